"""Text metrics: pure functions first, then thin torchmetrics classes over them.

Nothing but the classes needs torch, so it is imported when one of them is asked for: ``score`` never does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmprefix.metrics.answers import AnswerReference, AnswerScores, score_answers
from mmprefix.metrics.captions import CaptionScores, score_captions
from mmprefix.metrics.exact_match import exact_match

if TYPE_CHECKING:
    from mmprefix.metrics.stateful import AnswerMetric, CaptionMetrics, ExactMatch

__all__ = [
    "AnswerMetric", "AnswerReference", "AnswerScores", "CaptionMetrics", "CaptionScores", "ExactMatch", "exact_match",
    "score_answers", "score_captions",
]  # fmt: skip

_NEED_TORCH = ("AnswerMetric", "CaptionMetrics", "ExactMatch")


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(import_module("mmprefix.metrics.stateful"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
