"""A start from pretrained weights: they stay in their files, in the files' precision, until they are wanted in float32."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmprefix.decoder import DecoderArgs, build_decoder, decoder_config
from mmprefix.last_layer import last_layer
from mmprefix.probe import tiny_copy
from mmprefix.stored_weights import computing_in_float32, stored_dtype
from mmprefix.training.module import MMPrefixModule
from tests.architectures import ARCHITECTURES, HYBRIDS, attention_of, config_of
from tests.conftest import TINY_DECODER, make_model


def built(folder, dtype, attention=None):
    args = DecoderArgs(str(folder), attn_implementation=attention)
    return build_decoder(args, decoder_config(args), dtype)


def assert_same(found, expected):
    """Parameters and buffers, bit for bit."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype, key
            assert torch.equal(ours[key], value), key


# Embeddings are scaled by a buffer, the root of the width: 9.798, in bfloat16 9.8125. Roots of 64 are the same in both.
SCALED = {**TINY_DECODER, "model_type": "gemma3_text", "hidden_size": 96, "head_dim": 16}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *HYBRIDS, None])
def test_weights_made_float32_later_match_float32(tmp_path, name):
    """Bit for bit: parameters, and buffers, which half precision would round."""
    args = DecoderArgs(config={**SCALED, "vocab_size": 96})
    attention = None if name is None else attention_of(config_of(name))
    model = build_decoder(args, decoder_config(args)) if name is None else tiny_copy(config_of(name), attention)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert stored_dtype(tmp_path) == torch.bfloat16
    whole, later = built(tmp_path, torch.float32, attention), built(tmp_path, None, attention)
    assert {p.dtype for p in later.parameters()} == {torch.bfloat16}
    before = [(p, p.data_ptr()) for p in later.parameters()]
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        expected = whole.eval()(input_ids=ids, use_cache=False).logits
        with computing_in_float32(later.eval()):
            assert torch.equal(later(input_ids=ids, use_cache=False).logits, expected)
            assert {p.dtype for p in last_layer(later).parameters()} == {torch.bfloat16}, "a layer's turn is over"
            assert torch.equal(later(input_ids=ids, use_cache=False).logits, expected)
    assert all(p.data_ptr() == pointer for p, pointer in before), "weights are where they were"
    later.float()
    assert_same(later, whole)


def test_a_whole_model_in_half_precision_starts_as_its_values_in_float32(tmp_path):
    model, processor = make_model(SCALED)
    model.bfloat16()
    for dtype in ("float32", "bfloat16"):
        stored = copy.deepcopy(model).to(getattr(torch, dtype))
        stored.config.text_config.dtype = getattr(torch, dtype)
        stored.save_pretrained(tmp_path / dtype)
        processor.save_pretrained(tmp_path / dtype)
    expected, found = (MMPrefixModule(pretrained=str(tmp_path / dtype)) for dtype in ("float32", "bfloat16"))
    assert found.model.decoder.dtype == torch.bfloat16
    found.model.float()
    assert_same(found.model, expected.model)


@pytest.mark.parametrize("change", ["mixed", "half of torch.save", "none"])
def test_files_of_several_precisions_are_read_as_float32(tmp_path, change):
    """What is finer than the rest keeps its values, and what no mapping can be had of is read whole."""
    args = DecoderArgs(config={**TINY_DECODER, "vocab_size": 96})
    model = build_decoder(args, decoder_config(args))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.bfloat16().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    if change == "mixed":
        state["model.norm.weight"] = expected["model.norm.weight"] = torch.full([64], 1 / 3)
        save_file(state, path, {"format": "pt"})
    elif change == "half of torch.save":
        torch.save(state, tmp_path / "pytorch_model.bin")
        path.unlink()
    assert (stored_dtype(tmp_path) is None) == (change != "none")
    found = built(tmp_path, None)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16 if change == "none" else torch.float32}
    for name, value in found.state_dict().items():
        exact = expected[name] if name == "model.norm.weight" else expected[name].bfloat16().float()
        assert torch.equal(value.float(), exact), name
