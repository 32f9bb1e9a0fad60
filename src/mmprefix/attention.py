"""The prefix-LM rule inside transformers' own attention masks, and attention without a mask.

Every decoder of transformers builds its masks by calling the mask functions registered under the name of its
attention implementation. We wrap those functions: while a `PrefixPlan` is set (`prefix_plan`), the mask that comes
out is the prefix-LM rule with the decoder's own rule (causal, sliding window, chunked) inside the target, and without
a plan nothing changes. No architecture is touched, and no mask is passed in: a mask passed as ``attention_mask``
would silently replace sliding windows, too.

A plan with attention calls (a packed row) needs no mask. The wrapped mask function then returns a `MaskFree` in its
place, which the decoder hands to its attention function, wrapped as well: that runs the calls. Where it can't (a dtype
or a device without a kernel, attention dropout, a window shorter than a target on CUDA), it makes the dense mask after
all: slower, never wrong.

The plan travels beside the arguments (`_Current`, one for each thread) because the mask functions see the decoder's
config and sizes only. What attention reads is in the `MaskFree`, an argument of every layer: recomputation under
gradient checkpointing runs when no plan is set.

What this module doesn't do: decide whether an architecture obeys (`probe` does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mmprefix.masks import TokenIndex, prefix_lm_visible
from mmprefix.packing import PrefixPlan
from mmprefix.varlen import NO_WINDOW, attention_calls, unsupported

_ON_SCORES = ("softcap", "s_aux", "sinks", "position_bias")
"""Arguments of attention functions that no kernel of ours knows."""

DENSE_IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that take a dense mask."""

MASK_FREE_IMPLEMENTATION = "sdpa"
"""The one whose attention function is the library's, not the architecture's, and can be wrapped."""


class _Current(threading.local):
    """What is set around a pass. Not a ContextVar: torch.compile can't trace setting one."""

    plan: PrefixPlan | None = None
    columns: CachedColumns | None = None
    hidden_states: list[Tensor] | None = None
    only_mask_free = False


_current = _Current()


@contextmanager
def prefix_plan(plan: PrefixPlan | None) -> Iterator[None]:
    """Sets the plan that masks and logits of the decoder follow inside the block.

    Raises:
        RuntimeError: a plan, but nobody to follow it: the decoder was never installed here, or is no more.
    """
    if plan is not None and not masks_registered():
        raise RuntimeError("a prefix plan is set, but transformers' masks don't follow it: call install(decoder) first")
    outer, _current.plan = _current.plan, plan
    try:
        yield
    finally:
        _current.plan = outer


def current_plan() -> PrefixPlan | None:
    """The plan of the innermost `prefix_plan` block."""
    return _current.plan


def plan_mask_function(plan: PrefixPlan, own_rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mask function in transformers' form, ``(batch, head, query, key) -> bool``, that follows the plan.

    Indices broadcast against each other. The decoder's own rule is asked with positions inside the sample in place of
    columns, so that a sliding window neither counts padding nor reaches into another branch.
    """

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q = TokenIndex(*(t[batch, query] for t in plan.tokens))
        k = TokenIndex(*(t[batch, key] for t in plan.tokens))
        visible = prefix_lm_visible(q, k, plan.visibility, own_rule(batch, head, q.position, k.position))
        # Padding sees itself: nobody reads its output, and a row without any key would be NaN after softmax.
        return visible | (query == key)

    return rule


class MaskFreeError(RuntimeError):
    """Attention without a mask is not to be had, and `only_mask_free` asked for nothing else."""


@contextmanager
def only_mask_free() -> Iterator[None]:
    """Inside the block, attention of a packed row that would fall back to a dense mask raises `MaskFreeError`."""
    outer, _current.only_mask_free = _current.only_mask_free, True
    try:
        yield
    finally:
        _current.only_mask_free = outer


@dataclass(eq=False)
class MaskFree:
    """What stands in the place of a mask where a plan has attention calls.

    Attributes:
        plan: with calls.
        window: of the decoder's own rule in these layers, in tokens up to the query's own; `NO_WINDOW` for plain causal.
        refusal: why these layers can't do without a mask; None if they can.
        make_dense: the mask after all, as the library would have made it.
    """

    plan: PrefixPlan
    window: int
    refusal: str | None
    make_dense: Callable[[], Any]

    def __post_init__(self) -> None:
        self._dense: Any = None

    def dense(self) -> Any:
        """The dense mask, made once for all layers that share this object."""
        if self._dense is None:
            self._dense = self.make_dense()
        return self._dense

    def refuses(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, extras: dict[str, Any]) -> str | None:
        """Why this call needs the dense mask, in words; None if it doesn't."""
        if self.refusal is not None:
            return self.refusal
        if dropout:
            return "attention dropout"
        if key.shape[2] != query.shape[2] or query.shape[0] != 1:
            return "a cache"
        for name in _ON_SCORES:
            if extras.get(name) is not None:
                return f"{name} on attention scores"
        if query.device.type != "cpu" and self.window != NO_WINDOW and self.plan.visibility != "causal":
            # Prompts alone have no target, and no causal call.
            longest = max((call.max_q for call in self.plan.calls if call.causal), default=0)
            if longest > self.window:
                return f"a window of {self.window} over targets of up to {longest} tokens"
        return unsupported(query, key, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """``[1, H, T, D]`` and twice ``[1, G, T, D]`` -> ``[1, T, H, D]``."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        causal_throughout = self.plan.visibility == "causal"
        # A window that no target of the batch reaches hides nothing, since the prefix is seen by all.
        bites = causal_throughout or query.device.type == "cpu"
        return attention_calls(
            q, k, v, self.plan.calls, scale=scale, window=self.window if bites else NO_WINDOW,
            prefix_in_window=causal_throughout,
        ).unsqueeze(0)  # fmt: skip


@dataclass(eq=False)
class CachedColumns:
    """What a decoding step sees of a cache whose rows are filled from the left, to different lengths.

    Attributes:
        length: int64 ``[R]``, columns that are filled: the new token's column, and its position.
        prefix: int64 ``[R]``, how many of them are prefix.
        columns: L, of the cache.
        causal: whether the decoder's own rule holds for the prefix, too.
    """

    length: Tensor
    prefix: Tensor
    columns: int
    causal: bool

    def written(self) -> Tensor:
        """int64 ``[R, L]``, 0 on columns that nothing has been written to."""
        return (torch.arange(self.columns, device=self.length.device) <= self.length.unsqueeze(1)).long()

    def visible(self, own_rule: Callable[..., Tensor]) -> Tensor:
        """Bool ``[R, 1, 1, L]``.

        Args:
            own_rule: the decoder's, as in `plan_mask_function`.
        """
        number = torch.arange(len(self.length), device=self.length.device).view(-1, 1, 1, 1)
        query, key = self.length.view(-1, 1, 1, 1), torch.arange(self.columns, device=self.length.device)
        visible = own_rule(number, torch.zeros_like(number), query, key)
        if not self.causal:
            visible = visible | (key < self.prefix.view(-1, 1, 1, 1))
        return visible & (key <= query)


@contextmanager
def cached_columns(columns: CachedColumns) -> Iterator[None]:
    """Inside the block, the decoder is fed one token for each row of a cache, and sees what `columns` says."""
    outer, _current.columns = _current.columns, columns
    try:
        yield
    finally:
        _current.columns = outer


@dataclass(eq=False)
class _Visible:
    """What stands in the place of a mask ``[R, 1, 1, L]`` that all heads of a decoding step share."""

    mask: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """``[R, H, 1, D]`` and twice ``[R, G, L, D]`` -> ``[R, 1, H, D]``.

        Heads that share keys become one's queries: with a mask, the library would repeat the whole cache for them.
        """
        folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=self.mask, scale=scale)
        return out.reshape(query.shape[0], 1, query.shape[1], -1)


class _Unmasked:
    """What stands in the place of a mask where every query sees every key. None would be causal to the library."""


_UNMASKED = _Unmasked()


def _hides_nothing(plan: PrefixPlan, window: int | None, q_length: int, kv_length: int, q_offset: Any) -> bool:
    """Whether every query sees every key, in generation from prompts of equal length."""
    prompt = plan.segment.shape[1]
    if not plan.unpadded or not isinstance(q_offset, int) or kv_length != q_offset + q_length:
        return False  # a static cache has columns that aren't written yet
    if q_length > 1:
        return plan.visibility == "full" and kv_length == prompt
    return window is None or (kv_length if plan.visibility == "causal" else kv_length - prompt) <= window


def _follow_plan(library_mask: Callable[..., Any], mask_free: bool) -> Callable[..., Any]:
    @wraps(library_mask)
    def mask(
        *,
        kv_length: int,
        kv_offset: int = 0,
        mask_function: Callable[..., Tensor] = causal_mask_function,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if _current.columns is not None:
            assert mask_free, "only decoders that attend without masks have such a cache"
            return _Visible(_current.columns.visible(mask_function))
        plan = current_plan()
        if plan is None:
            return library_mask(
                kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
                **kwargs,
            )  # fmt: skip

        def dense() -> Any:
            return library_mask(
                kv_length=kv_length,
                kv_offset=kv_offset,
                mask_function=plan_mask_function(plan.padded_to(kv_offset + kv_length), mask_function),
                attention_mask=None,  # padding is part of the plan
                # The skips would drop the mask for what looks causal or full to the library; vmap cannot index a plan.
                **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": False},
            )

        window = kwargs.get("local_size")
        q_length = kwargs.get("q_length", 0)
        if mask_free and _hides_nothing(plan, window, q_length, kv_length, kwargs.get("q_offset", 0)):
            return None if q_length == 1 else _UNMASKED
        if not (plan.calls and mask_free):
            if plan.calls and _current.only_mask_free:
                raise MaskFreeError("eager attention is the architecture's own")
            return dense()
        chunk = getattr(kwargs.get("config"), "attention_chunk_size", None)
        refusal = "chunked attention" if window is not None and window == chunk else None
        return MaskFree(plan, NO_WINDOW if window is None else int(window), refusal, dense)

    mask.library_function = library_mask  # type: ignore[attr-defined]
    return mask


def _run_calls(library_attention: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(library_attention)
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is _UNMASKED:
            attention_mask, kwargs["is_causal"] = None, False
        elif isinstance(attention_mask, _Visible):
            if not any(kwargs.get(name) is not None for name in _ON_SCORES):
                return attention_mask.attend(query, key, value, scaling), None
            attention_mask = attention_mask.mask
        elif isinstance(attention_mask, MaskFree):
            # As it would for the library's attention; it knows no meta tensors, which FLOPs are counted with.
            if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
                dtype = torch.get_autocast_dtype(query.device.type)
                query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            refusal = attention_mask.refuses(query, key, value, dropout, kwargs)
            if refusal is None:
                return attention_mask.attend(query, key, value, scaling), None
            if _current.only_mask_free:
                raise MaskFreeError(refusal)
            attention_mask = attention_mask.dense()
        return library_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )  # fmt: skip

    attention.library_function = library_attention  # type: ignore[attr-defined]
    return attention


def register_masks() -> None:
    """Wraps transformers' dense mask functions and sdpa attention, once per process; inert while no plan is set."""
    for name in DENSE_IMPLEMENTATIONS:
        library_mask = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(library_mask, "library_function"):  # not __wrapped__: the library decorates some of its own
            AttentionMaskInterface.register(name, _follow_plan(library_mask, name == MASK_FREE_IMPLEMENTATION))
    library_attention = ALL_ATTENTION_FUNCTIONS[MASK_FREE_IMPLEMENTATION]
    if not hasattr(library_attention, "library_function"):
        AttentionInterface.register(MASK_FREE_IMPLEMENTATION, _run_calls(library_attention))


def masks_registered() -> bool:
    """Whether transformers' mask functions follow plans at the moment."""
    return hasattr(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], "library_function")


def unregister_masks() -> None:
    """Puts transformers' own functions back."""
    for name in DENSE_IMPLEMENTATIONS:
        library_mask = getattr(ALL_MASK_ATTENTION_FUNCTIONS[name], "library_function", None)
        if library_mask is not None:
            AttentionMaskInterface.register(name, library_mask)
    library_attention = getattr(ALL_ATTENTION_FUNCTIONS[MASK_FREE_IMPLEMENTATION], "library_function", None)
    if library_attention is not None:
        AttentionInterface.register(MASK_FREE_IMPLEMENTATION, library_attention)


@contextmanager
def collect_hidden_states() -> Iterator[list[Tensor]]:
    """Inside the block, a decoder under a plan with label positions makes no logits: their hidden states are collected.

    Yields:
        A list that gets one tensor ``[M, D]`` for each pass.
    """
    collected: list[Tensor] = []
    outer, _current.hidden_states = _current.hidden_states, collected
    try:
        yield collected
    finally:
        _current.hidden_states = outer


def select_label_positions(hidden_states: Tensor) -> Tensor:
    """``[B, T, D]`` -> ``[1, M, D]``, the hidden states that predict labels; unchanged without a plan for it.

    Runs in front of the decoder's output layer, so that prefix logits, (B * T, vocabulary) and very big, are never
    computed, while everything the model does to logits afterwards (soft-cap, scale) stays its own.
    """
    plan = current_plan()
    if plan is None or plan.label_positions is None:
        return hidden_states
    selected = torch.index_select(hidden_states.flatten(0, 1), 0, plan.label_positions)
    collected = _current.hidden_states
    if collected is None:
        return selected.unsqueeze(0)
    collected.append(selected)
    return selected.new_empty(1, 0, selected.shape[1])
