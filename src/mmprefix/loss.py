"""Cross-entropy of target tokens as (sum, count), so that whoever owns the optimizer step can normalise globally.

A mean per micro-batch or per rank would weight tokens by the company they keep: the same samples, grouped
differently, would give another gradient. Sums and counts add up over micro-batches and ranks.

Two forms, equal in value and gradient: from logits (`target_cross_entropy`), and from the hidden states that logits
are made of (`linear_cross_entropy`), which makes logits a chunk at a time, turns them into gradients on the spot and
drops them: with a vocabulary of 257,152, logits of 1,000 tokens and what autograd keeps of them take 3 GB.

Shapes: M target tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprefix.onednn import linear
from mmprefix.sequence import IGNORE_INDEX

LossNormalization = Literal["tokens", "per_sample"]
Reduction = Literal["sum", "mean"]

CHUNK_ELEMENTS = 2**26
"""Logits at a time, at most: 256 MB in float32. Smaller chunks write the gradient of the output layer more often."""


def label_weights(labels: Tensor, target_lengths: Tensor, normalization: LossNormalization = "tokens") -> Tensor:
    """What each label counts, float32 ``[M]``: 1, or under ``per_sample`` 1 / length of its target; 0 for fillers.

    Args:
        labels: ``[M]`` int64, `IGNORE_INDEX` on labels that only fill up a batch.
        target_lengths: ``[M]`` int64, labels of the target that each label belongs to.
        normalization: ``tokens``: every target token counts the same. ``per_sample``: mean over each target's
            tokens, then over targets, as PaliGemma trains (arXiv 2407.07726).
    """
    counted = (labels != IGNORE_INDEX).float()
    return counted if normalization == "tokens" else counted / target_lengths.float()


def target_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    target_lengths: Tensor,
    normalization: LossNormalization = "tokens",
    reduction: Reduction = "sum",
    of_labels: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and the count to divide it by.

    Args:
        logits: ``[M, V]`` of any float dtype; computed in float32.
        labels, target_lengths, normalization: see `label_weights`.
        reduction: `mean` divides the sum by the count.
        of_labels: where given, each label's own loss, float ``[M]`` without gradient, is appended to it.

    Returns:
        ``(sum, count)``, float32 scalars; ``sum / count`` is the loss in nats. The count is the number of target
        tokens or of targets. Under `mean`, ``(mean, count)``.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE_INDEX)
    weights = label_weights(labels, target_lengths, normalization)
    if of_labels is not None:
        of_labels.append(losses.detach())
    total, count = (losses * weights).sum(), weights.sum()
    return total / count if reduction == "mean" else total, count


@dataclass(frozen=True)
class LogitTransform:
    """What a decoder does to the output layer's values to make logits of them.

    Attributes:
        scale: factor (Cohere, Granite).
        softcap: c in ``c * tanh(x / c)``, after the scale (Gemma 2); None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Output layer's values -> logits, of any shape."""
        values = values * self.scale
        return values if self.softcap is None else self.softcap * torch.tanh(values / self.softcap)


class TiedWeight(torch.autograd.Function):
    """A weight that is both the token embedding's and the output layer's, as two tensors with one gradient.

    The embedding's gradient is as large as the vocabulary and nearly all zeros. By itself autograd makes it, and then
    a third tensor of that size for the sum. Here it stays sparse (`sparse_embedding`) and is added to the output
    layer's in place: the sum is dense as ever, with one tensor of that size instead of three, and no pass over zeros.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``[V, W]`` -> itself for the embedding, itself for the output layer."""
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        """The sum of the two."""
        of_embedding, of_output = gradients
        if of_embedding is None or of_output is None:
            return of_output if of_embedding is None else of_embedding.to_dense()
        # In place: `linear_cross_entropy` made it for nobody else. (A second pass through the same graph would find
        # what it had saved changed, and autograd says so.)
        return of_output.index_add_(0, of_embedding._indices()[0], of_embedding._values())


def sparse_embedding(embedding: nn.Module, weight: Tensor, ids: Tensor) -> Tensor:
    """``embedding(ids)`` with another weight ``[V, W]``, whose gradient is sparse.

    Args:
        embedding: an ``nn.Embedding``; subclasses that scale what they look up do so here, too.
        weight: in place of its own.
        ids: int64, any shape.
    """
    assert isinstance(embedding, nn.Embedding)
    own, padding = embedding.sparse, embedding.padding_idx
    # The padding token gets no gradient. A sparse one would be searched for it, which synchronises with the device.
    embedding.sparse, embedding.padding_idx = True, None
    try:
        values: Tensor = torch.func.functional_call(embedding, {"weight": weight}, (ids,))
    finally:
        embedding.sparse, embedding.padding_idx = own, padding
    if padding is None:
        return values
    return torch.where((ids == padding).unsqueeze(-1), values.detach(), values)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    target_lengths: Tensor,
    normalization: LossNormalization = "tokens",
    transform: LogitTransform | None = None,
    reduction: Reduction = "sum",
    of_labels: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`target_cross_entropy` of ``transform(F.linear(hidden, weight, bias))``, without ever holding all logits.

    Matrix products run in the autocast dtype, where that is on, or in that of ``hidden``; softmax and sums in float32
    (float64 for float64).

    Args:
        hidden: float ``[M, D]``.
        weight, bias: ``[V, D]`` and ``[V]`` or None, of the output layer.
        labels, target_lengths, normalization: see `label_weights`.
        transform: of the layer's values, none by default.
        reduction: `mean` divides on the way: ``loss / count`` afterwards costs a pass over the weight's gradient.
        of_labels: as in `target_cross_entropy`.

    Returns:
        ``(sum, count)`` as `target_cross_entropy`, or ``(mean, count)``.
    """
    transform = transform or LogitTransform()
    weights = label_weights(labels, target_lengths, normalization)
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    count = weights.sum()
    if reduction == "mean":
        weights = weights / count
    needs = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        total, *_, losses = _linear_cross_entropy(
            hidden.to(compute), weight.to(compute), None if bias is None else bias.to(compute), labels, weights,
            transform.scale, transform.softcap or 0.0, max(1, CHUNK_ELEMENTS // weight.shape[0]),
            needs and hidden.requires_grad, needs and weight.requires_grad,
            needs and bias is not None and bias.requires_grad,
        )  # fmt: skip
    if of_labels is not None:
        of_labels.append(losses)
    return total, count


def _rows_at_once(hidden: Tensor, chunk: int, wants_weight: bool) -> int:
    """Rows of a chunk.

    In half precision, chunks of the weight's gradient are added up in float32, beside each product: 6 bytes an element. As long
    as there are fewer rows than three quarters of the columns, logits of all rows, 8 bytes each at their peak, take less.
    """
    rows, columns = hidden.shape
    return max(chunk, rows) if wants_weight and hidden.dtype.itemsize < 4 and 4 * rows <= 3 * columns else chunk


# One node of a compiled graph, with gradients computed in the forward pass: autograd would keep logits for the backward,
# and recomputing them there would cost a third matrix product.
@torch.library.custom_op("mmprefix::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    scale: float,
    softcap: float,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.new_zeros((), dtype=wide)
    losses = hidden.new_empty(hidden.shape[0], dtype=wide)
    d_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    d_weight, d_bias = hidden.new_empty(0), hidden.new_empty(0)
    chunk = _rows_at_once(hidden, chunk, wants_weight)
    # Sums over chunks in half precision would lose what is small; a single chunk has nothing to sum.
    sums = hidden.dtype if hidden.shape[0] <= chunk else wide
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        rows = hidden[part]
        values = linear(rows, weight, bias).to(wide)
        if scale != 1.0:
            values *= scale
        slope = None
        if softcap:
            tanh = values.div_(softcap).tanh_()
            slope = (1 - tanh.square()) if wants_hidden or wants_weight or wants_bias else None
            values = tanh.mul_(softcap)
        label = labels[part].clamp(min=0).unsqueeze(1)  # fillers: their weight is 0
        share = weights[part].to(wide).unsqueeze(1)
        # In place where the kernel is known to read a row before it writes it.
        values = torch.log_softmax(values, 1, out=values if values.device.type == "cpu" else None)
        of_label = values.gather(1, label)
        total -= (of_label * share).sum()
        losses[part] = of_label.squeeze(1).neg()
        if not (wants_hidden or wants_weight or wants_bias):
            continue
        # In place: log-probabilities, probabilities, the gradient of logits. What is a factor of a whole row is
        # multiplied into the narrow side of the products below: each pass over (chunk, V) costs as much as a small layer.
        gradient = values.exp_()
        gradient.scatter_add_(1, label, torch.full_like(share, -1.0))
        if slope is not None:
            gradient *= slope
        gradient, factor = gradient.to(hidden.dtype), share * scale  # not rounded: one error for a whole row
        if wants_hidden:
            d_hidden[part] = linear(gradient, weight.t()) * factor
        if wants_weight:
            scaled = (rows * factor).to(hidden.dtype)
            if start == 0:
                d_weight = torch.mm(gradient.t(), scaled).to(sums)
            elif sums == hidden.dtype:
                d_weight.addmm_(gradient.t(), scaled)
            else:
                d_weight += torch.mm(gradient.t(), scaled)
        if wants_bias:
            d_bias = torch.mv(gradient.t().to(wide), factor.squeeze(1)).to(sums) + (d_bias if start else 0)
    if wants_weight and not d_weight.numel():
        d_weight = torch.zeros_like(weight)
    if wants_bias and not d_bias.numel():
        assert bias is not None
        d_bias = torch.zeros_like(bias)
    return (
        total.to(torch.promote_types(total.dtype, torch.float32)),
        d_hidden,
        d_weight.to(weight.dtype),
        d_bias.to(weight.dtype),
        losses,
    )


def transient_bytes(hidden: Tensor, weight: Tensor, bias: Any, labels: Any, weights: Any, scale: float, softcap: float,
                    chunk: int, *wanted: bool) -> int:  # fmt: skip
    """Bytes that the operator holds inside itself at its peak; its own arguments."""
    wide = torch.promote_types(hidden.dtype, torch.float32).itemsize
    # A chunk of logits, its copy in half precision, or off the CPU the log-probabilities beside it, and the soft-cap's slope.
    half = hidden.dtype.itemsize if hidden.dtype.itemsize < wide else 0
    each = wide + (half if hidden.device.type == "cpu" else wide) + (wide if softcap else 0)
    return min(hidden.shape[0], _rows_at_once(hidden, chunk, wanted[1])) * weight.shape[0] * each


@_linear_cross_entropy.register_fake
def _(hidden, weight, bias, labels, weights, scale, softcap, chunk, wants_hidden, wants_weight, wants_bias):  # type: ignore[no-untyped-def]
    return (
        hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)),
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if wants_weight else hidden.new_empty(0),
        torch.empty_like(bias) if wants_bias else hidden.new_empty(0),
        hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32)),
    )


def _keep_gradients(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.wanted = inputs[-3:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:4])
    ctx.mark_non_differentiable(output[4])


def _backward(ctx, grad, *unused):  # type: ignore[no-untyped-def]
    gradients = [g if wanted else None for g, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    if type(grad) is not Tensor:  # while a graph is traced
        gradients = [None if g is None else g * grad.to(g.dtype) for g in gradients]
    # On the CPU a look at the number is free, and spares a pass over the output layer's size.
    elif grad.device.type != "cpu" or grad.item() != 1:
        # In place, to hold one tensor of that size: a second pass through the graph is an error, which autograd raises. On
        # CUDA, a factor of another dtype is rounded to the tensor's, too, in a slower kernel.
        for g in gradients:
            if g is not None:
                g.mul_(grad if grad.device.type == "cpu" else grad.to(g.dtype))
    return (*gradients, *(None,) * 8)


_linear_cross_entropy.register_autograd(_backward, setup_context=_keep_gradients)
