"""Files and folders that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what is written there takes its place when the block ends well.

    Works for files and for folders. On an error (a full disk, Ctrl-C) the temporary is removed and what stood at
    ``path`` is untouched. Behind a symbolic link, what it points to is replaced. What is neither a file nor a
    folder (a pipe, a device) is written to as it is.

    Raises:
        IsADirectoryError: a file was written, and a folder stands at ``path``.
    """
    final = Path(path).resolve()
    if final.exists() and not final.is_file() and not final.is_dir():
        yield Path(path)
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield temporary
        if final.is_dir() and not temporary.is_dir():
            raise IsADirectoryError(errno.EISDIR, "expected a file or nothing, found a folder", str(final))
        if final.is_dir():  # a folder cannot be renamed onto a folder that holds something
            old = final.with_name(f".{final.name}.{os.getpid()}.old")
            os.rename(final, old)
            os.rename(temporary, final)
            shutil.rmtree(old)
        else:
            os.replace(temporary, final)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        # A full disk doesn't say of what it is full.
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            raise OSError(error.errno, error.strerror, str(final)) from error
        raise


def set_aside(folder: Path) -> Path | None:
    """Renames ``folder`` to ``folder.1`` (or the next free number) if it holds anything; returns the new name."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(kept)
    return kept
