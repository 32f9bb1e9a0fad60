"""The multimodal prefix LM as a transformers model: encoder, connector, decoder.

`MMPrefixForConditionalGeneration` is a `PreTrainedModel`, so `save_pretrained`, `from_pretrained` and `generate` are
those of transformers. It takes token sequences as `packing` lays them out (with a plan), or as transformers users
write them (placeholder ids, `token_type_ids` 0 on the prefix and 1 on the target, as PaliGemma has them).

Shapes: B rows, T tokens, I images, N image tokens of one image, M scored target tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from mmprefix.attention import collect_hidden_states
from mmprefix.decoder import DecoderArgs, build_decoder, decoder_config, find_logit_transform
from mmprefix.errors import InputError
from mmprefix.generation import PrefixDecoderConfig, PrefixDecoderModel, cached_length, plan_of_rows, run_decoder
from mmprefix.last_layer import find_label_only, restrict_last_layer
from mmprefix.loss import (
    LogitTransform,
    LossNormalization,
    Reduction,
    TiedWeight,
    linear_cross_entropy,
    sparse_embedding,
    target_cross_entropy,
)
from mmprefix.masks import PrefixVisibility
from mmprefix.packing import PackedBatch, PrefixPlan, PromptBatch
from mmprefix.probe import ProbeReport, check_prefix_lm, probe
from mmprefix.sequence import IGNORE_INDEX
from mmprefix.stored_weights import computing_in_float32
from mmprefix.vision import ConnectorArgs, VisionArgs, VisionEncoder, VisionSpec, build_connector, resolve_vision


class MMPrefixConfig(PrefixDecoderConfig):
    """Config of an encoder, a connector and a decoder.

    Args:
        vision_config: `VisionSpec.to_dict()`.
        text_config: config of the decoder, or its dict form.
        connector: ``{"kind": ..., "factor": ...}``, see `ConnectorArgs`.
        image_token_id: placeholder id of image positions; may lie beyond the decoder's vocabulary.
        prefix_visibility: `full`, `nested` or `causal`.
        shared_prefix: whether several targets may branch off one prefix on this decoder.
        logit_transform: `LogitTransform` as a dict, where the loss may be computed from hidden states in chunks.
        label_only: modules of the decoder's last layer that run at label positions only, see `last_layer`.
        kwargs: those of `PrefixDecoderConfig`.
    """

    model_type = "mmprefix"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        image_token_id: int = 0,
        prefix_visibility: PrefixVisibility = "full",
        shared_prefix: bool = True,
        logit_transform: dict[str, Any] | None = None,
        label_only: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.vision_config = vision_config
        self.connector = connector or {"kind": "linear"}
        self.image_token_id = image_token_id
        self.prefix_visibility = prefix_visibility
        self.shared_prefix = shared_prefix
        self.logit_transform = logit_transform
        self.label_only = list(label_only)
        super().__init__(text_config=text_config, **kwargs)

    def note(self, report: ProbeReport, decoder: PreTrainedModel) -> None:
        """Enters what the probe found out about the decoder, and what is found by looking at it, or at a tiny copy."""
        self.shared_prefix, self.refused_caches = report.can_share, list(report.refused_caches)
        self.mask_free = report.dense_reason is None
        transform = find_logit_transform(decoder)
        self.logit_transform = None if transform is None else asdict(transform)
        self.label_only = find_label_only(decoder) if self.mask_free else []

    @property
    def vision_spec(self) -> VisionSpec:
        """The encoder's specification."""
        assert self.vision_config is not None
        return VisionSpec.from_dict(self.vision_config)


@dataclass
class MMPrefixOutput(ModelOutput):
    """Output of `MMPrefixForConditionalGeneration`.

    Attributes:
        loss: float scalar, mean over target tokens; only where `labels` were given.
        logits: float ``[B, T, V]``, or ``[M, V]`` where a plan names label positions.
        past_key_values: the decoder's cache.
        label_states: float ``[M, W]``, in place of logits where they were asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    label_states: Tensor | None = None


class MMPrefixForConditionalGeneration(PrefixDecoderModel):
    """A timm encoder, a connector and any causal LM of transformers, with a bidirectional prefix."""

    config_class = MMPrefixConfig
    config: MMPrefixConfig
    input_modalities = ("image", "text")
    # The loss is a mean over the batch's own targets; trainers that accumulate have to average it themselves.
    accepts_loss_kwargs = False

    def __init__(self, config: MMPrefixConfig) -> None:
        super().__init__(config)
        spec = config.vision_spec
        self.vision = VisionEncoder(spec)
        width = self.decoder.get_input_embeddings().weight.shape[1]
        self.connector, self.num_image_tokens = build_connector(ConnectorArgs(**config.connector), spec, width)
        restrict_last_layer(self.decoder, config.label_only)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        vision: VisionArgs,
        connector: ConnectorArgs,
        decoder: DecoderArgs,
        *,
        image_token_id: int,
        prefix_visibility: PrefixVisibility = "full",
        special_tokens: dict[str, int] | None = None,
        vocab_size: int | None = None,
        decoder_dtype: torch.dtype | None = torch.float32,
    ) -> MMPrefixForConditionalGeneration:
        """A model from its parts, with their pretrained weights where asked for.

        Args:
            vision, connector, decoder: the parts.
            image_token_id: placeholder id.
            prefix_visibility: how prefix tokens see each other.
            special_tokens: `bos_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer.
            vocab_size: ids that the tokenizer can yield; fills an inline decoder config that names none.
            decoder_dtype: of the decoder's weights; None leaves pretrained ones in their files, see `build_decoder`. All
                else is float32.

        Raises:
            InputError: parts that don't exist, don't fit, or a decoder that does not obey the prefix mask.
        """
        spec = resolve_vision(vision)
        if decoder.config is not None:
            defaults = {**(special_tokens or {}), **({"vocab_size": vocab_size} if vocab_size else {})}
            decoder = replace(decoder, config={**defaults, **decoder.config})
        text_config = decoder_config(decoder)
        if vocab_size is not None and vocab_size > text_config.vocab_size:
            raise InputError(
                f"model.decoder: expected a vocabulary of at least {vocab_size} (the tokenizer's), "
                f"got vocab_size {text_config.vocab_size}"
            )
        if vocab_size is not None and decoder.name is not None and vocab_size < 0.5 * text_config.vocab_size:
            warnings.warn(
                f"{decoder.name}: its vocabulary has {text_config.vocab_size} tokens, the tokenizer {vocab_size}: "
                "is it the decoder's own?",
                stacklevel=2,
            )
        language_model = build_decoder(decoder, text_config, decoder_dtype)
        tokens: dict[str, Any] = dict(special_tokens or {})
        config = MMPrefixConfig(
            vision_config=spec.to_dict(),
            # A copy: the library sets the outer model's attention implementation on the config it is given.
            text_config=copy.deepcopy(language_model.config),
            connector={"kind": connector.kind, "factor": connector.factor},
            image_token_id=image_token_id,
            prefix_visibility=prefix_visibility,
            decoder_attention=language_model.config._attn_implementation,
            **tokens,
        )
        width = language_model.get_input_embeddings().weight.shape[1]
        model = cls.assemble(
            config,
            VisionEncoder(spec, vision.pretrained, vision.interpolate_position_embeddings),
            build_connector(connector, spec, width)[0],
            language_model,
        )
        model.generation_config.update(**tokens)
        return model

    @classmethod
    def assemble(
        cls, config: MMPrefixConfig, vision: VisionEncoder, connector: nn.Module, decoder: PreTrainedModel
    ) -> MMPrefixForConditionalGeneration:
        """A model around finished parts, which it takes as they are; the decoder is proved to obey.

        Args:
            config: of the whole; what the probe finds is entered here.
            vision, connector, decoder: the parts, on one device.

        Raises:
            InputError: a decoder that does not obey the prefix mask.
        """
        with torch.device("meta"):  # only the frame: a second set of weights would be made for nothing
            model = cls(config)
        model.vision, model.connector = vision, connector
        report = model.replace_decoder(decoder)
        for line in report.warnings():
            warnings.warn(line, stacklevel=3)
        model.tie_weights()
        return model

    def replace_decoder(self, decoder: PreTrainedModel) -> ProbeReport:
        """Puts another decoder, or the same one with adapters, in the place of the present one.

        Returns:
            What the probe found about it; entered in the config, too.

        Raises:
            InputError: one that does not obey the prefix mask.
        """
        super().replace_decoder(decoder)
        report = probe(decoder.config, decoder.config._attn_implementation, decoder)
        if report.refusal is not None:
            raise InputError(report.refusal)
        with computing_in_float32(decoder):
            check_prefix_lm(decoder)
            self.config.note(report, decoder)
        restrict_last_layer(decoder, self.config.label_only)
        return report

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises what `from_pretrained` did not find, and buffers that are never saved.

        timm and torch have initialised everything else when it was built; the library's default would undo that.
        """
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]
        elif isinstance(module, nn.Linear) and any(module is part for part in self.connector.modules()):
            module.reset_parameters()

    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        """What `VisionEncoder` takes, ``[I, 3, H, W]`` -> image tokens in the decoder's width, float ``[I, N, W]``."""
        tokens: Tensor = self.connector(self.vision(pixel_values))
        return tokens

    def image_tokens_of(self, batch: PackedBatch | PromptBatch) -> Tensor | None:
        """Image tokens of a batch's images, float ``[I, N, W]``; cached features only pass the connector.

        None for a batch without images of its own.
        """
        return self._image_tokens_of(batch)

    # Apart, for the reason in `_label_pass`.
    def _image_tokens_of(self, batch: PackedBatch | PromptBatch) -> Tensor | None:
        if batch.image_features is not None:
            # They are stored in bfloat16, the connector computes in the precision of its weights.
            tokens: Tensor = self.connector(batch.image_features.to(next(self.connector.parameters()).dtype))
            return tokens
        return None if batch.pixel_values is None else self.get_image_tokens(batch.pixel_values)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_tokens: Tensor | None = None,
        plan: PrefixPlan | None = None,
        prefix_length: int | None = None,
        unpadded: bool = False,
        logits_to_keep: int | Tensor = 0,
        return_label_states: bool = False,
        **kwargs: Any,
    ) -> MMPrefixOutput:
        """One pass.

        Args:
            input_ids: int64 ``[B, T]``, `image_token_id` at image positions.
            pixel_values: float ``[I, 3, H, W]``, normalised, or uint8, which is normalised here.
            attention_mask: int64 ``[B, T]`` (with a cache, ``[B, past + T]``), 0 on padding.
            position_ids: int64 ``[B, T]``; by default counted from `attention_mask`.
            token_type_ids: int64 ``[B, T]``, 0 on the prefix, 1 on the target. Without it everything is prefix.
            past_key_values: cache of a prefill; what follows is target.
            inputs_embeds: float ``[B, T, W]`` in place of `input_ids`, images already in it.
            labels: int64 ``[B, T]``, aligned with `input_ids` as transformers has them, `IGNORE_INDEX` elsewhere.
            image_tokens: float ``[I, N, W]`` from `get_image_tokens`, in place of `pixel_values`; or ``[B, P, W]``, an entry
                for each row, of which a row with fewer placeholders takes the first.
            plan: from `packing.collate`, in place of `token_type_ids`.
            prefix_length: with a cache, how many of its columns are prefix; sliding-window layers need to know.
            unpadded: with `prefix_length`, whether all of the prompts' columns are real. `generate` sets both.
            logits_to_keep: how many positions, from the last, get logits, as transformers has it; 0 for all.
            return_label_states: with a plan, no logits, but the hidden states that those of labels are made of.

        Raises:
            ValueError: labels without anything that says where the target starts, or images and placeholders that
                don't match.
        """
        if labels is not None and plan is None and token_type_ids is None:
            raise ValueError(
                "labels need token_type_ids (0 prefix, 1 target) or a plan: the mask can't be told from them"
            )
        if plan is not None and labels is not None and plan.label_positions is not None:
            raise ValueError("expected labels or a plan with label positions, got both")
        if plan is not None and plan.calls and not self.config.mask_free:
            plan = replace(plan, calls=())
        cached = cached_length(past_key_values)
        if inputs_embeds is None:
            assert input_ids is not None
            # With a cache, the images are in it already.
            images = (None, None) if cached else (pixel_values, image_tokens)
            inputs_embeds = self._embed(input_ids, *images, plan, cached)
        if plan is None and not self._sees_all(cached, inputs_embeds.shape[1], unpadded):
            plan = plan_of_rows(
                (inputs_embeds.shape[0], inputs_embeds.shape[1]),
                inputs_embeds.device,
                attention_mask,
                is_image=None if input_ids is None else input_ids == self.config.image_token_id,
                is_target=None if token_type_ids is None else token_type_ids == 1,
                cached=cached,
                prefix_length=prefix_length,
                visibility=self.config.prefix_visibility,
                unpadded=unpadded,
            )
        kwargs |= self._logits_to_keep(logits_to_keep)
        arguments = (self.decoder, inputs_embeds, plan, attention_mask, position_ids, past_key_values)
        if return_label_states:
            with collect_hidden_states() as collected:
                run_decoder(*arguments, **kwargs)
            if len(collected) != 1:
                raise RuntimeError("the decoder's output layer was replaced: call install(model.decoder) again")
            return MMPrefixOutput(label_states=collected[0])
        output = run_decoder(*arguments, **kwargs)
        logits = output.logits
        if plan is not None and plan.label_positions is not None:
            logits = logits.squeeze(0)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
            )
        return MMPrefixOutput(loss=loss, logits=logits, past_key_values=output.get("past_key_values"))

    def target_logits(self, batch: PackedBatch, image_tokens: Tensor | None = None) -> Tensor:
        """Logits of the batch's target tokens, float ``[M, V]``, in the order of ``batch.labels``.

        Args:
            batch: from `packing.collate`.
            image_tokens: float ``[I, N, W]`` from `get_image_tokens`, where they are known already.
        """
        logits = self._label_pass(batch, image_tokens).logits
        assert logits is not None
        return logits

    def _label_pass(
        self,
        batch: PackedBatch,
        image_tokens: Tensor | None,
        embedding_weight: Tensor | None = None,
        hidden_states: bool = False,
    ) -> MMPrefixOutput:
        """A pass over a batch, for logits of its labels or the hidden states that they are made of.

        ``embedding_weight`` ``[V, W]`` takes the place of the token embedding's and gets a sparse gradient.
        """
        if image_tokens is None and batch.image_features is not None:
            image_tokens = self._image_tokens_of(batch)
        pixel_values = batch.pixel_values if image_tokens is None else None
        if embedding_weight is None:
            inputs = {"input_ids": batch.input_ids, "pixel_values": pixel_values, "image_tokens": image_tokens}
        else:
            embeds = self._embed(batch.input_ids, pixel_values, image_tokens, batch.plan, 0, embedding_weight)
            inputs = {"inputs_embeds": embeds}
        # Whoever called has entered a sharded model; entered again, it would give up its layers in the middle of the pass.
        run: Any = self.forward if isinstance(self, FSDPModule) else self
        output: MMPrefixOutput = run(
            **inputs,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            plan=batch.plan,
            return_label_states=hidden_states,
            use_cache=False,
        )
        return output

    def target_loss(
        self,
        batch: PackedBatch,
        normalization: LossNormalization = "tokens",
        image_tokens: Tensor | None = None,
        reduction: Reduction = "sum",
        of_labels: list[Tensor] | None = None,
        blank: Literal["image", "features"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the batch's targets and the count to divide it by, float32 scalars.

        Where the decoder does no more to its logits than scale or cap them, they are made in chunks and never kept.

        Args:
            batch: from `packing.collate`.
            normalization: see `loss.label_weights`.
            image_tokens: float ``[I, N, W]`` from `get_image_tokens`, where they are known already.
            reduction: `mean` for the mean in place of the sum, which is cheaper than to divide it.
            of_labels: where given, each label's own loss, float ``[M]`` without gradient, is appended to it.
            blank: for a batch without images, also run the encoder on one that nobody sees, or the connector on features:
                processes that share layers run them together.
        """
        # Placed nowhere, but part of what the decoder gets: its layers, too, have a gradient to pass on where others have.
        if blank == "image":
            height, width = self.config.vision_spec.image_size
            image_tokens = self.get_image_tokens(
                torch.zeros(1, 3, height, width, dtype=torch.uint8, device=batch.input_ids.device)
            )
        elif blank == "features":
            spec, like = self.config.vision_spec, next(self.connector.parameters())
            image_tokens = self.connector(like.new_zeros(1, spec.num_tokens, spec.width))
        output_layer = self._plain_output_layer()
        if output_layer is None:
            logits = self.target_logits(batch, image_tokens)
            return target_cross_entropy(logits, batch.labels, batch.target_lengths, normalization, reduction, of_labels)
        weight: Tensor = output_layer.weight
        for_embedding = None
        if self._shares_gradient(output_layer):
            for_embedding, weight = TiedWeight.apply(weight)
        hidden = self._label_pass(batch, image_tokens, for_embedding, hidden_states=True).label_states
        assert hidden is not None
        return linear_cross_entropy(
            hidden, weight, output_layer.bias, batch.labels, batch.target_lengths, normalization,
            LogitTransform(**(self.config.logit_transform or {})), reduction, of_labels,
        )  # fmt: skip

    def _plain_output_layer(self) -> nn.Linear | None:
        """The output layer, where logits are its values under a `LogitTransform`; None where more is done."""
        layer = self.get_output_embeddings()
        if self.config.logit_transform is None or layer is None or layer._forward_hooks:
            return None
        if type(layer) is not nn.Linear:  # adapters wrap it
            return None
        # Gradients in float16 have to be scaled before they are rounded.
        return None if _compute_dtype(layer.weight) == torch.float16 else layer

    def _shares_gradient(self, output_layer: nn.Linear) -> bool:
        """Whether the output layer's weight is also the embedding's, learns, and `TiedWeight` may stand for it."""
        embedding = self.get_input_embeddings()
        return (
            isinstance(embedding, nn.Embedding)
            and embedding.weight is output_layer.weight
            and embedding.weight.requires_grad
            and torch.is_grad_enabled()
            # Sums over tokens would round in half precision; graphs of torch.compile know no sparse gradients.
            and embedding.weight.dtype in (torch.float32, torch.float64)
            and self._compiled_call_impl is None
        )

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_tokens: Tensor | None,
        plan: PrefixPlan | None,
        cached: int,
        embedding_weight: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings ``[B, T, W]`` with image tokens in place."""
        is_image = input_ids == self.config.image_token_id
        # The placeholder may lie beyond the vocabulary, so it is never looked up.
        text_ids = input_ids.masked_fill(is_image, 0)
        embedding = self.get_input_embeddings()
        if embedding_weight is None:
            embeds: Tensor = embedding(text_ids)
        else:
            embeds = sparse_embedding(embedding, embedding_weight, text_ids)
        if image_tokens is not None and (plan is None or plan.image_positions is None):
            image_tokens = _without_fillers(image_tokens, is_image)
        if image_tokens is None and pixel_values is not None:
            image_tokens = self.get_image_tokens(pixel_values)
        if image_tokens is None:
            if not cached:
                self._check_no_images(is_image, plan)
            return embeds
        image_tokens = image_tokens.flatten(0, 1).to(embeds.dtype)
        if plan is not None and plan.image_positions is not None and plan.image_sources is not None:
            placed = image_tokens.index_select(0, plan.image_sources)
            if embeds.shape[0] == 1:  # no view: a layer that is compiled on its own would be compiled for its base, too
                return embeds.index_copy(1, plan.image_positions, placed.unsqueeze(0))
            return embeds.flatten(0, 1).index_copy(0, plan.image_positions, placed).view_as(embeds)
        if int(is_image.sum()) != image_tokens.shape[0]:
            raise ValueError(
                f"expected {self.num_image_tokens} placeholders (token {self.config.image_token_id}) per image, "
                f"got {int(is_image.sum())} placeholders for {image_tokens.shape[0]} image tokens"
            )
        return embeds.masked_scatter(is_image.unsqueeze(-1), image_tokens)

    def _check_no_images(self, is_image: Tensor, plan: PrefixPlan | None) -> None:
        """Placeholders are never looked up: without images, they would be read as some token."""
        if plan is not None and plan.image_positions is not None:
            placeholders = plan.image_positions.numel()  # known without asking the device
        else:
            placeholders = int(is_image.sum())
        if placeholders:
            raise ValueError(f"expected pixel_values for {placeholders} image placeholders, got none")

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """transformers' own, without the images once they are in the cache."""
        first = kwargs.get("is_first_iteration", False)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not first and kwargs.get("use_cache", True):
            inputs["image_tokens"] = None
        return inputs

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; the whole prompt is prefix, whatever is generated is target.

        Images are encoded once, also for several beams or returned sequences. Prompts may have different numbers of them.

        Raises:
            ValueError: images that don't match the placeholders of the prompts.
        """
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        pixel_values, image_tokens = kwargs.pop("pixel_values", None), kwargs.pop("image_tokens", None)
        if image_tokens is None and pixel_values is not None:
            with torch.no_grad():
                image_tokens = self.get_image_tokens(pixel_values.to(self.device))
        if image_tokens is not None and prompt is not None:
            image_tokens = _by_prompt(image_tokens, (prompt == self.config.image_token_id).sum(1).tolist())
        if image_tokens is not None:
            kwargs["image_tokens"] = image_tokens
        return super().generate(inputs, *args, **kwargs)


def _by_prompt(image_tokens: Tensor, placeholders: list[int]) -> Tensor | None:
    """Image tokens with an entry for each prompt, which `generate` repeats for its beams, filled up at the end.

    Args:
        image_tokens: float ``[I, N, W]`` in the order of the placeholders, or such entries already.
        placeholders: of each prompt.

    Raises:
        ValueError: other placeholders than image tokens.
    """
    most = max(placeholders, default=0)
    if image_tokens.shape[0] * image_tokens.shape[1] == sum(placeholders):
        parts = image_tokens.flatten(0, 1).split(placeholders)
        return nn.utils.rnn.pad_sequence(parts, batch_first=True) if most else None
    if image_tokens.shape[:2] == (len(placeholders), most):
        return image_tokens if most else None
    raise ValueError(
        f"expected an image token for each placeholder, got {len(image_tokens)} images of {image_tokens.shape[1]} tokens "
        f"for prompts with {placeholders} placeholders"
    )


def _without_fillers(image_tokens: Tensor, is_image: Tensor) -> Tensor:
    """Entries of `_by_prompt`, each cut at the placeholders ``[B, T]`` of its row; others as they are."""
    placeholders = is_image.sum(1)
    if (
        image_tokens.shape[0] != len(placeholders)
        or image_tokens.shape[0] * image_tokens.shape[1] == placeholders.sum()
    ):
        return image_tokens
    columns = torch.arange(image_tokens.shape[1], device=image_tokens.device)
    return image_tokens[columns < placeholders.unsqueeze(1)].unsqueeze(0)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products with a weight run in."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


AutoConfig.register(MMPrefixConfig.model_type, MMPrefixConfig)
AutoModelForImageTextToText.register(MMPrefixConfig, MMPrefixForConditionalGeneration)
