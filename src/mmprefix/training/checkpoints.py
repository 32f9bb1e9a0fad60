"""The checkpoint to resume from, and the model inside one.

A checkpoint is one file, ``step=00000280.ckpt``, or, of a sharded model, a folder of that name (`sharded`). Either is
written under a temporary name and renamed when complete (`saving`), so the one with the highest step is always whole.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from mmprefix.adapters import add_stored, merge
from mmprefix.decoder import load_exactly
from mmprefix.errors import InputError
from mmprefix.files import replacing
from mmprefix.modeling import MMPrefixConfig, MMPrefixForConditionalGeneration
from mmprefix.processing import MMPrefixProcessor
from mmprefix.training import sharded

FOLDER = "checkpoints"
FILE_NAME = "step={step:08d}"
BEST_FILE = "best.json"
"""What validation said of checkpoints, beside them."""

CONTENT_KEY = "mmprefix"
"""Where a checkpoint keeps the model's config and the processor's files."""

TIED = "tied"
"""Where a folder's checkpoint keeps second names of tensors, each with the name that it is stored under."""

_STEP = re.compile(r"^step=(\d+)\.ckpt$")


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint of the highest step under ``run_folder/checkpoints``, or None."""
    steps = {
        int(match.group(1)): path for path in (run_folder / FOLDER).glob("*.ckpt") if (match := _STEP.match(path.name))
    }
    return steps[max(steps)] if steps else None


@dataclass
class Scores:
    """What validation said of the steps of a run.

    Attributes:
        metric: its name.
        mode: whether more or less of it is better.
        values: name of the checkpoint of a step -> value, in the order of validation; also of steps that were not saved.
    """

    metric: str
    mode: Literal["max", "min"]
    values: dict[str, float] = field(default_factory=dict)

    def ranked(self, names: Collection[str]) -> list[str]:
        """Those of ``names`` that have a number for a value, best first; of equals, the earlier."""
        numbers = [name for name in sorted(names) if not math.isnan(self.values.get(name, math.nan))]
        sign = 1 if self.mode == "min" else -1
        return sorted(numbers, key=lambda name: sign * self.values[name])

    def write(self, folder: Path) -> None:
        """Writes ``best.json``."""
        with replacing(folder / BEST_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Scores | None:
        """From ``best.json``, None where there is none.

        Raises:
            InputError: it is something else.
        """
        path = folder / BEST_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: expected metric, mode and values as fit writes them: {error}") from error


def best_checkpoint(run_folder: Path) -> tuple[Path, str, float] | None:
    """Of the complete checkpoints under ``run_folder/checkpoints`` the best, with its metric and value, or None.

    Raises:
        InputError: a file of scores that can't be read.
    """
    folder = run_folder / FOLDER
    scores = Scores.read(folder)
    ranked = [] if scores is None else scores.ranked([name for name in scores.values if (folder / name).exists()])
    if scores is None or not ranked:
        return None
    return folder / ranked[0], scores.metric, scores.values[ranked[0]]


def remove_leftovers(run_folder: Path) -> None:
    """Deletes what kills have left of checkpoints that were being written or removed; nothing of it has a checkpoint's name."""
    for path in [*(run_folder / FOLDER).glob(".*.ckpt.part"), *(run_folder / FOLDER).glob(".*.ckpt.*.part"),
                 *(run_folder / FOLDER).glob(".*.ckpt.old")]:  # fmt: skip
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def set_aside_newer(checkpoint: Path) -> list[Path]:
    """Renames checkpoints of later steps beside ``checkpoint``, or ``last`` would go back to the branch just left."""
    match = _STEP.match(checkpoint.name)
    if match is None:
        return []
    newer = [
        path
        for path in checkpoint.parent.glob("*.ckpt")
        if (other := _STEP.match(path.name)) and int(other.group(1)) > int(match.group(1))
    ]
    return [path.rename(path.with_suffix(".ckpt.left")) for path in sorted(newer)]


def read_checkpoint(path: Path, tensors: str | None = "") -> dict[str, Any]:
    """What a checkpoint holds. Tensors of a file are mapped from it rather than read.

    Args:
        path: a file or a folder.
        tensors: of a folder, those whose stored names begin so; None for none, neither weights nor states of optimizers.

    Raises:
        InputError: no checkpoint, or not one of ours.
    """
    folder = path.is_dir()
    if not (path / sharded.STATE_FILE if folder else path).is_file():
        raise InputError(f"{path}: expected a checkpoint file or folder, there is none")
    try:
        if folder:
            checkpoint = sharded.state(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever its unpickler or zip reader does
        message = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: expected a checkpoint of mmprefix, cannot read it: {message}") from error
    if not isinstance(checkpoint, dict) or CONTENT_KEY not in checkpoint:
        raise InputError(f"{path}: expected a checkpoint of mmprefix, got one without the key {CONTENT_KEY!r}")
    if folder and tensors is not None:
        checkpoint = sharded.join(sharded.read(path, tensors), checkpoint)
        weights = checkpoint["state_dict"]
        weights.update({name: weights[first] for name, first in checkpoint[TIED].items() if first in weights})
    return checkpoint


def check_fits(
    model: Mapping[str, torch.Size], stored: Mapping[str, torch.Size], path: str | Path, optional: Collection[str] = ()
) -> None:
    """Compares the tensors of a checkpoint with those of the model that shall go on from it.

    Args:
        model: shapes by name.
        stored: shapes by name.
        path: for the message.
        optional: names that either may lack.

    Raises:
        InputError: naming what differs.
    """
    differing = [
        f"{name} {tuple(stored[name])} there, {tuple(shape)} in the model"
        for name, shape in model.items() if name in stored and stored[name] != shape
    ]  # fmt: skip
    missing = [name for name in model if name not in stored and name not in optional]
    unknown = [name for name in stored if name not in model and name not in optional]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for names, what in ((differing, "of other shapes"), (missing, "missing"), (unknown, "that the model has not"))
        if names
    ]
    if problems:
        raise InputError(f"--ckpt_path {path}: the checkpoint does not fit the configured model: {'; '.join(problems)}")


def load_model(path: Path) -> tuple[MMPrefixForConditionalGeneration, MMPrefixProcessor]:
    """Model and processor, ready to generate, from what a run left behind; adapters are merged.

    Args:
        path: a checkpoint, a folder of `save_pretrained`, or a run folder that holds either.

    Raises:
        InputError: nothing usable there.
    """
    path = _find_model(path)
    if path.is_dir() and not _is_sharded(path):
        model: MMPrefixForConditionalGeneration = load_exactly(MMPrefixForConditionalGeneration, path, str(path))
        try:
            return model.eval(), MMPrefixProcessor.from_pretrained(path)
        except Exception as error:  # files that are missing or broken, each reader with errors of its own
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise InputError(f"{path}: expected processor and tokenizer files, cannot read them: {message}") from error
    checkpoint = read_checkpoint(path, sharded.WEIGHTS)
    content = checkpoint[CONTENT_KEY]
    model = MMPrefixForConditionalGeneration(MMPrefixConfig(**content["config"]))
    add_stored(model, content.get("adapters", {}))
    weights = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
    # Assigned, not copied: they keep the precision they were trained in, whatever the config says.
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    merge(model)
    for config in (model.config, model.config.text_config, model.decoder.config):
        config.dtype = model.dtype
    if "generation_config" in content:
        model.generation_config = GenerationConfig.from_dict(content["generation_config"])
    return model.eval(), MMPrefixProcessor.from_files(content["processor"])


def load_config(path: Path) -> MMPrefixConfig:
    """The config alone of what `load_model` would load.

    Raises:
        InputError: nothing usable there.
    """
    path = _find_model(path)
    if path.is_dir() and not _is_sharded(path):
        try:
            config: MMPrefixConfig = MMPrefixConfig.from_pretrained(path)
        except Exception as error:  # whatever a broken file raises
            raise InputError(f"{path}/config.json: cannot read it: {' '.join(str(error).split())[:200]}") from error
        return config
    return MMPrefixConfig(**read_checkpoint(path, None)[CONTENT_KEY]["config"])


def find_checkpoint(path: Path) -> Path:
    """A checkpoint, or the newest one of a run folder.

    Raises:
        InputError: neither.
    """
    if path.is_dir() and not _is_sharded(path):
        newest = newest_checkpoint(path)
        if newest is None:
            raise InputError(f"{path}: expected {FOLDER}/step=*.ckpt in it, found none")
        return newest
    return path


def _find_model(path: Path) -> Path:
    """A folder of `save_pretrained` or a checkpoint, where a run folder holds either."""
    if not path.is_dir() or _is_sharded(path):
        return path
    if (path / "config.json").is_file():
        _check_model_type(path)
        return path
    if (path / "model" / "config.json").is_file():
        return _find_model(path / "model")
    newest = newest_checkpoint(path)
    if newest is None:
        raise InputError(f"{path}: expected model/config.json or {FOLDER}/step=*.ckpt in it, found neither")
    return newest


def _is_sharded(path: Path) -> bool:
    return (path / sharded.STATE_FILE).is_file()


def _check_model_type(folder: Path) -> None:
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}/config.json: expected a JSON object: {error}") from error
    if model_type != MMPrefixConfig.model_type:
        hint = ": import it with `import-paligemma` first" if model_type == "paligemma" else ""
        raise InputError(f"{folder}: expected a model folder of mmprefix, got model type {model_type!r}{hint}")
