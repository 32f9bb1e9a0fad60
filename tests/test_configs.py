"""Every config loads, with tiny stand-ins for weights that would be downloaded, and trains a step."""

from pathlib import Path

import pytest
import torch
import yaml

from mmprefix.cli import run
from mmprefix.training import checkpoints
from tests.conftest import TINY_DECODER

CONFIGS = sorted(
    path for path in (Path(__file__).parent.parent / "configs").glob("*.yaml")
    if path.stem not in ("fsdp", "lora")  # lie over others: test_fsdp.py, test_lora.py
)  # fmt: skip


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"digits", "forkme", "captioning", "vqa", "paligemma"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_a_step_with_stand_ins(path, colour_shards, tmp_path, capfd):
    shards = colour_shards()
    stand_ins = tmp_path / "stand_ins.yaml"
    stand_ins.write_text(yaml.safe_dump({
        "model": {
            "pretrained": None,
            "vision": {"name": "test_vit", "pretrained": False, "image_size": 32, "kwargs": {}},
            "decoder": {"name": None, "config": TINY_DECODER},
            "tokenizer": {"name": "byte"},
        },
        "data": {"train": str(shards / "train-*.tar"), "val": str(shards / "val-*.tar"), "num_workers": 0},
        "trainer": {
            "default_root_dir": str(tmp_path / "run"), "max_steps": 1, "accumulate_grad_batches": 1,
            "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False,
        },
    }))  # fmt: skip
    # The tokenizer's own names stay: <pad> is a token of the byte tokenizer, too.
    status = run(["fit", "--config", str(path), "--config", str(stand_ins)])
    out, err = capfd.readouterr()
    assert status == 0, out + err
    assert checkpoints.newest_checkpoint(tmp_path / "run") is not None


@pytest.mark.parametrize("name", ["captioning", "vqa"])
def test_published_transfer_settings(name):
    """arXiv 2407.07726: lr 1e-5, 5% warm-up, cosine, clip 1.0, b2 0.999; COCO 5 epochs and beam 2, VQAv2 10, greedy."""
    config = yaml.safe_load((CONFIGS[0].parent / f"{name}.yaml").read_text())
    optimizer, trainer, data = config["model"]["optimizer"], config["trainer"], config["data"]
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["warmup"]) == (1e-5, 1e-6, 0.05)
    assert (optimizer["beta2"], trainer["gradient_clip_val"]) == (0.999, 1.0)
    assert config["model"]["loss_normalization"] == "per_sample"
    epochs, beams, samples_per_record = {"captioning": (5, 2, 5), "vqa": (10, 1, 5.4)}[name]
    assert trainer["max_epochs"] == epochs
    assert config["model"].get("num_beams", 1) == beams
    batch = data["batch_size"] * trainer["accumulate_grad_batches"] * samples_per_record
    assert batch == pytest.approx(256, rel=0.03)


def test_vision_names_of_the_configs_exist_in_timm():
    from mmprefix.vision import VisionArgs, resolve_vision

    for path in CONFIGS:
        vision = yaml.safe_load(path.read_text())["model"].get("vision")
        if vision is None:  # a whole model is imported
            continue
        spec = resolve_vision(VisionArgs(**{**vision, "pretrained": False}))
        assert spec.num_tokens > 0
        assert torch.Size(spec.image_size).numel() > 0
