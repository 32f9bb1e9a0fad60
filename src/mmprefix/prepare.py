"""`prepare`: a published set, a table or a folder of pictures -> webdataset shards with an index.

Imports neither torch nor Lightning: a conversion begins at once, and so do its worker processes.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
import time
from argparse import Namespace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmprefix import __version__
from mmprefix.arguments import CommandParser, available_cores, exit_status
from mmprefix.data.sources import PICTURES, READERS, Columns, SourceOptions, staged_records
from mmprefix.data.staging import Staging
from mmprefix.data.writing import (
    Converted,
    Job,
    alone_in,
    check_strangers,
    convert,
    finished_entry,
    workers,
)
from mmprefix.errors import InputError, printable

if TYPE_CHECKING:
    from tqdm import tqdm

DIGITS = "digits"
TABLES = ("jsonl", "csv", "parquet")
_COLUMNS = tuple(vars(Columns()))
_EPILOG = """\
examples:
  prepare coco    --annotations captions_train2017.json --images train2017 --out data/coco
  prepare coco    --annotations dataset_coco.json --split test --images . --out data/coco        (Karpathy's splits)
  prepare vqa     --questions v2_OpenEnded_mscoco_val2014_questions.json
                  --annotations v2_mscoco_val2014_annotations.json --images val2014 --split val --out data/vqav2
  prepare jsonl   --annotations mine.jsonl --images pictures --image-column file --target-column text --out data/mine
  prepare folder  --images pictures --out data/mine            (pictures with a .txt beside them)

What the sets' files look like, and what becomes of them: docs/data_format.md.
"""


def _parser() -> CommandParser:
    parser = CommandParser("prepare", "Writes webdataset shards and their index.", _EPILOG)
    parser.add_argument("source", choices=(*READERS, DIGITS), help="the format that is read")
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards; several splits may share it")
    parser.add_argument("--images", type=Path, help="folder that the names of images are relative to")
    parser.add_argument("--annotations", nargs="+", type=Path, default=[], help="annotation file(s)")
    parser.add_argument("--questions", type=Path, help="vqa: the questions file")
    parser.add_argument(
        "--split", default="train", help="name of the shards, and the part of a file that holds several"
    )
    parser.add_argument("--shard-size", type=int, default=1000, help="images in a shard")
    parser.add_argument(
        "--instruction", help="prefix text; {question} stands for the question (captions: 'caption en')"
    )
    parser.add_argument(
        "--image-name", help="textcaps, vqa, textvqa, gqa: a picture's name, with {image_id} or {image_id:012d}"
    )
    for name in _COLUMNS:
        parser.add_argument(f"--{name}-column", metavar="NAME", help=f"tables: by default {getattr(Columns(), name)}")
    parser.add_argument("--require-image", action="store_true", help="leave out samples of text only")
    parser.add_argument("--no-targets", action="store_true", help="keep samples without a target, for predict")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="shrink images whose longer side is larger")
    parser.add_argument("--tokenizer", help="count text lengths with this tokenizer, not in UTF-8 bytes")
    parser.add_argument("--processes", type=int, default=available_cores(), help="by default one for each core")
    parser.add_argument("--overwrite", action="store_true", help="replace the split that the folder holds")
    return parser


def _checked(arguments: list[str]) -> Namespace:
    options = _parser().parse_args(arguments)
    for name, least in (("shard_size", 1), ("processes", 1), ("resize", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if options.shard_size > 99_999:
        raise InputError(f"--shard-size: expected at most 99999, got {options.shard_size}")
    if not options.split or not all(c.isalnum() or c in "-_." for c in options.split) or options.split.startswith("."):
        raise InputError(f"--split: expected a name of letters, digits, '-', '_' and '.', got {options.split!r}")
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out: expected a folder, got the file {options.out}")
    source = options.source
    if source == DIGITS:
        defaults = _parser().parse_args([DIGITS, "--out", str(options.out)])
        given = [name for name, value in vars(options).items() if value != getattr(defaults, name)]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')}: expected none with {DIGITS}, which has --out only")
        return options
    given = [f"--{name}-column" for name in _COLUMNS if getattr(options, f"{name}_column") is not None]
    if given and source not in TABLES:
        raise InputError(f"{given[0]}: expected with {', '.join(TABLES)} only, got {source}")
    if options.questions is not None and source != "vqa":
        raise InputError(f"--questions: expected with vqa only, got {source}")
    if (
        source != "folder"
        and not options.annotations
        and not (source == "vqa" and options.questions and options.no_targets)
    ):
        raise InputError(f"--annotations: expected the annotation file of {source}, got none")
    if source == "folder" and options.annotations:
        raise InputError("--annotations: expected none with folder: texts stand beside the pictures")
    for path in (*options.annotations, *([options.questions] if options.questions else [])):
        if not path.is_file():
            raise InputError(
                f"--{'questions' if path == options.questions else 'annotations'}: expected a file, found none at {path}"
            )
    if options.images is None:
        if source != "parquet":
            raise InputError("--images: expected the folder of the pictures, got none")
    elif not options.images.is_dir():
        raise InputError(f"--images: expected a folder, found none at {options.images}")
    return options


def _fingerprint(options: Namespace) -> dict[str, Any]:
    """How a split was made: what must be the same for an interrupted run to go on."""
    made_by: dict[str, Any] = {"command": f"prepare {options.source}", "version": __version__}
    files = [*options.annotations, *([options.questions] if options.questions else [])]
    made_by["files"] = [[path.name, _sha256(path)] for path in files]
    for name, value in vars(options).items():
        if name not in ("source", "out", "annotations", "questions", "processes", "overwrite") and value:
            made_by[name] = str(value) if isinstance(value, Path) else value
    if options.source == "folder":
        made_by["pictures"] = sum(
            name.lower().endswith(PICTURES) for _, _, names in os.walk(options.images) for name in names
        )
    return made_by


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(arguments: list[str]) -> int:
    """Runs a conversion, says what it came to, and returns the exit status: 0, 2 where nothing could be used, 130 after Ctrl-C.

    Raises:
        InputError: options or files that don't fit, or a folder that holds something else.
    """
    options = _checked(arguments)
    with alone_in(options.out):
        return _digits(options.out) if options.source == DIGITS else _convert(options)


def _convert(options: Namespace) -> int:
    started = time.monotonic()
    columns = {n: v for n in _COLUMNS if (v := getattr(options, f"{n}_column")) is not None}
    source = SourceOptions(
        options.images, tuple(options.annotations), options.questions, options.split, options.instruction,
        options.image_name, Columns(**columns), not options.no_targets,
    )  # fmt: skip
    fingerprint = _fingerprint(options)
    if not options.overwrite:
        entry = finished_entry(options.out, options.split, fingerprint)
        if entry is not None:
            print(
                f"{options.out}: {options.split} is complete already, made from the same annotations with the same options; "
                "pictures were not compared, --overwrite makes it anew"
            )
            _say(Converted(entry), options)
            return 0
        check_strangers(options.out, options.split)
    job = Job(options.out, options.split, options.resize, options.tokenizer, needs_target=not options.no_targets)
    try:
        with workers(options.processes, options.tokenizer) as pool, Staging(options.out, options.split) as staging:
            inside = READERS[options.source](source, staging)  # only Parquet with pictures inside gives records itself
            records = chain(inside or (), staged_records(options.images or Path(), staging, options.require_image))
            with _Bar(options.split, None if inside else len(staging)) as bar:
                try:
                    converted = convert(
                        job, records, fingerprint, shard_size=options.shard_size, pool=pool, processes=options.processes,
                        overwrite=options.overwrite, refused=staging.refused, advance=bar.update,
                    )  # fmt: skip
                except KeyboardInterrupt:
                    print("\nstopping as soon as the shards in hand are written", file=sys.stderr)
                    raise
    except sqlite3.Error as error:  # annotations are kept there while they are joined
        raise OSError(f"{options.out}: cannot keep annotations there while they are read: {error}") from error
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from the finished shards in {options.out}", file=sys.stderr)
        return 130
    _say(converted, options)
    if not converted.entry["samples"]:
        raise InputError(f"--out: {options.out}: expected samples, nothing of what was read could be used")
    print(f"{time.monotonic() - started:.1f} seconds; train on it with --data.train '{_pattern(options, converted)}'")
    return 0


def _pattern(options: Namespace, converted: Converted) -> str:
    """What names the split's shards, and none of a split `val-2014` beside `val`."""
    mine = {shard["name"] for shard in converted.entry["shards"]}
    if {path.name for path in options.out.glob(f"{options.split}-*.tar")} <= mine:
        return f"{options.out}/{options.split}-*.tar"
    numbers = sorted(name.removesuffix(".tar")[-6:] for name in mine)
    of_all = numbers[0] if len(mine) == 1 else f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{options.out}/{options.split}-{of_all}.tar"


class _Bar:
    """A progress bar that is made, and tqdm imported, only where somebody waits."""

    def __init__(self, name: str, total: int | None) -> None:
        self._name, self._total = name, total
        # In a log file each refresh is a line of its own.
        self._interval = 0.1 if sys.stderr.isatty() else 30.0
        self._shown_at = time.monotonic() + max(0.5, self._interval)
        self._done = 0
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> _Bar:
        return self

    def update(self, number: int) -> None:
        """So many more images are done."""
        self._done += number
        if self._bar is None and time.monotonic() > self._shown_at:
            from tqdm import tqdm

            self._bar = tqdm(desc=self._name, total=self._total, unit="image", leave=False, mininterval=self._interval)
            number = self._done
        if self._bar is not None:
            self._bar.update(number)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _say(converted: Converted, options: Namespace) -> None:
    entry = converted.entry
    again = f", {converted.resumed} of them there before" if converted.resumed else ""
    number = len(entry["shards"])
    print(
        f"{options.out}: {number} shard{'' if number == 1 else 's'}{again}: {entry['images']:,} images, "
        f"{entry['samples']:,} samples, {entry['targets']:,} targets, {entry['bytes']:,} bytes"
    )
    if len(entry["kinds"]) > 1:
        shown = [f"{printable(kind)} {number:,}" for kind, number in list(entry["kinds"].items())[:12]]
        more = f" and {len(entry['kinds']) - 12} more" if len(entry["kinds"]) > 12 else ""
        print(f"kinds: {', '.join(shown)}{more}")
    lengths = entry["lengths"]
    unit = "UTF-8 bytes" if lengths["unit"] == "bytes" else f"tokens of {lengths['unit']}"
    for what in ("instruction", "target"):
        if lengths[what]:
            print(f"{what}s in {unit}: " + ", ".join(f"{name} {length}" for name, length in lengths[what].items()))
    if entry["refused"]:
        total = sum(entry["refused"].values())
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in entry["refused"].items())
        print(f"refused: {total:,} ({reasons}), each named in {options.out / (options.split + '.refused.jsonl')}")


def _digits(out: Path) -> int:
    from mmprefix.data.digits import SPLITS, shard_names, write_digits

    others = sorted({path.name for path in out.glob("*.tar")} - {*shard_names()})
    if others:
        raise InputError(f"--out: expected a folder for the digits alone, {out} holds {', '.join(others[:3])}")
    write_digits(out)
    print(f"{out}: {', '.join(f'{split} {len(rows)} images' for split, rows in SPLITS.items())}, three questions each")
    return 0


def run(arguments: list[str]) -> int:
    """`prepare`; see `arguments.exit_status`."""
    return exit_status(prepare, arguments)
