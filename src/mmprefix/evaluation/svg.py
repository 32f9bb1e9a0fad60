"""Line charts and interval bars as inline SVG: no library, no style of their own, everything escaped.

Classes (``line-0``, ``bar``, ...) are what the page's style sheet colours, in light and in dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

import numpy as np

from mmprefix.evaluation.runs import Curve

WIDTH, HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 28
_DOTS = 40
"""A line with no more points shows each as a dot."""
_POINTS = 300
"""A line has at most twice as many points."""


SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a pair, which JSON can hold and UTF-8 can't."""


def escaped(text: str) -> str:
    """Text as it may stand in HTML and in its attributes."""
    return escape(SURROGATE.sub("\ufffd", text))


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) in ``[low, high]``, about as many as wanted."""
    if not low < high:
        return [low]
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(curve: Curve) -> tuple[Curve, int]:
    """The curve without what is not finite, as means of so many neighbours that it has at most 2 x `_POINTS`."""
    keep = np.isfinite(curve.values)
    steps, values = curve.steps[keep], curve.values[keep]
    size = max(1, len(steps) // _POINTS)
    if size == 1:
        return Curve(steps, values), 1
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    return Curve(np.add.reduceat(steps, starts) // counts, np.add.reduceat(values, starts) / counts), size


def line_chart(title: str, curves: Sequence[tuple[str, Curve]]) -> str:
    """A figure with caption, drawing, legend and the words that say the same; "" where nothing can be drawn.

    Args:
        title: what is drawn.
        curves: names and values; the x-axis is the optimizer step.
    """
    drawn = [(name, curve, *thinned(curve)) for name, curve in curves]
    drawn = [entry for entry in drawn if len(entry[2].steps)]
    if not drawn:
        return ""
    low = min(float(thin.values.min()) for _, _, thin, _ in drawn)
    high = max(float(thin.values.max()) for _, _, thin, _ in drawn)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    first = min(int(thin.steps[0]) for _, _, thin, _ in drawn)
    last = max(int(thin.steps[-1]) for _, _, thin, _ in drawn)
    last = last if last > first else first + 1
    pad = 0.04 * (high - low)
    low, high = low - pad, high + pad

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in ticks(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_axis(value)}</text>')
    for step in ticks(first, last):
        anchor = "end" if x(step) > WIDTH - _RIGHT - 16 else "middle"
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_axis(step)}</text>')
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM}"/>'
    )
    notes, legend = [], []
    for number, (name, curve, thin, size) in enumerate(drawn):
        at = [(x(step), y(value)) for step, value in zip(thin.steps.tolist(), thin.values.tolist(), strict=True)]
        style = f"line line-{number % 4}"
        parts.append(f'<polyline class="{style}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in at)}"/>')
        if len(at) <= _DOTS:
            named = zip(at, thin.steps.tolist(), thin.values.tolist(), strict=True)
            parts += [
                f'<circle class="dot {style}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
                f"<title>{number_text(value)} at step {step:,}</title></circle>"
                for (a, b), step, value in named
            ]
        sample = f'<line class="{style}" x1="0" x2="28" y1="4" y2="4"/>'
        legend.append(
            f'<li><svg class="sample" viewBox="0 0 28 8" aria-hidden="true">{sample}</svg>'
            f"<bdi>{escaped(name)}</bdi> <b>{number_text(float(thin.values[-1]))}</b></li>"
        )
        hidden = len(curve.values) - int(np.isfinite(curve.values).sum())
        if size > 1:
            notes.append(f"{name}: each point is the mean of {size} logged values")
        if hidden:
            notes.append(f"{name}: {hidden} values that are not finite are not drawn")
    words = escaped(f"{title} by step: " + "; ".join(f"{name} {_words(thin)}" for name, _, thin, _ in drawn))
    note = f'<p class="note">{escaped(". ".join(notes))}.</p>' if notes else ""
    return (
        f'<figure class="chart"><figcaption><h3>{escaped(title)}</h3></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">{"".join(parts)}</svg>'
        f'<ul class="legend" aria-label="Last values of {escaped(title)}">{"".join(legend)}</ul>{note}</figure>'
    )


def _words(curve: Curve) -> str:
    steps, values = curve
    first, last, low, high = (number_text(float(v)) for v in (values[0], values[-1], values.min(), values.max()))
    return f"goes from {first} at step {int(steps[0]):,} to {last} at step {int(steps[-1]):,}, lowest {low}, highest {high}"


def interval_bar(value: float, interval: tuple[float, float] | None, high: float, baseline: float | None = None) -> str:
    """A bar from 0 with its interval as a whisker and a baseline as a tick; numbers stand beside it in words.

    Args:
        value: where the bar ends.
        interval: of the whisker.
        high: value at the right end.
        baseline: where the tick is.
    """

    def x(number: float) -> float:
        return 100 * min(1.0, max(0.0, number / high)) if high > 0 else 0.0

    parts = [
        f'<rect class="track" width="100" height="10" y="3"/><rect class="bar" width="{x(value):.2f}" height="10" y="3"/>'
    ]
    if interval is not None:
        start, end = map(x, interval)
        parts.append(f'<line class="whisker" x1="{start:.2f}" x2="{end:.2f}" y1="8" y2="8"/>')
        parts += [f'<line class="whisker" x1="{at:.2f}" x2="{at:.2f}" y1="4" y2="12"/>' for at in (start, end)]
    if baseline is not None:
        parts.append(f'<line class="baseline" x1="{x(baseline):.2f}" x2="{x(baseline):.2f}" y1="0" y2="16"/>')
    return f'<svg class="interval" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'


def number_text(value: float) -> str:
    """Four significant digits, without an exponent where there needn't be one."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _axis(value: float) -> str:
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.6g}" if abs(value) >= 1e4 else f"{round(value, 10):g}"
