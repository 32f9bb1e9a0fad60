"""Writing checkpoints: complete or absent, and, if wanted, in the background while training goes on.

In the background a save stands in training's way only while tensors are copied into the host's memory; the copies' memory
is kept for the next save. One save is written at a time: the next waits for it.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmprefix.errors import InputError, SaidElsewhereError
from mmprefix.files import replacing
from mmprefix.training import sharded
from mmprefix.training.agreement import together
from mmprefix.training.checkpoints import FILE_NAME, FOLDER, Scores, read_checkpoint


@dataclass
class BestArgs:
    """Which checkpoints are kept for what validation says of them, beside the newest.

    Attributes:
        metric: what validation logs: `val/exact_match`, `val/CIDEr`, `val/loss`, ...
        mode: whether more or less of it is better.
        keep: how many of the best are kept.
    """

    metric: str
    mode: Literal["max", "min"] = "max"
    keep: int = 1


@dataclass
class CheckpointArgs:
    """When checkpoints are saved, and which are kept.

    Attributes:
        every_n_steps: also every so many optimizer steps; else at the end of each epoch.
        keep_last: how many of the newest are kept.
        best: also keep the best by a metric of validation; `--ckpt_path best` finds the best of them.
        asynchronous: write in the background, while training goes on, for a copy of weights and optimizer state in the host's
            memory.
    """

    every_n_steps: int | None = None
    keep_last: int = 2
    best: BestArgs | None = None
    asynchronous: bool = True

    def callbacks(self, run_folder: Path) -> list[ModelCheckpoint]:
        """What Lightning saves by.

        Raises:
            InputError: a number below 1.
        """
        numbers = {"every_n_steps": self.every_n_steps, "keep_last": self.keep_last}
        if self.best is not None:
            numbers["best.keep"] = self.best.keep
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise InputError(f"checkpoints.{name}: expected at least 1, got {value}")
        return [NewestAndBest(self, run_folder / FOLDER)]


class NewestAndBest(ModelCheckpoint):
    """Saves every so many steps and at the end of each epoch, also of those that are not validated; keeps the newest.

    The best by a metric are kept, too, in the same folder: most were saved anyway, and none is written twice. What validation
    said of each is in a file of its own, `checkpoints.BEST_FILE`, and not in them: they may be written before it is known.
    """

    def __init__(self, args: CheckpointArgs, folder: Path) -> None:
        # By step, so that the newest stay: a kill while one is written leaves the other.
        super().__init__(
            folder, FILE_NAME, monitor="step", mode="max", save_top_k=args.keep_last, save_on_train_epoch_end=True,
            auto_insert_metric_name=False, enable_version_counter=False,
        )  # fmt: skip
        self._every_n_train_steps = args.every_n_steps or 0  # Lightning's own arguments take either this or epochs
        self.best = args.best
        self._scores: Scores | None = None
        self._kept: list[str] = []
        """Names of the best that were saved, best first."""
        self._awaited: int | None = None
        """Step of a validation whose checkpoint is saved when the epoch ends."""

    @property
    def state_key(self) -> str:
        """The same with other settings: a resumed run knows what to delete."""
        return "mmprefix.training.saving.Newest"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's, and looks whether there will be a metric.

        Raises:
            InputError: no validation.
        """
        super().on_train_start(trainer, pl_module)
        if self.best is not None and not any(trainer.num_val_batches):
            with together():
                raise InputError(f"checkpoints.best: expected a validation that logs {self.best.metric}, there is none")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves what is among the best, if it isn't saved already or will be in a moment.

        Raises:
            InputError: a metric that is not logged.
        """
        if self.best is None or trainer.fast_dev_run or trainer.state.fn != TrainerFn.FITTING:  # type: ignore[attr-defined]
            return
        value = self._value(trainer, self.best.metric)
        if trainer.sanity_checking or value is None:
            return
        scores, name = self._scores_of(trainer, self.best), f"{FILE_NAME.format(step=trainer.global_step)}.ckpt"
        scores.values[name] = value
        if name in scores.ranked([*self._kept, name])[: self.best.keep]:
            assert self.dirpath is not None
            path = os.path.join(self.dirpath, name)
            if trainer.strategy.broadcast(os.path.exists(path)) or self._last_global_step_saved == trainer.global_step:
                self._keep(trainer, name)
            elif trainer.is_last_batch:
                self._awaited = trainer.global_step
            else:
                self._save_checkpoint(trainer, path)
                self._keep(trainer, name)
        self._write_scores(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's; what it saved may be one of the best."""
        super().on_train_epoch_end(trainer, pl_module)
        awaited, self._awaited = self._awaited, None
        if awaited is not None and awaited == self._last_global_step_saved:
            self._keep(trainer, f"{FILE_NAME.format(step=awaited)}.ckpt")

    def save_now(self, trainer: pl.Trainer) -> None:
        """One that isn't due. It is counted as any: the run that goes on from it knows what to delete."""
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        """Lightning never removes the one that the run was resumed from: each resumption would leave one for ever."""
        assert self.dirpath is not None
        return previous != current and Path(self.dirpath).absolute() in Path(previous).absolute().parents

    def _value(self, trainer: pl.Trainer, metric: str) -> float | None:
        """The first process's value, so that all decide alike; None while a sanity check may not have come to it."""
        logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        found = trainer.callback_metrics.get(metric)
        value: float | None = trainer.strategy.broadcast(None if found is None else float(found))
        if value is not None:
            return value
        sets = getattr(trainer.datamodule, "set_names", lambda split: ())("val")  # type: ignore[attr-defined]
        if trainer.sanity_checking and metric.startswith(
            tuple(f"{name}/" for name in (*logged, *(f"val/{s}" for s in sets)))
        ):
            return None
        listed = ", ".join(logged) or "nothing"
        with together():
            raise InputError(f"checkpoints.best.metric: expected what validation logs ({listed}), got {metric!r}")

    def _scores_of(self, trainer: pl.Trainer, best: BestArgs) -> Scores:
        """Of a run that goes on, those from before; of steps that it goes back behind, none."""
        if self._scores is None:
            assert self.dirpath is not None
            self._scores, folder = Scores(best.metric, best.mode), Path(self.dirpath)
            before: Scores | None = trainer.strategy.broadcast(Scores.read(folder) if trainer.ckpt_path else None)
            if before is not None and (before.metric, before.mode) == (best.metric, best.mode):
                latest = f"{FILE_NAME.format(step=trainer.global_step)}.ckpt"
                self._scores.values = {name: value for name, value in before.values.items() if name <= latest}
                there = [name for name in self._scores.values if (folder / name).exists()]
                self._kept = trainer.strategy.broadcast(self._scores.ranked(there)[: best.keep])
        return self._scores

    def _write_scores(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self._scores is not None and self.dirpath is not None:
            self._scores.write(Path(self.dirpath))

    def _keep(self, trainer: pl.Trainer, name: str) -> None:
        assert self.best is not None
        assert self._scores is not None
        assert self.dirpath is not None
        ranked = self._scores.ranked({*self._kept, name})
        self._kept = ranked[: self.best.keep]
        for left in ranked[self.best.keep :]:
            path = os.path.join(self.dirpath, left)
            if path not in self.best_k_models:
                self._remove_checkpoint(trainer, path)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if os.path.basename(filepath) not in self._kept:
            super()._remove_checkpoint(trainer, filepath)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a full disk or a kill leaves the previous one whole."""

    def __init__(self, asynchronous: bool = False) -> None:
        """Settings.

        Args:
            asynchronous: copy, return, and write in the background. What fails then is raised by the next save, by
                `check`, or by `wait`. Whoever needs the file calls `wait` first.
        """
        self.asynchronous = asynchronous
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copy: Any = None
        self._unwanted: list[Path] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """See `lightning.fabric.plugins.CheckpointIO.save_checkpoint`.

        Raises:
            OSError: the file cannot be written; what stood there before is untouched.
        """
        self._save(checkpoint, lambda copied: _write_file(copied, Path(path)), Path(path))

    def save_shards(self, checkpoint: dict[str, Any], path: Path, group: Any) -> None:
        """This process's share of a checkpoint (`sharded`). All processes of ``group`` call it.

        Args:
            checkpoint: as Lightning makes it, with sharded tensors.
            path: the folder.
            group: of gloo, used for nothing else while a save is in the background.

        Raises:
            OSError: on all processes, if one cannot write.
        """

        def write(copied: dict[str, Any]) -> None:
            sharded.write(*sharded.split(copied), path, group)

        self._save(checkpoint, write, path)

    def _save(self, checkpoint: dict[str, Any], write: Callable[[dict[str, Any]], None], path: Path) -> None:
        self.wait()
        if not self.asynchronous:
            _named(write, checkpoint, path)
            return
        self._copy = copied = _copied(checkpoint, self._copy)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into pinned memory are still under way
        self._thread = threading.Thread(
            target=self._work, args=(partial(_named, write, copied, path),), name="checkpoint"
        )
        self._thread.start()

    def _work(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error
        else:
            self._remove_unwanted()

    def _remove_unwanted(self) -> None:
        while self._unwanted:
            _remove(self._unwanted.pop())

    @property
    def writing(self) -> bool:
        """Whether a save is in the background."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises what went wrong in the background, and waits for nothing."""
        if not self.writing:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is in the background.

        Raises:
            OSError: it could not be written; checkpoints that should have given way to it are still there.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._unwanted.clear()
            raise error
        self._remove_unwanted()

    def teardown(self) -> None:
        """Waits: what was asked for before the end is written."""
        self.wait()

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """All of a checkpoint, of either form, on the CPU."""
        self.wait()
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Deletes a file or a folder; while its successor is being written, after that."""
        if self.writing:
            self._unwanted.append(Path(path))
        else:
            self.wait()
            _remove(Path(path))


def _remove(path: Path) -> None:
    if path.is_dir():
        sharded.remove(path)
    else:
        path.unlink(missing_ok=True)


def _copied(value: Any, before: Any) -> Any:
    """A deep copy with all tensors on the CPU, in the memory of an earlier copy where that fits."""
    if isinstance(value, dict):
        old = before if isinstance(before, dict) else {}
        return {key: _copied(one, old.get(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        olds = before if isinstance(before, list | tuple) and len(before) == len(value) else [None] * len(value)
        return type(value)(_copied(one, old) for one, old in zip(value, olds, strict=True))
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    with torch.no_grad():
        source = value.to_local() if isinstance(value, DTensor) else value
        same = type(before) is type(value) and before.shape == value.shape and before.dtype == value.dtype
        if same and isinstance(value, DTensor):
            same = before.to_local().shape == source.shape
        if not same:
            if isinstance(value, DTensor):
                before = value.detach().to("cpu", copy=True)
            else:
                before = torch.empty_like(value.detach(), device="cpu", pin_memory=value.is_cuda)
        (before.to_local() if isinstance(before, DTensor) else before).copy_(source, non_blocking=True)
    return before


def _write_file(checkpoint: dict[str, Any], path: Path) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # else a crash of the machine could leave a renamed, empty file


def _named(write: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any], path: Path) -> None:
    """Runs ``write``; an error of the disk is told with the checkpoint's name."""
    try:
        write(checkpoint)
    except (OSError, RuntimeError) as error:
        # torch's writer hides a full disk behind a RuntimeError of its own, about a position.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        reason = f"cannot save {path}: {cause.strerror}; the checkpoint before it is untouched"
        kind = SaidElsewhereError if isinstance(cause, SaidElsewhereError) else OSError
        raise kind(cause.errno, reason) from error
