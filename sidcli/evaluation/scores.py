"""Metrics of candidates under a protocol. One pass over the images of a candidate provides the features for all metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sidcli import __version__
from sidcli.curation.questions import HIGHEST
from sidcli.data.imagesets import Collection, DrawnSet, FileSet, digest
from sidcli.distributed import Distributed
from sidcli.emoji import identities, world
from sidcli.environment import cache_folder
from sidcli.errors import EnvironmentProblem, UsageError
from sidcli.evaluation.candidates import REAL, Candidate
from sidcli.evaluation.protocols import LEAST_REPEATED, SEEDS, Protocol, scenes
from sidcli.metrics.appearance import diversity
from sidcli.metrics.catalog import METRICS, Measured
from sidcli.metrics.features import EmojiFeatures, Extractor, InceptionFeatures
from sidcli.metrics.fid import GROUPS, Statistics, fid, fid_infinity, statistics
from sidcli.metrics.intervals import mean, share
from sidcli.metrics.kid import KernelDistance, cmmd, kid
from sidcli.metrics.prdc import NEIGHBORS, Prdc, prdc
from sidcli.metrics.ssim import copy_score
from sidcli.metrics.transforms import crop_and_resize
from sidcli.progress import Listener, counted

if TYPE_CHECKING:
    from sidcli.curation.ratings import Rater, Rating

RATED = ("concept_preservation", "prompt_following", "cp_pf")
"""Metrics of the scores of a judge."""
QUOTED = 80
"""Characters of a judge's answer in an error message."""
PRDC = ("precision", "recall", "density", "coverage")
METRICS_OF_OPTION = {
    "fid": ("fid", "fid_teacher"),
    "fid_infinity": ("fid_infinity",),
    "kid": ("kid",),
    "prdc": PRDC,
    "dino": ("fd_dinov2",),
    "cmmd": ("cmmd",),
    "clip": ("clip",),
    "accuracy": ("noun", "color", "bare_noun"),
    "composition": ("composition",),
    "identity": ("identity", "subject_text", "copy"),
    "dino_i": ("dino_i",),
    "clip_i": ("clip_i",),
    "diversity": ("diversity",),
    "judge": RATED,
}
"""The metrics that each option requests."""
EXTRACTOR = dict.fromkeys(
    ("fid", "fid_infinity", "fid_teacher", "kid", *PRDC, "noun", "color", "bare_noun", "composition"), "features"
) | {
    "identity": "reader",
    "subject_text": "reader",
    "dino_i": "crops",
    "clip_i": "embeddings",
    "diversity": "embeddings",
    "clip": "clip",
    "cmmd": "embeddings",
    "fd_dinov2": "dino",
}
"""The extractor of the protocol that each metric uses; others read the images themselves."""
NEEDS_REFERENCE = ("fid", "fid_infinity", "kid", *PRDC, "fd_dinov2", "cmmd")
EMOJI_ONLY = ("noun", "color", "bare_noun", "composition")
IDENTITIES_ONLY = ("identity", "subject_text")
COMPARED = ("dino_i", "clip_i")
"""Metrics that compare the features of an image with those of its reference image."""
SUBJECTS_ONLY = (*IDENTITIES_ONLY, *COMPARED, "copy", "diversity", *RATED)
OTHER_CAPTIONS = {"composition": "held_out", "bare_noun": "bare", "diversity": "repeated"}
"""Metrics of images of other captions than the protocol's main list: the field of Candidate that holds those images."""
USUAL = {"emoji-subjects": ("identity",), "subjects": ("identity", "dino_i", "clip_i", "clip")}
"""Options that are used if none is given; of other protocols, FID, CLIP score and accuracy."""
MIN_IMAGES = {"fid": GROUPS, "fid_teacher": GROUPS, "fd_dinov2": GROUPS, "fid_infinity": 100, "kid": 3, "cmmd": 2, "clip": 2}
MIN_IMAGES |= dict.fromkeys(PRDC, NEIGHBORS + 1) | {"composition": 4, "copy": 2}
MIN_IMAGES |= dict.fromkeys((*COMPARED, *RATED), 2)
"""Minimum number of generated images for a metric and its interval; 1 for a metric without an entry."""
MIN_REFERENCE_IMAGES = {"fid": 2, "fd_dinov2": 2, "fid_infinity": 2, "kid": 2} | dict.fromkeys(PRDC, NEIGHBORS + 1)
"""Minimum number of reference images for a metric."""
PER_DIMENSION = 10
"""Minimum number of images per feature dimension; with fewer images, a Frechet distance is mostly small-sample bias."""


@dataclass(frozen=True)
class Row:
    """The results of one candidate. `seconds_per_image` is the sampling time alone, None if this command generated no images."""

    model: str
    sampling: str
    n: int
    metrics: dict[str, Measured]
    seconds_per_image: float | None
    is_real: bool = False

    def as_dict(self) -> dict[str, Any]:
        numbers = {
            name: {key: float(f"{value:.7g}") if math.isfinite(value) else None for key, value in asdict(one).items()}
            for name, one in self.metrics.items()
        }
        seconds = None if self.seconds_per_image is None else round(self.seconds_per_image, 5)
        facts = {"model": self.model, "is_real": self.is_real, "sampling": self.sampling, "n": self.n}
        return facts | {"metrics": numbers, "seconds_per_image": seconds}


def chosen(
    asked: Sequence[str],
    protocol: Protocol,
    everything: bool,
    candidates: Sequence[Candidate],
    gated: Iterable[str] = (),
    has_judge: bool = False,
) -> list[str]:
    """Return the metrics to compute, in the catalog's order, for the option names in `asked` and the metrics of a gate (`gated`).

    For an option that requests several metrics, only the measurable metrics are returned; if `everything`, all measurable metrics
    except `fid_infinity` and, on the emoji world, those of DINOv2. Raises UsageError if no metric of an option or of a gate can be
    measured.
    """
    gated = set(gated)
    if unknown := [option for option in asked if option not in METRICS_OF_OPTION]:
        raise UsageError(f"unknown metric {unknown[0]!r}", f"one of {', '.join(METRICS_OF_OPTION)}")
    impossible: dict[str, str] = {}
    if protocol.reference is None:
        impossible |= dict.fromkeys(NEEDS_REFERENCE, "--reference FOLDER to compare with")
    elif isinstance(protocol.reference, Statistics):
        only = "a reference of images; an .npz holds the statistics of FID alone"
        impossible |= {name: only for name in NEEDS_REFERENCE if not name.startswith("fid")}
    if protocol.captions is None:
        impossible["clip"] = "--prompts FILE with the captions of the images"
    if not any(candidate.is_teacher for candidate in candidates) or sum(not candidate.is_real for candidate in candidates) < 2:
        impossible["fid_teacher"] = "a teacher in the table, and a model beside it"
    if not protocol.is_emoji:
        impossible |= dict.fromkeys(EMOJI_ONLY, "the emoji world, whose images have a ground truth")
    if not has_judge:
        impossible |= dict.fromkeys(RATED, "--judge http with --judge-url and --judge-model")
    if protocol.name != "emoji-subjects":
        impossible |= dict.fromkeys(IDENTITIES_ONLY, "--protocol emoji-subjects, and models that take a reference image")
    if protocol.references is None:
        needed = "--protocol emoji-subjects or subjects, and models that take a reference image"
        impossible |= dict.fromkeys(set(SUBJECTS_ONLY) - set(IDENTITIES_ONLY), needed)
    for metric, field in OTHER_CAPTIONS.items():
        if metric not in impossible and all(getattr(one, field) is None for one in candidates if not one.is_real):
            impossible[metric] = "a model in the table; a folder of images has no images of these captions"
    for names in [*(METRICS_OF_OPTION[option] for option in asked), *((name,) for name in gated)]:
        if set(names) <= set(impossible):
            works = [
                f"--{option.replace('_', '-')}" for option, those in METRICS_OF_OPTION.items() if not set(those) <= set(impossible)
            ]
            raise UsageError(f"{METRICS[names[0]].label} needs {impossible[names[0]]}", ", ".join(works))
    if everything:
        wanted = set(METRICS) - {"fid_infinity"} - ({"fd_dinov2", "dino_i"} if protocol.is_emoji_world else set())
    else:
        usual = USUAL.get(protocol.name, ("fid", "clip", "accuracy"))
        wanted = {name for option in asked or usual for name in METRICS_OF_OPTION[option]}
    return [name for name in METRICS if name in (wanted - set(impossible)) | gated]


def seen_identity(metric: str, features: np.ndarray) -> Measured:
    """Return a metric of IDENTITIES_ONLY from the attributes [n, 5] that the reader sees in images."""
    sheets = [identities.unknown(index) for index in range(len(features))]
    if metric == "identity":
        return share((features[:, 2:] == [sheet.panels[0].identity for sheet in sheets]).all(1))
    wanted = [(world.NOUN_LIST.index(sheet.noun), world.COLOR_LIST.index(sheet.colors[1])) for sheet in sheets]
    return share((features[:, :2] == wanted).all(1))


class Evaluation:
    """The metrics of candidates under one protocol. All processes share the work of `fill`; the main process computes the rows."""

    def __init__(
        self,
        protocol: Protocol,
        candidates: Sequence[Candidate],
        metrics: Sequence[str],
        num: int | None,
        distributed: Distributed,
        rater: Rater | None = None,
    ):
        self.protocol, self.candidates, self.metrics, self.distributed = protocol, candidates, metrics, distributed
        self.asked, self.num, self.rater = num, num or protocol.default_num, rater
        sizes = [
            (candidate.name, self.count(candidate), MIN_IMAGES) for candidate in sorted(candidates, key=lambda one: one.is_real)
        ]
        sizes += [("the reference", self.reference.count, MIN_REFERENCE_IMAGES)] if self.reference is not None else []
        for name, count, minimum in sizes:
            for metric in metrics:
                if count < (least := minimum.get(metric, 1)):
                    raise UsageError(
                        f"{METRICS[metric].label} needs at least {least} images; {name} has {count}",
                        f"{least} images or more, or another metric",
                    )
        self.neighbors: tuple[Candidate, Prdc] | None = None
        """The candidate measured last and its precision, recall, density and coverage, which are computed together."""
        self.extractors: dict[str, Extractor] = {
            name: getattr(protocol.extractors, name) for name in {EXTRACTOR[metric] for metric in metrics if metric in EXTRACTOR}
        }
        self.ratings: dict[Candidate, list[Rating | None]] = {}
        """The scores of the judge; None where its answers have none."""

    def count(self, candidate: Candidate) -> int:
        """Return the number of images of a candidate; for real scenes, the largest number among the other candidates."""
        if candidate.is_real and any(not other.is_real for other in self.candidates):
            return max(self.count(other) for other in self.candidates if not other.is_real)
        limits = (self.num, candidate.limit, self.protocol.captions.limit if self.protocol.captions else None)
        return min(limit for limit in limits if limit is not None)

    @property
    def counts(self) -> list[int]:
        """Number of images of each candidate."""
        return [self.count(candidate) for candidate in self.candidates]

    def collection(self, candidate: Candidate) -> Collection:
        protocol, count = self.protocol, self.count(candidate)
        captions = protocol.captions.first(count) if protocol.captions else []
        needs_images = any(metric not in EXTRACTOR for metric in self.metrics)
        return Collection(candidate.images, count, captions, protocol.prepare, protocol.prepared, needs_images)

    def other(self, candidate: Candidate, metric: str) -> Collection | None:
        """Return the images for a metric of OTHER_CAPTIONS, about a quarter of the number of the other images."""
        images = getattr(candidate, OTHER_CAPTIONS[metric])
        if images is None or metric not in self.metrics:
            return None
        count = max(1, self.count(candidate) // 4)
        return Collection(images, max(LEAST_REPEATED, count // SEEDS * SEEDS) if metric == "diversity" else count)

    @property
    def shown(self) -> Collection | None:
        """The reference images of the captions, None if no metric of the table compares with their features."""
        references = self.protocol.references
        compared = references is not None and not set(COMPARED).isdisjoint(self.metrics)
        return references.collection(max(self.counts)) if references and compared else None

    @property
    def reference(self) -> Collection | None:
        """The reference images, None if no metric of the table compares with their features."""
        known = ("fid", "fid_infinity") if self.protocol.statistics else ()
        compared = any(metric in NEEDS_REFERENCE and metric not in known for metric in self.metrics)
        return self.protocol.reference if compared and isinstance(self.protocol.reference, Collection) else None

    def check_width(self, features: np.ndarray) -> None:
        """Raises UsageError if the reference statistics and the features have different numbers of dimensions."""
        given = self.protocol.reference
        if isinstance(given, Statistics) and features.shape[1] != len(given.mean):
            raise UsageError(
                f"the reference's statistics have {counted(len(given.mean), 'dimension')}, "
                f"{self.extractors['features'].name} has {features.shape[1]}",
                "statistics of Inception's 2048 features, or a folder of images",
            )

    def fill(self, listener: Listener) -> None:
        """Generate the images and compute the features that the cache lacks. Extractors are loaded before images are generated.

        Generating images may take hours, so image files whose prompts differ from the captions are reported first.
        """
        work: list[tuple[str, list[tuple[Collection, list[Extractor]]], Callable[[], None]]] = []
        if self.reference is not None:
            comparing = [self.extractors[name] for name in self.extractors if name != "clip"]
            work.append(("reference", [(self.reference, comparing)], lambda: None))
        if self.shown is not None:
            comparing = [self.extractors[EXTRACTOR[metric]] for metric in COMPARED if metric in self.metrics]
            work.append(("reference images", [(self.shown, comparing)], lambda: None))
        for candidate in self.candidates:
            parts = [(self.collection(candidate), list(self.extractors.values()))]
            others = [(self.other(candidate, metric), metric) for metric in OTHER_CAPTIONS]
            parts += [(other, [self.extractors[EXTRACTOR[metric]]]) for other, metric in others if other]
            work.append((f"{candidate.name}, {candidate.sampling}", parts, candidate.close))
        missing = [
            (part, extractor)
            for _, parts, _ in work
            for part, extractors in parts
            for extractor in extractors
            if part.lacks(extractor)
        ]
        lacking = {extractor for _, extractor in missing}
        for note in self.other_prompts if any(isinstance(part.images, DrawnSet) for part, _ in missing) else []:
            listener.note(f"note: {note}")
        for name, extractor in self.extractors.items():
            if extractor in lacking or (name == "features" and isinstance(self.protocol.reference, Statistics)):
                seen = extractor([np.zeros((8, 8, 3), np.uint8)], ["a"])
                if name == "features":
                    self.check_width(seen)
        for name, parts, close in work:
            with listener.progress(name, sum(part.count for part, _ in parts), "images") as advance:
                for part, extractors in parts:
                    part.fill(extractors, self.distributed.part, advance)
            close()
        self.distributed.wait()

    def rows(self, listener: Listener) -> list[Row]:
        if self.rater is not None:
            self.rate(self.rater, listener)
        with listener.progress("metrics", len(self.candidates) * len(self.metrics), "numbers") as advance:
            return [self.row(candidate, advance) for candidate in self.candidates]

    def row(self, candidate: Candidate, advance: Callable[[int], None]) -> Row:
        found: dict[str, Measured] = {}
        for metric in self.metrics:
            value = self.measure(candidate, metric, found)
            if value is not None:
                found[metric] = value
            advance(1)
        seconds = candidate.images.seconds_per_image if isinstance(candidate.images, DrawnSet) else None
        return Row(candidate.name, candidate.sampling, self.count(candidate), found, seconds, candidate.is_real)

    def measure(self, candidate: Candidate, metric: str, found: dict[str, Measured]) -> Measured | None:
        """Return one metric of one candidate, None if it does not apply. `found` holds the metrics measured before."""
        if metric == "copy":
            return self.copied(candidate)
        if metric in RATED:
            return self.rated(candidate, metric)
        extractor = EXTRACTOR[metric]
        features = self.collection(candidate).features(self.extractors[extractor])
        if metric in ("fid", "fd_dinov2"):
            return fid(features, self.statistics[extractor])
        if metric == "fid_infinity":
            return fid_infinity(features, self.statistics[extractor], found.get("fid") or fid(features, self.statistics[extractor]))
        if metric == "fid_teacher":
            return None if candidate is self.teacher or candidate.is_real else fid(features, self.statistics["teacher"])
        if metric == "kid":
            return self.kid(features / self.kid_unit)
        if metric in PRDC:
            if self.neighbors is None or self.neighbors[0] is not candidate:
                real = torch.from_numpy(self.compared(extractor, len(features)))
                self.neighbors = candidate, prdc(real, torch.from_numpy(features))
            return getattr(self.neighbors[1], metric)
        if metric == "cmmd":
            return self.cmmd(features)
        if metric == "clip":
            return mean(features[:, 0], metric)
        if metric in IDENTITIES_ONLY:
            return seen_identity(metric, features)
        if metric in COMPARED:
            return self.alike(metric, features)
        if metric in OTHER_CAPTIONS:
            other = self.other(candidate, metric)
            if other is None:
                return None
            features = other.features(self.extractors[extractor])
            if metric == "diversity":
                return mean(np.array([diversity(group) for group in np.split(features, len(features) // SEEDS)]), metric)
            if metric == "composition":
                return share(np.all(self.right(features, True), axis=1))
            return share(self.answers(features)[0] == np.arange(len(features)) % len(world.NOUN_LIST))
        return share(self.right(features, False)[:, ("noun", "color").index(metric)])

    def copied(self, candidate: Candidate) -> Measured:
        """Return the mean structural similarity of images and their reference images, which are cropped and resized to them."""
        assert self.protocol.references is not None
        scores = [
            copy_score(image, crop_and_resize(self.protocol.references.read(index), *image.shape[:2]))
            for index, image in enumerate(candidate.images.read(range(self.count(candidate))))
        ]
        return mean(np.array(scores), "copy")

    def rate(self, rater: Rater, listener: Listener) -> None:
        """Ask for the scores of all candidates. Raises EnvironmentProblem if a candidate gets fewer than two."""
        from sidcli.curation.questions import beginning
        from sidcli.curation.ratings import Drawing

        captions, references = self.protocol.captions, self.protocol.references
        assert captions is not None and references is not None
        prompts = captions.first(max(self.counts))
        for candidate in self.candidates:

            def drawing(index: int, candidate: Candidate = candidate) -> Drawing:
                image = candidate.images.read(range(index, index + 1))[0]
                reference = crop_and_resize(references.read(index), *image.shape[:2])
                return Drawing(image, reference, prompts[index], references.subject(index))

            folder = cache_folder() / "ratings" / candidate.images.key / digest(rater.name, captions.key)
            count = self.count(candidate)
            with listener.progress(f"judge {candidate.name}", count, "images") as advance:
                found = rater.rate(count, drawing, folder, advance)
            if len(found) - found.count(None) < 2:
                said = f"; it answered: {beginning(rater.unread, QUOTED)}" if rater.unread.strip() else "; its answers are empty"
                raise EnvironmentProblem(
                    f"{rater.chat.model} gave {candidate.name} no score that can be read{said}",
                    "--judge-model with another model, which ends its answers with a line such as SCORE: 3",
                )
            self.ratings[candidate] = found

    def rated(self, candidate: Candidate, metric: str) -> Measured:
        """Return a metric of RATED with the interval of its mean; of the product, to first order, as in the delta method."""
        ratings = [(one.concept, one.prompt) for one in self.ratings[candidate] if one is not None]
        concept, prompt = np.array(ratings, np.float64).T / HIGHEST
        both = concept * prompt.mean() + prompt * concept.mean() - concept.mean() * prompt.mean()
        found = mean({"concept_preservation": concept, "prompt_following": prompt, "cp_pf": both}[metric], metric)
        return Measured(found.value, max(0.0, found.low), min(1.0, found.high))

    def alike(self, metric: str, features: np.ndarray) -> Measured:
        """Return the mean cosine of the features [n, D] of images and those of their reference images."""
        assert self.shown is not None and self.protocol.references is not None
        shown = self.shown.features(self.extractors[EXTRACTOR[metric]])[self.protocol.references.places(len(features))]
        return mean((features * shown).sum(1) / (np.linalg.norm(features, axis=1) * np.linalg.norm(shown, axis=1)), metric)

    def answers(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the classified nouns and background colors, as indices into NOUN_LIST and COLOR_LIST, each int [n]."""
        extractor = self.extractors["features"]
        assert isinstance(extractor, EmojiFeatures)
        return extractor.answers(features)

    def right(self, features: np.ndarray, held_out: bool) -> np.ndarray:
        """Return whether the classified noun and background color match the caption, bool [n, 2]."""
        nouns, colors = self.answers(features)
        asked = scenes(len(features), held_out)
        right_nouns = nouns == np.array([world.NOUN_LIST.index(scene.noun) for scene in asked])
        right_colors = colors == np.array([world.COLOR_LIST.index(scene.color) for scene in asked])
        return np.stack([right_nouns, right_colors], 1)

    def compared(self, extractor: str, count: int | None = None) -> np.ndarray:
        """Return the features of the reference images; with `count`, those of at most `count` evenly spaced images."""
        assert self.reference is not None
        features = self.reference.features(self.extractors[extractor])
        return features if count is None else features[np.linspace(0, len(features) - 1, min(count, len(features))).astype(int)]

    @property
    def teacher(self) -> Candidate | None:
        return next((candidate for candidate in self.candidates if candidate.is_teacher), None)

    @cached_property
    def kid_unit(self) -> float:
        """Divisor of the features for the KID: the root mean square of the reference for the emoji classifier, 1 for Inception.

        The cubic kernel is designed for features of magnitude about 1, as Inception's are.
        """
        return float(np.sqrt(np.mean(self.compared("features") ** 2))) if self.protocol.is_emoji else 1.0

    @cached_property
    def kid(self) -> KernelDistance:
        return kid(self.compared("features") / self.kid_unit)

    @cached_property
    def cmmd(self) -> KernelDistance:
        return cmmd(self.compared("embeddings"))

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """Statistics for Frechet distances: of the reference under each extractor, and of the images of the first teacher."""
        given = self.protocol.reference
        found = {"features": given} if isinstance(given, Statistics) else {}
        if self.reference is not None:
            found |= {name: statistics(self.compared(name)) for name in self.extractors if name in ("features", "dino")}
        if self.protocol.statistics:
            found["features"] = self.protocol.statistics
        if self.teacher and "fid_teacher" in self.metrics:
            found["teacher"] = statistics(self.collection(self.teacher).features(self.extractors["features"]))
        return found

    @cached_property
    def other_prompts(self) -> list[str]:
        """One sentence for each set of image files whose recorded prompts differ from the captions."""
        found = []
        for candidate in self.candidates:
            if isinstance(candidate.images, FileSet) and self.protocol.captions:
                files, captions = candidate.images.files, self.protocol.captions.first(self.count(candidate))
                said = [(index, prompt) for index in range(len(captions)) if (prompt := files.record(index, "prompt")) is not None]
                wrong = [(index, prompt) for index, prompt in said if prompt.split() != captions[index].split()]
                if wrong:
                    index, prompt = wrong[0]
                    texts = (shorten(text, 60, placeholder="...") for text in (prompt, captions[index]))
                    found.append(
                        f"{candidate.name}: {len(wrong)} of {counted(len(said), 'image')} with a recorded prompt "
                        f"{'was' if len(wrong) == 1 else 'were'} made from another prompt than the caption, "
                        "for example {}: prompt {!r}, caption {!r}".format(files.members[index], *texts)
                    )
        return found

    @property
    def too_few(self) -> list[str]:
        """One sentence for each list of captions and each set of image files that has fewer entries than the requested number."""
        captions, asked = self.protocol.captions, self.asked or 0
        sets = [(captions.name, captions.limit, "caption")] if captions and captions.limit is not None else []
        files = [candidate for candidate in self.candidates if isinstance(candidate.images, FileSet)]
        sets += [(candidate.name, candidate.limit, "image") for candidate in files if candidate.limit is not None]
        return [f"--num {asked}: {name} has only {counted(limit, what)}" for name, limit, what in sets if limit < asked]

    def warnings(self, rows: Sequence[Row]) -> list[str]:
        """Return one sentence for each reason why the numbers may be biased or not comparable."""
        said = [*self.other_prompts, *self.too_few]
        said += [
            f"{candidate.name}: {counted(found.count(None), 'image')} without a score, because the judge's answers have none"
            for candidate, found in self.ratings.items()
            if None in found
        ]
        minimum, most = min(self.counts), max(self.counts)
        if minimum < most and not {"fid_teacher", *NEEDS_REFERENCE}.isdisjoint(self.metrics):
            said.append(f"rows of {minimum} and of {most} images: distances of different n do not compare")
        for metric in self.metrics:
            if metric in ("fid", "fd_dinov2"):
                label, dimensions = METRICS[metric].label, len(self.statistics[EXTRACTOR[metric]].mean)
                if minimum < PER_DIMENSION * dimensions:
                    instead = ", or --fid-infinity" if metric == "fid" and "fid_infinity" not in self.metrics else ""
                    said.append(
                        f"{label} is biased upwards at n = {minimum} (features of {dimensions} dimensions): "
                        f"use --num {PER_DIMENSION * dimensions}{instead}, and compare only rows of the same n"
                    )
                real = next((row for row in rows if row.is_real), None)
                below = [row.model for row in rows if real and row.metrics[metric].value < real.metrics[metric].value]
                if below:
                    names = ", ".join(dict.fromkeys(below))
                    said.append(
                        f"{label} of {names} is below that of {REAL}: at this n, bias and sampling error outweigh the difference"
                    )
        if "fid_teacher" in self.metrics and self.teacher and sum(candidate.is_teacher for candidate in self.candidates) > 1:
            said.append(f"FID to teacher is to the images of {self.teacher.name}, {self.teacher.sampling}")
        extractor = self.extractors.get("features")
        if isinstance(extractor, InceptionFeatures) and not extractor.published:
            said.append(f"{extractor.file} is not the Inception of published numbers: do not compare this FID with published ones")
        return said

    def record(self, seed: int) -> dict[str, Any]:
        """Return the settings that the numbers depend on, so that evaluations can be compared."""
        protocol = self.protocol
        return {
            "name": protocol.name,
            "images": max(self.counts),
            "seed": seed,
            "seeds_on": "cpu",
            "captions": {"name": protocol.captions.name, "key": protocol.captions.key} if protocol.captions else None,
            "prepared": protocol.prepared or "as it is",
            **protocol.facts,
            **({"judge": {"url": self.rater.chat.url, "model": self.rater.chat.model}} if self.rater else {}),
            "networks": {name: extractor.name for name, extractor in sorted(self.extractors.items())},
            "resize": "clean-fid, PIL bicubic per channel in float",
            "intervals": "95 %, over the drawn images; recall and coverage over the reference images",
            **(
                {"teacher": f"{self.teacher.name}, {self.teacher.sampling}"}
                if self.teacher and "fid_teacher" in self.metrics
                else {}
            ),
            "sid": __version__,
        }
