"""The parser of commands that are not Lightning's."""

from __future__ import annotations

import argparse
import os
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
