"""A JSON document, read from front to back with little of it in memory: annotation files have gigabytes.

`JsonStream` stands at a place of the document; whoever uses it says what is to be read there. A value is parsed by the
standard library's C parser, and an array's objects a thousand at a time, which takes half the time of one by one. What
is no JSON by RFC 8259 (NaN among it) ends the reading: ValueError.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

_PIECE = 1 << 18
"""Bytes that are read at a time."""
_MAX_VALUE = 256 << 20
"""Characters of a value that is parsed in one piece: what is broken is not read to the end of the file."""
_BLANKS = re.compile(r"[ \t\n\r]*")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"expected a number, got {name}")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


class JsonStream:
    """A document, and a place in it."""

    def __init__(self, file: BinaryIO) -> None:
        """Begins in front of the document's value.

        Args:
            file: open for reading; UTF-8, with or without a mark of it at the beginning.
        """
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._before = 0  # characters of the document in front of `_text`

    def _read(self, size: int) -> bool:
        """Forgets what was read; reads on behind the rest. False at the end of the file."""
        more = self._file.read(size)
        text = self._decoder.decode(more, final=not more)
        self._before += self._at
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(more)

    def _fail(self, expected: str) -> NoReturn:
        got = repr(self._text[self._at : self._at + 20]) if self._text[self._at :] else "the end of the file"
        raise ValueError(f"character {self._before + self._at}: expected {expected}, got {got}")

    def peek(self) -> str:
        """The next character that isn't blank, which says what comes; "" at the end of the file."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # it always matches
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(_PIECE):
                return ""

    def _pass(self, characters: str, expected: str) -> str:
        """Passes one of these characters."""
        found = self.peek()
        if not found or found not in characters:
            self._fail(expected)
        self._at += 1
        return found

    def value(self) -> Any:
        """The value that comes, whatever it is, as a whole."""
        self.peek()
        size = _PIECE
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text):  # otherwise it may be a number's first half
                    self._at = end
                    return value
                problem: ValueError | None = None
            except ValueError as error:
                problem = error
            size *= 2
            if len(self._text) - self._at > _MAX_VALUE or not self._read(size):
                if problem is None:
                    self._at = end
                    return value
                if isinstance(problem, json.JSONDecodeError):
                    self._at = problem.pos
                    self._fail(f"JSON ({problem.msg})")
                raise problem

    def elements(self) -> Iterator[list[Any]]:
        """The elements of the array that comes, in order, some at a time."""
        self._pass("[", "an array")
        if self.peek() == "]":
            self._at += 1
            return
        flat = True
        while True:
            block = self._objects() if flat else []
            flat = bool(block)  # of objects with objects inside, the last brace is rarely an element's
            yield block or [self.value()]
            if self._pass(",]", "',' or ']' behind an element") == "]":
                return

    def _objects(self) -> list[Any]:
        """All elements up to the last brace that was read, or to the array's end; none if that brace closes no element.

        What stands in front of a brace parses as elements of an array only if the brace closes one of them.
        """
        if len(self._text) - self._at < _PIECE // 2:
            self._read(_PIECE)
        brace = self._text.rfind("}", self._at) + 1
        try:
            block: list[Any]
            block, end = _DECODER.raw_decode(f"[{self._text[self._at : brace]}]")
        except ValueError:
            return []
        self._at += end - 2  # in front of a bracket, the array's own or the one that was added
        return block

    def members(self) -> Iterator[str]:
        """Names of the members of the object that comes; each time, the caller reads the value."""
        self._pass("{", "an object")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                self._fail("a name")
            name = self.value()
            self._pass(":", "':' behind a name")
            yield name
            if self._pass(",}", "',' or '}' behind a value") == "}":
                return

    def skip(self) -> None:
        """Passes the value that comes."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def end(self) -> None:
        """Makes sure that nothing but blanks is left."""
        if self.peek():
            self._fail("the end of the file")
