"""Slow, obvious references of metrics of answers. They need no torch, as the metrics don't."""

import functools
from fractions import Fraction

from mmprefix.metrics.contractions import CONTRACTIONS


def reference_vqa_answer(text):
    """VQA v2's normal form of an answer, character by character."""
    comma = any(text[i - 1].isdecimal() and text[i] == "," and text[i + 1].isdecimal() for i in range(1, len(text) - 1))
    kept = []
    for character in text:
        if character not in '[](){}<>;/"=+\\_-@`,?!':
            kept.append(character)
            continue
        places = [i for i, other in enumerate(text) if other == character]
        touches = any((text[i - 1] if i else "") == " " or text[i + 1 : i + 2] == " " for i in places)
        if not comma and not touches:
            kept.append(" ")
    without, removed = [], 0
    for i, character in enumerate(kept):
        if character == "." and removed < 32 and not (i + 1 < len(kept) and kept[i + 1].isdecimal()):
            removed += 1
        else:
            without.append(character)
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words = []
    for word in "".join(without).lower().split():
        if word in ("a", "an", "the"):
            continue
        if word == "none":
            word = "0"
        elif word in numbers:
            word = str(numbers.index(word))
        words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def reference_vqav2(prediction, answers):
    """VQA v2's accuracy as a fraction, one annotator left out after the other."""
    prediction, *answers = [" ".join(" ".join(t.split("\n")).split("\t")).strip() for t in (prediction, *answers)]
    if any(answer != answers[0] for answer in answers):
        prediction, *answers = [reference_vqa_answer(text) for text in (prediction, *answers)]
    terms = []
    for left_out in range(len(answers)):
        others = [answer for i, answer in enumerate(answers) if i != left_out]
        terms.append(min(Fraction(1), Fraction(others.count(prediction), 3)))
    return sum(terms) / len(terms)


def reference_edit_distance(a, b):
    """Levenshtein's, by its recursion."""

    @functools.cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return distance(len(a), len(b))
