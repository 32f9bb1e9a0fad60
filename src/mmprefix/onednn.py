"""Linear layers on the CPU in float32, without gradients, by oneDNN.

PyTorch's eager mode multiplies them by a BLAS that is slow where a few rows meet a large weight, as in decoding
(`benchmarks/decode.py`) and for the logits of targets. Half precision goes to oneDNN by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WORTHWHILE = 1 << 20
"""Elements of a weight from which on a layer gains: each call costs more than the BLAS's."""


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of float ``rows [..., D]``, ``weight [V, D]`` and ``bias [V]``, which keeps nothing for a backward pass."""
    if (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    ):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
        return out
    return F.linear(rows, weight, bias)


class _Linear(nn.Linear):
    """A linear layer for the time of `linears_by_onednn`."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if (
            weight.numel() < _WORTHWHILE
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            # Weights in four bits or in shards, and what is traced, compute in their own ways.
            or type(weight) is not nn.Parameter
            or type(input) is not Tensor
        ):
            return F.linear(input, weight, bias)  # `super()` fails where another thread has just taken this class back
        return linear(input, weight, bias)


@contextmanager
def linears_by_onednn(model: nn.Module) -> Iterator[None]:
    """For passes of a model without gradients: its large linear layers are `linear`, if they are on the CPU.

    Layers that are compiled stay as they are, to be found as they were compiled; so do subclasses of `nn.Linear`.
    """
    found = list(_plain_linears(model)) if next(model.parameters()).device.type == "cpu" else []
    for layer in found:
        layer.__class__ = _Linear
    try:
        yield
    finally:
        for layer in found:
            layer.__class__ = nn.Linear


def _plain_linears(module: nn.Module) -> Iterator[nn.Linear]:
    if module._compiled_call_impl is not None:
        return
    if type(module) is nn.Linear:
        yield module
    for child in module.children():
        yield from _plain_linears(child)
