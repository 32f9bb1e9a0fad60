"""Token sequences -> a batch, with the plan that says who sees whom.

Two layouts. By default each sequence has a row of its own, padded on the right: what a dense mask wants, whose cost
grows with the square of a row. *Packed*, all sequences share one row without padding, prefixes first:

    full, causal   [prefix of a][prefix of b] ... | [targets of a][targets of b] ...
    nested         [image of a][image of b] ...   | [instructions of a] ... | [targets of a] ...

so that the queries of each attention call (`AttentionCall`) are one slice of the row. Nothing downstream depends on the layout,
because every token carries its segment, branch, question, region and position.

This is the one place that pads. All index maps are built here, in the data loader's workers, so that the training step
never searches for positions (`nonzero` would synchronise with the device).

Shapes: B rows, T tokens of a row, S sequences, I images, N image tokens of one image, D encoder width,
P image tokens placed, M scored target tokens of the batch (and, in a bucketed batch, labels that fill up).

Nobody changes a batch or a plan once it is made. They are not frozen, because Lightning, which casts inputs for
`precision: bf16-true` by setting the fields of a copy, refuses frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmprefix.masks import PADDING_SEGMENT, PrefixVisibility, TokenIndex, visible_pairs
from mmprefix.sequence import IGNORE_INDEX, PREFIX_BRANCH, Region, TokenSequence
from mmprefix.varlen import AttentionCall


@dataclass(eq=False)
class PrefixPlan:
    """What attention and loss read of a batch, int64 tensors throughout.

    Attributes:
        segment: ``[B, T]`` sample within the row, `PADDING_SEGMENT` for padding.
        branch: ``[B, T]`` target within the sample, `PREFIX_BRANCH` in the prefix.
        question: ``[B, T]`` instruction within the sample.
        region: ``[B, T]`` values of `Region`.
        position: ``[B, T]`` what the decoder's own rule (causal, sliding window) counts distances by.
        visibility: how prefix tokens see each other.
        label_positions: ``[M]`` index into the flattened ``[B * T]`` tokens whose hidden states predict the labels;
            None asks for logits everywhere.
        label_rows: of a packed row, ``[R]`` the columns that `label_positions` name, each once, in order; in a bucketed
            batch with others that fill up. The last layer's outputs are read nowhere else.
        image_positions: ``[P]`` index into the flattened tokens of each image token; None where images are placed
            by their placeholder ids.
        image_sources: ``[P]`` index into the flattened ``[I * N]`` image tokens. One image may be placed several
            times, so that the encoder runs once for all questions about it.
        calls: of a packed row, the attention calls that are the rule without a mask; empty elsewhere.
        unpadded: of prompts, all of equal length: generation may do without masks, too.
    """

    segment: Tensor
    branch: Tensor
    question: Tensor
    region: Tensor
    position: Tensor
    visibility: PrefixVisibility = "full"
    label_positions: Tensor | None = None
    label_rows: Tensor | None = None
    image_positions: Tensor | None = None
    image_sources: Tensor | None = None
    calls: tuple[AttentionCall, ...] = ()
    unpadded: bool = False

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
        return cls(segment, branch, torch.zeros_like(branch), region, position, visibility)

    @property
    def tokens(self) -> TokenIndex:
        """The tensors of the rule, ``[B, T]`` each."""
        return TokenIndex(self.segment, self.branch, self.question, self.region, self.position)

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
            question=F.pad(self.question, (0, extra), value=0),
            region=F.pad(self.region, (0, extra), value=int(Region.TARGET)),
            position=torch.cat([self.position, new_positions.expand(self.position.shape[0], -1)], dim=1),
        )


Batch = TypeVar("Batch", bound="AttentionCall | PrefixPlan | PackedBatch | PromptBatch | EvaluationBatch")


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
    dataset: str = ""
    """Name of its set, where the split has several."""


@dataclass
class BadSample:
    """A sample that could not be used. ``fatal`` ones stop the run, in the main process."""

    shard: str
    key: str
    reason: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


@dataclass(eq=False)
class PackedBatch:
    """A batch as the model and the loss take it.

    Attributes:
        input_ids: int64 ``[B, T]``.
        attention_mask: int64 ``[B, T]``, 0 on padding.
        position_ids: int64 ``[B, T]``.
        plan: who sees whom, and the index maps.
        labels: int64 ``[M]``.
        target_lengths: int64 ``[M]``.
        pixel_values: uint8 ``[I, 3, H, W]``, or float, normalised; None in a batch without images.
        image_of: int64 ``[S, K]``, the images of each sequence, in order, -1 where it has fewer than others.
        references: one for each sequence.
        bad: samples that were left out of this batch, and why.
        num_tokens: tokens that are not padding.
        num_samples: instructions (each on an image).
        image_features: bfloat16 ``[I, N, D]``, what the encoder gives for the images, in place of ``pixel_values``.
        visible_pairs: (query, key) pairs that attention has to compute, of one head of one layer.
        label_datasets: int64 ``[M]``, number of the set that each label is of, where the split has several.
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
    num_samples: int = 0
    image_features: Tensor | None = None
    visible_pairs: int = 0
    label_datasets: Tensor | None = None

    @property
    def padding_share(self) -> float:
        """Share of the batch's tokens that are padding, in [0, 1]."""
        return 1.0 - self.num_tokens / max(1, self.input_ids.numel())


@dataclass(eq=False)
class PromptBatch:
    """The prefixes of a batch, padded on the left as `generate` takes them.

    Attributes:
        input_ids: int64 ``[S, T]``.
        attention_mask: int64 ``[S, T]``.
        pixel_values: uint8 ``[I, 3, H, W]``, or float, normalised.
        image_of: int64 ``[S, K]``, the images of each prompt, in order, -1 where it has fewer than others.
        image_features: bfloat16 ``[I, N, D]``, what the encoder gives for the images, in place of ``pixel_values``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None
    image_of: Tensor
    image_features: Tensor | None = None


@dataclass(eq=False)
class EvaluationBatch:
    """A batch with its prefixes for generation, and with its targets for the loss where they are known.

    The images are those of ``prompts``; ``targets`` holds none of its own, so that they travel and are encoded once.
    """

    prompts: PromptBatch
    targets: PackedBatch | None
    references: tuple[Reference, ...]
    bad: tuple[BadSample, ...] = ()


_ROUND_MAX = 64
"""What the bounds of attention calls are rounded up to: a compiled step is compiled anew when one changes."""


def collate(
    sequences: Sequence[TokenSequence],
    image_of: Sequence[int | Sequence[int]],
    pixel_values: Tensor | None,
    *,
    pad_id: int,
    visibility: PrefixVisibility = "full",
    references: Sequence[Reference] = (),
    bad: Sequence[BadSample] = (),
    packed: bool = False,
    bucket: int = 1,
    dataset_of: Sequence[int] = (),
) -> PackedBatch:
    """Lays sequences into rows.

    Args:
        sequences: the S sequences; may be empty, for a batch whose samples were all bad.
        image_of: indices of each sequence's images in ``pixel_values``, in the order of their placeholders; a number
            stands for one image.
        pixel_values: uint8 ``[I, 3, H, W]``, or float, normalised; or None.
        pad_id: id that fills the rows.
        visibility: how prefix tokens see each other.
        references: one for each sample.
        bad: samples left out.
        packed: all sequences in one row, with attention calls, instead of a row for each.
        bucket: what the lengths of a packed row's parts, and the number of labels, are rounded up to.
        dataset_of: number of the set that each sequence is of, where that is of interest.
    """
    images = _as_tuples(image_of)
    lengths = [len(sequence) for sequence in sequences]
    offsets = np.cumsum([0, *lengths])
    calls: tuple[AttentionCall, ...] = ()
    # Which token stands where: index into the concatenated sequences for each column, -1 for padding.
    if packed and sequences:
        order, calls = _pack(sequences, offsets, visibility, bucket)
        order = order[None]
    else:
        order = np.full((len(sequences), max(lengths, default=0)), -1, dtype=np.int64)
        for row, (start, length) in enumerate(zip(offsets, lengths, strict=False)):
            order[row, :length] = np.arange(start, start + length)
    is_token = torch.from_numpy(order >= 0)
    source = torch.from_numpy(order).clamp(min=0)
    empty = torch.zeros(0, dtype=torch.long)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(sequence, name) for sequence in sequences] or [empty])

    def placed(values: Tensor, padding: int) -> Tensor:
        return values[source].masked_fill_(~is_token, padding)

    column_of = torch.empty(int(offsets[-1]), dtype=torch.long)
    column_of[source[is_token]] = is_token.flatten().nonzero().squeeze(1)
    number = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths, dtype=torch.long))
    regions, positions = joined("regions"), placed(joined("positions"), 0)
    label_positions = column_of[_offset([sequence.label_positions for sequence in sequences], offsets)]
    label_rows = _rows_of(label_positions, order.shape[1], bucket) if calls else None
    more_labels = (0, -label_positions.numel() % bucket)
    label_positions = F.pad(label_positions, more_labels)
    plan = PrefixPlan(
        segment=placed(number if packed else torch.zeros_like(number), PADDING_SEGMENT),
        branch=placed(joined("branches"), PREFIX_BRANCH),
        question=placed(joined("questions"), 0),
        region=placed(regions, int(Region.INSTRUCTION)),
        position=positions,
        visibility=visibility,
        label_positions=label_positions,
        label_rows=label_rows,
        # Collation runs in the workers, on the CPU: searching here costs no synchronisation.
        image_positions=column_of[(regions == Region.IMAGE).nonzero().squeeze(1)],
        image_sources=_image_sources(sequences, images),
        calls=calls,
    )
    label_datasets = None
    if dataset_of:
        numbers = torch.tensor([s.labels.numel() for s in sequences], dtype=torch.long)
        label_datasets = F.pad(torch.repeat_interleave(torch.tensor(dataset_of), numbers), more_labels)
    return PackedBatch(
        input_ids=placed(joined("ids"), pad_id),
        attention_mask=is_token.long(),
        position_ids=positions,
        plan=plan,
        labels=F.pad(joined("labels"), more_labels, value=IGNORE_INDEX),
        target_lengths=F.pad(joined("target_lengths"), more_labels, value=1),
        pixel_values=pixel_values,
        image_of=_image_table(images),
        references=tuple(references),
        bad=tuple(bad),
        num_tokens=sum(lengths),
        num_samples=sum(sequence.num_questions for sequence in sequences),
        visible_pairs=sum(visible_pairs(sequence, visibility) for sequence in sequences),
        label_datasets=label_datasets,
    )


def _offset(indices: Sequence[Tensor], offsets: np.ndarray) -> Tensor:
    """Indices into each sequence -> indices into all of them, joined."""
    moved = [index + int(start) for index, start in zip(indices, offsets, strict=False)]
    return torch.cat(moved) if moved else torch.zeros(0, dtype=torch.long)


def _rows_of(label_positions: Tensor, length: int, bucket: int) -> Tensor:
    """The columns that predict a label, each once; in a bucketed batch with others, to a multiple of the bucket."""
    rows = label_positions.unique()
    missing = min(_round_up(rows.numel(), bucket), length) - rows.numel()
    if not missing:
        return rows
    others = torch.ones(length, dtype=torch.bool).index_fill_(0, rows, False).nonzero().squeeze(1)
    return torch.cat([rows, others[:missing]]).sort().values


def _image_sources(sequences: Sequence[TokenSequence], image_of: Sequence[tuple[int, ...]]) -> Tensor:
    sources = [torch.zeros(0, dtype=torch.long)]
    for sequence, images in zip(sequences, image_of, strict=True):
        number = sequence.num_image_tokens
        if number and (not images or number % len(images)):
            raise ValueError(f"expected images for {number} image tokens, got {len(images)}")
        each = number // len(images) if images else 0
        sources += [torch.arange(each) + image * each for image in images]
    return torch.cat(sources)


def _image_table(image_of: Sequence[tuple[int, ...]]) -> Tensor:
    """int64 ``[S, K]``, the images of each sequence in order, -1 where it has fewer than others."""
    most = max(map(len, image_of), default=0)
    return torch.tensor([[*images, *[-1] * (most - len(images))] for images in image_of], dtype=torch.long).view(
        len(image_of), most
    )


def _as_tuples(image_of: Sequence[int | Sequence[int]]) -> list[tuple[int, ...]]:
    return [(images,) if isinstance(images, int) else tuple(images) for images in image_of]


class _Block(NamedTuple):
    """Tokens of one sequence that see the same: indices into the joined sequences, own and in front."""

    own: np.ndarray
    ancestors: tuple[np.ndarray, ...]


def _blocks(sequence: TokenSequence, offset: int, visibility: PrefixVisibility) -> list[list[_Block]]:
    """The blocks of a sequence by level: prefix and targets, or under `nested` images, instructions and targets."""
    nested = visibility == "nested"
    branch = sequence.branches.numpy()
    question = sequence.questions.numpy() if nested else np.zeros_like(branch)
    level = (branch != PREFIX_BRANCH).astype(np.int64)
    if nested:
        level += sequence.regions.numpy() != Region.IMAGE
    # Images may stand between parts of the text: what sees the same is put together, each in its own order.
    order = np.lexsort((branch, question, level))
    level, question, branch = level[order], question[order], branch[order]
    changes = np.diff(level, prepend=-1) | np.diff(question, prepend=-1) | np.diff(branch, prepend=-2)
    starts = np.flatnonzero(changes)
    levels: list[list[_Block]] = [[] for _ in range(3 if nested else 2)]
    instruction_of: dict[int, _Block] = {}
    for start, stop in zip(starts, [*starts[1:], len(branch)], strict=True):
        here = int(level[start])
        # What stands in front of a block: the images, and the instruction of its own question, which may have none.
        in_front = list(levels[0]) if here else []
        if here == 2 and int(question[start]) in instruction_of:
            in_front.append(instruction_of[int(question[start])])
        block = _Block(order[start:stop] + offset, tuple(one.own for one in in_front))
        if nested and here == 1:
            instruction_of[int(question[start])] = block
        levels[here].append(block)
    return levels


def _pack(
    sequences: Sequence[TokenSequence], offsets: np.ndarray, visibility: PrefixVisibility, bucket: int
) -> tuple[np.ndarray, tuple[AttentionCall, ...]]:
    """The one row of all sequences, level by level, and a call for each level."""
    by_level: list[list[_Block]] = [[] for _ in range(3 if visibility == "nested" else 2)]
    for sequence, offset in zip(sequences, offsets, strict=False):
        for blocks, own in zip(by_level, _blocks(sequence, int(offset), visibility), strict=True):
            blocks.extend(own)
    order: list[np.ndarray] = []
    column_of = np.empty(int(offsets[-1]), dtype=np.int64)
    calls, start = [], 0
    for level, blocks in enumerate(by_level):
        # By shape: neighbours of one shape are one call of a kernel on the CPU.
        blocks = sorted(blocks, key=lambda b: (sum(map(len, b.ancestors)), len(b.own)))
        queries = [len(b.own) for b in blocks]
        order += [b.own for b in blocks]
        stop = start
        for block in blocks:
            column_of[block.own] = np.arange(stop, stop + len(block.own))
            stop += len(block.own)
        # Padding is a block of its own, and sees itself.
        padding = -(stop - start) % bucket
        order.append(np.full(padding, -1, dtype=np.int64))
        padded = np.arange(stop, stop + padding)
        stop += padding
        if stop > start:
            keys, key_lengths, more = None, queries, 0
            if level:
                key_columns = [column_of[part] for b in blocks for part in (*b.ancestors, b.own)]
                key_lengths = [sum(map(len, (*b.ancestors, b.own))) for b in blocks]
                more = -(sum(key_lengths) + padding) % bucket  # further keys of the padding's
                keys = torch.from_numpy(np.concatenate([*key_columns, padded, np.zeros(more, dtype=np.int64)]))
            if padding or more:
                queries, key_lengths = [*queries, padding], [*key_lengths, padding + more]
            calls.append(AttentionCall(
                start, stop, keys, _cumulative(queries, bucket), _cumulative(key_lengths, bucket),
                bound_of(max(queries)), bound_of(max(key_lengths)),
                causal=level == len(by_level) - 1 or visibility == "causal",
            ))  # fmt: skip
        start = stop
    return np.concatenate(order), tuple(calls)


def _cumulative(lengths: Sequence[int], bucket: int) -> Tensor:
    """Where blocks begin, int32; in a bucketed batch with empty blocks at the end."""
    sums = np.cumsum([0, *lengths], dtype=np.int32)
    missing = -len(sums) % min(bucket, 16)
    return torch.from_numpy(np.concatenate([sums, np.full(missing, sums[-1])]))


def bound_of(length: int) -> int:
    """`AttentionCall.max_q` or ``max_k`` of a call whose longest block has so many tokens."""
    return _round_up(length, _ROUND_MAX)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def first_fit(lengths: Sequence[int], max_tokens: int, max_items: int) -> list[list[int]]:
    """First-fit decreasing: items, longest first, each into the first bin that has room for it.

    Needs at most 11/9 of the fewest bins possible (Johnson 1973), and far less with many short items.

    Args:
        lengths: of the items, in tokens.
        max_tokens: of a bin.
        max_items: of a bin.

    Returns:
        The items of each bin, as indices into ``lengths``.

    Raises:
        ValueError: an item longer than a bin.
    """
    if len(lengths) and max(lengths) > max_tokens:
        raise ValueError(f"expected items of at most {max_tokens} tokens, got one of {max(lengths)}")
    # A tree over the room of the bins: each node holds the largest below it, so that the first bin with enough of it
    # is found in log2(n) steps.
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [max_tokens] * (2 * leaves)
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, node = lengths[item], 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        number = node - leaves
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        room[node] = room[node] - length if len(bins[number]) < max_items else -1
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def group_by_length(
    lengths: Sequence[int], rows: Sequence[int], max_tokens: int, max_items: int
) -> list[list[int]]:  # fmt: skip
    """Items of like length together, so that rows padded to the longest of a bin hold little padding.

    Args:
        lengths: of the longest row of each item, in tokens.
        rows: of each item.
        max_tokens: of a bin, padding included.
        max_items: of a bin.

    Raises:
        ValueError: an item that doesn't fit into a bin.
    """
    bins: list[list[int]] = []
    longest = used = 0
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], -rows[i])):
        if lengths[item] * rows[item] > max_tokens:
            raise ValueError(f"expected items of at most {max_tokens} tokens, got one of {lengths[item] * rows[item]}")
        if not bins or (used + rows[item]) * longest > max_tokens or len(bins[-1]) == max_items:
            bins.append([])
            longest, used = lengths[item], 0
        bins[-1].append(item)
        used += rows[item]
    return bins


def collate_prompts(
    sequences: Sequence[TokenSequence],
    image_of: Sequence[int | Sequence[int]],
    pixel_values: Tensor | None,
    *,
    pad_id: int,
) -> PromptBatch:
    """Pads the prefixes of the sequences on the left, so that every target starts in the same column."""
    prefixes = [sequence.ids[: sequence.prefix_length] for sequence in sequences]
    length = max((p.numel() for p in prefixes), default=0)
    input_ids = torch.full((len(prefixes), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prefix in enumerate(prefixes):
        input_ids[row, length - prefix.numel() :] = prefix
        attention_mask[row, length - prefix.numel() :] = 1
    return PromptBatch(input_ids, attention_mask, pixel_values, _image_table(_as_tuples(image_of)))


def pack_prompts(
    prompts: Sequence[Tensor], image: int, *, pad_id: int, visibility: PrefixVisibility = "full"
) -> PackedBatch:
    """Prompts in one row, as `collate` packs sequences, each with a label (0, which says nothing) at its last token: there
    the first token of its target is predicted.

    Args:
        prompts: int64 ``[T]`` each, on the CPU, at least one token.
        image: id of the image placeholder. Image tokens are taken as they come, prompt by prompt.
        pad_id: see `collate`.
        visibility: see `collate`.
    """
    sequences = []
    for ids in prompts:
        prefix = TokenSequence.from_ids(image, ids.tolist())
        last, one = torch.tensor([len(ids) - 1]), torch.ones(1, dtype=torch.long)
        sequences.append(replace(prefix, label_positions=last, labels=torch.zeros_like(one), target_lengths=one))
    # One image each stands for all of a prompt's, whose tokens are counted here, not whose images.
    image_of = [(0,) if sequence.num_image_tokens else () for sequence in sequences]
    batch = collate(sequences, image_of, None, pad_id=pad_id, visibility=visibility, packed=True)
    number = sum(sequence.num_image_tokens for sequence in sequences)
    return replace(batch, plan=replace(batch.plan, image_sources=torch.arange(number)))


def map_tensors(batch: Batch, function: Callable[[Any], Any], kind: type = Tensor) -> Batch:
    """Applies ``function`` to every tensor of a (nested) batch dataclass and returns the new batch.

    Args:
        batch: with tensors.
        function: of one.
        kind: what it is applied to, where something else stands in place of tensors.
    """
    changes: dict[str, Any] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, kind):
            changes[f.name] = function(value)
        elif isinstance(value, PrefixPlan | PromptBatch | PackedBatch):
            changes[f.name] = map_tensors(value, function, kind)
        elif f.name == "calls":
            changes[f.name] = tuple(map_tensors(call, function, kind) for call in value)
    return replace(batch, **changes)
