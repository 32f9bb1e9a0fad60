"""ANLS: the average normalised Levenshtein similarity of DocVQA and InfographicVQA.

Biten et al., Scene Text Visual Question Answering, https://arxiv.org/abs/1905.13648; in its details as the script of the Robust
Reading Competition computes it: distance between texts in lower case with white space collapsed, divided by the length of
the *raw* texts in upper case, and a similarity of exactly the threshold counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmprefix.errors import InputError

THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str], threshold: float = THRESHOLD) -> float:
    """Similarity to the answer that is nearest, or 0 where it is less than ``threshold``.

    Args:
        prediction: what the model said.
        answers: accepted answers, at least one.
        threshold: 0.5 in DocVQA, InfographicVQA and ST-VQA.

    Returns:
        In [0, 1]. Two texts of length 0 are equal.

    Raises:
        InputError: no answers.
    """
    if not answers:
        raise InputError("expected one or more accepted answers, got none")
    similarity = 1 - min(_normalized_distance(prediction, answer, threshold) for answer in answers)
    return 0.0 if similarity < threshold else similarity


def _normalized_distance(prediction: str, answer: str, threshold: float) -> float:
    said, given = (" ".join(text.lower().split()) for text in (prediction, answer))
    # upper() may lengthen: "ß" counts as two.
    length = max(len(prediction.upper()), len(answer.upper()))
    if length == 0:
        return 0.0
    # The distance is at least the difference in length: a page of text against a word need not be compared.
    least = abs(len(said) - len(given)) / length
    return least if 1 - least < threshold else edit_distance(said, given) / length


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions of characters that turn ``a`` into ``b``; time O(len(a) len(b))."""
    if len(a) < len(b):
        a, b = b, a
    above = list(range(len(b) + 1))
    for row, x in enumerate(a, 1):
        current = [row]
        for column, y in enumerate(b):
            substituted = above[column] + (x != y)
            deleted, inserted = above[column + 1] + 1, current[column] + 1
            current.append(min(substituted, deleted, inserted))
        above = current
    return above[-1]
