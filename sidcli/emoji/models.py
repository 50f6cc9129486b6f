"""The architectures of the emoji world: Stable Diffusion's classes at a size that can be trained on two CPU cores."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 24
TEXT_WIDTH = 128
BLANK_WIDTH = 8
"""Width of the second text encoder of the transformer, which is zeros."""


def new_vae() -> AutoencoderKL:
    """Return a VAE for 64 x 64 x 3 pixels and 16 x 16 x 4 latents. Its middle block has no attention, because sprites are local."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def new_tokenizer(texts: Iterable[str], size: int = 1024) -> CLIPTokenizer:
    """Return a CLIP tokenizer with a vocabulary learned from `texts`. Unknown words are split into shorter tokens or letters.

    CLIP's own vocabulary (49,408 entries) would need 6.3 M parameters in the text encoder, compared with 8 M in the UNet.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    learner.train_from_iterator(
        (text.lower() for text in texts),
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {letter: index for index, letter in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges = [tuple(pair) for pair in learned["merges"]]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """Return a UNet of 8 M parameters.

    Most parameters are at resolutions 8 x 8 and 4 x 4. A convolution costs a quarter of its cost at twice the resolution.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=16,
    )


def new_transformer(layers: int = 8, heads: int = 5) -> SD3Transformer2DModel:
    """Return a transformer of Stable Diffusion 3 (MMDiT), by default of 7.3 M parameters, for 64 tokens of 2 x 2 latents.

    It reads the 24 tokens of its CLIP encoders and one token of zeros where T5 would be: the 256 that the stock pipeline gives a model
    without T5 would take four times the compute of all others. It starts as the identity: the modulation of each block and the last
    layer are zero (adaLN-Zero, arXiv 2212.09748).
    """
    width, text = 32 * heads, TEXT_WIDTH + BLANK_WIDTH
    net = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=text,
        caption_projection_dim=width,
        pooled_projection_dim=text,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    net.register_to_config(max_sequence_length=1)
    modulations = [norm.linear for block in net.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*modulations, net.norm_out.linear, net.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


def projected(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Return a text encoder as Stable Diffusion 3 reads it: its states before the last normalization, and its pooled output.

    Stable Diffusion 3 reads the states behind the layer before the last one. The encoder gets another layer, which is the identity,
    so that these are the states behind all of its own layers. Its projection is the identity, too.
    """
    layers = encoder.config.num_hidden_layers
    config = CLIPTextConfig(**{**encoder.config.to_dict(), "num_hidden_layers": layers + 1})
    net = CLIPTextModelWithProjection(config)
    net.text_model.load_state_dict(encoder.state_dict(), strict=False)
    for value in net.text_model.encoder.layers[layers].parameters():
        nn.init.zeros_(value)
    nn.init.eye_(net.text_projection.weight)
    return net.eval()


def blank_text_encoder(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Return a small text encoder with the vocabulary of another one, whose states and pooled output are zeros.

    The stock pipeline of Stable Diffusion 3 cannot read prompts with one CLIP encoder alone.
    """
    sizes = {"hidden_size": BLANK_WIDTH, "intermediate_size": BLANK_WIDTH, "projection_dim": BLANK_WIDTH}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 1}
    net = CLIPTextModelWithProjection(CLIPTextConfig(**{**encoder.config.to_dict(), **sizes, **layers}))
    for value in net.parameters():
        nn.init.zeros_(value)
    return net.eval()


def new_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler of Stable Diffusion 3 without a shift of the timesteps, which serves larger images."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def new_scheduler() -> DDIMScheduler:
    """Return a DDIM scheduler (deterministic sampling) with the noise schedule of Stable Diffusion 1.5."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )


def new_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> np.ndarray:
    """Return token ids int64 [B, 24], padded with the end token as in Stable Diffusion."""
    return tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="np"
    ).input_ids


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Return `token_ids` as a tensor."""
    return torch.from_numpy(token_ids(tokenizer, texts))
