"""What a run left behind, read back for a report: predictions, scores, curves, and a few facts.

Files may come from strangers: each line is checked, and what is wrong is named by file and line.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mmprefix import __version__
from mmprefix.errors import InputError
from mmprefix.metrics import exact_match

EXACT_MATCH = "exact match"
_PREFERRED = ("CIDEr",)
_LISTED = 5


class Row(NamedTuple):
    """One line of ``predictions.jsonl``."""

    id: str
    image_id: str
    kind: str
    instruction: str
    prediction: str
    references: tuple[str, ...]
    dataset: str = ""


class Curve(NamedTuple):
    """One column of ``metrics.csv``: int64 ``[n]`` steps and float64 ``[n]`` values."""

    steps: np.ndarray
    values: np.ndarray


@dataclass
class Scores:
    """Per-item scores of a run's rows.

    Attributes:
        items: by metric, float64 ``[rows]``; NaN where a row has no score.
        corpus: what a metric says of the whole, where that is known. It need not be the mean of the items: BLEU's isn't.
        intervals: 95% intervals of corpus scores; those of means can do without.
        primary: the metric that sorts the gallery.
        notes: what must be said beside the numbers (which tokenizer, what is unavailable).
    """

    items: dict[str, np.ndarray]
    corpus: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    primary: str = EXACT_MATCH
    notes: list[str] = field(default_factory=list)


@dataclass
class Run:
    """A run, or any model's predictions.

    Attributes:
        name: for titles and legends.
        rows: the predictions.
        scores: of the rows.
        curves: by column of ``metrics.csv``.
        facts: what the summary says: model, checkpoint, versions.
        baseline: name, and value of the primary metric by kind.
    """

    name: str
    rows: list[Row]
    scores: Scores
    curves: dict[str, Curve] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    baseline: tuple[str, Mapping[str, float]] = ("", {})


def exact_match_scores(rows: Sequence[Row]) -> Scores:
    """1 where a prediction equals a reference up to white space, else 0; NaN where there is no reference."""
    values = [float(exact_match(row.prediction, row.references)) if row.references else math.nan for row in rows]
    return Scores({EXACT_MATCH: np.array(values, np.float64)})


def read_predictions(path: Path) -> list[Row]:
    """The rows of a ``predictions.jsonl``.

    Raises:
        InputError: a file that is missing or empty, or a line that is no prediction, with its number.
    """
    rows: list[Row] = []
    seen: dict[tuple[str, str], int] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = _parse(line, f"{path}:{number}")
                    first = seen.setdefault((row.dataset, row.id), number)
                    if first != number:
                        raise InputError(f"{path}:{number}: expected each id once, got {row.id!r} as in line {first}")
                    rows.append(row)
    except FileNotFoundError as error:
        raise InputError(f"expected predictions at {path}, found none") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8: {error}") from error
    if not rows:
        raise InputError(f"{path}: expected at least one prediction, the file is empty")
    return rows


def _parse(line: str, where: str) -> Row:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a JSON object, got {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(content).__name__}")
    defaults = {"image_id": content.get("id"), "kind": "", "instruction": "", "dataset": ""}
    texts = {}
    for name in ("id", "image_id", "kind", "instruction", "prediction", "dataset"):
        value = content.get(name, defaults.get(name))
        if name in ("id", "image_id") and type(value) is int:  # as the official formats have them
            value = str(value)
        if not isinstance(value, str):
            raise InputError(f"{where}: expected a string {name!r}, got {_shown(value)}")
        texts[name] = value
    references = content.get("references", [])
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise InputError(f"{where}: expected a list of strings 'references', got {_shown(references)}")
    return Row(references=tuple(references), **texts)


def read_scores(path: Path, rows: Sequence[Row], primary: str | None = None) -> Scores:
    """Scores as `mmprefix score --json` writes them: ``{"corpus": {metric: value}, "items": {id: {metric: score}}}``.

    Items may also stand by metric first, and are found by a row's id, or by its image's where captions are scored by image.

    Args:
        path: the file.
        rows: whose scores they are.
        primary: the metric that sorts the gallery; by default CIDEr where there is one, else the first.

    Raises:
        InputError: another format, or scores of other predictions.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"--scores: expected a file, found none at {path}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {' '.join(str(error).split())[:200]}") from error
    items = content.get("items") if isinstance(content, dict) else None
    if not isinstance(items, dict) or not items or not all(isinstance(of, dict) and of for of in items.values()):
        expected = '{"corpus": {metric: value}, "items": {id: {metric: score}}}, as score --json writes'
        raise InputError(f"{path}: expected {expected}, got {_shown(content)}")
    by_id: dict[str, Mapping[str, Any]] = items
    if not any(row.id in items or row.image_id in items for row in rows):
        by_id = {}
        for name, of in items.items():
            for key, value in of.items():
                by_id.setdefault(key, {})[name] = value  # type: ignore[index]
    found, without = _items_of(path, by_id, rows)
    corpus = content.get("corpus", {})
    if not isinstance(corpus, dict) or not all(_is_number(value) for value in corpus.values()):
        raise InputError(f"{path}: expected numbers by metric in 'corpus', got {_shown(corpus)}")
    intervals = content.get("intervals") or {}
    if not isinstance(intervals, dict) or not all(pair is None or _is_interval(pair) for pair in intervals.values()):
        raise InputError(f"{path}: expected two numbers by metric in 'intervals', got {_shown(intervals)}")
    if primary is None:
        primary = next((name for name in _PREFERRED if name in found), next(iter(found)))
    if primary not in found:
        raise InputError(f"--metric: expected one of {', '.join(found)}, got {primary!r}")
    unavailable = content.get("unavailable") or {}
    left = f"{without:,} of {len(rows):,} predictions have no score in {path.name}, and are left out of all numbers."
    more = content.get("notes") or []
    notes = [str(content["rules"])] if content.get("rules") else []
    notes += [str(note) for note in more] if isinstance(more, list) else []
    notes += [left] if without else []
    if isinstance(unavailable, dict):
        notes += [f"{name} is unavailable: {reason}" for name, reason in unavailable.items()]
    of_corpus = {str(name): float(value) for name, value in corpus.items()}
    known = {str(name): (float(pair[0]), float(pair[1])) for name, pair in intervals.items() if pair}
    return Scores(found, of_corpus, known, primary, notes)


def _items_of(
    path: Path, by_id: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]
) -> tuple[dict[str, np.ndarray], int]:
    """By metric, float64 ``[rows]``, NaN for rows without a score, which some sets don't count; and how many those are."""
    keys = [row.id for row in rows]
    if not any(key in by_id for key in keys):
        keys = [row.image_id for row in rows]
    unknown = set(by_id).difference(keys)
    if unknown:
        raise InputError(
            f"{path}: items: expected scores of these predictions only, got some of {_some(sorted(unknown))}"
        )
    found = {name: np.full(len(keys), math.nan) for name in next(iter(by_id.values()))}
    for number, key in enumerate(keys):
        scores = by_id.get(key)
        if scores is None:
            continue
        if scores.keys() != found.keys():
            raise InputError(f"{path}: items: {key}: expected {', '.join(found)}, got {', '.join(scores)}")
        for name, value in scores.items():
            if not _is_number(value) or not math.isfinite(value):
                raise InputError(f"{path}: items: {key}: {name}: expected a finite number, got {_shown(value)}")
            found[name][number] = value
    return found, sum(key not in by_id for key in keys)


def read_curves(path: Path) -> dict[str, Curve]:
    """The columns of a ``metrics.csv``, by name; {} where there is no file.

    Raises:
        InputError: a file without the column ``step``, or one with other things than numbers.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if "step" not in (reader.fieldnames or ()):
                raise InputError(
                    f"{path}: expected a column 'step', got {', '.join(reader.fieldnames or ()) or 'none'}"
                )
            for row in reader:
                for name, text in row.items():
                    if name in ("step", "epoch") or text in ("", None) or name is None:
                        continue
                    try:
                        step, value = int(row["step"]), float(text)
                    except ValueError as error:
                        where = f"{path}:{reader.line_num}: {name}"
                        raise InputError(
                            f"{where}: expected numbers, got {text[:40]!r} at step {row['step']!r}"
                        ) from error
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8: {error}") from error
    return {name: Curve(np.array(steps, np.int64), np.array(values)) for name, (steps, values) in found.items()}


def read_run(path: Path, scores: Path | None = None, metric: str | None = None) -> Run:
    """A run folder, or a file of predictions alone.

    Args:
        path: of either. In a folder, ``predictions.jsonl`` is taken.
        scores: per-item scores (`read_scores`); by default exact match.
        metric: the one of them that sorts the gallery.

    Raises:
        InputError: what is missing there or can't be read.
    """
    folder, file = (path, path / "predictions.jsonl") if path.is_dir() else (path.parent, path)
    rows = read_predictions(file)
    if scores is None and metric not in (None, EXACT_MATCH):
        raise InputError(f"--metric: expected --scores with {metric!r}; without, there is only {EXACT_MATCH!r}")
    read = exact_match_scores(rows) if scores is None else read_scores(scores, rows, metric)
    name = folder.resolve().name if path.is_dir() else file.stem
    run = Run(name, rows, read)
    # A file somewhere else (another model's answers) has no run around it.
    if _config_of(folder) is not None:
        run.name = folder.resolve().name
        run.curves = read_curves(folder / "metrics.csv")
        run.facts = {**facts_of(folder), "Predictions": file.name}
    return run


def facts_of(folder: Path) -> dict[str, str]:
    """What a run folder's files say of model and checkpoint; what they don't say is left out."""
    facts: dict[str, str] = {}
    path = _config_of(folder)
    if path is None:
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {"Model": f"{path.name} can't be read: {' '.join(str(error).split())[:100]}"}
    config = config if isinstance(config, dict) else {}
    model = config.get("model") if isinstance(config.get("model"), dict) else {}
    if model:
        facts["Model"] = model_line(model)
    steps = [int(m[1]) for p in (folder / "checkpoints").glob("step=*.ckpt") if (m := re.search(r"step=(\d+)", p.name))]
    if steps:
        facts["Checkpoint"] = f"step {max(steps):,}"
    if config.get("seed_everything") is not None:
        facts["Seed"] = str(config["seed_everything"])
    return facts


def _config_of(folder: Path) -> Path | None:
    """How the model came to be: the file that `fit` left; without one, that of an evaluation."""
    found = [folder / "config.yaml", *sorted(folder.glob("config-*.yaml"))]
    return next((path for path in found if path.is_file()), None)


def model_line(model: Mapping[str, Any]) -> str:
    """``resnetv2_18, linear, llama``: encoder, connector and decoder of a config's ``model``."""
    if model.get("pretrained"):
        return str(model["pretrained"])
    vision, connector, decoder = ((model.get(name) or {}) for name in ("vision", "connector", "decoder"))
    of_decoder = decoder.get("name") or (decoder.get("config") or {}).get("model_type")
    parts = [vision.get("name"), connector.get("kind"), of_decoder]
    return " → ".join(str(part) for part in parts if part) or "not named in config.yaml"


def versions() -> str:
    """Of this package and of what a model's numbers depend on."""
    found = [f"mmprefix {__version__}"]
    for name in ("torch", "transformers", "timm", "lightning"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(bound) for bound in value)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(repr(name[:60]) for name in names[:_LISTED]) + more


def _shown(value: Any) -> str:
    return "none" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
