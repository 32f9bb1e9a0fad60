"""The decoder's weights in 4 bits (NF4 with double quantisation, by bitsandbytes), under adapters: QLoRA, arXiv 2305.14314.

Such weights never learn, and what is saved of them is whole: a checkpoint holds them as the 4 bits say, in the precision
they had before, and is read without bitsandbytes. A run that is resumed quantises the pretrained weights again.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from mmprefix.errors import InputError


def loading_options() -> dict[str, Any]:
    """For `from_pretrained`: 4 bits, on the GPU of this process, where alone they can be made.

    Raises:
        InputError: no GPU, or no bitsandbytes.
    """
    where = "model.decoder.load_in_4bit"
    if not torch.cuda.is_available():
        raise InputError(f"{where}: expected a CUDA device, there is none")
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{where}: expected bitsandbytes, which is not installed: pip install 'mmprefix[qlora]'")
    number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    return {"quantization_config": quantization, "device_map": {"": number}}


def save_whole(model: PreTrainedModel) -> None:
    """Makes a model's quantised layers give and take weights of any other run, in place of their 4 bits."""
    del model.config.quantization_config  # what is saved has none
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.register_state_dict_post_hook(_give_whole)
            layer.register_load_state_dict_pre_hook(_compare)


# Hooks are plain functions without a state of their own, so that models can be copied and pickled.


def _whole(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer.weight
    whole: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return whole


def _give_whole(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:  # scales and code book
        del state[name]
    state[f"{prefix}weight"] = _whole(layer)


def _compare(
    layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
    errors: list[str],
) -> None:  # fmt: skip
    stored, own = state.get(f"{prefix}weight"), _whole(layer)
    if stored is None:
        return
    if stored.shape != own.shape or not torch.equal(stored.to(own), own):
        errors.append(f"{prefix}weight: expected the 4-bit weights that the decoder has, got others")
    state[f"{prefix}weight"] = layer.weight
