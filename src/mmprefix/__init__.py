"""Lightning-based fine-tuner for multimodal prefix LMs.

``import mmprefix`` makes its models known to transformers: AutoModelForImageTextToText, AutoModelForCausalLM,
AutoProcessor and pipelines load them from then on. As a command (``python -m mmprefix``) it imports nothing heavy by
itself, so that ``--help`` answers at once.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "MMPrefixConfig": "mmprefix.modeling",
    "MMPrefixForConditionalGeneration": "mmprefix.modeling",
    "MMPrefixProcessor": "mmprefix.processing",
    "PrefixLMConfig": "mmprefix.prefix_lm",
    "PrefixLMForCausalLM": "mmprefix.prefix_lm",
    "TokenSequence": "mmprefix.sequence",
    "to_causal_lm": "mmprefix.conversion",
    "to_prefix_lm": "mmprefix.conversion",
}

if TYPE_CHECKING:
    from mmprefix.conversion import to_causal_lm, to_prefix_lm
    from mmprefix.modeling import MMPrefixConfig, MMPrefixForConditionalGeneration
    from mmprefix.prefix_lm import PrefixLMConfig, PrefixLMForCausalLM
    from mmprefix.processing import MMPrefixProcessor
    from mmprefix.sequence import TokenSequence

__all__ = [
    "MMPrefixConfig",
    "MMPrefixForConditionalGeneration",
    "MMPrefixProcessor",
    "PrefixLMConfig",
    "PrefixLMForCausalLM",
    "TokenSequence",
    "__version__",
    "to_causal_lm",
    "to_prefix_lm",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if getattr(sys, "argv", [])[:1] != ["-m"]:  # what Python puts there while it looks for the module to run
    import_module("mmprefix.prefix_lm")
    import_module("mmprefix.processing")  # and with it the model
