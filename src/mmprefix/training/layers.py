"""The repeated layers of encoder and decoder, and what is done to each of them: recomputing, compiling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from mmprefix.errors import InputError
from mmprefix.last_layer import last_layer
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.probe import tiny_copy

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
    """Members of the outermost lists of layers of one class: blocks, stages, decoder layers."""
    found: list[nn.Module] = []
    for module in part.children():
        members = list(module.children())
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and len({type(m) for m in members}) == 1
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
    the rest again: activation functions, norms, rotations, sums. In a decoder with gated feed-forwards that halves what
    is kept, and costs no product.

    Raises:
        InputError: some layers only, of a decoder that recomputes as a whole.
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
    if which == "elementwise":
        if _changes_products(decoder.config):
            raise InputError(
                f"model.gradient_checkpointing: expected true, false, selective or a number, got {which}: a "
                f"{decoder.config.model_type} changes in place what matrix products give, which can't be kept"
            )
        apart = _restricted(model)
        for layer in (*_repeated(vision), *layers):
            if layer is not apart:  # it keeps little, and gets its rows from a hook
                layer.forward = partial(_recomputed, layer.forward, ELEMENTWISE)
        return
    # Since transformers 5.2x by another name; the older one warns.
    enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if every == 1:
        vision.model.set_grad_checkpointing(True)
        return
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i % every == 0
    for block in _repeated(vision)[::every]:
        block.forward = partial(_recomputed, block.forward, {})


def _changes_products(config: PreTrainedConfig) -> bool:
    """Whether a tiny copy of the decoder changes in place what is kept of it: experts that add their bias so (gpt_oss)."""
    try:
        decoder = tiny_copy(config)
    except (ValueError, RuntimeError, TypeError):  # found in training, if it is so
        return False
    for layer in decoder.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_recomputed, layer.forward, ELEMENTWISE)
    width = decoder.get_input_embeddings().weight.shape[1]
    output = decoder(inputs_embeds=torch.ones(1, 3, width), use_cache=False)
    try:
        output.logits.sum().backward()
    except RuntimeError as error:
        if "has been mutated" in str(error):
            return True
        raise
    return False


def _recomputed(forward: Callable[..., Any], how: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's own forward, as transformers' layers do it: hooks (of FSDP) stay outside. In a partial, which is copied and
    pickled with its module, as the bound method in it."""
    # Without gradients nothing is kept, and the random state, which `checkpoint` reads, can't be read in a CUDA graph.
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)


_KEPT = frozenset(
    "mm addmm bmm baddbmm linear convolution _grouped_mm _scaled_mm _scaled_grouped_mm "
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable".split()
)
"""ATen's operators that do the work of a layer."""


def products_are_kept() -> Any:
    """`context_fn` of `torch.utils.checkpoint`: keeps what costs much to compute, our own operators among it."""
    return create_selective_checkpoint_contexts(_policy)


ELEMENTWISE: Mapping[str, Any] = {"context_fn": products_are_kept}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    namespace, name = operator.name().split("::") if hasattr(operator, "_schema") else ("", "")
    kept = namespace == "mmprefix" or (namespace == "aten" and name.split(".")[0] in _KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# Compiling


def compile_layers(model: MMPrefixForConditionalGeneration, backend: str = "inductor") -> None:
    """`torch.compile` of each layer, in place: layers of one kind share what is compiled once, in seconds.

    A graph of the whole model takes much longer, and gains little: what lies between layers is few operations, and the loss
    is one. Sharded, it would need all weights at once; so, what gathers a layer runs around it, uncompiled (which is why
    this comes first), and overlaps with the layer before.

    A last layer of which `last_layer` runs a part at label positions only stays as it is: that part is small, and its rows
    reach it beside its arguments, where a compiler would guard each of their numbers.
    """
    # A hint for whoever passes it about in-place operations, which backward would find changed; values are tested here.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(
        lambda record: "context_fn is passed" not in record.getMessage()
    )
    apart = _restricted(model)
    for layer in layers_of(model):
        if layer is not apart:
            layer.compile(backend=backend)
