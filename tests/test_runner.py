"""A run's own predictions: gathered from all processes, scored once, written as servers take them."""

import json
import os
import re
import signal
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import yaml

from mmprefix import cli
from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.shards import write_shard
from mmprefix.errors import InputError
from mmprefix.evaluation.official import read_predictions
from mmprefix.evaluation.progress import Part, Progress, checkpoint_identity
from mmprefix.evaluation.report import score_tables
from mmprefix.evaluation.runner import (
    Evaluation,
    check_reference,
    gathered,
    logged,
    score_predictions,
    write_results,
)
from mmprefix.evaluation.scores import score_caption_split
from mmprefix.metrics import AnswerReference, score_answers, score_captions
from mmprefix.metrics.bleu import bleu_counts, bleu_of
from mmprefix.metrics.intervals import sums_intervals
from mmprefix.metrics.ngrams import CaptionCorpus
from mmprefix.metrics.rules import ScoringRules
from mmprefix.packing import Reference
from tests import forks
from tests.conftest import colour_record
from tests.test_captions import needs_official
from tests.test_cli import ENVIRONMENT
from tests.test_resume import CONFIG, ROOT

TEN = ("red",) * 3 + ("dark red",) * 7


def question(number, said, answers=TEN, kind="other", dataset=""):
    return Reference(f"{number}", f"{number // 2}", kind, "which?", answers, (number // 2, number % 2), dataset), said


def caption(number, said, captions, kind="in", dataset=""):
    return Reference(f"{number}", f"{number}", kind, "caption en", captions, (number, 0), dataset), said


QUESTIONS = [question(0, "red"), question(1, "dark red"), question(2, "blue", kind="yes/no")]
PYTHON = ScoringRules(caption_tokenizer="python")
CAPTIONS = [
    caption(3, "a dog on a sofa", ("a dog on a sofa", "a brown dog lies down")),
    caption(12, "two cats", ("two cats play", "cats on a bed"), kind="out"),
    caption(7, "a bus", ("a red bus in the street",)),
]


def test_scores_match_those_of_the_metrics_and_are_logged_by_name():
    of_vqa = score_predictions(QUESTIONS, {"": "vqa"}, intervals=False)
    expected = score_answers(
        "vqa", {r.id: said for r, said in QUESTIONS}, {r.id: AnswerReference(r.references) for r, _ in QUESTIONS}
    )
    assert logged("val", Evaluation(QUESTIONS, of_vqa)) == {
        "val/vqa_accuracy": expected.corpus["vqa_accuracy"],
        "val/vqa_accuracy.other": pytest.approx((0.9 + 1) / 2),
        "val/vqa_accuracy.yes_no": 0.0,
    }
    of_captions = score_predictions(CAPTIONS, {"": "caption"}, PYTHON, intervals=False)
    scores = score_captions(
        {r.id: said for r, said in CAPTIONS}, {r.id: r.references for r, _ in CAPTIONS}, tokenizer="python"
    )
    values = logged("test", Evaluation(CAPTIONS, of_captions))
    assert scores.corpus["CIDEr"] > 0.1
    assert {name: values[f"test/{name}"] for name in scores.corpus} == scores.corpus
    of_images = scores.items["CIDEr"]
    assert values["test/CIDEr.in"] == pytest.approx((of_images["3"] + of_images["7"]) / 2)
    assert values["test/CIDEr.out"] == of_images["12"]
    assert "tokenizer=python, not official" in score_tables("test", Evaluation(CAPTIONS, of_captions))[0]


def test_sets_have_their_own_metrics_and_a_value_together_only_where_it_is_one():
    more = [question(n, "red", dataset=name) for name in ("a", "b") for n in range(2)] + [
        question(2, "no", dataset="b")
    ]
    captions = [caption(n, said, r.references, dataset="c") for n, (r, said) in enumerate(CAPTIONS)]
    everything = [*more, *captions]

    def values(tasks):
        scores = score_predictions(everything, tasks, PYTHON, intervals=False)
        return logged("val", Evaluation(everything, scores))

    found = values({"a": "vqa", "b": "vqa", "c": "caption"})
    assert found["val/a/vqa_accuracy"] == pytest.approx(0.9)
    assert found["val/b/vqa_accuracy"] == pytest.approx(0.6)
    assert found["val/vqa_accuracy"] == pytest.approx(4 * 0.9 / 5)
    assert found["val/c/CIDEr"] == found["val/CIDEr"] > 0
    other_rules = values({"a": "vqa", "b": "textvqa", "c": "caption"})
    assert {"val/a/vqa_accuracy", "val/b/vqa_accuracy"} < other_rules.keys()
    assert "val/vqa_accuracy" not in other_rules
    two_of_captions = values({"a": "caption", "b": "vqa", "c": "caption"})
    assert "val/CIDEr" not in two_of_captions
    assert {"val/exact_match", "val/a/exact_match", "val/a/exact_match.other"} <= values({}).keys()


def test_names_are_such_that_every_logger_takes_them():
    """MLflow: letters, digits and few other characters, and no name that is another's folder."""
    kinds = ["yes/no", "yes no", "yes?no", "größe", "1-6"]
    asked = [question(n, "red", kind=kind) for n, kind in enumerate(kinds)]
    names = logged("val", Evaluation(asked, score_predictions(asked, {"": "vqa"}, intervals=False)))
    assert [*names] == [
        "val/vqa_accuracy", "val/vqa_accuracy.1-6", "val/vqa_accuracy.gr__e", "val/vqa_accuracy.yes_no",
        "val/vqa_accuracy.yes_no_", "val/vqa_accuracy.yes_no__",
    ]  # fmt: skip


def test_every_sample_counts_also_those_of_the_same_id():
    twice = [question(0, "red"), (question(1, "blue")[0]._replace(id="0", image_id="another"), "blue")]
    (scored,) = score_predictions(twice, {"": "vqa"}).values()
    assert scored.count == 2
    assert scored.corpus == {"vqa_accuracy": pytest.approx(0.45)}
    assert scored.rows[0].interval is not None


def test_gathered_predictions_are_each_once_in_the_order_of_the_split():
    mixed = [QUESTIONS[2], QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]
    assert gathered(mixed) == QUESTIONS


def test_sets_without_references_are_not_scored():
    unknown = [(r._replace(references=()), said) for r, said in CAPTIONS]
    evaluation = Evaluation(unknown, score_predictions(unknown, {"": "caption"}))
    assert evaluation.scores == {}
    assert logged("predict", evaluation) == {}
    assert score_tables("predict", evaluation) == ["predict: 3 predictions"]


def test_one_answer_is_too_few_for_vqa_accuracy_and_known_at_the_first_batch():
    with pytest.raises(InputError, match=r"data\.metric: vqa: .*ten in VQA.* for 0, got one"):
        check_reference("vqa", question(0, "red", ("red",))[0])
    check_reference("exact", question(0, "red", ("red",))[0])
    with pytest.raises(InputError, match=r"^set q: 0: expected the answers of several people"):
        score_predictions([question(0, "red", ("red",), dataset="q")], {"q": "vqa"})


def test_a_choice_is_a_letter():
    with pytest.raises(
        InputError, match=r"data\.metric: scienceqa: expected a choice's letter as the answer of 0, got 'red'"
    ):
        check_reference("scienceqa", question(0, "B", ("red",))[0])
    check_reference("scienceqa", question(0, "red", ("B",))[0])


def test_the_variant_is_that_of_the_rules():
    """Before 2021, people's answers kept their articles: `the dog` of the model became `dog`, theirs didn't."""
    asked = [question(0, "the dog", ("the dog",) * 9 + ("a cat",))]
    for variant, expected in ((None, 1.0), ("vqav2-2016", 0.0)):
        (scored,) = score_predictions(asked, {"": "vqa"}, ScoringRules(vqa_variant=variant)).values()
        assert scored.corpus == {"vqa_accuracy": expected}
        assert scored.rules.startswith(f"vqa_accuracy: {variant or 'vqav2'} (")
    (scored,) = score_predictions(asked, {"": "exact"}, ScoringRules(vqa_variant="vqav2-2016")).values()
    assert scored.corpus == {"exact_match": 1.0}, "what has no variants is left alone"


def test_caption_metrics_are_those_of_the_rules():
    rules = ScoringRules(("cider", "rouge_l"), "python")
    (scored,) = score_predictions(CAPTIONS, {"": "caption"}, rules).values()
    assert list(scored.corpus) == ["CIDEr", "ROUGE-L"]
    with pytest.raises(InputError, match=r"caption_metrics: expected cider among them.*got bleu"):
        ScoringRules(("bleu",))


def test_bleus_intervals_draw_images_with_all_of_their_captions():
    """Captions in another order than that of their ids, two images with several; the counts are each one's own."""
    texts = [
        "a dog on a sofa",
        "two cats",
        "a red bus in the street",
        "a dog",
        "a red cat on a bus",
        "two dogs play here",
    ]
    names, images = ["10", "9", "x", "2", "b", "11"], ["i", "j", "i", "k", "j", "i"]
    said = dict(zip(names, texts, strict=True))
    known = {
        name: AnswerReference((text.replace("red", "big"), f"{text} today"), image)
        for name, text, image in zip(names, texts, images, strict=True)
    }
    scored = score_caption_split(said, known, tokenizer="python")
    counts = np.stack(
        [bleu_counts(CaptionCorpus([said[name]], [list(known[name].answers)]))[:, 0] for name in names], axis=1
    )
    expected = sums_intervals(counts, bleu_of, images)
    found = [row.interval for row in scored.rows if row.name.startswith("BLEU")]
    assert np.asarray(found) == pytest.approx(np.asarray(expected))
    assert len({high - low for low, high in found}) == 4


def test_result_files_are_those_that_servers_take(tmp_path):
    own = [(r._replace(image_id="0012"), said) for r, said in CAPTIONS[:1]]
    assert write_results(tmp_path, "p", [*CAPTIONS, *own], {"": "caption"}) == []
    assert json.loads((tmp_path / "p.coco.json").read_text())[1:] == [
        {"image_id": 12, "caption": "two cats"}, {"image_id": 7, "caption": "a bus"},
        {"image_id": "0012", "caption": "a dog on a sofa"},
    ]  # fmt: skip
    mixed = [question(5, "7", dataset="q"), question(6, "ü", dataset="z"), question(7, "no", dataset="e")]
    assert write_results(tmp_path, "p-test", mixed, {"q": "textvqa", "z": "vizwiz"}) == []
    assert json.loads((tmp_path / "p-test.q.vqa.json").read_text()) == [{"question_id": 5, "answer": "7"}]
    assert json.loads((tmp_path / "p-test.z.vizwiz.json").read_text()) == [{"image": "6.jpg", "answer": "ü"}]
    assert len(list(tmp_path.iterdir())) == 3, "none for exact match"
    for name, task in (("p.coco.json", "caption"), ("p-test.q.vqa.json", "vqa"), ("p-test.z.vizwiz.json", "vizwiz")):
        assert read_predictions(tmp_path / name, task).answers  # `score` reads them
    assert write_results(tmp_path, "p", [CAPTIONS[0], CAPTIONS[0]], {"": "caption"}) == [
        "p.coco.json: not written: image_id 3 comes 2 times, which servers refuse"
    ]
    assert not (tmp_path / "p.coco.json").exists(), "no file of an earlier run stays"


def test_cocos_own_loader_takes_the_captions(tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools comes with the extra `captions`")
    images = [{"id": int(r.id)} for r, _ in CAPTIONS]
    annotations = [{"id": n, "image_id": int(r.id), "caption": r.references[0]} for n, (r, _) in enumerate(CAPTIONS)]
    (tmp_path / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    write_results(tmp_path, "p", CAPTIONS, {"": "caption"})
    results = coco.COCO(str(tmp_path / "annotations.json")).loadRes(str(tmp_path / "p.coco.json"))
    assert {one["image_id"]: one["caption"] for one in results.anns.values()} == {
        int(r.id): said for r, said in CAPTIONS
    }


def test_metric_settings():
    data = ShardDataModule(metric="vqa", val={"a": "x", "b": {"shards": "y", "metric": "caption"}}, test="z")
    assert data.tasks("val") == {"a": "vqa", "b": "caption"}
    assert data.tasks("test") == {"": "vqa"}
    assert ShardDataModule(test="z").tasks("test") == {"": "exact"}
    for settings, message in (
        ({"metric": "captions"}, r"^data\.metric: expected one of caption, .*, got 'captions'; did you mean caption\?"),
        ({"val": {"a": {"shards": "x", "metric": "f1"}}}, r"^data\.val\.a\.metric: expected one of .*got 'f1'"),
        ({"train": {"a": {"shards": "x", "metric": "vqa"}}}, r"^data\.train\.a\.metric: expected none"),
    ):
        with pytest.raises(InputError, match=message):
            ShardDataModule(**settings)


# Two processes against one ------------------------------------------------------------------------------------------

NUM_SAMPLES = 101


class Echo(pl.Callback):
    """Answers begin with the instruction: a random model alone would score nothing. Each rank writes what it logged.

    With `kill_at`, each rank is killed behind so many batches.
    """

    def __init__(self, path, kill_at=0):
        self.path, self.kill_at = path, kill_at

    def setup(self, trainer, module, stage):
        generate, tokenizer = module.generate, module.processor.tokenizer

        def echo(prompts, rows):
            said = tokenizer.batch_decode([prompt.ids for prompt in prompts], skip_special_tokens=True)
            said = [text.replace("<image>", "").strip() for text in said]
            own = generate(prompts, rows)
            with open(f"{self.path}.asked", "a") as file:
                file.write(f"{len(prompts)}\n")
            return [f"{a} {b}" if a.startswith("a ") else a for a, b in zip(said, own, strict=True)]

        module.generate = echo

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, *args):
        if batch_idx + 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_validation_end(self, trainer, module):
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        Path(f"{self.path}.{trainer.global_rank}").write_text(json.dumps(values))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_validation_end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """101 captions and 101 questions, texts of many lengths, and a config."""
    folder = tmp_path_factory.mktemp("runner")
    captions, questions = [], []
    for n in range(NUM_SAMPLES):
        key, image, _ = colour_record(n, side=12)
        words = " ".join(["dog", "cat", "bus", "tree", "house"][n % 5 : n % 5 + 1 + n % 3])
        kind = ("in", "out")[n % 2]
        targets = [f"a {words} with number {n}", f"one {words} number {n % 7}"]
        one = {"id": str(n), "image_id": str(n), "kind": kind, "instruction": f"a {words} number {n % 9}"}
        captions.append((key, image, json.dumps({**one, "targets": targets}).encode()))
        answers = [str(n % 4)] * (n % 11) + ["many"] * (10 - n % 11)
        one |= {"instruction": str(n % 3) + "?" * (n % 6), "target": answers[0], "answers": answers}
        questions.append((key, image, json.dumps(one).encode()))
    write_shard(folder / "captions.tar", captions)
    write_shard(folder / "questions.tar", questions)
    content = json.loads(json.dumps(CONFIG))
    sets = {
        "captions": {"shards": str(folder / "captions.tar"), "metric": "caption"},
        "questions": {"shards": str(folder / "questions.tar"), "metric": "vqa"},
    }
    content["data"] = {
        "train": str(folder / "questions.tar"), "val": sets, "test": sets, "predict": str(folder / "captions.tar"),
        "eval_batch_size": 16, "max_target_tokens": 48, "caption_tokenizer": "python",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    mmprefix(folder, "fit", "one", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1")
    return folder


def mmprefix(folder, command, name, *arguments, echo=False, kill_at=0):
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), ENVIRONMENT.get("PYTHONPATH", "")])}
    overlay = folder / f"{name}.yaml"
    callbacks = [{"class_path": "tests.test_runner.Echo", "init_args": {
        "path": str(folder / f"{name}.values"), "kill_at": kill_at,
    }}]  # fmt: skip
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks if echo else []}}))
    run_folder = folder / f"{name}-run"
    done = forks.run(
        ["mmprefix", command, "--config", folder / "config.yaml", "--config", overlay, "--trainer.default_root_dir", run_folder,
         *arguments],
        env=environment, cwd=folder, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr
    return done.stdout + done.stderr, run_folder


def weights_of(folder):
    (checkpoint,) = (folder / "one-run" / "checkpoints").glob("*.ckpt")
    return "--ckpt_path", str(checkpoint), "--trainer.limit_val_batches", "1.0"


def evaluated(folder, name, *arguments):
    """Table, predictions and each rank's values of `validate`."""
    out, run_folder = mmprefix(folder, "validate", name, *weights_of(folder), *arguments, echo=True)
    return results_of(folder, name, out, run_folder)


def results_of(folder, name, out, run_folder):
    files = {path.name: path.read_text() for path in run_folder.glob("predictions*.json*")}
    values = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.values.[0-9]"))]
    # Lightning's own table follows, losses with all digits.
    ours = re.split("[┏─]", out[re.search("(val|test) captions: ", out).start() :])[0]
    return ours, files, values


@pytest.fixture(scope="module")
def of_one(trained):
    return evaluated(trained, "alone")


def test_validate_reports_the_real_thing(of_one):
    text, files, (values,) = of_one
    assert set(files) == {
        "predictions-validate.jsonl", "predictions-validate.captions.coco.json", "predictions-validate.questions.vqa.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in files["predictions-validate.jsonl"].splitlines()]
    assert [row["id"] for row in rows] == [*map(str, range(NUM_SAMPLES))] * 2, "in the split's order, each once"
    for dataset, task in (("captions", "caption"), ("questions", "vqa")):
        said = {row["id"]: row["prediction"] for row in rows if row["dataset"] == dataset}
        known = {row["id"]: row["references"] for row in rows if row["dataset"] == dataset}
        if task == "caption":
            expected = score_captions(said, known, tokenizer="python").corpus
            assert expected["CIDEr"] > 0.1
        else:
            expected = score_answers(task, said, {n: AnswerReference(tuple(a)) for n, a in known.items()}).corpus
            assert 0.01 < expected["vqa_accuracy"] < 0.9
        for metric, value in expected.items():
            assert values[f"val/{dataset}/{metric}"] == pytest.approx(value, rel=1e-6)
            assert values[f"val/{metric}"] == pytest.approx(value, rel=1e-6)
    assert "val captions: caption: 101 items, 101 images\ntokenizer=python, not official" in text
    assert "val questions: vqa: 101 items, 101 images\nvqa_accuracy: vqav2" in text
    assert "95% interval" in text


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_say_and_score_what_one_does(trained, of_one, strategy):
    """101 samples are not divisible: the ranks' batches are unequal in size."""
    text, files, values = evaluated(trained, strategy, "--trainer.devices", "2", "--trainer.strategy", strategy)
    assert files == of_one[1]
    assert text == of_one[0]
    assert len(values) == 2
    assert values[0] == values[1], "what checkpoint callbacks monitor"
    expected = of_one[2][0]
    assert values[0].keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("/loss"):
            assert values[0][name] == pytest.approx(value, rel=1e-5)  # summed in another order
        else:
            assert values[0][name] == value


def asked(folder, name):
    """How many prompts were answered since the last call."""
    path = folder / f"{name}.values.asked"
    number = sum(map(int, path.read_text().split()))
    path.unlink()
    return number


TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
SHARDED = ("--trainer.devices", "2", "--trainer.strategy", "fsdp2")


def of_test(of_validate):
    """What `test` on the same sets says, from what `validate` said."""
    text, files, values = of_validate
    names = [{name.replace("val/", "test/"): value for name, value in of_rank.items()} for of_rank in values]
    files = {name.replace("-validate", "-test"): content for name, content in files.items()}
    return re.sub(r"\bval ", "test ", text).replace("-validate", "-test"), files, names


@pytest.mark.parametrize(
    ("name", "command", "before", "after"),
    [
        ("killed", "validate", (), ()),
        ("fewer", "validate", TWO, ()),
        ("more", "test", (), SHARDED),
        ("sharded", "test", SHARDED, SHARDED),
    ],
)
def test_a_killed_evaluation_goes_on_and_says_what_one_at_a_stretch_does(trained, of_one, name, command, before, after):
    """Of 202 records in batches of 16, windows of 4 are kept; the window that was under way is answered again."""
    kill_at = 5 if before else 9
    mmprefix(trained, command, name, *weights_of(trained), *before, echo=True, kill_at=kill_at)
    assert asked(trained, name) == 128, "two windows"
    (unfinished,) = (trained / f"{name}-run" / "unfinished").iterdir()
    for path in unfinished.glob("process-*.jsonl"):
        with path.open("a") as file:  # as a kill in the middle of a write would leave it
            file.write(path.read_text()[:1000])
    if name == "killed":  # other settings have answers of their own
        other = ("--data.max_target_tokens", "47")
        out, _ = mmprefix(trained, command, name, *weights_of(trained), *other, echo=True)
        what = "another data, another decoding"
        assert f"{command}: {unfinished} holds an unfinished evaluation with {what}: not used" in out
        assert asked(trained, name) == 202
    out, run_folder = mmprefix(trained, command, name, *weights_of(trained), *after, echo=True)
    assert f"goes on where it was cut short: 128 answers, to 128 of 202 records, found in {unfinished}" in out
    assert asked(trained, name) == 202 - 128
    assert not (run_folder / "unfinished").exists()
    expected = of_one if command == "validate" else of_test(of_one)
    text, files, values = results_of(trained, name, out, run_folder)
    assert text == expected[0]
    assert files == expected[1]
    for key, value in expected[2][0].items():
        assert values[0][key] == (pytest.approx(value, rel=1e-5) if key.endswith("/loss") else value)


def test_sampled_texts_depend_neither_on_processes_nor_on_a_kill(trained):
    drawn = (*weights_of(trained), "--model.sampling.temperature", "0.8", "--seed_everything", "3")
    texts = {}
    for name, seed, before in (("drawn", "3", ()), ("drawn-by-two", "3", TWO), ("other-seed", "4", ())):
        settings = (*drawn[:-1], seed)
        if before:
            mmprefix(trained, "predict", name, *settings, "--data.eval_window", "1", *before, echo=True, kill_at=2)
            assert asked(trained, name) == 64
        out, run_folder = mmprefix(trained, "predict", name, *settings, echo=True)
        assert ("64 of 101 records" in out) == bool(before)
        assert asked(trained, name) == (101 - 64 if before else 101)
        rows = map(json.loads, (run_folder / "predictions-predict.jsonl").read_text().splitlines())
        texts[name] = {row["id"]: row["prediction"] for row in rows}
        assert len(texts[name]) == NUM_SAMPLES
    assert texts["drawn-by-two"] == texts["drawn"]
    different = [number for number, text in texts["other-seed"].items() if text != texts["drawn"][number]]
    assert len(different) > NUM_SAMPLES // 2


def test_beams_say_the_same_by_two_processes(trained):
    texts = {}
    for name, devices in (("beams", ()), ("beams-by-two", TWO)):
        settings = (
            *weights_of(trained),
            "--model.num_beams",
            "3",
            "--data.max_target_tokens",
            "12",
            "--data.truncate",
            "target",
        )
        _, run_folder = mmprefix(trained, "predict", name, *settings, *devices)
        rows = map(json.loads, (run_folder / "predictions-predict.jsonl").read_text().splitlines())
        texts[name] = {row["id"]: row["prediction"] for row in rows}
    assert len(texts["beams"]) == NUM_SAMPLES
    assert len(set(texts["beams"].values())) > 5, "answers to different prompts differ"
    assert texts["beams-by-two"] == texts["beams"]


@needs_official
def test_meteor_and_another_variant_in_the_loop(trained, capsys):
    """METEOR is that of its program, SPICE says what it lacks, and 2016's rules have their own number."""
    settings = ("--data.caption_metrics", "[cider,meteor,spice]", "--data.vqa_variant", "vqav2-2016")
    folder = trained / "meteor-run"
    status = cli.run([
        "validate", "--config", str(trained / "config.yaml"), *weights_of(trained), *settings, "--data.max_target_tokens", "8",
        "--data.truncate", "target",
        "--trainer.default_root_dir", str(folder),
    ])  # fmt: skip
    printed, complaints = capsys.readouterr()
    assert status == 0, complaints
    rows = [json.loads(line) for line in (folder / "predictions-validate.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["dataset"] == "captions"]
    said, known = ({row["id"]: row[key] for row in rows} for key in ("prediction", "references"))
    expected = score_captions(said, known, metrics=["meteor"], tokenizer="python").corpus["METEOR"]
    assert re.search(rf"^METEOR +{100 * expected:.2f} +- +101$", printed, re.MULTILINE), printed
    assert re.search(r"^SPICE +unavailable +- +-$", printed, re.MULTILINE)
    assert "\nSPICE: SPICE needs Stanford CoreNLP" in printed
    assert "BLEU" not in printed
    assert "\nvqa_accuracy: vqav2-2016 (" in printed


def test_settings_that_no_split_is_scored_by_are_refused(tmp_path):
    for settings, message in (
        ({"vqa_variant": "vqav2"}, "data.vqa_variant: expected data.metric, or that of a set, to be vqa or okvqa or"),
        ({"caption_metrics": ["cider"]}, "data.caption_metrics: expected data.metric.* to be caption, got exact"),
        (
            {"caption_metrics": ["bleu"], "metric": "caption"},
            "data.caption_metrics: expected cider among them.*got bleu",
        ),
        ({"caption_metrics": [], "metric": "caption"}, "expected cider among them.*got none"),
    ):
        with pytest.raises(InputError, match=message):
            ShardDataModule(val=str(tmp_path / "v.tar"), **settings)
    assert ShardDataModule(train="t.tar", metric="vqa", vqa_variant="vqav2").vqa_variant == "vqav2"
    rules = ShardDataModule(val={"q": {"shards": "v.tar", "metric": "okvqa"}}, vqa_variant="vqav2-2016").scoring_rules(
        "python"
    )
    assert rules == ScoringRules(("bleu", "rouge_l", "cider"), "python", "vqav2-2016")


def part(*records):
    predictions = tuple((question(n, f"said {n}\u2028")[0]._replace(order=(n, 0)), f"said {n}\u2028") for n in records)
    return Part(records, ((0.1, 2.0), (1 / 3, 1.0)), predictions)


def test_parts_survive_torn_lines_and_belong_to_one_key(tmp_path):
    progress = Progress(tmp_path, "test", {"checkpoint": "a", "data": "d"}, rank=1)
    assert progress.read(10, 1) == []
    progress.add(part(0, 2))
    (path,) = progress.folder.glob("process-1.jsonl")
    with path.open("ab") as file:
        file.write(part(4, 5).to_line().encode()[:-20])
    progress.add(part(1, 3))
    Progress(tmp_path, "test", progress.key, rank=0).add(part(3, 6))
    assert progress.read(10, 1) == [part(3, 6), part(0, 2)], "3 once, and nothing of the torn line"
    path.write_bytes(path.read_bytes().replace(b'"losses"', b'"lossless"'))
    assert progress.read(10, 1) == [part(3, 6)]
    assert progress.read(4, 2) == [part(3, 6)]
    assert progress.read(4, 3) == [], "each process must have something to do"
    for stage, key in (("test", {"checkpoint": "b", "data": "d"}), ("validate", progress.key)):
        other = Progress(tmp_path, stage, key)
        assert other.read(10, 1) == []
        expected = [f"test: {progress.folder} holds an unfinished evaluation with another checkpoint: not used"]
        assert other.others() == (expected if stage == "test" else [])
    progress.finish()
    assert not (tmp_path / "unfinished").exists()


def test_another_checkpoint_has_another_identity(tmp_path):
    path = tmp_path / "step=1.ckpt"
    path.write_bytes(b"weights")
    first = checkpoint_identity(path)
    assert checkpoint_identity(path) == first
    os.utime(path, ns=(1, 1))  # written anew, as long as before
    assert checkpoint_identity(path) != first
    path.unlink()
    path.mkdir()
    (path / "0.pt").write_bytes(b"shard")
    sharded = checkpoint_identity(path)
    (path / "1.pt").write_bytes(b"shard")
    assert checkpoint_identity(path) != sharded
