"""Lightning-based fine-tuner for multimodal prefix LMs.

Imports nothing heavy by itself, so that ``python -m mmprefix --help`` answers at once; the names below load on use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "MMPrefixConfig": "mmprefix.modeling",
    "MMPrefixForConditionalGeneration": "mmprefix.modeling",
    "MMPrefixProcessor": "mmprefix.processing",
    "TokenSequence": "mmprefix.sequence",
}

if TYPE_CHECKING:
    from mmprefix.modeling import MMPrefixConfig, MMPrefixForConditionalGeneration
    from mmprefix.processing import MMPrefixProcessor
    from mmprefix.sequence import TokenSequence

__all__ = ["MMPrefixConfig", "MMPrefixForConditionalGeneration", "MMPrefixProcessor", "TokenSequence", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
