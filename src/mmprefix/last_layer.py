"""The last layer, where somebody reads it.

A loss reads the decoder's output at label positions: those of the targets, and the last one of each prefix. Of all
other tokens, most of a batch with images, the last layer has to make keys and values, which labels attend to. Their
queries, the projection behind attention and the feed-forward, by far the largest part of a layer, reach no label. In a
packed row those modules get the rows of label positions only, and put zeros elsewhere: the loss and every gradient
stay what they are, and an L-layer decoder saves nearly 1 / L of its work on prefixes, and of its activations.

Which modules those are is found by looking (`find_label_only`), not from a list of architectures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmprefix.attention import MaskFree, prefix_plan
from mmprefix.packing import collate, map_tensors
from mmprefix.sequence import PromptLayout, TokenSequence


class _Current(threading.local):
    """What the modules of a last layer read, set by the layer at each of its calls."""

    rows: Tensor | None = None
    length = 0
    elsewhere = 0.0


_current = _Current()
_CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps a layer's checkpoint function."""


def layers_of_decoder(decoder: PreTrainedModel) -> nn.ModuleList | None:
    """The decoder's layers; None where they are not one list."""
    number = getattr(decoder.config, "num_hidden_layers", None)
    return next((m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == number), None)


def last_layer(decoder: PreTrainedModel) -> nn.Module | None:
    """The decoder's last layer; None where its layers are not one list."""
    layers = layers_of_decoder(decoder)
    return None if layers is None else layers[-1]


def restrict_last_layer(decoder: PreTrainedModel, label_only: list[str]) -> None:
    """Lets modules of the last layer run at the label positions of a packed row only. Idempotent.

    Args:
        decoder: an installed decoder.
        label_only: their names in the last layer, from `find_label_only`; none takes the restriction back.
    """
    release_last_layer(decoder)
    layer = last_layer(decoder)
    if layer is None or not label_only:
        return
    layer.register_forward_pre_hook(_note_rows, with_kwargs=True)
    for name in label_only:
        _restrict(layer.get_submodule(name))


def release_last_layer(decoder: nn.Module) -> None:
    """Takes back what `restrict_last_layer` did."""
    for module in decoder.modules():
        for hooks, ours in (
            (module._forward_pre_hooks, (_note_rows, _select_rows)),
            (module._forward_hooks, (_put_rows,)),
        ):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        recomputing = getattr(module, _CHECKPOINT, None)
        if isinstance(recomputing, _WithRows):
            setattr(module, _CHECKPOINT, recomputing.checkpoint)


def _restrict(module: nn.Module) -> list[Any]:
    return [module.register_forward_pre_hook(_select_rows), module.register_forward_hook(_put_rows)]


# Hooks are plain functions without a state of their own, so that models can be copied and pickled.


class _WithRows:
    """A layer's checkpoint function, under which a recomputation finds the rows of its own forward pass.

    Newer transformers (5.23) recompute a layer inside of its hooks: nobody notes rows for it again. By then the last ones may
    be another batch's, and on CUDA backward runs in a thread of its own, which has none.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(with_rows_of_this_pass(function), *args, **kwargs)


def with_rows_of_this_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward for a checkpoint to compute twice: in backward, too, with the rows that are noted now."""
    if torch.compiler.is_compiling():  # both are in one graph
        return function
    return partial(_with_rows, _current.rows, _current.length, function)


def _with_rows(rows: Tensor | None, length: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = _current.rows, _current.length
    _current.rows, _current.length = rows, length
    try:
        return function(*args, **kwargs)
    finally:
        _current.rows, _current.length = before


def _note_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Here, and not once: whoever switches checkpointing on sets the function anew.
    recomputing = getattr(module, _CHECKPOINT, None)
    if recomputing is not None and not isinstance(recomputing, _WithRows):
        setattr(module, _CHECKPOINT, _WithRows(recomputing))
    # From an argument and not from the plan that is set: recomputation under gradient checkpointing has none.
    mask = next((value for value in (*args, *kwargs.values()) if isinstance(value, MaskFree)), None)
    if mask is None or mask.plan.label_positions is None:
        _current.rows = None
    else:
        _current.rows, _current.length = mask.plan.label_rows, mask.plan.segment.shape[1]


def _select_rows(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    rows = _current.rows
    if rows is None:
        return args
    return (args[0].index_select(-2, rows), *args[1:])


def _put_rows(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    rows = _current.rows
    if rows is None:
        return output
    shape = (*output.shape[:-2], _current.length, output.shape[-1])
    return output.new_full(shape, _current.elsewhere).index_copy(-2, rows, output)


@torch.no_grad()
def find_label_only(decoder: PreTrainedModel) -> list[str]:
    """Names of the last layer's modules that need to run at label positions only, found by looking.

    Each is tried with NaN in the place of what it doesn't compute: where any of that can reach a label, in whatever
    small a part, the label shows it. A module qualifies if labels get the values that they got before.

    Args:
        decoder: an installed decoder, with weights.

    Returns:
        The largest such modules; none on a decoder that attends with a mask.
    """
    layer = last_layer(decoder)
    if layer is None:
        return []
    weight = decoder.get_input_embeddings().weight
    layout = PromptLayout(image=0, bos=1, separator=(), eos=2)
    samples = [TokenSequence.build(layout, 0, [5] * prefix, [[5] * 3, [5] * 2]) for prefix in (6, 3, 3)]
    batch = map_tensors(collate(samples, [0] * 3, None, pad_id=0, packed=True), lambda t: t.to(weight.device))
    plan, rows = batch.plan, batch.plan.label_rows
    assert rows is not None
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(*batch.input_ids.shape, weight.shape[1], generator=generator).to(weight)
    embeds *= weight.float().std().to(embeds)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    def output() -> Tensor:
        found: Any = layer(*args, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    def labels_see() -> Tensor:
        return output()[0, rows].float()

    def qualifies(module: nn.Module) -> bool:
        lengths = []

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            lengths.append(args[0].shape[:-1].numel() if args and isinstance(args[0], Tensor) else None)

        hooks = [module.register_forward_pre_hook(watch, with_kwargs=True), *_restrict(module)]
        try:
            found = labels_see()
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError):  # it wants all tokens, or isn't a map
            return False
        finally:
            for hook in hooks:
                hook.remove()
        return lengths == [batch.input_ids.numel()] and bool((found - expected).abs().max() <= tolerance)

    def visit(parent: nn.Module, path: str) -> None:
        for name, module in parent.named_children():
            if not any(parameter.ndim > 1 for parameter in module.parameters()):
                continue  # a norm: to pick rows would cost what it saves
            if qualifies(module):
                names.append(path + name)
            elif not isinstance(module, nn.ModuleList):  # experts, which get tokens in an order of their own
                visit(module, f"{path}{name}.")

    names: list[str] = []
    was_training = decoder.training
    decoder.eval()
    release_last_layer(decoder)
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True)]
    try:
        with prefix_plan(plan):
            decoder(inputs_embeds=embeds, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
                    use_cache=False)  # fmt: skip
        (args, kwargs), *more = seen or [((), {})]
        if more or not any(isinstance(value, MaskFree) for value in (*args, *kwargs.values())):
            return []
        if output().shape[:2] != batch.input_ids.shape:  # several streams, as gemma3n's
            return []
        expected = labels_see()
        size = expected.abs().max().item()
        tolerance = size * (1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2)
        hooks.append(layer.register_forward_pre_hook(_note_rows, with_kwargs=True))
        _current.elsewhere = torch.nan
        visit(layer, "")
    finally:
        _current.elsewhere = 0.0
        decoder.train(was_training)
        for hook in hooks:
            hook.remove()
    return names
