"""How a sharded model gets its first weights: each process makes its own rows, a tensor at a time.

The model is built without memory for its weights (`lazy`), taken apart on the meta device, and then filled. A process holds
its share and, above it, what one tensor or one file needs, never the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mmprefix.errors import InputError
from mmprefix.lazy import Deferred, Recording

_Built = TypeVar("_Built")


def built_lazily(build: Callable[[], _Built]) -> tuple[_Built, Recording | None]:
    """What ``build`` makes, recorded; made as ever, and said so, where a library can't be followed.

    Returns:
        with the recording, None of what was made.

    Raises:
        InputError: as ``build`` does.
    """
    state, recording = torch.get_rng_state(), Recording()
    try:
        with recording:
            return build(), recording
    except InputError:
        raise
    except Exception as error:  # whatever a library raises that looks for values behind PyTorch's back
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rank_zero_info(f"start: each process makes the whole model, which can't be made a share at a time ({reason})")
    torch.set_rng_state(state)
    return build(), None


def rows_of(parameter: Tensor) -> tuple[int, int, Tensor]:
    """First row and number of rows that this process has of a parameter, and the memory for them.

    Args:
        parameter: sharded along its first dimension, or whole.

    Raises:
        RuntimeError: one that is sharded along another.
    """
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0] if parameter.ndim else 1, parameter.detach()
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if tuple(shape[1:]) != tuple(parameter.shape[1:]) or any(offset[1:]):
        raise RuntimeError(f"expected rows of {tuple(parameter.shape)}, got {tuple(shape)} from {tuple(offset)}")
    local: Tensor = parameter.to_local().detach()
    return (offset[0] if math.prod(shape) else 0), shape[0], local


def fill(model: nn.Module, deferred: Deferred, device: torch.device) -> None:
    """Makes this process's share of each parameter; all processes call it.

    Args:
        model: that ``deferred`` is of, sharded or not, parameters on the meta device.
        deferred: used up.
        device: of the parameters.

    Raises:
        InputError: on all processes, where one can't; rank 0's says which and why, the others' are empty.
    """
    tied = _tied(model)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)
    for owner, name, first in tied:  # by now each place may have memory of its own
        owner._parameters[name] = model.get_parameter(first)

    def work() -> None:
        targets: dict[str, tuple[int, int, Callable[[Tensor], Any]]] = {}
        for name in deferred.names:
            start, number, memory = rows_of(model.get_parameter(name))
            targets[name] = start, number, memory.copy_
        with _as_built():
            deferred.fill(targets)

    _together(work)


def _tied(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Second places of parameters: module, name there, full name of the first place."""
    first: dict[int, str] = {}
    found = []
    for full, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, name = full.rpartition(".")
        if first.setdefault(id(parameter), full) != full:
            found.append((model.get_submodule(owner), name, first[id(parameter)]))
    return found


@contextmanager
def _as_built() -> Iterator[None]:
    """Lightning's contexts around `configure_model` change the default device and precision."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(default)


def _together(work: Callable[[], Any]) -> None:
    """Runs ``work``; where one process fails, all do."""
    problem = ""
    try:
        work()
    except Exception as error:  # a file that has gone, memory that is not there: the others would wait without end
        if not _distributed():
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not _distributed():
        return
    problems = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found:
            first = torch.distributed.get_rank() == 0
            raise InputError(f"rank {rank}: cannot make its share of the model: {found}" if first else "")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
