#!/usr/bin/env python3
"""Compares ``python -m mmprefix estimate`` with the measured peak of a real training step, on the CPU.

    python benchmarks/estimate.py                  five configurations
    python benchmarks/estimate.py --smoke          the two smallest
    python benchmarks/estimate.py --json FILE      writes the rows there, too

The measured step is the second of a run of Lightning's trainer with our module (so that the optimizer has its state):
bytes of weights, optimizer state and gradients at its start, and from then on every storage that an operation makes,
until it is freed. Images and texts are random and of one length, the one that the estimate is given. The last column
is what the system says: by how much the resident memory of another process grew in the same two steps, without the
meter; libraries' workspaces are in it. Exits with 1 where estimate and meter differ by more than 15%.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import string
import subprocess
import sys
import warnings
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmprefix.accounting import LiveBytes, MemoryEstimate, Precision, Record
from mmprefix.commands import configured_model
from mmprefix.decoder import DecoderArgs
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.packing import PackedBatch, collate, map_tensors
from mmprefix.processing import TokenizerArgs
from mmprefix.training.module import MMPrefixModule
from mmprefix.training.optim import PartArgs
from mmprefix.vision import ConnectorArgs, VisionArgs

TOLERANCE = 0.15
LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GEMMA2 = {
    "model_type": "gemma2", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 48,
    "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 4096,
}  # fmt: skip
SMALL_VIT = VisionArgs("vit_tiny_patch16_224", image_size=96, kwargs={"depth": 4})
CASES: dict[str, dict[str, Any]] = {
    "ViT + llama": {
        "model": {"vision": SMALL_VIT, "decoder": DecoderArgs(config=LLAMA)},
        "record": Record(24, 16, targets=2), "batch_size": 4,
    },
    "ViT + gemma2, bf16-mixed, checkpointed": {
        "model": {"vision": SMALL_VIT, "decoder": DecoderArgs(config=GEMMA2), "gradient_checkpointing": True},
        "record": Record(24, 16), "batch_size": 8, "precision": "bf16-mixed",
    },
    "ViT (frozen) + llama, bf16-mixed": {
        "model": {
            "vision": VisionArgs("vit_tiny_patch16_224"), "decoder": DecoderArgs(config=LLAMA),
            "train_vision": PartArgs(freeze=True),
        },
        "record": Record(64, 32), "batch_size": 8, "precision": "bf16-mixed",
    },
    "ViT + gemma2, accumulating": {
        "model": {
            "vision": VisionArgs("vit_tiny_patch16_224"), "decoder": DecoderArgs(config=GEMMA2),
            "connector": ConnectorArgs("pixel_shuffle"),
        },
        "record": Record(64, 32, targets=5), "batch_size": 8, "accumulate": 2,
    },
    "ViT + llama, elementwise": {
        "model": {"vision": SMALL_VIT, "decoder": DecoderArgs(config=LLAMA), "gradient_checkpointing": "elementwise"},
        "record": Record(64, 32), "batch_size": 16,
    },
}  # fmt: skip
SMOKE = 2
DEFAULTS: dict[str, Any] = {
    "connector": ConnectorArgs(), "tokenizer": TokenizerArgs("byte"), "gradient_checkpointing": False,
    "prefix_visibility": None, "pretrained": None, "attention": "auto", "train_vision": PartArgs(),
    "train_connector": PartArgs(), "train_decoder": PartArgs(),
}  # fmt: skip


def configured(model: dict[str, Any]) -> MMPrefixForConditionalGeneration:
    """On the meta device, as the command would have it."""
    settings = {name: asdict(value) if is_dataclass(value) else value for name, value in {**DEFAULTS, **model}.items()}
    return configured_model(settings)


def estimated(model: dict[str, Any], record: Record, batch_size: int, precision: str, accumulate: int) -> float:
    """Bytes, as the command would say."""
    estimate = MemoryEstimate(configured(model), record, Precision.from_name(precision), accumulates=accumulate > 1)
    return estimate.total(batch_size)


class _Meter(pl.Callback):
    """Measures one batch of a run."""

    def __init__(self, batch_idx: int) -> None:
        self.batch_idx, self.live = batch_idx, LiveBytes()
        self.standing = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts what is there, and starts."""
        if batch_idx != self.batch_idx:
            return
        (optimizer,) = trainer.optimizers
        state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        standing = [*module.parameters(), *module.buffers(), *state]
        self.standing = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in standing}.values())
        for parameter in module.parameters():
            if parameter.grad is not None:
                self.live.count(parameter.grad, "gradients")
        map_tensors(batch, self._count_input)
        self.live.__enter__()

    def _count_input(self, tensor: Tensor) -> Tensor:
        self.live.count(tensor, "activations")
        return tensor

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops."""
        if batch_idx == self.batch_idx:
            self.live.__exit__(None, None, None)


class _Data(pl.LightningDataModule):
    """Hands out the batches as they are: they are on the CPU already."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> DataLoader[Any]:
        """The batches."""
        return self.loader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to do; Lightning's own would assign to frozen dataclasses."""
        return batch


def trained(
    model: dict[str, Any],
    record: Record,
    batch_size: int,
    precision: str,
    accumulate: int,
    callbacks: list[pl.Callback],
    steps: int = 2,
    **settings: Any,
) -> None:
    """The first steps of a real run; ``settings`` are the trainer's."""
    defaults = {name: value for name, value in DEFAULTS.items() if name in ("tokenizer", "connector")}
    module = MMPrefixModule(**{**defaults, **model})
    letters = random.Random(0)

    def text(length: int) -> str:
        return "".join(letters.choices(string.ascii_lowercase, k=length))  # a byte is a token

    def batch(items: Any) -> PackedBatch:
        sequences = [
            module.processor.encode(
                text(record.instruction_tokens), [text(record.target_tokens) for _ in range(record.targets)]
            )
            for _ in items
        ]
        pixels = torch.randn(len(sequences), 3, *module.model.config.vision_spec.image_size)
        return collate(
            sequences, range(len(sequences)), pixels, pad_id=module.processor.pad_id,
            visibility=module.processor.prefix_visibility, packed=module.model.config.mask_free,
        )  # fmt: skip

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, precision=precision, accumulate_grad_batches=accumulate,  # type: ignore[arg-type]
        gradient_clip_val=1.0, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **{"devices": 1, **settings},
    )  # fmt: skip
    items: Any = range(steps * accumulate * batch_size)
    trainer.fit(module, datamodule=_Data(DataLoader(items, batch_size, collate_fn=batch)))


def measured(**case: Any) -> float:
    """Bytes of live tensors at the peak of a step that was really trained."""
    # With accumulation, the second micro-batch of the second step: gradients of the first are there all along.
    meter = _Meter(batch_idx=2 * case["accumulate"] - 1)
    trained(**case, callbacks=[meter])
    return meter.standing + meter.live.peak


def resident(name: str) -> float:
    """Bytes by which the resident memory of a process grew, at its peak."""
    # Freed blocks go back to the system at once: else the peak would hold what the allocator keeps for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--resident", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _print_resident(name: str) -> None:
    """In the process of its own: a small run first, which loads what libraries load."""
    warm = {**_case(name), "record": Record(1, 1), "batch_size": 1}
    trained(**warm, callbacks=[])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    trained(**_case(name), callbacks=[])
    # Not getrusage's ru_maxrss: that one survives exec, so it may be this process's parent's.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024 - before)


def _case(name: str) -> dict[str, Any]:
    return {"precision": "32-true", "accumulate": 1, **CASES[name]}


def compare(name: str) -> dict[str, Any]:
    """One row: MiB estimated and measured, and their ratio."""
    case = _case(name)
    estimate, measurement = estimated(**case), measured(**case)
    return {
        "case": name,
        "batch_size": case["batch_size"],
        "estimated_mib": estimate / 2**20,
        "measured_mib": measurement / 2**20,
        "ratio": estimate / measurement,
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--resident", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.resident:
        return _print_resident(options.resident)
    rows = []
    print("| case | batch size | estimated (MiB) | measured (MiB) | estimated / measured | resident (MiB) |")
    print("|---|---|---|---|---|---|")
    for name in list(CASES)[: SMOKE if options.smoke else None]:
        row = {**compare(name), "resident_mib": resident(name) / 2**20}
        rows.append(row)
        print(
            f"| {name} | {row['batch_size']} | {row['estimated_mib']:.1f} | {row['measured_mib']:.1f} "
            f"| {row['ratio']:.3f} | {row['resident_mib']:.1f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(abs(row["ratio"] - 1) > TOLERANCE for row in rows))


if __name__ == "__main__":
    main()
