"""`prepare`: every published format, written here in small, through the command line; interruption and hostile input."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mmprefix.data import writing
from mmprefix.data.index import read_index
from mmprefix.data.shards import ShardCollection, write_shard
from mmprefix.data.sources import READERS, SourceOptions, staged_records
from mmprefix.data.staging import Staging
from mmprefix.data.writing import Job, _header, alone_in, write_chunk
from mmprefix.errors import InputError
from mmprefix.prepare import run

NAMES = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg", "COCO_val2014_000000000133.jpg"]


def picture(path, colour, size=(32, 24), form=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), colour, np.uint8)).save(path, form)
    return path.read_bytes()


@pytest.fixture
def images(tmp_path):
    """A folder of three pictures; their bytes by name."""
    return {name: picture(tmp_path / "images" / name, (80 * n, 10, 200)) for n, name in enumerate(NAMES)}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def prepared(tmp_path, source, *arguments, split="val", status=0, images="images"):
    out = tmp_path / "out"
    folder = ["--images", str(tmp_path / images)] if images else []
    assert run([source, "--out", str(out), "--split", split, *folder, "--processes", "2", *arguments]) == status
    return ShardCollection(str(out / f"{split}-*.tar"), "data.val", needs_target="--no-targets" not in arguments)


def samples_of(collection):
    return [sample for n in range(len(collection)) for sample in collection.samples(n)]


def refused(tmp_path, split="val"):
    path = tmp_path / "out" / f"{split}.refused.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Formats


def test_coco_captions_become_targets_of_one_sample_and_bytes_are_copied(tmp_path, images, capsys):
    captions = write(tmp_path / "captions.json", {
        "info": {"year": 2014},
        "annotations": [  # in no order of images, as in the published files
            {"id": 1, "image_id": 73, "caption": "a dog "},
            {"id": 2, "image_id": 42, "caption": "a\nred  house"},
            {"id": 3, "image_id": 73, "caption": "a brown dog"},
            {"id": 4, "image_id": 999, "caption": "of nothing"},
            {"id": 5, "image_id": 42, "caption": "  "},
            {"id": 6, "image_id": 42, "caption": None},
            {"id": 7, "image_id": 500, "caption": "a picture that is not there"},
        ],
        "images": [*({"id": int(name[-10:-4]), "file_name": name} for name in NAMES), {"id": 500, "file_name": "gone.jpg"}],
    })  # fmt: skip
    collection = prepared(tmp_path, "coco", "--annotations", captions)
    assert [(s.id, s.instruction, s.targets) for s in samples_of(collection)] == [
        ("73", "caption en", ("a dog", "a brown dog")), ("42", "caption en", ("a red house",)),
    ]  # fmt: skip
    assert [collection.image_bytes(n) for n in range(2)] == [images[NAMES[1]], images[NAMES[0]]]
    reasons = {(r["what"], r["reason"]) for r in refused(tmp_path)}
    assert reasons == {
        ("image 999", "unknown image"), ("caption 6", "bad entry"), (NAMES[2], "no caption"),
        (f"{NAMES[0]}: 42", "empty target"), ("gone.jpg", "no file"),
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "1 shard: 2 images, 2 samples, 3 targets" in printed
    assert "refused: 5 (" in printed
    assert "each named in" in printed


def test_coco_without_annotations_is_a_set_to_predict(tmp_path, images):
    captions = write(tmp_path / "c.json", {"images": [{"id": 42, "file_name": NAMES[0]}], "annotations": []})
    collection = prepared(tmp_path, "coco", "--annotations", captions, "--no-targets")
    assert [(s.id, s.targets) for s in samples_of(collection)] == [("42", ())]
    with pytest.raises(InputError, match="expected a `target`"):  # the index is no reason to trust it for training
        ShardCollection(collection.paths, "data.train")


def test_karpathy_split(tmp_path, images):
    (tmp_path / "images" / "val2014").mkdir()
    os.rename(tmp_path / "images" / NAMES[1], tmp_path / "images" / "val2014" / NAMES[1])
    content = {"dataset": "coco", "images": [
        {"filename": name, "filepath": "val2014", "cocoid": n, "split": split, "sentences": [{"raw": f"caption {n}"}]}
        for n, (name, split) in enumerate(zip(NAMES, ("train", "restval", "test"), strict=True))
    ]}  # fmt: skip
    karpathy = write(tmp_path / "dataset_coco.json", content)
    collection = prepared(tmp_path, "coco", "--annotations", karpathy, split="train")
    assert [(s.id, s.targets) for s in samples_of(collection)] == [("0", ("caption 0",)), ("1", ("caption 1",))]
    assert len(prepared(tmp_path, "coco", "--annotations", karpathy, split="test")) == 1
    assert set(read_index(tmp_path / "out")) == {"train", "test"}, "splits share a folder and its index"


def vqa_files(tmp_path, answered=(420, 730, 731)):
    questions = {"data_subtype": "val2014", "task_type": "Open-Ended", "questions": [
        {"image_id": 42, "question": "How many?", "question_id": 420},
        {"image_id": 73, "question": "Is it red?", "question_id": 730},
        {"image_id": 42, "question": "What is it?", "question_id": 731},
    ]}  # fmt: skip
    answers = {
        420: (["2"] * 9 + ["3"], "number"),
        730: (["yes"] * 6 + ["no"] * 4, "yes/no"),
        731: (["tv"] * 10, "other"),
    }
    annotations = {"annotations": [
        {"question_id": number, "image_id": 0, "answer_type": answers[number][1], "multiple_choice_answer": answers[number][0][0],
         "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers[number][0])]}
        for number in answered
    ]}  # fmt: skip
    return [
        "--questions", write(tmp_path / "q.json", questions), "--annotations", write(tmp_path / "a.json", annotations),
    ]  # fmt: skip


def test_vqa_keeps_all_ten_answers_and_joins_questions_of_an_image(tmp_path, images):
    collection = prepared(tmp_path, "vqa", *vqa_files(tmp_path))
    assert len(collection) == 2
    first, second = collection.samples(0)
    assert (first.id, first.image_id, first.kind, first.instruction) == ("420", "42", "number", "How many?")
    assert first.targets == ("2",)
    assert first.answers == ("2",) * 9 + ("3",)
    assert (second.id, second.kind) == ("731", "other")
    assert read_index(tmp_path / "out")["val"]["kinds"] == {"number": 1, "other": 1, "yes/no": 1}


def test_vqa_names_what_has_no_partner_and_takes_an_instruction(tmp_path, images):
    arguments = [*vqa_files(tmp_path, answered=(420, 730)), "--instruction", "answer en {question}"]
    collection = prepared(tmp_path, "vqa", *arguments)
    assert [s.instruction for s in samples_of(collection)] == ["answer en How many?", "answer en Is it red?"]
    assert [(r["what"], r["reason"]) for r in refused(tmp_path)] == [("question 731", "no answers")]


def test_vizwiz_okvqa_textvqa_docvqa(tmp_path, images):
    vizwiz = write(tmp_path / "vizwiz.json", [
        {"image": NAMES[0], "question": "What?", "answers": [{"answer": "tin", "answer_confidence": "yes"}] * 10,
         "answer_type": "other", "answerable": 1},
        {"question": "no image"},
    ])  # fmt: skip
    sample = prepared(tmp_path, "vqa", "--annotations", vizwiz, split="vizwiz").samples(0)[0]
    assert (sample.targets, len(sample.answers), sample.kind) == (("tin",), 10, "other")
    textvqa = write(tmp_path / "textvqa.json", {"dataset_type": "val", "data": [
        {"question": "what brand?", "image_id": NAMES[0][:-4], "question_id": 5, "answers": ["x", "nokia", "nokia"]},
    ]})  # fmt: skip
    sample = prepared(tmp_path, "textvqa", "--annotations", textvqa, split="text").samples(0)[0]
    assert (sample.id, sample.targets, sample.answers) == ("5", ("nokia",), ("x", "nokia", "nokia"))
    docvqa = write(tmp_path / "docvqa.json", {"data": [
        {"questionId": 9, "question": "date?", "image": NAMES[1], "answers": ["1 May"], "question_types": ["form", "table"]},
    ]})  # fmt: skip
    sample = prepared(tmp_path, "textvqa", "--annotations", docvqa, split="doc").samples(0)[0]
    assert (sample.id, sample.kind, sample.image_id) == ("9", "form", NAMES[1][:-4])


def test_gqa_and_scienceqa(tmp_path, images):
    gqa = write(tmp_path / "gqa.json", {
        "001": {"question": "Is it?", "imageId": NAMES[0][:-4], "answer": "yes", "types": {"structural": "verify"}},
        "002": {"imageId": "1"},
    })  # fmt: skip
    sample = prepared(tmp_path, "gqa", "--annotations", gqa, split="gqa").samples(0)[0]
    assert (sample.id, sample.targets, sample.kind) == ("001", ("yes",), "verify")
    assert [r["reason"] for r in refused(tmp_path, "gqa")] == ["bad entry"]
    picture(tmp_path / "images" / "val" / "7" / "image.png", 5)
    problems = {
        "7": {"question": "Which?", "choices": ["iron", "wood"], "answer": 1, "hint": "Look.", "image": "image.png",
              "split": "val", "subject": "natural science"},
        "8": {"question": "Text?", "choices": ["a"], "answer": 0, "image": None, "split": "val"},
        "9": {"question": "Other?", "choices": ["a"], "answer": 0, "image": "image.png", "split": "train"},
    }  # fmt: skip
    science = write(tmp_path / "problems.json", problems)
    collection = prepared(tmp_path, "scienceqa", "--annotations", science)
    samples = samples_of(collection)
    sample = next(s for s in samples if s.images)
    assert sample.instruction == "Which?\nContext: Look.\nOptions: (A) iron (B) wood"
    assert (sample.targets, sample.kind) == (("B",), "natural science")
    assert [s.id for s in samples if not s.images] == ["8"], "about text only"
    assert not refused(tmp_path)


def test_textcaps_chartqa_and_samples_without_an_image(tmp_path, images):
    textcaps = write(tmp_path / "textcaps.json", {"data": [
        *({"image_id": NAMES[n][:-4], "caption_id": m, "caption_str": f"a sign says  {m}"} for m in (1, 2) for n in (0, 1)),
        {"image_id": 3.5, "caption_str": "no image"}, {"image_id": NAMES[0][:-4], "caption_str": 7},
    ]})  # fmt: skip
    samples = samples_of(prepared(tmp_path, "textcaps", "--annotations", textcaps, split="caps"))
    assert [(s.id, s.image_id, s.instruction, s.targets) for s in samples] == [
        (name[:-4], name[:-4], "caption en", ("a sign says 1", "a sign says 2")) for name in NAMES[:2]
    ]
    assert [(r["what"], r["reason"]) for r in refused(tmp_path, "caps")] == [
        ("textcaps.json: data[4]", "bad entry"), ("textcaps.json: data[5]", "bad entry"),
    ]  # fmt: skip
    asked = [
        {"imgname": NAMES[0], "query": "How many?", "label": "12.5"},
        {"imgname": NAMES[1], "query": "Which?", "label": "a"},
    ]
    human, augmented = write(tmp_path / "h.json", asked), write(tmp_path / "m.json", [*asked, {"query": "no image"}])
    samples = samples_of(prepared(tmp_path, "chartqa", "--annotations", human, augmented, split="charts"))
    assert sorted((s.id, s.image_id, s.instruction, s.targets) for s in samples) == [
        ("0", NAMES[0], "How many?", ("12.5",)), ("1", NAMES[1], "Which?", ("a",)),
        ("2", NAMES[0], "How many?", ("12.5",)), ("3", NAMES[1], "Which?", ("a",)),
    ], "named by their place, as `score` names them"  # fmt: skip
    assert [(r["what"], r["reason"]) for r in refused(tmp_path, "charts")] == [("question 4", "bad entry")]
    rows = table(tmp_path, [{"image": NAMES[0], "target": "seen"}, {"image": [], "id": "t", "target": "unseen"}])
    assert len(samples_of(prepared(tmp_path, "jsonl", "--annotations", rows, split="all"))) == 2
    (sample,) = samples_of(prepared(tmp_path, "jsonl", "--annotations", rows, "--require-image", split="some"))
    assert sample.targets == ("seen",)
    assert [r["reason"] for r in refused(tmp_path, "some")] == ["no image"]


def test_llava_has_a_sample_for_each_assistant_turn(tmp_path, images):
    llava = write(tmp_path / "llava.json", [
        {"id": "a", "image": NAMES[0], "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A house."},
            {"from": "human", "value": "Is it old?"}, {"from": "gpt", "value": "Yes."}]},
        {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": "c", "image": NAMES[1], "conversations": [{"from": "robot", "value": "?"}]},
        {"id": "d", "image": list(NAMES[:2]), "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Is <image> older than <image>?"}, {"from": "gpt", "value": "No."}]},
        {"id": "e", "image": list(NAMES[:2]), "conversations": [
            {"from": "human", "value": "<image> Which?"}, {"from": "gpt", "value": "The first."}]},
        {"id": "f", "image": 3, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]},
    ])  # fmt: skip
    collection = prepared(tmp_path, "llava", "--annotations", llava)
    assert [(s.id, s.turns, s.targets, s.images) for s in samples_of(collection)] == [
        ("a#1", ("What is it?",), ("A house.",), 1), ("a#3", ("What is it?", "A house.", "Is it old?"), ("Yes.",), 1),
        ("b#1", ("Hi",), ("Hello",), 0),
        ("d#2", ("Be brief.\nIs <image> older than <image>?",), ("No.",), 2), ("e#1", ("Which?",), ("The first.",), 2),
    ]  # fmt: skip
    assert [collection.num_images(n) for n in range(3)] == [1, 0, 2]
    assert [collection.image_bytes(2, n) for n in range(2)] == [images[name] for name in NAMES[:2]]
    assert [(r["what"], r["reason"]) for r in refused(tmp_path)] == [
        ("conversation c", "bad turn"),
        ("conversation f", "bad image"),
    ]
    (entry,) = read_index(tmp_path / "out").values()
    assert (entry["images"], entry["samples"]) == (3, 5)
    assert entry["shards"][0]["images"] == [1, 0, 2]


def test_rows_of_a_table_may_have_several_pictures_or_none(tmp_path, images):
    rows = [
        {"image": list(NAMES[:2]), "instruction": "<image> or <image>?", "target": "the first"},
        {"image": [], "instruction": "1 + 1?", "target": "2"},
        {"image": list(NAMES[:2]), "instruction": "both?", "target": "yes"},
        {"image": [NAMES[0], "missing.jpg"], "instruction": "which?", "target": "a"},
        {"image": None, "instruction": "lost?", "target": "b"},
        {"image": [NAMES[0]], "instruction": "<image> <image>", "target": "c"},
    ]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    collection = prepared(tmp_path, "jsonl", "--annotations", str(table))
    assert [(s.instruction, s.images) for s in samples_of(collection)] == [
        ("<image> or <image>?", 2), ("both?", 2), ("1 + 1?", 0),
    ]  # fmt: skip
    assert sorted(r["reason"] for r in refused(tmp_path)) == [
        "bad sample", "image without a usable sample", "no file", "no image",
    ]  # fmt: skip


ROWS = [
    {"file": NAMES[0], "question": "what?", "answer": "a, b", "group": "x"},
    {"file": NAMES[0], "question": "what?", "answer": "c", "group": "x"},
    {"file": NAMES[1], "question": "where?", "answer": "here", "group": "y"},
]
COLUMNS = [
    "--image-column",
    "file",
    "--instruction-column",
    "question",
    "--target-column",
    "answer",
    "--kind-column",
    "group",
]


@pytest.mark.parametrize("source", ["jsonl", "csv", "tsv", "parquet"])
def test_tables_with_named_columns(tmp_path, images, source):
    path = tmp_path / f"table.{source}"
    if source == "jsonl":
        path.write_text("\ufeff" + "\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif source == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if source == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    collection = prepared(tmp_path, source.replace("tsv", "csv"), "--annotations", str(path), *COLUMNS)
    assert [(s.instruction, s.targets, s.kind) for s in samples_of(collection)] == [
        ("what?", ("a, b", "c"), "x"), ("where?", ("here",), "y"),
    ]  # fmt: skip


def test_parquet_with_pictures_inside(tmp_path, images):
    import pyarrow
    import pyarrow.parquet

    contents = [*images.values(), None]
    rows = [
        {"image": None if c is None else {"bytes": c, "path": "x"}, "target": f"t{n}"} for n, c in enumerate(contents)
    ]
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    collection = prepared(tmp_path, "parquet", "--annotations", str(path), images=None)
    assert [collection.image_bytes(n) for n in range(3)] == list(images.values())
    assert [s.targets for s in samples_of(collection)] == [("t0",), ("t1",), ("t2",)]
    assert [(r["what"], r["reason"]) for r in refused(tmp_path)] == [("t.parquet:3", "no image")]


def test_folder_of_pictures_with_texts(tmp_path, images):
    root = tmp_path / "images"
    (root / NAMES[0]).with_suffix(".txt").write_text("one line\n\n another line \n")
    picture(root / "sub" / "b.png", 3)
    (root / "sub" / "b.txt").write_text("in a folder")
    (root / NAMES[2]).with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    collection = prepared(tmp_path, "folder", "--instruction", "describe")
    assert [(s.id, s.instruction, s.targets) for s in samples_of(collection)] == [
        (NAMES[0][:-4], "describe", ("one line", "another line")), ("sub/b", "describe", ("in a folder",)),
    ]  # fmt: skip
    assert sorted(r["reason"] for r in refused(tmp_path)) == ["bad text", "no text"]


def test_digits(tmp_path):
    assert run(["digits", "--out", str(tmp_path / "d")]) == 0
    assert len(ShardCollection(str(tmp_path / "d" / "val-*.tar"), "data.val")) == 48


# What comes out


def table(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def from_rows(tmp_path, rows, *more):
    """The command that makes shards of a table of JSON lines."""
    return ["jsonl", "--annotations", rows, "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out"), *more]


def many(tmp_path, number):
    for n in range(number):
        picture(tmp_path / "images" / f"{n}.png", (n % 256, n // 256, 7), size=(8, 8))
    return table(tmp_path, [{"image": f"{n}.png", "instruction": "q", "target": f"t{n}"} for n in range(number)])


def test_shards_are_webdataset_and_the_index_equals_a_scan(tmp_path):
    rows = many(tmp_path, 25)
    indexed = prepared(tmp_path, "jsonl", "--annotations", rows, "--shard-size", "10")
    assert [Path(path).name for path in indexed.paths] == [f"val-00000{n}.tar" for n in range(3)]
    assert indexed.indexed == 3
    theirs = [s for path in indexed.paths for s in webdataset.WebDataset(path, shardshuffle=False)]
    entry = read_index(tmp_path / "out")["val"]
    os.rename(tmp_path / "out" / "index.json", tmp_path / "index.json")
    scanned = ShardCollection(indexed.paths, "data.val")
    assert scanned.indexed == 0
    for n in range(25):
        assert theirs[n]["__key__"] == indexed.key(n) == scanned.key(n)
        assert theirs[n]["png"] == indexed.image_bytes(n) == scanned.image_bytes(n)
        assert json.loads(theirs[n]["json"])["targets"] == [f"t{n}"]
        assert indexed.samples(n) == scanned.samples(n)
        assert indexed.path_of(n) == scanned.path_of(n)
    assert entry["images"] == entry["samples"] == indexed.num_samples == scanned.num_samples == 25
    assert entry["lengths"]["target"] == {"min": 2, "median": 3, "p90": 3, "p99": 3, "max": 3}
    import hashlib

    for shard in entry["shards"]:
        assert hashlib.sha256((tmp_path / "out" / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]


def test_output_does_not_depend_on_the_number_of_processes(tmp_path):
    rows = many(tmp_path, 30)
    contents = []
    for processes in ("1", "3"):
        out = tmp_path / processes
        assert run(["jsonl", "--annotations", rows, "--images", str(tmp_path / "images"), "--out", str(out), "--shard-size", "7",
                    "--processes", processes]) == 0  # fmt: skip
        contents.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"index.json", *(f"train-00000{n}.tar" for n in range(5))}, "and nothing else is left"


def test_resize_shrinks_what_is_larger_only(tmp_path, images):
    large = tmp_path / "images" / "large.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (200, 100)).save(large, exif=exif)
    rows = table(tmp_path, [{"image": name, "target": "t"} for name in ("large.jpg", NAMES[0])])
    collection = prepared(tmp_path, "jsonl", "--annotations", rows, "--resize", "50")
    assert Image.open(io.BytesIO(collection.image_bytes(0))).size == (25, 50)
    assert collection.image_bytes(1) == images[NAMES[0]]


def test_pictures_that_cannot_be_used_are_named(tmp_path, images):
    folder = tmp_path / "images"
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    picture(folder / "icon.ico", 9, form="ICO")
    header = bytearray(picture(folder / "huge.png", 1))
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (folder / "huge.png").write_bytes(header)
    names = [
        "text.jpg",
        "empty.png",
        "folder.png",
        "icon.ico",
        "huge.png",
        "../rows.jsonl",
        "/etc/hostname",
        "a\0b",
        NAMES[0],
    ]
    collection = prepared(
        tmp_path, "jsonl", "--annotations", table(tmp_path, [{"image": n, "target": "t"} for n in names])
    )
    assert len(collection) == 1
    reasons = {r["what"]: r["reason"] for r in refused(tmp_path)}
    assert reasons == {
        "text.jpg": "image unreadable", "empty.png": "image unreadable", "folder.png": "image unreadable",
        "icon.ico": "image format", "huge.png": "image too large",
        **dict.fromkeys(("../rows.jsonl", "/etc/hostname", "a\0b"), "image outside of --images"),
    }  # fmt: skip
    assert read_index(tmp_path / "out")["val"]["refused"]["image unreadable"] == 3


def test_bad_rows_are_named_and_a_set_of_nothing_else_fails(tmp_path, images, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": \n[1]\n{"target": "t"}\n' + json.dumps({"image": NAMES[0], "target": 5}) + "\n"
                    + json.dumps({"image": NAMES[0], "target": "\ud800"}) + "\n" + json.dumps({"image": NAMES[1]}) + "\n")  # fmt: skip
    arguments = [
        "jsonl",
        "--annotations",
        str(path),
        "--images",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert run(arguments) == 2
    assert capsys.readouterr().err.endswith("expected samples, nothing of what was read could be used\n")
    assert [(r["what"], r["reason"]) for r in refused(tmp_path, "train")] == [
        ("rows.jsonl:1", "bad line"), ("rows.jsonl:2", "bad line"), ("rows.jsonl:3", "no image"),
        ("rows.jsonl:4", "bad entry"), ("rows.jsonl:5", "bad entry"), ("rows.jsonl:6", "no target"),
    ]  # fmt: skip
    path.write_text(json.dumps({"image": NAMES[0], "target": "t"}) + "\n")
    assert run(arguments) == 0, "what came to nothing doesn't stand in the way of the next attempt"


def test_a_bad_row_costs_no_good_one_and_each_is_counted(tmp_path, images):
    """Rows of the same image and instruction, which make up one sample."""
    image = {"image": NAMES[0], "instruction": "q"}
    targets = ["good", None, "", " ", "\ud800", ["fine", " "]]
    rows = table(tmp_path, [{**image, "target": target} for target in targets])
    (sample,) = samples_of(prepared(tmp_path, "jsonl", "--annotations", rows))
    assert sample.targets == ("good", "fine")
    assert sorted((r["what"], r["reason"]) for r in refused(tmp_path)) == [
        (f"{NAMES[0]}: 0", "empty target"), ("rows.jsonl:2", "no target"), ("rows.jsonl:3", "no target"),
        ("rows.jsonl:4", "no target"), ("rows.jsonl:5", "bad entry"),
    ]  # fmt: skip
    captions = write(tmp_path / "c.json", {"images": [{"id": 1, "file_name": NAMES[0]}], "annotations": [
        {"id": 1, "image_id": 1, "caption": "\ud800"}, {"id": 2, "image_id": 1, "caption": "good"},
        {"id": 3, "image_id": 1, "caption": 17},
    ]})  # fmt: skip
    (sample,) = samples_of(prepared(tmp_path, "coco", "--annotations", captions, split="c"))
    assert sample.targets == ("good",)
    by_reason = {r["reason"]: r["detail"] for r in refused(tmp_path, "c")}
    assert by_reason == {
        "bad target": "half of a surrogate pair in '\\ud800'",
        "bad entry": "expected `image_id` and a text `caption`, got int '1' and int '17'",
    }


def test_an_id_names_one_thing(tmp_path, images):
    """An image of two files is neither; a sample's id that comes again is refused, whatever its image."""
    captions = write(tmp_path / "c.json", {
        "images": [{"id": 1, "file_name": NAMES[0]}, {"id": 2, "file_name": NAMES[1]}, {"id": 1, "file_name": NAMES[2]}],
        "annotations": [{"id": n, "image_id": n, "caption": f"caption {n}"} for n in (1, 2)],
    })  # fmt: skip
    (sample,) = samples_of(prepared(tmp_path, "coco", "--annotations", captions, split="c"))
    assert sample.targets == ("caption 2",)
    assert [(r["what"], r["reason"]) for r in refused(tmp_path, "c")] == [
        (NAMES[0], "id of another image, too"), ("image 1", "unknown image"),
    ]  # fmt: skip
    rows = [
        {"image": NAMES[0], "id": "a", "target": "1"}, {"image": NAMES[1], "id": "a", "target": "2"},
        {"image": NAMES[0], "id": "a", "target": "3"}, {"image": NAMES[0], "id": "a", "instruction": "other", "target": "4"},
        {"image": [], "id": "a", "target": "5"},
    ]  # fmt: skip
    (sample,) = samples_of(prepared(tmp_path, "jsonl", "--annotations", table(tmp_path, rows)))
    assert (sample.id, sample.targets) == ("a", ("1", "3"))
    assert [r["reason"] for r in refused(tmp_path)] == ["id twice"] * 3
    twice = {"question_id": 7, "image_id": 42, "question": "Is it?"}
    questions = write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": [twice, twice]})
    answers = write(tmp_path / "a.json", {"annotations": [
        {"question_id": 7, "image_id": 42, "multiple_choice_answer": "yes", "answers": [{"answer": "yes"}] * 10},
    ]})  # fmt: skip
    (sample,) = samples_of(prepared(tmp_path, "vqa", "--questions", questions, "--annotations", answers, split="q"))
    assert (sample.targets, len(sample.answers)) == (("yes",), 10)
    assert [(r["what"], r["reason"]) for r in refused(tmp_path, "q")] == [("question 7", "id twice")]
    answered = [
        {"question_id": 7, "image_id": 42, "multiple_choice_answer": said, "answers": [{"answer": said}]}
        for said in ("yes", "no")
    ]
    answers = write(tmp_path / "a.json", {"annotations": answered})
    (sample,) = samples_of(prepared(tmp_path, "vqa", "--questions", questions, "--annotations", answers, split="r"))
    assert sample.targets == ("yes",)
    assert [(r["what"], r["reason"]) for r in refused(tmp_path, "r")] == [
        ("answers 7", "id twice"),
        ("question 7", "id twice"),
    ]
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    llava = write(tmp_path / "l.json", [
        {"id": "x", "image": NAMES[0], "conversations": talk}, {"id": "x", "image": NAMES[0], "conversations": talk},
        {"id": "x", "image": NAMES[0], "conversations": [{"from": "human", "value": "other"}, talk[1]]},
        {"id": "x", "conversations": talk},
    ])  # fmt: skip
    samples = samples_of(prepared(tmp_path, "llava", "--annotations", llava, split="l"))
    assert sorted(s.id for s in samples) == ["x#1", "x.1#1", "x.2#1", "x.3#1"], "published files have ids several times"
    assert not refused(tmp_path, "l")


def test_folder_names_texts_without_a_picture_and_pictures_that_share_one(tmp_path):
    folder = tmp_path / "images"
    for name, colour in (("a.png", 1), ("a.jpg", 2), ("b.png", 3)):
        picture(folder / name, colour)
    for name in ("a", "b", "orphan"):
        (folder / f"{name}.txt").write_text(f"text of {name}")
    samples = samples_of(prepared(tmp_path, "folder"))
    assert [(s.id, s.targets) for s in samples] == [
        ("a.jpg", ("text of a",)), ("a.png", ("text of a",)), ("b", ("text of b",)),
    ]  # fmt: skip
    assert [(r["what"], r["reason"]) for r in refused(tmp_path)] == [("orphan.txt", "no picture")]


def test_shards_of_others_are_not_touched(tmp_path, images, capsys):
    rows = table(tmp_path, [{"image": NAMES[0], "target": "t"}])
    out = tmp_path / "out"
    write_shard(out / "val-000000.tar", [("k", b"i", b"{}")])
    before = (out / "val-000000.tar").read_bytes()
    command = from_rows(tmp_path, rows, "--split", "val")
    assert run(command) == 2
    assert (
        "holds shards of a split 'val' that no index describes (val-000000.tar); give --overwrite"
        in capsys.readouterr().err
    )
    assert (out / "val-000000.tar").read_bytes() == before
    assert run([*command, "--overwrite"]) == 0
    assert run([*command, "--shard-size", "3"]) == 2
    assert "shard_size: 1000, now 3" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": NAMES[0], "target": "u"}) + "\n")
    assert run(command) == 2
    assert "made otherwise (files: rows.jsonl); give" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "missing.png", "target": "u"}) + "\n")
    assert run([*command, "--overwrite"]) == 2
    assert not list(out.glob("*.tar"))
    assert not (out / "index.json").exists(), "which would speak of shards that are gone"
    assert run(["digits", "--out", str(out), "--split", "val"]) == 2
    assert "--split: expected none with digits" in capsys.readouterr().err
    write_shard(out / "val-000000.tar", [("k", b"i", b"{}")])
    assert run(["digits", "--out", str(out)]) == 2
    assert "expected a folder for the digits alone" in capsys.readouterr().err


def test_a_splits_name_may_begin_anothers(tmp_path, images, capsys):
    """`val` is no part of `val-2014`."""
    rows = table(tmp_path, [{"image": NAMES[0], "target": "t"}])
    for split in ("val-2014", "val", "val"):
        prepared(tmp_path, "jsonl", "--annotations", rows, "--overwrite", split=split)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.tar")) == ["val-000000.tar", "val-2014-000000.tar"]
    assert set(read_index(out)) == {"val", "val-2014"}
    assert f"--data.train '{out}/val-000000.tar'" in capsys.readouterr().out.splitlines()[-1]
    prepared(tmp_path, "jsonl", "--annotations", rows, split="val-20")


def test_overwriting_removes_nothing_before_there_is_something_better_and_goes_on(
    tmp_path, images, capsys, monkeypatch
):
    rows = many(tmp_path, 6)
    out = tmp_path / "out"
    command = from_rows(tmp_path, rows, "--shard-size", "2")
    assert run(command) == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert run([*command, "--overwrite", "--tokenizer", str(tmp_path)]) == 2
    other = ["llava", "--annotations", write(tmp_path / "x.json", {"no": "list"}), *command[3:7], "--overwrite"]
    assert run(other) == 2
    assert "expected LLaVA, a list of conversations" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == before
    collect = writing._compact
    done = []

    def interrupted(report):
        done.append(report)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return collect(report)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_compact", interrupted)
        assert run([*command, "--overwrite", "--processes", "1"]) == 130
    assert "stopping as soon as" in capsys.readouterr().err
    assert run([*command, "--overwrite"]) == 0
    assert re.search(r"3 shards, [23] of them there before", capsys.readouterr().out)
    assert run([*command, "--overwrite"]) == 0
    assert "there before" not in capsys.readouterr().out, "of a finished split nothing is kept"


def test_after_a_kill_of_the_main_process_alone_the_same_command_goes_on(tmp_path):
    rows = many(tmp_path, 400)
    command = [sys.executable, "-m", "mmprefix", "prepare", "jsonl", "--annotations", rows, "--images", str(tmp_path / "images"),
               "--out", str(tmp_path / "out"), "--shard-size", "200", "--processes", "2", "--resize", "2"]  # fmt: skip
    slow = (  # workers that are in the middle of a shard when nobody is left to wait for them
        "import sys, time, mmprefix.data.writing as w, mmprefix.prepare as p; f = w._image_of; "
        "w._image_of = lambda *a: time.sleep(0.05) or f(*a); sys.exit(p.run(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *command[4:]], stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".*.part")):
        assert time.monotonic() < until, "no shard was begun"
        time.sleep(0.05)
    workers_of = [int(pid) for pid in children.read_text().split()]
    assert len(workers_of) == 2
    process.kill()
    process.wait()
    while any(
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
        for pid in workers_of
    ):
        assert time.monotonic() < until, "workers go on without anybody"
        time.sleep(0.05)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "400 images" in done.stdout
    assert not list((tmp_path / "out").glob(".*"))


def test_two_at_work_in_one_folder(tmp_path, images, capsys):
    rows = table(tmp_path, [{"image": NAMES[0], "target": "t"}])
    out = tmp_path / "out"
    command = from_rows(tmp_path, rows)
    with alone_in(out):
        assert run(command) == 2
    assert capsys.readouterr().err == f"error: --out: another prepare is at work in {out}\n"
    assert run(command) == 0


def test_captions_have_no_question(tmp_path, images, capsys):
    rows = table(tmp_path, [{"image": NAMES[0], "target": "t"}])
    command = from_rows(tmp_path, rows)
    asked = [*command, "--instruction", "say {question}"]
    assert run(asked) == 2
    assert [(r["what"], r["reason"]) for r in refused(tmp_path, "train")] == [("rows.jsonl:1", "bad entry")]
    capsys.readouterr()
    captions = write(tmp_path / "c.json", {"images": [{"id": 1, "file_name": NAMES[0]}],
                                           "annotations": [{"id": 1, "image_id": 1, "caption": "c"}]})  # fmt: skip
    assert run(["coco", *asked[1:2], captions, *asked[3:]]) == 2
    assert "--instruction: expected text without {question}" in capsys.readouterr().err


def test_a_worker_that_dies_is_no_bad_input(tmp_path, images, capsys, monkeypatch):
    def dies(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("mmprefix.data.writing._image_of", dies)
    rows = table(tmp_path, [{"image": NAMES[0], "target": "t"}])
    command = from_rows(tmp_path, rows)
    assert run(command) == 1
    assert "a worker process died" in capsys.readouterr().err


# Running it


def test_a_second_run_finds_it_complete_and_other_input_is_refused(tmp_path, capsys):
    rows = many(tmp_path, 5)
    prepared(tmp_path, "jsonl", "--annotations", rows)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    prepared(tmp_path, "jsonl", "--annotations", rows)
    assert "complete already" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    other = ["jsonl", "--annotations", rows, "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out"),
             "--split", "val", "--instruction", "say"]  # fmt: skip
    assert run(other) == 2
    assert "instruction: None, now 'say'" in capsys.readouterr().err
    assert run([*other, "--overwrite"]) == 0
    assert read_index(tmp_path / "out")["val"]["made_by"]["instruction"] == "say"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, how):
    number, out = 3000, tmp_path / "out"
    rows = many(tmp_path, number)
    command = [sys.executable, "-m", "mmprefix", "prepare", "jsonl", "--annotations", rows, "--images", str(tmp_path / "images"),
               "--out", str(out), "--shard-size", "20", "--processes", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob(".train.progress/[0-9]*.json"))) < 10 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=60)
    done = {p.name: p.stat().st_mtime_ns for p in out.glob("train-*.tar")}
    assert 10 <= len(done) < number // 20, "too late or too early to show anything"
    assert not (out / "index.json").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors.strip().splitlines()[-1].startswith("interrupted; the same command goes on")
        assert "Traceback" not in errors
    finished = {n for n in done if (out / ".train.progress" / f"{n[6:12]}.json").exists()}
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f"150 shards, {len(finished)} of them there before: 3,000 images" in again.stdout
    assert all((out / name).stat().st_mtime_ns == done[name] for name in finished)
    assert sorted(p.name for p in out.iterdir()) == ["index.json", *(f"train-{n:06d}.tar" for n in range(150))]
    fresh = tmp_path / "fresh"
    command[command.index(str(out))] = str(fresh)
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert all((fresh / p.name).read_bytes() == p.read_bytes() for p in out.glob("*.tar"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco"], "--annotations: expected the annotation file of coco, got none"),
        (["cocoo"], "argument source: invalid choice: 'cocoo'"),
        (["coco", "--annotations", "gone.json"], "--annotations: expected a file, found none at gone.json"),
        (["vqa", "--annotations", "{self}"], "--questions: expected the questions that belong to"),
        (["coco", "--annotations", "{self}"], "expected JSON, got"),
        (["jsonl", "--annotations", "{self}", "--shard-size", "0"], "--shard-size: expected at least 1, got 0"),
        (["coco", "--annotations", "{self}", "--image-column", "x"], "--image-column: expected with jsonl, csv, parquet only"),
        (["folder", "--split", "../x"], "--split: expected a name of letters"),
        (["parquet", "--annotations", "{self}"], "expected Parquet, got"),
        (["csv", "--annotations", "{self}"], "expected a column 'image' (--image-column), got"),
        (["jsonl", "--annotations", "{self}", "--images", "gone"], "--images: expected a folder, found none at gone"),
        (["coco", "--annotations", "{self}", "--questions", "{self}"], "--questions: expected with vqa only"),
    ],
)  # fmt: skip
def test_wrong_flags_are_one_line(tmp_path, images, capsys, arguments, message):
    arguments = [str(__file__) if a == "{self}" else a for a in arguments]
    folder = [] if "--images" in arguments else ["--images", str(tmp_path / "images")]
    assert run([*arguments, "--out", str(tmp_path / "out"), *folder]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.glob("out/*.tar"))


# The index


def test_an_index_that_is_not_the_shards_is_refused(tmp_path):
    collection = prepared(tmp_path, "jsonl", "--annotations", many(tmp_path, 5))
    index, shard = tmp_path / "out" / "index.json", Path(collection.paths[0])
    good = json.loads(index.read_text())

    def changed(change):
        content = json.loads(json.dumps(good))
        change(content["splits"]["val"]["shards"][0])
        index.write_text(json.dumps(content))

    changed(lambda s: s.update(bytes=17))
    with pytest.raises(InputError, match=r"val-000000\.tar: expected 17 bytes, as index\.json says"):
        ShardCollection(str(shard), "data.val")
    changed(lambda s: s["members"].__setitem__(0, 10**12))
    with pytest.raises(InputError, match="expected members inside of the shard"):
        ShardCollection(str(shard), "data.val")
    changed(lambda s: s["members"].__setitem__(0, 10**30))
    with pytest.raises(InputError, match="expected whole numbers"):
        ShardCollection(str(shard), "data.val")
    changed(lambda s: s["members"].pop())
    with pytest.raises(InputError, match="expected 20 numbers in `members`, for 5 images and 5 records"):
        ShardCollection(str(shard), "data.val")
    changed(lambda s: s["members"].__setitem__(0, s["members"][0] + 512))
    with pytest.raises(InputError, match="expected a tar header of"):
        ShardCollection(str(shard), "data.val").image_bytes(0)
    index.write_text("{")
    with pytest.raises(InputError, match=r"index\.json: expected an index of shards"):
        ShardCollection(str(shard), "data.val")
    index.write_text('{"version": 99, "splits": {}}')
    with pytest.raises(InputError, match="of version 1, got version 99; without the file, shards are scanned"):
        ShardCollection(str(shard), "data.val")


def test_failing_reads_are_tried_again_with_a_warning(tmp_path, monkeypatch):
    collection = prepared(tmp_path, "jsonl", "--annotations", many(tmp_path, 2))
    expected = collection.image_bytes(0)
    monkeypatch.setattr("mmprefix.data.storage._PAUSES", (0.0, 0.0))
    left, pread = [2], os.pread

    def flaky(descriptor, size, offset):
        if left[0]:
            left[0] -= 1
            raise OSError(116, "Stale file handle")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    with pytest.warns(UserWarning, match=r"val-000000\.tar: Stale file handle; reading again"):
        assert collection.image_bytes(0) == expected
    left[0] = 3
    with pytest.raises(OSError, match="Stale"), pytest.warns(UserWarning, match="again"):
        collection.image_bytes(0)


def test_gnu_tar_extracts_what_was_written(tmp_path):
    collection = prepared(tmp_path, "jsonl", "--annotations", many(tmp_path, 3))
    with tarfile.open(collection.paths[0]) as tar:
        assert [member.mtime for member in tar] == [0] * 6
    listing = subprocess.run(["tar", "-tf", collection.paths[0]], capture_output=True, text=True, check=True)
    assert listing.stdout.split() == [f"000000{n:05d}.{s}" for n in range(3) for s in ("png", "json")]
    assert listing.stderr == ""


def test_tar_headers_are_those_of_tarfile():
    for name, size in (("00000000001.jpg", 0), ("x.json", 12345), ("y.png", 8**11 - 1)):
        info = tarfile.TarInfo(name)
        info.size = size
        assert _header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_tokenizer_that_cannot_be_loaded_is_one_line(tmp_path, images, capfd):
    rows = table(tmp_path, [{"image": NAMES[0], "target": "t"}])
    arguments = ["jsonl", "--annotations", rows, "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert run([*arguments, "--tokenizer", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert error.splitlines()[-1].startswith("error: --tokenizer: cannot load")
    assert "Traceback" not in error


JUNK = [None, 7, -1.5, "", "x", "\ud800", [], {}, [None], {"a": 1}, "../x", True, 10**30]
JSON_SOURCES = {
    "coco": {"images": [{"id": 1, "file_name": NAMES[0]}], "annotations": [{"id": 1, "image_id": 1, "caption": "c"}]},
    "karpathy": {"images": [{"filename": NAMES[0], "filepath": "x", "cocoid": 1, "split": "train", "sentences": [{"raw": "c"}]}]},
    "vqa": {"data_subtype": "val2014", "questions": [{"image_id": 42, "question": "q?", "question_id": 1}],
            "annotations": [{"question_id": 1, "answer_type": "other", "multiple_choice_answer": "a",
                             "answers": [{"answer": "a", "answer_id": 1}]}]},
    "vizwiz": [{"image": NAMES[0], "question": "q?", "answers": [{"answer": "a"}], "answer_type": "other"}],
    "textvqa": {"data": [{"question": "q?", "image_id": "a", "question_id": 5, "answers": ["x", "y"], "question_types": ["t"]}]},
    "textcaps": {"data": [{"image_id": "a", "caption_str": "c"}]},
    "chartqa": [{"imgname": NAMES[0], "query": "q?", "label": "a", "id": 3}],
    "gqa": {"1": {"question": "q?", "imageId": "a", "answer": "yes", "types": {"structural": "verify"}}},
    "scienceqa": {"7": {"question": "q?", "choices": ["a", "b"], "answer": 1, "hint": "h", "image": "i.png", "split": "train", "subject": "s"}},
    "llava": [{"id": "a", "image": NAMES[0], "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
    "jsonl": {"image": NAMES[0], "instruction": "q", "target": "t", "answers": ["a"], "id": "i", "kind": "k"},
}  # fmt: skip


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("name", JSON_SOURCES)
def test_annotations_with_anything_in_any_place_are_read_or_refused(tmp_path, images, name):
    """Every place of a small file replaced by everything: no exception but an `InputError`."""
    source, folder = {"karpathy": "coco", "vizwiz": "vqa"}.get(name, name), tmp_path / "images"
    path, outcomes = tmp_path / "a.json", set()
    for number, (place, junk) in enumerate((p, j) for p in places(JSON_SOURCES[name]) for j in JUNK):
        content = json.loads(json.dumps(JSON_SOURCES[name]))
        if place:
            parent = content
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = junk
        else:
            content = junk
        path.write_text(json.dumps(content))
        options = SourceOptions(folder, (path,), path if name == "vqa" else None)
        with Staging(tmp_path / "out", f"s{number}") as staging:
            try:
                READERS[source](options, staging)
            except InputError:
                outcomes.add("refused as a whole")
                continue
            records = list(staged_records(folder, staging))
            report = write_chunk(Job(tmp_path / "out", f"s{number}"), 0, records)
            refusals = [*staging.refused(), *report.refused]
            assert report.shard or refusals or not records, (place, junk)
            outcomes.add("shard" if report.shard else "nothing usable")
    assert len(outcomes) >= 2, "nothing was harmed"
