"""Checkpoints in the background and in folders: complete or absent, whatever happens while they are written."""

import math
import os
import resource
import signal
import threading

import pytest
import torch
from torch import multiprocessing

from mmprefix.errors import InputError
from mmprefix.training import saving, sharded
from mmprefix.training.checkpoints import (
    CONTENT_KEY,
    TIED,
    Scores,
    best_checkpoint,
    check_fits,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
)
from mmprefix.training.saving import AtomicCheckpointIO, BestArgs, CheckpointArgs


@pytest.fixture
def held(monkeypatch):
    """A disk that waits: each write to a file begins when the event is set."""
    event, write = threading.Event(), saving._write_file

    def waiting(checkpoint, path):
        assert event.wait(30)
        write(checkpoint, path)

    monkeypatch.setattr(saving, "_write_file", waiting)
    return event


def test_in_the_background_what_was_saved_is_what_was_there(tmp_path, held):
    io, path = AtomicCheckpointIO(asynchronous=True), tmp_path / "step=00000001.ckpt"
    weights, progress = torch.zeros(3), {"steps": [1]}
    io.save_checkpoint({"state_dict": {"w": weights}, "loops": progress}, path)
    weights += 1
    progress["steps"].append(2)
    assert io.writing
    assert not path.exists(), "complete or absent"
    held.set()
    io.wait()
    saved = torch.load(path, weights_only=True)
    assert torch.equal(saved["state_dict"]["w"], torch.zeros(3))
    assert saved["loops"] == {"steps": [1]}
    buffer = io._copy["state_dict"]["w"]
    io.save_checkpoint({"state_dict": {"w": weights}, "loops": progress}, path)
    assert io._copy["state_dict"]["w"] is buffer, "the memory is used again"
    io.wait()
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["w"], torch.ones(3))


def test_the_one_before_goes_when_the_next_is_there(tmp_path, held):
    io, first, second = AtomicCheckpointIO(asynchronous=True), tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    held.set()
    io.save_checkpoint({"x": 1}, first)
    io.wait()
    held.clear()
    io.save_checkpoint({"x": 2}, second)
    io.remove_checkpoint(first)
    assert first.exists(), "else a kill now would leave none"
    held.set()
    io.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["2.ckpt"]


def test_what_fails_in_the_background_is_raised_once_and_nothing_is_removed(tmp_path):
    io, first = AtomicCheckpointIO(asynchronous=True), tmp_path / "1.ckpt"
    io.save_checkpoint({"x": 1}, first)
    io.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        io.save_checkpoint({"x": torch.ones(1_000_000)}, tmp_path / "2.ckpt")
        io._unwanted.append(first)  # as if it had been asked for while the thread was at work
        io._thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(OSError, match=r"cannot save .*2\.ckpt: File too large; the checkpoint before it is untouched"):
        io.check()
    io.check()
    io.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["1.ckpt"]


def test_settings_are_checked(tmp_path):
    with pytest.raises(InputError, match=r"checkpoints\.keep_last: expected at least 1, got 0"):
        CheckpointArgs(keep_last=0).callbacks(tmp_path)
    with pytest.raises(InputError, match=r"checkpoints\.every_n_steps: expected at least 1, got -1"):
        CheckpointArgs(every_n_steps=-1).callbacks(tmp_path)
    with pytest.raises(InputError, match=r"checkpoints\.best\.keep: expected at least 1, got 0"):
        CheckpointArgs(best=BestArgs("val/loss", keep=0)).callbacks(tmp_path)


def test_the_best_of_what_is_there(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert best_checkpoint(tmp_path) is None
    names = [f"step={step:08d}.ckpt" for step in (1, 2, 3, 4, 5)]
    scores = Scores("val/x", "max", dict(zip(names, [0.5, 0.7, 0.7, math.nan, 0.9], strict=True)))
    assert scores.ranked(names) == [names[4], names[1], names[2], names[0]], "of equals the earlier, never no number"
    assert Scores("val/x", "min", scores.values).ranked(names) == [names[0], names[1], names[2], names[4]]
    scores.write(folder)
    assert best_checkpoint(tmp_path) is None, "none is complete"
    for name in names[:4]:
        (folder / name).touch()
    assert best_checkpoint(tmp_path) == (folder / names[1], "val/x", 0.7)
    (folder / "best.json").write_text("[1]")
    with pytest.raises(InputError, match=r"best\.json: expected metric, mode and values as fit writes them"):
        best_checkpoint(tmp_path)


# Folders. Processes of gloo share a scenario each way: starting them takes longer than all that they do.


def checkpoint_of(model, optimizer, step):
    return {"global_step": step, CONTENT_KEY: {}, TIED: {}, "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}  # fmt: skip


def trained(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))  # rows that don't divide
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def _process(rank, world_size, port, folder, scenario):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group("gloo")
    try:
        scenario(rank, world_size, folder)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def processes(folder, scenario, port=29611, world_size=2):
    multiprocessing.spawn(_process, (world_size, port, folder, scenario), nprocs=world_size)


def _save_in_all_ways(rank, world_size, folder):
    model, optimizer = trained(rank, world_size)
    group = torch.distributed.new_group(backend="gloo")
    io = AtomicCheckpointIO(asynchronous=True)
    io.save_shards(checkpoint_of(model, optimizer, 1), folder / "step=00000001.ckpt", group)
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().add_(1)  # while it is being written
    io.wait()
    if rank == 0:
        torch.save(whole, folder / "expected.pt")
    # A disk that one rank can't write to: all say so, and the checkpoint is absent.
    if rank == 1:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    with pytest.raises(OSError, match=r"cannot save .*step=00000002.ckpt: .*; the checkpoint before it is untouched"):
        io.save_shards(checkpoint_of(model, optimizer, 2), folder / "step=00000002.ckpt", group)
        io.wait()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()
    assert not (folder / "step=00000002.ckpt").exists()
    io.save_shards(checkpoint_of(model, optimizer, 2), folder / "step=00000002.ckpt", group)
    io.wait()


def _die_before_the_name(rank, world_size, folder):
    model, optimizer = trained(rank, world_size)
    group = torch.distributed.new_group(backend="gloo")
    if rank == 0:
        sharded._complete = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    AtomicCheckpointIO().save_shards(checkpoint_of(model, optimizer, 3), folder / "step=00000003.ckpt", group)


def test_processes_save_a_folder_and_one_reads_it(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    processes(folder, _save_in_all_ways)
    saved = read_checkpoint(folder / "step=00000001.ckpt")
    expected = torch.load(folder / "expected.pt")
    assert saved["state_dict"].keys() == expected.keys()
    assert all(torch.equal(saved["state_dict"][name], expected[name]) for name in expected)
    (optimizer,) = saved["optimizer_states"]
    assert optimizer["state"][0]["exp_avg"].shape == (3, 5)
    assert optimizer["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert read_checkpoint(folder / "step=00000001.ckpt", sharded.WEIGHTS)["optimizer_states"][0]["state"] == {}
    assert newest_checkpoint(tmp_path).name == "step=00000002.ckpt"
    # A kill after all was written, before it had its name.
    with pytest.raises(Exception, match="SIGKILL|terminated|closed|reset"):
        processes(folder, _die_before_the_name, port=29612)
    assert (folder / ".step=00000003.ckpt.part").is_dir()
    assert newest_checkpoint(tmp_path).name == "step=00000002.ckpt"
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["expected.pt", "step=00000001.ckpt", "step=00000002.ckpt"]
    # A file that was lost: what is left is not taken for all.
    lost = sorted((folder / "step=00000002.ckpt").glob("*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(InputError, match="expected all rows of .* values are missing"):
        read_checkpoint(folder / "step=00000002.ckpt")


def test_another_model_is_refused_by_name():
    shape = torch.Size
    model = {"a": shape([2, 3]), "b": shape([4]), "c": shape([1])}
    check_fits(model, {**model}, "x.ckpt")
    check_fits(model, {"a": shape([2, 3]), "c": shape([1])}, "x.ckpt", optional={"b"})
    with pytest.raises(InputError) as error:
        check_fits(model, {"a": shape([2, 4]), "b": shape([4]), "d": shape([1])}, "x.ckpt")
    assert str(error.value) == (
        "--ckpt_path x.ckpt: the checkpoint does not fit the configured model: 1 of other shapes: a (2, 4) there, (2, 3) in "
        "the model; 1 missing: c; 1 that the model has not: d"
    )
