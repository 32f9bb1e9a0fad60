"""Charts as Pillow images: matrices over tokens, maps over pictures, bars. It knows arrays and texts, no model.

One sequential colour map throughout, dark to bright, whose lightness grows evenly, so that it reads the same in grey;
what a mask hides is white paper. Colours stand for the square root of a value: attention is a few large shares and very
many small ones, which would all look like nothing. Fonts are Pillow's own, which knows little beyond ASCII; other
text is drawn in a font of the system, if there is one, else as boxes.

Shapes: T tokens, V views of a sample's images, R x C patches of a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# Ten points of viridis (Smith and van der Walt 2015, CC0).
_MAP = np.array([
    (68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
    (110, 206, 88), (181, 222, 43), (253, 231, 37),
])  # fmt: skip
_INK, _PALE, _PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)
_BOUNDARY = (213, 94, 0)
REGION_COLOURS: dict[str, Colour] = {"image": (0, 84, 148), "instruction": (232, 172, 40), "target": (0, 158, 115)}
"""By `Region`, in its order; apart in grey and for all kinds of colour vision (after Okabe and Ito 2008)."""

_OTHER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")
_MARGIN, _GAP, _STRIP = 14, 6, 8
_TITLE, _TEXT = 16, 12
_LABEL_WIDTH = 96
_LABELLED = 13  # pixels of a token that a label fits into
_TEXT_ROOM, _IMAGE_ROOM = 640, 512
_SIDES = {1: 168, 2: 152, 4: 112}  # of a view, by how many stand in a cell
_SMALL_SIDE, _MAX_SIDES = 88, 4  # in pixels; longer pictures are squeezed, or their patches would be lines
_PAGE = (1240, 2400)
_RELIEF = 0.3
_BAR, _ROW, _ROWS, _BANDS = 130, 17, 40, 4
_VALUE = 64  # pixels of a loss in figures


# Text


@cache
def _font(size: int, ascii_only: bool = True) -> Any:
    for name in () if ascii_only else _OTHER_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def printable(text: str) -> str:
    """One line in which all is seen: spaces as dots, what can't be printed escaped."""
    return "".join(
        "·" if c == " " else c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text
    )


def _size(text: str, size: int) -> int:
    return math.ceil(_font(size, text.isascii()).getlength(text))


def shorten(text: str, width: float, size: int = _TEXT) -> str:
    """The text, or as much of its beginning as fits into ``width`` pixels, and dots."""
    if _size(text, size) <= width:
        return text
    kept = min(len(text), int(width))  # no letter is less than a pixel wide
    while kept and _size(text[:kept] + "...", size) > width:
        kept -= 1
    return text[:kept] + "..."


def _wrap(text: str, width: int, size: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and _size(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(shorten(word, width, size))
    return lines


def _write(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: Colour = _INK, size: int = _TEXT,
           anchor: str = "lm") -> None:  # fmt: skip
    draw.text(at, text, colour, _font(size, text.isascii()), anchor=anchor)


def _upright(text: str, colour: Colour = _INK, size: int = _TEXT) -> Image.Image:
    """Text that reads from bottom to top."""
    label = Image.new("RGB", (_size(text, size) + 1, size + 4), _PAPER)
    _write(ImageDraw.Draw(label), (0, label.height / 2), text, colour, size)
    return label.transpose(Image.Transpose.ROTATE_90)


# Colours


def colours(values: np.ndarray, peak: float) -> np.ndarray:
    """Values from 0 to ``peak`` -> uint8 ``[..., 3]``, by their square root."""
    shares = np.sqrt(np.clip(values / peak, 0.0, 1.0)) if peak > 0 else np.zeros_like(values)
    places = shares * (len(_MAP) - 1)
    points = np.arange(len(_MAP))
    return np.stack([np.interp(places, points, _MAP[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def percent(share: float) -> str:
    """A share of 1 in percent, with two digits that count."""
    return f"{100 * share:.2g}%" if share < 0.995 else "100%"


def _colour_bar(ends: tuple[str, str, str]) -> Image.Image:
    width, height = 180, 10
    bar = Image.new("RGB", (width + 80, height + 20), _PAPER)
    bar.paste(Image.fromarray(np.repeat(colours(np.linspace(0, 1, width)[None] ** 2, 1.0), height, 0)), (8, 0))
    draw = ImageDraw.Draw(bar)
    for text, x, anchor in zip(ends, (8, 8 + width / 2, 8 + width), ("lm", "mm", "mm"), strict=True):
        _write(draw, (x, height + 10), text, anchor=anchor)
    return bar


def _scale_of(peak: float) -> Image.Image:
    return _colour_bar(("0", percent(peak / 4), percent(peak)))


# Figures


def _figure(title: str, notes: Sequence[str], body: Image.Image, head: Sequence[Image.Image] = ()) -> Image.Image:
    """Title, lines of text, legends and a picture, one below the other."""
    width = max(body.width, 480)
    lines = [(line, _TITLE, _INK) for line in _wrap(title, width, _TITLE)]
    lines += [(line, _TEXT, _PALE) for note in notes for line in _wrap(note, width, _TEXT)]
    height = sum(size + 6 for _, size, _ in lines) + sum(part.height + _GAP for part in head)
    figure = Image.new("RGB", (width + 2 * _MARGIN, height + body.height + 2 * _MARGIN + _GAP), _PAPER)
    draw, top = ImageDraw.Draw(figure), _MARGIN
    for line, size, colour in lines:
        _write(draw, (_MARGIN, top + size / 2 + 1), line, colour, size)
        top += size + 6
    for part in head:
        figure.paste(part, (_MARGIN, top))
        top += part.height + _GAP
    figure.paste(body, (_MARGIN, top + _GAP))
    return figure


def _grid(parts: Sequence[Image.Image], columns: int, gap: int = 2 * _GAP) -> Image.Image:
    """Pictures of one size in rows."""
    width, height = parts[0].size
    rows = -(-len(parts) // columns)
    picture = Image.new("RGB", (min(columns, len(parts)) * (width + gap) - gap, rows * (height + gap) - gap), _PAPER)
    for number, part in enumerate(parts):
        picture.paste(part, (number % columns * (width + gap), number // columns * (height + gap)))
    return picture


# Matrices over tokens


@dataclass(frozen=True, eq=False)
class TokenAxis:
    """The tokens of a sample along a side of a matrix.

    Image tokens are many and text tokens are few, so each kind has a size of its own; where tokens outnumber pixels,
    neighbours of one region share a bin and are shown by their mean.

    Attributes:
        regions: names of regions, ``[T]``.
        labels: ``[T]``.
        boundary: the first target token.
        starts: int ``[bins]``, first token of each bin.
        pixels: int ``[bins]``, its size.
    """

    regions: tuple[str, ...]
    labels: tuple[str, ...]
    boundary: int
    starts: np.ndarray
    pixels: np.ndarray

    @classmethod
    def of(cls, regions: Sequence[str], labels: Sequence[str], boundary: int, scale: float = 1.0) -> TokenAxis:
        """Lays tokens out; ``scale`` is that of small matrices.

        Args:
            regions: keys of `REGION_COLOURS`, ``[T]``.
            labels: ``[T]``, drawn where they fit.
            boundary: the first target token.
            scale: 1 for a matrix of its own.
        """
        images = sum(region == "image" for region in regions)
        sizes = {
            True: _bins(images, int(_IMAGE_ROOM * scale)),
            False: _bins(len(regions) - images, int(_TEXT_ROOM * scale)),
        }
        starts, pixels, start = [], [], 0
        for stop in [*(i for i in range(1, len(regions)) if regions[i] != regions[i - 1]), len(regions)]:
            tokens, size = sizes[regions[start] == "image"]
            bins = list(range(start, stop, tokens))
            starts += bins
            pixels += [size] * len(bins)
            start = stop
        return cls(tuple(regions), tuple(labels), boundary, np.array(starts), np.array(pixels))

    @property
    def length(self) -> int:
        """In pixels."""
        return int(self.pixels.sum())

    @property
    def shares_bins(self) -> bool:
        """Whether a bin holds more than one token."""
        return len(self.starts) < len(self.regions)

    def pixel(self, token: int) -> int:
        """Where a token begins."""
        return int(self.pixels[: np.searchsorted(self.starts, token)].sum())

    def binned(self, values: np.ndarray, along: int) -> np.ndarray:
        """Means over the tokens of each bin."""
        counts = np.diff(np.append(self.starts, len(self.regions)))
        shape = [1] * values.ndim
        shape[along] = len(counts)
        return np.add.reduceat(values, self.starts, along) / counts.reshape(shape)

    def painted(self, cells: np.ndarray) -> np.ndarray:
        """Colours of all pairs of bins, ``[bins, bins, 3]`` -> of pixels."""
        return np.repeat(np.repeat(cells, self.pixels, 0), self.pixels, 1)

    def runs(self) -> list[tuple[str, int, int]]:
        """``(region, first token, behind the last)`` of neighbours of one region."""
        changes = [0, *(i for i in range(1, len(self.regions)) if self.regions[i] != self.regions[i - 1])]
        return [
            (self.regions[start], start, stop) for start, stop in zip(changes, [*changes[1:], len(self.regions)], strict=True)
        ]  # fmt: skip

    def marks(self) -> list[tuple[float, str]]:
        """``(pixel, text)``: labels where they fit, else numbers of tokens, far enough apart."""
        marks: list[tuple[float, str]] = []
        for region, start, stop in self.runs():
            where = int(np.searchsorted(self.starts, start))
            if region != "image" and self.pixels[where] >= _LABELLED:
                marks += [(self.pixel(i) + self.pixels[where] / 2, self.labels[i]) for i in range(start, stop)]
                continue
            # In a run without labels: its first token and every 10th, 20th, 50th ... that is 40 pixels from the one before.
            shown = self.pixel(start) + _LABELLED / 2
            marks.append((shown, str(start)))
            step = next(n * 10**e for e in range(1, 9) for n in (1, 2, 5) if n * 10**e * self._per_token(where) >= 40)
            for i in range(start - start % step + step, stop, step):
                here = self.pixel(i)
                if here - shown >= 20 and here + _LABELLED / 2 <= self.pixel(stop):
                    marks.append((here, str(i)))
        apart: list[tuple[float, str]] = []
        for at, text in marks:
            if (not apart or at - apart[-1][0] >= _LABELLED - 1) and at + _LABELLED / 2 <= self.length:
                apart.append((at, text))
        return apart

    def _per_token(self, where: int) -> float:
        """Pixels of one of the tokens of a bin."""
        behind = self.starts[where + 1] if where + 1 < len(self.starts) else len(self.regions)
        return float(self.pixels[where] / max(1, behind - self.starts[where]))


def _bins(tokens: int, room: int) -> tuple[int, int]:
    """Tokens of a bin, and its pixels."""
    room = max(room, 8)
    return (-(-tokens // room), 1) if tokens > room else (1, min(16, room // max(1, tokens)))


def _matrix(pixels: np.ndarray, axis: TokenAxis, labelled: bool) -> Image.Image:
    """A matrix with strips of regions along its sides, the prefix boundary, and labels if asked for."""
    marks = axis.marks() if labelled else []
    marks = [(at, shorten(text, _LABEL_WIDTH)) for at, text in marks]
    room = max((_size(text, _TEXT) for _, text in marks), default=0) + (_GAP if marks else 0)
    origin, length = room + _STRIP + 2, axis.length
    picture = Image.new("RGB", (origin + length + 6, origin + length + 6), _PAPER)
    picture.paste(Image.fromarray(pixels), (origin, origin))
    draw = ImageDraw.Draw(picture)
    for region, start, stop in axis.runs():
        first, last = origin + axis.pixel(start), origin + axis.pixel(stop) - 1
        colour = REGION_COLOURS[region]
        draw.rectangle((room, first, room + _STRIP - 1, last), colour)
        draw.rectangle((first, room, last, room + _STRIP - 1), colour)
    draw.rectangle((origin - 1, origin - 1, origin + length, origin + length), outline=_PALE)
    at, end = origin + axis.pixel(axis.boundary), origin + length + 5
    draw.line((room, at, end, at), _BOUNDARY, 2)
    draw.line((at, room, at, end), _BOUNDARY, 2)
    for place, text in marks:
        _write(draw, (room - _GAP, origin + place), text, anchor="rm")
        label = _upright(text)
        picture.paste(label, (round(origin + place - label.width / 2), room - _GAP - label.height))
    return picture


def _legend(axis: TokenAxis) -> Image.Image:
    """Regions with their sizes, and the line between prefix and target."""
    entries: list[tuple[str, Colour | None]] = []
    for name, of_region in REGION_COLOURS.items():
        if count := axis.regions.count(name):
            entries.append((f"{name} ({count})", of_region))
    entries.append(("prefix boundary", None))
    widths = [20 + _size(text, _TEXT) + 18 for text, _ in entries]
    legend = Image.new("RGB", (sum(widths), 16), _PAPER)
    draw, left = ImageDraw.Draw(legend), 0
    for (text, shown), width in zip(entries, widths, strict=True):
        if shown is None:
            draw.line((left, 8, left + 14, 8), _BOUNDARY, 2)
        else:
            draw.rectangle((left + 1, 2, left + 13, 14), shown)
        _write(draw, (left + 20, 8), text)
        left += width
    return legend


_BINNED = "Neighbouring tokens share a pixel, which is their mean."


def mask_chart(visible: np.ndarray, axis: TokenAxis, title: str, notes: Sequence[str] = ()) -> Image.Image:
    """Who sees whom: bool ``[T, T]``, queries by keys; a key that is seen has the colour of its region."""
    shares = axis.binned(axis.binned(visible.astype(np.float64), 0), 1)[..., None]
    keys = np.array([REGION_COLOURS[axis.regions[start]] for start in axis.starts], float)[None]
    pixels = axis.painted((255 + shares * (keys - 255)).round().astype(np.uint8))
    smallest = int(axis.pixels.min())
    if smallest >= 6:  # lines between tokens that are large enough to have some
        edges = np.cumsum(axis.pixels)[:-1]
        pixels[edges - 1], pixels[:, edges - 1] = 225, 225
    more = [_BINNED] if axis.shares_bins else []
    return _figure(title, [*notes, *more], _matrix(pixels, axis, labelled=True), [_legend(axis)])


def _heat(attention: np.ndarray, visible: np.ndarray, axis: TokenAxis, peak: float) -> np.ndarray:
    means = axis.binned(axis.binned(attention, 0), 1)
    seen = axis.binned(axis.binned(visible.astype(np.float64), 0), 1) > 0
    return axis.painted(np.where(seen[..., None], colours(means, peak), np.uint8(255)))


def attention_chart(
    attention: np.ndarray, visible: np.ndarray, axis: TokenAxis, title: str, notes: Sequence[str] = ()
) -> Image.Image:
    """Attention ``[T, T]`` of one layer, queries by keys; what ``visible`` hides is white."""
    peak = float(axis.binned(axis.binned(attention, 0), 1).max())
    more = [_BINNED] if axis.shares_bins else []
    body = _matrix(_heat(attention, visible, axis, peak), axis, labelled=True)
    return _figure(title, [*notes, *more], body, [_legend(axis), _scale_of(peak)])


def heads_chart(
    heads: np.ndarray, visible: np.ndarray, axis: TokenAxis, title: str, notes: Sequence[str] = ()
) -> Image.Image:
    """Attention ``[H, T, T]`` of the heads of one layer, on one scale; ``axis`` is a small one."""
    peak = max(float(axis.binned(axis.binned(head, 0), 1).max()) for head in heads)
    parts = []
    for number, head in enumerate(heads):
        matrix = _matrix(_heat(head, visible, axis, peak), axis, labelled=False)
        part = Image.new("RGB", (matrix.width, matrix.height + 18), _PAPER)
        part.paste(matrix, (0, 18))
        _write(ImageDraw.Draw(part), (_STRIP + 2, 9), f"head {number}")
        parts.append(part)
    columns = max(1, min(len(parts), 8, _PAGE[0] // parts[0].width))
    more = [_BINNED] if axis.shares_bins else []
    return _figure(title, [*notes, *more], _grid(parts, columns), [_legend(axis), _scale_of(peak)])


# Maps over pictures


@dataclass(frozen=True, eq=False)
class WordMap:
    """What is laid over the pictures for one word.

    Attributes:
        text: the word.
        maps: float ``[V, R, C]``, attention to each patch, as a share of all that is attended to.
    """

    text: str
    maps: np.ndarray

    @property
    def caption(self) -> str:
        """In numbers."""
        return f"image {percent(float(self.maps.sum()))}, peak {percent(float(self.maps.max()))}"


def overlay(picture: Image.Image, attention: np.ndarray, peak: float) -> Image.Image:
    """Attention ``[R, C]`` over an RGB picture, which it covers whole: each patch is a block of one colour.

    The picture's lightness is laid on as a relief around its mean, so that a block's mean keeps the colour of the scale.
    """
    # Nearest: what lies between two patches was never computed.
    blocks = Image.fromarray(colours(attention, peak)).resize(picture.size, Image.Resampling.NEAREST)
    lightness = np.asarray(picture.convert("L"), np.float64)
    relief = _RELIEF * (lightness - lightness.mean())[..., None]
    return Image.fromarray(np.clip(np.asarray(blocks) + relief, 0, 255).round().astype(np.uint8))


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side ``side`` pixels long, and its shorter one at least a quarter of that."""
    scale = side / max(picture.size)
    width, height = (max(side // _MAX_SIDES, round(scale * length)) for length in picture.size)
    # Tiny pictures stay made of pixels: blurring them would hide what the encoder saw.
    return picture.resize((width, height), Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def word_charts(
    words: Sequence[WordMap], pictures: Sequence[Image.Image], title: str, notes: Sequence[str] = ()
) -> list[Image.Image]:
    """Attention of words over pictures, in pages; the pictures themselves come first on each.

    Args:
        words: with V maps each.
        pictures: V RGB pictures, each showing what the map of its number lies over.
        title, notes: above each page.
    """
    side = next((side for most, side in _SIDES.items() if len(pictures) <= most), _SMALL_SIDE)
    fitted = [_fitted(picture.convert("RGB"), side) for picture in pictures]
    box = (max(p.width for p in fitted), max(p.height for p in fitted))
    per_row = min(len(fitted), max(1, _PAGE[0] // (box[0] + 4)))

    def cell(text: str, caption: str, parts: Sequence[Image.Image]) -> Image.Image:
        placed = []
        for part in parts:
            placed.append(Image.new("RGB", box, _PAPER))
            placed[-1].paste(part, (0, 0))
        body = _grid(placed, per_row, 4)
        picture = Image.new("RGB", (max(body.width, 150), body.height + 38), _PAPER)
        draw = ImageDraw.Draw(picture)
        _write(draw, (0, 9), shorten(text, picture.width, 13), size=13)
        _write(draw, (0, 26), shorten(caption, picture.width), _PALE)
        picture.paste(body, (0, 36))
        return picture

    shown = f"{len(pictures)} views" if len(pictures) > 1 else "picture"
    first = cell(f"({shown})", "without attention", fitted)
    columns = max(1, (_PAGE[0] + 2 * _GAP) // (first.width + 2 * _GAP))
    room = max(1, columns * max(1, _PAGE[1] // (first.height + 2 * _GAP)) - 1)
    pages = []
    for start in range(0, len(words), room):
        cells = [first]
        for word in words[start : start + room]:
            peak = float(word.maps.max())
            parts = [overlay(picture, one, peak) for picture, one in zip(fitted, word.maps, strict=True)]
            cells.append(cell(printable(word.text) or "(white space)", word.caption, parts))
        name = title
        if len(words) > room:
            name += f", words {start + 1} to {min(len(words), start + room)} of {len(words)}"
        pages.append(_figure(name, notes, _grid(cells, columns), [_colour_bar(("0", "1/4 of", "the word's peak"))]))
    return pages


# Bars


def loss_chart(losses: np.ndarray, labels: Sequence[str], title: str, notes: Sequence[str] = ()) -> Image.Image:
    """The loss of each target token as a bar, in order, down and then to the right.

    Args:
        losses: ``[M]``, in nats.
        labels: ``[M]``.
        title, notes: above it.
    """
    finite = losses[np.isfinite(losses)]
    peak, mean = float(finite.max(initial=0.0)) or 1.0, float(losses.mean())
    labels = [shorten(label, _LABEL_WIDTH) for label in labels]
    number_width = _size(str(len(losses)), _TEXT) + _GAP
    label_width = max(_size(label, _TEXT) for label in labels) + _GAP
    left = number_width + label_width
    columns = []
    for start in range(0, len(losses), _ROWS):
        values = losses[start : start + _ROWS]
        rows = min(_ROWS, len(losses)) if len(losses) > _ROWS else len(values)
        column = Image.new("RGB", (left + _BAR + _VALUE, rows * _ROW + 4), _PAPER)
        draw = ImageDraw.Draw(column)
        for row, value in enumerate(values):
            middle = row * _ROW + _ROW / 2
            _write(draw, (number_width - _GAP, middle), str(start + row + 1), _PALE, anchor="rm")
            _write(draw, (left - _GAP, middle), labels[start + row], anchor="rm")
            length = _BAR * min(float(value), peak) / peak if value == value else 0.0
            if length >= 0.5:
                draw.rectangle((left, middle - 5, left + length, middle + 5), REGION_COLOURS["image"])
            _write(draw, (column.width - 1, middle), f"{value:#.3g}", anchor="rm")
        bottom = len(values) * _ROW
        draw.line((left - 1, 0, left - 1, bottom), _PALE)
        if math.isfinite(mean):
            at = left + _BAR * mean / peak
            for top in range(0, bottom, 6):  # dashed, so that bars are seen behind it
                draw.line((at, top, at, min(bottom, top + 3)), _BOUNDARY)
        columns.append(column)
    body = _grid(columns, _BANDS, 3 * _GAP)
    below = (-(-len(columns) // _BANDS) - 1) * _BANDS * _ROWS  # losses above the last band, which may be short
    unused = _ROWS - min(_ROWS, len(losses) - below) if below else 0
    body = body.crop((0, 0, body.width, body.height - unused * _ROW))
    return _figure(title, notes, body, [_mean_key(mean, len(losses))])


def _mean_key(mean: float, count: int) -> Image.Image:
    text = f"mean {mean:#.3g} nats over {count} token{'s' if count > 1 else ''}"
    key = Image.new("RGB", (24 + _size(text, _TEXT), 16), _PAPER)
    draw = ImageDraw.Draw(key)
    for left in range(0, 16, 6):
        draw.line((left, 8, left + 3, 8), _BOUNDARY, 2)
    _write(draw, (22, 8), text)
    return key
