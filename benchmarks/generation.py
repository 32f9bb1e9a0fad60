#!/usr/bin/env python3
"""Answers per second of the evaluation runner against a plain loop of transformers' `generate`, greedy.

    OMP_NUM_THREADS=2 python benchmarks/generation.py          tiny, float32, on a CPU
    python benchmarks/generation.py --cases mixed --json rows.json
    python benchmarks/generation.py --sizes 3b --dtypes bfloat16 --vocabs 257152       one GPU
    python benchmarks/generation.py --smoke                    seconds: checks that the benchmark works

The plain loop takes the samples in the order of the data, `BATCH_SIZE` at a time, into transformers' own PaliGemma:
`model.generate(**inputs)`, prompts padded on the left to the longest of the batch, until its longest answer is done. The
runner has the same weights and as many rows at a time, and takes windows of `WINDOW` batches, as `validate` does by default.
What both get is tokenized, decoded and collated already; the image encoder is in both times.

Cases:
    mixed       an image and an instruction of 2 to 256 tokens for each sample, log-uniform
    captions    an image and an instruction of 4 tokens for each sample: only answers differ in length
    questions   four questions of 4 to 12 tokens on each image, one after the other

Answers end when the model says EOS, at most after NEW_TOKENS tokens. So that a model with random weights does, some of its
weights are changed, in both (`let_end`); lengths are then about geometric. In float32, before any time is taken
and whatever dtype is measured, both must give the same tokens for every sample.

Metric (medians): `samples_per_s`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from side_by_side import (
    DTYPES,
    EOS,
    PAD,
    SIZES,
    Row,
    Size,
    build_theirs,
    compare,
    device_name,
    layout,
    now,
    parse_arguments,
    print_header,
    print_row,
    random_images,
    random_text,
    take_turns,
    write_json,
)
from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration

from mmprefix.attention import only_mask_free
from mmprefix.data.loading import Collator, EncodedImage, EncodedRecord
from mmprefix.decoding import answers
from mmprefix.interop.paligemma import convert_paligemma
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.packing import EvaluationBatch, Reference, collate_prompts, map_tensors
from mmprefix.sequence import TokenSequence
from mmprefix.training.module import prompts_of

CASES = ("mixed", "captions", "questions")
BATCH_SIZE, WINDOW = 8, 4
NUM_SAMPLES, NEW_TOKENS = 32, 64


@dataclass(frozen=True)
class Sample:
    """A prompt and the number of its image."""

    sequence: TokenSequence
    image: int


def make_samples(case: str, size: Size, vocab: int, number: int) -> list[Sample]:
    """Samples in the order of the data."""
    generator = torch.Generator().manual_seed(7)
    per_image = 4 if case == "questions" else 1
    samples = []
    for n in range(number):
        if case == "mixed":
            length = int(2 ** (1 + 7 * torch.rand((), generator=generator)))
        else:
            length = int(torch.randint(4, 13, (), generator=generator)) if case == "questions" else 4
        text = random_text(length, vocab, generator)
        samples.append(Sample(TokenSequence.build(layout(vocab), size.num_image_tokens, text), n // per_image))
    return samples


def let_end(theirs: PaliGemmaForConditionalGeneration) -> None:
    """Makes random weights say something, and end.

    As they are, all that differs between two steps is lost in what all have in common, and one token is said over and over.
    With larger embeddings the last token counts; a larger last MLP, and signs in the last norm, make of it another one than
    itself. EOS, which no prompt holds, gets a larger embedding than others: its logit varies more, and is sometimes the
    largest.
    """
    generator = torch.Generator().manual_seed(2)
    weight, text = theirs.get_input_embeddings().weight, theirs.model.language_model
    with torch.no_grad():
        weight.mul_(8)
        text.layers[-1].mlp.down_proj.weight.mul_(30)
        text.norm.weight.copy_(-2.0 * torch.randint(0, 2, text.norm.weight.shape, generator=generator))  # Gemma adds 1
        weight[EOS] = (torch.randn(weight.shape[1], generator=generator) * 3).to(weight) * weight[EOS + 1 :].std()
        weight[-1] = 0.0  # the image placeholder: trained models don't say it, and it is read differently where they do


def until_end(ids: list[int]) -> list[int]:
    """An answer without EOS and what follows it."""
    return ids[: ids.index(EOS)] if EOS in ids else ids


# --- the plain loop


def plain_inputs(samples: Sequence[Sample], images: Tensor) -> list[dict[str, Tensor]]:
    """What PaliGemma's processor makes of each batch."""
    batches = []
    for start in range(0, len(samples), BATCH_SIZE):
        members = samples[start : start + BATCH_SIZE]
        batch = collate_prompts([s.sequence for s in members], [s.image for s in members], None, pad_id=PAD)
        batches.append({
            "input_ids": batch.input_ids.to(images.device),
            "attention_mask": batch.attention_mask.to(images.device),
            "pixel_values": images[[s.image for s in members]],
            # Without them, the prompt would be causal.
            "token_type_ids": torch.zeros_like(batch.input_ids).to(images.device),
        })  # fmt: skip
    return batches


def plain(model: PaliGemmaForConditionalGeneration, batches: Sequence[dict[str, Tensor]]) -> list[list[int]]:
    """Answers in the order of the data."""
    found = []
    for inputs in batches:
        pixels = inputs["pixel_values"].to(model.dtype)
        output = model.generate(**{**inputs, "pixel_values": pixels}, do_sample=False, max_new_tokens=NEW_TOKENS)
        found += [until_end(ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]
    return found


# --- the runner


def runner_batches(samples: Sequence[Sample], images: Tensor) -> list[EvaluationBatch]:
    """What the data module's collator makes of each batch of the same samples."""
    collator = Collator(PAD, "full")
    batches = []
    for start in range(0, len(samples), BATCH_SIZE):
        records = [
            EncodedRecord(
                (EncodedImage(str(sample.image), images[sample.image].unsqueeze(0).cpu()),),
                (sample.sequence,), (Reference(str(n), order=(n, 0)),),
            )
            for n, sample in enumerate(samples[start : start + BATCH_SIZE], start)
        ]  # fmt: skip
        batches.append(map_tensors(collator.evaluate(records), lambda tensor: tensor.to(images.device)))
    return batches


@torch.no_grad()
def runner(model: MMPrefixForConditionalGeneration, batches: Sequence[EvaluationBatch]) -> list[list[int]]:
    """As `MMPrefixModule` evaluates, without the loss."""
    # `MMPrefixModule.setup` asks for more; a fall-back to a mask would end the benchmark.
    weight = next(model.parameters())
    packed = model.config.mask_free and (weight.device.type == "cpu" or weight.dtype != torch.float32)
    found = []
    for start in range(0, len(batches), WINDOW):
        window = batches[start : start + WINDOW]
        prompts = [prompt for batch in window for prompt in prompts_of(batch, model.image_tokens_of(batch.prompts))]
        with only_mask_free():
            found += answers(model, prompts, rows=BATCH_SIZE, max_new_tokens=NEW_TOKENS, packed=packed)
    return found


def timed(run: partial[list[list[int]]], device: torch.device) -> dict[str, float]:
    """Samples per second."""
    start = now(device)
    number = len(run())
    return {"samples_per_s": number / (now(device) - start)}


def counted(run: Callable[[], list[list[int]]], decoder: nn.Module) -> tuple[list[list[int]], int]:
    """What a side answers, and how often its decoder ran: prefills and steps."""
    passes: list[None] = []
    hook = decoder.register_forward_hook(lambda *_: passes.append(None))
    try:
        return run(), len(passes)
    finally:
        hook.remove()


def main() -> None:
    """All combinations of size, vocabulary and dtype; the same models for all cases."""
    options = parse_arguments(__doc__, CASES, vocabs=(32_768,))
    device = options.device
    if options.smoke:
        torch.set_num_threads(1)  # threads that share a busy core wait for each other at each tiny product
    print_header(device)
    rows: list[Row] = []
    notes: list[str] = []
    for name in options.sizes:
        size = SIZES[name]
        for vocab in options.vocabs:
            for dtype in options.dtypes:
                # Made and checked in float32: in bfloat16, a rounding may turn one token, and then all that follow.
                theirs = build_theirs(size, vocab, torch.float32, device).eval()
                let_end(theirs)
                ours = convert_paligemma(copy.deepcopy(theirs)).eval()
                sides = {}
                for case in options.cases:
                    samples = make_samples(case, size, vocab, 20 if options.smoke else NUM_SAMPLES)
                    images = random_images(samples[-1].image + 1, size, device)
                    sides[case] = {
                        "transformers": partial(plain, theirs, plain_inputs(samples, images)),
                        "mmprefix": partial(runner, ours, runner_batches(samples, images)),
                    }
                    decoders = {"transformers": theirs.model.language_model, "mmprefix": ours.decoder}
                    (expected, theirs_passes), (found, our_passes) = (
                        counted(run, decoders[side]) for side, run in sides[case].items()
                    )
                    if expected != found:
                        raise SystemExit(f"{case}: expected the tokens {expected}, got {found}")
                    lengths = sorted(len(ids) + 1 for ids in expected)
                    assert len(set(lengths)) > 2, "answers of one length show nothing"
                    prompts = sorted(len(sample.sequence) for sample in samples)
                    notes.append(
                        f"{case}: {len(samples)} samples, equal answers; tokens (smallest, median, mean, largest): prompts "
                        f"{_spread(prompts)}, answers {_spread(lengths)}; decoder passes: transformers {theirs_passes}, "
                        f"mmprefix {our_passes}"
                    )
                theirs.to(DTYPES[dtype])
                ours.to(DTYPES[dtype])
                for case in options.cases:
                    values = take_turns(
                        {side: partial(timed, run, device) for side, run in sides[case].items()}, options.repeats
                    )
                    (metric,) = values["mmprefix"]
                    rows.append(compare(
                        values["transformers"][metric], values["mmprefix"][metric], metric=metric, peer="transformers",
                        case=case, size=name, device=device_name(device), dtype=dtype, vocab=vocab,
                    ))  # fmt: skip
                    print_row(rows[-1])
                    write_json(options.json, rows)
    print("", *notes, sep="\n")


def _spread(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}, {numbers[len(numbers) // 2]}, {sum(numbers) / len(numbers):.1f}, {numbers[-1]}"


if __name__ == "__main__":
    main()
