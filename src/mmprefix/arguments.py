"""Commands that are not Lightning's: their parser, files that they must not overwrite, and what errors end them with."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from mmprefix.errors import InputError, printable


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CommandParser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            f"python -m mmprefix {command}", description=description, epilog=epilog, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.command = command

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.command}: {message}")


def keep_inputs(option: str, out: Path, inputs: Iterable[Path | None]) -> None:
    """Makes sure that what a command writes isn't what it reads.

    Args:
        option: that ``out`` came with.
        out: to be written.
        inputs: of the same command; None for those it was called without.

    Raises:
        InputError: one of them is ``out``.
    """
    for path in inputs:
        if path is not None and out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"{option}: expected another file than what is read, got {out}")


def exit_status(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs a command: its status, 2 after a line for bad input, 1 after one for a disk that fails, 130 after Ctrl-C.

    Raises:
        BrokenPipeError: `__main__` knows whose pipe it was.
    """
    try:
        return command(arguments)
    except InputError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
