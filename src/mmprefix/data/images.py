"""Encoded bytes -> RGB image, and the random affine augmentation for training from scratch."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from torch import Generator, rand


class UndecodableImageError(ValueError):
    """Bytes that are no image, or one too large to be decoded safely. The message is one line."""


def decode_image(content: bytes) -> Image.Image:
    """Encoded image -> RGB, upright by its EXIF orientation.

    Raises:
        UndecodableImageError: with the decoder's reason.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies every image, turned or not
            if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip to 255, that is to white
                return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")  # which copies, also to the same mode
    # Pillow's decoders raise much besides OSError on hostile bytes: SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        message = " ".join(str(error).split()).split(" <_io.BytesIO")[0] or type(error).__name__
        raise UndecodableImageError(f"image of {len(content)} bytes cannot be decoded: {message}") from error


@dataclass
class RandomAffine:
    """Random rotation, shift, scale and shear of training images; the image's border colour fills the corners.

    Attributes:
        degrees: rotation, uniform in [-degrees, degrees].
        translate: shift along each axis, uniform in [-translate, translate], as a share of the side.
        scale: zoom, uniform in [1 - scale, 1 + scale].
        shear: horizontal shear, uniform in [-shear, shear] degrees.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        """Same size and mode out; all randomness comes from the generator."""
        angle, dx, dy, zoom, shear = (2 * rand(5, generator=generator) - 1).tolist()
        angle, shear = math.radians(self.degrees * angle), math.tan(math.radians(self.shear * shear))
        zoom = 1.0 / (1.0 + self.scale * zoom)
        cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
        # Output pixel -> input pixel about the centre: shear, then rotate and zoom.
        a, b, d, e = cos, cos * shear - sin, sin, sin * shear + cos
        width, height = image.size
        x, y = width / 2, height / 2  # Pillow maps pixel centres, at 0.5, 1.5, ...
        c = x - a * x - b * y + dx * self.translate * width
        f = y - d * x - e * y + dy * self.translate * height
        corner = image.getpixel((0, 0))
        return image.transform(
            image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC, fillcolor=corner
        )
