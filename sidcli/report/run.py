"""The report page of a run folder, made only from its files. If a file is missing, damaged or incomplete, only its part of the page
is left out."""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sidcli.errors import InputError
from sidcli.files import read_json
from sidcli.metrics.catalog import METRICS
from sidcli.models import card
from sidcli.models.drawing import student_plan
from sidcli.objectives import OBJECTIVES
from sidcli.progress import counted, duration, plural
from sidcli.report.charts import evenly, number
from sidcli.report.decay import worsening
from sidcli.report.page import Commands, Curve, Curves, Facts, Gallery, Page, Section, Timeline
from sidcli.settings import flat

FRAMES = 24
PROXIES: Mapping[str, tuple[str, bool | None]] = {
    **{f"proxy_{name}": (f"{metric.label}, proxy", metric.lower_is_better) for name, metric in METRICS.items()},
    "proxy_saturation": ("Saturation, times the teacher's", None),
    "proxy_contrast": ("Contrast, times the teacher's", None),
    "proxy_diversity": ("Diversity at one prompt, times the teacher's", None),
    "ratio": ("Ratio", None),
    "sample_std": ("Spread of the latents", None),
}
COSTS: Mapping[str, tuple[str, bool | None]] = {
    "images_per_second": ("Images per second", False),
    "memory_gb": ("Peak memory, GB", True),
}
NOT_DRAWN = ("step", "images", "seconds", "skipped", "skipped_in_row", "proxy_cmmd_low", "proxy_cmmd_high")
"""Numbers of metrics.jsonl that are no curves."""
LOOK = "Look at the pictures and the proxies; proxies are measured on few images and compare steps of this run only."
RATIO = "The ratio is |y_teacher - y_fake| / |y_teacher - x|: how far the two denoisers differ, relative to what the teacher changes in x."


@dataclass(frozen=True)
class Run:
    """The readable content of a run folder. `records` maps each step, in order, to the finite numbers of metrics.jsonl."""

    folder: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    student: Mapping[str, Any]
    records: Mapping[float, Mapping[str, float]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        student = _json(folder / "student" / "sid.json", card.read_file)
        return cls(folder, _toml(folder / "config.toml"), _json(folder / "run.json"), student, records(folder / "metrics.jsonl"))

    @property
    def teacher(self) -> str:
        return str(self.config.get("teacher", ""))

    @property
    def student_steps(self) -> int:
        return _whole(self.student, "student_steps") or _whole(self.config, "student_steps") or 1

    @property
    def is_tuned(self) -> bool:
        """Whether the run tunes a model of many steps to take a reference image."""
        objective = OBJECTIVES.get(str(flat(self.config).get("objective")))
        return objective is not None and objective.makes == "teacher"

    @property
    def takes_reference(self) -> bool:
        return "reference_layout" in _json(self.folder / "student" / "unet" / "config.json")

    @property
    def done(self) -> float:
        """Number of training steps so far."""
        return max(self.records, default=_whole(self.student, "steps_trained") or 0)

    @property
    def images(self) -> float | None:
        """Number of training images per network so far: steps times batch size.

        The number in sid.json is not used, because the first versions of sid counted the images of both networks.
        """
        size = _whole(self.config, "batch_size")
        return self.done * size if size else None

    def last(self, key: str) -> float | None:
        """Return the newest value of a curve, None if it has no values."""
        return next((record[key] for record in reversed(list(self.records.values())) if key in record), None)


def run_page(folder: Path) -> Page:
    """Return the page of a run, finished or not. Raises InputError if the folder contains no readable file of a run."""
    run = Run.read(folder)
    sections = _sections(run)
    if not sections:
        raise InputError(f"{folder} holds no run that can be read", "give the folder that sid distill wrote")
    kind = "one" if run.student_steps == 1 else str(run.student_steps)
    what = "model with a reference image, tuned" if run.is_tuned else f"{kind}-step student distilled"
    return Page(folder.resolve().name, f"{what} from {run.teacher or 'a teacher'}", _summary(run), sections)


def run_sections(folder: Path) -> tuple[Section, ...]:
    """Return the sections of a run folder: results, pictures, proxies, losses, how to run the student, settings and provenance."""
    return _sections(Run.read(folder))


def _sections(run: Run) -> tuple[Section, ...]:
    keys = dict.fromkeys(key for record in run.records.values() for key in record if key not in NOT_DRAWN)
    curves = {key: [(step, record[key]) for step, record in run.records.items() if key in record] for key in keys}
    losses = {key: (key.replace("_", " ").capitalize(), None) for key in curves if key not in PROXIES and key not in COSTS}
    sections = (
        _overview(run),
        *_pairs(run.folder / "pairs"),
        _timeline(run.folder / "samples"),
        _curves("Progress", PROXIES, curves, (_reading(run), *_decay(run), *_goal(run), *([RATIO] if "ratio" in curves else []))),
        _curves("Losses", losses, curves, ("For the health of the run: they should stay finite and of one order of magnitude.",)),
        _curves("Speed and memory", COSTS, curves, from_zero=True),
        _commands(run),
        _facts("Settings", flat(run.config)),
        _facts("Student", {key: value for key, value in run.student.items() if key not in ("config", "teacher", "kind", "images")}),
        _facts("Provenance", run.record),
    )
    return tuple(section for section in sections if section is not None)


def _reading(run: Run) -> str:
    """Return a note that explains how to read the losses of the run's objective, and what to look at instead."""
    objective = OBJECTIVES.get(str(flat(run.config).get("objective", "sid")))
    return f"{objective.reads} {LOOK}" if objective else LOOK


def _decay(run: Run) -> tuple[str, ...]:
    """Return notes on a student that got worse, and on a student that is not that of the last step."""
    said, kept = worsening(run.records), run.record.get("student")
    notes = [f"Warning: {said}."] if said else []
    if isinstance(kept, dict) and kept.get("step") != run.done:
        notes.append(f"The student is that of step {kept.get('step')}: {kept.get('reason')}.")
    return tuple(notes)


def _goal(run: Run) -> tuple[str, ...]:
    """Return a note with the teacher's CLIP score, which the proxies can be expected to reach; empty if it is unknown."""
    goal = _json(run.folder / "proxy.json")
    score, images = goal.get("teacher_clip"), _whole(goal, "images")
    if not isinstance(score, float) or images is None:
        return ()
    return (f"The teacher's own images of the {counted(images, 'prompt')} of the proxies have a CLIP score of {score:.4f}.",)


def _summary(run: Run) -> str:
    planned, skipped = _whole(run.config, "steps"), run.last("skipped")
    parts = [
        f"Step {number(run.done)}" + (f" of {number(planned)}" if planned else ""),
        f"{number(run.images)} training {plural(run.images, 'image')} per network" if run.images else "",
        f"{number(skipped)} {plural(skipped, 'update')} left out" if skipped else "",
    ]
    return " · ".join(part for part in parts if part)


def _overview(run: Run) -> Facts | None:
    """Return the most important facts: the available results, start and end, training time, speed and hardware."""
    pairs: dict[str, str] = {}
    goal = _json(run.folder / "proxy.json").get("teacher_clip")
    for key, (label, _) in PROXIES.items():
        value = run.last(key) if key.startswith("proxy_") else None
        if value is not None:
            beside = f" (teacher {goal:.4f})" if key == "proxy_clip" and isinstance(goal, float) else ""
            pairs[label] = f"{value:.4f}{beside}"
    measured = run.student.get("metrics")
    pairs |= {name: str(value) for name, value in measured.items()} if isinstance(measured, dict) else {}
    for name in ("started", "finished"):
        if found := re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\dZ", str(run.record.get(name))):
            pairs[name.capitalize()] = f"{found[1]} {found[2]} UTC"
    seconds, speed = run.last("seconds"), run.last("images_per_second")
    pairs |= {"Training time": duration(seconds)} if seconds is not None else {}
    pairs |= {"Speed": f"{number(speed)} images per second"} if speed is not None else {}
    hardware, cores, processes = run.record.get("hardware"), _whole(run.record, "cores"), _whole(run.record, "processes")
    if isinstance(hardware, str) and hardware:
        on_cpu = run.record.get("device") == "cpu"
        pairs["Hardware"] = hardware + (f", {counted(cores, 'core')}" if on_cpu and cores else "")
        pairs["Hardware"] += f", {processes} processes" if processes and processes > 1 else ""
    return Facts("Overview", list(pairs.items()), is_open=True) if pairs else None


def _pairs(folder: Path) -> tuple[Section, ...]:
    """Return the results of the curation of pairs and a picture of some of them, those that can be read."""
    sections: list[Section] = []
    if facts := _flat({name: value for name, value in _json(folder / "curation.json").items() if name != "sha256"}):
        notes = ("The scores of all pairs, kept and rejected, are in pairs/pairs.jsonl.",)
        sections.append(Facts("Pairs of images of one subject", facts, notes, is_open=True))
    try:
        with Image.open(folder / "examples.png") as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return tuple(sections)
    row = [("the first of each", [picture])]
    return (*sections, Gallery("Pairs that were kept, then pairs that were rejected", ["pairs and reasons"], row))


def _timeline(folder: Path) -> Timeline | None:
    files = sorted((file for file in folder.glob("*.png") if file.stem.isdecimal()), key=lambda file: int(file.stem))
    known = _json(folder / "prompts.json")
    prompts, seeds = (value if isinstance(value, list) else [] for value in (known.get("prompts"), known.get("seeds")))
    strips = {int(file.stem): strip for file in evenly(files, FRAMES) if (strip := _strip(file, len(prompts)))}
    if not strips:
        return None
    count = len(next(iter(strips.values())))
    strips = {step: strip for step, strip in strips.items() if len(strip) == count}
    teacher = _strip(folder / "teacher.png", len(prompts))
    return Timeline(
        "Pictures over training",
        [str(prompt) for prompt in prompts] if len(prompts) == count else [f"Picture {index + 1}" for index in range(count)],
        list(strips),
        list(strips.values()),
        teacher if len(teacher) == count else None,
        seeds if len(seeds) == count else None,
        ("The same prompts and noise at every step.",),
    )


def _strip(file: Path, count: int) -> list[Image.Image]:
    """Return the pictures that a file contains side by side: `count` pictures of equal width.

    If `count` is 0 or does not divide the width, the pictures are taken to be square. Returns [] if the file is damaged.
    """
    try:
        with Image.open(file) as opened:
            row = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # the errors that Pillow raises for a damaged file
        return []
    if not count or row.width % count:
        count = max(1, round(row.width / row.height))
    width = row.width // count
    return [row.crop((index * width, 0, (index + 1) * width, row.height)) for index in range(count)]


def _curves(
    title: str,
    shown: Mapping[str, tuple[str, bool | None]],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    notes: Sequence[str] = (),
    from_zero: bool = False,
) -> Curves | None:
    found = [Curve(label, lower, curves[key], from_zero) for key, (label, lower) in shown.items() if key in curves]
    return Curves(title, found, notes) if found else None


def _commands(run: Run) -> Commands | None:
    model = shlex.quote(str(run.folder))
    if run.takes_reference:
        commands = [("On the command line:", f'sid sample "a cat" --reference reference.png --model {model}')]
        if run.is_tuned:
            commands.append(("Distill it to one step:", f"sid distill --teacher {model}"))
        if run.student.get("world") == "emoji":
            commands.append(("Measure it:", f"sid eval {model}"))
        return Commands("How to run the model", commands)
    t_init, steps = _whole(run.student, "t_init"), run.student_steps
    if t_init is None:
        return None
    own = {name: run.student[name] for name in ("sampler", "solver_steps", "shift") if name in run.student}
    plan = student_plan({"t_init": t_init, "student_steps": steps, **own})
    found = run.student.get("call")  # students of earlier versions have none
    options = found if isinstance(found, dict) else {"guidance_scale": 0}
    arguments = ", ".join(f"{name}={value}" for name, value in {**plan.in_diffusers, **options}.items())
    code = (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(str(run.folder / 'student'))}{_absent(run.folder)})\n"
        f'pipe("a cat", {arguments}).images[0].save("cat.png")'
    )
    stock = [(f"In diffusers (keep guidance_scale={options.get('guidance_scale')}):", code)] if _is_stock(run.folder) else []
    return Commands(
        "How to run the student",
        [("On the command line:", f'sid sample "a cat" --model {model}'), *stock, *_measuring(run, model)],
    )


def _is_stock(folder: Path) -> bool:
    """Return whether the stock pipeline draws with the student of a run. Of the text encoders, it can lack only the last one."""
    index = _json(folder / "student" / "model_index.json")
    texts = sorted(name for name in index if name.startswith("text_encoder"))
    return all(index[name] != [None, None] for name in texts[:-1])


def _absent(folder: Path) -> str:
    """Return the arguments for the text encoders and tokenizers that the student's pipeline could have and does not have."""
    parts = _json(folder / "student" / "model_index.json")
    return "".join(
        f", {name}=None" for name, part in parts.items() if part == [None, None] and name.startswith(("text_encoder", "tokenizer"))
    )


def _measuring(run: Run, model: str) -> list[tuple[str, str]]:
    """Return (explanation, command) pairs that measure the student of a run.

    To measure a student that draws photographs, the user must provide captions or reference images.
    """
    # `sid eval` uses the configs in the teacher's own files, so a teacher that was loaded with overrides is left out.
    described = run.config.get("prediction_type", "auto") == "auto" and not run.config.get("model_config")
    names = " ".join([model, shlex.quote(run.teacher)] if run.teacher and described else [model])
    if run.student.get("world") == "emoji":
        return [("Measure it beside its teacher:", f"sid eval {names}")]
    return [
        ("Measure it on your own captions, one a line:", f"sid eval {names} --prompts captions.txt"),
        (
            "Measure it as the paper does, with the validation set of COCO 2014 in the folder coco:",
            f"sid eval {model} --protocol coco2014-30k --reference coco --fid --clip",
        ),
    ]


def _facts(title: str, content: Mapping[str, Any]) -> Facts | None:
    pairs = _flat(content)
    return Facts(title, pairs) if pairs else None


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested tables to (name, value) pairs with joined names. Empty values are left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key} ")
        elif value not in ("", None):
            pairs.append((prefix + key, value if isinstance(value, str) else json.dumps(value, default=str)))
    return pairs


def records(file: Path) -> dict[float, dict[str, float]]:
    """Return the records of metrics.jsonl by step.

    Lines that are not a JSON object with a step, and values that are not finite numbers, are skipped.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    found: dict[float, dict[str, float]] = {}
    for line in lines:
        try:
            record = json.loads(line, parse_int=float)
        except ValueError:
            continue
        if isinstance(record, dict):
            numbers = {key: value for key, value in record.items() if isinstance(value, float) and math.isfinite(value)}
            if "step" in numbers:
                found.setdefault(numbers["step"], {}).update(numbers)
    return dict(sorted(found.items()))


def _whole(content: Mapping[str, Any], key: str) -> int | None:
    value = content.get(key)
    return value if isinstance(value, int) else None


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _json(file: Path, read: Callable[[Path], dict[str, Any]] = read_json) -> dict[str, Any]:
    try:
        return read(file)
    except InputError:
        return {}
