"""What is done to each layer: recomputing some of them, compiling them one by one."""

import copy
import os
import pickle
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
from torch import multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers.modeling_layers import GradientCheckpointingLayer

from mmprefix.accounting import Layout, MemoryEstimate, Precision, Record, meta_model
from mmprefix.errors import InputError
from mmprefix.probe import tiny_copy
from mmprefix.training.layers import (
    ELEMENTWISE,
    _policy,
    _recomputed,
    checkpoint_activations,
    compile_layers,
    layers_by_part,
    recomputed_shares,
)
from mmprefix.vision import VisionArgs
from tests.architectures import config_of
from tests.conftest import TINY_DECODER, make_batch, make_model
from tests.test_mask_free import batch_of, model_of, ragged_batches

FOUR = {**TINY_DECODER, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("which", "vision", "decoder"),
    [
        (False, [1] * 6, [1] * 4), (True, [2] * 6, [2] * 4), ("selective", [2, 1] * 3, [2, 1] * 2),
        (3, [2, 1, 1] * 2, [2, 1, 1, 2]), (1, [2] * 6, [2] * 4), ("elementwise", [2] * 6, [2] * 4),
    ],
)  # fmt: skip
def test_layers_that_are_recomputed_and_gradients_as_without(which, vision, decoder, photos):
    model, processor = make_model(FOUR)
    model.train()
    batch = make_batch(processor, photos)
    model.target_loss(batch)[0].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint_activations(model, which)
    layers = layers_by_part(model)
    calls = {name: [0] * len(part) for name, part in layers.items()}

    def count(name, i):
        def hook(*_):
            calls[name][i] += 1

        return hook

    for name, part in layers.items():
        for i, layer in enumerate(part):  # inside of the layer: its own hooks are outside of what is recomputed
            next(layer.children()).register_forward_hook(count(name, i))
    model.target_loss(batch)[0].backward()
    assert calls == {"vision": vision, "decoder": decoder}
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name
    shares = recomputed_shares(model, which)
    if which == "elementwise":  # no product
        vision = decoder = [1]
    assert shares == {
        name: sum(n == 2 for n in of) / len(of) for name, of in (("vision", vision), ("decoder", decoder))
    }


def test_memory_lies_between():
    """Of ten layers: the last keeps next to nothing (`last_layer`), and would weigh too much among four."""

    def peak(which):
        model = meta_model(make_model({**TINY_DECODER, "num_hidden_layers": 10})[0].config).train()
        checkpoint_activations(model, which)
        estimate = MemoryEstimate(model, Record(64, 16), Precision.from_name("32-true"), Layout())
        return estimate.step_peak(16)["activations"]

    all_kept, third, half, none_kept, products = map(peak, (False, 3, "selective", True, "elementwise"))
    assert none_kept < half < third < all_kept
    assert (half - none_kept) / (all_kept - none_kept) == pytest.approx(0.5, abs=0.15)
    assert none_kept < products < 0.75 * all_kept


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm", "grouped_mm_fallback")


class Executed(TorchDispatchMode):
    """Counts what costs much, as far as it reaches a kernel."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().split(".")[0]
        if "attention" in name or name.split("::")[1] in PRODUCTS:
            self.calls[name] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt2", "cohere"])
def test_products_and_attention_are_not_computed_again(name, photos):
    """A pass runs as many of them as without, and has the same gradients, bit by bit, in a copy, too."""
    model, processor = model_of(name, "full")
    model.train()
    batch = batch_of(processor, photos, packed=model.config.mask_free)

    def step(model):
        model.zero_grad()
        with Executed() as executed:
            model.target_loss(batch)[0].backward()
        return executed.calls, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = step(model)
    assert sum(n for name, n in expected.items() if "attention" in name) >= 2 or name == "gemma2", (
        "by products, with a mask"
    )
    whole, model = copy.deepcopy(model), copy.deepcopy(model)
    checkpoint_activations(model, "elementwise")
    for recomputing in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, again = step(recomputing)
        assert found == expected
        assert gradients.keys() == again.keys()
        assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())
    checkpoint_activations(whole, True)
    assert sum(step(whole)[0].values()) > sum(expected.values()), "checks nothing: recomputed layers run theirs again"


@pytest.mark.parametrize("name", ["jamba", "qwen3_next", "falcon_h1"])
def test_layers_of_several_classes_are_found(name):
    """They are sharded one by one: jamba's recurrent layers and those with attention are two classes."""
    model, _ = make_model()
    model.decoder = tiny_copy(config_of(name))
    assert layers_by_part(model)["decoder"] == list(model.decoder.model.layers)


def test_layers_of_several_classes_are_not_compiled():
    """The loop over tokens of jamba's recurrent ones, unrolled, is minutes of compilation."""
    model, _ = make_model()
    model.decoder = tiny_copy(config_of("jamba"))
    with pytest.warns(UserWarning, match="model.compile: layers of several classes, as a jamba has, stay uncompiled"):
        compile_layers(model, backend="eager")
    for part, is_compiled in (("vision", True), ("decoder", False)):
        assert all((layer._compiled_call_impl is not None) == is_compiled for layer in layers_by_part(model)[part])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "opt", "jamba", "qwen3_next", "falcon_h1"])
def test_every_kind_of_layer_can_recompute_what_is_elementwise(name):
    """Experts, latent attention, dropout (opt), recurrent layers, of several classes."""
    decoder = tiny_copy(config_of(name)).train()
    embeds = torch.randn(
        2, 6, decoder.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(0)
    )

    def step():
        decoder.zero_grad()
        torch.manual_seed(0)
        with Executed() as executed:
            decoder(inputs_embeds=embeds, use_cache=False).logits.square().sum().backward()
        return executed.calls, [p.grad for p in decoder.parameters() if p.grad is not None]

    expected, gradients = step()
    number = 0
    for layer in decoder.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_recomputed, layer.forward, ELEMENTWISE)
            number += 1
    assert number == decoder.config.num_hidden_layers
    found, again = step()
    assert found == expected
    assert all(map(torch.equal, again, gradients))


def test_a_decoder_that_changes_its_products_is_refused():
    model, _ = make_model({**tiny_copy(config_of("gpt_oss")).config.to_dict(), "vocab_size": 260})
    with pytest.raises(
        InputError, match="got elementwise: model.decoder.config: gpt_oss changes in place what would be"
    ):
        checkpoint_activations(model, "elementwise")


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_an_encoder_that_changes_its_products_is_refused(name, photos):
    """One without a norm between (squeeze-excite), and one of batches, which must not count its statistics twice."""
    model, processor = make_model(vision=VisionArgs(name, image_size=64, pretrained=False))
    with pytest.raises(
        InputError, match=f"got elementwise: model.vision.name: {name} changes in place what would be kept"
    ):
        checkpoint_activations(model.train(), "elementwise")
    model.target_loss(make_batch(processor, photos))[0].backward()


def test_an_encoder_without_repeated_layers_says_so():
    model, _ = make_model(vision=VisionArgs("regnety_002", image_size=64, pretrained=False))
    for which in ("selective", "elementwise"):
        with pytest.warns(match="gradient_checkpointing: regnety_002 has no repeated layers; it keeps all"):
            checkpoint_activations(copy.deepcopy(model), which)


def test_attention_that_draws_its_dropout_is_computed_again():
    """On CUDA, its kernels do: skipped, they would leave other numbers to what is drawn after them."""
    kept = {True: CheckpointPolicy.MUST_SAVE, False: CheckpointPolicy.PREFER_RECOMPUTE}
    for name, before in (("flash", 3), ("efficient", 5), ("cudnn", 5)):
        operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default
        for dropout in (0.0, 0.1):
            assert _policy(None, operator, *[None] * before, dropout) == kept[not dropout]
            assert _policy(None, operator, *[None] * 3, dropout_p=dropout) == kept[not dropout]
        assert _policy(None, operator, *[None] * before) == kept[True]
    import transformers.integrations.moe  # noqa: F401  (the operator that compiled experts use)

    assert _policy(None, torch.ops.transformers.grouped_mm_fallback.default) == kept[True]
    assert _policy(None, torch.ops.aten.gelu.default) == kept[False]


def test_a_cache_is_not_written_twice():
    decoder = tiny_copy(config_of("llama")).train()
    ids = torch.arange(12).reshape(2, 6)

    def gradients():
        decoder.zero_grad()
        decoder(ids).logits.square().sum().backward()
        return [p.grad for p in decoder.parameters()]

    expected = gradients()
    for layer in decoder.model.layers:
        layer.forward = partial(_recomputed, layer.forward, ELEMENTWISE)
    assert all(map(torch.equal, gradients(), expected))


@pytest.mark.parametrize("which", [True, "elementwise"])
def test_recomputed_layers_under_autocast(which, photos):
    model, processor = make_model()
    model.train()
    batch = make_batch(processor, photos)

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.target_loss(batch)[0]
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients()
    checkpoint_activations(model, which)
    assert all(map(torch.equal, gradients(), expected))


def test_nothing_is_recomputed_where_nothing_learns(photos):
    """What `checkpoint` reads first, the random state, can't be read while a CUDA graph is captured."""
    model, processor = make_model()
    checkpoint_activations(model, "elementwise")
    batch = make_batch(processor, photos)
    with torch.no_grad(), mock.patch("mmprefix.training.layers.checkpoint", side_effect=AssertionError):
        model.target_loss(batch)
    with pytest.raises(AssertionError), mock.patch("mmprefix.training.layers.checkpoint", side_effect=AssertionError):
        model.target_loss(batch)


def test_what_can_not_be_recomputed_in_part_is_refused():
    model, _ = make_model()
    with pytest.raises(InputError, match="expected false, true, selective, elementwise or a number, got -1"):
        checkpoint_activations(model, -1)
    with mock.patch("mmprefix.training.layers.GradientCheckpointingLayer", nn.Embedding):
        model.decoder.set_input_embeddings(nn.Identity())  # of the class that is looked for, none is left
        for which in ("selective", "elementwise", 3):
            with pytest.raises(
                InputError, match=f"expected true or false, got {which}: a llama can't recompute some of"
            ):
                checkpoint_activations(model, which)


def _compiled_and_sharded(rank, port, photos):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    from mmprefix.training.layers import layers_of

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    model, processor = model_of("llama", "full")
    model.train()
    batches = list(ragged_batches(processor, photos, 4, bucket=32))
    assert len({batch.input_ids.shape for batch in batches}) > 1, "lengths must differ"

    def losses():
        found = []
        for batch in batches:
            model.zero_grad()  # not between the two: what is gathered by then are others than those that get gradients
            loss = model.target_loss(batch)[0]
            loss.backward()
            gradients = (
                getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters() if p.grad is not None
            )
            found.append((loss.detach(), torch.stack([g.norm() for g in gradients])))
        return found

    expected = losses()
    checkpoint_activations(model, "selective")
    compile_layers(model, backend="aot_eager")
    mesh = init_device_mesh("cpu", (1,))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "target_loss")
    compiled = losses()
    torch.testing.assert_close(compiled, expected, atol=1e-6, rtol=1e-5)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "something was compiled"
    with torch.compiler.set_stance("fail_on_recompile"):
        losses()
    torch.distributed.destroy_process_group()


def test_layers_are_compiled_one_by_one_and_not_again(photos):
    """In a process of its own: a model is sharded where there is a group, here of one."""
    multiprocessing.spawn(_compiled_and_sharded, (29643, photos), nprocs=1)


@pytest.mark.parametrize("which", [False, "selective", "elementwise"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_compiled_layers_are_not_compiled_for_new_lengths(name, which, photos):
    model, processor = model_of(name, "full")
    model.train()
    checkpoint_activations(model, which)
    batches = list(ragged_batches(processor, photos, 6, bucket=32))

    def gradient(batch):
        model.zero_grad()
        model.target_loss(batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = [gradient(batch) for batch in batches]
    torch._dynamo.reset()
    compile_layers(model, backend="aot_eager")
    for batch, reference in zip(batches, expected, strict=True):
        torch.testing.assert_close(gradient(batch), reference, atol=1e-4, rtol=1e-3)
    with torch.compiler.set_stance("fail_on_recompile"):
        new = list(ragged_batches(processor, photos, 18, bucket=32))
        assert {batch.input_ids.shape for batch in new} - {batch.input_ids.shape for batch in batches}
        for batch in new:
            gradient(batch)
    torch._dynamo.reset()
