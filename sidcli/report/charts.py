"""Positions of the marks of a chart in percent of the chart area, so that lines and letters keep their size at any chart width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sidcli.metrics.catalog import Measured

POINTS = 200
"""Maximum number of points of a curve. A chart is at most twice as many pixels wide."""
NAME_LETTERS = 28
"""Maximum number of letters of a name, which must fit above a whisker on a phone."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, slightly wider than the range of the values."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float], from_zero: bool = False) -> Axis:
        """Return an axis around the finite values.

        With `from_zero` the axis starts at 0. This suits values that are never negative and are compared by size.
        """
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = 0.0 if from_zero else min(finite), max(finite)
        margin = 0.06 * ((high - low) or abs(high) or 1.0)
        return cls(0.0 if from_zero else low - margin, high + margin)

    def at(self, value: float) -> float:
        """Return the position of a value in percent of the axis, 0 at `low` and 100 at `high`."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self, wanted: int) -> list[Tick]:
        """Return about `wanted` ticks at round values."""
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [Tick(self.at(index * step), number(index * step)) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Plot:
    """A curve in its chart area: the `line` as SVG points, its `end`, and the ticks of both axes. y increases downwards."""

    line: str
    end: tuple[float, float]
    steps: list[Tick]
    values: list[Tick]


@dataclass(frozen=True)
class Whisker:
    """A measured value on a shared axis. `marks` are the positions of low, value and high, or None if one of them is not finite."""

    name: str
    marks: tuple[float, float, float] | None


def plot(points: Sequence[tuple[float, float]], from_zero: bool = False) -> Plot:
    """Return the plot of a curve through (step, value) points. At least one point is needed, and all points must be finite."""
    xs, ys = Axis(0, max(1, points[-1][0])), Axis.around([value for _, value in points], from_zero)
    places = [(xs.at(step), round(100 - ys.at(value), 2)) for step, value in evenly(points, POINTS)]
    line = " ".join(f"{x:g},{y:g}" for x, y in places)
    values = [Tick(round(100 - tick.at, 2), tick.label) for tick in ys.ticks(4)]
    return Plot(line, places[-1], xs.ticks(4), values)


def whiskers(rows: Sequence[tuple[str, Measured]], scale: float) -> tuple[list[Whisker], list[Tick]]:
    """Return the rows as whiskers on one axis, and the ticks of the axis. Values are multiplied by `scale`."""
    ends = [(scale * measured.low, scale * measured.value, scale * measured.high) for _, measured in rows]
    axis = Axis.around([end for row in ends for end in row])
    found = []
    for (name, _), (low, value, high) in zip(rows, ends, strict=True):
        is_finite = math.isfinite(low + value + high)
        found.append(Whisker(shortened(name), (axis.at(low), axis.at(value), axis.at(high)) if is_finite else None))
    return found, axis.ticks(3)


def number(value: float) -> str:
    """Format a number for an axis or a table: four significant digits, or an integer with thousands separators from 1,000."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def shortened(name: str) -> str:
    """Shorten a name that is too long to its head and tail. The tail is kept because paths often differ only there."""
    if len(name) <= NAME_LETTERS:
        return name
    return f"{name[: NAME_LETTERS // 3]}…{name[-(NAME_LETTERS - NAME_LETTERS // 3 - 1) :]}"


def evenly(items: Sequence[Item], limit: int) -> list[Item]:
    """Return at most `limit` evenly spaced items, including the first and the last item."""
    if len(items) <= limit:
        return list(items)
    return [items[round(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]
