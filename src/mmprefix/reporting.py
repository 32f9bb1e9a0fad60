"""`report`: the predictions of a run, or of two, as one page that loads nothing. Imports no Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mmprefix.arguments import CommandParser, exit_status, keep_inputs
from mmprefix.errors import InputError
from mmprefix.evaluation.drawings import DrawnSample
from mmprefix.evaluation.html_report import MAX_SAMPLES, PICTURE_BUDGET, from_page, write_report
from mmprefix.evaluation.runs import Row, Run, read_run
from mmprefix.evaluation.thumbnails import MIB, NOT_FOUND, Picture, telling_first

if TYPE_CHECKING:
    from mmprefix.data.samples import Sample
    from mmprefix.data.shards import ShardCollection

MAX_DRAWN = 100
"""Samples with drawings: each takes a pass or two, and some hundred KiB of the page."""


def run(arguments: list[str]) -> int:
    """`report`; see `arguments.exit_status`."""
    return exit_status(report, arguments)


def report(arguments: list[str]) -> int:
    """Writes the page and prints what is in it.

    Raises:
        InputError: what is missing or can't be read.
    """
    parser = CommandParser(
        "report",
        "Writes the predictions of a run as one page: scores, curves, confusion, a gallery to search.",
        "Pictures come from --images, or from the report.html that lies beside the predictions.",
    )
    parser.add_argument("--run", required=True, type=Path, help="run folder, or a predictions.jsonl")
    parser.add_argument("--compare", type=Path, help="another, on the same samples: adds a paired test")
    parser.add_argument("--scores", type=Path, help="per-item scores, as `score --json` writes; by default exact match")
    parser.add_argument("--compare-scores", type=Path, help="the same for --compare")
    parser.add_argument("--metric", help="the score that sorts the gallery, where there are several")
    parser.add_argument("--images", nargs="+", help="shards with the pictures: a folder, glob or brace range")
    parser.add_argument("--out", required=True, type=Path, help="the page to write, FILE.html")
    parser.add_argument(
        "--picture-budget", type=float, default=PICTURE_BUDGET / MIB, metavar="MIB",
        help="size of all pictures in the page (default: %(default)g); the worst and the best answers' come first",
    )  # fmt: skip
    parser.add_argument(
        "--max-samples",
        type=int,
        default=MAX_SAMPLES,
        help="samples in the gallery (default: %(default)s); numbers are of all",
    )
    parser.add_argument(
        "--visualize", type=int, default=0, metavar="K",
        help="draw mask, attention and loss of K answers, the worst and the best by turns; needs --images",
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help="of that model; by default the run folder's newest")
    options = parser.parse_args(arguments)
    if not 0 <= options.visualize <= MAX_DRAWN:
        raise InputError(f"--visualize: expected a number of samples from 0 to {MAX_DRAWN}, got {options.visualize}")
    if options.visualize and not options.images:
        raise InputError(
            "--visualize: expected --images with it, shards with the pictures as the model sees them, got none"
        )
    if options.visualize and options.checkpoint is None and not options.run.is_dir():
        raise InputError(f"--visualize: expected a run folder or --checkpoint, got the file {options.run} alone")
    if options.checkpoint is not None and not options.visualize:
        raise InputError("--checkpoint: expected --visualize with it, got none")
    if options.max_samples < 1:
        raise InputError(f"--max-samples: expected at least 1, got {options.max_samples}")
    if not 0 <= options.picture_budget < 1 << 20:
        raise InputError(f"--picture-budget: expected MiB from 0, got {options.picture_budget}")
    if options.out.is_dir():
        raise InputError(f"--out: expected the name of a file, got the folder {options.out}")
    keep_inputs("--out", options.out, [options.run, options.compare, options.scores, options.compare_scores])
    if (options.scores is None) != (options.compare_scores is None) and options.compare is not None:
        raise InputError("--compare: expected both or none of --scores and --compare-scores, got one of them")
    if options.compare_scores is not None and options.compare is None:
        raise InputError("--compare-scores: expected --compare with it, got none")
    first = read_run(options.run, options.scores, options.metric)
    second = read_run(options.compare, options.compare_scores, options.metric) if options.compare else None
    drawn: list[DrawnSample] = []
    if options.images:
        shards, records = _records(options.images, first.rows)
        picture = _from_shards(shards, records)
        if options.visualize:
            drawn = _drawn(options.checkpoint or options.run, first, shards, records, options.visualize)
    else:
        folder = options.run if options.run.is_dir() else options.run.parent
        name = "report.html" if options.run.is_dir() else f"{options.run.stem.replace('predictions', 'report', 1)}.html"
        picture = from_page(first, folder / name)
    budget = int(options.picture_budget * MIB)
    print(
        write_report(options.out, first, picture, second, budget=budget, max_samples=options.max_samples, drawn=drawn)
    )
    return 0


def _records(patterns: list[str], rows: Sequence[Row]) -> tuple[ShardCollection, list[int | None]]:
    """Shards, and in which record of theirs each row's sample is: by its id, else by its image's.

    Raises:
        InputError: shards that can't be read, or that hold none of the samples.
    """
    from mmprefix.data.shards import ShardCollection

    shards = ShardCollection(patterns, "--images", needs_target=False)
    of_sample: dict[tuple[str, str], int] = {}
    of_image: dict[str, int] = {}
    for record in range(len(shards)):
        for sample in shards.samples(record):
            of_sample.setdefault((sample.id, sample.image_id), record)
            of_image.setdefault(sample.image_id, record)
    records = [of_sample.get((row.id, row.image_id), of_image.get(row.image_id)) for row in rows]
    found = sum(record is not None for record in records)
    if not found:
        raise InputError(
            f"--images: expected shards with the samples of --run, none of its {len(rows)} is in {shards.describe()}: "
            f"looked for id {rows[0].id!r} and image {rows[0].image_id!r}"
        )
    if found < len(rows):
        print(f"--images: {len(rows) - found:,} of {len(rows):,} samples are not in these shards: they have no picture")
    return shards, records


def _from_shards(shards: ShardCollection, records: Sequence[int | None]) -> Picture:
    """The pictures of rows, by the record of each."""
    from mmprefix.data.images import UndecodableImageError, decode_image  # with torch
    from mmprefix.evaluation.pictures import as_stored

    def picture(row: int) -> Image.Image | str:
        record = records[row]
        if record is None:
            return NOT_FOUND
        try:
            return as_stored([decode_image(shards.image_bytes(record, n)) for n in range(shards.num_images(record))])
        except UndecodableImageError:
            return "picture can't be read"

    return picture


def _drawn(
    checkpoint: Path, run: Run, shards: ShardCollection, records: Sequence[int | None], number: int
) -> list[DrawnSample]:
    """What the model did with the most telling samples of a run; a sample that can't be drawn says why.

    Raises:
        InputError: no model there.
    """
    import torch

    from mmprefix.data.images import UndecodableImageError, decode_image
    from mmprefix.evaluation.visualize import draw_answer
    from mmprefix.training.checkpoints import load_model

    model, processor = load_model(checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    order = telling_first(run.scores.items[run.scores.primary])
    found = []
    for place in islice((place for place in order if records[place] is not None), number):
        row, record = run.rows[place], records[place]
        assert record is not None
        others = [text for text in row.references if text.strip() != row.prediction.strip() and text.strip()]
        expected = others[0] if others and len(others) == len(row.references) else None
        try:
            images = [decode_image(shards.image_bytes(record, n)) for n in range(shards.num_images(record))]
            instruction = _instruction(row, shards.samples(record))
            drawings, notes = draw_answer(model, processor, images, instruction, row.prediction.strip(), expected)
        except (InputError, UndecodableImageError) as error:
            drawings, notes = (), (f"Not drawn: {error}",)
        found.append(DrawnSample(place, drawings, notes))
    return found


def _instruction(row: Row, samples: Sequence[Sample]) -> str | tuple[str, ...]:
    """What stood in front of a row's answer: turns, where there were several and no template went over them."""
    for sample in samples:
        if sample.id == row.id and len(sample.turns) > 1:
            if sample.instruction != row.instruction:
                raise InputError("its turns were put into a template, of which the predictions have the text alone")
            return sample.turns
    return row.instruction
