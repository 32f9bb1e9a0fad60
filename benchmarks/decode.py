#!/usr/bin/env python3
"""Prefill and decode speed against transformers' own PaliGemma, with the same weights and prompts, greedy.

    python benchmarks/decode.py                                        tiny, float32, both vocabularies, on a CPU
    python benchmarks/decode.py --cases ragged8 --vocabs 257152
    python benchmarks/decode.py --sizes 3b --dtypes bfloat16           one GPU
    python benchmarks/decode.py --smoke                                seconds: checks that the benchmark works
    python benchmarks/decode.py --json rows.json

Cases:
    equal1, equal8   1 and 8 prompts with an instruction of 10 tokens
    ragged8          8 prompts with instructions of 4-64 tokens, padded on the left on both sides

Sides, all for one new token and for NEW_TOKENS, end of text suppressed:
    transformers         its `generate`
    mmprefix, generate   transformers' `generate` on our model
    mmprefix             `decoding.answers`, with which validate, test and predict decode. On a GPU, capturing its graph is
                         part of the time, as in every call
In float32, before any time is taken and whatever dtype is measured, all must generate the same tokens.

Metrics (medians):
    prefill_tokens_per_s   prompt tokens, padding not counted, with one new token: image encoder too
    decode_tokens_per_s    all further tokens, in what NEW_TOKENS take longer than one
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from side_by_side import (
    DTYPES,
    PAD,
    SIZES,
    Row,
    Size,
    build_pair,
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
from transformers import PreTrainedModel

from mmprefix.decoding import Prompt, answers
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.packing import collate_prompts
from mmprefix.sequence import TokenSequence

NEW_TOKENS = 32


def untie(theirs: PreTrainedModel, ours: PreTrainedModel) -> None:
    """Gives both the same random output layer: with one that is the embedding, too, random weights say each token again."""
    old = theirs.get_output_embeddings().weight
    head = torch.randn_like(old, requires_grad=False) * old.shape[1] ** -0.5
    for model in (theirs, ours):
        model.get_output_embeddings().weight = nn.Parameter(head.clone())


def instruction_lengths(case: str) -> list[int]:
    """Tokens of each prompt's instruction, without BOS and separator."""
    if case == "ragged8":
        generator = torch.Generator().manual_seed(5)
        return torch.randint(2, 63, (8,), generator=generator).tolist()
    return [8] * {"equal1": 1, "equal8": 8}[case]


CASES = ("equal1", "equal8", "ragged8")


def prompts(case: str, size: Size, vocab: int, device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` int64 ``[S, T]``, padded on the left, and ``pixel_values``."""
    generator = torch.Generator().manual_seed(6)
    sequences = [
        TokenSequence.build(layout(vocab), size.num_image_tokens, random_text(length, vocab, generator))
        for length in instruction_lengths(case)
    ]
    batch = collate_prompts(sequences, list(range(len(sequences))), None, pad_id=PAD)
    return {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
        "pixel_values": random_images(len(sequences), size, device),
    }


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int) -> Tensor:
    """Greedy tokens, int64 ``[S, new_tokens]``."""
    output = model.generate(**inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    return output[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def answer(model: MMPrefixForConditionalGeneration, inputs: dict[str, Tensor], new_tokens: int) -> Tensor:
    """Greedy tokens, int64 ``[S, new_tokens]``, as evaluation decodes."""
    images = model.get_image_tokens(inputs["pixel_values"])
    prompts = [
        Prompt(ids[mask.bool()], (image,), str(number), new_tokens)
        for number, (ids, mask, image) in enumerate(
            zip(inputs["input_ids"], inputs["attention_mask"], images, strict=True)
        )
    ]
    packed = model.device.type == "cpu" or model.dtype != torch.float32  # what has a kernel for packed rows
    found = answers(model, prompts, rows=len(prompts), max_new_tokens=new_tokens, packed=packed)
    return torch.tensor(found, device=model.device)


def timed(run: Callable[[int], Tensor], prompt_tokens: int, device: torch.device) -> dict[str, float]:
    """Tokens per second of prefill and of decoding."""
    start = now(device)
    run(1)
    after_one = now(device)
    decoded = run(NEW_TOKENS)[:, 1:].numel()
    prefill = after_one - start
    # Both calls prefill; what is left are the further tokens. Noise could make it nothing, which is no speed.
    decoding = max(now(device) - after_one - prefill, 1e-9)
    return {"prefill_tokens_per_s": prompt_tokens / prefill, "decode_tokens_per_s": decoded / decoding}


def main() -> None:
    """All combinations of size, vocabulary and dtype; the same models for all cases."""
    options = parse_arguments(__doc__, CASES, vocabs=(32_768, 257_152))
    device = options.device
    print_header(device)
    rows: list[Row] = []
    for name in options.sizes:
        size = SIZES[name]
        for vocab in options.vocabs:
            for dtype in options.dtypes:
                # Made and checked in float32: in bfloat16, a rounding may turn one token, and then all that follow.
                theirs, ours = (model.eval() for model in build_pair(size, vocab, torch.float32, device))
                untie(theirs, ours)
                without_end = copy.copy(ours)
                without_end.generation_config = copy.deepcopy(ours.generation_config)
                without_end.generation_config.eos_token_id = None
                sides = {}
                tokens: set[int] = set()
                for case in options.cases:
                    inputs = prompts(case, size, vocab, device)
                    # As PaliGemma's processor does: without them, the prompt would be causal.
                    their_inputs = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
                    sides[case] = {
                        "transformers": partial(generate, theirs, their_inputs),
                        "mmprefix, generate": partial(generate, ours, inputs),
                        "mmprefix": partial(answer, without_end, inputs),
                    }
                    expected, *others = (run(NEW_TOKENS) for run in sides[case].values())
                    for found in others:
                        if not torch.equal(expected, found):
                            raise SystemExit(f"{case}: expected the tokens {expected.tolist()}, got {found.tolist()}")
                    tokens.update(expected.unique().tolist())
                assert len(tokens) > len(options.cases) * 8, f"few tokens show little, got {tokens}"
                theirs.to(DTYPES[dtype])
                ours.to(DTYPES[dtype])
                for case in options.cases:
                    prompt_tokens = int(sides[case]["mmprefix"].args[1]["attention_mask"].sum())
                    values = take_turns(
                        {side: partial(timed, run, prompt_tokens, device) for side, run in sides[case].items()},
                        options.repeats,
                    )
                    for peer in ("transformers", "mmprefix, generate"):
                        for metric in values["mmprefix"]:
                            rows.append(compare(
                                values[peer][metric], values["mmprefix"][metric], metric=metric, peer=peer, case=case,
                                size=name, device=device_name(device), dtype=dtype, vocab=vocab,
                            ))  # fmt: skip
                            print_row(rows[-1])
                    write_json(options.json, rows)


if __name__ == "__main__":
    main()
