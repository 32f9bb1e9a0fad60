"""Parts that begin to learn at a step, on several processes: as on one, and resumed from either side of the step."""

import torch

from mmprefix.training.checkpoints import read_checkpoint
from tests.several import fit_each
from tests.test_fsdp import assert_losses, losses

LATE = [
    "--trainer.max_epochs", "1", "--trainer.gradient_clip_val", "1.0", "--model.optimizer.lr", "1.0e-3",
    "--model.train_vision.unfreeze_at_step", "2", "--model.train_vision.lr", "1.0e-4",
    "--model.train_decoder.unfreeze_at_step", "3",
]  # fmt: skip


def checkpoint(folder, step):
    """Of a run that others went on from, too: it was set aside then."""
    (path,) = folder.glob(f"*step={step:08d}.ckpt*")
    return read_checkpoint(path)


def test_a_part_that_unfreezes_learns_on_several_processes_as_on_one(records):
    """Nine records of which six have no image, so that at each switch a rank, or both, have text only."""
    one = fit_each(records, 1, {"one": (1, ["--data.batch_size", "2", *LATE])})["one"]
    strategies = {"ddp": "ddp", "sharded": "fsdp2"}
    arguments = {
        name: ["--data.batch_size", "1", "--trainer.strategy", strategy, *LATE] for name, strategy in strategies.items()
    }
    runs = {name: (1, words) for name, words in arguments.items()}
    for name, words in arguments.items():
        for step in (4, 2, 1):  # behind, at, and before the switches; later ones are set aside
            path = records / name / f"step={step:08d}.ckpt"
            runs[f"{name}-{step}"] = (1, [*words, "--ckpt_path", path])
    found = fit_each(records, 2, runs)
    expected = checkpoint(records / "one", 5)
    first = checkpoint(records / "one", 1)["state_dict"]
    for name in strategies:
        assert_losses(losses(found[name]), losses(one))
        whole = checkpoint(records / name, 5)
        for key, value in expected["state_dict"].items():  # Adam divides by what is near zero
            torch.testing.assert_close(whole["state_dict"][key], value, atol=2e-5, rtol=1e-4)
        (own,), (others,) = whole["optimizer_states"], expected["optimizer_states"]
        assert own["param_groups"] == others["param_groups"], "learning rates and their schedule"
        assert own["state"].keys() == others["state"].keys()
        assert all(own["state"][n]["step"] == others["state"][n]["step"] for n in own["state"]), "steps since it learns"
        for step in (1, 2, 4):
            assert_losses(losses(found[f"{name}-{step}"]), losses(found[name]), after=step)
            again = checkpoint(records / f"{name}-{step}", 5)
            for key, value in whole["state_dict"].items():
                assert torch.equal(again["state_dict"][key], value), f"{name} from step {step}: {key}"
        early = checkpoint(records / name, 2)["state_dict"]
        late = [key for key in first if ".vision." in key or ".decoder." in key]
        assert all(torch.equal(early[key], first[key]) for key in late), "frozen until then"
        moved = {key.split(".")[1] for key in late if not torch.equal(whole["state_dict"][key], first[key])}
        assert moved == {"vision", "decoder"}
