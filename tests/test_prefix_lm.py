"""Text-only prefix LMs: conversion and back, masks, labels, saving, and every way to generate."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

from mmprefix import PrefixLMForCausalLM, to_causal_lm, to_prefix_lm
from mmprefix import attention as attention_module
from mmprefix.errors import InputError
from mmprefix.probe import tiny_copy
from mmprefix.sequence import IGNORE_INDEX
from tests.architectures import ARCHITECTURES, NO_STATIC_CACHE, attention_of, config_of


def causal_lm(name="mistral"):
    config = config_of(name)
    model = tiny_copy(config, attention_of(config))
    if name == "bloom":  # normalises its tied embeddings, so every token would predict itself
        with torch.no_grad():
            for parameter in model.transformer.h.parameters():
                parameter.mul_(4 if parameter.ndim >= 2 else 1)
    return model


PROMPTS = [[11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33]]


def left_padded(prompts=PROMPTS):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def next_logits(model, prompt, generated):
    """Of one unpadded row, everything computed again."""
    ids = torch.tensor([prompt + generated])
    prefix = torch.arange(ids.shape[1]).unsqueeze(0) < len(prompt)
    return model(input_ids=ids, bidirectional_mask=prefix.long(), use_cache=False).logits[0, -1]


def greedy_by_recomputation(model, prompt, steps):
    generated = []
    for _ in range(steps):
        generated.append(int(next_logits(model, prompt, generated).argmax()))
    return generated


def beams_by_recomputation(model, prompt, steps, num_beams):
    """Beam search in words: keep the best sequences by sum of log-probabilities."""
    beams = [(0.0, [])]
    for _ in range(steps):
        grown = [
            (score + value, [*tokens, token])
            for score, tokens in beams
            for token, value in enumerate(next_logits(model, prompt, tokens).log_softmax(-1).tolist())
        ]
        beams = sorted(grown, key=lambda beam: -beam[0])[:num_beams]
    return [tokens for _, tokens in beams]


SETTINGS = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_match_recomputation(name):
    """Prompts of three lengths in one batch, windows shorter than all of it."""
    model = to_prefix_lm(causal_lm(name))
    model.generation_config.eos_token_id = None
    inputs = left_padded()
    width = inputs["input_ids"].shape[1]
    expected = [greedy_by_recomputation(model, prompt, 6) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 3, "the tokens must vary"
    caches = ["dynamic"] if name in NO_STATIC_CACHE else ["dynamic", "static"]
    for cache in caches:
        output = model.generate(**inputs, **SETTINGS, do_sample=False, cache_implementation=cache)
        assert output[:, width:].tolist() == expected, cache
    assert model.generate(**inputs, **SETTINGS, do_sample=False, use_cache=False)[:, width:].tolist() == expected


@pytest.mark.parametrize("name", ["mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_match_a_slow_beam_search(name, cache):
    model = to_prefix_lm(causal_lm(name))
    model.generation_config.eos_token_id = None
    inputs = left_padded()
    width = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs, **SETTINGS, do_sample=False, num_beams=3, num_return_sequences=2, cache_implementation=cache
    )[:, width:]
    for number, prompt in enumerate(PROMPTS):
        assert output[2 * number : 2 * number + 2].tolist() == beams_by_recomputation(model, prompt, 6, 3)[:2]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sampling_draws_from_the_same_distribution(cache):
    """Every sampled token lies in the top k and the nucleus of the recomputed distribution, and draws differ."""
    model = to_prefix_lm(causal_lm("gemma2"))
    model.generation_config.eos_token_id = None
    inputs = left_padded()
    width = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    output = model.generate(
        **inputs, **SETTINGS, do_sample=True, temperature=0.7, top_k=5, top_p=0.8, num_return_sequences=4,
        cache_implementation=cache,
    )[:, width:].tolist()  # fmt: skip
    assert len({tuple(row) for row in output}) > len(PROMPTS)
    for number, row in enumerate(output):
        prompt = PROMPTS[number // 4]
        for step, token in enumerate(row):
            logits = next_logits(model, prompt, row[:step]) / 0.7
            top = logits.topk(5)
            probabilities = top.values.softmax(-1)
            in_nucleus = (probabilities.cumsum(-1) - probabilities) < 0.8
            assert token in top.indices[in_nucleus].tolist()


def test_conversion_and_back_leaves_the_decoder_as_it_was():
    decoder = causal_lm("gpt_neo")
    ids = torch.arange(4, 16).unsqueeze(0)
    with torch.no_grad():
        native = decoder(input_ids=ids).logits
        model = to_prefix_lm(decoder)
        prefix = (torch.arange(12) < 6).long().unsqueeze(0)
        assert not torch.allclose(model(input_ids=ids, bidirectional_mask=prefix).logits, native, atol=1e-3)
        torch.testing.assert_close(
            model(input_ids=ids, bidirectional_mask=prefix * 0).logits, native, atol=1e-5, rtol=1e-4
        )
        again = to_causal_lm(model)
        assert again is decoder
        assert torch.equal(again(input_ids=ids).logits, native)
    assert not any(module._forward_pre_hooks for module in decoder.modules())


def test_a_saved_prefix_lm_never_reloads_as_causal(tmp_path):
    model = to_prefix_lm(causal_lm("qwen2 (sliding)"))
    ids = torch.arange(4, 16).unsqueeze(0)
    prefix = (torch.arange(12) < 6).long().unsqueeze(0)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is PrefixLMForCausalLM
    with torch.no_grad():
        assert torch.equal(
            again(input_ids=ids, bidirectional_mask=prefix).logits,
            model(input_ids=ids, bidirectional_mask=prefix).logits,
        )
        with pytest.raises(ValueError, match="expected bidirectional_mask"):
            again(input_ids=ids)
    # By the class of the decoder inside: nothing of the trained weights arrives.
    _, info = type(model.decoder).from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) >= len(model.decoder.state_dict()) - 1
    # Without mmprefix: not at all.
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "prefix_lm" in done.stderr


def test_tied_weights_and_dtype_survive(tmp_path):
    decoder = causal_lm("gemma").bfloat16()
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    model = to_prefix_lm(decoder)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert again.decoder.lm_head.weight is again.decoder.model.embed_tokens.weight
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_loss_is_that_of_targets_whatever_labels_say_of_the_prefix():
    model = to_prefix_lm(causal_lm("llama"))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    prefix = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    output = model(input_ids=ids, attention_mask=mask, bidirectional_mask=prefix, labels=ids)
    scored = [(0, 2, 8), (0, 3, 9), (0, 4, 10), (1, 1, 7), (1, 2, 8)]  # row, position, next token
    losses = [-output.logits[row, position].log_softmax(-1)[token] for row, position, token in scored]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    careful = ids.masked_fill((prefix == 1) | (mask == 0), IGNORE_INDEX)
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask, bidirectional_mask=prefix, labels=careful).loss, output.loss
    )
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["mistral", "gpt2"])  # gpt2's positions are learned, not relative
def test_padded_on_either_side_is_the_same(name):
    model = to_prefix_lm(causal_lm(name))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    prefix = torch.tensor([[1, 1, 1, 0, 0]])
    pad, one = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    with torch.no_grad():
        alone = model(input_ids=ids, bidirectional_mask=prefix).logits
        left = model(input_ids=torch.cat([pad, ids], 1), attention_mask=torch.cat([pad, one], 1),
                     bidirectional_mask=torch.cat([pad, prefix], 1)).logits[:, 3:]  # fmt: skip
        right = model(input_ids=torch.cat([ids, pad], 1), attention_mask=torch.cat([one, pad], 1),
                      bidirectional_mask=torch.cat([prefix, pad], 1)).logits[:, :5]  # fmt: skip
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "expected input_ids or inputs_embeds, got neither"),
        ({"input_ids": torch.ones(1, 4).long()}, "expected bidirectional_mask"),
        ({"input_ids": torch.ones(1, 4).long(), "bidirectional_mask": torch.ones(1, 3)}, r"expected shape \[1, 4\].* got \[1, 3\]"),
        ({"input_ids": torch.ones(2, 4).long(), "bidirectional_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]])}, "ones behind a zero in row 1"),
        ({"input_ids": torch.ones(1, 4).long(), "prefix_length": 2, "labels": torch.ones(1, 4).long()}, "labels need a bidirectional_mask"),
        ({"input_ids": torch.ones(1, 4).long(), "bidirectional_mask": torch.ones(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)}, "expected a 2-D attention_mask"),
    ],
)  # fmt: skip
def test_bad_inputs_say_what_was_expected(inputs, message):
    model = to_prefix_lm(causal_lm("llama"))
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_what_generation_cannot_do_is_refused():
    model = to_prefix_lm(causal_lm("mistral"))
    inputs = left_padded()
    with pytest.raises(ValueError, match="prefill_chunk_size: expected none"):
        model.generate(**inputs, **SETTINGS, prefill_chunk_size=2)
    with pytest.raises(ValueError, match="expected 1 on the whole prompt"):
        model.generate(**inputs, **SETTINGS, bidirectional_mask=torch.zeros_like(inputs["input_ids"]))
    forgetful = DynamicCache(config=model.decoder.config)
    with pytest.raises(ValueError, match="expected a cache that keeps the whole prefix"):
        model.generate(**inputs, **SETTINGS, past_key_values=forgetful)
    same = model.generate(**inputs, **SETTINGS, do_sample=False, bidirectional_mask=inputs["attention_mask"])
    assert torch.equal(same, model.generate(**inputs, **SETTINGS, do_sample=False))
    neo = to_prefix_lm_quietly(causal_lm("gpt_neo"))
    with pytest.raises(ValueError, match="static: transformers generates wrongly with it on gpt_neo"):
        neo.generate(**inputs, **SETTINGS, cache_implementation="static")


def test_without_a_cache_that_works_everything_is_computed_again():
    model = to_prefix_lm(causal_lm("llama"))
    model.generation_config.eos_token_id = None
    inputs = left_padded()
    expected = model.generate(**inputs, **SETTINGS, do_sample=False)
    model.config.refused_caches = ["dynamic", "static"]
    lengths = []
    handle = model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert torch.equal(model.generate(**inputs, **SETTINGS, do_sample=False), expected)
    handle.remove()
    assert lengths == [8, 9, 10, 11, 12, 13]
    with pytest.raises(ValueError, match="dynamic: transformers generates wrongly with it"):
        model.generate(**inputs, **SETTINGS, cache_implementation="dynamic")


def to_prefix_lm_quietly(model):
    with pytest.warns(UserWarning, match="generation with a static cache is wrong and refused"):
        return to_prefix_lm(model)


def test_transformers_itself_is_wrong_with_what_is_refused():
    """Without us, in plain causal mode: gpt_neo cuts its local windows from the end of the cache's length."""
    decoder = causal_lm("gpt_neo")
    decoder.generation_config.eos_token_id = None
    inputs = left_padded()
    dynamic, static = (
        decoder.generate(**inputs, **SETTINGS, do_sample=False, cache_implementation=cache)
        for cache in ("dynamic", "static")
    )
    assert not torch.equal(dynamic, static)


def test_own_static_cache_generates_the_same():
    model = to_prefix_lm(causal_lm("llama"))
    model.generation_config.eos_token_id = None
    inputs = left_padded()
    cache = StaticCache(config=model.decoder.config, max_cache_len=40)
    with_own = model.generate(**inputs, **SETTINGS, do_sample=False, past_key_values=cache)
    assert torch.equal(with_own, model.generate(**inputs, **SETTINGS, do_sample=False))


def test_labels_that_a_trainer_counted_wrongly_are_refused():
    """Trainer divides by the number of labels it sees; those of the prefix are not scored."""
    model = to_prefix_lm(causal_lm("llama"))
    ids = torch.arange(4, 10).unsqueeze(0)
    prefix = torch.tensor([[1, 1, 1, 0, 0, 0]])
    with pytest.raises(
        ValueError, match="labels: expected -100 on the prefix and on padding beside num_items_in_batch"
    ):
        model(input_ids=ids, bidirectional_mask=prefix, labels=ids, num_items_in_batch=6)
    masked = ids.masked_fill(prefix == 1, IGNORE_INDEX)
    loss = model(input_ids=ids, bidirectional_mask=prefix, labels=masked, num_items_in_batch=6).loss
    torch.testing.assert_close(loss * 2, model(input_ids=ids, bidirectional_mask=prefix, labels=ids).loss)


def test_caches_that_have_not_seen_the_prompt_are_refused():
    model = to_prefix_lm(causal_lm("llama"))
    inputs = left_padded()
    output = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
    longer = {k: torch.cat([v, v[:, -2:]], 1) for k, v in inputs.items()}
    with pytest.raises(ValueError, match="expected an empty cache"):
        model.generate(**longer, **SETTINGS, past_key_values=output.past_key_values)
    ids = torch.arange(4, 8).expand(3, -1)
    with pytest.raises(ValueError, match="bidirectional_mask: expected none with a cache"):
        model(input_ids=ids, bidirectional_mask=torch.ones_like(ids), past_key_values=output.past_key_values)
    neo = to_prefix_lm_quietly(causal_lm("gpt_neo"))
    static = StaticCache(config=neo.decoder.config, max_cache_len=40)
    with pytest.raises(ValueError, match="wrongly with a static cache on gpt_neo"):
        neo.generate(**inputs, **SETTINGS, past_key_values=static)


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": "self"}])
def test_assisted_generation_gives_the_same_tokens(settings):
    model = to_prefix_lm(causal_lm("gemma3_text"))
    model.generation_config.eos_token_id = None
    if "assistant_model" in settings:
        settings = {"assistant_model": to_prefix_lm(causal_lm("llama"))}
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 8, 5, 6]])
    expected = model.generate(ids, **SETTINGS, do_sample=False)
    assert torch.equal(model.generate(ids, **SETTINGS, do_sample=False, **settings), expected)


def test_the_model_itself_is_checked_not_only_its_architecture():
    class Stubborn(LlamaForCausalLM):
        def forward(self, attention_mask=None, **kwargs):
            with attention_module.prefix_plan(None):  # what code of its own might amount to
                return super().forward(attention_mask=attention_mask, **kwargs)

    decoder = Stubborn(causal_lm("llama").config)
    with pytest.raises(InputError, match="Stubborn can't be a prefix LM: its prefix stays causal"):
        to_prefix_lm(decoder)
    assert not any(module._forward_pre_hooks for module in decoder.modules())


def test_no_causal_lm_is_converted():
    with pytest.raises(InputError, match="property 1"):
        to_prefix_lm(AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", num_hidden_layers=1, vocab_size=64)))
    with pytest.raises(InputError, match="got PrefixLMForCausalLM, which is a prefix LM already"):
        to_prefix_lm(to_prefix_lm(causal_lm("llama")))
    with pytest.raises(InputError, match="expected a model of transformers, got Linear"):
        to_prefix_lm(torch.nn.Linear(2, 2))


def test_peft_wraps_a_prefix_lm(tmp_path):
    peft = pytest.importorskip("peft")
    model = to_prefix_lm(causal_lm("llama"))
    ids = torch.arange(4, 16).unsqueeze(0)
    prefix = (torch.arange(12) < 6).long().unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids, bidirectional_mask=prefix).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    output = wrapped(input_ids=ids, bidirectional_mask=prefix, labels=ids)
    torch.testing.assert_close(output.logits.detach(), expected)
    output.loss.backward()
    assert wrapped.generate(input_ids=ids, max_new_tokens=3).shape[1] > 12
    with pytest.raises(InputError, match="wrap with PEFT afterwards"):
        to_prefix_lm(wrapped)


def test_inputs_embeds_generate_the_same():
    model = to_prefix_lm(causal_lm("llama"))
    model.generation_config.eos_token_id = None
    inputs = left_padded()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    from_embeds = model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **SETTINGS, do_sample=False
    )
    assert torch.equal(from_embeds, model.generate(**inputs, **SETTINGS, do_sample=False)[:, 8:])
    assert isinstance(model.decoder, LlamaForCausalLM)
    assert attention_module.masks_registered()
