"""JSON and text files as streams: files of annotations are larger than what is needed of them.

Every error is an `InputError` that names the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmprefix.data.json_stream import JsonStream
from mmprefix.errors import InputError


def json_lists(path: Path, *names: str) -> Iterator[tuple[str, list[Any]]]:
    """Elements of the arrays that are members of a JSON object with these names, some at a time, as the file has them;
    nothing where it has none, or is no object."""
    with _opened(path) as document:
        if document.peek() != "{":
            document.skip()
        else:
            for name in document.members():
                if name in names and document.peek() == "[":
                    for block in document.elements():
                        yield name, block
                else:
                    document.skip()
        document.end()


def json_items(path: Path) -> Iterator[Any]:
    """Elements of a file that is a JSON array, one after the other; nothing where it is something else."""
    with _opened(path) as document:
        if document.peek() == "[":
            for block in document.elements():
                yield from block
        else:
            document.skip()
        document.end()


def json_members(path: Path) -> Iterator[tuple[str, Any]]:
    """Members of a file that is a JSON object; nothing where it is something else."""
    with _opened(path) as document:
        if document.peek() == "{":
            for name in document.members():
                yield name, document.value()
        else:
            document.skip()
        document.end()


def json_member(path: Path, name: str) -> Any:
    """The value of a member of a file that is a JSON object; "" where there is none."""
    with _opened(path) as document:
        for found in document.members() if document.peek() == "{" else ():
            if found == name:
                return document.value()
            document.skip()
    return ""


def json_names(path: Path) -> Iterator[str]:
    """Names of the members of a file that is a JSON object."""
    with _opened(path) as document:
        for name in document.members() if document.peek() == "{" else ():
            yield name
            document.skip()


@contextmanager
def _opened(path: Path) -> Iterator[JsonStream]:
    """The document in a file. What can't be read, or isn't JSON, is an `InputError`."""
    try:
        with path.open("rb") as file:
            yield JsonStream(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, among others
        raise InputError(f"{path}: expected JSON, got {' '.join(str(error).split())[:200]}") from error


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
