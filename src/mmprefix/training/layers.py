"""The repeated layers of encoder and decoder, and what is done to each of them: recomputing, compiling."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mmprefix.errors import InputError
from mmprefix.last_layer import last_layer
from mmprefix.modeling import MMPrefixForConditionalGeneration

Recomputing = bool | Literal["selective"] | int
"""Which layers keep only their inputs for backward: none (False), all (True), every second (`selective`), every n-th."""


def layers_of(model: MMPrefixForConditionalGeneration) -> list[nn.Module]:
    """The repeated layers of encoder and decoder, in the order that they are used in."""
    return [*_repeated(model.vision), *_repeated(model.decoder)]


def layers_by_part(model: MMPrefixForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """`layers_of`, of each part that has some: `vision`, `decoder`."""
    return {name: _repeated(getattr(model, name)) for name in ("vision", "decoder")}


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
    """Of how many layers of a part one is recomputed, the first among them; 0: none is.

    Raises:
        InputError: a negative number.
    """
    if isinstance(which, int) and which < 0:
        raise InputError(f"model.gradient_checkpointing: expected false, true, selective or a number, got {which}")
    return 2 if which == "selective" else int(which)


def recomputed_shares(model: MMPrefixForConditionalGeneration, which: Recomputing) -> dict[str, float]:
    """The share of each part's layers that `checkpoint_activations` recomputes, in [0, 1]."""
    every = recomputed_every(which)
    numbers = {name: len(layers) for name, layers in layers_by_part(model).items()}
    return {name: -(-number // every) / number if every and number else 0.0 for name, number in numbers.items()}


def checkpoint_activations(model: MMPrefixForConditionalGeneration, which: Recomputing = True) -> None:
    """Makes layers of encoder and decoder keep their inputs only, and compute the rest again in backward.

    Selectively, as torchtitan does it: of each part the first layer and every n-th after it.

    Raises:
        InputError: some layers only, of a decoder that recomputes as a whole.
    """
    every = recomputed_every(which)
    if not every:
        return
    model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    if every == 1:
        model.vision.model.set_grad_checkpointing(True)
        return
    layers = [module for module in model.decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"model.gradient_checkpointing: expected true or false, got {which}: a {model.decoder.config.model_type} can't "
            "recompute some of its layers"
        )
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i % every == 0
    for block in _repeated(model.vision)[::every]:
        # Of the block's own forward, as transformers' layers do it: hooks (of FSDP) stay outside. A partial of a bound method
        # is copied and pickled with its module.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# Compiling


def compile_layers(model: MMPrefixForConditionalGeneration, backend: str = "inductor") -> None:
    """`torch.compile` of each layer, in place: layers of one kind share what is compiled once, in seconds.

    A graph of the whole model takes much longer, and gains little: what lies between layers is few operations, and the loss
    is one. Sharded, it would need all weights at once; so, what gathers a layer runs around it, uncompiled (which is why
    this comes first), and overlaps with the layer before.

    A last layer of which `last_layer` runs a part at label positions only stays as it is: that part is small, and its rows
    reach it beside its arguments, where a compiler would guard each of their numbers.
    """
    apart = last_layer(model.decoder) if model.config.label_only else None
    for layer in layers_of(model):
        if layer is not apart:
            layer.compile(backend=backend)
