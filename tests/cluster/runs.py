"""What the rigs share: a small training run of two ranks, what it logged, and what it must end with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONFAULTHANDLER": "1",
    "OMP_NUM_THREADS": "1",  # sums must not depend on the number of threads
    # This checkout, and beside it the callback that logs ids.
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    "PYTHON": sys.executable,
}
EPOCHS = 4


class RigError(RuntimeError):
    """What a rig expected and did not get."""


def digits(folder: Path, name: str) -> list[str]:
    """Settings of ``fit``: digits on two ranks, sharded; 27 steps an epoch. Logs into ``name.jsonl``."""
    log = [{"class_path": "tests.test_resume.LogIds", "init_args": {"path": str(folder / f"{name}.jsonl")}}]
    return [
        "--config", str(ROOT / "configs" / "digits.yaml"), "--config", str(ROOT / "configs" / "fsdp.yaml"),
        "--trainer.accelerator", "cpu", "--trainer.max_epochs", str(EPOCHS), "--trainer.enable_progress_bar", "false",
        "--trainer.callbacks", json.dumps(log), "--trainer.default_root_dir", str(folder / name),
        "--data.dataset_folder", str(folder / "digits"), "--data.batch_size", "16",
        # A loader process gets the signals of its group, too.
        "--data.num_workers", "1",
    ]  # fmt: skip


def steps_of(log: Path) -> list[dict[str, Any]]:
    """Lines of ids, in the order in which they were learned from; the last may be cut by a kill."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(log: Path) -> int:
    """The latest step that was logged."""
    return max((line["step"] for line in steps_of(log)), default=0)


def await_(what: str, condition: Callable[[], Any], seconds: float, pause: float = 0.02) -> Any:
    """Waits until a condition is true, and returns what it gave.

    Raises:
        RigError: it did not become true.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise RigError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)
    return found


def compare(folder: Path, name: str, whole: str, *, exactly_once: bool) -> str:
    """Holds a run against the uninterrupted one: the samples of each step on each rank, and the final weights.

    Args:
        folder: of both.
        name: of the run.
        whole: of the uninterrupted one.
        exactly_once: no step was done twice; else only that repeated steps had the same samples.

    Returns:
        What is the same, in words.

    Raises:
        RigError: naming the first difference.
    """
    expected = {
        (line["step"], line["rank"]): (line["epoch"], line["ids"]) for line in steps_of(folder / f"{whole}.jsonl")
    }
    found = [
        ((line["step"], line["rank"]), (line["epoch"], line["ids"])) for line in steps_of(folder / f"{name}.jsonl")
    ]
    for key, content in found:
        if expected.get(key) != content:
            raise RigError(f"{name}: step and rank {key}: expected {expected.get(key)}, got {content}")
    missing = sorted(expected.keys() - {key for key, _ in found})
    if missing:
        raise RigError(f"{name}: {len(missing)} steps are missing, the first {missing[:3]} (step, rank)")
    again = len(found) - len(expected)
    if exactly_once and again:
        raise RigError(f"{name}: {again} steps were done twice")
    weights = [safetensors.torch.load_file(folder / run / "model" / "model.safetensors") for run in (whole, name)]
    different = [n for n in weights[0] if not torch.equal(weights[0][n], weights[1][n])]
    if weights[0].keys() != weights[1].keys() or different:
        raise RigError(f"{name}: {len(different)} of {len(weights[0])} tensors differ: {', '.join(different[:3])}")
    steps = len(expected) // 2
    return f"{steps} steps, {again // 2} done again, {len(weights[0])} of {len(weights[0])} tensors bit-equal"


def finish(process: subprocess.Popen[str], what: str, seconds: float) -> int:
    """Waits for a process; one that hangs is killed, after it has written where it is.

    Raises:
        RigError: it hung.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        process.send_signal(signal.SIGABRT)
        time.sleep(5)
        process.kill()
        process.wait()
        raise RigError(f"{what}: did not end within {seconds:g} s") from error


def versions() -> str:
    """For the head of a result."""
    from importlib.metadata import version

    return f"Python {sys.version.split()[0]}, torch {version('torch')}, lightning {version('lightning')}"
