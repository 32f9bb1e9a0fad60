import pytest
import torch
from transformers import masking_utils

from mmprefix import attention
from mmprefix.attention import prefix_plan
from mmprefix.decoder import DecoderArgs, build_decoder, can_share_prefix, check_prefix_lm, decoder_config, install
from mmprefix.errors import InputError
from mmprefix.packing import PrefixPlan

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
ARCHITECTURES = {
    "llama": SMALL,
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3},
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
}  # fmt: skip


def small(model_type, **kwargs):
    args = DecoderArgs(
        config={"model_type": model_type, "bos_token_id": 1, "eos_token_id": 2, **ARCHITECTURES[model_type]}, **kwargs
    )
    torch.manual_seed(0)
    return install(build_decoder(args, decoder_config(args))).eval()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures_obey(model_type):
    check_prefix_lm(small(model_type))


def test_eager_attention_obeys_too():
    check_prefix_lm(small("llama", attn_implementation="eager"))


def test_a_decoder_that_ignores_the_plan_is_refused():
    decoder = small("llama")
    attention.unregister_masks()
    try:
        with pytest.raises(InputError, match="LlamaForCausalLM can't be a prefix LM: its prefix stays causal"):
            check_prefix_lm(decoder)
    finally:
        attention.register_masks()


def test_a_decoder_that_leaks_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "prefix_lm_visible", lambda q, k, visibility, own: torch.ones_like(own))
    with pytest.raises(InputError, match="LlamaForCausalLM is no causal LM: a target token leaks"):
        check_prefix_lm(small("llama"))


def test_without_a_plan_nothing_changes():
    decoder = small("mistral")
    ids = torch.arange(4, 16).unsqueeze(0)
    with torch.no_grad():
        ours = decoder(input_ids=ids).logits
    attention.unregister_masks()
    try:
        with torch.no_grad():
            native = decoder(input_ids=ids).logits
    finally:
        attention.register_masks()
    assert torch.equal(ours, native)


def test_registration_is_idempotent_and_undone():
    install(small("llama"))
    install(small("llama"))
    wrapped = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    attention.unregister_masks()
    try:
        assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is wrapped.library_mask
    finally:
        attention.register_masks()


def test_the_plan_ends_with_its_block():
    plan = PrefixPlan.from_prompt(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert attention.current_plan() is None
    with pytest.raises(KeyError), prefix_plan(plan):
        assert attention.current_plan() is plan
        raise KeyError
    assert attention.current_plan() is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (DecoderArgs(), "expected exactly one of `name` and `config`, got neither"),
        (DecoderArgs(name="x", config={}), "got both"),
        (DecoderArgs(name="/nowhere/model"), "cannot read the config of '/nowhere/model'"),
        (DecoderArgs(config={"model_type": "t5"}), "expected a causal LM of transformers, got model type 't5'"),
        (DecoderArgs(config={"model_type": "no_such_thing"}), "got model type 'no_such_thing'"),
    ],
)
def test_what_is_no_causal_lm_is_refused(args, message):
    with pytest.raises(InputError, match=message):
        decoder_config(args)


def test_multimodal_checkpoints_are_refused_by_name(tmp_path):
    from transformers import Gemma3Config

    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a text-only decoder, got .* 'gemma3' has a vision part of its own"):
        decoder_config(DecoderArgs(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("model_type", "shares"), [*((m, True) for m in ARCHITECTURES if m != "bloom"), ("bloom", False)]
)
def test_which_decoders_can_share_a_prefix(model_type, shares):
    assert can_share_prefix(small(model_type)) == shares


def test_local_folder_is_loaded_with_its_weights(tmp_path):
    decoder = small("llama")
    decoder.save_pretrained(tmp_path)
    args = DecoderArgs(name=str(tmp_path))
    loaded = build_decoder(args, decoder_config(args))
    for name, value in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    fresh = DecoderArgs(name=str(tmp_path), pretrained=False)
    other = build_decoder(fresh, decoder_config(fresh))
    assert not torch.equal(other.model.embed_tokens.weight, decoder.model.embed_tokens.weight)


def test_no_row_of_the_mask_is_empty():
    """Some attention kernels give NaN for a row without any key; padding therefore sees itself, and nothing else."""
    padding = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    plan = PrefixPlan.from_prompt(padding, torch.zeros(2, 5, dtype=torch.bool))
    attention.register_masks()
    with prefix_plan(plan):
        mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            batch_size=2, q_length=5, kv_length=5, attention_mask=padding.bool()
        )
    assert mask.shape == (2, 1, 5, 5)
    assert mask.any(-1).all()
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert mask[1].all()
