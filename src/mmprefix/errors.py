"""What ends a command with one line: bad input, a disk that fails, and memory that is not enough.

The command line prints an `InputError` as a single line and exits with status 2; any other exception is a defect of ours and
keeps its traceback.
"""

from __future__ import annotations

import re


class InputError(ValueError):
    """Bad input. The message is one line that says what was expected, what came and where (file, key, shard)."""


class SaidElsewhereError(OSError):
    """An error of the disk that stops all processes of a run; another of them says it."""


class UnreadableError(OSError):
    """What stayed unreadable after all attempts; the message names it, in one line."""


def printable(text: str) -> str:
    """Text from data as a terminal may have it: what would steer it, or can't be shown, is a ``?``."""
    return "".join(c if c.isprintable() else "?" for c in text)


_ON_CPU = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_BY_NUMPY = re.compile(r"Unable to allocate ([\d.]+ \w+)")
_ELSEWHERE = re.compile(r"(CUDA|HIP|MPS|XPU)(?: error| backend)?:? out of memory(?!\. Tried)")
_ON_DEVICE = re.compile(
    r"(\w+) out of memory\. Tried to allocate ([\d.]+ \w+)(?:\. GPU (\d+) has .*?of which ([\d.]+ \w+) is free)?",
    re.DOTALL,
)


def out_of_memory(error: BaseException) -> str | None:
    """What was asked for, of whom, and what to ask less of, in one line; None for an error that is about something else."""
    said = str(error)
    if found := _ON_DEVICE.search(said):
        device, asked, number, free = found.groups()
        where = f"{device} device {number}" if number else f"{device} device"
        what = f"{asked} of the {where}, where {free} are free" if free else f"{asked} of the {where}"
    elif found := _ELSEWHERE.search(said):
        what = f"more than the {found[1]} device has"
    elif found := _ON_CPU.search(said):
        what = f"{int(found[1]) / 2**30:.1f} GiB of this machine's memory"
    elif isinstance(error, MemoryError):
        asked = _BY_NUMPY.search(said)
        what = f"{asked[1]} of this machine's memory" if asked else "more of this machine's memory than it has"
        if "DataLoader worker" in said:
            what += " in a loader process (data.num_workers)"
    else:
        return None
    return (
        f"out of memory: asked for {what}; take less at a time (training: data.batch_size, data.max_tokens, "
        "model.gradient_checkpointing; evaluation: data.eval_batch_size, data.eval_window, model.num_beams)"
    )
