"""The small open_clip model of the emoji world. Library, file format and code path are those of ViT-g-14; its size is 1/400."""

from __future__ import annotations

from typing import Any

import open_clip

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 24, "head_width": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def new_clip() -> tuple[open_clip.CLIP, open_clip.SimpleTokenizer]:
    """Return an untrained model and its tokenizer."""
    model_cfg = CONFIG["model_cfg"]
    return open_clip.CLIP(**model_cfg), open_clip.SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"])
