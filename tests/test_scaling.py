"""The plan of a step against sums by hand, against collectives and bytes of real processes, and the page made of it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from mmprefix.accounting import PARTS, Layout, ModelFlops, meta_model
from mmprefix.cli import fit_settings, run
from mmprefix.errors import InputError
from mmprefix.scaling import (
    RING,
    Collective,
    Machine,
    Step,
    Unit,
    Weight,
    alternatives,
    expected_step,
    layout_of,
    plan,
    units_of,
)
from mmprefix.training.fsdp import FullyShardedStrategy
from tests.conftest import TINY_DECODER, make_batch, make_model
from tests.test_cli import ENVIRONMENT

ROOT = Path(__file__).parents[1]
STRATEGY = "mmprefix.training.fsdp.FullyShardedStrategy"


# The plan


@pytest.mark.parametrize(
    ("shape", "shards", "kept", "padded"),
    [((8, 3), 4, 6, 24), ((10, 3), 4, 9, 36), ((1, 5), 4, 5, 20), ((2,), 4, 1, 4), ((10, 3), 1, 30, 30)],
)
def test_rows_are_divided_and_padded(shape, shards, kept, padded):
    weight = Weight(shape, True)
    assert (weight.kept(shards), weight.padded(shards)) == (kept, padded)
    (row,) = [chunk.numel() for chunk in torch.zeros(shape).chunk(shards)[:1]]
    assert row == kept


UNITS = [
    Unit("vision", (Weight((8, 2), False),), backward=False),
    Unit("vision", (Weight((8, 3), False),), backward=False),
    Unit("decoder", (Weight((8, 4), True), Weight((8, 1), False)), backward=True),
    Unit("decoder", (Weight((8, 5), True),), backward=True),
    Unit("rest", (Weight((8, 10), True), Weight((1, 7), False)), backward=True),
]
"""A frozen encoder of 16 and 24 elements, a decoder of 32 + 8 and 40, and a rest of 80 + 7 (28 on four shards)."""


def planned(layout, stored=torch.float32, **kwargs):
    return [(c.kind, c.group, c.ranks, c.bytes, c.times) for c in plan(UNITS, layout, stored, **kwargs)]


def test_plan_of_full_shards():
    layout = Layout(4, "fsdp", param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    expected = [
        ("all_gather", "shards", 4, 32, 1),  # frozen
        ("all_gather", "shards", 4, 48, 2),  # frozen, prefetched
        ("all_gather", "shards", 4, 80, 2),
        ("reduce_scatter", "shards", 4, 128, 1),
        ("all_gather", "shards", 4, 80, 2),
        ("reduce_scatter", "shards", 4, 160, 1),
        ("all_gather", "shards", 4, 216, 1),
        ("reduce_scatter", "shards", 4, 320, 1),
    ]
    assert planned(layout) == expected
    assert planned(layout, micro_batches=3) == [(*rest, 3 * times) for *rest, times in expected]
    stay = planned(replace(layout, reshard_after_forward=False))
    assert [times for kind, *_, times in stay if kind == "all_gather"] == [1, 1, 1, 1, 1]


def test_plan_of_replicas_and_of_ddp():
    two = planned(Layout(8, "fsdp", replicas=2))
    assert ("all_gather", "shards", 4, 160, 2) in two
    assert ("reduce_scatter", "shards", 4, 128, 1) in two
    assert [entry for entry in two if entry[0] == "all_reduce"] == [
        ("all_reduce", "replicas", 2, size // 4, 1) for size in (128, 160, 320)
    ]
    assert {entry[0] for entry in planned(Layout(4, "fsdp", replicas=4))} == {"all_reduce"}
    ddp = planned(Layout(4), torch.bfloat16, micro_batches=3)
    assert ddp == [("all_reduce", "devices", 4, size, 1) for size in (64, 80, 160)]
    assert planned(Layout(1)) == planned(Layout(1, "fsdp")) == []


def test_a_ring_sends_all_but_its_own_part():
    gather = Collective("all_gather", "shards", 4, 400, 3, "rest")
    assert gather.sent() == 3 * 300
    assert replace(gather, kind="all_reduce", times=1).sent() == 600
    assert replace(gather, kind="reduce_scatter", times=1).sent({**RING, "reduce_scatter": 2}) == 600


@pytest.mark.parametrize("frozen", [(), ("vision",), ("decoder", "connector"), ("vision", "decoder")])
@pytest.mark.parametrize("tied", [False, True])
def test_units_hold_each_parameter_once(frozen, tied):
    model, _ = make_model({**TINY_DECODER, "tie_word_embeddings": tied})
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    units = units_of(model)
    parameters = list(model.parameters())
    for learns in (True, False):
        found = sum(w.padded(1) for unit in units for w in unit.weights if w.learns is learns)
        assert found == sum(p.numel() for p in parameters if p.requires_grad is learns)
    assert sum(len(unit.weights) for unit in units) == len(parameters)
    parts = [unit.part for unit in units]
    assert parts == ["vision"] * parts.count("vision") + ["decoder"] * 2 + ["rest"]
    assert parts.count("vision") > 1
    assert {unit.backward for unit in units if unit.part == "vision"} == {"vision" not in frozen}
    assert {unit.backward for unit in units if unit.part != "vision"} == {True}


def test_recomputed_is_the_forward_of_the_layers(photos):
    model, processor = make_model()
    batch, flops = make_batch(processor, photos, packed=False), ModelFlops.of(meta_model(model.config).config)
    forward = flops.step(batch, ())
    all_of_them = {"vision": 1.0, "decoder": 1.0}
    layers = forward - 3 * flops.connector - batch.labels.numel() * flops.label
    assert flops.recomputed(batch, PARTS, all_of_them) == layers
    assert flops.recomputed(batch, ("decoder",), all_of_them) == layers - 3 * flops.vision
    assert flops.recomputed(batch, (), all_of_them) == 0
    half = flops.recomputed(batch, PARTS, {"decoder": 0.5})
    assert half == round((layers - 3 * flops.vision) / 2)


# Real processes


def test_collectives_bytes_and_state_of_real_steps(tmp_path):
    """Two processes, gloo: each collective of a step is the plan's, in kind and bytes; the sockets' bytes within 5%."""
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "scaling_bytes.py", "--smoke", "--json", out],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = {row["case"]: row for row in json.loads(out.read_text())}
    assert {"all_gather", "reduce_scatter", "all_reduce", "sharded", "replicas", "ddp"} <= rows.keys()
    for row in rows.values():
        assert row["differ"] == []
        assert row["sent_mib"] == pytest.approx(row["expected_mib"], rel=0.05)
    assert rows["sharded"]["collectives"] == 26, "9 units: gathered twice, but for the rest, and reduced"
    assert rows["sharded"]["ring_mib"] < 0.9 * rows["sharded"]["sent_mib"], "gloo's own number is needed to agree"
    assert rows["ddp"]["sent_mib"] != pytest.approx(rows["sharded"]["sent_mib"], rel=0.05)


# Time


def test_seconds_by_the_slowest_link():
    machine = Machine(tflops=1, bandwidth=100, between_nodes=20, devices_per_node=4)
    gather = Collective("all_gather", "shards", 4, 4_000_000_000, 1, "rest")  # 3 GB leave each rank
    assert machine.seconds(gather, Layout(4, "fsdp")) == pytest.approx(0.03)
    wide = replace(gather, ranks=8, bytes=8_000_000_000)  # 7 GB, and as much out of a node
    assert machine.seconds(wide, Layout(8, "fsdp")) == pytest.approx(7 / 20)
    assert replace(machine, between_nodes=1000).seconds(wide, Layout(8, "fsdp")) == pytest.approx(7 / 100)
    # Two replicas of four shards: the four rings of a node share its adapters.
    reduced = Collective("all_reduce", "replicas", 2, 1_000_000_000, 1, "rest")
    assert machine.seconds(reduced, Layout(8, "fsdp", replicas=2)) == pytest.approx(4 * 1 / 20)
    # Four replicas of two shards: two of each ring in a node, two rings.
    assert machine.seconds(replace(reduced, ranks=4), Layout(8, "fsdp", replicas=4)) == pytest.approx(2 * 1.5 / 20)
    late = replace(machine, latency=1000.0)
    assert late.seconds(gather, Layout(4, "fsdp")) == pytest.approx(0.03 + 3e-3)
    assert late.seconds(replace(reduced, ranks=4), Layout(8, "fsdp", replicas=4)) == pytest.approx(0.15 + 4e-3)


def test_what_machines_cannot_do_is_refused():
    wide, machine = Collective("all_gather", "shards", 12, 100, 1, "rest"), Machine(1, 100)
    with pytest.raises(
        InputError, match="--devices: expected at most 8 or a multiple of it .--devices_per_node., got 12"
    ):
        machine.seconds(wide, Layout(12, "fsdp"))
    with pytest.raises(InputError, match="--between_nodes: expected GB/s that a node sends, 16 devices are several"):
        machine.seconds(replace(wide, ranks=16), Layout(16, "fsdp"))
    with pytest.raises(InputError, match="expected shards that lie evenly in nodes of 8, got 3"):
        Machine(1, 100, 100).seconds(replace(wide, ranks=3), Layout(24, "fsdp", replicas=8))
    with pytest.raises(InputError, match="cpu_offload: expected false"):
        expected_step(UNITS, Layout(8, "fsdp", cpu_offload=True), torch.float32, machine, 1, 1)


def test_step_is_compute_beside_what_can_be_hidden():
    machine = Machine(tflops=2.0, bandwidth=1e-6)  # 1000 bytes a second
    step = expected_step(UNITS, Layout(2, "fsdp"), torch.float32, machine, flops=10**12, samples=3, micro_batches=2)
    rest = 2 * (0.5 * 4 * 94 + 0.5 * 320) / 1000  # the 7 frozen elements are gathered from both ranks
    layers = 2 * (0.5 * 64 + 2 * 0.5 * 96 + 2 * (2 * 0.5 * 160) + 0.5 * 128 + 0.5 * 160) / 1000
    assert step.sent == {"all_gather": 2 * (32 + 96 + 320 + 188), "reduce_scatter": 2 * 304, "all_reduce": 0}
    assert (step.compute, step.samples) == (1.0, 12)
    assert step.exposed == pytest.approx(rest)
    assert step.communication == pytest.approx(rest + layers)
    assert step.overlapped == pytest.approx(rest + max(1.0, layers))
    assert step.sequential == pytest.approx(1 + rest + layers)
    alone = expected_step(UNITS, Layout(1), torch.float32, machine, flops=10**12, samples=3)
    assert alone.overlapped == alone.sequential == alone.compute == 0.5
    assert alone.efficiency == (1, 1)
    assert Step({}, 1.0, 3.0, 1.0, 1).efficiency == (1 / 4, 1 / 3)


# Settings


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("auto", Layout(8)),
        ("ddp", Layout(8)),
        ("fsdp2", Layout(8, "fsdp")),
        ({"class_path": STRATEGY}, Layout(8, "fsdp")),
        (
            {"class_path": STRATEGY, "init_args": {"replicas": 2, "param_dtype": "bfloat16", "cpu_offload": True}},
            Layout(8, "fsdp", 2, torch.bfloat16, torch.float32, True, True),
        ),
        (
            {"class_path": STRATEGY, "init_args": {"reduce_dtype": "bfloat16", "reshard_after_forward": False}},
            Layout(8, "fsdp", reshard_after_forward=False),  # without param_dtype, it is not looked at
        ),
    ],
)  # fmt: skip
def test_strategy_of_a_config(strategy, expected):
    assert layout_of(strategy, 8) == expected
    assert layout_of(strategy, 8, "ddp") == Layout(8)
    assert layout_of(strategy, 8, "fsdp").strategy == "fsdp"


def test_defaults_are_the_strategys():
    strategy, layout = FullyShardedStrategy(), layout_of("fsdp2", 8)
    for name in ("replicas", "param_dtype", "reduce_dtype", "reshard_after_forward", "cpu_offload"):
        assert getattr(strategy, name) == getattr(layout, name), name


def test_alternatives():
    found = alternatives("fsdp2", 32, devices_per_node=8)
    assert {name: (layout.strategy, layout.shards) for name, layout in found.items()} == {
        "full": ("fsdp", 32), "hybrid": ("fsdp", 8), "ddp": ("ddp", 1),
    }  # fmt: skip
    two = {"class_path": STRATEGY, "init_args": {"replicas": 2, "param_dtype": "bfloat16"}}
    assert alternatives(two, 32, 8)["hybrid"] == layout_of(two, 32)
    assert alternatives(two, 32, 8)["full"] == replace(layout_of(two, 32), replicas=1)
    assert "hybrid" not in alternatives("ddp", 8, 8)
    assert alternatives(two, 1, 8) == {"one device": Layout()}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({
        "model": {
            "vision": {"name": "test_vit", "image_size": 32}, "tokenizer": {"name": "byte"},
            "decoder": {"config": TINY_DECODER},
        },
        "data": {"train": "nowhere/*.tar", "batch_size": 4},
    }))  # fmt: skip
    return str(path)


FSDP = ["--config", str(ROOT / "configs" / "fsdp.yaml")]


def estimated(config, capfd, *options):
    # Of so small a model, thousands fit into a real device, each of which would be laid out.
    assert run(["estimate", "--config", config, "--memory", "0.5", *options]) == 0
    out = capfd.readouterr().out
    rows = {line[:52].strip(): line[52:].split() for line in out.splitlines()}
    return out, {name: float(values[0]) for name, values in rows.items() if len(values) == 1 and "." in values[0]}


def test_estimate_reads_the_strategy_of_a_config(config, capfd):
    """What configs/fsdp.yaml lays over: shards, replicas, dtypes and offload."""
    _, whole = estimated(config, capfd)
    out, full = estimated(config, capfd, *FSDP, "--devices", "8")
    assert "8 devices, fsdp, precision" in out
    assert full["weights"] == pytest.approx(whole["weights"] / 8, abs=2e-3)
    out, half = estimated(config, capfd, "--trainer.strategy", "fsdp2", "--devices", "8")
    assert half == full
    out, two = estimated(config, capfd, *FSDP, "--devices", "8", "--trainer.strategy.replicas", "4")
    assert "8 devices, fsdp with 4 replicas" in out
    for name in ("weights", "gradients", "AdamW state"):
        assert two[name] == pytest.approx(whole[name] / 2, abs=2e-3)
    gathered = "buckets (ddp) or gathered weights (fsdp)"
    _, cast = estimated(config, capfd, *FSDP, "--devices", "8", "--trainer.strategy.param_dtype", "bfloat16")
    assert cast[gathered] == pytest.approx(full[gathered] / 2, abs=2e-3)
    assert cast["gradients"] == full["gradients"]
    _, stay = estimated(config, capfd, *FSDP, "--devices", "8", "--trainer.strategy.reshard_after_forward", "false")
    assert full[gathered] < 0.9 * stay[gathered]
    out, host = estimated(config, capfd, *FSDP, "--devices", "8", "--trainer.strategy.cpu_offload", "true")
    assert (host["weights"], host["gradients"], host["AdamW state"]) == (0, 0, 0)
    state = full["weights"] + full["gradients"] + full["AdamW state"]
    assert host["these three, in the host's memory"] == pytest.approx(state, abs=4e-3)
    assert host["total at batch size 4"] < full["total at batch size 4"] - full["weights"]
    assert run(["estimate", "--config", config, "--memory", "80", *FSDP, "--devices", "3", "--trainer.strategy.replicas", "2"]) == 2  # fmt: skip
    expected = "error: trainer.strategy.replicas: expected a divisor of the 3 devices, got 2\n"
    assert capfd.readouterr().err.endswith(expected)


# The command


RATES = ["--tflops", "1", "--bandwidth", "10"]


def test_command_prints_and_writes_rows(config, capfd, tmp_path):
    out = tmp_path / "rows.json"
    options = [*RATES, "--between_nodes", "10", "--devices", "1,4,8", "--devices_per_node", "4", "--json", str(out)]
    assert run(["scaling", "--config", config, *options]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    rows = json.loads(out.read_text())
    names = [(row["devices"], row["layout"]) for row in rows]
    assert names == [(1, "one device"), (4, "full"), (4, "ddp"), (8, "full"), (8, "hybrid"), (8, "ddp")]
    assert [line[:2] for line in lines if line[:1] == ["8"]] == [["8", "full"], ["8", "hybrid"], ["8", "ddp"]]
    full, hybrid, ddp = rows[3:]
    settings = fit_settings(["--config", config])
    assert settings["data"]["batch_size"] * 8 == full["samples"]
    assert full["memory"] < hybrid["memory"] < ddp["memory"]
    assert hybrid["all_gather"] < full["all_gather"]
    assert hybrid["all_reduce"] == pytest.approx(hybrid["reduce_scatter"] / 3, rel=1e-6), (
        "1 of 4 shards, twice, among 2"
    )
    assert full["compute"] == ddp["compute"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "8,x"], "--devices: expected numbers from 1, with commas, got '8,x'"),
        (["--devices", "0"], "--devices: expected numbers from 1, with commas, got '0'"),
        (["--devices", "12"], "--devices: expected at most 8 or a multiple of it (--devices_per_node), got 12"),
        (["--devices", "16"], "--between_nodes: expected GB/s that a node sends, 16 devices are several nodes"),
        (["--tflops", "0"], "--tflops: expected more than 0, got 0.0"),
        (["--bandwidth", "nan"], "--bandwidth: expected more than 0, got nan"),
        (["--latency", "-1"], "--latency: expected at least 0, got -1.0"),
        (["--devices_per_node", "0"], "--devices_per_node: expected at least 1, got 0"),
        (["--target_tokens", "0"], "--target_tokens: expected at least 1, got 0"),
        (["--json", "/no/such/rows.json"], "--json: expected a file in a folder that is there, got /no/such/rows.json"),
        (["--data.batch_size", "0"], "data.batch_size: expected at least 1, got 0"),
        ([*FSDP, "--trainer.strategy.replicas", "3"], "replicas: expected a divisor of the 8 devices, got 3"),
        ([*FSDP, "--trainer.strategy.cpu_offload", "true"], "trainer.strategy.cpu_offload: expected false"),
        (["--trainer.precision", "16-mixd"], "precision"),
    ],
)  # fmt: skip
def test_bad_options_give_one_line(config, capfd, options, message):
    try:
        status = run(["scaling", "--config", config, *RATES, "--devices", "8", *options])
    except SystemExit as exit_:
        status = exit_.code
    err = capfd.readouterr().err.strip().splitlines()
    assert status == 2
    assert err[-1].startswith("error: ")
    assert message in err[-1]


def test_the_page_shows_what_its_command_prints(capfd, monkeypatch):
    """The rows of 512 devices of the first table, computed again."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    blocks = re.findall(
        r"^```bash\npython -m mmprefix (scaling [^\n]*)\n```\n```\n(.*?)\n```", page, re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 4
    for command, table in blocks:
        numbers = re.search(r"--devices ([\d,]+)", command).group(1).split(",")
        assert {line.split()[0] for line in table.splitlines()[3:]} == set(numbers)
    command, table = blocks[0]
    monkeypatch.chdir(ROOT)
    assert run(re.sub(r"--devices [\d,]+", "--devices 512", command).split()) == 0
    printed = capfd.readouterr().out.splitlines()
    assert printed[:3] == table.splitlines()[:3]
    rows = [line for line in printed[3:] if line.startswith("    512")]
    assert len(rows) == 3
    assert rows == [line for line in table.splitlines() if line.startswith("    512")]
