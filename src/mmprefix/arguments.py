"""Commands that are not Lightning's: their parser, files that they must not overwrite, and what errors end them with."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NoReturn

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

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """See `argparse.ArgumentParser`, which would first name all that is required."""
        for flag in self._unknown(args):
            close = self._nearest(flag, 0.5)
            self.error(f"unrecognized arguments: {flag}" + (f"; did you mean {close}?" if close else ""))
        return super().parse_args(args, namespace)

    def parse_with_settings(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own options, and the others, which are those of ``fit``.

        Raises:
            InputError: one that is almost the command's own, as none of ``fit``'s is.
        """
        for flag in self._unknown(arguments):
            if "." not in flag and (close := self._nearest(flag, 0.8)):
                self.error(f"unrecognized arguments: {flag}; did you mean {close}?")
        return self.parse_known_args(arguments)

    def _unknown(self, arguments: Sequence[str]) -> Iterator[str]:
        known = self._option_string_actions
        words = list(takewhile(lambda argument: argument != "--", arguments))
        for before, word in pairwise(["", *words]):
            flag = word.partition("=")[0]
            # Behind an option that takes a value argparse asks for that; what has a space is a value to it, too.
            wants_value = before in known and known[before].nargs != 0
            if flag.startswith("--") and " " not in word and flag not in known and not wants_value:
                yield flag

    def _nearest(self, flag: str, cutoff: float) -> str | None:
        names = [name for name in self._option_string_actions if name.startswith("--")]
        return next(iter(get_close_matches(flag, names, n=1, cutoff=cutoff)), None)


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
