"""What an instruction may be: one text, or the turns of a conversation so far; with marks where images stand.

Read by the data, which checks it, and by the model's prompts, which write it. Knows neither tokens nor pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmprefix.errors import InputError

IMAGE_MARK = "<image>"
"""Where an instruction says that an image stands; tokenizers get a token of this name."""


def as_turns(instruction: str | Sequence[str]) -> tuple[str, ...]:
    """An instruction as turns of user and assistant, of which the last is the user's.

    Raises:
        InputError: an even number of turns.
    """
    turns = (instruction,) if isinstance(instruction, str) else tuple(instruction)
    if len(turns) % 2 == 0:
        raise InputError(f"instruction: expected turns of user and assistant, the user's last, got {len(turns)} turns")
    return turns


def check_marks(turns: Sequence[str], num_images: int) -> None:
    """Raises InputError where turns place another number of images than there are; none means in front of all text."""
    marks = sum(turn.count(IMAGE_MARK) for turn in turns)
    if marks not in (0, num_images):
        raise InputError(
            f"instruction: expected {IMAGE_MARK} once for each image ({num_images}), or not at all, got it {marks} times"
        )
