"""The command line as a user meets it: separate processes for what concerns start-up, exit status and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from mmprefix import cli
from mmprefix.__main__ import main
from mmprefix.cli import run
from mmprefix.data import storage
from mmprefix.data.shards import write_shard
from mmprefix.errors import out_of_memory
from mmprefix.training import checkpoints
from mmprefix.training.preemption import EXIT_PREEMPTED
from tests import forks
from tests.conftest import colour_record
from tests.test_training import MODEL, metric_rows

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def mmprefix(*arguments, timeout=240, **kwargs):
    return forks.run(["mmprefix", *arguments], text=True, timeout=timeout, env=ENVIRONMENT, **kwargs)


@pytest.fixture
def config(tmp_path, colour_shards):
    shards = colour_shards()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({
        "model": MODEL,
        "data": {
            "train": str(shards / "train-*.tar"), "val": str(shards / "val-*.tar"), "batch_size": 6,
            "max_target_tokens": 8,
        },
        "trainer": {
            "default_root_dir": str(tmp_path / "run"), "max_epochs": 1, "accelerator": "cpu",
            "log_every_n_steps": 1, "enable_progress_bar": False,
        },
    }))  # fmt: skip
    return path


def error_of(capfd, *arguments):
    """Status and last line of stderr of a run in this process."""
    capfd.readouterr()
    try:
        status = run([str(a) for a in arguments])
    except SystemExit as exit_:
        status = exit_.code
    return status, capfd.readouterr().err.strip().splitlines()[-1]


def test_help_and_version_import_nothing_heavy():
    for argument, shown in (("--help", "usage: python -m mmprefix COMMAND"), ("--version", "mmprefix 0.1.0")):
        command = [sys.executable, "-X", "importtime", "-m", "mmprefix", argument]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(shown)
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
        assert "mmprefix.__main__" in imported or "mmprefix" in imported, "the reader of imports must see them"
        assert not {"torch", "lightning", "transformers", "timm"} & imported


def test_output_that_nobody_reads_ends_quietly(tmp_path):
    """As under `| head -1`: the reader has gone before the command prints, and again while it prints."""
    rows = [{"id": str(n), "prediction": "a", "references": ["a"], "kind": "k" * 90 + str(n)} for n in range(1000)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = ["score", "--task", "exact", "--predictions", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "s.json")]
    report = ["report", "--run", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "r.html")]
    for arguments in ([], ["--version"], ["score", "--help"], score, report, ["probe", "--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "mmprefix", *arguments]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
        os.close(writing)
        assert done.stderr == "", arguments
        # argparse itself passes over it, where output isn't buffered.
        assert done.returncode in ((141, 0) if "--help" in arguments else (141,)), arguments
    assert len(json.loads((tmp_path / "s.json").read_text())["items"]) == 1000, "files are whole all the same"
    assert (tmp_path / "r.html").is_file()
    with subprocess.Popen(
        [sys.executable, "-m", "mmprefix", *score], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(100)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(300) == 141


def test_a_broken_pipe_of_something_else_is_an_error(monkeypatch, capfd):
    def broken(arguments):
        raise BrokenPipeError(32, "of a worker")

    monkeypatch.setattr("mmprefix.scoring.score", broken)
    assert main(["score"]) == 1
    assert capfd.readouterr().err == "error: [Errno 32] of a worker\n"


def test_no_command_and_wrong_command():
    assert mmprefix().returncode == 2
    wrong = mmprefix("fitt")
    assert wrong.returncode == 2
    assert (
        wrong.stderr
        == "error: expected one of fit, validate, test, predict, prepare, inspect, cache-features, score, report, generate, "
        "visualize, probe, estimate, doctor, scaling, import-paligemma, export, consolidate, "
        "got 'fitt'; did you mean fit?\n"
    )


def test_unknown_keys_are_refused_with_the_nearest(config, capfd, tmp_path):
    status, line = error_of(capfd, "fit", "--config", config, "--data.batchsize", 3)
    assert status == 2
    assert line == "error: unrecognized arguments: --data.batchsize 3; did you mean data.batch_size?"
    # An abbreviation is not the option it begins like.
    status, line = error_of(capfd, "fit", "--config", config, "--trainer.max_epoch", 3)
    assert (status, line.split(";")[1]) == (2, " did you mean trainer.max_epochs?")
    for content, key in (
        ({"data": {"batchsize": 3}}, "data.batch_size"),
        ({"model": {"conector": {"kind": "mlp"}}}, "model.connector.kind"),
        ({"model": {"optimizer": {"weight_decy": 1}}}, "model.optimizer.weight_decay"),
        ({"model": {"vision": {"nam": "x"}}}, "model.vision.name"),
    ):
        wrong = tmp_path / "wrong.yaml"
        wrong.write_text(yaml.safe_dump(content))
        status, line = error_of(capfd, "fit", "--config", config, "--config", wrong)
        assert status == 2
        assert line.startswith("error: ")
        assert next(iter(next(iter(content.values())))) in line
        assert f"did you mean {key}?" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": {"batch_size": "many"}}, "data.batch_size: expected a whole number, got many"),
        ({"data": {"batch_size": [1, 2]}}, "data.batch_size: expected a whole number, got [1, 2]"),
        ({"data": {"batch_size": None}}, "data.batch_size: expected a value, got null; without the line it is 32, the default"),
        # Lightning's own may be null.
        ({"trainer": {"inference_mode": None}, "model": {"compile": None}}, "model.compile: expected a value, got null; without the line it is false, the default"),
        ({"seed_everything": None}, "seed_everything: expected true or false or a whole number, got null"),
        ({"data": {"train": 5}}, "data.train: expected text, a list, a mapping or null, got 5"),
        ({"model": {"prefix_visibility": "all"}}, "model.prefix_visibility: expected full, nested, causal or null, got all"),
        ({"model": {"train_vision": {"lr": "fast"}}}, "model.train_vision.lr: expected a number or null, got fast"),
        ({"model": {"decoder": 3}}, "model.decoder: expected a mapping, got 3"),
        ({"checkpoints": None}, "checkpoints: expected a mapping, got null"),
        ({"hang_timeout_minutes": -1}, "hang_timeout_minutes: expected a number of at least 0, got -1"),
        ({"resume": "maybe"}, "resume: expected optional or required, got maybe"),
        ({"trainer": {"limit_train_batches": 0}}, "trainer.limit_train_batches: expected more than 0, got 0"),
        (
            {"model": {"train_vision": {"unfreeze_at_step": -3}}},
            "model.train_vision.unfreeze_at_step: expected at least 0, got -3",
        ),
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_are_refused_in_plain_words(content, message, config, capfd, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(content))
    assert error_of(capfd, "fit", "--config", config, "--config", wrong) == (2, f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--runn", "x"], "report: unrecognized arguments: --runn; did you mean --run?"),
        (["report", "--xyz=1"], "report: unrecognized arguments: --xyz"),
        (["generate", "--instruction", "--what"], "generate: argument --instruction: expected one argument"),
        (["prepare", "folder", "--image", "x"], "prepare: unrecognized arguments: --image; did you mean --images?"),
        (["estimate", "--deviced", "4"], "estimate: unrecognized arguments: --deviced; did you mean --devices?"),
        (["inspect", "x", "--splitt", "x"], "inspect: unrecognized arguments: --splitt; did you mean --splits?"),
        (["inspect", "x", "--data.train", "x"], "inspect: expected --config with settings of fit, got --data.train alone"),
        (["fit", "--data.batch_size", "3"], "fit: expected --config FILE (or settings of a model), got neither"),
        (["cache-features", "--ouut", "x"], "cache-features: unrecognized arguments: --ouut; did you mean --out?"),
    ],
)  # fmt: skip
def test_unknown_options_of_other_commands_are_refused_with_the_nearest(arguments, message, capfd):
    assert main(arguments) == 2
    assert capfd.readouterr().err == f"error: {message}\n"


def test_inspect_names_a_file_in_place_of_a_folder(capfd, tmp_path):
    path = tmp_path / "train-000.tar"
    path.touch()
    assert error_of(capfd, "inspect", path) == (2, f"error: inspect: expected a folder of shards, got the file {path}")


@pytest.mark.parametrize(
    "text",
    [
        "Parser key \"x\": Expected a <class 'some.Thing'>. Got value: 3",
        # It is a list: what it holds is wrong.
        "Parser key \"x\": Does not validate against any of the Union subtypes Subtypes: [list[int], <class 'NoneType'>] Errors: "
        "- Expected a <class 'int'> Given value type: <class 'list'> Given value: ['a']",
    ],
)
def test_a_message_that_would_mislead_stays_as_it_is(text):
    assert cli._plain(text) == text


def test_a_folder_that_cannot_be_cleared_hides_no_error_and_names_the_earlier_run(tmp_path, capfd):
    folder, kept = tmp_path / "run", tmp_path / "run.1"
    folder.mkdir()
    kept.mkdir()
    (folder / "tensorboard").symlink_to(kept)  # which no tree is removed through
    cli._Room(folder, folder.stat().st_ino, True, kept).give_back()
    assert f"{folder} could not be cleared: " in (said := capfd.readouterr().err)
    assert said.endswith(f"the earlier run is {kept}\n")
    assert kept.is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.train", "/nowhere/x-*.tar"], "data.train: expected shards at /nowhere/x-*.tar, the folder /nowhere does not exist"),
        (["--data.batch_size", "0"], "data.batch_size: expected at least 1, got 0"),
        (["--data.eval_batch_size", "0"], "data.eval_batch_size: expected at least 1, got 0"),
        (["--data.num_workers", "-1"], "data.num_workers: expected at least 0, got -1"),
        (["--model.num_beams", "0"], "model.num_beams: expected at least 1, got 0"),
        (["--model.peak_tflops", "0"], "model.peak_tflops: expected more than 0, or `measure`, got 0"),
        (["--model.peak_tflops", "much"], "model.peak_tflops"),
        (["--model.optimizer.warmup", "7"], "model.optimizer.warmup: expected at least 0 and below 1.0, got 7.0"),
        (["--trainer.accelerator", "gpuu"], "gpuu"),
        (["--data.batch_size", "many"], "data.batch_size"),
        (["--data.max_target_tokens", "2"], "target: expected at most 2 tokens (data.max_target_tokens), got "),
        (["--model.vision.name", "vit_tiny_patch16_244"], "expected a timm model, got 'vit_tiny_patch16_244'; close to it: vit_tiny_patch16"),
        (["--model.vision.kwargs", "{depht: 2}"], "timm cannot build test_vit"),
        (["--model.vision.pretrained", "/nowhere.safetensors"], "expected a weights file, found none at /nowhere.safetensors"),
        (["--model.decoder.config", "{model_type: bert}"], "BertLMHeadModel (bert, sdpa) can't be a prefix LM: property 1, 'no target token is seen before it', fails: target token"),
        (["--model.decoder.config", "{model_type: t5}"], "expected a causal LM of transformers, got model type 't5'"),
        (["--model.decoder.config", "{model_type: mamba, hidden_size: 32, num_hidden_layers: 1}"], "MambaForCausalLM (mamba, eager) can't be a prefix LM: property 2"),
        (["--model.decoder.config", "{hidden_size: 32}"], "expected the key `model_type`"),
        (["--model.decoder.name", "somewhere"], "expected exactly one of `name` and `config`, got both"),
        (["--model.tokenizer.name", "null"], "model.tokenizer.name: expected a name, a folder or `byte`"),
        (["--model.connector", "{kind: pixel_shuffle, factor: 3}"], "needs a token grid divisible by 3, test_vit has (2, 2)"),
        (["--model.connector.kind", "conv"], "model.connector.kind"),
        (["--model.decoder.attn_implementation", "flash_attention_2"], "expected one of sdpa, eager, got flash_attention_2, which drops the bidirectional prefix"),
        (["--model.vision.image_size", "33"], "takes multiples of its patch size 16, got 33x33; the nearest are 32 and 48"),
        (["--model.connector", "{kind: pixel_shuffle, factor: 0}"], "model.connector.factor: expected at least 1, got 0"),
        (["--model.decoder.config.num_key_value_heads", "3"], "expected num_key_value_heads that divide the 4 of num_attention_heads, got 3"),
        (["--model.decoder.config.num_hidden_layers", "0"], "expected num_hidden_layers of at least 1, got 0"),
        (["--model.decoder.config.hidden_act", "nosuch"], "model.decoder: llama: cannot be built: KeyError: 'nosuch'"),
        (["--model.decoder.config.hidden_size", "wide"], "model.decoder.config: Validation error for field 'hidden_size'"),
        (["--data.augmentation.scale", "1"], "data.augmentation.scale: expected at least 0 and below 1, got 1.0"),
        (["--data.augmentation.degrees", "-1"], "data.augmentation.degrees: expected at least 0 and at most 180, got -1.0"),
        (["--data.mixture.temperature", "0"], "data.mixture.temperature: expected a number above 0, got 0.0"),
        (["--data.max_target_tokens", "0"], "data.max_target_tokens: expected at least 1, or null, got 0"),
        (["--trainer.accumulate_grad_batches", "-1"], "trainer.accumulate_grad_batches: expected at least 1, got -1"),
        (["--trainer.log_every_n_steps", "0"], "trainer.log_every_n_steps: expected at least 1, got 0"),
        (["--trainer.val_check_interval", "100"], "trainer: `val_check_interval` (100) must be less than or equal to the number of the training batches"),
        (["--trainer.default_root_dir", __file__], "trainer.default_root_dir: expected a folder, got the file"),
        (["--seed_everything", "-1"], "seed_everything: -1 is not in bounds"),
        (["--model.pretrained", "/nowhere"], "model.pretrained: expected no model.vision beside it"),
    ],
)  # fmt: skip
def test_bad_settings_give_one_clear_line(config, capfd, settings, message):
    status, line = error_of(capfd, "fit", "--config", config, *settings)
    assert status == 2
    assert line.startswith("error: ")
    assert message in line


def test_tokenizer_without_pad_or_eos_is_refused_and_can_be_told(config, capfd, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "</s>": 1, **{chr(97 + n): 2 + n for n in range(26)}}
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")))
    bare.save_pretrained(tmp_path / "bare")
    name = ["--model.tokenizer.name", tmp_path / "bare"]
    status, line = error_of(capfd, "fit", "--config", config, *name)
    assert status == 2
    assert "has no eos_token; name one of its tokens with --model.tokenizer.eos_token" in line
    status, line = error_of(capfd, "fit", "--config", config, *name, "--model.tokenizer.eos_token", "</s>")
    assert "has no pad_token; name one of its tokens with --model.tokenizer.pad_token" in line
    both = ["--model.tokenizer.eos_token", "</s>", "--model.tokenizer.pad_token", "</s>"]
    assert run([str(a) for a in ("fit", "--config", config, *name, *both)]) == 0


def test_a_place_that_stays_unreadable_is_one_line(config, capfd, monkeypatch):
    def unreachable(*arguments):
        raise ConnectionResetError("reset by\npeer")

    monkeypatch.setattr(storage, "_PAUSES", (0.0,))
    monkeypatch.setattr(MemoryFileSystem, "isdir", unreachable)
    with pytest.warns(UserWarning, match="reading again"):
        status, line = error_of(capfd, "fit", "--config", config, "--data.train", "memory://bucket/x.tar")
    assert (status, line) == (1, "error: memory://bucket/x.tar: reset by peer")


def test_missing_config_file(capfd):
    status, line = error_of(capfd, "fit", "--config", "/nowhere.yaml")
    assert status == 2
    assert "/nowhere.yaml" in line


def test_print_config_is_a_config(config, tmp_path):
    printed = mmprefix("fit", "--config", config, "--print_config")
    assert printed.returncode == 0, printed.stderr
    values = yaml.safe_load(printed.stdout)
    assert values["data"]["batch_size"] == 6
    assert values["model"]["optimizer"]["warmup"] == 0.05
    again = tmp_path / "printed.yaml"
    again.write_text(printed.stdout)
    assert run(["fit", "--config", str(again)]) == 0


def test_generate_answers_about_a_picture(config, capfd, tmp_path, photos):
    assert run(["fit", "--config", str(config)]) == 0
    photos[0].save(tmp_path / "photo.jpg")
    outputs = []
    for where in (tmp_path / "run", checkpoints.newest_checkpoint(tmp_path / "run")):
        done = mmprefix(
            "generate", "--checkpoint", where, "--image", tmp_path / "photo.jpg", "--instruction", "is it red?"
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].count("\n") == 1
    base = ["generate", "--instruction", "q", "--checkpoint", tmp_path / "run", "--image"]
    status, line = error_of(capfd, *base, tmp_path / "none.png")
    assert (status, line) == (2, f"error: --image: expected a picture file, found none at {tmp_path}/none.png")
    (tmp_path / "text.png").write_text("no picture")
    status, line = error_of(capfd, *base, tmp_path / "text.png")
    assert status == 2
    assert "text.png: image of 10 bytes cannot be decoded" in line
    for where, message in (
        (tmp_path / "nothing", "expected a checkpoint file or folder, there is none"),
        (tmp_path / "text.png", "cannot read it"),
        (tmp_path / "shards", "expected model/config.json or checkpoints/step=*.ckpt in it, found neither"),
    ):
        status, line = error_of(capfd, *base, tmp_path / "photo.jpg", "--checkpoint", where)
        assert status == 2
        assert message in line
    torch.save({"x": 1}, tmp_path / "other.ckpt")
    status, line = error_of(capfd, *base, tmp_path / "photo.jpg", "--checkpoint", tmp_path / "other.ckpt")
    assert (status, "without the key 'mmprefix'" in line) == (2, True)


def wait_for(path: Path, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not path.exists():
        assert process.poll() is None, "ended before it was interrupted"
        time.sleep(0.05)
    assert path.exists()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_and_interrupted_runs_resume_to_the_same_weights(config, tmp_path, signal_number):
    """Real processes, real signals; 5 epochs of 4 steps."""
    settings = ["--config", config, "--trainer.max_epochs", "5"]
    whole = mmprefix("fit", *settings, "--trainer.default_root_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "broken"
    command = [sys.executable, "-m", "mmprefix", "fit", *settings, "--trainer.default_root_dir", folder]
    process = subprocess.Popen(
        list(map(str, command)), env={**ENVIRONMENT, "PYTHONFAULTHANDLER": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(folder / "checkpoints" / "step=00000008.ckpt", process)
    process.send_signal(signal_number)
    try:
        output = process.communicate(timeout=120)[0].decode()
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # says where it stands
        pytest.fail(f"does not end:\n{process.communicate(timeout=60)[0].decode()}")
    if signal_number != signal.SIGKILL:
        assert process.returncode == (128 + signal.SIGINT if signal_number == signal.SIGINT else EXIT_PREEMPTED), output
        assert "go on with --ckpt_path last" in output
        assert "Traceback" not in output
    again = mmprefix("fit", *settings, "--trainer.default_root_dir", folder, "--ckpt_path", "last")
    assert again.returncode == 0, again.stderr
    weights = [
        torch.load(f / "checkpoints" / "step=00000020.ckpt", weights_only=True)["state_dict"]
        for f in (tmp_path / "whole", folder)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_two_processes_train_as_one(config, tmp_path):
    """Two ranks with gloo against one process with the same global batch, one image broken.

    The rank with nothing but the broken image takes part with zeros; weights, losses, gradient norms and predictions
    are those of one process.
    """
    records = [colour_record(n) for n in range(24)]
    records[5] = (records[5][0], b"not a picture", records[5][2])
    write_shard(tmp_path / "bad.tar", records)
    plain = [
        "--config", config, "--model.vision.kwargs", "{}", "--model.decoder.config.attention_dropout", "0.0",
        "--data.train", tmp_path / "bad.tar",
    ]  # fmt: skip
    one = mmprefix("fit", *plain, "--trainer.default_root_dir", tmp_path / "one", "--data.batch_size", 2)
    assert one.returncode == 0, one.stderr
    # In earnest: strings have other hashes on each rank.
    words = [
        "fit", *plain, "--trainer.default_root_dir", tmp_path / "two", "--data.batch_size", 1,
        "--trainer.devices", 2, "--trainer.strategy", "ddp",
    ]  # fmt: skip
    command = [sys.executable, "-m", "mmprefix", *map(str, words)]
    two = subprocess.run(command, capture_output=True, text=True, timeout=400, env=ENVIRONMENT)
    assert two.returncode == 0, two.stderr
    for name in ("train/loss", "train/grad_norm", "train/bad_samples", "val/loss", "val/exact_match"):
        columns = [[float(row[name]) for row in metric_rows(tmp_path / n) if row[name]] for n in ("one", "two")]
        assert columns[0]
        assert columns[0] == pytest.approx(columns[1], rel=1e-3, abs=1e-5), name
    weights = [
        torch.load(tmp_path / n / "checkpoints" / "step=00000012.ckpt", weights_only=True)["state_dict"]
        for n in ("one", "two")
    ]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-3)
    assert (tmp_path / "one" / "predictions.jsonl").read_text() == (tmp_path / "two" / "predictions.jsonl").read_text()
    tables = [text[text.index("val: 6 images") :].split("\n\n")[0] for text in (one.stdout, two.stdout)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("command", "advice"),
    [("fit", "go on with --ckpt_path last"), ("test", "the same command goes on from the answers")],
)
def test_whoever_stops_a_command_is_told_how_to_go_on(command, advice, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_build", stop)
    assert cli.run([command]) == 130
    assert advice in capsys.readouterr().err


def test_memory_that_is_not_enough_is_one_line(monkeypatch, capsys):
    with pytest.raises(RuntimeError) as of_cpu:
        torch.empty(1 << 50)
    assert out_of_memory(of_cpu.value).startswith(
        "out of memory: asked for 4194304.0 GiB of this machine's memory; take"
    )
    of_cuda = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 3 has a total capacity of 79.11 GiB of which 12.31 GiB is free. "
        "Process 1 has 66.80 GiB memory in use. Of the allocated memory 60.00 GiB is allocated by PyTorch."
    )
    said = out_of_memory(of_cuda)
    assert said.startswith(
        "out of memory: asked for 20.00 GiB of the CUDA device 3, where 12.31 GiB are free; take less"
    )
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")).startswith(
        "out of memory: asked for 2.00 MiB of the CUDA device; take"
    )
    assert "of this machine's memory than" in out_of_memory(MemoryError())
    assert "asked for 3.00 GiB of this machine's memory;" in out_of_memory(
        MemoryError("Unable to allocate 3.00 GiB for an array with shape (9,) and data type float64")
    )
    of_worker = out_of_memory(MemoryError("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback"))
    assert "in a loader process (data.num_workers); take less" in of_worker
    assert "\n" not in of_worker
    for text, device in (
        ("CUDA error: out of memory\nCUDA kernel", "CUDA"),
        ("MPS backend out of memory (MPS ...", "MPS"),
    ):
        assert f"asked for more than the {device} device has;" in out_of_memory(RuntimeError(text))
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None

    def fit(*_):
        raise of_cuda

    monkeypatch.setattr(cli, "_build", fit)
    assert cli.run(["fit"]) == 1
    assert capsys.readouterr().err == f"error: {said}\n"
