"""Answerability: does a model know which questions its picture can't answer (VizWiz)?

Gurari et al., VizWiz Grand Challenge, https://arxiv.org/abs/1802.08218. As in its official evaluation, the positive class is
*unanswerable*, and its score is one minus the predicted answerability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprefix.errors import InputError


def average_precision(labels: Sequence[bool] | NDArray[Any], scores: Sequence[float] | NDArray[Any]) -> float:
    """Area under the steps of precision over recall: sum of (R_n - R_{n-1}) P_n over thresholds, ties taken together.

    Args:
        labels: (N,) bool or 0/1, whether the item is of the positive class.
        scores: (N,) higher for items that are more likely to be.

    Returns:
        In [0, 1]; 0 where no item is positive, as scikit-learn says.

    Raises:
        InputError: no items, or of other numbers.
    """
    positive, order = _checked(labels, scores)
    if not positive.any():
        return 0.0
    by_score = np.argsort(-order, kind="stable")
    found = np.cumsum(positive[by_score])
    ends = np.append(np.flatnonzero(np.diff(order[by_score])), len(order) - 1)  # last item of each threshold
    recall, precision = found[ends] / found[-1], found[ends] / (ends + 1)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def f1_score(labels: Sequence[bool] | NDArray[Any], predicted: Sequence[bool] | NDArray[Any]) -> float:
    """Harmonic mean of precision and recall of the positive class; 0 where it was neither there nor predicted.

    Raises:
        InputError: no items, or of other numbers.
    """
    positive, said = _checked(labels, predicted)
    there, named = positive.sum(), (said > 0).sum()
    both = (positive & (said > 0)).sum()
    return float(2 * both / (there + named)) if there + named else 0.0


def _checked(labels: Any, scores: Any) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    positive, numbers = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if positive.shape != numbers.shape or positive.ndim != 1 or not len(positive):
        raise InputError(f"expected as many labels as scores, at least one, got {positive.shape} and {numbers.shape}")
    return positive, numbers
