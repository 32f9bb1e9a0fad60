"""`score`: any model's file of predictions against a set's annotations -> the numbers of the official code.

Imports neither torch nor Lightning. What a value is sure to: bootstrap intervals over images (`mmprefix.metrics.intervals`).
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprefix import __version__
from mmprefix.arguments import CommandParser
from mmprefix.errors import InputError
from mmprefix.evaluation.official import CAPTION, TASKS, Predictions, References, read_predictions, read_references
from mmprefix.files import replacing
from mmprefix.metrics.answers import (
    ANSWERABILITY,
    VARIANT_TASKS,
    AnswerReference,
    check_coverage,
    implied_answerability,
    percent,
    score_answers,
)
from mmprefix.metrics.intervals import mean_interval, statistic_interval
from mmprefix.metrics.vqa import VARIANTS

CAPTION_METRICS = ("bleu", "rouge_l", "cider", "meteor", "spice")
TOKENIZERS = ("auto", "official", "python")
_QUESTION_TASKS = ("vqa", "okvqa")
_EPILOG = """\
examples:
  score --task vqa --predictions results.json --references v2_mscoco_val2014_annotations.json
  score --task caption --predictions results.json --references dataset_coco.json --split test
  score --task chartqa --predictions results.jsonl --references test_human.json test_augmented.json
  score --task exact --predictions runs/mine/predictions.jsonl         (has its references with it)

Formats, rules and variants: docs/metrics.md.
"""


def _parser() -> CommandParser:
    parser = CommandParser("score", "Scores predictions as the official code does.", _EPILOG)
    parser.add_argument("--task", required=True, choices=TASKS, help="what the predictions are")
    parser.add_argument(
        "--predictions", required=True, type=Path, help="COCO or VQA results, or a run's predictions.jsonl"
    )
    parser.add_argument("--references", nargs="+", type=Path, default=[], help="the set's annotation file(s)")
    parser.add_argument("--questions", type=Path, help="vqa, okvqa: the questions file, to check its ids")
    parser.add_argument("--split", help="scienceqa, and Karpathy's captions: the part of the file (test)")
    parser.add_argument("--variant", choices=tuple(VARIANTS), help="rules of VQA accuracy; by default the task's own")
    parser.add_argument("--metrics", nargs="+", choices=CAPTION_METRICS, help="caption: by default bleu rouge_l cider")
    parser.add_argument(
        "--tokenizer", choices=TOKENIZERS, help="caption: official needs Java; auto takes it where it is"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write corpus and per-item scores")
    return parser


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        axis: what it is a group of; "" for the whole split.
        name: metric or group.
        value: a fraction, not rounded.
        interval: 95% bootstrap; None for a single image, and where the value is no mean.
        count: items.
    """

    axis: str
    name: str
    value: float
    interval: tuple[float, float] | None
    count: int


@dataclass(frozen=True)
class Scored:
    """A split's scores, ready to be printed and written.

    Attributes:
        task: one of `TASKS`.
        rules: metric and variant, or the tokenizer, in words.
        rows: of the table; the whole split first.
        items: id -> metric -> value.
        unavailable: metric -> why.
        notes: what a reader of the numbers must know.
        images: number of them, where each item has one.
    """

    task: str
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


def _checked(arguments: list[str]) -> Namespace:
    options = _parser().parse_args(arguments)
    task = options.task
    for name, tasks in (
        ("questions", _QUESTION_TASKS), ("split", ("scienceqa", CAPTION)), ("variant", VARIANT_TASKS),
        ("metrics", (CAPTION,)), ("tokenizer", (CAPTION,)),
    ):  # fmt: skip
        if getattr(options, name) is not None and task not in tasks:
            raise InputError(f"--{name}: expected with {', '.join(tasks)} only, got {task}")
    for name, paths in (
        ("predictions", [options.predictions]), ("references", options.references),
        ("questions", [options.questions] if options.questions else []),
    ):  # fmt: skip
        for path in paths:
            if not path.is_file():
                raise InputError(f"--{name}: expected a file, found none at {path}")
    if options.questions and not options.references:
        raise InputError("--references: expected the annotations that belong to --questions, got none")
    if options.json is not None and options.json.is_dir():
        raise InputError(f"--json: expected a file, got the folder {options.json}")
    return options


def score(arguments: list[str]) -> int:
    """Scores, prints and writes; returns the exit status.

    Raises:
        InputError: options or files that don't fit.
    """
    options = _checked(arguments)
    predictions = read_predictions(options.predictions, options.task, own_references=not options.references)
    references = _references(options, predictions)
    notes: list[str] = []
    beside = references.uncounted & predictions.answers.keys()
    if beside:
        notes.append(f"{len(beside):,} predictions don't count: {references.note}")
    answers = {name: said for name, said in predictions.answers.items() if name not in references.uncounted}
    check_coverage(answers, references.items, str(options.predictions))
    if options.task == CAPTION:
        scored = _score_captions(options, answers, references.items, notes)
    else:
        scored = _score_answers(options, predictions, answers, references.items, notes)
    print(table(scored))
    if options.json is not None:
        _write(options, scored)
    return 0


def _references(options: Namespace, predictions: Predictions) -> References:
    if options.references:
        return read_references(
            options.references, options.task, questions=options.questions, split=options.split or "test"
        )
    if predictions.references is None:
        raise InputError(
            f"--references: expected the annotations of {options.task}, got none, and {options.predictions} has no "
            "`references` of its own"
        )
    return References(predictions.references)


def _score_answers(
    options: Namespace,
    predictions: Predictions,
    answers: Mapping[str, str],
    references: Mapping[str, AnswerReference],
    notes: list[str],
) -> Scored:
    scores = score_answers(
        options.task, answers, references, variant=options.variant, answerable=predictions.answerable or None
    )
    values = {name: score[scores.metric] for name, score in scores.items.items()}
    images = _images(references)
    few = sum(len(reference.answers) < 10 for reference in references.values())
    if scores.metric == "vqa_accuracy" and few:
        notes.append(
            f"{few:,} questions have fewer than ten answers, of which 4 equal ones are needed for a score of 1"
        )
    rows = [_mean_row("", scores.metric, list(references), values, images, scores.corpus[scores.metric])]
    if ANSWERABILITY.keys() & scores.corpus.keys():
        rows += _answerability_rows(predictions, answers, references)
        if not predictions.answerable:
            notes.append(
                "answerability is that of the answers: whether they say unanswerable; the file has no `answerable`"
            )
    for axis, kinds in scores.kinds.items():
        members: dict[str, list[str]] = {}
        for name, reference in references.items():
            for kind in (kind for of, kind in reference.kinds if of == axis):
                members.setdefault(kind, []).append(name)
        if len(kinds) > 1:  # a single group is the whole
            rows += [_mean_row(axis, kind, members[kind], values, images, of.value) for kind, of in kinds.items()]
    known = all(reference.image_id is not None for reference in references.values())
    rules = f"{scores.metric}: {scores.variant}"
    number = len({*images.values()}) if known else None
    return Scored(options.task, rules, rows, scores.items, scores.unavailable, notes, number)


def _answerability_rows(
    predictions: Predictions, answers: Mapping[str, str], references: Mapping[str, AnswerReference]
) -> list[Row]:
    said = predictions.answerable or implied_answerability(answers)
    labels = np.asarray([bool(reference.answerable) for reference in references.values()])
    predicted = np.asarray([said[name] for name in references])
    rows = []
    for metric, of in ANSWERABILITY.items():

        def drawn(items: NDArray[np.int64], of: Callable[[Any, Any], float] = of) -> float:
            return of(labels[items], predicted[items])

        rows.append(
            Row(
                "",
                metric,
                of(labels, predicted),
                statistic_interval(drawn, len(labels)) if len(labels) > 1 else None,
                len(labels),
            )
        )
    return rows


def _score_captions(
    options: Namespace, answers: Mapping[str, str], references: Mapping[str, AnswerReference], notes: list[str]
) -> Scored:
    from mmprefix.metrics.captions import score_captions

    captions = {name: reference.answers for name, reference in references.items()}
    scores = score_captions(
        answers, captions, metrics=options.metrics or CAPTION_METRICS[:3], tokenizer=options.tokenizer or "auto"
    )
    rows = []
    items: dict[str, dict[str, float]] = {name: {} for name in captions}
    for metric, value in scores.corpus.items():
        of_images = scores.items[metric]
        for name, of_image in of_images.items():
            items[name][metric] = of_image
        # BLEU of a corpus is no mean of its captions' (its n-grams are counted together): no interval.
        is_mean = abs(sum(of_images.values()) / len(captions) - value) <= 1e-9
        interval = mean_interval([*of_images.values()]) if is_mean and len(captions) > 1 else None
        rows.append(Row("", metric, value, interval, len(captions)))
    if scores.tokenizer_reason:
        notes.append(f"{scores.tokenizer}: {scores.tokenizer_reason}")
    return Scored(CAPTION, scores.tokenizer, rows, items, scores.unavailable, notes, len(captions))


def _images(references: Mapping[str, AnswerReference]) -> dict[str, str]:
    """id -> image; an item without one has its own."""
    return {
        name: f"image {reference.image_id}" if reference.image_id is not None else f"item {name}"
        for name, reference in references.items()
    }


def _mean_row(
    axis: str, name: str, members: Sequence[str], values: Mapping[str, float], images: Mapping[str, str], value: float
) -> Row:
    of_members = [images[member] for member in members]
    # All draws of a single image are the same: an interval of width 0 would claim to know.
    several = len({*of_members}) > 1
    interval = mean_interval([values[member] for member in members], of_members) if several else None
    return Row(axis, name, value, interval, len(members))


def table(scored: Scored) -> str:
    """The scores as text: of 100, with 95% intervals and numbers of items."""
    images = "" if scored.images is None else f", {scored.images:,} images"
    lines = [f"{scored.task}: {scored.count:,} items{images}", scored.rules, ""]
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


def _write(options: Namespace, scored: Scored) -> None:
    corpus = [row for row in scored.rows if not row.axis]
    kinds: dict[str, dict[str, Any]] = {}
    for row in scored.rows:
        if row.axis:
            kinds.setdefault(row.axis, {})[row.name] = {
                "value": row.value, "interval": row.interval, "count": row.count,
            }  # fmt: skip
    content = {
        "mmprefix": __version__,
        "task": scored.task,
        "rules": scored.rules,
        "predictions": str(options.predictions),
        "references": [str(path) for path in options.references],
        "count": scored.count,
        "images": scored.images,
        "corpus": {row.name: row.value for row in corpus},
        "percent": {row.name: percent(row.value) for row in corpus},
        "intervals": {row.name: row.interval for row in corpus},
        "kinds": kinds,
        "unavailable": scored.unavailable,
        "notes": scored.notes,
        "items": scored.items,
    }
    with replacing(options.json) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def run(arguments: list[str]) -> int:
    """`score`; bad input becomes one line and status 2."""
    try:
        return score(arguments)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
