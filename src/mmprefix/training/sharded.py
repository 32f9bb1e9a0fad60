"""A checkpoint of many processes: a folder to which each writes its share of the tensors.

    step=00000280.ckpt/
      shard-00001-model-00001-of-00001.safetensors   tensors, or rows of them, one file of each process
      state.pt                                       all else: schedule, loops, data, config, versions

Tensors are named as in the one file of a single process: `state_dict.NAME` and `optimizer_states.I.NUMBER.NAME`. They are
written and read by PyTorch's distributed checkpoints (`torch.distributed.checkpoint`), as safetensors: nothing of them is
unpickled, and any number of processes reads what any other number wrote.

The folder is written under another name and renamed when all of it is there: what has the name of a checkpoint is complete.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mmprefix.errors import InputError, SaidElsewhereError

STATE_FILE = "state.pt"
WEIGHTS = "state_dict."
_OPTIMIZERS = "optimizer_states."


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor before it is read."""

    shape: torch.Size
    dtype: torch.dtype


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint as Lightning makes it -> tensors of model and optimizers by name, and all else."""
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    tensors = {WEIGHTS + name: value for name, value in checkpoint["state_dict"].items()}
    rest["optimizer_states"] = []
    for i, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for number, values in optimizer["state"].items():
            tensors.update({f"{_OPTIMIZERS}{i}.{number}.{name}": value for name, value in values.items()})
        rest["optimizer_states"].append({key: value for key, value in optimizer.items() if key != "state"})
    return tensors, rest


def join(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    checkpoint = dict(rest)
    weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
    checkpoint["state_dict"] = weights
    for i, optimizer in enumerate(rest.get("optimizer_states", [])):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"{_OPTIMIZERS}{i}."):
                number, key = name.removeprefix(f"{_OPTIMIZERS}{i}.").split(".")
                state.setdefault(int(number), {})[key] = value
        optimizer["state"] = state
    return checkpoint


def optimizer_tensors(infos: Mapping[str, TensorInfo], i: int) -> dict[str, tuple[int, str]]:
    """Of the tensors of the ``i``-th optimizer: stored name -> number of the parameter, name in its state."""
    found = {}
    for name in infos:
        if name.startswith(f"{_OPTIMIZERS}{i}."):
            number, key = name.removeprefix(f"{_OPTIMIZERS}{i}.").split(".")
            found[name] = int(number), key
    return found


def write(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], folder: Path, group: Any) -> None:
    """Writes a process's share; all processes of ``group`` (gloo) call it and return when the folder is complete.

    Raises:
        OSError: on all processes, if one can't write; what stood at ``folder`` is untouched.
    """
    first = torch.distributed.get_rank(group) == 0
    part = folder.with_name(f".{folder.name}.part")
    _together(group, lambda: _make_room(part) if first else None)
    _together(group, lambda: None if part.is_dir() else _not_shared(part))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(
                dict(tensors), storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True), process_group=group
            )  # fmt: skip
    except CheckpointException as error:
        raise _on_all(group, *_disk_error(error.failures)) from error
    _together(group, lambda: _complete(tensors, rest, part, folder) if first else None)


def _make_room(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
    part.mkdir(parents=True)


def _not_shared(part: Path) -> None:
    raise FileNotFoundError(
        f"{part.parent}: expected a folder that all nodes share, {os.uname().nodename} sees another"
    )


def _complete(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], part: Path, folder: Path) -> None:
    """All else, a look at whether all rows came, and the name."""
    found = infos(part)
    for name, tensor in tensors.items():
        if name not in found or found[name].shape != tensor.shape:
            raise FileNotFoundError(f"{part}: expected {name} {tuple(tensor.shape)} in it, got {found.get(name)}")
    with (part / STATE_FILE).open("wb") as file:
        torch.save(dict(rest), file)
        file.flush()
        os.fsync(file.fileno())
    _sync(part)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        os.rename(folder, old)
        os.rename(part, folder)
        remove(old)
    else:
        os.rename(part, folder)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(group: Any, work: Any) -> None:
    """Runs ``work``; an error of one process is raised by all."""
    problem = None
    try:
        work()
    except OSError as error:
        problem = (error.errno, str(error))
    problems: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(problems, problem, group=group)
    for rank, found in enumerate(problems):
        if found is not None:
            raise _on_all(group, found[0], f"{found[1]} (rank {rank})")


def _on_all(group: Any, number: int, message: str) -> OSError:
    """An error that all processes of ``group`` raise: the first says it."""
    kind = SaidElsewhereError if torch.distributed.get_rank(group) else OSError
    return kind(number, message)


def _disk_error(failures: Mapping[int, Any]) -> tuple[int, str]:
    """From what PyTorch says of each rank that could not write."""
    rank, (cause, _) = min(failures.items())
    while not isinstance(cause, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    return getattr(cause, "errno", None) or 5, f"{getattr(cause, 'strerror', None) or cause} (rank {rank})"


def remove(folder: Path) -> None:
    """Deletes a checkpoint; a kill in the middle leaves nothing that has the name of one."""
    if folder.name.startswith("."):
        doomed = folder
    else:
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
    shutil.rmtree(doomed)


def state(folder: Path) -> dict[str, Any]:
    """All but the tensors."""
    found: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    return found


def infos(folder: Path) -> dict[str, TensorInfo]:
    """Shapes and types of all tensors, from the headers of the files."""
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    found = {}
    for name, one in stored.items():
        assert isinstance(one, TensorStorageMetadata)
        rows = sum(chunk.sizes.numel() for chunk in one.chunks)
        if rows != one.size.numel():  # a file was lost: the largest offset says nothing of those before it
            missing = one.size.numel() - rows
            raise InputError(f"{folder}: expected all rows of {name} {tuple(one.size)}, {missing} values are missing")
        found[name] = TensorInfo(one.size, one.properties.dtype)
    return found


def read_into(tensors: dict[str, Tensor], folder: Path, group: Any = None) -> None:
    """Fills tensors, whole ones or this process's share of sharded ones, in place.

    Args:
        tensors: by stored name; of sharded ones all processes of ``group`` must have the same names.
        folder: the checkpoint.
        group: without one the process reads alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it reads alone
        reader = HuggingFaceStorageReader(str(folder))
        load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)  # type: ignore[arg-type]


def read(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors whose names begin so, on the CPU."""
    found = infos(folder).items()
    tensors = {name: torch.empty(one.shape, dtype=one.dtype) for name, one in found if name.startswith(prefix)}
    if tensors:
        read_into(tensors, folder)
    return tensors
