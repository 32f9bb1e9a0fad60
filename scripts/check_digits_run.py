#!/usr/bin/env python3
"""Checks what ``fit --config configs/digits.yaml`` left behind: all files there, every kind well above chance.

Accuracies are recomputed from predictions.jsonl and the rows of scikit-learn's array, not taken from the run's own
table. The floor is loose: it tells a broken run from a working one. The measured numbers are in benchmarks/results/.
"""

import json
import sys
from pathlib import Path

FLOOR = 0.95
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main(folder: Path) -> None:
    """Exits with a message when something is missing or wrong."""
    from sklearn.datasets import load_digits

    for name in ("metrics.csv", "predictions.jsonl", "predictions.png", "config.yaml", "model/model.safetensors"):
        if not (folder / name).is_file():
            sys.exit(f"{folder / name} is missing")
    for pattern in ("checkpoints/step=*.ckpt", "tensorboard/events.out.tfevents.*"):
        if not list(folder.glob(pattern)):
            sys.exit(f"{folder / pattern} is missing")
    target = load_digits().target
    right: dict[str, list[bool]] = {}
    for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        digit = int(target[int(row["image_id"])])
        truth = {
            "digit": WORDS[digit],
            "parity": ("even", "odd")[digit % 2],
            "size": ("no", "yes")[int(digit > 4)],
        }[row["kind"]]
        if row["references"] != [truth]:
            sys.exit(f"{row['id']}: references {row['references']}, expected {[truth]}")
        right.setdefault(row["kind"], []).append(row["prediction"] == truth)
    for kind, answers in right.items():
        accuracy = sum(answers) / len(answers)
        print(f"{kind}: {accuracy:.4f} of {len(answers)}")
        if len(answers) != 899 or accuracy < FLOOR:
            sys.exit(f"{kind}: expected 899 answers and at least {FLOOR}, got {len(answers)} and {accuracy:.4f}")
    if set(right) != {"digit", "parity", "size"}:
        sys.exit(f"expected three kinds, got {sorted(right)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: check_digits_run.py RUN_FOLDER")
    main(Path(sys.argv[1]))
