"""What the benchmarks share: two models with the same weights, interleaved times, peak memory, rows and their table.

The peer is transformers' `PaliGemmaForConditionalGeneration` with random weights and sdpa; ours is the same weights
through `interop.paligemma.convert_paligemma`. Nothing is loaded or downloaded.

- Times are taken in one process, the sides taking turns, so that a noisy machine disturbs all of them alike; medians
  are compared, smallest and largest shown.
- Peak memory is what a forward and backward pass needs on top of weights, gradients and optimizer state. Gradients are
  allocated before the pass, as in the second micro-batch of an accumulated step. On CUDA it is what the allocator
  counted; on a CPU what its allocator had given out (from the profiler), in a pass of its own that is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from mmprefix.interop.paligemma import convert_paligemma
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.sequence import PromptLayout

PAD, EOS, BOS, NEWLINE = range(4)
FIRST_TEXT_ID = 4
"""Ids below frame prompts; the last id of a vocabulary is the image placeholder; all others are text."""


@dataclass(frozen=True)
class Size:
    """Shape of a PaliGemma, and how many images a training step takes.

    Attributes:
        vision, text: of transformers' configs.
        images: of a step.
        peer_rows: how many rows transformers takes at a time at most; the others follow as further micro-batches.
    """

    vision: dict[str, int]
    text: dict[str, int]
    images: int
    peer_rows: int | None = None

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


def _vision(width: int, layers: int, heads: int, inner: int, patch: int, side: int = 224) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner,
        "patch_size": patch, "image_size": side,
    }  # fmt: skip


def _text(width: int, layers: int, heads: int, head_dim: int, inner: int) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 1,
        "head_dim": head_dim, "intermediate_size": inner,
    }  # fmt: skip


SIZES = {
    # Seconds, for CI: nothing about speed can be read from it. Its micro-batches, too, must add up to the same loss.
    "smoke": Size(_vision(48, 2, 4, 96, 14, side=56), _text(64, 2, 4, 16, 128), images=2, peer_rows=6),
    "tiny": Size(_vision(384, 6, 6, 1536, 16), _text(512, 6, 8, 64, 2048), images=2),
    "small": Size(_vision(768, 12, 12, 3072, 16), _text(1024, 12, 8, 128, 4096), images=4),
    # PaliGemma-3B at 224 px. Logits of more rows, and what is made of them, leave no room on 141 GB for two models.
    "3b": Size(_vision(1152, 27, 16, 4304, 14), _text(2048, 18, 8, 256, 16384), images=16, peer_rows=22),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMOKE_VOCAB = 512


def parse_arguments(
    description: str | None,
    cases: Sequence[str],
    vocabs: Sequence[int],
    images: bool = False,
    compiles: bool = False,
    compiles_peer: bool = False,
    simulates: bool = False,
) -> argparse.Namespace:
    """The options that all of these benchmarks take.

    Args:
        description: the script's docstring.
        cases: all of its cases; by default they all run.
        vocabs: default sizes of the vocabulary.
        images, compiles, compiles_peer: whether it takes `--images`, `--compile` and `--recompute`, `--compile-peer`.
        simulates: whether defaults are a GPU's without one.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a model of a few thousand weights: does the script work?")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: tiny on a CPU, 3b on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--vocabs", nargs="+", type=int, default=list(vocabs))
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rows")
    if images:
        parser.add_argument("--images", nargs="+", type=int, help="images of a step; default: the size's")
    if compiles:
        parser.add_argument("--compile", action="store_true", help="ours with compiled layers")
        parser.add_argument("--recompute", choices=["elementwise"], help="ours with this model.gradient_checkpointing")
    if compiles_peer:
        parser.add_argument("--compile-peer", action="store_true", help="transformers' layers, too")
    options = parser.parse_args()
    options.device = torch.device(options.device)
    on_gpu = simulates or options.device.type == "cuda"
    options.sizes = options.sizes or ["3b" if on_gpu else "tiny"]
    options.dtypes = options.dtypes or ["bfloat16" if on_gpu else "float32"]
    if options.smoke:
        options.sizes, options.dtypes, options.vocabs, options.repeats = ["smoke"], ["float32"], [SMOKE_VOCAB], 2
        if images:
            options.images = None
    return options


# --- models


def build_theirs(size: Size, vocab: int, dtype: torch.dtype, device: torch.device) -> PaliGemmaForConditionalGeneration:
    """transformers' model with random weights, always the same ones."""
    config = PaliGemmaConfig(
        vision_config={
            **size.vision, "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": False,
        },
        text_config={**size.text, "model_type": "gemma", "vocab_size": vocab, "max_position_embeddings": 8192},
        image_token_index=vocab - 1, projection_dim=size.text["hidden_size"], hidden_size=size.text["hidden_size"],
        vocab_size=vocab, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        theirs = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # The library starts weights so small that attention is nearly uniform, and no check of a loss would
            # notice a wrong mask. Tied embeddings stay as they are: larger ones make every token predict itself.
            if parameter.ndim >= 2 and "embed_tokens" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    theirs.generation_config.update(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
    return theirs.train()


def build_pair(
    size: Size, vocab: int, dtype: torch.dtype, device: torch.device
) -> tuple[PaliGemmaForConditionalGeneration, MMPrefixForConditionalGeneration]:
    """transformers' model and ours, with equal weights that they don't share."""
    theirs = build_theirs(size, vocab, dtype, device)
    # The conversion takes apart what it is given.
    return theirs, convert_paligemma(copy.deepcopy(theirs)).train()


def layout(vocab: int) -> PromptLayout:
    """PaliGemma's: image tokens, BOS, text, newline, target, EOS."""
    return PromptLayout(image=vocab - 1, bos=BOS, separator=(NEWLINE,), eos=EOS)


def random_images(count: int, size: Size, device: torch.device) -> Tensor:
    """Normalised noise, float32 ``[count, 3, H, W]``."""
    side = size.vision["image_size"]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)


def random_text(length: int, vocab: int, generator: torch.Generator) -> list[int]:
    """Token ids of a text."""
    return torch.randint(FIRST_TEXT_ID, vocab - 1, (length,), generator=generator).tolist()


# --- time

Side = TypeVar("Side", bound=Hashable)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(
    sides: Mapping[Side, Callable[[], dict[str, float]]], repeats: int
) -> dict[Side, dict[str, list[float]]]:
    """Runs the sides by turns, after one untimed run each.

    Args:
        sides: for each a function that runs it once and returns what it measured, by metric.
        repeats: measured runs of each.

    Returns:
        side -> metric -> one value for each run.
    """
    values: dict[Side, dict[str, list[float]]] = {name: {} for name in sides}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-1, repeats):
            for name, run in sides.items():
                for metric, value in run().items():
                    if turn >= 0:
                        values[name].setdefault(metric, []).append(value)
    finally:
        gc.enable()
    return values


# --- memory


def _allocator_peak(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Most bytes that the CPU allocator had given out at one time during ``run``, above what it had before.

    From the profiler's record of every allocation, those inside of operators included.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        value = run()
    live = peak = 0
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert changes, "the profiler saw no allocation"
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, value


def peak_memory(
    model: nn.Module, loss: Callable[[], Tensor], device: torch.device, accumulates: bool = True
) -> tuple[int, Tensor]:
    """Peak bytes of a forward and backward pass above weights, gradients and optimizer state, and the loss.

    Leaves the pass's gradients behind.

    Args:
        model: whose parameters learn.
        loss: of a batch.
        device: the model's.
        accumulates: whether gradients of an earlier micro-batch are there already; otherwise the pass makes them, and
            their bytes are taken off the peak: while logits are there, gradients are not yet.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if accumulates else None
    made = 0 if accumulates else sum(parameter.numel() * parameter.itemsize for parameter in trained)
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        value = loss()
        value.backward()
        return torch.cuda.max_memory_allocated(device) - before - made, value.detach()

    def forward_and_backward() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    peak, value = _allocator_peak(forward_and_backward)
    return peak - made, value


# --- rows


@dataclass
class Row:
    """One measured comparison.

    Attributes:
        case, size, device, dtype, vocab: what was run.
        metric: what was measured, its unit in the name.
        peer: whose value ``baseline`` is.
        baseline, value: medians, the peer's and ours.
        ratio: value / baseline. Above 1 is good for what is counted per second, below 1 for bytes and seconds.
        baseline_range, value_range: smallest and largest.
        command, versions: how to get it again, and on what.
    """

    case: str
    size: str
    device: str
    dtype: str
    vocab: int
    metric: str
    peer: str
    baseline: float
    value: float
    ratio: float
    baseline_range: tuple[float, float]
    value_range: tuple[float, float]
    command: str = field(default_factory=lambda: " ".join(["python", *sys.argv]))
    versions: str = field(default_factory=lambda: versions())


def compare(baseline: Iterable[float], value: Iterable[float], *, metric: str, peer: str, **what: Any) -> Row:
    """The row of two series of measurements.

    Args:
        baseline, value: measurements of the peer and of ours.
        metric, peer: see `Row`.
        what: case, size, device, dtype and vocab.
    """
    baseline, value = list(baseline), list(value)
    medians = statistics.median(baseline), statistics.median(value)
    return Row(
        **what, metric=metric, peer=peer, baseline=medians[0], value=medians[1], ratio=medians[1] / medians[0],
        baseline_range=(min(baseline), max(baseline)), value_range=(min(value), max(value)),
    )  # fmt: skip


def device_name(device: torch.device) -> str:
    """``cpu``, or what the GPU calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions() -> str:
    """What the numbers depend on: libraries, Python, processor, threads."""
    found = []
    for name in ("torch", "transformers", "timm", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return ", ".join([*found, f"Python {platform.python_version()}", machine])


COLUMNS = ("case", "size", "dtype", "vocab", "metric", "peer", "peer's (min-max)", "mmprefix (min-max)", "ratio")


def print_header(device: torch.device) -> None:
    """Versions, device, and the head of the table."""
    print(f"{versions()}; {device_name(device)}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)


def print_row(row: Row) -> None:
    """One line of the table, as soon as it is known: a run that is cut short shows what it had."""
    cells = (
        row.case, row.size, row.dtype, row.vocab, row.metric, row.peer,
        _with_range(row.baseline, row.baseline_range, row.metric), _with_range(row.value, row.value_range, row.metric),
        f"**{row.ratio:.2f}**",
    )  # fmt: skip
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _with_range(median: float, between: tuple[float, float], metric: str) -> str:
    def short(value: float) -> str:
        if metric.startswith("peak_memory"):
            mebibytes = value / 2**20
            return f"{mebibytes:,.{0 if mebibytes >= 100 else 1}f} MiB"
        return f"{value:.4g}"

    if between[0] == between[1]:
        return short(median)
    return f"{short(median)} ({short(between[0])}-{short(between[1])})"


def write_json(path: Path | None, rows: Sequence[Row]) -> None:
    """The rows as a JSON list; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
