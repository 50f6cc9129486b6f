"""Feature extractors with open_clip models: embeddings of images, and the similarity of an image and its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from sidcli.errors import InputError
from sidcli.files import read_json, readable, sha256
from sidcli.metrics.transforms import quantized
from sidcli.models.sources import check_links

PREFIX = "A photo depicts "
"""Prefix of every caption in the paper's CLIP scores, as in arXiv 2104.08718."""


class Clip:
    """An open_clip model, loaded at its first use.

    `model` is a folder with open_clip_config.json and open_clip_model.safetensors, or ARCHITECTURE:WEIGHTS, where WEIGHTS is a tag
    of open_clip or a .safetensors file. `hint` is the suggestion in error messages. Raises InputError if the model does not exist.
    """

    def __init__(self, model: str, device: torch.device, hint: str):
        self.model, self.device, self.hint = model, device, hint
        with readable(model):
            self._identify()

    def _identify(self) -> None:
        """Set `folder`, `architecture`, `tag` and `name`. Raises InputError if the model does not exist, OSError if it cannot be read."""
        model, hint = self.model, self.hint
        self.folder = Path(model) if Path(model).is_dir() else None
        self.architecture, _, self.tag = model.rpartition(":")
        weights = Path(self.tag)
        if self.folder:
            check_links(self.folder, parts=())
            content = [sha256(self._in_folder(name)) for name in ("open_clip_config.json", "open_clip_model.safetensors")]
            self.name = f"open_clip {content[1][:12]}, described by {content[0][:12]}"
            return
        import open_clip  # takes two seconds, and a run without --eval-every uses no CLIP model

        if self.architecture not in (known := open_clip.list_models()):
            near = get_close_matches(self.architecture or model, known, 3)
            reason = f"open_clip has no architecture {self.architecture!r}" if self.architecture else "it is not a folder"
            raise InputError(f"no CLIP model {model}: {reason}", f"{', '.join(near)}, or {hint}" if near else hint)
        elif not weights.is_file() and self.tag not in (tags := open_clip.list_pretrained_tags_by_model(self.architecture)):
            raise InputError(f"no CLIP model {model}: {self.tag!r} is neither a file nor one of {', '.join(tags)}", hint)
        else:
            if weights.exists() and weights.suffix != ".safetensors":
                raise InputError(f"{weights} is not a .safetensors file, and other weights can run code", hint)
            self.name = f"{model} {sha256(weights)[:12]}" if weights.is_file() else model

    def _in_folder(self, name: str) -> Path:
        file = Path(self.model) / name
        if not file.is_file():
            raise InputError(f"{self.model} has no {name}", self.hint)
        return file

    @cached_property
    def opened(self) -> tuple[Any, Any, Any]:
        """The network, its preprocessing and its tokenizer."""
        import open_clip

        try:
            if self.folder:
                net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{self.folder}")
                config = read_json(self._in_folder("open_clip_config.json"))
                length = config["model_cfg"]["text_cfg"].get("context_length", 77)
                tokenizer = open_clip.SimpleTokenizer(context_length=length)
            else:
                net, _, preprocess = open_clip.create_model_and_transforms(self.architecture, self.tag)
                tokenizer = open_clip.get_tokenizer(self.architecture)
        except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            repo = str(open_clip.get_pretrained_cfg(self.architecture, self.tag).get("hf_hub", "")).rstrip("/")
            place = f"put open_clip_model.safetensors of {repo} into the hub's cache (HF_HOME), or " if repo else ""
            raise InputError(
                f"cannot load the CLIP model {self.model}: {(str(error).splitlines() or [type(error).__name__])[0]}",
                f"{place}{self.hint}",
            ) from error
        return net.to(self.device).eval(), preprocess, tokenizer

    @torch.no_grad()
    def see(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the embeddings, float32 [B, D] of norm 1, of images uint8 [H, W, 3] of any size."""
        net, preprocess, _ = self.opened
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images]).to(self.device)
        return F.normalize(net.encode_image(pixels).float(), dim=1)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Tensor:
        """Return the embeddings, float32 [B, D] of norm 1, of captions."""
        net, _, tokenizer = self.opened
        return F.normalize(net.encode_text(tokenizer(list(captions)).to(self.device)).float(), dim=1)


@dataclass(frozen=True)
class Embeddings:
    """The extractor of image embeddings [B, D], for the CMMD."""

    clip: Clip
    reads_captions = False

    @property
    def name(self) -> str:
        return f"embeddings of {self.clip.name}"

    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        return self.clip.see(images).cpu().numpy()


@dataclass(frozen=True)
class Similarity:
    """The extractor of the cosine similarity [B, 1] of each image and `prefix` + caption, for the CLIP score.

    If `as_gigagan`, images are first passed through `transforms.quantized`, as in the evaluation code of published scores.
    """

    clip: Clip
    prefix: str = ""
    as_gigagan: bool = False
    reads_captions = True

    @property
    def name(self) -> str:
        pixels = ", pixels truncated as in GigaGAN's code" if self.as_gigagan else ""
        return f"similarity by {self.clip.name}, captions after {self.prefix!r}{pixels}"

    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        texts = self.clip.read([self.prefix + caption for caption in captions])
        seen = self.clip.see([quantized(image) for image in images] if self.as_gigagan else images)
        return (seen * texts).sum(1, keepdim=True).cpu().numpy()
