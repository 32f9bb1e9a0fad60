"""Published annotation formats -> records: COCO, Karpathy and TextCaps captions, VQA v2 and its relatives, TextVQA, DocVQA,
ChartQA, GQA, ScienceQA, LLaVA conversations, tables, and folders of pictures with texts beside them.

Every reader is a function of `SourceOptions` and a `Staging` that takes samples as they come; files are read as
streams. A sample that lacks something is refused by name, and a file that is something else altogether ends the command:
`InputError` names the file, what was expected and what came.

Where a set has no instruction of its own, it gets PaliGemma's (``caption en``); a question is the instruction as it
stands, unless `instruction` puts it into a sentence.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmprefix.data.reading import is_json_array, json_items, json_lists, json_member, json_members, text_lines
from mmprefix.data.records import SourceRecord
from mmprefix.data.samples import SURROGATE
from mmprefix.data.staging import Staging
from mmprefix.errors import InputError
from mmprefix.instructions import IMAGE_MARK

CAPTION = "caption en"
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_MAX_FIELD = 16 << 20


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.

    Attributes:
        image: path of the picture, a list of several (an empty one for text only), or (Parquet) the picture itself; the only
            one that must be there.
        instruction, target, answers, id, kind: fields of a sample. Answers are a list, or JSON of one.
    """

    image: str = "image"
    instruction: str = "instruction"
    target: str = "target"
    answers: str = "answers"
    id: str = "id"
    kind: str = "kind"


@dataclass(frozen=True)
class SourceOptions:
    """Where a set lies.

    Attributes:
        images: folder that names of images are relative to.
        annotations: annotation files.
        questions: VQA: the questions file.
        split: which part of a file that holds several; also the name of the shards.
        instruction: text of the prefix; ``{question}`` stands for the question. None: the set's own.
        image_name: TextCaps, VQA, TextVQA and GQA: name of a picture, with ``{image_id}`` (``{image_id:012d}``); None finds it.
        columns: of a table.
        needs_target: whether a table's rows without a target are refused.
    """

    images: Path | None = None
    annotations: tuple[Path, ...] = ()
    questions: Path | None = None
    split: str = "train"
    instruction: str | None = None
    image_name: str | None = None
    columns: Columns = field(default_factory=Columns)
    needs_target: bool = True

    def caption_instruction(self) -> str:
        """Of sets without questions.

        Raises:
            InputError: it has a place for one.
        """
        if self.instruction is None:
            return CAPTION
        if "{question}" in self.instruction:
            raise InputError(
                f"--instruction: expected text without {{question}}, since there is none, got {self.instruction!r}"
            )
        return self.instruction

    def question_instruction(self, question: str) -> str:
        """Of sets with questions."""
        return question if self.instruction is None else self.instruction.replace("{question}", question)


# Entries --------------------------------------------------------------------------------------------------------------


def _objects(path: Path, name: str, staging: Staging) -> Iterator[dict[str, Any]]:
    """The elements of an array in a JSON object that are objects; others are refused."""
    number = 0
    for _, block in json_lists(path, name):
        yield from _only_objects(block, f"{path.name}: {name}", number, staging)
        number += len(block)


def _only_objects(block: list[Any], where: str, first: int, staging: Staging) -> Iterator[dict[str, Any]]:
    for number, entry in enumerate(block, first):
        if isinstance(entry, dict):
            yield entry
        else:
            staging.refuse(f"{where}[{number}]", "bad entry", f"a {type(entry).__name__}")


def _only(options: SourceOptions, what: str) -> Path:
    if len(options.annotations) != 1:
        raise InputError(f"--annotations: expected {what}, got {len(options.annotations)} files")
    return options.annotations[0]


def _text(value: Any) -> str | None:
    return " ".join(value.split()) if isinstance(value, str) else None


def _most_common(answers: list[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


# Captions -------------------------------------------------------------------------------------------------------------


def coco(options: SourceOptions, staging: Staging) -> None:
    """COCO captions (``captions_train2017.json``), or Karpathy's split of them (``dataset_coco.json``)."""
    path = _only(options, "one captions file")
    first = next((block[0] for _, block in json_lists(path, "images")), None)
    if not isinstance(first, dict):
        raise InputError(f"{path}: expected COCO captions with a list `images`, got none")
    if "sentences" in first:
        _karpathy(path, options, staging)
        return
    seen: Counter[str] = Counter()
    for name, block in json_lists(path, "images", "annotations"):
        entries = _only_objects(block, f"{path.name}: {name}", seen[name], staging)
        seen[name] += len(block)
        if name == "images":
            _coco_images(entries, staging)
        else:
            _coco_captions(entries, options, staging)
    for number, name in staging.unused_names():
        if seen["annotations"]:
            staging.refuse(name, "no caption")
        else:  # a test file: pictures to caption
            staging.add(number, _caption(options, number, []))


def _coco_images(entries: Iterable[dict[str, Any]], staging: Staging) -> None:
    for image in entries:
        name = image.get("file_name")
        if isinstance(name, str) and "id" in image:
            staging.name(str(image["id"]), name)
        else:
            staging.refuse(_name(image, "id"), "bad entry", "an image without id or file_name")


def _coco_captions(entries: Iterable[dict[str, Any]], options: SourceOptions, staging: Staging) -> None:
    begin = partial(_caption, options, captions=())
    for entry in entries:
        number, caption = entry.get("image_id"), _text(entry.get("caption"))
        if number is None or caption is None:
            got = f"got {_kind_of(number)} and {_kind_of(entry.get('caption'))}"
            staging.refuse(
                f"caption {_name(entry, 'id')}", "bad entry", f"expected `image_id` and a text `caption`, {got}"
            )
        else:
            staging.add_target(str(number), caption, begin)


def _caption(options: SourceOptions, number: str, captions: Iterable[Any]) -> dict[str, Any]:
    texts = [text for caption in captions if (text := _text(caption)) is not None]
    return {
        "id": number, "image_id": number, "instruction": options.caption_instruction(), "targets": texts,
    }  # fmt: skip


_KARPATHY = {"train": ("train", "restval")}
"""Karpathy's training set is both; other splits stand for themselves."""


def _karpathy(path: Path, options: SourceOptions, staging: Staging) -> None:
    wanted = _KARPATHY.get(options.split, (options.split,))
    seen: Counter[str] = Counter()
    for image in _objects(path, "images", staging):
        part = str(image.get("split"))
        seen[part] += 1
        if part not in wanted:
            continue
        name, folder = image.get("filename"), image.get("filepath")
        given = image.get("sentences")
        sentences = given if isinstance(given, list) else []
        captions = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
        if not isinstance(name, str):
            staging.refuse(_name(image, "imgid"), "bad entry", "an image without filename")
            continue
        if isinstance(folder, str) and not _exists(options, name):
            name = f"{folder}/{name}"
        staging.add(name, _caption(options, str(image.get("cocoid", Path(name).stem)), captions))
    if not any(seen[part] for part in wanted):
        raise InputError(f"--split: expected one of {', '.join(sorted(seen))}, got {options.split!r}: {path}")


def textcaps(options: SourceOptions, staging: Staging) -> None:
    """TextCaps (``TextCaps_0.1_train.json``): an entry for each caption in one `data`; a test file has none."""
    found = False
    for path in options.annotations:
        for number, entry in enumerate(_objects(path, "data", staging)):
            found = True
            image, caption = entry.get("image_id"), entry.get("caption_str")
            if not isinstance(image, int | str) or not isinstance(caption, str | None):
                staging.refuse(f"{path.name}: data[{number}]", "bad entry", "expected `image_id` and `caption_str`")
                continue
            name = str(image)
            captions = [] if caption is None else [caption]
            staging.add(_named(options.image_name or "{image_id}.jpg")(name), _caption(options, name, captions))
    if not found:
        raise InputError(f"{options.annotations[0]}: expected TextCaps with a list `data`, got none")


def folder(options: SourceOptions, staging: Staging) -> None:
    """Pictures with a `.txt` of the same name beside them: each line that isn't empty is a target."""
    assert options.images is not None
    pictures = [*_pictures(options.images)]
    sharing = Counter(os.path.splitext(name)[0] for name in pictures)
    for name in pictures:
        text = (options.images / name).with_suffix(".txt")
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            staging.refuse(name, "no text", f"expected {text.name} beside it")
            continue
        except (OSError, UnicodeDecodeError) as error:
            staging.refuse(name, "bad text", str(error))
            continue
        targets = [line.strip() for line in lines if line.strip()]
        key = os.path.splitext(name)[0]
        key = name if sharing[key] > 1 else key  # one text for `a.png` and `a.jpg`: two samples all the same
        staging.add(
            name, {"id": key, "image_id": key, "instruction": options.caption_instruction(), "targets": targets}
        )

    for name in _files(options.images, (".txt",)):
        if os.path.splitext(name)[0] not in sharing:
            staging.refuse(name, "no picture", "expected one of the same name beside it")


def _pictures(root: Path) -> Iterator[str]:
    return _files(root, PICTURES)


def _files(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Names relative to ``root``, in order."""
    for path, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            if file.lower().endswith(suffixes) and not file.startswith("."):
                yield os.path.relpath(os.path.join(path, file), root).replace(os.sep, "/")


# Questions ------------------------------------------------------------------------------------------------------------


def vqa(options: SourceOptions, staging: Staging) -> None:
    """VQA v2 and OK-VQA (questions and annotations), or VizWiz (one array with both). All ten answers are kept."""
    if options.questions is None:
        path = _only(options, "one VizWiz file, or --questions as well")
        if not is_json_array(path):
            raise InputError(f"--questions: expected the questions that belong to {path}, got none")
        _vizwiz(path, options, staging)
        return
    for path in options.annotations:
        found = False
        for entry in _objects(path, "annotations", staging):
            found = True
            if isinstance(entry, dict) and entry.get("question_id") is not None:
                staging.answer(str(entry["question_id"]), _answers(entry))
            else:
                staging.refuse("an annotation", "bad entry", "expected `question_id`")
        if not found:
            raise InputError(f"{path}: expected VQA annotations with a list `annotations`, got none")
    subtype = json_member(options.questions, "data_subtype")
    name_of, found = None, False
    for entry in _objects(options.questions, "questions", staging):
        found = True
        number, image, question = entry.get("question_id"), entry.get("image_id"), _text(entry.get("question"))
        if number is None or not isinstance(image, int | str) or question is None:
            staging.refuse(f"question {number}", "bad entry", "a question without question_id, image_id or question")
            continue
        name_of = name_of or _coco_names(options, str(subtype), image)
        sample = {"id": str(number), "image_id": str(image), "instruction": options.question_instruction(question)}
        staging.add(name_of(image), sample)
    if not found:
        raise InputError(f"{options.questions}: expected VQA questions with a list `questions`, got none")


def _answers(entry: dict[str, Any]) -> dict[str, Any]:
    """Target and answers of an annotation with answers by several people."""
    given = entry.get("answers")
    answers = [
        text
        for answer in (given if isinstance(given, list) else ())
        if (text := _text(answer.get("answer") if isinstance(answer, dict) else answer))
    ]
    target = _text(entry.get("multiple_choice_answer")) or (_most_common(answers) if answers else None)
    fields: dict[str, Any] = {"targets": [target] if target else []}
    if answers:
        fields["answers"] = answers
    if isinstance(entry.get("answer_type"), str):
        fields["kind"] = entry["answer_type"]
    return fields


def _vizwiz(path: Path, options: SourceOptions, staging: Staging) -> None:
    for number, entry in enumerate(json_items(path)):
        question = _text(entry.get("question")) if isinstance(entry, dict) else None
        if question is None or not isinstance(entry.get("image"), str):
            staging.refuse(f"entry {number}", "bad entry", "expected `image` and `question`")
            continue
        sample = {"id": Path(entry["image"]).stem, "instruction": options.question_instruction(question)}
        staging.add(entry["image"], sample | _answers(entry))


def _coco_names(options: SourceOptions, subtype: str, example: int | str) -> Callable[[int | str], str]:
    """How COCO's pictures are called here; the years differ, and so do folders."""
    if options.image_name is not None:
        return _named(options.image_name)
    patterns = [f"COCO_{subtype}_{{image_id:012d}}.jpg", "{image_id:012d}.jpg"]
    patterns += [f"{subtype}/{pattern}" for pattern in patterns] + ["{image_id}.jpg", "{image_id}.png"]
    for pattern in patterns:
        if not (isinstance(example, str) and "012d" in pattern) and _exists(options, _named(pattern)(example)):
            return _named(pattern)
    # None is there: refused one by one, under the name that the set's authors gave it.
    return _named(patterns[0] if isinstance(example, int) else "{image_id}.jpg")


def _named(pattern: str) -> Callable[[int | str], str]:
    def name(image_id: int | str) -> str:
        try:
            return pattern.format(image_id=image_id)
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(
                f"--image-name: expected a name with {{image_id}} or {{image_id:012d}}, got {pattern!r} for {image_id!r}"
            ) from error

    return name


def textvqa(options: SourceOptions, staging: Staging) -> None:
    """TextVQA (``TextVQA_0.5.1_train.json``) and DocVQA (``train_v1.0.json``): questions and answers in one `data`."""
    found = False
    for path in options.annotations:
        for entry in _objects(path, "data", staging):
            found = True
            number = entry.get("question_id", entry.get("questionId"))
            question, picture = _text(entry.get("question")), entry.get("image")
            if question is None or number is None:
                staging.refuse(f"question {number}", "bad entry", "a question without id or text")
                continue
            if not isinstance(picture, str):
                picture = _named(options.image_name or "{image_id}.jpg")(str(entry.get("image_id")))
            sample = {"id": str(number), "image_id": str(entry.get("image_id", Path(picture).stem)),
                      "instruction": options.question_instruction(question), **_answers(entry)}  # fmt: skip
            kinds = entry.get("question_types")
            if isinstance(kinds, list) and kinds:
                sample["kind"] = str(kinds[0])
            staging.add(picture, sample)
    if not found:
        raise InputError(f"{options.annotations[0]}: expected TextVQA or DocVQA with a list `data`, got none")


def gqa(options: SourceOptions, staging: Staging) -> None:
    """GQA (``train_balanced_questions.json``): an object of questions by id."""
    for path in options.annotations:
        if is_json_array(path):
            raise InputError(f"{path}: expected GQA, an object of questions by id, got a list")
        for number, entry in json_members(path):
            question = _text(entry.get("question")) if isinstance(entry, dict) else None
            if question is None or "imageId" not in entry:
                staging.refuse(f"question {number}", "bad entry", "expected `question` and `imageId`")
                continue
            sample = {"id": number, "image_id": str(entry["imageId"]),
                      "instruction": options.question_instruction(question)}  # fmt: skip
            answer, kinds = _text(entry.get("answer")), entry.get("types")
            sample["targets"] = [answer] if answer else []  # type: ignore[assignment]
            if isinstance(kinds, dict) and isinstance(kinds.get("structural"), str):
                sample["kind"] = kinds["structural"]
            staging.add(_named(options.image_name or "{image_id}.jpg")(str(entry["imageId"])), sample)


def chartqa(options: SourceOptions, staging: Staging) -> None:
    """ChartQA (``test_human.json``): a list of questions. One without an id is named by its place in the files, from 0."""
    number = 0
    for path in options.annotations:
        if not is_json_array(path):
            raise InputError(f"{path}: expected ChartQA, a list of questions with `query`, got an object")
        for entry in json_items(path):
            place, number = str(number), number + 1
            question = _text(entry.get("query")) if isinstance(entry, dict) else None
            if question is None or not isinstance(entry.get("imgname"), str):
                staging.refuse(f"question {place}", "bad entry", "expected `imgname` and `query`")
                continue
            answer = _text(entry.get("label"))
            staging.add(entry["imgname"], {
                "id": str(entry.get("question_id", entry.get("id", place))), "image_id": entry["imgname"],
                "instruction": options.question_instruction(question), "targets": [answer] if answer else [],
            })  # fmt: skip


def scienceqa(options: SourceOptions, staging: Staging) -> None:
    """ScienceQA (``problems.json``): choices are part of the instruction, the target is the letter; half have no image."""
    path, seen, chosen = _only(options, "problems.json"), Counter[str](), 0
    for number, entry in json_members(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("choices"), list):
            raise InputError(f"{path}: expected ScienceQA, an object of problems with `choices`, got {number!r}")
        seen[str(entry.get("split"))] += 1
        if entry.get("split") != options.split:
            continue
        chosen += 1
        choices, answer = [str(choice) for choice in entry["choices"]], entry.get("answer")
        question, hint = _text(entry.get("question")) or "", _text(entry.get("hint"))
        letters = [chr(ord("A") + n) for n in range(len(choices))]
        listed = " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
        text = "\n".join([question, *([f"Context: {hint}"] if hint else []), f"Options: {listed}"])
        target = [letters[answer]] if isinstance(answer, int) and 0 <= answer < len(choices) else []
        sample: dict[str, Any] = {
            "id": number, "image_id": number, "instruction": options.question_instruction(text),
            "targets": target,
        }  # fmt: skip
        if isinstance(entry.get("subject"), str):
            sample["kind"] = entry["subject"]
        if not isinstance(entry.get("image"), str):  # about half of them are about text only
            staging.add((), sample, number)
            continue
        name = f"{number}/{entry['image']}"
        staging.add(name if _exists(options, name) else f"{options.split}/{name}", sample)
    if not chosen:
        if not seen:
            raise InputError(f"{path}: expected ScienceQA, an object of problems by id, got none")
        raise InputError(f"--split: expected one of {', '.join(sorted(seen))}, got {options.split!r}: {path}")


def llava(options: SourceOptions, staging: Staging) -> None:
    """LLaVA conversations: a sample for each turn of the assistant, whose prefix is all that was said before it."""
    for path in options.annotations:
        if not is_json_array(path):
            raise InputError(f"{path}: expected LLaVA, a list of conversations, got none")
        for number, entry in enumerate(json_items(path)):
            _conversation(entry, number, staging)


def _conversation(entry: Any, number: int, staging: Staging) -> None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    name = str(entry.get("id", number)) if isinstance(entry, dict) else str(number)
    if not isinstance(turns, list) or not turns:
        staging.refuse(f"conversation {name}", "bad entry", "expected a list `conversations`")
        return
    images = _names(entry.get("image", []))
    if images is None:
        staging.refuse(
            f"conversation {name}", "bad image", f"expected a name or a list of names, got {entry['image']!r}"
        )
        return
    again = staging.times(name)
    if again:  # published files have several conversations of one id, about the same image
        name = f"{name}.{again}"
    said_so_far: list[str] = []  # user and assistant by turns
    for place, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        said = turn.get("value") if isinstance(turn, dict) else None
        if speaker not in ("human", "gpt", "system") or not isinstance(said, str):
            staging.refuse(f"conversation {name}", "bad turn", f"turn {place}: from {speaker!r}")
            return  # what follows would lack it
        users = len(said_so_far) % 2 == 0
        if speaker != "gpt":
            if users:
                said_so_far.append(said.strip())
            else:  # a system's turn, or a second one of the user's
                said_so_far[-1] = f"{said_so_far[-1]}\n{said.strip()}"
            continue
        if users:  # nobody asked
            said_so_far.append("")
        staging.add(images, {
            "id": f"{name}#{place}", "instruction": _placed(said_so_far, len(images)),
            "targets": [said.replace(IMAGE_MARK, "").strip()],
        }, name)  # fmt: skip
        said_so_far.append(said.replace(IMAGE_MARK, "").strip())


def _placed(turns: list[str], num_images: int) -> str | list[str]:
    """The turns with the marks of several images. A single one stands in front, as LLaVA trains, and so do images that
    the turns don't place, or not all of them."""
    if num_images < 2 or sum(turn.count(IMAGE_MARK) for turn in turns) != num_images:
        turns = [turn.replace(IMAGE_MARK, "").strip() for turn in turns]
    return turns[0] if len(turns) == 1 else list(turns)


def _names(value: Any) -> list[str] | None:
    """Names of images: one, or a list of them; None for anything else."""
    names = [value] if isinstance(value, str) else value
    return names if isinstance(names, list) and all(isinstance(name, str) and name for name in names) else None


# Tables ---------------------------------------------------------------------------------------------------------------


def jsonl(options: SourceOptions, staging: Staging) -> None:
    """JSON Lines: an object in each line."""
    for path in options.annotations:
        for number, line in enumerate(text_lines(path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                staging.refuse(f"{path.name}:{number}", "bad line", str(error))
                continue
            if isinstance(row, dict):
                _row(row, f"{path.name}:{number}", options, staging)
            else:
                staging.refuse(f"{path.name}:{number}", "bad line", f"expected an object, got {type(row).__name__}")


def csv_table(options: SourceOptions, staging: Staging) -> None:
    """CSV, or with tabs (`.tsv`), with the names of columns in its first line."""
    csv.field_size_limit(_MAX_FIELD)
    for path in options.annotations:
        reader = csv.DictReader(text_lines(path), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        _check_columns(path, reader.fieldnames or (), options.columns)
        try:
            for row in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in row or None in row.values():
                    staging.refuse(where, "bad line", f"expected {len(reader.fieldnames or ())} columns")
                else:
                    _row(dict(row), where, options, staging)
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: expected CSV, got {error}") from error


def _check_columns(path: Path, names: Iterable[str], columns: Columns) -> None:
    found = list(names)
    if columns.image not in found:
        raise InputError(
            f"{path}: expected a column {columns.image!r} (--image-column), got {', '.join(map(str, found)) or 'none'}"
        )


def _row(row: dict[str, Any], where: str, options: SourceOptions, staging: Staging) -> None:
    image = row.get(options.columns.image)
    images = None if image == "" else _names(image)
    if images is None:
        expected = "expected a path or a list of paths, an empty list for text only"
        staging.refuse(where, "no image", f"column {options.columns.image!r}: {expected}, got {_kind_of(image)}")
        return
    sample = _sample_of_row(row, options)
    if isinstance(sample, str):
        staging.refuse(where, "bad entry", sample)
    elif options.needs_target and not any(
        map(str.strip, sample.get("targets", ()))
    ):  # told here, where lines have numbers
        staging.refuse(where, "no target", f"column {options.columns.target!r}: expected text, got none")
    else:
        staging.add(images, sample, where)


def _sample_of_row(row: dict[str, Any], options: SourceOptions) -> dict[str, Any] | str:
    """A sample, or what is wrong with the row."""
    columns = options.columns
    own = row.get(columns.instruction)
    if own is None and "{question}" in (options.instruction or ""):
        return f"column {columns.instruction!r}: expected text, for which --instruction has a place, got none"
    if own is None:
        instruction = options.caption_instruction()
    elif isinstance(own, str):
        instruction = options.question_instruction(own)
    else:
        return f"column {columns.instruction!r}: expected text, got {type(own).__name__}"
    sample: dict[str, Any] = {"instruction": instruction}
    for name, column in (("targets", columns.target), ("answers", columns.answers)):
        value = row.get(column)
        if isinstance(value, str) and name == "answers" and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError as error:
                return f"column {column!r}: expected a list, got {error}"
        texts = [value] if isinstance(value, str) else value
        if texts is None or texts == [""]:
            continue
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return f"column {column!r}: expected text or a list of texts, got {type(value).__name__}"
        sample[name] = texts
    for text in (instruction, *sample.get("targets", ()), *sample.get("answers", ())):
        if SURROGATE.search(text):
            return f"expected text in Unicode, got half of a surrogate pair in {text[:40]!a}"
    if "answers" in sample and "targets" not in sample and sample["answers"]:
        sample["targets"] = [_most_common(sample["answers"])]
    for name, column in (("id", columns.id), ("kind", columns.kind)):
        if row.get(column) not in (None, ""):
            sample[name] = str(row[column])
    return sample


def parquet(options: SourceOptions, staging: Staging) -> Iterator[SourceRecord]:
    """Parquet: as the other tables, or with the pictures inside (bytes, or Hugging Face's ``{bytes, path}``).

    Yields:
        Records of rows that hold their picture; those with a path go to the staging.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            "parquet: expected pyarrow, which is not installed: pip install 'mmprefix[parquet]'"
        ) from error
    column = options.columns.image
    for path in options.annotations:
        try:
            table = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{path}: expected Parquet, got {' '.join(str(error).split())[:200]}") from error
        _check_columns(path, table.schema_arrow.names, options.columns)
        kind = table.schema_arrow.field(column).type
        inside = not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))
        names = [name for name in vars(options.columns).values() if name in table.schema_arrow.names]
        # Without a column to read, rows could not be counted: the picture's own is read, for all its size.
        texts = [name for name in names if not (inside and name == column)] or [column]
        first = 0
        for group in range(table.num_row_groups):
            try:
                rows = (
                    table.read_row_group(group, texts).to_pylist()
                    if texts
                    else [{}] * table.metadata.row_group(group).num_rows
                )
            except (OSError, pyarrow.ArrowException) as error:
                raise InputError(f"{path}: row group {group}: {' '.join(str(error).split())[:200]}") from error
            for number, row in enumerate(rows):
                where = f"{path.name}:{first + number}"
                if not inside:
                    _row(row, where, options, staging)
                    continue
                sample = _sample_of_row(row, options)
                if isinstance(sample, str):
                    staging.refuse(where, "bad entry", sample)
                else:
                    name = f"{path.stem}-{first + number}"
                    sample = {"id": name, "image_id": name, **sample}
                    yield SourceRecord((str(path),), where, json.dumps([sample]), (group, number), column)
            first += len(rows)


# All ------------------------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[SourceOptions, Staging], Any]] = {
    "coco": coco, "textcaps": textcaps, "vqa": vqa, "textvqa": textvqa, "gqa": gqa, "chartqa": chartqa,
    "scienceqa": scienceqa, "llava": llava, "jsonl": jsonl, "csv": csv_table, "parquet": parquet, "folder": folder,
}  # fmt: skip


def staged_records(images: Path, staging: Staging, require_image: bool = False) -> Iterator[SourceRecord]:
    """The records of everything that was staged.

    Args:
        images: folder; names that lead out of it are refused.
        staging: what was staged.
        require_image: whether records without an image are refused, too.
    """
    folder = str(images)  # `Path` takes longer for a name than all else here
    for names, called, samples in staging:
        outside = [name for name in names if os.path.isabs(name) or ".." in name.split(os.sep) or "\0" in name]
        if outside:
            staging.refuse(outside[0], "image outside of --images")
        elif require_image and not names:
            staging.refuse(called, "no image")
        else:
            yield SourceRecord(tuple([os.path.join(folder, name) for name in names]), called, samples)


def _exists(options: SourceOptions, name: str) -> bool:
    return options.images is not None and (options.images / name).is_file()


def _kind_of(value: Any) -> str:
    return (
        "none" if value is None else "an empty text" if value == "" else f"{type(value).__name__} {str(value)[:40]!r}"
    )


def _name(entry: Any, key: str) -> str:
    return str(entry.get(key)) if isinstance(entry, dict) else repr(entry)[:40]
