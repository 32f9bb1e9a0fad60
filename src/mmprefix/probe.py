"""Proves by perturbation that a decoder is an exact prefix LM: six properties, forward and gradient; and a seventh,
whether it attends without a mask.

There is no list of supported models. `probe` makes a tiny random copy of the decoder's config, with windows shorter
than the sequences it feeds, and looks at what moves when something changes:

1. Change a target token: nothing before it moves, and no prefix position.
2. Change a prefix token: every prefix position moves, and those before it in the first layer that looks ahead.
3. What stands in padding moves nothing, and a padded row equals the same row unpadded.
4. Samples packed into one row, and several targets branching off one prefix, equal the same samples alone.
5. With a causal prefix, the outputs are the decoder's own (a lost sliding window would show).
6. Prefill and cached decoding, prompts of different lengths in one batch, give the tokens of the full computation,
   with a dynamic and with a static cache.
7. Attention without a mask, over a packed row, gives what the dense mask gives.

A decoder that fails 1, 2, 3 or 5 is refused. One that fails 4 gets no packing, or no shared prefix. One that fails 6
is refused the cache with which it fails. One that fails 7 gets a dense mask.

`check_prefix_lm` is the short form, for the decoder itself rather than a copy: one forward pass.

Shapes: B rows, T tokens, W width of the decoder, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from mmprefix.attention import MaskFreeError, only_mask_free
from mmprefix.decoder import WINDOW_SETTINGS, install, is_installed, uninstall
from mmprefix.errors import InputError
from mmprefix.files import replacing
from mmprefix.generation import run_decoder
from mmprefix.masks import PADDING_SEGMENT, PrefixVisibility
from mmprefix.packing import PrefixPlan, collate, map_tensors
from mmprefix.prefix_lm import PrefixLMForCausalLM
from mmprefix.sequence import PREFIX_BRANCH, PromptLayout, Region, TokenSequence

WINDOW = 3
"""Sliding windows and chunks of the tiny copy, in tokens."""
PREFIX, TARGET = 5, 6
"""Tokens of the sequences it is fed; both longer than the window."""

TOLERANCE = 1e-4
"""Largest deviation that passes for numerical error, relative to the largest value compared."""
HALF_TOLERANCE = 0.1
"""The same for half precision, of lengths of vectors. Several times what rounding does, so that no kernel is refused for
it; a gradient that is a small part of the whole can be wrong and pass (gpt2's in queries)."""
HALF_DRAWS = 3
"""One that passes is enough: in a mixture of experts, rounding sends some tokens elsewhere; a wrong kernel is wrong in
all."""

FAR_COLUMNS = 1536
FAR_TOLERANCE = 2.0
"""Of packing in bfloat16 in a long row, in units of the error that bfloat16 makes on a sample alone. Measured on 35
architectures: at most 0.8 where positions are counted inside the sample, 3.5 and more with ALiBi."""

CACHES = ("dynamic", "static")

NAMES = {
    1: "no target token is seen before it",
    2: "the whole prefix is seen",
    3: "padding moves nothing",
    4: "packed and shared equal alone",
    5: "a causal prefix is the native decoder",
    6: "cached decoding equals the full forward",
    7: "attention without a mask equals the mask",
}


@dataclass(frozen=True)
class Property:
    """Outcome of one property.

    Attributes:
        number: 1 to 6.
        forward: largest deviation of outputs, relative to the largest output; for property 2 the smallest effect.
        gradient: the same of gradients; None where the property has none.
        failures: what failed, in words; empty where it holds.
    """

    number: int
    forward: float
    gradient: float | None = None
    failures: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return not self.failures


@dataclass(frozen=True)
class ProbeReport:
    """What the probe found about a decoder.

    Attributes:
        architecture: class name of the causal LM.
        model_type: of its config.
        attention: the attention implementation that was probed.
        layers: what the copy's layers attend by (`full`, `window 3`, ...).
        properties: one for each.
        stateful: whether it carries a recurrent state, through which the prefix is read from left to right only.
    """

    architecture: str
    model_type: str
    attention: str
    layers: str
    properties: tuple[Property, ...]
    stateful: bool = False

    def __getitem__(self, number: int) -> Property:
        return next(p for p in self.properties if p.number == number)

    @property
    def refusal(self) -> str | None:
        """Why this decoder can't be a prefix LM, in one line; None if it can."""
        for number in (1, 2, 3, 5):
            if not self[number].holds:
                return (
                    f"{self.architecture} ({self.model_type}, {self.attention}) can't be a prefix LM: property {number}, "
                    f"{NAMES[number]!r}, fails: {'; '.join(self[number].failures)}"
                )
        return None

    @property
    def can_pack(self) -> bool:
        """Whether several samples may share a row."""
        return not self._fails(4, "packed")

    @property
    def can_share(self) -> bool:
        """Whether several targets may branch off one prefix."""
        return not self._fails(4, "shared")

    @property
    def refused_caches(self) -> tuple[str, ...]:
        """`dynamic`, `static`: caches with which generation would go wrong."""
        return tuple(name for name in CACHES if self._fails(6, name))

    @property
    def dense_reason(self) -> str | None:
        """Why packed rows can't be attended to without a mask, in words; None if they can."""
        if not self.can_pack:
            return "samples cannot be packed into one row"
        return None if self[7].holds else "; ".join(self[7].failures)

    def _fails(self, number: int, what: str) -> bool:
        return any(failure.startswith(what) for failure in self[number].failures)

    def warnings(self, packing: bool = True) -> list[str]:
        """What a user of this decoder should know, in one line each; ``packing`` asks about rows, too."""
        lines = []
        if self.stateful:
            lines.append("recurrent layers read the prefix from left to right only")
        if packing and not self.can_pack:
            lines.append("samples cannot be packed into one row")
        if packing and not self.can_share:
            lines.append("targets cannot share a prefix; each becomes a sequence of its own")
        if "dynamic" in self.refused_caches:
            lines.append("generation with a cache is wrong; it computes everything again for each token")
        lines += [
            f"generation with a {name} cache is wrong and refused" for name in self.refused_caches if name != "dynamic"
        ]
        return [f"{self.architecture}: {line}" for line in lines]

    def table(self) -> str:
        """The report as a table for people."""
        lines = [
            f"{self.architecture} ({self.model_type}, {self.attention}), layers: {self.layers}",
            f"{'property':<45}{'forward':>9}{'gradient':>10}",
        ]
        for p in self.properties:
            gradient = "" if p.gradient is None else f"{p.gradient:.0e}"
            verdict = "ok" if p.holds else f"FAILS: {'; '.join(p.failures)}"
            lines.append(f"{p.number} {NAMES[p.number]:<43}{p.forward:>9.0e}{gradient:>10}  {verdict}")
        lines += self.warnings()
        lines.append(self.refusal or f"{self.architecture}: an exact prefix LM")
        return "\n".join(lines)


def probe(
    config: PreTrainedConfig, attention: str | None = None, decoder: PreTrainedModel | None = None
) -> ProbeReport:
    """Proves the six properties on a tiny random copy of a config. Takes a few seconds once, then it is remembered.

    Args:
        config: of any causal LM of transformers.
        attention: the attention implementation, None for the library's choice.
        decoder: the decoder itself, for architectures whose config can't be made tiny: it is probed in place of a
            copy, without gradients.

    Raises:
        InputError: no copy can be made, and there is no decoder to take its place.
    """
    path = _cache_path(config, attention)
    # Code that comes with a checkpoint may change under the same config: its report is not remembered.
    own_code = not type(config).__module__.startswith("transformers.")
    report = None if own_code else _read_report(path)
    if report is None:
        try:
            copied = tiny_copy(config, attention)
            report = probe_decoder(copied)
        except InputError:
            raise
        except Exception as error:  # whatever an architecture raises that can't be built or run at this size
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if decoder is None:
                raise InputError(
                    f"probe: no tiny copy of model type {config.model_type!r} can be made and run: {reason}"
                ) from error
            try:
                return probe_decoder(decoder, gradients=False)
            except Exception as own_error:
                raise InputError(
                    f"probe: {type(decoder).__name__} can be run neither as a tiny copy ({reason}) nor as it is: "
                    f"{type(own_error).__name__}: {' '.join(str(own_error).split())[:200]}"
                ) from own_error
        if not own_code:
            _write_report(path, report)
    return report


def _cache_path(config: PreTrainedConfig, attention: str | None) -> Path:
    """Where the report of this config lies: under a hash of config, library versions and our own sources."""
    digest = hashlib.sha256()
    settings = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(repr((attention, torch.__version__, transformers.__version__)).encode())
    sources = "probe", "attention", "decoder", "generation", "masks", "packing", "prefix_lm", "sequence", "varlen"
    for source in sources:
        digest.update((Path(__file__).parent / f"{source}.py").read_bytes())
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mmprefix" / "probe" / f"{config.model_type}-{digest.hexdigest()[:32]}.json"


def _read_report(path: Path) -> ProbeReport | None:
    try:
        content = json.loads(path.read_text())
        properties = tuple(Property(**{**p, "failures": tuple(p["failures"])}) for p in content.pop("properties"))
        return ProbeReport(**content, properties=properties)
    except (OSError, ValueError, TypeError, KeyError):  # none, or a file that something else has written
        return None


def _write_report(path: Path, report: ProbeReport) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(report)))
    except OSError:
        pass  # a home without room or rights: the next run probes again


# The tiny copy --------------------------------------------------------------------------------------------------------

_HEADS, _KEY_VALUE_HEADS, _HEAD_DIM = 4, 2, 16
_WIDTH = _HEADS * _HEAD_DIM

_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), _HEAD_DIM),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp",
         "moe_intermediate_size", "shared_expert_intermediate_size"), 96,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 24),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group"), 2),
    **dict.fromkeys(("topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(WINDOW_SETTINGS, WINDOW),
    # Recurrent hybrids: every second layer attends, and heads x head size is twice the width.
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "mamba_expand"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "mamba_n_groups"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state"), 16),
    "mamba_d_ssm": 2 * _WIDTH,
    "rotary_dim": _HEAD_DIM // 2,
    "query_pre_attn_scalar": _HEAD_DIM,
    "vocab_size": 96,
}  # fmt: skip
"""Settings that are sizes, under the names that configs of transformers give them, and the size in the copy."""
_LAYER_NUMBERS = ("moe_layers", "full_attn_idxs", "attn_layer_indices")
"""Settings that list the numbers of some layers."""
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def tiny_settings(config: PreTrainedConfig, window: int = WINDOW) -> dict[str, Any]:
    """The settings of a config with every size made small; what decides how it attends stays.

    The copy keeps one layer of each kind, two at least; grouped heads stay grouped; windows are shorter than the
    sequences of the probe.
    """
    settings = copy.deepcopy(config.to_dict())
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "auto_map", "quantization_config"):
        settings.pop(name, None)
    heads, layers = getattr(config, "num_attention_heads", None), config.num_hidden_layers
    kept = _one_layer_of_each_kind(settings, layers)
    count = len(kept)
    for name in _per_layer(settings, layers):
        settings[name] = [settings[name][number] for number in kept]
    for name in _LAYER_NUMBERS:
        if isinstance(settings.get(name), list):
            settings[name] = [new for new, old in enumerate(kept) if old in settings[name]]
    if isinstance(settings.get("block_types"), list):  # recurrent_gemma: a pattern that the layers repeat
        count = max(count, len(settings["block_types"]))
    if "attention_types" in settings:  # gpt_neo: [[kinds, repetitions], ...]
        settings["attention_types"] = [[list(dict.fromkeys(k for ks, _ in settings["attention_types"] for k in ks)), 1]]
        settings.pop("attention_layers", None)
        count = len(settings["attention_types"][0][0])
    for name, size in _SIZES.items():
        name = config.attribute_map.get(name, name)
        if isinstance(settings.get(name), int) and not isinstance(settings[name], bool):
            settings[name] = size
    for name in _LAYER_COUNTS:
        if name in settings:
            settings[name] = count
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(settings.get(name), int):
            own = settings[name]
            settings[name] = _HEADS if own == heads else 1 if own == 1 else _KEY_VALUE_HEADS
    if "word_embed_proj_dim" in settings:  # opt: a projection where it differs from the width
        settings["word_embed_proj_dim"] = _WIDTH if config.word_embed_proj_dim == config.hidden_size else _WIDTH // 2
    for name in WINDOW_SETTINGS:
        if settings.get(config.attribute_map.get(name, name)) == WINDOW:
            settings[config.attribute_map.get(name, name)] = window
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    _shorten_rope_factors(settings, config)
    return settings


def _per_layer(settings: dict[str, Any], layers: int) -> list[str]:
    """Names of settings that hold one entry for each layer."""
    return [
        name
        for name, value in settings.items()
        if isinstance(value, list) and len(value) == layers and name not in (*_LAYER_NUMBERS, "attention_layers")
    ]


def _one_layer_of_each_kind(settings: dict[str, Any], layers: int) -> list[int]:
    """Numbers of the layers that the copy keeps, two at least."""
    columns = [settings[name] for name in _per_layer(settings, layers)]
    columns += [
        [number in settings[name] for number in range(layers)]
        for name in _LAYER_NUMBERS
        if isinstance(settings.get(name), list)
    ]
    kinds = [tuple(map(str, kind)) for kind in zip(*columns, strict=True)] or [()] * layers
    first = {kinds.index(kind) for kind in kinds}
    for number in range(layers):
        if len(first) >= 2:
            break
        first.add(number)
    return sorted(first)


def _shorten_rope_factors(settings: dict[str, Any], config: PreTrainedConfig) -> None:
    """Longrope lists a factor for each rotated pair of a head: keep as many as the copy rotates."""
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        for name, value in part.items():
            if isinstance(value, list):
                part[name] = value[: max(1, len(value) * _HEAD_DIM // width)]


def tiny_copy(config: PreTrainedConfig, attention: str | None = None, window: int = WINDOW) -> PreTrainedModel:
    """A random model of a tiny copy of the config, float32, on the CPU, in eval mode.

    Its weights are larger than those of a fresh model, whose attention is nearly uniform: a wrong mask would hardly
    show.
    """
    tiny = type(config)(**tiny_settings(config, window))
    long = [name for name in WINDOW_SETTINGS if (getattr(tiny, name, None) or 0) > window]
    if long:  # under a name that we don't know: the properties would not reach over it
        raise ValueError(f"{long[0]} stays {getattr(tiny, long[0])} in the copy")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
            # Small against what layers add: tied, a token would otherwise predict itself, whatever it sees.
            model.get_input_embeddings().weight.normal_(std=0.02)
    return model.eval()


# The properties -------------------------------------------------------------------------------------------------------

Row = Sequence[tuple[str, int]]
"""A row as runs of tokens: ``("prefix", 5), ("target", 6)``; a prefix begins a sample, further targets branch off."""


def lay_out(rows: Sequence[Row], visibility: PrefixVisibility = "full") -> PrefixPlan:
    """The plan of rows of equal length, `padding` included."""
    columns: list[list[list[int]]] = []
    for row in rows:
        tokens: list[list[int]] = []
        segment, branch, prefix_length = -1, PREFIX_BRANCH, 0
        for kind, length in row:
            if kind == "prefix":
                segment, branch, prefix_length = segment + 1, PREFIX_BRANCH, length
                tokens += [[segment, branch, int(Region.INSTRUCTION), n] for n in range(length)]
            elif kind == "target":
                branch += 1
                tokens += [[segment, branch, int(Region.TARGET), prefix_length + n] for n in range(length)]
            else:
                tokens += [[PADDING_SEGMENT, PREFIX_BRANCH, int(Region.INSTRUCTION), 0]] * length
        columns.append(tokens)
    segments, branches, regions, positions = torch.tensor(columns).unbind(-1)
    return PrefixPlan(segments, branches, torch.zeros_like(branches), regions, positions, visibility)


class _Subject:
    """A decoder under test: random embeddings in, logits out."""

    def __init__(self, decoder: PreTrainedModel, gradients: bool) -> None:
        self.decoder, self.gradients = decoder, gradients
        weight = decoder.get_input_embeddings().weight
        self.width, self.like = weight.shape[1], weight
        # Decoders see embeddings of a certain size; far beyond it a saturated layer could hide a change.
        self.scale = weight.detach().float().std().item()
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        """Embeddings ``[*shape, W]``."""
        values = torch.randn(*shape, self.width, generator=self.generator) * self.scale
        return values.to(self.like)

    def logits(self, embeds: Tensor, plan: PrefixPlan | None) -> Tensor:
        """float32 ``[B, T, V]``; without a plan, the decoder's own."""
        return self._run(embeds, plan).logits.float()  # type: ignore[no-any-return]

    def layers(self, embeds: Tensor, plan: PrefixPlan) -> list[Tensor]:
        """float32 ``[B, T, ...]`` after each layer; where copying the decoder is too dear, its logits only."""
        if not self.gradients:
            return [self.logits(embeds, plan)]
        # On a copy: transformers leaves hooks on a model that was asked for its hidden states.
        copied = _Subject(install(copy.deepcopy(self.decoder)), gradients=False)
        output = copied._run(embeds, plan, output_hidden_states=True)
        uninstall(copied.decoder)
        return [states.float() for states in output.hidden_states[1:]]

    def _run(self, embeds: Tensor, plan: PrefixPlan | None, **kwargs: Any) -> Any:
        columns = torch.arange(embeds.shape[1]).expand(embeds.shape[:2])
        mask = torch.ones_like(columns) if plan is None else (plan.segment != PADDING_SEGMENT).long()
        # Rows padded on the left have plans that count columns; their tokens count from the first real one.
        left = mask[:, :1] == 0
        positions = columns if plan is None else torch.where(left, (mask.cumsum(-1) - 1).clamp(min=0), plan.position)
        device = embeds.device
        plan = None if plan is None else map_tensors(plan, lambda t: t.to(device))
        return run_decoder(self.decoder, embeds, plan, mask.to(device), positions.to(device), use_cache=False, **kwargs)

    def gradient(self, embeds: Tensor, plan: PrefixPlan | None, counted: Tensor | None = None) -> Tensor:
        """Gradient in the embeddings ``[B, T, W]`` of a fixed random projection of the logits.

        Args:
            embeds: ``[B, T, W]``.
            plan: as in `logits`.
            counted: weights ``[B, T]`` of the positions whose logits count, all by default.
        """
        embeds = embeds.clone().requires_grad_()
        logits = self.logits(embeds, plan)
        projection = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(1)).to(logits)
        scores = logits @ projection
        (scores if counted is None else scores * counted.to(scores)).sum().backward(inputs=[embeds])
        assert embeds.grad is not None
        return embeds.grad.float()


def _deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _worst(*deviations: float) -> float:
    """The largest; NaN if there is one, over which `max` passes in silence unless it comes first."""
    return math.nan if any(map(math.isnan, deviations)) else max(deviations)


def _target_is_hidden(s: _Subject) -> Property:
    plan = lay_out([[("prefix", PREFIX), ("target", TARGET)]] * (TARGET + 1))
    rows = s.random(1, PREFIX + TARGET).repeat(TARGET + 1, 1, 1)
    for k in range(TARGET):  # row k + 1 changes target token k
        rows[k + 1, PREFIX + k] += s.random(1)[0]
    failures = []
    with torch.no_grad():
        logits = s.logits(rows, plan)
    moved = (logits[1:] - logits[:1]).abs().amax(-1) / logits.abs().max()  # [TARGET, T]
    before = torch.arange(PREFIX + TARGET) < PREFIX + torch.arange(TARGET).unsqueeze(1)
    leaks = moved.cpu().masked_fill(~before, 0)
    forward = leaks.max().item()
    if not forward <= TOLERANCE:
        k, q = divmod(int(leaks.argmax()), PREFIX + TARGET)
        where = f"prefix token {q}" if q < PREFIX else f"target token {q - PREFIX}"
        failures.append(f"target token {k} leaks into {where}")
    elif not moved.cpu().masked_fill(before, 0).amax(-1).min() > TOLERANCE:
        failures.append("a changed target token shows nowhere")
    gradient = None
    if s.gradients:
        counted = before.float()
        gradients = s.gradient(
            rows[:1].repeat(TARGET, 1, 1), lay_out([[("prefix", PREFIX), ("target", TARGET)]] * TARGET), counted
        )
        later = gradients.abs().amax(-1).cpu().masked_fill(before, 0).max().item()
        gradient = later / gradients.abs().max().item()
        if not gradient <= TOLERANCE:
            failures.append("earlier outputs have a gradient in a later target token")
    return Property(1, forward, gradient, tuple(failures))


def _prefix_is_seen(s: _Subject) -> Property:
    plan = lay_out([[("prefix", PREFIX), ("target", TARGET)]] * (PREFIX + 1))
    rows = s.random(1, PREFIX + TARGET).repeat(PREFIX + 1, 1, 1)
    for k in range(PREFIX):
        rows[k + 1, k] += s.random(1)[0]
    # In the first layer that looks ahead at all, every position must see all that lies ahead of it: later layers could
    # pass on what it does not see itself. (Recurrent layers before it look back only.)
    ahead = torch.ones(PREFIX, PREFIX, dtype=torch.bool).tril(-1)  # changed token after the position that looks
    with torch.no_grad():
        layers = s.layers(rows, plan)
    moves = [((h[1:] - h[:1]).abs().amax(-1)[:, :PREFIX] / h.abs().max()).cpu() for h in layers]
    first = next((moved for moved in moves if moved[ahead].max() > 1e-6), moves[-1])
    effect = min(first[ahead].min().item(), moves[-1].min().item())
    failures = [] if effect > 1e-6 else ["its prefix stays causal under a bidirectional mask"]
    gradient = None
    if s.gradients:
        counted = torch.zeros(1, PREFIX + TARGET)
        counted[:, 0] = 1
        gradients = s.gradient(rows[:1], lay_out([[("prefix", PREFIX), ("target", TARGET)]]), counted).abs().amax(-1)
        gradient = (gradients[0, :PREFIX].min() / gradients.max()).item()
        if not gradient > 1e-6:
            failures.append("the first position has no gradient in the rest of the prefix")
    return Property(2, effect, gradient, tuple(failures))


def _padding_is_inert(s: _Subject) -> Property:
    short: Row = [("prefix", PREFIX - 1), ("target", TARGET - 3)]
    length, gap = PREFIX + TARGET - 4, 4
    rows = s.random(2, length + gap)
    alone = lay_out([short])
    forward, gradient, failures = 0.0, 0.0, []
    for side in ("right", "left"):
        padding = slice(length, None) if side == "right" else slice(0, gap)
        real = slice(0, length) if side == "right" else slice(gap, None)
        # The longer row is there so that the short one has to be padded.
        if side == "right":
            plan = lay_out([[("prefix", PREFIX), ("target", TARGET)], [*short, ("padding", gap)]])
        else:  # as `generate` and transformers' own collators lay rows out
            mask = torch.ones(2, length + gap, dtype=torch.long)
            mask[1, padding] = 0
            starts = torch.tensor([[PREFIX], [gap + PREFIX - 1]])
            is_target = torch.arange(length + gap) >= starts
            plan = PrefixPlan.from_prompt(mask, torch.zeros_like(is_target), is_target)
        counted = (plan.segment != PADDING_SEGMENT).float()
        changed = rows.clone()
        changed[1, padding] += s.random(gap)
        with torch.no_grad():
            base, moved = s.logits(rows, plan), s.logits(changed, plan)
            single = s.logits(rows[1:, real], alone)[0]
        weight = counted.to(base.device).unsqueeze(-1)
        deviations = [_deviation(moved * weight, base * weight), _deviation(base[1, real], single)]
        if s.gradients:
            gradients = s.gradient(rows, plan, counted)
            single = s.gradient(rows[1:, real], alone)[0]
            inert = gradients[1, padding].abs().max().item() / gradients.abs().max().item()
            deviations += [inert, _deviation(gradients[1, real], single)]
            gradient = _worst(gradient, *deviations[2:])
        forward = _worst(forward, *deviations[:2])
        if not _worst(*deviations) <= TOLERANCE:
            failures.append(f"padding on the {side} changes tokens")
    return Property(3, forward, gradient if s.gradients else None, tuple(failures))


def _together_equals_alone(s: _Subject) -> Property:
    a: Row = [("prefix", PREFIX), ("target", TARGET)]
    b: Row = [("prefix", PREFIX - 1), ("target", TARGET - 2)]
    branched: Row = [("prefix", PREFIX), ("target", 2), ("target", TARGET - 2)]
    first, second = PREFIX + TARGET, PREFIX - 1 + TARGET - 2
    row = s.random(1, first + second)

    def deviations(compute: Callable[[Tensor, PrefixPlan], Tensor], prefix_adds_up: bool) -> dict[str, float]:
        """How far one row is from its parts, for logits or for gradients."""
        packed = compute(row, lay_out([[*a, *b]]))
        parts = [compute(row[:, :first], lay_out([a])), compute(row[:, first:], lay_out([b]))]
        shared = compute(row[:, :first], lay_out([branched]))
        prefix, one, two = row[:, :first].split((PREFIX, 2, TARGET - 2), dim=1)
        left = compute(torch.cat([prefix, one], 1), lay_out([[("prefix", PREFIX), ("target", 2)]]))
        right = compute(torch.cat([prefix, two], 1), lay_out([[("prefix", PREFIX), ("target", TARGET - 2)]]))
        # The outputs of a shared prefix are those of either branch; its gradient is the sum over both.
        head = left[:PREFIX] + right[:PREFIX] if prefix_adds_up else left[:PREFIX]
        return {
            "packed": _deviation(packed, torch.cat(parts)),
            "shared": _deviation(shared, torch.cat([head, left[PREFIX:], right[PREFIX:]])),
        }

    def logits_of(tokens: Tensor, plan: PrefixPlan) -> Tensor:
        with torch.no_grad():
            return s.logits(tokens, plan)[0]

    def gradients_of(tokens: Tensor, plan: PrefixPlan) -> Tensor:
        # Of target outputs only: those of a shared prefix would count once for all of its branches.
        return s.gradient(tokens, plan, (plan.branch != PREFIX_BRANCH).float())[0]

    outputs = deviations(logits_of, prefix_adds_up=False)
    gradients = deviations(gradients_of, prefix_adds_up=True) if s.gradients else {}
    both = {name: _worst(output, gradients.get(name, 0.0)) for name, output in outputs.items()}
    failures = [f"{name}: differs by {off:.0e}" for name, off in both.items() if not off <= TOLERANCE]
    if s.gradients and not any(failure.startswith("packed") for failure in failures):
        far = _far_packed(s, a)
        if not far <= FAR_TOLERANCE:
            failures.append(f"packed: {far:.0f} times the error of bfloat16 in a row of {FAR_COLUMNS}")
    return Property(4, _worst(*outputs.values()), _worst(*gradients.values()) if gradients else None, tuple(failures))


@torch.no_grad()
def _far_packed(s: _Subject, sample: Row) -> float:
    """How far a sample at either end of a long row is from the same sample alone, in bfloat16.

    Decoders that count positions inside the sample are as exact there as anywhere. Those that count columns (ALiBi)
    add large biases, which the softmax would cancel in exact arithmetic.

    Returns:
        Root mean square of the difference, in units of what bfloat16 does to the sample alone.
    """
    limit = min(
        getattr(s.decoder.config, name, None) or FAR_COLUMNS for name in ("max_position_embeddings", "max_seq_len")
    )
    length = sum(n for _, n in sample)
    between: Row = [("prefix", 8), ("target", 24)] * max(0, (min(limit, FAR_COLUMNS) - 2 * length) // 32)
    row = s.random(1, 2 * length + sum(n for _, n in between))
    ends = (row[:, :length], row[:, -length:])
    exact = torch.cat([s.logits(tokens, lay_out([sample]))[0] for tokens in ends])
    half = _Subject(install(copy.deepcopy(s.decoder).bfloat16()), gradients=False)
    alone = torch.cat([half.logits(tokens.bfloat16(), lay_out([sample]))[0] for tokens in ends])
    together = half.logits(row.bfloat16(), lay_out([[*sample, *between, *sample]]))[0]
    uninstall(half.decoder)
    together = torch.cat([together[:length], together[-length:]])
    return ((together - alone).square().mean() / (alone - exact).square().mean()).sqrt().item()


def _causal_is_native(s: _Subject, windowed: bool) -> Property:
    length = PREFIX + TARGET
    row = s.random(1, length)
    cases = [(PREFIX, "causal"), (1, "causal")]
    if not windowed:  # the rule shows the prefix to windowed layers for ever, the native decoder does not
        cases.append((1, "full"))
    forward, gradient, failures = 0.0, 0.0, []
    with torch.no_grad():
        native = s.logits(row, None)
    native_gradient = s.gradient(row, None) if s.gradients else None
    for prefix, visibility in cases:
        plan = lay_out([[("prefix", prefix), ("target", length - prefix)]], visibility)  # type: ignore[arg-type]
        with torch.no_grad():
            deviations = [_deviation(s.logits(row, plan), native)]
        forward = _worst(forward, deviations[0])
        if native_gradient is not None:
            deviations.append(_deviation(s.gradient(row, plan), native_gradient))
            gradient = _worst(gradient, deviations[1])
        if not _worst(*deviations) <= TOLERANCE:
            failures.append(f"a {visibility} prefix of {prefix} differs from the decoder without a plan")
    return Property(5, forward, gradient if s.gradients else None, tuple(failures))


@torch.no_grad()
def _cache_equals_full(s: _Subject) -> Property:
    """Greedy tokens with a cache, then the whole sequences in one pass each: logits and tokens must agree."""
    model = PrefixLMForCausalLM.around(s.decoder)
    # Nothing ends early, and nothing of the decoder's own settings changes how it decodes.
    model.generation_config = GenerationConfig(pad_token_id=0)
    lengths, steps = (PREFIX, PREFIX + 3), TARGET
    device, vocabulary = s.like.device, s.like.shape[0]
    prompts = [torch.randint(3, vocabulary, (n,), generator=s.generator).to(device) for n in lengths]
    width = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(p, (width - p.numel(), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - p.numel(), 0)) for p in prompts])
    worst, failures = 0.0, []
    for cache in CACHES:
        kwargs: dict[str, Any] = {"cache_implementation": cache}
        try:
            output = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, use_cache=True,
                output_logits=True, return_dict_in_generate=True, **kwargs,
            )  # fmt: skip
        except Exception as error:  # an architecture that has no such cache raises what it likes
            failures.append(f"{cache}: {type(error).__name__} {' '.join(str(error).split())[:60]}")
            continue
        cached, deviations, equal = torch.stack(output.logits, 1).float(), [], True
        for row, prompt in enumerate(prompts):
            generated = output.sequences[row, width:]
            whole = torch.cat([prompt, generated]).unsqueeze(0)
            prefix = (torch.arange(whole.shape[1], device=device) < prompt.numel()).unsqueeze(0)
            full = model(input_ids=whole, bidirectional_mask=prefix, use_cache=False).logits[0].float()
            full = full[prompt.numel() - 1 : -1]
            deviations.append(_deviation(cached[row], full))
            equal &= torch.equal(full.argmax(-1), generated)
        if not (_worst(*deviations) <= TOLERANCE and equal):
            failures.append(f"{cache}: logits differ by {_worst(*deviations):.0e}")
        else:
            worst = max(worst, *deviations)
    return Property(6, worst, None, tuple(failures))


def _packed_row(visibility: PrefixVisibility) -> PrefixPlan:
    """The plan of a packed row: samples of several shapes, one of them twice, two targets, two questions, no image."""
    layout = PromptLayout(image=0, bos=1, separator=(), eos=2)
    build = TokenSequence.build
    question = build(layout, 3, [5] * PREFIX, [[5] * (TARGET - 1)])
    sequences = [
        question,
        question,
        build(layout, 2, [5], [[5], [5] * (TARGET - 2)]),
        build(layout, 0, [5, 5], [[5, 5]]),
    ]
    if visibility == "nested":
        sequences.append(TokenSequence.on_one_image([question, build(layout, 3, [5], [[5, 5], [5]])]))
    batch = collate(sequences, [0] * len(sequences), None, pad_id=0, visibility=visibility, packed=True, bucket=4)
    return replace(batch.plan, label_positions=None)


def _off_without_a_mask(s: _Subject, plan: PrefixPlan, measure: Callable[[Tensor, Tensor], float]) -> dict[str, float]:
    """How far a random packed row without a mask is from the same row with one, in values and, where they are taken, gradients.

    Raises:
        MaskFreeError: attention needs a mask.
    """
    counted = (plan.segment != PADDING_SEGMENT).float()
    row = s.random(1, plan.segment.shape[1])
    real = counted.to(row.device).unsqueeze(-1)
    ways = plan, replace(plan, calls=())
    with only_mask_free():
        off = {"values": measure(*(s.logits(row, way).detach() * real for way in ways))}
        if s.gradients:
            off["gradients"] = measure(*(s.gradient(row, way, counted) * real for way in ways))
    return off


def _needs_no_mask(s: _Subject) -> Property:
    largest: dict[str, float] = {"values": 0.0}
    failures = []
    for visibility in get_args(PrefixVisibility):
        try:
            off = _off_without_a_mask(s, _packed_row(visibility), _deviation)
        except MaskFreeError as error:
            return Property(7, 0.0, None, (str(error),))
        except Exception as error:  # attention of an architecture's own, which expects a tensor
            reason = " ".join(str(error).split())[:60]
            return Property(7, 0.0, None, (f"attention of its own ({type(error).__name__}: {reason})",))
        largest = {what: _worst(value, largest.get(what, 0.0)) for what, value in off.items()}
        if not _worst(*off.values()) <= TOLERANCE:
            failures.append(f"{visibility}: differs by {_worst(*off.values()):.0e}")
    return Property(7, largest["values"], largest.get("gradients"), tuple(failures))


def _off_in_half(subject: _Subject, plan: PrefixPlan) -> str | None:
    """What differs without a mask by more than half precision does, in the length of the whole."""
    for what, off in _off_without_a_mask(subject, plan, lambda a, b: float((a - b).norm() / b.norm())).items():
        if not off < HALF_TOLERANCE:  # also true of NaN
            return f"other {what} (off by {off:.0e})"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def mask_free_refusal(
    config: PreTrainedConfig, attention: str | None, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a decoder of this config can't attend without a mask on this device in this dtype; None if it can.

    What the probe has proved on the CPU is run once more on a tiny copy, where it will be needed, values and gradients.
    """
    # With windows that hide nothing: whether the real ones do is known from their size.
    decoder = install(tiny_copy(config, attention, window=FAR_COLUMNS).to(device, dtype)).requires_grad_(False)
    subject = _Subject(decoder, gradients=True)
    try:
        for visibility in get_args(PrefixVisibility):
            for _ in range(HALF_DRAWS):
                off = _off_in_half(subject, _packed_row(visibility))
                if off is None:
                    break
            else:
                return f"its kernel gives {off} under {visibility} than the mask"
    except MaskFreeError as error:
        return str(error)
    except (RuntimeError, AttributeError, TypeError) as error:  # whatever a kernel says that isn't there, or is another
        return " ".join(str(error).split())[:80]
    finally:
        uninstall(decoder)
    return None


def probe_decoder(decoder: PreTrainedModel, gradients: bool = True) -> ProbeReport:
    """The six properties of a decoder as it is.

    Args:
        decoder: any causal LM; left as it came.
        gradients: also look at gradients; costs the memory of a backward pass.
    """
    was_training, was_installed = decoder.training, is_installed(decoder)
    frozen = [p for p in decoder.parameters() if p.requires_grad]
    decoder.eval()
    install(decoder)
    try:
        for parameter in frozen:  # gradients are taken in the embeddings only
            parameter.requires_grad_(False)
        subject = _Subject(decoder, gradients)
        config = decoder.config
        windows = {name: getattr(config, name, None) for name in WINDOW_SETTINGS}
        windowed = any(value is not None for value in windows.values())
        properties = (
            _target_is_hidden(subject), _prefix_is_seen(subject), _padding_is_inert(subject),
            _together_equals_alone(subject), _causal_is_native(subject, windowed), _cache_equals_full(subject),
            _needs_no_mask(subject),
        )  # fmt: skip
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        decoder.train(was_training)
        if not was_installed:
            uninstall(decoder)
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kinds = kinds or getattr(config, "block_types", None) or ["attention"]
    sizes = [f"{name.replace('_', ' ')} {value}" for name, value in windows.items() if value is not None]
    return ProbeReport(
        architecture=type(decoder).__name__,
        model_type=config.model_type,
        attention=str(config._attn_implementation),
        layers=", ".join([*dict.fromkeys(str(kind) for kind in kinds), *sizes]),
        properties=properties,
        stateful=bool(getattr(decoder, "_is_stateful", False))
        or any(word in str(kind) for kind in kinds for word in ("linear", "conv", "mamba", "recurrent")),
    )


def check_prefix_lm(decoder: PreTrainedModel) -> None:
    """Properties 1 and 2, forward only, on an installed decoder itself: what was proved on a copy holds here, too.

    Raises:
        InputError: a leak, or a prefix that stayed causal.
    """
    was_training = decoder.training
    decoder.eval()
    try:
        subject = _Subject(decoder, gradients=False)
        failures = [*_target_is_hidden(subject).failures, *_prefix_is_seen(subject).failures]
    finally:
        decoder.train(was_training)
    if failures:
        raise InputError(f"{type(decoder).__name__} can't be a prefix LM: {'; '.join(failures)}")
