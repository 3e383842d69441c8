"""Figures of metrics over steps, as SVG whose lines stretch to the page's width while its text keeps its size."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from imagereward_jax.pages.page import escape, paragraph

COLOURS = 8  # classes k0 to k7 of style.css
FULL = 400  # points of a curve; of longer ones the least and the largest value of each of FULL / 2 parts are drawn
DOTS = 40  # of curves with more points, only the line is drawn
SIDE = 1000  # of the SVG's square, which is stretched


class Line(NamedTuple):
    """A curve.

    Attributes:
        points: (step, value) in order; None or a value that is not finite leaves a gap.
        label: of a figure with several, else "". colour: from 0.
        band: half the height of a band around the value, by step.
        clip: the least and the largest value that the band may show, by step.
    """

    points: Sequence[tuple[int, float | None]]
    label: str = ""
    colour: int = 0
    band: dict[int, float] = {}
    clip: dict[int, tuple[float, float]] = {}


def panel(
    title: str, name: str, note: str, lines: Sequence[Line], steps: tuple[int, int], marks: Iterable[int] = ()
) -> str:
    """One plot: its name in words and in metrics.jsonl, its first and last values (of several lines the last), axes.

    Args:
        title, name, note: text. steps: the first and the last of the axis.
        marks: steps of a slider's positions; the line of each shows there.
    """
    lines = [line._replace(points=_thinned(_finite(line.points))) for line in lines]
    ends = " ".join(
        f'<span class="k{line.colour % COLOURS}"><b>{_ends(line.points[-1:])}</b></span>'
        for line in lines
        if line.label
    )
    ends = ends or f"<b>{_ends(lines[0].points)}</b>"
    told = "; ".join(f"{line.label} {_ends(line.points)}".strip() for line in lines)
    return (
        f'<div class="panel"><div class="head"><h3>{escape(title)} <code class="soft">{escape(name)}</code></h3>'
        f'<span class="ends">{ends}</span></div>{paragraph(escape(note))}'
        f"{_plot(lines, steps, list(marks), f'{title} over steps: {told}')}</div>"
    )


def keys(labels: Sequence[str]) -> str:
    """The legend of figures whose lines have these labels, in the order of their colours."""
    items = [f'<li class="k{at % COLOURS}">{escape(label)}</li>' for at, label in enumerate(labels)]
    return f'<ul class="keys">{"".join(items)}</ul>'


def _finite(points):
    return [(step, value if value is not None and math.isfinite(value) else None) for step, value in points]


def _thinned(points):
    if len(points) <= FULL:
        return points
    kept, parts = [], FULL // 2
    for part in range(parts):
        some = points[part * len(points) // parts : (part + 1) * len(points) // parts]
        known = [point for point in some if point[1] is not None] or some[:1]
        kept += sorted({min(known, key=lambda p: p[1] or 0), max(known, key=lambda p: p[1] or 0)}, key=lambda p: p[0])
    return kept


def _ends(points):
    values = [value for _, value in points if value is not None]
    if not values:
        return "no finite value"
    return f"{values[0]:.4g} → {values[-1]:.4g}" if len(values) > 1 else f"{values[0]:.4g}"


def _band(line):
    """[(step, low, high)] of the points that have a band."""
    found = []
    for step, value in line.points:
        if value is not None and math.isfinite(line.band.get(step, math.nan)):
            low, high = line.clip.get(step, (-math.inf, math.inf))
            found.append((step, max(value - line.band[step], low), min(value + line.band[step], high)))
    return found


def _plot(lines, steps, marks, told):
    bands = [_band(line) for line in lines]
    values = [value for line in lines for _, value in line.points if value is not None]
    values += [edge for band in bands for _, *edges in band for edge in edges]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - margin, high + margin
    begin, width = steps[0], max(steps[1] - steps[0], 1)

    def x(step):
        return round((step - begin) / width * SIDE, 1)

    def y(value):
        return round((high - value) / (high - low) * SIDE, 1)

    heights = ticks(low, high, 4)
    parts = [f'<path class="grid" d="{"".join(f"M0 {y(value)}H{SIDE}" for value in heights)}"/>']
    for line, band in zip(lines, bands):
        colour = f"k{line.colour % COLOURS}"
        if len(band) > 1:
            edge = [f"{x(step)} {y(top)}" for step, _, top in band] + [f"{x(s)} {y(b)}" for s, b, _ in reversed(band)]
            parts.append(f'<path class="band {colour}" d="M{"L".join(edge)}Z"/>')
        known = [(x(step), y(value)) for step, value in line.points if value is not None]
        if known and len(lines) == 1:
            parts.append(f'<path class="start" d="M0 {known[0][1]}H{SIDE}"/>')
        parts.append(f'<path class="line {colour}" d="{_path(line.points, x, y)}"/>')
        if len(known) <= DOTS:
            parts.append(f'<path class="dots {colour}" d="{"".join(f"M{a} {b}h0" for a, b in known)}"/>')
    parts += [f'<path class="mark" data-at="{at}" hidden d="M{x(step)} 0V{SIDE}"/>' for at, step in enumerate(marks)]
    labels = [f'<span class="y" style="top:{y(value) / 10}%">{value:g}</span>' for value in heights]
    labels += [
        f'<span class="x" style="left:{x(step) / 10}%">{"step " if step == begin else ""}{step:g}</span>'
        for step in [begin, *ticks(steps[0] + width / 8, steps[1], 4, whole=True)]
    ]
    return (
        f'<div class="plot"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(told)}">{"".join(parts)}</svg>{"".join(labels)}</div>'
    )


def _path(points, x, y):
    """The line through points, in pieces between gaps."""
    path, pen = [], "M"
    for step, value in points:
        if value is not None:
            path.append(f"{pen}{x(step)} {y(value)}")
        pen = "M" if value is None else "L"
    return "".join(path)


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers in [low, high], at most some `most` + 1, evenly spaced; whole ones if asked for."""
    raw = (high - low) / most
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    spacing = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    spacing = max(spacing, 1.0) if whole else spacing
    first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [float(f"{index * spacing:.12g}") for index in range(first, last + 1)]
