"""The text-only prefix LM: any causal LM of transformers with a bidirectional prefix, without images.

A model of its own around the decoder, with a model type of its own: a folder that was saved as a prefix LM cannot be
loaded as the causal LM inside by mistake, and without `mmprefix` it cannot be loaded at all.

Shapes: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from mmprefix.generation import PrefixDecoderConfig, PrefixDecoderModel, cached_length, plan_of_rows, run_decoder
from mmprefix.sequence import IGNORE_INDEX


class PrefixLMConfig(PrefixDecoderConfig):
    """Config of a text-only prefix LM."""

    model_type = "prefix_lm"

    def __init__(self, **kwargs: Any) -> None:
        # Written out: transformers gives a config class without an __init__ of its own a generated one.
        super().__init__(**kwargs)


class PrefixLMForCausalLM(PrefixDecoderModel):
    """Any causal LM of transformers with a bidirectional prefix."""

    config_class = PrefixLMConfig

    def __init__(self, config: PrefixLMConfig) -> None:
        super().__init__(config)
        self.post_init()

    @classmethod
    def around(cls, decoder: PreTrainedModel, refused_caches: Sequence[str] = ()) -> PrefixLMForCausalLM:
        """The prefix LM around a decoder, whose weights it shares. Proves nothing: `conversion.to_prefix_lm` does."""
        config = PrefixLMConfig(
            # A copy: the library sets the outer model's attention implementation on the config it is given.
            text_config=copy.deepcopy(decoder.config),
            decoder_attention=decoder.config._attn_implementation,
            refused_caches=refused_caches,
        )
        with torch.device("meta"):  # only the frame
            model = cls(config)
        model.replace_decoder(decoder)
        model.tie_weights()
        if decoder.generation_config is not None:
            model.generation_config = copy.deepcopy(decoder.generation_config)
        return model.train(decoder.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the decoder initialises itself."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        bidirectional_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prefix_length: int | None = None,
        unpadded: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """One pass.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: int64 ``[B, S]`` (with a cache, ``[B, past + S]``), 0 on padding.
            bidirectional_mask: int64 or bool ``[B, S]``, 1 on the prefix. All zeros is the causal decoder.
            position_ids: int64 ``[B, S]``; by default counted from `attention_mask`.
            past_key_values: cache of a prefill; what follows is target.
            inputs_embeds: float ``[B, S, W]`` in place of `input_ids`.
            labels: int64 ``[B, S]``, aligned with `input_ids` as transformers has them. Tokens of the prefix, which
                see each other, and padding are never scored, whatever stands there.
            prefix_length: in place of `bidirectional_mask`: how many columns, from the first, are prefix.
                `generate` sets it.
            unpadded: with `prefix_length`, whether all of the prompts' columns are real. `generate` sets it.
            logits_to_keep: how many positions, from the last, get logits, as transformers has it; 0 for all.

        Returns:
            The decoder's own output: ``loss``, ``logits`` float ``[B, S, V]``, ``past_key_values``.

        Raises:
            ValueError: nothing that says where the prefix ends, or a prefix that does not stand in front.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("expected input_ids or inputs_embeds, got neither")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        batch, length = inputs_embeds.shape[:2]
        cached = cached_length(past_key_values)
        is_target = None
        if cached and bidirectional_mask is not None:
            raise ValueError("bidirectional_mask: expected none with a cache, whose columns have seen what they see")
        if not cached:
            if bidirectional_mask is None and prefix_length is None:
                raise ValueError(
                    "expected bidirectional_mask [B, S] (1 on the prefix, all zeros for a causal pass): "
                    "where the prefix ends can't be told from the tokens"
                )
            if bidirectional_mask is not None:
                is_target = _targets(bidirectional_mask, attention_mask, (batch, length))
                prefix_length = None
        plan = None if self._sees_all(cached, length, unpadded) else plan_of_rows(
            (batch, length), inputs_embeds.device, attention_mask,
            is_target=is_target, cached=cached, prefix_length=prefix_length, unpadded=unpadded,
        )  # fmt: skip
        kwargs |= self._logits_to_keep(logits_to_keep)
        if labels is not None:
            if is_target is None:
                raise ValueError("labels need a bidirectional_mask: without it, nothing says what is scored")
            scored = is_target if attention_mask is None else is_target & attention_mask.bool()
            if kwargs.get("num_items_in_batch") is not None and bool((~scored & (labels != IGNORE_INDEX)).any()):
                # It divides the loss, and was counted with labels that are not scored.
                raise ValueError(
                    f"labels: expected {IGNORE_INDEX} on the prefix and on padding beside num_items_in_batch, "
                    "which counts every other label"
                )
            kwargs["labels"] = labels.masked_fill(~scored, IGNORE_INDEX)
        return run_decoder(self.decoder, inputs_embeds, plan, attention_mask, position_ids, past_key_values, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`: the whole prompt is the prefix, whatever is generated is target.

        Raises:
            ValueError: a ``bidirectional_mask`` that says otherwise.
        """
        prefix = kwargs.pop("bidirectional_mask", None)
        if prefix is not None:
            padding = kwargs.get("attention_mask")
            in_prefix = prefix.bool() if padding is None else prefix.bool() | ~padding.bool()
            if not bool(in_prefix.all()):
                raise ValueError("bidirectional_mask: expected 1 on the whole prompt, which is the prefix, got zeros")
        return super().generate(inputs, *args, **kwargs)


def _targets(bidirectional_mask: Tensor, attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """bool ``[B, S]``, what isn't prefix."""
    if tuple(bidirectional_mask.shape) != shape:
        raise ValueError(
            f"bidirectional_mask: expected shape {list(shape)}, that of the tokens, got {list(bidirectional_mask.shape)}"
        )
    is_target = ~bidirectional_mask.bool()
    if not torch.compiler.is_compiling():  # the check waits for the device
        real = torch.ones_like(is_target) if attention_mask is None else attention_mask.bool()
        behind_target = (is_target & real).cumsum(-1) > 0
        wrong = (~is_target & real & behind_target).any(-1)
        if bool(wrong.any()):
            raise ValueError(
                "bidirectional_mask: expected ones, then zeros, got ones behind a zero in row "
                f"{int(wrong.nonzero()[0])}: that target would see what comes after it"
            )
    return is_target


AutoConfig.register(PrefixLMConfig.model_type, PrefixLMConfig)
AutoModelForCausalLM.register(PrefixLMConfig, PrefixLMForCausalLM)
