"""`PredictionReport`: what a split's predictions leave behind.

While `fit` runs, a picture of validation predictions goes to TensorBoard, Weights & Biases or MLflow, whichever logs. A
final evaluation (after `fit`, or `validate`, `test`, `predict`) writes ``predictions.jsonl``, ``predictions.png`` and
``report.html``, and prints a table per kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch.distributed
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from mmprefix.data.images import UndecodableImageError
from mmprefix.errors import InputError
from mmprefix.evaluation.html_report import write_report
from mmprefix.evaluation.pictures import SHOWN_IMAGES, Answer, Cell, as_stored, draw_cells, side_by_side, to_image
from mmprefix.evaluation.runs import Row, Run, exact_match_scores, facts_of, read_curves, versions
from mmprefix.files import replacing
from mmprefix.metrics import exact_match
from mmprefix.packing import EvaluationBatch, Reference
from mmprefix.vision import ImageTransform

Prediction = tuple[Reference, str]


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
    """Exact match per kind as text, next to a baseline where there is one."""
    kinds: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        kinds.setdefault((prediction[0].dataset, prediction[0].kind), []).append(prediction)
    datasets = list(dict.fromkeys(dataset for dataset, _ in kinds))
    named = any(datasets)
    more = [baseline_name] if baseline else []
    rows = [[*(["set"] if named else []), "kind", "question", "samples", "exact match", *more]]

    def add(dataset: str, kind: str, question: str, members: Sequence[Prediction], more: list[str]) -> None:
        of_set = [dataset] if named else []
        rows.append([*of_set, kind, question[:40], str(len(members)), f"{_accuracy(members):.4f}", *more])

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


def _accuracy(predictions: Sequence[Prediction]) -> float:
    return sum(exact_match(said, r.references) for r, said in predictions) / max(1, len(predictions))


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """A picture to TensorBoard, Weights & Biases or MLflow; other loggers take none."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [picture], step)
    elif isinstance(logger, MLFlowLogger):
        # A file for each step: with its own key and step, MLflow keeps them in the background and may lose the last.
        logger.experiment.log_image(logger.run_id, picture, f"{name}/step={step:08d}.png")


class _Gallery:
    """Images for the picture: those with a wrong answer first, as many others as there is room for."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.wrong: list[Cell] = []
        self.right: list[Cell] = []

    def add(
        self,
        batch: EvaluationBatch,
        predictions: Sequence[Prediction],
        transform: ImageTransform,
        picture: Callable[[int], Image.Image],
    ) -> None:
        """``picture`` gives a record's image, for batches that hold features in place of pixels."""
        of_images: dict[tuple[int, ...], list[Prediction]] = {}
        for number, (images, prediction) in enumerate(zip(batch.prompts.image_of.tolist(), predictions, strict=True)):
            # Samples without an image have nothing in common.
            of_images.setdefault(tuple(i for i in images if i >= 0) or (-1 - number,), []).append(prediction)
        for key, members in of_images.items():
            images = [image for image in key if image >= 0]
            answers = tuple(
                Answer(
                    r.instruction,
                    " | ".join(sorted(set(r.references))),
                    said,
                    exact_match(said, r.references) if r.references else None,
                )
                for r, said in members
            )
            group = self.right if all(answer.correct is not False for answer in answers) else self.wrong
            if len(group) >= self.room:
                continue
            pixels, first = batch.prompts.pixel_values, members[0][0]
            if not images:
                shown = []
            elif pixels is None:
                shown = [picture(first.order[0])]
            else:
                shown = [to_image(pixels[image], transform) for image in images[:SHOWN_IMAGES]]
            group.append(Cell(f"image {first.image_id}" if images else first.id, side_by_side(shown), answers))

    def cells(self) -> list[Cell]:
        wrong = self.wrong[: max(self.room // 2, self.room - len(self.right))]
        return [*wrong, *self.right[: self.room - len(wrong)]]


class PredictionReport(pl.Callback):
    """Collects predictions of a split; see the module's docstring for what it leaves where."""

    def __init__(self, folder: str, transform: ImageTransform, num_images: int = 24, name: str = "predictions") -> None:
        """Settings.

        Args:
            folder: where files go.
            transform: how pixels were normalised, to show them.
            num_images: images in a picture.
            name: of the files, without suffix.
        """
        self.folder = Path(folder)
        self.transform = transform
        self.num_images = num_images
        self.name = name
        self._text = ""
        self._start()

    def _start(self) -> None:
        self._predictions: list[Prediction] = []
        self._gallery = _Gallery(self.num_images)

    def _collect(self, trainer: pl.Trainer, split: str, outputs: Any, batch: EvaluationBatch) -> None:
        self._predictions += outputs
        picture = partial(trainer.datamodule.picture, split)  # type: ignore[attr-defined]
        self._gallery.add(batch, outputs, self.transform, picture)

    def _finish(self, trainer: pl.Trainer, split: str) -> None:
        predictions, gallery = self._gathered(trainer), self._gallery
        self._start()
        if not trainer.is_global_zero or not predictions:
            return
        write_predictions(self.folder / f"{self.name}.jsonl", predictions)
        if cells := gallery.cells():
            with replacing(self.folder / f"{self.name}.png") as temporary:
                draw_cells(cells).save(temporary, "PNG")
        self._write_page(trainer, split, predictions)
        if split == "predict" and not all(reference.references for reference, _ in predictions):
            text = f"predict: {len(predictions)} predictions"
        else:
            images = len({reference.image_id for reference, _ in predictions})
            name, baseline = trainer.datamodule.baseline(split)  # type: ignore[attr-defined]
            text = accuracy_table(f"{split}: {images} images, {len(predictions)} samples", predictions, name, baseline)
        self._text = text

    def _write_page(self, trainer: pl.Trainer, split: str, predictions: Sequence[Prediction]) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
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
            exact_match_scores(rows),
            read_curves(self.folder / "metrics.csv"),
            {
                "Split": split, **facts_of(self.folder), "Checkpoint": checkpoint,
                "Predictions": f"{self.name}.jsonl", "Versions": versions(),
            },
            datamodule.baseline(split) if any(row.references for row in rows) else ("", {}),
        )  # fmt: skip
        write_report(self.folder / f"{self.name.replace('predictions', 'report', 1)}.html", run, picture)

    def _gathered(self, trainer: pl.Trainer) -> list[Prediction]:
        gathered = [self._predictions]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self._predictions)
        once = {prediction[0].order: prediction for part in gathered for prediction in part}
        return [once[order] for order in sorted(once)]

    def _print(self) -> None:
        if self._text:  # at the very end, when the progress bar is closed
            print(f"\n{self._text}\n", flush=True)
        self._text = ""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the table."""
        self._print()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the table."""
        self._print()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the table."""
        self._print()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins anew: a sanity check may have left something."""
        self._start()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Collects."""
        self._collect(trainer, "val", outputs, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A picture while fitting, the whole report otherwise."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._finish(trainer, "val")
            return
        if not trainer.sanity_checking and (cells := self._gallery.cells()):
            for logger in trainer.loggers if trainer.is_global_zero else ():
                log_picture(logger, "val/predictions", draw_cells(cells), trainer.global_step)
        self._start()

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Collects."""
        self._collect(trainer, "test", outputs, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports."""
        self._finish(trainer, "test")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Collects."""
        self._collect(trainer, "predict", outputs, batch)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports."""
        self._finish(trainer, "predict")
