"""Predictions and references of a split -> its scores with 95% intervals, and the table that shows them.

The one place for both `score`, of anybody's files, and the runner, of a run's own predictions. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mmprefix.metrics.answers import (
    ANSWERABILITY,
    AnswerReference,
    implied_answerability,
    percent,
    score_answers,
)
from mmprefix.metrics.bleu import bleu_of
from mmprefix.metrics.captions import BLEU, CAPTION, DEFAULT_METRICS, MEANS, CaptionScores, score_captions
from mmprefix.metrics.intervals import mean_interval, statistic_interval, sums_intervals
from mmprefix.metrics.ptb import Tokenizer

HEADLINE: Final = "CIDEr"
"""Of captions: the one metric that is shown by kind."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        axis: what it is a group of; "" for the whole split.
        name: metric or group.
        value: a fraction, not rounded; CIDEr is in [0, 10].
        interval: 95% bootstrap; None for a single image, for METEOR, or where none was asked for.
        count: items.
    """

    axis: str
    name: str
    value: float
    interval: tuple[float, float] | None
    count: int


@dataclass(frozen=True)
class Scored:
    """A split's scores, ready to be printed, logged and written.

    Attributes:
        task: one of `mmprefix.metrics.captions.ALL_TASKS`.
        metric: the one that the task is known by, of which there are groups.
        rules: metric and variant, or the tokenizer, in words.
        rows: of the table; the whole split first.
        items: id -> metric -> value.
        unavailable: metric -> why.
        notes: what a reader of the numbers must know.
        images: number of them, where each item has one.
    """

    task: str
    metric: str
    rules: str
    rows: list[Row]
    items: dict[str, dict[str, float]]
    unavailable: dict[str, str]
    notes: list[str]
    images: int | None

    @property
    def count(self) -> int:
        """Items of the whole split."""
        return len(self.items)

    @property
    def corpus(self) -> dict[str, float]:
        """Metric -> value of the whole split."""
        return {row.name: row.value for row in self.rows if not row.axis}


def score_answer_split(
    task: str,
    answers: Mapping[str, str],
    references: Mapping[str, AnswerReference],
    *,
    variant: str | None = None,
    answerable: Mapping[str, float] | None = None,
    intervals: bool = True,
) -> Scored:
    """Scores of short answers, over the split and by kind.

    Args:
        task: one of `mmprefix.metrics.answers.TASKS`.
        answers: id -> what the model said.
        references: id -> what is known of the question; the same ids.
        variant: of VQA accuracy; None: the task's own.
        answerable: VizWiz: id -> predicted probability that the question can be answered.
        intervals: whether they are wanted: a thousand draws of the split, seconds for a large one.

    Raises:
        InputError: see `score_answers`.
    """
    scores = score_answers(task, answers, references, variant=variant, answerable=answerable or None)
    values = {name: score[scores.metric] for name, score in scores.items.items()}
    images = _images(references)
    notes = []
    few = sum(len(reference.answers) < 10 for reference in references.values())
    if scores.metric == "vqa_accuracy" and few:
        notes.append(
            f"{few:,} questions have fewer than ten answers, of which 4 equal ones are needed for a score of 1"
        )

    def row(axis: str, name: str, members: Sequence[str], value: float) -> Row:
        return Row(axis, name, value, _interval(members, values, images) if intervals else None, len(members))

    rows = [row("", scores.metric, list(references), scores.corpus[scores.metric])]
    if ANSWERABILITY.keys() & scores.corpus.keys():
        rows += _answerability_rows(answerable, answers, references, intervals)
        if not answerable:
            notes.append(
                "answerability is that of the answers: whether they say unanswerable; the file has no `answerable`"
            )
    for axis, members in _groups(references):
        rows += [row(axis, kind, names, scores.kinds[axis][kind].value) for kind, names in members.items()]
    known = all(reference.image_id is not None for reference in references.values())
    rules = f"{scores.metric}: {scores.variant}"
    number = len({*images.values()}) if known else None
    return Scored(task, scores.metric, rows=rows, rules=rules, items=scores.items, unavailable=scores.unavailable,
                  notes=notes, images=number)  # fmt: skip


def _answerability_rows(
    answerable: Mapping[str, float] | None,
    answers: Mapping[str, str],
    references: Mapping[str, AnswerReference],
    intervals: bool,
) -> list[Row]:
    said = answerable or implied_answerability(answers)
    labels = np.asarray([bool(reference.answerable) for reference in references.values()])
    predicted = np.asarray([said[name] for name in references])
    rows = []
    for metric, of in ANSWERABILITY.items():

        def drawn(items: NDArray[np.int64], of: Callable[[Any, Any], float] = of) -> float:
            return of(labels[items], predicted[items])

        interval = statistic_interval(drawn, len(labels)) if intervals and len(labels) > 1 else None
        rows.append(Row("", metric, of(labels, predicted), interval, len(labels)))
    return rows


def score_caption_split(
    captions: Mapping[str, str],
    references: Mapping[str, AnswerReference],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: Tokenizer = "auto",
    intervals: bool = True,
) -> Scored:
    """Scores of captions, over the split and CIDEr by kind.

    A kind's CIDEr is the mean over its items, whose document frequencies come from the whole split.

    Args:
        captions: id -> what the model said.
        references: id -> its captions as `answers`; the same ids.
        metrics: of `mmprefix.metrics.captions.METRICS`.
        tokenizer: see `mmprefix.metrics.ptb.tokenize`.
        intervals: whether they are wanted.

    Raises:
        InputError: see `score_captions`.
    """
    scores = score_captions(
        captions, {name: reference.answers for name, reference in references.items()},
        metrics=metrics, tokenizer=tokenizer,
    )  # fmt: skip
    images = _images(references)
    of_metrics = _caption_intervals(scores, list(references), images) if intervals else {}
    rows = [Row("", metric, value, of_metrics.get(metric), len(references)) for metric, value in scores.corpus.items()]
    of_images = scores.items.get(HEADLINE)
    for axis, members in _groups(references) if of_images is not None else ():
        assert of_images is not None
        for kind, names in members.items():
            interval = _interval(names, of_images, images) if intervals else None
            value = sum(of_images[name] for name in names) / len(names)
            rows.append(Row(f"{HEADLINE} by {axis}", kind, value, interval, len(names)))
    items = {name: {metric: of[name] for metric, of in scores.items.items()} for name in references}
    notes = [scores.tokenizer_reason] if scores.tokenizer_reason else []
    return Scored(CAPTION, HEADLINE, rows=rows, rules=scores.tokenizer, items=items, unavailable=scores.unavailable,
                  notes=notes, images=len({*images.values()}))  # fmt: skip


def _caption_intervals(
    scores: CaptionScores, names: Sequence[str], images: Mapping[str, str]
) -> dict[str, tuple[float, float] | None]:
    """By metric. METEOR, which only its program can compute from sums, has none."""
    found = {metric: _interval(names, scores.items[metric], images) for metric in MEANS if metric in scores.items}
    of_names = [images[name] for name in names]
    if scores.bleu_counts is not None and len({*of_names}) > 1:
        found |= dict(zip(BLEU, sums_intervals(scores.bleu_counts, bleu_of, of_names), strict=True))
    return found


def _groups(references: Mapping[str, AnswerReference]) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Axis -> group -> ids, groups by name. An axis with a single group is left out: it is the whole."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, reference in references.items():
        for axis, kind in reference.kinds:
            found.setdefault(axis, {}).setdefault(kind, []).append(name)
    for axis, members in found.items():
        if len(members) > 1:
            yield axis, dict(sorted(members.items()))


def _images(references: Mapping[str, AnswerReference]) -> dict[str, str]:
    """id -> image; an item without one has its own."""
    return {
        name: f"image {reference.image_id}" if reference.image_id is not None else f"item {name}"
        for name, reference in references.items()
    }


def _interval(
    members: Sequence[str], values: Mapping[str, float], images: Mapping[str, str]
) -> tuple[float, float] | None:
    of_members = [images[member] for member in members]
    # All draws of a single image are the same: an interval of width 0 would claim to know.
    if len({*of_members}) < 2:
        return None
    return mean_interval([values[member] for member in members], of_members)


def table(scored: Scored, where: str = "") -> str:
    """The scores as text: of 100 (CIDEr: of 1000), with 95% intervals and numbers of items.

    Args:
        scored: the scores.
        where: begins the first line: split and set.
    """
    images = "" if scored.images is None else f", {scored.images:,} images"
    lines = [f"{where}{scored.task}: {scored.count:,} items{images}", scored.rules, ""]
    cells = [("", "value", "95% interval", "items")]
    axis = ""
    for row in scored.rows:
        if row.axis != axis:
            axis = row.axis
            cells.append((axis, "", "", ""))
        low_high = "-" if row.interval is None else f"{percent(row.interval[0]):.2f} to {percent(row.interval[1]):.2f}"
        cells.append((f"{'  ' if axis else ''}{row.name}", f"{percent(row.value):.2f}", low_high, f"{row.count:,}"))
    cells += [(name, "unavailable", "-", "-") for name in scored.unavailable]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    for line in cells:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *numbers]).rstrip())
    lines.insert(4, "-" * len(lines[3]))
    lines += [f"{name}: {why}" for name, why in scored.unavailable.items()]
    return "\n".join([*lines, *scored.notes])
