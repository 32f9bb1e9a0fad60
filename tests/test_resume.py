"""Where a resumed run goes on: each remaining sample once, whatever the number of ranks, workers or the batch size."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml

from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.loading import EpochBatchSampler
from mmprefix.data.shards import write_shard
from mmprefix.errors import InputError
from mmprefix.packing import first_fit
from tests import forks
from tests.conftest import colour_record
from tests.test_cli import ENVIRONMENT

ROOT = Path(__file__).parents[1]
NUM_RECORDS = 103


class LogIds(pl.Callback):
    """Writes the ids of each training batch of this rank, after it was learned from."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        entry = {"epoch": trainer.current_epoch, "step": trainer.global_step, "rank": trainer.global_rank,
                 "ids": [reference.id for reference in batch.references],
                 "loss": float(trainer.callback_metrics.get("train/loss", "nan"))}  # fmt: skip
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def data_of(num_ranks, batch_size, epoch=1, num_records=NUM_RECORDS, **kwargs):
    """A data module as it would be on rank 0 of so many, without shards or a trainer's loops."""
    data = ShardDataModule(train="unread", batch_size=batch_size, seed=3, **kwargs)
    data._shards["train"] = range(num_records)
    data.trainer = SimpleNamespace(global_rank=0, world_size=num_ranks, current_epoch=epoch)
    return data


def samplers_of(data, epoch=1):
    samplers = []
    for rank in range(data.trainer.world_size):
        sampler = EpochBatchSampler(data.epoch_order, data.batch_size, rank, data.trainer.world_size, data._seen)
        sampler.set_epoch(epoch)
        samplers.append(sampler)
    return samplers


def steps_of(data, epoch=1):
    """Records of each step, on all ranks."""
    batches = [list(sampler) for sampler in samplers_of(data, epoch)]
    return [[i for batch in step for _, i in batch] for step in zip(*batches, strict=True)]


def checkpoint_of(data, done, epoch=1):
    progress = dict.fromkeys(("ready", "started", "processed"), done) | {"completed": done - 1}
    epochs = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    loops = {
        "epoch_progress": {"current": epochs, "total": dict(epochs)},
        "epoch_loop.batch_progress": {"current": progress, "total": dict(progress), "is_last_batch": False},
    }
    return {"ShardDataModule": data.state_dict(), "loops": {"fit_loop": loops}}


@pytest.mark.parametrize(
    ("before", "after"), [((1, 4), (2, 4)), ((2, 4), (1, 4)), ((4, 2), (3, 2)), ((2, 3), (2, 5)), ((2, 4), (2, 4))]
)
@pytest.mark.parametrize("done", [1, 5, 12])
def test_each_remaining_record_comes_once(before, after, done):
    first = data_of(*before)
    checkpoint = checkpoint_of(first, done)
    seen = [i for step in steps_of(first)[:done] for i in step]
    second = data_of(*after)
    second.resume(checkpoint)
    rest = steps_of(second)
    assert sorted(seen + [i for step in rest for i in step]) == list(range(NUM_RECORDS))
    order = np.arange(NUM_RECORDS)
    np.random.default_rng((3, 1)).shuffle(order)
    assert seen + [i for step in rest for i in step] == order.tolist(), "in the order of the epoch"
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert progress["processed"] + len(rest) == len(samplers_of(second)[0]), "the trainer's count leaves as many"
    assert progress["processed"] - progress["completed"] == 1, "what the trainer tells stages by stays"
    if before == after:
        assert progress["processed"] == done
        assert rest == steps_of(first)[done:]
    assert steps_of(second, epoch=2) == steps_of(data_of(*after), epoch=2), "the next epoch is whole"


def test_a_run_that_was_resumed_is_resumed_again():
    first = data_of(4, 2)
    second = data_of(3, 2)
    second.resume(checkpoint_of(first, 3))
    begun = second._position.batches
    third = data_of(1, 5)
    third.resume(checkpoint_of(second, begun + 4))
    everything = steps_of(first)[:3] + steps_of(second)[:4] + steps_of(third)
    assert sorted(i for step in everything for i in step) == list(range(NUM_RECORDS))


def test_other_data_and_other_budgets_are_refused():
    checkpoint = checkpoint_of(data_of(2, 4), 3)
    with pytest.raises(
        InputError, match="data.train: expected the 103 records that the checkpoint's epoch was begun with, got 99"
    ):
        data_of(2, 4, num_records=99).resume(checkpoint)
    with pytest.raises(InputError, match="data.max_tokens: expected max_tokens None as in the checkpoint, got 64"):
        data_of(2, 4, max_tokens=64).resume(checkpoint)
    budgeted = checkpoint_of(data_of(2, 4, max_tokens=64), 3)
    with pytest.raises(InputError, match="data.max_tokens: expected max_tokens 64 as in the checkpoint, got 65"):
        data_of(1, 4, max_tokens=65).resume(budgeted)
    data_of(2, 4, max_tokens=64).resume(budgeted)


LENGTHS = np.random.default_rng(0).integers(3, 40, NUM_RECORDS).tolist()


class Budgeted:
    """A run with a budget of tokens on so many ranks, as far as its data module and the trainer's counts go."""

    def __init__(self, num_ranks, checkpoint=None):
        self.data = data_of(num_ranks, 8, max_tokens=100)
        self.data._make_budget = lambda max_tokens: (first_fit(LENGTHS, max_tokens, 8), LENGTHS)
        if checkpoint is not None:
            self.data.resume(checkpoint)
        self.begun = 0 if checkpoint is None else self.progress(checkpoint)["processed"]

    @staticmethod
    def progress(checkpoint):
        return checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]

    def steps(self, epoch=1):
        """Of all ranks, from where it began to the epoch's end."""
        num_ranks, of_ranks = self.data.trainer.world_size, []
        for rank in range(num_ranks):
            count = SimpleNamespace(ready=self.begun if epoch == 1 else 0)
            loop = SimpleNamespace(batch_progress=SimpleNamespace(current=count))
            self.data.trainer = SimpleNamespace(
                global_rank=rank, world_size=num_ranks, current_epoch=epoch, fit_loop=SimpleNamespace(epoch_loop=loop)
            )
            sampler = self.data._budget_sampler()
            sampler.set_epoch(epoch)
            of_ranks.append(list(sampler))
            assert len(sampler) - count.ready == len(of_ranks[-1]), "as many as the trainer expects"
        return [[i for batch in step for _, i in batch] for step in zip(*of_ranks, strict=True)]

    def stopped_after(self, steps):
        """What it had seen, and its checkpoint."""
        seen = self.steps()[:steps]
        return [i for step in seen for i in step], checkpoint_of(self.data, self.begun + len(seen))


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (4, 3), (3, 3), (2, 7), (4, 3, 3, 1), (1, 8, 2, 2, 5)])
@pytest.mark.parametrize("done", [1, 2])
def test_each_remaining_record_of_a_budgeted_epoch_comes_once(ranks, done):
    everything, checkpoint = [], None
    for num_ranks in ranks:
        run = Budgeted(num_ranks, checkpoint)
        seen, checkpoint = run.stopped_after(done)
        everything += seen
        steps = run.steps(epoch=2)
        assert steps == Budgeted(num_ranks).steps(epoch=2), "the next epoch is whole"
    rest = run.steps()[done:]
    again = Budgeted(ranks[-1], checkpoint)
    assert again.steps() == rest, "the same ranks go on as if nothing had been"
    assert sorted(everything + [i for step in rest for i in step]) == list(range(NUM_RECORDS))
    assert max(sum(LENGTHS[i] for i in step) for step in rest or [[]]) <= 100 * ranks[-1]
    seen, checkpoint = again.stopped_after(len(rest))
    assert sorted(everything + seen) == list(range(NUM_RECORDS))
    other = Budgeted(2, checkpoint)
    if ranks[-1] != 2:
        assert other.begun == len(other.steps(epoch=2)), "complete: the trainer is about to begin the next"


def test_after_a_complete_epoch_the_next_is_whole():
    first, second = data_of(2, 4), data_of(1, 4)
    checkpoint = checkpoint_of(first, done=len(steps_of(first)))
    second.resume(checkpoint)
    assert steps_of(second) == steps_of(data_of(1, 4))
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert progress["processed"] == len(steps_of(second)), "complete in the new count, too"


@pytest.mark.parametrize("max_tokens", [None, 64])
def test_behind_an_epoch_other_data_and_other_ranks_will_do(max_tokens):
    first = data_of(2, 4, max_tokens=max_tokens)
    checkpoint = checkpoint_of(first, done=13)
    loops = checkpoint["loops"]["fit_loop"]
    loops["epoch_progress"]["current"]["processed"] += 1
    second = data_of(1, 4, num_records=300, max_tokens=max_tokens)
    second.resume(checkpoint)
    assert second._position.epoch == -1
    if max_tokens is None:
        assert loops["epoch_loop.batch_progress"]["current"]["processed"] == len(steps_of(second)) == 75


CONFIG = {
    "seed_everything": 0,
    "model": {
        "vision": {"name": "test_vit", "pretrained": False, "image_size": 32},
        "decoder": {"config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                               "num_attention_heads": 2, "num_key_value_heads": 1}},
        "tokenizer": {"name": "byte"},
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
                "enable_model_summary": False, "limit_val_batches": 0},
}  # fmt: skip


def fit(tmp_path, name, every, *arguments, callbacks=(), status=0):
    """Lines of `LogIds` of all runs of this name; what was printed is in ``name.out`` and ``name.err``.

    ``callbacks``: class path and arguments of further ones.
    """
    path = write_config(tmp_path, name, every, callbacks)
    command = ["mmprefix", "fit", "--config", path, "--trainer.default_root_dir", tmp_path / f"{name}-run", *arguments]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), ENVIRONMENT.get("PYTHONPATH", "")])}
    done = forks.run(command, env=environment, cwd=tmp_path, text=True, timeout=400)
    (tmp_path / f"{name}.out").write_text(done.stdout)
    (tmp_path / f"{name}.err").write_text(done.stderr)
    assert done.returncode == status, done.stderr
    return lines_of(tmp_path, name)


def lines_of(tmp_path, name):
    lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["epoch"], line["step"], line["rank"]))


def write_config(tmp_path, name, every, callbacks=()):
    """A config that learns from the shards of ``tmp_path`` and logs to ``name.jsonl``; see `fit`."""
    more = [{"class_path": path, "init_args": init} for path, init in callbacks]
    content = json.loads(json.dumps(CONFIG))
    shards = str(tmp_path / "*.tar")
    content["data"] = {"train": shards, "val": shards, "batch_size": 2, "num_workers": 1}
    callbacks = [{"class_path": "tests.test_resume.LogIds", "init_args": {"path": str(tmp_path / f"{name}.jsonl")}}]
    if every:
        init = {
            "dirpath": str(tmp_path / name),
            "filename": "{step:08d}",
            "every_n_train_steps": every,
            "save_top_k": -1,
        }
        callbacks.append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": init})
    content["trainer"]["callbacks"] = callbacks + more
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_one_process_goes_on_as_two_and_two_as_one(tmp_path):
    """Real processes with gloo. 13 records: the last step of two ranks has a record for the first of them only."""
    write_shard(tmp_path / "a.tar", [colour_record(n) for n in range(13)])
    one = fit(tmp_path, "one", 3)
    ids = [line["ids"] for line in one]
    assert [len(batch) for batch in ids[:7]] == [4] * 6 + [2], "two samples of each record"
    everything = sorted(id_ for batch in ids[:7] for id_ in batch)
    two_ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    checkpoint = next((tmp_path / "one").glob("*step=00000003.ckpt"))
    two = fit(tmp_path, "two", 2, *two_ranks, "--ckpt_path", str(checkpoint))
    rest = [id_ for line in two if line["epoch"] == 0 for id_ in line["ids"]]
    assert sorted(rest + [id_ for batch in ids[:3] for id_ in batch]) == everything
    assert {line["rank"] for line in two} == {0, 1}
    second = [id_ for line in two if line["epoch"] == 1 for id_ in line["ids"]]
    assert sorted(second) == everything
    # Back to one process, from the middle of the second epoch.
    checkpoint = max(
        (tmp_path / "two").glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"]
    )
    done = [id_ for line in two if line["epoch"] == 1 and line["step"] <= torch.load(checkpoint, weights_only=True)["global_step"]
            for id_ in line["ids"]]  # fmt: skip
    assert 0 < len(done) < len(everything)
    last = fit(tmp_path, "last", 0, "--ckpt_path", str(checkpoint))
    assert sorted(done + [id_ for line in last for id_ in line["ids"]]) == everything
    assert {line["epoch"] for line in last} == {1}


def test_a_checkpoint_of_an_epochs_last_batch_and_those_of_the_run_behind_it(tmp_path):
    """Found by kills at random steps: the third run began the second epoch anew."""
    write_shard(tmp_path / "a.tar", [colour_record(n) for n in range(6)])  # 3 steps an epoch
    whole = {line["step"]: line["ids"] for line in fit(tmp_path, "whole", 1)}
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    for before, name, step in (("whole", "second", 3), ("second", "third", 4), ("third", "fourth", 5)):
        (checkpoint,) = (tmp_path / before).glob(f"*step={step:08d}.ckpt")
        lines = fit(tmp_path, name, 1, "--ckpt_path", str(checkpoint))
        assert {line["step"]: line["ids"] for line in lines} == {s: ids for s, ids in whole.items() if s > step}
        assert {line["epoch"] for line in lines} == {1}
