"""Any transformers causal LM as a prefix LM: build it, install the prefix mask, and prove that it obeys.

`build_decoder` makes the decoder from a hub name, a local folder or an inline config. `install` wraps the mask
functions and the output layer; a decoder behaves as before when no plan is set. `check_prefix_lm` perturbs inputs and
looks at outputs, so that an architecture which ignores the mask is refused by name instead of training on leaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mmprefix.attention import DENSE_IMPLEMENTATIONS, prefix_plan, register_masks, select_label_positions
from mmprefix.errors import InputError
from mmprefix.packing import PrefixPlan
from mmprefix.sequence import PREFIX_BRANCH, Region


@dataclass
class DecoderArgs:
    """The text decoder.

    Attributes:
        name: hub name or local folder of a causal LM.
        config: inline config with `model_type`, for a decoder from scratch, instead of `name`.
        pretrained: load the weights of `name`; false takes its config only.
        attn_implementation: `sdpa` or `eager`; by default sdpa where the architecture has it. flash_attention_2
            drops the bidirectional prefix and is not offered.
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    pretrained: bool = True
    attn_implementation: Literal["sdpa", "eager"] | None = None


def decoder_config(args: DecoderArgs) -> PreTrainedConfig:
    """The transformers config of the decoder.

    Raises:
        InputError: neither or both of name and config, an unknown model type, or no causal LM.
    """
    if (args.name is None) == (args.config is None):
        raise InputError("model.decoder: expected exactly one of `name` and `config`, got " + (
            "neither" if args.name is None else "both"))  # fmt: skip
    if args.config is not None:
        settings = dict(args.config)
        model_type = settings.pop("model_type", None)
        if model_type is None:
            raise InputError("model.decoder.config: expected the key `model_type` (llama, gemma2, ...), got none")
        _check_causal(str(model_type), "model.decoder.config")
        try:
            config = AutoConfig.for_model(model_type, **settings)
        except (TypeError, ValueError) as error:
            raise InputError(f"model.decoder.config: {_one_line(error)}") from error
    else:
        try:
            config = AutoConfig.from_pretrained(args.name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"model.decoder.name: cannot read the config of {args.name!r}: {_one_line(error)}"
            ) from error
        if hasattr(config, "text_config"):
            raise InputError(
                f"model.decoder.name: expected a text-only decoder, got {args.name!r}, whose model type "
                f"{config.model_type!r} has a vision part of its own"
            )
        _check_causal(config.model_type, f"model.decoder.name={args.name}")
    return config


def build_decoder(args: DecoderArgs, config: PreTrainedConfig) -> PreTrainedModel:
    """The decoder with its weights, in float32, prefix mask not yet installed."""
    implementation = attention_implementation(args, config)
    try:
        if args.name is not None and args.pretrained:
            return AutoModelForCausalLM.from_pretrained(
                args.name, dtype=torch.float32, attn_implementation=implementation
            )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
    except OSError as error:
        raise InputError(f"model.decoder.name: cannot load {args.name!r}: {_one_line(error)}") from error
    except ValueError as error:  # an implementation that the architecture does not have, sizes that don't divide
        raise InputError(f"model.decoder: {config.model_type}: {_one_line(error)}") from error


def attention_implementation(args: DecoderArgs, config: PreTrainedConfig) -> str | None:
    """What to ask transformers for; None leaves it the choice.

    Raises:
        InputError: sdpa for an architecture with a soft-cap on attention scores, which sdpa would drop.
    """
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if soft_capped and args.attn_implementation == "sdpa":
        raise InputError(
            f"model.decoder.attn_implementation: expected eager for {config.model_type}, got sdpa, which drops its soft-cap"
        )
    return "eager" if soft_capped else args.attn_implementation


def _check_causal(model_type: str, where: str) -> None:
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"{where}: expected a causal LM of transformers, got model type {model_type!r}, which is none")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _before_output_layer(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (select_label_positions(args[0]), *args[1:])


def install(decoder: PreTrainedModel) -> PreTrainedModel:
    """Makes the decoder follow the plan of `attention.prefix_plan`. Idempotent.

    Raises:
        InputError: an attention implementation that takes no dense mask.
    """
    implementation = decoder.config._attn_implementation
    if implementation not in DENSE_IMPLEMENTATIONS:
        hint = ", which drops the bidirectional prefix silently" if "flash" in str(implementation) else ""
        raise InputError(
            f"model.decoder.attn_implementation: expected one of {', '.join(DENSE_IMPLEMENTATIONS)}, "
            f"got {implementation}{hint}"
        )
    output_layer = decoder.get_output_embeddings()
    if output_layer is None:
        raise InputError(f"{type(decoder).__name__} has no output embeddings: expected a decoder with an LM head")
    register_masks()
    if _before_output_layer not in output_layer._forward_pre_hooks.values():
        output_layer.register_forward_pre_hook(_before_output_layer)
    return decoder


def uninstall(decoder: PreTrainedModel) -> PreTrainedModel:
    """Removes what `install` put on this decoder. The process-wide mask wrappers stay: they are inert without a plan."""
    output_layer = decoder.get_output_embeddings()
    for key, hook in list(output_layer._forward_pre_hooks.items()):
        if hook is _before_output_layer:
            del output_layer._forward_pre_hooks[key]
    return decoder


@torch.no_grad()
def check_prefix_lm(decoder: PreTrainedModel) -> None:
    """Proves on the decoder itself that it obeys the rule, with 4 prefix and 3 target tokens in one forward pass.

    Row 0 is the base; row 1 changes the last target token, which no other token may notice; row 2 changes the last
    prefix token, which the first must notice.

    Raises:
        InputError: a leak into the prefix or past the causal order, or a prefix that stayed causal.
    """
    prefix, total = 4, 7
    width = decoder.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, total, width, generator=generator)
    rows = base.repeat(3, 1, 1)
    rows[1, -1] += torch.randn(width, generator=generator)
    rows[2, prefix - 1] += torch.randn(width, generator=generator)
    # Real decoders see embeddings of a certain size; far beyond it a saturated layer could hide a change.
    rows = rows * decoder.get_input_embeddings().weight.float().std().cpu()
    index = torch.arange(total, device=next(decoder.parameters()).device).expand(3, -1)
    zeros = torch.zeros_like(index)
    plan = PrefixPlan(
        segment=zeros,
        branch=torch.where(index < prefix, PREFIX_BRANCH, 0),
        region=torch.where(index < prefix, int(Region.INSTRUCTION), int(Region.TARGET)),
        position=index,
    )
    hidden = _hidden_states(decoder, rows, index, plan)
    scale = hidden[0].abs().max().item()
    leak = (hidden[1, :-1] - hidden[0, :-1]).abs().max().item()
    reach = (hidden[2, 0] - hidden[0, 0]).abs().max().item()
    architecture = type(decoder).__name__
    if not leak <= 1e-4 * scale:
        raise InputError(f"{architecture} is no causal LM: a target token leaks into what comes before it")
    if not reach > 1e-6 * scale:
        raise InputError(f"{architecture} can't be a prefix LM: its prefix stays causal under a bidirectional mask")


@torch.no_grad()
def can_share_prefix(decoder: PreTrainedModel) -> bool:
    """Whether several targets may branch off one prefix: whether a second branch comes out as it does alone.

    False for decoders that count distances by column (ALiBi) or carry a state along the row (recurrent hybrids).
    """
    prefix, branch = 4, 3
    width = decoder.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, prefix + 2 * branch, width, generator=generator)
    row = row * decoder.get_input_embeddings().weight.float().std().cpu()
    device = next(decoder.parameters()).device
    column = torch.arange(prefix + 2 * branch, device=device).unsqueeze(0)
    branches = torch.where(column < prefix, PREFIX_BRANCH, (column - prefix) // branch)
    position = torch.where(column < prefix + branch, column, column - branch)
    in_prefix = column < prefix
    region = torch.where(in_prefix, int(Region.INSTRUCTION), int(Region.TARGET))
    plan = PrefixPlan(torch.zeros_like(column), branches, region, position)
    shared = _hidden_states(decoder, row, position, plan)[:, -branch:]
    kept = torch.cat([row[:, :prefix], row[:, -branch:]], dim=1)
    column, in_prefix = column[:, : prefix + branch], in_prefix[:, : prefix + branch]
    plan = PrefixPlan(
        torch.zeros_like(column), torch.where(in_prefix, PREFIX_BRANCH, 0), region[:, : prefix + branch], column
    )
    alone = _hidden_states(decoder, kept, column, plan)[:, -branch:]
    return bool((shared - alone).abs().max() <= 1e-4 * alone.abs().max())


def _hidden_states(decoder: PreTrainedModel, rows: Tensor, position_ids: Tensor, plan: PrefixPlan) -> Tensor:
    """Last hidden states, float32, of embeddings ``[B, T, W]`` under a plan; leaves the decoder's mode as it was."""
    was_training = decoder.training
    decoder.eval()
    try:
        with prefix_plan(plan):
            hidden: Tensor = decoder(
                inputs_embeds=rows.to(next(decoder.parameters())),
                attention_mask=torch.ones_like(position_ids),
                position_ids=position_ids,
                use_cache=False,
                output_hidden_states=True,
            ).hidden_states[-1]
    finally:
        decoder.train(was_training)
    return hidden.float()
