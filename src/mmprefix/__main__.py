"""``python -m mmprefix``: answers ``--help`` and ``--version`` at once, and imports the rest only when it has work."""

from __future__ import annotations

import os
import select
import signal
import sys

from mmprefix import __version__

USAGE = """\
usage: python -m mmprefix COMMAND [options]

Fine-tunes multimodal prefix LMs: any timm encoder, any Hugging Face decoder, an exact prefix mask.

commands:
  fit        train, then score the test split        fit --config configs/digits.yaml
  validate   score the validation split              validate --config C --ckpt_path runs/X/checkpoints/step=N.ckpt
  test       score the test split                    (the same options)
  predict    write predictions, no targets needed    (the same options)
  cache-features                                     cache-features --config C --out DIR (for a frozen encoder)
  prepare    a published set or a folder -> shards   prepare coco --annotations A --images DIR --out DIR
  inspect    what is in a folder of shards?          inspect DIR --config C
  score      official numbers of any predictions     score --task vqa --predictions F --references F
  report     predictions as one page to look at       report --run runs/X [--compare runs/Y] --out report.html
  generate   answer about one image                  generate --checkpoint runs/X --image a.png --instruction "..."
  visualize  attention, mask and loss, as pictures   visualize --checkpoint runs/X --image a.png --instruction "..." --out DIR
  probe      is this decoder an exact prefix LM?     probe --decoder NAME_OR_FOLDER
  estimate   memory, largest batch that fits         estimate --config C --devices 8 --memory 80
  doctor     is this node, this allocation fit?      doctor --config C; under srun or torchrun: all ranks
  scaling    a step on 8 to 512 devices, on paper    scaling --config C --devices 8,64,512 --tflops X --bandwidth Y
  import-paligemma                                   import-paligemma --from NAME_OR_FOLDER --out DIR
  export     for transformers, or as a PaliGemma     export --checkpoint runs/X --format transformers --out DIR
  consolidate                                        consolidate --checkpoint runs/X --out DIR (in little memory)

Every setting of a config can be given on the command line (--data.batch_size 16). To see them all:
  python -m mmprefix fit --help                      all settings, with what they mean
  python -m mmprefix fit --config C --print_config   the config as it will run
  fit --ckpt_path last                               go on from the newest checkpoint of the run folder

options:
  -h, --help     this text
  --version      version of mmprefix
"""

COMMANDS = (
    "fit", "validate", "test", "predict", "prepare", "inspect", "cache-features", "score", "report", "generate",
    "visualize", "probe", "estimate", "doctor", "scaling", "import-paligemma", "export", "consolidate",
)  # fmt: skip


CLOSED_OUTPUT = 128 + signal.SIGPIPE
"""Status where nobody reads our output any more (``| head -1``), as of programs that the signal ends."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 2 for bad input, `CLOSED_OUTPUT` where nobody reads what it prints."""
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # here, where it can be caught, and not when Python ends
    except BrokenPipeError as error:
        if not _reader_is_gone():  # a pipe of something else broke
            print(f"error: {error}", file=sys.stderr)
            return 1
        # Python flushes once more at its end, and must find someone who takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_OUTPUT


def _reader_is_gone() -> bool:
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # no file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"mmprefix {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        from difflib import get_close_matches

        close = get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"error: expected one of {', '.join(COMMANDS)}, got {arguments[0]!r}{hint}", file=sys.stderr)
        return 2
    try:
        if arguments[0] == "prepare":
            from mmprefix.prepare import run  # without torch

            return run(arguments[1:])
        if arguments[0] == "score":
            from mmprefix.scoring import run as score  # without torch

            return score(arguments[1:])
        if arguments[0] == "report":
            from mmprefix.reporting import run as report  # without Lightning

            return report(arguments[1:])
        from mmprefix.cli import run

        return run(arguments)
    except KeyboardInterrupt:  # while importing
        return 130


if __name__ == "__main__":
    sys.exit(main())
