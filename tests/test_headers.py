"""Headers read without Pillow say what Pillow says, or nothing."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmprefix.data.headers import ordinary_header

SUFFIXES = {"JPEG": "jpg", "PNG": "png"}


def encoded(form, mode="RGB", size=(19, 11), **options):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if "A" in mode else image.convert("RGB")).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


ORDINARY = {
    "baseline": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "optimised": encoded("JPEG", optimize=True, quality=30),
    "grey": encoded("JPEG", "L"),
    "density": encoded("JPEG", dpi=(300, 300)),
    "comment": encoded("JPEG", comment=b"by hand"),
    "icc": encoded("JPEG", icc_profile=b"a profile"),
    "png": encoded("PNG"),
    "png_alpha": encoded("PNG", "RGBA"),
    "png_grey_alpha": encoded("PNG", "LA"),
    "png_palette": encoded("PNG", "P"),
    "png_bits": encoded("PNG", "1"),
    "png_density": encoded("PNG", dpi=(72, 72)),
}
FRAME = ORDINARY["baseline"].index(b"\xff\xc0") + 4  # bits, height, width


def patched(content, at, new):
    return content[:at] + new + content[at + len(new) :]


UNUSUAL = {
    "no_height": patched(ORDINARY["baseline"], FRAME + 1, b"\0\0"),
    "no_width": patched(ORDINARY["baseline"], FRAME + 3, b"\0\0"),
    "12_bits": patched(ORDINARY["baseline"], FRAME, b"\x0c"),
    "png_no_width": patched(
        patched(ORDINARY["png"], 16, bytes(4)),
        29,
        struct.pack(">I", zlib.crc32(patched(ORDINARY["png"], 16, bytes(4))[12:29])),
    ),
    "exif": encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
    "cmyk": encoded("JPEG", "CMYK"),
    "png_text": encoded("PNG", pnginfo=None, icc_profile=b"a profile"),
    "gif": encoded("GIF", "P"),
    "nothing": b"",
}


def seen_by_pillow(content):
    """(suffix, width, height), or None where Pillow doesn't open it."""
    try:
        image = Image.open(io.BytesIO(content))
    except Exception:
        return None
    return SUFFIXES.get(image.format), *image.size


def mutations(content, number, seed):
    """Bytes changed, cut out, put in and cut off; mostly near the front, where headers are."""
    draw = random.Random(seed)
    for _ in range(number):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            at = draw.randrange(min(len(changed), draw.choice((40, 200, 1000)))) if changed else 0
            how = draw.randrange(4)
            if how == 0 and changed:
                changed[at] = draw.choice((0, 1, 0xFF, 0xC0, 0xDA, draw.randrange(256)))
            elif how == 1 and changed:
                changed[at] ^= 1 << draw.randrange(8)
            elif how == 2:
                changed[at:at] = draw.choice((b"\xff", b"\0", b"\xff\xfe\0\x05abc", b"\xff\xe1\0\x08Exif\0\0"))
            else:
                del changed[at : at + draw.choice((1, 2, len(changed)))]
        if changed.startswith(b"\x89PNG") and len(changed) > 33 and draw.random() < 0.7:  # or all would end there
            changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
        yield bytes(changed)


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_pictures_are_read(name):
    content = ORDINARY[name]
    assert ordinary_header(content) == seen_by_pillow(content)
    assert ordinary_header(content)[1:] == (19, 11)


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_left_to_pillow(name):
    assert ordinary_header(UNUSUAL[name]) is None


@pytest.mark.filterwarnings("ignore")  # Pillow's, about sizes and malformed files
@pytest.mark.parametrize("name", [*ORDINARY, *UNUSUAL])
def test_a_verdict_on_damaged_pictures_matches_pillow(name):
    content, answered, refused = {**ORDINARY, **UNUSUAL}[name], 0, 0
    for changed in mutations(content, 400, seed=name):
        header, expected = ordinary_header(changed), seen_by_pillow(changed)
        answered += header is not None
        refused += expected is None
        if header is not None and header.width * header.height <= 178_956_970:  # Pillow opens nothing larger
            assert header == expected, changed
    if name in ORDINARY:
        assert answered > 20, "most of it must have been too damaged to say anything"
    assert refused > 20, "hardly anything was damaged"


@pytest.mark.parametrize("name", ["baseline", "icc", "png", "png_palette", "png_density"])
def test_a_verdict_on_every_truncation_matches_pillow(name):
    content = ORDINARY[name]
    answers = [ordinary_header(content[:length]) for length in range(len(content))]
    for length, header in enumerate(answers):
        if header is not None:
            assert header == seen_by_pillow(content[:length]), length
    assert any(answers)
    assert not all(answers)
