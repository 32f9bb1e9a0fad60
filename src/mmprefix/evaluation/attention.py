"""What a model computes of one sample: attention weights, the loss of each target token, and the words these form.

The one place of the evaluation that looks inside a model; `charts` draws, `visualize` joins the two.

The kernels that train (sdpa, and attention without a mask) never hold the weights. So the sample passes once more with
eager attention, the architecture's own and complete one: soft-cap, windows and sinks are in it, and its mask is the
dense form of the same plan. The decoder is switched for this pass and switched back; no copy is made. Each layer's
weights are taken where its attention returns them and let go at once, so that one layer's ``[H, T, T]`` are in memory.

Nothing is shown that isn't the model's: weights outside the prefix-LM rule, or a layer without weights, are errors.

Shapes: T tokens of the sample, M scored target tokens, H heads, V views of its images, R x C grid of image tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mmprefix.decoder import windows_of
from mmprefix.errors import InputError
from mmprefix.masks import PrefixVisibility, TokenIndex, dense_mask
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.packing import collate, map_tensors
from mmprefix.processing import MMPrefixProcessor
from mmprefix.sequence import Region, TokenSequence

_MAX_BYTES = 4  # of a character in UTF-8
_ROUNDING = 1e-2  # row sums in bfloat16
_PASS_COPIES = 4  # of a layer's [H, T, T] in float32, while it attends and is checked; 3.6 were measured
_GIB = 1 << 30
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Word:
    """Scored target tokens that are read as one.

    Attributes:
        text: as decoded, without white space around it.
        start, stop: which of the M labels.
    """

    text: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class SampleTrace:
    """One sample as a model computes it.

    Attributes:
        sequence: the sample's tokens, with one target.
        visibility: how prefix tokens see each other.
        texts: ``[T]``, text of each token; of image tokens an empty one.
        target: the target's text.
        generated: whether the model itself wrote the target, greedily.
        losses: float32 ``[M]``, cross-entropy of each target token, in nats.
        words: of the target, in order; together they are its M tokens.
        layers: numbers of the layers below, in order.
        attention: float32 ``[T, T]`` of each layer, queries by keys, mean over heads.
        heads: float32 ``[H, T, T]`` of each layer where they were asked for, else empty.
        views: how many views the encoder got of each image.
        grid: ``(R, C)`` of a view's image tokens, None where they form no grid.
        windows: how far the decoder's own windows or chunks reach, in tokens; empty where all layers see all.
    """

    sequence: TokenSequence
    visibility: PrefixVisibility
    texts: tuple[str, ...]
    target: str
    generated: bool
    losses: np.ndarray
    words: tuple[Word, ...]
    layers: tuple[int, ...]
    attention: tuple[np.ndarray, ...]
    heads: tuple[np.ndarray, ...]
    views: tuple[int, ...]
    grid: tuple[int, int] | None
    windows: tuple[int, ...] = ()

    @property
    def boundary(self) -> int:
        """Length of the prefix: the first target token."""
        return self.sequence.prefix_length

    @property
    def mean_loss(self) -> float:
        """Mean over the target's tokens, in nats: the loss that training reports of this sample."""
        return float(self.losses.mean(dtype=np.float64))

    @cached_property
    def visible(self) -> np.ndarray:
        """bool ``[T, T]``, the prefix-LM rule, queries by keys."""
        return _rule(self.sequence, self.visibility).numpy()

    def image_attention(self, word: Word) -> np.ndarray:
        """How the positions that predict a word attend to the image tokens, float32 ``[V * N]``, views in order.

        Mean over the word's tokens and the layers at hand. A token is predicted from the position in front of it, so
        the first one's attention is that of the last prefix token.
        """
        queries = self.sequence.label_positions[word.start : word.stop].numpy()
        keys = np.flatnonzero(self.sequence.regions.numpy() == Region.IMAGE)
        mean: np.ndarray = np.mean([layer[np.ix_(queries, keys)].mean(0) for layer in self.attention], axis=0)
        return mean

    def image_maps(self, word: Word) -> np.ndarray:
        """The same over patches, float32 ``[V, R, C]``.

        Raises:
            ValueError: image tokens that form no grid.
        """
        if self.grid is None:
            raise ValueError("expected image tokens that form a grid")
        return self.image_attention(word).reshape(-1, *self.grid)


def token_grid(model: MMPrefixForConditionalGeneration) -> tuple[int, int] | None:
    """Rows and columns of a view's image tokens as they leave the connector, row by row; None where they form no grid."""
    grid = model.config.vision_spec.grid
    if grid is None:
        return None
    factor = int(model.config.connector.get("factor", 2)) if model.config.connector["kind"] == "pixel_shuffle" else 1
    rows, columns = grid[0] // factor, grid[1] // factor
    return (rows, columns) if rows * columns == model.num_image_tokens else None


def trace_sample(
    model: MMPrefixForConditionalGeneration,
    processor: MMPrefixProcessor,
    images: Sequence[Image.Image],
    instruction: str | Sequence[str],
    target: str | None = None,
    *,
    layers: Collection[int] | None = None,
    heads: bool = False,
    max_new_tokens: int = 64,
) -> SampleTrace:
    """Passes one sample through the model and keeps what it computes.

    Args:
        model: with its decoder whole on one device; its mode and attention are as before when this returns.
        processor: the model's.
        images: of the sample, in order; may be empty.
        instruction: as `MMPrefixProcessor.encode` takes it.
        target: None for the model's own greedy answer.
        layers: numbers of the layers to keep, by default all. Each keeps ``T * T`` numbers, with ``heads`` H times that.
        heads: whether to keep each head's attention beside the mean.
        max_new_tokens: of a greedy answer.

    Raises:
        InputError: a layer that isn't there, a sample (with its answer) longer than the decoder's positions, a target
            without a token, more memory than is free, or a decoder whose attention weights are not to be had.
    """
    decoder: PreTrainedModel = model.decoder
    count = int(decoder.config.num_hidden_layers)
    wanted = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not wanted or wanted[0] < 0 or wanted[-1] >= count:
        raise InputError(f"layers: expected some of 0 to {count - 1}, got {', '.join(map(str, wanted)) or 'none'}")
    modes = [(module, module.training) for module in model.modules()]  # frozen parts have one of their own
    model.eval()
    try:
        with torch.no_grad():
            return _trace(model, processor, images, instruction, target, wanted, heads, max_new_tokens)
    finally:
        for module, mode in modes:
            module.training = mode


def _trace(
    model: MMPrefixForConditionalGeneration,
    processor: MMPrefixProcessor,
    images: Sequence[Image.Image],
    instruction: str | Sequence[str],
    target: str | None,
    wanted: tuple[int, ...],
    heads: bool,
    max_new_tokens: int,
) -> SampleTrace:
    pixels = [processor.transform.views(image) for image in images]
    views = [len(of_image) for of_image in pixels]
    sequence = processor.encode(instruction, () if target is None else (target,), views=views)
    length = len(sequence) + (max_new_tokens if target is None else 0)
    _check_length(model, length)
    _check_memory(model, length, len(wanted), heads)
    image_tokens = model.get_image_tokens(torch.cat(pixels).to(model.device)) if pixels else None
    if target is None:
        sequence = _answered(model, processor, sequence, image_tokens, max_new_tokens)
    batch = collate(
        [sequence], [tuple(range(sum(views)))], None, pad_id=processor.pad_id, visibility=model.config.prefix_visibility
    )
    batch = map_tensors(batch, lambda tensor: tensor.to(model.device))
    rule = _rule(sequence, model.config.prefix_visibility)
    kept = _Weights(wanted, heads, rule.to(model.device))
    with eager_attention(model.decoder), kept.taken_from(model.decoder):
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            image_tokens=image_tokens,
            plan=batch.plan,
            use_cache=False,
        ).logits
    kept.check(type(model.decoder).__name__, int(model.decoder.config.num_hidden_layers))
    losses = F.cross_entropy(logits.float(), sequence.labels.to(logits.device), reduction="none")
    text = processor.decode_generated(sequence.labels.unsqueeze(0))[0] if target is None else target
    return SampleTrace(
        sequence=sequence,
        visibility=model.config.prefix_visibility,
        texts=token_texts(processor.tokenizer, sequence),
        target=text,
        generated=target is None,
        losses=losses.cpu().numpy(),
        words=split_words(processor.tokenizer, sequence.labels.tolist()),
        layers=wanted,
        attention=tuple(kept.mean),
        heads=tuple(kept.heads),
        views=tuple(views),
        grid=token_grid(model),
        windows=tuple(sorted(set(windows_of(model.config.text_config).values()))),
    )


def _answered(
    model: MMPrefixForConditionalGeneration,
    processor: MMPrefixProcessor,
    prefix: TokenSequence,
    image_tokens: Tensor | None,
    max_new_tokens: int,
) -> TokenSequence:
    """The prefix with the model's greedy answer as its target, end included where the model wrote it."""
    ids = prefix.ids.unsqueeze(0).to(model.device)
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), image_tokens=image_tokens, max_new_tokens=max_new_tokens,
        do_sample=False, num_beams=1,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    end = processor.layout.eos
    answer = generated[: generated.index(end) + 1] if end in generated else generated
    # The ids themselves: a text that is tokenized again may become others.
    return TokenSequence.from_ids(processor.format.image_id, prefix.ids.tolist(), [answer])


def _check_length(model: MMPrefixForConditionalGeneration, length: int) -> None:
    """Learned position embeddings end somewhere, and an index behind them is an error deep in torch."""
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(model.decoder.config, name, None)
        if isinstance(limit, int) and length > limit:
            raise InputError(f"sample: expected at most {limit} tokens (the decoder's {name}), got {length}")


def _check_memory(model: MMPrefixForConditionalGeneration, length: int, layers: int, heads: bool) -> None:
    """Eager attention is quadratic: what would be killed for it, or would take the machine with it, is refused."""
    of_layer = int(model.decoder.config.num_attention_heads) * 4 * length**2
    passing = _PASS_COPIES * of_layer
    keeping = layers * (4 * length**2 + (of_layer if heads else 0))
    device = model.device
    needs = [(device, passing)] if device.type != "cpu" else []
    needs.append((torch.device("cpu"), keeping + (passing if device.type == "cpu" else 0)))
    for place, need in needs:
        free = free_memory(place)
        if free is None or need <= free:
            continue
        lower = ["a shorter prefix (smaller images, fewer tiles)"]
        if need - keeping <= free and place.type == "cpu":  # what is kept is too much, and that can be less
            lower = [*(["no heads"] if heads else []), *(["fewer layers"] if layers > 1 else []), *lower]
        of_heads = f" and their {of_layer // (4 * length**2)} heads" if heads else ""
        raise InputError(
            f"attention of {layers:,} layers{of_heads} over {length:,} tokens: expected at most {free / _GIB:.1f} GiB, what "
            f"is free on {place}, it needs {need / _GIB:.1f} GiB; ask for {', or '.join(lower)}"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take there; None where nothing says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = _MEMINFO.read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError, ValueError):  # a container's own limit; "max" is none
        found.append(int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text()))
    return min(found, default=None)


def _rule(sequence: TokenSequence, visibility: PrefixVisibility) -> Tensor:
    tokens = TokenIndex(
        torch.zeros_like(sequence.ids), sequence.branches, sequence.questions, sequence.regions, sequence.positions
    )
    return dense_mask(tokens, visibility)


@contextmanager
def eager_attention(decoder: nn.Module) -> Iterator[None]:
    """Inside the block, the decoder attends with its own eager attention, which makes weights. Not for two threads at once."""
    configs = {id(c): c for m in decoder.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            # Not `set_attn_implementation`: it refuses architectures (falcon) that read the config at each pass all the same.
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


class _Weights:
    """Takes each layer's attention weights where they are returned, keeps what is wanted, and checks them."""

    def __init__(self, wanted: Collection[int], heads: bool, rule: Tensor) -> None:
        """Settings.

        Args:
            wanted: numbers of layers to keep.
            heads: whether to keep each head's.
            rule: bool ``[T, T]``, the widest that any layer may see.
        """
        self.wanted, self.keep_heads, self.rule = frozenset(wanted), heads, rule
        self.layers = 0
        self.mean: list[np.ndarray] = []
        self.heads: list[np.ndarray] = []
        self.problem: str | None = None

    @contextmanager
    def taken_from(self, decoder: nn.Module) -> Iterator[None]:
        """Inside the block, weights that modules of the decoder return are taken, and are theirs no more."""
        hooks = [module.register_forward_hook(self._take) for module in decoder.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return None
        length = self.rule.shape[0]
        for place, value in enumerate(output[1:], 1):
            # The weights are the only thing of this shape that a module returns beside its output.
            if isinstance(value, Tensor) and value.shape[2:] == (length, length) and value.is_floating_point():
                self._add(value[0])
                # Nothing is left for those around it: some layers return the weights of their attention once more.
                return (*output[:place], value.new_empty(0), *output[place + 1 :])
        return None

    def _add(self, weights: Tensor) -> None:
        number, self.layers = self.layers, self.layers + 1
        weights = weights.float()
        sums = weights.sum(-1)
        if not bool(torch.isfinite(weights).all()):
            self.problem = self.problem or f"layer {number} has weights that are not finite"
        elif float(weights.masked_fill(self.rule, 0).abs().max()) > 0:
            self.problem = self.problem or f"layer {number} attends to what the prefix-LM rule hides"
        elif float(weights.min()) < 0 or float(sums.max()) > 1 + _ROUNDING or float(sums.min()) <= 0:
            self.problem = self.problem or f"layer {number} returns something else than shares of 1"
        if number in self.wanted:
            self.mean.append(weights.mean(0).cpu().numpy())
            if self.keep_heads:
                self.heads.append(weights.cpu().numpy())

    def check(self, name: str, count: int) -> None:
        """Raises InputError unless each of ``count`` layers gave weights that can be what it attends with."""
        if self.problem is None and self.layers != count:
            self.problem = f"{self.layers} of its {count} layers give attention weights"
        if self.problem is not None:
            raise InputError(f"{name}: expected attention weights of each layer under eager attention, {self.problem}")


def token_texts(tokenizer: Any, sequence: TokenSequence) -> tuple[str, ...]:
    """Text of each token ``[T]``, as it is read alone; of image tokens an empty one."""
    special = set(tokenizer.all_special_ids)
    texts: dict[int, str] = {}
    for id_ in set(sequence.ids[sequence.regions != Region.IMAGE].tolist()):
        texts[id_] = _decoded(tokenizer, [id_])
        if id_ in special or not texts[id_] or "\ufffd" in texts[id_]:  # a part of a character has a name only
            texts[id_] = str(tokenizer.convert_ids_to_tokens(id_))
    return tuple(
        "" if region == Region.IMAGE else texts[id_]
        for id_, region in zip(sequence.ids.tolist(), sequence.regions.tolist(), strict=True)
    )


def split_words(tokenizer: Any, ids: Sequence[int]) -> tuple[Word, ...]:
    """Token ids of a target -> its words, which together are all of them.

    White space parts words, and belongs to what stands behind it, at the end to what stands before it; a special token is a
    word of its own, and so is a character of a script that is written wide and without spaces (Unicode's East Asian width,
    UAX 11).
    """
    words: list[Word] = []
    is_open = False  # whether the last word may go on
    for start, stop, text, special in _units(tokenizer, ids):
        last = words[-1].text if words else ""
        if not is_open or special:
            joins = False
        elif not last.strip():
            joins = True
        else:
            joins = not (text[:1].isspace() or last[-1].isspace() or _is_wide(text[:1]) or _is_wide(last[-1]))
        if joins or (words and special and not last.strip()):
            words[-1] = Word(last + text, words[-1].start, stop)
        else:
            words.append(Word(text, start, stop))
        is_open = not special
    if len(words) > 1 and not words[-1].text.strip():  # nothing stands behind it
        blank, before = words.pop(), words.pop()
        words.append(Word(before.text, before.start, blank.stop))
    return tuple(Word(word.text.strip(), word.start, word.stop) for word in words)


def _units(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[int, int, str, bool]]:
    """Runs of tokens that hold whole characters: ``(start, stop, text, is special)``."""
    special = set(tokenizer.all_special_ids)
    start, stable = 0, ""
    for stop, id_ in enumerate(ids, 1):
        if id_ in special:
            if start < stop - 1:
                yield start, stop - 1, "", False
            yield stop - 1, stop, str(tokenizer.convert_ids_to_tokens(id_)), True
            start, stable = stop, _decoded(tokenizer, ids[:stop])
            continue
        whole = _decoded(tokenizer, ids[:stop])
        # In its place, not alone: many tokenizers decode a token that begins a text without the space in front of it.
        text = whole[len(stable) :] if whole.startswith(stable) else _decoded(tokenizer, ids[start:stop])
        if (text and not text.endswith("\ufffd")) or stop - start >= _MAX_BYTES:
            yield start, stop, text, False
            start, stable = stop, whole
    if start < len(ids):
        yield start, len(ids), _decoded(tokenizer, ids[start:]), False


def _is_wide(character: str) -> bool:
    return bool(character) and unicodedata.east_asian_width(character) in "WF"


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
