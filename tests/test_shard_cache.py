"""Shards copied to this machine: complete, current and checked, or absent."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.shard_cache import ShardCache
from mmprefix.data.shards import ShardCollection, expand_shards
from mmprefix.errors import InputError
from tests.conftest import make_model


def contents(collection):
    return [(collection.image_bytes(n), collection.samples(n)) for n in range(len(collection))]


def copies(cache):
    return {path.name: path.read_bytes() for path in cache.folder.rglob("*.tar")}


@pytest.fixture
def sources(bucket):
    return expand_shards(bucket[1], "data.train")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_run_reads_copies_and_copies_once(bucket, tmp_path, indexed, monkeypatch):
    local, remote = bucket
    expected = contents(ShardCollection(local, "data.train"))
    filesystem = fsspec.filesystem("memory")
    if not indexed:
        filesystem.rm("/bucket/set/index.json")
    data = ShardDataModule(make_model()[1], train=remote, shard_cache=str(tmp_path / "cache"))
    found = data.shards("train")
    assert all(path.startswith(str(tmp_path / "cache")) for path in found.paths)
    assert found.indexed == (2 if indexed else 0)
    assert contents(found) == expected
    assert data.shard_cache.fetch(expand_shards(remote, "data.train"), "data.train") == 0
    for name in ("train-000000.tar", "train-000001.tar"):
        filesystem.pipe_file(f"/bucket/set/{name}", b"")
    assert contents(found) == expected, "nothing is read from elsewhere"
    assert {path.name for path in found_files(data.shard_cache)} == {
        ".lock", "train-000000.tar", "train-000001.tar", *(["index.json"] if indexed else []),
    }  # fmt: skip


def found_files(cache):
    return [path for path in cache.folder.rglob("*") if path.is_file()]


def test_only_what_changed_is_copied_anew(bucket, sources, tmp_path):
    cache, filesystem = ShardCache(tmp_path / "cache"), fsspec.filesystem("memory")
    assert cache.fetch(sources, "data.train") == 2
    index = json.loads(filesystem.cat_file("/bucket/set/index.json"))
    first = index["splits"]["train"]["shards"][0]
    content = bytearray(filesystem.cat_file("/bucket/set/train-000000.tar"))
    content[first["members"][0]] ^= 1  # another image, of the same size
    filesystem.pipe_file("/bucket/set/train-000000.tar", bytes(content))
    assert cache.fetch(sources, "data.train") == 0, "an index is believed"
    # The shard is not the one of the index: the copy that was made of it does not stay.
    first["sha256"] = "0" * 64
    filesystem.pipe_file("/bucket/set/index.json", json.dumps(index).encode())
    before = copies(cache)["train-000001.tar"]
    with pytest.raises(InputError, match=r"train-000000\.tar: expected SHA-256 0000.* as in index\.json, got "):
        cache.fetch(sources, "data.train")
    assert copies(cache) == {"train-000001.tar": before}
    assert not list(cache.folder.rglob("*.part"))
    first["sha256"] = hashlib.sha256(content).hexdigest()
    filesystem.pipe_file("/bucket/set/index.json", json.dumps(index).encode())
    assert cache.fetch(sources, "data.train") == 1
    assert copies(cache)["train-000000.tar"] == content
    # Without an index, the size tells.
    filesystem.rm("/bucket/set/index.json")
    assert cache.fetch(sources, "data.train") == 2, "made by an index that is no more"
    filesystem.pipe_file("/bucket/set/train-000001.tar", before + bytes(512))
    assert cache.fetch(sources, "data.train") == 1


def test_output_of_commands(bucket, tmp_path):
    local = bucket[0]
    data = ShardDataModule(
        make_model()[1], train=f"pipe:cat {local}/train-{{000000..000001}}.tar", shard_cache=str(tmp_path / "cache")
    )
    assert contents(data.shards("train")) == contents(ShardCollection(local, "data.train"))
    cache = data.shard_cache
    for command, message in (
        (f"cat {local}/train-000000.tar; echo no more >&2; exit 3", "ended with status 3: no more"),
        ("nosuchcommand", "ended with status 127: .*not found"),
        ("exit 4", "ended with status 4: no message"),
    ):
        with pytest.raises(InputError, match=f"^pipe:.*: expected a shard, the command {message}"):
            cache.fetch([f"pipe:{command}"], "data.train")
        assert not cache.path_of(f"pipe:{command}").exists()
    assert not list(cache.folder.rglob("*.part"))


def test_a_disk_that_is_too_small_is_said_before_anything_is_copied(sources, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"data.shard_cache: expected room for 0.0 GB of data.train in .*, got 0.0 GB"):
        cache.fetch(sources, "data.train")
    assert not copies(cache)


def test_what_killed_processes_left_is_removed(sources, tmp_path):
    cache = ShardCache(tmp_path / "cache")
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    folder = cache.path_of(sources[0]).parent
    folder.mkdir(parents=True)
    left, others = folder / f".x.tar.{int(ended.stdout)}.part", folder / f".x.tar.{os.getppid()}.part"
    left.touch()
    others.touch()
    cache.fetch(sources, "data.train")
    assert not left.exists()
    assert others.exists(), "somebody is at it"


def test_paths_that_were_never_copied_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"data.val: expected a copy of s3://b/x.tar at .*x.tar, found none"):
        ShardCache(tmp_path).paths(["s3://b/x.tar"], "data.val")


def test_processes_that_come_at_once_copy_once(bucket, tmp_path):
    mark = tmp_path / "mark"
    command = f"pipe:echo one >> {mark}; sleep 1; cat {bucket[0]}/train-000000.tar"
    program = (
        "import sys; from mmprefix.data.shard_cache import ShardCache; "
        "print(ShardCache(sys.argv[1]).fetch([sys.argv[2]], 'data.train'))"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "cache"), command]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate(timeout=60)[0].strip() for process in processes) == ["0", "1"]
    assert mark.read_text() == "one\n"


def test_an_interrupt_ends_commands_at_once(tmp_path):
    """And leaves no process and no part of a copy behind."""
    cache = ShardCache(tmp_path / "cache")
    mark = tmp_path / "began"
    command = f"pipe:echo $$ > {mark}; cat /dev/zero | head -c 9000000; sleep 300 & wait"

    def interrupt():
        while not (mark.is_file() and mark.read_text()):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread, start = threading.Thread(target=interrupt), time.monotonic()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        cache.fetch([command, f"{command} # another"], "data.train")
    thread.join()
    assert time.monotonic() - start < 30
    assert not list(cache.folder.rglob("*.part"))
    assert not list(cache.folder.rglob("*.tar"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
