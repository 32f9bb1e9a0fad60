"""Checkpoints kept for what validation says of them, of one process and of two."""

import json

import pytest
import torch

from mmprefix.training.checkpoints import newest_checkpoint, read_checkpoint
from tests.several import fit_each, run_each
from tests.test_fsdp import assert_losses, losses

SETTINGS = [
    "--trainer.limit_val_batches", "1.0", "--trainer.val_check_interval", "2", "--model.optimizer.lr", "1.0e-3",
    "--checkpoints.keep_last", "1", "--checkpoints.best.metric", "val/loss",
]  # fmt: skip


@pytest.mark.parametrize("sharded", [False, True])
def test_the_best_stays_beside_the_newest_and_is_gone_on_from(records, sharded):
    """Five steps an epoch, validated after the second and fourth; of a loss that falls, the largest is the first."""
    strategy = ["--trainer.strategy", "fsdp2", "--data.batch_size", "1"] if sharded else ["--data.batch_size", "2"]
    checkpoints = records / "worst-run" / "checkpoints"
    found = fit_each(records, 1 + sharded, {
        "worst": (0, [*SETTINGS, *strategy, "--checkpoints.best.mode", "max"]),
        "two": (0, [*SETTINGS, *strategy, "--checkpoints.best.mode", "min", "--checkpoints.best.keep", "2",
                    "--checkpoints.every_n_steps", "1"]),
        "epochs": (0, [*strategy, *SETTINGS, "--trainer.val_check_interval", "1.0", "--checkpoints.best.mode", "max"]),
    })  # fmt: skip
    assert sorted(path.name for path in (records / "epochs-run" / "checkpoints").iterdir()) == [
        "best.json", "step=00000005.ckpt", "step=00000010.ckpt",
    ], "of a validation at an epoch's end, what is saved there anyway"  # fmt: skip
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "best.json",
        "step=00000002.ckpt",
        "step=00000010.ckpt",
    ]
    scores = json.loads((checkpoints / "best.json").read_text())
    steps = [f"step={step:08d}.ckpt" for step in (2, 4, 7, 9)]
    assert list(scores["values"]) == steps
    assert max(scores["values"], key=scores["values"].get) == steps[0]
    second = records / "two-run" / "checkpoints"
    values = json.loads((second / "best.json").read_text())["values"]
    assert values == scores["values"]
    best = sorted(values, key=values.get)[:2]
    assert sorted(path.name for path in second.iterdir()) == sorted(["best.json", *best, "step=00000010.ckpt"])
    expected = read_checkpoint(newest_checkpoint(records / "worst-run"))["state_dict"]
    expected = {name: value.clone() for name, value in expected.items()}
    ((status, out, err), *_) = run_each(records, 1 + sharded, {
        "worst": (0, [*SETTINGS, *strategy, "--checkpoints.best.mode", "max", "--ckpt_path", "best"])
    })  # fmt: skip
    assert status == 0, err
    value = scores["values"][steps[0]]
    assert f"resuming from {checkpoints / steps[0]}, the best by val/loss: {value:.6g}" in out
    assert "a later checkpoint is kept as" in out
    assert json.loads((checkpoints / "best.json").read_text()) == scores
    again = read_checkpoint(newest_checkpoint(records / "worst-run"))["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    lines = [json.loads(line) for line in (records / "worst.jsonl").read_text().splitlines()][10 * (1 + sharded) :]
    assert_losses(losses(lines), losses(found["worst"]), after=2)


def test_a_metric_that_is_not_logged_is_refused_before_training(records):
    def error(*arguments):
        ((status, _, err),) = run_each(records, 1, {"one": (0, [*SETTINGS, *arguments])})
        assert status == 2, err
        (line,) = (line for line in err.splitlines() if line.startswith("error: "))
        return line

    line = error("--checkpoints.best.metric", "val/accuracy")
    assert line.startswith(
        "error: checkpoints.best.metric: expected what validation logs (val/bad_samples, val/exact_match, "
    )
    assert line.endswith("), got 'val/accuracy'")
    assert not (records / "one-run" / "checkpoints").exists()
    assert error("--trainer.limit_val_batches", "0") == (
        "error: checkpoints.best: expected a validation that logs val/loss, there is none"
    )
    assert error("--ckpt_path", "best") == (
        f"error: --ckpt_path best: expected {records}/one-run/checkpoints/best.json and a checkpoint that it names, as `fit` "
        "leaves them with checkpoints.best, there is none"
    )
