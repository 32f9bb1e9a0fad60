"""One sample as one token sequence: ids, regions, branches, positions and labels, built together so they cannot drift.

    [image tokens][BOS][instruction][separator]  |  [target 0][EOS]  [target 1][EOS] ...
    \\---------------- prefix -----------------/     \\-- branch 0 --/  \\-- branch 1 --/

Left of the bar is the prefix. Each target is a branch: it continues the prefix and knows nothing of the other
branches, so its positions start where the prefix ends. Everything after this module reads these tensors and derives
nothing again. This module knows ids only: no text, no tokenizer, no batch. It never truncates and never pads.

The picture is the plain layout (`TokenSequence.build`). A prefix may be any ids (`TokenSequence.from_ids`): with images
anywhere in it, several or none, and in the frame of a chat template.

Where image tokens don't depend on what is asked (`nested` visibility), several questions on one image share them, too
(`TokenSequence.on_one_image`): a tree of three levels. So they may where several images stand, or the same text in front.

    [image tokens]  |  [BOS][question 0][separator]  |  [target 0][EOS] ...
                       [BOS][question 1][separator]  |  [target 1][EOS] ...

Shapes: T tokens of the sequence, M scored target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
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
        """Builds the sequence of one sample with its images in front.

        Args:
            layout: framing token ids.
            num_image_tokens: how many tokens the vision encoder yields for the sample's images, 0 without one.
            instruction: token ids of the instruction, without BOS and separator.
            targets: token ids of each target, without EOS. Empty for a bare prefix, as generation needs it.

        Raises:
            InputError: the prefix would be empty, a target is empty, or text holds the image placeholder.
        """
        if layout.image in instruction:
            raise InputError(
                f"instruction: expected text without the image placeholder (token {layout.image}), "
                f"got it at token {list(instruction).index(layout.image)}"
            )
        bos = [] if layout.bos is None else [layout.bos]
        prefix = [*[layout.image] * num_image_tokens, *bos, *instruction, *layout.separator]
        return cls.from_ids(layout.image, prefix, targets, (layout.eos,))

    @classmethod
    def from_ids(
        cls, image: int, prefix: Sequence[int], targets: Sequence[Sequence[int]] = (), end: Sequence[int] = ()
    ) -> TokenSequence:
        """Builds the sequence of one sample from a whole prefix.

        Args:
            image: placeholder id; wherever it stands in the prefix, an image token does.
            prefix: token ids, framing included, a placeholder for each image token.
            targets: token ids of each target.
            end: token ids that follow each target and are learnt with it, the last of them ending generation.

        Raises:
            InputError: the prefix or a target is empty, or a target holds the image placeholder.
        """
        if not prefix:
            raise InputError("expected a prefix of at least one token, got no image, no instruction, no BOS")
        for branch, target in enumerate(targets):
            if len(target) == 0:
                raise InputError(f"target {branch}: expected at least one token, got an empty target")
            if image in target:
                raise InputError(
                    f"target {branch}: expected text without the image placeholder (token {image}), "
                    f"got it at token {list(target).index(image)}"
                )
        # Arrays: in lists a prefix of 1,024 image tokens takes as long as decoding a small picture.
        first = len(prefix)
        ids = np.array([*prefix, *(i for target in targets for i in (*target, *end))], dtype=np.int64)
        lengths = np.array([len(target) + len(end) for target in targets], dtype=np.int64)
        starts = first + np.cumsum(lengths) - lengths
        in_prefix = np.where(ids[:first] == image, int(Region.IMAGE), int(Region.INSTRUCTION))
        positions = np.arange(len(ids))
        label_positions = positions[first:] - 1
        label_positions[starts - first] = first - 1
        positions[first:] -= np.repeat(starts - first, lengths)
        columns = (
            ids,
            np.concatenate([in_prefix, np.full(len(ids) - first, int(Region.TARGET))]),
            np.repeat(np.arange(PREFIX_BRANCH, len(targets)), [first, *lengths]),
            np.zeros_like(ids),
            positions,
            label_positions,
            ids[first:].copy(),
            np.repeat(lengths, lengths),
        )
        return cls(*map(torch.from_numpy, columns))

    @classmethod
    def on_one_image(cls, sequences: Sequence[TokenSequence]) -> TokenSequence:
        """Several questions on the same images as one sequence, in which the image tokens stand once, in front.

        Loss and gradient equal those of the separate sequences wherever image tokens see image tokens only.

        Args:
            sequences: one question each, with the same images at the same positions.

        Raises:
            ValueError: image tokens that differ in number or position.
        """
        if len(sequences) == 1:
            return sequences[0]
        in_image = [s.regions == Region.IMAGE for s in sequences]
        images = [s.positions[here] for s, here in zip(sequences, in_image, strict=True)]
        if not all(torch.equal(images[0], others) for others in images):
            raise ValueError(f"expected questions on the same images, got {[len(i) for i in images]} image tokens")
        n, first = len(images[0]), sequences[0]
        fields = ("ids", "regions", "branches", "questions", "positions")
        parts = {name: [getattr(first, name)[in_image[0]]] for name in fields}
        label_positions, start, branch = [], n, 0
        for question, (s, here) in enumerate(zip(sequences, in_image, strict=True)):
            others = ~here
            for name in ("ids", "regions", "positions"):
                parts[name].append(getattr(s, name)[others])
            parts["branches"].append(
                torch.where(s.branches == PREFIX_BRANCH, PREFIX_BRANCH, s.branches + branch)[others]
            )
            parts["questions"].append(torch.full((len(s) - n,), question))
            # Where each token stands now. A question that ends with an image is predicted from its last token.
            place = torch.where(here, here.cumsum(0) - 1, others.cumsum(0) - 1 + start)
            label_positions.append(place[s.label_positions])
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
    def num_image_tokens(self) -> int:
        """Number of image tokens."""
        return int((self.regions == Region.IMAGE).sum())

    @property
    def image_positions(self) -> tuple[int, ...]:
        """Positions of the image tokens; questions on the same images share them only where these are equal."""
        return tuple(self.positions[self.regions == Region.IMAGE].tolist())

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
