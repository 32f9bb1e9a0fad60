"""Text metrics: pure functions first, then thin torchmetrics classes over them."""

from mmprefix.metrics.exact_match import ExactMatch, exact_match

__all__ = ["ExactMatch", "exact_match"]
