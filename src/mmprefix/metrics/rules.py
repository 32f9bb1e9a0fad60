"""What a split's scores follow beside its task: metrics and tokenizer of captions, variant of VQA accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from mmprefix.errors import InputError
from mmprefix.metrics.captions import DEFAULT_METRICS, CaptionMetric
from mmprefix.metrics.ptb import Tokenizer
from mmprefix.metrics.vqa import VqaVariant


@dataclass(frozen=True)
class ScoringRules:
    """Of a run's evaluations.

    Attributes:
        caption_metrics: of captions. CIDEr is always among them: kinds and pictures are sorted by it.
        caption_tokenizer: see `mmprefix.metrics.ptb.tokenize`.
        vqa_variant: see `mmprefix.metrics.vqa.vqa_accuracy`; None: the task's own.

    Raises:
        InputError: caption metrics without CIDEr.
    """

    caption_metrics: tuple[CaptionMetric, ...] = DEFAULT_METRICS
    caption_tokenizer: Tokenizer = "auto"
    vqa_variant: VqaVariant | None = None

    def __post_init__(self) -> None:
        if "cider" not in self.caption_metrics:
            raise InputError(
                "data.caption_metrics: expected cider among them, by which captions are sorted, got "
                f"{', '.join(self.caption_metrics) or 'none'}"
            )
