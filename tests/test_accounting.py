"""Counted against formulas, against counted passes, and against measured steps."""

from dataclasses import asdict, replace

import pytest
import torch
import yaml
from benchmarks import estimate as benchmark
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmprefix import commands
from mmprefix.accounting import (
    GIB,
    Layout,
    LiveBytes,
    MemoryEstimate,
    ModelFlops,
    Precision,
    Record,
    counted_without_values,
    measured_peak_flops,
    meta_model,
)
from mmprefix.cli import run
from mmprefix.errors import InputError
from mmprefix.loss import target_cross_entropy
from mmprefix.packing import map_tensors
from mmprefix.vision import ConnectorArgs, VisionArgs
from tests.architectures import config_of
from tests.conftest import TINY_DECODER, TINY_VISION, make_batch, make_model


def flops_of(decoder, **kwargs):
    model, _ = make_model(decoder, **kwargs)
    return ModelFlops.of(model.config), model


def layer_weights(model):
    """Elements of the matrices in the decoder's layers: neither embedding nor output layer."""
    outer = {id(m.weight) for m in model.decoder.modules() if isinstance(m, torch.nn.Embedding)}
    outer.add(id(model.get_output_embeddings().weight))
    return sum(p.numel() for p in model.decoder.parameters() if p.ndim > 1 and id(p) not in outer)


# FLOPs


@pytest.mark.parametrize(
    ("decoder", "heads", "head_dim", "layers"),
    [
        (TINY_DECODER, 4, 16, 2),
        ({**TINY_DECODER, "model_type": "gemma2", "head_dim": 32, "sliding_window": 8}, 4, 32, 2),
        ({"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 3}, 3, 16, 3),
    ],
)
def test_decoder_costs_what_the_formula_says(decoder, heads, head_dim, layers):
    """PaLM, appendix B: 2 N for a token, 4 L H Q for a pair (of forward); and 2 D V for a label."""
    flops, model = flops_of(decoder)
    assert flops.pair == 4 * layers * heads * head_dim
    assert flops.token == pytest.approx(2 * layer_weights(model), rel=2e-3)  # rotary angles are a product, too
    assert flops.label == 2 * model.get_output_embeddings().weight.numel()
    assert flops.connector == 2 * model.num_image_tokens * model.connector.weight.numel()


def test_mixture_counts_active_experts_only():
    sizes = {**TINY_DECODER, "model_type": "mixtral", "num_local_experts": 8}
    one, two = (flops_of({**sizes, "num_experts_per_tok": n})[0].token for n in (1, 2))
    assert two - one == 2 * 2 * 3 * 64 * 96, "a gated expert has three matrices, in two layers"


def test_connector_that_begins_with_views_is_counted():
    """All of an image in one token: before its projection, only the shape changes."""
    whole = ConnectorArgs("pixel_shuffle", factor=2)
    flops, model = flops_of(TINY_DECODER, vision=TINY_VISION, connector=whole)
    assert model.num_image_tokens == 1
    assert flops.connector == 2 * sum(p.numel() for p in model.connector.parameters() if p.ndim == 2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_mixture_of_experts_is_estimated_in_any_precision(precision):
    decoder = {**TINY_DECODER, "model_type": "mixtral", "num_local_experts": 4}
    model, _ = make_model(decoder)
    estimate = MemoryEstimate(meta_model(model.config).train(), Record(8, 4), Precision.from_name(precision))
    assert estimate.total(2) > estimate.total(1) > 3 * estimate.weights


def test_decoder_whose_shapes_depend_on_values_is_said_in_a_line():
    with (
        pytest.raises(InputError, match="a jamba's can't be counted: Tensor.item"),
        counted_without_values(config_of("jamba")),
    ):
        torch.ones((), device="meta").item()


def test_encoder_grows_with_its_image():
    small, large = (flops_of(TINY_DECODER, vision=VisionArgs("test_vit", image_size=size))[0] for size in (32, 64))
    assert large.vision > 3.5 * small.vision > 0
    assert large.token == small.token


FREEZING = [(), ("vision",), ("vision", "connector"), ("decoder",), ("vision", "decoder"), ("connector", "decoder")]


@pytest.mark.parametrize("frozen", FREEZING, ids=lambda frozen: "+".join(frozen) or "all learn")
def test_step_matches_a_counted_step(frozen, photos):
    """Torch's counter over forward and backward of the model, its attention dense: every pair of the rows counts."""
    model, processor = make_model()
    batch = make_batch(processor, photos)
    rows, columns = batch.input_ids.shape
    assert batch.num_tokens < rows * columns, "the batch has padding, which a real step computes"
    meta = meta_model(model.config)
    for name in frozen:
        getattr(meta, name).requires_grad_(False)
    on_meta = map_tensors(batch, lambda tensor: tensor.to("meta"))
    with FlopCounterMode(display=False) as counter:
        target_cross_entropy(meta.target_logits(on_meta), on_meta.labels, on_meta.target_lengths)[0].backward()
    flops = ModelFlops.of(model.config)
    trained = {"vision", "connector", "decoder"} - set(frozen)
    counted = replace(batch, num_tokens=rows * columns, visible_pairs=rows * columns**2)
    expected = flops.step(counted, trained)
    # Gradients of the first inputs, which the convention counts and nobody computes.
    if "vision" in trained:
        expected -= 3 * 2 * 4 * model.vision.model.patch_embed.proj.weight.numel()
    elif "connector" in trained:
        expected -= 3 * flops.connector
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert flops.step(batch, trained) < expected, "padding and hidden pairs are no useful work"


def test_measured_peak_is_a_rate_of_this_machine():
    peak = measured_peak_flops(torch.device("cpu"), torch.float32, seconds=0.1)
    assert 1e8 < peak < 1e14


# Memory


def linear_relu_step():
    layers = [torch.nn.Linear(100, 100) for _ in range(5)]
    hidden = torch.empty(1000, 100)
    with LiveBytes() as live:
        for layer in layers:
            hidden = layer(hidden).relu()
        saved = live.live["activations"]
        hidden.sum().backward()
        del hidden
    return saved, live.live["activations"], live.peak


def test_live_bytes_of_a_small_network():
    saved, left, peak = linear_relu_step()
    assert saved == 5 * 4 * 1000 * 100, "each relu's output, nothing of what went into it"
    assert left == 5 * 4 * (100 * 100 + 100), "the gradients"
    assert saved < peak < saved + 3 * 4 * 1000 * 100
    with FakeTensorMode():
        assert linear_relu_step() == (saved, left, peak)


def test_live_bytes_count_views_once_and_what_was_there_not_at_all():
    before = torch.zeros(100)
    with LiveBytes() as live:
        view = before.view(10, 10).t()
        new = view + 1
        another = new[2:]
        assert live.live["activations"] == 400
        del new
        assert live.live["activations"] == 400, "the view keeps it"
        del another
        assert live.live["activations"] == 0
    assert live.peak == 400


@pytest.mark.parametrize("name", list(benchmark.CASES)[: benchmark.SMOKE])
def test_estimate_matches_a_measured_step(name):
    row = benchmark.compare(name)
    assert row["measured_mib"] > 50
    assert row["ratio"] == pytest.approx(1, abs=0.03)


def estimate_of(record=Record(8, 4), precision="32-true", **kwargs):  # noqa: B008
    model, _ = make_model()
    return MemoryEstimate(meta_model(model.config).train(), record, Precision.from_name(precision), **kwargs), model


def test_parts_of_the_memory():
    estimate, model = estimate_of()
    size = 4 * sum(p.numel() for p in model.parameters())
    learns = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.weights == pytest.approx(size, rel=1e-2)  # and some buffers
    assert (estimate.gradients, estimate.optimizer, estimate.communication) == (learns, 2 * learns, 0)
    assert estimate_of(layout=Layout(2))[0].communication == learns
    assert estimate_of(precision="bf16-true")[0].gradients == learns / 2
    sharded, _ = estimate_of(layout=Layout(4, "fsdp"))
    assert (sharded.weights, sharded.gradients) == (estimate.weights / 4, learns / 4)
    assert 0 < sharded.communication < size
    # Gathered in half precision, but kept as the weights are stored.
    kept = [
        estimate_of(layout=Layout(2, "fsdp", param_dtype=dtype))[0].step_peak(4)["gradients"]
        for dtype in (None, torch.bfloat16)
    ]
    assert kept == [learns / 2] * 2
    assert sharded.total(4) < estimate.total(4)


def test_logits_grow_with_targets_and_vocabulary():
    short, long = (estimate_of(Record(8, 4, targets))[0].step_peak(4)["logits"] for targets in (1, 5))
    assert long == 5 * short > 0


@pytest.mark.parametrize("start", [1, 7, 64])
def test_largest_batch_is_the_largest(start):
    estimate, _ = estimate_of()
    for memory in (estimate.total(23), estimate.total(23) + 1.0, estimate.total(24) - 1.0, 64 * 2**20):
        largest = estimate.largest_batch(memory, start)
        assert estimate.total(largest) <= memory < estimate.total(largest + 1)
    assert estimate.largest_batch(estimate.total(1) - 1.0, start) == 0


@pytest.mark.parametrize(
    ("name", "stored", "autocast"),
    [("bf16", "float32", "bfloat16"), (32, "float32", None), (None, "float32", None), ("16-true", "float16", None)],
)
def test_precision_names_of_the_trainer(name, stored, autocast):
    precision = Precision.from_name(name)
    assert precision == Precision(getattr(torch, stored), autocast and getattr(torch, autocast))
    with pytest.raises(InputError, match="expected 64-true, 32-true"):
        Precision.from_name("transformer-engine")


# The command


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({
        "model": {
            "vision": asdict(TINY_VISION), "tokenizer": {"name": "byte"}, "train_vision": {"freeze": True},
            # 3.2 billion parameters: 13 GB, if they were made.
            "decoder": {"config": {
                "model_type": "llama", "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 3,
                "num_attention_heads": 64, "vocab_size": 64000,
            }},
        },
        "data": {"train": "nowhere/*.tar", "batch_size": 4},
        "trainer": {"precision": "bf16-mixed"},
    }))  # fmt: skip
    return path


def test_command_estimates_billions_of_parameters_in_seconds(config, capfd):
    status = run([
        "estimate", "--config", str(config), "--devices", "2", "--memory", "80", "--targets", "5",
        "--data.batch_size", "8",
    ])  # fmt: skip
    out, err = capfd.readouterr()
    assert status == 0, err
    rows = {line[:52].strip(): line[52:].split() for line in out.splitlines()}
    trained, frozen = (float(v.replace(",", "")) for v in rows["decoder"])
    assert trained == pytest.approx(2 * 64000 * 8.192e-3 + 3 * (4 * 8192**2 + 3 * 8192 * 22528) / 1e6, rel=1e-3)
    assert (frozen, rows["vision"][0]) == (0.0, "0.000")
    gradients = trained * 4e6 / GIB
    assert float(rows["gradients"][0]) == pytest.approx(gradients, rel=1e-2)
    assert float(rows["AdamW state"][0]) == pytest.approx(2 * gradients, rel=1e-2)
    assert float(rows["buckets (ddp) or gathered weights (fsdp)"][0]) == pytest.approx(gradients, rel=1e-2)
    assert float(rows["total at batch size 8"][0]) > 5 * gradients
    assert int(rows["largest batch size in 80 GiB"][0].replace(",", "")) > 8
    assert "2 devices, ddp, precision bf16-mixed" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "0"], "--devices: expected at least 1, got 0"),
        (["--devices", "two"], "estimate: argument --devices: invalid int value: 'two'"),
        (["--target_tokens", "0"], "--target_tokens: expected at least 1, got 0"),
        (["--memory", "-3"], "--memory: expected more than 0 GiB, got -3.0"),
        (["--strategy", "zero"], "estimate: argument --strategy: invalid choice: 'zero'"),
        (["--precision", "half"], "precision: expected 64-true, 32-true"),
        (["--data.batch_size", "0"], "data.batch_size: expected at least 1, got 0"),
        (["--data.batchsize", "3"], "did you mean data.batch_size?"),
        (["--model.train_decoder.freeze", "true", "--model.train_connector.freeze", "true"], "expected a part that learns"),
        (["--model.pretrained", "/nowhere"], "/nowhere: expected a checkpoint file or folder, there is none"),
        (["--model.peak_tflops", "0", "--model.vision.name", "no_such_vit"], "expected a timm model, got 'no_such_vit'"),
    ],
)  # fmt: skip
def test_bad_options_give_one_line(config, capfd, options, message):
    given = [] if "--memory" in options else ["--memory", "80"]
    try:
        status = run(["estimate", "--config", str(config), *given, *options])
    except SystemExit as exit_:
        status = exit_.code
    err = capfd.readouterr().err.strip().splitlines()
    assert status == 2
    assert err[-1].startswith("error: ")
    assert message in err[-1]


def test_memory_is_asked_for_where_there_is_no_gpu(config, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["estimate", "--config", str(config)]) == 2
    assert capfd.readouterr().err == "error: --memory: expected the GiB of a device, there is no GPU here to ask\n"


def test_whole_model_is_estimated_from_its_config_alone(tmp_path):
    model, processor = make_model(connector=benchmark.ConnectorArgs("pixel_shuffle"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # not read
    settings = {name: asdict(v) if hasattr(v, "__dataclass_fields__") else v for name, v in benchmark.DEFAULTS.items()}
    configured = commands.configured_model({**settings, "pretrained": str(tmp_path)})
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in configured.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in configured.parameters())
