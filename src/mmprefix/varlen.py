"""Attention over packed sequences without a mask: queries of many samples in one tensor, and the keys of each.

    queries  [a a a][b b b b]        call i: the queries q[cu_q[i] : cu_q[i + 1]] see
    keys     [a a a a a][b b b b]            the keys    k[cu_k[i] : cu_k[i + 1]]

All of them, or, in a causal call, all up to the query's own: the last query sees every key, the one before it all but
the last (bottom-right alignment), so that a target sees its whole prefix, whose keys come first. Nothing is computed
for pairs that don't see each other, and nothing is padded.

A rule takes several calls, each over a slice of the row: `attention_calls` runs them all as one custom operator, one
node of a compiled graph, whatever the number of calls and samples. Apart, each call's gradients would be as long as the
row, mostly zeros, and added up, and the keys that it gathers kept for the backward pass.

On CUDA in half precision a call is one of the flash kernel behind `torch.nn.attention.varlen`. On the CPU it is one of
PyTorch's flash kernel there for each run of samples of equal shape, or for a chunk of their queries where they are
causal, with grouped query heads folded into queries.

This module knows no samples and no rule: `packing` makes the calls, `attention` has them run.

Shapes: Q queries, K keys, T tokens of a row, S samples, H query heads, G key-value heads (H is a multiple of G), D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NO_WINDOW = -1

MAX_HEAD_SIZE = 256
"""Of the flash kernels on CUDA."""


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
    """Why `attention_calls` can't take these, in words; None if it can.

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

    Args:
        query: float ``[T, H, D]``.
        key, value: float ``[T, G, D]``; on the CPU, values may have another head size.
        calls: over the row.
        scale: of the scores; by default ``D ** -0.5``.
        window: in causal calls, how many keys a query sees up to its own; `NO_WINDOW` for all.
        prefix_in_window: whether the window also hides keys that stand before the first query's own. By default
            they are prefix, and always seen. On CUDA, a window that hides something needs it.

    Returns:
        float ``[T, H, D]`` (the head size of the values). On the CPU, queries of no sample get zeros, and keys of none
        no gradient; on CUDA all must be some sample's.

    Raises:
        ValueError: calls that don't make up the row; on the CPU also blocks that reach beyond their call.
    """
    assert query.device.type == "cpu" or window == NO_WINDOW or prefix_in_window, "the kernel's window hides the prefix"
    indices = (
        [call.cu_q for call in calls], [call.cu_k for call in calls],
        [call.cu_q if call.key_index is None else call.key_index for call in calls],
    )  # fmt: skip
    how = (
        [call.key_index is not None for call in calls], [bound for call in calls for bound in (call.start, call.stop)],
        _longest(calls, query.device), [call.causal for call in calls], window, prefix_in_window,
        query.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip
    out: Tensor
    if torch.compiler.is_compiling():
        out, _ = _attention(query, key, value, *indices, *how)
    else:
        out = _Eager.apply(query, key, value, indices, how)
    return out


def _longest(calls: Sequence[AttentionCall], device: torch.device) -> list[int]:
    """Bounds of each call's queries and keys. On the CPU they change nothing, and each would be a reason to compile anew."""
    if device.type == "cpu":
        return [0] * (2 * len(calls))
    return [bound for call in calls for bound in (call.max_q, call.max_k)]


# The operator ----------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call as the operator does it.

    Attributes:
        at: its slice of the row.
        lse: its slice of the row's logsumexp, flat, one for each query and head, in the kernel's own order.
        columns: of its keys; None where they are the queries' own.
        cu_q, cu_k, max_q, max_k, causal: as in `AttentionCall`.
    """

    at: slice
    lse: slice
    columns: Tensor | None
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool

    def keys(self, x: Tensor) -> Tensor:
        """Of the row's keys or values the call's: a view, or a copy of some columns."""
        return x[self.at] if self.columns is None else x.index_select(0, self.columns)


class _How(NamedTuple):
    """As in `attention_calls`."""

    window: int
    prefix_in_window: bool
    scale: float


def _calls(
    rows: int, heads: int, cu_q: Sequence[Tensor], cu_k: Sequence[Tensor], key_index: Sequence[Tensor],
    gathered: Sequence[bool], bounds: Sequence[int], longest: Sequence[int], causal: Sequence[bool],
) -> Iterator[_Call]:  # fmt: skip
    """The operator's arguments, call by call: what no call writes would stay as memory was."""
    if [0, *bounds[1::2]] != [*bounds[::2], rows]:
        raise ValueError(f"expected calls over {rows} rows in order, got {bounds}")
    for n, is_causal in enumerate(causal):
        start, stop = bounds[2 * n], bounds[2 * n + 1]
        yield _Call(
            slice(start, stop), slice(heads * start, heads * stop), key_index[n] if gathered[n] else None,
            cu_q[n], cu_k[n], longest[2 * n], longest[2 * n + 1], is_causal,
        )  # fmt: skip


@torch.library.custom_op("mmprefix::varlen_attention", mutates_args=(), device_types=("cpu", "cuda"))
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: list[Tensor],
    cu_k: list[Tensor],
    key_index: list[Tensor],
    gathered: list[bool],
    bounds: list[int],
    longest: list[int],
    causal: list[bool],
    window: int,
    prefix_in_window: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    heads = query.shape[1]
    out = query.new_empty((query.shape[0], heads, value.shape[2]))
    lse = query.new_empty(query.shape[0] * heads, dtype=torch.promote_types(query.dtype, torch.float32))
    forward = _cpu_forward if query.device.type == "cpu" else _cuda_forward
    for call in _calls(len(query), heads, cu_q, cu_k, key_index, gathered, bounds, longest, causal):
        forward(
            call, query[call.at], call.keys(key), call.keys(value), out[call.at], lse[call.lse],
            _How(window, prefix_in_window, scale),
        )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    lse = query.new_empty(query.shape[0] * query.shape[1], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2])), lse


@torch.library.custom_op("mmprefix::varlen_attention_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _attention_backward(
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
    longest: list[int],
    causal: list[bool],
    window: int,
    prefix_in_window: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (x.new_empty(x.shape) for x in (query, key, value))
    written = [(bounds[2 * n], bounds[2 * n + 1]) for n, is_gathered in enumerate(gathered) if not is_gathered]
    for total in (d_key, d_value):
        for rest in _between(written, len(total)):
            total[rest].zero_()
    backward = _cpu_backward if query.device.type == "cpu" else _cuda_backward
    calls = list(_calls(len(query), query.shape[1], cu_q, cu_k, key_index, gathered, bounds, longest, causal))
    # First those that write their own keys' gradients, then those that add to any.
    for call in sorted(calls, key=lambda call: call.columns is not None):
        own = (d_key[call.at], d_value[call.at]) if call.columns is None else None
        of_key, of_value = backward(
            call, grad[call.at], query[call.at], call.keys(key), call.keys(value), out[call.at], lse[call.lse],
            d_query[call.at], own, _How(window, prefix_in_window, scale),
        )  # fmt: skip
        if call.columns is not None:
            d_key.index_add_(0, call.columns, of_key)
            d_value.index_add_(0, call.columns, of_value)
    return d_query, d_key, d_value


@_attention_backward.register_fake
def _(grad, query, key, value, *rest):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _keep_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, cu_q, cu_k, key_index, *ctx.how = inputs
    ctx.num_calls = len(cu_q)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, *cu_q, *cu_k, *key_index)


def _backward(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, out, lse, *indices = ctx.saved_tensors
    n = ctx.num_calls
    lists = indices[:n], indices[n : 2 * n], indices[2 * n :]
    gradients = _attention_backward(grad, query, key, value, out, lse, *lists, *ctx.how)
    return (*gradients, *([None] * n for _ in range(3)), *(None,) * len(ctx.how))


_attention.register_autograd(_backward, setup_context=_keep_for_backward)


class _Eager(torch.autograd.Function):
    """The same outside of compilation, in half the time on the host: `register_autograd` looks through all lists for
    tensors that learn, with 0.15 ms for each layer's two passes, for which a GPU waits where sequences are short."""

    @staticmethod
    def forward(ctx, query, key, value, indices, how):  # type: ignore[no-untyped-def]
        out, lse = _attention(query, key, value, *indices, *how)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.indices, ctx.how = indices, how
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return (*_attention_backward(grad, *ctx.saved_tensors, *ctx.indices, *ctx.how), None, None)


def _between(covered: Sequence[tuple[int, int]], length: int) -> tuple[slice, ...]:
    """What ascending intervals leave free of so many rows."""
    edges = [0, *(edge for interval in covered for edge in interval), length]
    return tuple(slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


# On CUDA ---------------------------------------------------------------------------------------------------------------

# The kernel takes fewer key heads than query heads in all releases. `varlen_attn` itself is two custom operators of
# Python for each call, and chooses among backends whose windows and alignments differ from release to release.


def _cuda_window(call: _Call, how: _How) -> dict[str, int]:
    if not call.causal:
        return {"window_size_left": -1, "window_size_right": -1}
    return {"window_size_left": -1 if how.window == NO_WINDOW else how.window - 1, "window_size_right": 0}


def _is_causal(call: _Call, how: _How) -> bool:
    """To the kernel, a window is another thing than being causal."""
    return call.causal and how.window == NO_WINDOW


def _cuda_forward(
    call: _Call, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, how: _How
) -> None:  # fmt: skip
    """Writes ``out [Q, H, D]`` and ``lse [H * Q]``."""
    found, found_lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, _is_causal(call, how), False,
        scale=how.scale, **_cuda_window(call, how),
    )  # fmt: skip
    out.copy_(found)
    lse.copy_(found_lse.flatten())


def _cuda_backward(
    call: _Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    d_query: Tensor, own: tuple[Tensor, Tensor] | None, how: _How,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes ``d_query [Q, H, D]``; returns the gradients of the call's keys and values, in ``own`` where it is given."""
    no_dropout = torch.empty(2, dtype=torch.uint64, device=query.device), query.new_empty(0)  # read with dropout only
    of_query, *of_keys = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse.view(query.shape[1], len(query)), call.cu_q, call.cu_k, call.max_q, call.max_k,
        0.0, _is_causal(call, how), *no_dropout, scale=how.scale, **_cuda_window(call, how),
    )  # fmt: skip
    d_query.copy_(of_query)
    if own is not None:
        of_keys = [to.copy_(gradient) for to, gradient in zip(own, of_keys, strict=True)]
    of_key, of_value = of_keys
    return of_key, of_value


# On the CPU ------------------------------------------------------------------------------------------------------------

_CHUNK = 128
"""Queries of a causal call that the kernel takes at a time: it computes all pairs, hidden ones, too, so that longer
targets are cut up and see keys up to their chunk's end only."""

_SMALL = 1 << 19
"""Entries of the largest mask that is remembered, 2 MiB in float32: all layers and both passes want the same ones."""


class _Piece(NamedTuple):
    """What the kernel is called for: neighbours of one shape, or a chunk of their queries.

    Attributes:
        n: how many neighbours.
        query: row of the first neighbour's first query in the chunk.
        rows: queries of each neighbour in the chunk.
        query_step: rows from one neighbour's queries to the next one's.
        key: row of the first neighbour's first key.
        seen: keys of each neighbour that the chunk may see.
        key_step: rows from one neighbour's keys to the next one's.
        start: of the chunk, within a neighbour's queries.
        prefix: keys of each neighbour that stand before its first query.
        is_first: whether no other chunk of these queries comes before it. The first one sees all keys.
    """

    n: int
    query: int
    rows: int
    query_step: int
    key: int
    seen: int
    key_step: int
    start: int
    prefix: int
    is_first: bool


class _Pieces(NamedTuple):
    """Of a call: the pieces, and the slices of its queries and keys that are in none of them."""

    pieces: tuple[_Piece, ...]
    other_queries: tuple[slice, ...]
    other_keys: tuple[slice, ...]


@lru_cache(maxsize=64)  # all layers and both passes want the same ones
def _pieces(starts_q: tuple[int, ...], starts_k: tuple[int, ...], causal: bool, queries: int, keys: int) -> _Pieces:
    """Packing sorts samples by length, so that runs of one shape are long.

    Args:
        starts_q, starts_k: `cu_q` and `cu_k`.
        causal: whether queries are cut into chunks.
        queries, keys: how many the call has.
    """
    # The views below don't look where they reach, and the kernel divides by the number of keys.
    if starts_q[-1] > queries or starts_k[-1] > keys:
        raise ValueError(f"expected at most {queries} queries and {keys} keys, got {starts_q} and {starts_k}")
    shapes = zip((b - a for a, b in pairwise(starts_q)), (b - a for a, b in pairwise(starts_k)), strict=True)
    pieces, covered_q, covered_k = [], [], []
    first = 0
    for (lq, lk), run in groupby(shapes):
        n = len(list(run))
        if lq:
            if lk < (lq if causal else 1):
                raise ValueError(f"expected keys for {lq} queries, got {lk}")
            step = _CHUNK if causal else lq
            for start in reversed(range(0, lq, step)):  # the last chunk sees all keys, and so comes first
                stop = min(start + step, lq)
                pieces.append(_Piece(
                    n, starts_q[first] + start, stop - start, lq, starts_k[first], lk - lq + stop if causal else lk, lk,
                    start, lk - lq, stop == lq,
                ))  # fmt: skip
            covered_q.append((starts_q[first], starts_q[first + n]))
            covered_k.append((starts_k[first], starts_k[first + n]))
        first += n
    return _Pieces(tuple(pieces), _between(covered_q, queries), _between(covered_k, keys))


# One view for each tensor of each piece: with some ten operations in its place, short blocks wait for Python.


class _View(NamedTuple):
    """A piece of any contiguous tensor of one shape, by the arguments of `Tensor.as_strided`."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, x: Tensor) -> Tensor:
        """The tensor may itself be a slice."""
        return x.as_strided(self.shape, self.stride, x.storage_offset() + self.offset)


def _view_of_queries(piece: _Piece, heads: int, groups: int, size: int, parts: int = 1) -> _View:
    """A piece's queries in ``[Q, H, D]``, by the heads that they share keys with.

    ``[n, G, L, D]`` where none share any, ``[n, parts, L * H / parts, D]`` where all do, so that heads become one's
    queries, which can be cut; otherwise ``[n, G, L, H / G, D]``.
    """
    row = heads * groups * size
    step, offset = piece.query_step * row, piece.query * row
    if heads == 1:
        rows = piece.rows * groups // parts
        return _View((piece.n, parts, rows, size), (step, rows * size, size, 1), offset)
    if groups == 1:
        return _View((piece.n, heads, piece.rows, size), (step, size, row, 1), offset)
    return _View((piece.n, heads, piece.rows, groups, size), (step, groups * size, row, size, 1), offset)


def _view_of_keys(piece: _Piece, heads: int, size: int) -> _View:
    """A piece's keys or values in ``[K, G, D]``: ``[n, G, L, D]``."""
    row = heads * size
    return _View((piece.n, heads, piece.seen, size), (piece.key_step * row, size, row, 1), piece.key * row)


def _fold(x: Tensor, heads: int) -> Tensor:
    """`_view_of_queries` -> ``[n, heads, L * H / heads, D]``: a copy where a view can't have it."""
    return x if x.dim() == 4 and x.shape[1] == heads else x.reshape(x.shape[0], heads, -1, x.shape[-1])


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


def _bias(piece: _Piece, groups: int, how: _How, dtype: torch.dtype) -> Tensor | None:
    """Additive mask of a causal piece, ``[1, 1, groups * L, seen]``; None where all is seen."""
    window, prefix_in_window = how.window, how.prefix_in_window
    if piece.rows == 1 and not (prefix_in_window and window != NO_WINDOW) and (
        window == NO_WINDOW or piece.start < window
    ):  # fmt: skip
        return None  # a last query sees all
    make = _remembered_bias if groups * piece.rows * piece.seen <= _SMALL else _make_bias
    return make(piece.rows, piece.seen, piece.prefix, groups, window, prefix_in_window, dtype)


def _spread(n: int, heads: int, rows: int) -> int:
    """In how many parts to cut the queries of each head: the kernel's backward has one thread for each head."""
    threads = torch.get_num_threads()
    if n * heads >= threads or rows < 64:
        return 1
    return next((parts for parts in range(threads // (n * heads), 1, -1) if rows % parts == 0), 1)


def _to_size(x: Tensor, size: int) -> Tensor:
    """Contiguous, and with the kernel's one head size: zeros behind a smaller one change nothing."""
    return x.contiguous() if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


_cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _pieces_of(call: _Call, query: Tensor, key: Tensor) -> _Pieces:
    return _pieces(tuple(call.cu_q.tolist()), tuple(call.cu_k.tolist()), call.causal, len(query), len(key))


def _cpu_forward(
    call: _Call, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, how: _How
) -> None:  # fmt: skip
    """Writes ``out [Q, H, D]`` and ``lse [H * Q]``, of each piece in the kernel's own shape, one after the other."""
    heads, size = key.shape[1], value.shape[2]
    groups, kernel_size = query.shape[1] // heads, max(query.shape[2], size)
    query, key, value = (_to_size(x, kernel_size) for x in (query, key, value))
    done = lse.storage_offset()
    pieces, other_queries, _ = _pieces_of(call, query, key)
    for piece in pieces:
        keys = _view_of_keys(piece, heads, kernel_size)
        o, piece_lse = _cpu_kernel(
            _fold(_view_of_queries(piece, heads, groups, kernel_size).of(query), heads), keys.of(key), keys.of(value),
            attn_mask=_bias(piece, groups, how, query.dtype) if call.causal else None, scale=how.scale,
        )  # fmt: skip
        place = _view_of_queries(piece, heads, groups, size).of(out)
        place.copy_((o if kernel_size == size else o[..., :size]).view(place.shape))
        n, _, rows = piece_lse.shape
        lse.as_strided(piece_lse.shape, (heads * rows, rows, 1), done).copy_(piece_lse)
        done += n * heads * rows
    for rest in other_queries:
        out[rest].zero_()


def _add_up(parts: Sequence[Tensor], total: Tensor, is_first: bool) -> None:
    """Writes the sum of some tensors, or adds it to what is there. Half precision would round each sum: once only."""
    if len(parts) > 2 and total.dtype.itemsize < 4:
        parts = (torch.stack(tuple(parts)).sum(0),)  # in float32
    if is_first and len(parts) > 1:
        first, second, *parts = parts
        torch.add(first, second, out=total)
    elif is_first:
        first, *parts = parts
        total.copy_(first)
    for part in parts:
        total += part


def _cpu_backward(
    call: _Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    d_query: Tensor, own: tuple[Tensor, Tensor] | None, how: _How,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes ``d_query [Q, H, D]``; returns the gradients of the call's keys and values, in ``own`` where it is given."""
    d_key, d_value = own or (key.new_empty(key.shape), value.new_empty(value.shape))
    heads = key.shape[1]
    groups, query_size, kernel_size = query.shape[1] // heads, query.shape[2], max(query.shape[2], value.shape[2])
    query, key, value, out, grad = (_to_size(x, kernel_size) for x in (query, key, value, out, grad))
    done = lse.storage_offset()
    pieces, other_queries, other_keys = _pieces_of(call, query, key)
    for piece in pieces:
        n, rows = piece.n, piece.rows * groups
        parts = _spread(n, heads, rows)
        queries = _view_of_queries(piece, heads, groups, kernel_size, parts)
        keys = _view_of_keys(piece, heads, kernel_size)
        q, o, g = (_fold(queries.of(x), heads * parts) for x in (query, out, grad))
        k, v = keys.of(key), keys.of(value)
        piece_lse = lse.as_strided((n, heads * parts, rows // parts), (heads * rows, rows // parts, 1), done)
        done += n * heads * rows
        bias = _bias(piece, groups, how, q.dtype) if call.causal else None
        if parts > 1:
            k, v = (x.expand(-1, parts, -1, -1) if heads == 1 else x.repeat_interleave(parts, 1) for x in (k, v))
            if bias is not None:
                bias = bias.view(1, parts, rows // parts, -1)
                bias = bias if heads == 1 else bias.repeat(1, heads, 1, 1)
        dq, dk, dv = _cpu_kernel_backward(g, q, k, v, o, piece_lse, 0.0, False, attn_mask=bias, scale=how.scale)
        place = _view_of_queries(piece, heads, groups, query_size, parts).of(d_query)
        place.copy_((dq if kernel_size == query_size else dq[..., :query_size]).reshape(place.shape))
        for total, d in ((d_key, dk), (d_value, dv)):
            seen = _view_of_keys(piece, heads, total.shape[-1]).of(total)
            d = d if d.shape[-1] == total.shape[-1] else d[..., : total.shape[-1]]
            _add_up((d,) if parts == 1 else d.unflatten(1, (heads, parts)).unbind(2), seen, piece.is_first)
    for total, others in ((d_query, other_queries), (d_key, other_keys), (d_value, other_keys)):
        for rest in others:
            total[rest].zero_()
    return d_key, d_value
