"""Modules of the last layer that run at label positions only: which they are, and that nothing else changes."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from mmprefix.accounting import ModelFlops
from mmprefix.attention import prefix_plan
from mmprefix.decoder import install, uninstall
from mmprefix.last_layer import _WithRows, find_label_only, last_layer, release_last_layer
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.packing import collate
from mmprefix.probe import tiny_copy
from mmprefix.sequence import PromptLayout, TokenSequence
from mmprefix.training.layers import checkpoint_activations
from tests.architectures import attention_of, config_of
from tests.conftest import TINY_DECODER, make_model
from tests.test_mask_free import batch_of, gradients, model_of, ragged_batches

LLAMA = ["self_attn.q_proj", "self_attn.o_proj", "mlp"]


def rows_of_mlp(model, batch):
    """How many rows the feed-forward of each layer gets in a pass."""
    seen = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
        for layer in model.decoder.model.layers
    ]
    loss, _ = model.target_loss(batch)
    for hook in hooks:
        hook.remove()
    return seen, loss


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", LLAMA),
        ("gemma3_text", LLAMA),
        ("mixtral", LLAMA),  # experts, too
        ("phi3", ["self_attn.o_proj", "mlp"]),  # one projection makes queries, keys and values
        ("gpt2", ["attn.c_proj", "mlp"]),
        ("phi", ["self_attn.q_proj", "self_attn.dense", "mlp"]),  # attention and feed-forward side by side
        ("opt", ["self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]),  # rows without a batch dimension
        ("gemma2", []),  # attends with a mask
    ],
)
def test_what_labels_alone_need_is_found(name, expected):
    decoder = install(tiny_copy(config_of(name), attention_of(config_of(name)))).train()
    assert find_label_only(decoder) == expected
    assert decoder.training
    uninstall(decoder)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in decoder.modules())


class MixingMLP(nn.Module):
    """A feed-forward that adds some of the mean over all tokens to each."""

    def __init__(self, inner, strength):
        super().__init__()
        self.inner, self.strength = inner, strength

    def forward(self, x):
        y = self.inner(x)
        return y + self.strength * y.mean(1, keepdim=True)


@pytest.mark.parametrize(("strength", "expected"), [(0.1, []), (1e-12, ["mlp"]), (0.0, LLAMA)])
def test_what_reaches_a_label_is_never_left_out(strength, expected):
    """Behind them tokens are mixed: however faintly, what is missing there reaches a label."""
    decoder = install(tiny_copy(config_of("llama")))
    layer = last_layer(decoder)
    if strength:
        layer.mlp = MixingMLP(layer.mlp, strength)
    assert find_label_only(decoder) == expected
    uninstall(decoder)


@pytest.mark.parametrize("bucket", [1, 16])
@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
def test_the_last_layer_runs_on_label_rows_and_loss_and_gradients_match(visibility, bucket, photos):
    model, processor = make_model(visibility=visibility)
    assert model.config.label_only == LLAMA
    batch = batch_of(processor, photos, bucket=bucket)
    length, rows = batch.input_ids.shape[1], batch.plan.label_rows
    labelled = set(batch.plan.label_positions[: int((batch.labels != -100).sum())].tolist())
    assert labelled <= set(rows.tolist())
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) % bucket == 0
    assert len(rows) < 0.7 * length, "or little is shown"
    seen, loss = rows_of_mlp(model, batch)
    assert seen == [length, len(rows)]
    fast = gradients(model, loss)
    unrestricted = copy.deepcopy(model)
    release_last_layer(unrestricted.decoder)
    seen, expected = rows_of_mlp(unrestricted, batch)
    assert seen == [length, length]
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(unrestricted, expected).items():
        torch.testing.assert_close(fast[name], gradient, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_copies_and_saved_models_are_restricted_and_a_released_decoder_is_not(photos, tmp_path):
    model, processor = make_model()
    batch = batch_of(processor, photos)
    expected, _ = rows_of_mlp(model, batch)
    assert expected[0] > expected[1]
    model.save_pretrained(tmp_path)
    loaded = MMPrefixForConditionalGeneration.from_pretrained(tmp_path)
    assert rows_of_mlp(copy.deepcopy(model), batch)[0] == rows_of_mlp(loaded, batch)[0] == expected
    released = uninstall(loaded.decoder)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in released.modules())


def test_adapters_are_restricted_with_what_they_wrap():
    from peft import LoraConfig, get_peft_model

    model, _ = make_model()
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model.replace_decoder(get_peft_model(model.decoder, config))
    assert model.config.label_only == LLAMA


def test_rows_that_are_not_packed_and_passes_without_labels_are_not_restricted(photos):
    model, processor = make_model()
    apart = batch_of(processor, photos, packed=False)
    assert apart.plan.label_rows is None
    seen, _ = rows_of_mlp(model, apart)
    assert seen == [apart.input_ids.shape[1]] * 2
    packed = batch_of(processor, photos)
    rows_of_mlp(model, packed)  # what it has set must be gone
    embeds = torch.randn(1, packed.input_ids.shape[1], 64)
    with torch.no_grad(), prefix_plan(None):
        outputs = model.decoder(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
        uninstall(model.decoder)
        expected = model.decoder(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(outputs.hidden_states[-1], expected.hidden_states[-1])


def test_logits_of_all_positions_come_from_an_unrestricted_layer(photos):
    model, processor = make_model()
    batch = batch_of(processor, photos)
    plan = replace(batch.plan, label_positions=None)
    inputs = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values, "position_ids": batch.position_ids}
    with torch.no_grad():
        found = model(**inputs, plan=plan, use_cache=False).logits
        expected = model(**inputs, plan=replace(plan, calls=()), use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_label_rows_are_filled_up_with_columns_of_the_row():
    layout = PromptLayout(image=0, bos=1, separator=(), eos=2)
    sequence = TokenSequence.build(layout, 0, [5], [[5, 5], [5]])
    for bucket in (1, 2, 4, 8, 64):
        plan = collate([sequence], [0], None, pad_id=0, packed=True, bucket=bucket).plan
        length = plan.segment.shape[1]
        assert plan.label_rows.numel() == min(length, -(-4 // bucket) * bucket)
        assert plan.label_rows.unique().numel() == plan.label_rows.numel()
        assert 0 <= int(plan.label_rows.min()) <= int(plan.label_rows.max()) < length


def test_what_is_spared_is_not_counted(photos):
    model, processor = make_model()
    flops = ModelFlops.of(model.config)
    layer = last_layer(model.decoder)
    matrices = [layer.self_attn.q_proj, layer.self_attn.o_proj, *layer.mlp.children()]
    assert flops.label_only == 2 * sum(m.weight.numel() for m in matrices if isinstance(m, nn.Linear))
    packed, apart = batch_of(processor, photos), batch_of(processor, photos, packed=False)
    spared = (packed.num_tokens - packed.plan.label_rows.numel()) * flops.label_only
    everything = {"vision", "connector", "decoder"}
    assert flops.step(apart, everything) - flops.step(packed, everything) == 3 * spared > 0
    assert ModelFlops.of(make_model({**TINY_DECODER, "model_type": "gemma2"})[0].config).label_only == 0


@pytest.mark.parametrize("which", [True, "elementwise"])
def test_recomputation_runs_with_the_rows_of_its_own_pass(which, photos):
    """In backward, after another batch's forward pass, and in another thread, as autograd has one for CUDA."""
    model, processor = model_of("llama", "full")
    model.train()
    assert model.config.label_only
    first, second = ragged_batches(processor, photos, 2, bucket=32)
    assert first.plan.label_rows.numel() != second.plan.label_rows.numel()

    def both():
        losses = [model.target_loss(batch)[0] for batch in (first, second)]
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(losses[0].backward).result()
        losses[1].backward()

    both()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint_activations(model, which)
    both()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    release_last_layer(model.decoder)
    assert not isinstance(getattr(last_layer(model.decoder), "_gradient_checkpointing_func", None), _WithRows)


@pytest.mark.parametrize("which", [True, "selective", "elementwise"])
def test_a_compiled_model_recomputes_in_one_graph(which, photos):
    if which != "elementwise" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("recomputes outside of the graph, with hooks inside")
    model, processor = model_of("llama", "full")
    model.train()
    batches = list(ragged_batches(processor, photos, 2, bucket=32))
    expected = [gradients(model, model.target_loss(batch)[0]) for batch in batches]
    checkpoint_activations(model, which)
    torch._dynamo.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    for batch, uncompiled in zip(batches, expected, strict=True):
        found = gradients(model, model.target_loss(batch)[0])
        for parameter, gradient in uncompiled.items():
            torch.testing.assert_close(found[parameter], gradient, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
