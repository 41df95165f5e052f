"""Line charts as SVG text: colours come from CSS variables, numbers are hover titles, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from rlflow.tracking.history import Series, bucket, smooth
from rlflow.tracking.lines import count, number

NUM_COLORS = 8
MOST_POINTS = 400
"""A line of more points is drawn through means of neighbours."""
MOST_HOVER_BANDS = 80
SMOOTH_FROM = 40
"""A noisy line of at least so many points is drawn faint under its mean over the nearest 15th of its length."""

LIGHT = (
    "--ink:#1d2330;--muted:#667085;--grid:#e7e9ee;--card:#ffffff;--s0:#2563eb;--s1:#e8590c;--s2:#0f9d76;"
    "--s3:#9333ea;--s4:#d6336c;--s5:#b08900;--s6:#0b7285;--s7:#6b7280"
)
DARK = (
    "--ink:#e6e9ef;--muted:#98a2b3;--grid:#2a303b;--card:#171b22;--s0:#6ea8ff;--s1:#ff9457;--s2:#3ccf9e;"
    "--s3:#c08bff;--s4:#ff7aa8;--s5:#e0b93a;--s6:#4cc3d9;--s7:#a3adbb"
)
"""CSS variables that every picture is drawn with; ``--s0`` to ``--s7`` are the series."""
_FONT = 'font-family:system-ui,-apple-system,"Segoe UI",sans-serif'


def style_sheet() -> str:
    """The style of pages with charts: page/page.css, with these colours."""
    text = Path(__file__).with_name("page").joinpath("page.css").read_text(encoding="utf-8")
    return text.replace("LIGHT", LIGHT).replace("DARK", DARK)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the plot lies in the picture, and which numbers its edges are."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    top: float = 8.0
    left: float = 50.0
    right: float = 16.0
    bottom: float = 24.0

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.bottom - self.top)

    def axes(self) -> str:
        """Horizontal grid lines with their numbers, steps below."""
        parts = []
        heights = ticks(*self.y_range, 5)
        for tick, label in zip(heights, tick_labels(heights), strict=True):
            y = self.y(tick)
            parts.append(line(self.left, y, self.width - self.right, y, "var(--grid)"))
            parts.append(text(self.left - 7, y + 3.5, label, anchor="end"))
        for tick in ticks(*self.x_range, max(2, int(self.width / 90))):
            if tick == int(tick):
                parts.append(text(self.x(tick), self.height - 7, f"{tick:.0f}", anchor="middle"))
        return "".join(parts)


def line_chart(series: Sequence[Series], *, width: float = 520, height: float = 200, top: float = 8.0) -> str:
    """One line a series over steps. A long noisy line is drawn faint under its moving average.

    Args:
        series: At most ``NUM_COLORS``; empty ones are left out but keep their colour.
        width, height, top: Of the picture in CSS pixels, and of what is kept free above the plot.
    """
    points = [bucket(one.points, MOST_POINTS) for one in series]
    everything = [point for line_points in points for point in line_points]
    if not everything:
        return svg(width, height, text(width / 2, height / 2, "no data", anchor="middle"))
    xs, ys = zip(*everything, strict=True)
    frame = Frame(width, height, widen(min(xs), max(xs), 0.0), value_range(min(ys), max(ys)), top=top)
    parts = [frame.axes()]
    for index, line_points in enumerate(points):
        if not line_points:
            continue
        color = f"var(--s{index % NUM_COLORS})"
        noisy = len(line_points) >= SMOOTH_FROM and is_noisy(line_points)
        parts.append(path(frame, line_points, color, opacity=0.28 if noisy else 1.0))
        if noisy:
            parts.append(path(frame, smooth(line_points, len(line_points) // 30), color, stroke=2.2))
        if len(line_points) <= 25:
            parts += [dot(frame.x(x), frame.y(y), color) for x, y in line_points]
    parts.append(_hover_bands(frame, series))
    return svg(width, height, "".join(parts))


def standalone(series: Sequence[Series], *, width: float = 860, height: float = 320) -> str:
    """A picture for a README: card, legend, style and all."""
    chart = line_chart(series, width=width, height=height, top=44.0)
    legend, x = [], 54.0
    for index, one in enumerate(series):
        legend.append(f'<circle cx="{x:.1f}" cy="22" r="4.5" fill="var(--s{index % NUM_COLORS})"/>')
        look = 'font-size="13" font-weight="600" fill="var(--ink)"'
        legend.append(f'<text x="{x + 11:.1f}" y="26.5" {look}>{escape(one.name)}</text>')
        x += 38 + 8.0 * len(one.name)
    style = f"<style>svg{{{LIGHT};{_FONT}}}@media(prefers-color-scheme:dark){{svg{{{DARK}}}}}</style>"
    card = f'<rect width="{width:g}" height="{height:g}" rx="10" fill="var(--card)"/>'
    return svg(width, height, f"{style}{card}{''.join(legend)}{chart}")


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within a range, about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Numbers of an axis with as many decimals as their distance needs, all of one kind."""
    largest = max(abs(value) for value in values)
    step = values[1] - values[0] if len(values) > 1 else largest
    if largest >= 1e4:
        return ["0" if value == 0 else count(value) for value in values]
    if 0 < largest < 1e-3:
        return ["0" if value == 0 else f"{value:.1e}".replace("e-0", "e-") for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{value:.{decimals}f}" for value in values]


def is_noisy(points: Sequence[tuple[float, float]]) -> bool:
    """Whether a line goes up and down much further than from its lowest to its highest point."""
    values = [y for _, y in points]
    travelled = sum(abs(b - a) for a, b in pairwise(values))
    return travelled > 3 * (max(values) - min(values))


def value_range(low: float, high: float) -> tuple[float, float]:
    """Edges of the y axis: a margin around the data, from 0 when the data come near it."""
    bottom, top = widen(low, high, 0.06)
    if 0 <= low < 0.4 * high:
        bottom = 0.0
    return bottom, top


def widen(low: float, high: float, margin: float) -> tuple[float, float]:
    """A range of some width: never empty, ``margin`` of it added at both ends."""
    if high == low:
        room = abs(low) * 0.5 or 0.5
        return low - room, high + room
    room = (high - low) * margin
    return low - room, high + room


def svg(width: float, height: float, body: str) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{body}</svg>'


def line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def text(x: float, y: float, content: str, *, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="11" fill="var(--muted)">{escape(content)}</text>'


def dot(x: float, y: float, color: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'


def path(
    frame: Frame, points: Sequence[tuple[float, float]], color: str, *, opacity: float = 1.0, stroke: float = 1.8
) -> str:
    places = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
    look = f'fill="none" stroke="{color}" stroke-width="{stroke}" stroke-opacity="{opacity}" stroke-linejoin="round"'
    return f'<path d="M{places}" {look}/>'


def _hover_bands(frame: Frame, series: Sequence[Series]) -> str:
    """Invisible columns that show the numbers of their step under the pointer."""
    values: dict[float, list[str]] = {}
    for one in series:
        for x, y in bucket(one.points, MOST_HOVER_BANDS):
            values.setdefault(round(x), []).append(f"{one.name} {number(y)}")
    steps = sorted(values)
    edges = [(a + b) / 2 for a, b in pairwise(steps)]
    lows, highs = [frame.x_range[0], *edges], [*edges, frame.x_range[1]]
    bands = []
    for step, low, high in zip(steps, lows, highs, strict=True):
        x, width = frame.x(low), frame.x(high) - frame.x(low)
        title = escape("\n".join([f"step {step}", *values[step]]))
        area = f'x="{x:.1f}" y="{frame.top:g}" width="{max(0.0, width):.1f}"'
        height = frame.height - frame.top - frame.bottom
        bands.append(
            f'<rect {area} height="{height:g}" fill="var(--ink)" class="band" fill-opacity="0">'
            f"<title>{title}</title></rect>"
        )
    return "".join(bands)
