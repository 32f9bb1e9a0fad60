"""A batch on its way from a worker process: one tensor in place of twenty.

PyTorch sends each tensor of a batch through a file descriptor of its own, asked for in a conversation between the
processes of its own, on the worker's side in a thread that waits for the interpreter: 24 ms for a batch of 20 tensors,
where decoding its 16 images takes 30. Page-locked memory is taken once for each tensor, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from mmprefix.packing import Batch, map_tensors

_ALIGNMENT = 64  # bytes; of any dtype


class _Slot(NamedTuple):
    """Where a tensor lies: of `dtype` and `shape`, `start` bytes behind the beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Parcel(Generic[Batch]):
    """A batch whose tensors lie in one.

    Attributes:
        batch: with a `_Slot` in place of each tensor.
        content: uint8 ``[bytes]``, the tensors one after the other.
    """

    batch: Batch
    content: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Parcel[Batch]:
        """Copies a batch of tensors on the CPU."""
        tensors: list[tuple[_Slot, Tensor]] = []
        end = 0

        def put(tensor: Tensor) -> _Slot:
            nonlocal end
            slot = _Slot(tensor.dtype, tuple(tensor.shape), end)
            end += slot.num_bytes + -slot.num_bytes % _ALIGNMENT
            tensors.append((slot, tensor))
            return slot

        batch = map_tensors(batch, put)
        parcel = cls(batch, torch.empty(end, dtype=torch.uint8))
        for slot, tensor in tensors:
            parcel._at(slot).copy_(tensor)
        return parcel

    def _at(self, slot: _Slot) -> Tensor:
        return self.content[slot.start : slot.start + slot.num_bytes].view(slot.dtype).view(slot.shape)

    def opened(self) -> Batch:
        """The batch; its tensors are views of `content`."""
        return map_tensors(self.batch, self._at, _Slot)

    def pin_memory(self) -> Parcel[Batch]:
        """The parcel in page-locked memory; called by the DataLoader."""
        return Parcel(self.batch, self.content.pin_memory())
