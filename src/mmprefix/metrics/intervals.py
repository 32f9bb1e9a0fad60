"""How sure a mean over a split is: bootstrap intervals, and a paired test of two models.

Items that share an image are not independent, so images are drawn, each with all of its items. Everything follows from the
seed and the set of items, not from their order. Pure numpy; seconds for 200,000 items.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap, 1993 (percentile interval, ch. 13; permutation test, ch. 15);
the p-value counts the observed arrangement among the drawn ones (Davison and Hinkley, Bootstrap Methods, 1997, eq. 4.11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprefix.errors import InputError

RESAMPLES = 1000
PERMUTATIONS = 10_000
LEVEL = 0.95
_AT_ONCE = 1 << 22
"""Numbers drawn at once: 32 MiB."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same items.

    Attributes:
        difference: mean of b minus a.
        low, high: its bootstrap interval.
        p_value: of a two-sided test that there is none: how often a difference as large comes about when, image by image, it is
            left to chance which of the two models is which.
    """

    difference: float
    low: float
    high: float
    p_value: float


def mean_interval(
    scores: Sequence[float] | Floats,
    images: Sequence[Any] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        scores: (N,) one for each item.
        images: (N,) which image an item is about; None where each has its own.
        level: 0.95 leaves out 2.5% on either side.
        resamples: how often a split of as many images is drawn.
        seed: of the draws.

    Returns:
        Lower and upper bound; both the mean itself where there is a single image.

    Raises:
        InputError: no items, of other numbers, or a level outside of (0, 1).
    """
    values = _scores(scores)
    (interval,) = sums_intervals(
        np.stack([values, np.ones(len(values))]), lambda sums: sums[:1] / sums[1], images,
        level=level, resamples=resamples, seed=seed,
    )  # fmt: skip
    return interval


def sums_intervals(
    counts: Floats,
    score: Callable[[Floats], Floats],
    images: Sequence[Any] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """The same for what is computed from sums over the items, as BLEU is: of each draw, the sums come first.

    Args:
        counts: (S, N) what is added up, of each item.
        score: (S, R) sums of R draws -> (M, R) scores.
        images, level, resamples, seed: see `mean_interval`.

    Returns:
        For each of the M scores its lower and upper bound.

    Raises:
        InputError: as `mean_interval`.
    """
    _check_level(level)
    sums = _by_image(counts, images)
    scores = [
        score(np.stack([of_images[drawn].sum(axis=1) for of_images in sums]))
        for drawn in _draws(sums.shape[1], resamples, seed)
    ]
    return [_percentiles(row, level) for row in np.concatenate(scores, axis=1)]


def statistic_interval(
    statistic: Callable[[NDArray[np.int64]], float],
    num_items: int,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The same for what isn't a mean: ``statistic`` gets (num_items,) indices of the items that were drawn, with repeats.

    Raises:
        InputError: no items, or a level outside of (0, 1).
    """
    if num_items < 1:
        raise InputError("expected one or more items, got none")
    _check_level(level)
    values = [statistic(row) for drawn in _draws(num_items, resamples, seed) for row in drawn]
    return _percentiles(np.asarray(values, dtype=np.float64), level)


def paired_test(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    images: Sequence[Any] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> PairedTest:
    """Is one model better than the other on these items?

    Args:
        a, b: (N,) scores of the two models, of the same items in the same order.
        images: (N,) which image an item is about; None where each has its own.
        level, resamples: of the interval.
        permutations: draws of the test; the p-value can't be less than ``1 / (permutations + 1)``.
        seed: of the draws.

    Raises:
        InputError: no items, or of other numbers.
    """
    first, second = _scores(a), _scores(b)
    if first.shape != second.shape:
        raise InputError(f"expected two scores of each item, got {first.shape} and {second.shape}")
    difference = second - first
    low, high = mean_interval(difference, images, level=level, resamples=resamples, seed=seed)
    (sums,) = _by_image(difference[None], images)
    generator = np.random.default_rng(seed)
    observed, extreme = abs(sums.sum()), 0
    # Sums of the same numbers in another order differ by rounding, and are as extreme.
    least = observed - 1e-9 * max(1.0, float(np.abs(sums).sum()))
    for rows in _chunks(permutations, len(sums)):
        signs = generator.integers(0, 2, size=(rows, len(sums)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= least).sum())
    return PairedTest(float(difference.mean()), low, high, (1 + extreme) / (1 + permutations))


def _scores(scores: Any) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise InputError(f"expected one or more scores, got an array of shape {values.shape}")
    return values


def _by_image(counts: Floats, images: Sequence[Any] | None) -> Floats:
    """(S, N) counts of items -> (S, I) their sums over each image, in an order that doesn't depend on theirs."""
    if images is None:
        return counts[:, np.lexsort(counts)]
    if len(images) != counts.shape[1]:
        raise InputError(f"expected an image for each of {counts.shape[1]} items, got {len(images)}")
    numbers: dict[Any, int] = {}
    group = np.fromiter((numbers.setdefault(image, len(numbers)) for image in images), np.int64, counts.shape[1])
    # Floating-point sums depend on their order, if only in the last bit.
    order = np.lexsort((*counts, group))
    sums: Floats = np.stack([np.bincount(group[order], weights=row[order]).astype(np.float64) for row in counts])
    return sums[:, np.lexsort(sums)]


def _draws(num: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """(R, num) indices, for so many R as fit into memory, until there are ``resamples`` rows."""
    generator = np.random.default_rng(seed)
    for rows in _chunks(resamples, num):
        yield generator.integers(0, num, size=(rows, num))


def _chunks(total: int, width: int) -> Iterator[int]:
    if total < 1:
        raise InputError(f"expected one or more draws, got {total}")
    at_once = max(1, _AT_ONCE // width)
    for start in range(0, total, at_once):
        yield min(at_once, total - start)


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    outside = (1 - level) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"expected a level between 0 and 1, got {level}")
