"""Metrics of short answers as torchmetrics: sums and counts over all ranks, each sample once. They need torch; the rest of this
room doesn't."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from mmprefix.metrics.answers import AnswerReference, score_answer
from mmprefix.metrics.exact_match import exact_match


class AnswerMetric(Metric):
    """Mean of a task's metric (`mmprefix.metrics.answers`), exact over ranks: per-item scores are added up, in float64.

    VizWiz's answerability is no mean, and not computed here.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    score: Tensor
    total: Tensor

    def __init__(self, task: str, variant: str | None = None) -> None:
        """Settings.

        Args:
            task: one of `mmprefix.metrics.answers.TASKS`.
            variant: of VQA accuracy; None: the task's own.

        Raises:
            InputError: an unknown task, or a variant that it doesn't have.
        """
        super().__init__()
        score_answer(task, "", AnswerReference(("",)), variant)  # says what is wrong before there is data
        self.task, self.variant = task, variant
        self.add_state("score", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: str, references: Sequence[str], num_choices: int = 26) -> None:
        """Counts one prediction. ``references`` are as in `AnswerReference.answers`."""
        reference = AnswerReference(tuple(references), num_choices=num_choices)
        self.score += score_answer(self.task, prediction, reference, self.variant)
        self.total += 1

    def compute(self) -> Tensor:
        """float64 scalar in [0, 1]; 0 where nothing was counted."""
        return self.score / self.total.clamp(min=1)


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
