"""Candidates of an evaluation: resolve names into models or image sets, and choose how each model generates images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sidcli.data.imagefiles import NOT_READ, SUFFIXES, ImageFiles, open_images
from sidcli.data.imagesets import DrawnSet, FileSet, ImageSet, PanelSet, SceneSet
from sidcli.emoji import world
from sidcli.errors import InputError, UsageError
from sidcli.evaluation.protocols import LEAST_REPEATED, Captions, Protocol
from sidcli.evaluation.spec import ModelSpec
from sidcli.files import readable
from sidcli.metrics.transforms import crop_and_resize
from sidcli.models.drawing import Drawer, student_plan
from sidcli.models.loading import Description, describe, load
from sidcli.models.sampler import Sampler, plan_for, untrained_plan
from sidcli.models.sources import Source, find, graph_format, read_card
from sidcli.progress import Listener, counted
from sidcli.settings import preset_for

REAL = "real scenes"
HINT_TEACHER = "name a teacher too, or leave the option out"


@dataclass(frozen=True)
class Resolved:
    """A spec and what its name refers to: a model (`source` and `known`), exported graphs (`source` alone), or images (`files`)."""

    spec: ModelSpec
    source: Source | None = None
    known: Description | None = None
    files: ImageFiles | None = None

    @property
    def is_teacher(self) -> bool:
        return self.known is not None and not self.known.is_student

    @property
    def takes_reference(self) -> bool:
        """Whether it is a model that takes a reference image."""
        return self.known is not None and self.known.layout is not None

    @property
    def is_emoji(self) -> bool:
        """Whether a model of the emoji world draws the images or, according to its record, drew the first image file."""
        if self.files is not None:
            model = self.files.record(0, "model") or ""
            return model != "" and (model.startswith("embedded:emoji") or preset_for(model) == "emoji")
        return self.source is not None and (self.known.card if self.known else read_card(self.source)).get("world") == "emoji"


def resolve(spec: ModelSpec, untrained: int, listener: Listener) -> list[Resolved]:
    """Resolve a spec. If `untrained` > 0, a teacher is returned twice: as itself and as an untrained student of `untrained` steps.

    Raises InputError if there is neither a model nor a set of images with this name.
    """
    path = Path(spec.name)
    models = ("model_index.json", "sid.json", "config.toml", "student", "student.safetensors")
    with readable(path):
        has_images = path.suffix.lower() == ".zip" or (path.is_dir() and not any((path / name).exists() for name in models))
    if has_images:
        if spec.own:
            raise UsageError(f"{spec.name} holds images, which steps= and guidance= do not change", "leave them out")
        files = open_images(path)
        for note in files.notes:
            listener.note(note)
        return [Resolved(spec, files=files)]
    if path.suffix.lower() in {*SUFFIXES, *NOT_READ, ".npz", ".tar"} and path.is_file():
        raise InputError(
            f"{path} is neither a model nor a folder or .zip of images",
            "give the folder that holds the images; --reference also takes an .npz of statistics",
        )
    source = find(spec.name, listener)
    found = Resolved(spec, source, None if source.path.is_dir() and graph_format(source.path) else describe(source, None, listener))
    return [found, replace(found, spec=replace(spec, untrained=untrained))] if untrained and found.is_teacher else [found]


def check_used(found: Sequence[Resolved], untrained: int) -> None:
    """Raises UsageError if an option for teachers is given and applies to none of the models to be measured."""
    teachers = [one.spec for one in found if one.is_teacher]
    if untrained and not teachers:
        raise UsageError(f"--untrained {untrained} applies to teachers, and none is measured", HINT_TEACHER)
    for name in ("steps", "guidance"):
        common = [spec for one in found if name not in (spec := one.spec).stated and getattr(spec, name) is not None]
        if common and all(name in spec.stated for spec in teachers):
            why = f"every teacher states its own {name}" if teachers else "none is measured"
            raise UsageError(f"--{name} {getattr(common[0], name):g} applies to teachers, and {why}", HINT_TEACHER)


@dataclass(frozen=True)
class Candidate:
    """A set of images to measure, one row of the table: images of the protocol's captions, its held-out pairs, its bare nouns and
    its repeated captions.

    `is_real`: the images are the scenes that the captions describe, for comparison, and no model generated them.
    """

    name: str
    sampling: str
    images: ImageSet
    limit: int | None = None
    held_out: ImageSet | None = None
    bare: ImageSet | None = None
    repeated: ImageSet | None = None
    is_teacher: bool = False
    is_real: bool = False
    close: Callable[[], None] = lambda: None
    """Frees the networks that generate the images, so that the networks of only one model are in memory at a time."""


@dataclass(frozen=True)
class Drawing:
    """How and where the models of an evaluation draw; `place` is the folder of the images, None for the cache."""

    device: torch.device
    seed: int
    batch_size: int
    place: Path | None
    precision: str = "fp32"


def to_measure(found: Sequence[Resolved], protocol: Protocol, num: int | None, drawing: Drawing) -> list[Candidate]:
    """Return the sets of images to measure, without generating images. For the emoji protocol, the first set is `REAL`, the scenes.

    A model that is named twice is measured once. Raises InputError if the emoji protocol is given a model of another world, and
    UsageError if a model needs captions and the protocol has none.
    """
    scenes = Candidate(REAL, "not drawn", SceneSet(world.PROMPT_SEED), held_out=SceneSet(world.PROMPT_SEED, True), is_real=True)
    rows = [scenes] if protocol.is_emoji else []
    if protocol.name == "emoji-subjects":
        rows = [Candidate(REAL, "not drawn", PanelSet(1), is_real=True)]
    for one in found:
        if one.files is not None:
            size = len(one.files)
            rows.append(Candidate(one.spec.name, counted(size, "image"), FileSet(one.files), size))
            continue
        if one.takes_reference and protocol.references is None:
            raise InputError(
                f"{one.spec.name} needs a reference image, and the protocol {protocol.name} gives none",
                "--protocol emoji-subjects" if one.is_emoji else "--protocol subjects --reference FOLDER",
            )
        if protocol.is_emoji_world and not one.is_emoji:
            raise InputError(
                f"{one.spec.name} does not draw the emoji world",
                "--protocol coco2014-30k, or --protocol custom with --prompts FILE",
            )
        captions = protocol.captions
        if captions is None:
            raise UsageError(f"{one.spec.name} needs captions to draw", "--prompts FILE, or --prompts general for built-in ones")
        count = captions.limit if captions.limit is not None else num or protocol.default_num or 0
        rows.append(_model(one, protocol, captions, count, drawing))
    return list({(row.name, row.sampling): row for row in rows}.values())


def _model(one: Resolved, protocol: Protocol, captions: Captions, count: int, drawing: Drawing) -> Candidate:
    source, spec = one.source, one.spec
    assert source is not None
    opened: list[Drawer] = []
    if one.known is None:
        if spec.own:
            raise UsageError(f"{spec.name} holds graphs, whose sampling is fixed", "leave steps= and guidance= out")
        if drawing.precision != "fp32":
            raise UsageError(f"{spec.name} holds graphs, which have a precision of their own", "leave --precision out")
        plan = student_plan(read_card(source), None, None, spec.name)
    elif spec.untrained:
        plan = untrained_plan(one.known.path, spec.untrained)
    elif one.known.is_student and not spec.own:
        plan = plan_for(one.known)
    else:
        plan = plan_for(one.known, spec.steps, spec.guidance)
    if one.known is not None:
        plan = replace(plan, precision=drawing.precision)

    def open_drawer() -> Drawer:
        if not opened:
            opened.append(_drawer(one, drawing.device))
        return opened[0]

    def drawn(asked: Captions, least: int = 0) -> DrawnSet:
        prompts = asked.first(max(count, least))
        place, reference = drawing.place, reference_of(asked)
        return DrawnSet(source, plan, prompts, asked.key, drawing.seed, open_drawer, drawing.batch_size, place, reference)

    def reference_of(asked: Captions) -> Callable[[int], np.ndarray] | None:
        if asked.references is None or not one.takes_reference:
            return None
        assert one.known is not None
        references, size = asked.references, one.known.size
        return lambda index: crop_and_resize(references.read(index), *size)

    return Candidate(
        spec.name,
        plan.describe() + (", from the prompt alone" if protocol.references and not one.takes_reference else ""),
        drawn(captions),
        captions.limit,
        drawn(protocol.held_out) if protocol.held_out else None,
        drawn(protocol.bare) if protocol.bare else None,
        drawn(protocol.repeated, LEAST_REPEATED) if protocol.repeated else None,
        is_teacher=one.is_teacher and not spec.untrained,
        close=opened.clear,
    )


def _drawer(one: Resolved, device: torch.device) -> Drawer:
    assert one.source is not None
    if one.known is None:
        from sidcli.formats.runtime import open_graphs

        return open_graphs(one.source.path, str(graph_format(one.source.path)))
    return Sampler(load(one.source), device)
