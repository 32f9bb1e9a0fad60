"""`cache-features`: runs the encoder over every image of some splits, once, and keeps what it gives on disk.

Features are computed in float32 (TensorFloat-32 on a GPU) and rounded to bfloat16 as they are stored, so the cache of
an encoder serves training in any precision.
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mmprefix.arguments import CommandParser
from mmprefix.commands import use_device
from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.features import EncoderInput, EncoderInputs, FeatureWriter
from mmprefix.errors import InputError
from mmprefix.packing import BadSample
from mmprefix.training.module import MMPrefixModule

SPLITS = ("train", "val", "test", "predict")
_SHOWN = 10
_CHUNK = 8  # images that a worker hands over at once


def parse(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The command's own options, and the others, which are those of ``fit``."""
    parser = CommandParser(
        "cache-features", "Runs the encoder of a config over every image once. Other options are those of fit."
    )
    parser.add_argument("--out", required=True, type=Path, help="new folder, or one that was begun: it is continued")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, help="by default train, val and test where configured")
    parser.add_argument("--batch_size", type=int, help="images in a pass; by default data.eval_batch_size")
    parser.add_argument("--num_workers", type=int, help="loader processes; by default data.num_workers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace the features that the folder holds")
    options, others = parser.parse_with_settings(arguments)
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name}: expected at least {least}, got {value}")
    return options, others


def cache_features(module: MMPrefixModule, data: ShardDataModule, options: Namespace) -> int:
    """Writes the cache, prints what is in it, and returns the exit status: 0, or 130 after Ctrl-C.

    Args:
        module: whose encoder runs.
        data: whose splits are read.
        options: from `parse`.

    Raises:
        InputError: a split without shards, a folder that holds something else, an image that must not be skipped.
    """
    started = time.monotonic()
    try:
        module.check_frozen_encoder()
    except InputError as error:
        warnings.warn(f"with these settings, fit takes no features: {error}", stacklevel=2)
    data.check_tiles("cache-features")
    data.prepare_data()
    splits = options.splits or [split for split in SPLITS[:3] if data.has(split)]
    collections = [data.shards(split) for split in dict.fromkeys(splits)]
    spec, encoder = module.model.config.vision_spec, module.model.vision.eval()
    writer: FeatureWriter | None = None
    try:
        with _interrupts_held():  # one that comes once the index is there is answered with what it holds
            writer = FeatureWriter(
                options.out, module.feature_key(), (spec.num_tokens, spec.width), overwrite=options.overwrite
            )
        known = len(writer.stored)
        inputs = EncoderInputs(collections, module.processor.transform, writer.stored)
        use_device(encoder, options.device)
        loader: DataLoader[EncoderInput | BadSample] = DataLoader(
            inputs,
            batch_size=_CHUNK,
            collate_fn=list,
            num_workers=data.num_workers if options.num_workers is None else options.num_workers,
        )
        batch_size = options.batch_size or data.eval_batch_size
        what = f"features of {', '.join(splits)}"
        unusable: list[str] = []
        seen: set[str] = set()
        pending: dict[str, Tensor] = {}
        # In a log file each refresh is a line of its own.
        refresh = 0.1 if sys.stderr.isatty() else 30.0
        with _interrupts_held():
            chunks = iter(loader)
        with tqdm(desc=what, total=len(inputs), mininterval=refresh, unit="image") as bar:
            for item in chain.from_iterable(chunks):
                bar.update()
                if isinstance(item, BadSample):
                    raise InputError(str(item))
                seen.add(item.digest)
                if item.undecodable is not None:
                    unusable.append(f"{item.shard}: {item.key}: {item.undecodable}")
                    if data.undecodable_is_fatal:
                        raise InputError(unusable[-1])
                    writer.add_undecodable(item.digest, item.undecodable)
                elif item.pixels is not None and item.digest not in writer:
                    # A copy: pixels from a worker hold a file descriptor each, and a process may have 1,024.
                    pending[item.digest] = item.pixels.clone()
                if len(pending) == batch_size:
                    _encode(module, pending, writer)
            if pending:
                _encode(module, pending, writer)
        writer.close()
    except KeyboardInterrupt:
        if writer is None:
            raise
        print(
            f"interrupted; {options.out} holds {len(writer.stored)} images in {writer.num_shards} finished shards: "
            "the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    seconds = time.monotonic() - started
    print(
        f"{options.out}: {len(inputs)} images of {', '.join(splits)}, {len(seen)} unique, "
        f"{len(writer.stored) - known} encoded now, {known} there before"
    )
    print(f"{writer.num_bytes:,} bytes in {writer.num_shards} shards, {spec.num_tokens} x {spec.width} for each image")
    if unusable:
        print(f"{len(unusable)} undecodable image(s):", *unusable[:_SHOWN], sep="\n  ")
        if len(unusable) > _SHOWN:
            print(f"  and {len(unusable) - _SHOWN} more")
    print(f"{seconds:.1f} seconds; train on it with --data.feature_cache {options.out}")
    return 0


@torch.inference_mode()
def _encode(module: MMPrefixModule, pending: dict[str, Tensor], writer: FeatureWriter) -> None:
    """Empties ``pending``: digest -> float32 ``[3, H, W]`` pixels."""
    encoder = module.model.vision
    device = next(encoder.parameters()).device
    with _tensor_float(device):
        features = encoder(torch.stack(list(pending.values())).to(device)).float().cpu()
    for digest, of_image in zip(pending, features, strict=True):
        if not of_image.isfinite().all():
            raise InputError(f"model.vision: expected finite features, got others for the image with SHA-256 {digest}")
        writer.add(digest, of_image)
    pending.clear()


@contextmanager
def _tensor_float(device: torch.device) -> Iterator[None]:
    """Products in TensorFloat-32 on a GPU: several times faster, with more digits than bfloat16 keeps."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block ends; processes that start in it never hear of it.

    It reaches the whole process group, and workers would each print a traceback; and what arrives while one is forked,
    Python's own hooks may swallow.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
