"""The one exception class for what the user can put right.

The command line prints an `InputError` as a single line and exits with status 2; any other exception is a defect of
ours and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input. The message is one line that says what was expected, what came and where (file, key, shard)."""


class SaidElsewhereError(OSError):
    """An error of the disk that stops all processes of a run; another of them says it."""


class UnreadableError(OSError):
    """What stayed unreadable after all attempts; the message names it, in one line."""
