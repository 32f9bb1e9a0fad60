"""One sample as one token sequence: ids, regions, branches, positions and labels, built together so they cannot drift.

    [image tokens][BOS][instruction][separator]  |  [target 0][EOS]  [target 1][EOS] ...
    \\---------------- prefix -----------------/     \\-- branch 0 --/  \\-- branch 1 --/

Left of the bar is the prefix. Each target is a branch: it continues the prefix and knows nothing of the other
branches, so its positions start where the prefix ends. Everything after this module reads these tensors and derives
nothing again. This module knows ids only: no text, no tokenizer, no batch. It never truncates and never pads.

Where image tokens don't depend on what is asked (`nested` visibility), several questions on one image share them, too
(`TokenSequence.on_one_image`): a tree of three levels.

    [image tokens]  |  [BOS][question 0][separator]  |  [target 0][EOS] ...
                       [BOS][question 1][separator]  |  [target 1][EOS] ...

Shapes: T tokens of the sequence, M scored target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from mmprefix.errors import InputError

IGNORE_INDEX = -100
"""Label of a position that is not scored, the value that `torch.nn.functional.cross_entropy` skips."""

PREFIX_BRANCH = -1
"""Branch of every prefix token; targets count from 0."""


class Region(IntEnum):
    """What a token is. BOS and separator belong to the instruction, EOS to its target."""

    IMAGE = 0
    INSTRUCTION = 1
    TARGET = 2


@dataclass(frozen=True)
class PromptLayout:
    """The token ids that frame instruction and target.

    Attributes:
        image: placeholder id at image positions. It is never looked up in the decoder's embedding.
        bos: id before the instruction, or None for a tokenizer without one.
        separator: ids between instruction and target; may be empty.
        eos: id that ends every target.
    """

    image: int
    bos: int | None
    separator: tuple[int, ...]
    eos: int


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One sample's tokens. All tensors are int64.

    Attributes:
        ids: ``[T]`` token ids; `PromptLayout.image` at image positions.
        regions: ``[T]`` values of `Region`.
        branches: ``[T]`` `PREFIX_BRANCH` in the prefix, k in target k (counted over all questions).
        questions: ``[T]`` which instruction on the image an instruction or target token belongs to; 0 in the image.
        positions: ``[T]`` position ids; every target starts at the length of its prefix.
        label_positions: ``[M]`` index of the token whose hidden state predicts label m.
        labels: ``[M]`` the token to predict. The label of the last prefix position is the first token of a target
            (of each target, when there are several), and EOS is the last label of each.
        target_lengths: ``[M]`` number of labels of the target that label m belongs to.
    """

    ids: Tensor
    regions: Tensor
    branches: Tensor
    questions: Tensor
    positions: Tensor
    label_positions: Tensor
    labels: Tensor
    target_lengths: Tensor

    @classmethod
    def build(
        cls,
        layout: PromptLayout,
        num_image_tokens: int,
        instruction: Sequence[int],
        targets: Sequence[Sequence[int]] = (),
    ) -> TokenSequence:
        """Builds the sequence of one sample.

        Args:
            layout: framing token ids.
            num_image_tokens: how many tokens the vision encoder yields for the sample's image, 0 without one.
            instruction: token ids of the instruction, without BOS and separator.
            targets: token ids of each target, without EOS. Empty for a bare prefix, as generation needs it.

        Raises:
            InputError: the prefix would be empty, a target is empty, or text holds the image placeholder.
        """
        for name, text in (("instruction", instruction), *((f"target {k}", t) for k, t in enumerate(targets))):
            if layout.image in text:
                raise InputError(
                    f"{name}: expected text without the image placeholder (token {layout.image}), "
                    f"got it at token {list(text).index(layout.image)}"
                )
        bos = [] if layout.bos is None else [layout.bos]
        text_prefix = [*bos, *instruction, *layout.separator]
        ids = [layout.image] * num_image_tokens + text_prefix
        prefix_length = len(ids)
        if prefix_length == 0:
            raise InputError("expected a prefix of at least one token, got no image, no instruction, no BOS")
        regions = [Region.IMAGE] * num_image_tokens + [Region.INSTRUCTION] * len(text_prefix)
        branches = [PREFIX_BRANCH] * prefix_length
        positions = list(range(prefix_length))
        label_positions: list[int] = []
        labels: list[int] = []
        target_lengths: list[int] = []
        for branch, target in enumerate(targets):
            if len(target) == 0:
                raise InputError(f"target {branch}: expected at least one token, got an empty target")
            start, length = len(ids), len(target) + 1
            scored = [*target, layout.eos]
            ids += scored
            regions += [Region.TARGET] * length
            branches += [branch] * length
            positions += range(prefix_length, prefix_length + length)
            label_positions += [prefix_length - 1, *range(start, start + length - 1)]
            labels += scored
            target_lengths += [length] * length
        return cls(*(torch.tensor(column, dtype=torch.long) for column in (
            ids, regions, branches, [0] * len(ids), positions, label_positions, labels, target_lengths,
        )))  # fmt: skip

    @classmethod
    def on_one_image(cls, sequences: Sequence[TokenSequence]) -> TokenSequence:
        """Several questions on one image as one sequence, in which the image tokens stand once.

        Loss and gradient equal those of the separate sequences wherever image tokens see image tokens only.

        Args:
            sequences: one question each, with the same image in front.

        Raises:
            ValueError: different numbers of image tokens.
        """
        images = [int((s.regions == Region.IMAGE).sum()) for s in sequences]
        if len(set(images)) != 1:
            raise ValueError(f"expected questions on one image, got {images} image tokens")
        if len(sequences) == 1:
            return sequences[0]
        n, first = images[0], sequences[0]
        parts: dict[str, list[Tensor]] = {
            "ids": [first.ids[:n]], "regions": [first.regions[:n]], "branches": [first.branches[:n]],
            "questions": [first.questions[:n]], "positions": [first.positions[:n]],
        }  # fmt: skip
        label_positions, start, branch = [], n, 0
        for question, s in enumerate(sequences):
            for name, values in (("ids", s.ids), ("regions", s.regions), ("positions", s.positions)):
                parts[name].append(values[n:])
            in_prefix = s.branches == PREFIX_BRANCH
            parts["branches"].append(torch.where(in_prefix, PREFIX_BRANCH, s.branches + branch)[n:])
            parts["questions"].append(torch.full_like(s.ids[n:], question))
            # A question without text is predicted from the last image token.
            in_image = s.label_positions < n
            label_positions.append(torch.where(in_image, s.label_positions, s.label_positions - n + start))
            start += len(s) - n
            branch += s.num_targets
        return cls(
            **{name: torch.cat(values) for name, values in parts.items()},
            label_positions=torch.cat(label_positions),
            labels=torch.cat([s.labels for s in sequences]),
            target_lengths=torch.cat([s.target_lengths for s in sequences]),
        )

    def __len__(self) -> int:
        return self.ids.numel()

    @property
    def prefix_length(self) -> int:
        """Number of prefix tokens, which stand in front where there is one question."""
        return int((self.branches == PREFIX_BRANCH).sum())

    @property
    def num_questions(self) -> int:
        """Number of instructions on the image."""
        return int(self.questions.max()) + 1

    @property
    def num_targets(self) -> int:
        """Number of targets (branches)."""
        return int(self.branches.max()) + 1

    def split(self) -> list[TokenSequence]:
        """One sequence for each target, each with the whole prefix; for decoders that cannot branch. Of one question."""
        sequences = []
        in_prefix = self.branches == PREFIX_BRANCH
        starts = self.label_positions == self.prefix_length - 1
        label_branch = starts.cumsum(0) - 1
        for branch in range(self.num_targets):
            kept = in_prefix | (self.branches == branch)
            of_branch = label_branch == branch
            length = int(of_branch.sum())
            sequences.append(TokenSequence(
                self.ids[kept], self.regions[kept], self.branches[kept].clamp(max=0), self.questions[kept],
                self.positions[kept],
                torch.arange(length) + self.prefix_length - 1, self.labels[of_branch], self.target_lengths[of_branch],
            ))  # fmt: skip
        return sequences

    def prefix(self) -> TokenSequence:
        """The same sample without its targets, as generation starts from it. Of one question."""
        n = self.prefix_length
        empty = self.labels.new_empty(0)
        return TokenSequence(
            self.ids[:n], self.regions[:n], self.branches[:n], self.questions[:n], self.positions[:n],
            empty, empty, empty,
        )  # fmt: skip
