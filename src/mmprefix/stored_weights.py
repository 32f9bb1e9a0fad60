"""Pretrained weights that stay in their files until they are wanted.

safetensors files are mapped into memory: a model that is loaded in the precision of its files costs none until somebody reads
its values, and then pages of the kernel's cache, which all processes of a host share and which go when memory is wanted.
Training wants float32. Under full sharding a process makes its share of that layer by layer (`training.fsdp`), so that the
whole of it is nowhere.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from mmprefix.last_layer import layers_of_decoder

_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names of the safetensors format; of these, each value is one of float32."""


def stored_dtype(source: str | os.PathLike[str]) -> torch.dtype | None:
    """The precision of all tensors in a model's safetensors files; None where they differ, or there are no such files.

    Args:
        source: hub name or local folder.
    """
    try:
        found = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        names = [SAFE_WEIGHTS_NAME]
        if found is not None:
            names = sorted(set(json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"].values()))
        dtypes = set()
        for name in names:
            path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if path is None:
                return None
            with safe_open(path, "pt") as file:
                dtypes |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
        return None  # what is wrong with them is said when they are loaded
    return _STORED_DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built have no memory for their parameters; their buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def take_buffers(model: nn.Module, exact: nn.Module) -> None:
    """Replaces buffers that no file holds: built in half precision, frequencies and scales are rounded to it.

    Args:
        model: whose buffers are replaced.
        exact: the same model, built in float32.
    """
    for name, module in model.named_modules():
        other = exact.get_submodule(name)
        for key in module._non_persistent_buffers_set:
            if module._buffers[key] is not None:
                module._buffers[key] = other._buffers[key]


def float32_in_mapping(tensor: Tensor) -> Tensor:
    """A copy of a tensor of any shape, float32 on the CPU, in memory of its own, which goes back when it is freed.

    From the heap it would not: shards, which stay, come to lie between what is freed.
    """
    if not tensor.numel():
        return tensor.to("cpu", torch.float32)
    memory = mmap.mmap(-1, tensor.numel() * torch.float32.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32).view(tensor.shape).copy_(tensor)


@contextmanager
def computing_in_float32(decoder: PreTrainedModel) -> Iterator[None]:
    """Passes over a decoder with weights in half precision, on the CPU, compute as if they were float32.

    Many CPUs are slow in half precision, and what the decoder is asked about itself should not depend on it. Each layer is
    made float32 when it runs, in memory that the next one takes over; what is outside of layers, while this is entered.
    For forward passes only. Other decoders are left alone.
    """
    if decoder.dtype not in (torch.bfloat16, torch.float16) or decoder.device.type != "cpu":
        yield
        return
    layers = layers_of_decoder(decoder) or ()
    tensors_of = {layer: _half_precision(layer) for layer in layers}
    inside = {id(tensor) for tensors in tensors_of.values() for tensor in tensors}
    stored: dict[int, tuple[Tensor, Tensor]] = {}
    free: dict[torch.Size, list[Tensor]] = {}

    def make(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) not in stored:
                stored[id(tensor)] = tensor, tensor.data
                taken = free.get(tensor.shape)
                tensor.data = taken.pop().copy_(tensor.data) if taken else float32_in_mapping(tensor.data)

    def put_back(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in stored:
                free.setdefault(tensor.shape, []).append(tensor.data)
                tensor.data = stored.pop(id(tensor))[1]

    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        make(tensors_of[layer])

    def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        put_back(tensors_of[layer])

    hooks: list[Any] = []
    with torch.no_grad():
        try:
            make([t for t in _half_precision(decoder) if id(t) not in inside])
            for layer in layers:
                hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
            yield
        finally:
            for hook in hooks:
                hook.remove()
            put_back([tensor for tensor, _ in list(stored.values())])


def _half_precision(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
