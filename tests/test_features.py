"""Cached features of a frozen encoder, from the command that writes them to training that never runs the encoder."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from mmprefix.cli import run
from mmprefix.data import features as features_room
from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.features import INDEX, FeatureCache, FeatureKey, FeatureWriter, image_digest
from mmprefix.data.images import decode_image
from mmprefix.data.loading import RecordDataset, TextLimits
from mmprefix.data.shards import ShardCollection, write_shard
from mmprefix.errors import InputError
from mmprefix.packing import BadSample
from mmprefix.training import callbacks
from mmprefix.training.module import MMPrefixModule
from mmprefix.vision import VisionEncoder
from tests.conftest import colour_record, make_model
from tests.test_cli import ENVIRONMENT, mmprefix, wait_for
from tests.test_training import MODEL, _KillAfter, assert_same, metric_rows, weights

FROZEN = {**MODEL, "train_vision": {"freeze": True}}
FORWARD = VisionEncoder.forward


@pytest.fixture
def command(tmp_path, colour_shards, capfd):
    """Runs a command on coloured pictures, in this process; returns status and what it printed."""
    shards = colour_shards()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({
        "model": FROZEN,
        "data": {
            "train": str(shards / "train-*.tar"), "val": str(shards / "val-*.tar"), "batch_size": 6,
            "eval_batch_size": 6, "max_target_tokens": 8,
        },
        "trainer": {
            "max_epochs": 2, "accelerator": "cpu", "gradient_clip_val": 1.0, "log_every_n_steps": 1,
            "enable_progress_bar": False, "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "run"),
        },
    }))  # fmt: skip

    def do(name, *arguments):
        capfd.readouterr()
        status = run([name, "--config", str(path), *map(str, arguments)])
        out, err = capfd.readouterr()
        return status, out + err

    do.config = path
    return do


@pytest.fixture
def cache(command, tmp_path):
    """The features of all coloured pictures."""
    status, text = command("cache-features", "--out", tmp_path / "cache")
    assert status == 0, text
    return tmp_path / "cache"


def no_forward(self, pixels, forward=VisionEncoder.forward):
    if pixels.device.type == "meta":  # counting its FLOPs
        return forward(self, pixels)
    raise AssertionError("the encoder ran")


def refused(command, *arguments, name="fit"):
    status, text = command(name, *arguments)
    assert status == 2, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


def test_an_encoder_that_learns_is_named_before_its_features_are_cached(command, tmp_path):
    with pytest.warns(UserWarning, match=r"with these settings, fit takes no features: .* an encoder that learns"):
        status, text = command("cache-features", "--out", tmp_path / "x", "--model.train_vision.freeze", "false")
    assert status == 0, text


# Training


@pytest.mark.parametrize("workers", [0, 2])
def test_training_matches_features_rounded_by_hand_and_never_runs_the_encoder(
    command, cache, tmp_path, monkeypatch, workers
):
    with monkeypatch.context() as patch:
        patch.setattr(VisionEncoder, "forward", no_forward)
        status, text = command(
            "fit", "--data.feature_cache", cache, "--data.num_workers", workers,
            "--trainer.default_root_dir", tmp_path / "cached",
        )  # fmt: skip
        assert status == 0, text
    calls = []

    def rounded(self, pixels):
        calls.append(1)
        return FORWARD(self, pixels).bfloat16().float()

    with monkeypatch.context() as patch:
        patch.setattr(VisionEncoder, "forward", rounded)
        status, text = command("fit", "--trainer.default_root_dir", tmp_path / "rounded")
        assert status == 0, text
    assert calls
    status, text = command("fit", "--trainer.default_root_dir", tmp_path / "exact")
    columns = {
        name: [
            float(row[column]) for row in metric_rows(tmp_path / name)
            for column in ("train/loss", "train/grad_norm", "val/loss", "val/exact_match") if row[column]
        ]
        for name in ("cached", "rounded", "exact")
    }  # fmt: skip
    assert len(columns["cached"]) >= 16
    assert columns["cached"] == pytest.approx(columns["rounded"], abs=1e-6)
    assert columns["exact"] != pytest.approx(columns["rounded"], abs=1e-6), "rounding must be seen at all"
    assert columns["exact"] == pytest.approx(columns["rounded"], rel=0.05)
    assert_same(weights(tmp_path / "cached"), weights(tmp_path / "rounded"), atol=1e-6, rtol=0)
    for name in ("predictions.jsonl", "predictions.png"):
        assert (tmp_path / "cached" / name).read_bytes() == (tmp_path / "rounded" / name).read_bytes()


def test_a_killed_run_on_features_resumes_to_the_same_weights(command, cache, tmp_path, monkeypatch):
    settings = ["--data.feature_cache", cache, "--data.num_workers", 1, "--trainer.default_root_dir"]
    command("fit", *settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Throughput, "on_train_batch_start", _KillAfter(6).on_train_batch_start)
        with pytest.raises(RuntimeError, match="killed"):
            command("fit", *settings, tmp_path / "broken")
    monkeypatch.setattr(VisionEncoder, "forward", no_forward)
    status, text = command("fit", *settings, tmp_path / "broken", "--ckpt_path", "last")
    assert status == 0, text
    assert "step=00000004.ckpt" in text
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_two_processes_train_on_features_as_one(command, cache, tmp_path):
    plain = [
        "--config", command.config, "--model.decoder.config.attention_dropout", "0.0",
        "--data.feature_cache", cache, "--trainer.max_epochs", 1,
    ]  # fmt: skip
    status, text = command("fit", *plain[2:], "--trainer.default_root_dir", tmp_path / "one")
    assert status == 0, text
    two = mmprefix(
        "fit", *plain, "--trainer.default_root_dir", tmp_path / "two", "--data.batch_size", 3,
        "--trainer.devices", 2, "--trainer.strategy", "ddp", timeout=400,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=1e-4, rtol=1e-3)
    assert (tmp_path / "one" / "predictions.jsonl").read_text() == (tmp_path / "two" / "predictions.jsonl").read_text()


def test_digits_from_the_command_line(tmp_path, capfd, monkeypatch):
    """As a user would: the built-in set, a frozen encoder, written and trained on, all splits."""
    settings = [
        "--config", "configs/digits.yaml", "--data.dataset_folder", str(tmp_path / "digits"),
        "--model.train_vision.freeze", "true", "--data.augmentation", "null", "--trainer.max_epochs", "1",
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert run(["cache-features", *settings, "--out", str(tmp_path / "cache"), "--batch_size", "64"]) == 0
    text = capfd.readouterr().out
    assert f"{tmp_path}/cache: 1797 images of train, val, test, 1797 unique, 1797 encoded now, 0 there before" in text
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(VisionEncoder, "forward", no_forward)
    assert run(["fit", *settings, "--data.feature_cache", str(tmp_path / "cache")]) == 0
    assert "test: 899 images, 2697 samples" in capfd.readouterr().out


def test_batches_hold_features_in_place_of_pixels(command, cache, tmp_path, monkeypatch):
    module = MMPrefixModule(**_arguments(command))
    settings = yaml.safe_load(command.config.read_text())["data"]
    data = ShardDataModule(module.processor, **settings, feature_cache=str(cache), feature_key=lambda: KEY)
    KEY = FeatureCache(cache).key
    data.setup("fit")
    (evaluation,) = data.val_dataloader()
    training = next(iter(data.train_dataloader()))
    for batch in (training, evaluation.prompts):
        assert batch.pixel_values is None
        assert batch.image_features.shape == (6, 4, 64)
        assert batch.image_features.dtype == torch.bfloat16
    assert evaluation.targets.image_features is None, "they travel once"
    # In the order of the images, whatever that is: the first record of the split is the first image.
    digest = image_digest(data.shards("val").image_bytes(0))
    assert torch.equal(evaluation.prompts.image_features[0], data._features[digest])
    assert torch.equal(pickle.loads(pickle.dumps(data._features))[digest], data._features[digest])  # a spawned worker's
    tokens = module.model.image_tokens_of(evaluation.prompts)
    assert torch.equal(tokens, module.model.connector(evaluation.prompts.image_features.float()))


def _arguments(command):
    from mmprefix.decoder import DecoderArgs
    from mmprefix.processing import TokenizerArgs
    from mmprefix.training.optim import PartArgs
    from mmprefix.vision import VisionArgs

    return {
        "vision": VisionArgs(**MODEL["vision"]), "decoder": DecoderArgs(**MODEL["decoder"]),
        "tokenizer": TokenizerArgs("byte"), "train_vision": PartArgs(freeze=True),
    }  # fmt: skip


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--seed_everything", 1], "is not of this encoder: weights: expected "),
        (["--model.vision.name", "test_vit2"], '{"kwargs": {"drop_path_rate": 0.2, "img_size": 32}, "name": "test_vit2"}'),
        (["--model.train_vision.freeze", "false"], "expected model.train_vision.freeze: true and unfreeze_at_step: null, got freeze: false and unfreeze_at_step: null"),
        (["--model.train_vision.unfreeze_at_step", 3], "got freeze: true and unfreeze_at_step: 3"),
        (["--data.augmentation", "{degrees: 10}"], "expected data.augmentation: null, got augmentation"),
    ],
)  # fmt: skip
def test_what_does_not_match_is_refused_in_one_line(command, cache, tmp_path, settings, message):
    line = refused(command, "--data.feature_cache", cache, *settings)
    assert line.startswith("error: data.feature_cache: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_keys_tell_every_part_apart():
    model, processor = make_model()
    spec = replace(model.config.vision_spec, unused=("norm.weight",))
    key = FeatureKey.of(model.vision, spec, processor.transform)
    assert key == FeatureKey.of(make_model()[0].vision, spec, processor.transform)
    assert key.difference(key) == ""
    brighter = FeatureKey.of(model.vision, spec, replace(processor.transform, mean=(0.1, 0.2, 0.3)))
    assert key.difference(brighter).startswith('transform: expected {"interpolation": "')
    assert key.hash != brighter.hash
    other = FeatureKey.of(model.vision, replace(spec, kwargs={"depth": 3}), processor.transform)
    assert key.difference(other).startswith("encoder: expected ")
    assert "format: " in key.difference(replace(key, format={"version": 2, "dtype": "bfloat16"}))
    assert "norm.weight" in model.vision.model.state_dict()
    for name, tensor in model.vision.model.state_dict().items():
        if tensor.is_floating_point():
            before = tensor.clone()
            tensor.view(-1)[-1] += 0.001
            changed = FeatureKey.of(model.vision, spec, processor.transform)
            assert key.difference(changed).startswith("weights: expected ") != (name in spec.unused), name
            tensor.copy_(before)
    assert FeatureKey.of(model.vision, spec, processor.transform) == key


def test_a_missing_image_is_named_by_shard_and_key(command, cache, tmp_path):
    write_shard(tmp_path / "new.tar", [colour_record(24), colour_record(77, side=50), colour_record(81, side=50)])
    line = refused(command, "--data.feature_cache", cache, "--data.val", tmp_path / "new.tar")
    assert f"each of the 3 images of data.val, 2 have none; the first is {tmp_path}/new.tar: 0077" in line
    # The test split is scored at the end: it is looked at before hours of training.
    line = refused(command, "--data.feature_cache", cache, "--data.test", tmp_path / "new.tar")
    assert "images of data.test, 2 have none" in line
    assert not (tmp_path / "run").exists()
    status, text = command("cache-features", "--out", cache, "--data.val", tmp_path / "new.tar", "--splits", "val")
    assert status == 0
    assert "3 images of val, 3 unique, 2 encoded now, 15 there before" in text
    assert len(FeatureCache(cache)) == 17


def test_an_image_that_changes_while_training_is_fatal_and_named(cache, tmp_path):
    (tmp_path / "s").mkdir()
    write_shard(tmp_path / "s" / "x.tar", [colour_record(99, side=50)])
    shards = ShardCollection(str(tmp_path / "s"), "data.train")
    dataset = RecordDataset(shards, make_model()[1], TextLimits(None, None, "none"), features=FeatureCache(cache))
    item = dataset[0, 0]
    assert isinstance(item, BadSample)
    assert item.fatal
    assert "0099: the image changed" in str(item)


def broken_folders(cache):
    shard, index = cache / "features-00000.safetensors", cache / INDEX
    content = json.loads(index.read_text())
    stored = shard.read_bytes()
    outside = {**content, "shards": [{**content["shards"][0], "file": "../features-00000.safetensors"}]}
    return {
        "truncated": (lambda: shard.write_bytes(stored[:-100]), f"expected {len(stored)} bytes, got {len(stored) - 100}: a broken shard"),
        "same_size": (lambda: shard.write_bytes(b"\xff" * len(stored)), "expected a safetensors shard, got a broken one"),
        "gone": (lambda: shard.unlink(), "features-00000.safetensors with 15 images, there is none"),
        "no_index": (lambda: index.unlink(), "expected a folder written by cache-features, found no index.json"),
        "half_an_index": (lambda: index.write_text(index.read_text()[:300]), "expected an index of cache-features, cannot read it"),
        "a_list": (lambda: index.write_text("[]"), "expected an index of cache-features, cannot read it"),
        "outside": (lambda: index.write_text(json.dumps(outside)), "got '../features-00000.safetensors'"),
        "shape": (lambda: index.write_text(json.dumps({**content, "shape": [4, 32]})), "expected BF16 [15, 4, 32], got BF16 [15, 4, 64]"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "what", ["truncated", "same_size", "gone", "no_index", "half_an_index", "a_list", "outside", "shape"]
)
def test_broken_caches_are_refused(command, cache, what):
    breaking, message = broken_folders(cache)[what]
    breaking()
    with pytest.raises(InputError) as error:
        FeatureCache(cache)
    assert message in str(error.value)
    if what == "truncated":
        assert f"error: data.feature_cache: {cache}/features-00000.safetensors: {message}" in refused(
            command, "--data.feature_cache", cache
        )
        assert f"error: --out: {cache}/features-00000.safetensors: {message}" in refused(
            command, "--out", cache, name="cache-features"
        )


def test_a_checkpoint_with_another_encoder_is_refused(command, cache, tmp_path):
    status, text = command("fit", "--seed_everything", 1, "--trainer.max_epochs", 1)
    assert status == 0, text
    checkpoint = tmp_path / "run" / "checkpoints" / "step=00000004.ckpt"
    for name in ("validate", "fit"):
        line = refused(command, "--data.feature_cache", cache, "--ckpt_path", checkpoint, name=name)
        assert "data.feature_cache: the checkpoint has another encoder, " in line
    command("fit", "--trainer.max_epochs", 1)
    status, text = command("validate", "--data.feature_cache", cache, "--ckpt_path", checkpoint)
    assert status == 0, text
    assert "val: 6 images, 12 samples" in text


# Writing


def test_what_is_stored_is_the_encoders_output(command, cache):
    settings = yaml.safe_load(command.config.read_text())["data"]
    torch.manual_seed(0)
    module = MMPrefixModule(**_arguments(command))
    stored = FeatureCache(cache)
    assert FeatureKey.of(module.model.vision, module.model.config.vision_spec, module.processor.transform) == stored.key
    for split in ("train", "val"):
        shards = ShardCollection(settings[split], split)
        for n in range(len(shards)):
            content = shards.image_bytes(n)
            with torch.no_grad():
                expected = module.model.vision(module.processor.transform(decode_image(content))[None])[0]
            found = stored[image_digest(content)]
            assert found.shape == stored.shape == (4, 64)
            assert found.untyped_storage().nbytes() == 4 * 64 * 2
            # Rounded to bfloat16; and encoded in a batch, where sums of float32 come out in another order.
            torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=2**-8)
    index = json.loads((cache / INDEX).read_text())
    assert (index["num_images"], index["shape"], index["hash"]) == (15, [4, 64], stored.key.hash)
    with safe_open(cache / "features-00000.safetensors", framework="pt") as file:
        assert file.metadata() == {"hash": stored.key.hash}


def test_the_same_picture_is_stored_once(command, tmp_path):
    same = colour_record(0)
    write_shard(tmp_path / "twice.tar", [same, ("other", same[1], same[2]), colour_record(1)])
    settings = ["--data.train", tmp_path / "twice.tar", "--data.val", tmp_path / "twice.tar"]
    status, text = command("cache-features", "--out", tmp_path / "cache", *settings)
    assert status == 0, text
    assert "6 images of train, val, 2 unique, 2 encoded now" in text
    assert len(FeatureCache(tmp_path / "cache")) == 2
    assert command("fit", "--data.feature_cache", tmp_path / "cache", *settings)[0] == 0


def interrupt_after(monkeypatch, passes):
    """Ctrl-C in the encoder's pass number ``passes``; returns the sizes of the passes before it."""
    sizes = []

    def forward(self, pixels):
        if len(sizes) == passes:
            raise KeyboardInterrupt
        sizes.append(len(pixels))
        return FORWARD(self, pixels)

    monkeypatch.setattr(VisionEncoder, "forward", forward)
    return sizes


def test_an_interrupted_run_goes_on_where_it_was(command, cache, tmp_path, monkeypatch):
    """15 unique images in passes of 2, 3 images to a shard."""
    monkeypatch.setattr(features_room, "SHARD_BYTES", 3 * 4 * 64 * 2)
    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        status, text = command("cache-features", "--out", out, "--batch_size", 2)
    assert status == 130
    assert f"interrupted; {out} holds 9 images in 3 finished shards: the same command goes on from there" in text
    assert "Traceback" not in text
    names = [f"features-0000{n}.safetensors" for n in range(5)]
    assert sorted(p.name for p in out.iterdir()) == [*names[:3], INDEX]
    assert len(FeatureCache(out)) == 9
    assert "of the 24 images of data.train, 6 have none; the first is " in refused(command, "--data.feature_cache", out)
    # Left behind by a kill: half a shard, and a whole one that the index does not name.
    (out / f".{names[3]}.77.part").write_bytes(b"half")
    (out / names[4]).write_bytes((out / names[0]).read_bytes())
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.name in names[:3]}
    sizes = interrupt_after(monkeypatch, 1000)
    status, text = command("cache-features", "--out", out, "--batch_size", 2, "--num_workers", 2)
    assert status == 0, text
    assert sum(sizes) == 6, "what is finished is not encoded again"
    assert "30 images of train, val, 15 unique, 6 encoded now, 9 there before" in text
    assert sorted(p.name for p in out.iterdir()) == [*names, INDEX]
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in out.iterdir()}.items()
    one, other = FeatureCache(cache), FeatureCache(out)
    assert one._number.keys() == other._number.keys()
    for digest in one._number:
        torch.testing.assert_close(one[digest], other[digest], atol=0, rtol=2**-7)


def test_another_key_is_refused_unless_overwritten(command, cache):
    before = {p.name: p.read_bytes() for p in cache.iterdir()}
    line = refused(command, "--out", cache, "--seed_everything", 1, name="cache-features")
    assert f"--out: {cache} holds features of another encoder: weights: expected " in line
    assert "--overwrite replaces them" in line
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == before
    status, text = command("cache-features", "--out", cache, "--seed_everything", 1, "--overwrite")
    assert status == 0, text
    assert "15 encoded now, 0 there before" in text
    assert command("fit", "--seed_everything", 1, "--data.feature_cache", cache)[0] == 0


def test_a_folder_with_other_files_is_left_alone(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for options in ([], ["--overwrite"]):
        line = refused(command, "--out", tmp_path / "mine", *options, name="cache-features")
        assert line == f"error: --out: expected a new folder or a feature cache, {tmp_path}/mine holds thesis.tex"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    line = refused(command, "--out", tmp_path / "mine" / "thesis.tex", name="cache-features")
    assert "expected a folder, got the file" in line


def test_undecodable_images_are_counted_named_and_skipped(command, tmp_path):
    records = [colour_record(n) for n in range(8)]
    records[5] = (records[5][0], b"not a picture", records[5][2])
    write_shard(tmp_path / "bad.tar", records)
    settings = ["--data.train", tmp_path / "bad.tar"]
    status, text = command("cache-features", "--out", tmp_path / "cache", *settings, "--num_workers", 1)
    assert status == 0, text
    named = f"{tmp_path}/bad.tar: 0005: image of 13 bytes cannot be decoded"
    assert f"1 undecodable image(s):\n  {named}" in text
    status, text = command("fit", "--data.feature_cache", tmp_path / "cache", *settings)
    assert status == 0, text
    assert f"train: 1 image(s) skipped (all in {tmp_path}/run/skipped.jsonl):\n  {named}" in text
    settings += ["--data.on_bad_sample", "error"]
    assert f"error: {named}" in refused(command, "--data.feature_cache", tmp_path / "cache", *settings)
    assert f"error: {named}" in refused(command, "--out", tmp_path / "new", *settings, name="cache-features")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--splits", "test"], "data.test: expected shards, for example --data.test 'mine/test-*.tar', got none"),
        (["--splits", "trian"], "cache-features: argument --splits: invalid choice: 'trian'"),
        (["--batch_size", 0], "--batch_size: expected at least 1, got 0"),
        (["--num_workers", -1], "--num_workers: expected at least 0, got -1"),
        (["--device", "abacus"], "--device: cannot use abacus: "),
        (["--data.batchsize", 3], "unrecognized arguments: --data.batchsize 3; did you mean data.batch_size?"),
    ],
)
def test_bad_options_give_one_clear_line(command, tmp_path, settings, message):
    assert message in refused(command, "--out", tmp_path / "cache", *settings, name="cache-features")


def test_features_that_are_not_finite_are_refused(command, tmp_path, monkeypatch):
    monkeypatch.setattr(VisionEncoder, "forward", lambda self, pixels: FORWARD(self, pixels) * float("nan"))
    line = refused(command, "--out", tmp_path / "cache", name="cache-features")
    assert "expected finite features, got others for the image with SHA-256 " in line
    assert len(FeatureCache(tmp_path / "cache")) == 0


def test_a_full_disk_leaves_the_finished_shards(tmp_path, monkeypatch):
    key = FeatureKey({"name": "x", "kwargs": {}}, "0", {}, features_room.FORMAT)
    writer = FeatureWriter(tmp_path / "cache", key, (2, 3), shard_bytes=24)  # two images
    writer.add("a", torch.ones(2, 3))
    writer.add("a", torch.zeros(2, 3))  # the same image once more
    writer.add("b", torch.ones(2, 3) * 2)
    writer.add("c", torch.ones(2, 3) * 3)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer.add("d", torch.ones(2, 3) * 4)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["features-00000.safetensors", INDEX]
    cache = FeatureCache(tmp_path / "cache")
    assert len(cache) == 2
    assert torch.equal(cache["a"], torch.ones(2, 3, dtype=torch.bfloat16))
    assert torch.equal(cache["b"], torch.full((2, 3), 2.0, dtype=torch.bfloat16))
    assert "c" not in cache


def test_ctrl_c_ends_with_130_and_one_line(command, tmp_path):
    """A real signal to the whole process group, as a terminal sends it, with loader processes."""
    out = tmp_path / "cache"
    write_shard(tmp_path / "many.tar", [colour_record(n, side=500 + n) for n in range(150)])
    arguments = ["--config", command.config, "--data.train", tmp_path / "many.tar", "--num_workers", 2, "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmprefix", "cache-features", *map(str, arguments)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    wait_for(out / INDEX, process)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, output
    assert f"interrupted; {out} holds 0 images in 0 finished shards" in output
    assert "Traceback" not in output
    assert [p.name for p in out.iterdir()] == [INDEX]
