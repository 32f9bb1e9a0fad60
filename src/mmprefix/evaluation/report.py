"""`PredictionReport`: what a split's predictions leave behind.

While `fit` runs, a picture of validation predictions goes to TensorBoard, Weights & Biases or MLflow, whichever logs. A
final evaluation (after `fit`, or `validate`, `test`, `predict`) writes ``predictions.jsonl``, ``predictions.png``,
``report.html`` and files for evaluation servers, and prints the module's scores as a table per kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from mmprefix.data.images import UndecodableImageError
from mmprefix.errors import InputError
from mmprefix.evaluation.html_report import write_report
from mmprefix.evaluation.pictures import SHOWN_IMAGES, Answer, Cell, as_stored, draw_cells, side_by_side
from mmprefix.evaluation.runner import (
    DEFAULT_TASK,
    Evaluation,
    Prediction,
    by_set,
    item_names,
    write_results,
)
from mmprefix.evaluation.runs import EXACT_MATCH, Row, Run, Scores, exact_match_scores, facts_of, read_curves, versions
from mmprefix.evaluation.scores import table
from mmprefix.files import replacing
from mmprefix.metrics import exact_match
from mmprefix.metrics.answers import listed
from mmprefix.metrics.captions import CAPTION
from mmprefix.metrics.intervals import mean_interval
from mmprefix.packing import Reference


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """One JSON object per line: id, image_id, kind, instruction, prediction, references; dataset, where there are several."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for reference, prediction in predictions:
            row = {
                "id": reference.id,
                "image_id": reference.image_id,
                "kind": reference.kind,
                "instruction": reference.instruction,
                "prediction": prediction,
                "references": list(reference.references),
                **({"dataset": reference.dataset} if reference.dataset else {}),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def accuracy_table(
    title: str, predictions: Sequence[Prediction], baseline_name: str = "", baseline: Mapping[str, float] | None = None
) -> str:
    """Exact match per kind as text, with 95% bootstrap intervals over images, next to a baseline where there is one."""
    kinds: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        kinds.setdefault((prediction[0].dataset, prediction[0].kind), []).append(prediction)
    datasets = list(dict.fromkeys(dataset for dataset, _ in kinds))
    named = any(datasets)
    more = [baseline_name] if baseline else []
    rows = [[*(["set"] if named else []), "kind", "question", "samples", "exact match", "95% interval", *more]]

    def add(dataset: str, kind: str, question: str, members: Sequence[Prediction], more: list[str]) -> None:
        of_set = [dataset] if named else []
        right = [float(exact_match(said, r.references)) for r, said in members]
        low, high = mean_interval(right, [r.image_id for r, _ in members])
        numbers = [str(len(members)), f"{sum(right) / len(right):.4f}", f"{low:.4f} to {high:.4f}"]
        rows.append([*of_set, kind, question[:40], *numbers, *more])

    for name in datasets:
        of_set = {kind: members for (dataset, kind), members in kinds.items() if dataset == name}
        for kind, members in of_set.items():
            instructions = {reference.instruction for reference, _ in members}
            question = instructions.pop() if len(instructions) == 1 else f"({len(instructions)} different)"
            of_baseline = [f"{baseline[kind]:.4f}" if kind in baseline else "-"] if baseline else []
            add(name, kind, question, members, of_baseline)
        if len(of_set) > 1 and len(datasets) > 1:
            add(name, "total", "", [p for members in of_set.values() for p in members], [""] if baseline else [])
    if len(kinds) > 1:
        add(*(("total", "") if named else ("", "total")), "", predictions, [""] if baseline else [])
    texts = 3 if named else 2
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if n < texts else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """A picture to TensorBoard, Weights & Biases or MLflow; other loggers take none."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [picture], step)
    elif isinstance(logger, MLFlowLogger):
        # A file for each step: with its own key and step, MLflow keeps them in the background and may lose the last.
        logger.experiment.log_image(logger.run_id, picture, f"{name}/step={step:08d}.png")


def gallery(
    evaluation: Evaluation, tasks: Mapping[str, str], room: int, pictures: Callable[[int], Sequence[Image.Image]]
) -> list[Cell]:
    """Records with the worst scores, for half of the room, and behind them those with the best; then ones without a score.

    Args:
        evaluation: what was found.
        tasks: set -> task.
        room: how many records.
        pictures: a record's pictures as the encoder takes them, none where it has none or they can't be read.
    """
    of_records: dict[int, list[tuple[Reference, Answer, float]]] = {}
    for name, members in by_set(evaluation.predictions).items():
        scored, task = evaluation.scores.get(name), tasks.get(name, DEFAULT_TASK)
        values = [math.nan if scored is None else scored.items[item][scored.metric] for item in item_names(members)]
        best = max((value for value in values if value > 0), default=1.0)  # of sets that are scored differently
        for (reference, said), value in zip(members, values, strict=True):
            expected = " | ".join(sorted(set(reference.references)))
            score = "" if scored is None or scored.task == DEFAULT_TASK else f"{scored.metric} {value:.2f}"
            right = None if scored is None or task == CAPTION else value >= 0.5  # a caption is neither
            answer = Answer(reference.instruction, expected, said, right, score)
            of_records.setdefault(reference.order[0], []).append((reference, answer, value / best))
    values_of = {record: sum(value for *_, value in members) / len(members) for record, members in of_records.items()}
    known = sorted((record for record, value in values_of.items() if value == value), key=values_of.__getitem__)
    worst = known[: (room + 1) // 2]
    best_ones = known[len(worst) :][::-1][: room - len(worst)]
    unknown = [record for record, value in values_of.items() if value != value]
    cells = []
    for record in [*worst, *best_ones, *unknown][:room]:
        answered, shown = of_records[record], pictures(record)
        first, *_ = answered[0]
        title = f"image {first.image_id}" if shown else first.id
        cells.append(Cell(title, side_by_side(shown), tuple(answer for _, answer, _ in answered)))
    return cells


def score_tables(
    split: str, evaluation: Evaluation, baseline_name: str = "", baseline: Mapping[str, float] | None = None
) -> list[str]:
    """Scores as text: sets that are scored by exact match in one table, each other one in its own.

    Args:
        split: names it in the first lines.
        evaluation: what was found.
        baseline_name, baseline: see `accuracy_table`; of exact match only.
    """
    of_sets, scores = by_set(evaluation.predictions), evaluation.scores
    exact = [p for name, members in of_sets.items() if name in scores and scores[name].task == "exact" for p in members]
    tables = []
    if exact:
        images = len({reference.image_id for reference, _ in exact})
        title = f"{split}: {images} images, {len(exact)} samples"
        tables.append(accuracy_table(title, exact, baseline_name, baseline))
    for name, members in of_sets.items():
        where = f"{split} {name}" if name else split
        if name not in scores:
            lacking = [reference.id for reference, _ in members if not reference.references]
            why = f", not scored: no references for {listed(lacking)}"
            tables.append(f"{where}: {len(members)} predictions{why if len(lacking) < len(members) else ''}")
        elif scores[name].task != "exact":
            tables.append(table(scores[name], f"{where}: "))
    if evaluation.skipped:
        tables.append(f"{split}: {_of_skipped(evaluation)}")
    return [*tables, f"no scores: {evaluation.problem}"] if evaluation.problem else tables


def _of_skipped(evaluation: Evaluation) -> str:
    return f"{evaluation.skipped} image(s) skipped, in none of these numbers; skipped.jsonl names them"


def page_scores(evaluation: Evaluation, rows: Sequence[Row]) -> Scores:
    """Scores of an evaluation as a page takes them.

    Args:
        evaluation: what was found.
        rows: its predictions.
    """
    if not evaluation.scores:
        return exact_match_scores(rows)
    scores = Scores({}, primary="")
    for name, scored in evaluation.scores.items():
        titles = {"exact_match": EXACT_MATCH}
        places = [n for n, row in enumerate(rows) if row.dataset == name]
        items = item_names([evaluation.predictions[n] for n in places])
        for n, item in zip(places, items, strict=True):
            for metric, value in scored.items[item].items():
                title = titles.get(metric, metric)
                scores.items.setdefault(title, np.full(len(rows), np.nan))[n] = value
        scores.primary = scores.primary or titles.get(scored.metric, scored.metric)
        if len(evaluation.scores) == 1:  # what several sets score is no number of all of them
            of_corpus = {titles.get(row.name, row.name): row for row in scored.rows if not row.axis}
            scores.corpus = {title: row.value for title, row in of_corpus.items()}
            scores.intervals = {title: row.interval for title, row in of_corpus.items() if row.interval}
        where = f"{name}: " if name else ""
        unavailable = (f"{metric} unavailable: {why}" for metric, why in scored.unavailable.items())
        rules = () if scored.task == DEFAULT_TASK else (scored.rules,)
        scores.notes += [f"{where}{text}" for text in (*rules, *unavailable, *scored.notes)]
    if evaluation.skipped:
        scores.notes.append(_of_skipped(evaluation))
    return scores


class PredictionReport(pl.Callback):
    """Reports the predictions of a split; see the module's docstring for what it leaves where."""

    def __init__(self, folder: str, num_images: int = 24, name: str = "predictions") -> None:
        """Settings.

        Args:
            folder: where files go.
            num_images: records in a picture.
            name: of the files, without suffix.
        """
        self.folder = Path(folder)
        self.num_images = num_images
        self.name = name

    def _cells(self, trainer: pl.Trainer, evaluation: Evaluation, split: str) -> list[Cell]:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]

        def pictures(record: int) -> list[Image.Image]:
            try:
                return list(datamodule.pictures(split, record, SHOWN_IMAGES))
            except (UndecodableImageError, InputError, OSError):  # a picture must not end a run
                return []

        return gallery(evaluation, datamodule.tasks(split), self.num_images, pictures)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        evaluation: Evaluation = pl_module.evaluation  # type: ignore[assignment]
        if not trainer.is_global_zero or not evaluation.predictions:
            return
        write_predictions(self.folder / f"{self.name}.jsonl", evaluation.predictions)
        with replacing(self.folder / f"{self.name}.png") as temporary:
            draw_cells(self._cells(trainer, evaluation, split)).save(temporary, "PNG")
        self._write_page(trainer, split, evaluation)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        problems = write_results(self.folder, self.name, evaluation.predictions, datamodule.tasks(split))
        tables = score_tables(split, evaluation, *datamodule.baseline(split))
        print("\n" + "\n\n".join([*tables, *problems]) + "\n", flush=True)

    def _write_page(self, trainer: pl.Trainer, split: str, evaluation: Evaluation) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        predictions = evaluation.predictions
        rows = [
            Row(r.id, r.image_id, r.kind, r.instruction, said, tuple(r.references), r.dataset)
            for r, said in predictions
        ]

        def picture(row: int) -> Image.Image | str:
            try:
                return as_stored(datamodule.originals(split, predictions[row][0].order[0]))
            except (UndecodableImageError, InputError, OSError):  # a page must not end a run
                return "picture can't be read"

        checkpoint = f"{trainer.ckpt_path}" if trainer.ckpt_path else f"the weights of step {trainer.global_step:,}"
        run = Run(
            self.folder.resolve().name,
            rows,
            page_scores(evaluation, rows),
            read_curves(self.folder / "metrics.csv"),
            {
                "Split": split, **facts_of(self.folder), "Checkpoint": checkpoint,
                "Predictions": f"{self.name}.jsonl", "Versions": versions(),
            },
            datamodule.baseline(split) if any(row.references for row in rows) else ("", {}),
        )  # fmt: skip
        write_report(self.folder / f"{self.name.replace('predictions', 'report', 1)}.html", run, picture)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """What can't be scored was predicted all the same."""
        evaluation: Evaluation = pl_module.evaluation  # type: ignore[assignment]
        if evaluation.problem and trainer.state.fn != TrainerFn.FITTING:
            write_predictions(self.folder / f"{self.name}.jsonl", evaluation.predictions)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports, when the module has scored and the progress bar is closed; while fitting, a picture for loggers."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._finish(trainer, pl_module, "val")
            return
        evaluation: Evaluation = pl_module.evaluation  # type: ignore[assignment]
        if trainer.sanity_checking or not trainer.is_global_zero or not evaluation.predictions:
            return
        picture = draw_cells(self._cells(trainer, evaluation, "val"))
        for logger in trainer.loggers:
            log_picture(logger, "val/predictions", picture, trainer.global_step)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports."""
        self._finish(trainer, pl_module, "test")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports."""
        self._finish(trainer, pl_module, "predict")
