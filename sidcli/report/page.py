"""One HTML page in one file: what can stand on it, and how it is written. The page loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from sidcli import __version__
from sidcli.files import atomic_file
from sidcli.metrics.catalog import Measured, Metric
from sidcli.printable import printable
from sidcli.report import charts

LONGEST_SIDE = 256
SMALL_SIDE = 128
"""Pictures below this many pixels are shown with their pixels as they are."""
QUALITY = 90
COLORS = 8
"""Colors of contestants in the template; a ninth contestant begins again with the first."""


@dataclass(frozen=True)
class Cell:
    text: str
    emphasis: bool = False


@dataclass(frozen=True)
class Table:
    """The first cell of a row names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Gallery:
    """Contestants side by side: `rows` hold a name and a picture per caption, all of the same seeds."""

    title: str
    captions: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Image.Image]]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Curve:
    """`points` are (training step, value), in the order of the steps, one at least, all finite; `from_zero`: so the axis begins."""

    title: str
    lower_is_better: bool | None
    points: Sequence[tuple[float, float]]
    from_zero: bool = False


@dataclass(frozen=True)
class Curves:
    title: str
    curves: Sequence[Curve]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Timeline:
    """The same prompts and seeds over training: `strips` hold, for each of `steps`, a picture per prompt. `seeds` where known."""

    title: str
    prompts: Sequence[str]
    steps: Sequence[int]
    strips: Sequence[Sequence[Image.Image]]
    teacher: Sequence[Image.Image] | None
    seeds: Sequence[int] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class IntervalRows:
    """One metric of several contestants on one axis."""

    metric: Metric
    rows: Sequence[tuple[str, Measured]]


@dataclass(frozen=True)
class Scores:
    title: str
    metrics: Sequence[IntervalRows]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Facts:
    """Settings, provenance, protocol; a long list is folded unless `is_open`."""

    title: str
    pairs: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()
    is_open: bool = False


@dataclass(frozen=True)
class Commands:
    """`commands` are (explanation, command)."""

    title: str
    commands: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()


Section = Table | Gallery | Curves | Timeline | Scores | Facts | Commands


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    summary: str
    sections: Sequence[Section]

    @property
    def contestants(self) -> list[str]:
        """Every name that has a color, in the order in which they come up."""
        galleries = [name for section in self.sections if isinstance(section, Gallery) for name, _ in section.rows]
        scores = [section for section in self.sections if isinstance(section, Scores)]
        return list(
            dict.fromkeys(galleries + [name for section in scores for metric in section.metrics for name, _ in metric.rows])
        )


@dataclass(frozen=True)
class Picture:
    """An image inside the page; `width` and `height` in pixels."""

    uri: str
    width: int
    height: int
    is_small: bool


def embedded(image: Image.Image) -> Picture:
    """As WebP, shrunk where its longer side is over 256 pixels."""
    picture = image.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=6)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(uri, *picture.size, is_small=max(picture.size) < SMALL_SIDE)


def shown(value: object) -> str:
    """What the template is about to write."""
    return value if isinstance(value, Markup) else printable(str(value), keep="\n")


def digest(text: str) -> str:
    """The hash by which a content security policy knows an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def numbers(curves: Sequence[Curve]) -> list[tuple[float, list[float | None]]]:
    """(step, value of each curve or None), over all steps that are drawn."""
    columns = [dict(charts.evenly(curve.points, charts.POINTS)) for curve in curves]
    return [(step, [column.get(step) for column in columns]) for step in sorted(set().union(*columns))]


def measurements(metrics: Sequence[IntervalRows]) -> list[tuple[str, list[tuple[Metric, Measured | None]]]]:
    """(contestant, each metric and what it measured of them, if anything)."""
    columns = [(intervals.metric, dict(intervals.rows)) for intervals in metrics]
    names = dict.fromkeys(name for intervals in metrics for name, _ in intervals.rows)
    return [(name, [(metric, column.get(name)) for metric, column in columns]) for name in names]


def render(page: Page) -> str:
    """The whole page. The same content gives the same text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "digest": digest,
        "embedded": embedded,
        "measurements": measurements,
        "number": charts.number,
        "numbers": numbers,
        "plot": charts.plot,
        "whiskers": charts.whiskers,
    }
    colors = {name: f"c{index % COLORS}" for index, name in enumerate(page.contestants)}
    return environment.get_template("page.html").render(page=page, colors=colors, version=__version__)


def write(page: Page, file: Path) -> None:
    """Raises EnvironmentProblem where the disk or the folder refuses."""
    with atomic_file(file) as temporary:
        temporary.write_text(render(page), encoding="utf-8")
