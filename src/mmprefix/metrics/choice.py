"""The letter that a model chose among several answers (ScienceQA)."""

from __future__ import annotations

import re

NUM_LETTERS = 26
"""Of a question of which nobody says how many choices it has."""

# "B", "(B)", "B.", "B) a whale", but not "A whale".
_ALONE = re.compile(r"\(?([A-Z])(?:$|\)\.?(?:\s|$)|[.:](?:\s|$))")
# What ScienceQA's authors have their models say, and look for.
_SENTENCE = re.compile(r"The answer is \(?([A-Z])\b")


def chosen_letter(prediction: str, num_choices: int) -> str | None:
    """The letter that ``prediction`` consists of or begins with, or names in "The answer is B."; None where there is none.

    ScienceQA's own code draws a choice at random where it finds no letter; here no letter is no answer, and wrong, so that
    the same file gets the same score twice.

    Args:
        prediction: what the model said.
        num_choices: a letter beyond them is none.
    """
    text = prediction.strip()
    alone = _ALONE.match(text)
    letters = [alone[1]] if alone else _SENTENCE.findall(text)
    letters = [letter for letter in letters if ord(letter) - ord("A") < num_choices]
    return letters[0] if len(letters) == 1 else None
