"""The outputs of a frozen encoder on disk: computed once for each image, then read by position.

A cache is a folder with ``index.json`` and ``features-NNNNN.safetensors``: one bfloat16 tensor ``features``
``[n, N, D]`` in each shard, what the encoder gives before the connector. The index holds the key (which encoder, which
weights, which transform, which format) and the images of each shard, by the SHA-256 of their encoded bytes: the same
picture in several records or splits is stored once, and a changed picture is another one. A shard counts once the index
names it, so whatever interrupts the writer, the folder holds complete shards only, and the next run goes on from there.
Nothing in it is unpickled.

This file knows no model: who computes features hands them in, and who reads them says which key they must have.

Shapes: n images of a shard, I images, N image tokens of one image, D encoder width.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from mmprefix.data.images import UndecodableImageError, decode_levels
from mmprefix.data.shards import ShardCollection
from mmprefix.errors import InputError
from mmprefix.files import replacing
from mmprefix.packing import BadSample
from mmprefix.vision import ImageTransform, VisionEncoder, VisionSpec

INDEX = "index.json"
FORMAT = {"version": 1, "dtype": "bfloat16"}
SHARD_BYTES = 512 * 2**20
"""How much a shard holds at most. The writer keeps that much in memory, three times while it writes."""

_TENSOR = "features"
_SHARD_NAME = re.compile(r"features-\d{5,}\.safetensors")
_LEFT_BEHIND = re.compile(r"\.(index\.json|features-\d+\.safetensors)\.\d+\.part")


def image_digest(content: bytes) -> str:
    """SHA-256 of an encoded image, in hex: the name of its features."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class FeatureKey:
    """What features depend on beside the image.

    Attributes:
        encoder: timm name and arguments.
        weights: SHA-256 of the encoder's weights and buffers.
        transform: size, mean, std and interpolation.
        format: version and dtype of the files.
    """

    encoder: dict[str, Any]
    weights: str
    transform: dict[str, Any]
    format: dict[str, Any]

    @classmethod
    def of(cls, encoder: VisionEncoder, spec: VisionSpec, transform: ImageTransform) -> FeatureKey:
        """The key of an encoder as it is now; reads all its weights, about a second for a gigabyte."""
        digest = hashlib.sha256()
        for name, tensor in sorted(encoder.model.state_dict().items()):
            if name in spec.unused:  # heads may be random where only the body was loaded; features don't see them
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        parts = {
            "encoder": {"name": spec.name, "kwargs": spec.kwargs},
            "weights": digest.hexdigest(),
            # Tiles are never cached: what they depend on is no part of the key.
            "transform": {name: value for name, value in asdict(transform).items() if name != "max_tiles"},
            "format": FORMAT,
        }
        return cls(**json.loads(json.dumps(parts)))  # tuples as lists, as they come back from the index

    @property
    def hash(self) -> str:
        """SHA-256 of all parts, in hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def difference(self, other: FeatureKey) -> str:
        """The parts in which ``other`` differs: ``weights: expected 1f.., got 2e..``; empty where none does."""
        found = []
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if mine != theirs:
                shown = [v[:12] if isinstance(v, str) else json.dumps(v, sort_keys=True) for v in (mine, theirs)]
                found.append(f"{part.name}: expected {shown[0]}, got {shown[1]}")
        return "; ".join(found)


@dataclass(frozen=True)
class _Index:
    """Content of ``index.json``."""

    key: FeatureKey
    shape: tuple[int, int]
    shards: tuple[tuple[str, int, tuple[str, ...]], ...]
    """File, bytes and images of each shard."""
    undecodable: dict[str, str]

    @classmethod
    def read(cls, folder: Path, where: str) -> _Index:
        path = folder / INDEX
        if not path.is_file():
            raise InputError(f"{where}: expected a folder written by cache-features, found no {INDEX} in {folder}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows, width = content["shape"]
            index = cls(
                FeatureKey(**content["key"]),
                (int(rows), int(width)),
                tuple((str(s["file"]), int(s["bytes"]), tuple(map(str, s["images"]))) for s in content["shards"]),
                dict(content["undecodable"]),
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise InputError(
                f"{where}: {path}: expected an index of cache-features, cannot read it: {reason}"
            ) from error
        for name, _, _ in index.shards:
            if not _SHARD_NAME.fullmatch(name):  # a name is never a path to elsewhere
                raise InputError(f"{where}: {path}: expected names like features-00000.safetensors, got {name!r}")
        return index

    def write(self, folder: Path) -> None:
        content = {
            "key": asdict(self.key),
            "hash": self.key.hash,
            "num_images": sum(len(images) for _, _, images in self.shards),
            "shape": list(self.shape),
            "shards": [{"file": name, "bytes": size, "images": images} for name, size, images in self.shards],
            "undecodable": self.undecodable,
        }
        _write(folder / INDEX, json.dumps(content, indent=1).encode())

    def check_shards(self, folder: Path, where: str) -> None:
        """Every shard is there, as long as it was written, with the tensor the index tells of; reads headers only."""
        for name, size, images in self.shards:
            path = folder / name
            if not path.is_file():
                raise InputError(f"{where}: expected the shard {path} with {len(images)} images, there is none")
            if path.stat().st_size != size:
                raise InputError(f"{where}: {path}: expected {size} bytes, got {path.stat().st_size}: a broken shard")
            expected = ("BF16", [len(images), *self.shape])
            try:
                with safe_open(path, framework="pt") as file:
                    tensor = file.get_slice(_TENSOR)
                    found = (tensor.get_dtype(), tensor.get_shape())
            except (SafetensorError, OSError) as error:
                raise InputError(f"{where}: {path}: expected a safetensors shard, got a broken one: {error}") from error
            if found != expected:
                raise InputError(f"{where}: {path}: expected {expected[0]} {expected[1]}, got {found[0]} {found[1]}")


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else a crash of the machine could leave a renamed, empty file


class FeatureCache:
    """The features of a folder, by image digest.

    Attributes:
        folder: where they lie.
        key: what they were made with.
        shape: ``(N, D)`` of an image.
        undecodable: digests of images that could not be decoded, and why.
    """

    def __init__(self, folder: str | Path, where: str = "data.feature_cache") -> None:
        """Reads the index and the headers of all shards.

        Args:
            folder: written by `FeatureWriter`.
            where: setting the folder came from, for messages.

        Raises:
            InputError: no cache there, or shards that are missing or broken.
        """
        self.folder, self.where = Path(folder), where
        index = _Index.read(self.folder, where)
        index.check_shards(self.folder, where)
        self.key, self.shape, self.undecodable = index.key, index.shape, index.undecodable
        self._names = [name for name, _, _ in index.shards]
        self._starts = list(accumulate((len(images) for _, _, images in index.shards), initial=0))
        every = (digest for _, _, images in index.shards for digest in images)
        self._number = {digest: number for number, digest in enumerate(every)}
        self._open: dict[int, tuple[int, Any]] = {}

    def __len__(self) -> int:
        return len(self._number)

    def __contains__(self, digest: str) -> bool:
        return digest in self._number

    def __getstate__(self) -> dict[str, Any]:
        # Open shards stay in the process that opened them.
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, digest: str) -> Tensor:
        """bfloat16 ``[N, D]``, as the encoder gave it.

        Raises:
            KeyError: an image that is not in the cache.
        """
        number = self._number[digest]
        shard = bisect_right(self._starts, number) - 1
        # Mapped, not read: what is resident is the page cache, shared by all loader processes and ranks. A shard that
        # is cut while it is mapped ends the process with SIGBUS; nothing of ours changes a finished shard.
        process, file = self._open.get(shard, (-1, None))
        if process != os.getpid():
            file = safe_open(self.folder / self._names[shard], framework="pt")
            self._open[shard] = (os.getpid(), file)
        row = number - self._starts[shard]
        # A copy: a slice is a view of the whole mapped shard, and would be pickled as such.
        features: Tensor = file.get_slice(_TENSOR)[row : row + 1][0].clone()
        return features

    def check_key(self, key: FeatureKey) -> None:
        """Raises InputError, naming the parts, where the features are not those of the encoder with ``key``."""
        if difference := key.difference(self.key):
            raise InputError(
                f"{self.where}: {self.folder} is not of this encoder: {difference}; "
                "write one with cache-features from this config"
            )

    def check_images(self, split: str, shards: ShardCollection) -> None:
        """Every image of a split is here, or known to be undecodable. Reads each picture once, to see if it changed.

        Raises:
            InputError: naming shard and key of the first that is missing.
        """
        missing = []
        for index in range(len(shards)):
            for number in range(shards.num_images(index)):
                digest = image_digest(shards.image_bytes(index, number))
                if digest not in self and digest not in self.undecodable:
                    missing.append(index)
        if missing:
            raise InputError(
                f"{self.where}: {self.folder}: expected features of each of the {shards.num_all_images} images of "
                f"data.{split}, {len(missing)} have none; the first is {shards.path_of(missing[0])}: {shards.key(missing[0])}; "
                "cache-features from this config adds them"
            )

    def describe(self) -> str:
        """One line for logs."""
        return f"features: {len(self)} images of {self.shape[0]} tokens x {self.shape[1]} from {self.folder}"


class FeatureWriter:
    """Writes a cache, or goes on with one that was interrupted.

    Attributes:
        stored: digests of the images in finished shards.
        undecodable: digests of images that could not be decoded, and why.
    """

    def __init__(
        self,
        folder: str | Path,
        key: FeatureKey,
        shape: tuple[int, int],
        *,
        overwrite: bool = False,
        shard_bytes: int | None = None,
        where: str = "--out",
    ) -> None:
        """Opens the folder and enters the key.

        Args:
            folder: a new or empty one, or a cache.
            key: what the features depend on.
            shape: ``(N, D)`` of an image.
            overwrite: drop what a cache in ``folder`` holds; else its finished shards are kept.
            shard_bytes: how much a shard holds at most, at least one image; by default `SHARD_BYTES`.
            where: setting the folder came from, for messages.

        Raises:
            InputError: a folder with other files, a cache with another key, or with broken shards.
        """
        self.folder, self.key, self.shape = Path(folder), key, shape
        image_bytes = shape[0] * shape[1] * torch.bfloat16.itemsize
        self._room = max(1, (SHARD_BYTES if shard_bytes is None else shard_bytes) // image_bytes)
        self._pending: dict[str, Tensor] = {}
        self._shards: list[tuple[str, int, tuple[str, ...]]] = []
        self.undecodable: dict[str, str] = {}
        if self.folder.exists():
            self._enter(overwrite, where)
        self.stored = {digest for _, _, images in self._shards for digest in images}
        self._write_index()

    def _enter(self, overwrite: bool, where: str) -> None:
        if not self.folder.is_dir():
            raise InputError(f"{where}: expected a folder, got the file {self.folder}")
        names = sorted(path.name for path in self.folder.iterdir())
        ours = [n for n in names if n == INDEX or _SHARD_NAME.fullmatch(n) or _LEFT_BEHIND.fullmatch(n)]
        if foreign := sorted(set(names) - set(ours)):
            raise InputError(f"{where}: expected a new folder or a feature cache, {self.folder} holds {foreign[0]}")
        if INDEX in names and not overwrite:
            index = _Index.read(self.folder, where)
            if difference := self.key.difference(index.key):
                raise InputError(
                    f"{where}: {self.folder} holds features of another encoder: {difference}; --overwrite replaces them"
                )
            index.check_shards(self.folder, where)
            self._shards, self.undecodable = list(index.shards), index.undecodable
        else:
            (self.folder / INDEX).unlink(missing_ok=True)  # first: an index never names a shard that is gone
        kept = {INDEX, *(name for name, _, _ in self._shards)}
        for name in set(ours) - kept:  # finished, but not entered: the process ended in between
            (self.folder / name).unlink(missing_ok=True)

    def __contains__(self, digest: str) -> bool:
        """Whether the image needs no more features: they are stored, or wait for their shard to be full."""
        return digest in self.stored or digest in self._pending

    @property
    def num_bytes(self) -> int:
        """Of all finished shards."""
        return sum(size for _, size, _ in self._shards)

    @property
    def num_shards(self) -> int:
        """Finished shards."""
        return len(self._shards)

    def add(self, digest: str, features: Tensor) -> None:
        """Takes the features of one image, float ``[N, D]``; one that is here already is left as it is."""
        assert tuple(features.shape) == self.shape, f"expected {self.shape}, got {tuple(features.shape)}"
        if digest in self:
            return
        self.undecodable.pop(digest, None)
        # A copy: a view would keep the whole batch in memory.
        self._pending[digest] = features.to("cpu", torch.bfloat16, copy=True)
        if len(self._pending) == self._room:
            self._finish_shard()

    def add_undecodable(self, digest: str, reason: str) -> None:
        """Notes an image that has no features."""
        self.undecodable[digest] = reason

    def _finish_shard(self) -> None:
        name = f"features-{len(self._shards):05d}.safetensors"
        content = save({_TENSOR: torch.stack(list(self._pending.values()))}, {"hash": self.key.hash})
        _write(self.folder / name, content)
        self._shards.append((name, len(content), tuple(self._pending)))
        self.stored.update(self._pending)
        self._pending.clear()
        self._write_index()

    def _write_index(self) -> None:
        _Index(self.key, self.shape, tuple(self._shards), self.undecodable).write(self.folder)

    def close(self) -> None:
        """Writes what is left as a last, smaller shard."""
        if self._pending:
            self._finish_shard()
        else:
            self._write_index()


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """One record's image: uint8 ``[3, H, W]``, or none where they are not needed or cannot be had."""

    digest: str
    shard: str
    key: str
    pixels: Tensor | None = None
    undecodable: str | None = None


class EncoderInputs(Dataset[EncoderInput | BadSample]):
    """The images of several collections, one after the other, as the encoder takes them."""

    def __init__(
        self, collections: Iterable[ShardCollection], transform: ImageTransform, stored: Iterable[str] = ()
    ) -> None:
        """Settings.

        Args:
            collections: of which every record's image is visited.
            transform: the encoder's.
            stored: digests of images that need not be decoded.
        """
        self.places = [
            (shards, index, number)
            for shards in collections
            for index in range(len(shards))
            for number in range(shards.num_images(index))
        ]
        self.transform = transform
        self.stored = frozenset(stored)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> EncoderInput | BadSample:
        shards, index, of_record = self.places[number]
        shard, key = shards.path_of(index), f"record {index}"
        try:
            key = shards.key(index)
            content = shards.image_bytes(index, of_record)
        except (InputError, OSError) as error:  # an exception from a worker would arrive as a wall of text
            return BadSample(shard, key, str(error), fatal=True)
        digest = image_digest(content)
        if digest in self.stored:
            return EncoderInput(digest, shard, key)
        try:
            return EncoderInput(digest, shard, key, self.transform.resize(decode_levels(content)))
        except UndecodableImageError as error:
            return EncoderInput(digest, shard, key, undecodable=str(error))
