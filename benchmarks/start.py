#!/usr/bin/env python3
"""Host memory of a start from pretrained weights under FSDP2, beside that of transformers' own loading.

    python benchmarks/start.py                  a decoder of 0.8 GiB in bfloat16, 5 files, 2 and 4 processes
    python benchmarks/start.py --smoke          a small one, 2 processes
    python benchmarks/start.py --json FILE      writes the rows there, too

Random weights are written in bfloat16 as `save_pretrained` writes them; processes then start from them, with weights in
float32 and each layer sharded: *transformers*: `from_pretrained(dtype=float32)` and `fully_shard` of each layer and of the
whole, as its users write it; *mmprefix*: `MMPrefixModule` and `FullyShardedStrategy`, checks of the decoder included. Every
process's shards of the decoder are asserted to be bit-equal on both sides. What is measured, every 2 ms, over the process's
state before the start:

Exits with 1 where mmprefix needs more above its share than the largest file (small: than transformers).

- anon: memory that nobody can take back (RssAnon). Above the share: without what the process keeps.
- mapped: pages of files that were read (RssFile). They are the kernel's cache, one copy for all processes of a host, and go
  when memory is wanted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from mmprefix.decoder import DecoderArgs
from mmprefix.processing import TokenizerArgs
from mmprefix.training.fsdp import FullyShardedStrategy
from mmprefix.training.module import MMPrefixModule
from mmprefix.vision import VisionArgs

MIB = 1 << 20
SIDES = "transformers", "mmprefix"
SIZES = {"full": (1536, 16, 200), "smoke": (512, 8, 24)}
"""Width, layers, MiB of a file."""


def write_decoder(folder: Path, width: int, layers: int, file_mib: int) -> None:
    """A decoder with random weights in bfloat16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=16384, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, tie_word_embeddings=True,
    )  # fmt: skip
    decoder = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    decoder.save_pretrained(folder, max_shard_size=file_mib * MIB)


def strategy_of_process() -> FullyShardedStrategy:
    """Its group made, without a trainer; rank and size from the environment."""
    strategy = FullyShardedStrategy()
    strategy.accelerator = CPUAccelerator()
    strategy.parallel_devices = [torch.device("cpu")] * int(os.environ["WORLD_SIZE"])
    environment = LightningEnvironment()
    environment.set_world_size(int(os.environ["WORLD_SIZE"]))
    environment.set_global_rank(int(os.environ["RANK"]))
    strategy.cluster_environment = environment
    strategy._lightning_module = SimpleNamespace()  # is told of the mesh
    strategy.setup_environment()
    return strategy


def start(side: str, decoder: DecoderArgs, strategy: FullyShardedStrategy) -> nn.Module:
    """A sharded model of which ``.decoder`` is the decoder."""
    if side == "mmprefix":
        module = MMPrefixModule(
            VisionArgs("test_vit", image_size=32), decoder, tokenizer=TokenizerArgs(name="byte")
        )  # fmt: skip
        module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
        module.configure_model()
        return module.model
    model = (
        AutoModelForCausalLM.from_pretrained(decoder.name, dtype=torch.float32)
        if decoder.name
        else AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**decoder.config)  # type: ignore[arg-type]
        )
    )
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    holder = nn.Module()
    holder.decoder = model
    return holder


class Memory(threading.Thread):
    """The largest RssAnon and RssFile of the process, in bytes, above those at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self._now()
        self.peak = self.before
        self._ended = threading.Event()

    @staticmethod
    def _now() -> tuple[int, int]:
        _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
        page = os.sysconf("SC_PAGESIZE")
        return (resident - of_files) * page, of_files * page

    def run(self) -> None:
        while not self._ended.wait(0.002):
            anon, mapped = self._now()
            self.peak = max(self.peak[0], anon), max(self.peak[1], mapped)

    def end(self) -> dict[str, int]:
        """Peaks, above the start."""
        self._ended.set()
        self.join()
        return {name: self.peak[i] - self.before[i] for i, name in enumerate(("anon", "mapped"))}


def measure(side: str, folder: Path) -> None:
    """Of this process, printed: bytes, seconds and a hash of its shards."""
    strategy = strategy_of_process()
    tiny = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4}  # fmt: skip
    start(side, DecoderArgs(config=tiny), strategy)  # loads libraries
    torch.distributed.barrier()
    memory, begun = Memory(), time.perf_counter()
    memory.start()
    model = start(side, DecoderArgs(name=str(folder)), strategy)
    seconds = time.perf_counter() - begun
    found: dict[str, Any] = {**memory.end(), "seconds": seconds, "share": 0}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        found["share"] += local.numel() * local.itemsize
        if name.startswith("decoder."):
            digest.update(name.encode() + local.detach().contiguous().view(torch.uint8).numpy().tobytes())
    torch.distributed.barrier()
    print(json.dumps({**found, "hash": digest.hexdigest()}))


def in_processes(side: str, folder: Path, processes: int) -> list[dict[str, Any]]:
    """`measure` of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--measure", side, str(folder)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "NODE_RANK": "0",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(processes)
    ]  # fmt: skip
    results = []
    try:
        for process in started:
            out, err = process.communicate(timeout=600)
            if process.returncode:
                raise RuntimeError(err)
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
    return results


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small decoder, 2 processes")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    size = "smoke" if options.smoke else "full"
    rows: list[dict[str, Any]] = []
    too_much: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_decoder(folder, *SIZES[size])
        files = sorted((path.stat().st_size for path in folder.glob("*.safetensors")), reverse=True)
        print(
            f"{len(files)} files, {sum(files) / MIB:.0f} MiB, the largest {files[0] / MIB:.0f} MiB; MiB of the worst process"
        )
        print("processes  side           anon    share  above share  mapped  seconds")
        for processes in (2,) if options.smoke else (2, 4):
            hashes, needed = [], []
            for side in SIDES:
                found = in_processes(side, folder, processes)
                hashes.append([one["hash"] for one in found])
                worst = max(found, key=lambda one: one["anon"] - one["share"])
                above = worst["anon"] - worst["share"]
                needed.append(above)
                print(
                    f"{processes:9}  {side:12} {worst['anon'] / MIB:6.0f} {worst['share'] / MIB:8.0f} {above / MIB:12.0f} "
                    f"{worst['mapped'] / MIB:7.0f} {worst['seconds']:8.1f}"
                )
                rows.append({
                    "case": f"{processes} processes", "size": size, "device": "cpu", "dtype": "float32", "vocab": 16384,
                    "metric": f"anonymous bytes above the share, {side}", "baseline": files[0], "value": above,
                    "ratio": round(above / files[0], 3), "command": " ".join(["python", *sys.argv]),
                    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                })  # fmt: skip
            assert hashes[0] == hashes[1], "the two sides have other weights"
            # What any start needs is more than the small decoder's files, but not more than to make the whole decoder.
            bound = needed[0] if options.smoke else files[0]
            if needed[1] > bound:
                too_much.append(
                    f"{processes} processes: {needed[1] / MIB:.0f} MiB above the share, bound {bound / MIB:.0f}"
                )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if too_much:
        raise SystemExit("\n".join(too_much))


if __name__ == "__main__":
    main()
