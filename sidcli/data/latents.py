"""Latents of images with captions, for objectives that learn from images. They are computed once and stored in the cache.

Work is split into units of UNIT images. A unit is one file with a SHA-256, so interrupted work resumes where it stopped, and a damaged
file is computed again. The image at a position is a function of (seed, position), as for prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidcli import randomness
from sidcli.data.captioned import CaptionedImages
from sidcli.data.imagesets import digest
from sidcli.data.prompts import Prompts, permutation
from sidcli.data.references import ENLARGED
from sidcli.distributed import Distributed, Share
from sidcli.environment import cache_folder
from sidcli.errors import InputError
from sidcli.files import atomic_file, check_space, readable, save_tensors
from sidcli.metrics.features import in_threads
from sidcli.metrics.transforms import crop_and_resize
from sidcli.models.loading import Model
from sidcli.models.sampler import Plan
from sidcli.progress import Listener, Progress, counted

UNIT = 64
FORMAT = 1
"""Version of the content of the files. Another version reads none of them."""
TEACHER_IMAGES = 1000
"""Default number of images that the teacher draws."""
TEACHER_SEED = 0
"""Seed of the teacher's images, whatever the seed of the run is, so that all runs with the same prompts share them."""
NAMED = 5
"""Number of images that a message names."""
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Unit:
    """Results for up to UNIT images, apart from the latents: the indices of the `kept` images, and a digest of their `content`.

    `skipped` has a name and a reason for each image without a latent, `converted` a name and Pillow's mode for each kept image that
    is not in RGB.
    """

    kept: tuple[int, ...]
    content: str = ""
    skipped: Pairs = ()
    converted: Pairs = ()


class Source(Protocol):
    """Images of which latents are computed. Sources with equal `key`s have equal latents, `identity` enters the digest of the data."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str:
        """Title of the progress bar."""
        ...

    @property
    def key(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a latent: channels, height, width."""
        ...

    def __len__(self) -> int: ...
    def caption(self, index: int) -> str: ...
    def latents(self, indices: range, advance: Progress) -> tuple[Tensor, Unit]:
        """Return the latents float32 [n, C, h, w] of the images that can be used, on the CPU, and which these are."""
        ...


@dataclass(frozen=True)
class EncodedImages:
    """Images of files, cropped to the center and resized to the size of the model, and encoded by its VAE on `device`.

    A latent is the mean of the VAE's distribution, so that it does not depend on a random draw and is stored once. The standard
    deviation of published VAEs is far below that of the latents.
    """

    images: CaptionedImages
    count: int
    """Number of images to use, from the first one on."""
    model: Model
    device: torch.device
    title = "encode images"
    identity = ""

    @property
    def name(self) -> str:
        return self.images.files.name

    @cached_property
    def key(self) -> str:
        files = [self.images.name(index) for index in range(len(self.images))]
        return digest("encoded", FORMAT, self.images.files.fingerprint, files, self.model.codec.digest(), self.model.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.model.latent_shape

    def __len__(self) -> int:
        return min(self.count, len(self.images))

    def caption(self, index: int) -> str:
        return self.images.captions[index]

    def latents(self, indices: range, advance: Progress) -> tuple[Tensor, Unit]:
        codec = self.model.codec.to(self.device)
        found, content = [torch.empty(0, *self.model.latent_shape)], hashlib.sha256()
        kept, skipped, converted = [], [], []
        for index, (pixels, mode, reason) in zip(indices, in_threads(self._read, indices), strict=True):
            advance(1)
            name = self.images.name(index)
            latent = None if pixels is None else self._encoded(codec.encode_image, pixels)
            if pixels is None or latent is None:
                skipped.append((name, reason or "the VAE's output is not finite"))
                continue
            found.append(latent)
            kept.append(index)
            content.update(pixels.tobytes())
            converted += [(name, mode)] if mode != "RGB" else []
        return torch.cat(found), Unit(tuple(kept), content.hexdigest(), tuple(skipped), tuple(converted))

    def _read(self, index: int) -> tuple[np.ndarray | None, str, str]:
        """Return an image uint8 [H, W, 3] of the model's size, Pillow's mode of its file, and the reason if there is no image."""
        files, number = self.images.files, self.images.indices[index]
        try:
            pixels, mode = files.read_with_mode(number)
        except InputError as error:
            return None, "", error.message.removeprefix(f"{files.name}/{files.members[number]} ")
        (height, width), (wanted_height, wanted_width) = pixels.shape[:2], self.model.size
        if ENLARGED * height < wanted_height or ENLARGED * width < wanted_width:
            return None, mode, f"{width} x {height} pixels, too small for {wanted_width} x {wanted_height}"
        return crop_and_resize(pixels, wanted_height, wanted_width), mode, ""

    def _encoded(self, encode: Callable[[np.ndarray], Tensor], pixels: np.ndarray) -> Tensor | None:
        """Return a latent [1, C, h, w], or None if it is not finite. Images are encoded one at a time: the result does not depend
        on a batch size, and memory stays small."""
        latent = encode(pixels).cpu()
        return latent if latent.isfinite().all() else None


@dataclass(frozen=True)
class TeacherImages:
    """Images that the teacher draws in many steps: image i has the prompt and the noise of position i.

    Their latents are stored as they are drawn, without a loss by decoding and encoding. `draw` maps prompts, noise [B, C, h, w] and
    a callback for each denoising step to latents; `precision` describes its arithmetic.
    """

    model: Model
    fingerprint: str
    """Digest of the model's files."""
    plan: Plan
    prompts: Prompts
    count: int
    batch_size: int
    precision: str
    draw: Callable[[Sequence[str], Tensor, Callable[[], None]], Tensor]
    title = "teacher images to train on"

    @property
    def name(self) -> str:
        return f"{self.model.source.name}, {self.plan.describe()}"

    @cached_property
    def key(self) -> str:
        model = self.fingerprint, self.model.path.prediction, self.model.size, repr(self.plan), self.precision
        return digest("teacher", FORMAT, *model, self.prompts.digest, TEACHER_SEED)

    @property
    def identity(self) -> str:
        return self.key

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.model.latent_shape

    def __len__(self) -> int:
        return self.count

    def caption(self, index: int) -> str:
        return self.prompts.at(TEACHER_SEED, index)

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Return the noise [n, C, h, w] from which the teacher draws the images."""
        return randomness.normal(self.shape, TEACHER_SEED, "teacher image", 0, indices)

    def latents(self, indices: range, advance: Progress) -> tuple[Tensor, Unit]:
        found = []
        for start in range(0, len(indices), self.batch_size):
            batch = indices[start : start + self.batch_size]
            prompts = [self.caption(index) for index in batch]
            found.append(self.draw(prompts, self.noise(batch), partial(advance, len(batch) / self.plan.steps)))
        latents = torch.cat(found)
        finite = latents.isfinite().flatten(1).all(1)
        kept = tuple(index for index, good in zip(indices, finite.tolist(), strict=True) if good)
        skipped = tuple((self.caption(index), "not finite") for index in indices if index not in kept)
        return latents[finite], Unit(kept, skipped=skipped)


class Latents:
    """Latents in the cache with their captions. `digest` changes with the pixels, the captions and the number of images."""

    def __init__(self, source: Source, units: dict[Path, Unit]):
        self.source, self.files, self.units = source, list(units), list(units.values())
        self.starts = [0, *accumulate(len(unit.kept) for unit in self.units)]
        if not len(self):
            name, reason = self.skipped[0]
            said = f"{source.name}: none of {counted(len(source), 'image')} can be used: {name} ({reason})"
            raise InputError(said, "give other images with --data")
        content = [source.identity, [unit.content for unit in self.units], [source.caption(index) for index in self._kept()]]
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return [pair for unit in self.units for pair in unit.skipped]

    def _kept(self) -> Iterator[int]:
        return (index for unit in self.units for index in unit.kept)

    def at(self, seed: int, position: int) -> tuple[Tensor, str]:
        """Return the latent [C, h, w] and the caption at a position. Each pass over the images uses a new permutation."""
        unit, row = self._place(seed, position)
        with readable(self.files[unit]), safe_open(self.files[unit], "pt") as content:
            latent = content.get_slice("latents")[row].clone()  # safetensors maps the file into memory
        return latent, self.source.caption(self.units[unit].kept[row])

    def noise(self, seed: int, position: int) -> Tensor:
        """Return the noise [C, h, w] from which the teacher drew the image at a position."""
        assert isinstance(self.source, TeacherImages)
        unit, row = self._place(seed, position)
        return self.source.noise([self.units[unit].kept[row]])[0]

    def _place(self, seed: int, position: int) -> tuple[int, int]:
        """Return the number of the unit, and the row in it, of the image at a position."""
        epoch, offset = divmod(position, len(self))
        number = int(permutation(len(self), seed, "image order", epoch)[offset])
        unit = bisect_right(self.starts, number) - 1
        return unit, number - self.starts[unit]

    def notes(self, without_caption: Pairs = ()) -> list[str]:
        """Return a line that counts and names the images that are not used, and one for those that were converted to RGB."""
        skipped = [*without_caption, *self.skipped]
        converted = [pair for unit in self.units for pair in unit.converted]
        lines = [f"{self.name}: {counted(len(self), 'image')} to train on"]
        lines += [f"{counted(len(skipped), 'image')} not used: {_named(skipped)}"] if skipped else []
        return lines + ([f"{counted(len(converted), 'image')} converted to RGB: {_named(converted)}"] if converted else [])


def _named(pairs: Sequence[tuple[str, str]]) -> str:
    more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    return ", ".join(f"{name} ({text})" for name, text in pairs[:NAMED]) + more


def prepare(source: Source, distributed: Distributed, listener: Listener) -> Latents:
    """Return the latents of a source, after the processes of the group have computed those that the cache lacks.

    Raises InputError if no image can be used, EnvironmentProblem if the cache cannot be written.
    """
    folder = cache_folder() / "latents" / source.key
    parts = [range(start, min(start + UNIT, len(source))) for start in range(0, len(source), UNIT)]
    files = {folder / f"{part.start:08d}-{len(part)}.safetensors": part for part in parts}
    units = {file: unit for file in files if (unit := _read(file))}
    missing = {file: part for file, part in files.items() if file not in units}
    size = 4 * math.prod(source.shape) * sum(map(len, missing.values()))
    check_space(folder, size, "the latents need", "make room, or choose another cache folder with SID_CACHE_DIR")
    distributed.wait()  # the processes have looked at the same files
    for share in (distributed.part, Share()):  # the second time for a process that does not share the cache with all others
        own = [file for number, file in enumerate(missing) if number % share.count == share.rank]
        found = {file: unit for file in own if file not in units and (unit := _read(file))}
        units |= found | _computed(source, {file: files[file] for file in own if file not in units | found}, listener)
        distributed.wait()
    return Latents(source, {file: units[file] for file in files})


def _computed(source: Source, files: dict[Path, range], listener: Listener) -> dict[Path, Unit]:
    """Compute units of images and write them to files."""
    units = {}
    if files:
        with listener.progress(source.title, sum(map(len, files.values())), "images") as advance:
            for file, part in files.items():
                latents, units[file] = source.latents(part, advance)
                _write(file, latents, units[file])
    return units


def _digest(latents: Tensor, unit: Unit) -> str:
    return hashlib.sha256(latents.numpy().tobytes() + json.dumps(asdict(unit)).encode()).hexdigest()


def _write(file: Path, latents: Tensor, unit: Unit) -> None:
    metadata = {"unit": json.dumps(asdict(unit)), "sha256": _digest(latents, unit)}
    with atomic_file(file) as temporary:
        save_tensors({"latents": latents}, temporary, metadata)


def _read(file: Path) -> Unit | None:
    """Return the unit in a file of the cache, or None if the file is missing or damaged."""
    try:
        with safe_open(file, "pt") as content:
            metadata, latents = content.metadata(), content.get_tensor("latents")
        found = json.loads(metadata["unit"])
        pairs = {name: tuple((one, other) for one, other in found[name]) for name in ("skipped", "converted")}
        unit = Unit(tuple(found["kept"]), found["content"], **pairs)
        return unit if _digest(latents, unit) == metadata["sha256"] else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
