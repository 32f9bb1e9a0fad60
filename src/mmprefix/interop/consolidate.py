"""A checkpoint as the folder that `export --format transformers` writes, one output file in memory at a time.

No process group and no model are needed: tensors go from the checkpoint's files to those of the folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import GenerationConfig

from mmprefix.accounting import meta_model
from mmprefix.errors import InputError
from mmprefix.files import replacing
from mmprefix.interop.export import check_output
from mmprefix.modeling import MMPrefixConfig
from mmprefix.processing import MMPrefixProcessor
from mmprefix.training import sharded
from mmprefix.training.checkpoints import CONTENT_KEY, find_checkpoint, read_checkpoint

_MODEL = sharded.WEIGHTS + "model."
_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


def consolidate(checkpoint: Path, out: Path, max_shard_size: str = "5GB") -> Path:
    """Writes the model of a checkpoint.

    Args:
        checkpoint: a folder of many processes, a file, or a run folder with either.
        out: where; must not hold anything.
        max_shard_size: of one safetensors file, and so about the memory that is needed.

    Returns:
        the checkpoint that it was.

    Raises:
        InputError: no checkpoint, adapters in it, or ``out`` holds something.
    """
    check_output(out, max_shard_size)
    path = find_checkpoint(checkpoint)
    description = read_checkpoint(path, None)
    content = description[CONTENT_KEY]
    if content.get("adapters"):
        raise InputError(f"{path}: expected a checkpoint without adapters, which are merged by `export`")
    mapped: dict[str, Tensor] = {}
    if path.is_dir():
        infos = {n: one for n, one in sharded.infos(path).items() if n.startswith(_MODEL)}
    else:
        mapped = {n: t for n, t in sharded.split(description)[0].items() if n.startswith(_MODEL)}
        infos = {name: sharded.TensorInfo(tensor.shape, tensor.dtype) for name, tensor in mapped.items()}
    config = MMPrefixConfig(**content["config"])
    tied = meta_model(config).all_tied_weights_keys  # stored once, as `save_pretrained` does
    files = _split({n: one for n, one in infos.items() if n.removeprefix(_MODEL) not in tied}, _bytes(max_shard_size))
    dtypes = {one.dtype for one in infos.values() if one.dtype.is_floating_point}
    for part in (config, config.text_config):
        part.dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    with replacing(out) as temporary:
        temporary.mkdir()
        index: dict[str, str] = {}
        for number, names in enumerate(files, 1):
            file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = mapped or {n: torch.empty(infos[n].shape, dtype=infos[n].dtype) for n in names}
            if path.is_dir():
                sharded.read_into(tensors, path)
            stored = {name.removeprefix(_MODEL): tensors[name].contiguous() for name in names}
            safetensors.torch.save_file(stored, temporary / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(stored, file))
        if len(files) > 1:
            total = sum(_size(infos[_MODEL + name]) for name in index)
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
            (temporary / "model.safetensors.index.json").write_text(text + "\n")
        config.architectures = ["MMPrefixForConditionalGeneration"]
        config.save_pretrained(temporary)
        if "generation_config" in content:
            GenerationConfig.from_dict(content["generation_config"]).save_pretrained(temporary)
        MMPrefixProcessor.from_files(content["processor"]).save_pretrained(temporary)
    return path


def _bytes(size: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)(\D+)", size).groups()  # type: ignore[union-attr]  # `check_output` has looked
    return int(float(number) * (1024 if "i" in unit else 1000) ** _UNITS[unit[0]])


def _size(info: sharded.TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _split(infos: Mapping[str, sharded.TensorInfo], limit: int) -> list[list[str]]:
    """Names of each file, in order; a tensor over the limit has one of its own."""
    files: list[list[str]] = [[]]
    used = 0
    for name, info in infos.items():
        if files[-1] and used + _size(info) > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += _size(info)
    return files
