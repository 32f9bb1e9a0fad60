"""Shards copied to this machine: complete, current and checked, or absent."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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
        ".lock", *(["index.json"] if indexed else []),
        *(name for n in range(2) for name in (f"train-00000{n}.tar", f".train-00000{n}.tar.source")),
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
    # Without an index, size and time tell.
    filesystem.rm("/bucket/set/index.json")
    assert cache.fetch(sources, "data.train") == 2, "made by an index that is no more"
    assert not list(cache.folder.rglob("index.json"))
    assert cache.fetch(sources, "data.train") == 0
    filesystem.pipe_file("/bucket/set/train-000001.tar", bytes(len(before)))
    assert cache.fetch(sources, "data.train") == 1
    assert copies(cache)["train-000001.tar"] == bytes(len(before))


def test_a_file_of_the_same_size_is_another_file(bucket, tmp_path):
    cache, path = ShardCache(tmp_path / "cache"), tmp_path / "mine.tar"
    content = Path(bucket[0], "train-000000.tar").read_bytes()
    for written in (content, content[::-1]):
        path.write_bytes(written)
        # The same shard, spelled in two ways.
        assert cache.fetch([str(path), f"{tmp_path}/../{tmp_path.name}/mine.tar"], "data.train") == 1
        assert copies(cache) == {"mine.tar": written}


def test_a_complete_cache_is_read_without_a_right_to_write(sources, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache")
    cache.fetch(sources, "data.train")

    def only_read(path, mode="r", *arguments, **kwargs):
        assert "r" in mode
        return open(path, mode, *arguments, **kwargs)

    with monkeypatch.context() as patched:  # whoever runs the tests may have all rights
        patched.setattr(Path, "open", only_read)
        assert cache.fetch(sources, "data.train") == 0
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data.shard_cache: cannot write in .*/file: (File exists|Not a directory)"):
        ShardCache(tmp_path / "file").fetch(sources, "data.train")


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
        ("exec >&-; sleep 0.1; exit 5", "ended with status 5: no message"),
    ):
        with pytest.raises(InputError, match=f"^pipe:.*: expected a shard, the command {message}"):
            cache.fetch([f"pipe:{command}"], "data.train")
        assert not cache.path_of(f"pipe:{command}").exists()
    for command, size in (("true", 0), ("echo hi", 3), (f"head -c 3000 {local}/train-000000.tar", 3000)):
        with pytest.raises(
            InputError, match=f"pipe:{command}: expected a tar, got {size} bytes without its end-of-archive"
        ):
            cache.fetch([f"pipe:{command}"], "data.train")
    assert len(copies(cache)) == 1, "both outputs from above have the same name"
    assert expand_shards(r"pipe:cat a\ b.tar", "data.train", pipes=True) == [r"pipe:cat a\ b.tar"]
    for pattern in ("x/{a", "pipe:cat {a"):
        with pytest.raises(InputError, match="data.train: expected braces in pairs, got"):
            expand_shards(pattern, "data.train", pipes=True)
    assert not list(cache.folder.rglob("*.part"))


def test_a_disk_that_is_too_small_is_said_before_anything_is_copied(sources, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(
        InputError, match=r"data.shard_cache: expected room for [0-9,]+ bytes of data.train in .*, got 1,000"
    ):
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
