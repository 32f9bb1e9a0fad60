"""A run's predictions of a split: brought together from all processes, scored once, and written as servers take them.

Every sample counts once: predictions are gathered as text and scored as a whole on one process. CIDEr takes its document
frequencies from all references, and a mean over batches or processes would be another number.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed

from mmprefix.errors import InputError
from mmprefix.evaluation.scores import Scored, score_answer_split, score_caption_split
from mmprefix.files import replacing
from mmprefix.metrics.answers import VARIANT_TASKS, AnswerReference
from mmprefix.metrics.captions import CAPTION
from mmprefix.metrics.rules import ScoringRules
from mmprefix.packing import Reference

Prediction = tuple[Reference, str]
"""What is known of a sample, and what the model said."""

DEFAULT_TASK = "exact"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, on the first process; elsewhere it is empty.

    Attributes:
        predictions: of the whole split, in its order.
        scores: by set, "" for the only one of a split; none of a set of which a sample has no references.
        problem: why there are no scores, where that is no matter of references.
        skipped: how many records have no prediction, because their images can't be decoded.
    """

    predictions: list[Prediction] = field(default_factory=list)
    scores: dict[str, Scored] = field(default_factory=dict)
    problem: str = ""
    skipped: int = 0


def check_reference(task: str, reference: Reference) -> None:
    """What can be known at the first batch must not show after the last.

    Raises:
        InputError: VQA accuracy of a sample with a single answer, or a choice that is no letter.
    """
    if task in VARIANT_TASKS and len(reference.references) == 1:
        raise InputError(
            f"data.metric: {task}: expected the answers of several people (ten in VQA) for {reference.id}, got one; for a "
            "single answer there is the metric exact"
        )
    choices = [answer for answer in reference.references if re.fullmatch("[A-Z]", answer)]
    if task == "scienceqa" and reference.references and not choices:
        raise InputError(
            f"data.metric: scienceqa: expected a choice's letter as the answer of {reference.id}, got "
            f"{reference.references[0][:40]!r}"
        )


def gathered(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Predictions of all processes on the first, each once, in the order of the split; an empty list on the others.

    Args:
        predictions: of this process.
    """
    parts: list[Any] = [predictions]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        first = torch.distributed.get_rank() == 0
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.gather_object(predictions, parts if first else None)
        if not first:
            return []
    once = {prediction[0].order: prediction for part in parts for prediction in part}
    return [once[order] for order in sorted(once)]


def score_predictions(
    predictions: Sequence[Prediction],
    tasks: Mapping[str, str],
    rules: ScoringRules = ScoringRules(),  # noqa: B008  (frozen)
    *,
    intervals: bool = True,
) -> dict[str, Scored]:
    """Scores of each set, by its task.

    Items are known by their sample's id; where several samples of a set share one, by their place, too: each of them counts,
    and a warning names one: runs can't be compared sample by sample, and the same shard may have come twice.

    Args:
        predictions: of the whole split.
        tasks: set -> one of `mmprefix.metrics.captions.ALL_TASKS`; sets that it lacks are scored by exact match.
        rules: of captions and of VQA accuracy.
        intervals: whether they are wanted.

    Raises:
        InputError: naming the set, a sample that its task can't score.
    """
    scores = {}
    for name, members in by_set(predictions).items():
        if not all(reference.references for reference, _ in members):
            continue
        names = item_names(members)
        if renamed := [item for item, (r, _) in zip(names, members, strict=True) if item != r.id]:
            of_set = f" of {name}" if name else ""
            warnings.warn(
                f"{len(renamed)} samples{of_set} share an id with another, {renamed[0]} the first; each is scored",
                stacklevel=2,
            )
        said = dict(zip(names, (text for _, text in members), strict=True))
        known = {
            item: AnswerReference(reference.references, reference.image_id, (("kind", reference.kind),))
            for item, (reference, _) in zip(names, members, strict=True)
        }
        task = tasks.get(name, DEFAULT_TASK)
        try:
            if task == CAPTION:
                scores[name] = score_caption_split(
                    said, known, metrics=rules.caption_metrics, tokenizer=rules.caption_tokenizer, intervals=intervals
                )
            else:
                variant = rules.vqa_variant if task in VARIANT_TASKS else None
                scores[name] = score_answer_split(task, said, known, variant=variant, intervals=intervals)
        except InputError as error:
            raise InputError(f"{f'set {name}: ' if name else ''}{error}") from error
    return scores


def by_set(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Set -> its predictions."""
    of_sets: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        of_sets.setdefault(prediction[0].dataset, []).append(prediction)
    return of_sets


def item_names(members: Sequence[Prediction]) -> list[str]:
    """A name for each of a set's samples: its id, and where others have the same, its place in the split."""
    number = Counter(reference.id for reference, _ in members)
    return [f"{r.id} (record {r.order[0]}, sample {r.order[1]})" if number[r.id] > 1 else r.id for r, _ in members]


def logged(split: str, evaluation: Evaluation) -> dict[str, float]:
    """Scores by the names under which they are logged.

    ``SPLIT/METRIC`` and ``SPLIT/METRIC.KIND``, in a mixture with the set in between: ``SPLIT/SET/METRIC``. A mixture has
    ``SPLIT/METRIC`` as well where that is a number: as the mean over the samples of all sets of a task, or of its only set
    with captions, since CIDEr of two sets together is neither's. In the names of kinds, whatever isn't a letter, a digit,
    ``_``, ``-`` or ``.`` is a ``_``.
    """
    values: dict[str, float] = {}
    of_sets = by_set(evaluation.predictions)
    of_metric: dict[str, list[Scored]] = {}
    for name, scored in evaluation.scores.items():
        front = f"{split}/{name}" if name else split
        values |= {f"{front}/{metric}": value for metric, value in scored.corpus.items()}
        of_kind: dict[str, list[float]] = {}
        for item, (reference, _) in zip(item_names(of_sets[name]), of_sets[name], strict=True):
            of_kind.setdefault(reference.kind, []).append(scored.items[item][scored.metric])
        for kind, of in sorted(of_kind.items()):
            # Not behind a slash: MLflow keeps a metric in a file, whose name another's folder must not have. Nor does
            # it take most other characters, and ends the run over one.
            title = f"{front}/{scored.metric}.{re.sub(r'[^a-zA-Z0-9_.-]', '_', kind)}"
            while title in values:  # kinds that differ in those only
                title += "_"
            values[title] = sum(of) / len(of)
        of_metric.setdefault(scored.metric, []).append(scored)
    for metric, parts in of_metric.items():
        if len(parts) == 1:
            values |= {f"{split}/{name}": value for name, value in parts[0].corpus.items()}
        elif parts[0].task != CAPTION and len({part.task for part in parts}) == 1:
            scores = [item[metric] for part in parts for item in part.items.values()]
            values[f"{split}/{metric}"] = sum(scores) / len(scores)
    return values


# Files ----------------------------------------------------------------------------------------------------------------

_FORMATS = {
    CAPTION: ("coco", "image_id", "caption"),
    "vqa": ("vqa", "question_id", "answer"),
    "okvqa": ("vqa", "question_id", "answer"),
    "textvqa": ("vqa", "question_id", "answer"),
    "vizwiz": ("vizwiz", "image", "answer"),
    "gqa": ("gqa", "questionId", "prediction"),
    "docvqa": ("docvqa", "questionId", "answer"),
}
"""Task -> suffix of the file, and the names of its two fields, as the sets' evaluation servers take them."""


def write_results(folder: Path, name: str, predictions: Sequence[Prediction], tasks: Mapping[str, str]) -> list[str]:
    """Predictions as evaluation servers take them: ``NAME.coco.json``, ``NAME.vqa.json``, ...; in a mixture
    ``NAME.SET.vqa.json``.

    Args:
        folder: where files go.
        name: of the files, without suffixes.
        predictions: of the whole split.
        tasks: set -> task; only some have a format of their own.

    Returns:
        A line for each set whose file could not be written, and why.
    """
    problems = []
    for dataset, members in by_set(predictions).items():
        task = tasks.get(dataset, DEFAULT_TASK)
        if task not in _FORMATS:
            continue
        suffix, id_field, text_field = _FORMATS[task]
        path = folder / f"{name}{f'.{dataset}' if dataset else ''}.{suffix}.json"
        rows = [{id_field: _result_id(task, reference), text_field: said} for reference, said in members]
        (twice, times), *_ = Counter(row[id_field] for row in rows).most_common(1)
        if times > 1:
            path.unlink(missing_ok=True)  # an earlier run's would be taken for this one's
            problems.append(f"{path.name}: not written: {id_field} {twice} comes {times} times, which servers refuse")
            continue
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")
    return problems


def _result_id(task: str, reference: Reference) -> int | str:
    name = reference.image_id if task == CAPTION else reference.id
    if task == "vizwiz":
        return name if Path(name).suffix else f"{name}.jpg"
    # GQA's ids are strings of digits.
    return int(name) if task != "gqa" and name.isascii() and name.isdigit() and str(int(name)) == name else name
