"""Tiny random SD 2 and SDXL pipelines with the real class layout, written as complete diffusers folders in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sidcli.models.families import clip_tokenizer
from tests import tiny

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def openclip_text(width: int, projection: int, layers: int = 2) -> CLIPTextConfig:
    """OpenCLIP text encoders use exact gelu and heads of 64 at full size; here two heads."""
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act="gelu",
        projection_dim=projection,
    )


def write_sd2(folder: Path, prediction: str = "v_prediction") -> Path:
    """A random SD 2 pipeline of four levels: linear projections, a head count per level, OpenCLIP text; latents 8 x 8 (f8)."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        down_block_types=tiny.DOWN,
        up_block_types=tiny.UP,
        cross_attention_dim=32,
        attention_head_dim=(2, 2, 4, 4),
        use_linear_projection=True,
    )
    pipe = StableDiffusionPipeline(
        vae=tiny.new_vae((8, 8, 16, 16), 1, 4, 64),
        text_encoder=CLIPTextModel(openclip_text(32, 16)),
        tokenizer=clip_tokenizer("!"),
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def write_sdxl(folder: Path) -> Path:
    """A random SDXL pipeline of three levels: two text encoders of 16 and 24 channels, size conditioning; latents 8 x 8 (f8)."""
    torch.manual_seed(3)
    first = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(openclip_text(24, 20)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder
