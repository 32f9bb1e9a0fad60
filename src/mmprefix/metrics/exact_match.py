"""Exact match: does the prediction equal one of the references?

White space is collapsed and stripped on both sides, nothing else is normalised: case and punctuation count. The
official VQA normalisation is another metric and not this one.
"""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether ``prediction`` equals one of ``references``, up to white space."""
    return " ".join(prediction.split()) in {" ".join(reference.split()) for reference in references}
