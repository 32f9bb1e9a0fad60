"""Cross-entropy of target tokens as (sum, count), so that whoever owns the optimizer step can normalise globally.

A mean per micro-batch or per rank would weight tokens by the company they keep: the same samples, grouped
differently, would give another gradient. Sums and counts add up over micro-batches and ranks.

Shapes: M target tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

LossNormalization = Literal["tokens", "per_sample"]


def target_cross_entropy(
    logits: Tensor, labels: Tensor, target_lengths: Tensor, normalization: LossNormalization = "tokens"
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and the count to divide it by.

    Args:
        logits: ``[M, V]`` of any float dtype; computed in float32.
        labels: ``[M]`` int64.
        target_lengths: ``[M]`` int64, labels of the target that each label belongs to.
        normalization: ``tokens``: every target token counts the same. ``per_sample``: mean over each target's
            tokens, then over targets, as PaliGemma trains (arXiv 2407.07726).

    Returns:
        ``(sum, count)``, float32 scalars; ``sum / count`` is the loss in nats. The count is the number of target
        tokens or of targets.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    if normalization == "tokens":
        return losses.sum(), losses.new_full((), labels.numel())
    weights = 1.0 / target_lengths.float()
    return (losses * weights).sum(), weights.sum()
