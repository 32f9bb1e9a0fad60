"""A signal ends a run after its step, with a checkpoint; what goes on from it ends as if nothing had been."""

import csv
import json
import os
import signal

import lightning.pytorch as pl
import pytest
import torch

from mmprefix.data.shards import write_shard
from mmprefix.training.checkpoints import newest_checkpoint, read_checkpoint
from mmprefix.training.preemption import EXIT_PREEMPTED
from tests.conftest import colour_record
from tests.test_resume import fit

FSDP = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--data.batch_size", "1"]
VALIDATED = ["--trainer.limit_val_batches", "1.0", "--trainer.logger", "true", "--data.eval_batch_size", "2"]


class SendSignal(pl.Callback):
    """To its own process, at one batch of one rank."""

    def __init__(self, send, rank=0, step=0, validation_batch=None):
        self.send, self.rank, self.step, self.validation_batch = send, rank, step, validation_batch

    def _send(self, trainer):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), getattr(signal, self.send))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.validation_batch is None:
            self._send(trainer)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, *rest):
        if batch_idx == self.validation_batch:
            self._send(trainer)


@pytest.fixture
def records(tmp_path):
    write_shard(tmp_path / "a.tar", [colour_record(n) for n in range(9)])  # 5 steps an epoch
    return tmp_path


def weights(tmp_path, name):
    return read_checkpoint(newest_checkpoint(tmp_path / f"{name}-run"))["state_dict"]


def saved_of(tmp_path, name):
    return sorted(path.name for path in (tmp_path / f"{name}-run" / "checkpoints").glob("step=*"))


def metrics(tmp_path, name):
    with (tmp_path / f"{name}-run" / "metrics.csv").open() as file:
        return [
            (row["step"], {k: v for k, v in row.items() if v and k.startswith("val/")}) for row in csv.DictReader(file)
        ]


def validations(tmp_path, name):
    return [row for row in metrics(tmp_path, name) if row[1]]


def go_on(tmp_path, name, arguments, **when):
    """Steps of a run that was signalled, and the lines of it and of the one that went on."""
    callback = ("tests.test_preemption.SendSignal", when)
    first = fit(tmp_path, name, 0, *arguments, callbacks=[callback], status=EXIT_PREEMPTED)
    step = max(line["step"] for line in first)
    saved = f"stopped by a signal; saved {tmp_path}/{name}-run/checkpoints/step={step:08d}.ckpt; go on with --ckpt_path last"
    assert (tmp_path / f"{name}.err").read_text().count(saved) == 1
    both = fit(tmp_path, name, 0, *arguments, "--ckpt_path", "last")
    assert (
        f"resuming from {tmp_path}/{name}-run/checkpoints/step={step:08d}.ckpt"
        in (tmp_path / f"{name}.out").read_text()
    )
    return step, both


def assert_nothing_happened(tmp_path, name, lines, expected="whole"):
    whole = fit_lines(tmp_path, expected)
    assert [(line["epoch"], line["step"], line["rank"], line["ids"]) for line in lines] == whole
    assert saved_of(tmp_path, name) == saved_of(tmp_path, expected), "what the run went on from goes in its turn"
    found, wanted = weights(tmp_path, name), weights(tmp_path, expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert validations(tmp_path, name) == validations(tmp_path, expected)
    assert validations(tmp_path, name)


def fit_lines(tmp_path, name):
    lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    return sorted((line["epoch"], line["step"], line["rank"], line["ids"]) for line in lines)


def test_one_process(records):
    """In the middle of an epoch, at its last batch, and in the middle of validation; written at once or in the background."""
    fit(records, "whole", 0, *VALIDATED)
    step, lines = go_on(records, "middle", VALIDATED, send="SIGTERM", step=2)
    assert step == 3, "the step is ended"
    assert_nothing_happened(records, "middle", lines)
    step, lines = go_on(records, "end", [*VALIDATED, "--checkpoints.asynchronous", "false"], send="SIGUSR1", step=4)
    assert step == 5
    assert_nothing_happened(records, "end", lines)
    step, lines = go_on(records, "validation", VALIDATED, send="SIGUSR1", step=5, validation_batch=1)
    assert step == 5
    assert_nothing_happened(records, "validation", lines)


def test_two_processes(records):
    """One of them is signalled. A step later both stop."""
    settings = [*VALIDATED, *FSDP]
    fit(records, "whole", 0, *settings)
    step, lines = go_on(records, "middle", settings, send="SIGUSR1", rank=1, step=1)
    assert step == 3
    assert_nothing_happened(records, "middle", lines)
    step, lines = go_on(records, "validation", settings, send="SIGTERM", rank=1, step=5, validation_batch=1)
    assert step == 5
    assert_nothing_happened(records, "validation", lines)


def test_resuming_where_there_is_nothing(records):
    fit(records, "new", 0, "--trainer.max_steps", "1", "--ckpt_path", "last")
    assert (
        f"--ckpt_path last: there is no {records}/new-run/checkpoints/step=*.ckpt: a new run begins"
        in (records / "new.out").read_text()
    )
    (records / "required.jsonl").touch()
    fit(records, "required", 0, "--ckpt_path", "last", "--resume", "required", status=2)
    assert (records / "required.err").read_text().splitlines()[-1] == (
        f"error: --ckpt_path last: there is no {records}/required-run/checkpoints/step=*.ckpt, and --resume is `required`"
    )
