"""The prefix-LM rule: which query sees which key.

A query q sees a key k when both belong to the same sample and

- k is in the prefix (for prefix and target queries alike), or
- k is in the same target as q and not after it.

So no prefix token ever sees a target token. Prefix 3 of 7 (rows are queries, columns keys):

    full               nested (2 image tokens)   causal
    1 1 1 . . . .      1 1 . . . . .             1 . . . . . .
    1 1 1 . . . .      1 1 . . . . .             1 1 . . . . .
    1 1 1 . . . .      1 1 1 . . . .             1 1 1 . . . .
    1 1 1 1 . . .      1 1 1 1 . . .             1 1 1 1 . . .
    1 1 1 1 1 . .      1 1 1 1 1 . .             1 1 1 1 1 . .
    1 1 1 1 1 1 .      1 1 1 1 1 1 .             1 1 1 1 1 1 .
    1 1 1 1 1 1 1      1 1 1 1 1 1 1             1 1 1 1 1 1 1

`nested`: image tokens see image tokens only, so that they do not depend on the instruction; several questions on one
image may then share them, and don't see each other. `causal`: the decoder's own rule, for comparison. Padding belongs
to no sample: it sees nothing and nothing sees it.

This module knows neither batches nor models: its functions take index tensors and broadcast.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmprefix.sequence import PREFIX_BRANCH, Region, TokenSequence

PrefixVisibility = Literal["full", "nested", "causal"]

PADDING_SEGMENT = -1
"""Segment of padding tokens; samples count from 0 in each row."""

_IMAGE = int(Region.IMAGE)  # torch 2.15's compiler makes a tensor's comparison with an IntEnum a constant, False


class TokenIndex(NamedTuple):
    """What the rule needs to know of tokens: int64 tensors of one shape (or shapes that broadcast).

    Attributes:
        segment: which sample of its row a token belongs to, `PADDING_SEGMENT` for padding.
        branch: which target of its sample, `PREFIX_BRANCH` in the prefix.
        question: which instruction on the sample's image; read under `nested` only, where there may be several.
        region: values of `Region`.
        position: position inside the sample, as the decoder's own rule counts it.
    """

    segment: Tensor
    branch: Tensor
    question: Tensor
    region: Tensor
    position: Tensor


def prefix_lm_visible(q: TokenIndex, k: TokenIndex, visibility: PrefixVisibility, own_rule: Tensor) -> Tensor:
    """The rule above as a predicate.

    Args:
        q: the queries.
        k: the keys, broadcasting against the queries.
        visibility: how prefix tokens see each other.
        own_rule: bool, whether the decoder's own mask (causal, sliding window, ...) lets q see k.

    Returns:
        bool tensor of the broadcast shape, True where q sees k.
    """
    same_sample = (q.segment == k.segment) & (q.segment != PADDING_SEGMENT)
    k_in_prefix = k.branch == PREFIX_BRANCH
    if visibility == "full":
        prefix_part = k_in_prefix
    elif visibility == "nested":
        own_question = (q.region != _IMAGE) & (q.question == k.question)
        prefix_part = k_in_prefix & ((k.region == _IMAGE) | own_question)
    else:
        prefix_part = k_in_prefix & own_rule
    target_part = ~k_in_prefix & (q.branch == k.branch) & own_rule
    return same_sample & (prefix_part | target_part)


def dense_mask(tokens: TokenIndex, visibility: PrefixVisibility = "full") -> Tensor:
    """The rule over all pairs of tokens, with a plain causal decoder.

    Args:
        tokens: tensors of shape ``[..., T]``.

    Returns:
        bool ``[..., T, T]``, queries by keys. Rows of padding are all False.
    """
    q = TokenIndex(*(t.unsqueeze(-1) for t in tokens))
    k = TokenIndex(*(t.unsqueeze(-2) for t in tokens))
    return prefix_lm_visible(q, k, visibility, own_rule=k.position <= q.position)


def prefix_lm_mask(
    prefix_len: int, total: int, visibility: PrefixVisibility = "full", num_image_tokens: int = 0
) -> Tensor:
    """The mask of a single sample with one target, bool ``[total, total]``; the pictures above come from here."""
    index = torch.arange(total)
    region = torch.full((total,), int(Region.INSTRUCTION))
    region[:num_image_tokens] = Region.IMAGE
    region[prefix_len:] = Region.TARGET
    branch = torch.where(index < prefix_len, PREFIX_BRANCH, 0)
    zeros = torch.zeros_like(index)
    return dense_mask(TokenIndex(zeros, branch, zeros, region, index), visibility)


def visible_pairs(sequence: TokenSequence, visibility: PrefixVisibility = "full") -> int:
    """How many (query, key) pairs of a sample the rule lets see each other: the area of `dense_mask`, without drawing it.

    From lengths alone, so that a collator can afford it: T^2 entries of a long sample would cost more than its batch.
    """
    # In numpy: a batch holds hundreds of samples, and torch's calls on tensors this small are ten times as slow.
    branch, question = sequence.branches.numpy(), sequence.questions.numpy()
    in_prefix, in_image = branch == PREFIX_BRANCH, sequence.regions.numpy() == _IMAGE
    image = int(in_image.sum())
    instructions = np.bincount(question[in_prefix & ~in_image], minlength=int(question[-1]) + 1)
    if visibility == "full":
        pairs = int(in_prefix.sum()) ** 2
    elif visibility == "nested":
        pairs = image * image + int((instructions * (image + instructions)).sum())
    else:
        prefix = int(in_prefix.sum())
        pairs = prefix * (prefix + 1) // 2
    starts = np.flatnonzero(np.diff(branch, prepend=PREFIX_BRANCH) * ~in_prefix)  # first token of each target
    lengths = np.bincount(branch[~in_prefix])
    prefixes = image + instructions[question[starts]]
    return pairs + int((lengths * prefixes + lengths * (lengths + 1) // 2).sum())
