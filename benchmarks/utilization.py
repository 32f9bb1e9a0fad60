#!/usr/bin/env python3
"""Model FLOPs utilization (MFU) of our training step: useful operations beside the rate of large matrix products.

    python benchmarks/utilization.py                                   tiny, float32, on a CPU
    python benchmarks/utilization.py --sizes 3b --dtypes bfloat16 --images 4 16 32       one GPU
    python benchmarks/utilization.py --compile                         with compiled layers, as model.compile has it
    python benchmarks/utilization.py --compile --recompute elementwise      ... which keep what products and attention give
    python benchmarks/utilization.py --smoke                           seconds: checks that the benchmark works
    python benchmarks/utilization.py --json rows.json

Cases: those of train_step.py, with as many images as `--images` says.

FLOPs are those that the batch's plan says (`accounting.ModelFlops`): visible query-key pairs, labels that are scored,
no padding. The baseline is what `accounting.measured_peak_flops` finds on the same device before: the fastest of
several square products of random matrices of the same dtype. No vendor's number is used.

Metrics (FLOP/s, medians; the ratio is the utilization):
    flops_per_s                 forward and backward pass; every parameter gets a gradient
    flops_per_s_with_optimizer  the same and AdamW, fused
"""

from __future__ import annotations

from functools import partial

import torch
from side_by_side import (
    DTYPES,
    SIZES,
    Row,
    build_theirs,
    compare,
    device_name,
    parse_arguments,
    print_header,
    print_row,
    random_images,
    take_turns,
    write_json,
)
from train_step import CASES, our_batch, our_mean_loss, timed_step

from mmprefix.accounting import ModelFlops, measured_peak_flops, trained_parts
from mmprefix.interop.paligemma import convert_paligemma
from mmprefix.training.layers import checkpoint_activations, compile_layers


def main() -> None:
    """All combinations; one model for all cases of a size, dtype and vocabulary."""
    options = parse_arguments(__doc__, list(CASES), vocabs=(257_152,), images=True, compiles=True)
    device = options.device
    print_header(device)
    rows: list[Row] = []
    for name in options.sizes:
        size = SIZES[name]
        for dtype in options.dtypes:
            peak = measured_peak_flops(device, DTYPES[dtype])
            for vocab in options.vocabs:
                model = convert_paligemma(build_theirs(size, vocab, DTYPES[dtype], device)).train()
                flops_of, trained = ModelFlops.of(model.config), trained_parts(model)
                # At a rate of 0 all of its work is done.
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
                checkpoint_activations(model, options.recompute or False)
                if options.compile:
                    compile_layers(model)
                for images in options.images or [size.images]:
                    for case in options.cases:
                        samples = CASES[case].samples(images, vocab)
                        pixels = random_images(images, size, device)
                        batch = our_batch(samples, pixels, size, vocab, CASES[case].visibility)
                        flops = flops_of.step(batch, trained)
                        targets = sum(len(sample.targets) for sample in samples)
                        run = partial(
                            timed_step, model, partial(our_mean_loss, model, batch), optimizer, targets, device
                        )
                        per_second = take_turns({"mmprefix": run}, options.repeats)["mmprefix"]
                        for metric, what in (
                            ("samples_per_s", "flops_per_s"),
                            ("train_step_with_optimizer", "flops_per_s_with_optimizer"),
                        ):
                            rows.append(compare(
                                [peak], [flops * value / targets for value in per_second[metric]], metric=what,
                                peer="matrix products", case=f"{case}, {images} images", size=name,
                                device=device_name(device), dtype=dtype, vocab=vocab,
                            ))  # fmt: skip
                            print_row(rows[-1])
                        write_json(options.json, rows)
                del model, optimizer


if __name__ == "__main__":
    main()
