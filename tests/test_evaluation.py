import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmprefix.errors import InputError
from mmprefix.evaluation.pictures import Answer, Cell, draw_cells, to_image
from mmprefix.evaluation.report import accuracy_table, gallery, page_scores, score_tables, write_predictions
from mmprefix.evaluation.runner import Evaluation, score_predictions
from mmprefix.evaluation.runs import Row
from mmprefix.metrics import ExactMatch, exact_match
from mmprefix.metrics.intervals import mean_interval
from mmprefix.metrics.rules import ScoringRules
from mmprefix.packing import BadSample, Reference
from mmprefix.training.callbacks import BadSampleReport
from mmprefix.vision import ImageTransform, as_levels

PYTHON = ScoringRules(caption_tokenizer="python")
PREDICTIONS = [
    (Reference("a", "1", "colour", "which?", ("red",), (0, 0)), "red"),
    (Reference("b", "1", "shape", "what shape?", ("round", "circle"), (0, 1)), "circle"),
    (Reference("c", "2", "colour", "which?", ("blue",), (1, 0)), "grün"),
]


def test_exact_match_ignores_white_space_only():
    assert exact_match(" a  dog\n", ["a dog"])
    assert exact_match("b", ["a", "b"])
    assert not exact_match("A dog", ["a dog"])
    assert not exact_match("a dog.", ["a dog"])
    assert not exact_match("", ["a"])


def test_exact_match_metric_counts():
    metric = ExactMatch()
    assert metric.compute() == 0
    for reference, prediction in PREDICTIONS:
        metric.update(prediction, reference.references)
    torch.testing.assert_close(metric.compute(), torch.tensor(2 / 3))


def test_predictions_file(tmp_path):
    write_predictions(tmp_path / "p.jsonl", PREDICTIONS)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[2] == {
        "id": "c", "image_id": "2", "kind": "colour", "instruction": "which?", "prediction": "grün", "references": ["blue"],
    }  # fmt: skip


def test_table_shows_kinds_with_intervals_next_to_the_baseline():
    assert accuracy_table("test: 2 images", PREDICTIONS, "SVC", {"colour": 0.75}).splitlines() == [
        "test: 2 images",
        "kind    question     samples  exact match      95% interval     SVC",
        "-------------------------------------------------------------------",
        "colour  which?             2       0.5000  0.0000 to 1.0000  0.7500",
        "shape   what shape?        1       1.0000  1.0000 to 1.0000       -",
        "total                      3       0.6667  0.0000 to 1.0000        ",
    ]
    many = [(reference._replace(image_id=str(n)), said) for n in range(20) for reference, said in PREDICTIONS]
    low, high = mean_interval([1.0, 1.0, 0.0] * 20, [str(n) for n in range(20) for _ in range(3)])
    assert f"{low:.4f} to {high:.4f}" in accuracy_table("", many).splitlines()[-1]


def test_what_is_in_no_number_is_said():
    lacking = [
        (Reference("d", "3", "", "?", (), (2, 0), "more"), "x"),
        (PREDICTIONS[0][0]._replace(dataset="more"), "red"),
    ]
    evaluation = Evaluation([*PREDICTIONS, *lacking], score_predictions([*PREDICTIONS, *lacking], {}), skipped=2)
    tables = score_tables("predict", evaluation)
    assert tables[1:] == [
        "predict more: 2 predictions, not scored: no references for d",
        "predict: 2 image(s) skipped, in none of these numbers; skipped.jsonl names them",
    ]
    page = page_scores(
        evaluation,
        [
            Row(r.id, r.image_id, r.kind, r.instruction, said, r.references, r.dataset)
            for r, said in evaluation.predictions
        ],
    )
    assert page.notes[-1] == "2 image(s) skipped, in none of these numbers; skipped.jsonl names them"


def test_picture_has_a_cell_for_each_image():
    image = Image.new("RGB", (8, 8), (200, 10, 10))
    right = Cell("image 1", image, (Answer("which?", "red", "red", True),))
    wrong = Cell("image 2", image.resize((640, 427)), (Answer("which? " * 40, "blue", "", False),) * 5)
    picture = draw_cells([right, wrong, right], columns=2)
    assert picture.width == 2 * draw_cells([right]).width
    assert picture.height > 2 * 144
    colours = {tuple(c) for c in np.asarray(picture).reshape(-1, 3).tolist()}
    assert (0, 120, 40) in colours, "right answers are green"
    assert (190, 20, 20) in colours, "wrong ones red"
    assert draw_cells([]).size[1] >= 1


def test_pixels_are_shown_as_the_encoder_saw_them(photos):
    transform = ImageTransform((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    shown = to_image(transform(photos[0]), transform)
    assert torch.equal(as_levels(shown), transform.resize(photos[0]))


def test_the_worst_and_the_best_are_shown_with_their_scores(photos):
    """Of ten captions, one record of two questions, and a record without an image."""
    captions = [f"a dog number {n} on a sofa" for n in range(10)]
    predictions = []
    for n, text in enumerate(captions):
        words = text.split()
        said = " ".join(words[: 1 + n % 7])  # the better, the longer
        predictions.append((Reference(f"c{n}", f"i{n}", "", "caption en", (text, text), (n, 0), "captions"), said))
    for n, said in enumerate(("yes", "no")):
        predictions.append((Reference(f"q{n}", "i10", "", f"{n}?", ("yes",), (10, n), "questions"), said))
    predictions.append((Reference("t", "t", "", "1 + 1?", ("2",), (11, 0), "questions"), "2"))
    tasks = {"captions": "caption", "questions": "exact"}
    evaluation = Evaluation(predictions, score_predictions(predictions, tasks, PYTHON))
    asked = []
    cells = gallery(evaluation, tasks, 6, lambda record: asked.append(record) or ([] if record == 11 else [photos[0]]))
    assert len(cells) == len(asked) == 6
    values = {n: evaluation.scores["captions"].items[f"c{n}"]["CIDEr"] for n in range(10)}
    worst = sorted(values, key=values.__getitem__)[:3]
    assert [cell.title for cell in cells[:3]] == [f"image i{n}" for n in worst]
    assert [cell.answers[0].score for cell in cells[:3]] == [f"CIDEr {values[n]:.2f}" for n in worst]
    best = max(values, key=values.__getitem__)
    assert {cell.title for cell in cells[3:]} >= {"t", f"image i{best}"}, "right, and the best caption"
    everything = gallery(evaluation, tasks, 20, lambda record: [])
    assert sum(len(cell.answers) for cell in everything) == len(predictions)
    (questions,) = [cell for cell in everything if len(cell.answers) == 2]
    assert [(answer.correct, answer.score) for answer in questions.answers] == [(True, ""), (False, "")]
    unscored = Evaluation([(Reference("p", "p", "", "?", (), (0, 0)), "so")])
    assert [cell.answers[0].correct for cell in gallery(unscored, {}, 6, lambda record: [photos[0]])] == [None]


def test_what_the_sanity_check_skips_is_counted_once(tmp_path):
    """The records of the sanity check come again in the first validation."""
    report = BadSampleReport(str(tmp_path))
    batch = SimpleNamespace(bad=[BadSample("s.tar", "k", "truncated")], references=["another"])
    module = SimpleNamespace(log=lambda *_, **__: None, device="cpu")
    alone = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    for sanity_checking in (True, False):
        trainer = SimpleNamespace(sanity_checking=sanity_checking, current_epoch=0, strategy=alone)
        report.on_validation_batch_end(trainer, module, None, batch, 0)
        report.on_validation_epoch_end(trainer, module)
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"split": "val", "epoch": 0, "shard": "s.tar", "key": "k", "reason": "truncated"}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_with_nothing_usable_has_no_score(split, tmp_path):
    """On all processes, if none of them had anything."""
    module = SimpleNamespace(log=lambda *_, **__: None, device="cpu")
    batch = SimpleNamespace(bad=[BadSample("s.tar", "k", "truncated")], references=[])
    for elsewhere in (1.0, 0.0):
        strategy = SimpleNamespace(reduce=lambda tensor, reduce_op, n=elsewhere: tensor + torch.tensor([2.0, n]))
        trainer = SimpleNamespace(sanity_checking=False, current_epoch=0, strategy=strategy)
        report = BadSampleReport(str(tmp_path))
        getattr(report, f"on_{split}_batch_end")(trainer, module, None, batch, 0)
        end = partial(getattr(report, f"on_{split}_epoch_end"), trainer, module)
        if elsewhere:
            end()
        else:
            with pytest.raises(InputError, match="expected images that can be decoded, all 3 were skipped"):
                end()


def test_samples_that_share_an_id_are_scored_each_and_named():
    shared = [(Reference("z", f"{n}", "", "what?", ("yes",), (n, 0)), said) for n, said in enumerate(("yes", "no"))]
    with pytest.warns(
        UserWarning, match=r"2 samples share an id with another, z \(record 0, sample 0\) the first; each"
    ):
        (scored,) = score_predictions(shared, {}, PYTHON, intervals=False).values()
    assert sorted(scored.items) == ["z (record 0, sample 0)", "z (record 1, sample 0)"]
