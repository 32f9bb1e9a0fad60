"""A scheduler's signal to make room: the step is ended, a checkpoint saved, and all processes stop with a status of their own.

SLURM sends a signal some time before it takes a node (`--signal=USR1@120`), Kubernetes and torchrun send SIGTERM. It may
reach one process or all. The handler sets a flag and nothing else: whatever it did with other processes would run in the
middle of whatever they do. The flags are added up at the end of each optimizer step, in a group of their own, and looked
at one step later, so that no step waits for it. In validation processes have different numbers of batches: who knows of a
flag waits for the others, who come at the latest when they have done theirs.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment

from mmprefix.training.checkpoints import FILE_NAME, FOLDER
from mmprefix.training.saving import AtomicCheckpointIO, NewestAndBest

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again."""
_KEY = "mmprefix/preempted"
_DUE = "validation_due"


class Preempted(Exception):
    """A signal ended the run after a checkpoint was saved."""

    def __init__(self, checkpoint: Path, status: int) -> None:
        super().__init__(f"stopped by a signal; saved {checkpoint}")
        self.status = status
        """What the process should exit with."""


class Preemption(Checkpoint):  # so that it comes after all other callbacks
    """Saves and stops at the end of the step in which SIGTERM or SIGUSR1 came.

    Raises:
        Preempted: on all processes, from `fit`.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._step = 0
        self._group: Any = None
        self._sum = torch.zeros(1)
        self._work: Any = None
        self._before: dict[signal.Signals, Any] = {}
        self._validation_due = False

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True

    # Before validation's sanity check; Lightning has registered its own by then, which talk to other processes.
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over the signals."""
        self._take_over(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over the signals; makes up for a validation that one of them cut short."""
        self._take_over(trainer)
        self._step = trainer.global_step
        if self._validation_due:
            self._validate(trainer)

    def _take_over(self, trainer: pl.Trainer) -> None:
        if not self._before:
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if trainer.world_size > 1 and self._group is None:
            self._store = torch.distributed.distributed_c10d._get_default_store()
            self._group = torch.distributed.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an optimizer step: stops, if one was signalled."""
        _io(trainer).check()  # a full disk ends the run now, not at the next save
        if trainer.global_step == self._step:  # gradients are still being accumulated: they would be lost
            return
        self._step = trainer.global_step
        if self._agreed():
            loop = trainer.fit_loop
            self._validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
            self._stop(trainer)

    def _agreed(self) -> bool:
        """Whether any process had been signalled, as of the step before this one; the same on all."""
        if self._group is None:
            return self._signalled
        known = False
        if self._work is not None:
            self._work.wait()
            known = bool(self._sum.item())
        self._sum = torch.tensor([float(self._signalled)])
        self._work = torch.distributed.all_reduce(self._sum, group=self._group, async_op=True)
        return known

    def _stop(self, trainer: pl.Trainer) -> None:
        saves = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        folder = saves[0].dirpath if saves else Path(trainer.default_root_dir) / FOLDER
        assert folder is not None
        path = Path(folder) / f"{FILE_NAME.format(step=trainer.global_step)}.ckpt"
        io = _io(trainer)
        io.wait()
        trainer.strategy.barrier("checkpoints on their way")
        if not trainer.strategy.broadcast(path.exists()):  # it may have been due anyway
            if saves and isinstance(saves[0], NewestAndBest):
                saves[0].save_now(trainer)
            else:
                trainer.save_checkpoint(path)
            io.wait()
        # The others go when the last is done.
        trainer.strategy.barrier("preemption")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        # Lightning's own launcher kills the first process when it sees another end with a status.
        started_by_first = isinstance(environment, LightningEnvironment) and trainer.local_rank
        raise Preempted(path, 0 if started_by_first else EXIT_PREEMPTED)

    # Validation

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Stops, if one was signalled: the rest of the validation is done by the run that goes on."""
        if self._before and not trainer.sanity_checking and self._heard():
            self._meet(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before ranks add up their results: some may be waiting to stop."""
        if self._before and not trainer.sanity_checking:
            self._meet(trainer)

    def _heard(self) -> bool:
        if self._group is not None:
            if self._signalled:
                self._store.set(_KEY, "")
            return bool(self._store.check([_KEY]))
        return self._signalled

    def _meet(self, trainer: pl.Trainer) -> None:
        stop = torch.tensor([float(self._signalled)])
        if self._group is not None:
            stop[0] = self._heard()
            torch.distributed.all_reduce(stop, group=self._group)
        if stop.item():
            self._validation_due = True
            self._stop(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint from before or within a validation says that one is due.

        One from within is told as one from behind the batch before it: going on from the middle is nothing that
        Lightning does well, and the rest would be no split.
        """
        if not self._validation_due:
            return
        checkpoint[_DUE] = True
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        for progress in (batches["total"], batches["current"]):
            progress["completed"] = progress["processed"] - 1
        for name, progress in loops.items():
            if name.startswith("epoch_loop.val_loop") and name.endswith("batch_progress"):
                for counts in (progress["total"], progress["current"]):
                    counts.update(dict.fromkeys(counts, counts["completed"]))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See `on_save_checkpoint`."""
        self._validation_due = checkpoint.get(_DUE, False)

    def _validate(self, trainer: pl.Trainer) -> None:
        """As the loop over an epoch's batches does it, under the number of the step that it follows."""
        self._validation_due = False
        epoch_loop = trainer.fit_loop.epoch_loop
        epoch_loop._batches_that_stepped -= 1
        trainer.validating = True
        epoch_loop.val_loop.run()
        trainer.training = True
        epoch_loop._batches_that_stepped += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the signals back."""
        if self._work is not None:
            self._work.wait()
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)
        self._signalled, self._group, self._work = False, None, None


def _io(trainer: pl.Trainer) -> Any:
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, AtomicCheckpointIO), "checkpoints that are complete or absent"
    return io
