"""Every config loads, with tiny stand-ins for weights that would be downloaded, and trains a step."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from mmprefix.cli import fit_settings, run
from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.mixture import instructed
from mmprefix.data.samples import Sample
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
        "data": {
            "train": str(shards / "train-*.tar"), "val": str(shards / "val-*.tar"), "num_workers": 0,
            "metric": "caption" if path.stem == "captioning" else "exact",  # for VQA accuracy they have too few answers
        },
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


EVALUATIONS = sorted((CONFIGS[0].parent / "eval").glob("*.yaml"))
PUBLISHED = {  # arXiv 2407.07726 and big_vision's transfer configs: beams, most tokens, prompt
    "coco": (2, 32, "caption en"), "nocaps": (2, 32, "caption en"), "textcaps": (3, 32, "caption en"),
    "vqav2": (1, 32, "answer en Why?"), "okvqa": (1, 32, "answer en Why?"), "textvqa": (1, 32, "answer en Why?"),
    "gqa": (1, 32, "answer en Why?"), "vizwiz": (1, 48, "answer en Why?"), "docvqa": (1, 32, "Why?"),
    "chartqa": (1, 48, "Why?"), "scienceqa": (1, 512, "Question: Why?\nAnswer:"),
}  # fmt: skip


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_evaluation_config_lies_over_a_models_and_asks_as_published(path):
    base = re.search(r"--config (configs/\w+\.yaml) --config configs/eval/", path.read_text()).group(1)
    settings = fit_settings(["--config", str(path.parents[2] / base), "--config", str(path)])
    beams, tokens, prompt = PUBLISHED[path.stem]
    assert settings["model"]["num_beams"] == beams
    assert settings["data"]["max_target_tokens"] == tokens
    data = ShardDataModule(metric=settings["data"]["metric"], test=settings["data"]["test"])
    task = {"coco": "caption", "nocaps": "caption", "textcaps": "caption", "vqav2": "vqa"}.get(path.stem, path.stem)
    assert set(data.tasks("test").values()) == {task}
    sample = Sample("1", "1", "all", ("Why?",), ("so",), ("so",))
    for one in data._sets["test"]:
        assert instructed(sample, one.instructions[0]).instruction == prompt


def test_there_is_an_evaluation_config_for_each_published_task():
    assert {path.stem for path in EVALUATIONS} == set(PUBLISHED)
