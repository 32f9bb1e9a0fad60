"""Captions -> tokens, as COCO's caption evaluation makes them before anything is scored.

The official step is Stanford's Penn Treebank tokenizer (CoreNLP 3.4.1, a Java program), lower case, one caption a line;
then a fixed list of punctuation is dropped. Scores depend on it, so
every result says which one made its tokens: `OFFICIAL`, or `PYTHON` for `mmprefix.metrics.treebank`, which gives the
same tokens on ordinary captions and needs no Java.

What breaks lines is replaced by a space before either: the official wrapper cleans only the line feed, and each of the
others shifts all later captions to the wrong image.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import mmprefix.metrics.java as java
from mmprefix.errors import InputError
from mmprefix.metrics.treebank import split_captions

Tokenizer = Literal["auto", "official", "python"]
OFFICIAL: Final = "tokenizer=official"
PYTHON: Final = "tokenizer=python, not official"

JAR: Final = "tokenizer/stanford-corenlp-3.4.1.jar"
TIMEOUT: Final = 3600.0
"""Seconds for a whole corpus; 30,000 captions take about four."""

# The list is the official one, with its bracket names in upper case: they are compared after lower-casing, so brackets
# are never dropped.
DROPPED: Final = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_LINE_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")
# Halves of a character, which JSON can hold and UTF-8 cannot.
_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_CLEANED = _LINE_BREAKS | _SURROGATES


@dataclass(frozen=True)
class Tokenized:
    """Tokens of captions.

    Attributes:
        captions: for each its tokens, lower case, joined by single spaces; empty where nothing is left.
        label: `OFFICIAL` or `PYTHON`.
        reason: why it is not the official tokenizer, though that was welcome; empty otherwise.
    """

    captions: tuple[str, ...]
    label: str
    reason: str = ""


def tokenize(captions: Sequence[str], tokenizer: Tokenizer = "auto", timeout: float = TIMEOUT) -> Tokenized:
    """Tokens of each caption, punctuation dropped.

    Args:
        captions: all of a corpus: starting Java takes a second.
        tokenizer: ``auto`` is ``official`` where Java and the extra are there, else ``python``.
        timeout: seconds for the official one.

    Raises:
        InputError: the official tokenizer was asked for and cannot be run, or something is not a string.
    """
    if tokenizer not in ("auto", "official", "python"):
        raise InputError(f"tokenizer: expected auto, official or python, got {tokenizer!r}")
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise InputError(f"caption {position}: expected a string, got {type(caption).__name__}: {caption!r:.80}")
    lines = [clean(caption) for caption in captions]
    reason = ""
    if tokenizer != "python":
        try:
            return Tokenized(tuple(map(drop_punctuation, official_lines(lines, timeout))), OFFICIAL)
        except java.JavaUnavailableError as error:
            if tokenizer == "official":
                raise InputError(f"tokenizer=official: {error}") from None
            reason = str(error)
    return Tokenized(tuple(drop_punctuation(" ".join(tokens)) for tokens in split_captions(lines)), PYTHON, reason)


def clean(caption: str) -> str:
    """The caption on one line, and such that UTF-8 can hold it."""
    return caption if caption.isascii() and caption.isprintable() else caption.translate(_CLEANED)


def drop_punctuation(line: str) -> str:
    """A line of tokens without the official list's."""
    return " ".join([token for token in line.rstrip().split(" ") if token not in DROPPED])


def official_lines(lines: Sequence[str], timeout: float = TIMEOUT) -> list[str]:
    """What Stanford's tokenizer makes of each of ``lines`` (cleaned), punctuation still there.

    Raises:
        JavaUnavailableError: it cannot be run, or gave another number of lines.
    """
    if not lines:
        return []
    program = java.jar(JAR)
    with tempfile.TemporaryDirectory(prefix="mmprefix-") as folder:
        corpus = Path(folder) / "captions.txt"
        # As the official wrapper writes it, no line feed at the end: the tokenizer looks at what follows a period.
        corpus.write_bytes("\n".join(lines).encode())
        printed = java.run(
            ["-cp", program, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", corpus],
            Path(folder),
            timeout,
        )
    found = printed.removesuffix("\n").split("\n")
    # It prints no line feed behind the last line where that has no tokens; of several such lines some may be missing.
    silent = next((n for n, line in enumerate(reversed(lines)) if any(map(str.isalnum, line))), len(lines))
    if len(lines) - silent <= len(found) < len(lines):
        found += [""] * (len(lines) - len(found))
    if len(found) > len(lines) and not any(found[len(lines) :]):
        del found[len(lines) :]
    if len(found) != len(lines):
        raise java.JavaUnavailableError(f"{program.name} gave {len(found)} lines for {len(lines)} captions")
    return found
