"""Training through the command line's own entry point, in this process, on small coloured pictures."""

import csv
import itertools
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml

from mmprefix.cli import run
from mmprefix.data.shards import write_shard
from mmprefix.decoder import DecoderArgs
from mmprefix.errors import InputError
from mmprefix.processing import TokenizerArgs
from mmprefix.training import callbacks, checkpoints, module, saving
from mmprefix.training.layers import compile_layers, layers_of
from mmprefix.training.module import MMPrefixModule
from mmprefix.training.optim import OptimizerArgs, PartArgs, parameter_groups, schedule_factor
from mmprefix.vision import VisionArgs
from tests.conftest import TINY_DECODER, TINY_VISION, colour_record, make_batch

MODEL = {
    "vision": {"name": "test_vit", "image_size": 32, "kwargs": {"drop_path_rate": 0.2}},
    "decoder": {"config": {**TINY_DECODER, "attention_dropout": 0.1}},
    "tokenizer": {"name": "byte"},
    "optimizer": {"lr": 1e-3, "weight_decay": 0.01},
}


@pytest.fixture
def fit(tmp_path, colour_shards, capfd):
    """Runs ``fit`` on coloured pictures; returns status, what it printed, and the run folder."""
    shards = colour_shards()

    def do(run_name="run", *, command="fit", config=None, **settings):
        content = {
            "model": MODEL,
            "data": {
                "train": str(shards / "train-*.tar"), "val": str(shards / "val-*.tar"), "batch_size": 6,
                "max_target_tokens": 8, "augmentation": {"degrees": 10},
            },
            "trainer": {
                "max_epochs": 2, "accelerator": "cpu", "gradient_clip_val": 1.0, "log_every_n_steps": 1,
                "enable_progress_bar": False, "enable_model_summary": False,
            },
        }  # fmt: skip
        for section, values in (config or {}).items():
            content[section] = {**content[section], **values}
        path = tmp_path / f"{run_name}.yaml"
        path.write_text(yaml.safe_dump(content))
        folder = tmp_path / "runs" / run_name
        arguments = [command, "--config", str(path), "--trainer.default_root_dir", str(folder)]
        for name, value in settings.items():
            arguments += [f"--{name.replace('__', '.')}", str(value)]
        capfd.readouterr()
        status = run(arguments)
        out, err = capfd.readouterr()
        return status, out + err, folder

    return do


def weights(folder, step=None):
    path = checkpoints.newest_checkpoint(folder) if step is None else folder / "checkpoints" / f"step={step:08d}.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def metric_rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


def test_fit_leaves_everything_behind(fit):
    status, text, folder = fit()
    assert status == 0, text
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.yaml", "metrics.csv", "model", "predictions.jsonl", "predictions.png", "report.html",
        "tensorboard",
    ]  # fmt: skip
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert "val/predictions" in events.Tags()["images"]
    assert len(events.Images("val/predictions")) == 2, "one for each validated epoch"
    assert "train/loss" in events.Tags()["scalars"]
    assert (folder / "model" / "model.safetensors").is_file()
    rows = metric_rows(folder)
    for name in (
        "train/loss", "train/grad_norm", "train/samples_per_second", "train/tokens_per_second", "train/padding_share",
        "lr/vision", "lr/connector", "lr/decoder", "val/loss", "val/exact_match", "val/exact_match.colour",
    ):  # fmt: skip
        assert any(row[name] for row in rows), name
    steps = [row for row in rows if row["train/loss"]]
    assert len(steps) == 8
    assert all(0 <= float(row["train/padding_share"]) < 0.5 for row in steps)
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 12
    assert list(predictions[0]) == ["id", "image_id", "kind", "instruction", "prediction", "references"]
    assert "val: 6 images, 12 samples" in text
    assert "which colour?" in text


def test_throughput_logs_utilization_and_memory(fit, caplog):
    status, text, folder = fit(model__peak_tflops=0.5)
    assert status == 0, text
    steps = [row for row in metric_rows(folder) if row["train/tokens_per_second"]]
    assert len(steps) == 8
    for row in steps:
        tflops = float(row["train/tflops_per_device"])
        assert float(row["train/mfu"]) == pytest.approx(tflops / 0.5)
        # From 3 times the two of each weight, for a token, up to what vision and logits add.
        assert 0.3e6 < tflops * 1e12 / float(row["train/tokens_per_second"]) < 3e6
        assert 0.1 < float(row["train/peak_rss_gib"]) < 100
    status, text, folder = fit("measured", model__peak_tflops="measure", trainer__max_epochs=1)
    assert status == 0, text
    assert caplog.text.count("TFLOP/s, measured with torch.float32 matrix products") == 1
    assert all(0 < float(row["train/mfu"]) < 1.5 for row in metric_rows(folder) if row["train/mfu"])


def test_a_decoder_whose_flops_cannot_be_counted_trains_all_the_same(fit, monkeypatch):
    def refuse(config, lora):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(callbacks.ModelFlops, "of", refuse)
    with pytest.warns(UserWarning, match="train/tflops_per_device is not logged: .* Tensor.item"):
        status, text, folder = fit(trainer__max_epochs=1, model__peak_tflops=1)
    assert status == 0, text
    assert not {"train/tflops_per_device", "train/mfu"} & metric_rows(folder)[0].keys()
    assert "train/peak_rss_gib" in metric_rows(folder)[0]


def test_a_second_run_keeps_the_first(fit):
    _, _, folder = fit(trainer__max_epochs=1)
    first = (folder / "metrics.csv").read_text()
    status, text, _ = fit(trainer__max_epochs=1)
    assert status == 0
    assert f"{folder} holds an earlier run: kept as {folder}.1" in text
    assert (folder.with_name("run.1") / "metrics.csv").read_text() == first
    assert (folder / "metrics.csv").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer__val_check_interval": 5000}, "error: trainer: `val_check_interval` (5000) must be"),
        ({"data__max_tokens": 1}, "error: data.max_tokens: expected items of at most 1 tokens, got one of "),
        (
            {f"model__train_{part}__freeze": True for part in ("vision", "connector", "decoder")},
            "error: model: expected a part that learns",
        ),
    ],
    ids=["interval", "max_tokens", "frozen"],
)
def test_a_run_that_is_refused_leaves_the_folder_as_it_was(settings, message, fit):
    """Also where only Lightning's loop finds out, after the earlier run was moved away."""
    status, text, folder = fit(trainer__max_epochs=1, **settings)
    assert status == 2
    assert message in text
    assert not folder.exists()
    _, _, folder = fit(trainer__max_epochs=1)
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, text, _ = fit(trainer__max_epochs=1, **settings)
    assert status == 2
    assert f"{folder} holds the earlier run again" in text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == first
    assert not folder.with_name("run.1").exists()


def test_a_run_that_fails_after_its_first_step_keeps_what_it_wrote(fit, monkeypatch):
    """Also where nothing was logged yet."""
    _, _, folder = fit(trainer__max_epochs=1)

    def fail(self, outputs, batch, batch_idx):
        raise RuntimeError("a fault")

    monkeypatch.setattr(MMPrefixModule, "on_train_batch_end", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        fit(trainer__max_epochs=1, trainer__log_every_n_steps=50)
    assert (folder / "config.yaml").is_file()
    assert not (folder / "metrics.csv").exists()
    assert (folder.with_name("run.1") / "metrics.csv").is_file()


def test_a_run_that_fails_leaves_alone_another_that_began_in_its_place(fit, monkeypatch):
    _, _, folder = fit(trainer__max_epochs=1)

    def begin_another(self):
        folder.rename(folder.with_name("run.2"))
        folder.mkdir()
        (folder / "config.yaml").touch()
        raise InputError("too late")

    monkeypatch.setattr(MMPrefixModule, "on_fit_start", begin_another)
    status, text, _ = fit(trainer__max_epochs=1)
    assert (status, text.splitlines()[-1]) == (2, "error: too late")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert (folder.with_name("run.1") / "metrics.csv").is_file()
    assert (folder.with_name("run.2") / "config.yaml").is_file()


def test_an_empty_folder_and_a_link_to_one_are_left_as_they_were(fit, tmp_path):
    runs = tmp_path / "runs"
    (runs / "empty").mkdir(parents=True)
    (runs / "link").symlink_to(runs / "empty")
    for name in ("empty", "link"):
        status, text, folder = fit(name, trainer__max_epochs=1, data__max_tokens=1)
        assert (status, text.splitlines()[-1][:24]) == (2, "error: data.max_tokens: ")
        assert list(folder.iterdir()) == []
    assert (runs / "link").is_symlink()


def test_a_folder_without_a_name_of_its_own_is_no_run_folder_unless_it_is_empty(fit, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.yaml").write_text("of the user")
    monkeypatch.chdir(tmp_path / "here")
    status, text, _ = fit(trainer__max_epochs=1, trainer__default_root_dir=".")
    assert status == 2
    assert (
        "error: trainer.default_root_dir: expected a folder that can be renamed, since it holds something, got ."
        in text
    )
    assert Path("config.yaml").read_text() == "of the user"


def test_same_seed_same_weights_other_seed_others(fit):
    folders = [fit(f"seed{n}", seed_everything=seed, trainer__max_epochs=1)[2] for n, seed in enumerate((0, 0, 1))]
    assert_same(weights(folders[0]), weights(folders[1]))
    a, b = weights(folders[0]), weights(folders[2])
    assert not all(torch.equal(a[name], b[name]) for name in a)


class _KillAfter(pl.Callback):
    """Ends the run in the middle of an epoch, as a kill would: nothing is saved on the way out."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize(("killed_at", "workers"), [(4, 0), (6, 1), (9, 0)])
def test_resume_equals_the_uninterrupted_run_bit_by_bit(fit, monkeypatch, killed_at, workers):
    """Dropout, stochastic depth and augmentation are on; 4 steps an epoch, of which only the second is validated."""
    settings = {"trainer__max_epochs": 3, "trainer__check_val_every_n_epoch": 2}
    _, _, whole = fit("whole", **settings)
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step=00000008.ckpt", "step=00000012.ckpt"]
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Throughput, "on_train_batch_start", _KillAfter(killed_at).on_train_batch_start)
        with pytest.raises(RuntimeError, match="killed"):
            fit("broken", data__num_workers=workers, **settings)
    status, text, broken = fit("broken", ckpt_path="last", data__num_workers=workers, **settings)
    assert status == 0
    assert f"resuming from {broken}/checkpoints/step={killed_at // 4 * 4:08d}.ckpt" in text
    assert_same(weights(whole), weights(broken))
    # The history goes on where the checkpoint was: no step missing, none twice.
    losses = [
        [(row["step"], row["train/loss"]) for row in metric_rows(f) if row["train/loss"]] for f in (whole, broken)
    ]
    assert losses[0] == losses[1]
    assert (whole / "predictions.jsonl").read_text() == (broken / "predictions.jsonl").read_text()


def test_resume_in_the_middle_of_an_epoch_continues_it(fit, monkeypatch, tmp_path):
    """With a checkpoint every 3 steps, as a user may configure it; 4 steps an epoch, workers prefetching."""

    def settings(name):
        every_3_steps = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {
                "dirpath": str(tmp_path / "runs" / name / "checkpoints"), "filename": "step={step:08d}",
                "auto_insert_metric_name": False, "every_n_train_steps": 3, "save_top_k": -1,
            },
        }  # fmt: skip
        return {"config": {"trainer": {"callbacks": [every_3_steps]}}, "trainer__max_epochs": 3, "data__num_workers": 1}

    _, _, whole = fit("whole", **settings("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Throughput, "on_train_batch_start", _KillAfter(7).on_train_batch_start)
        with pytest.raises(RuntimeError, match="killed"):
            fit("broken", **settings("broken"))
    status, text, broken = fit("broken", ckpt_path="last", **settings("broken"))
    assert status == 0
    assert "step=00000006.ckpt" in text, "in the middle of the second epoch"
    assert_same(weights(whole, 12), weights(broken, 12))


def test_resume_from_an_older_checkpoint_leaves_the_newer_aside(fit):
    _, _, folder = fit()
    older = folder / "checkpoints" / "step=00000004.ckpt"
    status, text, _ = fit(ckpt_path=older)
    assert status == 0
    assert f"a later checkpoint is kept as {folder}/checkpoints/step=00000008.ckpt.left" in text
    assert checkpoints.newest_checkpoint(folder).name == "step=00000008.ckpt", "written anew"


def test_a_run_that_cannot_start_moves_nothing(fit):
    _, _, folder = fit(trainer__max_epochs=1)
    status, text, _ = fit(data__train="/nowhere/*.tar")
    assert status == 2
    assert "kept as" not in text
    assert (folder / "model" / "config.json").is_file()
    assert not folder.with_name("run.1").exists()


def test_resume_with_nothing_there_is_an_error(fit):
    """But for `fit` and `last`, which a job that is started again and again says from the beginning."""
    status, text, folder = fit(command="validate", ckpt_path="last")
    assert status == 2
    assert f"error: --ckpt_path last: there is no {folder}/checkpoints/step=*.ckpt" in text
    status, text, _ = fit(ckpt_path="/nowhere.ckpt")
    assert status == 2
    assert "error: /nowhere.ckpt: expected a checkpoint file or folder, there is none" in text


@pytest.mark.parametrize("normalization", ["tokens", "per_sample"])
def test_loss_does_not_depend_on_how_samples_are_grouped(fit, normalization):
    """12 records as one batch, as 2 and as 4 accumulated micro-batches, with targets of different lengths."""
    model = {**MODEL, "vision": {"name": "test_vit", "image_size": 32}, "decoder": {"config": TINY_DECODER}}
    folders = []
    for size in (12, 6, 3):
        status, text, folder = fit(
            f"{normalization}{size}", config={"model": {**model, "loss_normalization": normalization}},
            data__batch_size=size, trainer__accumulate_grad_batches=12 // size,
        )  # fmt: skip
        assert status == 0, text
        folders.append(folder)
    losses = [[float(row["train/loss"]) for row in metric_rows(f) if row["train/loss"]] for f in folders]
    norms = [[float(row["train/grad_norm"]) for row in metric_rows(f) if row["train/grad_norm"]] for f in folders]
    assert len(losses[0]) == 4
    for other in (1, 2):
        assert losses[0] == pytest.approx(losses[other], rel=1e-4)
        assert norms[0] == pytest.approx(norms[other], rel=1e-3)


def test_short_last_window_is_normalised_by_what_is_in_it(fit):
    """24 records, batches of 6, windows of 3: the last window of an epoch holds a single batch."""
    model = {**MODEL, "vision": {"name": "test_vit", "image_size": 32}, "decoder": {"config": TINY_DECODER}}
    status, _, folder = fit("short", config={"model": model}, trainer__accumulate_grad_batches=3, trainer__max_epochs=1)
    assert status == 0
    norms = [float(row["train/grad_norm"]) for row in metric_rows(folder) if row["train/grad_norm"]]
    assert len(norms) == 2
    # A mean over the nominal window would make the last norm about a third.
    assert norms[1] > 0.6 * norms[0]


def test_overfits_one_batch_to_zero_loss_and_answers_it(fit):
    status, _, folder = _overfit(fit)
    assert status == 0
    losses = [float(row["train/loss"]) for row in metric_rows(folder) if row["train/loss"]]
    assert losses[0] > 1
    assert losses[-1] < 0.01
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert all(p["prediction"] in p["references"] for p in predictions)


def _overfit(fit):
    _, _, folder = fit("first", trainer__max_epochs=1)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    val = config["data"]["val"]
    return fit(
        "overfit", config={"model": {**MODEL, "vision": {"name": "test_vit", "image_size": 32},
                                     "decoder": {"config": TINY_DECODER}, "optimizer": {"lr": 3e-3}},
                           "data": {"augmentation": None, "train": val}},
        trainer__max_epochs=250, trainer__check_val_every_n_epoch=250,
    )  # fmt: skip


def test_nan_loss_names_step_and_samples_and_keeps_the_checkpoint(fit, monkeypatch):
    original = MMPrefixModule.training_step

    def poisoned(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        if self.global_step == 5:
            self._window.losses[-1] = self._window.losses[-1] * float("nan")
        return loss

    monkeypatch.setattr(MMPrefixModule, "training_step", poisoned)
    status, text, folder = fit()
    assert status == 2
    assert "error: step 5 (epoch 1): the loss is not finite; samples of the batch: " in text
    named = text.split("samples of the batch: ")[1].split(";")[0].split(", ")
    assert len(named) == 12
    assert all(name.endswith(("-colour", "-red")) for name in named)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step=00000004.ckpt"]
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_non_finite_gradient_under_a_finite_loss_is_refused_before_the_step(fit, monkeypatch):
    original = MMPrefixModule.on_before_optimizer_step

    def poisoned(self, optimizer):
        original(self, optimizer)
        if self.global_step == 5:
            self.model.connector.weight.grad[0, 0] = float("inf")

    monkeypatch.setattr(MMPrefixModule, "on_before_optimizer_step", poisoned)
    status, text, folder = fit()
    assert status == 2
    assert "error: step 5 (epoch 1): the gradient is not finite; samples of the batch: " in text
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step=00000004.ckpt"]


def test_full_disk_keeps_the_previous_checkpoint(fit, monkeypatch):
    save, count = torch.save, []

    def full(content, file):
        count.append(1)
        if len(count) == 2:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(checkpoints.torch, "save", full)
    status, text, folder = fit()
    assert status == 1
    assert "error: [Errno 28] cannot save " in text
    assert "No space left on device; the checkpoint before it is untouched" in text
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step=00000004.ckpt"]
    assert weights(folder)


def test_a_write_that_fails_half_way_keeps_the_file_before_it(tmp_path):
    """A real failing write: the process may not write files beyond 200 kB. torch reports it as a RuntimeError."""
    path = tmp_path / "step=00000001.ckpt"
    writer = saving.AtomicCheckpointIO()
    writer.save_checkpoint({"x": torch.ones(10)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot save .*; the checkpoint before it is untouched"):
            writer.save_checkpoint({"x": torch.ones(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_skipped_images_are_reported_with_key_and_shard(fit, tmp_path):
    records = [colour_record(n) for n in range(7)]
    records[3] = ("0003", b"not a picture", records[3][2])
    write_shard(tmp_path / "bad.tar", records)
    status, text, folder = fit(data__train=str(tmp_path / "bad.tar"), trainer__max_epochs=2, data__batch_size=1)
    assert status == 0, text
    assert text.count("train: 1 image(s) skipped (all in") == 2, "once per epoch"
    assert f"{tmp_path}/bad.tar: 0003: image of 13 bytes cannot be decoded" in text
    assert [row["train/bad_samples"] for row in metric_rows(folder) if row["train/bad_samples"]] == ["1.0", "1.0"]
    named = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [(row["split"], row["epoch"], row["key"]) for row in named] == [("train", 0, "0003"), ("train", 1, "0003")]
    status, text, _ = fit(command="predict", ckpt_path="last", data__predict=str(tmp_path / "bad.tar"))
    assert status == 0
    assert "predict: 1 image(s) skipped (all in" in text
    assert "predict: 1 image(s) skipped, in none of these numbers; skipped.jsonl names them" in text
    assert len((folder / "predictions-predict.jsonl").read_text().splitlines()) == 12
    status, text, _ = fit(data__train=str(tmp_path / "bad.tar"), data__on_bad_sample="error")
    assert status == 2
    assert f"error: {tmp_path}/bad.tar: 0003: image of 13 bytes cannot be decoded" in text


def test_nothing_usable_ends_the_run_without_a_checkpoint(fit, tmp_path):
    write_shard(
        tmp_path / "bad.tar", [(key, b"no picture", payload) for key, _, payload in map(colour_record, range(3))]
    )
    status, text, folder = fit(data__train=str(tmp_path / "bad.tar"))
    assert status == 2
    assert "error: data.train: expected images that can be decoded, all 3 were skipped: " in text
    assert not list(folder.glob("checkpoints/*"))


def test_broken_and_unfitting_checkpoints_are_one_line(fit):
    _, _, folder = fit(trainer__max_epochs=1)
    status, text, _ = fit(ckpt_path="last", model__decoder__config__hidden_size=32)
    assert status == 2
    assert "the checkpoint does not fit the configured model: " in text
    path = checkpoints.newest_checkpoint(folder)
    path.write_bytes(path.read_bytes()[:5000])
    for command in ("fit", "validate"):
        status, text, _ = fit(command=command, ckpt_path="last")
        assert status == 2
        assert f"error: {path}: expected a checkpoint of mmprefix, cannot read it: " in text


def test_training_without_checkpoints_is_possible(fit):
    status, text, folder = fit(trainer__enable_checkpointing="false", trainer__max_epochs=1)
    assert status == 0, text
    assert not (folder / "checkpoints").exists()


def test_validate_and_predict_use_a_checkpoint(fit):
    _, _, folder = fit(trainer__max_epochs=1)
    predictions = (folder / "predictions.jsonl").read_text()
    for command in ("validate", "predict"):
        status, text, _ = fit(command=command, ckpt_path="last")
        assert status == 0, text
        assert "val: 6 images" in text or "predict: 6 images" in text
        assert (folder / f"predictions-{command}.jsonl").read_text() == predictions
    status, text, _ = fit(command="validate")
    assert status == 2
    assert "validate: expected --ckpt_path FILE" in text


def test_model_of_a_checkpoint_is_the_exported_model(fit):
    _, _, folder = fit(trainer__max_epochs=1)
    exported, processor = checkpoints.load_model(folder / "model")
    from_file, other = checkpoints.load_model(checkpoints.newest_checkpoint(folder))
    assert_same(exported.state_dict(), from_file.state_dict())
    assert processor.encode("q", ["a"]).ids.tolist() == other.encode("q", ["a"]).ids.tolist()


@pytest.mark.parametrize(
    ("settings", "frozen", "moved"),
    [
        ({"train_vision": {"freeze": True}}, ["vision"], ["connector", "decoder"]),
        ({"train_decoder": {"unfreeze_at_step": 99}}, ["decoder"], ["vision", "connector"]),
        ({"train_vision": {"unfreeze_at_step": 4}}, [], ["vision", "connector", "decoder"]),
        ({"train_connector": {"lr": 0.0}}, ["connector"], ["vision", "decoder"]),
    ],
)
def test_freezing_and_learning_rates_per_part(fit, settings, frozen, moved):
    status, text, folder = fit("start", config={"model": {**MODEL, **settings}}, trainer__max_epochs=2)
    assert status == 0, text
    first, last = weights(folder, 4), weights(folder, 8)

    def changed(part):
        return any(not torch.equal(first[n], last[n]) for n in first if n.startswith(f"model.{part}."))

    assert [part for part in frozen if changed(part)] == []
    assert [part for part in moved if not changed(part)] == []


def test_bf16_trains_close_to_float32_but_not_in_it(fit):
    model = {**MODEL, "vision": {"name": "test_vit", "image_size": 32}, "decoder": {"config": TINY_DECODER}}
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        status, text, folder = fit(
            precision, config={"model": model}, trainer__precision=precision, trainer__max_epochs=1
        )
        assert status == 0, text
        losses.append([float(row["train/loss"]) for row in metric_rows(folder) if row["train/loss"]])
        assert all(value.dtype == torch.float32 for value in weights(folder).values() if value.is_floating_point())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != pytest.approx(losses[1], rel=1e-5), "bf16 must show"


NO_DROPOUT = {"model": {**MODEL, "decoder": {"config": TINY_DECODER}}}


@pytest.mark.parametrize("visibility", ["full", "nested"])
def test_packed_training_without_masks_matches_rows_with_masks(fit, visibility, caplog):
    runs = {}
    for attention in ("auto", "dense"):
        config = {"model": {**NO_DROPOUT["model"], "vision": {"name": "test_vit", "image_size": 32}}}
        status, text, folder = fit(
            attention, config=config, model__attention=attention, model__prefix_visibility=visibility
        )
        assert status == 0, text
        lines = [message for message in caplog.messages if message.startswith("attention: ")]
        caplog.clear()
        runs[attention] = folder
        rows = metric_rows(folder)
        padding = [float(row["train/padding_share"]) for row in rows if row["train/padding_share"]]
        if attention == "auto":
            kernel = "flash attention over runs of equal length"
            assert lines == [f"attention: mask-free ({kernel}), samples packed into one row"]
            assert max(padding) == 0
        else:
            assert lines == ["attention: dense mask, a row for each sample: as model.attention says"]
            assert max(padding) > 0
    assert_same(*map(weights, runs.values()), atol=1e-3, rtol=1e-2)
    losses = [[float(row["train/loss"]) for row in metric_rows(run) if row["train/loss"]] for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_attention_dropout_needs_a_mask_and_says_so(fit, caplog):
    status, text, _ = fit(trainer__max_epochs=1)
    assert status == 0, text
    assert "attention: dense mask, a row for each sample: the decoder's attention_dropout" in caplog.messages


def test_a_budgeted_run_resumes_in_mid_epoch_bit_equal(fit):
    every = "[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {every_n_train_steps: 1, " \
        "save_top_k: -1, filename: '{step:08d}', auto_insert_metric_name: true}}]"  # fmt: skip
    kwargs = {
        "config": NO_DROPOUT, "data__max_tokens": 200, "data__batch_size": 32, "trainer__callbacks": every,
    }  # fmt: skip
    status, text, whole = fit("whole", **kwargs)
    assert status == 0, text
    steps = sorted(whole.rglob("*.ckpt"))
    assert len(steps) > 8, "more batches than without a budget"
    expected = torch.load(steps[-1], weights_only=True)["state_dict"]
    status, text, resumed = fit("resumed", ckpt_path=steps[len(steps) // 2 + 1], **kwargs)
    assert status == 0, text
    assert max(path.name for path in resumed.rglob("*.ckpt")) == steps[-1].name
    assert_same(weights(resumed, len(steps)), expected)


def test_bf16_true_trains(fit):
    """Lightning casts the batch by setting the fields of a copy."""
    status, text, folder = fit(config=NO_DROPOUT, trainer__precision="bf16-true", trainer__max_epochs=1)
    assert status == 0, text
    assert all(value.dtype == torch.bfloat16 for value in weights(folder).values() if value.is_floating_point())


def test_rotary_frequencies_stay_exact_in_half_precision(photos):
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            buffers = dict(module.model.named_buffers())
            seen.update({name: b.clone() for name, b in buffers.items() if name.endswith("inv_freq")})

    module = MMPrefixModule(TINY_VISION, DecoderArgs(config=TINY_DECODER), tokenizer=TokenizerArgs("byte"))
    exact = {name: b.clone() for name, b in module.model.named_buffers() if name.endswith("inv_freq")}
    trainer = pl.Trainer(
        precision="bf16-true", max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        callbacks=[Look()], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([make_batch(module.processor, photos)], batch_size=None))
    assert seen
    assert next(module.model.decoder.parameters()).dtype == torch.bfloat16
    assert_same(seen, exact)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_recomputes_activations_also_in_a_frozen_decoder(frozen, photos):
    module = MMPrefixModule(
        TINY_VISION, DecoderArgs(config=TINY_DECODER), tokenizer=TokenizerArgs("byte"), gradient_checkpointing=True,
        train_decoder=PartArgs(freeze=frozen),
    )  # fmt: skip
    module.train()
    module._set_freezing(0)
    calls = []
    module.model.decoder.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    batch = make_batch(module.processor, photos)
    module.model.target_logits(batch).sum().backward()
    assert len(calls) == 2, "once forward, once again for the gradient"
    assert module.model.decoder.model.layers[0].self_attn.training != frozen


def test_gradient_checkpointing_does_not_change_the_training(fit):
    model = {**MODEL, "vision": {"name": "test_vit", "image_size": 32}, "decoder": {"config": TINY_DECODER}}
    folders = [
        fit(f"gc{flag}", config={"model": {**model, "gradient_checkpointing": flag}}, trainer__max_epochs=1)[2]
        for flag in (False, True, "elementwise")
    ]
    for folder in folders[1:]:
        assert_same(weights(folders[0]), weights(folder), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", ["false", "selective", "elementwise"])
def test_compiled_layers_do_not_change_the_training(fit, monkeypatch, checkpointing):
    """Compiled once, in spite of the validation and the test inside of `fit`; whose code runs uncompiled."""
    compiled = []

    def without_a_c_compiler(model):  # what inductor makes of the same graphs takes minutes
        compiled.append(layers_of(model))
        compile_layers(model, backend="aot_eager")

    monkeypatch.setattr(module, "compile_layers", without_a_c_compiler)
    exact = {"decoder": {"config": TINY_DECODER}, "vision": {"name": "test_vit", "image_size": 32}}
    settings = {"config": {"model": {**MODEL, **exact}}, "model__gradient_checkpointing": checkpointing}
    status, text, plain = fit("plain", **settings)
    assert status == 0, text
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    status, text, folder = fit("compiled", model__compile="true", **settings)
    assert status == 0, text
    assert len(compiled) == 1
    assert all(layer._compiled_call_impl is not None for layer in compiled[0][:-1]), "the last one runs on labels only"
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2, "a layer of the encoder and one of the decoder"
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    assert_same(weights(folder), weights(plain), atol=2e-5, rtol=1e-4)
    losses = [[float(row["train/loss"]) for row in metric_rows(run) if row["train/loss"]] for run in (plain, folder)]
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-4, rtol=1e-4)


def test_progress_bar_shows_the_time_left(fit, monkeypatch):
    shown = []
    original = callbacks.ProgressBar.get_metrics
    monkeypatch.setattr(
        callbacks.ProgressBar, "get_metrics", lambda self, *args: shown.append(original(self, *args)) or shown[-1]
    )
    status, text, _ = fit(trainer__enable_progress_bar="true")
    assert status == 0, text
    left = [metrics["left"] for metrics in shown if "left" in metrics]
    assert left
    assert left[-1] == "0:00:00"
    assert all("v_num" not in metrics for metrics in shown)


# Pieces


def test_schedule_rises_linearly_and_falls_as_a_cosine():
    factors = [schedule_factor(step, 100, warmup=0.1, final_lr=0.1) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] == pytest.approx(10 / 11)
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))


def test_weight_decay_is_on_matrices_only_and_unused_heads_are_left_out():
    module = MMPrefixModule(TINY_VISION, DecoderArgs(config=TINY_DECODER), tokenizer=TokenizerArgs("byte"))
    parts = {name: (module._trainable[name], PartArgs()) for name in ("vision", "connector", "decoder")}
    parts["connector"] = (module._trainable["connector"], PartArgs(lr=0.5))
    groups = parameter_groups(parts, OptimizerArgs(lr=1.0, weight_decay=0.1))
    assert [g["lr"] for g in groups] == [1.0, 1.0, 0.5, 0.5, 1.0, 1.0]
    assert [g["name"] for g in groups] == [
        "vision", "vision/no_decay", "connector", "connector/no_decay", "decoder", "decoder/no_decay",
    ]  # fmt: skip
    for group in groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
    grouped = sum(p.numel() for g in groups for p in g["params"])
    assert grouped == sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_all_frozen_is_refused(fit):
    frozen = {f"train_{part}": {"freeze": True} for part in ("vision", "connector", "decoder")}
    status, text, _ = fit(config={"model": {**MODEL, **frozen}})
    assert status == 2
    assert "all of vision, connector and decoder are frozen" in text


def test_a_whole_model_is_the_start(tmp_path):
    """An imported PaliGemma trains, in float32, and what stands beside it is refused."""
    from mmprefix.interop.export import write_pretrained
    from mmprefix.interop.paligemma import import_paligemma
    from tests.paligemma import save_paligemma

    save_paligemma(tmp_path / "source", dtype=torch.bfloat16)
    imported = import_paligemma(str(tmp_path / "source"))
    write_pretrained(tmp_path / "ours", *imported)
    module = MMPrefixModule(pretrained=str(tmp_path / "ours"), prefix_visibility="nested")
    assert module.model.decoder.dtype == torch.bfloat16, "mapped from its file, until it trains"
    module._trainer = SimpleNamespace(strategy=None)
    module.configure_model()
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    assert module.model.training
    assert module.model.config.prefix_visibility == module.processor.prefix_visibility == "nested"
    for name, value in imported[0].state_dict().items():
        assert torch.equal(module.model.state_dict()[name].bfloat16(), value)
    with pytest.raises(InputError, match="expected no model.vision beside it, got VisionArgs"):
        MMPrefixModule(pretrained=str(tmp_path / "ours"), vision=VisionArgs("test_vit"))
    with pytest.raises(InputError, match="expected a timm model, got none"):
        MMPrefixModule(
            decoder=DecoderArgs(config={"model_type": "llama", "num_hidden_layers": 1}), tokenizer=TokenizerArgs("byte")
        )


def test_a_run_on_copies_of_shards_is_the_run_on_the_shards(fit, tmp_path):
    shards, cache = tmp_path / "shards", tmp_path / "cache"
    sources = {
        "data__train": f"pipe:cat {shards}/train-{{000,001}}.tar", "data__val": f"{shards}/val-*.tar", "data__test": shards,
    }  # fmt: skip
    status, text, plain = fit("plain", trainer__max_epochs=1)
    assert status == 0, text
    status, text, _ = fit("early", data__shard_cache=cache, data__train="pipe:exit 1")
    assert status == 2
    assert "pipe:exit 1: expected a shard, the command ended with status 1: no message" in text
    assert "Traceback" not in text
    status, text, copied = fit("copied", trainer__max_epochs=1, data__shard_cache=cache, **sources)
    assert status == 0, text
    assert_same(weights(plain), weights(copied))
    assert len(list(cache.rglob("*.tar"))) == 5, "two outputs of commands, and three files"
    settings = {**sources, "ckpt_path": checkpoints.newest_checkpoint(copied), "data__shard_cache": tmp_path / "others"}
    status, text, _ = fit("only", command="validate", **settings)
    assert status == 0, text
    assert [path.name for path in (tmp_path / "others").rglob("*.tar")] == ["val-000.tar"], "training data stays away"
