"""How sure a mean of per-item scores is: bootstrap intervals, and a paired test of two systems on the same items.

Items of one group (questions on the same image) are drawn together: they are not independent, and intervals that take
them as such are too narrow. Everything is seeded, and needs numpy only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

_LEVEL = 0.95


class PairedTest(NamedTuple):
    """Mean of ``first - second``, its 95% interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    samples: int = 1000,
) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean (Efron, 1979).

    Args:
        values: float ``[n]``, one score an item.
        groups: of each item; groups are drawn whole. None: each item is one.
        seed: of the draws.
        samples: how often is drawn.

    Raises:
        ValueError: no values, or another number of groups than of values.
    """
    sums, counts = _by_group(values, groups)
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    for n in range(samples):
        drawn = generator.integers(0, len(sums), len(sums))
        means[n] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def paired_test(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    samples: int = 1000,
) -> PairedTest:
    """Sign-flip permutation test of the mean difference of two systems' scores on the same items, groups flipped whole.

    Args:
        first: float ``[n]``.
        second: float ``[n]``, of the same items.
        groups: of each item, as in `bootstrap_interval`.
        seed: of the draws.
        samples: permutations; the smallest p-value is ``1 / (samples + 1)``.

    Raises:
        ValueError: no values, or lengths that differ.
    """
    if len(first) != len(second):
        raise ValueError(f"expected scores of the same items, got {len(first)} and {len(second)}")
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    sums, _ = _by_group(difference, groups)
    generator = np.random.default_rng(seed)
    observed, as_large = abs(sums.sum()), 0
    for _ in range(samples):
        flipped = abs((sums * generator.choice((-1.0, 1.0), len(sums))).sum())
        as_large += bool(flipped >= observed - 1e-9)
    low, high = bootstrap_interval(difference, groups, seed=seed, samples=samples)
    return PairedTest(float(difference.mean()), low, high, (1 + as_large) / (1 + samples))


def _by_group(
    values: Sequence[float] | np.ndarray, groups: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Sum and number of the values of each group, float64 ``[groups]``."""
    array = np.asarray(values, np.float64)
    if not len(array):
        raise ValueError("expected at least one score, got none")
    if groups is None:
        return array, np.ones(len(array))
    if len(groups) != len(array):
        raise ValueError(f"expected a group for each of {len(array)} scores, got {len(groups)}")
    numbers: dict[Hashable, int] = {}
    of_item = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    return np.bincount(of_item, array), np.bincount(of_item).astype(np.float64)
