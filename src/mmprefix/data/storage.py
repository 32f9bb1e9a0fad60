"""Files read by position: on this machine, on a network folder, or in object storage.

A path with a protocol (``s3://bucket/train-*.tar``, ``gs://``, ``https://``) is read through fsspec and the package that it
has for the protocol; all others are files. Nothing is read but what is asked for, and a read that fails is tried again.
"""

from __future__ import annotations

import glob
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar

from mmprefix.errors import InputError, UnreadableError

_MAX_OPEN = 256  # each process may open 1,024 files on many systems
_PAUSES = (0.1, 0.5, 2.0, 5.0)
"""Seconds before a failed read is tried again; networks fail for moments."""

Result = TypeVar("Result")


def is_remote(path: str) -> bool:
    """Whether a path is one of fsspec's."""
    return "://" in path


def _filesystem(path: str) -> tuple[Any, str]:
    """fsspec's filesystem of a remote path, and the path in it."""
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return found


def join(folder: str, name: str) -> str:
    """The path of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def split(path: str) -> tuple[str, str]:
    """A file's folder and name."""
    if is_remote(path):
        folder, _, name = path.rpartition("/")
        return folder, name
    return os.path.dirname(path), os.path.basename(path)


def is_folder(path: str) -> bool:
    """Whether there is such a folder; for object storage, anything under that name."""
    if not is_remote(path):
        return os.path.isdir(path)
    filesystem, inside = _filesystem(path)
    return bool(attempt(path, lambda: filesystem.isdir(inside)))


def find(pattern: str) -> list[str]:
    """Files that match a path or glob, sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    filesystem, inside = _filesystem(pattern)
    if not glob.has_magic(inside):
        return [pattern] if attempt(pattern, lambda: filesystem.isfile(inside)) else []
    return sorted(map(str, map(filesystem.unstrip_protocol, attempt(pattern, lambda: filesystem.glob(inside)))))


def size_of(path: str) -> int:
    """In bytes."""
    if not is_remote(path):
        return os.path.getsize(path)
    filesystem, inside = _filesystem(path)
    return int(attempt(path, lambda: filesystem.size(inside)))


def state_of(path: str) -> tuple[int, str]:
    """Size in bytes, and text that changes when the file does: with its time, or with what a bucket has for it."""
    if not is_remote(path):
        found = os.stat(path)
        return found.st_size, f"{found.st_size} bytes, {found.st_mtime_ns}"
    filesystem, inside = _filesystem(path)
    info = attempt(path, lambda: filesystem.info(inside))
    names = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
    return int(info["size"]), ", ".join([f"{info['size']} bytes", *(str(info[name]) for name in names if name in info)])


def read_whole(path: str) -> bytes:
    """All of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    filesystem, inside = _filesystem(path)
    return bytes(attempt(path, lambda: filesystem.cat_file(inside)))


def open_file(path: str) -> BinaryIO:
    """A file to seek and read in; a remote one is fetched block by block."""
    if not is_remote(path):
        return open(path, "rb")
    filesystem, inside = _filesystem(path)
    opened: BinaryIO = attempt(path, lambda: filesystem.open(inside, "rb"))
    return opened


def attempt(path: str, read: Callable[[], Result], forget: Callable[[], None] = lambda: None) -> Result:
    """Tries again after errors that may pass, with a warning for each; the last one is raised as an `UnreadableError`.

    Args:
        path: for messages.
        read: what to try.
        forget: called after each failure: a stale handle of a network folder stays stale.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except Exception as error:  # each package of fsspec's has errors of its own
            forget()
            if isinstance(error, FileNotFoundError | PermissionError | InputError):
                raise
            if not is_remote(path) and not isinstance(error, OSError):
                raise
            message = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
            if pause is None:
                raise UnreadableError(f"{path}: {message}") from error
            warnings.warn(f"{path}: {message}; reading again in {pause} s", stacklevel=2)
            time.sleep(pause)
    raise AssertionError("the last pause is None")


class Reader:
    """Bytes of many files by position, from any process.

    Attributes:
        paths: the files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        # Of the process that opened them: a forked one shares its parent's position in a file (pread uses none), a
        # spawned one has none of them, and connections must not be shared.
        self._open: dict[int, tuple[int, Any]] = {}

    def read(self, number: int, size: int, offset: int) -> bytes:
        """``size`` bytes of file ``number`` from ``offset``; fewer at its end.

        Raises:
            OSError: what stayed after all attempts.
        """
        path = self.paths[number]
        if is_remote(path):
            return attempt(path, lambda: self._fetch(number, size, offset), lambda: self._close(number))
        return attempt(path, lambda: os.pread(self._descriptor(number), size, offset), lambda: self._close(number))

    def _fetch(self, number: int, size: int, offset: int) -> bytes:
        process, found = self._open.get(number, (-1, None))
        if process != os.getpid():
            found = _filesystem(self.paths[number])
            self._open[number] = (os.getpid(), found)
        filesystem, inside = found
        return bytes(filesystem.cat_file(inside, start=offset, end=offset + size))

    def _descriptor(self, number: int) -> int:
        process, descriptor = self._open.get(number, (-1, -1))
        if process != os.getpid():
            if len(self._open) >= _MAX_OPEN:
                self._close(next(iter(self._open)))
            descriptor = os.open(self.paths[number], os.O_RDONLY)
            self._open[number] = (os.getpid(), descriptor)
        return int(descriptor)

    def _close(self, number: int) -> None:
        process, opened = self._open.pop(number, (-1, None))
        if process == os.getpid() and isinstance(opened, int):
            os.close(opened)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens its own."""
        return {"paths": self.paths, "_open": {}}
