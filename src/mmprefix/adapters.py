"""Low-rank adapters (LoRA) in encoder and decoder, by PEFT: put in, merged, saved and loaded in PEFT's own format.

The weights of a part with adapters never learn. Beside each chosen layer's product ``W x`` stands ``scale * B A x``, with
A ``[rank, in]`` and B ``[out, rank]``; B is zero at first, so training begins at the model as it was. Sources: LoRA,
arXiv 2106.09685; DoRA, arXiv 2402.09353; rank-stabilised scale, arXiv 2312.03732.

Adapters change no mask: they act on each token by itself. PEFT is optional and imported where it is needed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mmprefix.decoder import install, uninstall
from mmprefix.errors import InputError
from mmprefix.files import replacing
from mmprefix.last_layer import restrict_last_layer
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.vision import VisionEncoder

_NAME = "default"
_PREFIX = "base_model.model."
"""What PEFT's files begin the names of weights with."""
_SETTINGS_OF_VALUES = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Initial weights of PEFT's that leave the base's weights alone."""


@dataclass
class LoraArgs:
    """Low-rank adapters in one part of the model, whose own weights stay as they are.

    Attributes:
        rank: width between the two matrices of an adapter.
        alpha: adapters are scaled by alpha / rank.
        dropout: on what goes into adapters, in training.
        target_modules: `all-linear`: every linear layer but the output layer; or names of linear layers and convolutions, or
            the ends of their names (`q_proj`, `mlp.fc1`).
        use_dora: a learned magnitude for each output beside them (DoRA).
        use_rslora: scaled by alpha / sqrt(rank) instead (rank-stabilised LoRA).
        pretrained: a folder in PEFT's own format to start from, in place of all settings above.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False
    pretrained: str | None = None


def _peft(where: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{where}: expected peft, which is not installed: pip install 'mmprefix[lora]'") from error
    return peft


def _inside(model: MMPrefixForConditionalGeneration, part: str) -> nn.Module:
    """The library's own model in a part, which names of layers, also in PEFT's files, are counted from."""
    module: nn.Module = model.vision.model if part == "vision" else model.decoder
    return module


def _prefix_of(part: str) -> str:
    return "vision.model." if part == "vision" else "decoder."


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that adapters wrap, by name."""
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
            yield name, layer


# Putting adapters in


def add_lora(
    model: MMPrefixForConditionalGeneration,
    part: str,
    args: LoraArgs,
    base_name: str | None = None,
    dora: bool = True,
) -> None:
    """Puts adapters into a part, in place, and freezes everything else of it.

    Args:
        model: without adapters in this part; on the meta device, adapters get no weights either.
        part: `vision` or `decoder`.
        args: which ones.
        base_name: what the part's weights are known by; goes into PEFT's files.
        dora: whether to heed `LoraArgs.use_dora`.

    Raises:
        InputError: PEFT is missing, settings out of range, layers that don't exist or can't have adapters, a folder that is
            not such adapters'.
    """
    where = f"model.train_{part}.lora"
    peft = _peft(where)
    layers = adaptable_layers(model, part)
    if args.pretrained is not None:
        config = _stored_config(peft, args, where)
    else:
        for name, fits, expected in (
            ("rank", args.rank >= 1, "at least 1"),
            ("alpha", args.alpha > 0, "more than 0"),
            ("dropout", 0 <= args.dropout < 1, "at least 0 and below 1"),
        ):
            if not fits:
                raise InputError(f"{where}.{name}: expected {expected}, got {getattr(args, name)}")
        targets = _targets(model, part, args.target_modules, layers, where)
        config = peft.LoraConfig(
            r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout, use_dora=args.use_dora,
            use_rslora=args.use_rslora, target_modules=targets,
            fan_in_fan_out=all(isinstance(layers[name], Conv1D) for name in targets),
            task_type="CAUSAL_LM" if part == "decoder" else None, base_model_name_or_path=base_name,
        )  # fmt: skip
    config.use_dora = config.use_dora and dora
    _inject(peft, model, part, config, where)
    found = {name for name, _ in _layers(_inside(model, part))}
    if args.pretrained is None:
        assert found == set(targets), sorted(found ^ set(targets))
        return
    if others := sorted(found - layers.keys()):
        raise InputError(
            f"{where}.pretrained: {args.pretrained}: expected layers that can be adapted, got {_shown(others)}"
        )
    if next(_inside(model, part).parameters()).device.type != "meta":
        _load(peft, _inside(model, part), Path(args.pretrained), f"{where}.pretrained")


def add_stored(model: MMPrefixForConditionalGeneration, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts adapters in again, as `settings_of` described them; their weights have to be loaded then.

    Raises:
        InputError: PEFT is missing.
    """
    for part, config in settings.items():
        peft = _peft("the model has adapters")
        _inject(peft, model, part, peft.PeftConfig.from_peft_type(**config), part)


def _inject(peft: Any, model: MMPrefixForConditionalGeneration, part: str, config: Any, where: str) -> None:
    inside = _inside(model, part)
    config.inference_mode = False
    if part == "decoder":  # its hooks are on layers that are about to be wrapped
        uninstall(model.decoder)
    try:
        # Adapters are made on the default device first.
        with torch.device(next(inside.parameters()).device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the config could have said better
            peft.inject_adapter_in_model(config, inside, adapter_name=_NAME)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{where}: PEFT can't put adapters in: {' '.join(str(error).split())[:300]}") from error
    finally:
        if part == "decoder":
            install(model.decoder)
            restrict_last_layer(model.decoder, model.config.label_only)
    for _, layer in _layers(inside):
        # Weights and inputs are of one precision already, or autocast makes them so: another copy would be for nothing.
        layer.cast_input_dtype_enabled = False
        for own in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            own.float()  # beside weights in 4 bits, they would be in bfloat16


def adaptable_layers(model: MMPrefixForConditionalGeneration, part: str) -> dict[str, nn.Module]:
    """Layers that can have adapters, by name: linear ones and convolutions without groups.

    Without those that compute something else with their weight (standardised convolutions), a weight that is also the
    embedding's, and in encoders, found by looking, heads that no image token depends on and layers whose weight is used by
    others past the layer itself: their adapters would never learn.
    """
    layers = {name: layer for name, layer in _inside(model, part).named_modules() if _kind(layer) is not None}
    if part == "vision":
        reaching = _reaching_tokens(model, list(layers))
        return {name: layer for name, layer in layers.items() if name in reaching}
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    return {name: layer for name, layer in layers.items() if layer.weight is not embedding}


def _kind(layer: nn.Module) -> Literal["linear", "convolution"] | None:
    forward = type(layer).forward
    if forward in (nn.Linear.forward, Conv1D.forward) or type(layer).__name__ == "Linear4bit":
        return "linear"
    if forward is nn.Conv2d.forward and layer.groups == 1:
        return "convolution"
    return None


def _reaching_tokens(model: MMPrefixForConditionalGeneration, names: list[str]) -> set[str]:
    """Of an encoder's layers, those whose adapters image tokens depend on, found on a copy without weights."""
    import peft

    spec = model.config.vision_spec
    with torch.device("meta"):
        twin = VisionEncoder(spec)
        if not names:
            return set()
        peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=names), twin.model)
        tokens = twin(torch.empty(1, 3, *spec.image_size))
    layers = [(name, layer) for name, layer in _layers(twin.model) if name in names]
    weights = [layer.lora_B[_NAME].weight for _, layer in layers]
    gradients = torch.autograd.grad(tokens.sum(), weights, allow_unused=True)
    return {name for (name, _), gradient in zip(layers, gradients, strict=True) if gradient is not None}


def _targets(
    model: MMPrefixForConditionalGeneration,
    part: str,
    wanted: str | list[str],
    layers: Mapping[str, nn.Module],
    where: str,
) -> list[str]:
    """Full names of the layers to adapt."""
    where = f"{where}.target_modules"
    linear = [name for name, layer in layers.items() if _kind(layer) == "linear"]
    if wanted == "all-linear":
        output = model.get_output_embeddings() if part == "decoder" else None
        found = [name for name in linear if layers[name] is not output]
        if not found:
            convolutions = _shown(_ends(layers))
            raise InputError(
                f"{where}: expected a part with linear layers, there are convolutions only: {convolutions}"
            )
        return found
    if isinstance(wanted, str) or not wanted:
        raise InputError(f"{where}: expected all-linear or a list of names, got {wanted!r}")
    found = []
    for name in wanted:
        matching = [full for full in layers if full == name or full.endswith(f".{name}")]
        if not matching:
            ends = _ends(layers)
            close = get_close_matches(name, [*ends, *layers], n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {_shown(ends)}"
            raise InputError(f"{where}: expected names of layers that can have adapters, got {name!r}; {hint}")
        found += matching
    return list(dict.fromkeys(found))


def _ends(names: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


# Training


def learning_modules(model: MMPrefixForConditionalGeneration, part: str) -> list[nn.Module]:
    """What of a part with adapters is in training mode while they learn: their dropout. The rest is as if frozen."""
    found: list[nn.Module] = []
    for _, layer in _layers(_inside(model, part)):
        found += [layer, *layer.lora_dropout.values()]  # DoRA asks the layer itself whether there is dropout
    return found


# What a model has


def configs_of(model: MMPrefixForConditionalGeneration) -> dict[str, Any]:
    """PEFT's config of each part that has adapters."""
    found = {}
    for part in ("vision", "decoder"):
        config = getattr(_inside(model, part), "peft_config", {}).get(_NAME)
        if config is not None:
            found[part] = config
    return found


def settings_of(model: MMPrefixForConditionalGeneration) -> dict[str, dict[str, Any]]:
    """The same in plain values (JSON's), for a checkpoint; {} of a model without adapters."""
    return {
        part: json.loads(json.dumps(config.to_dict(), default=sorted)) for part, config in configs_of(model).items()
    }


def check_stored(model: MMPrefixForConditionalGeneration, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares a checkpoint's adapters with the model's.

    Raises:
        InputError: in other parts, or of another rank or scale: weights of the same shapes would mean something else.
    """
    own = settings_of(model)
    if own.keys() != settings.keys():
        stored, wanted = (", ".join(parts) or "no part" for parts in (settings, own))
        raise InputError(f"model.train_*.lora: expected adapters in {stored}, as the checkpoint has, got {wanted}")
    for part, config in own.items():
        for name in _SETTINGS_OF_VALUES:
            if config[name] != (expected := settings[part].get(name)):
                raise InputError(
                    f"model.train_{part}.lora: expected {name} {expected} as in the checkpoint, got {config[name]}"
                )


# Merging


def merge(model: MMPrefixForConditionalGeneration) -> None:
    """Adds adapters to the weights that they stand beside, and takes them out; every parameter may learn then.

    Weights that were adapted are new tensors: who shared the old ones keeps them as they were.

    Raises:
        InputError: merged weights that are not finite.
    """
    for part in configs_of(model):
        inside = _inside(model, part)
        if part == "decoder":
            uninstall(model.decoder)
        for name, layer in list(_layers(inside)):
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise InputError(f"{part}: expected finite adapters, those of {name} are not") from error
            parent, _, child = name.rpartition(".")
            setattr(inside.get_submodule(parent), child, layer.get_base_layer())
        del inside.peft_config
        inside.requires_grad_(True)
        if part == "decoder":
            install(model.decoder)
            restrict_last_layer(model.decoder, model.config.label_only)
        else:
            for name in model.config.vision_spec.unused:
                inside.get_parameter(name).requires_grad_(False)


def merged(model: MMPrefixForConditionalGeneration, weights: Mapping[str, Tensor]) -> MMPrefixForConditionalGeneration:
    """A copy for saving, with ``weights``, all of them, and ``model``'s adapters merged; tensors without adapters are shared.

    Buffers that are never saved have no values.
    """
    with torch.device("meta"):
        copy = type(model)(type(model.config)(**model.config.to_dict()))
    add_stored(copy, settings_of(model))
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    merge(copy)
    return copy


# PEFT's own format


def save_adapters(model: MMPrefixForConditionalGeneration, weights: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """Writes ``adapter-decoder/`` and ``adapter-vision/``, as far as there are adapters, for `peft.PeftModel.from_pretrained`.

    Args:
        model: with adapters.
        weights: all tensors of the model, on the CPU.
        folder: where.
    """
    written = []
    for part, settings in settings_of(model).items():
        peft = _peft(part)
        prefix = _prefix_of(part)
        inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        # PEFT would ask the hub whether the vocabulary has grown.
        found = peft.get_peft_model_state_dict(_inside(model, part), inside, _NAME, save_embedding_layers=False)
        tensors = {f"{_PREFIX}{name}": value.detach().cpu().contiguous() for name, value in found.items()}
        stored = peft.PeftConfig.from_peft_type(**{**settings, "inference_mode": True})
        stored.target_modules = settings["target_modules"]  # in order: sets have another one in each process
        path = folder / f"adapter-{part}"
        with replacing(path) as temporary:
            stored.save_pretrained(str(temporary))
            safetensors.torch.save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        written.append(path)
    return written


def _stored_config(peft: Any, args: LoraArgs, where: str) -> Any:
    """Of a folder in PEFT's own format."""
    others = {name: v for name, v in asdict(args).items() if name != "pretrained" and v != getattr(LoraArgs, name, v)}
    if others:
        raise InputError(f"{where}.pretrained: expected no other setting beside it, got {others}")
    folder, where = Path(str(args.pretrained)), f"{where}.pretrained"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{where}: expected a folder in PEFT's format, found no {name} in {folder}")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{where}: {folder}: cannot read adapter_config.json: {_one_line(error)}") from error
    if not isinstance(config, peft.LoraConfig) or config.peft_type != peft.PeftType.LORA:
        raise InputError(
            f"{where}: {folder}: expected LoRA, got {getattr(config.peft_type, 'value', config.peft_type)}"
        )
    plain = peft.LoraConfig()
    known = {
        *_SETTINGS_OF_VALUES, "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "fan_in_fan_out", "init_lora_weights", "task_type", "peft_type", "peft_version", "auto_mapping", "revision",
        "base_model_name_or_path", "inference_mode", "runtime_config",
    }  # fmt: skip
    more = [name for name, value in vars(config).items() if name not in known and value != getattr(plain, name, None)]
    if config.init_lora_weights not in _PLAIN_STARTS:  # the base it belongs to is another one
        more.append(f"init_lora_weights {config.init_lora_weights!r}")
    if more:
        raise InputError(f"{where}: {folder}: expected plain LoRA, DoRA or rsLoRA, got also {', '.join(sorted(more))}")
    return config


def _load(peft: Any, inside: nn.Module, folder: Path, where: str) -> None:
    try:
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{where}: {folder}: cannot read adapter_model.safetensors: {_one_line(error)}") from error
    tensors = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    expected = peft.get_peft_model_state_dict(inside, adapter_name=_NAME, save_embedding_layers=False)
    problems = [
        f"{len(names)} {what}: {_shown(sorted(names))}"
        for what, names in (
            ("missing", expected.keys() - tensors.keys()),
            ("left over", tensors.keys() - expected.keys()),
            ("misshapen", {n for n, t in tensors.items() if n in expected and t.shape != expected[n].shape}),
        )
        if names
    ]
    if problems:
        raise InputError(f"{where}: {folder}: expected exactly the adapters of this part, got {'; '.join(problems)}")
    peft.set_peft_model_state_dict(inside, tensors, adapter_name=_NAME)


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
