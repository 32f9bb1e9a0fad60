#!/usr/bin/env python3
"""A training step against transformers' own PaliGemma, with the same weights on the same samples.

    python benchmarks/train_step.py                                    tiny, float32, both vocabularies, on a CPU
    python benchmarks/train_step.py --cases captions --vocabs 257152
    python benchmarks/train_step.py --sizes 3b --dtypes bfloat16 --vocabs 257152      one GPU of 141 GB
    python benchmarks/train_step.py --compile                          ours with compiled layers, as model.compile has it
    python benchmarks/train_step.py --compile --recompute elementwise      ... which keep what products and attention give
    python benchmarks/train_step.py --smoke                            seconds: checks that the benchmark works
    python benchmarks/train_step.py --json rows.json

Cases:
    captions    COCO: 5 captions of 8-20 tokens for each image, one short instruction
    questions   VQA: 5.4 questions of 6-14 tokens for each image (5, 6, 5, 6, 5, ...), answers of 1-3;
                ours with prefix_visibility nested, transformers' with its only mask, which is full
    single      one target of 1-40 tokens for each image, instructions of 4-64

transformers gets what its API takes: a row for each pair of image and target, the image repeated, padded on the right.
At size 3b it takes at most `Size.peer_rows` rows at a time, and accumulates gradients over them. On a GPU with liger-kernel
installed, transformers with Liger's kernels is the second peer. With `--compile`, ours without a compiler is one more, or with
`--recompute` ours that keeps all activations; with `--compile-peer` transformers with its layers compiled in the same way.
Compiled code has seen a batch of another shape.

Before any time is taken, the losses must be equal and the gradients equally long. Under `nested`, where transformers
has no such mask, ours are compared with our own on each question alone.

Metrics (target sequences per second, medians):
    samples_per_s               forward and backward pass; gradients start from None, every parameter gets one
    train_step_with_optimizer   the same and AdamW, fused, on both sides
    peak_memory                 above weights, gradients and optimizer state, with gradients of an earlier micro-batch
    peak_memory_first           the same where gradients start from None, as after every optimizer step
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from side_by_side import (
    BOS,
    DTYPES,
    EOS,
    NEWLINE,
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
    peak_memory,
    print_header,
    print_row,
    random_images,
    random_text,
    take_turns,
    write_json,
)
from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration

from mmprefix.data.loading import Collator
from mmprefix.masks import PrefixVisibility
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.packing import PackedBatch, collate, map_tensors
from mmprefix.sequence import IGNORE_INDEX, TokenSequence
from mmprefix.training.layers import checkpoint_activations, compile_layers

QUESTIONS_PER_IMAGE = (5, 6, 5, 6, 5)
"""5.4 on average, as VQAv2 has them."""

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative, on the loss. bfloat16 has 8 bits, and the two sides add up in different orders."""
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Relative, on the length of the whole gradient."""


class Sample(NamedTuple):
    """An image's number, an instruction and its targets, as token ids without framing."""

    image: int
    instruction: list[int]
    targets: list[list[int]]


def captions(images: int, vocab: int) -> list[Sample]:
    """5 captions of 8-20 tokens for each image, with an instruction of 4 tokens (framing included)."""
    generator = torch.Generator().manual_seed(2)
    instruction = random_text(2, vocab, generator)
    return [
        Sample(image, instruction, [random_text(_between(8, 20, generator), vocab, generator) for _ in range(5)])
        for image in range(images)
    ]


def questions(images: int, vocab: int) -> list[Sample]:
    """5.4 questions of 6-14 tokens for each image, with answers of 1-3."""
    generator = torch.Generator().manual_seed(3)
    return [
        Sample(
            image,
            random_text(_between(6, 14, generator), vocab, generator),
            [random_text(_between(1, 3, generator), vocab, generator)],
        )
        for image in range(images)
        for _ in range(QUESTIONS_PER_IMAGE[image % len(QUESTIONS_PER_IMAGE)])
    ]


def single(images: int, vocab: int) -> list[Sample]:
    """One target of 1-40 tokens for each image, with an instruction of 4-64 (framing included)."""
    generator = torch.Generator().manual_seed(4)
    return [
        Sample(
            image,
            random_text(_between(4, 64, generator) - 2, vocab, generator),
            [random_text(_between(1, 40, generator), vocab, generator)],
        )
        for image in range(images)
    ]


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


@dataclass(frozen=True)
class Case:
    """How samples are made, and the mask that ours trains them with."""

    samples: Callable[[int, int], list[Sample]]
    visibility: PrefixVisibility = "full"


CASES = {"captions": Case(captions), "questions": Case(questions, "nested"), "single": Case(single)}


# --- the sides


def our_batch(
    samples: list[Sample], pixel_values: Tensor, size: Size, vocab: int, visibility: PrefixVisibility
) -> PackedBatch:
    """The samples as ours takes them: packed into one row, targets of one instruction as branches of one prefix, under
    `nested` with one copy of each image's tokens."""
    sequences, image_of = Collator(PAD, visibility).rows(
        [TokenSequence.build(layout(vocab), size.num_image_tokens, s.instruction, s.targets) for s in samples],
        [sample.image for sample in samples],
    )
    batch = collate(sequences, image_of, pixel_values.cpu(), pad_id=PAD, visibility=visibility, packed=True)
    return map_tensors(batch, lambda t: t.to(pixel_values.device))


def our_loss(model: MMPrefixForConditionalGeneration, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Summed loss and number of target tokens."""
    return model.target_loss(batch)


def our_mean_loss(model: MMPrefixForConditionalGeneration, batch: PackedBatch) -> Tensor:
    """Mean over target tokens."""
    return model.target_loss(batch, reduction="mean")[0]


def our_loss_alone(
    model: MMPrefixForConditionalGeneration, samples: list[Sample], pixel_values: Tensor, size: Size, vocab: int,
    visibility: PrefixVisibility,
) -> Tensor:  # fmt: skip
    """The reference where transformers has no such mask: every target in a pass of its own, nothing shared.

    Takes the backward pass, too, one at a time, and returns the mean over all target tokens.
    """
    alone = [Sample(s.image, s.instruction, [target]) for s in samples for target in s.targets]
    count = sum(len(s.targets[0]) + 1 for s in alone)
    total = pixel_values.new_zeros((), dtype=torch.float32)
    for sample in alone:
        pixels = pixel_values[sample.image : sample.image + 1]
        batch = our_batch([sample._replace(image=0)], pixels, size, vocab, visibility)
        loss = our_loss(model, batch)[0] / count
        loss.backward()
        total += loss.detach()
    return total


def their_batch(samples: list[Sample], pixel_values: Tensor, size: Size, vocab: int) -> dict[str, Tensor]:
    """The samples as `PaliGemmaProcessor` lays them out with ``suffix``: a row for each target, padded on the right."""
    rows = []
    for sample in samples:
        prefix = [vocab - 1] * size.num_image_tokens + [BOS, *sample.instruction, NEWLINE]
        rows += [(sample.image, prefix, [*target, EOS]) for target in sample.targets]
    shape = (len(rows), max(len(prefix) + len(suffix) for _, prefix, suffix in rows))
    input_ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORE_INDEX)
    attention_mask, token_type_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for r, (_, prefix, suffix) in enumerate(rows):
        start, end = len(prefix), len(prefix) + len(suffix)
        input_ids[r, :end] = torch.tensor(prefix + suffix)
        labels[r, start:end] = torch.tensor(suffix)
        attention_mask[r, :end] = 1
        token_type_ids[r, start:end] = 1
    inputs = {
        "input_ids": input_ids, "labels": labels, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
    }  # fmt: skip
    return {name: t.to(pixel_values.device) for name, t in inputs.items()} | {
        "pixel_values": pixel_values[[image for image, _, _ in rows]]
    }


def their_loss(model: PaliGemmaForConditionalGeneration, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean over target tokens, as the model computes it."""
    return model(**inputs, use_cache=False).loss


def in_parts(loss: Callable[[Mapping[str, Tensor]], Tensor], inputs: list[dict[str, Tensor]]) -> Tensor:
    """The mean over target tokens of all micro-batches; takes the backward pass of all but the last."""
    counts = [int((part["labels"] != IGNORE_INDEX).sum()) for part in inputs]
    before = torch.zeros((), device=inputs[0]["labels"].device)
    for part, count in zip(inputs[:-1], counts, strict=False):
        value = loss(part) * (count / sum(counts))
        value.backward()
        before += value.detach()
        del value
    return loss(inputs[-1]) * (counts[-1] / sum(counts)) + before


def uncompiled(loss: Callable[[], Tensor]) -> Tensor:
    """What a model with compiled layers gives without them."""
    with torch.compiler.set_stance("force_eager"):
        return loss()


def compile_theirs(model: PaliGemmaForConditionalGeneration) -> None:
    """Each layer of encoder and decoder, as `compile_layers` does it with ours."""
    for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
        layer.compile()


class Liger:
    """transformers' model with the Liger kernels, on the same parameters.

    Liger replaces functions in transformers' modules, too, where all models of the process would find them: ours has
    the same decoder. They are in place while this side runs only.

    Its own forward for PaliGemma is written for transformers before 5; the layers' kernels, and its linear
    cross-entropy that never holds all logits, are taken one by one, as that forward does.
    """

    def __init__(self, theirs: PaliGemmaForConditionalGeneration) -> None:
        from liger_kernel.transformers import apply_liger_kernel_to_paligemma
        from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss
        from transformers.models.gemma import modeling_gemma
        from transformers.models.gemma2 import modeling_gemma2

        self._loss = LigerForCausalLMLoss
        self.model = copy.deepcopy(theirs, {id(p): p for p in theirs.parameters()})
        modules = (modeling_gemma, modeling_gemma2)
        before = [dict(vars(module)) for module in modules]
        apply_liger_kernel_to_paligemma(fused_linear_cross_entropy=False, model=self.model)
        self._replaced = [
            (module, name, old[name], new)
            for module, old in zip(modules, before, strict=True)
            for name, new in list(vars(module).items())
            if name in old and old[name] is not new
        ]
        assert any(name == "apply_rotary_pos_emb" for _, name, _, _ in self._replaced), "Liger replaced nothing"
        for module, name, old, _ in self._replaced:
            setattr(module, name, old)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        for module, name, _, new in self._replaced:
            setattr(module, name, new)
        try:
            yield
        finally:
            for module, name, old, _ in self._replaced:
                setattr(module, name, old)

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean over target tokens."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        with self._in_place():
            hidden_states = self.model.model(**inputs, use_cache=False).last_hidden_state
            return self._loss(
                hidden_states=hidden_states, lm_head_weight=self.model.lm_head.weight, labels=labels,
                hidden_size=hidden_states.shape[-1],
            )  # fmt: skip


# --- measuring


def gradient_norm(model: nn.Module) -> float:
    """Length of the whole gradient; every parameter that trains must have one."""
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient for {missing}"
    norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm())


def check_equal(name: str, expected: tuple[float, float], found: tuple[float, float], dtype: str) -> None:
    """Stops the benchmark unless (loss, gradient norm) agree."""
    for what, a, b, tolerance in zip(
        ("loss", "gradient norm"), expected, found, (TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]), strict=True
    ):
        if not abs(a - b) <= tolerance * abs(a):  # also true of NaN
            raise SystemExit(f"{name}: expected a {what} within {tolerance:g} of {a:.8g}, got {b:.8g}")


def timed_step(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, targets: int, device: torch.device
) -> dict[str, float]:
    """One training step; target sequences per second with and without the optimizer's part."""
    start = now(device)
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    after_backward = now(device)
    optimizer.step()
    end = now(device)
    # The other sides need the memory.
    optimizer.zero_grad(set_to_none=True)
    return {"samples_per_s": targets / (after_backward - start), "train_step_with_optimizer": targets / (end - start)}


def measure(
    case: str, pair: tuple[PaliGemmaForConditionalGeneration, MMPrefixForConditionalGeneration], liger: Liger | None,
    keeping: MMPrefixForConditionalGeneration | None, optimizers: Mapping[nn.Module, torch.optim.Optimizer],
    size: Size, vocab: int, dtype: str, device: torch.device, repeats: int, compiled: bool, peer_compiled: bool,
) -> Iterator[tuple[str, str, list[float], list[float]]]:  # fmt: skip
    """Checks, measures, and yields ``(peer, metric, peer's values, ours)``."""
    theirs, ours = pair
    samples = CASES[case].samples(size.images, vocab)
    visibility = CASES[case].visibility
    targets = sum(len(sample.targets) for sample in samples)
    pixel_values = random_images(size.images, size, device)
    batch = our_batch(samples, pixel_values, size, vocab, visibility)
    # A row for each target, as many at a time as the size says, in equal parts.
    alone = [sample._replace(targets=[target]) for sample in samples for target in sample.targets]
    number = -(-len(alone) // (size.peer_rows or len(alone)))
    bounds = [len(alone) * part // number for part in range(number + 1)]
    inputs = [their_batch(alone[a:b], pixel_values, size, vocab) for a, b in pairwise(bounds)]

    their = partial(in_parts, partial(their_loss, theirs), inputs)
    our = partial(our_mean_loss, ours, batch)
    sides: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    sides["transformers"] = theirs, partial(uncompiled, their) if peer_compiled else their
    if peer_compiled:
        sides["transformers, compiled"] = theirs, their
    if liger is not None:
        sides["transformers + Liger"] = liger.model, partial(in_parts, liger.loss, inputs)
    if keeping is not None:
        sides["mmprefix, all kept"] = keeping, partial(our_mean_loss, keeping, batch)
    elif compiled:
        sides["mmprefix, not compiled"] = ours, partial(uncompiled, our)
    sides["mmprefix"] = ours, our
    if compiled:  # for one shape only, it would be compiled for that one
        fewer = samples[: -(-len(samples) // 2)]
        other = our_batch(fewer, pixel_values[: fewer[-1].image + 1], size, vocab, visibility)
        for model in (ours,) if keeping is None else (ours, keeping):
            our_mean_loss(model, other).backward()
            model.zero_grad(set_to_none=True)

    memory, found = {}, {}
    for name, (model, loss) in sides.items():
        if compiled and name in ("mmprefix", "mmprefix, all kept"):  # what compiling takes is none of the pass's
            loss().backward()
            model.zero_grad(set_to_none=True)
        first, _ = peak_memory(model, loss, device, accumulates=False)
        every, value = peak_memory(model, loss, device)
        memory[name] = {"peak_memory": every, "peak_memory_first": first}
        found[name] = float(value), gradient_norm(model)
        model.zero_grad(set_to_none=True)
    if visibility == "full":
        expected = found["transformers"]
    else:
        # Compiled, a question alone would be shapes of its own.
        alone = uncompiled(partial(our_loss_alone, ours, samples, pixel_values, size, vocab, visibility))
        expected = float(alone), gradient_norm(ours)
        ours.zero_grad(set_to_none=True)
    for name in sides:
        reference = expected if name.startswith("mmprefix") else found["transformers"]
        check_equal(f"{case}: {name}", reference, found[name], dtype)
    if dtype == "float32":  # rounding in bfloat16 is as large as what a mask changes
        with torch.no_grad():
            causal = float(our_mean_loss(ours, our_batch(samples, pixel_values, size, vocab, "causal")))
        assert abs(causal - expected[0]) > 2 * TOLERANCE[dtype] * expected[0], "checked nothing: the mask must matter"

    values = take_turns(
        {
            name: partial(timed_step, model, loss, optimizers[model], targets, device)
            for name, (model, loss) in sides.items()
        },
        repeats,
    )
    for peer in sides:
        if peer != "mmprefix":
            for metric in values[peer]:
                yield peer, metric, values[peer][metric], values["mmprefix"][metric]
            for metric in memory[peer]:
                yield peer, metric, [memory[peer][metric]], [memory["mmprefix"][metric]]


def main() -> None:
    """All combinations of size, dtype and vocabulary, with the same models for all cases."""
    options = parse_arguments(__doc__, list(CASES), vocabs=(32_768, 257_152), compiles=True, compiles_peer=True)
    device = options.device
    with_liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    print_header(device)
    rows: list[Row] = []
    for name in options.sizes:
        for dtype in options.dtypes:
            for vocab in options.vocabs:
                size = SIZES[name]
                pair = build_pair(size, vocab, DTYPES[dtype], device)
                liger = Liger(pair[0]) if with_liger else None
                # At a rate of 0 all of its work is done, and the weights stay equal for the next case.
                optimizers: dict[nn.Module, torch.optim.Optimizer] = {
                    model: torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) for model in pair
                }
                if liger is not None:
                    optimizers[liger.model] = optimizers[pair[0]]  # the same parameters
                keeping = None
                if options.recompute:
                    keeping = copy.deepcopy(pair[1], {id(p): p for p in pair[1].parameters()})
                    optimizers[keeping] = optimizers[pair[1]]
                    checkpoint_activations(pair[1], options.recompute)
                if options.compile:
                    for model in (pair[1],) if keeping is None else (pair[1], keeping):
                        compile_layers(model)
                if options.compile_peer:
                    compile_theirs(pair[0])
                for case in options.cases:
                    for peer, metric, baseline, value in measure(
                        case,
                        pair,
                        liger,
                        keeping,
                        optimizers,
                        size,
                        vocab,
                        dtype,
                        device,
                        options.repeats,
                        options.compile,
                        options.compile_peer,
                    ):
                        rows.append(compare(
                            baseline, value, metric=metric, peer=peer, case=case, size=name,
                            device=device_name(device), dtype=dtype, vocab=vocab,
                        ))  # fmt: skip
                        print_row(rows[-1])
                        write_json(options.json, rows)
                del pair, liger, keeping, optimizers


if __name__ == "__main__":
    main()
