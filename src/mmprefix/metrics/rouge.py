"""ROUGE-L as COCO's caption evaluation computes it.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004: an F-measure of the longest common subsequence.
COCO's rules: beta = 1.2; the best precision and the best recall over the references, which may come from two
different ones; captions are split at single spaces, so that an empty caption is one empty token (an empty prediction
scores 1 where a reference is empty as well, and 0 elsewhere); the score of a corpus is the mean over images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmprefix.metrics.ngrams import CaptionCorpus, Floats

BETA = 1.2


def longest_common_subsequences(words: Sequence[str], others: Sequence[Sequence[str]]) -> list[int]:
    """Lengths of the longest common subsequence of ``words`` and of each of ``others``.

    Bit-parallel (Hyyrö, "Bit-Parallel LCS-length Computation Revisited", 2004): a row of the dynamic programme is one
    integer, in which a 0 bit says that the length grows at that word, and an addition computes the next row. Python's
    integers have no width, so nothing else is needed for long texts.
    """
    places: dict[str, int] = {}
    for position, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << position
    everything = (1 << len(words)) - 1
    lengths = []
    for other in others:
        row = everything
        for word in other:
            if place := places.get(word):  # other words leave the row as it is
                hit = row & place
                row = (row + hit | row - hit) & everything
        lengths.append(len(words) - row.bit_count())
    return lengths


def rouge_l(corpus: CaptionCorpus) -> tuple[float, Floats]:
    """ROUGE-L of the corpus, and of each image.

    Returns:
        a float, and float64 ``[I]``; in [0, 1].
    """
    scores = np.zeros(len(corpus.predictions))
    for position, (prediction, references) in enumerate(zip(corpus.predictions, corpus.references, strict=True)):
        words = prediction.split(" ")
        others = [reference.split(" ") for reference in references]
        lengths = longest_common_subsequences(words, others)
        precision = max(lengths) / len(words)
        if precision:
            recall = max([length / len(other) for length, other in zip(lengths, others, strict=True)])
            scores[position] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return float(scores.mean()), scores
