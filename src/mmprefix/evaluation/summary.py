"""What a report says in numbers: scores with intervals, confusion of closed answer sets, two runs on the same samples.

Shape: R rows (samples).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmprefix.errors import InputError
from mmprefix.evaluation.runs import Row, Run
from mmprefix.metrics.choice import NUM_LETTERS, chosen_letter
from mmprefix.metrics.intervals import mean_interval

MAX_ANSWERS = 30
"""A set of answers with more is not closed: no confusion matrix."""


class Interval(NamedTuple):
    """A mean score, or what the corpus scores, and its 95% interval, where one is known."""

    value: float
    interval: tuple[float, float] | None
    scored: int


@dataclass(frozen=True)
class Confusion:
    """Answers given against answers expected, of one kind of question.

    Attributes:
        name: of the kind.
        answers: expected ones, sorted; a prediction that is none of them is counted in a last column.
        counts: int64 ``[answers, answers + 1]``.
        cells: by row of the run, where it is counted.
    """

    name: str
    answers: tuple[str, ...]
    counts: np.ndarray
    cells: dict[int, tuple[int, int]]


def image_keys(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What names a row's image: items that share one are not independent."""
    return [(row.dataset, row.image_id) for row in rows]


def summarize(
    values: np.ndarray,
    groups: Sequence[tuple[str, str]],
    corpus: float | None = None,
    interval: tuple[float, float] | None = None,
) -> Interval:
    """Value and interval of a metric.

    Args:
        values: float ``[R]``; NaN is left out and not counted.
        groups: of each value; drawn together.
        corpus: what the metric says of all rows. Where that is their mean, or 100 times it up to the second decimal, the
            interval is of the same scale.
        interval: of a corpus score that is no mean (BLEU).
    """
    known = np.flatnonzero(np.isfinite(values)).tolist()
    if not len(known):
        return Interval(math.nan if corpus is None else corpus, interval, 0)
    mean = float(values[known].mean())
    scale = 1.0
    if corpus is not None:
        near = [s for s, off in ((1.0, 1e-6 * max(1.0, abs(mean))), (100.0, 0.0051)) if abs(s * mean - corpus) <= off]
        if not near:
            return Interval(corpus, interval, len(known))
        scale = near[0]
    low, high = mean_interval(values[known], [groups[n] for n in known])
    return Interval(mean if corpus is None else corpus, (scale * low, scale * high), len(known))


def confusions(rows: Sequence[Row], scores: NDArray[np.float64]) -> list[Confusion]:
    """A matrix for each kind of question whose references are a closed set, in the order of the rows.

    Closed: 2 to `MAX_ANSWERS` different answers that recur, at least twice on average. The answer of a row with several
    references is the most frequent of them (of equals the first). White space is collapsed. What is none of the answers by its
    letters, but scored as right ("Yes." by the rules of VQA), is the expected one; of choices, "The answer is B." is B.

    Args:
        rows: predictions.
        scores: (N,) theirs, NaN where there is none.
    """
    by_kind: dict[tuple[str, str], list[int]] = {}
    for number, row in enumerate(rows):
        if row.references:
            by_kind.setdefault((row.dataset, row.kind), []).append(number)
    found = []
    for (dataset, kind), members in by_kind.items():
        expected = [Counter(map(_plain, rows[n].references)).most_common(1)[0][0] for n in members]
        distinct = set(expected)
        if not 2 <= len(distinct) <= MAX_ANSWERS or len(members) < 2 * len(distinct):
            continue
        answers = tuple(sorted(distinct, key=_natural))
        places = {answer: n for n, answer in enumerate(answers)}
        choices = all(re.fullmatch("[A-Z]", answer) for answer in answers)
        cells = {}
        for number, answer in zip(members, expected, strict=True):
            said = _plain(rows[number].prediction)
            if said not in places and choices:
                said = chosen_letter(said, NUM_LETTERS) or said
            if said not in places and scores[number] >= 0.5:
                said = answer
            cells[number] = places[answer], places.get(said, len(answers))
        counts = np.zeros((len(answers), len(answers) + 1), np.int64)
        np.add.at(counts, tuple(zip(*cells.values(), strict=True)), 1)
        found.append(Confusion(kind_name(dataset, kind), answers, counts, cells))
    return found


def paired(first: Run, second: Run) -> tuple[Run, Run, str]:
    """Both runs' rows of the samples that are in both, in the first's order, and a sentence about the others.

    Raises:
        InputError: no sample in common, other references for the same sample, or other metrics.
    """
    places = {(row.dataset, row.id): n for n, row in enumerate(second.rows)}
    common = [(n, places[row.dataset, row.id]) for n, row in enumerate(first.rows) if (row.dataset, row.id) in places]
    if not common:
        raise InputError(
            f"--compare: expected samples that are in both, {first.name} and {second.name} have no id in common"
        )
    for n, m in common:
        one, other = first.rows[n].references, second.rows[m].references
        if Counter(one) != Counter(other):
            raise InputError(
                f"--compare: expected the same references in both, got {list(one)[:3]} in {first.name} and "
                f"{list(other)[:3]} in {second.name} for {first.rows[n].id!r}"
            )
    if first.scores.primary not in second.scores.items:
        raise InputError(
            f"--compare: expected scores of {first.scores.primary!r} for both, {second.name} has "
            f"{', '.join(second.scores.items)}"
        )
    sides = [_only(run, [pair[side] for pair in common]) for side, run in enumerate((first, second))]
    sides[1].scores.primary = first.scores.primary
    left = [(run.name, len(run.rows) - len(common)) for run in (first, second) if len(run.rows) > len(common)]
    note = f"Compared on the {len(common):,} samples that are in both."
    if left:
        note += " Left out: " + ", ".join(f"{number:,} only in {name}" for name, number in left) + "."
    return sides[0], sides[1], note


def _only(run: Run, chosen: Sequence[int]) -> Run:
    whole = len(chosen) == len(run.rows)
    items = {name: values[list(chosen)] for name, values in run.scores.items.items()}
    # A corpus score of a part is another number (CIDEr's document frequencies): the mean of the items stands for it.
    scores = replace(run.scores, items=items) if whole else replace(run.scores, items=items, corpus={}, intervals={})
    return replace(run, rows=[run.rows[n] for n in chosen], scores=scores)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _natural(text: str) -> tuple[float, str]:
    """Numbers by value, before words."""
    return (float(text), text) if re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", text, re.ASCII) else (math.inf, text)


def kind_name(dataset: str, kind: str) -> str:
    """What tables and filters call a kind of question."""
    return " / ".join(part for part in (dataset, kind) if part) or "all"
