"""webdataset shards as a random-access collection: tars are indexed once, then read by position.

A shard is an ordinary tar as webdataset writes and reads it: members of one record follow each other and share a key,
``KEY.jpg`` beside ``KEY.json``. Knowing (shard, offset, size) of every member makes an epoch a permutation: every
record exactly once, in an order that depends on seed and epoch alone and can be resumed anywhere.

Indexing reads each tar's headers and JSON members once per start and checks them, so that a bad record is reported
before training, not hours into it. Member names are keys only, never paths on disk.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand
from webdataset.tariterators import base_plus_ext

from mmprefix.data.samples import Sample, parse_record
from mmprefix.errors import InputError
from mmprefix.files import replacing

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_TAR_BLOCK = 512
_MAX_OPEN_SHARDS = 256  # each process may open 1,024 files on many systems


@dataclass(frozen=True)
class Member:
    """Where a member's content lies: byte offset and size within its shard."""

    offset: int
    size: int


@dataclass(frozen=True)
class Record:
    """One image with what is asked about it."""

    shard: int
    key: str
    image: Member
    json: Member


def expand_shards(pattern: str | Sequence[str], what: str) -> list[str]:
    """Paths of the shards that a pattern names, sorted.

    Args:
        pattern: a path, glob (``train-*.tar``), brace range (``train-{000..009}.tar``) or folder, or a list of them.
        what: setting the pattern came from, for messages.

    Raises:
        InputError: a folder or file that is missing, or a pattern without a match.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    paths: list[str] = []
    for entry in patterns:
        for expanded in braceexpand.braceexpand(entry):
            candidate = os.path.join(expanded, "*.tar") if os.path.isdir(expanded) else expanded
            matches = sorted(glob.glob(candidate))
            if not matches:
                folder = os.path.dirname(candidate) or "."
                if not os.path.isdir(folder):
                    raise InputError(f"{what}: expected shards at {expanded}, the folder {folder} does not exist")
                tars = len(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
                raise InputError(
                    f"{what}: expected shards at {expanded}, none match ({folder} holds {tars} .tar files)"
                )
            paths += matches
    return paths


class ShardCollection:
    """The records of some shards.

    Attributes:
        paths: the shards.
        records: in the order of shards and their members.
        num_samples: instructions on all records.
    """

    def __init__(self, pattern: str | Sequence[str], what: str, *, needs_target: bool = True) -> None:
        """Indexes and checks the shards.

        Args:
            pattern: see `expand_shards`.
            what: setting the pattern came from, for messages.
            needs_target: whether a sample without target is refused.

        Raises:
            InputError: missing or truncated shards, records without image or JSON, samples that are incomplete.
        """
        self.paths = expand_shards(pattern, what)
        self.needs_target = needs_target
        self.records: list[Record] = []
        self.num_samples = 0
        self._descriptors: dict[int, tuple[int, int]] = {}
        for number, path in enumerate(self.paths):
            self._index(number, path)
        if not self.records:
            raise InputError(
                f"{what}: expected records (KEY.jpg + KEY.json) in {', '.join(self.paths[:3])}, found none"
            )

    def __len__(self) -> int:
        return len(self.records)

    def _index(self, number: int, path: str) -> None:
        members: dict[str, Member] = {}
        current: str | None = None
        seen: set[str] = set()
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for info in tar:
                        if not info.isreg():
                            continue
                        key, suffix = base_plus_ext(info.name)
                        if key is None:
                            continue
                        if info.offset_data + info.size > size:
                            raise InputError(
                                f"{path}: {info.name}: expected {info.size} bytes, the shard ends before them"
                            )
                        if key != current:
                            self._add(number, path, current, members, file.fileno())
                            if key in seen:
                                raise InputError(
                                    f"{path}: {key}: expected a record's members side by side, it comes twice"
                                )
                            seen.add(key)
                            current, members = key, {}
                        members[suffix.lower()] = Member(info.offset_data, info.size)
                        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header; a shard may hold 100,000
                    end = tar.offset
            except tarfile.TarError as error:
                raise InputError(f"{path}: expected an uncompressed tar, got {error}") from error
            # tarfile takes a broken header or the end of the file for the end of the archive, without an error.
            if os.pread(file.fileno(), _TAR_BLOCK, end) != bytes(_TAR_BLOCK):
                raise InputError(
                    f"{path}: expected an end-of-archive mark at byte {end}, got a truncated or broken shard"
                )
            self._add(number, path, current, members, file.fileno())

    def _add(self, number: int, path: str, key: str | None, members: dict[str, Member], descriptor: int) -> None:
        if key is None:
            return
        image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
        found = f"got {', '.join(f'.{s}' for s in members)}"
        if image is None:
            raise InputError(f"{path}: {key}: expected an image (.{', .'.join(IMAGE_SUFFIXES)}), {found}")
        if "json" not in members:
            raise InputError(f"{path}: {key}: expected {key}.json with instruction and target, {found}")
        payload = os.pread(descriptor, members["json"].size, members["json"].offset)
        self.num_samples += len(parse_record(payload, key, path, needs_target=self.needs_target))
        self.records.append(Record(number, key, image, members["json"]))

    def _read(self, shard: int, member: Member) -> bytes:
        # A descriptor belongs to the process that opened it: a forked worker shares its file position, but pread
        # doesn't use one; a spawned worker has none of them. Reopen on a change of process all the same.
        process, descriptor = self._descriptors.get(shard, (-1, -1))
        if process != os.getpid():
            if len(self._descriptors) >= _MAX_OPEN_SHARDS:
                oldest, (owner, stale) = next(iter(self._descriptors.items()))
                del self._descriptors[oldest]
                if owner == os.getpid():
                    os.close(stale)
            descriptor = os.open(self.paths[shard], os.O_RDONLY)
            self._descriptors[shard] = (os.getpid(), descriptor)
        content = os.pread(descriptor, member.size, member.offset)
        if len(content) != member.size:
            raise InputError(
                f"{self.paths[shard]}: expected {member.size} bytes at {member.offset}, got {len(content)}"
            )
        return content

    def samples(self, index: int) -> tuple[Sample, ...]:
        """The samples of record ``index``."""
        record = self.records[index]
        payload = self._read(record.shard, record.json)
        return parse_record(payload, record.key, self.paths[record.shard], needs_target=self.needs_target)

    def image_bytes(self, index: int) -> bytes:
        """The encoded image of record ``index``."""
        record = self.records[index]
        return self._read(record.shard, record.image)

    def describe(self) -> str:
        """One line for logs."""
        return f"{len(self.paths)} shards, {len(self.records)} images, {self.num_samples} samples"


def write_shard(path: Path, records: Sequence[tuple[str, bytes, bytes]], image_suffix: str = "png") -> None:
    """Writes one shard: ``(key, encoded image, JSON)`` for each record. Complete or absent, never half."""
    import webdataset

    # A fixed time makes equal content equal bytes.
    with replacing(path) as temporary, webdataset.TarWriter(str(temporary), mtime=0) as writer:
        for key, image, payload in records:
            writer.write({"__key__": key, image_suffix: image, "json": payload})
