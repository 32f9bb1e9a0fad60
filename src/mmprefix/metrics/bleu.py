"""BLEU-1 to BLEU-4 as COCO's caption evaluation computes it.

Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002: clipped n-gram precisions,
their geometric mean up to n, a penalty for brevity against the reference whose length is closest (of two equally
close ones the shorter). COCO's rules on top: counts are summed over the corpus before anything is divided; where
nothing could be counted, ratios are kept finite by `TINY` and `SMALL`, and a score is then as good as zero, not zero:
without them a prediction of three words would have no BLEU-4.
"""

from __future__ import annotations

import numpy as np

from mmprefix.metrics.ngrams import MAX_ORDER, CaptionCorpus, Floats

TINY, SMALL = 1e-15, 1e-9
"""Added to numerators and to denominators; part of the official number."""


def bleu(corpus: CaptionCorpus) -> tuple[Floats, Floats]:
    """BLEU of the corpus, and of each image by itself.

    The score of a corpus is not the mean of its images' scores.

    Returns:
        float64 ``[4]`` and float64 ``[4, I]``, in [0, 1]; the first row is BLEU-1.
    """
    counts = bleu_counts(corpus)
    return bleu_of(counts.sum(1)), bleu_of(counts)


def bleu_counts(corpus: CaptionCorpus) -> Floats:
    """What BLEU adds up over a corpus, of each image.

    Returns:
        float64 ``[10, I]``: for n = 1..4 n-grams that match, then for n = 1..4 those there are, the caption's length, and
        that of the reference which is closest in length.
    """
    images = len(corpus.predictions)
    matched = np.zeros((MAX_ORDER, images))
    possible = np.maximum(corpus.prediction_lengths - np.arange(MAX_ORDER)[:, None], 0.0)
    for n, order in enumerate(corpus.orders):
        # How often a reference has the n-gram, at most.
        allowed = np.zeros(len(order.predictions.gram), np.int64)
        found = order.match >= 0
        np.maximum.at(allowed, order.match[found], order.references.count[found])
        clipped = np.minimum(allowed, order.predictions.count)
        matched[n] = np.bincount(order.predictions.caption, clipped, minlength=images)
    return np.concatenate([matched, possible, corpus.prediction_lengths[None], _closest_lengths(corpus)[None]])


def bleu_of(counts: Floats) -> Floats:
    """BLEU-1 to BLEU-4, ``[4, ...]``, of `bleu_counts` or sums of them, ``[10, ...]``."""
    matched, possible, length, reference_length = (
        counts[:MAX_ORDER], counts[MAX_ORDER : 2 * MAX_ORDER], counts[-2], counts[-1],
    )  # fmt: skip
    precisions = np.cumprod((matched + TINY) / (possible + SMALL), axis=0)
    exponents = 1 / np.arange(1, MAX_ORDER + 1)
    means = precisions ** exponents.reshape(-1, *[1] * (counts.ndim - 1))
    ratio = (length + TINY) / (reference_length + SMALL)
    return np.asarray(means * np.exp(np.minimum(1 - 1 / ratio, 0)))


def _closest_lengths(corpus: CaptionCorpus) -> Floats:
    """float64 ``[I]``: the length of the reference that is closest in length; of two, the shorter."""
    image = corpus.image_of_reference
    distance = np.abs(corpus.reference_lengths - corpus.prediction_lengths[image])
    order = np.lexsort((corpus.reference_lengths, distance, image))
    first = np.cumsum(corpus.num_references) - corpus.num_references
    return corpus.reference_lengths[order][first].astype(np.float64)
