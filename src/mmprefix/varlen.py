"""Attention over packed sequences without a mask: queries of many samples in one tensor, and the keys of each.

    queries  [a a a][b b b b]        call i: the queries q[cu_q[i] : cu_q[i + 1]] see
    keys     [a a a a a][b b b b]            the keys    k[cu_k[i] : cu_k[i + 1]]

All of them, or, in a causal call, all up to the query's own: the last query sees every key, the one before it all but
the last (bottom-right alignment), so that a target sees its whole prefix, whose keys come first. Nothing is computed
for pairs that don't see each other, and nothing is padded.

On CUDA in half precision this is `torch.nn.attention.varlen`. On the CPU it is one call of PyTorch's own flash kernel
for each run of samples of equal shape, with grouped query heads folded into queries, so that keys are never repeated;
as a custom operator, it is one node of a compiled graph, whatever the number of samples.

This module knows no samples and no rule: `packing` makes the calls, `attention` runs them.

Shapes: Q queries, K keys, S samples, H query heads, G key-value heads (H is a multiple of G), D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

NO_WINDOW = -1

MAX_HEAD_SIZE = 256
"""Of the flash kernels on CUDA."""
_ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch >= 2.13


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why `varlen_attention` can't take these, in words; None if it can.

    Args:
        query, key, value: any shape ``[..., D]``.
    """
    if query.device.type == "cpu":
        return None
    if query.device.type != "cuda":
        return f"no kernel for {query.device.type}"
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernel takes bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > MAX_HEAD_SIZE or query.shape[-1] % 8:
        return f"the CUDA kernel takes no heads of {query.shape[-1]} and {value.shape[-1]}"
    return None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool,
    scale: float | None = None,
    window: int = NO_WINDOW,
    prefix_in_window: bool = False,
) -> Tensor:
    """Attention of packed queries to the keys of their own sample.

    Args:
        query: float ``[Q, H, D]``.
        key, value: float ``[K, G, D]``; on the CPU, values may have another head size.
        cu_q, cu_k: int32 ``[S + 1]``, where each sample's queries and keys begin; a sample may have none.
        max_q, max_k: at least the longest sample's; they size the launch on CUDA and change nothing else.
        causal: bottom-right aligned, see above; without it every query sees every key of its sample.
        scale: of the scores; by default ``D ** -0.5``.
        window: in a causal call, how many keys a query sees up to its own; `NO_WINDOW` for all.
        prefix_in_window: whether the window also hides keys that stand before the first query's own. By default
            they are prefix, and always seen. On CUDA, a window that hides something needs it.

    Returns:
        float ``[Q, H, D]`` (the head size of the values). Queries of no sample get zeros.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.device.type == "cpu":
        out: Tensor = _cpu_attention(
            query, key, value, cu_q, cu_k, causal, window, prefix_in_window, scale
        )[0]  # fmt: skip
        return out
    assert window == NO_WINDOW or prefix_in_window, "the kernel's window hides the prefix, too"
    # The kernel takes fewer key heads than query heads in all releases, and repeats none; later ones want to be told.
    kwargs: dict[str, Any] = {"enable_gqa": True} if _ASKS_FOR_GROUPS and query.shape[1] != key.shape[1] else {}
    left = -1 if window == NO_WINDOW else window - 1
    # Where several backends exist, the others' windows and alignments differ from release to release.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        result = varlen_attn(
            query, key, value, cu_q, cu_k, max_q, max_k,
            scale=scale, window_size=(left, 0) if causal else (-1, -1), **kwargs,
        )  # fmt: skip
    assert isinstance(result, Tensor)  # a pair where the logsumexp was asked for
    return result


# The CPU operator ------------------------------------------------------------------------------------------------------

_CHUNK = 128
"""Queries of a causal call that the kernel takes at a time: it computes all pairs, hidden ones, too, so that longer
targets are cut up and see keys up to their chunk's end only."""

_SMALL = 1 << 16
"""Entries of the largest mask that is remembered."""


class _Piece(NamedTuple):
    """Neighbours of one shape, or a chunk of their queries.

    Attributes:
        queries, keys: slices of the packed tensors, of the whole run.
        n: how many neighbours.
        start, stop: the chunk, within each neighbour's queries.
        seen: keys of each neighbour that the chunk may see.
        prefix: keys of each neighbour that stand before its first query.
    """

    queries: slice
    keys: slice
    n: int
    start: int
    stop: int
    seen: int
    prefix: int


def _pieces(cu_q: Tensor, cu_k: Tensor, causal: bool) -> Iterator[_Piece]:
    """What the kernel is called for, one after the other. Packing sorts samples by length, so that runs are long."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    lengths_q = [b - a for a, b in pairwise(starts_q)]
    lengths_k = [b - a for a, b in pairwise(starts_k)]
    first = 0
    for (lq, lk), run in groupby(zip(lengths_q, lengths_k, strict=True)):
        n = len(list(run))
        last = first + n
        queries = slice(starts_q[first], starts_q[last])
        keys = slice(starts_k[first], starts_k[last])
        step = _CHUNK if causal else max(lq, 1)
        for start in range(0, lq, step):
            stop = min(start + step, lq)
            yield _Piece(queries, keys, n, start, stop, lk - lq + stop if causal else lk, lk - lq)
        first = last


def _fold(x: Tensor, piece: _Piece, heads: int) -> Tensor:
    """A piece's queries of ``[Q, H, D]`` -> ``[n, G, (H / G) * L, D]``: heads that share keys become one's queries."""
    rows = x[piece.queries].unflatten(0, (piece.n, -1))[:, piece.start : piece.stop]
    return rows.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _put(x: Tensor, piece: _Piece, folded: Tensor) -> None:
    """Writes what `_fold` reads."""
    length = piece.stop - piece.start
    rows = folded.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    x[piece.queries].unflatten(0, (piece.n, -1))[:, piece.start : piece.stop] = rows


def _keys_of(x: Tensor, piece: _Piece) -> Tensor:
    """A piece's keys or values of ``[K, G, D]`` -> ``[n, G, L, D]``, a view."""
    return x[piece.keys].unflatten(0, (piece.n, -1))[:, : piece.seen].transpose(1, 2)


def _make_bias(
    length: int, seen: int, prefix: int, groups: int, window: int, prefix_in_window: bool, dtype: torch.dtype
) -> Tensor:
    q = torch.arange(seen - length, seen).unsqueeze(1)
    k = torch.arange(seen)
    visible = k <= q
    if window != NO_WINDOW:
        within = k > q - window
        visible &= within if prefix_in_window else within | (k < prefix)
    bias = torch.zeros(length, seen, dtype=dtype).masked_fill_(~visible, -torch.inf)
    return bias.repeat(groups, 1)[None, None]


_remembered_bias = lru_cache(maxsize=64)(_make_bias)


def _bias(piece: _Piece, groups: int, window: int, prefix_in_window: bool, dtype: torch.dtype) -> Tensor | None:
    """Additive mask of a causal piece, ``[1, 1, groups * L, seen]``; None where all is seen."""
    length = piece.stop - piece.start
    if length == 1 and not (prefix_in_window and window != NO_WINDOW) and (window == NO_WINDOW or piece.start < window):
        return None  # a last query sees all
    make = _remembered_bias if groups * length * piece.seen <= _SMALL else _make_bias
    return make(length, piece.seen, piece.prefix, groups, window, prefix_in_window, dtype)


def _spread(n: int, heads: int, rows: int) -> int:
    """In how many parts to cut the queries of each head: the kernel's backward has one thread for each head."""
    threads = torch.get_num_threads()
    if n * heads >= threads or rows < 64:
        return 1
    return next((parts for parts in range(threads // (n * heads), 1, -1) if rows % parts == 0), 1)


def _to_size(x: Tensor, size: int) -> Tensor:
    """The kernel wants one head size: zeros behind a smaller one change nothing."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


@torch.library.custom_op("mmprefix::varlen_attention", mutates_args=(), device_types="cpu")
def _cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int,
    prefix_in_window: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    heads, size = key.shape[1], value.shape[2]
    groups = query.shape[1] // heads
    out = query.new_zeros((query.shape[0], query.shape[1], size))
    # Of each piece in the kernel's own shape, one after the other.
    lse = query.new_zeros(query.shape[0] * query.shape[1], dtype=torch.promote_types(query.dtype, torch.float32))
    kernel_size = max(query.shape[2], size)
    query, key, value = (_to_size(x, kernel_size) for x in (query, key, value))
    done = 0
    for piece in _pieces(cu_q, cu_k, causal):
        q = _fold(query, piece, heads)
        o, piece_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, _keys_of(key, piece), _keys_of(value, piece), 0.0, False,
            attn_mask=_bias(piece, groups, window, prefix_in_window, q.dtype) if causal else None, scale=scale,
        )  # fmt: skip
        _put(out, piece, o[..., :size])
        lse[done : done + piece_lse.numel()] = piece_lse.reshape(-1)
        done += piece_lse.numel()
    return out, lse


@_cpu_attention.register_fake
def _(query, key, value, cu_q, cu_k, causal, window, prefix_in_window, scale):  # type: ignore[no-untyped-def]
    lse = query.new_empty(query.shape[0] * query.shape[1], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2])), lse


@torch.library.custom_op("mmprefix::varlen_attention_backward", mutates_args=(), device_types="cpu")
def _cpu_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int,
    prefix_in_window: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, size = key.shape[1], value.shape[2]
    groups = query.shape[1] // heads
    d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    query_size, kernel_size = query.shape[2], max(query.shape[2], size)
    query, key, value, out, grad = (_to_size(x, kernel_size) for x in (query, key, value, out, grad))
    done = 0
    for piece in _pieces(cu_q, cu_k, causal):
        q, o, g = (_fold(x, piece, heads) for x in (query, out, grad))
        k, v = _keys_of(key, piece), _keys_of(value, piece)
        n, rows = piece.n, q.shape[2]
        piece_lse = lse[done : done + n * heads * rows].view(n, heads, rows)
        done += piece_lse.numel()
        bias = _bias(piece, groups, window, prefix_in_window, q.dtype) if causal else None
        parts = _spread(n, heads, rows)
        if parts > 1:
            q, o, g = (x.reshape(n, heads * parts, rows // parts, -1) for x in (q, o, g))
            k, v = (x.repeat_interleave(parts, 1) for x in (k, v))
            piece_lse = piece_lse.reshape(n, heads * parts, rows // parts)
            if bias is not None:
                bias = bias.reshape(1, parts, rows // parts, -1).repeat(1, heads, 1, 1)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, piece_lse, 0.0, False, attn_mask=bias, scale=scale
        )
        _put(d_query, piece, dq.reshape(n, heads, rows, -1)[..., :query_size])
        if parts > 1:
            dk, dv = (x.unflatten(1, (heads, parts)).sum(2) for x in (dk, dv))
        for total, part in ((d_key, dk[..., :query_size]), (d_value, dv[..., :size])):
            seen = _keys_of(total, piece)
            if piece.start:  # an earlier chunk has written there
                seen += part
            else:
                seen.copy_(part)
    return d_query, d_key, d_value


@_cpu_attention_backward.register_fake
def _(grad, query, key, value, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, cu_q, cu_k, *ctx.how = inputs
    ctx.save_for_backward(query, key, value, *output, cu_q, cu_k)


def _backward(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    gradients = _cpu_attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.how)
    return (*gradients, *(None,) * 6)


_cpu_attention.register_autograd(_backward, setup_context=_keep_for_backward)
