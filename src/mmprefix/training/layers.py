"""The repeated layers of encoder and decoder, and what is done to each of them: recomputing, compiling."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from mmprefix.errors import InputError
from mmprefix.last_layer import last_layer, with_rows_of_this_pass
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.probe import tiny_copy
from mmprefix.vision import VisionEncoder, VisionSpec

Recomputing = bool | Literal["selective", "elementwise"] | int
"""What is computed again in backward: nothing (False), all layers (True), every second (`selective`), every n-th; or, in
each layer, all but its matrix products and attention (`elementwise`)."""


def layers_of(model: MMPrefixForConditionalGeneration) -> list[nn.Module]:
    """The repeated layers of encoder and decoder, in the order that they are used in."""
    return [*_repeated(model.vision), *_repeated(model.decoder)]


def layers_by_part(model: MMPrefixForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """`layers_of`, of each part that has some: `vision`, `decoder`."""
    return {name: _repeated(getattr(model, name)) for name in ("vision", "decoder")}


def _restricted(model: MMPrefixForConditionalGeneration) -> nn.Module | None:
    """The layer of which `last_layer` runs a part at label positions only, if there is one."""
    return last_layer(model.decoder) if model.config.label_only else None


def _repeated(part: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists of layers: blocks, stages, decoder layers, which a hybrid has of several classes."""
    found: list[nn.Module] = []
    for module in part.children():
        members = list(module.children())
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and (
            len({type(m) for m in members}) == 1 or all(isinstance(m, GradientCheckpointingLayer) for m in members)
        )
        if not listed or not any(True for _ in members[0].children()):
            found += _repeated(module)
        elif len(members) > 1:
            found += members
        else:  # a stage of one block, or what holds all blocks
            found += _repeated(members[0]) or members
    return found


# Recomputing


def recomputed_every(which: Recomputing) -> int:
    """Of how many layers of a part one is recomputed as a whole, the first among them; 0: none is.

    Raises:
        InputError: a negative number.
    """
    if isinstance(which, int) and which < 0:
        raise InputError(
            f"model.gradient_checkpointing: expected false, true, selective, elementwise or a number, got {which}"
        )
    return 2 if which == "selective" else 0 if which == "elementwise" else int(which)


def recomputed_shares(model: MMPrefixForConditionalGeneration, which: Recomputing) -> dict[str, float]:
    """The share of each part's matrix products and attention that `checkpoint_activations` recomputes, in [0, 1]."""
    every = recomputed_every(which)
    numbers = {name: len(layers) for name, layers in layers_by_part(model).items()}
    return {name: -(-number // every) / number if every and number else 0.0 for name, number in numbers.items()}


def checkpoint_activations(model: MMPrefixForConditionalGeneration, which: Recomputing = True) -> None:
    """Makes layers of encoder and decoder compute again in backward what they don't keep.

    By layers, as torchtitan does it: of each part the first layer and every n-th after it keep their inputs only.
    `elementwise`: every layer keeps its input and what matrix products, convolutions and attention give, and computes
    the rest again: activation functions, norms, rotations, sums. It costs no product. Where all of a decoder with gated
    feed-forwards learns, it halves what is kept. A frozen layer keeps less anyway, and one with adapters, uncompiled, more.

    Raises:
        InputError: some layers only, of a decoder that recomputes as a whole; `elementwise`, where what would be kept is
            changed in place.
    """
    every = recomputed_every(which)
    if not every and which != "elementwise":
        return
    decoder, vision = model.decoder, model.vision
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if every != 1 and not layers:
        raise InputError(
            f"model.gradient_checkpointing: expected true or false, got {which}: a {decoder.config.model_type} can't "
            "recompute some of its layers, or a part of each"
        )
    blocks = _repeated(vision)
    if every != 1 and not blocks:
        name = model.config.vision_spec.name
        warnings.warn(f"model.gradient_checkpointing: {name} has no repeated layers; it keeps all", stacklevel=2)
    if which == "elementwise":
        for part, changes in (
            (f"decoder.config: {decoder.config.model_type}", _decoder_changes_products(decoder.config)),
            (f"vision.name: {model.config.vision_spec.name}", _encoder_changes_products(model.config.vision_spec)),
        ):
            if changes:
                raise InputError(
                    "model.gradient_checkpointing: expected true, false, selective or a number, got elementwise: "
                    f"model.{part} changes in place what would be kept"
                )
        for layer in (*blocks, *layers):
            layer.forward = partial(_recomputed, layer.forward, ELEMENTWISE)
        return
    # Transformers 5.23 has it by this name, and warns under the one that 5.17 has.
    enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if every == 1:
        vision.model.set_grad_checkpointing(True)
        return
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i % every == 0
    for block in blocks[::every]:
        block.forward = partial(_recomputed, block.forward, {})


def _decoder_changes_products(config: PreTrainedConfig) -> bool:
    """Whether a decoder changes what would be kept of it, as experts do that add their bias in place (gpt_oss).

    Found on a tiny copy; one that can't be made or run is found in training, if it is so.
    """

    def run() -> Tensor:
        decoder = tiny_copy(config, config._attn_implementation)
        for layer in decoder.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(_recomputed, layer.forward, ELEMENTWISE)
        width = decoder.get_input_embeddings().weight.shape[1]
        output: Tensor = decoder(inputs_embeds=torch.ones(1, 3, width), use_cache=False).logits
        return output

    return _finds_a_change(run)


def _encoder_changes_products(spec: VisionSpec) -> bool:
    """The same of an encoder, whose convolutions may lead to activations in place; on the meta device."""

    def run() -> Tensor:
        with torch.device("meta"):
            encoder = VisionEncoder(spec)
            for block in _repeated(encoder):
                block.forward = partial(_recomputed, block.forward, ELEMENTWISE)
            output: Tensor = encoder(torch.empty(2, 3, *spec.image_size))
        return output

    return _finds_a_change(run)


# The caller may want no gradients.
@torch.inference_mode(False)
@torch.enable_grad()
def _finds_a_change(run: Callable[[], Tensor]) -> bool:
    try:
        run().sum().backward()
    except Exception as error:  # what can't be made or run raises what it likes
        return "has been mutated" in str(error)  # by torch.utils.checkpoint
    return False


def _recomputed(forward: Callable[..., Any], how: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's own forward, as transformers' layers do it: hooks (of FSDP) stay outside. In a partial, which is copied and
    pickled with its module, as the bound method in it.

    Passes that share an autocast context and its cache of cast weights would cast less than their recomputations do, which
    torch 2.14 refuses: a context for each, as Lightning has it.
    """
    # Without gradients nothing is kept, and the random state, which `checkpoint` reads, can't be read in a CUDA graph.
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # A cache would be written twice.
    kwargs |= {name: value for name, value in (("use_cache", False), ("past_key_values", None)) if name in kwargs}
    return checkpoint(with_rows_of_this_pass(forward), *args, use_reentrant=False, **how, **kwargs)


_ATTENTION = frozenset(
    f"aten::_scaled_dot_product_{name}"
    for name in (
        "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable",
    )
)  # fmt: skip
_KEPT = _ATTENTION | frozenset(
    "aten::mm aten::addmm aten::bmm aten::baddbmm aten::linear aten::convolution aten::_grouped_mm aten::_scaled_mm "
    "aten::_scaled_grouped_mm transformers::grouped_mm_fallback "
    # Statistics of a batch would be counted twice.
    "aten::native_batch_norm aten::_native_batch_norm_legit aten::_batch_norm_with_update aten::cudnn_batch_norm "
    "aten::miopen_batch_norm".split()
)
"""Operators that do the work of a layer."""


def products_are_kept() -> Any:
    """`context_fn` of `torch.utils.checkpoint`: keeps what costs much to compute, our own operators among it."""
    return create_selective_checkpoint_contexts(_policy)


ELEMENTWISE: Mapping[str, Any] = {"context_fn": products_are_kept}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
    kept = name in _KEPT or name.startswith("mmprefix::")
    # Skipped, it would not draw its dropout, and all that is drawn after it in the layer would be another.
    if kept and name in _ATTENTION and _argument(operator, "dropout_p", args, kwargs):
        kept = False
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _argument(operator: torch._ops.OpOverload, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    position, argument = next((n, a) for n, a in enumerate(operator._schema.arguments) if a.name == name)
    return kwargs.get(name, args[position] if position < len(args) else argument.default_value)


# Compiling


def _is_no_hint(record: logging.LogRecord) -> bool:
    """Not the one about operations in place under selective checkpointing: they are looked for."""
    return "context_fn is passed" not in record.getMessage()


def compile_layers(model: MMPrefixForConditionalGeneration, backend: str = "inductor") -> None:
    """`torch.compile` of each layer, in place: layers of one kind share what is compiled once, in seconds.

    A graph of the whole model takes much longer, and gains little: what lies between layers is few operations, and the loss
    is one. Sharded, it would need all weights at once; so, what gathers a layer runs around it, uncompiled (which is why
    this comes first), and overlaps with the layer before.

    A last layer of which `last_layer` runs a part at label positions only stays as it is: that part is small, and its rows
    reach it beside its arguments, where a compiler would guard each of their numbers.

    Layers of several classes are a hybrid's: they stay as they are, too, with a warning. Of the recurrent ones a compiler
    unrolls the loop over tokens.
    """
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_no_hint)
    parts = layers_by_part(model)
    if len({type(layer) for layer in parts["decoder"]}) > 1:
        kind = model.decoder.config.model_type
        warnings.warn(f"model.compile: layers of several classes, as a {kind} has, stay uncompiled", stacklevel=2)
        del parts["decoder"]
    apart = _restricted(model)
    layers = [layer for part in parts.values() for layer in part if layer is not apart]
    # Where layers recompute, all share one function's limit, past which they run uncompiled.
    limit = 8 * max(1, len({type(layer) for layer in layers}))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for layer in layers:
        layer.compile(backend=backend)
