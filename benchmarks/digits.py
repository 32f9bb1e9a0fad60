#!/usr/bin/env python3
"""The main job, timed and scored: ``fit --config configs/digits.yaml``, with the full and the causal prefix.

    python benchmarks/digits.py                    both modes, one seed each, several minutes
    python benchmarks/digits.py --seeds 0 1 2      more seeds
    python benchmarks/digits.py --smoke            one epoch each: checks that the benchmark works
    python benchmarks/digits.py --json rows.json
    python benchmarks/digits.py --check runs/digits   checks what a run left behind: CI does, after the README's command

Each run is a process of its own, timed from its start to its end: imports, writing the set, training, validation,
scoring the test half, fitting the baseline and saving are all in the wall time. Accuracy is recomputed from
predictions.jsonl and scikit-learn's labels.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = ("digit", "parity", "size")
FLOOR = 0.95
"""What `--check` asks of every kind: loose, it tells a broken run from a working one on any machine."""
LEFT_BEHIND = (
    "metrics.csv", "predictions.jsonl", "predictions.png", "config.yaml", "model/model.safetensors",
    "checkpoints/step=*.ckpt", "tensorboard/events.out.tfevents.*",
)  # fmt: skip


def truth(kind: str, digit: int) -> str:
    """The right answer to one of the three questions."""
    return {"digit": WORDS[digit], "parity": ("even", "odd")[digit % 2], "size": ("no", "yes")[int(digit > 4)]}[kind]


def accuracies(predictions: Path) -> dict[str, float]:
    """Share of right answers per kind, from the file that a run left behind and scikit-learn's labels."""
    from sklearn.datasets import load_digits

    target = load_digits().target
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for line in predictions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        right[row["kind"]].append(row["prediction"] == truth(row["kind"], int(target[int(row["image_id"])])))
    assert all(len(answers) == 899 for answers in right.values()), {k: len(v) for k, v in right.items()}
    return {kind: sum(answers) / len(answers) for kind, answers in right.items()}


def check(folder: Path) -> None:
    """Exits with a message when a file is missing or an accuracy is below the floor."""
    for pattern in LEFT_BEHIND:
        if not list(folder.glob(pattern)):
            sys.exit(f"{folder / pattern} is missing")
    for kind, accuracy in accuracies(folder / "predictions.jsonl").items():
        print(f"{kind}: {accuracy:.4f}")
        if accuracy < FLOOR:
            sys.exit(f"{kind}: expected an accuracy of at least {FLOOR}, got {accuracy:.4f}")


def baseline() -> float:
    """scikit-learn's own example: the support-vector classifier on the same halves."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits = load_digits()
    pixels = digits.images.reshape(len(digits.images), -1)
    return float(SVC(gamma=0.001).fit(pixels[:898], digits.target[:898]).score(pixels[898:], digits.target[898:]))


def run(visibility: str, seed: int, smoke: bool) -> dict[str, Any]:
    """One fit in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "mmprefix", "fit", "--config", str(ROOT / "configs" / "digits.yaml"),
            "--seed_everything", str(seed), "--model.prefix_visibility", visibility,
        ]  # fmt: skip
        if smoke:
            command += ["--trainer.max_epochs", "1"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return {"visibility": visibility, "seed": seed, "seconds": round(seconds, 1),
                **accuracies(Path(folder) / "runs" / "digits" / "predictions.jsonl")}  # fmt: skip


def main() -> None:
    """Runs the modes interleaved, so that a noisy machine disturbs both, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", type=Path, metavar="RUN_FOLDER")
    options = parser.parse_args()
    if options.check is not None:
        check(options.check)
        return
    rows = [run(mode, seed, options.smoke) for seed in options.seeds for mode in ("full", "causal")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "timm", "lightning"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}")
    print(f"baseline (SVC of scikit-learn's example, measured now): {baseline():.4f}\n")
    print("| prefix | seed | which digit | even or odd | more than four | wall time, s |\n|---|---|---|---|---|---|")
    for row in rows:
        scores = " | ".join(f"{row[kind]:.4f}" for kind in KINDS)
        print(f"| {row['visibility']} | {row['seed']} | {scores} | {row['seconds']} |")
    if len(options.seeds) > 1:
        for mode in ("full", "causal"):
            of_mode = [row for row in rows if row["visibility"] == mode]
            medians = [statistics.median(row[key] for row in of_mode) for key in (*KINDS, "seconds")]
            print(f"| {mode} | median | " + " | ".join(f"{m:.4f}" for m in medians[:3]) + f" | {medians[3]:.1f} |")
    if options.json:
        options.json.write_text(
            json.dumps({"command": " ".join(["python", *sys.argv]), "versions": versions, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
