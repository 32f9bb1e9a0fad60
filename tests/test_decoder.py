import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BertConfig, masking_utils

from mmprefix import attention
from mmprefix import decoder as decoder_module
from mmprefix.attention import prefix_plan
from mmprefix.decoder import DecoderArgs, build_decoder, decoder_config, install, uninstall
from mmprefix.errors import InputError
from mmprefix.packing import PrefixPlan
from mmprefix.probe import check_prefix_lm
from tests.conftest import make_model

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
ARCHITECTURES = {
    "llama": SMALL,
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3},
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "word_embed_proj_dim": 32},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "max_position_embeddings": 64,
                "attention_types": [[["global", "local"], 1]], "window_size": 3, "intermediate_size": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
}  # fmt: skip


def small(model_type, **kwargs):
    args = DecoderArgs(
        config={"model_type": model_type, "bos_token_id": 1, "eos_token_id": 2, **ARCHITECTURES[model_type]}, **kwargs
    )
    torch.manual_seed(0)
    return install(build_decoder(args, decoder_config(args))).eval()


def logits_under_plan(decoder, ids, prefix=4):
    is_target = torch.arange(ids.shape[1]).expand_as(ids) >= prefix
    plan = PrefixPlan.from_prompt(torch.ones_like(ids), torch.zeros_like(is_target), is_target)
    with prefix_plan(plan):
        return decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


IDS = torch.arange(4, 16).unsqueeze(0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures_obey(model_type):
    check_prefix_lm(small(model_type))


def test_eager_attention_obeys_too():
    check_prefix_lm(small("llama", attn_implementation="eager"))


def test_a_plan_that_nobody_follows_is_an_error():
    decoder = small("llama")
    attention.unregister_masks()
    try:
        with pytest.raises(RuntimeError, match="call install"):
            check_prefix_lm(decoder)
    finally:
        attention.register_masks()


def test_a_decoder_that_leaks_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "prefix_lm_visible", lambda q, k, visibility, own: torch.ones_like(own))
    with pytest.raises(InputError, match="LlamaForCausalLM can't be a prefix LM: target token . leaks into"):
        check_prefix_lm(small("llama"))


@pytest.mark.parametrize("model_type", ["mistral", "gpt_neo", "gemma2"])
def test_without_a_plan_nothing_changes(model_type):
    decoder = small(model_type)
    with torch.no_grad():
        ours = decoder(input_ids=IDS).logits
        logits_under_plan(decoder, IDS)
        after = decoder(input_ids=IDS).logits
        uninstall(decoder)
        native = decoder(input_ids=IDS).logits
    assert torch.equal(ours, native)
    assert torch.equal(after, native), "also after a pass under a plan"


def test_installing_twice_is_installing_once_and_the_last_one_out_takes_all_back():
    native = {name: masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name] for name in attention.DENSE_IMPLEMENTATIONS}
    native = {name: getattr(function, "library_function", function) for name, function in native.items()}
    first, second = small("llama"), small("gpt_neo")
    install(first)
    assert len(first.get_output_embeddings()._forward_pre_hooks) == 1
    logits_under_plan(second, IDS)
    for decoder in list(decoder_module._installed):
        if decoder not in (first, second):
            uninstall(decoder)
    uninstall(first)
    assert attention.masks_registered(), "the second still needs them"
    assert not any(module._forward_pre_hooks for module in first.modules())
    uninstall(second)
    assert {name: masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name] for name in native} == native
    assert not any(module._forward_pre_hooks for module in second.modules())
    bias = second.transformer.h[0].attn.attention.bias
    assert torch.equal(bias, bias.tril())


def test_copies_and_pickles_of_a_model_install_themselves():
    import copy
    import pickle

    model = make_model()[0]
    ids = torch.arange(10, 20).unsqueeze(0)
    types = (torch.arange(10) >= 5).long().unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids, token_type_ids=types).logits
        again = copy.deepcopy(model)
        for decoder in list(decoder_module._installed):
            if decoder is not again.decoder:
                uninstall(decoder)
        assert torch.equal(again(input_ids=ids, token_type_ids=types).logits, expected)
        content = pickle.dumps(again)
        uninstall(again.decoder)
        assert not attention.masks_registered()
        assert torch.equal(pickle.loads(content)(input_ids=ids, token_type_ids=types).logits, expected)
    install(model.decoder)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_peft_wrapped_decoders_follow_the_plan(modules_to_save):
    peft = pytest.importorskip("peft")
    decoder = small("llama")
    with torch.no_grad():
        expected = logits_under_plan(decoder, IDS)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=modules_to_save, init_lora_weights=True
    )
    wrapped = install(peft.get_peft_model(decoder, config))
    torch.testing.assert_close(logits_under_plan(wrapped, IDS).detach(), expected)  # fresh adapters add nothing
    plan = PrefixPlan.from_prompt(
        torch.ones_like(IDS), torch.zeros_like(IDS).bool(), torch.arange(12).unsqueeze(0) >= 4
    )
    plan = replace(plan, label_positions=torch.tensor([3, 4, 7]))
    with prefix_plan(plan):
        picked = wrapped(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    torch.testing.assert_close(picked[0].detach(), expected[0, [3, 4, 7]])
    picked.sum().backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_B" in n)


def test_bfloat16_does_not_leak():
    decoder = small("gemma2").bfloat16()
    ids = IDS.repeat(2, 1)
    ids[1, -1] = 33
    with torch.no_grad():
        logits = logits_under_plan(decoder, ids)
    assert torch.equal(logits[0, :-1], logits[1, :-1])
    assert not torch.equal(logits[0, -1], logits[1, -1])


@pytest.mark.parametrize("model_type", ["mistral", "gpt2"])
def test_compiled_decoder_matches(model_type):
    decoder = small(model_type)
    expected = logits_under_plan(decoder, IDS).detach()
    decoder.compile(backend="aot_eager")
    torch.testing.assert_close(logits_under_plan(decoder, IDS).detach(), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(decoder(input_ids=IDS).logits, uninstall(decoder)(input_ids=IDS).logits)


def test_the_plan_ends_with_its_block():
    attention.register_masks()
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


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_dense_mask_is_refused_by_name(implementation):
    hint = ", which drops the bidirectional prefix silently" if "flash" in implementation else ""
    with pytest.raises(InputError, match=f"expected one of sdpa, eager, got {implementation}{hint}$"):
        small("llama", attn_implementation=implementation)


@pytest.mark.parametrize(
    ("config", "architectures", "message"),
    [
        (BartConfig, ["BartForConditionalGeneration"], "got 'bart', an encoder-decoder"),
        (BertConfig, ["BertForMaskedLM"], "got BertForMaskedLM, a masked LM"),
    ],
)
def test_other_kinds_of_models_are_refused_by_name(config, architectures, message, tmp_path):
    config(architectures=architectures).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        decoder_config(DecoderArgs(name=str(tmp_path)))


def test_code_of_a_checkpoint_runs_only_when_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"},
    }))  # fmt: skip
    marker = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    with pytest.raises(InputError, match="needs Python code .* model.decoder.trust_remote_code: true"):
        decoder_config(DecoderArgs(name=str(tmp_path)))
    assert not marker.exists()
    assert decoder_config(DecoderArgs(name=str(tmp_path), trust_remote_code=True)).model_type == "mine"
    assert marker.exists()


def test_weights_that_are_not_exactly_the_models_are_refused_and_listed(tmp_path):
    decoder = small("llama")
    decoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    args = DecoderArgs(name=str(tmp_path))

    def rejected(**changes):
        save_file({k: v for k, v in {**weights, **changes}.items() if v is not None}, tmp_path / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        with pytest.raises(InputError) as caught:
            build_decoder(args, decoder_config(args))
        return str(caught.value)

    name = "model.layers.1.mlp.up_proj.weight"
    assert rejected(**{name: None}).endswith(f"expected exactly the tensors of the model, got 1 missing: {name}")
    assert rejected(extra=torch.ones(2)).endswith("got 1 left over: extra")
    assert name in rejected(**{name: torch.ones(3, 3)})


def test_multimodal_checkpoints_are_refused_by_name(tmp_path):
    from transformers import Gemma3Config

    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a text-only decoder, got .* 'gemma3' has a vision part of its own"):
        decoder_config(DecoderArgs(name=str(tmp_path)))


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
