"""torchmetrics classes over the pure functions: what they saw is added up over all ranks before it is scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mmprefix.errors import InputError
from mmprefix.metrics.answers import AnswerReference, listed, score_answer
from mmprefix.metrics.captions import DEFAULT_METRICS, CaptionScores, in_order, score_captions
from mmprefix.metrics.choice import NUM_LETTERS
from mmprefix.metrics.exact_match import exact_match
from mmprefix.metrics.ptb import Tokenizer


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

    def update(self, prediction: str, references: Sequence[str], num_choices: int = NUM_LETTERS) -> None:
        """Counts one prediction. ``references`` are as in `AnswerReference.answers`."""
        reference = AnswerReference(tuple(references), num_choices=num_choices)
        self.score += score_answer(self.task, prediction, reference, self.variant)
        self.total += 1

    def compute(self) -> Tensor:
        """float64 scalar in [0, 1]; 0 where nothing was counted."""
        return self.score / self.total.clamp(min=1)


class CaptionMetrics(Metric):
    """BLEU, ROUGE-L, CIDEr and others of a whole split, from what all ranks saw.

    The state is text: torchmetrics gathers tensors, so each batch is kept as the bytes of lines of JSON, which can be
    joined in any order. Nothing is scored before all of it is there: CIDEr's document frequency comes from all
    references, and the mean of batches' or ranks' scores is another number. So call `update`, not the metric itself,
    which would score every batch, too.

    An image that several ranks saw, as samplers do that make ranks equally long, counts once. The result does not depend on
    the number of ranks, and is that of `score_captions`.

    Attributes:
        scores: of the last `compute`, with each image's score; None before.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    records: list[Tensor]
    scores: CaptionScores | None

    def __init__(self, metrics: Sequence[str] = DEFAULT_METRICS, tokenizer: Tokenizer = "auto", **kwargs: Any) -> None:
        """See `score_captions`; ``kwargs`` are torchmetrics' own."""
        super().__init__(**kwargs)
        self.metrics = tuple(metrics)
        self.tokenizer: Tokenizer = tokenizer
        self.scores = None
        self.add_state("records", default=[], dist_reduce_fx="cat")

    def update(self, ids: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Takes a batch: for each image its id, its caption, and its references.

        Raises:
            InputError: these are not equally many.
        """
        if not len(ids) == len(predictions) == len(references):
            raise InputError(
                f"expected as many predictions and sets of references as ids, got {len(ids)} ids,"
                f" {len(predictions)} predictions, {len(references)} sets of references"
            )
        rows = zip(ids, predictions, map(list, references), strict=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if text:
            self.records.append(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics does it. A rank without a batch takes part with no bytes, not with a float32 tensor."""
        if not self.records:
            self.records.append(torch.zeros(0, dtype=torch.uint8, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """float32 scalars by name, of the metrics that are available; on the official scale.

        Raises:
            InputError: there was no image, or one came twice with different captions or references.
        """
        # Gathered, the state is one tensor.
        records = self.records if isinstance(self.records, list) else [self.records]
        rows: dict[str, tuple[str, list[str]]] = {}
        differing: list[str] = []
        for record in records:
            for line in bytes(record.cpu().numpy()).splitlines():
                name, prediction, references = json.loads(line)
                if rows.setdefault(name, (prediction, references)) != (prediction, references):
                    differing.append(name)
        if differing:
            raise InputError(
                f"expected one caption for each id, got several different ones for {listed(list(dict.fromkeys(differing)))}"
            )
        self.scores = score_captions(
            {name: prediction for name, (prediction, _) in rows.items()},
            {name: rows[name][1] for name in in_order(rows)},  # ranks came in any order
            metrics=self.metrics,
            tokenizer=self.tokenizer,
        )
        return {name: torch.tensor(value) for name, value in self.scores.corpus.items()}
