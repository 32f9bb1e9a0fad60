"""Checkpoints that are complete or absent, the one to resume from, and the model inside one.

A checkpoint is one file, ``step=00000280.ckpt``, written under a temporary name and renamed when complete. Resuming
takes the one with the highest step: with atomic files, the newest is always whole.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from transformers import GenerationConfig

from mmprefix.adapters import add_stored, merge
from mmprefix.decoder import load_exactly
from mmprefix.errors import InputError
from mmprefix.files import replacing
from mmprefix.modeling import MMPrefixConfig, MMPrefixForConditionalGeneration
from mmprefix.processing import MMPrefixProcessor

FOLDER = "checkpoints"
FILE_NAME = "step={step:08d}"
CONTENT_KEY = "mmprefix"
"""Where a checkpoint keeps the model's config and the processor's files."""

_STEP = re.compile(r"^step=(\d+)\.ckpt$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a full disk or a kill leaves the previous one whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """See `lightning.fabric.plugins.CheckpointIO.save_checkpoint`.

        Raises:
            OSError: the file cannot be written; what stood there before is untouched.
        """
        try:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # else a crash of the machine could leave a renamed, empty file
        except (OSError, RuntimeError) as error:
            # torch's writer hides a full disk behind a RuntimeError of its own, about a position.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            reason = f"cannot save {path}: {cause.strerror}; the checkpoint before it is untouched"
            raise OSError(cause.errno, reason) from error


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint of the highest step under ``run_folder/checkpoints``, or None."""
    steps = {
        int(match.group(1)): path for path in (run_folder / FOLDER).glob("*.ckpt") if (match := _STEP.match(path.name))
    }
    return steps[max(steps)] if steps else None


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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A ``.ckpt`` file's content, tensors mapped from the file rather than read.

    Raises:
        InputError: no file, not a checkpoint, or not one of ours.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a checkpoint file or folder, there is none")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever its unpickler or zip reader does
        message = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: expected a checkpoint of mmprefix, cannot read it: {message}") from error
    if not isinstance(checkpoint, dict) or CONTENT_KEY not in checkpoint:
        raise InputError(f"{path}: expected a checkpoint of mmprefix, got one without the key {CONTENT_KEY!r}")
    return checkpoint


def load_model(path: Path) -> tuple[MMPrefixForConditionalGeneration, MMPrefixProcessor]:
    """Model and processor, ready to generate, from what a run left behind; adapters are merged.

    Args:
        path: a ``.ckpt`` file, a folder of `save_pretrained`, or a run folder that holds either.

    Raises:
        InputError: nothing usable there.
    """
    path = _find_model(path)
    if path.is_dir():
        model: MMPrefixForConditionalGeneration = load_exactly(MMPrefixForConditionalGeneration, path, str(path))
        try:
            return model.eval(), MMPrefixProcessor.from_pretrained(path)
        except Exception as error:  # files that are missing or broken, each reader with errors of its own
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise InputError(f"{path}: expected processor and tokenizer files, cannot read them: {message}") from error
    checkpoint = read_checkpoint(path)
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
    if path.is_dir():
        try:
            config: MMPrefixConfig = MMPrefixConfig.from_pretrained(path)
        except Exception as error:  # whatever a broken file raises
            raise InputError(f"{path}/config.json: cannot read it: {' '.join(str(error).split())[:200]}") from error
        return config
    return MMPrefixConfig(**read_checkpoint(path)[CONTENT_KEY]["config"])


def _find_model(path: Path) -> Path:
    """A folder of `save_pretrained` or a checkpoint file, where a run folder holds either."""
    if not path.is_dir():
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


def _check_model_type(folder: Path) -> None:
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}/config.json: expected a JSON object: {error}") from error
    if model_type != MMPrefixConfig.model_type:
        hint = ": import it with `import-paligemma` first" if model_type == "paligemma" else ""
        raise InputError(f"{folder}: expected a model folder of mmprefix, got model type {model_type!r}{hint}")
