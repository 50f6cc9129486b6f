"""An HTML page in one file: its possible sections, and the code that writes it. The page loads no other files and runs only its own
script."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from sidcli import __version__
from sidcli.files import atomic_file
from sidcli.metrics.catalog import Measured, Metric
from sidcli.printable import printable
from sidcli.report import charts

LONGEST_SIDE = 256
SMALL_SIDE = 128
"""Pictures whose longer side is below this many pixels are enlarged without smoothing."""
QUALITY = 90
COLORS = 8
"""Number of colors of candidates in the template. A ninth candidate has the first color again."""


@dataclass(frozen=True)
class Cell:
    text: str
    emphasis: bool = False


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row is the name of the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Gallery:
    """Pictures of several candidates. A row is the name of a candidate and one picture per caption; all rows use the same seeds."""

    title: str
    captions: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Image.Image]]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Curve:
    """A curve over training. `points` are (training step, value) in the order of the steps, at least one point, all of them finite.

    With `from_zero` the axis starts at 0.
    """

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
    """Pictures of the same prompts and seeds over training. `strips` contains one picture per prompt for each of `steps`.

    `seeds` is None if the seeds are unknown.
    """

    title: str
    prompts: Sequence[str]
    steps: Sequence[int]
    strips: Sequence[Sequence[Image.Image]]
    teacher: Sequence[Image.Image] | None
    seeds: Sequence[int] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class IntervalRows:
    """One metric of several candidates on one axis."""

    metric: Metric
    rows: Sequence[tuple[str, Measured]]


@dataclass(frozen=True)
class Scores:
    title: str
    metrics: Sequence[IntervalRows]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Facts:
    """A list of settings, provenance or protocol as (name, value). A long list is collapsed unless `is_open` is True."""

    title: str
    pairs: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()
    is_open: bool = False


@dataclass(frozen=True)
class Commands:
    """Commands for the user to run. `commands` are (explanation, command)."""

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
        """The names of all candidates of galleries and scores, in order of appearance. Every name has a color."""
        galleries = [name for section in self.sections if isinstance(section, Gallery) for name, _ in section.rows]
        scores = [section for section in self.sections if isinstance(section, Scores)]
        return list(
            dict.fromkeys(galleries + [name for section in scores for metric in section.metrics for name, _ in metric.rows])
        )


@dataclass(frozen=True)
class Picture:
    """An image embedded in the page as a data URI. `width` and `height` are in pixels."""

    uri: str
    width: int
    height: int
    is_small: bool


def embedded(image: Image.Image) -> Picture:
    """Encode an image as WebP. An image with a longer side above 256 pixels is shrunk."""
    picture = image.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=6)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(uri, *picture.size, is_small=max(picture.size) < SMALL_SIDE)


def shown(value: object) -> str:
    """Return a value of the template as printable text; Markup is returned unchanged."""
    return value if isinstance(value, Markup) else printable(str(value), keep="\n")


def digest(text: str) -> str:
    """Return the hash that a content security policy uses to allow an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def numbers(curves: Sequence[Curve]) -> list[tuple[float, list[float | None]]]:
    """Return (step, value of each curve or None) for all steps that are drawn."""
    columns = [dict(charts.evenly(curve.points, charts.POINTS)) for curve in curves]
    return [(step, [column.get(step) for column in columns]) for step in sorted(set().union(*columns))]


def measurements(metrics: Sequence[IntervalRows]) -> list[tuple[str, list[tuple[Metric, Measured | None]]]]:
    """Return (candidate, [(metric, measured value of the candidate or None) for each metric]) for all candidates."""
    columns = [(intervals.metric, dict(intervals.rows)) for intervals in metrics]
    names = dict.fromkeys(name for intervals in metrics for name, _ in intervals.rows)
    return [(name, [(metric, column.get(name)) for metric, column in columns]) for name in names]


@cache
def template() -> Template:
    """Return the template of the page. Compiling it takes longer than rendering a page."""
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
    return environment.get_template("page.html")


def render(page: Page) -> str:
    """Return the HTML of the page. The same content gives the same text."""
    colors = {name: f"c{index % COLORS}" for index, name in enumerate(page.contestants)}
    return template().render(page=page, colors=colors, version=__version__)


def write(page: Page, file: Path) -> None:
    """Write the page to `file`. Raises EnvironmentProblem if the file cannot be written."""
    with atomic_file(file) as temporary:
        temporary.write_text(render(page), encoding="utf-8")
