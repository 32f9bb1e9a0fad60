"""AdamW with weight decay on matrices only, a learning rate for each part, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mmprefix.adapters import LoraArgs
from mmprefix.errors import InputError


@dataclass
class OptimizerArgs:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate, of parts that name none of their own.
        weight_decay: on matrices and convolution kernels; never on biases, norms and single vectors.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        warmup: share of all steps over which the learning rate rises linearly.
        final_lr: share of the peak that the cosine ends at.
    """

    lr: float = 1e-5
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup: float = 0.05
    final_lr: float = 0.0

    def check(self) -> None:
        """Raises InputError for a value out of its range."""
        for name, below in (
            ("lr", math.inf), ("weight_decay", math.inf), ("beta1", 1.0), ("beta2", 1.0), ("eps", math.inf),
            ("warmup", 1.0), ("final_lr", math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value < below:
                raise InputError(f"model.optimizer.{name}: expected at least 0 and below {below}, got {value}")


@dataclass
class PartArgs:
    """How one part of the model (vision, connector or decoder) learns.

    Attributes:
        lr: peak learning rate, by default the optimizer's.
        freeze: never train it.
        unfreeze_at_step: frozen until this optimizer step.
        lora: low-rank adapters learn, at this rate and from this step, in place of the part's own weights; not of the
            connector.
    """

    lr: float | None = None
    freeze: bool = False
    unfreeze_at_step: int | None = None
    lora: LoraArgs | None = None

    def is_frozen(self, step: int) -> bool:
        """Whether the part is frozen at this optimizer step."""
        return self.freeze or (self.unfreeze_at_step is not None and step < self.unfreeze_at_step)


def schedule_factor(step: int, total_steps: int, warmup: float, final_lr: float) -> float:
    """Learning rate at a step as a share of the peak: linear warm-up, then half a cosine down to ``final_lr``."""
    warmup_steps = warmup * total_steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return final_lr + (1.0 - final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(
    parts: Mapping[str, tuple[Iterable[nn.Parameter], PartArgs]], args: OptimizerArgs
) -> list[dict[str, Any]]:
    """Groups for AdamW: for each part one with decay and one without, named ``part`` and ``part/no_decay``.

    Args:
        parts: for each, what of it may learn, now or later.
        args: of the optimizer.
    """
    groups = []
    for name, (parameters, part) in parts.items():
        if part.freeze:
            continue
        trainable = list(parameters)
        for suffix, decay, members in (
            ("", args.weight_decay, [p for p in trainable if p.ndim >= 2]),
            ("/no_decay", 0.0, [p for p in trainable if p.ndim < 2]),
        ):
            if members:
                lr = args.lr if part.lr is None else part.lr
                groups.append({"params": members, "lr": lr, "weight_decay": decay, "name": name + suffix})
    return groups


def build_optimizer(
    parts: Mapping[str, tuple[Iterable[nn.Parameter], PartArgs]],
    args: OptimizerArgs,
    total_steps: int,
    *,
    fused: bool = True,
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """The optimizer and its schedule, to be stepped once per optimizer step.

    ``fused`` must be off under fp16 loss scaling: a fused step unscales gradients itself, after they were clipped.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(parts, args), betas=(args.beta1, args.beta2), eps=args.eps, fused=fused
    )
    schedule = LambdaLR(optimizer, lambda step: schedule_factor(step, total_steps, args.warmup, args.final_lr))
    return optimizer, schedule
