"""Pictures inside a page: encoded once each, as many as a budget of bytes holds, the most telling first."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
from PIL import Image

SIDE = 224
"""Pixels of a thumbnail's longer side."""
_SMALL = 64
_QUALITY = 72
MIB = 1 << 20

NO_PICTURE, NOT_FOUND, NO_ROOM = "no picture", "picture not found", "picture left out to keep this page small"
Picture = Callable[[int], "Image.Image | str"]
"""Row -> its picture, or why there is none, in a few words."""


def encode(image: Image.Image) -> str:
    """A picture as a data URI: WebP of at most `SIDE` pixels, or without loss where it is tiny (digits, icons)."""
    small = max(image.size) <= _SMALL
    image = image.convert("RGB")
    if not small:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    buffer = io.BytesIO()
    # method: of 0 to 6; 2 takes a third of the time of the default for a few percent more bytes.
    image.save(buffer, "WEBP", lossless=small, quality=_QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def telling_first(scores: np.ndarray, change: np.ndarray | None = None) -> Iterator[int]:
    """Rows by turns from the worst, the best and, where two runs are compared, the most changed; each once.

    Args:
        scores: float ``[rows]``; NaN comes last.
        change: float ``[rows]``, by how much another run differs.
    """
    order = np.argsort(scores, kind="stable")  # NaN last
    known = order[: int(np.isfinite(scores).sum())]
    best = np.argsort(-scores[known], kind="stable")
    lists = [order, known[best]]
    if change is not None:
        lists.append(np.argsort(-np.abs(change), kind="stable"))
    seen: set[int] = set()
    for turn in zip_longest(*(numbers.tolist() for numbers in lists)):
        for row in turn:
            if row is not None and row not in seen:
                seen.add(row)
                yield row


def embed(rows: Iterable[int], image_of: Sequence[int], num_images: int, picture: Picture, budget: int) -> list[str]:
    """The pictures of a page: of each a data URI, or why it is not there.

    Pictures are read and encoded one at a time, in the order of ``rows``, until the next would not fit.

    Args:
        rows: which are wanted, the most telling first.
        image_of: the picture of each row, numbered.
        num_images: how many there are.
        picture: reads one.
        budget: bytes that all data URIs may have together.
    """
    found: list[str | None] = [None] * num_images
    left = budget
    for row in rows:
        if found[image_of[row]] is not None:
            continue
        read = picture(row)
        if isinstance(read, Image.Image):
            uri = encode(read)
            if len(uri) > left:
                break
            left -= len(uri)
            found[image_of[row]] = uri
        else:
            found[image_of[row]] = read
    return [NO_ROOM if one is None else one for one in found]
