"""Shards in object storage, with fsspec's in-memory filesystem in the place of a bucket."""

import pickle

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import DataLoader

from mmprefix.data import storage
from mmprefix.data.loading import EncodedRecord, RecordDataset, TextLimits
from mmprefix.data.shards import ShardCollection
from mmprefix.errors import InputError
from tests.conftest import make_model


class FlakyFileSystem(MemoryFileSystem):
    """Fails the first times that bytes are asked for."""

    protocol = "flaky"
    left = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, *args, **kwargs):
        if FlakyFileSystem.left:
            FlakyFileSystem.left -= 1
            raise ConnectionResetError("reset by\npeer")
        return super().cat_file(*args, **kwargs)


@pytest.mark.parametrize("form", ["{}", "{}/train-*.tar", "{}/train-{{000000..000001}}.tar", "{}/"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_bucket_holds_what_the_folder_holds(bucket, form, indexed):
    local, remote = bucket
    if not indexed:
        fsspec.filesystem("memory").rm("/bucket/set/index.json")
    here, there = ShardCollection(local, "data.train"), ShardCollection(form.format(remote), "data.train")
    assert there.indexed == (2 if indexed else 0)
    assert len(there) == len(here) == 5
    assert there.num_samples == 5
    for n in range(5):
        assert there.image_bytes(n) == here.image_bytes(n)
        assert there.samples(n) == here.samples(n)
        assert there.key(n) == here.key(n)
        assert there.path_of(n).startswith("memory://")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_processes_read_from_a_bucket(bucket, num_workers):
    dataset = RecordDataset(ShardCollection(bucket[1], "data.train"), make_model()[1], TextLimits(None, None, "none"))
    items = list(DataLoader(dataset, sampler=[(0, n) for n in range(5)], batch_size=None, num_workers=num_workers))
    assert all(isinstance(item, EncodedRecord) for item in items)
    assert [item.references[0].references for item in items] == [(f"number {n}",) for n in range(5)]


def test_a_connection_that_fails_is_tried_again_with_a_warning(bucket, monkeypatch):
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    collection = ShardCollection("flaky://bucket/set/train-*.tar", "data.train")
    expected = collection.image_bytes(0)
    FlakyFileSystem.left = 2
    with pytest.warns(UserWarning, match=r"flaky:.*train-000000\.tar: reset by peer; reading again in 0.0 s"):
        assert collection.image_bytes(0) == expected
    FlakyFileSystem.left = 3
    with pytest.raises(OSError, match=r"train-000000\.tar: reset by peer"), pytest.warns(UserWarning, match="again"):
        collection.image_bytes(0)
    FlakyFileSystem.left = 0
    gone = ShardCollection(bucket[1], "data.train")
    fsspec.filesystem("memory").rm("/bucket/set/train-000000.tar")
    with pytest.raises(FileNotFoundError):  # no error that passes
        gone.image_bytes(0)


def test_readers_travel_to_other_processes_without_what_they_opened(bucket):
    reader = storage.Reader([f"{bucket[0]}/train-000000.tar"])
    expected = reader.read(0, 100, 0)
    assert reader._open
    copied = pickle.loads(pickle.dumps(reader))
    assert not copied._open
    assert copied.read(0, 100, 0) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("memory://bucket/set/val-*.tar", r"none match \(memory://bucket/set holds 2 .tar files\)"),
        ("memory://bucket/none/val-*.tar", "the folder memory://bucket/none does not exist"),
        ("nosuch://bucket/x.tar", "nosuch://bucket/x.tar: cannot be read: Protocol not known"),
        ("pipe:cat x.tar", "a pipe can't be"),
    ],
)
def test_what_is_not_there_is_said(bucket, pattern, message):
    with pytest.raises(InputError, match=message):
        ShardCollection(pattern, "data.train")
