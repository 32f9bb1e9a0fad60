#!/usr/bin/env python3
"""Compares the plan of `mmprefix.scaling` with real steps of several processes: collectives, bytes sent, memory of a rank.

    python benchmarks/scaling_bytes.py                     2 and 4 processes on this machine, gloo
    python benchmarks/scaling_bytes.py --smoke             2 processes, fewer cases
    python benchmarks/scaling_bytes.py --json FILE         writes the rows there, too

Each case is a run of Lightning's trainer with our module. Counted on each rank, after the first step:

    collectives   those of one step, with the bytes of their tensors, against the plan's; what is left over are counts,
                  losses and norms, at most 1 KiB each. DDP's buckets are compared by their sum.
    bytes sent    payload of all TCP sockets of the process, as the kernel counts it (`tcpi_bytes_sent`), over 3 steps,
                  against the plan's. gloo's own headers are in it: 0.3 KB for each collective.
    state         bytes of weights, gradients and AdamW's moments that the first rank holds, against `MemoryEstimate`.

The plan counts what NCCL's rings send. Of n ranks, gloo's send the same for an all-gather, (n - 1) / n of the tensor, and
an all-reduce, twice that; but its reduce-scatter is an all-reduce of which each rank keeps its part, and sends twice as
much as a ring. The first rows measure that, one collective at a time, with 2 and 4 processes; the others are computed
with gloo's number, and the column `ring` says what NCCL would send. Exits with 1 where bytes differ by more than 5%,
state by more than 1%, or collectives at all.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from estimate import GEMMA2, SMALL_VIT, configured, trained
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmprefix.accounting import Layout, MemoryEstimate, Precision, Record
from mmprefix.decoder import DecoderArgs
from mmprefix.scaling import RING, Kind, layout_of, plan, units_of
from mmprefix.training.fsdp import FullyShardedStrategy
from mmprefix.training.optim import PartArgs

GLOO: dict[Kind, int] = {**RING, "reduce_scatter": 2}
BYTES_TOLERANCE, STATE_TOLERANCE = 0.05, 0.01
SMALL = 1024
"""Bytes up to which a collective carries counts, losses and norms."""
STEPS = 3
STRATEGY = "mmprefix.training.fsdp.FullyShardedStrategy"
FROZEN = PartArgs(freeze=True)
CASES: dict[str, dict[str, Any]] = {
    "sharded": {},
    "checkpointed, vision frozen": {"model": {"train_vision": FROZEN, "gradient_checkpointing": True}},
    "replicas": {"strategy": {"replicas": 2}},
    "layers stay gathered": {"strategy": {"reshard_after_forward": False}},
    "ddp": {"strategy": None},
    "checkpointed": {"model": {"gradient_checkpointing": True}},
    "decoder frozen": {"model": {"train_decoder": FROZEN}},
    "connector alone": {"model": {"train_decoder": FROZEN, "train_vision": FROZEN}},
    "gathered in bfloat16": {"strategy": {"param_dtype": "bfloat16"}},
    "reduced in bfloat16": {"strategy": {"param_dtype": "bfloat16", "reduce_dtype": "bfloat16", "replicas": 2}},
    "accumulating": {"accumulate": 2},
}
SMOKE = 5
MODEL = {"vision": SMALL_VIT, "decoder": DecoderArgs(config=GEMMA2)}
RECORD, BATCH_SIZE = Record(8, 8), 1
TCP_INFO_BYTES_SENT = 200
"""Where `tcpi_bytes_sent` lies in Linux's `struct tcp_info` (since 4.19): payload, in 64 bits."""


def bytes_sent() -> int:
    """By all TCP sockets of this process, since they were opened."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(fd)).st_mode):
                continue
        except OSError:  # the listing's own, closed by now
            continue
        with socket.socket(fileno=os.dup(int(fd))) as copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, TCP_INFO_BYTES_SENT)[0]
    return total


def settled_bytes_sent() -> int:
    """The same, when no rank has anything left to send."""
    dist.barrier()
    time.sleep(0.05)
    return bytes_sent()


class Collectives(TorchDispatchMode):
    """Counts the collectives of this thread, backward's included: a CPU has no other for it."""

    KINDS: dict[str, tuple[Kind, Callable[[Any], int]]] = {  # noqa: RUF012
        "c10d::_allgather_base_": ("all_gather", lambda args: _bytes(args[0])),
        "c10d::_reduce_scatter_base_": ("reduce_scatter", lambda args: _bytes(args[1])),
        "c10d::allreduce_": ("all_reduce", lambda args: sum(map(_bytes, args[0]))),
    }
    """Kind and bytes by operator; any other is found with what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in self.KINDS:
            kind, size = self.KINDS[name]
            self.found[kind, size(args)] += 1
        elif name.startswith("c10d::"):  # of a few bytes: barriers, DDP's buffers
            self.found[name, sum(_bytes(t) for t in tree_leaves(args) if isinstance(t, Tensor))] += 1
        return func(*args, **(kwargs or {}))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


class Meter(pl.Callback):
    """Counts `STEPS` optimizer steps behind the first; collectives of the first of them."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.collectives = Collectives()
        self.sent = self.state = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts."""
        if batch_idx == self.accumulate:
            self.sent -= settled_bytes_sent()
            self.collectives.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops."""
        if batch_idx == 2 * self.accumulate - 1:
            self.collectives.__exit__(None, None, None)
        if batch_idx == (1 + STEPS) * self.accumulate - 1:
            self.sent += settled_bytes_sent()
            (optimizer,) = trainer.optimizers
            moments = [t for of in optimizer.state.values() for name, t in of.items() if name != "step"]
            parameters = list(module.parameters())
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.state = sum(_bytes(_local(t)) for t in [*parameters, *gradients, *moments])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def measure(name: str) -> dict[str, Any]:
    """One row, the same on each rank but for what it measured itself."""
    ranks, case = dist.get_world_size(), CASES[name]
    settings, accumulate = case.get("strategy", {}), case.get("accumulate", 1)
    sharded = settings is not None
    model = {**MODEL, **case.get("model", {})}
    meter = Meter(accumulate)
    trained(
        model, RECORD, BATCH_SIZE, "32-true", accumulate, [meter], steps=1 + STEPS, devices=ranks,
        strategy=FullyShardedStrategy(**settings) if sharded else "ddp", use_distributed_sampler=False,
    )  # fmt: skip
    layout = layout_of({"class_path": STRATEGY, "init_args": settings}, ranks) if sharded else Layout(ranks)
    planned = plan(units_of(configured(model)), layout, torch.float32, accumulate)
    expected: Counter[tuple[str, int]] = Counter()
    for collective in planned:
        expected[collective.kind, collective.bytes] += collective.times
    found = meter.collectives.found
    if not sharded:  # buckets are not units
        expected = Counter({("all_reduce", sum(collective.bytes for collective in planned)): 1})
        buckets = {key: times for key, times in found.items() if key[0] == "all_reduce" and key[1] > SMALL}
        found = found - Counter(buckets)
        found["all_reduce", sum(size * times for (_, size), times in buckets.items())] = 1
    missing, surplus = expected - found, found - expected
    surplus = Counter({key: times for key, times in surplus.items() if key[1] > SMALL})
    estimate = MemoryEstimate(configured(model), RECORD, Precision.from_name("32-true"), layout)
    return {
        "case": name,
        "ranks": ranks,
        "collectives": sum(expected.values()) if sharded else None,
        "differ": [f"{what} {times} x {kind} of {size} bytes"
                   for what, counter in (("missing", missing), ("surplus", surplus))
                   for (kind, size), times in sorted(counter.items())],
        "ring_mib": sum(collective.sent() for collective in planned) / 2**20,
        "expected_mib": sum(collective.sent(GLOO) for collective in planned) / 2**20,
        "sent_mib": meter.sent / STEPS / 2**20,
        "estimated_state_mib": (estimate.weights + estimate.gradients + estimate.optimizer) / 2**20,
        "state_mib": meter.state / 2**20,
    }  # fmt: skip


def alone(kind: Kind, size: int = 8 << 20) -> dict[str, Any]:
    """A row of one collective on its own, of ``size`` bytes."""
    ranks, repeats = dist.get_world_size(), 4
    whole, part = torch.zeros(size // 4), torch.zeros(size // 4 // ranks)
    run = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, op=dist.ReduceOp.AVG),
        "all_reduce": lambda: dist.all_reduce(whole, op=dist.ReduceOp.AVG),
    }[kind]
    run()  # connects
    before = settled_bytes_sent()
    for _ in range(repeats):
        run()
    sent = (settled_bytes_sent() - before) / repeats
    ring = RING[kind] * size * (ranks - 1) / ranks / 2**20
    return {
        "case": kind, "ranks": ranks, "differ": [], "ring_mib": ring,
        "expected_mib": ring * GLOO[kind] / RING[kind], "sent_mib": sent / 2**20,
    }  # fmt: skip


def work(cases: list[str], out: Path) -> None:
    """What each process does; the first one writes the rows."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    rows = []
    for name in [*RING, *cases]:
        row = alone(name) if name in RING else measure(name)  # type: ignore[arg-type]
        rows_of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows_of_ranks, row)
        sent = [of_rank["sent_mib"] for of_rank in rows_of_ranks]
        differ = sorted({line for of_rank in rows_of_ranks for line in of_rank["differ"]})
        # The rank that is farthest off.
        farthest = max(sent, key=lambda value: abs(value - row["expected_mib"]))
        rows.append({**row, "sent_mib": farthest, "differ": differ})
        if dist.get_rank() == 0:
            print(_line(rows[-1]), flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))
    dist.destroy_process_group()
    # Not as Python ends: once in a while a thread of torch's still runs then, and takes the process down with it.
    sys.stdout.flush()
    os._exit(0)


def _line(row: dict[str, Any]) -> str:
    cells = [
        row["ranks"], row["case"], row.get("collectives") or "", f"{row['ring_mib']:.3f}", f"{row['expected_mib']:.3f}",
        f"{row['sent_mib']:.3f}", f"{row['sent_mib'] / row['expected_mib']:.4f}",
        *((f"{row['estimated_state_mib']:.3f}", f"{row['state_mib']:.3f}") if "state_mib" in row else ("", "")),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |" + "".join(f"\n  {line}" for line in row["differ"])


def holds(row: dict[str, Any]) -> bool:
    """Whether a row is within the bounds."""
    state = row.get("state_mib", 1.0) / row.get("estimated_state_mib", 1.0)
    return (
        not row["differ"]
        and abs(row["sent_mib"] / row["expected_mib"] - 1) <= BYTES_TOLERANCE
        and abs(state - 1) <= STATE_TOLERANCE
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = list(CASES)[: SMOKE if options.smoke else None]
    if options.work:
        return work(cases, options.work)
    print("| ranks | case | collectives | ring (MiB) | formula, gloo (MiB) | sent (MiB) | sent / formula "
          "| state, estimated (MiB) | state (MiB) |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    for ranks in (2,) if options.smoke else (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__,
                "--work", str(out), *(["--smoke"] if options.smoke else []),
            ]  # fmt: skip
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            if subprocess.run(command, env=environment, timeout=1200).returncode:
                sys.exit(f"{' '.join(command)} failed")
            rows += json.loads(out.read_text())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(not all(map(holds, rows)))


if __name__ == "__main__":
    main()
