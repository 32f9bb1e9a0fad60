"""Relaxed accuracy: ChartQA's, which accepts numbers that are off by up to 5%.

Masry et al., ChartQA, https://arxiv.org/abs/2203.10244, section 5.1. The authors gave no script; this is Pix2Struct's reading
of it, which the field reports: nothing but ``%`` is understood beside the number, so ``1,000``, ``$5`` and ``5 kg`` are texts.
"""

from __future__ import annotations

TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, reference: str, tolerance: float = TOLERANCE) -> bool:
    """Whether two numbers are within ``tolerance`` of the reference, or two texts equal up to case.

    A reference of 0 is compared as text: nothing is within 5% of it. ``nan`` and ``inf`` are numbers to Python that nothing is
    near to, themselves included; that, too, is what the field's code does.
    """
    said, given = _number(prediction), _number(reference)
    if said is not None and given:
        return abs(said - given) / abs(given) <= tolerance
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
