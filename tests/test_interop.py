"""PaliGemma in and out against transformers' own, and folders that transformers loads."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, GemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
from transformers.models.paligemma import modeling_paligemma

from mmprefix.cli import run
from mmprefix.interop.export import export, write_pretrained
from mmprefix.interop.paligemma import export_paligemma, import_paligemma, siglip_to_timm, timm_to_siglip
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.processing import MMPrefixProcessor
from mmprefix.training.checkpoints import load_model, newest_checkpoint
from mmprefix.vision import ConnectorArgs
from tests.conftest import make_model
from tests.paligemma import save_paligemma

PROMPTS = ["caption en", "what is this then?"]
SUFFIXES = ["a temple by a lake", "yes"]


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_paligemma(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def theirs(source):
    model = PaliGemmaForConditionalGeneration.from_pretrained(source, attn_implementation="eager").eval()
    return model, PaliGemmaProcessor.from_pretrained(source)


@pytest.fixture(scope="module")
def ours(source):
    model, processor = import_paligemma(str(source))
    return model.eval(), processor


def their_inputs(processor, photos, suffix=None, side="left"):
    prompts = [f"<image>{prompt}" for prompt in PROMPTS]
    kwargs = {"padding": True, "padding_side": side, "return_tensors": "pt"}
    return processor(images=photos[:2], text=prompts, **({"suffix": suffix} if suffix else {}), **kwargs)


def test_same_tokens_masks_and_labels(theirs, ours, photos):
    """Their processor is the reference for the prompt's format; pictures differ by the rounding of the resizing."""
    expected = their_inputs(theirs[1], photos, SUFFIXES, "right")
    found = ours[1](photos[:2], PROMPTS, SUFFIXES)
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        assert torch.equal(found[name], expected[name]), name
    assert (found["pixel_values"] - expected["pixel_values"]).abs().max() <= 2 / 255 + 1e-6
    prompt = ours[1](photos[:2], PROMPTS)
    assert torch.equal(prompt["input_ids"], their_inputs(theirs[1], photos)["input_ids"])


def test_logits_loss_and_gradients_match(theirs, ours, photos):
    inputs = their_inputs(theirs[1], photos, SUFFIXES, "right")
    real = inputs["attention_mask"].bool()
    losses, gradients, logits = [], [], []
    for model, _ in (theirs, ours):
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        losses.append(output.loss.detach())
        logits.append(output.logits.detach())
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    cap = ours[0].decoder.config.to_dict().get("final_logit_softcapping")
    if cap is not None and "softcap" not in Path(modeling_paligemma.__file__).read_text():
        # Before 5.23, transformers' PaliGemma 2 forgets Gemma 2's cap on its logits; its decoder alone has it.
        logits[0] = cap * torch.tanh(logits[0] / cap)
        shifted = torch.nn.functional.cross_entropy(logits[0][:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        losses[0] = shifted
    else:
        assert (gradients[0] - gradients[1]).abs().max() <= 1e-5
    assert (logits[0] - logits[1])[real].abs().max() <= 1e-5
    assert abs(losses[0] - losses[1]) <= 1e-5
    causal = ours[0](**{**inputs, "token_type_ids": None, "labels": None}).logits
    assert (causal - logits[1])[real].abs().max() > 1e-3, "the mask must matter"


def test_round_trip_of_every_tensor_is_bit_equal(source, ours, tmp_path):
    write_pretrained(tmp_path / "ours", *ours)
    export(tmp_path / "ours", "paligemma", tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert len(before) > 60
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    for part in ("text_config", "vision_config"):
        for config in configs:
            config[part].pop("dtype", None)
    differing = {
        k for k in configs[0]["text_config"] if configs[0]["text_config"][k] != configs[1]["text_config"].get(k)
    }
    assert differing <= {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}, differing
    assert all(configs[1]["vision_config"][k] == v for k, v in configs[0]["vision_config"].items())


def test_exported_generates_the_same_20_tokens(ours, photos, tmp_path):
    """Greedy, prompts of two lengths in one batch, with and without a cache, static and dynamic."""
    model, processor = ours
    parts = export_paligemma(model, processor)
    write_pretrained(tmp_path / "back", *parts)
    exported = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    their_processor = PaliGemmaProcessor.from_pretrained(tmp_path / "back")
    inputs = their_inputs(their_processor, photos)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 2
    width = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = exported.generate(**inputs, **settings)[:, width:]
    assert expected.shape == (2, 20)
    assert len(expected.unique()) > 8, "the tokens must vary"
    inputs.pop("token_type_ids")
    for kwargs in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(**inputs, **settings, **kwargs)[:, width:], expected)
    with torch.no_grad():
        batch = their_inputs(their_processor, photos, SUFFIXES, "right")
        cap = {"gemma2": 15.0}.get(model.decoder.config.model_type)
        logits = exported(**batch).logits
        if cap is not None and "softcap" not in Path(modeling_paligemma.__file__).read_text():
            logits = cap * torch.tanh(logits / cap)
        real = batch["attention_mask"].bool()
        assert (logits - model(**batch).logits)[real].abs().max() <= 1e-5


def test_dtype_generation_settings_and_sharding_travel_along(tmp_path):
    save_paligemma(tmp_path / "source", dtype=torch.bfloat16)
    template = "{{ messages[0]['content'][1]['text'] }}"
    processor = PaliGemmaProcessor.from_pretrained(tmp_path / "source")
    processor.chat_template = template
    processor.save_pretrained(tmp_path / "source")
    config = tmp_path / "source" / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_beams": 2, "max_new_tokens": 7}))
    model, processor = import_paligemma(str(tmp_path / "source"))
    assert model.dtype == torch.bfloat16
    write_pretrained(tmp_path / "ours", model, processor, max_shard_size="100KB")
    again, loaded = load_model(tmp_path / "ours")
    assert (loaded.chat_template, loaded.separator) == (template, "\n")
    assert again.dtype == torch.bfloat16
    assert (again.generation_config.num_beams, again.generation_config.max_new_tokens) == (2, 7)
    export(tmp_path / "ours", "paligemma", tmp_path / "back", max_shard_size="100KB")
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert not list((tmp_path / "back").glob("*.bin"))
    before = load_file(tmp_path / "source" / "model.safetensors")
    after = {k: v for shard in shards for k, v in load_file(shard).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert PaliGemmaProcessor.from_pretrained(tmp_path / "back").chat_template == template
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert (generation["num_beams"], generation["max_new_tokens"]) == (2, 7)


def test_images_that_fill_the_window_are_announced():
    from mmprefix.interop.paligemma import _warn_of_window

    with pytest.warns(UserWarning, match="4096 image tokens and text don't fit the decoder's window of 4096"):
        _warn_of_window(Gemma2Config(), 4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_window(Gemma2Config(), 1024)
        _warn_of_window(GemmaConfig(), 4096)


def test_published_encoder_has_its_timm_name():
    from transformers import SiglipVisionConfig

    from mmprefix.interop.paligemma import _vision_spec

    for size, tokens in ((224, 256), (448, 1024), (896, 4096)):
        spec, _ = _vision_spec(SiglipVisionConfig(
            hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, patch_size=14,
            image_size=size,
        ), "x")  # fmt: skip
        assert spec.name == f"vit_so400m_patch14_siglip_gap_{size}"
        assert (spec.num_tokens, spec.width) == (tokens, 1152)
        assert spec.kwargs == {"act_layer": "gelu_tanh"}


def test_query_key_and_value_are_joined_in_this_order():
    state = {f"vision_model.encoder.layers.0.{m}.{k}": torch.zeros(1) for k in ("weight", "bias")
             for m in ("layer_norm1", "layer_norm2", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    state |= {f"vision_model.encoder.layers.0.self_attn.{p}_proj.{k}": torch.full((1,), n)
              for n, p in enumerate("qkv") for k in ("weight", "bias")}  # fmt: skip
    state |= {f"vision_model.{m}": torch.zeros(1, 1) for m in (
        "embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias", "embeddings.position_embedding.weight",
        "post_layernorm.weight", "post_layernorm.bias")}  # fmt: skip
    ours = siglip_to_timm(state)
    assert ours["blocks.0.attn.qkv.weight"].tolist() == [0, 1, 2]
    back = timm_to_siglip(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_other_image_sizes_interpolate_on_request(source, photos):
    model, processor = import_paligemma(str(source), image_size=84)
    assert model.num_image_tokens == processor.num_image_tokens == 36
    inputs = processor(photos[:2], PROMPTS)
    assert inputs["pixel_values"].shape[-2:] == (84, 84)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "{source}", "--out", "{full}"], "--out: expected a new or empty folder, {full} holds something"),
        (["--from", "{llama}", "--out", "{out}"], "expected a PaliGemma checkpoint, got model type 'llama'"),
        (["--from", "{full}", "--out", "{out}"], "cannot read its config"),
        (
            ["--from", "{source}", "--out", "{out}", "--image_size", "60"],
            "--image_size 60: model.vision.image_size: vit_base_patch16_siglip_gap_224 takes multiples of its patch size 14, got 60x60; the nearest are 56 and 70",
        ),
        (["--from", "{missing}", "--out", "{out}"], "1 missing: lm_head.bias_that_is_not"),
        (["--from", "{source}"], "the following arguments are required: --out"),
        (
            ["--from", "{source}", "--out", "{out}", "--form", "x"],
            "unrecognized arguments: --form; did you mean --from?",
        ),
    ],
)
def test_import_says_what_is_wrong(arguments, message, source, tmp_path, capfd):
    from transformers import LlamaConfig

    paths = {name: tmp_path / name for name in ("full", "llama", "out", "missing")} | {"source": source}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    save_paligemma(tmp_path / "missing")
    weights = load_file(tmp_path / "missing" / "model.safetensors")
    removed = sorted(weights)[-1]
    del weights[removed]
    save_file(weights, tmp_path / "missing" / "model.safetensors", metadata={"format": "pt"})
    message = message.format(**paths).replace("lm_head.bias_that_is_not", "model.")
    assert run(["import-paligemma", *(a.format(**paths) for a in arguments)]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_tokenizer_that_does_not_fit_is_refused(tmp_path, capfd):
    save_paligemma(tmp_path / "source")
    processor = PaliGemmaProcessor.from_pretrained(tmp_path / "source")
    processor.tokenizer.add_tokens([f"<new{n}>" for n in range(50)])
    processor.save_pretrained(tmp_path / "source")
    assert run(["import-paligemma", "--from", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert "expected a tokenizer of at most" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "expected a Gemma or Gemma 2 decoder, got llama"),
        ({"decoder": {"model_type": "gemma", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                      "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}},
         r"expected a SigLIP encoder \(vit_\*_siglip_gap_\*\), got test_vit \(cls_token"),
        ({"decoder": {"model_type": "gemma", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                      "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
          "connector": ConnectorArgs("mlp")}, "expected a linear connector, got mlp"),
        ({"decoder": {"model_type": "gemma", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                      "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
          "visibility": "nested"}, "expected prefix_visibility full, got nested"),
    ],
)  # fmt: skip
def test_models_that_are_no_paligemma_export_as_transformers_only(changes, message):
    with pytest.raises(ValueError, match=f"{message}.*--format transformers takes any model"):
        export_paligemma(*make_model(**changes))


def test_transformers_folder_loads_in_a_process_that_only_imports_mmprefix(photos, tmp_path):
    """Auto classes and the pipeline, and the prompt's format travels along."""
    model, processor = make_model()
    write_pretrained(tmp_path / "saved", model, processor)
    assert (
        run(
            [
                "export",
                "--checkpoint",
                str(tmp_path / "saved"),
                "--format",
                "transformers",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    photos[0].save(tmp_path / "photo.png")
    code = (
        "import sys, mmprefix\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline\n"
        "folder, image = sys.argv[1], Image.open(sys.argv[2])\n"
        "pipe = pipeline('image-text-to-text', model=folder)\n"
        "answers = pipe(images=[image, image], text=['what?', 'which of them?'], max_new_tokens=4, return_full_text=False)\n"
        "model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)\n"
        "inputs = processor(images=image, text='what?')\n"
        "ids = model.generate(**inputs, max_new_tokens=4)[:, inputs['input_ids'].shape[1]:]\n"
        "print(repr([a['generated_text'] for a in answers])); print(repr(processor.tokenizer.decode(ids[0], skip_special_tokens=True)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "photo.png")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers, single = done.stdout.strip().splitlines()
    inputs = processor(photos[0], "what?")
    expected = processor.decode_generated(
        model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    )[0]
    assert expected.strip() == eval(single).strip()
    assert len(eval(answers)) == 2
    assert eval(answers)[0].strip() == expected.strip()


def test_interrupted_export_leaves_nothing(tmp_path, monkeypatch, capfd):
    model, processor = make_model()
    write_pretrained(tmp_path / "saved", model, processor)

    def full_disk(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MMPrefixProcessor, "save_pretrained", full_disk)
    status = run(
        ["export", "--checkpoint", str(tmp_path / "saved"), "--format", "transformers", "--out", str(tmp_path / "out")]
    )
    assert status == 1
    assert "No space left on device" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_folders_of_other_models_are_refused(source, capfd, tmp_path):
    assert run(["export", "--checkpoint", str(source), "--format", "transformers", "--out", str(tmp_path / "out")]) == 2
    assert "got model type 'paligemma': import it with `import-paligemma` first" in capfd.readouterr().err


def test_saved_weights_that_miss_a_tensor_are_refused(tmp_path, capfd):
    write_pretrained(tmp_path / "saved", *make_model())
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    del weights["connector.weight"]
    save_file(weights, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    assert (
        run(
            [
                "export",
                "--checkpoint",
                str(tmp_path / "saved"),
                "--format",
                "transformers",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "got 1 missing: connector.weight" in capfd.readouterr().err
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert "connector.bias" in file.keys()  # noqa: SIM118


def test_images_are_encoded_once_for_all_beams(photos):
    model, processor = make_model()
    inputs = processor(photos[:2], ["what?", "which of them?"])
    seen = []
    handle = model.vision.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    output = model.generate(**inputs, max_new_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False)
    handle.remove()
    assert seen == [2]
    assert output.shape[0] == 4
    same_length = processor(photos[:2], ["what?", "when?"])
    image = torch.full((2, 4), model.config.image_token_id)
    two_images = torch.cat([image, same_length["input_ids"]], 1)
    mask = torch.ones_like(two_images)
    pixels = inputs["pixel_values"][[0, 1, 1, 0]]
    prefills = []
    handle = model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: prefills.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    prompts = {"input_ids": two_images, "attention_mask": mask, "pixel_values": pixels}
    for num_beams in (1, 3):
        model.generate(**prompts, max_new_tokens=1, num_beams=num_beams, do_sample=False)
    handle.remove()
    assert prefills[1].shape[0] == 6
    assert torch.equal(prefills[1], prefills[0].repeat_interleave(3, 0)), "beams keep their own images"
    with pytest.raises(ValueError, match="got 3 images of 4 tokens for prompts with"):
        model.generate(**{**inputs, "pixel_values": inputs["pixel_values"][[0, 1, 1]]}, max_new_tokens=3)
    assert isinstance(model, MMPrefixForConditionalGeneration)


def test_probe_command_prints_the_table(tmp_path, capfd):
    from transformers import BertConfig, MistralConfig

    MistralConfig().save_pretrained(tmp_path / "mistral")
    assert run(["probe", "--decoder", str(tmp_path / "mistral")]) == 0
    out = capfd.readouterr().out
    assert out.startswith("MistralForCausalLM (mistral, sdpa), layers: attention, sliding window 3\n")
    assert "6 cached decoding equals the full forward" in out
    assert out.endswith("MistralForCausalLM: an exact prefix LM\n")
    BertConfig().save_pretrained(tmp_path / "bert")
    assert run(["probe", "--decoder", str(tmp_path / "bert")]) == 1
    assert "can't be a prefix LM: property 1" in capfd.readouterr().out
    assert run(["probe", "--decoder", str(tmp_path / "mistral"), "--attn_implementation", "flash_attention_2"]) == 2
    assert "got flash_attention_2, which drops the bidirectional prefix silently" in capfd.readouterr().err


def test_imported_trained_and_exported_is_what_was_trained(colour_shards, tmp_path, photos, capfd):
    """From half-precision weights: training in float32 must not be rounded away on any way out."""
    save_paligemma(tmp_path / "source", "gemma2", dtype=torch.bfloat16)
    assert run(["import-paligemma", "--from", str(tmp_path / "source"), "--out", str(tmp_path / "ours")]) == 0
    shards = colour_shards()
    config = {
        "model": {"pretrained": str(tmp_path / "ours"), "optimizer": {"lr": 1e-3}},
        "data": {
            "train": str(shards / "train-*.tar"), "val": str(shards / "val-*.tar"), "batch_size": 6, "num_workers": 0,
            "max_target_tokens": 16,
        },
        "trainer": {
            "max_steps": 2, "accelerator": "cpu", "default_root_dir": str(tmp_path / "run"),
            "enable_progress_bar": False, "enable_model_summary": False,
        },
    }  # fmt: skip
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    assert run(["fit", "--config", str(tmp_path / "fit.yaml")]) == 0, capfd.readouterr().err
    checkpoint = newest_checkpoint(tmp_path / "run")
    trained = {k.removeprefix("model."): v for k, v in torch.load(checkpoint, weights_only=True)["state_dict"].items()}
    before = load_model(tmp_path / "ours")[0].state_dict()
    assert all(v.dtype == torch.float32 for v in trained.values())
    assert not any(torch.equal(v, before[k].float()) for k, v in trained.items() if "weight" in k), "all of it trains"
    for number, source in enumerate((checkpoint, tmp_path / "run")):
        model, _ = load_model(source)
        assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())
        assert model.generation_config.max_new_tokens == 20
        assert model.config.text_config.dtype == torch.float32
        for form in ("transformers", "paligemma"):
            out = tmp_path / f"{form}-{number}"
            assert run(["export", "--checkpoint", str(source), "--format", form, "--out", str(out)]) == 0
        again, _ = load_model(tmp_path / f"transformers-{number}")
        assert all(torch.equal(v, trained[k]) for k, v in again.state_dict().items())
        theirs = PaliGemmaForConditionalGeneration.from_pretrained(out, attn_implementation="eager").eval()
        assert theirs.dtype == torch.float32
        inputs = their_inputs(PaliGemmaProcessor.from_pretrained(out), photos)
        settings = {"max_new_tokens": 8, "do_sample": False}
        expected = theirs.generate(**inputs, **settings)
        inputs.pop("token_type_ids")
        assert torch.equal(again.generate(**inputs, **settings), expected)
    # Straight from the checkpoint's file: the same folder, in pieces.
    for source, size in ((checkpoint, "5GB"), (tmp_path / "run", "100KB")):
        pieces = tmp_path / f"pieces-{size}"
        arguments = ["consolidate", "--checkpoint", str(source), "--out", str(pieces), "--max_shard_size", size]
        assert run(arguments) == 0
        assert (
            len(list(pieces.glob("*.safetensors"))) == 1
            if size == "5GB"
            else len(list(pieces.glob("*.safetensors"))) > 3
        )
        again, _ = load_model(pieces)
        assert all(torch.equal(v, trained[k]) for k, v in again.state_dict().items())
        for file in (tmp_path / "transformers-0").glob("*.json"):
            assert (pieces / file.name).read_text() == file.read_text(), file.name
    out = tmp_path / "half"
    assert (
        run(
            [
                "export",
                "--checkpoint",
                str(checkpoint),
                "--format",
                "paligemma",
                "--out",
                str(out),
                "--dtype",
                "bfloat16",
            ]
        )
        == 0
    )
    assert all(v.dtype == torch.bfloat16 for v in load_file(out / "model.safetensors").values())


def broken_model_folder(tmp_path, name, content):
    write_pretrained(tmp_path / "saved", *make_model())
    path = tmp_path / "saved" / name
    path.unlink() if content is None else path.write_text(content)
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"half', "config.json: expected a JSON object"),
        ("config.json", "[1]", "config.json: expected a JSON object"),
        ("processor_config.json", None, "expected processor and tokenizer files, cannot read them"),
        ("tokenizer_config.json", '{"half', "expected processor and tokenizer files, cannot read them"),
    ],
)
def test_broken_model_folders_give_one_line(name, content, message, tmp_path, capfd):
    folder = broken_model_folder(tmp_path, name, content)
    assert run(["export", "--checkpoint", str(folder), "--format", "transformers", "--out", str(tmp_path / "out")]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: {folder}")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens: expected at least 1, got 0"),
        (["--num_beams", "0"], "--num_beams: expected at least 1, got 0"),
        (["--device", "cudaa"], "--device: cannot use cudaa"),
    ],
)
def test_bad_settings_of_generate_give_one_line(arguments, message, tmp_path, photos, capfd):
    write_pretrained(tmp_path / "saved", *make_model())
    photos[2].save(tmp_path / "photo.png")
    command = ["generate", "--checkpoint", str(tmp_path / "saved"), "--image", str(tmp_path / "photo.png")]
    assert run([*command, "--instruction", "what?", *arguments]) == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]


def test_sizes_that_are_none_are_refused_before_the_work(tmp_path, capfd):
    for command in (["import-paligemma", "--from", "x"], ["export", "--checkpoint", "x", "--format", "transformers"]):
        assert run([*command, "--out", str(tmp_path / "out"), "--max_shard_size", "banana"]) == 2
        assert "--max_shard_size: expected a number with KB, MB or GB, got 'banana'" in capfd.readouterr().err


def test_broken_tokenizer_on_import_gives_one_line(tmp_path, capfd):
    save_paligemma(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text('{"a": 1}')
    assert run(["import-paligemma", "--from", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert "expected a PaliGemma processor, cannot read it" in capfd.readouterr().err


def test_images_that_are_missing_or_too_many_are_refused(photos):
    model, processor = make_model()
    inputs = processor(photos[:2], ["what?", "when?"])
    without = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="expected pixel_values for 8 image placeholders, got none"):
        model(**without)
    with pytest.raises(ValueError, match="expected pixel_values for 8 image placeholders, got none"):
        model.generate(**without, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"got 3 images of 4 tokens for prompts with \[4, 4\] placeholders"):
        model.generate(**without, pixel_values=inputs["pixel_values"][[0, 1, 1]], max_new_tokens=2, num_beams=2)
    with pytest.raises(ValueError, match="got 4 placeholders for 8 image tokens"):
        model(without["input_ids"][:1], inputs["pixel_values"], without["attention_mask"][:1])


def test_trainers_average_accumulated_losses_themselves():
    assert make_model()[0].accepts_loss_kwargs is False
