#!/usr/bin/env python3
"""Kills runs of two sharded processes with SIGKILL, at steps and while they save, and times what a save costs training.

    python benchmarks/kills.py                         all cases, 20 kills each
    python benchmarks/kills.py --smoke                 all cases, one or two kills each
    python benchmarks/kills.py --cases steps --kills 5 --seed 1

- `steps`: one run of ``configs/digits.yaml`` with dropout under FSDP2, killed at random steps, once one of its processes and
  once all in turn (so ``--kills 20`` is 40 kills), and started again with ``--ckpt_path last``. Ids of all batches and the
  final weights are compared with an uninterrupted run's.
- `saves`: two processes save, save after save, tensors that all hold the number of their step, and are killed before,
  while and after files are written. The newest checkpoint must load, and hold one number.
- `stall`: seconds that training stands still for a checkpoint, written at once and in the background, by turns.

Exits with 1 unless all is as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
import torch.distributed
from resume import ROOT, checkpoints, command, finish

from mmprefix.training.checkpoints import CONTENT_KEY, TIED, newest_checkpoint, read_checkpoint
from mmprefix.training.saving import AtomicCheckpointIO

CASES = ("steps", "saves", "stall")


class LogBatches(pl.Callback):
    """Writes step, rank and ids of each batch after it was learned from."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        """A line for each."""
        ids = [reference.id for reference in batch.references]
        with open(self.path, "a") as file:
            file.write(json.dumps([trainer.global_step, trainer.global_rank, ids]) + "\n")


def batches_of(path: Path) -> list[tuple[tuple[int, int], tuple[str, ...]]]:
    """Step and rank, and ids, in the order in which they were learned from; a line may be cut by a kill."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [((s, rank), tuple(ids)) for s, rank, ids in (json.loads(line) for line in lines if line.endswith("\n"))]


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """At once, as far as that goes."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def steps_case(kills: int, epochs: int, seed: int) -> bool:
    """See the module."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)

        def arguments(run: str) -> list[str]:
            log = {"class_path": "kills.LogBatches", "init_args": {"path": str(work / f"{run}.ids")}}
            dropout = {"model.vision.kwargs.drop_path_rate": 0.1, "model.decoder.config.attention_dropout": 0.1}
            return [
                *command(epochs, work / run), "--trainer.devices", "2", "--trainer.strategy", "fsdp2",
                "--data.num_workers", "1", "--checkpoints.every_n_steps", "2", "--trainer.callbacks", json.dumps([log]),
                *(part for key, value in dropout.items() for part in (f"--{key}", str(value))),
            ]  # fmt: skip

        finish(arguments("whole"), work)
        whole = dict(batches_of(work / "whole.ids"))
        last_step = max(step for step, _ in whole)
        log, right = work / "killed.ids", True
        wanted = sorted(random.Random(seed).sample(range(3, last_step), 2 * kills))
        print("| killed | after step | ended after (s) | batches as in the uninterrupted run |\n|---|---|---|---|")
        for number, target in enumerate(wanted):
            before = len(batches_of(log))
            process = subprocess.Popen(
                [*arguments("killed"), "--ckpt_path", "last"], cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )  # fmt: skip
            end = time.monotonic() + 600
            while max((step for (step, _), _ in batches_of(log)[before:]), default=0) < target:
                if process.poll() is not None or time.monotonic() > end:
                    process.kill()
                    sys.exit(f"step {target} did not come")
                time.sleep(0.005)
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            # The first process starts the second, and tells it its rank; loader processes of the first have none.
            (second,) = (p for p in tree if p.ppid() == process.pid and p.environ().get("LOCAL_RANK") == "1")
            ranks = [tree[0], second]
            one = ranks[number // 2 % 2] if number % 2 == 0 else None
            kill_all(tree if one is None else [one])
            start = time.monotonic()
            _, alive = psutil.wait_procs(tree, timeout=120)
            kill_all(alive)
            process.wait()
            right &= not alive  # the others must end by themselves
            done = batches_of(log)
            same = sum(whole.get(key) == ids for key, ids in done[before:])
            right &= same == len(done) - before
            what = "all" if one is None else f"rank {number // 2 % 2}"
            print(
                f"| {what} | {target} | {time.monotonic() - start:.1f} | {same} of {len(done) - before} |", flush=True
            )
        finish([*arguments("killed"), "--ckpt_path", "last"], work)
        done = batches_of(log)
        wrong = sum(whole.get(key) != ids for key, ids in done)
        last = [read_checkpoint(checkpoints(work / run)[-1])["state_dict"] for run in ("whole", "killed")]
        equal = sum(torch.equal(last[0][n], last[1][n]) for n in last[0])
        missing = whole.keys() - {key for key, _ in done}
        print(
            f"{2 * kills} kills: {len(done)} batches learned from, {wrong} other than in the uninterrupted run, "
            f"{len(missing)} missing; {equal} of {len(last[0])} tensors bit-equal\n"
        )
        return right and not wrong and not missing and equal == len(last[0])


def write_forever(folder: Path) -> None:
    """One of two processes: saves tensors full of the number of their step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo")
    mesh, group = init_device_mesh("cpu", (2,)), torch.distributed.new_group(backend="gloo")
    newest = newest_checkpoint(folder)
    step = read_checkpoint(newest, None)["global_step"] if newest else 0
    io = AtomicCheckpointIO(asynchronous=True)
    while True:
        step += 1
        tensors = {str(n): distribute_tensor(torch.full((64, 4096), float(step)), mesh, [Shard(0)]) for n in range(24)}
        checkpoint = {"global_step": step, CONTENT_KEY: {}, TIED: {}, "state_dict": tensors, "optimizer_states": []}
        io.save_shards(checkpoint, folder / "checkpoints" / f"step={step:08d}.ckpt", group)
        if step > 2 and torch.distributed.get_rank() == 0:
            io.remove_checkpoint(folder / "checkpoints" / f"step={step - 2:08d}.ckpt")
        time.sleep(0.05)


def saves_case(kills: int, seed: int) -> bool:
    """See the module."""
    draw, right = random.Random(seed), True
    print("| kill | newest checkpoint | left behind | loads, of one step |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "checkpoints").mkdir()
        for kill in range(kills):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29700 + kill), "WORLD_SIZE": "2"}
            writers = [
                subprocess.Popen(
                    [sys.executable, __file__, "--writer", str(folder)], stderr=subprocess.DEVNULL,
                    env={**os.environ, **environment, "RANK": str(rank)},
                ) for rank in range(2)
            ]  # fmt: skip
            before, end = newest_checkpoint(folder), time.monotonic() + 120
            while newest_checkpoint(folder) == before:
                if any(w.poll() is not None for w in writers) or time.monotonic() > end:
                    kill_all([psutil.Process(w.pid) for w in writers])
                    sys.exit("no checkpoint came")
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.4))
            kill_all([psutil.Process(w.pid) for w in writers])
            for writer in writers:
                writer.wait()
            newest = newest_checkpoint(folder)
            assert newest is not None
            left = sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith("."))
            step = int(newest.stem.split("=")[1])
            saved = read_checkpoint(newest)
            one = all(bool((tensor == step).all()) for tensor in saved["state_dict"].values())
            good = one and saved["global_step"] == step and len(saved["state_dict"]) == 24
            right &= good
            print(
                f"| {kill + 1} | {newest.name} | {', '.join(left) or 'nothing'} | {'yes' if good else 'NO'} |",
                flush=True,
            )
    print()
    return right


def stall_case(rounds: int, megabytes: int) -> tuple[bool, list[dict[str, Any]]]:
    """See the module."""
    tensors = {str(n): torch.randn(1024, 1024) for n in range(megabytes // 4)}
    checkpoint = {"global_step": 1, CONTENT_KEY: {}, "state_dict": tensors, "optimizer_states": []}
    writers = {"at once": AtomicCheckpointIO(), "in the background": AtomicCheckpointIO(asynchronous=True)}
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        for turn in range(rounds + 1):
            for name, io in writers.items():
                path = Path(folder) / f"{name}.ckpt"
                start = time.perf_counter()
                io.save_checkpoint(checkpoint, path)
                took = time.perf_counter() - start
                io.wait()
                if turn:  # the first makes the memory for the copies
                    seconds[name].append(took)
        saved = [read_checkpoint(Path(folder) / f"{name}.ckpt")["state_dict"] for name in writers]
        assert all(torch.equal(saved[0][n], saved[1][n]) and torch.equal(saved[0][n], tensors[n]) for n in tensors)
    at_once, background = (statistics.median(values) for values in seconds.values())
    ratio = background / at_once
    print("| checkpoint (MB) | at once (s) | in the background (s) | share |\n|---|---|---|---|")
    print(f"| {megabytes} | {at_once:.3f} | {background:.3f} | **{100 * ratio:.1f}%** |\n")
    row = {
        "case": "stall", "size": f"{megabytes} MB", "device": "cpu", "metric": "seconds", "baseline": at_once,
        "value": background, "ratio": ratio, "command": " ".join(sys.argv),
        "versions": {"torch": torch.__version__},
    }  # fmt: skip
    return ratio <= 0.1, [row]


def main() -> None:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4, help="of the run that is killed at steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--writer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.writer is not None:
        write_forever(options.writer)
    kills = 1 if options.smoke else options.kills
    rows: list[dict[str, Any]] = []
    right = True
    if "saves" in options.cases:
        right &= saves_case(kills, options.seed)
    if "stall" in options.cases:
        good, rows = stall_case(1 if options.smoke else 7, 64 if options.smoke else 1024)
        right &= good or options.smoke
    if "steps" in options.cases:
        right &= steps_case(kills, 1 if options.smoke else options.epochs, options.seed)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
