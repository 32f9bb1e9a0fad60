"""Processes that are not alike are found out before they train together."""

import os
import subprocess

import yaml

from mmprefix.data.shards import write_shard
from mmprefix.training.agreement import difference, identity
from tests import forks
from tests.conftest import colour_record
from tests.test_cli import ENVIRONMENT
from tests.test_resume import CONFIG


def test_who_differs_from_the_first_in_what():
    one = {**identity("model:\n  lr: 1\n  a: 2"), "host": "node-a"}
    assert difference([one, {**one, "host": "node-b"}]) is None
    old = {**one, "host": "node-b", "torch": "2.11.0"}
    assert difference([one, one, old]) == (
        f"rank 2 (node-b): expected the torch of rank 0 (node-a), {one['torch']!r}, got '2.11.0'"
    )
    other = {**one, "host": "node-b", "settings": "model:\n  lr: 2\n  a: 2"}
    assert difference([one, other]) == "rank 1 (node-b): expected the settings of rank 0 (node-a), 'lr: 1', got 'lr: 2'"
    shorter = {**one, "settings": "model:\n  lr: 1"}
    assert difference([one, shorter]).endswith("'a: 2', got '(end)'")


def test_two_processes_with_other_settings_end_with_one_line(tmp_path):
    write_shard(tmp_path / "a.tar", [colour_record(n) for n in range(4)])
    config = {**CONFIG, "data": {"train": str(tmp_path / "a.tar"), "val": str(tmp_path / "a.tar")}}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    processes = []
    for rank in range(2):
        torchrun = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29641, "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
        arguments = [
            "--config",
            "fit.yaml",
            "--trainer.devices",
            "2",
            "--trainer.strategy",
            "ddp",
            "--data.batch_size",
            str(1 + rank),
        ]
        processes.append(forks.Process(
            ["mmprefix", "fit", *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **ENVIRONMENT, **{name: str(value) for name, value in torchrun.items()}},
        ))  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    lines = [line for text in errors for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "error: rank 1 (" in lines[0]
    assert lines[0].endswith("'batch_size: 1', got 'batch_size: 2'")
