"""A text-only causal LM as a prefix LM, and back: for people who have no images.

model = to_prefix_lm(AutoModelForCausalLM.from_pretrained(...))
model(input_ids=..., attention_mask=..., bidirectional_mask=..., labels=...).loss.backward()
model.generate(**tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt"))
model.save_pretrained(folder)          # AutoModelForCausalLM.from_pretrained gives a prefix LM again
causal = to_causal_lm(model)           # the model that came in
"""

from __future__ import annotations

import warnings

from transformers import PreTrainedModel

from mmprefix.decoder import uninstall
from mmprefix.errors import InputError
from mmprefix.generation import PrefixDecoderModel
from mmprefix.prefix_lm import PrefixLMForCausalLM
from mmprefix.probe import check_prefix_lm, probe


def to_prefix_lm(model: PreTrainedModel) -> PrefixLMForCausalLM:
    """A causal LM as a prefix LM. Weights are shared, not copied.

    Args:
        model: any causal LM of transformers, in any dtype, on any device. Wrap with PEFT afterwards, not before.

    Raises:
        InputError: an architecture that does not obey the prefix mask, named with the property that fails; or a
            model that PEFT has wrapped already.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"expected a model of transformers, got {type(model).__name__}; wrap with PEFT afterwards")
    if isinstance(model, PrefixDecoderModel):
        raise InputError(f"expected a causal LM, got {type(model).__name__}, which is a prefix LM already")
    report = probe(model.config, model.config._attn_implementation, model)
    if report.refusal is not None:
        raise InputError(report.refusal)
    for line in report.warnings(packing=False):
        warnings.warn(line, stacklevel=2)
    prefix_lm = PrefixLMForCausalLM.around(model, report.refused_caches)
    prefix_lm.config.mask_free = report.dense_reason is None
    try:
        check_prefix_lm(model)
    except InputError:
        uninstall(model)
        raise
    return prefix_lm


def to_causal_lm(model: PrefixLMForCausalLM) -> PreTrainedModel:
    """The causal LM inside a prefix LM, its own again: nothing of ours stays on it."""
    return uninstall(model.decoder)
