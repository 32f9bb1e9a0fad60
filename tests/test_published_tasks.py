"""Each config of `configs/eval/`: the commands in its head, over a small set as a user has it before the first of them.

A random model stands in for the published one, and says what it is told to.
"""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from mmprefix import cli, prepare
from mmprefix.decoding import _Decoding
from mmprefix.training.module import MMPrefixModule
from tests.conftest import TINY_DECODER
from tests.test_configs import CONFIGS, EVALUATIONS

ROOT = CONFIGS[0].parents[1]
NAMES = [f"COCO_val2014_{n:012d}" for n in (42, 73, 133)]
"""Of pictures, without suffix; as VQA's questions name them, by number only."""
QUESTIONS = [("Is it red?", "yes"), ("What colour is it?", "dark red"), ("How many?", "3")]


def captions():
    images = [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate(NAMES)]
    texts = [{"id": 5 * n + m, "image_id": n, "caption": f"a house of {n} and {m}"} for n in range(3) for m in range(5)]
    return {"images": images, "annotations": texts}


def karpathy():
    return {"images": [
        {"filename": f"{name}.jpg", "filepath": ".", "cocoid": n, "split": "val", "sentences": [{"raw": f"house {n}"}] * 5}
        for n, name in enumerate(NAMES)
    ]}  # fmt: skip


def vqa_questions():
    return {"data_subtype": "val2014", "questions": [
        {"image_id": int(name[-12:]), "question": question, "question_id": n}
        for n, (name, (question, _)) in enumerate(zip(NAMES, QUESTIONS, strict=True))
    ]}  # fmt: skip


def vqa_answers():
    return {"annotations": [
        {"question_id": n, "image_id": int(name[-12:]), "answer_type": "other", "multiple_choice_answer": answer,
         "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": m} for m in range(10)]}
        for n, (name, (_, answer)) in enumerate(zip(NAMES, QUESTIONS, strict=True))
    ]}  # fmt: skip


def vizwiz():
    return [
        {"image": f"{name}.jpg", "question": question, "answer_type": "other", "answerable": int(n > 0),
         "answers": [{"answer": answer if n else "unanswerable", "answer_confidence": "yes"}] * 10}
        for n, (name, (question, answer)) in enumerate(zip(NAMES, QUESTIONS, strict=True))
    ]  # fmt: skip


def textvqa():
    return {"data": [
        {"question": question, "image_id": name, "question_id": n, "answers": [answer] * 10}
        for n, (name, (question, answer)) in enumerate(zip(NAMES, QUESTIONS, strict=True))
    ]}  # fmt: skip


def docvqa():
    return {"data": [
        {"questionId": n, "question": question, "image": f"{name}.jpg", "answers": [answer], "question_types": ["form"]}
        for n, (name, (question, answer)) in enumerate(zip(NAMES, QUESTIONS, strict=True))
    ]}  # fmt: skip


def gqa():
    return {
        f"00{n}": {"question": question, "imageId": name, "answer": answer, "types": {"structural": "query"}}
        for n, (name, (question, answer)) in enumerate(zip(NAMES, QUESTIONS, strict=True))
    }


def scienceqa():
    return {
        str(n): {"question": "Which?", "choices": ["iron", "wood"], "answer": n % 2, "hint": "", "image": f"{name}.jpg",
                 "split": "test", "subject": "natural science"}
        for n, name in enumerate(NAMES)
    } | {"3": {"question": "Why?", "choices": ["a", "b"], "answer": 0, "image": None, "split": "test"}}  # fmt: skip


def chartqa():
    rows = zip(NAMES, QUESTIONS, strict=True)
    return [{"imgname": f"{name}.jpg", "query": question, "label": answer} for name, (question, answer) in rows]


def textcaps():
    return {
        "data": [{"image_id": name, "caption_str": f"text {m} on wall {name[-2:]}"} for m in range(5) for name in NAMES]
    }


FILES = {
    "dataset_coco.json": karpathy, "nocaps_val_4500_captions.json": captions, "TextCaps_0.1_val.json": textcaps,
    "v2_OpenEnded_mscoco_val2014_questions.json": vqa_questions, "v2_mscoco_val2014_annotations.json": vqa_answers,
    "OpenEnded_mscoco_val2014_questions.json": vqa_questions, "mscoco_val2014_annotations.json": vqa_answers,
    "val.json": vizwiz, "TextVQA_0.5.1_val.json": textvqa, "val_v1.0_withQT.json": docvqa,
    "testdev_balanced_questions.json": gqa, "problems.json": scienceqa, "test_human.json": chartqa,
    "test_augmented.json": chartqa,
}  # fmt: skip
"""What a user has before the first command."""
FOLDERS = ("coco", "nocaps", "train_images", "val2014", "val", "docvqa", "gqa", "scienceqa", "png")
SAID = {"textcaps": "text 1 on wall 73", "scienceqa": "The answer is B."}
SAID |= dict.fromkeys(("coco", "nocaps"), "a house of 1 and 2")
"""What each picture is answered with; by default the second question's answer."""
METRICS = {"docvqa": "anls", "chartqa": "relaxed_accuracy", "gqa": "accuracy", "scienceqa": "accuracy"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the commands name, and a run of a random model that knows nothing."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name, make in FILES.items():
        content = make()
        rows = [json.dumps(row) for row in content] if name.endswith(".jsonl") else [json.dumps(content)]
        (folder / name).write_text("\n".join(rows))
    for of_task in FOLDERS:
        for n, name in enumerate(NAMES):
            path = folder / of_task / f"{name}.jpg"
            if of_task == "scienceqa":
                path = folder / of_task / "test" / str(n) / path.name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((24, 32, 3), 80 * n, np.uint8)).save(path)
    (folder / "stand_ins.yaml").write_text(yaml.safe_dump({
        "model": {
            "pretrained": None, "vision": {"name": "test_vit", "pretrained": False, "image_size": 32, "kwargs": {}},
            "decoder": {"name": None, "config": TINY_DECODER}, "tokenizer": {"name": "byte"},
        },
        "data": {"train": "data/vqav2/val-*.tar", "val": "data/vqav2/val-*.tar", "num_workers": 0},
        "trainer": {
            "default_root_dir": "run", "max_steps": 1, "accumulate_grad_batches": 1, "accelerator": "cpu",
            "enable_progress_bar": False,
        },
    }))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands_of(ROOT / "configs" / "eval" / "vqav2.yaml")[:-1]:
            assert prepare.run(command[1:]) == 0
        assert cli.run(["fit", "--config", "configs/vqa.yaml", "--config", "stand_ins.yaml"]) == 0
        yield folder


def commands_of(path):
    """Arguments of the commands in the head of a config."""
    head = "".join(re.findall(r"^# ?(.*\n)", path.read_text(), re.MULTILINE)).replace("\\\n", " ")
    return [shlex.split(line)[3:] for line in head.splitlines() if line.strip().startswith("python -m mmprefix")]


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_the_commands_of_a_config_end_with_a_row_to_lay_beside_the_published_one(path, place, capsys, monkeypatch):
    *preparing, testing = commands_of(path)
    assert testing[0] == "test"
    for command in preparing:
        assert command[0] == "prepare"
        out = place / command[command.index("--out") + 1]
        if not (out / "index.json").exists():
            assert prepare.run(command[1:]) == 0
        refused = [json.loads(line) for file in out.glob("*.refused.jsonl") for line in file.read_text().splitlines()]
        expected = [("3", "no image")] if path.stem == "scienceqa" else []
        assert [(row["what"], row["reason"]) for row in refused] == expected
    generate = MMPrefixModule.generate
    # The model answers, to nothing that could be scored.
    said = SAID.get(path.stem, QUESTIONS[1][1])
    monkeypatch.setattr(MMPrefixModule, "generate", lambda *given: [said for _ in generate(*given)])
    prefills = []
    prefill = _Decoding._prefill_packed
    monkeypatch.setattr(_Decoding, "_prefill_packed", lambda *given: prefills.append(1) or prefill(*given))
    capsys.readouterr()
    assert cli.run([*testing, "--config", "stand_ins.yaml"]) == 0
    assert yaml.safe_load((place / "run" / "config.yaml").read_text())["data"]["test"] is None, "that of `fit`"
    assert list(yaml.safe_load((place / "run" / "config-test.yaml").read_text())["data"]["test"])
    is_greedy = yaml.safe_load(path.read_text())["model"]["num_beams"] == 1
    assert bool(prefills) == is_greedy, "the faster of two ways to the same answers"
    tables = re.split(r"^test(?= )", capsys.readouterr().out, flags=re.MULTILINE)
    sets = yaml.safe_load(path.read_text())["data"]["test"]
    is_captions = "captioning" in " ".join(testing)
    for name, settings in sets.items():
        (table,) = [text for text in tables if text.startswith(f" {name}: {settings['metric']}: 3 items, 3 images\n")]
        metric = "CIDEr" if is_captions else METRICS.get(path.stem, "vqa_accuracy")
        row = re.search(rf"^{metric} +([\d.]+) +[\d.]+ to [\d.]+ +3$", table, re.MULTILINE)
        assert row, table
        if is_captions:
            assert float(row[1]) > 1
        else:
            assert float(row[1]) == pytest.approx(100 / 3, abs=0.01), "one of three"
