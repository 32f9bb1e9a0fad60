"""Images -> image tokens: a timm encoder, a connector to the decoder's width, and the transform the encoder expects.

The transform takes images to the encoder's input size with the encoder's own interpolation, mean and standard deviation
(timm's data config). By default it squashes and never crops: what an instruction asks about may stand at the border.

Shapes: I images, N image tokens of one image, D encoder width, W decoder width.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from mmprefix.errors import InputError

ResizeMode = Literal["squash", "crop", "pad", "tiles"]
ConnectorKind = Literal["linear", "mlp", "pixel_shuffle"]


@dataclass
class VisionArgs:
    """The vision encoder.

    Attributes:
        name: any model name of timm.
        pretrained: true for timm's weights, or the path of a local weights file; false starts from random weights.
        image_size: side of the square input in pixels; by default what timm's data config says.
        resize: how an image comes to that size: `squash` it; `crop` the middle of what is too long, after scaling; `pad` what
            is too short with the mean colour; `tiles`: the padded image, and where it is larger than that, tiles of it.
        max_tiles: of an image under `tiles`; each costs as many image tokens as the whole.
        interpolate_position_embeddings: allow another size than the pretrained weights were made for, where their
            position embeddings have to be interpolated to it.
        kwargs: passed on to `timm.create_model`, for other depths, widths or patch sizes.
    """

    name: str | None = None
    pretrained: bool | str = False
    image_size: int | None = None
    resize: ResizeMode = "squash"
    max_tiles: int = 4
    interpolate_position_embeddings: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ConnectorArgs:
    """From encoder width to decoder width.

    Attributes:
        kind: `linear`; `mlp` (linear, GELU, linear); `pixel_shuffle`, which joins neighbouring tokens first.
        factor: `pixel_shuffle` only: joins factor x factor tokens, so the prefix is factor^2 times shorter.
    """

    kind: ConnectorKind = "linear"
    factor: int = 2


@dataclass(frozen=True)
class VisionSpec:
    """All that is needed to build the encoder again, without weights; stored in the model's config.

    Attributes:
        name: timm model name.
        kwargs: for `timm.create_model`.
        image_size: ``(height, width)`` in pixels.
        mean, std: per channel, for pixels in [0, 1].
        interpolation: `bicubic`, `bilinear`, ...
        grid: ``(rows, columns)`` of image tokens, None where they form no grid.
        num_tokens: N.
        width: D.
        unused: names of parameters that the image tokens do not depend on (heads, poolers).
        resize: `squash`, `crop`, `pad` or `tiles`.
        max_tiles: of an image, under `tiles`.
    """

    name: str
    kwargs: dict[str, Any]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    grid: tuple[int, int] | None
    num_tokens: int
    width: int
    unused: tuple[str, ...] = ()
    resize: ResizeMode = "squash"
    max_tiles: int = 4

    @property
    def max_views(self) -> int:
        """How many views of one image the encoder gets at most."""
        return 1 + self.max_tiles if self.resize == "tiles" and self.max_tiles > 1 else 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionSpec:
        """The inverse of `to_dict`, which JSON has turned tuples into lists on."""
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they go into `config.json`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


# The caller may want no gradients: which parameters matter is found by them.
@torch.inference_mode(False)
@torch.enable_grad()
def resolve_vision(args: VisionArgs) -> VisionSpec:
    """Finds out what the encoder takes and gives, on the meta device: no weights are made.

    Raises:
        InputError: an unknown name, arguments or an image size that the encoder does not take.
    """
    if args.max_tiles < 1:
        raise InputError(f"model.vision.max_tiles: expected at least 1, got {args.max_tiles}")
    if args.name is None:
        raise InputError("model.vision.name: expected a timm model, got none")
    kwargs = dict(args.kwargs)
    try:
        pretrained_cfg = timm.models.get_pretrained_cfg(args.name, allow_unregistered=False)
    except RuntimeError as error:
        close = difflib.get_close_matches(args.name.split(".")[0], timm.list_models(), n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise InputError(f"model.vision.name: expected a timm model, got {args.name!r}{hint}") from error
    if args.image_size is not None and pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        kwargs.setdefault("img_size", args.image_size)
    try:
        with torch.device("meta"):
            model = timm.create_model(args.name, pretrained=False, num_classes=0, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"model.vision: timm cannot build {args.name} with {kwargs}: {error}") from error
    data_config = timm.data.resolve_model_data_config(model)
    _, height, width = data_config["input_size"]
    if args.image_size is not None:
        height = width = args.image_size
    elif "img_size" in kwargs:
        side = kwargs["img_size"]
        height, width = (side, side) if isinstance(side, int) else tuple(side)
    _check_size(args, model, pretrained_cfg, height, width)
    try:
        # In training, batch norm wants more than one value for each channel: more than one picture, where one gives one.
        features = model.eval().forward_features(torch.empty(1, 3, height, width, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"model.vision: {args.name} does not take {height}x{width} images: {message}") from error
    tokens, grid = _to_tokens(model, features)
    return VisionSpec(
        name=args.name,
        kwargs=kwargs,
        image_size=(height, width),
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
        interpolation=data_config["interpolation"],
        resize=args.resize,
        max_tiles=args.max_tiles,
        grid=grid,
        num_tokens=tokens.shape[1],
        width=tokens.shape[2],
        unused=_unused_parameters(model, tokens),
    )


def tile_grid(size: tuple[int, int], tile: tuple[int, int], max_tiles: int) -> tuple[int, int]:
    """Rows and columns of tiles that show most pixels of an image, scaled with its aspect ratio to fit into them; of those
    that show as many, the smallest. As LLaVA-NeXT chooses its grids.

    Args:
        size: width and height of the image.
        tile: width and height of a tile.
        max_tiles: in all.
    """
    width, height = size

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * tile[0] / width, rows * tile[1] / height, 1.0)
        return round(scale * width) * round(scale * height), -rows * columns

    return max(((r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)), key=rank)


def _check_size(args: VisionArgs, model: nn.Module, pretrained_cfg: Any, height: int, width: int) -> None:
    """timm would cut off what patches don't cover, and interpolate position embeddings, without a word."""
    where = f"model.vision.image_size: {args.name}"
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and len(patch) == 2 and (height % patch[0] or width % patch[1]):
        sides = sorted({max(1, side // p) * p for side, p in ((height, patch[0]), (width, patch[1]))})
        raise InputError(
            f"{where} takes multiples of its patch size {patch[0]}, got {height}x{width}; "
            f"the nearest are {sides[0]} and {sides[0] + patch[0]}"
        )
    if args.pretrained is not True or args.interpolate_position_embeddings or pretrained_cfg is None:
        return  # what a weights file was made for is seen when it is loaded
    made_for = tuple(pretrained_cfg.input_size[1:])
    if pretrained_cfg.fixed_input_size and made_for != (height, width):
        raise InputError(
            f"{where} has pretrained position embeddings for {made_for[0]}x{made_for[1]}, got {height}x{width}; "
            "interpolate them with model.vision.interpolate_position_embeddings: true"
        )


def _unused_parameters(model: nn.Module, tokens: Tensor) -> tuple[str, ...]:
    """Parameters without influence on the tokens: DistributedDataParallel would wait for their gradients."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(tokens.sum(), parameters, allow_unused=True)
    return tuple(name for name, gradient in zip(names, gradients, strict=True) if gradient is None)


def _to_tokens(model: nn.Module, features: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
    """timm's features -> ``[I, N, D]`` without class and register tokens, and their grid."""
    if not isinstance(features, Tensor):
        raise InputError(
            f"model.vision: {type(model).__name__} gives {type(features).__name__}, expected one feature map"
        )
    if features.ndim == 4:
        if getattr(model, "output_fmt", "NCHW") != "NHWC":
            features = features.permute(0, 2, 3, 1)
        return features.flatten(1, 2), (features.shape[1], features.shape[2])
    if features.ndim != 3:
        raise InputError(
            f"model.vision: expected feature maps or tokens from {type(model).__name__}, got shape {tuple(features.shape)}"
        )
    tokens = features[:, getattr(model, "num_prefix_tokens", 0) :]
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or grid[0] * grid[1] != tokens.shape[1]:
        side = int(tokens.shape[1] ** 0.5)
        grid = (side, side) if side * side == tokens.shape[1] else None
    return tokens, None if grid is None else (int(grid[0]), int(grid[1]))


class VisionEncoder(nn.Module):
    """A timm encoder that yields image tokens.

    Class and register tokens are dropped; feature maps of CNNs become tokens row by row.
    """

    def __init__(
        self, spec: VisionSpec, pretrained: bool | str = False, interpolate_position_embeddings: bool = False
    ) -> None:
        """Builds the encoder.

        Args:
            spec: from `resolve_vision`.
            pretrained, interpolate_position_embeddings: as in `VisionArgs`.

        Raises:
            InputError: a weights file that is missing or does not fit.
        """
        super().__init__()
        try:
            self.model = timm.create_model(spec.name, pretrained=pretrained is True, num_classes=0, **spec.kwargs)
        except (OSError, RuntimeError) as error:  # no network, no weights under this name
            message = " ".join(str(error).split())[:300]
            raise InputError(f"model.vision: cannot get the weights of {spec.name}: {message}") from error
        if isinstance(pretrained, str):
            _load_weights(self.model, spec, pretrained, interpolate_position_embeddings)
        self.num_tokens = spec.num_tokens
        self.mean, self.std = spec.mean, spec.std
        for name in spec.unused:
            self.model.get_parameter(name).requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """uint8 ``[I, 3, H, W]``, or float, normalised -> image tokens, float ``[I, N, D]``.

        Batches of the data hold uint8, a quarter of what would have to be made, moved between processes and sent.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise(pixel_values, self.mean, self.std)
        # Pixels are float32, weights perhaps in half precision.
        pixel_values = pixel_values.to(next(self.model.parameters()).dtype)
        tokens, _ = _to_tokens(self.model, self.model.forward_features(pixel_values))
        return tokens


def _load_weights(model: nn.Module, spec: VisionSpec, path: str, interpolate: bool) -> None:
    """Loads a local file with timm's own conversion for the architecture; heads may be missing or left over."""
    where = f"model.vision.pretrained: {path}"
    if not Path(path).is_file():
        raise InputError(f"model.vision.pretrained: expected a weights file, found none at {path}")
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        stored = timm.models.load_state_dict(path).get("pos_embed")
        keys = timm.models.load_checkpoint(model, path, strict=False, filter_fn=convert)
    except Exception as error:  # whatever the reader of the file, the conversion or the shapes raise
        raise InputError(f"{where}: expected weights of {spec.name}: {' '.join(str(error).split())[:300]}") from error
    own = getattr(model, "pos_embed", None)
    if not interpolate and isinstance(own, Tensor) and stored is not None and stored.shape != own.shape:
        raise InputError(
            f"{where}: has position embeddings {tuple(stored.shape)}, {spec.name} at {spec.image_size[0]}x"
            f"{spec.image_size[1]} needs {tuple(own.shape)}; interpolate them with "
            "model.vision.interpolate_position_embeddings: true"
        )
    missing = sorted(set(keys.missing_keys) - set(spec.unused)) if keys else []
    if missing:
        raise InputError(
            f"{where}: expected weights of {spec.name}, {len(missing)} tensors are missing: {', '.join(missing[:5])}"
        )


class PixelShuffle(nn.Module):
    """Joins ``factor x factor`` neighbouring tokens: ``[I, N, D] -> [I, N / factor^2, factor^2 * D]``."""

    def __init__(self, grid: tuple[int, int], factor: int) -> None:
        super().__init__()
        self.grid, self.factor = grid, factor

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens in row-major order in, joined tokens in row-major order out."""
        (rows, columns), f = self.grid, self.factor
        blocks = tokens.unflatten(1, (rows // f, f, columns // f, f))
        return blocks.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def build_connector(args: ConnectorArgs, spec: VisionSpec, decoder_width: int) -> tuple[nn.Module, int]:
    """The connector and the number of image tokens that leave it.

    Raises:
        InputError: a token grid that `pixel_shuffle` cannot divide.
    """
    if args.kind == "linear":
        return nn.Linear(spec.width, decoder_width), spec.num_tokens
    if args.kind == "mlp":
        hidden = nn.Linear(spec.width, decoder_width)
        return nn.Sequential(hidden, nn.GELU(), nn.Linear(decoder_width, decoder_width)), spec.num_tokens
    if args.kind != "pixel_shuffle":
        raise InputError(f"model.connector.kind: expected linear, mlp or pixel_shuffle, got {args.kind!r}")
    grid, f = spec.grid, args.factor
    if f < 1:
        raise InputError(f"model.connector.factor: expected at least 1, got {f}")
    if grid is None or grid[0] % f or grid[1] % f:
        raise InputError(
            f"model.connector: pixel_shuffle by {f} needs a token grid divisible by {f}, {spec.name} has {grid}"
        )
    return (
        nn.Sequential(PixelShuffle(grid, f), nn.Linear(spec.width * f * f, decoder_width)),
        spec.num_tokens // (f * f),
    )


def as_levels(image: Image.Image | Tensor) -> Tensor:
    """Picture -> RGB, uint8 ``[3, height, width]``, the channels of a pixel side by side in memory; a tensor as it is.

    Raises:
        ValueError: a tensor of another dtype or shape.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"expected a picture or uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
        return image
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def as_picture(levels: Tensor) -> Image.Image:
    """The inverse of `as_levels`."""
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def resample(levels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resizes with an antialiased filter, along rows first, then along columns, rounded in between.

    That is what Pillow did before its version 13, which begins along columns where that is less work, and gets other
    pixels at sharp edges. PyTorch's filters are several times as fast. A value differs from Pillow's by one level at most,
    one in some 100,000 by two, where rounding adds up.

    Args:
        levels: uint8 ``[3, height, width]``.
        size: ``(height, width)`` in pixels.
        interpolation: name of a Pillow resampling filter, in lower case.

    Returns:
        uint8 ``[3, *size]``.
    """
    if levels.shape[1:] == size:
        return levels
    if interpolation in ("bicubic", "bilinear"):
        return F.interpolate(levels.unsqueeze(0), size, mode=interpolation, antialias=True)[0]
    method = Image.Resampling[interpolation.upper()]
    return as_levels(as_picture(levels).resize((size[1], levels.shape[1]), method).resize((size[1], size[0]), method))


def normalise(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Levels -> float32 of the same shape, standardised for each channel.

    Args:
        levels: uint8 ``[..., 3, H, W]``.
        mean, std: per channel, for pixels in [0, 1].
    """
    # Numbers, not tensors: those would have to be sent to the device, which waits for it.
    pixels = torch.empty(levels.shape, dtype=torch.float32, device=levels.device).copy_(levels)
    for channel, centre, spread in zip(pixels.unbind(-3), mean, std, strict=True):
        channel.sub_(255 * centre).div_(255 * spread)
    return pixels


@dataclass(frozen=True)
class ImageTransform:
    """Pixels as the encoder expects them.

    Attributes:
        size: ``(height, width)`` in pixels.
        mean, std: per channel, for pixels in [0, 1].
        interpolation: name of a Pillow resampling filter, in lower case.
        resize_mode: `squash` changes the aspect ratio; `crop` fills the size and loses what is too long, evenly on both
            sides; `pad` loses nothing and fills up with the mean colour, evenly on both sides; `tiles` pads, too, and adds
            tiles of a larger image.
        max_tiles: of an image.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: ResizeMode = "squash"
    max_tiles: int = 4

    @classmethod
    def from_spec(cls, spec: VisionSpec) -> ImageTransform:
        """The transform of an encoder."""
        return cls(spec.image_size, spec.mean, spec.std, spec.interpolation, spec.resize, spec.max_tiles)

    def resize(self, image: Image.Image | Tensor) -> Tensor:
        """Image of any size -> uint8 ``[3, H, W]`` of `size`.

        Args:
            image: a picture, or uint8 ``[3, height, width]``, RGB.
        """
        levels = as_levels(image)
        if self.resize_mode == "crop":
            return self._cropped(levels)
        if self.resize_mode in ("pad", "tiles"):
            return self._padded(levels, self.size)
        return resample(levels, self.size, self.interpolation)

    def _cropped(self, levels: Tensor) -> Tensor:
        # Pillow cuts between pixels, which a tensor can't.
        method = Image.Resampling[self.interpolation.upper()]
        return as_levels(ImageOps.fit(as_picture(levels), (self.size[1], self.size[0]), method))

    def _padded(self, levels: Tensor, size: tuple[int, int]) -> Tensor:
        scale = min(size[0] / levels.shape[1], size[1] / levels.shape[2])
        height, width = (
            max(1, min(most, round(scale * side))) for side, most in zip(levels.shape[1:], size, strict=True)
        )
        inner = resample(levels, (height, width), self.interpolation)
        if (height, width) == size:
            return inner
        colour = torch.tensor([round(255 * value) for value in self.mean], dtype=torch.uint8)
        padded = colour.expand(*size, 3).contiguous().permute(2, 0, 1)
        top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
        padded[:, top : top + height, left : left + width] = inner
        return padded

    def _tiles(self, levels: Tensor) -> list[Tensor]:
        """Row by row; none of an image that one tile shows as well."""
        height, width = self.size
        rows, columns = tile_grid((levels.shape[2], levels.shape[1]), (width, height), self.max_tiles)
        if rows * columns == 1:
            return []
        whole = self._padded(levels, (rows * height, columns * width))
        return [tile for row in whole.split(height, 1) for tile in row.split(width, 2)]

    def normalise(self, levels: Tensor) -> Tensor:
        """uint8 ``[..., 3, H, W]`` -> normalised float32 of the same shape."""
        return normalise(levels, self.mean, self.std)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Image of any size, as in `resize` -> normalised float32 ``[3, H, W]``."""
        return self.normalise(self.resize(image))

    def views(self, image: Image.Image | Tensor) -> Tensor:
        """Image of any size, as in `resize` -> what the encoder gets of it, uint8 ``[V, 3, H, W]``."""
        levels = as_levels(image)
        tiles = self._tiles(levels) if self.resize_mode == "tiles" else []
        return torch.stack([self.resize(levels), *tiles])
