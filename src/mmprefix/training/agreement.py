"""Processes of one run must have the same code and the same settings, or they learn different things together.

Nodes of a cluster are installed one by one; a job that mixes them trains, and nobody notices.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed

import mmprefix
from mmprefix.errors import InputError

PACKAGES = ("torch", "lightning", "transformers", "timm")


def identity(settings: str) -> dict[str, str]:
    """What must be the same: versions, the package's own sources, and settings; ``host`` may differ."""
    digest = hashlib.sha256()
    for path in sorted(Path(mmprefix.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {
        "host": os.uname().nodename, **{name: version(name) for name in PACKAGES},
        "mmprefix": f"{mmprefix.__version__} ({digest.hexdigest()[:12]})", "settings": settings,
    }  # fmt: skip


def difference(of_ranks: Sequence[Mapping[str, str]]) -> str | None:
    """The first rank that differs from rank 0, and in what, in one line; None where all are alike."""
    first = of_ranks[0]
    for rank, own in enumerate(of_ranks):
        for name in (*PACKAGES, "mmprefix", "settings"):
            expected, got = first[name], own[name]
            if expected == got:
                continue
            if name == "settings":
                lines = zip(f"{expected}\n(end)".splitlines(), f"{got}\n(end)".splitlines(), strict=False)
                expected, got = next((a.strip(), b.strip()) for a, b in lines if a != b)
            return f"rank {rank} ({own['host']}): expected the {name} of rank 0 ({first['host']}), {expected!r}, got {got!r}"
    return None


@contextmanager
def together() -> Iterator[None]:
    """All processes come here: what is wrong for one of them is raised by all, and said by the first that it is wrong for.

    Else the others would wait for one that has gone. The others' `InputError` is empty.
    """
    problem: str | None = None
    cause: InputError | None = None
    try:
        yield
    except InputError as error:
        problem, cause = str(error), error
    problems = [problem]
    rank = 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        problems = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, problem)
    first = next((i for i, found in enumerate(problems) if found is not None), None)
    if first is not None:
        raise InputError(problems[rank] if rank == first else "") from cause


class Agreement(pl.Callback):
    """Compares all processes before the first of them trains."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See `difference`.

        Raises:
            InputError: on all processes; rank 0's says why, the others' are empty.
        """
        if trainer.world_size == 1:
            return
        found: list[dict[str, str]] = [{}] * trainer.world_size
        torch.distributed.all_gather_object(found, identity(str(pl_module.settings)))
        problem = difference(found)
        with together():
            if problem is not None:
                raise InputError(problem)
