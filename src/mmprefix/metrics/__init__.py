"""Text metrics: pure functions that import no torch, then thin torchmetrics classes over them, imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmprefix.metrics.exact_match import exact_match

if TYPE_CHECKING:
    from mmprefix.metrics.answer_metrics import AnswerMetric, ExactMatch

_LAZY = {
    "AnswerMetric": "mmprefix.metrics.answer_metrics",
    "ExactMatch": "mmprefix.metrics.answer_metrics",
}
"""Classes that need torch, and where they are."""

__all__ = ["AnswerMetric", "ExactMatch", "exact_match"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
