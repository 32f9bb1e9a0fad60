"""Callbacks of a run: throughput and utilization, skipped samples, time left, metrics that survive a resume."""

from __future__ import annotations

import csv
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from mmprefix.accounting import GIB, ModelFlops, Precision, measured_peak_flops, trained_parts
from mmprefix.errors import InputError
from mmprefix.files import replacing
from mmprefix.packing import BadSample, PackedBatch


class Throughput(pl.Callback):
    """Logs throughput since the last time it was logged: counted on the host, from numbers the collator knew.

    - `train/samples_per_second`, `train/tokens_per_second`: of all ranks. A sample is an image with one instruction;
      tokens are those of prefix and target, without padding.
    - `train/padding_share`: in [0, 1].
    - `train/tflops_per_device`: model TFLOP/s (`accounting.ModelFlops`) of the first rank.
    - `train/mfu`: the same as a share of the device's peak, where `model.peak_tflops` says what that is.
    - `train/peak_memory_gib`: largest memory of tensors since the start, on the first rank's GPU. Without a GPU it is
      `train/peak_rss_gib`: largest resident set of the process, with libraries and all.
    """

    def __init__(self) -> None:
        self._logged_at = 0
        self._flops_of: ModelFlops | None = None
        self._peak_flops: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._samples = self._tokens = self._padded = self._flops = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts what an image, a token, a pair and a label cost, and finds out the peak."""
        assert isinstance(pl_module.model, torch.nn.Module)
        try:
            self._flops_of = ModelFlops.of(pl_module.model.config, pl_module.lora)  # type: ignore[arg-type]
        except (NotImplementedError, RuntimeError) as error:  # shapes that depend on values
            message = " ".join(str(error).split())[:200]
            rank_zero_warn(f"train/tflops_per_device is not logged: this decoder's FLOPs can't be counted: {message}")
            return
        peak = pl_module.peak_tflops
        if peak == "measure":
            dtype = Precision.from_name(str(trainer.precision)).compute
            self._peak_flops = measured_peak_flops(pl_module.device, dtype)
            rank_zero_info(f"peak: {self._peak_flops / 1e12:.3g} TFLOP/s, measured with {dtype} matrix products")
        elif peak is not None:
            self._peak_flops = float(peak) * 1e12  # type: ignore[arg-type]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock after validation."""
        self._reset()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Counts; logs where the trainer logs."""
        self._samples += batch.num_samples
        self._tokens += batch.num_tokens
        self._padded += batch.input_ids.numel()
        if self._flops_of is not None:
            self._flops += self._flops_of.step(batch, trained_parts(pl_module.model))  # type: ignore[arg-type]
        # Once per optimizer step: accumulated micro-batches share a step number.
        due = trainer.global_step != self._logged_at and trainer.global_step % trainer.log_every_n_steps == 0
        if due and self._padded:
            self._logged_at = trainer.global_step
            seconds = time.perf_counter() - self._since
            pl_module.log("train/samples_per_second", trainer.world_size * self._samples / seconds)
            pl_module.log("train/tokens_per_second", trainer.world_size * self._tokens / seconds)
            pl_module.log("train/padding_share", 1 - self._tokens / self._padded)
            if self._flops_of is not None:
                pl_module.log("train/tflops_per_device", self._flops / seconds / 1e12)
            if self._peak_flops is not None:
                pl_module.log("train/mfu", self._flops / seconds / self._peak_flops)
            pl_module.log(*_peak_memory(pl_module.device))
            self._reset()


def _peak_memory(device: torch.device) -> tuple[str, float]:
    """Metric and value in GiB. Neither asks the device: the allocator keeps its statistics on the host."""
    if device.type == "cuda":
        return "train/peak_memory_gib", torch.cuda.max_memory_allocated(device) / GIB
    # getrusage(2): bytes on macOS, KiB elsewhere. On Linux it survives exec: started from a process that is larger than
    # training gets, this is that process's.
    unit = 1 if sys.platform == "darwin" else 1024
    return "train/peak_rss_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class BadSampleReport(pl.Callback):
    """Counts images that were skipped, names some at the end of each epoch, and all of them in ``skipped.jsonl``."""

    SHOWN = 10

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / "skipped.jsonl"
        # By split: validation runs inside a training epoch.
        self._bad: dict[str, list[BadSample]] = {"train": [], "val": [], "test": [], "predict": []}
        self._usable = dict.fromkeys(self._bad, 0)

    def _report(self, trainer: pl.Trainer, split: str) -> None:
        bad, self._bad[split] = self._bad[split], []
        if not bad:
            return
        lines = [str(one) for one in bad[: self.SHOWN]]
        if len(bad) > self.SHOWN:
            lines.append(f"and {len(bad) - self.SHOWN} more")
        # Not only on rank 0: each rank knows its own.
        print(f"{split}: {len(bad)} image(s) skipped (all in {self.file}):", *lines, sep="\n  ", flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            for one in bad:
                where = {"split": split, "epoch": trainer.current_epoch, "shard": one.shard, "key": one.key}
                file.write(json.dumps({**where, "reason": one.reason}, ensure_ascii=False) + "\n")

    def _collect(self, split: str, batch: Any) -> None:
        self._bad[split].extend(batch.bad)
        self._usable[split] += len(batch.references)

    def _nothing_usable(self, split: str, number: int) -> InputError:
        return InputError(f"data.{split}: expected images that can be decoded, all {number} were skipped: {self.file}")

    def _report_all(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Reports an evaluation.

        Raises:
            InputError: no process had anything to evaluate; on all of them.
        """
        counts = torch.tensor(
            [len(self._bad[split]), self._usable[split]], dtype=torch.float32, device=pl_module.device
        )
        self._report(trainer, split)
        self._usable[split] = 0
        bad, usable = (float(n) for n in trainer.strategy.reduce(counts, reduce_op="sum"))
        if bad and not usable:
            raise self._nothing_usable(split, int(bad))

    def _log(self, pl_module: pl.LightningModule, split: str) -> None:
        pl_module.log(f"{split}/bad_samples", float(len(self._bad[split])), reduce_fx="sum", sync_dist=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects."""
        self._bad["train"].extend(batch.bad)
        self._usable["train"] += batch.num_samples

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports; an epoch of which nothing was usable ends the run, before a checkpoint is made of it."""
        number, usable = len(self._bad["train"]), self._usable["train"]
        self._usable["train"] = 0
        self._log(pl_module, "train")
        self._report(trainer, "train")
        if number and not usable:
            raise self._nothing_usable("train", number)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Collects; the same records come again after the sanity check."""
        if not trainer.sanity_checking:
            self._collect("val", batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports; with nothing usable, there is no score."""
        self._log(pl_module, "val")
        self._report_all(trainer, pl_module, "val")

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Collects."""
        self._collect("test", batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports; with nothing usable, there is no score."""
        self._log(pl_module, "test")
        self._report_all(trainer, pl_module, "test")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Collects."""
        self._bad["predict"].extend(batch.bad)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports; nothing can be logged while predicting."""
        self._report(trainer, "predict")


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, with the time left until the end of the run."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._started: tuple[float, int] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Notes when and at which step this process began."""
        if self._started is None:
            self._started = (time.monotonic(), trainer.global_step)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Lightning's metrics without the version number, and ``left``."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if self._started is not None and trainer.global_step > self._started[1]:
            start, first_step = self._started
            per_step = (time.monotonic() - start) / (trainer.global_step - first_step)
            left = per_step * max(0.0, trainer.estimated_stepping_batches - trainer.global_step)
            metrics["left"] = f"{int(left) // 3600:d}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        return metrics


class _AppendingWriter(ExperimentWriter):
    """Keeps the rows that are there: a resumed run continues its file."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class ResumableCSVLogger(CSVLogger):
    """``metrics.csv`` directly in the run folder, continued by a resume instead of deleted."""

    def __init__(self, run_folder: str) -> None:
        super().__init__(run_folder, name="", version="", flush_logs_every_n_steps=20)
        self._experiment: _AppendingWriter | None = None

    @property
    @rank_zero_experiment  # type: ignore[untyped-decorator]
    def experiment(self) -> ExperimentWriter:
        """The writer, on rank 0."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment


def drop_rows_after(metrics_file: Path, step: int) -> None:
    """Removes rows of ``metrics.csv`` that a resume from ``step`` will write again."""
    if not metrics_file.is_file():
        return
    with metrics_file.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or [])
    kept = [row for row in rows if int(row["step"]) < step]
    if len(kept) == len(rows):
        return
    with replacing(metrics_file) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(kept)
