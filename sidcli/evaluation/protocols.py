"""Evaluation protocols. A protocol defines captions, reference images, the preprocessing of images, and feature extractors.

- `emoji`: caption i describes scene (PROMPT_SEED, i). No model was trained on its text, which always names the background color.
  The reference is 10,000 scenes of REFERENCE_SEED;
- `emoji-subjects`: for models that take a reference image. Caption i names the noun and the background of the second panel of a sheet
  of one subject, whose first panel is the reference image. No model was trained on the identity of the subject;
- `subjects`: for models that take a reference image, with the images and prompts of a folder; see `data.subjects`;
- `coco2014-30k`: the protocol of the paper's numbers, introduced by GigaGAN: 30,000 captions of COCO's validation set of 2014, with
  all of its images as the reference. The center square of each image is resized to 256 with the Lanczos filter; for CLIP, pixels
  are truncated as in GigaGAN's code;
- `custom`: the user's captions and the user's reference, with unchanged images. If neither is given, the captions are those of the
  built-in list `general`, for metrics that need no reference.

Image i is generated from caption i with seed `seed + i`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from typing import Protocol as Shape

import numpy as np
import torch

from sidcli.curation.crops import subject
from sidcli.data.imagefiles import DAMAGE, ImageFiles, open_images
from sidcli.data.imagesets import Collection, FileSet, PanelSet, Prepare, SceneSet, as_it_is
from sidcli.data.prompts import open_prompts, read_list
from sidcli.data.subjects import References, open_subjects
from sidcli.emoji import identities, world
from sidcli.errors import InputError, UsageError
from sidcli.evaluation import emoji_reference
from sidcli.files import sha256, size_of
from sidcli.metrics.clip import PREFIX, Clip, Embeddings, Similarity
from sidcli.metrics.features import DINO, DinoFeatures, EmojiFeatures, Extractor, InceptionFeatures
from sidcli.metrics.fid import Statistics
from sidcli.metrics.reader import ReaderFeatures
from sidcli.metrics.transforms import square
from sidcli.metrics.weights import INCEPTION, fetch
from sidcli.models.sources import WEIGHTS
from sidcli.progress import Listener, counted
from sidcli.randomness import numpy_generator

QUICK_NUM = 300
"""Default number of images per model if the number of captions is unlimited."""
GENERAL = "general"
GENERAL_SEED = 0xE7A1
"""Seed of the captions from the built-in list. Distillation uses other seeds for its prompts from this list."""
COCO_CAPTIONS = Path("annotations") / "captions_val2014.json"
COCO_IMAGES = Path("val2014")
COCO_SIZE = 256
REFERENCE_SIZE = 512
"""Side in pixels to which reference images of photographs are resized before features are computed, as in DreamBench++."""
SEEDS = 4
"""Number of images of each prompt with which the diversity is measured."""
LEAST_REPEATED = 2 * SEEDS
"""Minimum number of images with which the diversity is measured: an interval needs two prompts."""
MAX_STATISTICS = 1 << 30
"""Maximum unpacked size of reference statistics, in bytes; statistics of 2048 features have 34 million bytes."""
ROUNDING = 1e-6
"""Negative variances are accepted as float32 rounding errors up to this fraction of the largest variance."""
PHOTO_CLIP, CMMD_CLIP = "ViT-g-14:laion2b_s12b_b42k", "ViT-L-14-336-quickgelu:openai"


@dataclass(frozen=True)
class Networks:
    """The files of the metric networks (None: the default files), their device, and the listener that reports downloads."""

    device: torch.device
    listener: Listener
    inception: Path | None = None
    clip: str | None = None
    cmmd: str | None = None
    dino: str | None = None


def hint(option: str) -> str:
    return f"{option} FOLDER with open_clip_config.json and open_clip_model.safetensors, or {option} ARCHITECTURE:TAG"


class Extractors(Shape):
    """The feature extractors of a protocol. Each of them is created when a metric first uses it."""

    @property
    def features(self) -> Extractor:
        """The extractor for FID, KID, precision, recall, density and coverage."""
        ...

    @property
    def clip(self) -> Extractor: ...
    @property
    def embeddings(self) -> Extractor:
        """The extractor for the CMMD."""
        ...

    @property
    def dino(self) -> Extractor: ...
    @property
    def crops(self) -> Extractor:
        """The extractor for DINO-I."""
        ...


@dataclass(frozen=True)
class CropFeatures:
    """The extractor of DINOv2's features [B, D] of the crops of subjects."""

    dino: DinoFeatures
    reads_captions = False

    @property
    def name(self) -> str:
        return f"{self.dino.name}, crops of subjects"

    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str] = ()) -> np.ndarray:
        return self.dino([subject(image) for image in images])


@dataclass(frozen=True)
class _WithDino:
    networks: Networks

    @cached_property
    def dino(self) -> DinoFeatures:
        return DinoFeatures(self.networks.dino or DINO, self.networks.device)

    @cached_property
    def crops(self) -> CropFeatures:
        return CropFeatures(DinoFeatures(self.networks.dino or DINO, self.networks.device, "DINO-I"))


@dataclass(frozen=True)
class EmojiExtractors(_WithDino):
    """The extractors of the emoji protocol: the classifier and the open_clip model that ship with the emoji world."""

    @cached_property
    def features(self) -> EmojiFeatures:
        return EmojiFeatures()

    @cached_property
    def _clip(self) -> Clip:
        return Clip(self.networks.clip or str(WEIGHTS / "clip"), self.networks.device, hint("--clip-model"))

    @property
    def clip(self) -> Similarity:
        return Similarity(self._clip)

    @property
    def embeddings(self) -> Embeddings:
        return Embeddings(self._clip)

    @cached_property
    def reader(self) -> ReaderFeatures:
        return ReaderFeatures()


@dataclass(frozen=True)
class PhotoExtractors(_WithDino):
    """The extractors that published numbers are computed with. `as_gigagan`: use CLIP as in GigaGAN's evaluation code."""

    as_gigagan: bool

    @cached_property
    def features(self) -> InceptionFeatures:
        file = self.networks.inception or fetch(INCEPTION, self.networks.listener)
        return InceptionFeatures(file, self.networks.device)

    @cached_property
    def clip(self) -> Similarity:
        clip = Clip(self.networks.clip or PHOTO_CLIP, self.networks.device, hint("--clip-model"))
        return Similarity(clip, PREFIX, as_gigagan=True) if self.as_gigagan else Similarity(clip)

    @cached_property
    def embeddings(self) -> Embeddings:
        return Embeddings(Clip(self.networks.cmmd or CMMD_CLIP, self.networks.device, hint("--cmmd-model")))


@dataclass(frozen=True)
class SubjectExtractors(PhotoExtractors):
    """The extractors of photographs of subjects: one CLIP model compares images with captions and with each other."""

    @cached_property
    def embeddings(self) -> Embeddings:
        return Embeddings(self.clip.clip)


@dataclass(frozen=True)
class Captions:
    """A list of captions. `first(n)` returns the first n captions, `key` identifies it, `limit` is its length (None: endless).

    `references` are the reference images of the captions, for models that take one. `key` identifies these images too.
    """

    name: str
    key: str
    first: Callable[[int], list[str]]
    limit: int | None = None
    references: References | None = None


@dataclass(frozen=True)
class Protocol:
    """The captions, the reference and the extractors of an evaluation. `reference` is None if there are no reference images.

    The emoji protocol has two more lists of captions: held-out pairs of noun and color (`held_out`) and nouns alone (`bare`). Protocols
    with reference images have one more (`repeated`): caption i is one of theirs, and the same for each SEEDS captions.
    """

    name: str
    captions: Captions | None
    reference: Collection | Statistics | None
    extractors: Extractors
    default_num: int | None
    prepare: Prepare = as_it_is
    prepared: str = ""
    held_out: Captions | None = None
    bare: Captions | None = None
    repeated: Captions | None = None
    statistics: Statistics | None = None
    """Statistics of the reference's features for the FID, if they are known without its images."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_emoji(self) -> bool:
        return self.name == "emoji"

    @property
    def references(self) -> References | None:
        """The reference images of the captions, None if models draw from captions alone."""
        return self.captions.references if self.captions else None

    @property
    def is_emoji_world(self) -> bool:
        """Whether the images are of the emoji world."""
        return self.name in ("emoji", "emoji-subjects")


def scenes(count: int, held_out: bool = False) -> list[world.Scene]:
    """Return the scenes that the captions of the emoji protocol describe."""
    return [_scene(index, held_out) for index in range(count)]


def emoji_captions(count: int, held_out: bool = False) -> list[str]:
    return [_caption(index, held_out) for index in range(count)]


@cache  # each metric of each model asks for all of them
def _scene(index: int, held_out: bool) -> world.Scene:
    return world.scene(world.PROMPT_SEED, index, held_out)


@cache
def _caption(index: int, held_out: bool) -> str:
    return world.caption(_scene(index, held_out), world.PROMPT_SEED, index, "eval", 1.0).text


def bare_captions(count: int) -> list[str]:
    return [world.bare_caption(index) for index in range(count)]


def emoji(networks: Networks) -> Protocol:
    def captions(held_out: bool) -> Captions:
        name = "emoji world, held-out pairs" if held_out else "emoji world, evaluation captions"
        return Captions(name, f"emoji {world.digest()} {held_out}", partial(emoji_captions, held_out=held_out))

    return Protocol(
        "emoji",
        captions(False),
        Collection(SceneSet(world.REFERENCE_SEED), emoji_reference.SCENES),
        EmojiExtractors(networks),
        QUICK_NUM,
        held_out=captions(True),
        bare=Captions("emoji world, nouns alone", f"emoji {world.digest()} bare", bare_captions),
        statistics=emoji_reference.shipped(emoji_reference.SCENES),
        facts={"reference": f"{emoji_reference.SCENES} scenes of the emoji world", "world": world.digest()},
    )


def subject_captions(count: int) -> list[str]:
    sheets = [identities.unknown(index) for index in range(count)]
    return [identities.sheet_caption(sheet.noun, sheet.colors[1:]) for sheet in sheets]


def _subject_name(index: int) -> str:
    return identities.unknown(index).noun


def emoji_subjects(networks: Networks) -> Protocol:
    """Return the protocol of models that draw the subject of a reference image of the emoji world."""
    captions = Captions(
        "emoji world, a subject on another background",
        f"emoji subjects {identities.digest()}",
        subject_captions,
        references=References(PanelSet(0), lambda index: index, _subject_name),
    )
    facts = {"reference": "an image of the subject", "identities": identities.digest()}
    return Protocol(
        "emoji-subjects",
        captions,
        None,
        EmojiExtractors(networks),
        QUICK_NUM,
        repeated=repeated(captions, lambda group: group),
        facts=facts,
    )


def subjects(networks: Networks, folder: Path | None) -> Protocol:
    """Return the protocol of models that draw the subjects of the images of a folder; see `data.subjects`.

    Raises UsageError if `folder` is None, and InputError as `open_subjects` does.
    """
    if folder is None:
        raise UsageError(
            "the protocol subjects needs reference images with prompts",
            "--reference FOLDER, DreamBench++ or images with a metadata.jsonl of file_name and text",
        )
    found = open_subjects(folder)
    for note in found.files.notes:
        networks.listener.note(note)
    references = found.references(partial(square, size=REFERENCE_SIZE), f"center square, Lanczos to {REFERENCE_SIZE}")
    captions = Captions(folder.name, found.key, lambda count: list(found.prompts[:count]), len(found), references)
    order = numpy_generator(0, "diversity").permutation(len(found))  # neighbors are of one image
    images = counted(len(found.files), "image")
    return Protocol(
        "subjects",
        captions,
        None,
        SubjectExtractors(networks, as_gigagan=False),
        None,
        repeated=repeated(captions, lambda group: int(order[group % len(order)])),
        facts={"reference": f"{images} of {folder.name}", "reference_files": found.files.fingerprint},
    )


def repeated(captions: Captions, pick: Callable[[int], int]) -> Captions:
    """Return a list of which each SEEDS captions, with their reference image, are caption `pick(group)` of another list."""
    assert captions.references is not None
    own = captions.references

    def first(count: int) -> list[str]:
        picked = [pick(place // SEEDS) for place in range(count)]
        texts = captions.first(1 + max(picked))
        return [texts[place] for place in picked]

    references = replace(
        own, of=lambda place: own.of(pick(place // SEEDS)), subject=lambda place: own.subject(pick(place // SEEDS))
    )
    return Captions(f"{captions.name}, {SEEDS} seeds each", f"{captions.key} repeated", first, None, references)


def listed(prompts: Path, listener: Listener, column: str = "") -> Captions:
    """Return the captions of a file, in its order, or of the endless built-in list `general`. `column` is that of a table."""
    if str(prompts) in ("emoji", "emoji-nouns") and not prompts.exists():
        nouns = ", whose metric `bare noun` measures nouns alone" if str(prompts) == "emoji-nouns" else ""
        raise UsageError(
            f"--prompts {prompts}: the captions of the emoji world are those of its protocol", f"--protocol emoji{nouns}"
        )
    if str(prompts) == GENERAL and not prompts.exists():
        source = open_prompts(GENERAL, column)
        return Captions(GENERAL, f"{GENERAL} {source.digest}", lambda count: [source.at(GENERAL_SEED, i) for i in range(count)])
    found = read_list(prompts, column)
    if found.note:
        listener.note(found.note)
    return Captions(found.name, found.digest, found.first, len(found))


def coco(networks: Networks, folder: Path | None, prompts: Path | None, column: str = "") -> Protocol:
    """Return the protocol `coco2014-30k`. `folder` holds annotations/captions_val2014.json and val2014/ of COCO's archives.

    Raises UsageError if `folder` is None, and InputError if a file is missing.
    """
    if folder is None:
        raise UsageError(
            "the protocol coco2014-30k needs COCO's validation set of 2014",
            f"--reference FOLDER with {COCO_IMAGES}/ and {COCO_CAPTIONS}, unpacked from val2014.zip and annotations_trainval2014.zip",
        )
    for needed in (folder / COCO_IMAGES, *([] if prompts else [folder / COCO_CAPTIONS])):
        if not needed.exists():
            raise InputError(
                f"{folder} is not COCO 2014: {needed} is missing", "unpack val2014.zip and annotations_trainval2014.zip there"
            )
    files = _images(folder / COCO_IMAGES, networks.listener)
    prepare, prepared = partial(square, size=COCO_SIZE), f"center square, Lanczos to {COCO_SIZE}"
    return Protocol(
        "coco2014-30k",
        listed(prompts or folder / COCO_CAPTIONS, networks.listener, column),
        Collection(FileSet(files), len(files), prepare=prepare, prepared=prepared),
        PhotoExtractors(networks, as_gigagan=True),
        30_000,
        prepare,
        prepared,
        facts={"reference": f"{counted(len(files), 'image')} of {COCO_IMAGES}", "reference_files": files.fingerprint},
    )


def _images(path: Path, listener: Listener) -> ImageFiles:
    files = open_images(path)
    for note in files.notes:
        listener.note(note)
    return files


def custom(networks: Networks, reference: Path | None, prompts: Path | None, column: str = "") -> Protocol:
    """Return the protocol `custom`. If neither a reference nor prompts are given, its captions are those of the built-in list."""
    compared: Collection | Statistics | None = None
    facts: dict[str, Any] = {"reference": "none"}
    if reference and reference.suffix.lower() == ".npz":
        compared = read_statistics(reference)
        facts = {
            "reference": f"statistics of {reference.name}",
            "reference_files": sha256(reference),
        }
    elif reference:
        files = _images(reference, networks.listener)
        compared = Collection(FileSet(files), len(files))
        facts = {"reference": f"{counted(len(files), 'image')} of {reference.name}", "reference_files": files.fingerprint}
    if prompts is None and reference is None:
        prompts = Path(GENERAL)
    captions = listed(prompts, networks.listener, column) if prompts else None
    num = QUICK_NUM if captions and captions.limit is None else None
    return Protocol("custom", captions, compared, PhotoExtractors(networks, as_gigagan=False), num, facts=facts)


def read_statistics(file: Path) -> Statistics:
    """Read `mu` and `sigma` of Inception features, as written by clean-fid and others. Raises InputError if the file is invalid."""
    hint = "--reference takes a folder or zip of images, or an .npz with `mu` [D] and `sigma` [D, D]"
    try:
        size_of(file, MAX_STATISTICS)
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_STATISTICS:
            raise ValueError(f"{size} bytes, unpacked")
        with np.load(file, allow_pickle=False) as kept:
            mean, covariance = (kept[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
    except (*DAMAGE, KeyError, TypeError, MemoryError) as error:
        raise InputError(f"{file} holds no statistics: {getattr(error, 'strerror', None) or error}", hint) from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or len(mean) == 0:
        raise InputError(f"{file}: mu {list(mean.shape)} and sigma {list(covariance.shape)} do not fit", hint)
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise InputError(f"{file} holds values that are not finite", "compute the statistics again")
    variances = np.diag(covariance)
    if not np.allclose(covariance, covariance.T) or variances.min() < -ROUNDING * np.abs(variances).max():
        raise InputError(
            f"{file}: sigma is not a covariance: not symmetric, or negative on its diagonal", "compute the statistics again"
        )
    return Statistics(mean, covariance, 0)


def choose(name: str, all_emoji: bool, images_are_emoji: AbstractSet[bool], own: bool, all_subjects: bool = False) -> str:
    """Resolve `auto`: `emoji` for emoji models, unless the user gives captions or a reference (`own`), else `custom`.

    If all models take a reference image (`all_subjects`), it is `emoji-subjects` or `subjects` instead.

    `images_are_emoji` has an entry for the image files: whether a model of the emoji world drew them; it is empty without image files.
    Raises UsageError if `custom` would measure image files without the user's captions or reference, because images of the built-in
    captions can only be generated by a model.
    """
    if name == "auto":
        known, others = ("emoji-subjects", "subjects") if all_subjects else ("emoji", "custom")
        name = known if all_emoji and not own else others
    if name == "custom" and images_are_emoji and not own:
        raise UsageError(
            "images need something to be compared with",
            "--protocol emoji, whose captions they may be of"
            if images_are_emoji == {True}
            else "sid eval FOLDER --reference OTHER_FOLDER (FID, KID), or sid eval FOLDER --prompts CAPTIONS.txt (CLIP score)",
        )
    return name


def open_protocol(name: str, networks: Networks, reference: Path | None, prompts: Path | None, column: str = "") -> Protocol:
    """Return the protocol with this name. Raises UsageError if a required input is missing or an input is not allowed."""
    if name == "coco2014-30k":
        return coco(networks, reference, prompts, column)
    if name == "custom":
        return custom(networks, reference, prompts, column)
    inception = networks.inception if name != "subjects" else None
    for option, given in (("--inception", inception), ("--cmmd-model", networks.cmmd)):
        if given:
            raise UsageError(f"{option} {given}: the protocol {name} has a network of its own for this", f"leave {option} out")
    if name == "subjects":
        if prompts:
            raise UsageError(
                f"--prompts {prompts}: the prompts of the protocol subjects are those of its --reference", "leave it out"
            )
        return subjects(networks, reference)
    if reference or prompts:
        raise UsageError(f"the protocol {name} has captions and a reference of its own", "--protocol custom, for yours")
    return emoji_subjects(networks) if name == "emoji-subjects" else emoji(networks)
