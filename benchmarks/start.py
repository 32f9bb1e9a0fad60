"""Host memory and time of a start under FSDP2: each process makes the whole model first, or its share only.

    python benchmarks/start.py                  # a decoder of 8 files, 2 and 4 processes
    python benchmarks/start.py --smoke --json   # a small one, 2 processes

Random weights are written to a temporary folder as `save_pretrained` writes them. Each process starts a tiny model first, so
that libraries are loaded, then the model in question. Peak: the largest resident set (pages of files that are mapped into
memory counted) during the start, above that before it. Above its share: without what the process keeps, its rows of the
weights. The bound is the largest of the files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers

MIB = 1 << 20
SIZES = {"full": (1024, 8), "smoke": (512, 8)}
"""Width and layers."""


def write_model(folder: Path, width: int, layers: int) -> None:
    """A model folder whose decoder has a file for about each layer."""
    import torch

    from mmprefix.training.module import MMPrefixModule

    torch.manual_seed(0)
    module = MMPrefixModule(**parts(width, layers))
    layer = sum(p.numel() * 4 for p in module.model.decoder.model.layers[0].parameters())
    module.model.save_pretrained(folder, max_shard_size=layer + MIB)
    module.processor.save_pretrained(folder)


def parts(width: int, layers: int) -> dict[str, Any]:
    """Settings of a model from scratch."""
    from mmprefix.decoder import DecoderArgs
    from mmprefix.processing import TokenizerArgs
    from mmprefix.vision import VisionArgs

    config = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
    }  # fmt: skip
    return {
        "vision": VisionArgs("test_vit", image_size=32), "decoder": DecoderArgs(config=config),
        "tokenizer": TokenizerArgs(name="byte"),
    }  # fmt: skip


def strategy_of(rank: int, processes: int) -> Any:
    """A strategy of this process, its group made, without a trainer; the address is in the environment."""
    import torch
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.plugins.environments import LightningEnvironment

    from mmprefix.training.fsdp import FullyShardedStrategy

    strategy = FullyShardedStrategy()
    strategy.accelerator = CPUAccelerator()
    strategy.parallel_devices = [torch.device("cpu")] * processes
    environment = LightningEnvironment()
    environment.set_world_size(processes)
    environment.set_global_rank(rank)
    strategy.cluster_environment = environment
    strategy._lightning_module = SimpleNamespace()  # is told of the mesh
    strategy.setup_environment()
    return strategy


def start(strategy: Any, **settings: Any) -> Any:
    """A module with its weights in place."""
    from mmprefix.training.module import MMPrefixModule

    module = MMPrefixModule(**settings)
    module._trainer = SimpleNamespace(strategy=strategy)
    module.configure_model()
    module.on_sharded()
    return module


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def measure(rank: int, processes: int, folder: Path, meta_start: bool) -> dict[str, Any]:
    """Starts once; in bytes and seconds."""
    import torch
    from torch.distributed.tensor import DTensor

    strategy = strategy_of(rank, processes)
    start(strategy, meta_start=meta_start, **parts(64, 2))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    torch.distributed.barrier()
    begun = time.perf_counter()
    module = start(strategy, meta_start=meta_start, pretrained=str(folder))
    torch.distributed.barrier()
    seconds = time.perf_counter() - begun
    tensors = [p.to_local() if isinstance(p, DTensor) else p for p in [*module.parameters(), *module.buffers()]]
    share = sum(t.numel() * t.itemsize for t in tensors)
    peak = resident("VmHWM") - before
    return {"rank": rank, "peak": peak, "share": share, "above_share": peak - share, "seconds": seconds}


def in_processes(number: int, work: Callable[..., Any], *arguments: Any, timeout: float = 600.0) -> list[Any]:
    """``work(rank, number, *arguments)`` in as many forked processes, which share what was imported; their results.

    Raises:
        RuntimeError: one failed or was killed.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int, pipe: Any) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
        pipe.send(work(rank, number, *arguments))

    pipes = [context.Pipe(duplex=False) for _ in range(number)]
    workers = [context.Process(target=run, args=(rank, pipes[rank][1])) for rank in range(number)]
    for worker, (_, end) in zip(workers, pipes, strict=True):
        worker.start()
        end.close()
    try:
        results = []
        for rank, (receiver, _) in enumerate(pipes):
            if not receiver.poll(timeout):
                raise RuntimeError(f"process {rank} did not answer")
            try:
                results.append(receiver.recv())
            except EOFError as error:
                raise RuntimeError(f"process {rank} failed") from error
        return results
    finally:
        for worker in workers:
            worker.join(1)
            worker.kill()


def _written(rank: int, number: int, folder: Path, width: int, layers: int) -> list[int]:
    write_model(folder, width, layers)
    return sorted((path.stat().st_size for path in folder.glob("*.safetensors")), reverse=True)


def compare(width: int, layers: int, numbers: Sequence[int]) -> dict[str, Any]:
    """Starts of both kinds; sizes of files in bytes, and of each start the process that needs most above its share."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        (files,) = in_processes(1, _written, folder, width, layers)
        for processes in numbers:
            for meta_start in (False, True):
                of_ranks = in_processes(processes, measure, folder, meta_start)
                worst = max(of_ranks, key=lambda one: one["above_share"])
                rows.append({"processes": processes, "start": "share" if meta_start else "whole", **worst})
    return {"files": files, "rows": rows}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small model, two processes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import mmprefix.training.module  # noqa: F401  (before forking)

    transformers.utils.logging.disable_progress_bar()
    found = compare(*SIZES["smoke" if options.smoke else "full"], (2,) if options.smoke else (2, 4))
    if options.json:
        print(json.dumps(found))
        return
    files = found["files"]
    print(
        f"{len(files)} files, {sum(files) / MIB:.0f} MiB, the largest {files[0] / MIB:.0f} MiB; MiB of the worst process"
    )
    print("processes  made first   peak  share  above share  seconds")
    for row in found["rows"]:
        peak, share, above = (row[name] / MIB for name in ("peak", "share", "above_share"))
        print(f"{row['processes']:9}  {row['start']:10} {peak:6.0f} {share:6.0f} {above:12.0f} {row['seconds']:8.1f}")


if __name__ == "__main__":
    main()
