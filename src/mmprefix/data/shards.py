"""webdataset shards as a random-access collection: known by (shard, offset, size) of every member, read by position.

A shard is an ordinary tar as webdataset writes and reads it: members of one record follow each other and share a key,
``KEY.jpg`` beside ``KEY.json`` (or ``KEY.0.jpg``, ``KEY.1.jpg``, ... for several images). Knowing where every member lies
makes an epoch a permutation: every record exactly once, in an order that depends on seed and epoch alone and can be
resumed anywhere.

Where a folder has an `index.json` (`index.py`), nothing is read to know that. Other shards are scanned at each start:
headers and JSON members are read once and checked, so that a bad record is reported before training, not hours into
it. Either way, whatever is read later is checked against its header in the tar. Member names are keys only, never paths
on disk, and nothing is unpickled or evaluated.
"""

from __future__ import annotations

import glob
import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand
import numpy as np
from webdataset.tariterators import base_plus_ext

from mmprefix.data import storage
from mmprefix.data.index import INDEX_NAME, read_index
from mmprefix.data.samples import MAX_IMAGE_BYTES, MAX_JSON_BYTES, Sample, parse_record
from mmprefix.data.shard_cache import PIPE
from mmprefix.errors import InputError
from mmprefix.files import replacing

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_TAR_BLOCK = 512
_Members = tuple[np.ndarray, np.ndarray]
"""Of a shard: int64 ``[records]``, images of each record; int64 ``[members, 2]``, offset and size of each image and JSON."""


@dataclass(frozen=True)
class Member:
    """Where a member's content lies: byte offset and size within its shard."""

    offset: int
    size: int


def expand_shards(pattern: str | Sequence[str], what: str, *, pipes: bool = False) -> list[str]:
    """Paths of the shards that a pattern names, sorted.

    Args:
        pattern: a path, glob (``train-*.tar``), brace range (``train-{000..009}.tar``) or folder, or a list of them; on
            this machine or, with a protocol, wherever fsspec reads.
        what: setting the pattern came from, for messages.
        pipes: whether ``pipe:COMMAND`` may stand among them.

    Raises:
        InputError: a folder or file that is missing, a pattern without a match, no pattern, or a shard that comes twice.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not all(patterns) or not patterns:
        raise InputError(f"{what}: expected the path of shards, got {pattern!r}")
    paths: list[str] = []
    for entry in patterns:
        try:
            # A command keeps its backslashes.
            alternatives = list(braceexpand.braceexpand(entry, escape=not entry.startswith(PIPE)))
        except ValueError as error:
            raise InputError(f"{what}: expected braces in pairs, got {entry}") from error
        for expanded in alternatives:
            if expanded.startswith(PIPE):
                if not pipes:
                    raise InputError(
                        f"{what}: expected shards that can be read by position, got {expanded}: a pipe can't be; "
                        "name a folder on this machine for its output with --data.shard_cache"
                    )
                paths.append(expanded)
                continue
            candidate = storage.join(expanded, "*.tar") if storage.is_folder(expanded) else expanded
            matches = storage.find(candidate)
            if not matches:
                folder = storage.split(candidate)[0] or "."
                if not storage.is_folder(folder):
                    raise InputError(f"{what}: expected shards at {expanded}, the folder {folder} does not exist")
                tars = len(storage.find(storage.join(glob.escape(folder), "*.tar")))
                raise InputError(
                    f"{what}: expected shards at {expanded}, none match ({folder} holds {tars} .tar files)"
                )
            paths += matches
    twice = [path for path, number in Counter(paths).items() if number > 1 and not path.startswith(PIPE)]
    if twice:
        raise InputError(f"{what}: expected each shard once, got {twice[0]} twice")
    return paths


class ShardCollection:
    """The records of some shards.

    Attributes:
        paths: the shards.
        num_samples: instructions on all records.
        indexed: how many of the shards an `index.json` describes; the others were scanned.
    """

    def __init__(
        self, pattern: str | Sequence[str], what: str, *, needs_target: bool = True, problems: list[str] | None = None
    ) -> None:
        """Finds out where every record lies, from the folders' indices or by scanning.

        Args:
            pattern: see `expand_shards`.
            what: setting the pattern came from, for messages.
            needs_target: whether a sample without target is refused.
            problems: takes what is wrong with records that are scanned, which are then left out; None makes it an error.

        Raises:
            InputError: missing or truncated shards, records without image or JSON, samples that are incomplete.
        """
        self.paths = expand_shards(pattern, what)
        self._problems = problems
        self.needs_target = needs_target
        self.num_samples = self.indexed = 0
        self._set_firsts = np.zeros(1, np.int64)  # where each joined collection begins
        self._reader = storage.Reader(self.paths)
        self._keys: list[list[str] | None] = []  # of a shard's records; None where their headers say them
        members: list[_Members] = []
        index_of = cache(read_index)
        indices: dict[str, dict[str, Any]] = {}
        for path in self.paths:
            folder, name = storage.split(path)
            if folder not in indices:
                indices[folder] = _shards_of(index_of(folder or "."), needs_target)
            entry = indices[folder].get(name)
            if entry is None:
                members.append(self._scan(path))
            else:
                members.append(_members_of(path, entry))
                self._keys.append(None)
                self.num_samples += entry["samples"]
                self.indexed += 1
        check_complete(pattern, what, index_of)
        # Where each shard's records begin in the numbering of all.
        self._firsts = np.cumsum([0, *(len(counts) for counts, _ in members)])
        counts = np.concatenate([np.zeros(0, np.int64), *(counts for counts, _ in members)])
        # A record's members are its images and then its JSON; where those of each begin.
        self._starts = np.cumsum([0, *(counts + 1)])
        self._members = np.concatenate([np.zeros((0, 2), np.int64), *(places for _, places in members)])
        if not len(self) and not problems:
            raise InputError(
                f"{what}: expected records (KEY.jpg + KEY.json) in {', '.join(self.paths[:3])}, found none"
            )

    @classmethod
    def joined(cls, collections: Sequence[ShardCollection]) -> ShardCollection:
        """Several collections as one, the records of each behind those of the one before it."""
        if len(collections) == 1:
            return collections[0]
        whole = cls.__new__(cls)
        whole.paths = [path for one in collections for path in one.paths]
        whole.needs_target = collections[0].needs_target
        whole.num_samples = sum(one.num_samples for one in collections)
        whole.indexed = sum(one.indexed for one in collections)
        whole._reader = storage.Reader(whole.paths)
        whole._keys = [keys for one in collections for keys in one._keys]
        whole._firsts = np.cumsum([0, *(n for one in collections for n in np.diff(one._firsts))])
        whole._starts = np.cumsum([0, *(n for one in collections for n in np.diff(one._starts))])
        whole._members = np.concatenate([one._members for one in collections])
        whole._set_firsts = np.cumsum([0, *map(len, collections)])[:-1]
        return whole

    @property
    def set_sizes(self) -> tuple[int, ...]:
        """How many records each joined collection has."""
        return tuple(np.diff([*self._set_firsts, len(self)]).tolist())

    def set_of(self, index: int) -> int:
        """Which of the joined collections record ``index`` is of."""
        return int(np.searchsorted(self._set_firsts, index, side="right")) - 1

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _scan(self, path: str) -> _Members:
        members: dict[str, Member] = {}
        current: str | None = None
        found: dict[str, list[int]] = {}
        size = storage.size_of(path)
        with storage.open_file(path) as file:
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
                            self._add(path, current, members, file, found)
                            current, members = key, {}
                        members[suffix.lower()] = Member(info.offset_data, info.size)
                        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header; a shard may hold 100,000
                    end = tar.offset
            except InputError:  # which is a ValueError
                raise
            # Headers are read from strangers' files: tarfile lets much through besides its own errors.
            except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
                raise InputError(f"{path}: expected an uncompressed tar, got {' '.join(str(error).split())}") from error
            # tarfile takes a broken header or the end of the file for the end of the archive, without an error.
            if _at(file, end, _TAR_BLOCK) != bytes(_TAR_BLOCK):
                raise InputError(
                    f"{path}: expected an end-of-archive mark at byte {end}, got a truncated or broken shard"
                )
            self._add(path, current, members, file, found)
        self._keys.append(list(found))
        counts = np.array([len(numbers) // 2 - 1 for numbers in found.values()], dtype=np.int64)
        return counts, np.array([n for numbers in found.values() for n in numbers], dtype=np.int64).reshape(-1, 2)

    def _add(
        self, path: str, key: str | None, members: dict[str, Member], file: BinaryIO, found: dict[str, list[int]]
    ) -> None:  # fmt: skip
        """Enters a record that is complete; another is an error, or one of the problems that are wanted."""
        if key is None:
            return
        try:
            self._add_complete(path, key, members, file, found)
        except InputError as error:
            if self._problems is None:
                raise
            self._problems.append(str(error))

    def _add_complete(
        self, path: str, key: str, members: dict[str, Member], file: BinaryIO, found: dict[str, list[int]]
    ) -> None:
        if key in found:
            raise InputError(f"{path}: {key}: expected a record's members side by side, it comes twice")
        images = _images_among(members)
        got = f"got {', '.join(f'.{s}' for s in members)}"
        if "json" not in members:
            raise InputError(f"{path}: {key}: expected {key}.json with instruction and target, {got}")
        _check_size(path, key, members["json"].size, MAX_JSON_BYTES)
        payload = _at(file, members["json"].offset, members["json"].size)
        samples = parse_record(payload, key, path, needs_target=self.needs_target)
        _check_number(path, key, samples, len(images), got)
        for image in images:
            _check_size(path, key, image.size, MAX_IMAGE_BYTES)
        self.num_samples += len(samples)
        found[key] = [number for member in (*images, members["json"]) for number in (member.offset, member.size)]

    def _read(self, shard: int, member: Member) -> bytes:
        path = self.paths[shard]
        content = self._reader.read(shard, _TAR_BLOCK + member.size, member.offset - _TAR_BLOCK)
        header, content = content[:_TAR_BLOCK], content[_TAR_BLOCK:]
        size = _size_in(header)
        if size != member.size:
            raise InputError(
                f"{path}: expected a tar header of {member.size} bytes before byte {member.offset}, got "
                f"{'none' if size is None else f'one of {size}'}: the shard changed, or {INDEX_NAME} is not its own"
            )
        if len(content) != member.size:
            raise InputError(f"{path}: expected {member.size} bytes at {member.offset}, got {len(content)}")
        return content

    def path_of(self, index: int) -> str:
        """The shard of record ``index``."""
        return self.paths[self._shard_of(index)]

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._firsts, index, side="right")) - 1

    def key(self, index: int) -> str:
        """The key of record ``index``."""
        shard = self._shard_of(index)
        keys = self._keys[shard]
        if keys is not None:
            return keys[index - int(self._firsts[shard])]
        header = self._reader.read(shard, _TAR_BLOCK, self._json(index).offset - _TAR_BLOCK)
        name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
        # It goes into messages: a harmed or hostile one must not steer the terminal.
        name = "".join(c if c.isprintable() else "?" for c in name)
        return str(base_plus_ext(name)[0] or name or f"record {index}")

    @property
    def num_all_images(self) -> int:
        """How many images all records have."""
        return len(self._members) - len(self)

    def num_images(self, index: int) -> int:
        """How many images record ``index`` has."""
        return int(self._starts[index + 1] - self._starts[index]) - 1

    def image(self, index: int, number: int = 0) -> Member:
        """Where an image of record ``index`` lies in its shard."""
        return Member(*map(int, self._members[self._starts[index] + number]))

    def _json(self, index: int) -> Member:
        return Member(*map(int, self._members[self._starts[index + 1] - 1]))

    def samples(self, index: int) -> tuple[Sample, ...]:
        """The samples of record ``index``."""
        payload = self._read(self._shard_of(index), self._json(index))
        key, path = self.key(index), self.path_of(index)
        samples = parse_record(payload, key, path, needs_target=self.needs_target)
        _check_number(path, key, samples, self.num_images(index), f"got {self.num_images(index)} in {INDEX_NAME}")
        return samples

    def image_bytes(self, index: int, number: int = 0) -> bytes:
        """An encoded image of record ``index``."""
        return self._read(self._shard_of(index), self.image(index, number))

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the shards' names and of where everything lies in them, wherever their folders are."""
        digest = hashlib.sha256("\0".join(storage.split(path)[1] for path in self.paths).encode())
        for numbers in (self._firsts, self._starts, self._members):
            digest.update(np.asarray(numbers, np.int64).tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for logs."""
        records = "" if self.num_all_images == len(self) else f"{len(self)} records, "
        shards = f"{len(self.paths)} shard{'' if len(self.paths) == 1 else 's'}"
        return f"{shards}, {records}{self.num_all_images} images, {self.num_samples} samples"


def _images_among(members: dict[str, Member]) -> list[Member]:
    """The images of a record: ``.jpg``, or ``.0.jpg``, ``.1.jpg``, ... in the order of their numbers."""
    alone = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
    if alone is not None:
        return [alone]
    numbered = []
    for suffix, member in members.items():
        number, _, kind = suffix.partition(".")
        if kind in IMAGE_SUFFIXES and number.isascii() and number.isdigit():
            numbered.append((int(number), member))
    return [member for _, member in sorted(numbered, key=lambda pair: pair[0])]


def _check_number(path: str, key: str, samples: Sequence[Sample], number: int, got: str) -> None:
    """A record with fewer images than its samples speak of has lost some."""
    for sample in samples:
        if sample.images != number:
            expected = f"an image (.{', .'.join(IMAGE_SUFFIXES)})" if sample.images == 1 else f"{sample.images} images"
            raise InputError(f"{path}: {key}: expected {expected}, {got}")


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes at a place; the position in the file stays, since `tarfile` counts on its own."""
    position = file.tell()
    try:
        file.seek(offset)
        return file.read(size)
    finally:
        file.seek(position)


def check_complete(
    pattern: str | Sequence[str], what: str, index_of: Callable[[str], Mapping[str, Any]] = read_index
) -> None:
    """A glob or a folder takes what is there: it must not lose a shard that the index beside it knows.

    Args:
        pattern, what: as in `expand_shards`.
        index_of: reads a folder's index, which takes a second for a large set.

    Raises:
        InputError: naming it, or an index that can't be read.
    """
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        for expanded in () if entry.startswith(PIPE) else braceexpand.braceexpand(entry):
            if expanded.endswith(".tar") and not glob.has_magic(expanded):
                continue  # asked for by name: no question to object storage for each of thousands
            wanted = storage.join(expanded, "*.tar") if storage.is_folder(expanded) else expanded
            name = storage.split(wanted)[1]
            if not glob.has_magic(name):
                continue
            there = storage.find(wanted)
            for folder in dict.fromkeys(storage.split(path)[0] for path in there):
                known = [shard["name"] for split in index_of(folder or ".").values() for shard in split["shards"]]
                expected = [storage.join(folder, shard) for shard in known if fnmatchcase(shard, name)]
                lost = sorted({*expected}.difference(there))
                if lost:
                    raise InputError(
                        f"{what}: expected {len(lost):,} more shard(s), as {INDEX_NAME} says, found none at "
                        f"{', '.join(lost[:3])}"
                    )


def _shards_of(index: Mapping[str, Any], needs_target: bool) -> dict[str, dict[str, Any]]:
    """What an index says of its shards, by file name."""
    splits = index.values()
    # Where targets may be missing, they are looked for.
    usable = (split for split in splits if not (needs_target and (split.get("made_by") or {}).get("no_targets")))
    return {shard["name"]: shard for split in usable for shard in split["shards"]}


def _members_of(path: str, entry: dict[str, Any]) -> _Members:
    """The members of an indexed shard.

    Raises:
        InputError: a shard of another size than the index says, or members that lie beyond it.
    """
    size = storage.size_of(path)
    advice = f"the shard changed, or {INDEX_NAME} is not its own"
    if size != entry["bytes"]:
        raise InputError(f"{path}: expected {entry['bytes']} bytes, as {INDEX_NAME} says, got {size}: {advice}")
    try:
        members = np.array(entry["members"], dtype=np.int64).reshape(-1, 2)
        counts = np.array(entry.get("images", [1] * entry["records"]), dtype=np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: expected whole numbers in {INDEX_NAME}, got {error}") from error
    starts, sizes = members[:, 0], members[:, 1]
    if (starts < _TAR_BLOCK).any() or (sizes < 0).any() or (starts > size).any() or (sizes > size - starts).any():
        raise InputError(f"{path}: expected members inside of the shard's {size} bytes: {advice}")
    if len(members):
        is_json = np.zeros(len(sizes), dtype=bool)
        is_json[np.cumsum(counts + 1) - 1] = True
        _check_size(path, INDEX_NAME, int(sizes[is_json].max()), MAX_JSON_BYTES)
        _check_size(path, INDEX_NAME, int(sizes.max()), MAX_IMAGE_BYTES)
    return counts, members


def _check_size(path: str, key: str, size: int, most: int) -> None:
    if size > most:
        raise InputError(f"{path}: {key}: expected members of at most {most} bytes, got one of {size}")


def _size_in(header: bytes) -> int | None:
    """The size that a tar header names; None where it is no header."""
    if header[257:262] != b"ustar":
        return None
    try:
        return int(tarfile.nti(header[124:136]))  # type: ignore[attr-defined]
    except tarfile.HeaderError:
        return None


def write_shard(path: Path, records: Sequence[tuple[str, bytes, bytes]], image_suffix: str = "png") -> None:
    """Writes one shard: ``(key, encoded image, JSON)`` for each record. Complete or absent, never half."""
    import webdataset

    # A fixed time makes equal content equal bytes.
    with replacing(path) as temporary, webdataset.TarWriter(str(temporary), mtime=0) as writer:
        for key, image, payload in records:
            writer.write({"__key__": key, image_suffix: image, "json": payload})
