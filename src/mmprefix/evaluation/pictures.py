"""Pictures of predictions: images with question, answer and prediction, as one PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmprefix.evaluation.thumbnails import NO_PICTURE, SIDE
from mmprefix.vision import ImageTransform, as_picture

SHOWN_IMAGES = 4
"""Of a sample with several."""
_IMAGE_SIDE = 144
_CELL_WIDTH = 208
_LINE_HEIGHT = 15
_MARGIN = 10
_QUESTION_LINES, _ANSWER_LINES, _MAX_LINES = 3, 4, 16
_INK, _RIGHT, _WRONG = (30, 30, 30), (0, 120, 40), (190, 20, 20)


@dataclass(frozen=True)
class Answer:
    """One question on an image, what was expected, and what came; ``correct`` is None where nothing was expected, and
    ``score`` the metric and its value where there is more to say than right or wrong."""

    instruction: str
    reference: str
    prediction: str
    correct: bool | None
    score: str = ""


@dataclass(frozen=True)
class Cell:
    """One image with its answers."""

    title: str
    image: Image.Image
    answers: tuple[Answer, ...]


def to_image(pixels: Tensor, transform: ImageTransform) -> Image.Image:
    """uint8 ``[3, H, W]``, or float, normalised -> the RGB image that the encoder saw."""
    if pixels.dtype == torch.uint8:
        return as_picture(pixels.cpu())
    mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (transform.mean, transform.std))
    levels = ((pixels * std + mean).clamp(0, 1) * 255).round().byte()
    return as_picture(levels.cpu())


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Several images of a sample as one, RGB; an empty one for a sample without."""
    if len(images) == 1:
        return images[0]
    width, height = sum(i.width for i in images) + len(images) - 1, max((i.height for i in images), default=1)
    picture, left = Image.new("RGB", (max(1, width), height), "white"), 0
    for image in images:
        picture.paste(image, (left, 0))
        left += image.width + 1
    return picture


def as_stored(images: Sequence[Image.Image]) -> Image.Image | str:
    """The pictures of a sample as one for a page; the words that stand in its place where there are none."""
    if not images:
        return NO_PICTURE
    if len(images) > 1:
        images = [image.copy() for image in images[:SHOWN_IMAGES]]
        for image in images:
            image.thumbnail((SIDE, SIDE))
    return side_by_side(images)


def draw_cells(cells: Sequence[Cell], columns: int = 6) -> Image.Image:
    """The cells in rows; right predictions green, wrong ones red beside the expected answer."""
    font = ImageFont.load_default(size=12)
    texts = [_lines(cell) for cell in cells]
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    heights = [_IMAGE_SIDE + _LINE_HEIGHT * max(len(texts[i]) for i in row) + 2 * _MARGIN for row in rows]
    picture = Image.new("RGB", (_CELL_WIDTH * min(columns, max(1, len(cells))), max(1, sum(heights))), "white")
    draw = ImageDraw.Draw(picture)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = column * _CELL_WIDTH + _MARGIN
            picture.paste(_scaled(cells[index].image), (left, top + _MARGIN))
            for number, (line, colour) in enumerate(texts[index]):
                draw.text((left, top + _MARGIN + _IMAGE_SIDE + number * _LINE_HEIGHT), line, colour, font)
        top += height
    return picture


def _scaled(image: Image.Image) -> Image.Image:
    scale = _IMAGE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Tiny images stay made of pixels: blurring them would hide what the encoder saw.
    return image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)


def _lines(cell: Cell) -> list[tuple[str, tuple[int, int, int]]]:
    width = 30
    lines = [(cell.title, _INK)]
    for answer in cell.answers:
        # A long question must not push its answer out of the cell.
        question = textwrap.wrap(answer.instruction, width, max_lines=_QUESTION_LINES, placeholder=" ...")
        lines += [(line, _INK) for line in question]
        said = f"-> {answer.prediction or '(nothing)'}"
        if answer.correct is False:
            said += f"   (expected {answer.reference})"
        said_lines = textwrap.wrap(said, width, max_lines=_ANSWER_LINES, placeholder=" ...")
        said_lines += [answer.score] if answer.score else []
        lines += [(line, {True: _RIGHT, False: _WRONG, None: _INK}[answer.correct]) for line in said_lines]
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], ("...", _INK)]
    return lines
