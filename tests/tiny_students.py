"""Students around the smallest networks that have every part of their family, made without training: for tests of exports."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sidcli.formats.card import provenance
from sidcli.models.families import clip_tokenizer
from sidcli.models.loading import Model, load
from sidcli.models.overrides import Overrides
from sidcli.models.sources import find
from tests.tiny_families import BETAS, openclip_text

FAMILIES = ("sd1", "sd2", "sdxl")


def write_teacher(folder: Path, family: str, prediction: str | None = None, **scheduler: Any) -> Path:
    """A random pipeline: a UNet of two levels with one layer each, latents 8 x 8, images 32 x 32. SD 2 predicts v unless told otherwise."""
    torch.manual_seed(5)
    prediction = prediction or ("v_prediction" if family == "sd2" else "epsilon")
    xl = family == "sdxl"
    first = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16)
    second = openclip_text(24, 20, layers=1)
    options: dict[str, Any] = {"use_linear_projection": True} if family != "sd1" else {}
    if xl:
        options |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
            "transformer_layers_per_block": (1, 1),
        }
    text = CLIPTextModel(openclip_text(16, 16, layers=1) if family == "sd2" else first)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D") if not xl else ("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D") if not xl else ("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40 if xl else 16,
        attention_head_dim=2,
        **options,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.13025 if xl else 0.18215,
        force_upcast=xl,
    )
    networks: dict[str, Any] = {
        "vae": vae,
        "text_encoder": text,
        "tokenizer": clip_tokenizer("!" if family == "sd2" else "<|endoftext|>"),
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(**BETAS | {"prediction_type": prediction, "steps_offset": 1} | scheduler),
    }
    if xl:
        networks |= {"text_encoder_2": CLIPTextModelWithProjection(second), "tokenizer_2": clip_tokenizer("!")}
        StableDiffusionXLPipeline(**networks, add_watermarker=False).save_pretrained(folder)
    else:
        networks |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**networks).save_pretrained(folder)
    return folder


def student_of(teacher: Model, **card: Any) -> Model:
    """The teacher with other weights in every layer and the card of a student, as `sid distill` leaves them."""
    unet = copy.deepcopy(teacher.denoiser)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in unet.parameters():
            value += 0.02 * torch.randn(value.shape, generator=generator)
    told = {"kind": "student", "method": "SiD-LSG (arXiv 2406.01561)", "t_init": 625, "student_steps": 1, "renoise": "ddim"}
    return dataclasses.replace(teacher, denoiser=unet, card=told | {"teacher": provenance(teacher), "sid": "test"} | card)


def make(
    folder: Path, family: str, size: tuple[int, int] = (0, 0), prediction: str | None = None, **card: Any
) -> tuple[Model, Model]:
    """A teacher in a folder, and a student of it that draws at `size`, height and width in pixels; 0: the teacher's own."""
    source = find(str(write_teacher(folder / "teacher", family, prediction)))
    return load(source), student_of(load(source, Overrides(height=size[0], width=size[1])), **card)
