#!/usr/bin/env python3
"""How the cost of our training step grows with tokens, prefix length, targets per image and vocabulary.

    python benchmarks/scaling.py                                       tiny, float32, on a CPU
    python benchmarks/scaling.py --cases tokens targets
    python benchmarks/scaling.py --sizes 3b --dtypes bfloat16          one GPU
    python benchmarks/scaling.py --smoke                               seconds: checks that the benchmark works
    python benchmarks/scaling.py --json rows.json

Cases, each a sweep of one quantity with all others fixed:
    tokens      more samples of one length (an image each, an instruction of 8 tokens, a target of 16): all tokens of
                the batch, 1 to 8 samples
    prefix      longer instructions: prefix tokens, image included, of 2 samples
    targets     more targets of one image and instruction: 1 to 10
    vocabulary  `--vocabs`, 2 samples

There is no peer: the baseline is the cost of the sweep's previous point grown in proportion to the quantity (not of
the first one: what is fixed in a small pass would hide how a large one grows). So a ratio of 1 is linear growth, above
1 is faster, below 1 is slower, which is where something is shared or fixed. All points of a sweep take turns.

Metrics:
    seconds      forward and backward pass, median
    peak_memory  above weights and gradients, see side_by_side.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from side_by_side import (
    DTYPES,
    SIZES,
    Row,
    Size,
    build_theirs,
    compare,
    device_name,
    now,
    parse_arguments,
    peak_memory,
    print_header,
    print_row,
    random_images,
    random_text,
    take_turns,
    write_json,
)
from torch import Tensor
from train_step import Sample, our_batch, our_mean_loss

from mmprefix.interop.paligemma import convert_paligemma
from mmprefix.modeling import MMPrefixForConditionalGeneration

INSTRUCTION, TARGET = 8, 16
"""Tokens, without framing, where the sweep doesn't say otherwise."""


@dataclass(frozen=True, eq=False)
class Point:
    """One step of a sweep: the quantity's value and the samples that have it."""

    value: int
    samples: list[Sample]
    vocab: int


def make_samples(images: int, vocab: int, instruction: int = INSTRUCTION, targets: int = 1) -> list[Sample]:
    """A sample for each image, all of one length."""
    generator = torch.Generator().manual_seed(7)
    return [
        Sample(
            image,
            random_text(instruction, vocab, generator),
            [random_text(TARGET, vocab, generator) for _ in range(targets)],
        )
        for image in range(images)
    ]


def tokens(size: Size, vocabs: list[int]) -> Iterator[Point]:
    """More samples of one length."""
    length = size.num_image_tokens + INSTRUCTION + 2 + TARGET + 1
    for images in (1, 2, 4, 8):
        yield Point(images * length, make_samples(images, vocabs[0]), vocabs[0])


def prefix(size: Size, vocabs: list[int]) -> Iterator[Point]:
    """Longer instructions."""
    for instruction in (INSTRUCTION, 256, 512, 1024):
        yield Point(
            size.num_image_tokens + instruction + 2, make_samples(2, vocabs[0], instruction=instruction), vocabs[0]
        )


def targets(size: Size, vocabs: list[int]) -> Iterator[Point]:
    """More targets of one prefix."""
    for number in (1, 2, 5, 10):
        yield Point(number, make_samples(1, vocabs[0], targets=number), vocabs[0])


def vocabulary(size: Size, vocabs: list[int]) -> Iterator[Point]:
    """More tokens to choose from."""
    for vocab in vocabs:
        yield Point(vocab, make_samples(2, vocab), vocab)


CASES: dict[str, Callable[[Size, list[int]], Iterator[Point]]] = {
    "tokens": tokens,
    "prefix": prefix,
    "targets": targets,
    "vocabulary": vocabulary,
}


def timed_pass(
    model: MMPrefixForConditionalGeneration, loss: Callable[[], Tensor], device: torch.device
) -> dict[str, float]:
    """One forward and backward pass."""
    start = now(device)
    loss().backward()
    end = now(device)
    model.zero_grad(set_to_none=True)
    return {"seconds": end - start}


def main() -> None:
    """All combinations of size and dtype; the first vocabulary for all sweeps but its own."""
    options = parse_arguments(__doc__, list(CASES), vocabs=(32_768, 65_536, 131_072, 257_152))
    if options.smoke:
        options.vocabs = [512, 1024]
    device = options.device
    print_header(device)
    rows: list[Row] = []
    for name in options.sizes:
        size = SIZES[name]
        for dtype in options.dtypes:
            models: dict[int, MMPrefixForConditionalGeneration] = {}
            for case in options.cases:
                points = list(CASES[case](size, options.vocabs))
                runs, memory = {}, {}
                for point in points:
                    if point.vocab not in models:
                        models[point.vocab] = convert_paligemma(build_theirs(size, point.vocab, DTYPES[dtype], device))
                    model = models[point.vocab]
                    pixels = random_images(len(point.samples), size, device)
                    batch = our_batch(point.samples, pixels, size, point.vocab, "full")
                    loss = partial(our_mean_loss, model, batch)
                    memory[point] = [peak_memory(model, loss, device)[0]]
                    model.zero_grad(set_to_none=True)
                    runs[point] = partial(timed_pass, model, loss, device)
                seconds = {point: values["seconds"] for point, values in take_turns(runs, options.repeats).items()}
                for previous, point in zip([points[0], *points], points, strict=False):
                    growth = point.value / previous.value
                    for metric, values in (("seconds", seconds), ("peak_memory", memory)):
                        rows.append(compare(
                            [value * growth for value in values[previous]], values[point], metric=metric,
                            peer="linear growth", case=f"{case}={point.value}", size=name,
                            device=device_name(device), dtype=dtype, vocab=point.vocab,
                        ))  # fmt: skip
                        print_row(rows[-1])
                write_json(options.json, rows)


if __name__ == "__main__":
    main()
