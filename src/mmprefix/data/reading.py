"""JSON and text files as streams: files of annotations are larger than what is needed of them.

Every error is an `InputError` that names the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ijson

from mmprefix.errors import InputError


def json_items(path: Path, prefix: str) -> Iterator[Any]:
    """Elements of a JSON array, one after the other; nothing where the file has no such array.

    Args:
        path: a JSON file.
        prefix: ``annotations.item``, ``item`` for an array that is the file.
    """
    yield from _streamed(path, lambda file: ijson.items(file, prefix, use_float=True))


def json_members(path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Members of a JSON object."""
    yield from _streamed(path, lambda file: ijson.kvitems(file, prefix, use_float=True))


def is_json_array(path: Path) -> bool:
    """Whether the file begins as an array."""
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a text file in UTF-8, with what ends them."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, got {error}") from error


def _streamed(path: Path, read: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield from read(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {' '.join(str(error).split())[:200]}") from error
