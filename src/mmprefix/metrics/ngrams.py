"""Tokenised captions and their n-grams as integers: what BLEU and CIDEr count, counted once for both.

Legend: I images, R references of all images together, E entries (distinct n-grams of a caption, all captions
together), G distinct n-grams.

Every caption is split at white space, as the official scorers do, and every n-gram becomes an integer: the id of an
n-gram is that of the pair (id of its first n - 1 words, id of its last word), made dense by sorting. So no tuple of
strings is built or hashed, and counting is sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mmprefix.errors import InputError

MAX_ORDER = 4
"""BLEU-4 and CIDEr: n-grams of one to four words."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Entries:
    """Distinct n-grams of captions, sorted by caption.

    Attributes:
        caption: int64 ``[E]``, whose; its position among predictions, or among all references.
        gram: int64 ``[E]``, which.
        count: int64 ``[E]``, how often there.
    """

    caption: Integers
    gram: Integers
    count: Integers


@dataclass(frozen=True)
class Order:
    """All n-grams of one length.

    Attributes:
        num_grams: G.
        predictions, references: what captions consist of.
        match: int64, for each entry of ``references`` the position of the same n-gram in ``predictions``, in the
            caption of the same image; -1 where that does not have it.
    """

    num_grams: int
    predictions: Entries
    references: Entries
    match: Integers


@dataclass(frozen=True)
class CaptionCorpus:
    """Tokenised captions of a split: all that a corpus score may depend on.

    Attributes:
        predictions: one for each image, tokens joined by single spaces.
        references: for each image at least one.

    Raises:
        InputError: there is no image, an image has no references, or there are more of the ones than of the others.
    """

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if len(self.predictions) != len(self.references):
            raise InputError(
                f"expected references for each prediction, got {len(self.predictions)} predictions and"
                f" {len(self.references)} sets of references"
            )
        if not self.predictions:
            raise InputError("expected at least one prediction to score, got an empty split")
        for position, references in enumerate(self.references):
            if isinstance(references, str) or not references:
                raise InputError(f"image {position}: expected a list of at least one reference, got {references!r}")

    @cached_property
    def num_references(self) -> Integers:
        """int64 ``[I]``."""
        return np.fromiter(map(len, self.references), np.int64, len(self.references))

    @cached_property
    def image_of_reference(self) -> Integers:
        """int64 ``[R]``."""
        return np.repeat(np.arange(len(self.references)), self.num_references)

    @cached_property
    def _tokens(self) -> tuple[Integers, Integers]:
        """Ids of all words, predictions first, then references, and the number of words in each caption."""
        vocabulary: dict[str, int] = {}
        ids: list[int] = []
        lengths: list[int] = []
        for caption in chain(self.predictions, chain.from_iterable(self.references)):
            words = caption.split()
            lengths.append(len(words))
            ids.extend([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        return np.array(ids, np.int64), np.array(lengths, np.int64)

    @cached_property
    def prediction_lengths(self) -> Integers:
        """int64 ``[I]``, in words."""
        return self._tokens[1][: len(self.predictions)]

    @cached_property
    def reference_lengths(self) -> Integers:
        """int64 ``[R]``, in words."""
        return self._tokens[1][len(self.predictions) :]

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        """The n-grams of one word, of two, of three, of four."""
        words, lengths = self._tokens
        caption = np.repeat(np.arange(len(lengths)), lengths)
        remaining = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))
        num_words = int(words.max(initial=0)) + 1
        start = np.arange(len(words))
        grams = words
        orders = []
        for n in range(1, MAX_ORDER + 1):
            if n > 1:
                keep = remaining[start] >= n
                start = start[keep]
                # Dense ids stay below the number of words in the corpus, so the product is far below 2**63.
                grams = np.unique(grams[keep] * num_words + words[start + n - 1], return_inverse=True)[1]
            orders.append(self._count(caption[start], grams))
        return tuple(orders)

    def _count(self, caption: Integers, gram: Integers) -> Order:
        num_grams = int(gram.max(initial=-1)) + 1
        keys, counts = np.unique(caption * num_grams + gram, return_counts=True)
        caption, gram = np.divmod(keys, max(num_grams, 1))
        border = int(np.searchsorted(caption, len(self.predictions)))
        predictions = Entries(caption[:border], gram[:border], counts[:border])
        references = Entries(caption[border:] - len(self.predictions), gram[border:], counts[border:])
        # An image's prediction has the image's own number.
        wanted = self.image_of_reference[references.caption] * num_grams + references.gram
        match = np.searchsorted(keys[:border], wanted)
        found = np.append(keys[:border], -1)[match] == wanted
        return Order(num_grams, predictions, references, np.where(found, match, -1))
