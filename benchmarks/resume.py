#!/usr/bin/env python3
"""Kills ``fit --config configs/digits.yaml`` with SIGKILL after an epoch, resumes it, and compares final weights.

    python benchmarks/resume.py                    4 epochs, killed once after each of the first 3
    python benchmarks/resume.py --smoke            2 epochs, killed after the first
    python benchmarks/resume.py --epochs 10

Prints a row for each kill and exits with 1 unless every tensor is bit-equal to the uninterrupted run's. The kill lands
wherever the process is when the checkpoint of that epoch has appeared, somewhere in the next epoch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def command(epochs: int, folder: Path) -> list[str]:
    """The command line of a run."""
    return [
        sys.executable, "-m", "mmprefix", "fit", "--config", str(ROOT / "configs" / "digits.yaml"),
        "--trainer.max_epochs", str(epochs), "--trainer.default_root_dir", str(folder),
    ]  # fmt: skip


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest last."""
    return sorted((folder / "checkpoints").glob("step=*.ckpt"))


def finish(arguments: list[str], cwd: Path) -> str:
    """Runs to the end; returns what it printed."""
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=1200)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def kill_after(epoch: int, arguments: list[str], cwd: Path, folder: Path, steps: int) -> None:
    """Starts a run and kills it once the checkpoint of ``epoch`` (from 1) is there."""
    wanted = folder / "checkpoints" / f"step={epoch * steps:08d}.ckpt"
    process = subprocess.Popen(arguments, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 600
    while not wanted.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            sys.exit(f"{wanted} did not appear")
        time.sleep(0.02)
    process.kill()
    process.wait()


def main() -> None:
    """One uninterrupted run, then one killed run for each epoch but the last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    epochs = 2 if options.smoke else options.epochs
    failed = False
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        finish(command(epochs, work / "whole"), work)
        last = checkpoints(work / "whole")[-1]
        whole = torch.load(last, weights_only=True)["state_dict"]
        steps = int(last.stem.split("=")[1]) // epochs
        print("| killed after epoch | resumed from | tensors | bit-equal |\n|---|---|---|---|")
        for epoch in range(1, epochs):
            folder = work / f"killed{epoch}"
            arguments = command(epochs, folder)
            kill_after(epoch, arguments, work, folder, steps)
            output = finish([*arguments, "--ckpt_path", "last"], work)
            start = output.split("resuming from ")[1].splitlines()[0].rsplit("/", 1)[1]
            weights = torch.load(checkpoints(folder)[-1], weights_only=True)["state_dict"]
            equal = sum(torch.equal(whole[n], weights[n]) for n in whole) if whole.keys() == weights.keys() else 0
            failed |= equal != len(whole)
            print(f"| {epoch} | {start} | {len(whole)} | {equal} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
