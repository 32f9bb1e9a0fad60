"""VQA accuracy: what share of people gave the predicted answer, in the variants that are in use.

Every variant first normalises answers, each in its own way, and then leaves out one annotator after the other: against the
others, an answer scores ``min(1, matches / 3)``, and the mean over who is left out is the score. With ten annotators, 0, 1,
2, 3 and 4 or more equal answers score 0, 0.3, 0.6, 0.9 and 1 (Antol et al., VQA, https://arxiv.org/abs/1505.00468).

| variant | what is normalised |
|---|---|
| `vqav2` | GT-Vision-Lab/VQA since 2021: both sides, unless the annotators all agree; then white space only |
| `vqav2-2016` | the same before, and LAVIS: the prediction always; of people's answers punctuation only, unless all agree |
| `textvqa` | MMF's TextVQA evaluator: both sides always; ``,`` and ``?`` go first, ``'s`` becomes a word |
| `vizwiz` | VizWiz's own evaluation: the prediction only, with another table of contractions |

Scores equal those of the official code bit for bit (docs/metrics.md: of which text of it), its oddities included, which are
noted where they happen: they are part of every published number. Annotators are told apart by their place in the list, as the
official code does by ``answer_id``. This module knows nothing of files, and changes nothing in place (the official code does,
so that it may say something else when it is run a second time).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from mmprefix.errors import InputError
from mmprefix.metrics.contractions import CONTRACTIONS, VIZWIZ_CONTRACTIONS

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The official pattern begins with `(?!<=\d)`, a slip for `(?<!\d)` that is true everywhere.
_PERIOD = re.compile(r"\.(?!\d)")
# The official call passes the flag re.UNICODE in the place of `count`: only so many periods go.
_PERIODS_REMOVED = int(re.UNICODE)


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: str = "vqav2") -> float:
    """The score of one prediction.

    Args:
        prediction: what the model said.
        answers: one for each annotator, ten as a rule. With a single one every prediction scores 0.
        variant: one of `VARIANTS`.

    Returns:
        In [0, 1], not rounded.

    Raises:
        InputError: an unknown variant, or no answers.
    """
    if variant not in _PREPARED:
        raise InputError(f"expected a variant of VQA accuracy ({', '.join(VARIANTS)}), got {variant!r}")
    if not answers:
        raise InputError("expected the answers of one or more annotators, got none")
    said, given = _PREPARED[variant](prediction, answers)
    equal = [answer == said for answer in given]
    matches = sum(equal)
    if matches == 0 or matches > 3:  # every term is 0, or every term is 1
        return float(matches > 0)
    # Summed in the order of the annotators: the official sum rounds in that order, too.
    return sum(min(1, (matches - own) / 3) for own in equal) / len(equal)


VqaVariant = Literal["vqav2", "vqav2-2016", "textvqa", "vizwiz"]

VARIANTS: Mapping[str, str] = MappingProxyType({
    "vqav2": "VQA v2, official code since 2021",
    "vqav2-2016": "VQA v2, official code before 2021",
    "textvqa": "TextVQA, MMF",
    "vizwiz": "VizWiz, official code",
})  # fmt: skip
"""Variants, and what tables call them."""


def normalized_answer(text: str) -> str:
    """Punctuation, then case, number words, articles and contractions, as VQA v2: ``"Two  dogs!"`` -> ``"2 dogs"``.

    The answer ``"a"`` becomes the empty one.
    """
    return _remembered(text) if len(text) <= _REMEMBERED_LENGTH else _normalized(text)


def _normalized(text: str) -> str:
    return _words(_without_punctuation(text), CONTRACTIONS)


# Most answers are among few. Long ones are not, and would fill the memory.
_REMEMBERED_LENGTH = 64
_remembered = lru_cache(maxsize=1 << 14)(_normalized)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    # Whether a mark is deleted or becomes a space is decided on the text as it came, so that "a - b" has two spaces
    # left; and one comma between digits anywhere decides for all marks: "1,000-2,000" -> "10002000".
    delete = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in _MARKS:
        if mark in text:
            result = result.replace(mark, "" if delete or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", result, count=_PERIODS_REMOVED)


def _words(text: str, contractions: Mapping[str, str]) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join([contractions.get(word, word) for word in words if word not in _ARTICLES])


_Prepared = tuple[str, Sequence[str]]


def _vqav2(prediction: str, answers: Sequence[str]) -> _Prepared:
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(answers)) == 1:  # "Yes" against ten times "yes" scores 0
        return prediction, answers
    return normalized_answer(prediction), [normalized_answer(answer) for answer in answers]


def _vqav2_2016(prediction: str, answers: Sequence[str]) -> _Prepared:
    if len(set(answers)) > 1:
        answers = [_without_punctuation(answer) for answer in answers]
    return normalized_answer(_one_line(prediction)), answers


def _textvqa(prediction: str, answers: Sequence[str]) -> _Prepared:
    return _textvqa_normalized(prediction), [_textvqa_normalized(answer) for answer in answers]


def _textvqa_normalized(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalized_answer(_one_line(text))


def _vizwiz(prediction: str, answers: Sequence[str]) -> _Prepared:
    return _words(_without_punctuation(_one_line(prediction)), VIZWIZ_CONTRACTIONS), answers


_PREPARED: Mapping[str, Callable[[str, Sequence[str]], _Prepared]] = {
    "vqav2": _vqav2, "vqav2-2016": _vqav2_2016, "textvqa": _textvqa, "vizwiz": _vizwiz,
}  # fmt: skip
