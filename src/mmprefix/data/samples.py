"""One record of a shard -> samples: what the JSON beside an image may hold, and what is refused.

`docs/data_format.md` is the specification for users; this module is where it is enforced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmprefix.errors import InputError
from mmprefix.instructions import as_turns, check_marks

FIELDS = ("instruction", "target", "targets", "answers", "images", "id", "image_id", "kind")
MAX_IMAGES = 1024
"""Of a record."""
MAX_IMAGE_BYTES = 256 << 20
MAX_JSON_BYTES = 64 << 20
"""Larger members are refused unread: a shard may come from strangers."""

SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Sample:
    """One instruction on the images of its record.

    Attributes:
        id: unique in its split; by default the record's key.
        image_id: by default the record's key.
        kind: group for which metrics are reported separately.
        turns: texts of the prefix: the instruction alone, or what user and assistant said by turns, the user last.
        targets: texts to learn; empty only where none is needed (`predict`).
        answers: accepted answers for evaluation; by default the targets.
        images: how many images the record has.
    """

    id: str
    image_id: str
    kind: str
    turns: tuple[str, ...]
    targets: tuple[str, ...]
    answers: tuple[str, ...]
    images: int = 1

    @property
    def instruction(self) -> str:
        """All turns as one text."""
        return "\n".join(self.turns)


def parse_record(payload: bytes, key: str, shard: str, *, needs_target: bool = True) -> tuple[Sample, ...]:
    """The samples of one JSON member: an object is one sample, a list is several on the same image.

    Args:
        payload: content of ``KEY.json``.
        key: the record's key, for default ids and messages.
        shard: path of the shard, for messages.
        needs_target: whether a sample without target is refused.

    Raises:
        InputError: with shard, key, what was expected and what came.
    """
    where = f"{shard}: {key}.json"
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON, got {error}") from error
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise InputError(f"{where}: expected at least one sample, got an empty list")
    samples = []
    for number, entry in enumerate(entries):
        one = f"{where}[{number}]" if isinstance(content, list) else where
        if not isinstance(entry, dict):
            raise InputError(f"{one}: expected an object with {', '.join(FIELDS[:2])}, got {type(entry).__name__}")
        default_id = f"{key}#{number}" if isinstance(content, list) else key
        try:
            samples.append(_parse_sample(entry, key, default_id, needs_target))
        except InputError as error:
            raise InputError(f"{one}: {error}") from error
    return tuple(samples)


def _parse_sample(entry: Mapping[str, Any], key: str, default_id: str, needs_target: bool) -> Sample:
    turns, targets, answers, images = check_sample(entry, needs_target=needs_target)
    return Sample(
        id=str(entry.get("id", default_id)),
        image_id=str(entry.get("image_id", key)),
        kind=str(entry.get("kind", "all")),
        turns=tuple(turns),
        targets=tuple(targets),
        answers=tuple(answers),
        images=images,
    )


def check_sample(entry: Mapping[str, Any], *, needs_target: bool = True) -> tuple[list[str], list[str], list[str], int]:
    """Turns, targets, answers and number of images of a sample's JSON.

    Args:
        entry: the sample's fields.
        needs_target: whether a sample without target is refused.

    Raises:
        InputError: what was expected and what came.
    """
    instruction, images = entry.get("instruction"), entry.get("images", 1)
    turns: list[Any] = instruction if isinstance(instruction, list) else [instruction]
    if not turns or not _are_texts(turns):
        raise InputError(f"expected a string `instruction`, or a list of turns, got {_shown(instruction)}")
    if type(images) is not int or not 0 <= images <= MAX_IMAGES:
        raise InputError(f"expected a number of `images` from 0 to {MAX_IMAGES}, got {_shown(images)}")
    check_marks(as_turns(turns), images)
    if "target" in entry and "targets" in entry:
        raise InputError("expected one of `target` and `targets`, got both")
    targets = entry.get("targets", [entry["target"]] if "target" in entry else [])
    if not isinstance(targets, list) or not _are_texts(targets):
        raise InputError(f"expected a string `target` or a list of strings `targets`, got {_shown(targets)}")
    if needs_target and not targets:
        raise InputError(f"expected a `target` or `targets`, got neither (fields: {', '.join(entry) or 'none'})")
    if not all(map(str.strip, targets)):
        raise InputError("expected a target with text, got an empty one")
    answers = entry.get("answers", targets)
    if not isinstance(answers, list) or not _are_texts(answers):
        raise InputError(f"expected a list of strings `answers`, got {_shown(answers)}")
    for text in (*turns, *targets, *answers):
        if not text.isascii() and SURROGATE.search(text):
            raise InputError(f"expected text in Unicode, got half of a surrogate pair in {text[:40]!a}")
    if "answers" in entry and not answers:
        raise InputError("expected at least one of `answers`, got an empty list")
    return turns, targets, answers, images


def _are_texts(values: list[Any]) -> bool:
    return set(map(type, values)) <= {str}  # as JSON has them: no subclasses


def _shown(value: Any) -> str:
    return "none" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
