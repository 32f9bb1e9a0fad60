"""The prefix-LM rule inside transformers' own attention masks.

Every decoder of transformers builds its masks by calling the mask functions registered under the name of its
attention implementation. We wrap those functions: while a `PrefixPlan` is set (`prefix_plan`), the mask that comes
out is the prefix-LM rule with the decoder's own rule (causal, sliding window, chunked) inside the target, and without
a plan nothing changes. No architecture is touched, and no mask is passed in: a mask passed as ``attention_mask``
would silently replace sliding windows, too.

The plan travels in a ContextVar because the mask functions see the decoder's config and sizes only.

What this module doesn't do: decide whether an architecture obeys (`probe` does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function

from mmprefix.masks import TokenIndex, prefix_lm_visible
from mmprefix.packing import PrefixPlan

DENSE_IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that take a dense mask."""

_current_plan: ContextVar[PrefixPlan | None] = ContextVar("mmprefix_plan", default=None)


@contextmanager
def prefix_plan(plan: PrefixPlan | None) -> Iterator[None]:
    """Sets the plan that masks and logits of the decoder follow inside the block.

    Raises:
        RuntimeError: a plan, but nobody to follow it: the decoder was never installed here, or is no more.
    """
    if plan is not None and not masks_registered():
        raise RuntimeError("a prefix plan is set, but transformers' masks don't follow it: call install(decoder) first")
    token = _current_plan.set(plan)
    try:
        yield
    finally:
        _current_plan.reset(token)


def current_plan() -> PrefixPlan | None:
    """The plan of the innermost `prefix_plan` block."""
    return _current_plan.get()


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


def _follow_plan(library_mask: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(library_mask)
    def mask(
        *,
        kv_length: int,
        kv_offset: int = 0,
        mask_function: Callable[..., Tensor] = causal_mask_function,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        plan = current_plan()
        if plan is not None:
            mask_function = plan_mask_function(plan.padded_to(kv_offset + kv_length), mask_function)
            attention_mask = None  # padding is part of the plan
            # The skips would drop the mask for what looks causal or full to the library; vmap cannot index a plan.
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": False}
        return library_mask(
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )

    mask.library_mask = library_mask  # type: ignore[attr-defined]
    return mask


def register_masks() -> None:
    """Wraps transformers' dense mask functions, once per process; inert while no plan is set."""
    for name in DENSE_IMPLEMENTATIONS:
        library_mask = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(library_mask, "library_mask"):  # not __wrapped__: the library decorates some of its own
            AttentionMaskInterface.register(name, _follow_plan(library_mask))


def masks_registered() -> bool:
    """Whether transformers' mask functions follow plans at the moment."""
    return hasattr(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], "library_mask")


def unregister_masks() -> None:
    """Puts transformers' own mask functions back."""
    for name in DENSE_IMPLEMENTATIONS:
        library_mask = getattr(ALL_MASK_ATTENTION_FUNCTIONS[name], "library_mask", None)
        if library_mask is not None:
            AttentionMaskInterface.register(name, library_mask)


def select_label_positions(hidden_states: Tensor) -> Tensor:
    """``[B, T, D]`` -> ``[1, M, D]``, the hidden states that predict labels; unchanged without a plan for it.

    Runs in front of the decoder's output layer, so that prefix logits, (B * T, vocabulary) and very big, are never
    computed, while everything the model does to logits afterwards (soft-cap, scale) stays its own.
    """
    plan = current_plan()
    if plan is None or plan.label_positions is None:
        return hidden_states
    return torch.index_select(hidden_states.flatten(0, 1), 0, plan.label_positions).unsqueeze(0)
