"""Feature extractors. Images for Inception are resized by clean-fid, so that the FID is comparable with published FIDs."""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from cleanfid.resize import make_resizer
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sidcli.emoji.classifier import Classifier
from sidcli.emoji.world import SIZE
from sidcli.errors import InputError
from sidcli.files import MAX_DESCRIPTION, readable, sha256
from sidcli.metrics.weights import INCEPTION
from sidcli.models.sources import WEIGHTS, check_links

Item = TypeVar("Item")
Made = TypeVar("Made")

CLASSIFIER = WEIGHTS / "classifier.safetensors"
"""The classifier of the emoji world."""
DINO, DINO_SIZE = "facebook/dinov2-large", 224
"""The default DINOv2, and the side in pixels of the images that it gets."""
IMAGENET = (np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32))


class Extractor(Protocol):
    """Maps images uint8 [H, W, 3], of any sizes, and their captions to features float32 [B, D].

    Extractors with equal `name`s return equal features. If `reads_captions` is False, the captions may be empty.
    """

    reads_captions: bool

    @property
    def name(self) -> str: ...
    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray: ...


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] to float32 [size, size, 3] in 0..255 by clean-fid's resizer (PIL bicubic per channel, unquantized)."""
    if image.shape[:2] == (size, size):
        return image.astype(np.float32)
    return make_resizer("PIL", False, "bicubic", (size, size))(image)


def batch(images: Sequence[np.ndarray], size: int) -> Tensor:
    """Return images as float32 [B, 3, size, size] in 0..255, the input format of clean-fid's networks."""
    return torch.from_numpy(np.stack(in_threads(lambda image: resize(image, size), images))).permute(0, 3, 1, 2)


def in_threads(work: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """Apply `work` to each item in threads and return the results in order. Decoding and resizing release the GIL."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(work, items))


REACHES_OUT = {"aten::save", "aten::from_file"}
"""TorchScript operations that access a file of the script's choice. Operations of libraries other than torch are all refused."""
SCRIPT_HINT = f"--inception takes {INCEPTION.name}"


def check_source(file: Path) -> None:
    """Raises InputError if the TorchScript file is invalid or would run code when it is loaded (a module with `__setstate__`)."""
    try:
        with zipfile.ZipFile(file) as archive:
            sources = [member for member in archive.infolist() if member.filename.endswith(".py")]
            if any(member.file_size > MAX_DESCRIPTION or b"__setstate__" in archive.read(member) for member in sources):
                raise InputError(f"{file} would run a program of its own when it is loaded", SCRIPT_HINT)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, zlib.error) as error:
        raise InputError(f"{file} is not the Inception network in TorchScript: {error}", SCRIPT_HINT) from error


def check_graph(file: Path, graph: Any) -> None:
    """Raises InputError if a TorchScript function does more than arithmetic, because it could read and write any file."""
    torch._C._jit_pass_inline(graph)
    blocks = [graph]
    for block in blocks:
        for node in block.nodes():
            kind = node.kind()
            if kind in REACHES_OUT or "Call" in kind or kind.split("::")[0] not in ("aten", "prim"):
                raise InputError(f"{file} does more than look at images: {kind}", SCRIPT_HINT)
            blocks += node.blocks()


class EmojiFeatures:
    """The extractor of features [B, 128] of the emoji world's classifier. `answers` returns the predictions for features."""

    reads_captions = False

    def __init__(self) -> None:
        self.net = Classifier().eval()
        self.net.load_state_dict(load_file(CLASSIFIER))
        self.name = f"emoji classifier {sha256(CLASSIFIER)[:12]}"

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str] = ()) -> np.ndarray:
        return self.net.features(batch(images, SIZE)).numpy()

    @torch.no_grad()
    def answers(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the predicted noun and color for features [n, 128], as indices [n] into NOUN_LIST and COLOR_LIST."""
        seen = torch.from_numpy(features)
        return self.net.noun(seen).argmax(1).numpy(), self.net.color(seen).argmax(1).numpy()


class InceptionFeatures:
    """The extractor of features [B, 2048] of the Inception network in a TorchScript file, called as in clean-fid.

    `published` says whether the file holds the weights that published FIDs are computed with. Raises InputError if the file does
    not exist or holds another network.
    """

    reads_captions = False

    def __init__(self, file: Path, device: torch.device):
        with readable(file):
            if not file.is_file():
                raise InputError(
                    f"no file {file}", f"--inception takes {INCEPTION.name} in TorchScript, or leave it out to fetch it"
                )
            digest = sha256(file)
        self.file, self.device = file, device
        self.published = digest == INCEPTION.sha256
        self.name = f"inception {digest[:12]}"

    @cached_property
    def net(self) -> Any:
        from cleanfid.inception_torchscript import InceptionV3W

        if not self.published:
            check_source(self.file)
        with tempfile.TemporaryDirectory() as folder:  # clean-fid expects a folder with a file of this name
            (Path(folder) / "inception-2015-12-05.pt").symlink_to(self.file.absolute())
            try:
                net = InceptionV3W(folder, download=False, resize_inside=False).eval()
                if not self.published:
                    check_graph(self.file, net.layers.forward.graph.copy())
                return net.to(self.device)
            except (RuntimeError, AttributeError) as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                raise InputError(f"{self.file} is not the Inception network in TorchScript: {reason}", SCRIPT_HINT) from error

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str] = ()) -> np.ndarray:
        return self.net(batch(images, 299).to(self.device)).float().cpu().numpy()


@dataclass(frozen=True)
class DinoFeatures:
    """The extractor of DINOv2's normalized class token [B, D] of images resized to 224 x 224 (PIL bicubic), as in arXiv 2306.04675.

    `model` is a folder or a hub id that transformers can load. Raises InputError, which names `user`, who needs it, and `option`, which
    sets it, if it cannot be loaded.
    """

    model: str
    device: torch.device
    user: str = "FD-DINOv2"
    option: str = "--dino-model"
    reads_captions = False

    @property
    def name(self) -> str:
        files = [Path(self.model) / name for name in ("config.json", "model.safetensors")]
        with readable(self.model):
            known = " ".join(sha256(file)[:12] for file in files) if all(file.is_file() for file in files) else self.model
        return f"dinov2 {known}, {DINO_SIZE} pixels"

    @cached_property
    def net(self) -> Any:
        from transformers import Dinov2Model

        with self._reading():
            options = {"use_safetensors": True, "dtype": torch.float32, "attn_implementation": "sdpa"}
            return Dinov2Model.from_pretrained(self.model, **options).eval().to(self.device)

    def check(self) -> None:
        """Raises the InputError of `net` if the model is missing, without reading weights that are there."""
        from transformers import Dinov2Config

        with self._reading():
            Dinov2Config.from_pretrained(self.model)
        if Path(self.model).is_dir() and not any(Path(self.model).glob("*.safetensors")):
            _ = self.net

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            if Path(self.model).is_dir():
                check_links(Path(self.model), parts=())
            yield
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{self.user} needs {self.model}, which cannot be read: {reason}",
                f"put its config.json and model.safetensors into a folder and pass {self.option} FOLDER",
            ) from error

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str] = ()) -> np.ndarray:
        mean, deviation = IMAGENET
        small = [Image.fromarray(image).resize((DINO_SIZE, DINO_SIZE), Image.Resampling.BICUBIC) for image in images]
        pixels = np.stack([(np.asarray(image, np.float32) / 255 - mean) / deviation for image in small])
        return self.net(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)).pooler_output.float().cpu().numpy()
