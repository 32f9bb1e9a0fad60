"""Attention over packed sequences without a mask: queries of many samples in one tensor, and the keys of each.

    queries  [a a a][b b b b]        call i: the queries q[cu_q[i] : cu_q[i + 1]] see
    keys     [a a a a a][b b b b]            the keys    k[cu_k[i] : cu_k[i + 1]]

All of them, or, in a causal call, all up to the query's own: the last query sees every key, the one before it all but
the last (bottom-right alignment), so that a target sees its whole prefix, whose keys come first. Nothing is computed
for pairs that don't see each other, and nothing is padded.

On CUDA in half precision this is `torch.nn.attention.varlen`. On the CPU it is one call of PyTorch's own flash kernel
for each run of samples of equal shape, with grouped query heads folded into queries, so that keys are never repeated;
as a custom operator, it is one node of a compiled graph, whatever the number of samples.

A rule takes several calls, each over a slice of the row: `attention_calls` runs them all. This module knows no samples
and no rule: `packing` makes the calls, `attention` has them run.

Shapes: Q queries, K keys, T tokens of a row, S samples, H query heads, G key-value heads (H is a multiple of G), D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
_ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch >= 2.12


@dataclass(eq=False)  # not frozen, see `packing`
class AttentionCall:
    """One call of attention without a mask over a packed row: a slice of it as queries, each block with its own keys.

    Attributes:
        start, stop: the slice of the row.
        key_index: int64 ``[K]``, columns of the keys of all blocks; None where they are the queries' own.
        cu_q, cu_k: int32 ``[blocks + 1]``, where each block's queries and keys begin.
        max_q, max_k: bounds of a block's queries and keys, rounded up so that they rarely change.
        causal: whether a block's keys are seen up to the query's own only; those in front of the first always are.
    """

    start: int
    stop: int
    key_index: Tensor | None
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


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
            query, key, value, [cu_q], [cu_k], [cu_q], [False], [0, len(query), 0, len(key)], [causal], window,
            prefix_in_window, scale,
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


def attention_calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    calls: Sequence[AttentionCall],
    *,
    scale: float | None = None,
    window: int = NO_WINDOW,
    prefix_in_window: bool = False,
) -> Tensor:
    """Attention of a packed row to itself, in calls whose slices make up the row in order.

    On the CPU it is one operator: apart, each call's gradients would be as long as the row, mostly zeros, and added up.

    Args:
        query: float ``[T, H, D]``.
        key, value: float ``[T, G, D]``.
        calls: over the row.
        scale, window, prefix_in_window: as in `varlen_attention`; the window is that of causal calls.

    Returns:
        float ``[T, H, D]`` (the head size of the values).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.device.type == "cpu":
        out: Tensor = _cpu_attention(
            query, key, value, [call.cu_q for call in calls], [call.cu_k for call in calls],
            [call.cu_q if call.key_index is None else call.key_index for call in calls],
            [call.key_index is not None for call in calls],
            [bound for call in calls for bound in (call.start, call.stop, call.start, call.stop)],
            [call.causal for call in calls], window, prefix_in_window, scale,
        )[0]  # fmt: skip
        return out
    outputs = []
    for call in calls:
        at = slice(call.start, call.stop)
        keys = (key[at], value[at]) if call.key_index is None else (
            key.index_select(0, call.key_index), value.index_select(0, call.key_index))  # fmt: skip
        outputs.append(varlen_attention(
            query[at], *keys, call.cu_q, call.cu_k, call.max_q, call.max_k, causal=call.causal, scale=scale,
            window=window if call.causal else NO_WINDOW, prefix_in_window=prefix_in_window,
        ))  # fmt: skip
    return torch.cat(outputs)


# The CPU operator ------------------------------------------------------------------------------------------------------

_CHUNK = 128
"""Queries of a causal call that the kernel takes at a time: it computes all pairs, hidden ones, too, so that longer
targets are cut up and see keys up to their chunk's end only."""

_SMALL = 1 << 19
"""Entries of the largest mask that is remembered, 2 MiB in float32: all layers and both passes want the same ones."""


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


def _rows(x: Tensor, piece: _Piece) -> Tensor:
    """A piece's queries of ``[Q, H, D]`` -> ``[n, L, H, D]``, a view."""
    rows = x[piece.queries]
    rows = rows.view(piece.n, len(rows) // piece.n, *x.shape[1:])
    return rows if piece.stop - piece.start == rows.shape[1] else rows[:, piece.start : piece.stop]


def _fold(x: Tensor, piece: _Piece, heads: int) -> Tensor:
    """A piece's queries of ``[Q, H, D]`` -> ``[n, G, L * (H / G), D]``: heads that share keys become one's queries.

    Where all heads share them, a view.
    """
    rows = _rows(x, piece)
    if heads == 1:
        return rows.reshape(piece.n, 1, -1, x.shape[2])
    return rows.unflatten(2, (heads, -1)).transpose(1, 2).flatten(2, 3)


def _put(x: Tensor, piece: _Piece, folded: Tensor) -> None:
    """Writes what `_fold` reads."""
    rows = _rows(x, piece)
    if folded.shape[1] == 1:
        rows.copy_(folded.reshape(rows.shape))
    else:
        rows.copy_(folded.unflatten(2, (rows.shape[1], -1)).transpose(1, 2).flatten(2, 3))


def _keys_of(x: Tensor, piece: _Piece) -> Tensor:
    """A piece's keys or values of ``[K, G, D]`` -> ``[n, G, L, D]``, a view."""
    rows = x[piece.keys]
    rows = rows.view(piece.n, len(rows) // piece.n, *x.shape[1:])
    return (rows if piece.seen == rows.shape[1] else rows[:, : piece.seen]).transpose(1, 2)


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
    return bias.repeat_interleave(groups, 0)[None, None]


_remembered_bias = lru_cache(maxsize=32)(_make_bias)


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


def _calls(
    cu_q: Sequence[Tensor], cu_k: Sequence[Tensor], key_index: Sequence[Tensor], gathered: Sequence[bool],
    bounds: Sequence[int], causal: Sequence[bool],
) -> Iterator[tuple[slice, slice | Tensor, bool, list[_Piece]]]:  # fmt: skip
    """Of each call: its slice of queries, its keys as a slice or by columns, whether it is causal, what the kernel does."""
    for number, is_causal in enumerate(causal):
        first_q, last_q, first_k, last_k = bounds[4 * number : 4 * number + 4]
        keys = key_index[number] if gathered[number] else slice(first_k, last_k)
        yield slice(first_q, last_q), keys, is_causal, list(_pieces(cu_q[number], cu_k[number], is_causal))


def _taken(x: Tensor, keys: slice | Tensor) -> Tensor:
    return x[keys] if isinstance(keys, slice) else x.index_select(0, keys)


@torch.library.custom_op("mmprefix::varlen_attention", mutates_args=(), device_types="cpu")
def _cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: list[Tensor],
    cu_k: list[Tensor],
    key_index: list[Tensor],
    gathered: list[bool],
    bounds: list[int],
    causal: list[bool],
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
    for at, keys, is_causal, pieces in _calls(cu_q, cu_k, key_index, gathered, bounds, causal):
        own_query, own_out, own_key, own_value = query[at], out[at], _taken(key, keys), _taken(value, keys)
        for piece in pieces:
            q = _fold(own_query, piece, heads)
            o, piece_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, _keys_of(own_key, piece), _keys_of(own_value, piece), 0.0, False,
                attn_mask=_bias(piece, groups, window, prefix_in_window, q.dtype) if is_causal else None, scale=scale,
            )  # fmt: skip
            _put(own_out, piece, o if kernel_size == size else o[..., :size])
            lse[done : done + piece_lse.numel()] = piece_lse.reshape(-1)
            done += piece_lse.numel()
    return out, lse


@_cpu_attention.register_fake
def _(query, key, value, cu_q, cu_k, key_index, gathered, bounds, causal, window, prefix_in_window, scale):  # type: ignore[no-untyped-def]
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
    cu_q: list[Tensor],
    cu_k: list[Tensor],
    key_index: list[Tensor],
    gathered: list[bool],
    bounds: list[int],
    causal: list[bool],
    window: int,
    prefix_in_window: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, size = key.shape[1], value.shape[2]
    groups = query.shape[1] // heads
    d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    query_size, kernel_size = query.shape[2], max(query.shape[2], size)
    query, key, value, out, grad = (_to_size(x, kernel_size) for x in (query, key, value, out, grad))
    later: list[tuple[Tensor, Tensor, Tensor]] = []
    done = 0
    for at, keys, is_causal, pieces in _calls(cu_q, cu_k, key_index, gathered, bounds, causal):
        own_query, own_out, own_grad, own_d_query = query[at], out[at], grad[at], d_query[at]
        own_key, own_value = _taken(key, keys), _taken(value, keys)
        if isinstance(keys, slice):
            own_d_key, own_d_value = d_key[keys], d_value[keys]
        else:
            own_d_key, own_d_value = (x.new_zeros((len(keys), *x.shape[1:])) for x in (d_key, d_value))
            later.append((keys, own_d_key, own_d_value))
        for piece in pieces:
            q, o, g = (_fold(x, piece, heads) for x in (own_query, own_out, own_grad))
            k, v = _keys_of(own_key, piece), _keys_of(own_value, piece)
            n, rows = piece.n, q.shape[2]
            piece_lse = lse[done : done + n * heads * rows].view(n, heads, rows)
            done += piece_lse.numel()
            bias = _bias(piece, groups, window, prefix_in_window, q.dtype) if is_causal else None
            parts = _spread(n, heads, rows)
            if parts > 1:
                q, o, g = (x.reshape(n, heads * parts, rows // parts, -1) for x in (q, o, g))
                k, v = (x.unsqueeze(2).expand(-1, -1, parts, -1, -1).flatten(1, 2) for x in (k, v))
                piece_lse = piece_lse.reshape(n, heads * parts, rows // parts)
                if bias is not None:
                    bias = bias.reshape(1, 1, parts, rows // parts, -1).expand(-1, heads, -1, -1, -1).flatten(1, 2)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, piece_lse, 0.0, False, attn_mask=bias, scale=scale
            )
            dq = dq.reshape(n, heads, rows, -1)
            _put(own_d_query, piece, dq if kernel_size == query_size else dq[..., :query_size])
            if parts > 1:
                dk, dv = (x.unflatten(1, (heads, parts)).sum(2) for x in (dk, dv))
            for total, part in ((own_d_key, dk[..., :query_size]), (own_d_value, dv[..., :size])):
                seen = _keys_of(total, piece)
                if piece.start:  # an earlier chunk has written there
                    seen += part
                else:
                    seen.copy_(part)
    for index, more_key, more_value in later:  # columns that a slice has written, too
        d_key.index_add_(0, index, more_key)
        d_value.index_add_(0, index, more_value)
    return d_query, d_key, d_value


@_cpu_attention_backward.register_fake
def _(grad, query, key, value, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, cu_q, cu_k, key_index, *ctx.how = inputs
    ctx.num_calls = len(cu_q)
    ctx.save_for_backward(query, key, value, *output, *cu_q, *cu_k, *key_index)


def _backward(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, out, lse, *indices = ctx.saved_tensors
    n = ctx.num_calls
    lists = indices[:n], indices[n : 2 * n], indices[2 * n :]
    gradients = _cpu_attention_backward(grad.contiguous(), query, key, value, out, lse, *lists, *ctx.how)
    return (*gradients, *([None] * n for _ in range(3)), *(None,) * 6)


_cpu_attention.register_autograd(_backward, setup_context=_keep_for_backward)
