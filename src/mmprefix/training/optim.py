"""AdamW with weight decay on matrices only, a learning rate for each part, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
class GuardArgs:
    """What becomes of an optimizer step whose loss or gradient would spoil the weights.

    Attributes:
        action: `stop` the run before the step; `skip` the step, count it (train/skipped_steps) and name it.
        spike_factor: also of a step whose loss is so many times the mean of those before it (their exponential mean, over
            about 50 steps; the first 20 are only counted).
        max_in_a_row: with `skip`, how many steps in a row may be skipped before the run stops.
    """

    action: Literal["stop", "skip"] = "stop"
    spike_factor: float | None = None
    max_in_a_row: int = 5

    def check(self) -> None:
        """Raises InputError for a value out of its range."""
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise InputError(f"model.guard.spike_factor: expected more than 1, got {self.spike_factor}")
        if self.max_in_a_row < 1:
            raise InputError(f"model.guard.max_in_a_row: expected at least 1, got {self.max_in_a_row}")


@dataclass
class Guard:
    """Judges the losses of a run; its fields are its state.

    Attributes:
        mean: exponential mean of the losses of the steps that were taken.
        steps: of these, how many.
        skipped: steps that were not taken.
        in_a_row: of these, the last ones.
    """

    mean: float = 0.0
    steps: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def judge(self, loss: float, spike_factor: float | None) -> str | None:
        """Why a step of this loss should not be taken, in words; else None, and it counts."""
        if not math.isfinite(loss):
            return "loss is not finite"
        if spike_factor is not None and self.steps >= 20 and loss > spike_factor * self.mean:
            return f"loss is {loss:.4g}, over {spike_factor:g} times the mean of {self.mean:.4g}"
        self.steps += 1
        weight = max(1 / self.steps, 1 / 50)
        self.mean += weight * (loss - self.mean)
        return None


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
