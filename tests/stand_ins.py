"""Networks with the files and calls of the published ones, and weights of ours: what they see is worthless, how they are called is not."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class Layers(nn.Module):
    """The part of the TorchScript Inception that clean-fid calls: pixels around 0 -> 2048 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 13, stride=12), nn.ReLU(), nn.Conv2d(32, 128, 5, stride=5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(self.body(x), 4).flatten(1)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 128) / 128)


def write_inception(file: Path) -> Path:
    torch.manual_seed(0)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(Inception().eval()).save(str(file))
    return file


def write_clip(folder: Path) -> Path:
    """An open_clip folder; also its weights and, by the name tiny-clip, its architecture, as those that open_clip publishes."""
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CLIP(**CLIP_CONFIG)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "architectures").mkdir()
    (folder / "architectures" / "tiny-clip.json").write_text(json.dumps(CLIP_CONFIG))
    open_clip.add_model_config(folder / "architectures")
    return folder


def write_dino(folder: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56)
    ).save_pretrained(folder)
    return folder
