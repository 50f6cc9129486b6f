"""Tiny random Stable Diffusion pipelines with the real class layout, built offline in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sidcli.models.families import clip_tokenizer
from sidcli.models.loading import Model
from sidcli.models.sources import WEIGHTS, Source
from sidcli.models.unet import read_path

DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": DOWN,
    "up_block_types": UP,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}


def sd15_text() -> CLIPTextConfig:
    return CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)


def new_vae(widths: tuple[int, ...], layers: int, groups: int, size: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=layers,
        norm_num_groups=groups,
        sample_size=size,
    )


def sd15_vae() -> AutoencoderKL:
    return new_vae((128, 256, 512, 512), 2, 32, 512)


def sd15() -> Model:
    """The networks of SD 1.5 at their full size with random weights; 4 GB. The VAE has none, training never decodes."""
    unet, text = UNet2DConditionModel(**SD15_UNET), CLIPTextModel(sd15_text())
    with torch.device("meta"):
        vae = sd15_vae()
    for net in (unet, vae, text):
        net.eval().requires_grad_(False)
    source = Source("sd15", Path(), "random weights")
    return Model(source, unet, vae, (text,), (clip_tokenizer(),), read_path(SD15_SCHEDULER), SD15_SCHEDULER)


def write_sd15_configs(folder: Path) -> Path:
    """The JSON files of a pipeline of SD 1.5's size, without weights."""
    with torch.device("meta"):
        parts = {"unet": UNet2DConditionModel(**SD15_UNET), "vae": sd15_vae()}
    for name, net in parts.items():
        net.save_config(folder / name)
    sd15_text().save_pretrained(folder / "text_encoder")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    PNDMScheduler(**SD15_SCHEDULER).save_pretrained(folder / "scheduler")
    stock = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    stock |= {"tokenizer": "CLIPTokenizer", "scheduler": "PNDMScheduler"}
    index = {"_class_name": "StableDiffusionPipeline"} | {name: ["diffusers", kind] for name, kind in stock.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_sd(folder: Path, prediction: str = "epsilon", size: int = 8) -> Path:
    """A random SD 1 pipeline of four levels at `size` x `size` latents (f8), as a folder."""
    return _write(folder, prediction, size, (16, 16, 32, 32), clip_tokenizer())


def write_two_levels(folder: Path, prediction: str = "epsilon", size: int = 8) -> Path:
    """The same with two levels and the small vocabulary of the emoji world, which trains and is written twice as fast."""
    return _write(folder, prediction, size, (16, 32), CLIPTokenizer.from_pretrained(WEIGHTS / "teacher" / "tokenizer"))


def _write(folder: Path, prediction: str, size: int, widths: tuple[int, ...], tokenizer: CLIPTokenizer) -> Path:
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=size,
        layers_per_block=1,
        block_out_channels=widths,
        norm_num_groups=8,
        down_block_types=DOWN[-len(widths) :],
        up_block_types=UP[: len(widths)],
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    vae = new_vae((8, 8, 8, 8), 1, 4, 8 * size)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder
