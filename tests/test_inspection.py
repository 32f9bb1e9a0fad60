"""`inspect`: everything that is wrong with a folder of shards is named, and the page shows what the model sees."""

import io
import json
from html.parser import HTMLParser

import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from mmprefix.cli import run
from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.shards import ShardCollection, write_shard
from mmprefix.errors import InputError
from mmprefix.prepare import run as prepare
from tests.conftest import png

CONFIG = {
    "model": {
        "vision": {"name": "test_vit", "pretrained": False, "image_size": 32},
        "decoder": {"config": {"model_type": "llama", "hidden_size": 32}},
        "tokenizer": {"name": "byte"},
    },
    "data": {"max_target_tokens": 20},
}


class Page(HTMLParser):
    """Tags, texts by class of their element, and embedded pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.sources, self._open = [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.sources.append(attrs["src"])
            assert attrs["alt"]
        elif tag not in ("meta",):
            self._open.append(attrs.get("class") or "")

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)


def record(n, image, *samples):
    return f"{n:04d}", image, json.dumps(list(samples)).encode()


def sample(target, instruction="q", **kwargs):
    return {"instruction": instruction, "target": target, **kwargs}


@pytest.fixture
def inspect(tmp_path, capfd):
    """Runs the command on ``tmp_path / "set"``; returns status, what it printed, and the page."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))

    def do(*arguments, with_config=True):
        capfd.readouterr()
        command = ["inspect", str(tmp_path / "set"), *(["--config", str(config)] if with_config else []), *arguments]
        status = run([*command, "--num_workers", "0"])
        text = "".join(capfd.readouterr())
        path = tmp_path / "set" / "inspect.html"
        return status, text, Page(path.read_text()) if path.exists() else None

    return do


def test_a_good_set_is_shown_as_the_model_sees_it(inspect, tmp_path, photos):
    write_shard(tmp_path / "set" / "train-000.tar", [
        record(0, png(photos[0]), sample("a <b>temple</b>", "what & where?", kind="a"), sample("red", kind="b")),
        record(1, png(photos[1]), sample("a flower")),
    ])  # fmt: skip
    write_shard(tmp_path / "set" / "val-000.tar", [record(2, png(photos[2]), sample("</script><script>alert(1)"[:20]))])
    status, text, page = inspect()
    assert status == 0, text
    assert "train: 1 shard, 2 images, 3 samples" in text
    assert "val: 1 shard, 1 images, 1 samples" in text
    assert "width: min 640, median 640, p90 640, p99 640, max 640" in text
    assert "kinds: a 1, b 1, all 1" in text
    assert "script" not in page.tags
    assert "b" not in page.tags
    joined = {kind: "".join(texts) for kind, texts in page.texts.items()}
    assert joined["image"].count("4 image tokens") == 4, "of test_vit at 32 pixels, for each sample"
    assert joined["instruction"] == "instruction" + "what & where?" + "qq" + "instruction" + "q"
    assert joined["target"].startswith("target" + "a <b>temple</b>red")
    assert joined["frame"].count("↵") == 4
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources), "nothing is fetched"
    with Image.open(tmp_path / "set" / "inspect.png") as picture:
        assert picture.size == (4 * 360, 2 * 200)


def test_what_is_unusable_is_named_and_the_status_is_1(inspect, tmp_path, photos):
    folder = tmp_path / "set"
    write_shard(folder / "train-000.tar", [
        record(0, png(photos[0]), sample("x" * 21, id="long")),
        record(1, png(photos[0])[:500], sample("y", id="twice")),
        record(2, png(photos[0]), sample("z", id="twice")),
    ])  # fmt: skip
    write_shard(folder / "train-001.tar", [record(3, png(photos[1]), sample(""))])
    (folder / "train-002.tar").write_bytes((folder / "train-000.tar").read_bytes()[:5000])
    write_shard(folder / "val-000.tar", [record(4, png(photos[0]), sample("w"))])
    status, text, page = inspect()
    assert status == 1
    for message in (
        "train-000.tar: 0000: long: target of 21 tokens, at most 20: 'xxxx",
        "train-000.tar: 0001: image of 500 bytes cannot be decoded",
        "sample id 'twice' comes 2 times",
        "train-001.tar: 0003.json[0]: expected a target with text, got an empty one",
        "train-002.tar: 0000.png: expected",
        "images in more than one record: 1",
        "images that stand in val, too: 1",
    ):
        assert message in text, message
        assert any(message in text for texts in page.texts.values() for text in texts), f"on the page: {message}"
    status, text, _ = inspect("--splits", "val")
    assert status == 0
    assert "train" not in text


def test_all_faults_of_a_shard_are_named_and_its_good_records_counted(inspect, tmp_path, photos):
    good = record(0, png(photos[0]), sample("t"))
    bad = [("b1", png(photos[0]), b"{oops"), ("b2", png(photos[0]), b'{"target": "t"}'), ("b3", png(photos[0]), b"[]")]
    write_shard(tmp_path / "set" / "train-000000.tar", [bad[0], good, *bad[1:], record(9, png(photos[1]), sample("u"))])
    status, text, _ = inspect()
    assert status == 1
    assert "train: 1 shard, 2 images, 2 samples" in text
    for name, what in (("b1", "expected JSON"), ("b2", "`instruction`"), ("b3", "at least one sample")):
        (line,) = [line for line in text.splitlines() if f"train-000000.tar: {name}" in line]
        assert what in line
        assert "uncompressed tar" not in line
    write_shard(tmp_path / "set" / "train-000000.tar", bad)
    status, text, _ = inspect()
    assert (status, text.count("unusable: ")) == (1, 3)
    assert "train: no usable shard" in text


def test_what_is_worth_knowing_is_named(inspect, tmp_path, photos):
    """Samples that `fit` refuses, pictures that come again, and a terminal that data must not steer."""
    same = png(photos[0])
    write_shard(tmp_path / "set" / "train-000000.tar", [
        record(0, same, {"instruction": "q", "kind": "\x1b[2Jk"}), record(1, same, sample("x" * 31)),
        record(2, same, sample("日本 é", kind="other")),
    ])  # fmt: skip
    status, text, page = inspect(with_config=False)
    assert status == 0
    assert "remark: samples without a target, which only `predict` takes: 1" in text
    assert "remark: images in more than one record: 1 (train-000000.tar: 0001, train-000000.tar: 0002)" in text
    assert "\x1b" not in text
    assert "?[2Jk 1" in text
    assert f"{'x' * 29}…" in text
    assert {"日", "本", "é"} <= set(page.texts["target"]), "characters, not the bytes of which they are made"


def test_a_split_that_is_gone_and_shards_of_nobody(inspect, tmp_path, photos):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(3):
        photos[n].save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text("t")
    for split in ("train", "val"):
        command = ["folder", "--images", str(folder), "--split", split, "--shard-size", "1"]
        assert prepare([*command, "--out", str(tmp_path / "set")]) == 0
    for path in (tmp_path / "set").glob("val-*.tar"):
        path.unlink()
    (tmp_path / "set" / "train-000001.tar").rename(tmp_path / "set" / "train-000007.tar")
    status, text, _ = inspect()
    assert status == 1
    assert text.count("as index.json says, found none") == 4
    assert "remark: shards that index.json doesn't list: train-000007.tar" in text
    with pytest.raises(InputError, match=r"data\.train: expected 1 more shard.*none at .*train-000001\.tar"):
        ShardCollection(str(tmp_path / "set" / "train-*.tar"), "data.train")
    part = ShardCollection(str(tmp_path / "set" / "train-00000{0,2}.tar"), "data.train")
    assert len(part) == 2, "asked for by name"
    with pytest.raises(InputError, match=r"data\.val: expected 4 more shard"):
        ShardCollection(str(tmp_path / "set"), "data.val")
    cached = ShardDataModule(train=str(tmp_path / "set" / "train-*.tar"), shard_cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"data\.train: expected 1 more shard"):
        cached.shards("train")
    remote = MemoryFileSystem()
    remote.put(str(tmp_path / "set"), "/lost", recursive=True)
    for pattern in ("memory://lost/train-*.tar", "memory://lost", "memory:///lost/train-*.tar"):
        with pytest.raises(InputError, match=r"more shard.*memory://.*train-000001\.tar"):
            ShardCollection(pattern, "data.train")
    remote.rm("/lost", recursive=True)
    assert run(["inspect", str(tmp_path / "set"), "--out", str(folder / "0.png")]) == 2


def test_cut_texts_are_shown_and_no_problem_where_cutting_is_allowed(inspect, tmp_path, photos):
    write_shard(tmp_path / "set" / "x.tar", [record(0, png(photos[2]), sample("abcdefghijklmnopqrstuvwxyz"))])
    status, text, page = inspect("--data.truncate", "target")
    assert status == 0, text
    assert "texts cut at their limit: 1" in text
    assert page.texts["cut"] == ["cut", "uvwxyz"]


def test_an_index_is_checked_against_its_shards(inspect, tmp_path, photos):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(4):
        (pictures / f"{n}.png").write_bytes(png(photos[2].rotate(n)))
        (pictures / f"{n}.txt").write_text(f"number {n}")
    arguments = ["folder", "--images", str(pictures), "--out", str(tmp_path / "set"), "--shard-size", "2"]
    assert prepare(arguments) == 0
    status, text, _ = inspect("--checksums")
    assert status == 0, text
    shard = tmp_path / "set" / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # behind everything that is read
    shard.write_bytes(content)
    assert inspect()[0] == 0
    status, text, _ = inspect("--checksums")
    assert (status, "train-000001.tar: expected SHA-256" in text) == (1, True)
    shard.unlink()
    status, text, _ = inspect()
    assert (status, "train-000001.tar: expected a shard, as index.json says, found none" in text) == (1, True)


def test_without_a_config_bytes_stand_for_tokens(inspect, tmp_path, photos):
    write_shard(tmp_path / "set" / "train-0.tar", [record(0, png(photos[0]), sample("é"))])
    status, text, page = inspect(with_config=False)
    assert status == 0
    assert "target tokens: min 2" in text
    assert "image" in page.texts
    assert len(page.texts["image"]) == 1, "the legend only: how many image tokens there are is not known"
    assert Image.open(io.BytesIO(png(photos[0]))).size == (640, 427)
    assert any("640 x 427" in text for text in page.texts["meta"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "inspect: expected a folder of shards, found none at nowhere"),
        (["{set}"], "none match"),
        (["{set}", "--samples", "-1"], "--samples: expected at least 0, got -1"),
        (["{set}", "--data.batch_size", "3"], "expected --config with settings of fit"),
        (["{set}", "--config", "gone.yaml"], "gone.yaml"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capfd, arguments, message):
    (tmp_path / "empty").mkdir()
    assert run(["inspect", *(str(tmp_path / "empty") if a == "{set}" else a for a in arguments)]) == 2
    error = capfd.readouterr().err
    assert (error.startswith("error: "), error.count("\n")) == (True, 1)
    assert message in error
