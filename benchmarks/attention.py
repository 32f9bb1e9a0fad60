#!/usr/bin/env python3
"""Our attention without a mask against a dense mask, FlexAttention and pure causal attention, on the same tokens.

    python benchmarks/attention.py                                     256 to 4k, float32, on a CPU
    python benchmarks/attention.py --lengths 16384 --repeats 1 --device cpu          minutes
    python benchmarks/attention.py --dtypes bfloat16 --lengths 256 16384             on a GPU: 256 to 16k by default
    python benchmarks/attention.py --smoke                             seconds: checks that the benchmark works
    python benchmarks/attention.py --json rows.json

A length is that of a batch's longest sample; the shortest has a quarter of it, the others lie evenly between, in random
order, with a seed. A batch has as many samples as would fill `TOKENS` if all were longest, at least `MIN_SAMPLES`.

Cases, as shares of a sample's tokens:
    long_targets    a prefix of 1/4, one target; visibility full
    long_prefixes   a prefix of 7/8, one target; full
    captions        a prefix of 1/2, 5 targets that don't see each other; full
    questions       an image of 1/2, 4 questions on it, each 3/4 instruction and 1/4 answer; nested

Sides:
    mmprefix          one packed row through `MaskFree.attend`, as in a training step without torch.compile: gathering
                      keys and joining the calls' outputs is part of the time
    dense mask        a padded row for each sample, a bool mask, transformers' own sdpa function (which repeats keys
                      and values for each query head where there is a mask). Several targets or questions share their
                      row, too: whole rows for each would cost more
    FlexAttention     our packed row, the same rule as a block mask, compiled; CUDA only
    pure causal       whole samples, each token sees all before it. On CUDA one call of the flash kernel over all of
                      them, the one that ours calls; on the CPU sdpa for each sample. This computes something else: it
                      is what the rule costs beside a text-only decoder's attention

Before any time is taken, outputs and gradients of all tokens must be equal to ours, the largest difference against the
largest value, within `TOLERANCE`; those of pure causal attention must differ. Where gradients don't exist
(FlexAttention on the CPU), outputs of short rows are compared and nothing is timed.

Masks, block masks and index maps are made once for a batch and all of its layers, and are not in the times.

Metrics (seconds, medians):
    seconds                       forward and backward
    forward_s, backward_s         its parts
    ns_per_pair                   beside pure causal attention only: nanoseconds for each pair of query and key that
                                  the side's own rule lets see each other. With one target and a share f of prefix,
                                  the prefix-LM rule has 1 + f^2 times the pairs of the causal one: 1.06 in
                                  long_targets, 1.77 in long_prefixes; in captions it has 1.05, in questions 1.1 times
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from side_by_side import DTYPES, Row, compare, device_name, now, print_header, print_row, take_turns, write_json
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmprefix.attention import MaskFree, plan_mask_function
from mmprefix.masks import PrefixVisibility, dense_mask
from mmprefix.packing import collate, map_tensors
from mmprefix.sequence import PromptLayout, TokenSequence
from mmprefix.varlen import NO_WINDOW

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
"""Of the largest absolute value. bfloat16 has 8 bits, and sides add up in different orders."""

TOKENS = {"cpu": 4096, "cuda": 32_768}
MIN_SAMPLES = 4
SHORTEST = 128
"""A quarter of it has a token for everything that a case's smallest sample holds."""
FLEX_ON_CPU = 1024
"""Tokens of a row up to which FlexAttention's outputs are compared without a compiler: it draws all scores."""


class Heads(NamedTuple):
    """Query heads, key-value heads and their size."""

    query: int
    key_value: int
    size: int


SHAPES = {
    "smoke": Heads(4, 2, 16),
    "8/1/64": Heads(8, 1, 64),
    "8/1/256": Heads(8, 1, 256),  # PaliGemma
    "32/8/128": Heads(32, 8, 128),  # Llama 3
}


# --- samples

_TEXT = 1
_LAYOUT = PromptLayout(image=0, bos=None, separator=(), eos=2)


def _sample(image: int, instruction: int, *targets: int) -> TokenSequence:
    """By lengths; EOS is part of a target."""
    return TokenSequence.build(_LAYOUT, image, [_TEXT] * instruction, [[_TEXT] * (length - 1) for length in targets])


def long_targets(total: int) -> TokenSequence:
    """A short prefix."""
    return _sample(0, total // 4, total - total // 4)


def long_prefixes(total: int) -> TokenSequence:
    """A short target."""
    return _sample(0, total - total // 8, total // 8)


def captions(total: int) -> TokenSequence:
    """Five targets of one prefix."""
    target = total // 2 // 5
    return _sample(0, total - 5 * target, *[target] * 5)


def questions(total: int) -> TokenSequence:
    """Four questions on one image."""
    question = total // 2 // 4
    target = max(2, question // 4)
    return TokenSequence.on_one_image([_sample(total - 4 * question, question - target, target)] * 4)


@dataclass(frozen=True)
class Case:
    """How a sample of so many tokens is made, and the rule that it is seen with."""

    sample: Callable[[int], TokenSequence]
    visibility: PrefixVisibility = "full"


CASES = {
    "long_targets": Case(long_targets),
    "long_prefixes": Case(long_prefixes),
    "captions": Case(captions),
    "questions": Case(questions, "nested"),
}


def ragged(length: int, tokens: int) -> list[int]:
    """Lengths of samples: evenly from a quarter of the longest to the longest."""
    count = max(MIN_SAMPLES, tokens // length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(length))
    return torch.linspace(length / 4, length, count).round().long()[order].tolist()


# --- sides


class Side(NamedTuple):
    """One way to compute attention.

    Attributes:
        columns: int64 ``[B, T]``, the number of the token (of all samples, joined) in each column; -1 for padding.
        attend: ``[B, H, T, D]`` and twice ``[B, G, T, D]`` -> ``[B, T, H, D]``.
        pairs: how many (query, key) pairs its rule lets see each other.
    """

    columns: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    pairs: int


class _Layer(torch.nn.Module):
    """What transformers' function reads of an attention layer."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.num_key_value_groups = heads.query // heads.key_value
        self.is_causal = True


def mask_free(sequences: list[TokenSequence], visibility: PrefixVisibility, device: torch.device) -> Side:
    """Ours."""
    batch = map_tensors(
        collate(sequences, range(len(sequences)), None, pad_id=-1, visibility=visibility, packed=True),
        lambda t: t.to(device),
    )
    mask = MaskFree(batch.plan, NO_WINDOW, refusal=None, make_dense=lambda: None)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        refusal = mask.refuses(query, key, value, 0.0, {})
        assert refusal is None, refusal
        return mask.attend(query, key, value, None)

    return Side(batch.input_ids, attend, batch.visible_pairs)


def masked(
    sequences: list[TokenSequence], visibility: PrefixVisibility, heads: Heads, device: torch.device
) -> Side:  # fmt: skip
    """A dense mask over padded rows."""
    batch = map_tensors(
        collate(sequences, range(len(sequences)), None, pad_id=-1, visibility=visibility), lambda t: t.to(device)
    )
    itself = torch.eye(batch.input_ids.shape[1], dtype=torch.bool, device=device)  # padding would see nothing
    mask = (dense_mask(batch.plan.tokens, visibility) | itself).unsqueeze(1)
    layer = _Layer(heads)
    return Side(
        batch.input_ids,
        lambda query, key, value: sdpa_attention_forward(layer, query, key, value, mask)[0],
        batch.visible_pairs,
    )


@cache
def _compiled_flex() -> Callable[..., Any]:
    # One compilation for each shape and rule, and one more once lengths change. Past the limit, or with a broken graph,
    # all scores would be drawn: better an error.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, fullgraph=True)


def block_masked(
    sequences: list[TokenSequence], visibility: PrefixVisibility, heads: Heads, device: torch.device
) -> Side:  # fmt: skip
    """FlexAttention over our packed row; on the CPU the slow function that it compiles."""
    batch = map_tensors(
        collate(sequences, range(len(sequences)), None, pad_id=-1, visibility=visibility, packed=True),
        lambda t: t.to(device),
    )
    tokens = batch.input_ids.shape[1]
    rule = plan_mask_function(batch.plan, lambda batch, head, query, key: key <= query)
    mask = create_block_mask(rule, 1, None, tokens, tokens, device=device)
    function = _compiled_flex() if device.type == "cuda" else flex_attention
    grouped = heads.query > heads.key_value

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(query, key, value, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return Side(batch.input_ids, attend, batch.visible_pairs)


def pure_causal(sequences: list[TokenSequence], heads: Heads, device: torch.device) -> Side:
    """Every token sees all of its sample up to itself."""
    lengths = [len(sequence) for sequence in sequences]
    cumulative = torch.tensor([0, *lengths]).cumsum(0)
    cu, longest = cumulative.int().to(device), max(lengths)
    layer = _Layer(heads)
    # Later releases want to be told of grouped queries, which all take.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **grouped).unsqueeze(0)

    def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        samples = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
        return torch.cat([sdpa_attention_forward(layer, q, k, v, None)[0] for q, k, v in samples], 1)

    columns = torch.arange(sum(lengths), device=device).unsqueeze(0)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Side(columns, packed if device.type == "cuda" else one_by_one, pairs)


# --- measuring


class Run:
    """One side with its inputs, in the layout in which a decoder's projections leave them.

    Args:
        side: what to run.
        values: query, key, value and the output's gradient of all tokens, joined, ``[N, heads, D]``.
    """

    def __init__(self, side: Side, values: tuple[Tensor, ...]) -> None:
        self.side = side
        self._is_token = side.columns >= 0
        *inputs, self._grad = (self._placed(x) for x in values)
        self._inputs = [x.requires_grad_() for x in inputs]

    def _placed(self, x: Tensor) -> Tensor:
        return torch.where(self._is_token[..., None, None], x[self.side.columns.clamp(min=0)], 0)

    def _joined(self, x: Tensor) -> Tensor:
        joined = torch.empty_like(x[self._is_token])
        joined[self.side.columns[self._is_token]] = x[self._is_token]
        return joined.float()

    def _forward(self, inputs: list[Tensor]) -> Tensor:
        return self.side.attend(*(x.transpose(1, 2) for x in inputs))

    def output(self) -> dict[str, Tensor]:
        """Of all tokens, joined, float32, without gradients."""
        return {"output": self._joined(self._forward([x.detach() for x in self._inputs]))}

    def results(self) -> dict[str, Tensor]:
        """Output and gradients of all tokens, joined, float32."""
        output = self._forward(self._inputs)
        found = torch.autograd.grad(output, self._inputs, self._grad)
        names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
        return {name: self._joined(x) for name, x in zip(names, (output.detach(), *found), strict=True)}

    def timed(self) -> dict[str, float]:
        """One forward and backward pass."""
        device = self._grad.device
        start = now(device)
        output = self._forward(self._inputs)
        middle = now(device)
        torch.autograd.grad(output, self._inputs, self._grad)
        end = now(device)
        return {"seconds": end - start, "forward_s": middle - start, "backward_s": end - middle}


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Of the largest absolute value; NaN if there is one."""
    return float((a - b).abs().max() / a.abs().max())


def check_equal(name: str, expected: dict[str, Tensor], found: dict[str, Tensor], dtype: str) -> None:
    """Stops the benchmark unless all that was found is as expected."""
    for what, value in found.items():
        difference = largest_difference(expected[what], value)
        if not difference <= TOLERANCE[dtype]:  # also true of NaN
            raise SystemExit(f"{name}, {what}: differs from ours by {difference:.2g}, more than {TOLERANCE[dtype]:g}")


def measure(
    name: str, length: int, heads: Heads, dtype: str, device: torch.device, tokens: int, repeats: int,
    with_flex: bool,
) -> Iterator[tuple[str, str, list[float], list[float]]]:  # fmt: skip
    """Checks, measures, and yields ``(peer, metric, peer's values, ours)``."""
    case = CASES[name]
    sequences, start = [], 0
    for total in ragged(length, tokens):
        sequence = case.sample(total)
        # A token's id is its number, by which columns of different layouts are compared.
        sequences.append(replace(sequence, ids=torch.arange(start, start + len(sequence))))
        start += len(sequence)
    generator = torch.Generator().manual_seed(0)
    values = tuple(
        torch.randn(start, number, heads.size, generator=generator).to(device, DTYPES[dtype])
        for number in (heads.query, heads.key_value, heads.key_value, heads.query)
    )
    runs = {"mmprefix": Run(mask_free(sequences, case.visibility, device), values)}
    expected = runs["mmprefix"].results()

    runs["dense mask"] = Run(masked(sequences, case.visibility, heads, device), values)
    check_equal(f"{name}={length}: dense mask", expected, runs["dense mask"].results(), dtype)
    if with_flex and (device.type == "cuda" or start <= FLEX_ON_CPU):
        flex = Run(block_masked(sequences, case.visibility, heads, device), values)
        try:
            found = flex.results() if device.type == "cuda" else flex.output()
        except RuntimeError as e:  # also those of its compiler: not every shape has a kernel on every GPU
            print_unmeasured(f"{name}={length}", dtype, "FlexAttention", str(e).strip().partition("\n")[0])
        else:
            check_equal(f"{name}={length}: FlexAttention", expected, found, dtype)
            if device.type == "cuda":
                runs["FlexAttention"] = flex
    causal = Run(pure_causal(sequences, heads, device), values)
    different = largest_difference(expected["output"], causal.output()["output"])
    assert different > 2 * TOLERANCE[dtype], "checked nothing: the rule must matter"
    runs["pure causal"] = causal
    del expected

    times = take_turns({side: run.timed for side, run in runs.items()}, repeats)
    for peer in runs:
        if peer != "mmprefix":
            for metric in times[peer]:
                yield peer, metric, times[peer][metric], times["mmprefix"][metric]
    yield (
        "pure causal", "ns_per_pair",
        *([1e9 * t / runs[side].side.pairs for t in times[side]["seconds"]] for side in ("pure causal", "mmprefix")),
    )  # fmt: skip


def print_unmeasured(case: str, dtype: str, peer: str, reason: str) -> None:
    """A line of the table for what has no time."""
    print(f"| {case} | | {dtype} | | | {peer} | {reason} | | |", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The options; by default what the device can do in minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one short length: does the script work?")
    parser.add_argument("--lengths", nargs="+", type=int, help="default: 256 to 4096 on a CPU, to 16384 on a GPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="query heads / key-value heads / size")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--no-flex", action="store_true", help="without FlexAttention, whose compilation takes most of the time"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="default: 5 on a CPU, 10 on a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rows")
    options = parser.parse_args()
    options.device = torch.device(options.device)
    on_gpu = options.device.type == "cuda"
    options.tokens = TOKENS[options.device.type]
    options.lengths = options.lengths or [2**n for n in range(8, 15 if on_gpu else 13)]
    options.shapes = options.shapes or (["8/1/256", "32/8/128"] if on_gpu else ["8/1/64"])
    options.dtypes = options.dtypes or ["bfloat16" if on_gpu else "float32"]
    options.repeats = options.repeats or (10 if on_gpu else 5)
    if options.smoke:
        options.lengths, options.shapes, options.repeats, options.tokens = [SHORTEST], ["smoke"], 2, 0
        options.dtypes = ["bfloat16" if on_gpu else "float32"]  # the kernel on CUDA takes no float32
    if min(options.lengths) < SHORTEST:
        parser.error(f"expected lengths of at least {SHORTEST}, got {min(options.lengths)}")
    return options


def main() -> None:
    """All combinations, the shortest samples first."""
    options = parse_arguments()
    device = options.device
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # on the CPU that is meant
    print_header(device)
    rows: list[Row] = []
    for dtype in options.dtypes:
        if device.type != "cuda":
            print_unmeasured("all", dtype, "FlexAttention", f"no backward on the {device.type.upper()}")
        for length in options.lengths:
            for shape in options.shapes:
                for case in options.cases:
                    for peer, metric, baseline, value in measure(
                        case, length, SHAPES[shape], dtype, device, options.tokens, options.repeats, not options.no_flex
                    ):
                        rows.append(compare(
                            baseline, value, metric=metric, peer=peer, case=f"{case}={length}", size=shape,
                            device=device_name(device), dtype=dtype, vocab=0,
                        ))  # fmt: skip
                        print_row(rows[-1])
                        write_json(options.json, rows)


if __name__ == "__main__":
    main()
