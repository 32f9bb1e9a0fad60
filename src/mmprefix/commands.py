"""The commands beside training: generate, visualize, probe, estimate, scaling, import-paligemma, export.

Each takes its arguments, raises `InputError` on bad ones, and returns the exit status.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmprefix.accounting import GIB, PARTS, Layout, MemoryEstimate, Precision, Record, meta_model, trained_parts
from mmprefix.adapters import LoraArgs, add_lora, learning_modules
from mmprefix.arguments import CommandParser, keep_inputs
from mmprefix.data.images import UndecodableImageError, decode_image
from mmprefix.decoder import (
    DecoderArgs,
    attention_implementation,
    build_decoder,
    decoder_config,
    install,
    uninstall,
)
from mmprefix.errors import InputError
from mmprefix.evaluation.visualize import as_json, sample_pictures
from mmprefix.files import replacing
from mmprefix.interop.consolidate import consolidate
from mmprefix.interop.export import check_output, export, write_pretrained
from mmprefix.interop.paligemma import import_paligemma
from mmprefix.modeling import MMPrefixConfig, MMPrefixForConditionalGeneration
from mmprefix.probe import probe, tiny_copy
from mmprefix.processing import TokenizerArgs, load_tokenizer, text_vocab_size
from mmprefix.scaling import Machine, alternatives, computed_flops, expected_step, layout_of, units_of
from mmprefix.training.checkpoints import load_config, load_model
from mmprefix.training.layers import checkpoint_activations, recomputed_shares
from mmprefix.training.module import switch_off_training_mode
from mmprefix.vision import ConnectorArgs, VisionArgs, resolve_vision

_DTYPES = ("float32", "bfloat16", "float16")


def use_device(module: nn.Module, device: str) -> None:
    """Moves a module; InputError where there is no such device."""
    try:
        module.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or none here
        raise InputError(f"--device: cannot use {device}: {' '.join(str(error).split())[:200]}") from error


def generate(arguments: list[str]) -> int:
    """Prints one answer about an image, several or none."""
    parser = CommandParser("generate", "Answers about an image, several or none.")
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder, its model/ folder, or a .ckpt file")
    parser.add_argument("--image", nargs="+", default=[], type=Path, help="picture file, or several; by default none")
    parser.add_argument(
        "--instruction", required=True, help="text of the prefix; pictures stand in front, or where it says <image>"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--num_beams", type=int, default=1, help="1 is greedy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    for name in ("max_new_tokens", "num_beams"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    images = _read_images(options.image)
    model, processor = load_model(options.checkpoint)
    use_device(model, options.device)
    inputs = processor(images=images or None, text=options.instruction).to(options.device)
    generated = model.generate(
        **inputs, max_new_tokens=options.max_new_tokens, num_beams=options.num_beams, do_sample=False
    )
    print(processor.decode_generated(generated[:, inputs["input_ids"].shape[1] :])[0])
    return 0


def _read_images(paths: Sequence[Path]) -> list[Image.Image]:
    images = []
    for path in paths:
        if not path.is_file():
            raise InputError(f"--image: expected a picture file, found none at {path}")
        try:
            images.append(decode_image(path.read_bytes()))
        except UndecodableImageError as error:
            raise InputError(f"--image: {path}: {error}") from error
    return images


def visualize(arguments: list[str]) -> int:
    """Draws what a model does with one sample, and prints a line for each picture."""
    parser = CommandParser(
        "visualize",
        "One sample as a model computes it: its mask, each layer's attention, words over patches, loss of each token.",
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder, its model/ folder, or a .ckpt file")
    parser.add_argument("--image", nargs="+", default=[], type=Path, help="picture file, or several; by default none")
    parser.add_argument(
        "--instruction", required=True, help="text of the prefix; pictures stand in front, or where it says <image>"
    )
    parser.add_argument(
        "--target", help="text whose loss and attention are drawn; by default the model's greedy answer"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of that answer")
    parser.add_argument("--layers", help="numbers and ranges, with commas: 0,4-7; by default all")
    parser.add_argument("--heads", action="store_true", help="draw each head of each layer, too")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes losses of tokens and words there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens: expected at least 1, got {options.max_new_tokens}")
    if options.target is not None and not options.target:
        raise InputError("--target: expected text, got an empty one; without --target the model's own answer is drawn")
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir())):
        raise InputError(f"--out: expected a new or empty folder, {options.out} holds something")
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise InputError(f"--json: expected a file in a folder that is there, got {options.json}")
    if options.json is not None:
        keep_inputs("--json", options.json, options.image)
    layers = None if options.layers is None else _numbers(options.layers)
    images = _read_images(options.image)
    model, processor = load_model(options.checkpoint)
    count = int(model.decoder.config.num_hidden_layers)
    if layers is not None and max(layers) >= count:
        raise InputError(f"--layers: expected numbers from 0 to {count - 1}, the decoder's, got {options.layers!r}")
    use_device(model, options.device)
    drawn = sample_pictures(
        model, processor, images, options.instruction, options.target, layers=layers, heads=options.heads,
        max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    with replacing(options.out) as temporary:
        temporary.mkdir()
        for name, picture in drawn.pictures.items():
            picture.save(temporary / f"{name}.png")
    if options.json is not None:
        with replacing(options.json) as temporary:
            content = {"instruction": options.instruction, **as_json(drawn.trace)}
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for name, picture in drawn.pictures.items():
        print(f"{options.out / name}.png: {picture.width} x {picture.height}")
    for name, reason in drawn.missing.items():
        print(f"no {name}.png: {reason}")
    return 0


def _numbers(text: str) -> set[int]:
    """Numbers and ranges, ``0,4-7``."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if first > last:
            raise InputError(f"--layers: expected numbers and ranges with commas (0,4-7), got {text!r}")
        numbers.update(range(first, last + 1))
    return numbers


def probe_command(arguments: list[str]) -> int:
    """Prints what holds of a decoder; status 1 if it can't be a prefix LM."""
    parser = CommandParser("probe", "Proves on a tiny random copy of a decoder that it is an exact prefix LM.")
    parser.add_argument("--decoder", required=True, help="hub name or local folder; only its config is read")
    parser.add_argument("--attn_implementation", help="sdpa or eager; by default as training would choose")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the config")
    options = parser.parse_args(arguments)
    args = DecoderArgs(
        options.decoder,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )
    config = decoder_config(args)
    report = probe(config, attention_implementation(args, config))
    print(report.table())
    return 0 if report.refusal is None else 1


def import_paligemma_command(arguments: list[str]) -> int:
    """Writes a PaliGemma checkpoint as a folder of ours."""
    parser = CommandParser("import-paligemma", "PaliGemma or PaliGemma 2 -> a model folder of mmprefix.")
    parser.add_argument("--from", required=True, dest="source", help="hub name or local folder")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument(
        "--image_size", type=int, help="side of the input in pixels; position embeddings are interpolated to it"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="of one safetensors file")
    options = parser.parse_args(arguments)
    check_output(options.out, options.max_shard_size)
    model, processor = import_paligemma(options.source, options.image_size)
    write_pretrained(options.out, model, processor, max_shard_size=options.max_shard_size)
    spec = model.config.vision_spec
    print(
        f"{options.out}: {spec.name} at {spec.image_size[0]} px ({spec.num_tokens} image tokens), "
        f"{type(model.decoder).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}"
    )
    return 0


def export_command(arguments: list[str]) -> int:
    """Writes a trained model as a folder of transformers."""
    parser = CommandParser("export", "A trained model -> a folder that transformers loads.")
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder, its model/ folder, or a .ckpt file")
    parser.add_argument("--format", required=True, choices=("transformers", "paligemma"), dest="form")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; by default as they were trained")
    parser.add_argument("--max_shard_size", default="5GB", help="of one safetensors file")
    options = parser.parse_args(arguments)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    export(options.checkpoint, options.form, options.out, options.max_shard_size, dtype)
    print(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
    return 0


def consolidate_command(arguments: list[str]) -> int:
    """Writes a checkpoint's model as a folder of transformers, in little memory."""
    parser = CommandParser(
        "consolidate", "A checkpoint, of one process or of many -> a folder that transformers loads."
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder, or a checkpoint in it")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--max_shard_size", default="5GB", help="of one safetensors file; about the memory it takes")
    options = parser.parse_args(arguments)
    source = consolidate(options.checkpoint, options.out, options.max_shard_size)
    print(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}, from {source}")
    return 0


def estimate_command(arguments: list[str], read_settings: Callable[[list[str]], Mapping[str, Any]]) -> int:
    """Prints parameters, memory of a device, and the largest batch that fits.

    Args:
        arguments: of the command line.
        read_settings: reads what ``fit`` would run with (`model`, `data`, `trainer`) from ``--config`` and the
            settings behind it, without building anything.
    """
    parser = CommandParser(
        "estimate",
        "Memory of a training run, from its config alone: no weights are read and nothing is trained.",
        "Every setting of `fit` can be given, too (--data.batch_size 16).",
    )
    parser.add_argument("--config", required=True, action="append", help="config of `fit`; may be given several times")
    parser.add_argument("--devices", type=int, default=1, help="ranks")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), help="by default the config's")
    parser.add_argument("--memory", type=float, help="GiB of a device; by default those of the GPU here")
    parser.add_argument("--precision", help="by default the config's")
    _add_record_options(parser)
    options, rest = parser.parse_with_settings(arguments)
    if options.devices < 1:
        raise InputError(f"--devices: expected at least 1, got {options.devices}")
    record = _record(options)
    if options.memory is not None and not 0 < options.memory < float("inf"):
        raise InputError(f"--memory: expected more than 0 GiB, got {options.memory}")
    if options.memory is None and not torch.cuda.is_available():
        raise InputError("--memory: expected the GiB of a device, there is no GPU here to ask")
    model_settings, trainer, batch_size = _settings(options.config, rest, read_settings)
    precision = Precision.from_name(options.precision or trainer["precision"])
    layout = layout_of(trainer["strategy"], options.devices, options.strategy)
    model = configured_model(model_settings)
    lines = _parameter_lines(model)
    estimate = MemoryEstimate(
        model,
        record,
        precision,
        layout,
        accumulates=trainer["accumulate_grad_batches"] > 1,
        normalization=model_settings["loss_normalization"],
    )
    memory = options.memory * GIB if options.memory else torch.cuda.get_device_properties(0).total_memory
    largest = estimate.largest_batch(memory, batch_size)
    lines += _memory_lines(estimate, batch_size)
    lines.append(_line(f"largest batch size in {memory / GIB:.4g} GiB", "", f"{largest:,}"))
    replicas = f" with {layout.replicas} replicas" if layout.replicas > 1 else ""
    devices = f"{layout.devices} devices, {layout.strategy}{replicas}" if layout.devices > 1 else "1 device"
    lines += [
        "",
        f"{devices}, precision {options.precision or trainer['precision'] or '32-true'}; a record is an image of "
        f"{model.num_image_tokens} tokens, an instruction of {record.instruction_tokens} and {record.targets} "
        f"target(s) of {record.target_tokens}.",
        *ASSUMPTIONS,
    ]
    if layout.shards > 1:
        lines.append(
            "FSDP: a layer is gathered at a time, and what is in no layer stays gathered; prefetched layers come on top."
        )
    print("\n".join(lines))
    return 0


def _add_record_options(parser: CommandParser) -> None:
    parser.add_argument("--instruction_tokens", type=int, default=32, help="without BOS and separator")
    parser.add_argument("--target_tokens", type=int, default=32, help="of each target, without EOS")
    parser.add_argument("--targets", type=int, default=1, help="of each instruction")


def _record(options: Namespace) -> Record:
    for name, least in (("instruction_tokens", 0), ("target_tokens", 1), ("targets", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    return Record(options.instruction_tokens, options.target_tokens, options.targets)


def _settings(
    configs: list[str], others: list[str], read_settings: Callable[[list[str]], Mapping[str, Any]]
) -> tuple[Mapping[str, Any], Mapping[str, Any], int]:
    """`model`, `trainer` and the batch size that ``fit`` would run with."""
    settings = read_settings([*(word for path in configs for word in ("--config", path)), *others])
    batch_size: int = settings["data"]["batch_size"]
    if batch_size < 1:
        raise InputError(f"data.batch_size: expected at least 1, got {batch_size}")
    return settings["model"], settings["trainer"], batch_size


def scaling_command(arguments: list[str], read_settings: Callable[[list[str]], Mapping[str, Any]]) -> int:
    """Prints what a step sends, holds and takes on several numbers of devices, sharded fully, within nodes, or not.

    Args:
        arguments: of the command line.
        read_settings: see `estimate_command`.
    """
    parser = CommandParser(
        "scaling",
        "A training step on many devices, on paper: bytes sent, memory and time from its config and measured rates.",
        "Every setting of `fit` can be given, too (--data.batch_size 16, of each device).",
    )
    parser.add_argument("--config", required=True, action="append", help="config of `fit`; may be given several times")
    parser.add_argument("--devices", required=True, help="numbers of ranks, with commas: 8,64,512")
    parser.add_argument("--tflops", required=True, type=float, help="TFLOP/s that matrix products reach on a device")
    parser.add_argument("--bandwidth", required=True, type=float, help="GB/s that a device sends within its node")
    parser.add_argument("--between_nodes", type=float, help="GB/s that a node sends to others, all adapters together")
    parser.add_argument("--devices_per_node", type=int, default=8)
    parser.add_argument(
        "--latency", type=float, default=0.0, help="microseconds of one step of a collective; by default 0"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rows there, too")
    _add_record_options(parser)
    options, rest = parser.parse_with_settings(arguments)
    try:
        numbers = [int(word) for word in options.devices.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"--devices: expected numbers from 1, with commas, got {options.devices!r}")
    if options.devices_per_node < 1:
        raise InputError(f"--devices_per_node: expected at least 1, got {options.devices_per_node}")
    for name in ("tflops", "bandwidth", "between_nodes"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name}: expected more than 0, got {value}")
    if not 0 <= options.latency < float("inf"):
        raise InputError(f"--latency: expected at least 0, got {options.latency}")
    if options.json is not None and not options.json.parent.is_dir():
        raise InputError(f"--json: expected a file in a folder that is there, got {options.json}")
    machine = Machine(
        options.tflops, options.bandwidth, options.between_nodes, options.devices_per_node, options.latency
    )
    record = _record(options)
    model_settings, trainer, batch_size = _settings(options.config, rest, read_settings)
    rows = scaling_rows(model_settings, trainer, batch_size, record, machine, numbers)
    text = scaling_table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join([text, "", *SCALING_ASSUMPTIONS]))
    return 0


def scaling_rows(
    model_settings: Mapping[str, Any],
    trainer: Mapping[str, Any],
    batch_size: int,
    record: Record,
    machine: Machine,
    numbers: list[int],
) -> list[dict[str, Any]]:
    """A row for each number of devices and each of `scaling.alternatives`.

    Raises:
        InputError: see `scaling.expected_step`.
    """
    precision, micro_batches = Precision.from_name(trainer["precision"]), trainer["accumulate_grad_batches"]
    model = configured_model(model_settings)
    units, trained = units_of(model), trained_parts(model)
    shares = recomputed_shares(model, model_settings["gradient_checkpointing"])
    flops = computed_flops(model, record, batch_size, trained, shares)
    # All that can be refused, before the simulations.
    steps = [
        (name, layout, expected_step(units, layout, precision.stored, machine, flops, batch_size, micro_batches))
        for number in numbers
        for name, layout in alternatives(trainer["strategy"], number, machine.devices_per_node).items()
    ]
    memory: dict[Layout, float] = {}
    rows = []
    for name, layout, step in steps:
        # Replicas and DDP's devices hold the same, however many they are.
        alike = replace(layout, devices=min(2, layout.devices)) if layout.strategy == "ddp" else replace(
            layout, devices=layout.shards, replicas=1
        )  # fmt: skip
        if alike not in memory:
            estimate = MemoryEstimate(
                configured_model(model_settings), record, precision, alike, accumulates=micro_batches > 1,
                normalization=model_settings["loss_normalization"],
            )  # fmt: skip
            memory[alike] = estimate.total(batch_size)
        rows.append({
            "devices": layout.devices, "layout": name, "shards": layout.shards, "memory": memory[alike],
            "all_gather": step.sent["all_gather"], "reduce_scatter": step.sent["reduce_scatter"],
            "all_reduce": step.sent["all_reduce"], "compute": step.compute, "communication": step.communication,
            "exposed": step.exposed, "overlapped": step.overlapped, "sequential": step.sequential,
            "samples": step.samples,
        })  # fmt: skip
    return rows


def scaling_table(rows: list[dict[str, Any]]) -> str:
    """Of `scaling_rows`: GB are 1e9 bytes that a device sends in a step, GiB those that it holds, seconds of a step."""
    lines = [
        f"{'':>7}  {'':<10} {'memory':>8} {'gathered':>9} {'scattered':>9} {'reduced':>9} {'compute':>9} {'send':>9} "
        f"{'step':>17} {'efficiency':>11} {'samples/s':>17}",
        f"{'devices':>7}  {'layout':<10} {'GiB':>8} {'GB':>9} {'GB':>9} {'GB':>9} {'s':>9} {'s':>9} {'s':>17} {'%':>11}",
        "-" * 125,
    ]
    for row in rows:
        best, worst, compute, samples = (row[key] for key in ("overlapped", "sequential", "compute", "samples"))
        sent = (f"{row[kind] / 1e9:>9.3f}" for kind in ("all_gather", "reduce_scatter", "all_reduce"))
        step, efficiency = f"{best:.4f} - {worst:.4f}", f"{100 * compute / worst:.0f} - {100 * compute / best:.0f}"
        lines.append(
            f"{row['devices']:>7}  {row['layout']:<10} {row['memory'] / GIB:>8.2f} {' '.join(sent)} {compute:>9.4f} "
            f"{row['communication']:>9.4f} {step:>17} {efficiency:>11} "
            f"{f'{samples / worst:,.0f} - {samples / best:,.0f}':>17}"
        )
    return "\n".join(lines)


SCALING_ASSUMPTIONS = (
    "full: shards over all devices; hybrid: within nodes, a replica for each, or as many as the config has; ddp: none.",
    "Sent: by a device in an optimizer step, ring algorithms; send: all collectives, one after the other.",
    "Step: from all hidden behind compute, but for what is in no layer, to nothing hidden. Compute is matrix products at",
    "the given rate, recomputed ones included: no norms, optimizer step, data or start of kernels. Memory: see `estimate`.",
)


ASSUMPTIONS = (
    "The total is the peak of one simulated step, which is less than the sum of its parts where they don't live together.",
    "Tensors only: add the CUDA context (0.5 to 1 GiB) and some percent for the allocator's fragments.",
    "Activations and logits of a record: what one more adds to a large batch.",
    "Parts that unfreeze later count as trained. One row per record, as long as the longest; no torch.compile.",
    "Operations are the CPU's: attention is fused (eager attention is not), autocast keeps norms as the CPU does.",
)


def configured_model(settings: Mapping[str, Any]) -> MMPrefixForConditionalGeneration:
    """The model of ``fit``'s settings (`MMPrefixModule`'s, plain values) on the meta device.

    In training mode, frozen and checkpointed as they say. Of a hub name or folder, only the config is read.

    Raises:
        InputError: settings that make no model, or nothing to train.
    """
    if settings["pretrained"] is not None:
        config = load_config(Path(settings["pretrained"]))
    else:
        decoder = DecoderArgs(**settings["decoder"])
        if decoder.load_in_4bit:
            raise InputError("model.decoder.load_in_4bit: expected false: memory of 4-bit weights is not estimated")
        if decoder.config is not None and "vocab_size" not in decoder.config:
            tokenizer = load_tokenizer(TokenizerArgs(**settings["tokenizer"]), None)
            decoder = replace(decoder, config={"vocab_size": text_vocab_size(tokenizer), **decoder.config})
        text_config = decoder_config(decoder)
        with torch.device("meta"):
            attention = build_decoder(replace(decoder, pretrained=False), text_config).config._attn_implementation
        config = MMPrefixConfig(
            vision_config=resolve_vision(VisionArgs(**settings["vision"])).to_dict(),
            text_config=text_config,
            connector=vars(ConnectorArgs(**settings["connector"])),
            image_token_id=text_config.vocab_size,
            decoder_attention=attention,
        )
        # Where no tiny copy can be made, the estimate is of rows, a dense mask and all logits at once.
        with suppress(InputError, ValueError, RuntimeError):
            report, tiny = probe(text_config, attention), install(tiny_copy(text_config, attention))
            config.note(report, tiny)
            uninstall(tiny)
    if settings["attention"] == "dense":
        config.mask_free = False
    if settings["prefix_visibility"] is not None:
        config.prefix_visibility = settings["prefix_visibility"]
    model = meta_model(config).train()
    checkpoint_activations(model, settings["gradient_checkpointing"])
    for name in PARTS:
        learning = settings[f"train_{name}"]
        if learning["freeze"]:
            switch_off_training_mode(getattr(model, name).requires_grad_(False))
        elif learning["lora"] is not None:
            add_lora(model, name, LoraArgs(**learning["lora"]))
            switch_off_training_mode(getattr(model, name))
            for module in learning_modules(model, name):
                module.training = True
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("model: expected a part that learns, all of vision, connector and decoder are frozen")
    return model


def _line(name: str, *values: str) -> str:
    return f"{name:<52}" + "".join(f"{value:>12}" for value in values)


def _parameter_lines(model: MMPrefixForConditionalGeneration) -> list[str]:
    lines = [_line("parameters (millions)", "trained", "frozen"), "-" * 76]
    for name in PARTS:
        parameters = list(getattr(model, name).parameters())
        counts = (sum(p.numel() for p in parameters if p.requires_grad is learns) for learns in (True, False))
        lines.append(_line(name, *(f"{count / 1e6:,.3f}" for count in counts)))
    return [*lines, ""]


def _memory_lines(estimate: MemoryEstimate, batch_size: int) -> list[str]:
    each, fixed = estimate.each_record()
    rows = [
        ("weights", estimate.weights),
        ("gradients", estimate.gradients),
        ("AdamW state", estimate.optimizer),
        *([("these three, in the host's memory", estimate.host)] if estimate.host else []),
        ("buckets (ddp) or gathered weights (fsdp)", estimate.communication),
        ("activations, whatever the batch size", fixed),
        ("activations, each record", each["activations"]),
        ("logits, each record", each["logits"]),
        (f"total at batch size {batch_size}", estimate.total(batch_size)),
    ]
    unit, size = ("GiB", GIB) if rows[-1][1] >= GIB else ("MiB", GIB / 1024)
    head = [f"memory of a device ({unit})", "-" * 76]
    return [*head, *(_line(name, "", f"{value / size:,.3f}") for name, value in rows)]


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "generate": generate,
    "visualize": visualize,
    "probe": probe_command,
    "import-paligemma": import_paligemma_command,
    "export": export_command,
    "consolidate": consolidate_command,
}
