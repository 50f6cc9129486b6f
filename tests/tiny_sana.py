"""A tiny random SANA pipeline with the real class layout, built offline in a second."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's kind of tokenizer with one token for each character."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = "▁\n" + string.ascii_letters + string.digits + string.punctuation
    return GemmaTokenizer(vocab={token: index for index, token in enumerate([*marks, *letters])}, add_bos_token=True)


def gemma_encoder(width: int, tokens: int) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=0.5,
        initializer_range=0.2,
    )
    return Gemma2Model(config)


def new_vae() -> AutoencoderDC:
    """A VAE whose latents have a quarter of the sides of an image."""
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )


def write_sana(folder: Path, positions: float | None = None, multistep: bool = True) -> Path:
    """Latents of 8 channels, 8 x 8; images 32 x 32; Gemma 2 of 48 channels, in which limited scores differ from others. `positions` is
    the interpolation scale of models of 2048 and 4096 pixels; the other models have no positions."""
    torch.manual_seed(23)
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=48,
        sample_size=8,
        interpolation_scale=positions,
    )
    letters = gemma_tokenizer()
    SanaPipeline(
        tokenizer=letters,
        text_encoder=gemma_encoder(48, len(letters)),
        vae=new_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**FLOW) if multistep else FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder
