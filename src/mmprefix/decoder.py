"""Any transformers causal LM as a prefix LM: build it, and make it follow the prefix mask.

`build_decoder` makes the decoder from a hub name, a local folder or an inline config. `install` wraps transformers'
mask functions and hooks into the output layer; a decoder behaves as before when no plan is set, and `uninstall` takes
everything back. Whether an architecture obeys is found out in `probe`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from weakref import WeakSet

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mmprefix.attention import (
    DENSE_IMPLEMENTATIONS,
    current_plan,
    register_masks,
    select_label_positions,
    unregister_masks,
)
from mmprefix.errors import InputError, out_of_memory
from mmprefix.four_bit import loading_options, save_whole
from mmprefix.last_layer import release_last_layer
from mmprefix.loss import LogitTransform
from mmprefix.stored_weights import parameters_on_meta, stored_dtype, take_buffers

WINDOW_SETTINGS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
"""Settings of transformers' configs that are lengths of windows or chunks, in tokens."""

_installed: WeakSet[nn.Module] = WeakSet()


@dataclass
class DecoderArgs:
    """The text decoder.

    Attributes:
        name: hub name or local folder of a causal LM.
        config: inline config with `model_type`, for a decoder from scratch, instead of `name`.
        pretrained: load the weights of `name`; false takes its config only.
        attn_implementation: `sdpa` or `eager`; by default sdpa where the architecture has it. flash_attention_2
            drops the bidirectional prefix and is refused.
        trust_remote_code: run the Python code that comes with `name`, if it needs any. Read it before.
        load_in_4bit: keep the pretrained weights in 4 bits (bitsandbytes, CUDA), under adapters (`model.train_decoder.lora`).
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    pretrained: bool = True
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    load_in_4bit: bool = False


def windows_of(config: PreTrainedConfig) -> dict[str, int]:
    """The windows and chunks of a config, by setting; empty where every layer attends to all."""
    return {name: size for name in WINDOW_SETTINGS if isinstance(size := getattr(config, name, None), int)}


def decoder_config(args: DecoderArgs) -> PreTrainedConfig:
    """The transformers config of the decoder.

    Raises:
        InputError: neither or both of name and config, an unknown model type, no causal LM, one that needs code of
            its own, or settings that its config refuses.
    """
    if (args.name is None) == (args.config is None):
        raise InputError("model.decoder: expected exactly one of `name` and `config`, got " + (
            "neither" if args.name is None else "both"))  # fmt: skip
    if args.config is not None:
        settings = dict(args.config)
        model_type = settings.pop("model_type", None)
        if model_type is None:
            raise InputError("model.decoder.config: expected the key `model_type` (llama, gemma2, ...), got none")
        _check_causal(str(model_type), "model.decoder.config")
        try:
            config = AutoConfig.for_model(model_type, **settings)
        except (TypeError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
            raise InputError(f"model.decoder.config: {_one_line(error)}") from error
        _check_settings(config, settings)
    else:
        config = _config_of(str(args.name), args.trust_remote_code)
        where = f"model.decoder.name={args.name}"
        if config.model_type in ("prefix_lm", "mmprefix"):
            raise InputError(f"{where}: expected a causal LM, got {config.model_type!r}, which is a prefix LM already")
        if hasattr(config, "text_config"):
            raise InputError(
                f"model.decoder.name: expected a text-only decoder, got {args.name!r}, whose model type "
                f"{config.model_type!r} has a vision part of its own"
            )
        if not (args.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})):
            _check_causal(config.model_type, where)
    _check_kind(config, "model.decoder.config" if args.config is not None else f"model.decoder.name={args.name}")
    return config


_FOLDED = ("rope_theta", "rope_scaling", "partial_rotary_factor", "attn_implementation")
"""Settings that transformers takes in and keeps under another name."""


def _check_settings(config: PreTrainedConfig, settings: Mapping[str, Any]) -> None:
    """What transformers takes in silence: a key that nobody reads, no layer, and heads that can't share keys."""
    defaults = type(config)()
    for key in settings:
        if key not in _FOLDED and not hasattr(defaults, key):
            close = get_close_matches(key, defaults.to_dict(), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            warnings.warn(f"model.decoder.config: a {config.model_type} has no setting {key}{hint}", stacklevel=3)
    if getattr(config, "num_hidden_layers", 1) < 1:
        raise InputError(
            f"model.decoder.config: expected num_hidden_layers of at least 1, got {config.num_hidden_layers}"
        )
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        default = "" if "num_key_value_heads" in settings else f", the default of {config.model_type}"
        raise InputError(
            f"model.decoder.config: expected num_key_value_heads that divide the {heads} of num_attention_heads, got "
            f"{shared}{default}"
        )


def _config_of(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"model.decoder.name: {name!r} needs Python code that comes with it; "
                "read it, then allow it with model.decoder.trust_remote_code: true"
            ) from error
        raise InputError(f"model.decoder.name: cannot read the config of {name!r}: {_one_line(error)}") from error


def build_decoder(
    args: DecoderArgs, config: PreTrainedConfig, dtype: torch.dtype | None = torch.float32
) -> PreTrainedModel:
    """The decoder with its weights, prefix mask not yet installed.

    Args:
        args: which one.
        config: `decoder_config` of it.
        dtype: of the weights. None: pretrained ones in the precision of their files, and mapped from them where these are
            safetensors, so that they cost no memory until they are made others; ``.float()`` gives what float32 gives.

    Raises:
        InputError: weights that cannot be had, or that are not exactly the model's; 4 bits of none, or where they can't be.
    """
    kwargs: dict[str, Any] = {
        "dtype": dtype or torch.float32,
        "attn_implementation": attention_implementation(args, config),
        "trust_remote_code": args.trust_remote_code,
    }
    if args.load_in_4bit:
        if args.name is None or not args.pretrained:
            raise InputError("model.decoder.load_in_4bit: expected the pretrained weights of a `name`, got random ones")
        kwargs |= loading_options()
    if args.name is not None and args.pretrained:
        exact: nn.Module | None = None
        if dtype is None and not args.load_in_4bit:
            stored = stored_dtype(args.name)
            if stored not in (None, torch.float32):
                with parameters_on_meta():
                    exact = AutoModelForCausalLM.from_config(config, **kwargs)
                kwargs["dtype"] = stored
        model: PreTrainedModel = load_exactly(
            AutoModelForCausalLM, args.name, f"model.decoder.name={args.name}", **kwargs
        )
        if args.load_in_4bit:
            save_whole(model)
        if exact is not None:
            take_buffers(model, exact)
        return model
    try:
        return AutoModelForCausalLM.from_config(config, **kwargs)
    # An implementation that the architecture does not have, sizes that don't divide; wrong values raise what they like.
    except Exception as error:
        if out_of_memory(error) is not None:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"model.decoder: {config.model_type}: cannot be built: {kind}{_one_line(error)}") from error


def load_exactly(model_class: Any, source: str | os.PathLike[str], where: str, **kwargs: Any) -> Any:
    """``model_class.from_pretrained`` for weights that are exactly the model's.

    By itself, transformers starts missing tensors at random and drops the ones it doesn't know.

    Args:
        model_class: a model of transformers, or one of its Auto classes.
        source: hub name or local folder.
        where: begins the message of an error.
        kwargs: passed on.

    Raises:
        InputError: weights that cannot be read, or tensors that are missing, left over or of another shape, listed.
    """
    try:
        # Asked to go on, it says which shapes differ.
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{where}: cannot load it: {_one_line(error)}") from error
    problems = []
    for kind, text in (("missing_keys", "missing"), ("unexpected_keys", "left over"), ("mismatched_keys", "misshapen")):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ())
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{len(names)} {text}: {', '.join(names[:8])}{more}")
    if problems:
        raise InputError(f"{where}: expected exactly the tensors of the model, got {'; '.join(problems)}")
    return model


def attention_implementation(args: DecoderArgs, config: PreTrainedConfig) -> str | None:
    """What to ask transformers for; None leaves it the choice.

    Raises:
        InputError: an implementation without a dense mask, or sdpa for an architecture with a soft-cap on attention
            scores, which sdpa would drop.
    """
    if args.attn_implementation is not None:
        _check_implementation(args.attn_implementation)
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if soft_capped and args.attn_implementation == "sdpa":
        raise InputError(
            f"model.decoder.attn_implementation: expected eager for {config.model_type}, got sdpa, which drops its soft-cap"
        )
    return "eager" if soft_capped else args.attn_implementation


def _check_implementation(implementation: str) -> None:
    if implementation not in DENSE_IMPLEMENTATIONS:
        hint = ", which drops the bidirectional prefix silently" if "flash" in str(implementation) else ""
        raise InputError(
            f"model.decoder.attn_implementation: expected one of {', '.join(DENSE_IMPLEMENTATIONS)}, "
            f"got {implementation}{hint}"
        )


def _check_causal(model_type: str, where: str) -> None:
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"{where}: expected a causal LM of transformers, got model type {model_type!r}, which is none")


def _check_kind(config: PreTrainedConfig, where: str) -> None:
    """Model types that have a causal head, too, but whose checkpoints are something else."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{where}: expected a causal LM, got {config.model_type!r}, an encoder-decoder")
    masked = [name for name in getattr(config, "architectures", None) or () if name.endswith("ForMaskedLM")]
    if masked:
        raise InputError(f"{where}: expected a causal LM, got {masked[0]}, a masked LM")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def install(decoder: PreTrainedModel) -> PreTrainedModel:
    """Makes the decoder follow the plan of `attention.prefix_plan`. Idempotent; works on PEFT-wrapped models.

    Three things are put in place: transformers' mask functions are wrapped (once for all decoders), the output layer
    computes the logits of label positions only, and causal masks that an architecture keeps in a buffer of its own
    (gpt_neo) are opened at the first pass under a plan. Without a plan, all three do nothing. Call it again after
    wrapping the decoder with PEFT, if that changed the output layer.

    Raises:
        InputError: an attention implementation that takes no dense mask, or a model without an output layer.
    """
    _check_implementation(decoder.config._attn_implementation)
    output_layer = decoder.get_output_embeddings()
    if output_layer is None:
        raise InputError(f"{type(decoder).__name__} has no output embeddings: expected a decoder with an LM head")
    register_masks()
    _installed.add(decoder)
    # PEFT may have wrapped a layer that has the hook: two would pick positions twice.
    _remove_hooks(output_layer, _before_output_layer)
    output_layer.register_forward_pre_hook(_before_output_layer)
    _remove_hooks(decoder, _open_causal_buffers)
    for module in decoder.modules():
        if _causal_buffers(module):
            module.register_forward_pre_hook(_open_causal_buffers)
    return decoder


@torch.no_grad()
def find_logit_transform(decoder: PreTrainedModel) -> LogitTransform | None:
    """What the decoder does to its output layer's values to make logits of them, found by looking.

    Returns:
        None where the output layer is not a plain linear layer, or where what is done to its values is neither a scale
        nor a soft-cap that the config names.
    """
    output_layer = decoder.get_output_embeddings()
    if type(output_layer) is not nn.Linear:
        return None
    weight = decoder.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    embeds = (torch.randn(1, 4, weight.shape[1], generator=generator) * weight.float().std().cpu()).to(weight)
    factor, seen = 1.0, weight.new_zeros(0)

    def enlarge(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * factor, *args[1:])

    def look(module: nn.Module, args: tuple[Any, ...], values: torch.Tensor) -> None:
        nonlocal seen
        seen = values.float()

    hooks = [output_layer.register_forward_pre_hook(enlarge), output_layer.register_forward_hook(look)]
    was_training = decoder.training
    decoder.eval()
    try:
        for _ in range(2):
            mask = torch.ones(1, 4, dtype=torch.long, device=weight.device)
            logits = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits.float()
            # In the second pass large enough that a soft-cap, which leaves small values alone, shows.
            factor = 60.0 / max(seen.std().item(), 1e-6)
    finally:
        decoder.train(was_training)
        for hook in hooks:
            hook.remove()
    scale = ((logits * seen).sum() / seen.square().sum()).item()
    caps = {
        float(value)
        for name, value in decoder.config.to_dict().items()
        if "softcap" in name.replace("_", "") and isinstance(value, int | float) and not isinstance(value, bool)
    }
    for transform in (LogitTransform(), LogitTransform(scale), *(LogitTransform(softcap=cap) for cap in sorted(caps))):
        if torch.allclose(transform(seen), logits, rtol=2e-2 if weight.dtype != torch.float32 else 1e-4, atol=1e-3):
            return transform
    return None


def is_installed(decoder: nn.Module) -> bool:
    """Whether `install` was called on this decoder, and `uninstall` wasn't since."""
    return decoder in _installed


def uninstall(decoder: PreTrainedModel) -> PreTrainedModel:
    """Takes back what `install` and `restrict_last_layer` did.

    With the last installed decoder, transformers is its own again, too.
    """
    _remove_hooks(decoder, _before_output_layer)
    _remove_hooks(decoder, _open_causal_buffers)
    release_last_layer(decoder)
    for module in decoder.modules():
        if module.__dict__.pop(_OPENED, False):
            for name in _causal_buffers(module):
                setattr(module, name, module.get_buffer(name).tril())
    _installed.discard(decoder)
    if not _installed:
        unregister_masks()
    return decoder


def _before_output_layer(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (select_label_positions(args[0]), *args[1:])


_OPENED = "mmprefix_opened"


def _causal_buffers(module: nn.Module) -> list[str]:
    """Names of the module's own ``[1, 1, S, S]`` bool buffers: causal masks applied beside the library's."""
    return [
        name
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.bool and buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2] > 1
    ]


def _open_causal_buffers(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Lets queries see later keys, where the library's mask lets them.

    At the first pass and not in `install`: loading fills such buffers again after the model was built. Once open they
    stay so: the library's mask is always complete beside them, and recomputation under gradient checkpointing, where
    no plan is set, must find what the first pass found. What the buffer hides behind a query (a local window) stays.
    """
    if current_plan() is None:
        return
    for name in _causal_buffers(module):
        buffer = module.get_buffer(name)
        if not getattr(buffer, _OPENED, False):  # on the tensor: one that was moved or filled again is a new one
            opened = buffer | torch.ones_like(buffer).triu(1)
            setattr(opened, _OPENED, True)
            setattr(module, name, opened)
            module.__dict__[_OPENED] = True


def _remove_hooks(root: nn.Module, hook: Any) -> None:
    for module in root.modules():
        for key, found in list(module._forward_pre_hooks.items()):
            if found is hook:
                del module._forward_pre_hooks[key]
