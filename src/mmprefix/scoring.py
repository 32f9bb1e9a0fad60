"""`score`: any model's file of predictions against a set's annotations -> the numbers of the official code.

Imports neither torch nor Lightning. What is made of the files: `mmprefix.evaluation.scores`.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any, get_args

from mmprefix import __version__
from mmprefix.arguments import CommandParser, exit_status, keep_inputs
from mmprefix.errors import InputError
from mmprefix.evaluation.official import TASKS, Predictions, References, read_predictions, read_references
from mmprefix.evaluation.scores import Scored, score_answer_split, score_caption_split, table
from mmprefix.files import replacing
from mmprefix.metrics.answers import VARIANT_TASKS, check_coverage, percent
from mmprefix.metrics.captions import CAPTION, DEFAULT_METRICS, METRICS
from mmprefix.metrics.ptb import Tokenizer
from mmprefix.metrics.vqa import VARIANTS

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
    parser.add_argument("--metrics", nargs="+", choices=tuple(METRICS), help="caption: by default bleu rouge_l cider")
    parser.add_argument(
        "--tokenizer", choices=get_args(Tokenizer), help="caption: official needs Java; auto takes it where it is"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write corpus and per-item scores")
    return parser


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
    for name in ("questions", "split"):
        if getattr(options, name) is not None and not options.references:
            raise InputError(f"--references: expected the annotations that belong to --{name}, got none")
    if options.json is not None and options.json.is_dir():
        raise InputError(f"--json: expected a file, got the folder {options.json}")
    if options.json is not None:
        keep_inputs("--json", options.json, [options.predictions, *options.references, options.questions])
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
        scored = score_caption_split(
            answers, references.items, metrics=options.metrics or DEFAULT_METRICS, tokenizer=options.tokenizer or "auto"
        )
    else:
        scored = score_answer_split(
            options.task, answers, references.items, variant=options.variant, answerable=predictions.answerable
        )
    scored.notes[:0] = notes
    problem: OSError | None = None
    if options.json is not None:
        try:
            _write(options, scored)
        except OSError as error:  # what was scored is not lost with it
            problem = error
    print(table(scored))  # at the end: who reads it may stop (`| head -1`)
    if problem is not None:
        raise OSError(f"--json: {problem}") from problem
    return 0


def _references(options: Namespace, predictions: Predictions) -> References:
    if options.references:
        return read_references(options.references, options.task, questions=options.questions, split=options.split)
    if predictions.references is None:
        raise InputError(
            f"--references: expected the annotations of {options.task}, got none, and {options.predictions} has no "
            "`references` of its own"
        )
    return References(predictions.references)


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
    """`score`; see `arguments.exit_status`."""
    return exit_status(score, arguments)
