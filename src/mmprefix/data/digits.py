"""The default set: scikit-learn's 1,797 scans of handwritten digits, three questions each, as webdataset shards.

The split is that of scikit-learn's own digits example: the first half trains, the last 899 scans test, unshuffled, so
that the writers of the test half are mostly new. The last 48 scans of the first half are held out for validation. The baseline
is that example's support-vector classifier, fitted here, in the same run, on the whole first half.
"""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmprefix.data.shards import write_shard

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_TRAIN_HALF = 898
NUM_VAL = 48
SPLITS = {
    "train": range(NUM_TRAIN_HALF - NUM_VAL),
    "val": range(NUM_TRAIN_HALF - NUM_VAL, NUM_TRAIN_HALF),
    "test": range(NUM_TRAIN_HALF, 1797),
}
RECORDS_PER_SHARD = 256
BASELINE_NAME = "SVC"


def questions(digit: int) -> list[dict[str, str]]:
    """Kind, instruction and target of the three questions about one digit."""
    return [
        {"kind": "digit", "instruction": "which digit is this?", "target": WORDS[digit]},
        {"kind": "parity", "instruction": "is it even or odd?", "target": "odd" if digit % 2 else "even"},
        {"kind": "size", "instruction": "is it more than four?", "target": "yes" if digit > 4 else "no"},
    ]


@cache
def _load() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def shard_names() -> dict[str, range]:
    """Names of all shards, each with the rows of scikit-learn's array that it holds."""
    names = {}
    for split, rows in SPLITS.items():
        for number, start in enumerate(range(rows.start, rows.stop, RECORDS_PER_SHARD)):
            names[f"{split}-{number:03d}.tar"] = range(start, min(start + RECORDS_PER_SHARD, rows.stop))
    return names


def write_digits(folder: Path) -> None:
    """Writes the shards of all splits into ``folder``, where they are not there yet.

    Images are 8x8 greyscale PNGs, the 17 levels 0..16 spread over 0..255. ``image_id`` is the row in scikit-learn's
    array.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in shard_names().items():
        if not (folder / name).exists():
            write_shard(folder / name, [_record(row) for row in rows])


def _record(row: int) -> tuple[str, bytes, bytes]:
    images, target = _load()
    buffer = io.BytesIO()
    Image.fromarray(np.round(images[row] * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
    samples = [
        {"id": f"{row}-{question['kind']}", "image_id": str(row), **question} for question in questions(target[row])
    ]
    return f"{row:04d}", buffer.getvalue(), json.dumps(samples).encode()


def baseline(split: str) -> dict[str, float]:
    """Accuracy of the classifier per question kind, fitted now on the whole first half; {} for training splits."""
    from sklearn.svm import SVC

    if split != "test":
        return {}
    images, target = _load()
    pixels = images.reshape(len(images), -1)
    classifier = SVC(gamma=0.001).fit(pixels[:NUM_TRAIN_HALF], target[:NUM_TRAIN_HALF])
    rows = SPLITS[split]
    predicted = classifier.predict(pixels[rows.start : rows.stop])
    asked = [questions(digit) for digit in target[rows.start : rows.stop]]
    answered = [questions(digit) for digit in predicted]
    return {
        kind["kind"]: float(np.mean([q[n]["target"] == a[n]["target"] for q, a in zip(asked, answered, strict=True)]))
        for n, kind in enumerate(asked[0])
    }
