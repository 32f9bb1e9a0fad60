"""Adapters: where they go, that they alone learn, in PEFT's format, merged, and as exact as the model without them."""

import copy
import csv
import json
import sys

import peft
import pytest
import safetensors.torch
import timm
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from mmprefix import adapters, four_bit
from mmprefix.accounting import ModelFlops, meta_model
from mmprefix.adapters import LoraArgs, add_lora, merged, save_adapters
from mmprefix.cli import run
from mmprefix.decoder import DecoderArgs, build_decoder, decoder_config
from mmprefix.errors import InputError
from mmprefix.loss import target_cross_entropy
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.packing import map_tensors
from mmprefix.probe import check_prefix_lm
from mmprefix.processing import TokenizerArgs
from mmprefix.training import checkpoints
from mmprefix.training.module import MMPrefixModule
from mmprefix.training.optim import PartArgs
from mmprefix.vision import VisionArgs
from tests.conftest import TINY_DECODER, TINY_VISION, make_batch, make_model
from tests.reference import separate_losses
from tests.test_mask_free import SAMPLES, batch_of, gradients
from tests.test_modeling import GPT2
from tests.test_resume import ROOT

SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
BOTH = {"vision": LoraArgs(4), "decoder": LoraArgs(4)}
BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def with_adapters(lora, random=True, **kwargs):
    """A model in eval mode, whose fresh adapters were made to matter."""
    model, processor = make_model(**kwargs)
    for part, args in lora.items():
        add_lora(model, part, args)
    if random:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name or ".lora_magnitude" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter) * (1 if parameter.ndim > 1 else parameter.abs()))
    return model.eval(), processor


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def adapted(module):
    return {name for name, _ in adapters._layers(module)}


# Where they go


@pytest.mark.parametrize(
    ("decoder", "stem", "names"),
    [
        (TINY_DECODER, "model.layers", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"),
        ({**TINY_DECODER, "tie_word_embeddings": True}, "model.layers", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"),
        (GPT2, "transformer.h", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    ],
    ids=["llama", "tied llama", "gpt2"],
)  # fmt: skip
def test_all_linear_is_every_linear_layer_but_the_output(decoder, stem, names):
    model, _ = make_model(decoder)
    others = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("decoder.")}
    add_lora(model, "decoder", LoraArgs(4))
    found = adapted(model.decoder)
    assert found == {f"{stem}.{n}.{name}" for n in (0, 1) for name in names.split()}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == others | {f"decoder.{name}.lora_{m}.default.weight" for name in found for m in "AB"}


@pytest.mark.parametrize(
    ("vision", "names"),
    [
        (TINY_VISION, BLOCK),
        # Its qkv layers are never called: their weights are used with another bias.
        (VisionArgs("beit_base_patch16_224", image_size=32, kwargs=SMALL_VIT), BLOCK[1:]),
        # It has a head that pools tokens by attention, which image tokens don't depend on.
        (VisionArgs("vit_base_patch16_siglip_224", image_size=32, kwargs=SMALL_VIT), BLOCK),
    ],
    ids=["vit", "beit", "siglip"],
)
def test_in_encoders_only_what_image_tokens_pass_through(vision, names):
    model, _ = make_model(vision=vision)
    add_lora(model, "vision", LoraArgs(4))
    layers = len(model.vision.model.blocks)
    assert adapted(model.vision.model) == {f"blocks.{n}.{name}" for n in range(layers) for name in names}
    model.get_image_tokens(torch.rand(1, 3, *model.config.vision_spec.image_size)).sum().backward()
    learning = [p for p in model.vision.parameters() if p.requires_grad]
    assert learning
    assert all(p.grad is not None for p in learning), "DDP would wait for it"


def test_convolutions_are_adapted_where_they_are_named():
    vision = VisionArgs("resnet10t", image_size=64)
    with pytest.raises(
        InputError, match="a part with linear layers, there are convolutions only: 0, 3, 6, conv1, conv2"
    ):
        add_lora(make_model(vision=vision)[0], "vision", LoraArgs())
    model, _ = with_adapters({"vision": LoraArgs(4, target_modules=["conv2"])}, vision=vision)
    assert adapted(model.vision.model) == {f"layer{n}.0.conv2" for n in (1, 2, 3, 4)}
    plain = merged(model, model.state_dict()).vision.eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels), model.vision(pixels), atol=1e-4, rtol=1e-4)
    # Standardised convolutions: what is added to the weight is not what is added to the output.
    assert adapters._kind(timm.layers.StdConv2d(8, 8, 3)) is None
    assert adapters._kind(torch.nn.Conv2d(8, 8, 3, groups=8)) is None


# As exact as without them


@pytest.mark.parametrize("args", [LoraArgs(4), LoraArgs(4, use_rslora=True), LoraArgs(4, use_dora=True)])
def test_training_starts_at_the_model_as_it_was(args, photos):
    plain, processor = make_model()
    model, _ = with_adapters({"vision": args, "decoder": args}, random=False)
    batch = make_batch(processor, photos)
    with torch.no_grad():
        expected, found = plain.target_logits(batch), model.target_logits(batch)
    if args.use_dora:  # divides by the magnitude and multiplies with it
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("visibility", ["full", "nested"])
@pytest.mark.parametrize("args", [LoraArgs(4), LoraArgs(4, use_dora=True)], ids=["lora", "dora"])
def test_packed_loss_and_every_gradient_match_separate_sequences(args, visibility, photos):
    model, processor = with_adapters({"vision": args, "decoder": args}, visibility=visibility)
    batch = batch_of(processor, photos)
    assert batch.plan.calls
    total, count = model.target_loss(batch)
    fast = gradients(model, total / count)
    losses = []
    for photo, instruction, targets in SAMPLES:
        losses += separate_losses(
            model, processor.layout, processor.transform(photos[photo]), processor.num_image_tokens,
            processor.format.text_ids(instruction), [processor.format.text_ids(target) for target in targets],
        )  # fmt: skip
    mean = torch.cat(losses).mean()
    slow = gradients(model, mean)
    torch.testing.assert_close(total / count, mean, atol=1e-5, rtol=1e-5)
    assert {name for name in fast if not name.startswith("connector.")} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, atol=3e-5, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_adapters_leak_nothing_and_of_the_last_layer_run_where_labels_are(photos):
    model, processor = with_adapters({"decoder": LoraArgs(4)})
    check_prefix_lm(model.decoder)
    rows = []
    for layer in model.decoder.model.layers:
        layer.self_attn.q_proj.lora_A["default"].register_forward_hook(lambda _, args, out: rows.append(out.shape[-2]))
    batch = batch_of(processor, photos)
    model.target_loss(batch)
    assert rows == [batch.input_ids.shape[1], batch.plan.label_rows.numel()]
    assert rows[0] > rows[1]


def test_compiled_step_has_no_graph_break(photos):
    model, processor = with_adapters(BOTH)
    batch = batch_of(processor, photos, bucket=32)
    expected = gradients(model, model.target_loss(batch)[0])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model.target_loss, backend="aot_eager", fullgraph=True)
        found = gradients(model, compiled(batch)[0])
    torch._dynamo.reset()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


# Merged, and in PEFT's own format


@pytest.mark.parametrize(
    ("args", "decoder"),
    [(LoraArgs(4), None), (LoraArgs(4, 4, use_rslora=True), {**TINY_DECODER, "tie_word_embeddings": True}),
     (LoraArgs(4, use_dora=True), None), (LoraArgs(4), GPT2),
     (LoraArgs(4, target_modules=["lm_head", "v_proj"]), None)],
    ids=["lora", "rslora, tied", "dora", "gpt2", "lm_head"],
)  # fmt: skip
def test_merged_gives_the_same_and_leaves_the_adapters_alone(args, decoder, photos, tmp_path):
    vision = LoraArgs(args.rank, args.alpha, use_dora=args.use_dora, use_rslora=args.use_rslora)
    model, processor = with_adapters({"vision": vision, "decoder": args}, decoder=decoder)
    plain, _ = make_model(decoder)
    batch = make_batch(processor, photos)
    before = state_of(model)
    merged(model, model.state_dict()).save_pretrained(tmp_path)
    loaded = MMPrefixForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model.target_logits(batch)
        torch.testing.assert_close(loaded.target_logits(batch), expected, atol=1e-5 * expected.abs().max(), rtol=1e-5)
        assert (plain.target_logits(batch) - expected).abs().max() > 0.1 * expected.std(), "adapters matter"
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert loaded.config.label_only == plain.config.label_only
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_peft_loads_what_was_saved_and_we_load_what_peft_saved(photos, tmp_path):
    lora = {
        "vision": LoraArgs(4, 6, 0.1),
        "decoder": LoraArgs(4, use_dora=True, target_modules=["q_proj", "mlp.up_proj"]),
    }
    model, _ = with_adapters(lora)
    plain, _ = make_model()
    written = save_adapters(model, model.state_dict(), tmp_path)
    assert [path.name for path in written] == ["adapter-vision", "adapter-decoder"]
    config = json.loads((written[1] / "adapter_config.json").read_text())
    assert config["inference_mode"]
    assert (config["peft_type"], config["task_type"], config["r"], config["use_dora"]) == ("LORA", "CAUSAL_LM", 4, True)
    assert config["target_modules"] == sorted(adapted(model.decoder))
    # The bare decoder, as transformers builds it.
    bare = AutoModelForCausalLM.from_config(plain.decoder.config)
    bare.load_state_dict(plain.decoder.state_dict())
    decoder = peft.PeftModel.from_pretrained(bare, written[1]).eval()
    ids = torch.arange(10, 22).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(decoder(input_ids=ids).logits, model.decoder(input_ids=ids).logits)
        assert not torch.allclose(decoder(input_ids=ids).logits, plain.decoder(input_ids=ids).logits, atol=1e-2)
    spec = model.config.vision_spec
    bare = timm.create_model(spec.name, num_classes=0, **spec.kwargs)
    bare.load_state_dict(plain.vision.model.state_dict())
    pixels = torch.rand(2, 3, *spec.image_size)
    encoder = peft.PeftModel.from_pretrained(bare, written[0]).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.base_model.model.forward_features(pixels), model.vision.model.forward_features(pixels)
        )
    # Ours again, from our folders and from PEFT's.
    decoder.save_pretrained(tmp_path / "theirs")
    for folder in (written[1], tmp_path / "theirs"):
        again, _ = make_model()
        add_lora(again, "vision", LoraArgs(pretrained=str(written[0])))
        add_lora(again, "decoder", LoraArgs(pretrained=str(folder)))
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
        assert adapters.settings_of(again)["vision"]["lora_dropout"] == 0.1


# Training


MODEL = {
    # Dropout of its own, which stays off as a frozen part's.
    "vision": {"name": "test_vit", "image_size": 32, "kwargs": {"drop_path_rate": 0.2}},
    "decoder": {"config": {**TINY_DECODER, "attention_dropout": 0.1}},
    "tokenizer": {"name": "byte"},
    "optimizer": {"lr": 1e-3},
    "train_vision": {"lr": 2e-3, "lora": {"rank": 2, "dropout": 0.1}},
    "train_decoder": {"lr": 5e-3, "lora": {"rank": 4, "use_dora": True}},
}


@pytest.fixture
def fit(tmp_path, colour_shards, capfd):
    """Runs a command on coloured pictures; returns status, what it printed, and the run folder."""
    shards = colour_shards()

    def do(run_name="run", *arguments, command="fit", **model):
        path, folder = tmp_path / f"{run_name}.yaml", tmp_path / "runs" / run_name
        path.write_text(yaml.safe_dump({
            "model": {**MODEL, **model},
            "data": {"train": str(shards / "train-*.tar"), "val": str(shards / "val-*.tar"), "batch_size": 6,
                     "max_target_tokens": 8},
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False,
                        "enable_model_summary": False, "default_root_dir": str(folder)},
        }))  # fmt: skip
        capfd.readouterr()
        try:
            status = run([command, "--config", str(path), *map(str, arguments)])
        except SystemExit as exit_:
            status = exit_.code
        return status, "".join(capfd.readouterr()), folder

    return do


def stored(folder, step):
    return torch.load(folder / "checkpoints" / f"step={step:08d}.ckpt", weights_only=True)


def moved(folder, first, last):
    a, b = (stored(folder, step)["state_dict"] for step in (first, last))
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_adapters_and_connector_learn_and_nothing_else(fit, photos, capfd):
    status, text, folder = fit()
    assert status == 0, text
    assert "attention: mask-free" in text or "dense" not in text, "the decoder's own dropout is off: no mask is needed"
    changed, names = moved(folder, 4, 8), stored(folder, 4)["state_dict"].keys()
    assert changed == {name for name in names if ".lora_" in name or ".connector." in name}
    assert len([name for name in names if ".lora_magnitude" in name]) == 14
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter-decoder", "adapter-vision", "checkpoints", "config.yaml", "metrics.csv", "model", "predictions.jsonl",
        "predictions.png", "report.html", "tensorboard",
    ]  # fmt: skip
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    peaks = [max(float(row[f"lr/{part}"]) for row in rows) for part in ("vision", "connector", "decoder")]
    assert peaks[0] / peaks[1] == pytest.approx(2)
    assert peaks[2] / peaks[1] == pytest.approx(5)
    assert all(float(row["train/tflops_per_device"]) > 0 for row in rows)
    # Merged alike from a checkpoint and in the model folder; PEFT's folder is what the checkpoint has.
    exported, processor = checkpoints.load_model(folder / "model")
    loaded, _ = checkpoints.load_model(folder / "checkpoints" / "step=00000008.ckpt")
    for name, value in loaded.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value), name
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == {
        f"vision.model.{name}" for name in loaded.config.vision_spec.unused
    }
    tensors = safetensors.torch.load_file(folder / "adapter-decoder" / "adapter_model.safetensors")
    weights = stored(folder, 8)["state_dict"]
    for name, value in tensors.items():
        name = name.removeprefix("base_model.model.").replace("_A.", "_A.default.").replace("_B.", "_B.default.")
        name = name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
        assert torch.equal(weights[f"model.decoder.{name}"], value)
    # The run's own model, with its adapters, gives what the merged one does.
    module = MMPrefixModule(
        VisionArgs(**MODEL["vision"]), DecoderArgs(**MODEL["decoder"]), tokenizer=TokenizerArgs("byte"),
        train_vision=PartArgs(lora=LoraArgs(2)), train_decoder=PartArgs(lora=LoraArgs(4, use_dora=True)),
    )  # fmt: skip
    module.load_state_dict(weights)
    batch = make_batch(processor, photos)
    with torch.no_grad():
        expected = module.eval().model.target_logits(batch)
        torch.testing.assert_close(loaded.target_logits(batch), expected, atol=1e-5, rtol=1e-5)


def test_every_command_takes_a_checkpoint_with_adapters(fit, tmp_path, photos, capfd):
    status, text, folder = fit("run", "--trainer.max_epochs", 1)
    assert status == 0, text
    checkpoint = folder / "checkpoints" / "step=00000004.ckpt"
    status, text, _ = fit("run", "--ckpt_path", "last", command="validate")
    assert status == 0, text
    photos[0].save(tmp_path / "a.png")
    asked = [
        "--image",
        str(tmp_path / "a.png"),
        "--instruction",
        "is it red?",
        "--max_new_tokens",
        "4",
        "--device",
        "cpu",
    ]
    answers = []
    for source in (checkpoint, folder / "model"):
        assert run(["generate", "--checkpoint", str(source), *asked]) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1]
    out = tmp_path / "exported"
    assert run(["export", "--checkpoint", str(checkpoint), "--format", "transformers", "--out", str(out)]) == 0
    assert not any(".lora_" in name for name in safetensors.torch.load_file(out / "model.safetensors"))
    # On from the merged model, with fresh adapters; and on from the adapters, beside the weights they belong to.
    nothing = {key: {} for key in ("vision", "decoder", "tokenizer")}
    status, text, again = fit("again", "--trainer.max_steps", 1, pretrained=str(checkpoint), **nothing)
    assert status == 0, text
    start = checkpoints.load_model(checkpoint)[0].state_dict()
    for name, value in stored(again, 1)["state_dict"].items():
        if ".base_layer." in name:
            assert torch.equal(start[name.removeprefix("model.").replace(".base_layer", "")], value)
    learning = {"lr": 0.0, "lora": {"pretrained": str(folder / "adapter-decoder")}}
    status, text, on = fit("on", "--trainer.max_steps", 1, train_decoder=learning)
    assert status == 0, text
    before = stored(folder, 4)["state_dict"]
    for name, value in stored(on, 1)["state_dict"].items():
        if name.startswith("model.decoder."):
            assert torch.equal(before[name], value), name


def test_adapters_can_learn_later(fit):
    late = {"unfreeze_at_step": 4, "lora": {"rank": 2, "dropout": 0.5}}
    status, text, folder = fit("run", "--trainer.max_epochs", 3, train_decoder=late, train_vision={"freeze": True})
    assert status == 0, text
    start = stored(folder, 8)["state_dict"]
    assert len(stored(folder, 8)["optimizer_states"][0]["state"]) == 2 + 28
    _, _, first = fit("first", "--trainer.max_epochs", 1, train_decoder=late, train_vision={"freeze": True})
    for name, value in stored(first, 4)["state_dict"].items():
        learned = not torch.equal(value, start[name])
        assert learned == (".lora_" in name or ".connector." in name), name
        if ".lora_B." in name:
            assert not value.any(), "not before its step"


def test_resume_equals_the_uninterrupted_run_bit_by_bit(fit):
    """With dropout on adapters."""
    _, _, whole = fit("whole")
    status, text, cut = fit("whole", "--ckpt_path", whole / "checkpoints" / "step=00000004.ckpt")
    assert status == 0, text
    (left,) = (cut / "checkpoints").glob("*.left")
    expected, found = torch.load(left, weights_only=True), stored(cut, 8)
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name


def test_only_the_adapters_dropout_is_on_and_only_in_training(photos):
    vision = VisionArgs("test_vit", image_size=32, kwargs={"proj_drop_rate": 0.5, "drop_path_rate": 0.5})
    gpt2 = {**GPT2, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}

    def module_of(dropout):
        torch.manual_seed(0)
        return MMPrefixModule(
            vision, DecoderArgs(config=gpt2), tokenizer=TokenizerArgs("byte"),
            train_vision=PartArgs(lora=LoraArgs(4, dropout=dropout)),
            train_decoder=PartArgs(lora=LoraArgs(4, dropout=dropout, use_dora=True)),
        )  # fmt: skip

    def losses(module):
        return {module.model.target_loss(make_batch(module.processor, photos))[0].item() for _ in range(3)}

    still, dropping = module_of(0.0), module_of(0.5)
    for module in (still, dropping):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if ".lora_B." in name:
                    parameter.fill_(0.05)
        module._set_freezing(0)
    assert len(losses(still)) == 1, "the parts' own dropout is off"
    assert len(losses(dropping)) == 3
    dropping.eval()
    assert losses(dropping) == losses(still)
    dropping.train()
    dropping._set_freezing(0)
    assert len(losses(dropping)) == 3
    assert not dropping.model.decoder.transformer.h[0].mlp.dropout.training


def test_gradient_checkpointing_does_not_change_the_training(fit):
    states = []
    for flag in (False, True, "elementwise"):
        status, text, folder = fit(f"gc{flag}", "--trainer.max_epochs", 1, gradient_checkpointing=flag)
        assert status == 0, text
        states.append(stored(folder, 4)["state_dict"])
    for name, value in states[0].items():
        for state in states[1:]:
            torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(fit, precision):
    status, text, folder = fit("run", "--trainer.precision", precision, "--trainer.max_epochs", 1)
    assert status == 0, text
    model, _ = checkpoints.load_model(folder / "checkpoints" / "step=00000004.ckpt")
    assert model.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_config_that_lies_over_others(fit):
    path = ROOT / "configs" / "lora.yaml"
    status, text, folder = fit("run", "--config", path, "--trainer.max_steps", 1, train_vision={}, train_decoder={})
    assert status == 0, text
    assert {"adapter-vision", "adapter-decoder"} <= {path.name for path in folder.iterdir()}
    documented = yaml.safe_load(path.read_text())["model"]["train_decoder"]["lora"]
    assert documented == vars(LoraArgs()) | {"dropout": 0.05}, "all settings, defaults but for dropout"


# What it costs


def test_step_matches_a_counted_step(photos):
    """Torch's counter over forward and backward, as in test_accounting."""
    lora = {"vision": LoraArgs(4), "decoder": LoraArgs(8)}
    for parts in ({"vision", "decoder"}, {"decoder"}, {"vision"}):
        chosen = {part: lora[part] for part in parts}
        model, processor = make_model()
        batch = make_batch(processor, photos)
        rows, columns = batch.input_ids.shape
        meta = meta_model(model.config)
        for part in ("vision", "decoder"):
            meta.get_submodule(part).requires_grad_(False)
        for part, args in chosen.items():
            add_lora(meta, part, args)
        on_meta = map_tensors(batch, lambda tensor: tensor.to("meta"))
        with FlopCounterMode(display=False) as counter:
            target_cross_entropy(meta.target_logits(on_meta), on_meta.labels, on_meta.target_lengths)[0].backward()
        flops = ModelFlops.of(model.config, chosen)
        counted = batch.__class__(**{**vars(batch), "num_tokens": rows * columns, "visible_pairs": rows * columns**2})
        expected = flops.step(counted, {"connector", *parts})
        spec, images = model.config.vision_spec, len(photos)
        if "vision" in parts:  # gradients of the first inputs, which the convention counts and nobody computes
            patches, qkv = model.vision.model.patch_embed.proj.weight, model.vision.model.blocks[0].attn.qkv.weight
            tokens = spec.num_tokens + model.vision.model.num_prefix_tokens
            expected -= images * 2 * (spec.num_tokens * patches.numel() + tokens * (qkv.numel() + 4 * spec.width))
        else:
            expected -= images * flops.connector
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6), parts
        if parts == {"vision", "decoder"}:
            assert flops.step(counted, {"connector"}) < expected, "adapters that don't learn yet"
            full = ModelFlops.of(model.config).step(counted, {"vision", "connector", "decoder"})
            assert 0.6 < expected / full < 0.95, "no gradients of the weights"


def test_estimate_counts_what_learns(fit):
    status, text, _ = fit("run", "--memory", 8, command="estimate")
    assert status == 0, text
    rows = {line[:52].strip(): line[52:].split() for line in text.splitlines()}
    module = MMPrefixModule(
        VisionArgs(**MODEL["vision"]), DecoderArgs(**MODEL["decoder"]), tokenizer=TokenizerArgs("byte"),
        train_vision=PartArgs(lora=LoraArgs(2)), train_decoder=PartArgs(lora=LoraArgs(4, use_dora=True)),
    )  # fmt: skip
    for part in ("vision", "decoder"):
        counts = [
            sum(p.numel() for p in module.part(part).parameters() if p.requires_grad is flag) for flag in (True, False)
        ]
        assert [float(v) for v in rows[part]] == pytest.approx([count / 1e6 for count in counts], abs=6e-4)
    learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert float(rows["gradients"][0]) == pytest.approx(4 * learning / 2**20, abs=1e-3)
    status, text, _ = fit("run", "--memory", 8, "--model.decoder.load_in_4bit", "true", command="estimate")
    assert (status, "memory of 4-bit weights is not estimated" in text) == (2, True)


# What is refused


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"train_connector": {"lora": {}}}, "model.train_connector.lora: expected null: the connector is small"),
        ({"train_decoder": {"freeze": True, "lora": {}}}, "model.train_decoder: expected lora or freeze: true, got both"),
        ({"train_decoder": {"lora": {"rank": 0}}}, "model.train_decoder.lora.rank: expected at least 1, got 0"),
        ({"train_decoder": {"lora": {"alpha": 0}}}, "model.train_decoder.lora.alpha: expected more than 0, got 0"),
        ({"train_vision": {"lora": {"dropout": 1.0}}}, "model.train_vision.lora.dropout: expected at least 0 and below 1, got 1.0"),
        ({"train_decoder": {"lora": {"target_modules": ["q_porj"]}}}, "got 'q_porj'; did you mean q_proj?"),
        ({"train_decoder": {"lora": {"target_modules": ["embed_tokens"]}}}, "expected names of layers that can have adapters, got 'embed_tokens'"),
        ({"train_vision": {"lora": {"target_modules": ["xyz"]}}}, "got 'xyz'; there are proj, qkv, fc1, fc2"),
        ({"train_decoder": {"lora": {"target_modules": []}}}, "expected all-linear or a list of names, got []"),
        ({"train_decoder": {"lora": {"rnak": 3}}}, "rnak"),
        ({"train_decoder": {"lora": {"pretrained": "/nowhere"}}}, "expected a folder in PEFT's format, found no adapter_config.json in /nowhere"),
        ({"train_decoder": {"lora": {"pretrained": "/nowhere", "rank": 2}}}, "expected no other setting beside it, got {'rank': 2}"),
        ({"decoder": {**MODEL["decoder"], "load_in_4bit": True}, "train_decoder": {}}, "expected model.train_decoder.lora beside it"),
        ({"decoder": {**MODEL["decoder"], "load_in_4bit": True}}, "expected the pretrained weights of a `name`, got random ones"),
    ],
)  # fmt: skip
def test_bad_settings_give_one_line(fit, model, message):
    status, text, folder = fit(**model)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert (status, len(errors)) == (2, 1), text
    assert message in errors[0]
    assert not folder.exists()


def test_tied_weights_and_other_methods_are_refused(tmp_path):
    tied, _ = make_model({**TINY_DECODER, "tie_word_embeddings": True})
    with pytest.raises(InputError, match="names of layers that can have adapters, got 'lm_head'"):
        add_lora(tied, "decoder", LoraArgs(target_modules=["lm_head"]))
    for config, message in (
        (peft.LoHaConfig(target_modules=["q_proj"]), "expected LoRA, got LOHA"),
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "got also modules_to_save"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "got also init_lora_weights 'pissa'"),
        (
            peft.LoraConfig(target_modules=["embed_tokens"]),
            "expected layers that can be adapted, got model.embed_tokens",
        ),
        (peft.LoraConfig(target_modules=["k_proj"]), "got 4 missing: model.layers.0.self_attn.k_proj.lora_A.weight"),
        (
            peft.LoraConfig(r=3, target_modules=["q_proj"]),
            "got 4 misshapen: model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
        (peft.LoraConfig(target_modules=["fc1"]), "PEFT can't put adapters in: "),
    ):
        model, _ = make_model()
        wrapped = peft.get_peft_model(copy.deepcopy(model.decoder), peft.LoraConfig(target_modules=["q_proj"]))
        wrapped.save_pretrained(tmp_path)
        config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=message):
            add_lora(model, "decoder", LoraArgs(pretrained=str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"{}")
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot read adapter_model.safetensors"):
        add_lora(make_model()[0], "decoder", LoraArgs(pretrained=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read adapter_config.json"):
        add_lora(make_model()[0], "decoder", LoraArgs(pretrained=str(tmp_path)))


def test_a_checkpoint_of_other_adapters_is_refused(fit):
    _, _, folder = fit("run", "--trainer.max_epochs", 1)
    for model, message in (
        ({"train_decoder": {"lora": {"rank": 4, "use_dora": True, "alpha": 8}}}, "model.train_decoder.lora: expected lora_alpha 32 as in the checkpoint, got 8"),
        ({"train_decoder": {"lora": {"rank": 8, "use_dora": True}}}, "model.train_decoder.lora: expected r 4 as in the checkpoint, got 8"),
        ({"train_decoder": {}}, "model.train_*.lora: expected adapters in vision, decoder, as the checkpoint has, got vision"),
    ):  # fmt: skip
        status, text, _ = fit("other", "--ckpt_path", folder / "checkpoints" / "step=00000004.ckpt", **model)
        assert status == 2
        assert message in text.splitlines()[-1]


def test_cached_features_and_adapters_of_the_encoder_are_refused(fit, tmp_path):
    status, text, _ = fit("run", "--data.feature_cache", tmp_path)
    assert status == 2
    assert "data.feature_cache: expected model.train_vision.freeze: true" in text


def test_without_peft_one_line_says_what_to_install(fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    status, text, _ = fit()
    assert status == 2
    assert text.splitlines()[-1] == (
        "error: model.train_vision.lora: expected peft, which is not installed: pip install 'mmprefix[lora]'"
    )


# 4 bits


def test_four_bits_are_refused_where_they_cannot_be(monkeypatch, tmp_path):
    model, _ = make_model()
    model.decoder.save_pretrained(tmp_path)
    args = DecoderArgs(str(tmp_path), load_in_4bit=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="model.decoder.load_in_4bit: expected a CUDA device, there is none"):
        build_decoder(args, decoder_config(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(four_bit, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"expected bitsandbytes, which is not installed: pip install 'mmprefix\[qlora\]'"
    ):
        build_decoder(args, decoder_config(args))
