"""Exact match: does the prediction equal one of the references?

White space is collapsed and stripped on both sides, nothing else is normalised: case and punctuation count. The
official VQA normalisation is another metric and not this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether ``prediction`` equals one of ``references``, up to white space."""
    return " ".join(prediction.split()) in {" ".join(reference.split()) for reference in references}


class ExactMatch(Metric):
    """Share of predictions that equal one of their references, summed over all ranks."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: str, references: Sequence[str]) -> None:
        """Counts one prediction."""
        self.correct += int(exact_match(prediction, references))
        self.total += 1

    def compute(self) -> Tensor:
        """float32 scalar in [0, 1]; 0 where nothing was counted."""
        return self.correct / self.total.clamp(min=1)
