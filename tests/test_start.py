"""Models that are recorded and made later are those that are made at once, bit for bit, and in little memory."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from benchmarks.start import compare, in_processes, start, strategy_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mmprefix import lazy
from mmprefix.adapters import LoraArgs
from mmprefix.decoder import DecoderArgs
from mmprefix.errors import InputError
from mmprefix.processing import TokenizerArgs
from mmprefix.training.checkpoints import CONTENT_KEY
from mmprefix.training.module import MMPrefixModule
from mmprefix.training.optim import PartArgs
from mmprefix.training.start import built_lazily
from mmprefix.vision import VisionArgs
from tests.conftest import TINY_DECODER, TINY_VISION

DECODERS = {
    "llama": TINY_DECODER,
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "mixtral": {
        **TINY_DECODER,
        "model_type": "mixtral",
        "num_local_experts": 4,
    },  # its experts are fused while it is loaded
    "gemma2": {**TINY_DECODER, "model_type": "gemma2", "head_dim": 16},  # tied
}
for name, config in DECODERS.items():
    DECODERS[name] = {**config, "model_type": name, "vocab_size": 300}


def assert_made_later(made, recorded, recording):
    """Parameters whole and from the middle on, buffers, ties, what learns; at least one that was put off."""
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in recorded.named_parameters()]
    assert any(lazy.is_lazy(p) for p in recorded.parameters()), "nothing was put off"
    for name, expected in made.named_parameters():
        found = recorded.get_parameter(name)
        assert found.requires_grad == expected.requires_grad
        assert torch.equal(recording.whole(found), expected), name
        if lazy.is_lazy(found):
            half = len(expected) // 2
            assert torch.equal(recording.rows(found, half, len(expected) - half), expected[half:]), name
    buffers = zip(made.named_buffers(), recorded.named_buffers(), strict=True)
    for (name, expected), (other, found) in buffers:
        assert name == other
        assert torch.equal(recording.whole(found), expected), name


@pytest.mark.parametrize("name", DECODERS)
def test_a_recorded_decoder_matches_one_made_at_once_from_scratch_and_from_files(name, tmp_path):
    settings = dict(DECODERS[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)

    def scratch():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), torch.get_rng_state()

    made, state = scratch()
    with lazy.Recording() as recording:
        recorded, other_state = scratch()
    assert_made_later(made, recorded, recording)
    assert torch.equal(state, other_state), "what is built behind it would begin with other numbers"
    made.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with lazy.Recording() as recording:
        recorded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_made_later(expected, recorded, recording)


@pytest.mark.parametrize("name", ["test_vit", "resnet10t", "convnext_atto"])
def test_a_recorded_encoder_matches_one_made_at_once(name):
    def scratch():
        torch.manual_seed(3)
        return timm.create_model(name, num_classes=0), torch.get_rng_state()

    made, state = scratch()
    with lazy.Recording() as recording:
        recorded, other_state = scratch()
    assert_made_later(made, recorded, recording)
    assert torch.equal(state, other_state)


def test_rows_that_are_in_a_file_are_read_alone(tmp_path):
    weights = torch.randn(64, 64, dtype=torch.float64).to(torch.bfloat16)
    safetensors.torch.save_file({"a": weights}, tmp_path / "a.safetensors")
    with lazy.Recording() as recording:
        stored = safetensors.torch.load_file(tmp_path / "a.safetensors")["a"]
        layer = nn.Linear(64, 64, bias=False)
        layer.load_state_dict({"weight": stored.float()})
    recording._make = None  # what makes a tensor whole
    assert torch.equal(recording.rows(layer.weight, 40, 5), weights[40:45].float())


def test_values_that_are_looked_at_are_made_and_small_tensors_take_them():
    with lazy.Recording() as recording:
        large = torch.arange(4096.0)
        assert lazy.is_lazy(large)
        assert large.sum().item() == 4096 * 4095 / 2
        small = torch.zeros(4)
        small.copy_(large[10:14])
        large.add_(1)
    assert small.tolist() == [10, 11, 12, 13]
    assert torch.equal(recording.whole(large), torch.arange(4096.0) + 1)


def test_a_tensor_that_was_changed_after_it_was_recorded_is_an_error():
    constant = torch.zeros(4096)
    with lazy.Recording() as recording:
        doubled = constant * 2
        constant.add_(1)
    with pytest.raises(RuntimeError, match="was written to after its values were recorded"):
        recording.whole(doubled)


def test_what_cannot_be_followed_is_made_at_once_with_the_same_numbers(caplog):
    def build():
        layer = nn.Linear(64, 64)
        layer.seen = np.asarray(layer.weight.detach().numpy()).sum()
        return layer

    torch.manual_seed(0)
    expected = build()
    torch.manual_seed(0)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        found, recording = built_lazily(build)
    assert recording is None
    assert torch.equal(found.weight, expected.weight)
    assert "each process makes the whole model" in caplog.text


def settings_of(folder):
    """Starts of all kinds, each with adapters or without."""
    scratch = {"vision": TINY_VISION, "tokenizer": TokenizerArgs(name="byte")}
    lora = {
        "train_decoder": PartArgs(lora=LoraArgs(rank=3, use_dora=True)),
        "train_vision": PartArgs(lora=LoraArgs(rank=2)),
    }
    named = {name: DecoderArgs(name=str(folder / name)) for name in ("mixtral", "gemma2")}
    weights = VisionArgs("test_vit", image_size=32, pretrained=str(folder / "vit.safetensors"))
    return {
        "scratch": {**scratch, "decoder": DecoderArgs(config=TINY_DECODER), **lora},
        "buffers": {**scratch, "decoder": DecoderArgs(config=dict(DECODERS["gpt_neo"]))},
        "folder": {**scratch, "vision": weights, "decoder": named["mixtral"]},
        "tied": {**scratch, "decoder": named["gemma2"], "train_decoder": PartArgs(freeze=True)},
        "pretrained": {"pretrained": str(folder / "model"), **lora},
        "file": {"pretrained": str(folder / "a.ckpt")},
    }  # fmt: skip


def content_of(module, weights):
    buffers = {name: buffer.clone() for name, buffer in module.model.named_buffers()}
    config = module.model.config
    found = config.label_only, config.logit_transform, config.shared_prefix, config.mask_free
    return {**{n: v.clone() for n, v in weights.items()}, **buffers}, found, torch.get_rng_state()


def started(rank, processes, settings, path):
    strategy = strategy_of(rank, processes)
    for name, arguments in settings.items():
        torch.manual_seed(1)
        module = start(strategy, meta_start=True, **arguments)
        state = torch.get_rng_state()
        trained = {n for n, p in module.model.named_parameters() if p.requires_grad}
        content, found, _ = content_of(module, strategy.whole_state(module.model))
        if rank == 0:
            torch.save((content, found, state, trained), path / f"{name}.pt")
    return True


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for name, dtype in (("mixtral", torch.bfloat16), ("gemma2", torch.float32)):
        torch.manual_seed(2)
        settings = dict(DECODERS[name])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        decoder = AutoModelForCausalLM.from_config(config, dtype=dtype)
        decoder.save_pretrained(folder / name, max_shard_size="40KB")
    vit = timm.create_model("test_vit", num_classes=0, img_size=32)
    safetensors.torch.save_file(vit.state_dict(), folder / "vit.safetensors")
    module = MMPrefixModule(**settings_of(folder)["folder"])
    module.model.save_pretrained(folder / "model", max_shard_size="50KB")
    module.processor.save_pretrained(folder / "model")
    adapted = MMPrefixModule(**settings_of(folder)["scratch"])
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    checkpoint = {"state_dict": adapted.state_dict(), "global_step": 0}
    adapted.on_save_checkpoint(checkpoint)
    assert checkpoint[CONTENT_KEY]["adapters"], "they are merged when it is loaded"
    torch.save(checkpoint, folder / "a.ckpt")
    return folder


def test_shares_of_two_processes_match_a_model_made_at_once(parts, tmp_path):
    """Weights, adapters, buffers, what the decoder is found to be, what learns, and the generator behind it."""
    settings = settings_of(parts)
    expected = {}
    for name, arguments in settings.items():
        torch.manual_seed(1)
        module = MMPrefixModule(**arguments)
        trained = {n for n, p in module.model.named_parameters() if p.requires_grad}
        expected[name] = *content_of(module, module.model.state_dict()), trained
    assert all(in_processes(2, started, settings, tmp_path))
    for name, (content, found, state, trained) in expected.items():
        other, other_found, other_state, other_trained = torch.load(tmp_path / f"{name}.pt")
        assert other.keys() == content.keys()
        for key, value in content.items():
            assert other[key].dtype == value.dtype
            assert torch.equal(other[key], value), f"{name}: {key}"
        assert other_found == found, name
        assert torch.equal(other_state, state), name
        assert other_trained == trained, name


@pytest.mark.parametrize("name", ["scratch", "tied"])
def test_weights_that_were_put_off_for_another_strategy_match_too(parts, name):
    arguments = settings_of(parts)[name]
    torch.manual_seed(1)
    expected = MMPrefixModule(**arguments)
    torch.manual_seed(1)
    module = MMPrefixModule(**arguments, meta_start=True)
    assert all(p.is_meta for p in module.parameters())
    assert module.feature_key().hash == expected.feature_key().hash
    module._trainer = SimpleNamespace(strategy=None)
    module.configure_model()
    ties = [{n: id(p) for n, p in m.named_parameters(remove_duplicate=False)} for m in (expected, module)]
    for shared in ({n for n in ids if list(ids.values()).count(ids[n]) > 1} for ids in ties):
        assert bool(shared) == (name == "tied")
    for key, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key
    assert module.model.config.to_dict() == expected.model.config.to_dict()


def failed(rank, processes, settings):
    strategy = strategy_of(rank, processes)
    messages = []
    for arguments in settings:
        try:
            module = MMPrefixModule(meta_start=True, **arguments)
            if rank == 1:
                module._deferred.fill = unreadable
            module._trainer = SimpleNamespace(strategy=strategy)
            module.configure_model()
        except InputError as error:
            messages.append(str(error))
    return messages


def unreadable(targets):
    raise OSError("the disk has gone")


def test_a_process_that_cannot_read_its_share_ends_all_with_one_line(parts, tmp_path):
    shutil.copytree(parts / "model", tmp_path / "lacking")
    index = tmp_path / "lacking" / "model.safetensors.index.json"
    file = sorted(tmp_path.glob("lacking/model-0*.safetensors"))[2]
    tensors = safetensors.torch.load_file(file)
    lost = sorted(tensors)[0]
    safetensors.torch.save_file(tensors | {lost: tensors[lost][:-1].clone()}, file, {"format": "pt"})
    assert index.is_file()
    settings = [{"pretrained": str(parts / "model")}, {"pretrained": str(tmp_path / "lacking")}]
    with pytest.raises(InputError) as at_once:
        MMPrefixModule(**settings[1])
    first, second = in_processes(2, failed, settings)
    assert first == ["rank 1: cannot make its share of the model: OSError: the disk has gone", str(at_once.value)]
    assert second == ["", str(at_once.value)]
    assert "1 misshapen" in str(at_once.value)


def test_a_start_needs_no_more_than_a_file_above_the_share():
    """400 MB of random weights in nine files: resident memory of each process."""
    found = compare(1024, 8, (2,))
    whole, share = found["rows"]
    assert len(found["files"]) >= 8
    assert whole["above_share"] > 3 * found["files"][0], "the measure sees a whole model"
    assert share["above_share"] <= found["files"][0]
