"""A tiny random PixArt-Sigma pipeline with the real class layout, built offline in a second."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests import tiny_sd3


def write_pixart(folder: Path) -> Path:
    """Latents of 4 channels, 8 x 8, in patches of 2 x 2; images 32 x 32; T5 of 48 channels."""
    torch.manual_seed(17)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        cross_attention_dim=32,
        caption_channels=48,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    letters = tiny_sd3.t5_tokenizer()
    PixArtSigmaPipeline(
        tokenizer=letters,
        text_encoder=tiny_sd3.t5_encoder(48, len(letters)),
        vae=tiny_sd3.new_vae(4, 0.13025, None),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    ).save_pretrained(folder)
    return folder


def spiece_model(pieces: list[tuple[str, float]], charsmap: bytes = b"") -> bytes:
    """A file of SentencePiece with these pieces and their scores, and this map of characters of its normalizer."""
    rows = [_sized(1, text.encode()) + b"\x15" + struct.pack("<f", score) for text, score in pieces]
    trainer = b"\x18\x01" + b"\x35" + struct.pack("<f", 0.5) + _sized(7, b"x" * 200)  # is not read
    return b"".join(_sized(1, row) for row in rows) + _sized(2, trainer) + _sized(3, _sized(2, charsmap))


def _sized(field: int, content: bytes) -> bytes:
    """A field of a message, with its length below 2^14 before it."""
    size = len(content)
    return bytes([field << 3 | 2, *([size] if size < 128 else [size & 127 | 128, size >> 7])]) + content
