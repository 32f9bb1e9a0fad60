"""Scores of captions: ids checked, tokens made, official metrics computed, once over a whole split.

This is the one entry for captions: ``score``, the metric in the loop and the benchmark call it. Values are on the
official code's scale (BLEU, ROUGE-L, METEOR, SPICE in [0, 1], CIDEr in [0, 10]); tables of the field show 100 times
that, and multiplying is the business of who shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from mmprefix.errors import InputError
from mmprefix.metrics.answers import TASKS, check_coverage
from mmprefix.metrics.bleu import bleu, bleu_counts
from mmprefix.metrics.cider import cider
from mmprefix.metrics.java import JavaUnavailableError
from mmprefix.metrics.java_scorers import meteor, spice
from mmprefix.metrics.ngrams import MAX_ORDER, CaptionCorpus, Floats
from mmprefix.metrics.ptb import Tokenizer, tokenize
from mmprefix.metrics.rouge import rouge_l

CAPTION: Final = "caption"
"""Name of the task."""

ALL_TASKS: Final = (CAPTION, *TASKS)
"""Whatever a split can be scored by: `caption`, and the tasks of `mmprefix.metrics.answers`."""

CaptionMetric = Literal["bleu", "rouge_l", "cider", "meteor", "spice"]

DEFAULT_METRICS: Final[tuple[CaptionMetric, ...]] = ("bleu", "rouge_l", "cider")

MEANS: Final[tuple[str, ...]] = ("ROUGE-L", "CIDEr", "SPICE")
"""Whose score of a corpus is the mean of its images'; BLEU and METEOR add up what they count first."""

BLEU: Final = tuple(f"BLEU-{n}" for n in range(1, MAX_ORDER + 1))

Scores = dict[str, tuple[float, Floats]]
"""Name -> score of the corpus, and of each image, float64 ``[I]``."""


def _bleu(corpus: CaptionCorpus) -> Scores:
    totals, images = bleu(corpus)
    return {name: (float(total), of_images) for name, total, of_images in zip(BLEU, totals, images, strict=True)}


METRICS: Final[dict[str, Callable[[CaptionCorpus], Scores]]] = {
    "bleu": _bleu,
    "rouge_l": lambda corpus: {"ROUGE-L": rouge_l(corpus)},
    "cider": lambda corpus: {"CIDEr": cider(corpus)},
    "meteor": lambda corpus: {"METEOR": meteor(corpus)},
    "spice": lambda corpus: {"SPICE": spice(corpus)},
}


@dataclass(frozen=True)
class CaptionScores:
    """What a set of captions scored.

    Attributes:
        corpus: name -> score of the whole split. Names are BLEU-1 to BLEU-4, ROUGE-L, CIDEr, METEOR, SPICE.
        items: name -> image id -> its score. BLEU and METEOR of a corpus are not the mean of these.
        tokenizer: ``tokenizer=official`` or ``tokenizer=python, not official``: part of the number.
        tokenizer_reason: why not the official one, where that was welcome; else empty.
        unavailable: name of a metric that was asked for -> why it could not be computed. It is in neither of the others.
        bleu_counts: where BLEU was asked for, what it adds up (`mmprefix.metrics.bleu.bleu_counts`), images as in `items`.
    """

    corpus: dict[str, float]
    items: dict[str, dict[str, float]]
    tokenizer: str
    tokenizer_reason: str
    unavailable: dict[str, str]
    bleu_counts: Floats | None = field(default=None, repr=False, compare=False)


def score_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: Tokenizer = "auto",
) -> CaptionScores:
    """Scores one caption for each image against its references.

    Args:
        predictions: image id -> caption.
        references: image id -> at least one caption; the same ids. The order of images does not matter (`in_order`).
        metrics: of `METRICS`. ``meteor`` and ``spice`` need Java and the extra ``captions``.
        tokenizer: see `mmprefix.metrics.ptb.tokenize`.

    Raises:
        InputError: ids don't match exactly, there are none, something is not a string, an image has no reference, a
            metric or tokenizer is unknown, or the official tokenizer was asked for and cannot be run.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise InputError(f"metrics: expected some of {', '.join(METRICS)}, got {', '.join(map(repr, unknown))}")
    _check(predictions, references)
    corpus, tokenized = _tokenized(predictions, references, tokenizer)
    totals: dict[str, float] = {}
    items: dict[str, dict[str, float]] = {}
    unavailable: dict[str, str] = {}
    for name in dict.fromkeys(metrics):
        try:
            scores = METRICS[name](corpus)
        except JavaUnavailableError as error:
            unavailable[name.upper()] = str(error)
            continue
        for title, (total, images) in scores.items():
            totals[title] = total
            of_images = dict(zip(in_order(references), images.tolist(), strict=True))
            items[title] = {name: of_images[name] for name in references}
    counts = None
    if "bleu" in metrics:
        places = {name: place for place, name in enumerate(in_order(references))}
        counts = bleu_counts(corpus)[:, [places[name] for name in references]]
    return CaptionScores(totals, items, *tokenized, unavailable, counts)


def _tokenized(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: Tokenizer
) -> tuple[CaptionCorpus, tuple[str, str]]:
    """The corpus, images as `in_order`, the tokenizer's label, and why it is not the official one."""
    names = in_order(references)
    texts = [predictions[name] for name in names]
    # The official code tokenizes both sides by themselves; a line between them keeps the last prediction from being
    # read with the first reference.
    border = "."
    counts = [len(references[name]) for name in names]
    result = tokenize([*texts, border, *(text for name in names for text in references[name])], tokenizer)
    tokens = iter(result.captions[len(texts) + 1 :])
    grouped = [[next(tokens) for _ in range(count)] for count in counts]
    return CaptionCorpus(result.captions[: len(texts)], grouped), (result.label, result.reason)


def in_order(names: Iterable[str]) -> list[str]:
    """Ids in the order in which images are tokenized and added up: numbers by value, then other names.

    The official program reads a caption that ends in a letter and a period with the next one (docs/metrics.md), so a few tokens
    depend on which one that is. The official code has images as the annotations have them, which ranks and a run's own files
    don't know; with an order that ids alone decide, the same captions have the same scores wherever they are scored.
    """
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _check(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Raises `InputError` unless every image has one prediction and some references, all of them strings."""
    check_coverage(predictions, references)
    for name, caption in predictions.items():
        if not isinstance(caption, str):
            raise InputError(f"prediction of id {name!r}: expected a string, got {_described(caption)}")
    for name, captions in references.items():
        if isinstance(captions, str) or not isinstance(captions, Sequence):
            raise InputError(f"references of id {name!r}: expected a list of strings, got {_described(captions)}")
        if not captions:
            raise InputError(f"references of id {name!r}: expected at least one, got none")
        for caption in captions:
            if not isinstance(caption, str):
                raise InputError(f"references of id {name!r}: expected strings, got {_described(caption)}")


def _described(value: object) -> str:
    return f"{type(value).__name__} {value!r:.80}"
