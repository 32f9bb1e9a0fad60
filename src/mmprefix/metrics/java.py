"""The official Java programs of caption evaluation: where they are, and how one is run.

They come with the package ``pycocoevalcap`` (the extra ``captions``), of which only the jars are used: its own wrappers
write into the package's folder, wait without end, and shift lines on some characters.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

OLDEST_JAVA = 8


class JavaUnavailableError(Exception):
    """Why a Java program cannot be run here, in one line."""


def jar(path: str) -> Path:
    """A jar of the extra ``captions``, by its path inside ``pycocoevalcap``.

    Raises:
        JavaUnavailableError: the package is not installed, or comes without it.
    """
    spec = find_spec("pycocoevalcap")  # finds without importing: some of its modules download when imported or used
    if spec is None or not spec.submodule_search_locations:
        raise JavaUnavailableError("pycocoevalcap is not installed: pip install 'mmprefix[captions]'")
    found = Path(next(iter(spec.submodule_search_locations))) / path
    if not found.is_file():
        raise JavaUnavailableError(f"pycocoevalcap comes without {path}: expected {found}")
    return found


def java() -> str:
    """Path of ``java``, of a version that runs the programs.

    Raises:
        JavaUnavailableError: there is none, or it is too old, or does not start.
    """
    path = shutil.which("java")
    if path is None:
        raise JavaUnavailableError(f"no java on PATH: expected Java {OLDEST_JAVA} or newer")
    version = _version(path)
    if version is None:
        raise JavaUnavailableError(f"{path} -version does not say which Java it is: expected {OLDEST_JAVA} or newer")
    if version < OLDEST_JAVA:
        raise JavaUnavailableError(f"Java {version} at {path}: expected {OLDEST_JAVA} or newer")
    return path


@cache
def _version(path: str) -> int | None:
    """Major version; 8 calls itself 1.8."""
    try:
        said = subprocess.run([path, "-version"], capture_output=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(rb'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    return int(found[1]) if found else None


@contextmanager
def conversation(arguments: Sequence[str | Path], timeout: float) -> Iterator[Callable[[str | None], str]]:
    """Runs ``java arguments`` for the length of a block, and yields a function that asks it.

    The function writes a line (none for None) and returns the next line of the answer, stripped.

    Args:
        arguments: without ``java`` itself.
        timeout: seconds for the whole block, after which the program is killed.

    Raises:
        JavaUnavailableError: Java is not there, or the program ended, by itself or killed, before it had answered.
    """
    command = [java(), *map(str, arguments)]
    with tempfile.TemporaryDirectory(prefix="mmprefix-") as folder, tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints
            )
        except OSError as error:
            raise JavaUnavailableError(f"{command[0]} could not be started: {error}") from None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(timeout, process.kill)
        late.start()

        def ask(line: str | None) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if line is not None:
                    process.stdin.write(f"{line}\n".encode())
                    process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:  # a broken pipe
                answer = b""
            if not answer:
                late.cancel()
                status = process.wait()
                complaints.seek(0)
                said = complaints.read().decode(errors="replace").strip().splitlines() or ["no message"]
                raise JavaUnavailableError(f"{_name(command)} ended with status {status} before it was done: {said[0]}")
            return answer.decode(errors="replace").strip()

        try:
            yield ask
        finally:
            late.cancel()
            process.kill()
            process.wait()
            with suppress(OSError):  # of a line that nobody will read
                process.stdin.close()
            process.stdout.close()


def run(arguments: Sequence[str | Path], folder: Path, timeout: float) -> str:
    """Standard output of ``java arguments``, run in ``folder``.

    Args:
        arguments: without ``java`` itself.
        folder: where it may write.
        timeout: seconds, after which it is killed.

    Raises:
        JavaUnavailableError: Java is not there, failed, or took longer.
    """
    command = [java(), *map(str, arguments)]
    try:
        done = subprocess.run(
            command, cwd=folder, timeout=timeout, capture_output=True, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise JavaUnavailableError(f"{_name(command)} took longer than {timeout:.0f} s and was ended") from None
    except OSError as error:
        raise JavaUnavailableError(f"{command[0]} could not be started: {error}") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise JavaUnavailableError(f"{_name(command)} ended with status {done.returncode}: {lines[0]}")
    return done.stdout.decode(errors="replace")


def _name(command: Sequence[str]) -> str:
    return next((Path(part).name for part in command if part.endswith(".jar")), "java")
