"""What can't work on several processes is said in one line, by one of them, and all end with a status."""

import json
import os
import subprocess

import pytest

from mmprefix.errors import InputError
from mmprefix.training.agreement import together
from mmprefix.training.fsdp import FullyShardedStrategy
from tests.several import errors, fit_each, run_each, statuses
from tests.test_resume import CONFIG

WIDER = json.dumps({**CONFIG["model"]["decoder"]["config"], "intermediate_size": 64})


def test_alone_nothing_is_changed():
    with together():
        pass
    with pytest.raises(InputError, match="^what is wrong$"), together():
        raise InputError("what is wrong")


def test_settings_and_checkpoints_that_do_not_fit(records):
    """One launch; after each refusal the processes are in step, and the next is run."""
    (alone,) = run_each(records, 1, {"alone": (0, ["--trainer.strategy", "fsdp2"])})
    assert statuses(alone[2]) == [2]
    assert errors(alone[2]) == [
        "error: trainer.strategy: expected several processes to shard the model over, got one; leave the strategy out, or give "
        "more with --trainer.devices"
    ]
    by_path = (
        f"{FullyShardedStrategy.__module__}.{FullyShardedStrategy.__name__}"  # a registered name takes no settings
    )
    sharded, once = ["--trainer.strategy", "fsdp2", "--data.batch_size", "1"], ["--trainer.max_steps", "1"]
    fit_each(records, 1, {"narrow": (1, once)})
    narrow = ["--ckpt_path", str(records / "narrow" / "step=00000001.ckpt"), "--model.decoder.config", WIDER]
    found = run_each(records, 2, {
        "replicas": (0, ["--trainer.strategy", by_path, "--trainer.strategy.replicas", "3", "--data.batch_size", "1"]),
        "wide": (0, [*sharded, *once, *narrow]),
        "wide_ddp": (0, ["--trainer.strategy", "ddp", *once, *narrow]),
        "wide_folder": (1, [*sharded, *once, "--model.decoder.config", WIDER]),
        "narrow_again": (0, [*sharded, *once, "--ckpt_path", str(records / "wide_folder" / "step=00000001.ckpt")]),
        "no_metric": (0, [*sharded, *once, "--checkpoints.best.metric", "val/x", "--trainer.limit_val_batches", "1.0"]),
    })  # fmt: skip
    assert [statuses(err) for _, _, err in found] == [[2, 2, 2, 0, 2, 2]] * 2
    first, second = (errors(err) for _, _, err in found)
    assert second == [], "said once"
    assert first[0] == "error: trainer.strategy.replicas: expected a divisor of the 2 processes, got 3"
    mlp = "model.decoder.model.layers.0.mlp.gate_proj.weight"
    for line, shapes in ((first[1], "(48, 32) there, (64, 32)"), (first[2], "(48, 32) there, (64, 32)"),
                         (first[3], "(64, 32) there, (48, 32)")):  # fmt: skip
        assert "the checkpoint does not fit the configured model: 3 of other shapes: " in line
        assert f"{mlp} {shapes} in the model" in line
    assert first[4].startswith("error: checkpoints.best.metric: expected what validation logs (")
    assert len(first) == 5


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, at a folder; a function makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("needs root that may mount a tmpfs")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_disk_that_cannot_be_written_ends_all_processes(records, small_disk, strategy, read_only):
    folder, make_read_only = small_disk
    if read_only:
        make_read_only()
    arguments = [
        "--trainer.strategy",
        strategy,
        "--data.batch_size",
        "1",
        "--trainer.max_epochs",
        "1",
        "--hang_timeout_minutes",
        "5",
    ]
    found = run_each(records, 2, {"run": (0, [*arguments, "--trainer.default_root_dir", folder / "run"])})
    reason = "Read-only file system" if read_only else "No space left on device"
    assert all(status for status, _, _ in found), found
    assert all(not err or "Traceback" not in err for _, _, err in found), "\n\n".join(err for _, _, err in found)
    said = [line for _, _, err in found for line in errors(err)]
    assert sum(reason in line for line in said) == 1, said
    if not read_only:
        (line,) = (line for line in said if reason in line)
        assert "cannot save" in line
        assert line.endswith("the checkpoint before it is untouched")
