#!/usr/bin/env python3
"""Kills ``fit --config configs/digits.yaml`` with SIGKILL after an epoch, resumes it, and compares final weights.

    python benchmarks/resume.py                    4 epochs, killed once after each of the first 3
    python benchmarks/resume.py --smoke            2 epochs, killed after the first
    python benchmarks/resume.py --epochs 10
    python benchmarks/resume.py --kills 20         one run, killed at 20 random steps, checkpoints every 2 steps

Prints a row for each kill and exits with 1 unless every tensor is bit-equal to the uninterrupted run's. The kill lands
wherever the process is when the checkpoint of that epoch has appeared, somewhere in the next epoch.

With ``--kills``, the ids of every batch that was learned from are compared, too: each step of the run, also those that
were done again after a kill, must have had the very batch that it has in the uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
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


class LogIds(pl.Callback):
    """Writes the ids of each batch after it was learned from."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        """A line for each."""
        with open(self.path, "a") as file:
            file.write(json.dumps([trainer.global_step, [reference.id for reference in batch.references]]) + "\n")


def batches_of(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Step and ids of each batch in the order in which they were learned from; a line may be cut by a kill."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [(step, tuple(ids)) for step, ids in (json.loads(line) for line in lines if line.endswith("\n"))]


def killed_often(kills: int, epochs: int, seed: int = 0) -> bool:
    """One uninterrupted run and one that is killed at random steps; whether all is the same."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)

        def arguments(run: str) -> list[str]:
            folder = work / run / "checkpoints"
            callbacks = [
                {"class_path": "resume.LogIds", "init_args": {"path": str(work / f"{run}.ids")}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {
                    "dirpath": str(folder), "filename": "step={step:08d}", "auto_insert_metric_name": False,
                    "every_n_train_steps": 2, "save_top_k": -1}},
            ]  # fmt: skip
            return [
                *command(epochs, work / run),
                "--trainer.callbacks",
                json.dumps(callbacks),
                "--data.num_workers",
                "1",
            ]

        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        finish(arguments("whole"), work)
        whole = dict(batches_of(work / "whole.ids"))
        targets = sorted(random.Random(seed).sample(range(3, len(whole)), kills))
        print("| killed after step | steps done again | batches as in the uninterrupted run |\n|---|---|---|")
        log = work / "killed.ids"
        for target in targets:
            before = len(batches_of(log))
            resume = ["--ckpt_path", "last"] if checkpoints(work / "killed") else []
            process = subprocess.Popen(
                [*arguments("killed"), *resume], cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            end = time.monotonic() + 300
            while max((step for step, _ in batches_of(log)[before:]), default=0) < target:
                if process.poll() is not None or time.monotonic() > end:
                    process.kill()
                    sys.exit(f"step {target} did not come")
                time.sleep(0.005)
            process.kill()
            process.wait()
            done = batches_of(log)
            again = sum(step <= max((s for s, _ in done[:before]), default=0) for step, _ in done[before:])
            same = sum(whole.get(step) == ids for step, ids in done[before:])
            print(f"| {target} | {again} | {same} of {len(done) - before} |", flush=True)
        finish([*arguments("killed"), "--ckpt_path", "last"], work)
        done = batches_of(log)
        wrong = sum(whole.get(step) != ids for step, ids in done)
        last = [torch.load(checkpoints(work / run)[-1], weights_only=True)["state_dict"] for run in ("whole", "killed")]
        equal = sum(torch.equal(last[0][n], last[1][n]) for n in last[0])
        missing = whole.keys() - {step for step, _ in done}
        print(
            f"{kills} kills: {len(done)} batches learned from, {wrong} other than in the uninterrupted run, "
            f"{len(missing)} steps missing; {equal} of {len(last[0])} tensors bit-equal"
        )
        return not wrong and not missing and equal == len(last[0])


def main() -> None:
    """One uninterrupted run, then one killed run for each epoch but the last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--kills", type=int, metavar="N", help="one run, killed at N random steps")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.kills:
        sys.exit(0 if killed_often(options.kills, options.epochs) else 1)
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
