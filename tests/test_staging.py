"""What waits in memory, and what is read of a picture: the same whatever the bounds."""

import json
from pathlib import Path

import pytest

from mmprefix.data.records import SourceRecord
from mmprefix.data.sources import READERS, SourceOptions, staged_records
from mmprefix.data.staging import Staging
from mmprefix.data.writing import _read, _usable


def test_samples_are_the_same_however_few_wait_in_memory(tmp_path, monkeypatch):
    captions = [{"id": n, "image_id": n * 7 % 10, "caption": f"caption {n}"} for n in range(40)]
    path = tmp_path / "c.json"
    path.write_text(json.dumps({
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(10)], "annotations": captions,
    }))  # fmt: skip
    found, rows = [], []
    for room in (0, 10_000, 1 << 20):
        monkeypatch.setattr("mmprefix.data.staging._ROOM", room)
        with Staging(tmp_path / "out", str(room)) as staging:
            READERS["coco"](SourceOptions(tmp_path, (path,)), staging)
            rows += staging._db.execute("SELECT count(*) FROM samples").fetchone()
            found.append([(r.images, r.name, r.read_samples()) for r in staged_records(tmp_path, staging)])
    assert rows[0] == 40 > rows[1] > rows[2] == 10, "otherwise all of it waited each time"
    assert found[0] == found[1] == found[2]
    assert [Path(images[0]).stem for images, _, _ in found[0]] == [str(n * 7 % 10) for n in range(10)], (
        "as they came first"
    )
    for _, _, (sample,) in found[0]:
        assert sample["targets"] == [c["caption"] for c in captions if str(c["image_id"]) == sample["id"]]


def test_an_image_of_any_size_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("mmprefix.data.writing._FIRST_READ", 3)
    monkeypatch.setattr("mmprefix.data.writing.MAX_IMAGE_BYTES", 50)
    for size in (0, 1, 3, 4, 6, 7, 49, 50):
        (tmp_path / "x").write_bytes(bytes(range(size)))
        assert _read(SourceRecord((str(tmp_path / "x"),), "x", "[]"), 0) == bytes(range(size))
    (tmp_path / "x").write_bytes(bytes(80))
    assert len(_read(SourceRecord((str(tmp_path / "x"),), "x", "[]"), 0)) == 51, "one more than allowed, to be refused"


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_a_question_that_is_listed_twice_is_one_however_few_samples_wait(tmp_path, monkeypatch, room):
    monkeypatch.setattr("mmprefix.data.staging._ROOM", room)
    with Staging(tmp_path, "twice") as staging:
        staging.answer("1", {"targets": ["yes"], "kind": "k"})
        for _ in range(2):
            staging.add("a.png", {"id": "1", "instruction": "q?"})
        ((_, _, samples),) = staging
        (sample,) = SourceRecord(("a.png",), "a.png", samples).read_samples()
        assert [(r.what, r.reason) for r in staging.refused()] == [("question 1", "id twice")]
    assert sample == {"id": "1", "instruction": "q?", "targets": ["yes"], "kind": "k"}, "twice the weight for nothing"


def test_a_sample_that_is_refused_keeps_its_id_from_nobody(tmp_path):
    samples = [{"id": "a", "instruction": "q", "targets": [" "]}, {"id": "a", "instruction": "other", "targets": ["t"]}]
    refusals = []
    record = SourceRecord(("a.png",), "a.png", json.dumps(samples))
    ((sample, _),) = _usable(record, True, lambda *what: refusals.append(what))
    assert sample["targets"] == ["t"]
    assert refusals == [("a.png: a", "empty target", "")]
