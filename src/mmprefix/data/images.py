"""Encoded bytes -> RGB pixels, and the random affine augmentation for training from scratch.

`decode_image` is Pillow's decoder. `decode_levels`, which training uses, gives the same pixels and has the common kind
of JPEG decoded by torchvision, without the copies between Pillow's image and a tensor.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Generator, Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mmprefix.errors import InputError
from mmprefix.vision import as_levels


class UndecodableImageError(ValueError):
    """Bytes that are no image, or one too large to be decoded safely. The message is one line."""


def decode_image(content: bytes) -> Image.Image:
    """Encoded image -> RGB, upright by its EXIF orientation.

    Raises:
        UndecodableImageError: with the decoder's reason.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _upright_rgb(image)
    # Pillow's decoders raise much besides OSError on hostile bytes: SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise _undecodable(content, error) from error


def decode_levels(content: bytes) -> Tensor:
    """Encoded image -> RGB, upright by its EXIF orientation, uint8 ``[3, height, width]``: `decode_image` as a tensor.

    Raises:
        UndecodableImageError: with the decoder's reason.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:  # reads no more than the header, and refuses gigantic ones
            if image.format == "JPEG" and image.mode in ("RGB", "L") and image.getexif().get(_ORIENTATION, 1) == 1:
                try:
                    # Both are libjpeg-turbo. torchvision's prints what it corrects ("Corrupt JPEG data: ...") to stderr.
                    return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
                except RuntimeError:
                    pass  # Pillow may still take it, and has the better reason if not
            return as_levels(_upright_rgb(image))
    except Exception as error:
        raise _undecodable(content, error) from error


_ORIENTATION = ExifTags.Base.Orientation


def _upright_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies every image, turned or not
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip to 255, that is to white
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies, also to the same mode


def _undecodable(content: bytes, error: Exception) -> UndecodableImageError:
    message = " ".join(str(error).split()).split(" <_io.BytesIO")[0] or type(error).__name__
    return UndecodableImageError(f"image of {len(content)} bytes cannot be decoded: {message}")


@dataclass
class RandomAffine:
    """Random rotation, shift, scale and shear of training images; the image's border colour fills the corners.

    Attributes:
        degrees: rotation, uniform in [-degrees, degrees]; at most 180.
        translate: shift along each axis, uniform in [-translate, translate], as a share of the side; at most 1.
        scale: zoom, uniform in [1 - scale, 1 + scale]; below 1.
        shear: horizontal shear, uniform in [-shear, shear] degrees; below 90.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def check(self) -> None:
        """Refuses what is no such transform.

        Raises:
            InputError: naming the setting.
        """
        for name, value, fits, bound in (
            ("degrees", self.degrees, self.degrees <= 180, "at most 180"),
            ("translate", self.translate, self.translate <= 1, "at most 1"),
            ("scale", self.scale, self.scale < 1, "below 1"),
            ("shear", self.shear, self.shear < 90, "below 90"),
        ):
            if not (fits and value >= 0):
                raise InputError(f"data.augmentation.{name}: expected at least 0 and {bound}, got {value}")

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        """Same size and mode out; all randomness comes from the generator."""
        angle, dx, dy, zoom, shear = (2 * torch.rand(5, generator=generator) - 1).tolist()
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
