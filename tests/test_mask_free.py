"""Packed rows without a mask, on whole models: loss and every gradient are those of separate sequences."""

import pytest
import torch

from mmprefix.attention import MaskFree, MaskFreeError, only_mask_free
from mmprefix.data.loading import Collator, EncodedImage, EncodedRecord
from mmprefix.loss import target_cross_entropy
from tests.conftest import TINY_DECODER, make_model
from tests.reference import separate_losses
from tests.test_modeling import GEMMA3, GPT2

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

COHERE = {
    "model_type": "cohere", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "logit_scale": 0.25,
}  # fmt: skip
GEMMA2 = {
    "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4,
}  # fmt: skip
DECODERS = {"llama": None, "gemma3": GEMMA3, "gpt2": GPT2, "cohere": COHERE, "gemma2": GEMMA2}
NO_DROPOUT = {"gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}

SAMPLES = [
    (0, "what is this?", ["a temple", "a temple by a lake"]),
    (0, "is it old?", ["yes"]),
    (1, "what colour?", ["red", "dark red, almost brown"]),
    (0, "what is this?", ["water"]),
]
"""Number of the photograph, instruction, targets: three questions on one image, two of them equally long."""


@pytest.fixture(scope="module", params=DECODERS)
def name(request):
    return request.param


def model_of(name, visibility):
    settings = DECODERS[name]
    return make_model(settings and {**settings, **NO_DROPOUT.get(name, {})}, visibility=visibility)


def batch_of(processor, photos, packed=True, bucket=1, samples=SAMPLES):
    records = [
        EncodedRecord(
            (EncodedImage(str(photo), processor.transform.views(photos[photo])),),
            (processor.encode(instruction, targets),),
            (),
        )
        for photo, instruction, targets in samples
    ]
    return Collator(
        processor.pad_id, processor.prefix_visibility, processor.shared_prefix, packed=packed, bucket=bucket
    ).train(records)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bucket", [1, 16])
@pytest.mark.parametrize("normalization", ["tokens", "per_sample"])
@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
def test_packed_loss_and_every_gradient_match_separate_sequences(name, visibility, normalization, bucket, photos):
    model, processor = model_of(name, visibility)
    # Else the probe has found the fast path wrong, and it isn't what is tested here.
    assert model.config.mask_free == (name != "gemma2")
    batch = batch_of(processor, photos, bucket=bucket)
    assert batch.plan.calls
    assert batch.input_ids.shape[0] == 1
    assert batch.num_samples == 4
    images = []
    handle = model.vision.register_forward_pre_hook(lambda _, args: images.append(args[0].shape[0]))
    total, count = model.target_loss(batch, normalization)
    handle.remove()
    assert images == [2], "the encoder runs once for each image"
    if visibility == "nested":
        assert int((batch.plan.region == 0).sum()) == 2 * processor.num_image_tokens, "and its tokens stand there once"
    fast = gradients(model, total / count)
    losses = []
    for photo, instruction, targets in SAMPLES:
        losses += separate_losses(
            model, processor.layout, processor.transform(photos[photo]), processor.num_image_tokens,
            processor.format.text_ids(instruction), [processor.format.text_ids(target) for target in targets],
        )  # fmt: skip
    mean = torch.cat(losses).mean() if normalization == "tokens" else torch.stack([x.mean() for x in losses]).mean()
    slow = gradients(model, mean)
    torch.testing.assert_close(total / count, mean, atol=1e-5, rtol=1e-5)
    assert fast.keys() == slow.keys()
    for parameter, gradient in slow.items():
        torch.testing.assert_close(
            fast[parameter], gradient, atol=3e-5, rtol=2e-3, msg=lambda m, p=parameter: f"{p}: {m}"
        )


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "cohere"])
def test_attention_runs_without_a_mask_and_logits_are_never_made(name, photos, monkeypatch):
    model, processor = model_of(name, "full")
    batch = batch_of(processor, photos)
    calls = []
    monkeypatch.setattr(
        MaskFree, "attend", lambda self, *a, attend=MaskFree.attend: calls.append(1) or attend(self, *a)
    )
    sizes = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    with only_mask_free():
        model.target_loss(batch)
    handle.remove()
    assert len(calls) == model.decoder.config.num_hidden_layers
    assert sizes == [0]


def test_where_attention_needs_a_mask_it_gets_one(photos):
    """Soft-capped scores: eager attention, on the very same packed row."""
    model, processor = model_of("gemma2", "full")
    assert not model.config.mask_free
    batch = batch_of(processor, photos)
    with torch.no_grad():
        packed, _ = model.target_loss(batch)
        apart, _ = model.target_loss(batch_of(processor, photos, packed=False))
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-5)
    model.config.mask_free = True  # as a wrong config would say
    with only_mask_free(), pytest.raises(MaskFreeError, match="eager attention"):
        model.target_loss(batch)
    dropping, processor = make_model({**GPT2, "attn_pdrop": 0.5})
    with only_mask_free(), pytest.raises(MaskFreeError, match="attention dropout"):
        dropping.train().target_loss(batch_of(processor, photos))


@pytest.mark.parametrize("visibility", ["full", "nested"])
def test_gradient_checkpointing_recomputes_with_the_same_calls(visibility, photos):
    """The recomputation runs in the backward pass, where no plan is set."""
    model, processor = model_of("llama", visibility)
    model.train()
    batch = batch_of(processor, photos)
    plain = gradients(model, model.target_loss(batch)[0])
    model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients(model, model.target_loss(batch)[0])
    for parameter, gradient in plain.items():
        torch.testing.assert_close(recomputed[parameter], gradient)


def test_target_loss_matches_logits_where_the_output_layer_is_wrapped(photos):
    """LoRA on the output layer: it is no plain linear layer any more, and logits are made."""
    from peft import LoraConfig, get_peft_model

    model, processor = model_of("llama", "full")
    batch = batch_of(processor, photos)
    model.replace_decoder(
        get_peft_model(model.decoder, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    )
    logits = model.target_logits(batch)
    expected = target_cross_entropy(logits, batch.labels, batch.target_lengths)
    torch.testing.assert_close(model.target_loss(batch), expected)


def ragged_batches(processor, photos, number, bucket):
    """Batches of many shapes: other lengths, other numbers of targets and images."""
    words = ["red", "a house", "an old house by the lake", "no", "a very long answer to a very short question indeed"]
    for n in range(number):
        samples = [
            ((n + k) % 2 if k else 0, words[(n + k) % 5], [words[(n + k + j) % 5] for j in range(1 + (n + k) % 3)])
            for k in range(2 + n % 3)
        ]
        yield batch_of(processor, photos, bucket=bucket, samples=samples)


@pytest.mark.parametrize("visibility", ["full", "nested"])
def test_compiled_step_has_no_graph_break_and_is_not_compiled_again(visibility, photos):
    model, processor = model_of("llama", visibility)
    batches = list(ragged_batches(processor, photos, 12, bucket=32))
    shapes = {(tuple(b.input_ids.shape), b.labels.numel(), len(b.plan.calls[-1].cu_q)) for b in batches}
    assert len(shapes) > 3, "shapes must differ"
    expected = [gradients(model, model.target_loss(batch)[0]) for batch in batches]
    torch._dynamo.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    compiled = [gradients(model, model.target_loss(batch)[0]) for batch in batches]
    for found, reference in zip(compiled, expected, strict=True):
        for parameter, gradient in reference.items():
            torch.testing.assert_close(found[parameter], gradient, atol=1e-4, rtol=1e-3)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in [*batches, *ragged_batches(processor, photos, 20, bucket=32)]:
            model.target_loss(batch)[0].backward()
    torch._dynamo.reset()


def test_gradient_of_a_tied_embedding_stays_dense_and_matches(photos):
    """Autograd adds the embedding's sparse gradient to the output layer's dense one."""
    model, processor = make_model({**GEMMA3, "tie_word_embeddings": True})
    embedding = model.get_input_embeddings()
    embedding.padding_idx = ord("a") + 3  # a token of the texts: it gets no gradient by being looked up
    assert embedding.weight is model.get_output_embeddings().weight
    batch = batch_of(processor, photos)
    layouts = []
    original = torch.nn.functional.embedding

    def seen(*args, **kwargs):
        layouts.append(args[-1] if len(args) > 6 else kwargs.get("sparse"))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", seen)
        fast = gradients(model, model.target_loss(batch)[0])
    assert layouts == [True], "the sparse gradient must have been asked for"
    assert not embedding.sparse
    logits = model.target_logits(batch)
    slow = gradients(model, target_cross_entropy(logits, batch.labels, batch.target_lengths)[0])
    for parameter, gradient in slow.items():
        assert fast[parameter].layout == torch.strided
        torch.testing.assert_close(fast[parameter], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "cohere"])
def test_generation_without_masks_matches_generation_with_them(name, visibility, cache, photos):
    """Prompts of one length; gemma3's window of 4 is shorter than prompt and target."""
    model, processor = model_of(name, visibility)
    images, texts = photos[:2], ["what colour?", "which animal"]
    inputs = processor(images=images, text=texts)
    assert bool(inputs["attention_mask"].all())
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    seen = []
    handle = model.decoder.get_output_embeddings().register_forward_hook(lambda *a: seen.append(a[2].shape[1]))
    fast = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
    handle.remove()
    assert seen[0] == 1, "logits of the last prompt position only"
    model.config.mask_free = False
    slow = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(fast.sequences, slow.sequences)
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(slow.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation_makes_no_mask_for_prompts_of_one_length_only(name, photos, monkeypatch):
    settings = {**(DECODERS[name] or TINY_DECODER), **({"sliding_window": 8} if name == "gemma3" else {})}
    model, processor = make_model(settings)
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def seen(*args, **kwargs):
        masks.append(kwargs.get("attn_mask"))
        return attend(*args, **kwargs)

    for texts, expected in ((["what colour?", "which animal"], False), (["what colour?", "why"], True)):
        inputs = processor(images=photos[:2], text=texts)
        image_tokens = model.get_image_tokens(inputs.pop("pixel_values"))
        masks.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
            model.generate(**inputs, image_tokens=image_tokens, max_new_tokens=4, min_new_tokens=4)
        assert len(masks) == 4 * model.decoder.config.num_hidden_layers
        assert {mask is not None for mask in masks} == {expected}
