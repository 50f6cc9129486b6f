"""Published configurations of Stable Diffusion 1.5, 2.1 (and its base) and SDXL base 1.0, for weight files that contain none.

The values are those of the JSON files that diffusers would download from the hub; tests check them by parameter counts. Functions
import the network libraries when they build a network, so that reading a configuration stays fast.
"""

from __future__ import annotations

import copy
import gzip
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import CLIPTextConfig, CLIPTokenizer

END = "<|endoftext|>"
MAX_TOKENS = 77
WORDS = 49408

TEXT_KEYS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "projection_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "attention_dropout",
        "initializer_factor",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
)
"""Entries of a text encoder's configuration that sid uses. Others select an implementation, which can be downloaded code."""


@dataclass(frozen=True)
class Family:
    """A published architecture. `components` maps unet, vae, text_encoder (and text_encoder_2) to their configuration."""

    title: str
    components: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    tokenizers: dict[str, dict[str, Any]]
    pipeline: dict[str, Any]
    """Entries of model_index.json other than the components."""


def _unet(**differences: Any) -> dict[str, Any]:
    return {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        **differences,
    }


def _vae(**differences: Any) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": 0.18215,
        **differences,
    }


def _text(width: int, layers: int, heads: int, activation: str, projection: int) -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": projection,
        "max_position_embeddings": MAX_TOKENS,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        # The published eos_token_id 2 is wrong. transformers detects this value and pools at the largest token id instead.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _tokenizer(pad_token: str) -> dict[str, Any]:
    return {"pad_token": pad_token, "model_max_length": MAX_TOKENS}


CLIP_L = _text(768, 12, 12, "quick_gelu", 768)
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PNDM = {
    "_class_name": "PNDMScheduler",
    **BETAS,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

FAMILIES = {
    "sd1": Family(
        "Stable Diffusion 1",
        {"unet": _unet(), "vae": _vae(), "text_encoder": CLIP_L},
        PNDM,
        {"tokenizer": _tokenizer(END)},
        {},
    ),
    # Configuration of 2.1-base; `describe` changes it to that of 2.1 if the prediction type is v_prediction.
    "sd2": Family(
        "Stable Diffusion 2",
        {
            "unet": _unet(
                cross_attention_dim=1024,
                attention_head_dim=[5, 10, 20, 20],
                use_linear_projection=True,
                upcast_attention=True,  # these weights overflow in half-precision attention
            ),
            "vae": _vae(),
            "text_encoder": _text(1024, 23, 16, "gelu", 512),
        },
        PNDM,
        {"tokenizer": _tokenizer("!")},
        {},
    ),
    "sdxl": Family(
        "Stable Diffusion XL",
        {
            "unet": _unet(
                sample_size=128,
                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                block_out_channels=[320, 640, 1280],
                transformer_layers_per_block=[1, 2, 10],
                cross_attention_dim=2048,
                attention_head_dim=[5, 10, 20],
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "vae": _vae(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
            "text_encoder": CLIP_L,
            "text_encoder_2": _text(1280, 32, 20, "gelu", 1280),
        },
        {
            "_class_name": "EulerDiscreteScheduler",
            **BETAS,
            "prediction_type": "epsilon",
            "interpolation_type": "linear",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "use_karras_sigmas": False,
        },
        {"tokenizer": _tokenizer(END), "tokenizer_2": _tokenizer("!")},
        {"force_zeros_for_empty_prompt": True},
    ),
}


def describe(name: str, prediction: str, zero_snr: bool = False) -> Family:
    """Return a deep copy of a family with `prediction` as the prediction type, and with zero terminal SNR if `zero_snr`.

    Stable Diffusion 2 with v_prediction is 2.1, which generates 768 pixels; with epsilon it is 2.1-base, which generates 512
    pixels.
    """
    family = copy.deepcopy(FAMILIES[name])
    scheduler = family.scheduler
    if name == "sd2" and prediction == "v_prediction":
        family.components["unet"]["sample_size"] = 96
        family.components["vae"]["sample_size"] = 768
    if name != "sdxl" and prediction == "v_prediction":
        del scheduler["skip_prk_steps"]
        scheduler |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    scheduler["prediction_type"] = prediction
    if zero_snr:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return family


def family_of(unet_config: Mapping[str, Any]) -> str:
    """Return the family of a UNet's configuration. The width of the UNet does not matter."""
    if unet_config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if unet_config.get("use_linear_projection") else "sd1"


def network_class(component: str) -> Any:
    """Return the class of a component. A class name in a model's files is only compared with it, never imported."""
    if component == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel
    if component == "vae":
        from diffusers import AutoencoderKL

        return AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}[component]


def build(component: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a network with random weights on torch's default device (under `torch.device("meta")` it needs no memory)."""
    kind = network_class(component)
    network: nn.Module = kind(text_config(config)) if component.startswith("text") else kind.from_config(dict(config))
    return network


def text_config(config: Mapping[str, Any]) -> CLIPTextConfig:
    """Return a text encoder's configuration without the entries that select an implementation."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(**{key: value for key, value in config.items() if key in TEXT_KEYS})


@cache
def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """Return CLIP's tokenizer, built without a download from the vocabulary in open_clip. OpenCLIP's text encoders pad with "!"."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _words()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS, pad_token=pad_token)


def _words() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Return token -> id, and the merges. Order of ids: letters, letters that end a word, merges by rank, begin and end token."""
    package = importlib.util.find_spec("open_clip")  # find_spec avoids the import, which takes seconds
    assert package is not None and package.origin is not None, "open_clip_torch is a dependency"
    packed = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    letters = _letters()
    lines = gzip.decompress(packed).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 1 + WORDS - 2 - 2 * len(letters)]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), "<|startoftext|>", END]
    return {token: index for index, token in enumerate(tokens)}, merges


def _letters() -> list[str]:
    """Return a visible character for each of the 256 bytes, in CLIP's order: printable bytes unchanged, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
