import json

import numpy as np
import torch
from PIL import Image

from mmprefix.evaluation.pictures import Answer, Cell, draw_cells, to_image
from mmprefix.evaluation.report import _Gallery, accuracy_table, write_predictions
from mmprefix.metrics import ExactMatch, exact_match
from mmprefix.packing import EvaluationBatch, PromptBatch, Reference
from mmprefix.vision import ImageTransform, as_levels

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


def test_table_shows_kinds_next_to_the_baseline():
    assert accuracy_table("test: 2 images", PREDICTIONS, "SVC", {"colour": 0.75}).splitlines() == [
        "test: 2 images",
        "kind    question     samples  exact match     SVC",
        "-------------------------------------------------",
        "colour  which?             2       0.5000  0.7500",
        "shape   what shape?        1       1.0000       -",
        "total                      3       0.6667        ",
    ]


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


def test_text_only_samples_of_a_batch_are_cells_of_their_own():
    """Questions on the same image share one."""
    references = tuple(Reference(f"q{n}", "i", "", f"{n}?", ("yes",), (n, 0)) for n in range(5))
    image_of = torch.tensor([[-1], [0], [-1], [0], [-1]])
    ids = torch.zeros(5, 2, dtype=torch.int64)
    prompts = PromptBatch(ids, ids, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), image_of)
    gallery = _Gallery(10)
    predictions = [(reference, "yes" if n != 2 else "no") for n, reference in enumerate(references)]
    transform = ImageTransform((4, 4), (0.5,) * 3, (0.5,) * 3)
    gallery.add(EvaluationBatch(prompts, None, references), predictions, transform, lambda record: None)
    assert [(cell.title, len(cell.answers)) for cell in gallery.cells()] == [
        ("q2", 1), ("q0", 1), ("image i", 2), ("q4", 1),
    ]  # fmt: skip
