"""Answers with rows that make room for others, against what `generate` says to each prompt alone."""

import gc
import math
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mmprefix import decoding
from mmprefix.attention import CachedColumns, MaskFree, only_mask_free
from mmprefix.decoding import Prompt, SamplingArgs, answers, draw, uniform_numbers
from mmprefix.errors import InputError
from mmprefix.masks import TokenIndex, prefix_lm_visible
from mmprefix.packing import PrefixPlan, pack_prompts
from mmprefix.places import Places
from tests.architectures import ARCHITECTURES
from tests.conftest import make_model
from tests.test_prefix_lm import causal_lm

LENGTHS = (3, 17, 9, 4, 30, 11, 11, 6, 22, 5)
NEW = 12


def prompts_for(model):
    """Of many lengths, some without an image and some with two."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        tokens = model.get_image_tokens(pixels)
    found = []
    for n, length in enumerate(LENGTHS):
        images = {0: (), 1: (0, 2)}.get(n % 4, (n % 3,))
        places = torch.full((len(images) * tokens.shape[1],), model.config.image_token_id)
        text = torch.randint(4, 120, (length,), generator=generator)
        found.append(Prompt(torch.cat([places, text]), tuple(tokens[i] for i in images), str(n)))
    return found


def ending(model):
    """An EOS that the model says now and then, so that answers have many lengths."""
    model.generation_config.eos_token_id = 65
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[65] = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1)) * weight.std() * 3
    return model


def alone(model, prompt, end=65):
    tokens = torch.cat(prompt.images).unsqueeze(0) if prompt.images else None
    output = model.generate(
        input_ids=prompt.ids.unsqueeze(0), attention_mask=torch.ones_like(prompt.ids).unsqueeze(0), image_tokens=tokens,
        max_new_tokens=NEW, do_sample=False,
    )  # fmt: skip
    ids = output[0, prompt.ids.numel() :].tolist()
    return ids[: ids.index(end)] if end in ids else ids


@pytest.fixture
def model_and_prompts():
    model, _ = make_model()
    model = ending(model)
    return model, prompts_for(model)


MASKED = {
    "gpt_neo", "gptj", "bloom", "mpt", "falcon", "codegen", "gemma2", "llama4_text", "gpt_oss", "falcon (ALiBi)",
}  # fmt: skip
"""Decoders that need a mask; of all others prompts are prefilled as one packed row."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_of_other_decoders_match_those_of_each_prompt_alone(name):
    """With windows shorter than prompts, biases by distance, caches that the library would have made otherwise."""
    model, _ = make_model()
    decoder = causal_lm(name)
    model.config.text_config = decoder.config
    model.replace_decoder(decoder)
    model.generation_config.eos_token_id = None
    prompts = [Prompt(prompt.ids % 28 + 4) for prompt in prompts_for(model) if not prompt.images]
    prompts += [Prompt(prompt.ids[-7 - n :]) for n, prompt in enumerate(prompts)]
    assert len({prompt.ids.numel() for prompt in prompts}) > 3
    lengths = [3 + 2 * (n % 5) for n in range(len(prompts))]
    with torch.no_grad():
        expected = [alone(model, prompt, end=None) for prompt in prompts]
        # An end that comes at another step for each: a token that only this answer has there.
        tokens = sorted({ids[length] for ids, length in zip(expected, lengths, strict=True)})
        model.generation_config.eos_token_id = tokens[::2]
        expected = [ids[: next((n for n, t in enumerate(ids) if t in tokens[::2]), NEW)] for ids in expected]
        assert answers(model, prompts, rows=2, max_new_tokens=NEW) == expected
        if model.config.mask_free:
            with only_mask_free():
                assert answers(model, prompts, rows=2, max_new_tokens=NEW, packed=True) == expected
                assert answers(model, prompts, rows=3, max_new_tokens=NEW, packed=True, in_places=True) == expected
    assert model.config.mask_free == (name not in MASKED)
    assert len({len(ids) for ids in expected}) > 1, "answers must end at different steps"
    assert decoding._fresh_cache(model) is not None


@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_answers_do_not_depend_on_rows(rows, visibility):
    model, _ = make_model(visibility=visibility)
    prompts = prompts_for(ending(model))
    with torch.no_grad():
        expected = [alone(model, prompt) for prompt in prompts]
        assert answers(model, prompts, rows=rows, max_new_tokens=NEW) == expected
        with only_mask_free():
            assert answers(model, prompts, rows=rows, max_new_tokens=NEW, packed=True) == expected
        for packed in (False, True):
            assert answers(model, prompts, rows=rows, max_new_tokens=NEW, packed=packed, in_places=True) == expected


@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
def test_packed_prefill_matches_the_padded_one(visibility):
    """Logits, and keys and values wherever there is a token."""
    model, _ = make_model(visibility=visibility)
    prompts = prompts_for(model)[:6]
    how = decoding._Decoding(model, prompts, 6, NEW, None, None, packed=True)
    caches = [decoding._fresh_cache(model) for _ in range(2)]
    numbers = [3, 0, 5, 1]
    with torch.no_grad(), only_mask_free():
        expected = how._prefill_padded(numbers, caches[0])
        found = how._prefill_packed(numbers, caches[1])
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    is_token = expected[0].bool()
    for ours, padded in zip(caches[1].layers, caches[0].layers, strict=True):
        for x, y in ((ours.keys, padded.keys), (ours.values, padded.values)):
            assert x.shape == y.shape
            torch.testing.assert_close(x.transpose(1, 2)[is_token], y.transpose(1, 2)[is_token], rtol=1e-5, atol=1e-5)
            assert not x.transpose(1, 2)[~is_token].any()


def test_layers_that_share_keys_and_streams_of_one_layer():
    """gemma3n's last layers take keys of earlier ones, and all of its layers give four outputs."""
    config = AutoConfig.for_model(
        "gemma3n_text", hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, vocab_size=264, vocab_size_per_layer_input=264, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(config)
    model, _ = make_model()
    model.config.text_config = config
    model.replace_decoder(decoder)
    model.generation_config.eos_token_id = None
    prompts = [Prompt(prompt.ids % 28 + 4) for prompt in prompts_for(model) if not prompt.images]
    with torch.no_grad():
        expected = [alone(model, prompt, end=None) for prompt in prompts]
        assert answers(model, prompts, rows=2, max_new_tokens=NEW) == expected
        with only_mask_free():
            assert answers(model, prompts, rows=2, max_new_tokens=NEW, packed=True) == expected
            assert answers(model, prompts, rows=2, max_new_tokens=NEW, packed=True, in_places=True) == expected


@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
def test_a_window_bites_on_prompts_only_where_they_are_causal(visibility):
    """On CUDA, where its kernel's window would hide the prefix, too; meta tensors stand in for it."""
    batch = pack_prompts([torch.arange(4, 304), torch.arange(4, 270)], 3, pad_id=0, visibility=visibility)
    stand_in = MaskFree(batch.plan, window=256, refusal=None, make_dense=lambda: None)
    tensors = [torch.empty(1, heads, 566, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2)]
    assert stand_in.refuses(*tensors, 0.0, {}) == "no kernel for meta", "the last thing that is asked"


def test_image_tokens_of_a_neighbour_are_not_taken(model_and_prompts):
    model, prompts = model_and_prompts
    more = replace(prompts[1], images=(*prompts[1].images, prompts[1].images[0]), sample="one too many")
    with torch.no_grad(), pytest.raises(ValueError, match="sample one too many: expected 8 image tokens, .* got 12"):
        answers(model, [prompts[0], more, prompts[2]], rows=4, max_new_tokens=NEW, packed=True)


def test_places_of_ended_rows_are_taken(model_and_prompts, monkeypatch):
    """Fewer passes than batches of like length would need, each of its longest answer."""
    model, prompts = model_and_prompts
    widths = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: widths.append(tuple(k["input_ids"].shape)) or forward(*a, **k)
    )
    with torch.no_grad():
        found = answers(model, prompts, rows=2, max_new_tokens=NEW)
    lengths = [min(len(ids) + 1, NEW) for ids in found]  # with EOS, where there was room for it
    steps = sum(width == 1 for _, width in widths)
    in_order = [lengths[n] for n in sorted(range(len(prompts)), key=lambda n: -prompts[n].ids.numel())]
    batches = [in_order[n : n + 2] for n in range(0, len(in_order), 2)]
    assert len(set(lengths)) > 2
    assert steps < sum(max(batch) - 1 for batch in batches)
    prefills = [width for _, width in widths if width > 1]
    assert all(a >= b for a, b in pairwise(prefills)), "the longest first"
    assert max(rows for rows, _ in widths) == 2


def test_beams_match_those_of_each_prompt_alone(model_and_prompts):
    model, prompts = model_and_prompts
    with torch.no_grad():
        found = answers(model, prompts, rows=4, max_new_tokens=NEW, num_beams=2)
        for prompt, ids in zip(prompts, found, strict=True):
            assert answers(model, [prompt], rows=1, max_new_tokens=NEW, num_beams=2) == [ids]


def test_what_changes_logits_is_left_to_the_library(model_and_prompts):
    model, prompts = model_and_prompts
    model.generation_config.repetition_penalty = 3.0
    with torch.no_grad():
        found = answers(model, prompts, rows=3, max_new_tokens=NEW)
        assert found == [alone(model, prompt) for prompt in prompts]
        model.generation_config.repetition_penalty = None
        assert found != answers(model, prompts, rows=3, max_new_tokens=NEW)


# Sampling ---------------------------------------------------------------------------------------------------------------

SAMPLING = SamplingArgs(temperature=1.5, top_p=0.95, top_k=50)


def test_sampled_answers_depend_on_seed_and_sample_alone(model_and_prompts, monkeypatch):
    model, prompts = model_and_prompts
    settings = {"max_new_tokens": NEW, "sampling": SAMPLING}
    with torch.no_grad():
        first = answers(model, prompts, rows=4, seed=1, **settings)
        assert answers(model, prompts, rows=3, seed=1, in_places=True, **settings) == first
        assert answers(model, prompts, rows=1, seed=1, **settings) == first
        assert answers(model, prompts[::-1], rows=3, seed=1, **settings) == first[::-1]
        assert answers(model, prompts[5:], rows=2, seed=1, **settings) == first[5:]
        other = answers(model, prompts, rows=4, seed=2, **settings)
        greedy = answers(model, prompts, rows=4, max_new_tokens=NEW)
        assert sum(a != b for a, b in zip(first, other, strict=True)) > len(prompts) // 2
        assert sum(a != b for a, b in zip(first, greedy, strict=True)) > len(prompts) // 2
        monkeypatch.setattr(decoding, "_fresh_cache", lambda model: None)
        assert answers(model, prompts, rows=4, seed=1, **settings) == first, "the library's loop draws the same"


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])
    count = 20_000
    uniform = uniform_numbers(0, "a sample", count)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02
    for sampling, kept in (
        (SamplingArgs(), [0, 1, 2, 3, 4]),
        (SamplingArgs(temperature=0.5), [0, 1, 2, 3, 4]),
        (SamplingArgs(top_k=2), [0, 2]),
        (SamplingArgs(top_p=0.75), [0, 2]),  # 0.57 and 0.21
        (SamplingArgs(top_p=0.01), [0]),
        (SamplingArgs(temperature=2.0, top_k=4, top_p=0.7), [0, 1, 2]),
    ):
        drawn = draw(logits.expand(count, -1), uniform, sampling)
        probabilities = torch.full_like(logits, -math.inf)
        probabilities[kept] = logits[kept] / sampling.temperature
        found = torch.bincount(drawn, minlength=5) / count
        torch.testing.assert_close(found, probabilities.softmax(0), atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, r"^model.sampling.temperature: expected more than 0, got 0; for greedy answers leave"),
        ({"temperature": -1}, r"^model.sampling.temperature: expected more than 0, got -1$"),
        ({"temperature": math.nan}, r"^model.sampling.temperature: expected more than 0, got nan"),
        ({"top_p": 0}, r"^model.sampling.top_p: expected more than 0 and at most 1, got 0"),
        ({"top_p": 1.1}, r"^model.sampling.top_p: expected more than 0 and at most 1, got 1.1"),
        ({"top_k": 0}, r"^model.sampling.top_k: expected at least 1, or null for all, got 0"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(InputError, match=message):
        SamplingArgs(**settings).check()
    with pytest.raises(InputError, match=r"^model.sampling: expected model.num_beams: 1 beside it, got 3"):
        SamplingArgs().check(num_beams=3)


# Places of fixed size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_visible_columns_match_the_rule_of_the_dense_mask(causal):
    """A window of 3; rows of different length, each as the last token of a sequence of its own."""
    lengths, prefixes, width = [2, 5, 9], [2, 3, 4], 12
    columns = CachedColumns(torch.tensor(lengths), torch.tensor(prefixes), width, causal)

    def window(batch, head, query, key):  # of a decoder that would see what comes later, too
        return key > query - 3

    found = columns.visible(window)
    assert found.shape == (3, 1, 1, width)
    for row, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        is_target = torch.arange(length + 1) >= prefix
        tokens = PrefixPlan.from_prompt(
            torch.ones(1, length + 1),
            torch.zeros(1, length + 1).bool(),
            is_target[None],
            "causal" if causal else "full",
        ).tokens
        q = TokenIndex(*(t[:, -1:] for t in tokens))
        own = window(None, None, q.position[0], tokens.position[0])
        expected = prefix_lm_visible(q, tokens, "causal" if causal else "full", own)
        assert found[row, 0, 0].tolist() == [*expected[0].tolist(), *[False] * (width - length - 1)]
    assert columns.written().sum(1).tolist() == [length + 1 for length in lengths]


def test_heads_that_share_keys_are_folded_not_repeated(monkeypatch):
    """A cache of 2 key heads for 4 query heads reaches the kernel as it is."""
    model, _ = make_model()
    prompts = prompts_for(ending(model))
    shapes = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, *args, **kwargs):
        if kwargs.get("attn_mask") is not None and query.shape[2] == 2:
            shapes.add((query.shape[:3], key.shape[:2]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    with torch.no_grad():
        answers(model, prompts, rows=3, max_new_tokens=NEW, packed=True, in_places=True)
    assert shapes == {((3, 2, 2), (3, 2))}


def test_a_prompt_takes_the_place_of_an_answer_that_has_ended(model_and_prompts, monkeypatch):
    model, prompts = model_and_prompts
    taken, steps = [], []
    put, step = Places.put, Places.step
    monkeypatch.setattr(
        Places, "put", lambda self, places, *rest: taken.append(tuple(places)) or put(self, places, *rest)
    )
    monkeypatch.setattr(Places, "step", lambda self: steps.append(1) or step(self))
    with torch.no_grad():
        found = answers(model, prompts, rows=2, max_new_tokens=NEW, in_places=True)
    lengths = [min(len(ids) + 1, NEW) for ids in found]
    assert sum(len(places) for places in taken) <= len(prompts)
    assert {place for places in taken for place in places} == {0, 1}
    assert len(taken) > len(prompts) // 2
    assert len(steps) < sum(lengths) - len(lengths), "two answers at a time"


POSITIONS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 70},
    "dynamic": {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 70,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    },
}  # fmt: skip
"""Tables that end at 70 positions, and frequencies that change beyond 70."""


@pytest.mark.parametrize("name", POSITIONS)
def test_places_that_nobody_is_in_count_no_positions(name):
    """The longest needs 68; a place left early would be at 80 when the last answer ends."""
    model, _ = make_model(POSITIONS[name])
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(torch.randint(4, 120, (length,), generator=generator)) for length in (40, 38, 36)]
    with torch.no_grad():
        expected = [answers(model, [prompt], rows=1, max_new_tokens=28)[0] for prompt in prompts]
        assert answers(model, prompts, rows=2, max_new_tokens=28, packed=True, in_places=True) == expected


def test_places_wait_at_position_1(model_and_prompts, monkeypatch):
    model, prompts = model_and_prompts
    waited = []
    push = Places.push

    def watch(self, tokens, ended):
        push(self, tokens, ended)
        waited.extend(self._length[self._taken == 0].tolist())

    monkeypatch.setattr(Places, "push", watch)
    with torch.no_grad():
        answers(model, prompts, rows=4, max_new_tokens=NEW, in_places=True)
    assert len(waited) > NEW
    assert set(waited) == {1}


def test_caches_are_held_once_and_no_longer_than_their_answers(model_and_prompts, monkeypatch):
    """Without the garbage collector, which may come late: on a GPU a cache is gigabytes."""
    model, prompts = model_and_prompts
    made, places, filled = [], [], []
    fresh_cache, init, step = decoding._fresh_cache, Places.__init__, Places.step

    def fresh(model):
        cache = fresh_cache(model)
        made.append(weakref.ref(cache))
        return cache

    def watch(self):
        caches = [cache() for cache in made]
        filled.append(sum(c is not None and any(layer.is_initialized for layer in c.layers) for c in caches))
        return step(self)

    monkeypatch.setattr(decoding, "_fresh_cache", fresh)
    monkeypatch.setattr(Places, "__init__", lambda self, *a: init(self, *a) or places.append(weakref.ref(self)))
    monkeypatch.setattr(Places, "step", watch)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for _ in range(2):
                answers(model, prompts, rows=4, max_new_tokens=NEW, in_places=True)
        assert [found() for found in places] == [None, None]
    finally:
        gc.enable()
    assert len(made) > 4
    assert set(filled) == {0}, "a prefill's cache is gone when its rows have their places"
