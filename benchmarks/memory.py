#!/usr/bin/env python3
"""Peak memory of our training step at a GPU's size, simulated: no GPU, no weights, a minute.

    python benchmarks/memory.py                                        PaliGemma-3B's shape, bfloat16, 257,152 words
    python benchmarks/memory.py --sizes small --dtypes float32 --vocabs 32768
    python benchmarks/memory.py --smoke                                seconds: checks that the benchmark works
    python benchmarks/memory.py --json rows.json

Cases: those of train_step.py, packed into one row. Our own code runs forward and backward, uncompiled, on tensors that have
shapes but no data (`accounting.MemoryEstimate`), beside gradients of an earlier micro-batch. What operations hold inside
themselves is counted for the loss only, as the CPU's. Rows compare `model.gradient_checkpointing: elementwise` with all kept.

Metric:
    peak_memory_simulated       above weights, gradients and optimizer state: train_step.py's peak_memory
"""

from __future__ import annotations

import torch
from estimate import configured
from side_by_side import (
    SIZES,
    Row,
    Size,
    compare,
    parse_arguments,
    print_header,
    print_row,
    random_images,
    write_json,
)
from train_step import CASES, our_batch

from mmprefix.accounting import MemoryEstimate, Precision, Record
from mmprefix.decoder import DecoderArgs
from mmprefix.training.layers import Recomputing
from mmprefix.vision import VisionArgs

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true"}
"""The trainer's names of them."""


def simulated_peak(case: str, size: Size, vocab: int, dtype: str, recompute: Recomputing) -> float:
    """Bytes above weights, gradients and optimizer state."""
    vision = size.vision
    kwargs = {
        "embed_dim": vision["hidden_size"], "depth": vision["num_hidden_layers"], "num_heads": vision["num_attention_heads"],
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"], "patch_size": vision["patch_size"],
        "act_layer": "gelu_tanh",
    }  # fmt: skip
    encoder = VisionArgs(
        "vit_base_patch16_siglip_gap_224", pretrained=False, image_size=vision["image_size"], kwargs=kwargs
    )
    decoder = DecoderArgs(config={**size.text, "model_type": "gemma", "vocab_size": vocab})
    model = configured({"vision": encoder, "decoder": decoder, "gradient_checkpointing": recompute})
    samples = CASES[case].samples(size.images, vocab)
    pixels = random_images(size.images, size, torch.device("cpu"))
    batch = our_batch(samples, pixels, size, vocab, CASES[case].visibility)
    # The record is that of batches which the estimate makes up itself.
    estimate = MemoryEstimate(model, Record(1, 1), Precision.from_name(PRECISIONS[dtype]), accumulates=True)
    return sum(estimate.peak_of(batch).values()) - estimate.gradients


def main() -> None:
    """All combinations."""
    options = parse_arguments(__doc__, list(CASES), vocabs=(257_152,), simulates=True)
    print_header(torch.device("cpu"))
    rows: list[Row] = []
    for name in options.sizes:
        for dtype in options.dtypes:
            for vocab in options.vocabs:
                for case in options.cases:
                    kept, recomputed = (
                        simulated_peak(case, SIZES[name], vocab, dtype, which) for which in (False, "elementwise")
                    )
                    rows.append(compare(
                        [kept], [recomputed], metric="peak_memory_simulated", peer="mmprefix, all kept", case=case,
                        size=name, device="simulated", dtype=dtype, vocab=vocab,
                    ))  # fmt: skip
                    print_row(rows[-1])
                    write_json(options.json, rows)


if __name__ == "__main__":
    main()
