"""Metrics of entrants under a protocol: one pass over the images of each, every number from that pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sidcli import __version__
from sidcli.emoji import world
from sidcli.entrants import FLOOR, Entrant
from sidcli.errors import UsageError
from sidcli.hub import Listener
from sidcli.imagesets import Collection, DrawnSet
from sidcli.metrics.catalogue import METRICS, Measured
from sidcli.metrics.features import EmojiFeatures, Extractor, InceptionFeatures
from sidcli.metrics.fid import Statistics, fid, fid_infinity, statistics
from sidcli.metrics.intervals import mean, share
from sidcli.metrics.kid import KernelDistance, cmmd, kid
from sidcli.metrics.prdc import NEIGHBOURS, prdc
from sidcli.parallel import Team
from sidcli.protocols import Protocol, scenes

PRDC = ("precision", "recall", "density", "coverage")
ASKED = {
    "fid": ("fid", "fid_teacher"),
    "fid_infinity": ("fid_infinity",),
    "kid": ("kid",),
    "prdc": PRDC,
    "dino": ("fd_dinov2",),
    "cmmd": ("cmmd",),
    "clip": ("clip",),
    "accuracy": ("noun", "colour"),
    "composition": ("composition",),
}
"""Metrics by the option that asks for them."""
JUDGE = dict.fromkeys(("fid", "fid_infinity", "fid_teacher", "kid", *PRDC, "noun", "colour", "composition"), "features") | {
    "clip": "clip",
    "cmmd": "embeddings",
    "fd_dinov2": "dino",
}
"""The network of the protocol that a metric looks through."""
COMPARED = ("fid", "fid_infinity", "kid", *PRDC, "fd_dinov2", "cmmd")
EMOJI_ONLY = ("noun", "colour", "composition")
FEWEST = {"fid": 2, "fid_teacher": 2, "fd_dinov2": 2, "kid": 3, "fid_infinity": 100, "composition": 4}
FEWEST |= dict.fromkeys(PRDC, NEIGHBOURS + 1)
"""Images without which a metric has no value."""
PER_DIMENSION = 10
"""Images per feature dimension below which a Frechet distance is mostly the bias of a small sample."""


@dataclass(frozen=True)
class Row:
    """What was measured of one entrant. `seconds_per_image` is the drawing alone, None where nothing was drawn."""

    model: str
    sampling: str
    n: int
    metrics: dict[str, Measured]
    seconds_per_image: float | None

    def as_dict(self) -> dict[str, Any]:
        numbers = {
            name: {key: float(f"{value:.7g}") if math.isfinite(value) else None for key, value in asdict(one).items()}
            for name, one in self.metrics.items()
        }
        seconds = None if self.seconds_per_image is None else round(self.seconds_per_image, 5)
        return {"model": self.model, "sampling": self.sampling, "n": self.n, "metrics": numbers, "seconds_per_image": seconds}


def chosen(
    asked: Iterable[str], protocol: Protocol, everything: bool, entered: Sequence[Entrant], gated: Iterable[str] = ()
) -> list[str]:
    """Metrics to compute, in the catalogue's order, for the names of options in `asked` and the metrics of a gate.

    With `everything`, all that this protocol can give. Raises UsageError for what was asked for by name and cannot be given.
    """
    gated = set(gated)
    wanted = {name for option in asked for name in ASKED[option]}
    impossible: dict[str, str] = {}
    if protocol.reference is None:
        impossible |= dict.fromkeys(COMPARED, "--reference FOLDER to compare with")
    elif isinstance(protocol.reference, Statistics):
        only = "a reference of images; an .npz holds the statistics of one FID alone"
        impossible |= {name: only for name in COMPARED if not name.startswith("fid")}
    if protocol.captions is None:
        impossible["clip"] = "--prompts FILE with the captions of the images"
    if not protocol.is_emoji:
        impossible |= dict.fromkeys(EMOJI_ONLY, "the emoji world, whose images have a ground truth")
    if everything:
        optional = {"fid_infinity"} | ({"fd_dinov2"} if protocol.is_emoji else set())
        wanted |= set(METRICS) - optional - set(impossible)
    elif not wanted:
        wanted = {name for option in ("fid", "clip", "accuracy") for name in ASKED[option]} - set(impossible)
    if not any(entrant.is_teacher for entrant in entered) or len(entered) - protocol.is_emoji < 2:
        impossible["fid_teacher"] = "a teacher in the table, and a model beside it"
        wanted -= {"fid_teacher"}
    wanted |= gated
    for name in sorted(wanted & set(impossible)):
        raise UsageError(f"{METRICS[name].label} needs {impossible[name]}")
    if not wanted:
        raise UsageError("nothing to measure: neither a reference nor captions are given", "--reference FOLDER, --prompts FILE")
    return [name for name in METRICS if name in wanted]


class Evaluation:
    """Metrics of entrants under one protocol. `fill` is the work that processes share; rows are computed by the one that leads."""

    def __init__(self, protocol: Protocol, entered: Sequence[Entrant], metrics: Sequence[str], num: int | None, team: Team):
        self.protocol, self.entered, self.metrics, self.team = protocol, entered, metrics, team
        self.num = num or protocol.default_num
        self.judges: dict[str, Extractor] = {name: getattr(protocol.judges, name) for name in {JUDGE[metric] for metric in metrics}}
        counted = [(entrant.name, self.count(entrant)) for entrant in entered]
        counted += [("the reference", self.reference.count)] if self.reference is not None else []
        for name, count in counted:
            for metric in metrics:
                if count < FEWEST.get(metric, 1):
                    raise UsageError(
                        f"{METRICS[metric].label} has no value with {count} images of {name}", f"{FEWEST[metric]} images or more"
                    )

    def count(self, entrant: Entrant) -> int:
        limits = (self.num, entrant.limit, self.protocol.captions.limit if self.protocol.captions else None)
        return min(limit for limit in limits if limit is not None)

    @property
    def counts(self) -> list[int]:
        """Images of each entrant."""
        return [self.count(entrant) for entrant in self.entered]

    def collection(self, entrant: Entrant) -> Collection:
        protocol, count = self.protocol, self.count(entrant)
        captions = protocol.captions.first(count) if protocol.captions else []
        return Collection(entrant.images, count, captions, protocol.prepare, protocol.prepared)

    def held_out(self, entrant: Entrant) -> Collection | None:
        if entrant.held_out is None or "composition" not in self.metrics:
            return None
        return Collection(entrant.held_out, self.count(entrant) // 4)

    @property
    def reference(self) -> Collection | None:
        compared = any(metric in COMPARED for metric in self.metrics)
        return self.protocol.reference if compared and isinstance(self.protocol.reference, Collection) else None

    def check_width(self, features: np.ndarray) -> None:
        """Raises UsageError where given statistics are those of another network than this protocol's."""
        given = self.protocol.reference
        if isinstance(given, Statistics) and features.shape[1] != len(given.mean):
            raise UsageError(
                f"the reference's statistics have {len(given.mean)} dimensions, {self.judges['features'].name} has {features.shape[1]}",
                "statistics of Inception's 2048 features, or a folder of images",
            )

    def fill(self, listener: Listener) -> None:
        """Draw and look at everything that the cache lacks. Networks are opened before the first image is drawn."""
        work: list[tuple[str, list[tuple[Collection, list[Extractor]]], Callable[[], None]]] = []
        if self.reference is not None:
            comparing = [self.judges[name] for name in self.judges if name != "clip"]
            work.append(("reference", [(self.reference, comparing)], lambda: None))
        for entrant in self.entered:
            parts = [(self.collection(entrant), list(self.judges.values()))]
            held_out = self.held_out(entrant)
            if held_out:
                parts.append((held_out, [self.judges["features"]]))
            work.append((f"{entrant.name}, {entrant.sampling}", parts, entrant.close))
        lacking = {judge for _, parts, _ in work for part, judges in parts for judge in judges if part.lacks(judge)}
        for name, judge in self.judges.items():
            if judge in lacking or (name == "features" and isinstance(self.protocol.reference, Statistics)):
                seen = judge([np.zeros((8, 8, 3), np.uint8)], ["a"])
                if name == "features":
                    self.check_width(seen)
        for name, parts, close in work:
            with listener.progress(name, sum(part.count for part, _ in parts), "images") as advance:
                for part, judges in parts:
                    part.fill(judges, self.team.part, advance)
            close()
        self.team.wait()

    def rows(self, listener: Listener) -> list[Row]:
        with listener.progress("metrics", len(self.entered) * len(self.metrics), "numbers") as advance:
            return [self.row(entrant, advance) for entrant in self.entered]

    def row(self, entrant: Entrant, advance: Callable[[int], None]) -> Row:
        found: dict[str, Measured] = {}
        for metric in self.metrics:
            value = self.measure(entrant, metric, found)
            if value is not None:
                found[metric] = value
            advance(1)
        seconds = entrant.images.seconds_per_image if isinstance(entrant.images, DrawnSet) else None
        return Row(entrant.name, entrant.sampling, self.count(entrant), found, seconds)

    def measure(self, entrant: Entrant, metric: str, found: dict[str, Measured]) -> Measured | None:
        """One number of one entrant, None where it has no such number; `found` are those measured before."""
        judge = JUDGE[metric]
        features = self.collection(entrant).features(self.judges[judge])
        if metric in ("fid", "fd_dinov2"):
            return fid(features, self.statistics[judge])
        if metric == "fid_infinity":
            return fid_infinity(features, self.statistics[judge], found.get("fid") or fid(features, self.statistics[judge]))
        if metric == "fid_teacher":
            return None if entrant is self.teacher or entrant.name == FLOOR else fid(features, self.statistics["teacher"])
        if metric == "kid":
            return self.kid(features / self.kid_unit)
        if metric in PRDC:
            if metric == PRDC[0]:
                self.neighbours = prdc(torch.from_numpy(self.compared(judge, len(features))), torch.from_numpy(features))
            return getattr(self.neighbours, metric)
        if metric == "cmmd":
            return self.cmmd(features)
        if metric == "clip":
            return mean(features[:, 0])
        if metric == "composition":
            held_out = self.held_out(entrant)
            return share(np.all(self.right(held_out.features(self.judges[judge]), True), axis=1)) if held_out else None
        return share(self.right(features, False)[:, ("noun", "colour").index(metric)])

    def right(self, features: np.ndarray, held_out: bool) -> np.ndarray:
        """Whether noun and background colour are those that were asked for, bool [n, 2]."""
        judge = self.judges["features"]
        assert isinstance(judge, EmojiFeatures)
        nouns, colours = judge.answers(features)
        asked = scenes(len(features), held_out)
        right_nouns = [world.NOUN_LIST[seen] == scene.noun for seen, scene in zip(nouns, asked, strict=True)]
        right_colours = [world.COLOUR_LIST[seen] == scene.colour for seen, scene in zip(colours, asked, strict=True)]
        return np.stack([right_nouns, right_colours], 1)

    def compared(self, judge: str, count: int | None = None) -> np.ndarray:
        """Features of the reference; with `count`, of so many of its images, evenly spaced."""
        assert self.reference is not None
        features = self.reference.features(self.judges[judge])
        return features if count is None else features[np.linspace(0, len(features) - 1, min(count, len(features))).astype(int)]

    @property
    def teacher(self) -> Entrant | None:
        return next((entrant for entrant in self.entered if entrant.is_teacher), None)

    @cached_property
    def kid_unit(self) -> float:
        """The cubic kernel is made for features of size about 1, as Inception's are; those of the emoji classifier are divided by this."""
        return float(np.sqrt(np.mean(self.compared("features") ** 2))) if self.protocol.is_emoji else 1.0

    @cached_property
    def kid(self) -> KernelDistance:
        return kid(self.compared("features") / self.kid_unit)

    @cached_property
    def cmmd(self) -> KernelDistance:
        return cmmd(self.compared("embeddings"))

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """What Frechet distances are taken to: the reference through each network, and the first teacher's own images."""
        given = self.protocol.reference
        found = {"features": given} if isinstance(given, Statistics) else {}
        if self.reference is not None:
            found |= {name: statistics(self.compared(name)) for name in self.judges if name in ("features", "dino")}
        if self.teacher and "fid_teacher" in self.metrics:
            found["teacher"] = statistics(self.collection(self.teacher).features(self.judges["features"]))
        return found

    def warnings(self) -> list[str]:
        """What makes these numbers worth less than they look."""
        said = []
        fewest, most = min(self.counts), max(self.counts)
        if fewest < most:
            said.append(f"rows of {fewest} and of {most} images: distances of different n do not compare")
        for metric in self.metrics:
            if metric in ("fid", "fd_dinov2"):
                dimensions = len(self.statistics[JUDGE[metric]].mean)
                if fewest < PER_DIMENSION * dimensions:
                    instead = ", or --fid-infinity" if metric == "fid" and "fid_infinity" not in self.metrics else ""
                    said.append(
                        f"{METRICS[metric].label} of {fewest} images in {dimensions} dimensions is too high by a bias; "
                        f"--num {PER_DIMENSION * dimensions} or more{instead}; compare only rows of one n"
                    )
        if "fid_teacher" in self.metrics and self.teacher and sum(entrant.is_teacher for entrant in self.entered) > 1:
            said.append(f"FID to teacher is to the images of {self.teacher.name}, {self.teacher.sampling}")
        judge = self.judges.get("features")
        if isinstance(judge, InceptionFeatures) and not judge.published:
            said.append(f"{judge.file} is not the Inception of published numbers: this FID compares with nobody else's")
        return said

    def record(self, seed: int) -> dict[str, Any]:
        """What the numbers depend on, for whoever compares them."""
        protocol = self.protocol
        return {
            "name": protocol.name,
            "images": max(self.counts),
            "seed": seed,
            "seeds_on": "cpu",
            "captions": {"name": protocol.captions.name, "key": protocol.captions.key} if protocol.captions else None,
            "prepared": protocol.prepared or "as it is",
            **protocol.facts,
            "networks": {name: judge.name for name, judge in sorted(self.judges.items())},
            "resize": "clean-fid, PIL bicubic per channel in float",
            "intervals": "95 %, over the drawn images; recall and coverage over the reference images",
            **(
                {"teacher": f"{self.teacher.name}, {self.teacher.sampling}"}
                if self.teacher and "fid_teacher" in self.metrics
                else {}
            ),
            "sid": __version__,
        }
