"""Full sharding, with real processes and gloo: what one process learns, several do."""

from datetime import timedelta

import pytest
import safetensors.torch
import torch

from mmprefix.errors import InputError
from mmprefix.interop.consolidate import consolidate
from mmprefix.training.checkpoints import read_checkpoint
from mmprefix.training.fsdp import FullyShardedStrategy
from mmprefix.training.layers import layers_of
from mmprefix.vision import VisionArgs
from tests.conftest import make_model
from tests.test_resume import ROOT, fit

TWO = ["--data.batch_size", "1", "--trainer.devices", "2"]
SHARDED = [*TWO, "--trainer.strategy", "fsdp2"]


def state(folder, step):
    (path,) = folder.glob(f"*step={step:08d}.ckpt")
    return read_checkpoint(path)


def losses(lines):
    """Of each step, one rank's."""
    return {line["step"]: line["loss"] for line in lines if line["rank"] == 0 and line["loss"] == line["loss"]}


def assert_losses(found, expected, after=0):
    assert list(found) == [step for step in expected if step > after]
    for step, loss in found.items():
        assert abs(loss - expected[step]) <= 2e-6, f"step {step}"


def test_two_processes_learn_what_one_does_and_go_on_for_each_other(records):
    """Most steps have a rank with text only, some have only such, and the last has one without a record: losses, weights,
    optimizer state and answers; and a checkpoint of either is gone on with by the other."""
    once = ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1.0", "--trainer.gradient_clip_val", "1.0"]
    one = fit(records, "one", 1, "--data.batch_size", "2", *once)
    two = fit(records, "two", 1, *SHARDED, *once)
    assert sorted(i for line in one for i in line["ids"]) == sorted(i for line in two for i in line["ids"])
    assert min(len(line["ids"]) for line in two) == 0, "an empty batch"
    assert_losses(losses(two), losses(one))
    expected, found = state(records / "one", 5), state(records / "two", 5)
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():  # Adam divides by what is near zero
        torch.testing.assert_close(found["state_dict"][name], value, atol=2e-5, rtol=1e-4)
    (expected_state,), (found_state,) = expected["optimizer_states"], found["optimizer_states"]
    assert found_state["state"].keys() == expected_state["state"].keys()
    for number, values in expected_state["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(found_state["state"][number][name], value, atol=2e-6, rtol=1e-3)
    predictions = [sorted((records / f"{name}-run" / "predictions.jsonl").open()) for name in ("one", "two")]
    assert predictions[0] == predictions[1]
    models = [
        safetensors.torch.load_file(records / f"{name}-run" / "model" / "model.safetensors") for name in ("one", "two")
    ]
    assert models[0].keys() == models[1].keys()
    consolidate(next((records / "two").glob("*step=00000005.ckpt")), records / "whole")
    whole = safetensors.torch.load_file(records / "whole" / "model.safetensors")
    assert whole.keys() == models[1].keys()
    assert all(torch.equal(whole[name], models[1][name]) for name in whole)
    for name, arguments, source in (("back", ["--data.batch_size", "2"], "two"), ("on", SHARDED, "one")):
        (checkpoint,) = (records / source).glob("*step=00000002.ckpt")
        lines = fit(records, name, 0, *arguments, *once, "--ckpt_path", str(checkpoint))
        assert_losses(losses(lines), losses(one), after=2)


@pytest.mark.parametrize("frozen", [False, True])
def test_accumulated_and_recomputed_steps_are_those_of_one_process(records, frozen):
    """By the config that lays itself over another; two copies of the shards, each of one process, or one of both."""
    settings = [
        "--trainer.accumulate_grad_batches", "2", "--model.gradient_checkpointing", "true", "--trainer.max_epochs", "1",
        "--model.train_vision.freeze", str(frozen).lower(),
    ]  # fmt: skip
    one = fit(records, "one", 0, "--data.batch_size", "2", *settings)
    overlay = ["--config", ROOT / "configs" / "fsdp.yaml", "--trainer.strategy.replicas", 2 if frozen else 1]
    two = fit(records, "two", 0, *map(str, [*TWO, *overlay, *settings]))
    assert_losses(losses(two), losses(one))


LORA = [
    "--model.train_decoder.lora", "{rank: 3, use_dora: true}", "--model.train_vision.lora", "{rank: 2, dropout: 0.0}",
    "--model.train_vision.lr", "1.0e-4",
]  # fmt: skip


def test_adapters_learn_what_they_do_on_one_process_and_go_on_on_another_number(records):
    """In both parts; ranks of three and two don't divide evenly. Losses, weights, PEFT's files and the merged model."""
    once = ["--trainer.max_epochs", "1", "--trainer.gradient_clip_val", "1.0", "--model.optimizer.lr", "1.0e-3", *LORA]
    one = fit(records, "one", 1, "--data.batch_size", "2", *once)
    two = fit(records, "two", 1, *SHARDED, *once)
    ddp = fit(records, "ddp", 0, *TWO, "--trainer.strategy", "ddp", *once)
    assert_losses(losses(two), losses(one))
    assert_losses(losses(ddp), losses(one))
    first, expected, found = (
        state(records / name, step)["state_dict"] for name, step in (("one", 1), ("one", 5), ("two", 5))
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        learns = ".lora_" in name or ".connector." in name
        assert learns != torch.equal(value, first[name]), name
        torch.testing.assert_close(found[name], value, atol=2e-5 if learns else 0, rtol=1e-4 if learns else 0)
    for file in ("adapter-decoder/adapter_model", "adapter-vision/adapter_model", "model/model"):
        one_file, two_file = (
            safetensors.torch.load_file(records / f"{run}-run" / f"{file}.safetensors") for run in ("one", "two")
        )
        assert one_file.keys() == two_file.keys()
        for name, value in one_file.items():
            torch.testing.assert_close(two_file[name], value, atol=2e-5, rtol=1e-4)
    configs = [
        (records / f"{run}-run" / "adapter-decoder" / "adapter_config.json").read_text() for run in ("one", "two")
    ]
    assert configs[0] == configs[1]
    for name, arguments, source in (("back", ["--data.batch_size", "2"], "two"), ("on", SHARDED, "one")):
        (checkpoint,) = (records / source).glob("*step=00000002.ckpt")
        lines = fit(records, name, 0, *arguments, *once, "--ckpt_path", str(checkpoint))
        assert_losses(losses(lines), losses(one), after=2)


def test_replicas_that_do_not_divide_the_processes_are_refused():
    strategy = FullyShardedStrategy(replicas=2)
    strategy.parallel_devices = [torch.device("cpu")] * 3
    with pytest.raises(InputError, match="replicas: expected a divisor of the 3 processes, got 2"):
        strategy.setup_environment()
    strategy.parallel_devices = [torch.device("cpu")]
    with pytest.raises(
        InputError, match="trainer.strategy: expected several processes to shard the model over, got one"
    ):
        strategy.setup_environment()


def test_an_exchange_leaves_time_to_find_out_who_is_missing():
    """So that the run has ended within the time-out."""
    assert FullyShardedStrategy(timeout_minutes=30)._timeout == timedelta(minutes=29, seconds=40)
    assert FullyShardedStrategy(timeout_minutes=0.5)._timeout == timedelta(seconds=15)


@pytest.mark.parametrize(
    ("name", "kwargs", "vision"),
    [
        ("test_vit", {"image_size": 32}, 6), ("resnet10t", {"image_size": 64}, 4), ("convnext_atto", {"image_size": 64}, 4),
        ("swin_tiny_patch4_window7_224", {"kwargs": {"depths": [1, 1, 1, 1]}}, 4),
    ],
)  # fmt: skip
def test_layers_are_found_in_any_encoder(name, kwargs, vision):
    model, _ = make_model(vision=VisionArgs(name, **kwargs))
    decoder = list(model.decoder.model.layers)
    found = layers_of(model)
    assert found[-len(decoder) :] == decoder
    assert len(found) - len(decoder) == vision
    assert len({id(p) for layer in found for p in layer.parameters()}) == sum(
        1 for la in found for _ in la.parameters()
    )
