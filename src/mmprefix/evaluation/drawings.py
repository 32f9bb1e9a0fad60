"""A section of a page: what a model did with some samples, as pictures. It knows no model, and imports no torch.

`visualize` draws; here pictures become part of the page: text escaped, each with words in its place for who can't see it, and
together no larger than a budget.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mmprefix.evaluation.runs import Run
from mmprefix.evaluation.svg import escaped
from mmprefix.evaluation.thumbnails import MIB

DRAWING_BUDGET = 16 * MIB
"""Bytes that all drawings of a page may have together, as they stand in it."""
_MAX_SUMMARY = 120
_QUALITY = 80


@dataclass(frozen=True)
class Drawing:
    """A picture and what it shows, in words.

    Attributes:
        title: what stands below it.
        words: what is to be seen, for those who can't.
        picture: RGB.
        photo: whether it has photographs in it, which are kept smaller with a loss that isn't seen.
    """

    title: str
    words: str
    picture: Image.Image
    photo: bool = False


@dataclass(frozen=True)
class DrawnSample:
    """What there is of one sample.

    Attributes:
        row: number of the prediction in its run.
        drawings: in the order of the page; empty where the sample could not be drawn.
        notes: why something is missing.
    """

    row: int
    drawings: tuple[Drawing, ...]
    notes: tuple[str, ...] = ()


def as_uri(drawing: Drawing) -> str:
    """The picture as a data URI: WebP, without loss where it is a chart."""
    buffer = io.BytesIO()
    drawing.picture.save(buffer, "WEBP", lossless=not drawing.photo, quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def drawn_section(samples: Sequence[DrawnSample], run: Run, budget: int = DRAWING_BUDGET) -> tuple[str, list[int]]:
    """The section's HTML, and the rows that are in it, of which row ``n`` is the element ``drawn-n``.

    Args:
        samples: the most telling first; those that no longer fit into the budget are left out, and the section says so.
        run: whose rows they are.
        budget: bytes of all pictures.
    """
    parts, rows, left, too_large = [], [], budget, 0
    for sample in samples:
        uris = [as_uri(drawing) for drawing in sample.drawings]
        size = sum(map(len, uris))
        if size > left:
            too_large += 1
            continue
        left -= size
        rows.append(sample.row)
        parts.append(_sample(sample, uris, run, is_open=len(rows) == 1))
    note = (
        "What the model computes of the answer that it gave: which token sees which, where each layer reads, where the "
        "answer's words look in the picture, and how sure it was of each token. Attention isn't an explanation."
    )
    if too_large:
        note += (
            f" {too_large:,} of {len(samples):,} samples are left out: their pictures would make this page too large."
        )
    return f'<p class="note">{escaped(note)}</p>{"".join(parts)}', rows


def _sample(sample: DrawnSample, uris: Sequence[str], run: Run, is_open: bool) -> str:
    row, score = run.rows[sample.row], float(run.scores.items[run.scores.primary][sample.row])
    said = row.prediction.strip() or "(nothing)"
    scored = "no score" if math.isnan(score) else f"{run.scores.primary} {score:.3g}"
    figures = "".join(
        f'<figure><img src="{uri}" width="{drawing.picture.width}" height="{drawing.picture.height}" '
        f'alt="{escaped(drawing.words)}" decoding="async"><figcaption><bdi>{escaped(drawing.title)}</bdi></figcaption></figure>'
        for drawing, uri in zip(sample.drawings, uris, strict=True)
    )
    notes = "".join(f'<p class="note"><bdi>{escaped(note)}</bdi></p>' for note in sample.notes)
    return (
        f'<details class="drawn" id="drawn-{sample.row}"{" open" if is_open else ""}><summary>'
        f"<bdi>{escaped(row.id)}</bdi>: <bdi>{escaped(_short(row.instruction))}</bdi> → "
        f"<b><bdi>{escaped(_short(said))}</bdi></b> <small>({escaped(scored)})</small></summary>"
        f'{notes}<div class="drawings">{figures}</div></details>'
    )


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SUMMARY else f"{text[: _MAX_SUMMARY - 1]}…"
