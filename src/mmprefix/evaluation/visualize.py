"""Pictures of what a model does with one sample: its mask, each layer's attention, words over patches, losses.

`sample_pictures` is all that others need; `attention` looks inside the model, `charts` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmprefix.evaluation.attention import SampleTrace, trace_sample
from mmprefix.evaluation.charts import (
    REGION_COLOURS,
    TokenAxis,
    WordMap,
    attention_chart,
    heads_chart,
    loss_chart,
    mask_chart,
    percent,
    printable,
    word_charts,
)
from mmprefix.evaluation.drawings import Drawing
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.processing import MMPrefixProcessor
from mmprefix.vision import ImageTransform, as_picture

_REGIONS = tuple(REGION_COLOURS)
_READING = (
    "A row is a query's attention to all keys; colour stands for the square root of a share. "
    "White: hidden by the prefix-LM rule."
)
_SINKS = "Rows sum to {low:.2f} to {high:.2f}: the rest goes to the decoder's attention sinks."


@dataclass(frozen=True, eq=False)
class SamplePictures:
    """Pictures of one sample.

    Attributes:
        pictures: RGB, by name: `mask`, `loss`, `words` (or `words-1`, ... in pages), `attention-layer-00`, ...,
            `attention-layer-00-heads`, ...
        missing: name -> why there is no such picture.
        trace: what they are made of.
    """

    pictures: dict[str, Image.Image]
    missing: dict[str, str]
    trace: SampleTrace


def sample_pictures(
    model: MMPrefixForConditionalGeneration,
    processor: MMPrefixProcessor,
    images: Sequence[Image.Image],
    instruction: str | Sequence[str],
    target: str | None = None,
    *,
    layers: Collection[int] | None = None,
    heads: bool = False,
    max_new_tokens: int = 64,
) -> SamplePictures:
    """All pictures of one sample; arguments and errors are those of `attention.trace_sample`."""
    trace = trace_sample(
        model, processor, images, instruction, target, layers=layers, heads=heads, max_new_tokens=max_new_tokens
    )
    pictures, missing = draw_trace(trace, view_pictures(images, processor.transform))
    return SamplePictures(pictures, missing, trace)


def view_pictures(images: Sequence[Image.Image], transform: ImageTransform) -> list[Image.Image]:
    """A picture for each view of each image, over which the view's patches lie evenly.

    The whole image as it is, where the encoder gets it squashed; else what the encoder gets: a part, or margins, too.
    """
    pictures = []
    for image in images:
        if transform.resize_mode == "squash":
            pictures.append(image.convert("RGB"))
        else:
            pictures += [as_picture(view) for view in transform.views(image)]
    return pictures


def draw_trace(
    trace: SampleTrace, pictures_of_views: Sequence[Image.Image]
) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Pictures by name, and why others are missing; see `SamplePictures`.

    Args:
        trace: of a sample.
        pictures_of_views: from `view_pictures`.
    """
    sequence = trace.sequence
    regions = [_REGIONS[region] for region in sequence.regions.tolist()]
    texts = [printable(text) for text in trace.texts]
    axis, small = (TokenAxis.of(regions, texts, trace.boundary, scale) for scale in (1.0, 0.25))
    whose = "the model's own answer" if trace.generated else "the given target"
    of_target = [texts[trace.boundary + n] for n in range(len(trace.losses))]
    windows = [size for size in trace.windows if size < len(sequence)]
    more = [f"Some layers see less, through a window of {windows[0]} tokens of their own."] if windows else []
    pictures = {
        "mask": mask_chart(
            trace.visible, axis, f"Mask: {trace.visibility} prefix, {len(sequence)} tokens",
            ["A row's query sees the keys that are coloured in it.", *more],
        ),
        "loss": loss_chart(
            trace.losses, of_target, "Loss of each target token",
            [f"Cross-entropy in nats, of {whose}; a space is shown as a dot."],
        ),
    }  # fmt: skip
    missing = {}
    if not pictures_of_views:
        missing["words"] = "the sample has no image, so there are no patches for words to attend to"
    elif trace.grid is None:
        missing["words"] = "the encoder's image tokens form no grid to lay over a picture"
    else:
        maps = [WordMap(word.text, trace.image_maps(word)) for word in trace.words]
        depth = f"layer {trace.layers[0]}" if len(trace.layers) == 1 else f"{len(trace.layers)} layers"
        notes = [
            f"Each word of {whose}, over {trace.grid[0]} x {trace.grid[1]} patches: attention of the positions that predict "
            f"its tokens, mean over these, all heads and {depth}. Shares are of all that is attended to."
        ]
        pages = word_charts(maps, pictures_of_views, "Words over the picture", notes)
        names = ["words"] if len(pages) == 1 else [f"words-{number}" for number in range(1, len(pages) + 1)]
        pictures |= dict(zip(names, pages, strict=True))
    for place, layer in enumerate(trace.layers):
        mean, heads = trace.attention[place], trace.heads[place] if trace.heads else None
        notes = [_READING, *more, *_of_sinks(mean)]
        name = f"attention-layer-{layer:02d}"
        pictures[name] = attention_chart(
            mean, trace.visible, axis, f"Attention of layer {layer}, mean over heads", notes
        )
        if heads is not None:
            pictures[f"{name}-heads"] = heads_chart(
                heads, trace.visible, small, f"Attention of layer {layer}, {len(heads)} heads", notes
            )
    return pictures, missing


_SPELLED = 40  # tokens or words whose numbers are said in words


def in_words(trace: SampleTrace) -> dict[str, str]:
    """What the pictures of `draw_trace` show, by name, for those who can't see them; pages of `words` have one text."""
    regions = trace.sequence.regions.numpy()
    counts = ", ".join(f"{int((regions == n).sum())} {name}" for n, name in enumerate(_REGIONS))
    tokens = [
        f"{printable(text)} {loss:.2f}" for text, loss in zip(trace.texts[trace.boundary :], trace.losses, strict=True)
    ]
    texts = {
        "mask": f"Which token sees which: {trace.visibility} prefix of {trace.boundary} tokens; tokens: {counts}.",
        "loss": f"Loss of each target token in nats: {_spelled(tokens)}. Mean {trace.mean_loss:.2f}.",
    }
    if trace.grid is not None and trace.views:
        words = [f"{printable(word.text)} {percent(float(trace.image_attention(word).sum()))}" for word in trace.words]
        texts["words"] = f"For each word of the target, what share of attention goes to the image: {_spelled(words)}."
    for layer, attention in zip(trace.layers, trace.attention, strict=True):
        of_target = attention[trace.sequence.label_positions.numpy()].mean(0)
        shares = (f"{percent(float(of_target[regions == n].sum()))} to the {name}" for n, name in enumerate(_REGIONS))
        texts[f"attention-layer-{layer:02d}"] = (
            f"Attention of layer {layer}, mean over heads: the positions that predict the target give {', '.join(shares)}."
        )
    return texts


def _spelled(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - _SPELLED} more" if len(parts) > _SPELLED else ""
    return "; ".join(parts[:_SPELLED]) + more


def draw_answer(
    model: MMPrefixForConditionalGeneration,
    processor: MMPrefixProcessor,
    images: Sequence[Image.Image],
    instruction: str | Sequence[str],
    answer: str,
    reference: str | None = None,
    layers: int = 4,
) -> tuple[tuple[Drawing, ...], tuple[str, ...]]:
    """Drawings of an answer for a page, and why others are missing.

    Args:
        model, processor, images, instruction: as `attention.trace_sample` takes them.
        answer: the model's; of an empty one, what it says greedily is drawn.
        reference: what was expected where that is something else: the loss of that is drawn beside the answer's.
        layers: how many to show at most, evenly from the first to the last. Words are over the mean of all layers.

    Raises:
        InputError: as `attention.trace_sample`.
    """
    drawn = sample_pictures(model, processor, images, instruction, answer or None)
    trace = drawn.trace
    shown = {trace.layers[round(n)] for n in np.linspace(0, len(trace.layers) - 1, min(layers, len(trace.layers)))}
    hidden = {f"attention-layer-{layer:02d}" for layer in trace.layers if layer not in shown}
    words, order = in_words(trace), ("words", "loss", "mask", "attention")
    found = []
    for name in sorted(drawn.pictures, key=lambda name: (order.index(name.split("-")[0]), len(name), name)):
        if name not in hidden:
            kind = "words" if name.startswith("words") else name
            found.append(
                Drawing(_TITLES[name.split("-")[0]](trace, name), words[kind], drawn.pictures[name], kind == "words")
            )
        if name == "loss" and reference:
            other = sample_pictures(model, processor, images, instruction, reference, layers=[0])
            title = f"Loss of what was expected: {printable(reference)[:80]}"
            found.append(Drawing(title, in_words(other.trace)["loss"], other.pictures["loss"]))
    return tuple(found), tuple(f"No {name}: {reason}." for name, reason in drawn.missing.items())


_TITLES: dict[str, Callable[[SampleTrace, str], str]] = {
    "words": lambda trace, name: f"Where the answer's words look, mean of {len(trace.layers)} layers",
    "loss": lambda trace, name: "Loss of the answer",
    "mask": lambda trace, name: "Mask",
    "attention": lambda trace, name: f"Attention of layer {int(name.rpartition('-')[2])}",
}


def _of_sinks(attention: np.ndarray) -> list[str]:
    sums = attention.sum(-1)
    low, high = float(sums.min()), float(sums.max())
    return [_SINKS.format(low=low, high=high)] if low < 0.99 else []


def as_json(trace: SampleTrace) -> dict[str, Any]:
    """Losses of tokens and words, and attention of words to the image, as plain values."""
    words = []
    has_image = trace.sequence.num_image_tokens > 0
    for word in trace.words:
        share = float(trace.image_attention(word).sum()) if has_image else None
        loss = float(trace.losses[word.start : word.stop].sum(dtype=np.float64))
        words.append({"text": word.text, "first": word.start, "tokens": word.stop - word.start, "loss": loss,
                      "image_attention": share})  # fmt: skip
    texts = trace.texts[trace.boundary :]
    return {
        "target": trace.target,
        "generated": trace.generated,
        "mean_loss": trace.mean_loss,
        "prefix_tokens": trace.boundary,
        "image_tokens": trace.sequence.num_image_tokens,
        "layers": list(trace.layers),
        "tokens": [
            {"id": id_, "text": text, "loss": float(loss)}
            for id_, text, loss in zip(trace.sequence.labels.tolist(), texts, trace.losses, strict=True)
        ],
        "words": words,
    }
