"""Shards copied to a disk of this machine before they are read, complete or absent.

For shards in object storage or on a slow network folder that are read for many epochs, and the only way to read
``pipe:COMMAND``, which can't be read by position. One process of a machine at a time copies what is missing; a copy is checked
against the size and the SHA-256 in `index.json` where its folder has one. A file beside it says what it was copied from: it is
made anew where that changed, which elsewhere the size and the time of the last change tell, or what a bucket has for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from mmprefix.data import storage
from mmprefix.data.index import INDEX_NAME, read_index
from mmprefix.errors import InputError
from mmprefix.files import replacing

PIPE = "pipe:"
_BLOCK = 8 << 20
_THREADS = 8
_PART = re.compile(r"\..*\.(\d+)\.part")


@dataclass(frozen=True)
class _Copy:
    """A shard and what is known of it.

    Attributes:
        source: path, or ``pipe:COMMAND``.
        path: of the copy.
        stamp: changes when the source does.
        size: in bytes; None where only reading tells.
        sha256: in hex, where an index has it.
    """

    source: str
    path: Path
    stamp: str
    size: int | None = None
    sha256: str | None = None

    @property
    def note(self) -> Path:
        """Where `stamp` stands when the copy is complete."""
        return self.path.with_name(f".{self.path.name}.source")

    def is_current(self) -> bool:
        """Whether there is a copy of the source as it is now."""
        return self.path.is_file() and _read(self.note) == self.stamp.encode()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


class ShardCache:
    """A folder with a folder for each place that shards come from.

    Attributes:
        folder: on this machine.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path_of(self, source: str) -> Path:
        """Where the copy of a shard is, or will be."""
        place, name = (source, "shard.tar") if source.startswith(PIPE) else storage.split(source)
        if not source.startswith(PIPE) and not storage.is_remote(source):
            place = os.path.abspath(place)
        return self.folder / hashlib.sha256(place.encode()).hexdigest()[:16] / name

    def paths(self, sources: Sequence[str], what: str) -> list[str]:
        """The copies of shards that `fetch` has made.

        Raises:
            InputError: one is missing.
        """
        copies = [self.path_of(source) for source in sources]
        for source, path in zip(sources, copies, strict=True):
            if not path.is_file():
                raise InputError(f"{what}: expected a copy of {source} at {path}, found none")
        return [str(path) for path in copies]

    def fetch(self, sources: Sequence[str], what: str) -> int:
        """Copies what is not there, or has changed; returns how many shards that were.

        Args:
            sources: paths, or ``pipe:COMMAND``.
            what: setting they came from, for messages.

        Raises:
            InputError: no room, a command that fails, a copy that is not what the index says.
            OSError: a source that stays unreadable.
        """
        copies, indices = self._known({self.path_of(source): source for source in sources})
        if all(c.is_current() for c in copies) and all(_read(path) == content for path, content in indices.items()):
            return 0  # nothing is written: the folder may be another user's
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise InputError(f"data.shard_cache: cannot write in {self.folder}: {error.strerror}") from error
        # The processes of a node, and other runs on it, come here at the same time: one copies, the others find it done.
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._fetch(copies, indices, what)

    def _fetch(self, copies: list[_Copy], indices: dict[Path, bytes | None], what: str) -> int:
        self._remove_leftovers()
        for path, content in indices.items():
            if content is None:
                path.unlink(missing_ok=True)
            elif _read(path) != content:
                with replacing(path) as temporary:
                    temporary.write_bytes(content)
        missing = [copy for copy in copies if not copy.is_current()]
        if not missing:
            return 0
        for copy in missing:  # what is there is of something else
            copy.path.unlink(missing_ok=True)
        wanted, free = sum(copy.size or 0 for copy in missing), shutil.disk_usage(self.folder).free
        if wanted > free:
            raise InputError(
                f"data.shard_cache: expected room for {wanted:,} bytes of {what} in {self.folder}, got {free:,}"
            )
        copying = _Copying()
        # In a log file each refresh is a line of its own.
        refresh = 0.1 if sys.stderr.isatty() else 30.0
        with (
            tqdm(desc=f"{what} to {self.folder}", total=wanted or None, unit="B", unit_scale=True, mininterval=refresh) as bar,
            ThreadPoolExecutor(_THREADS) as pool,
        ):  # fmt: skip
            try:
                for future in [pool.submit(copying.copy, copy, bar.update) for copy in missing]:
                    future.result()
            except BaseException:
                copying.stop()  # else Ctrl-C would wait for shards of gigabytes
                pool.shutdown(cancel_futures=True)
                raise
        return len(missing)

    def _known(self, sources: dict[Path, str]) -> tuple[list[_Copy], dict[Path, bytes | None]]:
        """What is known of shards, and the index of each place that they come from, by the path of its copy."""
        copies, indices, entries = [], dict[Path, bytes | None](), dict[str, dict[str, Any]]()
        for path, source in sources.items():
            if source.startswith(PIPE):
                copies.append(_Copy(source, path, PIPE))
                continue
            folder, name = storage.split(source)
            if folder not in entries:
                splits = read_index(folder or ".").values()
                entries[folder] = {shard["name"]: shard for entry in splits for shard in entry["shards"]}
                index = storage.join(folder, INDEX_NAME)
                indices[path.with_name(INDEX_NAME)] = storage.read_whole(index) if splits else None
            entry = entries[folder].get(name, {})
            if entry.get("sha256"):
                copies.append(_Copy(source, path, f"sha256 {entry['sha256']}", entry["bytes"], entry["sha256"]))
            else:
                size, stamp = storage.state_of(source)
                copies.append(_Copy(source, path, stamp, size))
        return copies, indices

    def _remove_leftovers(self) -> None:
        """Of processes of this machine that were killed."""
        for path in self.folder.glob("*/.*.part"):
            found = _PART.fullmatch(path.name)
            if found and not _runs(int(found[1])):
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


class _Copying:
    """Copies shards in several threads, until told to stop."""

    def __init__(self) -> None:
        self._stopped = False
        self._commands: set[int] = set()  # process groups

    def stop(self) -> None:
        """Ends commands at once, and whatever else is copied at its next block."""
        self._stopped = True
        for group in tuple(self._commands):
            _kill(group)

    def copy(self, copy: _Copy, advance: Callable[[int], Any]) -> None:
        """Copies a shard; reads that fail are tried again."""
        storage.attempt(copy.source, lambda: self._once(copy, advance))

    def _once(self, copy: _Copy, advance: Callable[[int], Any]) -> None:
        digest, size = hashlib.sha256(), 0
        copy.note.unlink(missing_ok=True)
        try:
            with replacing(copy.path) as temporary:
                with self._opened(copy.source) as source, temporary.open("wb") as target:
                    while block := source.read(_BLOCK):
                        if self._stopped:
                            raise InputError(f"{copy.source}: stopped")
                        _write(target, block, copy.path)
                        digest.update(block)
                        size += len(block)
                        advance(len(block))
                if copy.size not in (None, size):
                    raise InputError(f"{copy.source}: expected {copy.size} bytes, got {size}")
                if copy.sha256 and digest.hexdigest() != copy.sha256:
                    raise InputError(
                        f"{copy.source}: expected SHA-256 {copy.sha256} as in {INDEX_NAME}, got {digest.hexdigest()}"
                    )
                if copy.size is None and not _ends_as_tar(temporary):
                    raise InputError(f"{copy.source}: expected a tar, got {size} bytes without its end-of-archive mark")
        except BaseException:
            advance(-size)
            raise
        with replacing(copy.note) as temporary:
            temporary.write_text(copy.stamp)

    @contextmanager
    def _opened(self, source: str) -> Iterator[BinaryIO]:
        if not source.startswith(PIPE):
            with storage.open_file(source) as file:
                yield file
            return
        # The command is the user's own, from the config, as webdataset runs it. What it says may be more than a pipe holds.
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                source.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE, stderr=said, start_new_session=True
            ) as process,
        ):
            assert process.stdout is not None
            self._commands.add(process.pid)
            if self._stopped:  # in the meantime
                _kill(process.pid)
            try:
                yield process.stdout  # type: ignore[misc]
                process.wait()
            except BaseException:
                _kill(process.pid)  # with what the shell has started
                raise
            finally:
                self._commands.discard(process.pid)
            if process.returncode:
                said.seek(-min(said.seek(0, os.SEEK_END), 4096), os.SEEK_END)
                lines = said.read().decode(errors="replace").strip().splitlines() or ["no message"]
                status = f"the command ended with status {process.returncode}"
                raise InputError(f"{source}: expected a shard, {status}: {lines[-1][:200]}")


def _ends_as_tar(path: Path) -> bool:
    """Whether a file ends with a tar's two blocks of zeros: a command may succeed with half of one, or with nothing."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < 1024:
            return False
        file.seek(-1024, os.SEEK_END)
        return not any(file.read())


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _write(file: BinaryIO, block: bytes, path: Path) -> None:
    try:
        file.write(block)
    except OSError as error:  # a full disk: no matter of the source, and not to be tried again
        raise InputError(f"data.shard_cache: cannot write {path}: {error.strerror}") from error
