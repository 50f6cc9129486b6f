"""Feature extractors for the FID: clean-fid's resizer in front of a network that takes float32 [B, 3, S, S] in 0..255."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from cleanfid.resize import make_resizer
from safetensors.torch import load_file
from torch import Tensor

from sidcli.emoji import world
from sidcli.emoji.classifier import Classifier
from sidcli.errors import InputError
from sidcli.files import atomic_file, cache_folder, sha256
from sidcli.metrics.fid import Statistics, statistics
from sidcli.sources import WEIGHTS

INCEPTION = "inception-2015-12-05.pt"


class Extractor(Protocol):
    """`name` for the record, `size` of the square input, and the network itself."""

    name: str
    size: int

    def __call__(self, pixels: Tensor) -> Tensor: ...


class EmojiExtractor:
    """Features [B, 128] of the emoji world's classifier."""

    name, size = "emoji-classifier", world.SIZE

    def __init__(self) -> None:
        self.net = Classifier().eval()
        self.net.load_state_dict(load_file(WEIGHTS / "classifier.safetensors"))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.net.features(pixels)


class InceptionExtractor:
    """Features [B, 2048] of clean-fid's Inception. The file is looked for in our cache and never fetched here.

    Raises InputError that says which file to put where.
    """

    name, size = "inception-2015-12-05", 299

    def __init__(self) -> None:
        folder = Path(os.environ.get("SID_INCEPTION", cache_folder() / INCEPTION)).parent
        if not (folder / INCEPTION).is_file():
            raise InputError(
                f"the FID of photographs needs {INCEPTION}, which is not in {folder}",
                "download it from NVIDIA's StyleGAN2-ADA metrics, or point SID_INCEPTION at the file",
            )
        from cleanfid.inception_torchscript import InceptionV3W

        self.net = InceptionV3W(str(folder), download=False, resize_inside=False).eval()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, size, size] in 0..255 by clean-fid's resizer (PIL bicubic per channel, not quantised)."""
    if images.shape[1:3] == (size, size):
        return images.permute(0, 3, 1, 2).float()
    resizer = make_resizer("PIL", False, "bicubic", (size, size))
    return torch.from_numpy(np.stack([resizer(image) for image in images.numpy()])).permute(0, 3, 1, 2)


def extract(extractor: Extractor, images: Tensor) -> np.ndarray:
    """Features float32 [B, D] of images uint8 [B, H, W, 3]."""
    return extractor(resize(images, extractor.size)).numpy()


def scene_statistics(extractor: Extractor, seed: int, count: int, advance: Callable[[int], None] = lambda _: None) -> Statistics:
    """Statistics of `count` scenes of the emoji world, computed once and cached by what they depend on."""
    version = f"{world.digest()}-{extractor.name}-{_weights_digest()}-{seed}-{count}"
    file = cache_folder() / "statistics" / f"{version}.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            return Statistics(kept["mean"], kept["covariance"], int(kept["n"]))
    features = []
    for start in range(0, count, 200):
        scenes = range(start, min(start + 200, count))
        features.append(extract(extractor, torch.from_numpy(world.render_many(seed, scenes))))
        advance(len(scenes))
    found = statistics(np.concatenate(features))
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, mean=found.mean, covariance=found.covariance, n=found.n)
    return found


def _weights_digest() -> str:
    return sha256(WEIGHTS / "classifier.safetensors")[:12]
