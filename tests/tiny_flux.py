"""A tiny random FLUX.1 pipeline with the real class layout, built offline in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from sidcli.models.sources import WEIGHTS
from tests import tiny_sd3


def write_flux(folder: Path, dev: bool = True) -> Path:
    """Latents of 16 channels, 8 x 8, in tokens of 2 x 2; images 32 x 32; CLIP of 16 channels, T5 of 48. FLUX.1 dev has an input for the
    guidance scale and a shift that depends on the size; schnell has neither."""
    torch.manual_seed(19)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(4, 2, 2),
    )
    transformer.register_to_config(sample_size=8)
    words, letters = CLIPTokenizer.from_pretrained(WEIGHTS / "teacher" / "tokenizer"), tiny_sd3.t5_tokenizer()
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=tiny_sd3.new_vae(16, 0.3611, 0.1159),
        text_encoder=CLIPTextModel(tiny_sd3.clip_config(words, 16, "quick_gelu")),
        tokenizer=words,
        text_encoder_2=tiny_sd3.t5_encoder(48, len(letters)),
        tokenizer_2=letters,
    ).save_pretrained(folder)
    return folder
