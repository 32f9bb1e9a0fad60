"""What the header of an ordinary JPEG or PNG says, read without Pillow, whose look takes many times as long.

`ordinary_header` answers only where Pillow's `open` would surely answer the same. Anything unusual, damaged, truncated
or enormous is None: Pillow is asked then, and its verdict stands.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple
from zlib import crc32


class Header(NamedTuple):
    """What a picture says about itself.

    Attributes:
        suffix: of files of its format: jpg or png.
        width, height: in pixels, both at least 1.
    """

    suffix: str
    width: int
    height: int


def ordinary_header(content: bytes) -> Header | None:
    """The header of a picture whose format is read here and whose header holds nothing unusual; otherwise None.

    Args:
        content: the whole file, or the beginning of one.
    """
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
        return _png(content)
    return None


# ITU-T T.81, annex B.
_SOS, _DQT = 0xDA, 0xDB
_FRAMES = frozenset((0xC0, 0xC2))  # baseline, progressive
_SKIPPED = frozenset((0xC4, 0xDD, 0xFE))  # Huffman tables, restart interval, comment: Pillow, too, skips them
_APPLICATIONS = {0xE0: (b"JFIF\0", 16), 0xE2: (b"ICC_PROFILE\0", 17), 0xEE: (b"Adobe", 14)}
"""Application segments that are read here: how they begin and their least length. (Exif may hold anything.)"""
_DQT_TABLE = 65
"""Bytes of a table of 8-bit values, with the byte that says so."""
_segment, _frame = Struct(">BBH").unpack_from, Struct(">BHHB").unpack_from


def _jpeg(content: bytes) -> Header | None:
    """Walks from segment to segment up to the start of the scan, as Pillow does."""
    frame = None
    at, last = 2, len(content) - 4
    while at <= last:
        escape, marker, length = _segment(content, at)
        beyond = at + 2 + length
        if escape != 0xFF or length < 2 or beyond > len(content):
            return None
        if marker in _SKIPPED:
            pass
        elif marker == _DQT:
            if (length - 2) % _DQT_TABLE or (length > 2 and max(content[at + 4 : beyond : _DQT_TABLE]) > 0x0F):
                return None
        elif marker in _FRAMES:
            if frame is not None or length not in (11, 17):  # one component, or three
                return None
            bits, height, width, components = _frame(content, at + 4)
            if bits != 8 or not height or not width or 8 + 3 * components != length:
                return None
            frame = Header("jpg", width, height)
        elif marker == _SOS:
            return frame
        else:
            start, least = _APPLICATIONS.get(marker, (b"", 1 << 16))
            if length < least or not content.startswith(start, at + 4):
                return None
        at = beyond
    return None


# PNG (third edition), 11.2.1 and 11.3; a chunk is its length, its type, its content and a checksum of the latter two.
_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits of a sample, by colour type."""
_LEAST = {b"PLTE": 3, b"gAMA": 4, b"pHYs": 9, b"sRGB": 1, b"cHRM": 32}
"""Chunks that are read here, and the least that they hold."""
_FIRST_CHUNK = 8 + 25
"""The signature and IHDR."""


def _png(content: bytes) -> Header | None:
    """Checks IHDR and what comes between it and the first IDAT, checksums included."""
    if len(content) < _FIRST_CHUNK or crc32(content[12:29]) != int.from_bytes(content[29:33], "big"):
        return None
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    bits, colour, _, filtering, _ = content[24:29]
    if not 0 < width < 1 << 31 or not 0 < height < 1 << 31 or bits not in _BITS.get(colour, ()) or filtering:
        return None
    at = _FIRST_CHUNK
    while len(content) >= at + 8:
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if kind == b"IDAT":
            return Header("png", width, height)
        beyond = at + 8 + length
        checksum = content[beyond : beyond + 4]
        if length < _LEAST.get(kind, 1 << 31) or len(checksum) < 4:
            return None
        if crc32(content[at + 4 : beyond]) != int.from_bytes(checksum, "big"):
            return None
        at = beyond + 4
    return None
