"""Commands that are not Lightning's: their parser, and what errors end them with."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from mmprefix.errors import InputError


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


def exit_status(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs a command: its status, 2 after a line for bad input, 1 after one for a disk that fails, 130 after Ctrl-C.

    Raises:
        BrokenPipeError: `__main__` knows whose pipe it was.
    """
    try:
        return command(arguments)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
