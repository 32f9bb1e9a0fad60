"""The architectures of the matrix, and the table of docs/decoders.md: ``python -m tests.architectures`` prints it."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from mmprefix.decoder import DecoderArgs, attention_implementation
from mmprefix.probe import PREFIX, TARGET, ProbeReport, probe_decoder, tiny_copy

_SAME = (
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "bloom", "opt", "mpt", "falcon", "codegen", "gpt_bigcode", "starcoder2",
    "llama", "llama4_text", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "cohere", "cohere2", "glm", "glm4", "stablelm", "olmo2", "olmo3", "smollm3", "granite", "gpt_oss", "deepseek_v3",
)  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in _SAME},
    "falcon (ALiBi)": ("falcon", {"alibi": True}),
    "qwen2 (sliding)": ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}),
}
"""Name -> model type and settings beside the defaults of the architecture's config, which are those of a release."""
HYBRIDS = {name: (name, {}) for name in ("jamba", "qwen3_next", "falcon_h1")}

ALIBI = ("bloom", "mpt", "falcon (ALiBi)")
CANNOT_SHARE = (*ALIBI, "gpt_neo")
CANNOT_PACK = ("bloom", "falcon (ALiBi)")
NO_STATIC_CACHE = ("gpt_neo",)
"""Exceptions, found by the probe and asserted in both directions."""


def config_of(name: str) -> PreTrainedConfig:
    model_type, settings = {**ARCHITECTURES, **HYBRIDS}[name]
    return AutoConfig.for_model(model_type, **settings)


def attention_of(config: PreTrainedConfig) -> str | None:
    return attention_implementation(DecoderArgs(), config)


def report_of(name: str) -> ProbeReport:
    config = config_of(name)
    return probe_decoder(tiny_copy(config, attention_of(config)))


def row(name: str, report: ProbeReport) -> str:
    cells = [name, report.architecture, report.attention, report.layers]
    cells += ["yes" if report[number].holds else "no" for number in (1, 2, 3)]
    cells += ["yes" if report.can_pack else "no", "yes" if report.can_share else "no"]
    cells += ["yes" if report[5].holds else "no"]
    cells += ["no" if cache in report.refused_caches else "yes" for cache in ("dynamic", "static")]
    cells += ["yes" if report.dense_reason is None else "no"]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| decoder | class | attention | layers of the copy | 1 | 2 | 3 | 4 packed | 4 shared | 5 | 6 dynamic | 6 static | 7 |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    print(f"<!-- python -m tests.architectures: prefix {PREFIX}, target {TARGET} tokens -->")
    print(HEADER)
    for name in (*ARCHITECTURES, *HYBRIDS):
        print(row(name, report_of(name)))


if __name__ == "__main__":
    main()
