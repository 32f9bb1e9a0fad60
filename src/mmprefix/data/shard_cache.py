"""Shards copied to a disk of this machine before they are read, complete or absent.

For shards in object storage or on a slow network folder that are read for many epochs, and the only way to read
``pipe:COMMAND``, which can't be read by position. One process of a machine at a time copies what is missing; a copy is checked
against the size and the SHA-256 in `index.json` where its folder has one, against the size of the file elsewhere, and is
made anew where that changed.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        size: in bytes; None where only reading tells.
        sha256: in hex, where an index has it.
    """

    source: str
    path: Path
    size: int | None
    sha256: str | None


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
        self.folder.mkdir(parents=True, exist_ok=True)
        # The processes of a node, and other runs on it, come here at the same time: one copies, the others find it done.
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._fetch(sources, what)

    def _fetch(self, sources: Sequence[str], what: str) -> int:
        copies = self._copies(dict.fromkeys(sources))
        missing = [c for c in copies if not c.path.is_file() or c.size not in (None, c.path.stat().st_size)]
        if not missing:
            return 0
        self._remove_leftovers()
        wanted, free = sum(copy.size or 0 for copy in missing), shutil.disk_usage(self.folder).free
        if wanted > free:
            raise InputError(
                f"data.shard_cache: expected room for {wanted / 1e9:.1f} GB of {what} in {self.folder}, "
                f"got {free / 1e9:.1f} GB"
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

    def _copies(self, sources: Iterable[str]) -> list[_Copy]:
        """What is known of shards; copies of what changed are removed, and so is what was made of their index."""
        copies, indices = [], dict[str, dict[str, Any]]()
        for source in sources:
            path = self.path_of(source)
            if source.startswith(PIPE):
                copies.append(_Copy(source, path, None, None))
                continue
            folder, name = storage.split(source)
            if folder not in indices:
                indices[folder] = self._copy_index(folder or ".", path.parent)
            entry = indices[folder].get(name)
            if entry is None:
                copies.append(_Copy(source, path, storage.size_of(source), None))
            else:
                copies.append(_Copy(source, path, entry["bytes"], entry.get("sha256")))
        return copies

    def _copy_index(self, source: str, folder: Path) -> dict[str, Any]:
        """The entries of a folder's index by shard, the index being copied, too."""
        now, before = _entries(source), _entries(str(folder))
        if now == before:
            return now
        for path in folder.glob("*.tar"):
            entry = now.get(path.name, {})
            if not entry.get("sha256") or entry["sha256"] != before.get(path.name, {}).get("sha256"):
                path.unlink()
        index = folder / INDEX_NAME
        if now:
            with replacing(index) as temporary:
                temporary.write_bytes(storage.read_whole(storage.join(source, INDEX_NAME)))
        else:
            index.unlink(missing_ok=True)
        return now

    def _remove_leftovers(self) -> None:
        """Of processes of this machine that were killed."""
        for path in self.folder.glob("*/.*.part"):
            found = _PART.fullmatch(path.name)
            if found and not _runs(int(found[1])):
                path.unlink(missing_ok=True)


def _entries(folder: str) -> dict[str, Any]:
    """Of an index, by shard."""
    return {shard["name"]: shard for entry in read_index(folder).values() for shard in entry["shards"]}


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
        except BaseException:
            advance(-size)
            raise

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
            except BaseException:
                _kill(process.pid)  # with what the shell has started
                raise
            finally:
                self._commands.discard(process.pid)
            if process.wait():
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines() or ["no message"]
                status = f"the command ended with status {process.returncode}"
                raise InputError(f"{source}: expected a shard, {status}: {lines[-1][:200]}")


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _write(file: BinaryIO, block: bytes, path: Path) -> None:
    try:
        file.write(block)
    except OSError as error:  # a full disk: no matter of the source, and not to be tried again
        raise InputError(f"data.shard_cache: cannot write {path}: {error.strerror}") from error
