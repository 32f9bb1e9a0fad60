"""The commands beside training: generate, probe, import-paligemma, export.

Each takes its arguments, raises `InputError` on bad ones, and returns the exit status.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from mmprefix.data.images import UndecodableImageError, decode_image
from mmprefix.decoder import DecoderArgs, attention_implementation, decoder_config
from mmprefix.errors import InputError
from mmprefix.interop.export import check_output, export, write_pretrained
from mmprefix.interop.paligemma import import_paligemma
from mmprefix.probe import probe
from mmprefix.training.checkpoints import load_model

_DTYPES = ("float32", "bfloat16", "float16")


class CommandParser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"python -m mmprefix {command}", description=description, allow_abbrev=False)
        self.command = command

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.command}: {message}")


def use_device(module: nn.Module, device: str) -> None:
    """Moves a module; InputError where there is no such device."""
    try:
        module.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or none here
        raise InputError(f"--device: cannot use {device}: {' '.join(str(error).split())[:200]}") from error


def generate(arguments: list[str]) -> int:
    """Prints one answer about one image."""
    parser = CommandParser("generate", "Answers about one image.")
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder, its model/ folder, or a .ckpt file")
    parser.add_argument("--image", required=True, type=Path, help="picture file")
    parser.add_argument("--instruction", required=True, help="text of the prefix")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--num_beams", type=int, default=1, help="1 is greedy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    for name in ("max_new_tokens", "num_beams"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if not options.image.is_file():
        raise InputError(f"--image: expected a picture file, found none at {options.image}")
    try:
        image = decode_image(options.image.read_bytes())
    except UndecodableImageError as error:
        raise InputError(f"--image: {options.image}: {error}") from error
    model, processor = load_model(options.checkpoint)
    use_device(model, options.device)
    inputs = processor(images=image, text=options.instruction).to(options.device)
    generated = model.generate(
        **inputs, max_new_tokens=options.max_new_tokens, num_beams=options.num_beams, do_sample=False
    )
    print(processor.decode_generated(generated[:, inputs["input_ids"].shape[1] :])[0])
    return 0


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


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "generate": generate,
    "probe": probe_command,
    "import-paligemma": import_paligemma_command,
    "export": export_command,
}
