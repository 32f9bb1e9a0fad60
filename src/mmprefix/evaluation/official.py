"""Files of predictions and of annotations, in the formats of the sets' authors -> what is scored.

Imports no torch. Every entry is used or is an error that names file and entry: `InputError`, one line. Ids are strings from
here on, so that ``12`` and ``"12"`` are one id.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mmprefix.data.reading import is_json_array, json_items, json_lists, json_members, json_names, text_lines
from mmprefix.data.sources import PICTURES
from mmprefix.errors import InputError
from mmprefix.metrics.answers import AnswerReference, listed
from mmprefix.metrics.captions import ALL_TASKS, CAPTION

TASKS = ALL_TASKS
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OKVQA_TYPES = {
    "one": "vehicles and transportation", "two": "brands, companies and products", "three": "objects, material and clothing",
    "four": "sports and recreation", "five": "cooking and food", "six": "geography, history, language and culture",
    "seven": "people and everyday life", "eight": "plants and animals", "nine": "science and technology",
    "ten": "weather and climate",
}  # fmt: skip
"""OK-VQA's annotations hold the number of a category (Marino et al., https://arxiv.org/abs/1906.00067)."""


@dataclass
class Predictions:
    """What a model said.

    Attributes:
        answers: id -> text.
        answerable: VizWiz: id -> probability that the question can be answered, where the file has it.
        references: what a run's own ``predictions.jsonl`` knows, where it is asked for; None in other formats.
    """

    answers: dict[str, str] = field(default_factory=dict)
    answerable: dict[str, float] = field(default_factory=dict)
    references: dict[str, AnswerReference] | None = None


@dataclass
class References:
    """What is known of a split.

    Attributes:
        items: id -> reference; captions are its answers.
        uncounted: ids that may be predicted and don't count, by the rules of the set.
        note: why they don't.
        has_splits: whether they came from a file that holds several splits.
    """

    items: dict[str, AnswerReference] = field(default_factory=dict)
    uncounted: set[str] = field(default_factory=set)
    note: str = ""
    has_splits: bool = False

    def add(self, where: str, name: str, reference: AnswerReference) -> None:
        """Adds one.

        Raises:
            InputError: there is one of that id already.
        """
        if name in self.items:
            raise InputError(f"{where}: expected each id once, got {name} twice")
        self.items[name] = reference


# Predictions ----------------------------------------------------------------------------------------------------------


def read_predictions(path: Path, task: str, *, own_references: bool = False) -> Predictions:
    """A model's answers.

    Read are a list of results (COCO's ``[{"image_id", "caption"}]``, VQA's ``[{"question_id", "answer"}]`` and their relatives:
    ``questionId``, ``image``, ``prediction``), an object of answers by id, and JSON Lines of such results, a run's own
    ``predictions.jsonl`` among them, which holds references, too.

    Args:
        path: a file.
        task: one of `TASKS`.
        own_references: whether those of a run's own file are wanted. Samples of several sets are then told apart by their
            set's name, too.

    Raises:
        InputError: a file that can't be read or is something else, an id that comes twice, an answer that is not a string.
    """
    result = Predictions()
    duplicates: dict[str, None] = {}
    of_runs = 0
    for where, row in _rows(path):
        name = _id(row, where, task)
        answer = _answer(row, where, name)
        if own_references and isinstance(row.get("dataset"), str):
            name = f"{row['dataset']}/{name}"
        if name in result.answers:
            duplicates[name] = None
        result.answers[name] = answer
        if task == "vizwiz" and "answerable" in row:
            result.answerable[name] = _probability(row["answerable"], where)
        if own_references and "references" in row:
            of_runs += 1
            result.references = result.references or {}
            result.references[name] = _of_run(row, where)
    if duplicates:
        raise InputError(
            f"{path}: expected each id once, got {len(duplicates):,} of them again ({listed([*duplicates])})"
        )
    if not result.answers:
        raise InputError(f"{path}: expected one or more predictions, got none")
    if 0 < of_runs < len(result.answers):
        raise InputError(f"{path}: expected `references` in each line or in none, got them in {of_runs:,} lines")
    if 0 < len(result.answerable) < len(result.answers):
        lacking = [name for name in result.answers if name not in result.answerable]
        raise InputError(f"{path}: expected `answerable` in each entry or in none, got none for {listed(lacking)}")
    return result


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Entries with their places."""
    if is_json_array(path):
        for number, row in enumerate(json_items(path)):
            yield f"{path}: entry {number}", _object(row, f"{path}: entry {number}")
        return
    if not _is_json_lines(path):
        for name, answer in json_members(path):
            if not isinstance(answer, str):
                raise InputError(
                    f"{path}: expected a list of results, an object of answers by id, or JSON Lines, got {_top(path)}"
                )
            yield f"{path}: {name}", {"id": name, "answer": answer}
        return
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: expected JSON, got {error}") from error
            yield where, _object(row, where)


def _is_json_lines(path: Path) -> bool:
    """Whether the first line is a whole object with an id; else the file is one object."""
    first = next((line for line in text_lines(path) if line.strip()), "")
    if not first:
        raise InputError(f"{path}: expected predictions, got an empty file")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return path.suffix == ".jsonl"
    return path.suffix == ".jsonl" or (isinstance(row, dict) and any(key in row for key in _IDS))


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with an id and an answer, got {_kind(row)}")
    return row


_IDS = ("question_id", "questionId", "id", "image_id", "image")
_TEXTS = ("answer", "prediction", "caption")


def _id(row: Mapping[str, Any], where: str, task: str) -> str:
    # A run's own file has the sample's id and the image's; a list of captions the image's alone.
    for key in _IDS:
        if key in row:
            return _name(row[key], where, key, task)
    raise InputError(f"{where}: expected one of {', '.join(_IDS)}, got {_fields(row)}")


def _name(value: Any, where: str, key: str, task: str = "") -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"{where}: expected `{key}` to be a number or a name, got {_kind(value)}")
    text = str(value)
    # VizWiz's questions are named by their picture; in a run's file that is without the suffix.
    return Path(text).stem if task == "vizwiz" and text.lower().endswith(PICTURES) else text


def _answer(row: Mapping[str, Any], where: str, name: str) -> str:
    keys = [key for key in _TEXTS if key in row]
    for key in keys:
        if not isinstance(row[key], str):
            raise InputError(f"{where}: expected `{key}` of {name} to be a string, got {_kind(row[key])}")
    if len({row[key] for key in keys}) > 1:  # one may be what was expected
        raise InputError(
            f"{where}: expected one of {', '.join(_TEXTS)} of {name}, got {' and '.join(keys)}, which differ"
        )
    if keys:
        text: str = row[keys[0]]
        return text
    raise InputError(f"{where}: expected one of {', '.join(_TEXTS)}, got {_fields(row)}")


def _probability(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{where}: expected `answerable` from 0 to 1, got {_kind(value)}")
    return float(value)


def _of_run(row: Mapping[str, Any], where: str) -> AnswerReference:
    kinds = [(axis, row[key]) for axis, key in (("set", "dataset"), ("kind", "kind")) if isinstance(row.get(key), str)]
    image = row.get("image_id")
    return AnswerReference(
        _texts(row["references"], where, "references"), None if image is None else str(image), tuple(kinds)
    )


# Annotations ----------------------------------------------------------------------------------------------------------


def read_references(
    paths: Sequence[Path], task: str, *, questions: Path | None = None, split: str | None = None
) -> References:
    """What is known of a split, from its authors' annotation files.

    Args:
        paths: files; several are read one after the other.
        task: one of `TASKS`.
        questions: VQA and OK-VQA: the questions file; its ids must be those of the annotations.
        split: ScienceQA and Karpathy's captions, whose file holds several; None: ``test``.

    Raises:
        InputError: a file that can't be read or is something else, entries that lack something, ids that come twice.
    """
    references = References()
    for path in paths:
        _READERS[task](path, references, split or "test")
    if not references.items:
        raise InputError(f"{paths[0]}: expected {_EXPECTED[task]}, got no item of that kind")
    if split is not None and not references.has_splits:
        raise InputError(f"--split: expected none, since {paths[0]} holds a single one, got {split!r}")
    if questions is not None:
        _check_questions(questions, references)
    return references


def _entries(path: Path, name: str, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Elements of an array that must be there, with their places: a member's, or the file's own where ``name`` is empty."""
    if is_json_array(path) != (not name):
        raise InputError(f"{path}: expected {_EXPECTED[task]}, got {'a list' if is_json_array(path) else 'an object'}")
    found = False
    entries = (entry for _, block in json_lists(path, name) for entry in block) if name else json_items(path)
    for number, entry in enumerate(entries):
        found = True
        where = f"{path}: {name or 'entry'}[{number}]"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected an object, got {_kind(entry)}")
        yield where, entry
    if not found:
        raise InputError(f"{path}: expected {_EXPECTED[task]}, got {_top(path)}")


def _top(path: Path) -> str:
    """What a file holds instead."""
    if is_json_array(path):
        return "an empty list"
    names = list(islice(json_names(path), 8))
    return f"an object with {', '.join(names)}" if names else "an empty object"


def _first(path: Path, name: str) -> Any:
    """The first element of an array in a JSON object; None where there is none."""
    return next((block[0] for _, block in json_lists(path, name)), None)


def _captions(path: Path, references: References, split: str) -> None:
    first = _first(path, "images")
    if isinstance(first, dict) and "sentences" in first:
        _karpathy(path, references, split)
        return
    if first is None and _first(path, "data") is not None:
        # TextCaps: an entry for each caption, with all captions of its image.
        several: dict[str, list[str]] = {}
        for where, entry in _entries(path, "data", CAPTION):
            name = _name(_needed(entry, "image_id", where), where, "image_id")
            captions = _texts(_needed(entry, "reference_strs", where), where, "reference_strs")
            known = several.setdefault(name, [])
            known += (Counter(captions) - Counter(known)).elements()  # should an entry have more than those before it
        for name, given in several.items():
            references.add(str(path), name, AnswerReference(tuple(given), name))
        return
    captions_of: dict[str, list[str]] = {}
    for where, entry in _entries(path, "images", CAPTION):
        name = _name(_needed(entry, "id", where), where, "id")
        if name in captions_of:
            raise InputError(f"{where}: expected each id once, got {name} twice")
        captions_of[name] = []
    for where, entry in _entries(path, "annotations", CAPTION):
        name = _name(_needed(entry, "image_id", where), where, "image_id")
        if name not in captions_of:
            raise InputError(f"{where}: expected an `image_id` of `images`, got {name}")
        captions_of[name].append(_text(entry, "caption", where))
    without = [name for name, captions in captions_of.items() if not captions]
    if without:
        raise InputError(f"{path}: expected captions for each image, got none for {len(without):,} ({listed(without)})")
    for name, given in captions_of.items():
        references.add(str(path), name, AnswerReference(tuple(given), name))


def _karpathy(path: Path, references: References, split: str) -> None:
    seen: dict[str, None] = {}
    for where, entry in _entries(path, "images", CAPTION):
        part = str(entry.get("split"))
        seen[part] = None
        if part != split:
            continue
        sentences = _needed(entry, "sentences", where)
        if not isinstance(sentences, list) or not sentences:
            raise InputError(f"{where}: expected a list `sentences`, got {_kind(sentences)}")
        captions = tuple(_text(_object(sentence, where), "raw", where) for sentence in sentences)
        name = _name(entry.get("cocoid", Path(str(entry.get("filename"))).stem), where, "cocoid")
        references.add(where, name, AnswerReference(captions, name))
    _check_split(path, split, seen, references)


def _vqa(path: Path, references: References, split: str, names: Mapping[str, str] = MappingProxyType({})) -> None:
    for where, entry in _entries(path, "annotations", "vqa"):
        name = _name(_needed(entry, "question_id", where), where, "question_id")
        kinds = _kinds(entry, {"answer type": "answer_type", "question type": "question_type"})
        named = tuple((axis, names.get(kind, kind) if axis == "question type" else kind) for axis, kind in kinds)
        image = str(entry["image_id"]) if "image_id" in entry else None
        references.add(where, name, AnswerReference(_answers(entry, where), image, named))


def _okvqa(path: Path, references: References, split: str) -> None:
    _vqa(path, references, split, _OKVQA_TYPES)


def _check_questions(path: Path, references: References) -> None:
    asked: set[str] = set()
    for where, entry in _entries(path, "questions", "questions"):
        name = _name(_needed(entry, "question_id", where), where, "question_id")
        if name in asked:
            raise InputError(f"{where}: expected each id once, got {name} twice")
        asked.add(name)
    odd = sorted(asked ^ references.items.keys())
    if odd:
        raise InputError(
            f"{path}: expected the questions of the annotations, got {len(odd):,} of one file only ({listed(odd)})"
        )


def _vizwiz(path: Path, references: References, split: str) -> None:
    for where, entry in _entries(path, "", "vizwiz"):
        name = _name(_needed(entry, "image", where), where, "image", "vizwiz")
        label = entry.get("answerable")
        if label not in (None, 0, 1):
            raise InputError(f"{where}: expected `answerable` to be 0 or 1, got {_kind(label)}")
        kinds, known = _kinds(entry, {"answer type": "answer_type"}), None if label is None else bool(label)
        references.add(where, name, AnswerReference(_answers(entry, where), name, kinds, known))


def _text_in_images(path: Path, references: References, split: str, task: str) -> None:
    for where, entry in _entries(path, "data", task):
        key = "question_id" if "question_id" in entry else "questionId"
        name = _name(_needed(entry, key, where), where, key)
        image = next((str(entry[of]) for of in ("image_id", "image", "image_local_name") if of in entry), None)
        kinds = _kinds(entry, {"question type": "question_types", "answer type": "answer_type"})
        references.add(where, name, AnswerReference(_answers(entry, where), image, kinds))


def _textvqa(path: Path, references: References, split: str) -> None:
    _text_in_images(path, references, split, "textvqa")


def _docvqa(path: Path, references: References, split: str) -> None:
    _text_in_images(path, references, split, "docvqa")


def _gqa(path: Path, references: References, split: str) -> None:
    for name, entry in _members(path, "gqa"):
        where = f"{path}: {name}"
        # The official numbers are those of balanced questions, whatever the file holds.
        if entry.get("isBalanced") is False:
            references.uncounted.add(name)
            references.note = "not balanced, which GQA's accuracy leaves out"
            continue
        given = entry.get("types")
        types = given if isinstance(given, dict) else {}
        kinds = _kinds(types, {"structural": "structural", "semantic": "semantic"})
        if "structural" in types:
            kinds = (("answer", "open" if types["structural"] == "query" else "binary"), *kinds)
        image = str(entry["imageId"]) if "imageId" in entry else None
        references.add(where, name, AnswerReference((_text(entry, "answer", where),), image, kinds))


def _chartqa(path: Path, references: References, split: str) -> None:
    several = len(references.items)
    for number, (where, entry) in enumerate(_entries(path, "", "chartqa"), several):
        name = _name(entry.get("question_id", entry.get("id", number)), where, "id")
        image = str(entry["imgname"]) if "imgname" in entry else None
        reference = AnswerReference((_text(entry, "label", where),), image, (("file", path.stem),))
        references.add(where, name, reference)


def _scienceqa(path: Path, references: References, split: str) -> None:
    seen: dict[str, None] = {}
    for name, entry in _members(path, "scienceqa"):
        where = f"{path}: {name}"
        seen[str(entry.get("split"))] = None
        if entry.get("split") != split:
            continue
        choices, answer = _needed(entry, "choices", where), _needed(entry, "answer", where)
        if not isinstance(choices, list) or not 1 <= len(choices) <= len(LETTERS):
            raise InputError(f"{where}: expected a list `choices` of up to {len(LETTERS)}, got {_kind(choices)}")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise InputError(f"{where}: expected `answer` from 0 to {len(choices) - 1}, got {_kind(answer)}")
        reference = AnswerReference((LETTERS[answer],), None, tuple(_science_kinds(entry)), num_choices=len(choices))
        references.add(where, name, reference)
    _check_split(path, split, seen, references)


def _science_kinds(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The groups of the published tables; a question may have a text and an image for context."""
    if isinstance(entry.get("subject"), str):
        yield "subject", entry["subject"]
    context = [name for name, key in (("text", "hint"), ("image", "image")) if entry.get(key)]
    for name in context or ["none"]:
        yield "context", name
    grade = str(entry.get("grade", "")).removeprefix("grade")
    if grade.isdecimal():
        yield "grade", "1-6" if int(grade) <= 6 else "7-12"


def _exact(path: Path, references: References, split: str) -> None:
    for where, row in _rows(path):
        key = next((key for key in ("references", "answers", "answer", "targets", "target") if key in row), None)
        if key is None:
            raise InputError(f"{where}: expected references, answers or answer, got {_fields(row)}")
        given = [row[key]] if isinstance(row[key], str) else row[key]
        kinds = (("kind", row["kind"]),) if isinstance(row.get("kind"), str) else ()
        image = str(row["image_id"]) if "image_id" in row else None
        references.add(where, _id(row, where, "exact"), AnswerReference(_texts(given, where, key), image, kinds))


_Reader = Callable[[Path, References, str], None]
_READERS: dict[str, _Reader] = {
    CAPTION: _captions, "vqa": _vqa, "okvqa": _okvqa, "textvqa": _textvqa, "vizwiz": _vizwiz, "gqa": _gqa,
    "docvqa": _docvqa, "chartqa": _chartqa, "scienceqa": _scienceqa, "exact": _exact,
}  # fmt: skip
_EXPECTED = {
    CAPTION: "captions (COCO's `images` and `annotations`, Karpathy's `images` with `sentences`, or TextCaps' `data`)",
    "vqa": "VQA annotations with a list `annotations`",
    "okvqa": "VQA annotations with a list `annotations`",
    "questions": "VQA questions with a list `questions`",
    "textvqa": "TextVQA with a list `data`",
    "vizwiz": "VizWiz, a list of questions",
    "gqa": "GQA, an object of questions by id",
    "docvqa": "DocVQA with a list `data`",
    "chartqa": "ChartQA, a list of questions with `label`",
    "scienceqa": "ScienceQA, an object of problems by id",
    "exact": "a list or lines of objects with an id and `answers`",
}


def _members(path: Path, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if is_json_array(path):
        raise InputError(f"{path}: expected {_EXPECTED[task]}, got a list")
    for name, entry in json_members(path):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: expected {_EXPECTED[task]}, got {_kind(entry)} at {name!r}")
        yield name, entry


def _check_split(path: Path, split: str, seen: Iterable[str], references: References) -> None:
    references.has_splits = True
    if not references.items:
        raise InputError(f"--split: expected one of {', '.join(sorted(seen)) or 'none'}, got {split!r}: {path}")


def _needed(entry: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise InputError(f"{where}: expected `{key}`, got {_fields(entry)}")
    return entry[key]


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = _needed(entry, key, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: expected `{key}` to be a string, got {_kind(value)}")
    return value


def _texts(given: Any, where: str, key: str) -> tuple[str, ...]:
    """Answers: strings, or objects with an ``answer``."""
    if not isinstance(given, list) or not given:
        raise InputError(f"{where}: expected one or more `{key}`, got {_kind(given)}")
    texts = []
    for one in given:
        text = one.get("answer") if isinstance(one, dict) else one
        if not isinstance(text, str):
            raise InputError(f"{where}: expected `{key}` to be strings, got {_kind(text)}")
        texts.append(text)
    return tuple(texts)


def _answers(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    return _texts(_needed(entry, "answers", where), where, "answers")


def _kinds(entry: Mapping[str, Any], axes: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Groups of an entry, from fields that hold a name or a list of names."""
    found = []
    for axis, key in axes.items():
        value = entry.get(key)
        found += [(axis, name) for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
    return tuple(found)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _fields(row: Mapping[str, Any]) -> str:
    return f"only {', '.join(list(row)[:8])}" if row else "an empty object"
