"""Where the marks of a chart go, in percent of its box: a chart of any width then keeps its lines and letters as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sidcli.metrics.catalog import Measured

POINTS = 200
"""Points of a curve that are kept; a chart is not drawn wider than twice as many pixels."""
NAME_LETTERS = 28
"""Letters of a name that fit over a whisker on a phone."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, a little more than there is to show."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float], from_zero: bool = False) -> Axis:
        """Around the finite ones of some values; `from_zero` for those that are no less than 0 and whose size counts."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = 0.0 if from_zero else min(finite), max(finite)
        margin = 0.06 * ((high - low) or abs(high) or 1.0)
        return cls(0.0 if from_zero else low - margin, high + margin)

    def at(self, value: float) -> float:
        """Percent of the way from `low` to `high`."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self, wanted: int) -> list[Tick]:
        """About `wanted` round values."""
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [Tick(self.at(index * step), number(index * step)) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Plot:
    """A curve in its box: the `line` as SVG points, where it ends, and the ticks; y counts downwards."""

    line: str
    end: tuple[float, float]
    steps: list[Tick]
    values: list[Tick]


@dataclass(frozen=True)
class Whisker:
    """A measured value on the axis it shares with others; `marks` are low, value and high, or None where one is not finite."""

    name: str
    marks: tuple[float, float, float] | None


def plot(points: Sequence[tuple[float, float]], from_zero: bool = False) -> Plot:
    """A curve through (step, value) points, one at least, all finite."""
    xs, ys = Axis(0, max(1, points[-1][0])), Axis.around([value for _, value in points], from_zero)
    places = [(xs.at(step), round(100 - ys.at(value), 2)) for step, value in evenly(points, POINTS)]
    line = " ".join(f"{x:g},{y:g}" for x, y in places)
    values = [Tick(round(100 - tick.at, 2), tick.label) for tick in ys.ticks(4)]
    return Plot(line, places[-1], xs.ticks(4), values)


def whiskers(rows: Sequence[tuple[str, Measured]], scale: float) -> tuple[list[Whisker], list[Tick]]:
    """The rows on one axis, and its ticks, whose labels are multiplied by `scale`."""
    ends = [(scale * measured.low, scale * measured.value, scale * measured.high) for _, measured in rows]
    axis = Axis.around([end for row in ends for end in row])
    found = []
    for (name, _), (low, value, high) in zip(rows, ends, strict=True):
        is_finite = math.isfinite(low + value + high)
        found.append(Whisker(shortened(name), (axis.at(low), axis.at(value), axis.at(high)) if is_finite else None))
    return found, axis.ticks(3)


def number(value: float) -> str:
    """For an axis or a table: four digits, or a whole number with its thousands marked."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def shortened(name: str) -> str:
    """Head and tail of a name that is too long; the tails of paths differ."""
    if len(name) <= NAME_LETTERS:
        return name
    return f"{name[: NAME_LETTERS // 3]}…{name[-(NAME_LETTERS - NAME_LETTERS // 3 - 1) :]}"


def evenly(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items, evenly chosen, with the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]
