"""The CLIP score: mean cosine between image and caption embeddings of an open_clip model (as a fraction, not times 100)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sidcli.errors import InputError
from sidcli.sources import WEIGHTS

PHOTO_MODEL = ("ViT-g-14", "laion2b_s12b_b42k")
"""The model of the paper's CLIP scores (method 2.1)."""


class ClipScore:
    """Accumulates over batches. `emoji` scores with the small model that ships, else with the paper's ViT-g-14."""

    def __init__(self, emoji: bool, device: torch.device):
        self.device = device
        if emoji:
            self.name = "emoji open_clip"
            self.model, self.preprocess, self.tokenizer = open_local(WEIGHTS / "clip")
        else:
            self.name = " ".join(PHOTO_MODEL)
            try:
                self.model, _, self.preprocess = open_clip.create_model_and_transforms(PHOTO_MODEL[0], PHOTO_MODEL[1])
            except RuntimeError as error:
                raise InputError(
                    f"cannot load the CLIP model {self.name}: {str(error).splitlines()[0]}",
                    "connect once to fetch it from the hub, or set HF_HOME to a cache that has it",
                ) from error
            self.tokenizer = open_clip.get_tokenizer(PHOTO_MODEL[0])
        self.model = self.model.to(device).eval()
        self.total, self.count = 0.0, 0

    @torch.no_grad()
    def add(self, images: Tensor, prompts: Sequence[str]) -> None:
        """images uint8 [B, H, W, 3] and their captions."""
        pixels = torch.stack([self.preprocess(Image.fromarray(image.numpy())) for image in images]).to(self.device)
        seen = F.normalize(self.model.encode_image(pixels).float(), dim=1)
        said = F.normalize(self.model.encode_text(self.tokenizer(list(prompts)).to(self.device)).float(), dim=1)
        self.total += float((seen * said).sum())
        self.count += len(prompts)

    @property
    def value(self) -> float:
        return self.total / self.count


def open_local(folder: Path) -> tuple[Any, Any, Any]:
    """Model, preprocessing and tokenizer of a folder with open_clip_config.json and open_clip_model.safetensors."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    return model, preprocess, open_clip.SimpleTokenizer(context_length=config["model_cfg"]["text_cfg"]["context_length"])
