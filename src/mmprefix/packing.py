"""Token sequences -> a batch of rows, with the plan that says who sees whom.

This is the one place that pads. `collate` lays each sequence into a row of its own, padded on the right; `rows` puts
several into one, and nothing downstream changes, because every token carries its segment, branch, region and
position. All index maps are built here, in the data loader's workers, so that the training step never searches for
positions (`nonzero` would synchronise with the device).

Shapes: B rows, T tokens of a row, S sequences, I images, N image tokens of one image, P image tokens placed,
M scored target tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmprefix.masks import PADDING_SEGMENT, PrefixVisibility, TokenIndex, visible_pairs
from mmprefix.sequence import PREFIX_BRANCH, Region, TokenSequence


@dataclass(frozen=True, eq=False)
class PrefixPlan:
    """What attention and loss read of a batch, int64 tensors throughout.

    Attributes:
        segment: ``[B, T]`` sample within the row, `PADDING_SEGMENT` for padding.
        branch: ``[B, T]`` target within the sample, `PREFIX_BRANCH` in the prefix.
        region: ``[B, T]`` values of `Region`.
        position: ``[B, T]`` what the decoder's own rule (causal, sliding window) counts distances by.
        visibility: how prefix tokens see each other.
        label_positions: ``[M]`` index into the flattened ``[B * T]`` tokens whose hidden states predict the labels;
            None asks for logits everywhere.
        image_positions: ``[P]`` index into the flattened tokens of each image token; None where images are placed
            by their placeholder ids.
        image_sources: ``[P]`` index into the flattened ``[I * N]`` image tokens. One image may be placed several
            times, so that the encoder runs once for all questions about it.
    """

    segment: Tensor
    branch: Tensor
    region: Tensor
    position: Tensor
    visibility: PrefixVisibility = "full"
    label_positions: Tensor | None = None
    image_positions: Tensor | None = None
    image_sources: Tensor | None = None

    @classmethod
    def from_prompt(cls, attention_mask: Tensor, is_image: Tensor, is_target: Tensor | None = None,
                    visibility: PrefixVisibility = "full") -> PrefixPlan:  # fmt: skip
        """The plan of rows that hold one sample with at most one target each, padded on either side.

        Args:
            attention_mask: ``[B, T]``, 0 on padding.
            is_image: bool ``[B, T]``.
            is_target: bool ``[B, T]``; None for prompts, where every token is prefix.
            visibility: how prefix tokens see each other.
        """
        # Column indices rather than positions in the sample: they are what the decoder's own mask functions count
        # by when a cache is in use, and a row's padding shifts all of its tokens alike.
        position = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)
        segment = torch.where(attention_mask.bool(), 0, PADDING_SEGMENT)
        region = torch.where(is_image, int(Region.IMAGE), int(Region.INSTRUCTION))
        branch = torch.full_like(region, PREFIX_BRANCH)
        if is_target is not None:
            region = torch.where(is_target, int(Region.TARGET), region)
            branch = torch.where(is_target, 0, branch)
        return cls(segment, branch, region, position, visibility)

    @property
    def tokens(self) -> TokenIndex:
        """The tensors of the rule, ``[B, T]`` each."""
        return TokenIndex(self.segment, self.branch, self.region, self.position)

    def padded_to(self, length: int) -> PrefixPlan:
        """The plan with ``length`` columns, the new ones being generated tokens of the row's (only) sample.

        Static caches are longer than what was written to them; the library masks what lies ahead by its own rule.
        """
        extra = length - self.segment.shape[1]
        if extra <= 0:
            return self
        new_positions = torch.arange(self.segment.shape[1], length, device=self.segment.device)
        return replace(
            self,
            segment=F.pad(self.segment, (0, extra), value=0),
            branch=F.pad(self.branch, (0, extra), value=0),
            region=F.pad(self.region, (0, extra), value=int(Region.TARGET)),
            position=torch.cat([self.position, new_positions.expand(self.position.shape[0], -1)], dim=1),
        )


Batch = TypeVar("Batch", bound="PrefixPlan | PackedBatch | PromptBatch | EvaluationBatch")


class Reference(NamedTuple):
    """What is known of a sequence beside its tokens, for reports and metrics.

    Not a frozen dataclass: Lightning rebuilds what steps return, and knows named tuples.
    """

    id: str = ""
    image_id: str = ""
    kind: str = ""
    instruction: str = ""
    references: tuple[str, ...] = ()
    order: tuple[int, int] = (0, 0)
    """Record and sample in the split, by which gathered predictions are sorted."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used. ``fatal`` ones stop the run, in the main process."""

    shard: str
    key: str
    reason: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch as the model and the loss take it.

    Attributes:
        input_ids: int64 ``[B, T]``.
        attention_mask: int64 ``[B, T]``, 0 on padding.
        position_ids: int64 ``[B, T]``.
        plan: who sees whom, and the index maps.
        labels: int64 ``[M]``.
        target_lengths: int64 ``[M]``.
        pixel_values: float32 ``[I, 3, H, W]``; None in a batch without images.
        image_of: int64 ``[S]``, the image of each sequence.
        references: one for each sequence.
        bad: samples that were left out of this batch, and why.
        num_tokens: tokens that are not padding.
        visible_pairs: (query, key) pairs that attention has to compute, of one head of one layer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    plan: PrefixPlan
    labels: Tensor
    target_lengths: Tensor
    pixel_values: Tensor | None
    image_of: Tensor
    references: tuple[Reference, ...] = ()
    bad: tuple[BadSample, ...] = ()
    num_tokens: int = 0
    visible_pairs: int = 0

    @property
    def num_sequences(self) -> int:
        """Sequences (image + instruction) in this batch."""
        return self.image_of.numel()

    @property
    def padding_share(self) -> float:
        """Share of the batch's tokens that are padding, in [0, 1]."""
        return 1.0 - self.num_tokens / max(1, self.input_ids.numel())

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory; called by the DataLoader."""
        return map_tensors(self, Tensor.pin_memory)


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """The prefixes of a batch, padded on the left as `generate` takes them.

    Attributes:
        input_ids: int64 ``[S, T]``.
        attention_mask: int64 ``[S, T]``.
        pixel_values: float32 ``[I, 3, H, W]``.
        image_of: int64 ``[S]``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None
    image_of: Tensor


@dataclass(frozen=True, eq=False)
class EvaluationBatch:
    """A batch with its prefixes for generation, and with its targets for the loss where they are known.

    The images are those of ``prompts``; ``targets`` holds none of its own, so that they travel and are encoded once.
    """

    prompts: PromptBatch
    targets: PackedBatch | None
    references: tuple[Reference, ...]
    bad: tuple[BadSample, ...] = ()

    def pin_memory(self) -> EvaluationBatch:
        """The batch in page-locked memory; called by the DataLoader."""
        return map_tensors(self, Tensor.pin_memory)


def collate(
    sequences: Sequence[TokenSequence],
    image_of: Sequence[int],
    pixel_values: Tensor | None,
    *,
    pad_id: int,
    visibility: PrefixVisibility = "full",
    references: Sequence[Reference] = (),
    bad: Sequence[BadSample] = (),
    rows: Sequence[Sequence[int]] | None = None,
) -> PackedBatch:
    """Lays sequences into rows.

    Args:
        sequences: the S sequences; may be empty, for a batch whose samples were all bad.
        image_of: index of each sequence's image in ``pixel_values``.
        pixel_values: float ``[I, 3, H, W]`` or None.
        pad_id: id that fills the rows.
        visibility: how prefix tokens see each other.
        references: one for each sequence.
        bad: samples left out.
        rows: which sequences share a row, in this order; by default each has its own.
    """
    rows = [[s] for s in range(len(sequences))] if rows is None else rows
    num_rows = len(rows)
    num_columns = max((sum(len(sequences[s]) for s in row) for row in rows), default=0)
    shape = (num_rows, num_columns)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    segment = torch.full(shape, PADDING_SEGMENT, dtype=torch.long)
    branch = torch.full(shape, PREFIX_BRANCH, dtype=torch.long)
    region = torch.full(shape, int(Region.INSTRUCTION), dtype=torch.long)
    empty = torch.zeros(0, dtype=torch.long)
    label_positions, labels, target_lengths, image_positions, image_sources = ([empty] for _ in range(5))
    for r, row in enumerate(rows):
        start = 0
        for index_in_row, s in enumerate(row):
            sequence = sequences[s]
            columns = slice(start, start + len(sequence))
            input_ids[r, columns] = sequence.ids
            attention_mask[r, columns] = 1
            position_ids[r, columns] = sequence.positions
            segment[r, columns] = index_in_row
            branch[r, columns] = sequence.branches
            region[r, columns] = sequence.regions
            offset = r * num_columns + start
            label_positions.append(sequence.label_positions + offset)
            labels.append(sequence.labels)
            target_lengths.append(sequence.target_lengths)
            # Collation runs in the workers, on the CPU: searching here costs no synchronisation.
            image_tokens = (sequence.regions == Region.IMAGE).nonzero().squeeze(1)
            image_positions.append(image_tokens + offset)
            image_sources.append(torch.arange(image_tokens.numel()) + image_of[s] * image_tokens.numel())
            start += len(sequence)
    plan = PrefixPlan(
        segment, branch, region, position_ids, visibility,
        label_positions=torch.cat(label_positions),
        image_positions=torch.cat(image_positions),
        image_sources=torch.cat(image_sources),
    )  # fmt: skip
    return PackedBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        plan=plan,
        labels=torch.cat(labels),
        target_lengths=torch.cat(target_lengths),
        pixel_values=pixel_values,
        image_of=torch.tensor(image_of, dtype=torch.long),
        references=tuple(references),
        bad=tuple(bad),
        num_tokens=sum(len(sequence) for sequence in sequences),
        visible_pairs=sum(visible_pairs(sequence, visibility) for sequence in sequences),
    )


def collate_prompts(
    sequences: Sequence[TokenSequence], image_of: Sequence[int], pixel_values: Tensor | None, *, pad_id: int
) -> PromptBatch:
    """Pads the prefixes of the sequences on the left, so that every target starts in the same column."""
    prefixes = [sequence.ids[: sequence.prefix_length] for sequence in sequences]
    length = max((p.numel() for p in prefixes), default=0)
    input_ids = torch.full((len(prefixes), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prefix in enumerate(prefixes):
        input_ids[row, length - prefix.numel() :] = prefix
        attention_mask[row, length - prefix.numel() :] = 1
    return PromptBatch(input_ids, attention_mask, pixel_values, torch.tensor(image_of, dtype=torch.long))


def map_tensors(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Applies ``function`` to every tensor of a (nested, frozen) batch dataclass and returns the new batch."""
    changes: dict[str, Any] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = function(value)
        elif isinstance(value, PrefixPlan | PromptBatch | PackedBatch):
            changes[f.name] = map_tensors(value, function)
    return replace(batch, **changes)
