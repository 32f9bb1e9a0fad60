"""Attention is the model's own, words and charts are what they say."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmprefix.attention import prefix_plan
from mmprefix.cli import run
from mmprefix.decoder import install, uninstall
from mmprefix.errors import InputError
from mmprefix.evaluation import attention
from mmprefix.evaluation.attention import _Weights, eager_attention, split_words, token_grid, token_texts, trace_sample
from mmprefix.evaluation.charts import (
    REGION_COLOURS,
    TokenAxis,
    attention_chart,
    colours,
    loss_chart,
    mask_chart,
    overlay,
    printable,
    shorten,
)
from mmprefix.evaluation.visualize import as_json, sample_pictures, view_pictures
from mmprefix.masks import dense_mask
from mmprefix.packing import collate
from mmprefix.probe import tiny_copy
from mmprefix.sequence import IGNORE_INDEX, Region, TokenSequence
from mmprefix.vision import ConnectorArgs, VisionArgs
from tests.architectures import ARCHITECTURES, attention_of, config_of
from tests.conftest import TINY_VISION, make_model
from tests.reference import may_see

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS = {
    "llama": {"model_type": "llama", **SMALL},
    "gemma2": {"model_type": "gemma2", **SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3,
               "attn_logit_softcapping": 1.0},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 3,
              "max_window_layers": 1},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt_oss": {"model_type": "gpt_oss", **SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3,
                "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip
WINDOWED = {"gemma2": {0}, "qwen2": {1}, "gpt_oss": {0}}
TARGET = "a temple in the sun"


@pytest.fixture(scope="module", params=[(d, v) for d in DECODERS for v in ("full", "nested", "causal")], ids="-".join)
def traced(request):
    decoder, visibility = request.param
    model, processor = make_model(decoder=DECODERS[decoder], visibility=visibility)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    before = model.decoder.config._attn_implementation
    trace = trace_sample(model, processor, [picture], "what is <image> this?", TARGET, heads=True)
    assert model.decoder.config._attn_implementation == before
    return decoder, visibility, model, processor, picture, trace


def seen_by_loops(decoder, layer, visibility, trace):
    """bool ``[T, T]``: the rule in words, and the layer's window inside the target (under `causal`, everywhere)."""
    s = trace.sequence
    tokens = [
        {"segment": 0, "branch": b, "question": 0, "region": r, "position": p}
        for b, r, p in zip(s.branches.tolist(), s.regions.tolist(), s.positions.tolist(), strict=True)
    ]
    windowed = layer in WINDOWED.get(decoder, ())

    def sees(q, k):
        in_window = not windowed or q["position"] - k["position"] < 3
        by_own_rule = k["branch"] >= 0 or visibility == "causal"
        return may_see(q, k, visibility) and (in_window or not by_own_rule)

    return np.array([[sees(q, k) for k in tokens] for q in tokens])


def test_attention_is_zero_exactly_where_the_rule_in_words_hides(traced):
    decoder, visibility, _, _, _, trace = traced
    for layer, heads in zip(trace.layers, trace.heads, strict=True):
        seen = seen_by_loops(decoder, layer, visibility, trace)
        assert not seen.all(), "a rule that hides nothing would pass"
        assert heads.shape == (4, *seen.shape)
        assert (heads[:, ~seen] == 0).all()
        assert (heads[:, seen] > 0).all()


def test_rows_sum_to_one(traced):
    decoder, _, _, _, _, trace = traced
    for mean, heads in zip(trace.attention, trace.heads, strict=True):
        np.testing.assert_allclose(mean, heads.mean(0), atol=1e-7)
        if decoder == "gpt_oss":  # what is missing went to its sinks
            assert (heads.sum(-1) < 1).all()
        else:
            np.testing.assert_allclose(heads.sum(-1), 1, atol=1e-5)


@torch.no_grad()
def test_losses_and_logits_of_the_pass_match_those_of_the_ordinary_one(traced):
    _, visibility, model, processor, picture, trace = traced
    pixels = processor.transform.views(picture)
    packed = model.config.mask_free and model.decoder.config._attn_implementation == "sdpa"
    batch = collate([trace.sequence], [0], pixels, pad_id=0, visibility=visibility, packed=packed)
    ordinary = model.target_logits(batch)
    with eager_attention(model.decoder):
        rows = collate([trace.sequence], [0], pixels, pad_id=0, visibility=visibility)
        eager = model.target_logits(rows)
    torch.testing.assert_close(eager, ordinary, atol=1e-4, rtol=0)
    expected = F.cross_entropy(ordinary, trace.sequence.labels, reduction="none").numpy()
    np.testing.assert_allclose(trace.losses, expected, atol=1e-4)
    assert IGNORE_INDEX not in trace.sequence.labels
    assert trace.mean_loss == pytest.approx(float(model.target_loss(batch)[0]) / len(trace.losses), abs=1e-4)


def test_attention_explains_what_the_layer_puts_out():
    """Values weighted with the weights that were taken are what enters the output projection, by hand."""
    model, processor = make_model(decoder=DECODERS["llama"])
    first = model.decoder.model.layers[0].self_attn
    seen = {}
    hooks = [
        first.v_proj.register_forward_hook(lambda m, a, out: seen.update(v=out)),
        first.o_proj.register_forward_pre_hook(lambda m, a: seen.update(o=a[0])),
    ]
    trace = trace_sample(model, processor, [], "what?", "this", heads=True)
    for hook in hooks:
        hook.remove()
    values = seen["v"][0].unflatten(-1, (4, 8)).transpose(0, 1).numpy()
    mixed = np.einsum("hqk,hkd->qhd", trace.heads[0], values).reshape(values.shape[1], -1)
    np.testing.assert_allclose(mixed, seen["o"][0].numpy(), atol=1e-5)


def test_weights_that_cannot_be_the_models_are_refused(monkeypatch):
    from mmprefix import attention

    model, processor = make_model()
    layer = model.decoder.model.layers[1].self_attn
    none = layer.register_forward_hook(lambda m, a, out: (out[0], None))
    with pytest.raises(InputError, match="LlamaForCausalLM: .* 1 of its 2 layers give attention weights"):
        trace_sample(model, processor, [], "what?", "this")
    none.remove()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "prefix_lm_visible", lambda q, k, visibility, own: torch.ones_like(own))
        with pytest.raises(InputError, match="layer 0 attends to what the prefix-LM rule hides"):
            trace_sample(model, processor, [], "what?", "this")
    twice = layer.register_forward_hook(lambda m, a, out: (out[0], out[1] * 2))
    with pytest.raises(InputError, match="layer 1 returns something else than shares of 1"):
        trace_sample(model, processor, [], "what?", "this")
    twice.remove()
    assert trace_sample(model, processor, [], "what?", "this").layers == (0, 1)
    assert model.decoder.config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match="layers: expected some of 0 to 1, got 0, 2"):
        trace_sample(model, processor, [], "what?", "this", layers=[2, 0])


def test_modes_of_frozen_parts_stay():
    model, processor = make_model()
    model.train()
    model.vision.eval()
    trace_sample(model, processor, [], "what?", "this", layers=[0])
    assert model.decoder.training
    assert not model.vision.model.training
    model.eval()


def test_a_sample_longer_than_the_decoders_positions_is_one_line():
    model, processor = make_model(decoder={**DECODERS["gpt2"], "n_positions": 64})
    with pytest.raises(
        InputError, match=r"sample: expected at most 64 tokens \(the decoder's max_position_embeddings\), got 7\d"
    ):
        trace_sample(model, processor, [], "what?", "x" * 65)
    with pytest.raises(InputError, match="expected at most 64 tokens .*, got 67"):
        trace_sample(model, processor, [], "what?", max_new_tokens=60)


def test_greedy_answer_is_what_generate_says(model_and_processor, photos):
    model, processor = model_and_processor
    trace = trace_sample(model, processor, photos[:1], "what?", max_new_tokens=9)
    inputs = processor(images=photos[0], text="what?")
    ids = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert trace.generated
    assert trace.sequence.labels.tolist() == ids.tolist()[: len(trace.losses)]
    assert trace.target == processor.decode_generated(ids[None])[0]
    assert len(trace.losses) == 9 or trace.sequence.labels[-1] == processor.layout.eos
    # Each was the likeliest token where it was predicted: none of the others has a smaller loss.
    assert (trace.losses <= np.log(model.config.text_config.vocab_size)).all()


def test_an_answer_ends_with_its_end_and_padding_is_none_of_it(model_and_processor, monkeypatch):
    model, processor = model_and_processor
    answer = [*processor.format.text_ids("no"), processor.layout.eos, processor.pad_id, processor.pad_id]
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **kwargs: torch.cat([input_ids, torch.tensor([answer])], dim=1)
    )
    trace = trace_sample(model, processor, [], "what?")
    assert trace.sequence.labels.tolist() == answer[:3]
    assert trace.target == "no"
    assert [word.text for word in trace.words] == ["no", "</s>"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_of_the_matrix_gives_weights(name):
    config = config_of(name)
    decoder = install(tiny_copy(config, attention_of(config))).eval()
    sequence = TokenSequence.from_ids(99, range(3, 10), [range(10, 17)])
    batch = collate([sequence], [()], None, pad_id=0)
    kept = _Weights((0, 1), True, dense_mask(batch.plan.tokens)[0])
    with torch.no_grad(), eager_attention(decoder), kept.taken_from(decoder), prefix_plan(batch.plan):
        decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    kept.check(name, decoder.config.num_hidden_layers)
    assert kept.layers == len(kept.heads) == 2
    uninstall(decoder)


def test_more_memory_than_is_free_is_refused_before_it_is_taken(model_and_processor, photos, monkeypatch):
    model, processor = model_and_processor
    monkeypatch.setattr(model, "generate", lambda **kwargs: pytest.fail("it should have been refused"))
    length = 20_000 + 64
    instruction = "a" * (length - 64 - len(processor.encode("", (), views=())))
    monkeypatch.setattr(model.decoder.config, "max_position_embeddings", 1 << 20)
    monkeypatch.setattr(attention, "free_memory", lambda device: 30 << 30)
    layer = 4 * 4 * length**2  # of four heads
    assert 4 * layer + 2 * layer / 4 < 30 << 30 < 4 * layer + 2 * (layer / 4 + layer)
    with pytest.raises(InputError) as error:
        trace_sample(model, processor, [], instruction, heads=True)
    assert str(error.value) == (
        "attention of 2 layers and their 4 heads over 20,064 tokens: expected at most 30.0 GiB, what is free on cpu, it needs "
        "39.0 GiB; ask for no heads, or fewer layers, or a shorter prefix (smaller images, fewer tiles)"
    )
    monkeypatch.setattr(attention, "free_memory", lambda device: 10 << 30)
    with pytest.raises(InputError, match=r"over 20,064 tokens: .* ask for a shorter prefix \(smaller"):
        trace_sample(model, processor, [], instruction)
    monkeypatch.setattr(attention, "free_memory", lambda device: None)
    assert len(trace_sample(model, processor, [], "a", "b").attention) == 2, "where nothing says, nothing is refused"


def test_estimate_of_memory_covers_what_a_pass_takes(model_and_processor):
    """Bytes that torch allocates and does not give back, against the estimate that is compared with what is free."""
    model, processor = model_and_processor
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trace = trace_sample(model, processor, [], "a" * 900, "b", heads=True)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    layer = 4 * 4 * len(trace.sequence) ** 2
    assert 2 * layer < peak < attention._PASS_COPIES * layer + 2 * (layer + layer / 4)


def test_free_memory_is_the_least_that_anything_says(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(attention, "_CGROUP", tmp_path)
    assert attention.free_memory(torch.device("cpu")) is None
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     512 kB\n")
    assert attention.free_memory(torch.device("cpu")) == 512 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert attention.free_memory(torch.device("cpu")) == 512 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert attention.free_memory(torch.device("cpu")) == 4000
    assert attention.free_memory(torch.device("meta")) is None


# Words, texts and patches


def words_of(processor, text, special=()):
    ids = [*processor.format.text_ids(text), *special]
    words = split_words(processor.tokenizer, ids)
    assert [(w.start, w.stop) for w in words] == [
        (a, b) for a, b in zip([0, *(w.stop for w in words)], [w.stop for w in words], strict=False)
    ]
    assert words[-1].stop == len(ids)
    return [w.text for w in words]


def test_words_are_all_tokens_of_the_target(model_and_processor):
    _, processor = model_and_processor
    eos = processor.layout.eos
    assert words_of(processor, "a temple,  in\nthe sun", [eos]) == ["a", "temple,", "in", "the", "sun", "</s>"]
    assert words_of(processor, " é ") == ["é"]
    assert words_of(processor, "ein 中文 Wort") == ["ein", "中", "文", "Wort"]
    assert words_of(processor, "ab中文c d") == ["ab", "中", "文", "c", "d"]
    assert words_of(processor, "  ") == [""]
    assert words_of(processor, "a ", [eos]) == ["a", "</s>"]
    assert words_of(processor, "", [eos, eos]) == ["</s>", "</s>"]


def test_bytes_that_are_no_characters_are_words_all_the_same(model_and_processor):
    _, processor = model_and_processor
    half = list(processor.format.text_ids("中"))[:2]
    for ids in (half, half * 7, [*half, processor.layout.eos]):
        words = split_words(processor.tokenizer, ids)
        assert words[0].start == 0
        assert words[-1].stop == len(ids)


def test_texts_name_what_is_no_text(model_and_processor):
    _, processor = model_and_processor
    sequence = processor.encode("é", ["b"], views=[1])
    texts = token_texts(processor.tokenizer, sequence)
    assert all(texts[len(texts) - 2 :]), "each has a name"
    assert texts[-2:] == ("b", "</s>")
    assert {text for text, region in zip(texts, sequence.regions.tolist(), strict=True) if region == Region.IMAGE} == {
        ""
    }


@pytest.mark.parametrize(
    ("connector", "grid"), [(ConnectorArgs("mlp"), (4, 4)), (ConnectorArgs("pixel_shuffle", 2), (2, 2))]
)
def test_maps_lie_over_the_patches_of_each_view(photos, connector, grid):
    """By hand: attention of the positions in front of a word's tokens, to the image tokens one by one."""
    vision = VisionArgs("test_vit", image_size=64, resize="tiles", max_tiles=2)
    model, processor = make_model(vision=vision, connector=connector)
    assert token_grid(model) == grid
    trace = trace_sample(model, processor, photos[:2], "<image> or <image>?", "a red flower", layers=[1])
    assert trace.views == (3, 3)
    s, word = trace.sequence, trace.words[1]
    assert word.text == "red"
    image = [i for i, region in enumerate(s.regions.tolist()) if region == Region.IMAGE]
    maps = np.zeros((6, *grid))
    for number, key in enumerate(image):
        view, patch = divmod(number, grid[0] * grid[1])
        queries = [trace.boundary - 1 + n for n in range(word.start, word.stop)]
        maps[view, patch // grid[1], patch % grid[1]] = np.mean([trace.attention[0][q, key] for q in queries])
    np.testing.assert_allclose(trace.image_maps(word), maps, atol=1e-7)
    assert 0 < maps.sum() < 1


def test_patches_of_the_map_are_where_the_picture_is():
    """What changes in a part of the picture changes the image token that the map shows there."""
    model, processor = make_model(vision=VisionArgs("test_vit", image_size=64))
    rows, columns = token_grid(model)
    grey = Image.new("RGB", (320, 160), (128, 128, 128))
    for row, column in ((0, columns - 1), (rows - 1, 0), (1, 2)):
        spot = grey.copy()
        x, y = 320 * column // columns, 160 * row // rows
        spot.paste((255, 0, 0), (x, y, x + 320 // columns, y + 160 // rows))
        with torch.no_grad():
            tokens = [model.get_image_tokens(processor.transform.views(picture))[0] for picture in (grey, spot)]
        change = (tokens[1] - tokens[0]).norm(dim=1)
        assert divmod(int(change.argmax()), columns) == (row, column)


def test_joined_patches_of_the_map_are_neighbours():
    """Tokens that say where they stand, through `pixel_shuffle`: each joined one holds those of its block."""
    model, _ = make_model(vision=VisionArgs("test_vit", image_size=96), connector=ConnectorArgs("pixel_shuffle", 3))
    (rows, columns), (height, width) = token_grid(model), model.config.vision_spec.grid
    assert (rows, columns, height, width) == (2, 2, 6, 6)
    places = torch.tensor([(r, c) for r in range(height) for c in range(width)])
    joined = model.connector[0](places[None])[0].view(rows * columns, 9, 2)
    for number, block in enumerate(joined.tolist()):
        assert {(r // 3, c // 3) for r, c in block} == {divmod(number, columns)}


# Charts


def test_colours_grow_lighter_evenly():
    scale = colours(np.linspace(0, 1, 101) ** 2, 1.0).astype(float)
    grey = scale @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(grey) > 0).all()
    assert np.diff(grey).max() < 4 * np.diff(grey).mean()
    assert colours(np.array([0.0, 1.0]), 0.0).tolist() == [[68, 1, 84]] * 2, "nothing at all is dark"


def axis_of(image, instruction, target, scale=1.0):
    regions = ["image"] * image + ["instruction"] * instruction + ["target"] * target
    return TokenAxis.of(regions, [f"t{n}" for n in range(len(regions))], image + instruction, scale)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (4, 20, 5), (256, 20, 500), (5000, 30, 900), (1, 3000, 2)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_axes_hold_all_tokens_and_labels_never_overlap(sizes, scale):
    axis = axis_of(*sizes, scale)
    counts = np.diff(np.append(axis.starts, sum(sizes)))
    assert (counts > 0).all()
    assert axis.length <= 1400
    assert axis.boundary in axis.starts, "the boundary lies between two bins"
    ones = np.ones((sum(sizes), 2))
    np.testing.assert_allclose(axis.binned(ones, 0), np.ones((len(axis.starts), 2)))
    places = [at for at, _ in axis.marks()]
    assert (np.diff(places) >= 12).all()
    assert all(0 <= at <= axis.length for at in places)


def test_bins_match_means_by_loops():
    axis = axis_of(1300, 4, 3)
    values = np.random.default_rng(0).random(1307)
    bounds = [*axis.starts.tolist(), 1307]
    means = [np.mean(values[a:b]) for a, b in pairwise(bounds)]
    np.testing.assert_allclose(axis.binned(values, 0), means)
    assert axis.shares_bins


def test_matrix_pixels_have_the_colours_of_their_tokens():
    axis = axis_of(2, 2, 2)
    visible = np.tril(np.ones((6, 6), bool))
    visible[:, :4] = True
    attention = np.where(visible, np.arange(36).reshape(6, 6) / 36, 0.0)
    attention[0, 0] = 0.0
    for chart, colour_of in (
        (mask_chart(visible, axis, "mask"), lambda q, k: REGION_COLOURS[axis.regions[k]]),
        (attention_chart(attention, visible, axis, "heat"),
         lambda q, k: tuple(colours(attention[q, k], attention.max()).tolist())),
    ):  # fmt: skip
        pixels = np.asarray(chart)
        frame = np.argwhere((pixels == (120, 120, 120)).all(-1))  # the border of the matrix is the longest grey line
        row = np.bincount(frame[:, 0]).argmax()
        top = min(r for r in range(len(pixels)) if (frame[:, 0] == r).sum() >= axis.length) + 1
        left = frame[frame[:, 0] == row][:, 1].min() + 1
        for q in range(6):
            for k in range(6):
                at = tuple(pixels[top + axis.pixel(q) + 5, left + axis.pixel(k) + 5].tolist())
                assert at == (colour_of(q, k) if visible[q, k] else (255, 255, 255)), (q, k)


def test_overlay_covers_each_patch_with_its_colour():
    picture = Image.new("RGB", (40, 20), (90, 90, 90))
    shown = np.asarray(overlay(picture, np.array([[0.0, 1.0], [0.25, 0.5]]), 1.0))
    for row, column, value in ((0, 0, 0.0), (0, 1, 1.0), (1, 0, 0.25), (1, 1, 0.5)):
        block = shown[10 * row : 10 * row + 10, 20 * column : 20 * column + 20].reshape(-1, 3)
        assert (block == colours(np.array(value), 1.0)).all()


def test_bars_are_as_long_as_losses():
    chart = np.asarray(loss_chart(np.array([1.0, 2.0, 0.0, 4.0], np.float32), list("abcd"), "loss"))
    bars = (chart == REGION_COLOURS["image"]).all(-1)
    lengths = [int(bars[row].sum()) for row in range(len(bars)) if bars[row].sum()]
    levels = sorted(set(lengths))
    assert len(levels) >= 3
    assert levels[-1] / max(1, levels[0]) == pytest.approx(4, rel=0.1)
    for losses in ([float("nan")], [float("inf"), 1.0], [0.0], [1.0] * 500):
        assert loss_chart(np.array(losses, np.float32), ["x"] * len(losses), "loss").width < 1300


def test_labels_are_cut_and_escaped():
    assert printable("a b\n\x07\u202e") == "a·b\\n\\x07\\u202e"
    assert shorten("short", 200) == "short"
    cut = shorten("very " * 100, 60)
    assert cut.endswith("...")
    assert len(cut) < 20


# All together


@pytest.mark.parametrize("resize", ["squash", "crop", "pad", "tiles"])
def test_a_picture_for_each_view(photos, resize):
    _, processor = make_model(vision=VisionArgs("test_vit", image_size=32, resize=resize))
    images = [*photos, Image.new("L", (1, 1))]
    views = sum(len(processor.transform.views(image)) for image in images)
    pictures = view_pictures(images, processor.transform)
    assert len(pictures) == views
    assert all(picture.mode == "RGB" for picture in pictures)
    assert (pictures[0].size == photos[0].size) == (resize == "squash")


@pytest.mark.parametrize("case", ["pixel", "panorama", "several", "long", "scripts", "no grid"])
def test_odd_samples_are_drawn(photos, case):
    model, processor = make_model(vision=TINY_VISION, decoder={**DECODERS["llama"], "max_position_embeddings": 4096})
    images, target = [photos[0]], "yes"
    if case == "pixel":
        images = [Image.new("RGB", (1, 1), (200, 0, 0))]
    elif case == "panorama":
        images = [photos[0].resize((4000, 12)), photos[0].resize((5, 3000))]
    elif case == "several":
        images = photos * 4
    elif case == "long":
        target = "a temple in the sun " * 25
    elif case == "scripts":
        target = "中文 עברית один 🌞 \x00\t\u202e"
    else:
        model.config.vision_config["grid"] = None
    drawn = sample_pictures(model, processor, images, "what?", target, layers=[1], heads=case == "pixel")
    names = {"mask", "loss", "attention-layer-01"}
    assert names <= set(drawn.pictures)
    assert ("attention-layer-01-heads" in drawn.pictures) == (case == "pixel")
    words = [name for name in drawn.pictures if name.startswith("words")]
    if case == "no grid":
        assert not words
        assert "form no grid" in drawn.missing["words"]
    else:
        assert words
        assert drawn.missing == {}
    for picture in drawn.pictures.values():
        assert picture.width <= 1400
        assert picture.height <= 3400
        assert len(picture.getcolors(1 << 24)) > 5, "something is drawn"
    assert sum(token["loss"] for token in as_json(drawn.trace)["tokens"]) == pytest.approx(
        sum(word["loss"] for word in as_json(drawn.trace)["words"])
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("visualize") / "model"
    model, processor = make_model()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_command_writes_pictures_and_losses(folder, photos, tmp_path, capfd):
    for name in ("a.png", "b.png"):
        photos[2].save(tmp_path / name)
    arguments = ["visualize", "--checkpoint", str(folder), "--device", "cpu", "--instruction", "what?"]
    status = run([*arguments, "--image", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--target", "a temple", "--heads",
                  "--layers", "0-1", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "losses.json")])  # fmt: skip
    assert status == 0
    lines = capfd.readouterr().out.splitlines()
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [
        "attention-layer-00-heads.png", "attention-layer-00.png", "attention-layer-01-heads.png", "attention-layer-01.png",
        "loss.png", "mask.png", "words.png",
    ]  # fmt: skip
    assert sorted(line.split(":")[0] for line in lines) == [str(tmp_path / "out" / name) for name in written]
    for name in written:
        Image.open(tmp_path / "out" / name).verify()
    content = json.loads((tmp_path / "losses.json").read_text())
    assert [token["text"] for token in content["tokens"]] == [*"a temple", "</s>"]
    assert content["mean_loss"] == pytest.approx(np.mean([token["loss"] for token in content["tokens"]]))
    assert [word["text"] for word in content["words"]] == ["a", "temple", "</s>"]
    assert all(0 < word["image_attention"] < 1 for word in content["words"])
    # Without an image there are no patches, and it says so.
    assert run([*arguments, "--max_new_tokens", "3", "--layers", "1", "--out", str(tmp_path / "text")]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == (
        "no words.png: the sample has no image, so there are no patches for words to attend to"
    )
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == [
        "attention-layer-01.png",
        "loss.png",
        "mask.png",
    ]


def test_bad_input_is_one_line(folder, tmp_path, capfd):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    picture = tmp_path / "picture.png"
    picture.touch()
    arguments = ["visualize", "--checkpoint", str(folder), "--instruction", "what?", "--device", "cpu"]
    for more, message in (
        (["--layers", "2"], "--layers: expected numbers from 0 to 1, the decoder's, got '2'"),
        (["--layers", "1-0"], "--layers: expected numbers and ranges with commas (0,4-7), got '1-0'"),
        (["--layers", "all"], "--layers: expected numbers and ranges with commas (0,4-7), got 'all'"),
        (
            ["--target", ""],
            "--target: expected text, got an empty one; without --target the model's own answer is drawn",
        ),
        (["--max_new_tokens", "0"], "--max_new_tokens: expected at least 1, got 0"),
        (["--image", "/nowhere.png"], "--image: expected a picture file, found none at /nowhere.png"),
        (["--json", "/nowhere/x.json"], "--json: expected a file in a folder that is there, got /nowhere/x.json"),
        (
            ["--image", str(picture), "--json", str(picture)],
            f"--json: expected another file than what is read, got {picture}",
        ),
        (
            ["--out", str(tmp_path / "full")],
            f"--out: expected a new or empty folder, {tmp_path / 'full'} holds something",
        ),
        (
            ["--instruction", "<image>?"],
            "instruction: expected <image> once for each image (0), or not at all, got it 1 times",
        ),
    ):
        status = run([*arguments, "--out", str(tmp_path / "out"), *more])
        error = capfd.readouterr().err.strip().splitlines()
        assert (status, len(error)) == (2, 1), error
        assert message in error[0]
        assert not (tmp_path / "out").exists()
