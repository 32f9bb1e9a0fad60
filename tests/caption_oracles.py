"""Caption metrics with dictionaries and loops, straight from their definitions. Slow and obvious; nothing is shared with the package."""

from __future__ import annotations

import math
from collections import Counter


def _grams(caption: str, n: int) -> Counter[tuple[str, ...]]:
    words = caption.split()
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def bleu_by_counts(predictions: list[str], references: list[list[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus; of an image, given alone."""
    length = closest = 0
    matched, possible = [0] * 4, [0] * 4
    for prediction, others in zip(predictions, references, strict=True):
        size = len(prediction.split())
        length += size
        closest += min((abs(len(other.split()) - size), len(other.split())) for other in others)[1]
        for n in range(1, 5):
            possible[n - 1] += max(size - n + 1, 0)
            for gram, count in _grams(prediction, n).items():
                matched[n - 1] += min(count, max(_grams(other, n)[gram] for other in others))
    ratio = (length + 1e-15) / (closest + 1e-9)
    scores, product = [], 1.0
    for n in range(1, 5):
        product *= (matched[n - 1] + 1e-15) / (possible[n - 1] + 1e-9)
        scores.append(product ** (1 / n) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0))
    return scores


def lcs_by_table(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def rouge_by_table(prediction: str, references: list[str]) -> float:
    """ROUGE-L of an image."""
    words = prediction.split(" ")
    common = [(lcs_by_table(words, other.split(" ")), len(other.split(" "))) for other in references]
    precision = max(size / len(words) for size, _ in common)
    recall = max(size / length for size, length in common)
    return 0.0 if precision == 0 else (1 + 1.44) * precision * recall / (recall + 1.44 * precision)


def cider_by_dicts(predictions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D of each image."""
    scores = []
    for prediction, others in zip(predictions, references, strict=True):
        total = 0.0
        for other in others:
            for n in range(1, 5):
                mine, theirs = (_weighted(text, n, references) for text in (prediction, other))
                norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                dot = sum(min(mine[gram], theirs.get(gram, 0)) * theirs.get(gram, 0) for gram in mine)
                bigrams = max(len(prediction.split()) - 1, 0) - max(len(other.split()) - 1, 0)
                if norms > 0:
                    total += dot / norms * math.exp(-(bigrams**2) / 72)
        scores.append(10 * total / 4 / len(others))
    return scores


def _weighted(caption: str, n: int, references: list[list[str]]) -> dict[tuple[str, ...], float]:
    def images_with(gram: tuple[str, ...]) -> int:
        return sum(any(gram in _grams(other, n) for other in others) for others in references)

    return {
        gram: count * (math.log(len(references)) - math.log(max(1, images_with(gram))))
        for gram, count in _grams(caption, n).items()
    }
