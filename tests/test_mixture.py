"""Several sets as one split: how much of each an epoch takes, in which order, under which instructions, and their metrics."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch
import yaml

from mmprefix.cli import run
from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.loading import EpochBatchSampler
from mmprefix.data.mixture import EpochOrder, MixtureArgs, SetArgs, parse_sets, quotas
from mmprefix.data.shards import write_shard
from mmprefix.errors import InputError
from tests.conftest import colour_record
from tests.test_resume import CONFIG


def quotas_of(sizes, weights=None, own_sizes=None, **mixture):
    sets = [
        SetArgs(f"set{n}", "x", weights and weights[n], own_sizes and own_sizes[n]) for n in range(len(sizes))
    ]  # fmt: skip
    return quotas(sets, sizes, MixtureArgs(**mixture))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"sizes": [100, 10]}, (100, 10)),
        ({"sizes": [100, 10], "own_sizes": [None, 25]}, (100, 25)),
        ({"sizes": [100, 10], "temperature": 1.0}, (100, 10)),
        ({"sizes": [100, 25], "temperature": 2.0}, (50, 25)),
        ({"sizes": [100, 25], "temperature": 2.0, "stopping_strategy": "all_exhausted"}, (100, 50)),
        ({"sizes": [100, 10], "weights": [1, 1]}, (10, 10)),
        ({"sizes": [100, 10], "weights": [3.0, 1.0]}, (30, 10)),
        ({"sizes": [100, 10], "weights": [1, 1], "stopping_strategy": "all_exhausted"}, (100, 100)),
        ({"sizes": [1000, 10], "weights": [1, 10000]}, (1, 10)),
        ({"sizes": [10**9, 3], "temperature": 0.001}, (10**9, 1)),
        ({"sizes": [10**9, 3], "temperature": 1e9}, (3, 3)),
    ],
)
def test_quotas(arguments, expected):
    assert quotas_of(**arguments) == expected


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(InputError, match="expected one of weights, sizes and data.mixture.temperature, got several"):
        quotas_of([1, 2], weights=[1, 1], temperature=2.0)
    with pytest.raises(InputError, match="temperature: expected a number above 0, got 0"):
        MixtureArgs(temperature=0.0).check()
    with pytest.raises(InputError, match="expected an epoch of at most 2"):
        quotas_of([1, 10**12], weights=[1, 1], stopping_strategy="all_exhausted")


@pytest.mark.parametrize("own_sizes", [(7, 20), (10, 3), (23, 11), (10, 8)])
def test_no_record_comes_again_before_all_of_its_set_came(own_sizes):
    sizes = (10, 8)
    order = EpochOrder(sizes, own_sizes, seed=5)
    seen = [Counter(), Counter()]
    for epoch in range(9):
        passes, records = order(epoch)
        assert len(records) == len(passes) == len(order) == sum(own_sizes)
        of_set = [int(record >= 10) for record in records]
        assert Counter(of_set) == {0: own_sizes[0], 1: own_sizes[1]}
        for one, record, number in zip(passes.tolist(), records.tolist(), of_set, strict=True):
            seen[number][one, record] += 1
    for number, (size, quota) in enumerate(zip(sizes, own_sizes, strict=True)):
        assert max(seen[number].values()) == 1, "each record at most once in each pass"
        by_pass = Counter(one for one, _ in seen[number])
        full, rest = divmod(9 * quota, size)
        assert [by_pass[n] for n in range(full)] == [size] * full
        assert by_pass[full] == rest
    assert not np.array_equal(order(0)[1], order(1)[1])
    assert np.array_equal(order(3)[1], EpochOrder(sizes, own_sizes, seed=5)(3)[1])
    assert not np.array_equal(order(3)[1], EpochOrder(sizes, own_sizes, seed=6)(3)[1])


def test_sets_are_mixed_and_go_each_its_own_way():
    order = EpochOrder((50, 50), (50, 50))
    records = order(0)[1]
    first_half = Counter((records[:50] >= 50).tolist())
    assert min(first_half.values()) > 10
    firsts, seconds = records[records < 50], records[records >= 50] - 50
    assert not np.array_equal(firsts, seconds)
    alone = EpochOrder.of(50)
    assert alone.is_plain
    assert sorted(alone(2)[1].tolist()) == list(range(50))
    assert set(alone(2)[0].tolist()) == {2}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_share_an_epoch_of_a_mixture(num_ranks):
    order = EpochOrder((10, 8), (5, 12), seed=1)
    expected = Counter(zip(*(numbers.tolist() for numbers in order(4)), strict=True))
    drawn = Counter()
    for rank in range(num_ranks):
        sampler = EpochBatchSampler(order, 2, rank, num_ranks)
        sampler.set_epoch(4)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        drawn.update(index for batch in batches for index in batch)
    assert drawn == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "data.train: expected shards, or sets by name, got {}"),
        ({"a": 3}, "data.train.a.shards: expected a path, glob or folder, or a list of them, got 3"),
        (
            {"a": {"shard": "x"}},
            "expected shards, weight, size, instructions, metric, got 'shard'; did you mean shards?",
        ),
        ({"a": {"shards": "x", "weight": 0}}, "data.train.a.weight: expected a number above 0, got 0"),
        ({"a": {"shards": "x", "weight": True}}, "data.train.a.weight"),
        ({"a": {"shards": "x", "size": 0}}, "data.train.a.size: expected a number of records above 0, got 0"),
        ({"a": {"shards": "x", "size": 3, "weight": 1}}, "data.train.a: expected a weight or a size, got both"),
        ({"a": {"shards": "x", "weight": 1}, "b": "y"}, "data.train.b: expected a weight, as a has one, got none"),
        ({"a/b": "x"}, "expected a name of letters"),
        ({"a": {"shards": "x", "instructions": [1]}}, "instructions: expected a text or a list of texts"),
        ({"a": {"shards": "x", "instructions": "{question}?"}}, "expected no placeholder but {instruction}, got"),
    ],
)
def test_bad_sets_are_named(value, message):
    with pytest.raises(InputError) as error:
        parse_sets(value, "data.train", trains=True)
    assert message in str(error.value)


def test_evaluated_sets_have_no_weights():
    with pytest.raises(InputError, match="data.val.a: expected no weight and no size: each record is evaluated once"):
        parse_sets({"a": {"shards": "x", "weight": 1}}, "data.val", trains=False)
    assert parse_sets({"a": "x"}, "data.val", trains=False) == (SetArgs("a", "x"),)


@pytest.fixture
def two_sets(tmp_path):
    """Colours: 12 records of two samples each; numbers: 5 of one."""
    write_shard(tmp_path / "colours.tar", [colour_record(n) for n in range(12)])
    records = []
    for n in range(5):
        key, image, _ = colour_record(40 + n)
        records.append((key, image, json.dumps({"instruction": f"{n}?", "target": f"it is {n}"}).encode()))
    write_shard(tmp_path / "numbers.tar", records)
    return {"colours": str(tmp_path / "colours.tar"), "numbers": str(tmp_path / "numbers.tar")}


def data_module(processor, train, **kwargs):
    data = ShardDataModule(processor, train=train, batch_size=4, **kwargs)
    data.setup_done = [data.shards(split) for split in ("train", "val") if data.has(split)]
    return data


def test_batches_say_which_set_each_label_is_of(model_and_processor, two_sets):
    _, processor = model_and_processor
    data = data_module(processor, two_sets)
    datasets = Counter()
    for batch in data.train_dataloader():
        datasets.update(reference.dataset for reference in batch.references)
        texts = {0: 0, 1: 0}
        for reference in batch.references:
            number = ("colours", "numbers").index(reference.dataset)
            texts[number] += sum(len(processor.format.text_ids(text)) + 1 for text in reference.references)
        assert Counter(batch.label_datasets.tolist()) == Counter({k: v for k, v in texts.items() if v})
    assert datasets == {"colours": 24, "numbers": 5}
    assert data.set_names("train") == ("colours", "numbers")
    plain = data_module(processor, two_sets["colours"])
    assert next(iter(plain.train_dataloader())).label_datasets is None


def test_instructions_are_drawn_by_seed_for_training_and_the_first_is_evaluated(model_and_processor, two_sets):
    _, processor = model_and_processor
    templates = ["say: {instruction}", "{instruction} now", "caption en"]
    sets = {**two_sets, "numbers": {"shards": two_sets["numbers"], "instructions": templates}}

    def drawn(seed, epoch=0):
        data = data_module(processor, sets, seed=seed)
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        pairs = [(r.id, r.instruction, r.dataset) for batch in loader for r in batch.references]
        assert all(instruction in ("which colour?", "is it red?") for _, instruction, of in pairs if of == "colours")
        return {id_: instruction for id_, instruction, of in pairs if of == "numbers"}

    first = drawn(1)
    assert first == drawn(1), "the same seed, the same instructions"
    kinds = {i.replace(str(n), "") for n, i in enumerate(first[f"{40 + n:04d}"] for n in range(5))}
    assert kinds <= {"say: ?", "? now", "caption en"}
    assert len(kinds) > 1
    assert any(drawn(1, epoch) != first for epoch in range(1, 4))
    assert any(drawn(seed) != first for seed in (2, 3))
    data = data_module(processor, two_sets, val=sets)
    shown = [r.instruction for batch in data.val_dataloader() for r in batch.references if r.dataset == "numbers"]
    assert shown == [f"say: {n}?" for n in range(5)]


def test_a_budget_of_tokens_counts_the_longest_instruction_and_needs_every_record_once(model_and_processor, two_sets):
    _, processor = model_and_processor
    templates = ["{instruction}", "please look at the picture and say: {instruction}"]
    long = {name: {"shards": shards, "instructions": templates} for name, shards in two_sets.items()}
    data = data_module(processor, long, max_tokens=260)
    data.packed = True
    for epoch in range(3):
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        assert max(batch.num_tokens for batch in loader) <= 260
    weighted = {name: {"shards": shards, "weight": 1} for name, shards in two_sets.items()}
    with pytest.raises(InputError, match=r"data.max_tokens: expected an epoch of every record once.* takes 5, 5"):
        data_module(processor, weighted, max_tokens=260).train_dataloader()


def fit(tmp_path, two_sets, name, *arguments, sets=None):
    content = json.loads(json.dumps(CONFIG))
    content["trainer"] |= {"default_root_dir": str(tmp_path / name), "logger": True, "limit_val_batches": 1.0,
                           "log_every_n_steps": 1}  # fmt: skip
    content["data"] = {"train": sets or two_sets, "val": two_sets, "batch_size": 3, "num_workers": 0}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return run(["fit", "--config", str(path), *arguments])


def test_a_run_logs_and_reports_each_set(tmp_path, two_sets, capfd):
    sets = {"colours": {"shards": two_sets["colours"], "size": 6}, "numbers": two_sets["numbers"]}
    assert fit(tmp_path, two_sets, "run", sets=sets) == 0
    lines = capfd.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("set"))
    assert header.split() == ["set", "kind", "question", "samples", "exact", "match", "95%", "interval"]
    rows = [line.split() for line in lines[lines.index(header) + 2 :] if line.strip()][:5]
    assert [row[:2] for row in rows[:4]] == [
        ["colours", "colour"], ["colours", "red"], ["colours", "total"], ["numbers", "all"],
    ]  # fmt: skip
    assert rows[4][:2] == ["total", "29"]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    columns = {name for row in table for name, value in row.items() if value}
    for name in ("colours", "numbers"):
        assert {f"train/{name}/loss", f"val/{name}/loss", f"val/{name}/exact_match"} <= columns
    assert {"val/colours/exact_match.red", "val/exact_match", "val/loss"} <= columns
    last = [row for row in table if row["val/loss"]][-1]
    losses = [float(last[f"val/{name}/loss"]) for name in ("colours", "numbers")]
    assert min(losses) <= float(last["val/loss"]) <= max(losses)
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").open()]
    assert Counter(p["dataset"] for p in predictions) == {"colours": 24, "numbers": 5}


def test_a_mixture_resumes_bit_equal_and_refuses_other_sets(tmp_path, two_sets, capfd):
    sets = {
        "colours": {"shards": two_sets["colours"], "size": 7},
        "numbers": {"shards": two_sets["numbers"], "size": 8},
    }
    every = [
        "--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.dirpath", str(tmp_path / "kept"),
        "--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_top_k", "-1",
    ]  # fmt: skip
    assert fit(tmp_path, two_sets, "whole", *every, sets=sets) == 0
    checkpoints = {torch.load(p, weights_only=True)["global_step"]: p for p in (tmp_path / "kept").glob("*.ckpt")}
    assert len(checkpoints) == 10
    final = torch.load(checkpoints[10], weights_only=True)["state_dict"]
    again = [argument.replace("kept", "again") for argument in every]
    assert fit(tmp_path, two_sets, "resumed", *again, "--ckpt_path", str(checkpoints[7]), sets=sets) == 0
    resumed = {torch.load(p, weights_only=True)["global_step"]: p for p in (tmp_path / "again").glob("*.ckpt")}
    found = torch.load(resumed[10], weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in final.items())
    capfd.readouterr()
    other = {**sets, "numbers": {"shards": two_sets["colours"], "size": 8}}
    assert fit(tmp_path, two_sets, "other", "--ckpt_path", str(checkpoints[7]), sets=other) == 2
    assert "data.train: expected the sets (name, records, records of an epoch)" in capfd.readouterr().err
