"""Transformers of PixArt-Sigma (arXiv 2403.04692): a discrete diffusion that predicts epsilon, with T5 as the only text encoder.

The network also predicts the variance of a step. DDIM does not use it, and neither does the stock pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sidcli.diffusion.path import DiscretePath
from sidcli.errors import InputError
from sidcli.models import compatibility, t5
from sidcli.models.compatibility import OTHER_MODEL, SUPPORTED_VALUES, Rules, positive_integer
from sidcli.models.kind import Cond
from sidcli.models.transformer import Tokens, Transformer, check_latents, check_outputs, check_square, check_states, keep_positions
from sidcli.models.unet import read_path

TEXT = "text_encoder"
T5_TOKENS = 300
SIZES = "image sizes are an input of PixArt-alpha, which sid does not give"
RULES = Rules(
    ("PixArtSigmaPipeline",),
    compatibility.SCHEDULERS,
    compatibility.DISCRETE.scheduler_hint,
    {"transformer": "PixArtTransformer2DModel", "vae": "AutoencoderKL"},
    {
        "transformer": frozenset(
            {
                *("sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim"),
                *("num_attention_heads", "dropout", "norm_num_groups", "cross_attention_dim", "attention_bias", "activation_fn"),
                *("num_embeds_ada_norm", "upcast_attention", "norm_type", "norm_elementwise_affine", "norm_eps"),
                *("interpolation_scale", "caption_channels"),
            }
        ),
        "vae": compatibility.ACCEPTED["vae"],
        "scheduler": compatibility.ACCEPTED["scheduler"],
    },
    {
        "transformer": {
            "use_additional_conditions": ((False, None), SIZES),
            "attention_type": (("default", None), "boxes and phrases are inputs that sid cannot give"),
        },
        "vae": SUPPORTED_VALUES["vae"],
        TEXT: t5.VALUES,
        "scheduler": SUPPORTED_VALUES["scheduler"],
    },
)


class PixArt(Transformer):
    models = "a PixArt-Sigma model"
    texts = (TEXT,)
    text_classes: ClassVar = {TEXT: "T5EncoderModel"}
    tokenizers: ClassVar = {"tokenizer": t5.CLASSES}
    rules = RULES
    architecture = (
        *("num_layers", "attention_head_dim", "num_attention_heads", "cross_attention_dim", "caption_channels"),
        *("in_channels", "out_channels", "patch_size"),
    )
    formats = ("diffusers",)
    missing_formats: ClassVar = {
        "lora": "its stock pipeline reads no LoRA",
        "single-file": "diffusers reads no single file of its transformer",
    }
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")  # attention and feed-forward
    size_entries = ("sample_size", "interpolation_scale")
    is_square = True
    former_classes: ClassVar = {"transformer": "Transformer2DModel"}

    def pipeline(self, texts: Sequence[str]) -> Any:
        from diffusers import PixArtSigmaPipeline

        return PixArtSigmaPipeline

    def call_options(self, config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """Return the arguments of the stock pipeline, which by default draws published sizes only and rewrites prompts."""
        return super().call_options(config, size) | {"use_resolution_binning": False, "clean_caption": False}

    def index_entries(self, model: Any) -> dict[str, Any]:
        return {}

    def text_names(self, index: Mapping[str, Any], place: str) -> list[str]:
        return [TEXT]

    def read_path(self, scheduler: Mapping[str, Any], config: Mapping[str, Any]) -> DiscretePath:
        return read_path(scheduler)

    def check_schedule(self, place: str, scheduler: Mapping[str, Any]) -> None:
        compatibility.check_schedule(place, scheduler)

    def check_fit(self, name: str, networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str]) -> None:
        net, place = networks[self.component], places[self.component]
        channels = positive_integer(net, "in_channels", place)
        check_latents(name, channels, networks["vae"], places["vae"])
        check_outputs(net, place, 2 * channels, channels)
        check_square(name, net)
        if (
            net.get("use_additional_conditions") is None and net["sample_size"] == 128
        ):  # the default of diffusers at this size is true
            raise InputError(f"{place}: use_additional_conditions is missing: {SIZES}", OTHER_MODEL)
        check_states(name, net, "caption_channels", networks[TEXT], (place, places[TEXT]))

    def usual_guidance(self, config: Mapping[str, Any]) -> float:
        return 4.5

    def resized(self, config: Mapping[str, Any], size: int | list[int]) -> dict[str, Any]:
        before = config.get("sample_size")
        default = max(before // 64, 1) if isinstance(before, int) else None
        return keep_positions(config, super().resized(config, size), default)

    def text_tokens(self, config: Mapping[str, Any]) -> int:
        return T5_TOKENS

    def prepared(self, prompt: str) -> str:
        return prompt.lower().strip()

    def cond(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tokens], config: Mapping[str, Any]) -> Cond:
        """Return the states of T5, and the mask of the tokens that they belong to."""
        ids, mask = tokens[TEXT]
        # transformers reads the values of the mask, which a tensor on the meta device does not have
        states = encoders[TEXT](ids, attention_mask=None if mask.is_meta else mask)[0]
        return Cond(states, {"encoder_attention_mask": mask})

    def meta_cond(self, networks: Mapping[str, Mapping[str, Any]]) -> Cond:
        states = torch.empty(1, T5_TOKENS, networks[self.component]["caption_channels"], device="meta")
        return Cond(states, {"encoder_attention_mask": torch.empty(1, T5_TOKENS, device="meta")})

    def denoise(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        predicted: Tensor = net(x, cond.states, timestep=t, **cond.added).sample
        return predicted[:, : x.shape[1]]  # the channels behind them are the variance

    def recomputed(self) -> tuple[type[nn.Module], ...]:
        from diffusers.models.attention import BasicTransformerBlock

        return (BasicTransformerBlock,)


PIXART = PixArt()
