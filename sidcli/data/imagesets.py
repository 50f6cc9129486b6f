"""Images by number, wherever they come from, and their features: each image is drawn once, each feature computed once, and both kept.

Work is cut into units of UNIT images. A unit's features are one small file of the cache, so what was interrupted goes on where it
stopped, and several processes that share a cache share the work by taking every n-th unit each.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sidcli import __version__
from sidcli.data.imagefiles import ImageFiles
from sidcli.distributed import Share
from sidcli.emoji import world
from sidcli.environment import cache_folder
from sidcli.files import atomic_file
from sidcli.formats.pictures import save_png
from sidcli.metrics.features import Extractor, in_threads
from sidcli.models.sampler import Drawer, Plan, png_info
from sidcli.models.sources import Source, fingerprint
from sidcli.progress import Progress, silent

UNIT = 100

Prepare = Callable[[np.ndarray], np.ndarray]


class ImageSet(Protocol):
    """Equal `key`s hold equal images under equal numbers."""

    @property
    def key(self) -> str: ...
    @property
    def must_exist(self) -> bool:
        """Whether the images are wanted for themselves, and not only their features."""
        ...

    def read(self, indices: range, advance: Progress = silent) -> list[np.ndarray]:
        """Images uint8 [H, W, 3]; `advance` hears of those that had to be drawn."""
        ...


@dataclass(frozen=True)
class SceneSet:
    """Scenes of the emoji world."""

    seed: int
    held_out: bool = False
    must_exist = False

    @property
    def key(self) -> str:
        return digest("scenes", world.digest(), self.seed, self.held_out)

    def read(self, indices: range, advance: Progress = silent) -> list[np.ndarray]:
        return list(world.render_many(self.seed, indices, self.held_out))


@dataclass(frozen=True)
class FileSet:
    """Images of a folder or a zip."""

    files: ImageFiles
    must_exist = False

    @cached_property
    def key(self) -> str:
        return digest("files", self.files.fingerprint)

    def read(self, indices: range, advance: Progress = silent) -> list[np.ndarray]:
        return in_threads(self.files.read, indices)


class DrawnSet:
    """What a model draws: image i answers prompts[i] with seed `seed + i` and is kept as a PNG in a folder of its own.

    `open_drawer` is asked when an image is missing, and again for every batch. `prompts_key` says what the prompts are however many of
    them are asked for, so that a set can grow.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        prompts: Sequence[str],
        prompts_key: str,
        seed: int,
        open_drawer: Callable[[], Drawer],
        batch_size: int,
        place: Path | None = None,
    ):
        self.source, self.plan, self.prompts, self.seed = source, plan, prompts, seed
        self.open_drawer, self.batch_size, self.must_exist = open_drawer, batch_size, place is not None
        self.drawn, self.seconds = 0, 0.0
        self.key = digest("drawn", __version__, fingerprint(source), repr(plan), prompts_key, seed)
        name = "".join(c if c.isalnum() or c in "-." else "-" for c in source.path.name)
        self.folder = (place or cache_folder() / "images") / f"{name}-{self.key}"

    def file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def read(self, indices: range, advance: Progress = silent) -> list[np.ndarray]:
        kept = {index: self._kept(index) for index in indices}
        missing = [index for index, image in kept.items() if image is None]
        for start in range(0, len(missing), self.batch_size):
            kept |= self._draw(missing[start : start + self.batch_size], advance)
        return [image for image in kept.values() if image is not None]

    def _kept(self, index: int) -> np.ndarray | None:
        """An image drawn before; None where there is none, or a damaged one."""
        try:
            with Image.open(self.file(index), formats=["PNG"]) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError):
            return None

    def _draw(self, indices: Sequence[int], advance: Progress) -> dict[int, np.ndarray]:
        prompts, seeds = [self.prompts[index] for index in indices], [self.seed + index for index in indices]
        drawer = self.open_drawer()
        begun = time.monotonic()
        images = drawer.images(prompts, seeds, self.plan, advance).numpy()
        self.seconds += time.monotonic() - begun
        self.drawn += len(indices)
        for index, prompt, seed, image in zip(indices, prompts, seeds, images, strict=True):
            save_png(Image.fromarray(image), self.file(index), png_info(prompt, seed, self.source, self.plan))
        return dict(zip(indices, images, strict=True))

    @property
    def seconds_per_image(self) -> float | None:
        """Of the drawing alone, over the images that this process has drawn; None where all of them were there already."""
        return self.seconds / self.drawn if self.drawn else None


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def as_it_is(image: np.ndarray) -> np.ndarray:
    return image


@dataclass(frozen=True)
class Collection:
    """The first `count` images of a set as a metric sees them: after `prepare`, with their captions, if they have any."""

    images: ImageSet
    count: int
    captions: Sequence[str] = ()
    prepare: Prepare = as_it_is
    prepared: str = ""
    """Names what `prepare` does."""

    def units(self) -> list[range]:
        return [range(start, min(start + UNIT, self.count)) for start in range(0, self.count, UNIT)]

    def said(self, unit: range) -> Sequence[str]:
        return self.captions[unit.start : unit.stop]

    def file(self, extractor: Extractor, unit: range) -> Path:
        """Where the cache keeps a unit's features."""
        heard = digest(*self.said(unit)) if extractor.reads_captions else ""
        name = digest(extractor.name, self.prepared, heard)
        return cache_folder() / "features" / self.images.key / f"{name}-{unit.start:06d}-{len(unit)}.npy"

    def lacks(self, extractor: Extractor) -> bool:
        """Whether the cache has not all of these features."""
        return any(_read(self.file(extractor, unit)) is None for unit in self.units())

    def fill(self, extractors: Sequence[Extractor], share: Share, advance: Progress) -> None:
        """Compute what the cache lacks of this process's share; images that it has every feature of are not looked at."""
        for number, unit in enumerate(self.units()):
            if number % share.count == share.rank:
                self._fill_unit(unit, extractors, advance)
            else:
                advance(len(unit))

    def _fill_unit(self, unit: range, extractors: Sequence[Extractor], advance: Progress) -> None:
        left = float(len(unit))

        def drawn(count: float, text: str = "") -> None:
            nonlocal left
            left -= count
            advance(count, text)

        todo = [extractor for extractor in extractors if _read(self.file(extractor, unit)) is None]
        if todo or self.images.must_exist:
            images = in_threads(self.prepare, self.images.read(unit, drawn))
        for extractor in todo:
            advance(0, "computing features")
            _write(self.file(extractor, unit), extractor(images, self.said(unit)))
        advance(left)

    def features(self, extractor: Extractor) -> np.ndarray:
        """float32 [count, D], after `fill`."""
        return np.concatenate([found for unit in self.units() if (found := _read(self.file(extractor, unit))) is not None])


def _read(file: Path) -> np.ndarray | None:
    """Features of the cache; None where there are none, or damaged ones."""
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _write(file: Path, features: np.ndarray) -> None:
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, features)
