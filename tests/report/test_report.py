"""The report is one HTML file: it loads nothing, believes no text, reads in the dark, on a phone, aloud and without its script."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tomli_w
from PIL import Image

from sidcli.diffusion.grids import exit_grid
from sidcli.emoji import world
from sidcli.errors import EnvironmentProblem, InputError
from sidcli.metrics.catalog import METRICS, Measured
from sidcli.report import charts, run
from sidcli.report.page import (
    Cell,
    Commands,
    Curve,
    Curves,
    Facts,
    Gallery,
    IntervalRows,
    Page,
    Scores,
    Table,
    Timeline,
    embedded,
    render,
    write,
)

VOID = {"meta", "img", "input", "line", "circle", "polyline"}
EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onfocus=alert(1) x='", "</title></style>{{ 7 * 7 }}"]
TRICKS = "exe.\u202egnp\u2066\x00\u200b"


class Element:
    def __init__(self, tag: str, attributes: dict[str, str], parent: Element | None):
        self.tag, self.attributes, self.parent, self.text = tag, attributes, parent, ""

    def __getitem__(self, name: str) -> str:
        return self.attributes[name]

    def __contains__(self, name: str) -> bool:
        return name in self.attributes

    @property
    def above(self) -> list[Element]:
        return [self.parent, *self.parent.above] if self.parent else []


class Document(HTMLParser):
    """Every element in order, with its attributes, what it stands in, and all text inside it."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(text)
        self.close()
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} is there twice"
        element = Element(tag, {name: value or "" for name, value in attrs}, self.open[-1] if self.open else None)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]

    def one(self, tag: str) -> Element:
        (element,) = self.all(tag)
        return element

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(element.tag, tuple(element.attributes)) for element in self.elements]

    @property
    def style(self) -> str:
        return self.one("style").text


def picture(index: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(world.render(world.scene(world.PROMPT_SEED, index))).resize(size)


def full_page(text: str = "plain") -> Page:
    """Every kind of section, with `text` wherever text can stand."""
    names = [text, f"{text} 2", f"{text} 3"]
    measured = [Measured(12.0, 11.0, 13.0), Measured(8.0, 7.5, 8.5), Measured(float("nan"), float("nan"), float("nan"))]
    gallery = [(name, [picture(index), picture(index + 1)]) for index, name in enumerate(names)]
    curves = (Curve(text, True, [(1, 0.5), (10, 0.25)]), Curve(f"{text} 2", None, [(10, 3.0)]))
    strips = [[picture(step), picture(step + 1)] for step in range(3)]
    return Page(
        text,
        text,
        text,
        (
            Table(text, ["model", text], [[Cell(names[0]), Cell(text, True)], [Cell("other"), Cell(text)]], [text]),
            Scores(text, [IntervalRows(METRICS["fid"], list(zip(names, measured, strict=True)))], [text]),
            Gallery(text, [text, text], gallery, [text]),
            Timeline(text, [text, text], [0, 500, 1000], strips, strips[0], [3, 4], [text]),
            Curves(text, curves, [text]),
            Curves(text, curves[:1]),
            Commands(text, [(text, text)], [text]),
            Facts(text, [(text, text)] * 9, [text]),
        ),
    )


@pytest.fixture(scope="module")
def page() -> Document:
    return Document(render(full_page()))


RECORDS = [
    {
        "step": 1,
        "fake_loss": 80.0,
        "generator_loss": 30.0,
        "grad_norm": None,
        "ratio": 0.2,
        "images_per_second": 5.0,
        "skipped": 0.0,
    },
    {
        "step": 10,
        "fake_loss": 60.0,
        "generator_loss": -5.0,
        "grad_norm": 1.5,
        "ratio": 0.4,
        "images_per_second": 6.0,
        "skipped": 0.0,
    },
    {"step": 50, "images": 800, "seconds": 754.2, "fake_loss": 70.0, "generator_loss": 9.0, "ratio": 0.5, "skipped": 0.0},
    {"step": 50, "proxy_clip": 0.2, "proxy_cmmd": 0.3},
]
CONFIG = {"teacher": "emoji-teacher", "prompts": "emoji", "steps": 100, "batch_size": 16, "seed": 0, "student_steps": 1}
CARD = {"kind": "student", "t_init": 625, "student_steps": 1, "images": 1600, "config": CONFIG, "world": "emoji"}
RECORD = {
    "sid": "0.1.0",
    "started": "2026-11-26T14:42:39Z",
    "finished": None,
    "versions": {"torch": "2.15.0"},
    "teacher": {"revision": ""},
    "device": "cpu",
    "hardware": "A Processor",
    "cores": 2,
    "processes": 1,
}
PROMPTS = ["a cat", "a dog"]


def strip(first: int, count: int = 2, size: tuple[int, int] = (64, 64)) -> Image.Image:
    row = Image.new("RGB", (count * size[0], size[1]))
    for index in range(count):
        row.paste(picture(first + index, size), (index * size[0], 0))
    return row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder as `sid distill` leaves it."""
    root = tmp_path / "demo"
    (root / "samples").mkdir(parents=True)
    (root / "student").mkdir()
    (root / "config.toml").write_text(tomli_w.dumps(CONFIG))
    (root / "run.json").write_text(json.dumps(RECORD))
    (root / "student" / "sid.json").write_text(json.dumps(CARD))
    (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (root / "samples" / "prompts.json").write_text(json.dumps({"prompts": PROMPTS, "seeds": [5, 6]}))
    for step in (0, 50):
        strip(step).save(root / "samples" / f"{step:08d}.png")
    strip(9).save(root / "samples" / "teacher.png")
    return root


def section(sections: tuple[object, ...], kind: type, title: str = "") -> object:
    (found,) = (one for one in sections if isinstance(one, kind) and title in one.title)  # type: ignore[attr-defined]
    return found


# One file


def test_the_page_loads_nothing_and_runs_only_its_own_style_and_script(page: Document) -> None:
    (policy,) = (element for element in page.all("meta") if element.attributes.get("http-equiv") == "Content-Security-Policy")
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy["content"].split(";")}
    assert rules["default-src"] == ["'none'"] and rules["img-src"] == ["data:"]
    for name in ("style", "script"):
        own = base64.b64encode(hashlib.sha256(page.one(name).text.encode()).digest()).decode()
        assert rules[f"{name}-src"] == [f"'sha256-{own}'"]
    # A policy rules only what comes after it.
    assert all(page.elements.index(policy) < page.elements.index(element) for element in page.all("style", "script", "img", "link"))


def test_no_address_leads_out_of_the_page(page: Document) -> None:
    for element in page.elements:
        assert not {"srcset", "action", "data", "poster", "xlink:href", "background"} & set(element.attributes)
        assert ("src" in element) == (element.tag == "img")
        assert element.attributes.get("src", "data:image/webp;base64,").startswith("data:image/webp;base64,")
        assert element.attributes.get("href", "#").startswith("#")
        assert "style" not in element and not any(name.startswith("on") for name in element.attributes)
    assert not page.all("link", "base", "iframe", "object", "embed", "form")
    assert "url(" not in page.style and "@import" not in page.style
    assert not re.search(r"fetch|XMLHttp|import|eval|innerHTML", page.one("script").text)


@pytest.mark.parametrize("text", EVIL)
def test_prompts_names_and_settings_stay_text(text: str, page: Document) -> None:
    evil = Document(render(full_page(text)))
    assert evil.shape == page.shape
    for tag in ("title", "h1", "h2", "h3", "figcaption", "th", "td", "dt", "dd", "code", "desc"):
        assert any(text in element.text for element in evil.all(tag)), tag
    assert any(text in element["alt"] for element in evil.all("img"))
    assert evil.style == page.style and evil.one("script").text == page.one("script").text


def test_characters_that_hide_or_turn_text_are_made_visible() -> None:
    text = render(full_page(TRICKS))
    assert not set(TRICKS) & set(text) - set("exe.gnp")
    assert Document(text).one("h1").text == "exe.\\u202egnp\\u2066\\u0000\\u200b"


def test_the_same_content_gives_the_same_bytes_and_appears_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.html"
    write(full_page(), file)
    assert file.read_text(encoding="utf-8") == render(full_page())
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]
    with pytest.raises(EnvironmentProblem):
        write(full_page(), file / "below-a-file.html")


# Pictures


def test_pictures_are_shrunk_but_never_enlarged_and_small_ones_keep_their_pixels() -> None:
    sizes = {(64, 48): (64, 48, True), (128, 128): (128, 128, False), (256, 100): (256, 100, False), (1024, 512): (256, 128, False)}
    for size, (width, height, is_small) in sizes.items():
        found = embedded(picture(0, size))
        image = Image.open(io.BytesIO(base64.b64decode(found.uri.removeprefix("data:image/webp;base64,"))))
        assert (image.size, image.format) == ((width, height), "WEBP")
        assert (found.width, found.height, found.is_small) == (width, height, is_small)
    small, large = (
        Document(render(full_page())),
        replace(full_page(), sections=[Gallery("g", ["c"], [("a", [picture(0, (300, 300))])])]),
    )
    assert all(image["class"] == "small" for image in small.all("img"))
    assert "class" not in Document(render(large)).one("img")
    assert "img.small { image-rendering: pixelated; }" in small.style


def test_the_pictures_of_24_steps_and_8_prompts_take_less_than_400_kilobytes() -> None:
    strips = [[picture(8 * step + index) for index in range(8)] for step in range(24)]
    timeline = Timeline("t", [f"prompt {index}" for index in range(8)], list(range(24)), strips, strips[0])
    assert len(render(Page("t", "", "", [timeline])).encode()) < 400_000


def test_without_its_script_the_page_shows_the_last_step_and_no_dead_slider(page: Document) -> None:
    frames = [image for image in page.all("img") if any(above.attributes.get("class") == "frames" for above in image.above)]
    assert len(frames) == 2 * 3
    assert all(("at step 1,000" in image["alt"]) == ("hidden" not in image) for image in frames)
    assert any("hidden" in above for above in page.one("input").above)
    assert "step 1,000" in page.one("noscript").text
    assert len(page.one("script").text.strip().splitlines()) <= 20


# For every reader


def test_a_screen_reader_finds_its_way(page: Document) -> None:
    assert page.one("html")["lang"] == "en" and page.one("main") and page.all("title")[0].text == "plain"
    levels = [int(element.tag[1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(deeper - level <= 1 for level, deeper in itertools.pairwise(levels))
    identifiers = [element["id"] for element in page.elements if "id" in element]
    assert len(identifiers) == len(set(identifiers))
    for element in page.elements:
        for name in ("aria-labelledby", "for"):
            assert all(target in identifiers for target in element.attributes.get(name, "").split())
        assert element.attributes.get("href", "#s1").removeprefix("#") in identifiers
    assert all(image["alt"].strip() for image in page.all("img"))
    slider = page.one("input")
    assert page.one("label")["for"] == slider["id"] == page.one("output")["for"]
    assert slider["aria-valuetext"] == "step 1,000 of 1,000" and "aria-valuetext" in page.one("script").text
    for element in page.all("th"):
        assert element["scope"] == ("col" if any(above.tag == "thead" for above in element.above) else "row")
    assert all(summary.text.strip() for summary in page.all("summary"))


def test_every_chart_has_a_name_a_description_and_its_numbers_in_a_table(page: Document) -> None:
    outer = [svg for svg in page.all("svg") if not any(above.tag == "svg" for above in svg.above)]
    assert len(outer) == 4
    for svg in outer:
        title, text = (
            next(one for one in page.elements if one.attributes.get("id") == key) for key in svg["aria-labelledby"].split()
        )
        assert svg["role"] == "img" and title.tag == "title" and text.tag == "desc" and title.text and text.text
    rows = ["".join(f"{cell.text}|" for cell in page.all("th", "td") if row in cell.above) for row in page.all("tr")]
    assert "plain|12.00 (11.00 to 13.00)|" in rows and "plain 2|8.00 (7.50 to 8.50)|" in rows
    assert "1|0.5||" in rows and "10|0.25|3|" in rows


def luminance(color: str) -> float:
    parts = (int(color[index : index + 2], 16) / 255 for index in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """As WCAG 2 defines it, from 1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_stand_out_by_day_and_by_night(page: Document) -> None:
    day, night = page.style.split("@media (prefers-color-scheme: dark)")
    assert "color-scheme: light dark" in day
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in (day, night)]
    assert set(schemes[0]) == set(schemes[1]) and luminance(schemes[0]["page"]) > 0.8 > 0.1 > luminance(schemes[1]["page"])
    for scheme in schemes:
        for ground in ("page", "card"):
            for name in ("ink", "muted", "accent"):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, name
            for index in range(8):
                assert contrast(scheme[f"c{index}"], scheme[ground]) >= 3, index


def test_a_phone_scrolls_tables_and_commands_but_not_the_page(page: Document) -> None:
    assert any("width=device-width" in element["content"] for element in page.all("meta") if "content" in element)
    assert all(any(above.attributes.get("class") == "scroll" for above in table.above) for table in page.all("table"))
    assert all(
        "tabindex" in box
        for box in [*page.all("pre"), *(one for one in page.all("div") if one.attributes.get("class") == "scroll")]
    )
    assert ".scroll { overflow: auto;" in page.style and re.search(r"pre \{[^}]*overflow-x: auto", page.style)
    # A column may not be wider than the page, which min(100%, ...) sees to.
    assert all("min(100%" in columns for columns in re.findall(r"auto-fill, (.*?, 1fr\))", page.style))


def test_nothing_moves_for_readers_who_do_not_want_it_and_the_focus_is_seen(page: Document) -> None:
    still, moving = page.style.split("@media (prefers-reduced-motion: no-preference)")
    assert "scroll-behavior" in moving and not re.search(r"transition|animation|scroll-behavior", still)
    assert ":focus-visible { outline: 3px" in still and "outline: none" not in still


def test_a_contestant_has_one_color_in_every_table_chart_and_gallery(page: Document) -> None:
    named = {(element.text, element["class"]) for element in page.all("span") if "contestant" in element["class"]}
    assert named == {("plain", "contestant c0"), ("plain 2", "contestant c1"), ("plain 3", "contestant c2")}
    assert [mark["class"] for mark in page.all("g")] == ["c0", "c1"]
    for place in ("th", "p"):
        colored = [element for element in page.all("span") if any(above.tag == place for above in element.above)]
        assert len(colored) == {"th": 1 + 3, "p": 2 * 3}[place]
    assert all(f"--c{index}:" in page.style and f".c{index} {{" in page.style for index in range(8))


# Charts


def test_ticks_are_round_numbers_inside_the_axis() -> None:
    for low, high, labels in (
        (0, 2000, ["0", "500", "1,000", "1,500", "2,000"]),
        (0.16, 0.24, ["0.16", "0.18", "0.2", "0.22", "0.24"]),
    ):
        ticks = charts.Axis(low, high).ticks(4)
        assert [tick.label for tick in ticks] == labels
        assert (ticks[0].at, ticks[-1].at) == (0, 100)


def test_a_curve_goes_from_the_first_point_to_the_last_with_better_upwards_only_if_higher() -> None:
    drawn = charts.plot([(0, 1.0), (50, 3.0), (100, 2.0)])
    (x0, y0), (x1, y1), (x2, y2) = (map(float, place.split(",")) for place in drawn.line.split())
    assert (x0, x1, x2) == (0, 50, 100) and y1 < y2 < y0 and drawn.end == (x2, y2)
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.02)


def test_flat_single_and_endless_curves_are_drawn() -> None:
    assert charts.plot([(5, 2.0)]).line == "100,50" and charts.plot([(0, 0.0), (9, 0.0)]).line == "0,50 100,50"
    many = charts.plot([(step, step % 7) for step in range(100_000)]).line.split()
    assert len(many) == charts.POINTS and many[0].startswith("0,") and many[-1].startswith("100,")


def test_whiskers_share_one_axis_and_what_is_not_finite_has_none() -> None:
    nothing = float("nan")
    rows = [("a", Measured(0.5, 0.4, 0.6)), ("b", Measured(0.5, 0.4, 0.8)), ("c", Measured(nothing, nothing, nothing))]
    (first, second, third), ticks = charts.whiskers(rows, 100)
    assert first.marks and second.marks and third.marks is None
    assert first.marks[:2] == second.marks[:2] and first.marks[0] < first.marks[1] < first.marks[2] < second.marks[2] < 100
    assert [tick.label for tick in ticks] == ["40", "60", "80"]
    assert charts.whiskers(rows[2:], 1)[0][0].marks is None


def test_a_long_name_keeps_its_head_and_tail() -> None:
    assert charts.shortened("emoji-teacher") == "emoji-teacher"
    short = charts.shortened("runs/guidance-2.5/checkpoints/step-00002000")
    assert len(short) == charts.NAME_LETTERS and short.startswith("runs/gui") and short.endswith("step-00002000")


# Run folders


def test_a_run_shows_results_then_pictures_then_proxies_then_losses(folder: Path) -> None:
    found = run.run_page(folder)
    assert (found.title, found.subtitle) == ("demo", "one-step student distilled from emoji-teacher")
    assert found.summary == "Step 50 of 100 · 800 training images per network"
    titles = ["Overview", "Pictures over training", "Progress", "Losses", "Speed and memory", "How to run the student"]
    assert [one.title for one in found.sections] == [*titles, "Settings", "Student", "Provenance"]
    progress, losses = section(found.sections, Curves, "Progress"), section(found.sections, Curves, "Losses")
    assert isinstance(progress, Curves) and isinstance(losses, Curves)
    assert [(curve.title, curve.lower_is_better) for curve in progress.curves] == [
        ("CMMD, proxy", True),
        ("CLIP score, proxy", False),
        ("Ratio", None),
    ]
    assert progress.curves[2].points == [(1, 0.2), (10, 0.4), (50, 0.5)]
    assert "do not show progress" in progress.notes[0] and "|y_teacher - y_fake| / |y_teacher - x|" in progress.notes[1]
    assert {curve.title: list(curve.points) for curve in losses.curves}["Grad norm"] == [(10, 1.5)]
    assert [curve.title for curve in losses.curves] == ["Fake loss", "Generator loss", "Grad norm"]
    assert ("versions torch", "2.15.0") in section(found.sections, Facts, "Provenance").pairs  # type: ignore[attr-defined]
    text = Document(render(found))
    assert "CMMD, proxy" in [heading.text for heading in text.all("h3")]


def test_the_overview_tells_results_dates_duration_and_hardware(folder: Path) -> None:
    (folder / "proxy.json").write_text(json.dumps({"images": 128, "teacher_clip": 0.9}))
    overview = section(run.run_sections(folder), Facts, "Overview")
    assert (
        isinstance(overview, Facts)
        and overview.is_open
        and dict(overview.pairs)
        == {
            "CMMD, proxy": "0.3000",
            "CLIP score, proxy": "0.2000 (teacher 0.9000)",
            "Started": "2026-11-26 14:42 UTC",
            "Training time": "13 min",
            "Speed": "6 images per second",
            "Hardware": "A Processor, 2 cores",
        }
    )
    on_gpu = {"finished": "2026-11-27T01:02:03Z", "device": "cuda", "hardware": "A GPU", "processes": 8}
    (folder / "run.json").write_text(json.dumps(RECORD | on_gpu))
    (folder / "student" / "sid.json").write_text(json.dumps(CARD | {"metrics": {"FID": 12.5}}))
    overview = section(run.run_sections(folder), Facts, "Overview")
    assert (
        isinstance(overview, Facts)
        and dict(overview.pairs).items()
        >= {
            "FID": "12.5",
            "Finished": "2026-11-27 01:02 UTC",
            "Hardware": "A GPU, 8 processes",
        }.items()
    )


def test_the_axes_of_speed_and_memory_begin_at_zero_and_others_do_not(folder: Path) -> None:
    costs, losses = (section(run.run_sections(folder), Curves, title) for title in ("Speed", "Losses"))
    assert isinstance(costs, Curves) and isinstance(losses, Curves)
    assert all(curve.from_zero for curve in costs.curves) and not any(curve.from_zero for curve in losses.curves)
    points = [(0, 1.8), (10, 1.9)]
    assert charts.plot(points, True).values[0] == charts.Tick(100.0, "0")
    assert charts.plot(points).values[0].label == "1.8"


def test_pictures_are_larger_than_99_pixels_on_a_desktop(page: Document) -> None:
    """The arithmetic of the grids, with the numbers of the style; a browser confirms it below where there is one."""

    def grid(selector: str) -> int:
        return int(re.search(rf"{re.escape(selector)} {{[^}}]*?minmax\(min\(100%, (\d+)px\)", page.style)[1])  # type: ignore[index]

    widest = int(re.search(r"max-width: (\d+)px; padding: ", page.style)[1])  # type: ignore[index]
    for window in (1024, 1280, 1920):
        room = min(window, widest) - 80
        for selector, beside in ((".cards.pairs", 2), (".cards", 3)):
            columns = (room + 16) // (grid(selector) + 16)
            figure = (room - 16 * (columns - 1)) / columns
            assert (figure - 34 - 12 * (beside - 1)) / beside > 99, (window, selector)


def test_the_timeline_has_prompts_seeds_and_the_teacher(folder: Path) -> None:
    timeline = section(run.run_sections(folder), Timeline)
    assert isinstance(timeline, Timeline) and timeline.teacher
    assert (timeline.prompts, timeline.seeds, timeline.steps) == (PROMPTS, [5, 6], [0, 50])
    for column in range(2):
        assert timeline.strips[1][column].tobytes() == picture(50 + column).tobytes()
        assert timeline.teacher[column].tobytes() == picture(9 + column).tobytes()


def test_a_long_run_shows_24_steps_evenly_with_the_first_and_the_last(folder: Path) -> None:
    for step in range(0, 5000, 50):
        strip(0).save(folder / "samples" / f"{step:08d}.png")
    timeline = section(run.run_sections(folder), Timeline)
    assert isinstance(timeline, Timeline) and len(timeline.steps) == len(timeline.strips) == 24
    gaps = {after - before for before, after in itertools.pairwise(timeline.steps)}
    assert (timeline.steps[0], timeline.steps[-1]) == (0, 4950) and gaps <= {200, 250}


def test_an_old_run_without_prompts_and_teacher_is_cut_into_squares(folder: Path) -> None:
    (folder / "samples" / "prompts.json").unlink()
    (folder / "samples" / "teacher.png").unlink()
    timeline = section(run.run_sections(folder), Timeline)
    assert isinstance(timeline, Timeline) and timeline.teacher is None and timeline.seeds is None
    assert timeline.prompts == ["Picture 1", "Picture 2"] and timeline.strips[0][1].size == (64, 64)
    assert "seed" not in Document(render(run.run_page(folder))).one("main").text.split("Progress")[0]


def test_prompts_say_how_many_pictures_a_row_holds_where_they_are_not_square(folder: Path) -> None:
    strip(0, 2, (96, 64)).save(folder / "samples" / "00000000.png")
    strip(0, 2, (96, 64)).save(folder / "samples" / "00000050.png")
    timeline = section(run.run_sections(folder), Timeline)
    assert isinstance(timeline, Timeline) and [image.size for image in timeline.strips[0]] == [(96, 64), (96, 64)]


def test_the_page_says_how_to_run_a_student_of_one_step_or_of_several(folder: Path) -> None:
    lines = [command for _, command in section(run.run_sections(folder), Commands).commands]  # type: ignore[attr-defined]
    assert lines[0] == f'sid sample "a cat" --model {folder}' and lines[2] == f"sid eval {folder} emoji-teacher"
    assert f'from_pretrained("{folder}/student")' in lines[1]
    assert 'pipe("a cat", num_inference_steps=1, guidance_scale=0)' in lines[1]
    (folder / "student" / "sid.json").write_text(json.dumps(CARD | {"student_steps": 4}))
    lines = [command for _, command in section(run.run_sections(folder), Commands).commands]  # type: ignore[attr-defined]
    assert f'pipe("a cat", timesteps={list(exit_grid(625, 4))}, guidance_scale=0)' in lines[1]
    assert run.run_page(folder).subtitle == "4-step student distilled from emoji-teacher"


def test_the_page_of_photographs_says_what_a_measurement_needs(folder: Path) -> None:
    def lines() -> list[str]:
        commands = section(run.run_sections(folder), Commands)
        assert isinstance(commands, Commands)
        return [command for _, command in commands.commands[2:]]

    (folder / "student" / "sid.json").write_text(json.dumps({name: value for name, value in CARD.items() if name != "world"}))
    coco = f"sid eval {folder} --protocol coco2014-30k --reference coco --fid --clip"
    (folder / "config.toml").write_text(tomli_w.dumps(CONFIG | {"teacher": "owner/sd"}))
    assert lines() == [f"sid eval {folder} owner/sd --prompts captions.txt", coco]
    # `sid eval` cannot be told what a teacher predicts.
    (folder / "config.toml").write_text(tomli_w.dumps(CONFIG | {"teacher": "sd.safetensors", "prediction_type": "v_prediction"}))
    assert lines() == [f"sid eval {folder} --prompts captions.txt", coco]


def test_commands_are_quoted_for_the_shell(folder: Path) -> None:
    odd = folder.rename(folder.parent / "a run; $(rm -rf) \"x'")
    commands = section(run.run_sections(odd), Commands)
    assert isinstance(commands, Commands)
    for line in (commands.commands[0][1], commands.commands[2][1]):
        words = subprocess.run(
            ["bash", "-c", f'printf "%s\\n" {line}'], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert str(odd) in words
    compile(commands.commands[1][1], "snippet", "exec")


def test_a_run_that_is_still_training_has_a_page_without_a_student(folder: Path) -> None:
    shutil.rmtree(folder / "student")
    titles = [one.title for one in run.run_sections(folder)]
    assert "How to run the student" not in titles and "Student" not in titles and "Pictures over training" in titles
    assert run.run_page(folder).summary == "Step 50 of 100 · 800 training images per network"


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("config.toml", {"Settings"}),
        ("run.json", {"Provenance"}),
        ("metrics.jsonl", {"Progress", "Losses", "Speed and memory"}),  # the overview has other sources too
        ("student/sid.json", {"Student", "How to run the student"}),
        ("samples/prompts.json", set()),
        ("samples/teacher.png", set()),
        ("samples/00000050.png", set()),
    ],
)
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "noise", "[1]"])
def test_a_damaged_file_costs_its_own_part_of_the_page_alone(folder: Path, name: str, lost: set[str], damage: str) -> None:
    before = {one.title for one in run.run_sections(folder)}
    file = folder / name
    content = file.read_bytes()
    if name == "metrics.jsonl":
        content = content.splitlines()[0]  # half a file of one line has none
    damaged = {"empty": b"", "half": content[: len(content) // 2], "noise": b"\xff\x00{" * 50, "[1]": b"[1]"}
    file.unlink() if damage == "gone" else file.write_bytes(damaged[damage])
    assert before - {one.title for one in run.run_sections(folder)} == lost
    Document(render(run.run_page(folder)))


def test_a_card_with_an_invalid_entry_costs_its_own_part_of_the_page_alone(folder: Path) -> None:
    before = {one.title for one in run.run_sections(folder)}
    (folder / "student" / "sid.json").write_text(json.dumps(CARD | {"student_steps": -1}))
    assert before - {one.title for one in run.run_sections(folder)} == {"Student", "How to run the student"}


def test_lines_cut_short_and_values_that_are_no_numbers_are_left_out(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "ratio": NaN, "fake_loss": null, "note": "x", "generator_loss": [1]}\n[]\n{"ratio": 9}\n')
        file.write('{"step": 70, "ratio": 0.7}\n{"step": 80, "rat')
    progress = section(run.run_sections(folder), Curves, "Progress")
    assert isinstance(progress, Curves) and progress.curves[2].points == [(1, 0.2), (10, 0.4), (50, 0.5), (70, 0.7)]
    losses = section(run.run_sections(folder), Curves, "Losses")
    assert isinstance(losses, Curves) and losses.curves[0].points[-1] == (50, 70.0)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        run.run_page(tmp_path)


def test_a_page_is_made_without_torch(folder: Path) -> None:
    code = "import sys; from pathlib import Path; from sidcli.report import page, run; page.render(run.run_page(Path(sys.argv[1])))"
    check = f"{code}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check, str(folder)], check=True)


def test_a_browser_shows_it_moves_the_slider_and_asks_for_nothing(tmp_path: Path, folder: Path) -> None:
    browsers = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no browser")
    file = tmp_path / "report.html"
    others = [one for one in run.run_sections(folder) if not isinstance(one, Timeline)]
    write(replace(full_page("x" * 300), sections=(*full_page("x" * 300).sections, *others)), file)
    said: list[str] = []
    with browsers.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 800})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: said.append(request.url))
        tab.goto(file.as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        shown = "[...document.querySelectorAll('.frames img')].map(one => !one.hidden && one.naturalWidth > 0)"
        assert tab.evaluate(shown) == [False, False, True] * 2
        tab.locator("input").press("Home")
        assert tab.evaluate(shown) == [True, False, False] * 2
        assert tab.locator("input").get_attribute("aria-valuetext") == "step 0 of 1,000"
        tab.set_viewport_size({"width": 1280, "height": 800})
        widths = tab.evaluate("[...document.querySelectorAll('img')].filter(one => !one.hidden).map(one => one.clientWidth)")
        assert min(widths) > 99
        browser.close()
    assert [line for line in said if not line.startswith("data:")] == [file.as_uri()]


def test_a_student_that_the_stock_pipeline_cannot_draw_with_has_no_code_for_it(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "text_encoder": [None, None],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
    }
    clips = {name: ["transformers", "CLIPTextModelWithProjection"] for name in ("text_encoder", "text_encoder_2")}
    (tmp_path / "student").mkdir()
    for entries, draws in ((index, False), (index | clips, True), (index | clips | {"text_encoder_3": [None, None]}, True)):
        (tmp_path / "student" / "model_index.json").write_text(json.dumps(entries))
        assert run._is_stock(tmp_path) == draws
