"""What a training step sends and how long it takes on many devices, on paper: from the config and two measured numbers.

The plan of a step is the list of its collectives, each with its bytes: what `training.fsdp` gathers and reduces, unit by
unit, or what DDP reduces. `benchmarks/scaling_bytes.py` compares it with the collectives of real steps and with the bytes
that really went over the wire.

Bytes follow the ring algorithms: of n ranks, each sends (n - 1) / n of a gathered or scattered tensor, and twice that of
an all-reduced one. Source: the performance notes of NVIDIA's nccl-tests ("bus bandwidth"). Time divides them by the link.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from mmprefix.accounting import (
    Layout,
    ModelFlops,
    Record,
    counted_without_values,
    trained_parts,
    typical_batch,
)
from mmprefix.errors import InputError
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.training.layers import layers_of

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
Group = Literal["shards", "replicas", "devices"]
RING: Mapping[Kind, int] = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""How often (n - 1) / n of its tensor a rank sends."""


# The plan


@dataclass(frozen=True)
class Weight:
    """Shape of a parameter, and whether it learns."""

    shape: tuple[int, ...]
    learns: bool

    def kept(self, shards: int) -> int:
        """Elements of the first rank's shard, which is the largest: rows are divided, and not every number of them is."""
        return -(-self.shape[0] // shards) * math.prod(self.shape[1:])

    def padded(self, shards: int) -> int:
        """Elements that are gathered: as many of each rank as of the first one.

        A parameter with fewer rows than ranks (a position embedding has one) is gathered up to ``shards`` times.
        """
        return shards * self.kept(shards)


@dataclass(frozen=True)
class Unit:
    """What is gathered together.

    Attributes:
        part: `vision` or `decoder`, of which it is a layer; `rest` for all that is in no layer.
        weights: its parameters, each once.
        backward: whether gradients go through it.
    """

    part: Literal["vision", "decoder", "rest"]
    weights: tuple[Weight, ...]
    backward: bool

    def gathered(self, shards: int) -> int:
        """Elements of an all-gather, padding included."""
        return sum(weight.padded(shards) for weight in self.weights)

    def reduced(self, shards: int) -> int:
        """Elements of a reduce-scatter, padding included: of what learns."""
        return sum(weight.padded(shards) for weight in self.weights if weight.learns)

    def kept(self, shards: int, learns: bool | None = None) -> int:
        """Elements of the first rank's shards, of all weights or of those that (don't) learn."""
        return sum(weight.kept(shards) for weight in self.weights if learns in (None, weight.learns))


def units_of(model: MMPrefixForConditionalGeneration) -> list[Unit]:
    """The units that `training.fsdp` shards, in the order of forward; the rest, which is gathered first, is the last."""
    trained = trained_parts(model)
    encoder = {id(module) for module in model.vision.modules()}
    seen: set[int] = set()
    units = []
    for layer in layers_of(model):
        part: Literal["vision", "decoder"] = "vision" if id(layer) in encoder else "decoder"
        # Behind a part that learns, gradients go through what is frozen.
        units.append(Unit(part, _weights(layer, seen), "vision" in trained if part == "vision" else bool(trained)))
    return [*units, Unit("rest", _weights(model, seen), bool(trained))]


def _weights(module: nn.Module, seen: set[int]) -> tuple[Weight, ...]:
    found = []
    for parameter in module.parameters():
        if id(parameter) not in seen:  # tied ones stay in the first unit
            seen.add(id(parameter))
            found.append(Weight(tuple(parameter.shape), parameter.requires_grad))
    return tuple(found)


@dataclass(frozen=True)
class Collective:
    """One kind of collective of one unit in an optimizer step.

    Attributes:
        kind: what it does.
        group: which ranks do it together: those that share shards, those that hold the same shard, or all.
        ranks: how many they are.
        bytes: of the whole tensor: gathered, or to be reduced.
        times: how often in an optimizer step.
        part: of the unit.
    """

    kind: Kind
    group: Group
    ranks: int
    bytes: int
    times: int
    part: str

    def sent(self, passes: Mapping[Kind, int] = RING) -> float:
        """Bytes that each rank sends in an optimizer step.

        Args:
            passes: how often the library's algorithm sends (n - 1) / n of a tensor.
        """
        return self.times * passes[self.kind] * self.bytes * (self.ranks - 1) / self.ranks


def plan(units: Sequence[Unit], layout: Layout, stored: torch.dtype, micro_batches: int = 1) -> list[Collective]:
    """Collectives of an optimizer step; the few bytes of counts, losses and norms are left out.

    FSDP gathers each unit for forward. For backward it gathers again

    - layers that were given up and that gradients go through. Activation checkpointing adds none: backward gathers a layer
      before it is computed again;
    - the layer in front of the first of these, which is prefetched for nothing (the last one of a frozen encoder).

    The rest is kept from forward to backward.

    Each micro-batch reduces (Lightning accumulates shards). DDP reduces once.

    Args:
        units: of `units_of`.
        layout: over the devices.
        stored: dtype of weights and of their gradients, where ``layout`` names no other.
        micro_batches: of an optimizer step.
    """
    found = []
    if layout.strategy == "ddp":
        for unit in units:
            size = unit.reduced(1) * stored.itemsize
            found.append(Collective("all_reduce", "devices", layout.devices, size, 1, unit.part))
    else:
        shards, replicas = layout.shards, layout.replicas
        gathered = (layout.param_dtype or stored).itemsize
        reduced = (layout.reduce_dtype or layout.param_dtype or stored).itemsize
        for unit, behind in zip(units, [*units[1:], units[-1]], strict=True):
            needed = unit.backward or (behind.backward and behind.part != "rest")
            again = layout.reshard_after_forward and needed and unit.part != "rest"
            size, times = unit.gathered(shards) * gathered, micro_batches * (2 if again else 1)
            found.append(Collective("all_gather", "shards", shards, size, times, unit.part))
            size = unit.reduced(shards) * reduced
            found.append(Collective("reduce_scatter", "shards", shards, size, micro_batches, unit.part))
            found.append(Collective("all_reduce", "replicas", replicas, size // shards, micro_batches, unit.part))
    return [collective for collective in found if collective.ranks > 1 and collective.bytes]


# Time


@dataclass(frozen=True)
class Machine:
    """Devices in nodes, in measured numbers.

    Attributes:
        tflops: TFLOP/s of matrix products on a device, in the precision of training.
        bandwidth: GB/s (1e9 bytes) that a device sends to others of its node in a ring.
        between_nodes: GB/s that a node sends to others, through all of its adapters together.
        devices_per_node: how many share a node.
        latency: microseconds of one step, of which a ring of n ranks has n - 1, and an all-reduce, for which NCCL has
            trees, twice the logarithm of n.
    """

    tflops: float
    bandwidth: float
    between_nodes: float | None = None
    devices_per_node: int = 8
    latency: float = 0.0

    def seconds(self, collective: Collective, layout: Layout) -> float:
        """How long a collective takes, all groups of its kind at work at once.

        A ring through several nodes leaves each node once, so that a node sends what one device sends. Where several
        groups go through a node (replicas: one group for each shard), they share its adapters.

        Raises:
            InputError: several nodes without ``between_nodes``, or groups that don't lie evenly in nodes.
        """
        in_node = min(layout.devices, self.devices_per_node)
        if layout.devices % in_node:
            raise InputError(
                f"--devices: expected at most {in_node} or a multiple of it (--devices_per_node), got {layout.devices}"
            )
        # Ranks that share shards are neighbours.
        before = layout.shards if collective.group == "replicas" else 1
        members = min(collective.ranks, max(1, in_node // before))
        if in_node % members or collective.ranks % members:
            raise InputError(
                f"trainer.strategy.replicas: expected shards that lie evenly in nodes of {in_node}, got {layout.shards}"
            )
        sent = collective.sent() / 1e9
        times = [sent / self.bandwidth] if members > 1 else []
        if collective.ranks > members:
            if self.between_nodes is None:
                raise InputError(
                    f"--between_nodes: expected GB/s that a node sends, {layout.devices} devices are several nodes"
                )
            times.append(sent * (in_node // members) / self.between_nodes)
        reduces = collective.kind == "all_reduce"
        hops = 2 * math.ceil(math.log2(collective.ranks)) if reduces else collective.ranks - 1
        return max(times) + collective.times * hops * self.latency * 1e-6


@dataclass(frozen=True)
class Step:
    """An optimizer step of one device.

    Attributes:
        sent: bytes that a device sends, by kind of collective.
        compute: seconds of matrix products.
        communication: seconds of all collectives, one after the other.
        exposed: of these, what nothing can hide: what is in no layer is gathered before the first operation and reduced
            after the last.
        samples: of all devices.
    """

    sent: Mapping[Kind, float]
    compute: float
    communication: float
    exposed: float
    samples: int

    @property
    def overlapped(self) -> float:
        """Seconds, if all but ``exposed`` goes on beside the matrix products."""
        return self.exposed + max(self.compute, self.communication - self.exposed)

    @property
    def sequential(self) -> float:
        """Seconds, if nothing does."""
        return self.compute + self.communication

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the step that is matrix products: sequential, overlapped."""
        return self.compute / self.sequential, self.compute / self.overlapped


def expected_step(
    units: Sequence[Unit],
    layout: Layout,
    stored: torch.dtype,
    machine: Machine,
    flops: int,
    samples: int,
    micro_batches: int = 1,
) -> Step:
    """The step of a run.

    Args:
        units: of `units_of`.
        layout: over the devices.
        stored: dtype of weights.
        machine: what it runs on.
        flops: of a device and micro-batch, what is computed again included (`computed_flops`).
        samples: of a device and micro-batch.
        micro_batches: of an optimizer step.

    Raises:
        InputError: see `Machine.seconds`; or CPU offload, whose copies and optimizer are not modelled.
    """
    if layout.cpu_offload:
        raise InputError("trainer.strategy.cpu_offload: expected false, its copies and optimizer step are not modelled")
    sent: dict[Kind, float] = dict.fromkeys(RING, 0.0)
    communication = exposed = 0.0
    for collective in plan(units, layout, stored, micro_batches):
        sent[collective.kind] += collective.sent()
        seconds = machine.seconds(collective, layout)
        communication += seconds
        exposed += seconds if collective.part == "rest" else 0.0
    compute = micro_batches * flops / (machine.tflops * 1e12)
    return Step(sent, compute, communication, exposed, layout.devices * micro_batches * samples)


def computed_flops(
    model: MMPrefixForConditionalGeneration,
    record: Record,
    batch_size: int,
    trained: Collection[str],
    recomputes: Mapping[str, float],
) -> int:
    """FLOPs of forward and backward of a micro-batch of ``batch_size`` records on one device.

    Args:
        model: on the meta device.
        record: what each of them holds.
        batch_size: records.
        trained: which of `accounting.PARTS` learn.
        recomputes: shares of layers under activation checkpointing, see `accounting.ModelFlops.recomputed`.

    Raises:
        InputError: see `accounting.counted_without_values`.
    """
    with counted_without_values(model.decoder.config):
        flops = ModelFlops.of(model.config)
    batch = typical_batch(model, record, batch_size)
    return flops.step(batch, trained) + flops.recomputed(batch, trained, recomputes)


# Settings


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def layout_of(strategy: Any, devices: int, choice: Literal["ddp", "fsdp"] | None = None) -> Layout:
    """`trainer.strategy`, a name or ``class_path`` and ``init_args``, on so many devices.

    Args:
        strategy: plain values, as the command line has read them.
        devices: ranks.
        choice: another strategy than the config's.

    Raises:
        InputError: replicas that don't divide the devices.
    """
    sharded = any(name in str(strategy) for name in ("fsdp", "FullySharded"))
    if (choice or ("fsdp" if sharded else "ddp")) == "ddp":
        return Layout(devices)
    args = (strategy.get("init_args") or {}) if sharded and isinstance(strategy, Mapping) else {}
    param_dtype = _DTYPES.get(args.get("param_dtype") or "")
    return Layout(
        devices, "fsdp", args.get("replicas", 1), param_dtype,
        # As `FullyShardedStrategy.shard` has it.
        _DTYPES[args.get("reduce_dtype") or "float32"] if param_dtype else None,
        args.get("reshard_after_forward", True), args.get("cpu_offload", False), args.get("prefetch", 1),
    )  # fmt: skip


def alternatives(strategy: Any, devices: int, devices_per_node: int) -> dict[str, Layout]:
    """What to choose from: `full`, shards over all devices; `hybrid`, shards within nodes, a replica for each; `ddp`.

    Args:
        strategy: see `layout_of`; its dtypes are those of both, and replicas, where it names some, those of `hybrid`.
        devices: ranks; one has no alternatives.
        devices_per_node: how many share a node.

    Raises:
        InputError: replicas that don't divide the devices.
    """
    if devices == 1:
        return {"one device": Layout()}
    sharded = layout_of(strategy, devices, "fsdp")
    found = {"full": replace(sharded, replicas=1)}
    replicas = sharded.replicas if sharded.replicas > 1 else devices // devices_per_node
    if replicas > 1 and not devices % replicas:
        found["hybrid"] = replace(sharded, replicas=replicas)
    return {**found, "ddp": Layout(devices)}
