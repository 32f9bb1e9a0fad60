"""The matrix: every architecture through the six properties, forward and gradient; and what the probe does with it."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, LlamaConfig, LlamaForCausalLM, MambaConfig

from mmprefix import probe, varlen
from mmprefix.attention import prefix_plan
from mmprefix.decoder import install, is_installed, uninstall
from mmprefix.errors import InputError
from mmprefix.masks import dense_mask
from mmprefix.probe import (
    PREFIX,
    TARGET,
    ProbeReport,
    Property,
    check_prefix_lm,
    lay_out,
    mask_free_refusal,
    probe_decoder,
    tiny_copy,
)
from tests.architectures import (
    ARCHITECTURES,
    CANNOT_PACK,
    CANNOT_SHARE,
    HEADER,
    HYBRIDS,
    NO_STATIC_CACHE,
    attention_of,
    config_of,
    report_of,
    row,
)

DOCS = (Path(__file__).parent.parent / "docs" / "decoders.md").read_text()


@pytest.fixture(scope="module")
def reports():
    return {}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_there_are_35():
    assert len(ARCHITECTURES) == 35


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matrix(name, reports):
    report = reports[name] = report_of(name)
    assert report.refusal is None
    for number in (1, 2, 3, 5):
        assert report[number].holds, report.table()
        assert report[number].gradient is not None
    assert "dynamic" not in report.refused_caches
    # The exceptions in both directions: one that goes away is news, too.
    assert report.can_share == (name not in CANNOT_SHARE), report.table()
    assert report.can_pack == (name not in CANNOT_PACK), report.table()
    assert report.refused_caches == (("static",) if name in NO_STATIC_CACHE else ()), report.table()
    assert not report.stateful
    assert row(name, report) in DOCS


@pytest.mark.parametrize("name", HYBRIDS)
def test_recurrent_hybrids_are_exact_alone_and_warn(name):
    report = report_of(name)
    assert report.refusal is None
    assert report.stateful
    assert not report.can_pack
    assert not report.can_share
    assert any("read the prefix from left to right only" in line for line in report.warnings())
    assert row(name, report) in DOCS


def test_docs_show_the_tables_header():
    assert HEADER in DOCS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_copies_keep_what_decides_and_shrink_the_rest(name):
    config = config_of(name)
    copied = tiny_copy(config, attention_of(config))
    tiny = copied.config
    assert copied.num_parameters() < 1_000_000
    assert tiny.num_hidden_layers <= 4
    for window in ("sliding_window", "attention_chunk_size", "window_size"):
        if getattr(config, window, None) is not None:
            assert getattr(tiny, window) < min(PREFIX, TARGET)
    if getattr(config, "layer_types", None):
        assert set(tiny.layer_types) == set(config.layer_types)
    assert (tiny.num_attention_heads == config.num_attention_heads) <= (tiny.num_attention_heads == 4)
    kv, own_kv = getattr(config, "num_key_value_heads", None), getattr(tiny, "num_key_value_heads", None)
    if kv:
        assert (own_kv == tiny.num_attention_heads) == (kv == config.num_attention_heads)


def test_copy_takes_a_config_with_windows_in_some_layers_only():
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=7, sliding_window=512,
        layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    )  # fmt: skip
    assert tiny_copy(config).config.layer_types == ["sliding_attention", "full_attention"]


def test_longrope_factors_are_shortened():
    factors = [1.0 + n / 48 for n in range(48)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": 4096}  # fmt: skip
    config = AutoConfig.for_model("phi3", max_position_embeddings=131072, rope_parameters=rope)
    assert probe.probe(config).refusal is None


def test_masked_lm_is_refused_with_the_property_and_the_architecture():
    with pytest.raises(InputError, match="BertLMHeadModel .* property 1, 'no target token is seen before it', fails"):
        _raise(probe.probe(BertConfig()))


def test_recurrent_decoder_without_attention_is_refused():
    with pytest.raises(InputError, match="MambaForCausalLM .* property 2, 'the whole prefix is seen', fails"):
        _raise(probe.probe(MambaConfig()))


def _raise(report):
    if report.refusal:
        raise InputError(report.refusal)


def test_report_is_remembered_by_config_and_versions(monkeypatch, tmp_path):
    config = config_of("llama")
    first = probe.probe(config)
    files = list((tmp_path / "cache" / "mmprefix" / "probe").iterdir())
    assert len(files) == 1
    monkeypatch.setattr(probe, "probe_decoder", lambda *a, **k: pytest.fail("probed again"))
    assert probe.probe(config_of("llama")) == first
    for change in (lambda: AutoConfig.for_model("llama", num_key_value_heads=8), lambda: config_of("mistral")):
        with pytest.raises(pytest.fail.Exception, match="probed again"):
            probe.probe(change())
    monkeypatch.setattr(probe.transformers, "__version__", "0")
    with pytest.raises(pytest.fail.Exception, match="probed again"):
        probe.probe(config)


def test_broken_or_unwritable_memory_costs_a_probe_only(tmp_path, monkeypatch):
    config = config_of("llama")
    report = probe.probe(config)
    (file,) = (tmp_path / "cache" / "mmprefix" / "probe").iterdir()
    file.write_text('{"half')
    assert probe.probe(config) == report
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file where a folder should be
    assert probe.probe(config) == report


def test_decoder_without_a_tiny_copy_is_probed_itself(monkeypatch):
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
                                  num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    monkeypatch.setattr(probe, "tiny_copy", lambda *a: 1 / 0)
    with pytest.raises(InputError, match="no tiny copy of model type 'llama' can be made and run: ZeroDivisionError"):
        probe.probe(config)
    decoder = AutoModelForCausalLM.from_config(config)
    report = probe.probe(config, decoder=decoder)
    assert report.refusal is None
    assert report[1].gradient is None
    assert decoder.training
    assert all(p.requires_grad for p in decoder.parameters())


def test_probe_leaves_nothing_behind():
    decoder = tiny_copy(config_of("gpt_neo"))
    before = {k: v.clone() for k, v in (*decoder.state_dict().items(), *decoder.named_buffers())}
    probe_decoder(decoder)
    after = dict((*decoder.state_dict().items(), *decoder.named_buffers()))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in decoder.modules())


def test_probe_leaves_an_installed_decoder_installed():
    decoder = install(tiny_copy(config_of("gpt_neo")))
    probe_decoder(decoder)
    check_prefix_lm(decoder)
    assert is_installed(decoder)
    uninstall(decoder)


def test_a_window_under_an_unknown_name_is_no_tiny_copy():
    class OddConfig(LlamaConfig):
        attribute_map = {"sliding_window": "reach"}  # noqa: RUF012

    assert probe.tiny_settings(OddConfig(reach=512))["reach"] == probe.WINDOW
    config = LlamaConfig()
    monkey = type("Stuck", (LlamaConfig,), {"attention_window_size": 512})
    with pytest.raises(ValueError, match="attention_window_size stays 512 in the copy"):
        tiny_copy(monkey(**config.to_dict()))


def test_decoder_that_can_not_be_probed_at_all_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(probe, "tiny_copy", lambda *a: 1 / 0)
    monkeypatch.setattr(probe, "probe_decoder", lambda *a, **k: [][1])
    decoder = AutoModelForCausalLM.from_config(tiny_copy(config_of("llama")).config)
    with pytest.raises(InputError, match="neither as a tiny copy .ZeroDivisionError.* nor as it is: IndexError"):
        probe.probe(config_of("mistral"), decoder=decoder)


def test_code_of_ones_own_is_probed_each_time(tmp_path):
    class OwnConfig(LlamaConfig):
        model_type = "own"

    AutoConfig.register("own", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, type("Own", (LlamaForCausalLM,), {"config_class": OwnConfig}))
    assert probe.probe(OwnConfig()).refusal is None
    assert not (tmp_path / "cache").exists()


def test_table_is_for_people():
    report = ProbeReport("XForCausalLM", "x", "sdpa", "attention", (
        Property(1, 0.3, 0.2, ("target token 2 leaks into prefix token 0",)),
        *(Property(n, 0.0, 0.0) for n in (2, 3)), Property(4, 0.1, 0.1, ("packed: differs by 1e-01",)),
        Property(5, 0.0, 0.0), Property(6, 0.5, None, ("static: logits differ by 5e-01",)),
    ), stateful=True)  # fmt: skip
    table = report.table()
    assert "1 no target token is seen before it" in table
    assert "FAILS: target token 2 leaks into prefix token 0" in table
    assert "XForCausalLM: samples cannot be packed into one row" in table
    assert "XForCausalLM: generation with a static cache is wrong and refused" in table
    assert table.splitlines()[-1] == report.refusal
    assert report.can_share
    assert not report.can_pack
    assert max(map(len, table.splitlines()[:8])) < 120


def test_check_on_the_decoder_itself():
    decoder = install(tiny_copy(config_of("mistral")))
    check_prefix_lm(decoder)
    check_prefix_lm(decoder.bfloat16())
    uninstall(decoder)
    bert = install(tiny_copy(BertConfig()))
    with pytest.raises(InputError, match="BertLMHeadModel can't be a prefix LM: target token 5 leaks into"):
        check_prefix_lm(bert)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "cohere", "mixtral"])
def test_kernels_in_half_precision_are_taken(name, dtype):
    with torch.inference_mode():  # nor does it matter what surrounds it
        assert mask_free_refusal(config_of(name), "sdpa", torch.device("cpu"), dtype) is None


def _forgets_that_it_is_causal(function):
    return lambda call, *rest: function(call._replace(causal=False), *rest)


def _takes_the_logsumexp_of_others(backward):
    return lambda call, grad, query, key, value, out, lse, *rest: backward(
        call, grad, query, key, value, out, lse.roll(1) if call.causal else lse, *rest
    )


@pytest.mark.parametrize(
    ("which", "wrong", "message"),
    [
        ("_cpu_forward", _forgets_that_it_is_causal, "gives other values"),
        ("_cpu_backward", _forgets_that_it_is_causal, "gives other gradients"),
        ("_cpu_backward", _takes_the_logsumexp_of_others, "gives other gradients"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_kernels_that_are_wrong_in_half_precision_are_refused(name, which, wrong, message, monkeypatch):
    monkeypatch.setattr(varlen, which, wrong(getattr(varlen, which)))
    refusal = mask_free_refusal(config_of(name), "sdpa", torch.device("cpu"), torch.bfloat16)
    assert re.search(message, refusal or "")


def test_kernels_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(varlen, "_cpu_forward", lambda *_: torch.ops.aten.no_such_kernel())
    refusal = mask_free_refusal(config_of("llama"), "sdpa", torch.device("cpu"), torch.bfloat16)
    assert "no_such_kernel" in (refusal or "")


def test_layout_is_the_plan_it_says():
    plan = lay_out([[("prefix", 2), ("target", 1), ("target", 2), ("prefix", 1), ("padding", 1)]])
    assert plan.segment.tolist() == [[0, 0, 0, 0, 0, 1, -1]]
    assert plan.branch.tolist() == [[-1, -1, 0, 1, 1, -1, -1]]
    assert plan.position.tolist() == [[0, 1, 2, 2, 3, 0, 0]]
    visible = dense_mask(plan.tokens)[0].int().tolist()
    assert visible[4] == [1, 1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("what", ["gradient", "logits"])
def test_what_is_not_a_number_fails(what, monkeypatch):
    """`max` passes over a NaN that does not come first."""
    original = getattr(probe._Subject, what)
    monkeypatch.setattr(probe._Subject, what, lambda *args: original(*args) * torch.nan)
    report = probe_decoder(tiny_copy(config_of("llama")))
    assert [number for number in range(1, 8) if not report[number].holds] == [1, 2, 3, 4, 5, 7], "6 looks at answers"


def test_gradient_checkpointing_recomputes_under_the_same_mask():
    """Recomputation runs outside of the plan; gpt_neo's own buffer must be as it was."""
    for name in ("llama", "gpt_neo", "gemma3_text"):
        decoder = install(tiny_copy(config_of(name)))
        plan = lay_out([[("prefix", PREFIX), ("target", TARGET)]])
        embeds = torch.randn(1, PREFIX + TARGET, 64, generator=torch.Generator().manual_seed(0))
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                decoder.gradient_checkpointing_enable()
                decoder.train()
            decoder.zero_grad()
            with prefix_plan(plan):
                logits = decoder(
                    inputs_embeds=embeds, attention_mask=torch.ones(1, PREFIX + TARGET, dtype=torch.long),
                    position_ids=plan.position, use_cache=False,
                ).logits  # fmt: skip
            logits.square().sum().backward()
            gradients.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
        assert decoder.is_gradient_checkpointing
        for with_it, without in zip(*gradients, strict=True):
            torch.testing.assert_close(with_it, without, atol=1e-4, rtol=1e-4)
        uninstall(decoder)
