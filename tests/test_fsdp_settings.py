"""Settings of full sharding and of its layers, each on two real processes beside what one process learns."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from mmprefix.training.layers import layers_by_part
from tests.several import errors, fit_each, run_each, statuses
from tests.test_fsdp import assert_losses, losses, state
from tests.test_resume import CONFIG

DECODER = {**CONFIG["model"]["decoder"]["config"], "num_hidden_layers": 3}
TIED = {**DECODER, "tie_word_embeddings": True}


class Look(pl.Callback):
    """Writes what the first process's model is like after the first step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank or trainer.global_step != 1:
            return
        model = module.model
        decoder = layers_by_part(model)["decoder"]
        seen = {
            "inv_freq": str(model.decoder.get_submodule("model.rotary_emb").inv_freq.dtype),
            "weights": str(decoder[0].mlp.up_proj.weight.dtype),
            "moments": str(trainer.optimizers[0].state[decoder[0].mlp.up_proj.weight]["exp_avg"].dtype),
            "mesh": list(getattr(decoder[0].mlp.up_proj.weight, "device_mesh", torch.empty(0)).shape),
            "compiled": [layer._compiled_call_impl is not None for layer in decoder],
            "gathered": [group.is_unsharded for layer in decoder for group in groups_of(layer)],
        }
        if isinstance(model, FSDPModule):
            states = [layer._get_fsdp_state() for layer in decoder]
            for way in ("forward", "backward"):
                seen[way] = [
                    [states.index(other) for other in getattr(one, f"_states_to_{way}_prefetch")] for one in states
                ]
        name = trainer.default_root_dir.rsplit("/", 1)[1]
        with open(f"{self.folder}/{name}.json", "w") as file:
            json.dump(seen, file)


def groups_of(layer):
    return layer._get_fsdp_state()._fsdp_param_groups if isinstance(layer, FSDPModule) else ()


def test_every_setting_learns_what_one_process_does(records):
    """Losses of all steps; in bfloat16 within its rounding, with weights and optimizer in float32."""
    look = [("tests.test_fsdp_settings.Look", {"folder": str(records)})]
    once = ["--trainer.max_epochs", "1", "--model.decoder.config", json.dumps(DECODER)]
    tied = [*once[:-1], json.dumps(TIED)]
    alone = ["--data.batch_size", "2"]
    one = fit_each(records, 1, {
        "plain": (0, [*alone, *once]),
        "tied": (0, [*alone, *tied]),
        "selective": (0, [*alone, *once, "--model.gradient_checkpointing", "selective"]),
        "half": (0, [*alone, *once, "--trainer.precision", "bf16-true"]),
    }, look)  # fmt: skip
    assert_losses(losses(one["selective"]), losses(one["plain"]))
    sharded = ["--data.batch_size", "1", "--trainer.strategy", "fsdp2"]
    cases = {
        "offloaded": [*once, "--trainer.strategy.cpu_offload", "true", "--trainer.gradient_clip_val", "1.0e9"],
        "kept": [*once, "--trainer.strategy.reshard_after_forward", "false", "--trainer.strategy.prefetch", "2"],
        "recomputed": [*once, "--model.gradient_checkpointing", "3"],
        "in_bfloat16": [*once, "--trainer.strategy.param_dtype", "bfloat16"],
        "compiled": [*once, "--model.compile", "true", "--model.gradient_checkpointing", "elementwise"],
        "sharded_tied": tied,
        "sharded_half": [*once, "--trainer.precision", "bf16-true"],
    }
    two = fit_each(records, 2, {name: (5, [*sharded, *words]) for name, words in cases.items()}, look)
    for name in ("offloaded", "kept", "recomputed", "compiled"):
        assert_losses(losses(two[name]), losses(one["plain"]))
    assert_losses(losses(two["sharded_tied"]), losses(one["tied"]))
    for name, reference in (("in_bfloat16", "plain"), ("sharded_half", "half")):
        found, expected = losses(two[name]), losses(one[reference])
        assert list(found) == list(expected)
        assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-2
    assert losses(two["in_bfloat16"]) != losses(one["plain"]), "it computes in something else"
    seen = {name: json.loads((records / f"{name}-run.json").read_text()) for name in (*cases, "half")}
    for name in cases:
        stored = "torch.bfloat16" if name == "sharded_half" else "torch.float32"
        assert (seen[name]["weights"], seen[name]["moments"]) == (stored, stored), name
        assert seen[name]["inv_freq"] == "torch.float32", name
        weights = state(records / name, 5)["state_dict"]
        assert {str(value.dtype) for key, value in weights.items() if key.endswith("proj.weight")} == {stored}, name
    assert {name for name in seen if any(seen[name]["compiled"])} == {"compiled"}
    assert seen["compiled"]["compiled"][:-1] == [True] * (len(seen["compiled"]["compiled"]) - 1)
    assert (seen["offloaded"]["forward"], seen["offloaded"]["backward"]) == ([[1], [2], []], [[], [0], [1]])
    assert (seen["kept"]["forward"], seen["kept"]["backward"]) == ([[1, 2], [2], []], [[], [0], [1, 0]])
    tied_state = state(records / "sharded_tied", 5)["state_dict"]
    names = [name for name in tied_state if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(names) == 2
    assert torch.equal(*(tied_state[name] for name in names))


@pytest.mark.parametrize("name", ["prefetch", "replicas"])
def test_settings_are_checked(records, name):
    """By a command: its parser must not wrap what is wrong into an error of its own."""
    words = ["--trainer.strategy", "fsdp2", f"--trainer.strategy.{name}", "0"]
    ((_, _, err),) = run_each(records, 1, {name: (0, words)})
    assert statuses(err) == [2]
    assert errors(err) == [f"error: trainer.strategy.{name}: expected at least 1, got 0"]


def test_copies_of_the_shards_learn_what_one_process_does(records):
    """Hybrid sharding: four processes, two copies; each shard is half of the model, on two of them."""
    once = ["--trainer.max_epochs", "1", "--model.decoder.config", json.dumps(DECODER)]
    one = fit_each(records, 1, {"alone": (3, ["--data.batch_size", "4", *once])})
    words = ["--data.batch_size", "1", "--trainer.strategy", "fsdp2", "--trainer.strategy.replicas", "2", *once]
    four = fit_each(records, 4, {"copies": (3, words)}, [("tests.test_fsdp_settings.Look", {"folder": str(records)})])
    assert json.loads((records / "copies-run.json").read_text())["mesh"] == [2, 2], "copies, shards"
    assert_losses(losses(four["copies"]), losses(one["alone"]))
    whole, ours = (state(records / name, 3)["state_dict"] for name in ("alone", "copies"))
    assert len(ours) > 20
    for name, value in ours.items():
        torch.testing.assert_close(value, whole[name], atol=1e-6, rtol=0)
