"""Models with a prefix-LM decoder inside: a pass over rows of one sample each, and `generate`.

Shared by the multimodal model and the text-only one. The whole prompt is prefix, whatever is generated is target:
prefill sets a plan in which everything is prefix, cached steps set one that says how many columns of the cache are.
So prompts are padded on the left, and every target starts in the same column.

transformers does the decoding (greedy, sampling, beams); this module only keeps it from losing the prefix:

- A cache layer that forgets what has left its window would forget the prefix, which stays visible to all. Such
  layers are replaced by ones that keep everything; what a window hides is then hidden by the mask.
- With a static cache, the library makes the mask before `forward` is called, where no plan is set. We hand the 2-D
  mask through, and the decoder makes its mask inside.
- A prompt fed in chunks cannot be bidirectional, and a cache made by the caller may forget: both are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from mmprefix.attention import prefix_plan
from mmprefix.decoder import install, uninstall, windows_of
from mmprefix.masks import PrefixVisibility
from mmprefix.onednn import linears_by_onednn
from mmprefix.packing import PrefixPlan


@cache
def _takes_logits_to_keep(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


def cached_length(cache: Cache | None) -> int:
    """Columns that a cache holds, 0 without one."""
    return 0 if cache is None else int(cache.get_seq_length())


def plan_of_rows(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    is_image: Tensor | None = None,
    is_target: Tensor | None = None,
    cached: int = 0,
    prefix_length: int | None = None,
    visibility: PrefixVisibility = "full",
    unpadded: bool = False,
) -> PrefixPlan | None:
    """The plan of rows with one sample each, or of the prefix that a cache holds.

    Args:
        shape: ``(B, T)`` of the tokens that are fed.
        device: where the plan shall be.
        attention_mask: int64 ``[B, T]``, with a cache ``[B, cached + T]``, 0 on padding.
        is_image, is_target: bool ``[B, T]``; with a cache they are not read.
        cached: columns in the cache.
        prefix_length: how many columns, cached or not, are prompt; the others were generated.
        visibility: how prefix tokens see each other.
        unpadded: whether all columns of the prompt are known to be real, on a decoder that can do without masks.

    Returns:
        None with a cache of unknown prefix length: the decoder's own mask shows a target token all that is cached,
        which is right but for sliding windows.
    """
    batch, length = shape
    if cached:
        if prefix_length is None:
            return None
        length, is_target = prefix_length, None
        is_image = None
    elif prefix_length is not None and prefix_length < length:
        # Generation without a cache: what follows the prompt was generated.
        is_target = (torch.arange(length, device=device) >= prefix_length).expand(batch, -1)
    if attention_mask is None:
        attention_mask = torch.ones((batch, length), dtype=torch.long, device=device)
    if is_image is None:
        is_image = torch.zeros((batch, length), dtype=torch.bool, device=device)
    plan = PrefixPlan.from_prompt(attention_mask[:, :length], is_image, is_target, visibility)
    return replace(plan, unpadded=True) if unpadded and is_target is None else plan


def run_decoder(
    decoder: Any,
    inputs_embeds: Tensor,
    plan: PrefixPlan | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> Any:
    """One pass of an installed decoder over embeddings ``[B, T, W]`` under a plan.

    Positions are counted from the attention mask by default, so padding on the left takes none.

    Raises:
        ValueError: an attention mask that isn't 2-D, or a plan of another shape than the tokens.
    """
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        raise ValueError("expected a 2-D attention_mask: a ready-made mask has no bidirectional prefix in it")
    batch, length = inputs_embeds.shape[:2]
    cached = cached_length(past_key_values)
    if plan is not None and not cached and tuple(plan.segment.shape) != (batch, length):
        raise ValueError(f"expected a plan of {batch} x {length} tokens, got {tuple(plan.segment.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones((batch, cached + length), dtype=torch.long, device=inputs_embeds.device)
    if position_ids is None:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
    if past_key_values is not None and past_key_values.is_compileable:
        # A static cache has columns that aren't written yet; position biases (bloom) are made from this mask.
        missing = past_key_values.get_max_length() - attention_mask.shape[1]
        attention_mask = F.pad(attention_mask, (0, max(0, missing)))
    with prefix_plan(plan):
        return decoder(
            inputs_embeds=inputs_embeds,
            # Always a 2-D mask: without one the library guesses packed sequences from the positions.
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **{**kwargs, "return_dict": True},
        )


class PrefixDecoderConfig(PreTrainedConfig):
    """Config of a model with a prefix-LM decoder inside.

    Args:
        text_config: config of the decoder, or its dict form.
        decoder_attention: `sdpa` or `eager`; transformers does not save an attention implementation by itself.
        refused_caches: caches with which this decoder generates wrongly (`static`), as the probe found.
        mask_free: whether its attention can do without a mask, as the probe found.
    """

    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  (transformers reads it from the class)

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        decoder_attention: str | None = None,
        refused_caches: Sequence[str] = (),
        mask_free: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            settings = dict(text_config)
            text_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.text_config: Any = text_config
        self.decoder_attention = decoder_attention
        self.refused_caches = list(refused_caches)
        self.mask_free = mask_free
        if text_config is not None:
            # `save_pretrained` and `generate` read them from the outermost config.
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)


class PrefixDecoderModel(PreTrainedModel, GenerationMixin):
    """A model with a prefix-LM decoder inside, and `generate` with a bidirectional prompt.

    Subclasses have a `forward` that takes ``prefix_length``: how many columns are prompt.
    """

    config: PrefixDecoderConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def __init__(self, config: PrefixDecoderConfig) -> None:
        super().__init__(config)
        self.decoder = install(
            AutoModelForCausalLM.from_config(config.text_config, attn_implementation=config.decoder_attention)
        )

    def replace_decoder(self, decoder: PreTrainedModel) -> Any:
        """Puts another decoder in the place of the present one, whose installation it takes back."""
        uninstall(self.decoder)
        self.decoder = install(decoder)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies, or unpickles in another process, where nobody has wrapped transformers' masks yet."""
        super().__setstate__(state)
        install(self.decoder)

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embedding."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the decoder's token embedding."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The decoder's output layer."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the decoder's output layer."""
        self.decoder.set_output_embeddings(value)
        install(self.decoder)  # the new layer has no hook yet

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; the whole prompt is prefix, whatever is generated is target."""
        for prompt in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
            if prompt is not None:
                kwargs.setdefault("prefix_length", prompt.shape[1])
        mask = kwargs.get("attention_mask")  # without one, the library looks for padding itself
        kwargs["unpadded"] = self.config.mask_free and mask is not None and bool((mask != 0).all())
        with linears_by_onednn(self):
            return super().generate(inputs, *args, **kwargs)

    def _logits_to_keep(self, number: int | Tensor) -> dict[str, Any]:
        """What to tell the decoder, if it can be told; by default (0) it makes all logits."""
        wanted = isinstance(number, Tensor) or number > 0
        return {"logits_to_keep": number} if wanted and _takes_logits_to_keep(type(self.decoder).forward) else {}

    def _sees_all(self, cached: int, length: int, unpadded: bool) -> bool:
        """Whether a cached step needs no plan: one token behind unpadded prompts, without a window that hides something.

        The decoder's own mask is right then, and costs nothing.
        """
        return unpadded and cached > 0 and length == 1 and not windows_of(self.config.text_config)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        if generation_config.cache_implementation is None and "dynamic" in self.config.refused_caches:
            generation_config.use_cache = model_kwargs["use_cache"] = False  # slow, and right
            return
        wanted = str(generation_config.cache_implementation or "dynamic")
        for refused in self.config.refused_caches:
            if refused in wanted:
                raise ValueError(
                    f"cache_implementation: {wanted}: transformers generates wrongly with it on "
                    f"{self.config.text_config.model_type}, as the probe found"
                )
        if getattr(generation_config, "prefill_chunk_size", None) is not None:
            raise ValueError("prefill_chunk_size: expected none, a prompt fed in chunks cannot be bidirectional")
        own = model_kwargs.get("past_key_values")
        if own is not None and not getattr(generation_config, "is_assistant", False):
            self._check_own_cache(own)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, Cache):
            return
        if own is None:
            keep_everything(cache, max_cache_length=args[-1])
        if any(cache.is_sliding):
            raise ValueError("past_key_values: expected a cache that keeps the whole prefix, got sliding-window layers")

    def _check_own_cache(self, cache: Cache) -> None:
        """Refuses a cache of the caller's with which generation would go wrong."""
        name = "static" if isinstance(cache, StaticCache) else "dynamic"
        if name in self.config.refused_caches:
            raise ValueError(
                f"past_key_values: transformers generates wrongly with a {name} cache on "
                f"{self.config.text_config.model_type}, as the probe found"
            )
        if cached_length(cache):
            raise ValueError(
                "past_key_values: expected an empty cache: what it holds has not seen the rest of the prompt, "
                "and the whole prompt is prefix"
            )

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """Nothing: the decoder makes its mask in `forward`, where the plan is set."""
        return attention_mask


def keep_everything(cache: Cache, max_cache_length: int = 0) -> None:
    """Replaces sliding-window layers of a fresh cache by ones that keep all columns; static ones of so many.

    Static layers get the length of their full neighbours: without a sliding layer left, the library takes the columns
    of every mask from the first layer.
    """
    full_lengths = [
        layer.max_cache_len
        for layer in cache.layers
        if isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer)
    ]
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, StaticSlidingWindowLayer):
            cache.layers[number] = StaticLayer(max_cache_len=max(full_lengths, default=max_cache_length))
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = DynamicLayer()
