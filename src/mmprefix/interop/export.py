"""A trained model as a folder that others load: safetensors in shards, complete or absent.

`transformers` holds any model of ours, for ``AutoModelForImageTextToText``, ``AutoProcessor`` and
``pipeline("image-text-to-text")`` once `mmprefix` is imported; `paligemma` needs no `mmprefix` to load.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch

from mmprefix.errors import InputError
from mmprefix.files import replacing
from mmprefix.interop.paligemma import export_paligemma
from mmprefix.training.checkpoints import load_model

ExportFormat = Literal["transformers", "paligemma"]


def check_output(out: Path, max_shard_size: str) -> None:
    """Refuses to write over something, before the work is done.

    Raises:
        InputError: a file, or a folder that holds anything; a size that is none.
    """
    if re.fullmatch(r"\d+(\.\d+)?[KMGT]i?B", max_shard_size) is None:
        raise InputError(f"--max_shard_size: expected a number with KB, MB or GB, got {max_shard_size!r}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"--out: expected a new or empty folder, {out} holds something")


def write_pretrained(out: Path, *parts: Any, max_shard_size: str = "5GB") -> None:
    """Saves models and processors side by side, beside ``out`` first and moved into place when complete.

    Raises:
        InputError: ``out`` holds something.
        OSError: the disk is full; nothing is left behind.
    """
    check_output(out, max_shard_size)
    with replacing(out) as temporary:
        temporary.mkdir()
        for part in parts:
            part.save_pretrained(temporary, max_shard_size=max_shard_size)


def export(
    checkpoint: Path,
    form: ExportFormat,
    out: Path,
    max_shard_size: str = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Writes what a run left behind as a folder of transformers.

    Args:
        checkpoint: as `training.checkpoints.load_model` takes it.
        form: which kind of folder.
        out: where; must not hold anything.
        max_shard_size: of one safetensors file.
        dtype: of the weights; by default as they were trained.
    """
    check_output(out, max_shard_size)
    parts: tuple[Any, Any] = load_model(checkpoint)
    if dtype is not None:
        parts[0].to(dtype)
    if form == "paligemma":
        parts = export_paligemma(*parts)
    write_pretrained(out, *parts, max_shard_size=max_shard_size)
