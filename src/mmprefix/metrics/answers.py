"""One entry for all tasks whose predictions are short answers: which metric a task has, and its scores.

Scores are fractions, not rounded; `percent` rounds a value as the official code does. A corpus value is the mean over items,
summed in the order of the references, as the official code sums it in the order of the annotations. Predictions and
references must name the same items: what is missing is an error here, never left out of a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from mmprefix.errors import InputError
from mmprefix.metrics.anls import THRESHOLD, anls
from mmprefix.metrics.answerability import average_precision, f1_score
from mmprefix.metrics.choice import NUM_LETTERS, chosen_letter
from mmprefix.metrics.exact_match import exact_match
from mmprefix.metrics.relaxed_accuracy import TOLERANCE, relaxed_accuracy
from mmprefix.metrics.vqa import VARIANTS, normalized_answer, vqa_accuracy

UNANSWERABLE = "unanswerable"
_SHOWN = 10


@dataclass(frozen=True)
class AnswerReference:
    """What is known of a question.

    Attributes:
        answers: accepted answers; for VQA accuracy one for each annotator, in their order; for ScienceQA the letter.
        image_id: items of one image are drawn together in a bootstrap; None: an image of its own.
        kinds: groups it belongs to, as (axis, name): ``("answer type", "yes/no")``. It may belong to several of an axis.
        answerable: VizWiz: whether people could answer.
        num_choices: ScienceQA: how many there are.
    """

    answers: tuple[str, ...]
    image_id: str | None = None
    kinds: tuple[tuple[str, str], ...] = ()
    answerable: bool | None = None
    num_choices: int = NUM_LETTERS


@dataclass(frozen=True)
class KindScore:
    """Mean of the task's metric over a group, and the number of its items."""

    value: float
    count: int


@dataclass(frozen=True)
class AnswerScores:
    """Scores of a split.

    Attributes:
        task: one of `TASKS`.
        metric: name of the task's metric.
        variant: which rules it followed, in words.
        corpus: metric -> value in [0, 1]; the task's metric first.
        items: id -> metric -> value in [0, 1].
        kinds: axis -> group -> `KindScore`, groups by name.
        unavailable: metric -> why it couldn't be computed.
    """

    task: str
    metric: str
    variant: str
    corpus: dict[str, float]
    items: dict[str, dict[str, float]]
    kinds: dict[str, dict[str, KindScore]]
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Task:
    metric: str
    score: Callable[[str, AnswerReference, str], float]
    variant: str  # of VQA accuracy, or in words where there are no variants


def _vqa(prediction: str, reference: AnswerReference, variant: str) -> float:
    return vqa_accuracy(prediction, reference.answers, variant)


_TASKS: dict[str, _Task] = {
    "vqa": _Task("vqa_accuracy", _vqa, "vqav2"),
    "okvqa": _Task("vqa_accuracy", _vqa, "vqav2"),
    "textvqa": _Task("vqa_accuracy", _vqa, "textvqa"),
    "vizwiz": _Task("vqa_accuracy", _vqa, "vizwiz"),
    "gqa": _Task("accuracy", lambda said, r, _: float(said in r.answers), "the same string"),
    "docvqa": _Task("anls", lambda said, r, _: anls(said, r.answers), f"threshold {THRESHOLD}, which counts"),
    "chartqa": _Task(
        "relaxed_accuracy",
        lambda said, r, _: float(any(relaxed_accuracy(said, answer) for answer in r.answers)),
        f"within {TOLERANCE:.0%}",
    ),
    "scienceqa": _Task(
        "accuracy",
        lambda said, r, _: float(chosen_letter(said, r.num_choices) in r.answers),
        "the choice's letter; none is wrong",
    ),
    "exact": _Task("exact_match", lambda said, r, _: float(exact_match(said, r.answers)), "up to white space"),
}
TASKS: tuple[str, ...] = tuple(_TASKS)
METRIC_OF: Mapping[str, str] = MappingProxyType({name: task.metric for name, task in _TASKS.items()})
VARIANT_TASKS: tuple[str, ...] = tuple(name for name, task in _TASKS.items() if task.metric == "vqa_accuracy")
"""Tasks that are scored by VQA accuracy, of which there are variants."""


def percent(value: float) -> float:
    """A score in [0, 1] as the official code prints it: of 100, rounded to two decimals."""
    return round(100 * value, 2)


def score_answer(task: str, prediction: str, reference: AnswerReference, variant: str | None = None) -> float:
    """The task's metric for one prediction, in [0, 1].

    Raises:
        InputError: an unknown task, a variant that it doesn't have, or no accepted answers.
    """
    chosen = _checked_task(task, variant)
    return chosen.score(prediction, reference, variant or chosen.variant)


def score_answers(
    task: str,
    predictions: Mapping[str, str],
    references: Mapping[str, AnswerReference],
    *,
    variant: str | None = None,
    answerable: Mapping[str, float] | None = None,
) -> AnswerScores:
    """Scores a split.

    Args:
        task: one of `TASKS`.
        predictions: id -> what the model said.
        references: id -> what is known of the question; the same ids.
        variant: of VQA accuracy; None: the task's own.
        answerable: VizWiz: id -> predicted probability that the question can be answered. None: what isn't answered with
            "unanswerable" was held to be answerable.

    Raises:
        InputError: an unknown task, a variant that it doesn't have, no items, ids that are missing on one side (they are
            listed), an answer that is not a string, a question without accepted answers.
    """
    chosen = _checked_task(task, variant)
    check_coverage(predictions, references)
    rules = variant or chosen.variant
    scores: dict[str, float] = {}
    for name, reference in references.items():
        said = predictions[name]
        if not isinstance(said, str):
            raise InputError(f"{name}: expected an answer that is a string, got {type(said).__name__}")
        if not reference.answers:
            raise InputError(f"{name}: expected one or more accepted answers, got none")
        if chosen.metric == "vqa_accuracy" and len(reference.answers) == 1:
            raise InputError(
                f"{name}: expected the answers of several people (ten in VQA), got one: leaving it out leaves none. "
                "For a single answer there is the task exact"
            )
        scores[name] = chosen.score(said, reference, rules)
    corpus = {chosen.metric: _mean(scores.values())}
    unavailable: dict[str, str] = {}
    if task == "vizwiz":
        _add_answerability(predictions, references, answerable, corpus, unavailable)
    return AnswerScores(
        task=task,
        metric=chosen.metric,
        variant=f"{rules} ({VARIANTS[rules]})" if rules in VARIANTS else rules,
        corpus=corpus,
        items={name: {chosen.metric: score} for name, score in scores.items()},
        kinds=_by_kind(scores, references),
        unavailable=unavailable,
    )


def check_coverage(predictions: Iterable[str], references: Iterable[str], where: str = "") -> None:
    """Whether both name the same items, at least one.

    Args:
        predictions, references: ids.
        where: begins the message: the file of the predictions.

    Raises:
        InputError: with the ids that only one side has.
    """
    said, known = dict.fromkeys(predictions), dict.fromkeys(references)
    missing = [name for name in known if name not in said]
    unknown = [name for name in said if name not in known]
    at = f"{where}: " if where else ""
    if not known:
        raise InputError(f"{at}expected one or more items, got an empty split")
    if missing or unknown:
        parts = [
            *([f"{len(missing):,} missing ({listed(missing)})"] if missing else []),
            *([f"{len(unknown):,} unknown ({listed(unknown)})"] if unknown else []),
        ]
        raise InputError(
            f"{at}expected a prediction for each of {len(known):,} ids and no others, got {', '.join(parts)}"
        )


def listed(names: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _unanswerable_precision(answerable: Sequence[bool], predicted: Sequence[float]) -> float:
    return average_precision(~np.asarray(answerable, dtype=bool), 1 - np.asarray(predicted, dtype=np.float64))


def _unanswerable_f1(answerable: Sequence[bool], predicted: Sequence[float]) -> float:
    return f1_score(~np.asarray(answerable, dtype=bool), 1 - np.asarray(predicted, dtype=np.float64) > 0.5)


ANSWERABILITY: Mapping[str, Callable[[Any, Any], float]] = MappingProxyType({
    "answerability_average_precision": _unanswerable_precision,
    "answerability_f1": _unanswerable_f1,
})  # fmt: skip
"""VizWiz's second task: of (N,) whether people could answer, and (N,) the predicted probability that they could."""


def implied_answerability(predictions: Mapping[str, str]) -> dict[str, float]:
    """id -> 0 where the model said that the question can't be answered, else 1."""
    return {name: float(normalized_answer(said.strip()) != UNANSWERABLE) for name, said in predictions.items()}


def _add_answerability(
    predictions: Mapping[str, str],
    references: Mapping[str, AnswerReference],
    answerable: Mapping[str, float] | None,
    corpus: dict[str, float],
    unavailable: dict[str, str],
) -> None:
    labels = [reference.answerable for reference in references.values() if reference.answerable is not None]
    if len(labels) != len(references):
        unavailable["answerability"] = f"{len(references) - len(labels):,} questions have no label `answerable`"
        return
    if answerable is not None:
        check_coverage(answerable, references, "answerable")
    if all(labels):  # scikit-learn, and so the official code, would say 0, which looks like a score
        unavailable["answerability"] = "all questions can be answered: there is nothing to be found"
        return
    predicted = implied_answerability(predictions) if answerable is None else answerable
    for metric, value in ANSWERABILITY.items():
        corpus[metric] = value(labels, [predicted[name] for name in references])


def _checked_task(task: str, variant: str | None) -> _Task:
    if task not in _TASKS:
        raise InputError(f"expected a task of {', '.join(TASKS)}, got {task!r}")
    if variant is not None and task not in VARIANT_TASKS:
        raise InputError(f"variant: expected with {', '.join(VARIANT_TASKS)} only, got {task}")
    if variant is not None and variant not in VARIANTS:
        raise InputError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    return _TASKS[task]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return float(sum(numbers)) / len(numbers)


def _by_kind(scores: Mapping[str, float], references: Mapping[str, AnswerReference]) -> dict[str, dict[str, KindScore]]:
    members: dict[str, dict[str, list[float]]] = {}
    for name, reference in references.items():
        for axis, kind in reference.kinds:
            members.setdefault(axis, {}).setdefault(kind, []).append(scores[name])
    return {
        axis: {kind: KindScore(_mean(group), len(group)) for kind, group in sorted(kinds.items())}
        for axis, kinds in members.items()
    }
