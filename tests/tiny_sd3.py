"""A tiny random Stable Diffusion 3 pipeline with the real class layout, built offline in a second."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from sidcli.models.sources import WEIGHTS

TOKENS = 24
"""Tokens that the CLIP encoders read: those of the tokenizer of the emoji world."""
TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def clip_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        hidden_act=activation,
        max_position_embeddings=TOKENS,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def t5_tokenizer() -> T5Tokenizer:
    """T5's kind of tokenizer with one token for each letter."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*marks, *((letter, -2.0) for letter in "▁" + string.ascii_letters)], extra_ids=0)


def t5_encoder(width: int, tokens: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=tokens,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config)


def new_vae(channels: int, scale: float, shift: float | None) -> AutoencoderKL:
    """A VAE whose latents have a quarter of the sides of an image."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def write_sd3(folder: Path, texts: Sequence[str] = TEXTS, shift: float = 3.0, layers: int = 3) -> Path:
    """Latents of 16 channels, 8 x 8, in patches of 2 x 2; images 32 x 32; CLIP encoders of 16 and 24 channels, T5 of 48. Encoders that
    are not in `texts` are left out."""
    torch.manual_seed(13)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = new_vae(16, 1.5305, 0.0609)
    words, letters = CLIPTokenizer.from_pretrained(WEIGHTS / "teacher" / "tokenizer"), t5_tokenizer()
    parts: dict[str, Any] = {
        "text_encoder": CLIPTextModelWithProjection(clip_config(words, 16, "quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(words, 24, "gelu")),
        "text_encoder_3": t5_encoder(48, len(letters)),
        "tokenizer": words,
        "tokenizer_2": words,
        "tokenizer_3": letters,
    }
    for name in TEXTS:
        if name not in texts:
            parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **parts).save_pretrained(folder)
    return folder
