"""`report.html`: a run's predictions as one page that loads nothing.

The page is text, style, one script and two blocks of JSON. Its content security policy forbids all loading, and lets run
only the script and the style whose hashes it names, so whatever stands in the data, nothing is fetched and nothing else
runs. Numbers, tables and charts are written here as HTML, with every text escaped, and are there without the script; the
gallery is made by `page/report.js` from the JSON, with ``textContent`` only.

Shapes: R rows (samples), of which S are shown in the gallery.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files as _resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmprefix.evaluation.drawings import DrawnSample, drawn_section
from mmprefix.evaluation.runs import Curve, Run
from mmprefix.evaluation.summary import Confusion, confusions, image_keys, kind_name, paired, summarize
from mmprefix.evaluation.svg import SURROGATE, escaped, interval_bar, line_chart
from mmprefix.evaluation.thumbnails import MIB, NOT_FOUND, Picture, embed, telling_first
from mmprefix.files import replacing
from mmprefix.metrics.intervals import paired_test

PICTURE_BUDGET = 16 * MIB
"""Bytes that the pictures of a page may have together, as they stand in it."""
MAX_SAMPLES = 20_000
"""Samples in the gallery; numbers are of all."""
_MAX_TEXT = 20_000
_GRADED = ("BLEU", "ROUGE", "CIDEr", "METEOR", "SPICE")
"""Scores of which 1 is not right, nor 0 wrong."""
_MAX_MATRICES = 12
_DATA_BLOCK = re.compile(r'<script type="application/json" id="report-pictures">(.*?)</script>', re.DOTALL)
_EMBEDDED = re.compile(r"data:image/webp;base64,[A-Za-z0-9+/]+={0,2}")


def write_report(
    path: Path,
    run: Run,
    picture: Picture,
    other: Run | None = None,
    *,
    budget: int = PICTURE_BUDGET,
    max_samples: int = MAX_SAMPLES,
    drawn: Sequence[DrawnSample] = (),
    written: datetime | None = None,
) -> str:
    """Writes the page; complete or absent. Returns a line that says what is in it.

    Args:
        path: of the file.
        run: what is shown.
        picture: the picture of a row of ``run`` (by number), or why there is none.
        other: a run to compare with.
        budget: bytes of all pictures.
        max_samples: in the gallery: the worst and the best, by turns. Numbers are of all.
        drawn: rows of ``run`` with pictures of what the model did, which have a budget of their own.
        written: the date in the page; by default now.

    Raises:
        InputError: runs that can't be compared.
    """
    note, original = "", range(len(run.rows))
    inside, of_rows = drawn_section(drawn, run) if drawn else ("", [])
    if other is not None:
        if other.name == run.name:
            run, other = replace(run, name=f"{run.name} (first)"), replace(other, name=f"{other.name} (second)")
        places = {(row.dataset, row.id): n for n, row in enumerate(run.rows)}
        run, other, note = paired(run, other)
        original = [places[row.dataset, row.id] for row in run.rows]  # type: ignore[assignment]
    scores = run.scores.items[run.scores.primary]
    change = None if other is None else np.nan_to_num(scores - other.scores.items[run.scores.primary])
    telling = list(islice(telling_first(scores, change), max_samples))
    shown = sorted(telling)
    keys = image_keys([run.rows[n] for n in shown])
    numbers: dict[tuple[str, str], int] = {}
    image_of = [numbers.setdefault(key, len(numbers)) for key in keys]
    place = {row: n for n, row in enumerate(shown)}
    sources = embed(
        (place[row] for row in telling), image_of, len(numbers), lambda n: picture(original[shown[n]]), budget
    )
    anchors = {n: original[row] for n, row in enumerate(shown) if original[row] in of_rows}
    page = _page(
        run, other, note, shown, image_of, list(numbers), sources, (inside, anchors), written or datetime.now(UTC)
    )
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode())
    embedded = sum(source.startswith("data:") for source in sources)
    more = f"{len(of_rows):,} drawn, " if drawn else ""
    return (
        f"{path}: {len(shown):,} samples, {embedded:,} of {len(sources):,} pictures, {more}"
        f"{len(page.encode()) / MIB:.1f} MiB"
    )


def embedded_pictures(path: Path) -> dict[tuple[str, str], str]:
    """The pictures in an earlier page, as data URIs by data set and image id; {} where there is none or no such page."""
    try:
        block = _DATA_BLOCK.search(path.read_text(encoding="utf-8"))
        content = json.loads(block[1]) if block else {"keys": [], "sources": []}
        pairs = zip(content["keys"], content["sources"], strict=True)
        return {(dataset, image): uri for (dataset, image), uri in pairs if _EMBEDDED.fullmatch(uri)}
    except (OSError, ValueError, KeyError, TypeError):  # no page of ours
        return {}


def from_page(run: Run, path: Path) -> Picture:
    """Pictures of ``run`` as an earlier page has them."""
    found, keys = embedded_pictures(path), image_keys(run.rows)
    return lambda row: found.get(keys[row], NOT_FOUND)


def _page(
    run: Run, other: Run | None, note: str, shown: Sequence[int], image_of: Sequence[int],
    image_names: Sequence[tuple[str, str]], sources: Sequence[str], drawn: tuple[str, dict[int, int]], written: datetime,
) -> str:  # fmt: skip
    matrices, of_other = (
        confusions(one.rows, one.scores.items[one.scores.primary]) if one is not None else [] for one in (run, other)
    )
    script, style = (_asset(name) for name in ("report.js", "report.css"))
    title = run.name if other is None else f"{run.name} against {other.name}"
    sections = [
        ("summary", "Summary", _summary(run, other, note, written)),
        ("comparison", "Comparison", _comparison(run, other) if other is not None else ""),
        ("kinds", "By kind", _kinds(run, other)),
        ("curves", "Training", _curves(run, other)),
        ("confusion", "Confusion", _confusion(run, matrices, other, of_other)),
        ("inside", "Attention and loss", drawn[0]),
    ]
    written_out = [(key, name, body) for key, name, body in sections if body]
    hidden = len(run.rows) - len(shown)
    embedded = sum(source.startswith("data:") for source in sources)
    remarks = []
    if hidden:
        remarks.append(
            f"The gallery holds {len(shown):,} of {len(run.rows):,} samples, the best and the worst; numbers are of all."
        )
    if 0 < embedded < len(sources):
        remarks.append(
            f"{embedded:,} of {len(sources):,} pictures are in this page, those of the best and worst answers first."
        )
    parts = {
        "title": escaped(title),
        "policy": _policy(script, style),
        "style": style,
        "script": script,
        "nav": "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in written_out),
        "sections": "".join(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{name}</h2>{body}</section>'
            for key, name, body in written_out
        ),
        "remarks": "".join(f'<p class="note">{escaped(remark)}</p>' for remark in remarks),
        "data": _json({**_gallery_data(run, other, shown, image_of, matrices), "drawn": drawn[1]}),
        "pictures": _json({"keys": image_names, "sources": sources}),
    }
    # In one pass: what stands in the data may look like a mark.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _asset("report.html"))


def _gallery_data(
    run: Run, other: Run | None, shown: Sequence[int], image_of: Sequence[int], matrices: Sequence[Confusion]
) -> dict[str, Any]:
    """What `report.js` shows, by column; texts that recur stand once."""
    rows = [run.rows[n] for n in shown]
    # Kinds are numbered as in the table of kinds, which has those of rows that are not shown, too.
    kinds = dict.fromkeys(kind_name(row.dataset, row.kind) for row in run.rows)
    tables: dict[str, dict[str, int]] = {"instructions": {}, "kinds": {name: n for n, name in enumerate(kinds)}}

    def number(table: str, text: str) -> int:
        return tables[table].setdefault(text, len(tables[table]))

    cell: list[list[int] | None] = [None] * len(rows)
    place = {row: n for n, row in enumerate(shown)}
    for of, matrix in enumerate(matrices):
        for row, (expected, said) in matrix.cells.items():
            if row in place:
                cell[place[row]] = [of, expected, said]
    runs = [run] if other is None else [run, other]
    metrics = [name for name in run.scores.items if all(name in one.scores.items for one in runs)]
    return {
        "metrics": metrics,
        "primary": metrics.index(run.scores.primary),
        # Where scores are shares of a right answer, 1 is right and 0 is wrong.
        "shares": [
            not name.startswith(_GRADED) and all(_are_shares(one.scores.items[name]) for one in runs)
            for name in metrics
        ],
        "id": [row.id for row in rows],
        "image": list(image_of),
        "kind": [number("kinds", kind_name(row.dataset, row.kind)) for row in rows],
        "instruction": [number("instructions", _cut(row.instruction)) for row in rows],
        "references": [[_cut(text) for text in row.references] for row in rows],
        "cell": cell,
        "runs": [
            {
                "name": one.name,
                "prediction": [_cut(one.rows[n].prediction) for n in shown],
                "scores": [[_rounded(one.scores.items[name][n]) for n in shown] for name in metrics],
            }
            for one in runs
        ],
        "matrices": [{"name": matrix.name, "answers": matrix.answers} for matrix in matrices],
        **{name: list(table) for name, table in tables.items()},
    }


def _summary(run: Run, other: Run | None, note: str, written: datetime) -> str:
    runs = [run] if other is None else [run, other]
    tiles = []
    for one in runs:
        primary = one.scores.primary
        of_corpus = one.scores.corpus.get(primary), one.scores.intervals.get(primary)
        found = summarize(one.scores.items[primary], image_keys(one.rows), *of_corpus)
        interval = (
            f"95% interval {_range(found.interval)}" if found.interval else "no interval: not a mean of its samples"
        )
        who = f"<bdi>{escaped(one.name)}</bdi>, " if other is not None else ""
        if found.scored or not math.isnan(found.value):
            tiles.append(_tile(f"{who}{escaped(primary)}", _value(found.value), interval, main=True))
    images = len(set(image_keys(run.rows)))
    kinds = len({(row.dataset, row.kind) for row in run.rows})
    for name, number in (("samples", len(run.rows)), ("images", images), ("kinds", kinds)):
        tiles.append(_tile(name, f"{number:,}"))
    body = f'<dl class="tiles">{"".join(tiles)}</dl>'
    if note:
        body += f'<p class="note">{escaped(note)}</p>'
    names = list(run.scores.items)
    if len(names) > 1 or set(run.scores.corpus) - set(names):
        body += _metrics_table(runs)
    for one in runs:
        body += "".join(f'<p class="note">{escaped(remark)}</p>' for remark in one.scores.notes)
    for one in runs:
        heading = f"<h3><bdi>{escaped(one.name)}</bdi></h3>" if other is not None else ""
        facts = {**one.facts, **({"Written": f"{written:%Y-%m-%d %H:%M} UTC"} if one is runs[-1] else {})}
        entries = "".join(f"<div><dt>{escaped(k)}</dt><dd><bdi>{escaped(v)}</bdi></dd></div>" for k, v in facts.items())
        body += f'{heading}<dl class="facts">{entries}</dl>'
    return body


def _metrics_table(runs: Sequence[Run]) -> str:
    head = "".join(
        f'<th scope="col"><bdi>{escaped(one.name)}</bdi></th><th scope="col">95% interval</th>' for one in runs
    )
    lines = []
    for name in dict.fromkeys(name for one in runs for name in (*one.scores.items, *one.scores.corpus)):
        cells = ""
        for one in runs:
            values, corpus = one.scores.items.get(name), one.scores.corpus.get(name)
            if values is None:
                interval = _range(one.scores.intervals.get(name))
                cells += f"<td>{'-' if corpus is None else _value(corpus)}</td><td>{interval}</td>"
                continue
            found = summarize(values, image_keys(one.rows), corpus, one.scores.intervals.get(name))
            cells += f"<td>{_value(found.value)}</td><td>{_range(found.interval)}</td>"
        lines.append(f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>')
    return _scrolling("All metrics", _table(f'<th scope="col">metric</th>{head}', lines))


def _comparison(run: Run, other: Run) -> str:
    primary, groups = run.scores.primary, image_keys(run.rows)
    first, second = run.scores.items[primary], other.scores.items[primary]
    known = np.flatnonzero(np.isfinite(first) & np.isfinite(second)).tolist()
    if not len(known):
        return '<p class="note">No sample has a score in both runs.</p>'
    test = paired_test(second[known], first[known], [groups[n] for n in known])
    difference = first[known] - second[known]
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    names = [f"<bdi>{escaped(one.name)}</bdi>" for one in (run, other)]
    sure = test.low > 0 or test.high < 0
    verdict = (
        f"{names[0] if test.difference > 0 else names[1]} is better: the interval of the difference does not hold 0."
        if sure
        else "No difference is shown: the interval of the difference holds 0."
    )
    tiles = (
        ("difference", _signed(test.difference), f"95% interval {_signed(test.low)} to {_signed(test.high)}"),
        ("p-value", f"{test.p_value:.3g}", "two-sided, paired by image"),
        (f"{names[0]} better", f"{better:,}", ""), (f"{names[1]} better", f"{worse:,}", ""),
        ("equal", f"{len(known) - better - worse:,}", ""),
    )  # fmt: skip
    shown = "".join(_tile(*tile) for tile in tiles)
    return f'<p class="verdict">{escaped(primary)}, {names[0]} minus {names[1]}: {verdict}</p><dl class="tiles">{shown}</dl>'


def _kinds(run: Run, other: Run | None) -> str:
    runs = [run] if other is None else [run, other]
    primary, groups = run.scores.primary, image_keys(run.rows)
    members: dict[str, list[int]] = {}
    for n, row in enumerate(run.rows):
        members.setdefault(kind_name(row.dataset, row.kind), []).append(n)
    found = {
        name: [summarize(one.scores.items[primary][of], [groups[n] for n in of]) for one in runs]
        for name, of in members.items()
    }
    if not any(one.scored for of in found.values() for one in of):
        return ""
    baseline_name, baseline = run.baseline
    high = max(1.0, *(one.value for of in found.values() for one in of if one.scored), *baseline.values())
    names = [f"<bdi>{escaped(one.name)}</bdi>" for one in runs] if other is not None else [escaped(primary)]
    head = '<th scope="col">kind</th><th scope="col">samples</th>'
    head += "".join(f'<th scope="col">{name}</th><th scope="col">95% interval</th>' for name in names)
    if baseline:
        head += f'<th scope="col">{escaped(baseline_name)}</th>'
    if other is not None:
        head += '<th scope="col">difference</th>'
    head += f'<th scope="col" class="bars">0 to {high:.4g}</th>'
    lines = []
    for number, (name, of) in enumerate(members.items()):
        values = found[name]
        cells = "".join(f"<td>{_value(v.value)}</td><td>{_range(v.interval)}</td>" for v in values)
        kind = run.rows[of[0]].kind
        beside = baseline.get(kind)
        if baseline:
            cells += f"<td>{'-' if beside is None else _value(beside)}</td>"
        if other is not None:
            cells += f"<td>{_kind_difference(run, other, of, groups)}</td>"
        bars = "".join(interval_bar(v.value, v.interval, high, beside) for v in values if v.scored)
        button = f'<button type="button" class="link" data-kind="{number}"><bdi>{escaped(name)}</bdi></button>'
        lines.append(f'<tr><th scope="row">{button}</th><td>{len(of):,}</td>{cells}<td class="bars">{bars}</td></tr>')
    what = f"{primary} by kind" + (f"; the tick is {baseline_name}" if baseline else "")
    note = f"{what}. Whiskers are 95% bootstrap intervals, images drawn whole. Choose a kind to see its samples."
    return f'<p class="note">{escaped(note)}</p>' + _scrolling("Scores by kind", _table(head, lines))


def _kind_difference(run: Run, other: Run, of: Sequence[int], groups: Sequence[tuple[str, str]]) -> str:
    primary = run.scores.primary
    difference = run.scores.items[primary][list(of)] - other.scores.items[primary][list(of)]
    found = summarize(difference, [groups[n] for n in of])
    if found.interval is None:
        return "-"
    return f"{_signed(found.value)} <small>{_signed(found.interval[0])} to {_signed(found.interval[1])}</small>"


def _curves(run: Run, other: Run | None) -> str:
    runs = [run] if other is None else [run, other]

    def named(one: Run, name: str) -> str:
        return name if other is None else f"{one.name}: {name}"

    charts: dict[str, list[tuple[str, Curve]]] = {"loss": [], "learning rate": []}
    for one in runs:
        # Groups with the same rate are one line.
        rates: dict[tuple[bytes, bytes], list[str]] = {}
        for name, curve in one.curves.items():
            if name in ("train/loss", "val/loss"):
                charts["loss"].append((named(one, name), curve))
            elif name.startswith("lr"):
                rates.setdefault((curve.steps.tobytes(), curve.values.tobytes()), []).append(name.removeprefix("lr/"))
        for same in rates.values():
            charts["learning rate"].append((named(one, ", ".join(same)), one.curves[_rate_name(one, same[0])]))
    for one in runs:
        for name, curve in one.curves.items():
            if name.startswith("val/") and name not in ("val/loss", "val/bad_samples"):
                charts.setdefault(name, []).append((named(one, name), curve))
    drawn = "".join(line_chart(title, curves) for title, curves in charts.items() if curves)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _rate_name(run: Run, short: str) -> str:
    return f"lr/{short}" if f"lr/{short}" in run.curves else short


def _confusion(run: Run, matrices: Sequence[Confusion], other: Run | None, of_other: Sequence[Confusion]) -> str:
    figures = []
    beside = {matrix.name: matrix for matrix in of_other}
    for number, matrix in enumerate(matrices[:_MAX_MATRICES]):
        title = matrix.name if other is None else f"{matrix.name}, {run.name}"
        figures.append(_matrix(title, matrix, number))
        if other is not None and matrix.name in beside:
            figures.append(_matrix(f"{matrix.name}, {other.name}", beside[matrix.name], None))
    if not figures:
        return ""
    more = len(matrices) - _MAX_MATRICES
    note = (
        f'<p class="note">The first {_MAX_MATRICES} of {len(matrices)} kinds with few answers.</p>' if more > 0 else ""
    )
    hint = "Rows are what was expected, columns what was answered. Choose a number to see its samples."
    return f'<p class="note">{hint}</p>{note}<div class="matrices">{"".join(figures)}</div>'


def _matrix(title: str, matrix: Confusion, number: int | None) -> str:
    """``number`` is the matrix whose samples its cells show; None: none."""
    columns = [*matrix.answers, "other"]
    last = len(columns) - bool(not matrix.counts[:, -1].any())  # nobody said anything else
    head = "".join(
        f'<th scope="col"{" class=other" if n == len(matrix.answers) else ""}><bdi>{escaped(_short(name))}</bdi></th>'
        for n, name in enumerate(columns[:last])
    )
    lines = []
    for row, answer in enumerate(matrix.answers):
        total = int(matrix.counts[row].sum())
        cells = []
        for column in range(last):
            count = int(matrix.counts[row, column])
            shade = f"{'right' if row == column else 'wrong'} s{math.ceil(count / total * 8) if count else 0}"
            inside = f"{count:,}"
            if count and number is not None:
                words = f"{count:,} expected {answer}, answered {columns[column]}"
                inside = (
                    f'<button type="button" tabindex="-1" data-cell="{number},{row},{column}" '
                    f'aria-label="{escaped(words)}">{count:,}</button>'
                )
            cells.append(f'<td class="{shade}">{inside if count else "<span>0</span>"}</td>')
        lines.append(f'<tr><th scope="row"><bdi>{escaped(_short(answer))}</bdi></th>{"".join(cells)}</tr>')
    table = (
        f'<table class="matrix"><caption><bdi>{escaped(title)}</bdi></caption><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )
    return _scrolling(f"Confusion matrix: {title}", table)


def _tile(name: str, value: str, more: str = "", main: bool = False) -> str:
    return (
        f'<div class="tile{" main" if main else ""}"><dt>{name}</dt><dd><b>{value}</b> <small>{more}</small></dd></div>'
    )


def _table(head: str, lines: Sequence[str]) -> str:
    return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _scrolling(label: str, table: str) -> str:
    """A wide table scrolls in its own box, which the keyboard can reach."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(label)}">{table}</div>'


def _policy(script: str, style: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _asset(name: str) -> str:
    return (_resources("mmprefix.evaluation") / "page" / name).read_text(encoding="utf-8")


def _json(content: Any) -> str:
    """JSON that can stand in a script element: no ``<`` begins a tag or a comment, whatever the data holds."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def _cut(text: str, most: int = _MAX_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:23]}…"


def _are_shares(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return bool(((known >= 0) & (known <= 1)).all())


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _value(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) <= 1 else f"{value:+.2f}"


def _range(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{_value(interval[0])} to {_value(interval[1])}"
