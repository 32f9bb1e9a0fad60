"""`score`: official result and annotation files in, the table and its JSON out; what is wrong with them in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmprefix.errors import InputError
from mmprefix.evaluation.official import TASKS, read_predictions, read_references
from mmprefix.metrics import score_captions
from mmprefix.scoring import run


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def people(*answers):
    return [{"answer": answer, "answer_id": n + 1, "answer_confidence": "yes"} for n, answer in enumerate(answers)]


VQA = {
    "annotations": [
        {"question_id": 10, "image_id": 1, "question_type": "is the", "answer_type": "yes/no", "answers": people(*["yes"] * 9, "no")},
        {"question_id": 11, "image_id": 1, "question_type": "what", "answer_type": "other", "answers": people(*["red"] * 3, *["blue"] * 7)},
        {"question_id": 12, "image_id": 2, "question_type": "how many", "answer_type": "number", "answers": people(*["2"] * 10)},
    ]
}  # fmt: skip
VQA_RESULTS = [
    {"question_id": 12, "answer": "two"},
    {"question_id": 10, "answer": "Yes"},
    {"question_id": 11, "answer": "red"},
]
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 1, "caption": "a dog"}, {"id": 2, "image_id": 2, "caption": "a cat"}, {"id": 3, "image_id": 1, "caption": "one dog"},
    ],
}  # fmt: skip
COCO_RESULTS = [{"image_id": 2, "caption": "a cat"}, {"image_id": 1, "caption": "a dog"}]

# task -> (annotations, predictions, the task's value, groups of the table)
OFFICIAL = {
    "vqa": (VQA, VQA_RESULTS, 0.63333333, {"yes/no": 1.0, "other": 0.9, "number": 0.0, "is the": 1.0}),
    "okvqa": (
        {"annotations": [
            {"question_id": 1, "image_id": 5, "question_type": "four", "answer_type": "other", "answers": people(*["ski"] * 6, *["run"] * 4)},
            {"question_id": 2, "image_id": 6, "question_type": "other", "answer_type": "other", "answers": people(*["ski"] * 2, *["run"] * 8)},
        ]},
        [{"question_id": 1, "answer": "ski"}, {"question_id": 2, "answer": "ski"}],
        0.8, {"sports and recreation": 1.0, "other": 0.6},
    ),
    "textvqa": (
        {"data": [{"question_id": 3, "image_id": "f00", "question": "?", "answers": ["Joe's"] * 9 + ["x"]}]},
        [{"question_id": 3, "answer": "joe 's?"}], 1.0, {},
    ),
    "vizwiz": (
        [{"image": "V_1.jpg", "question": "?", "answer_type": "other", "answerable": 1, "answers": [{"answer": "cat"}] * 10},
         {"image": "V_2.jpg", "question": "?", "answer_type": "unanswerable", "answerable": 0, "answers": [{"answer": "unanswerable"}] * 10}],
        [{"image": "V_1.jpg", "answer": "Cat."}, {"image": "V_2.jpg", "answer": "dog"}], 0.5, {"other": 1.0, "unanswerable": 0.0},
    ),
    "gqa": (
        {"7": {"imageId": "n1", "question": "?", "answer": "yes", "isBalanced": True, "types": {"structural": "verify", "semantic": "obj"}},
         "8": {"imageId": "n1", "question": "?", "answer": "Dog", "isBalanced": True, "types": {"structural": "query", "semantic": "obj"}},
         "9": {"imageId": "n2", "question": "?", "answer": "x", "isBalanced": False, "types": {"structural": "query", "semantic": "obj"}}},
        [{"questionId": "7", "prediction": "yes"}, {"questionId": "8", "prediction": "dog"}, {"questionId": "9", "prediction": "x"}],
        0.5, {"binary": 1.0, "open": 0.0, "verify": 1.0},
    ),
    "docvqa": (
        {"data": [
            {"questionId": 4, "question": "?", "docId": 1, "image": "documents/a.png", "question_types": ["form", "layout"], "answers": ["1998", "in 1998"]},
            {"questionId": 5, "question": "?", "docId": 1, "image": "documents/a.png", "question_types": ["layout"], "answers": ["abcd"]},
        ]},
        [{"questionId": 4, "answer": "IN  1998"}, {"questionId": 5, "answer": "abxy"}], 0.75, {"form": 1.0, "layout": 0.75},
    ),
    "chartqa": (
        [{"imgname": "a.png", "query": "?", "label": "100"}, {"imgname": "a.png", "query": "?", "label": "Yes"}],
        {"0": "104", "1": "no"}, 0.5, {},
    ),
    "scienceqa": (
        {"1": {"question": "?", "choices": ["a", "b"], "answer": 1, "split": "test", "subject": "language science", "grade": "grade3", "hint": "", "image": None},
         "2": {"question": "?", "choices": ["a", "b"], "answer": 0, "split": "test", "subject": "natural science", "grade": "grade8", "hint": "h", "image": "i.png"},
         "3": {"question": "?", "choices": ["a", "b"], "answer": 0, "split": "val", "subject": "natural science"}},
        {"1": "B", "2": "The answer is B."}, 0.5, {"1-6": 1.0, "7-12": 0.0, "none": 1.0, "text": 0.0, "language science": 1.0},
    ),
    "exact": (
        lines({"id": "q1", "answers": ["a b"], "kind": "x"}, {"id": "q2", "answer": "c"}),
        lines({"id": "q1", "prediction": "a  b"}, {"id": "q2", "prediction": "C"}), 0.5, {},
    ),
}  # fmt: skip


def scored(tmp_path, task, *arguments):
    out = tmp_path / "scores.json"
    assert run(["--task", task, "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("task", OFFICIAL)
def test_official_formats(task, tmp_path, write, capsys):
    annotations, predictions, value, groups = OFFICIAL[task]
    content = scored(
        tmp_path, task, "--predictions", write("p.json", predictions), "--references", write("r.json", annotations)
    )
    metric = next(iter(content["corpus"]))
    assert content["corpus"][metric] == pytest.approx(value)
    found = {name: kind for axis in content["kinds"].values() for name, kind in axis.items()}
    assert {name: found[name]["value"] for name in groups} == pytest.approx(groups)
    assert len(content["items"]) == content["count"] == len(read_references([tmp_path / "r.json"], task).items)
    mean = sum(item[metric] for item in content["items"].values()) / content["count"]
    assert content["corpus"][metric] == pytest.approx(mean)
    interval = content["intervals"][metric]
    assert (interval is None) == (content["images"] == 1)  # all draws of a single image are the same
    assert interval is None or 0 <= interval[0] <= content["corpus"][metric] <= interval[1] <= 1
    printed = capsys.readouterr().out
    shown = "-" if interval is None else r"[\d.]+ to [\d.]+"
    line = rf"^{metric} +{content['percent'][metric]:.2f} +{shown} +{content['count']}$"
    assert re.search(line, printed, re.MULTILINE)
    for name, of in groups.items():
        assert re.search(rf"^  {re.escape(name)} +{100 * of:.2f} ", printed, re.MULTILINE)
    assert content["rules"] in printed


def test_every_task_is_tested():
    assert {*OFFICIAL, "caption"} == set(TASKS)


def test_the_variant_is_named_and_changes_the_number(tmp_path, write, capsys):
    files = ["--predictions", write("p.json", VQA_RESULTS), "--references", write("r.json", VQA)]
    new, old = scored(tmp_path, "vqa", *files), scored(tmp_path, "vqa", *files, "--variant", "vqav2-2016")
    assert new["rules"] == "vqa_accuracy: vqav2 (VQA v2, official code since 2021)"
    assert old["rules"] == "vqa_accuracy: vqav2-2016 (VQA v2, official code before 2021)"
    assert new["items"]["12"]["vqa_accuracy"] == 0  # "two" against ten times "2"
    assert old["items"]["12"]["vqa_accuracy"] == 1
    assert "vqav2-2016" in capsys.readouterr().out


def test_a_runs_own_predictions_need_no_references(tmp_path, write, capsys):
    row = {"image_id": "i", "kind": "digit", "instruction": "?", "prediction": "7", "references": ["7"]}
    path = write(
        "predictions.jsonl", lines(row | {"id": "1"}, row | {"id": "2", "kind": "parity", "prediction": "odd"})
    )
    content = scored(tmp_path, "exact", "--predictions", path)
    assert content["corpus"] == {"exact_match": 0.5}
    assert content["kinds"]["kind"]["digit"]["value"] == 1
    assert content["images"] == 1
    # The same file against the set's own annotations, whose ids it has.
    answers = write("r.jsonl", lines({"id": "1", "answer": "7"}, {"id": "2", "answer": "odd"}))
    assert scored(tmp_path, "exact", "--predictions", path, "--references", answers)["corpus"] == {"exact_match": 1}
    # Ids are unique in their set only.
    path = write(
        "predictions.jsonl",
        lines(row | {"id": "1", "dataset": "a"}, row | {"id": "1", "dataset": "b", "prediction": ""}),
    )
    content = scored(tmp_path, "exact", "--predictions", path)
    assert {name: kind["value"] for name, kind in content["kinds"]["set"].items()} == {"a": 1, "b": 0}
    assert set(content["items"]) == {"a/1", "b/1"}


def test_vqa_of_a_run_with_fewer_answers_says_so(write, capsys):
    row = {"id": "1", "image_id": "i", "prediction": "a", "references": ["a"] * 3}
    assert run(["--task", "vqa", "--predictions", write("p.jsonl", lines(row))]) == 0
    assert "1 questions have fewer than ten answers" in capsys.readouterr().out


def test_vizwiz_takes_probabilities_or_says_that_it_has_none(tmp_path, write, capsys):
    annotations = write("r.json", OFFICIAL["vizwiz"][0])
    said = OFFICIAL["vizwiz"][1]
    content = scored(tmp_path, "vizwiz", "--predictions", write("p.json", said), "--references", annotations)
    assert content["corpus"]["answerability_f1"] == 0
    assert "whether they say unanswerable" in capsys.readouterr().out
    told = [row | {"answerable": probability} for row, probability in zip(said, (0.8, 0.3), strict=True)]
    content = scored(tmp_path, "vizwiz", "--predictions", write("p.json", told), "--references", annotations)
    assert content["corpus"]["answerability_f1"] == content["corpus"]["answerability_average_precision"] == 1
    assert content["notes"] == []
    # A run's own file names questions without the suffix of the picture.
    own = write("p.jsonl", lines({"id": "V_1", "prediction": "cat"}, {"id": "V_2", "prediction": "unanswerable"}))
    assert (
        scored(tmp_path, "vizwiz", "--predictions", own, "--references", annotations)["corpus"]["answerability_f1"] == 1
    )


def test_gqa_counts_balanced_questions_and_says_so(tmp_path, write, capsys):
    annotations, predictions, _, _ = OFFICIAL["gqa"]
    content = scored(
        tmp_path, "gqa", "--predictions", write("p.json", predictions), "--references", write("r.json", annotations)
    )
    assert content["count"] == 2
    assert "1 predictions don't count: not balanced" in capsys.readouterr().out
    assert (
        run(
            [
                "--task",
                "gqa",
                "--predictions",
                write("p.json", predictions[:2]),
                "--references",
                str(tmp_path / "r.json"),
            ]
        )
        == 0
    )


def test_several_files_of_references_are_one_split(tmp_path, write):
    human = write("test_human.json", [{"imgname": "a.png", "query": "?", "label": "1"}])
    augmented = write("test_augmented.json", [{"imgname": "b.png", "query": "?", "label": "2"}])
    content = scored(
        tmp_path, "chartqa", "--predictions", write("p.json", {"0": "1", "1": "1"}), "--references", human, augmented
    )
    assert {name: kind["value"] for name, kind in content["kinds"]["file"].items()} == {
        "test_human": 1,
        "test_augmented": 0,
    }


# Captions -------------------------------------------------------------------------------------------------------------


KARPATHY = {"images": [
    {"cocoid": 1, "split": "test", "filename": "a.jpg", "sentences": [{"raw": "a dog"}, {"raw": "one dog"}]},
    {"cocoid": 2, "split": "test", "filename": "b.jpg", "sentences": [{"raw": "a cat"}]},
    {"cocoid": 3, "split": "val", "filename": "c.jpg", "sentences": [{"raw": "x"}]},
]}  # fmt: skip
TEXTCAPS = {"data": [
    {"image_id": 1, "caption_str": "a dog", "reference_strs": ["a dog", "one dog"]},
    {"image_id": 1, "caption_str": "one dog", "reference_strs": ["a dog", "one dog"]},
    {"image_id": 2, "caption_str": "a cat", "reference_strs": ["a cat"]},
]}  # fmt: skip


def test_textcaps_as_published_has_all_captions_of_an_image_once(tmp_path, write):
    """The fields of `TextCaps_0.1_val.json`: an entry for each caption, which may be there twice."""
    captions = ["STOP on a sign.", "a red sign", "a red sign", "stop", "A sign."]
    entries = [
        {
            "image_id": "011e7e629fb9ae7b", "image_classes": ["Traffic sign"], "flickr_original_url": "", "flickr_300k_url": "",
            "image_width": 1024, "image_height": 702, "set_name": "val", "image_name": "011e7e629fb9ae7b",
            "image_path": "train/011e7e629fb9ae7b.jpg", "caption_id": n, "caption_str": text, "caption_tokens": ["<s>", "</s>"],
            "reference_strs": given, "reference_tokens": [],
        }
        for n, (text, given) in enumerate(zip(captions, (captions[:4], *4 * [captions]), strict=True))
    ]  # fmt: skip
    published = {"dataset_type": "val", "dataset_name": "textcaps", "dataset_version": 0.1, "data": entries}
    (path,) = [Path(write("r.json", published))]
    references = read_references([path], "caption")
    assert {name: sorted(one.answers) for name, one in references.items.items()} == {
        "011e7e629fb9ae7b": sorted(captions)
    }
    for entry in entries:  # the test split has no captions
        del entry["reference_strs"], entry["caption_str"]
    with pytest.raises(InputError, match="expected `reference_strs`"):
        read_references([Path(write("t.json", published))], "caption")


@pytest.mark.parametrize("annotations", [COCO, KARPATHY, TEXTCAPS], ids=["coco", "karpathy", "textcaps"])
def test_captions(annotations, tmp_path, write, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java
    files = ["--predictions", write("p.json", COCO_RESULTS), "--references", write("r.json", annotations)]
    content = scored(tmp_path, "caption", *files, "--metrics", "cider", "bleu", "spice", "--tokenizer", "python")
    expected = score_captions(
        {"2": "a cat", "1": "a dog"},
        {"1": ["a dog", "one dog"], "2": ["a cat"]},
        metrics=["cider", "bleu"],
        tokenizer="python",
    )
    assert content["corpus"] == expected.corpus
    assert content["items"] == {n: {m: of[n] for m, of in expected.items.items()} for n in ("1", "2")}
    low, high = content["intervals"]["CIDEr"]
    assert low < content["corpus"]["CIDEr"] < high
    low, high = content["intervals"]["BLEU-4"]
    assert low == pytest.approx(content["corpus"]["BLEU-4"]) == high, "whatever is drawn, no image has three words"
    assert list(content["unavailable"]) == ["SPICE"]
    printed = capsys.readouterr().out
    assert "\ntokenizer=python, not official\n" in printed
    assert re.search(r"^SPICE +unavailable", printed, re.MULTILINE)
    assert re.search(rf"^CIDEr +{100 * content['corpus']['CIDEr']:.2f} +[0-9.]+ to [0-9.]+ +2$", printed, re.MULTILINE)


# Bad input ------------------------------------------------------------------------------------------------------------

R = VQA
BAD = {
    "missing and unknown": ([*VQA_RESULTS[1:], {"question_id": 99, "answer": "x"}], R, "p.json: expected a prediction for each of 3 ids and no others, got 1 missing (12), 1 unknown (99)"),
    "twice": ([*VQA_RESULTS, VQA_RESULTS[0]], R, "p.json: expected each id once, got 1 of them again (12)"),
    "twice, as number and text": ([*VQA_RESULTS, {"question_id": "12", "answer": "x"}], R, "again (12)"),
    "not a string": ([{"question_id": 12, "answer": 2}], R, "entry 0: expected `answer` of 12 to be a string, got int '2'"),
    "null": ([{"question_id": 12, "answer": None}], R, "got null"),
    "no answer": ([{"question_id": 12, "text": "2"}], R, "entry 0: expected one of answer, prediction, caption, got only question_id, text"),
    "no id": ([{"answer": "2"}], R, "entry 0: expected one of question_id"),
    "an id that is none": ([{"question_id": 1.5, "answer": "2"}], R, "`question_id` to be a number or a name, got float '1.5'"),
    "not an object": ([3], R, "entry 0: expected an object with an id and an answer, got int '3'"),
    "no predictions": ([], R, "p.json: expected one or more predictions, got none"),
    "an empty file": ("", R, "p.json: expected predictions, got an empty file"),
    "broken": ('[{"question_id": 1, "ans', R, "p.json: expected JSON, got"),
    "annotations for predictions": (VQA, R, "or JSON Lines, got an object with annotations"),
    "an empty split": (VQA_RESULTS, {"annotations": []}, "r.json: expected VQA annotations with a list `annotations`, got an object with annotations"),
    "questions for annotations": (VQA_RESULTS, {"questions": [{"question_id": 10}]}, "`annotations`, got an object with questions"),
    "a list for annotations": (VQA_RESULTS, VQA_RESULTS, "`annotations`, got a list"),
    "broken annotations": (VQA_RESULTS, '{"annotations": [', "r.json: expected JSON, got"),
    "no answers": (VQA_RESULTS, {"annotations": [{"question_id": 10, "image_id": 1}]}, "annotations[0]: expected `answers`, got only question_id, image_id"),
    "answers that are none": (VQA_RESULTS, {"annotations": [{"question_id": 10, "answers": []}]}, "annotations[0]: expected one or more `answers`, got list '[]'"),
    "an answer that is a number": (VQA_RESULTS, {"annotations": [{"question_id": 10, "answers": [{"answer": 3}]}]}, "expected `answers` to be strings, got int '3'"),
    "a question twice": (VQA_RESULTS, {"annotations": [*VQA["annotations"], VQA["annotations"][0]]}, "annotations[3]: expected each id once, got 10 twice"),
}  # fmt: skip


def refused(capsys, *arguments):
    assert run(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, write, capsys):
    predictions, references, message = BAD[case]
    files = ["--predictions", write("p.json", predictions), "--references", write("r.json", references)]
    assert message in refused(capsys, "--task", "vqa", *files)


def test_bad_files_of_other_tasks(write, capsys, tmp_path):
    p = write("p.json", {"1": "A", "2": "B"})
    problems = {"1": {"choices": ["a", "b"], "answer": 0, "split": "test"}}
    cases = [
        ("scienceqa", problems, ["--split", "minival"], "--split: expected one of test, got 'minival'"),
        ("scienceqa", {"1": problems["1"] | {"answer": 2}}, [], "expected `answer` from 0 to 1, got int '2'"),
        ("gqa", [1], [], "expected GQA, an object of questions by id, got a list"),
        ("gqa", {"1": 3}, [], "got int '3' at '1'"),
        ("vizwiz", {"data": []}, [], "expected VizWiz, a list of questions, got an object"),
        (
            "vizwiz",
            [{"image": "a.jpg", "answerable": 2, "answers": ["x"]}],
            [],
            "`answerable` to be 0 or 1, got int '2'",
        ),
        ("chartqa", [{"imgname": "a.png"}], [], "[0]: expected `label`, got only imgname"),
        ("caption", VQA, [], "expected captions (COCO's"),
        ("caption", COCO | {"annotations": COCO["annotations"][:1]}, [], "got none for 1 (2)"),
        ("caption", KARPATHY, ["--split", "train"], "--split: expected one of test, val, got 'train'"),
        ("exact", [{"id": 1}], [], "expected references, answers or answer, got only id"),
        ("caption", COCO, ["--split", "val"], "--split: expected none, since"),
        ("caption", COCO | {"images": COCO["images"][:1] * 2}, [], "images[1]: expected each id once, got"),
    ]
    for task, references, more, message in cases:
        error = refused(capsys, "--task", task, "--predictions", p, "--references", write("r.json", references), *more)
        assert message in error, task
    own = write("own.jsonl", lines({"id": 1, "prediction": "x", "references": ["x", "x"]}))
    assert "annotations that belong to --split, got none" in refused(
        capsys, "--task", "caption", "--predictions", own, "--split", "val"
    )
    asked = {"questions": [{"question_id": 10}, {"question_id": 11}, {"question_id": 12}, {"question_id": 10}]}
    files = ["--predictions", write("v.json", VQA_RESULTS), "--references", write("r.json", VQA)]
    assert "questions[3]: expected each id once, got 10 twice" in refused(
        capsys, "--task", "vqa", *files, "--questions", write("q.json", asked)
    )
    told = write("p.json", [{"image": "a.jpg", "answer": "x", "answerable": 0.5}, {"image": "b.jpg", "answer": "x"}])
    assert "or in none, got none for b" in refused(
        capsys, "--task", "vizwiz", "--predictions", told, "--references", told
    )
    told = write("p.json", [{"image": "a.jpg", "answer": "x", "answerable": "no"}])
    assert "from 0 to 1, got str 'no'" in refused(
        capsys, "--task", "vizwiz", "--predictions", told, "--references", told
    )
    mixed = write("p.jsonl", lines({"id": 1, "prediction": "x", "references": ["x"]}, {"id": 2, "prediction": "x"}))
    assert "in each line or in none" in refused(capsys, "--task", "exact", "--predictions", mixed)
    broken = write("p.jsonl", lines({"id": 1, "prediction": "x"}) + "{oops\n")
    assert "line 2: expected JSON" in refused(
        capsys, "--task", "exact", "--predictions", broken, "--references", broken
    )
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": 1, "prediction": "caf\xe9"}\n')
    latin = str(tmp_path / "latin.jsonl")
    assert "expected text in UTF-8" in refused(capsys, "--task", "exact", "--predictions", latin, "--references", latin)


def test_bad_options(write, capsys, tmp_path):
    p, r = write("p.json", VQA_RESULTS), write("r.json", VQA)
    both = ["--predictions", p, "--references", r]
    for arguments, message in (
        (["--task", "vqa", "--predictions", p], "--references: expected the annotations of vqa, got none"),
        (
            ["--task", "vqa", "--predictions", str(tmp_path / "no.json")],
            "--predictions: expected a file, found none at",
        ),
        (
            ["--task", "vqa", "--predictions", p, "--references", str(tmp_path)],
            "--references: expected a file, found none at",
        ),
        (
            ["--task", "gqa", *both, "--variant", "vqav2"],
            "--variant: expected with vqa, okvqa, textvqa, vizwiz only, got gqa",
        ),
        (["--task", "vqa", *both, "--metrics", "cider"], "--metrics: expected with caption only"),
        (["--task", "vqa", *both, "--split", "test"], "--split: expected with scienceqa, caption only"),
        (["--task", "gqa", *both, "--questions", r], "--questions: expected with vqa, okvqa only"),
        (["--task", "vqa", "--predictions", p, "--questions", r], "--references: expected the annotations that belong"),
        (["--task", "vqa", *both, "--json", str(tmp_path)], "--json: expected a file, got the folder"),
        (["--task", "nlvr", *both], "score: argument --task: invalid choice"),
        (["--task", "vqa"], "score: the following arguments are required: --predictions"),
    ):
        assert message in refused(capsys, *arguments)


def test_nothing_is_lost_to_where_the_scores_go(write, capsys, tmp_path):
    files = ["--predictions", write("p.json", VQA_RESULTS), "--references", write("r.json", VQA)]
    for path in files[1::2]:
        assert run(["--task", "vqa", *files, "--json", path]) == 2
        assert capsys.readouterr().err == f"error: --json: expected another file than what is read, got {path}\n"
    assert [json.loads(Path(path).read_text()) for path in files[1::2]] == [VQA_RESULTS, VQA]
    write("file", "")
    assert run(["--task", "vqa", *files, "--json", str(tmp_path / "file" / "scores.json")]) == 1
    out, err = capsys.readouterr()
    assert "vqa_accuracy" in out
    assert err.startswith("error: --json: ")
    assert err.count("\n") == 1


def test_what_was_expected_is_not_taken_for_what_was_said(write, capsys):
    rows = [{**row, "prediction": row["answer"]} for row in VQA_RESULTS]
    assert run(["--task", "vqa", "--predictions", write("p.json", rows), "--references", write("r.json", VQA)]) == 0
    rows[1]["prediction"] = "nonsense"
    capsys.readouterr()
    assert run(["--task", "vqa", "--predictions", write("p.json", rows), "--references", write("r.json", VQA)]) == 2
    assert capsys.readouterr().err.endswith(
        "entry 1: expected one of answer, prediction, caption of 10, got answer and prediction, which differ\n"
    )


def test_questions_must_be_those_of_the_annotations(write, capsys):
    files = ["--task", "vqa", "--predictions", write("p.json", VQA_RESULTS), "--references", write("r.json", VQA)]
    questions = {"questions": [{"question_id": n} for n in (10, 11, 12)]}
    assert run([*files, "--questions", write("q.json", questions)]) == 0
    capsys.readouterr()
    questions["questions"].append({"question_id": 13})
    assert "got 1 of one file only (13)" in refused(capsys, *files, "--questions", write("q.json", questions))


def test_a_file_that_may_not_be_read(write, capsys, monkeypatch):
    p = write("p.json", VQA_RESULTS)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    assert "p.json: cannot be read: Permission denied" in refused(capsys, "--task", "vqa", "--predictions", p)


# As a command ---------------------------------------------------------------------------------------------------------


def command(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mmprefix", "score", *arguments],
        capture_output=True,
        text=True,
        **more,
    )


def test_command_imports_neither_torch_nor_lightning(write):
    done = command("--task", "vqa", "--predictions", write("p.json", VQA_RESULTS), "--references", write("r.json", VQA))
    assert done.returncode == 0
    assert "vqa: 3 items, 2 images" in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not imported & {"torch", "lightning", "torchmetrics", "transformers", "sklearn"}


def test_ctrl_c_ends_with_130(tmp_path):
    """While it waits for a pipe that nobody writes to, as for a slow disk."""
    pipe = tmp_path / "p.json"
    os.mkfifo(pipe)
    program = (
        "import sys, pathlib; sys.argv = ['-m']; pathlib.Path.is_file = lambda self: True\n"
        "from mmprefix.scoring import run\n"
        f"sys.exit(run(['--task', 'vqa', '--predictions', {str(pipe)!r}, '--references', 'r']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    writer = None
    while writer is None and process.poll() is None:
        try:  # succeeds once the other side is there
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    os.close(writer)
    assert (process.returncode, errors) == (130, "")


def test_readers_of_one_kind_of_predictions_agree(write):
    rows = [{"question_id": 1, "answer": "a"}, {"question_id": 2, "answer": "b"}]
    expected = {"1": "a", "2": "b"}
    for name, content in (
        ("a.json", rows), ("b.jsonl", lines(*rows)), ("c.json", lines(*rows)), ("d.json", expected),
        ("e.json", json.dumps(expected, indent=1)), ("f.json", json.dumps(rows, indent=1)),
    ):  # fmt: skip
        assert read_predictions(Path(write(name, content)), "vqa").answers == expected, name
