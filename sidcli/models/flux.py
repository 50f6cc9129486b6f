"""Transformers of FLUX.1 (dev and schnell), trained by flow matching, with a pooled projection of CLIP and the states of T5.

The network reads latents as tokens of 2 x 2. FLUX.1 dev has its guidance built in: the guidance scale is an input (arXiv 2210.03142),
so that guidance needs no empty prompt and no second half of a batch. FLUX.1 schnell has no such input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sidcli.diffusion.path import FlowPath
from sidcli.errors import InputError
from sidcli.models import flow, t5, tokenizers
from sidcli.models.card import MAX_SHIFT
from sidcli.models.compatibility import ACCEPTED, OTHER_COPY, SUPPORTED_VALUES, Rules, is_number, positive_integer, value_text
from sidcli.models.kind import Cond, Denoise, tokenizer_of
from sidcli.models.ldm import Place, Places, block_places
from sidcli.models.transformer import Tokens, Transformer, check_latents, check_outputs, check_states

CLIP, T5 = "text_encoder", "text_encoder_2"
PATCH = 2
"""Latents of a token in each direction."""
GUIDANCE = "guidance"
"""Name of the guidance scale [B, 1] in the cond of FLUX.1 dev. That of an encoded prompt is 1, at which students and fake scores run."""
DYNAMIC: Mapping[str, float] = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
"""Entries of the scheduler's configuration for shifts that depend on the size of an image, with their defaults."""
WIDTH = 3072
"""Channels of the transformers of published models, which programs assume for single files."""
SIZES: Mapping[str, Any] = {
    "in_channels": 64,
    "num_attention_heads": 24,
    "attention_head_dim": WIDTH // 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
"""Entries of a transformer's configuration with the values of published models."""
LAYERS = {
    "time_text_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_text_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
    "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
    "time_text_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_text_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "context_embedder.": "txt_in.",
    "x_embedder.": "img_in.",
    "proj_out.": "final_layer.linear.",
}
"""Layer outside of the blocks -> its name in the original code (model.py of Black Forest Labs)."""
BLOCK = {
    "norm1.linear.": "img_mod.lin.",
    "norm1_context.linear.": "txt_mod.lin.",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
    "ff.net.0.proj.": "img_mlp.0.",
    "ff.net.2.": "img_mlp.2.",
    "ff_context.net.0.proj.": "txt_mlp.0.",
    "ff_context.net.2.": "txt_mlp.2.",
}
"""Layer of a block of text and image -> its name in the original code."""
JOINED = {
    "img_attn.qkv.": ("attn.to_q.", "attn.to_k.", "attn.to_v."),
    "txt_attn.qkv.": ("attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."),
}
"""Layer of such a block in the original code -> the layers of which it has the rows, in order."""
SINGLE_BLOCK = {
    "norm.linear.": "modulation.lin.",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out.": "linear2.",
}
SINGLE_JOINED = {"linear1.": ("attn.to_q.", "attn.to_k.", "attn.to_v.", "proj_mlp.")}
"""The same of the blocks that follow."""
RULES = Rules(
    ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    flow.SCHEDULERS,
    flow.HINT,
    {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"},
    {
        "transformer": frozenset(
            {
                *("in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads"),
                *("joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope"),
            }
        ),
        "vae": ACCEPTED["vae"] | {"shift_factor"},
        "scheduler": flow.ACCEPTED - {"time_shift_type"} | {"use_dynamic_shifting"},
    },
    {
        "transformer": {"patch_size": ((1,), "tokens of 2 x 2 latents are packed before the transformer")},
        "vae": {entry: rule for entry, rule in SUPPORTED_VALUES["vae"].items() if entry != "shift_factor"},
        CLIP: SUPPORTED_VALUES["text_encoder"],
        T5: t5.VALUES,
        "scheduler": {entry: rule for entry, rule in flow.VALUES.items() if entry != "use_dynamic_shifting"}
        | {"time_shift_type": (("exponential", None), flow.SIGMAS)},
    },
)


class Flux(Transformer):
    models = "a FLUX.1 model"
    formats = ("diffusers", "single-file", "lora")
    texts = (CLIP, T5)
    text_classes: ClassVar = {CLIP: "CLIPTextModel", T5: "T5EncoderModel"}
    tokenizers: ClassVar = {tokenizer_of(CLIP): tokenizers.CLASSES, tokenizer_of(T5): t5.CLASSES}
    rules = RULES
    architecture = (
        *("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim"),
        *("pooled_projection_dim", "in_channels", "guidance_embeds", "axes_dims_rope"),
    )
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    )  # attention and feed-forward, and the last layer, which has the name of one of them
    default_side = 128

    def pipeline(self, texts: Sequence[str]) -> Any:
        from diffusers import FluxPipeline

        return FluxPipeline

    def call_options(self, config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """Return the arguments of the stock pipeline, whose default size does not depend on the model."""
        sides = (
            {} if self.latent_shape(config)[1:] == (self.default_side,) * 2 else dict(zip(("height", "width"), size, strict=True))
        )
        if config.get("guidance_embeds"):
            return sides | {"guidance_scale": 1}
        return sides | {"guidance_scale": 0, "max_sequence_length": self.text_tokens(config)}

    def index_entries(self, model: Any) -> dict[str, Any]:
        return {}

    def text_names(self, index: Mapping[str, Any], place: str) -> list[str]:
        return list(self.texts)

    def read_path(self, scheduler: Mapping[str, Any], config: Mapping[str, Any]) -> FlowPath:
        flow.check_prediction(scheduler, self.models)
        steps, shift = scheduler.get("num_train_timesteps", 1000), float(scheduler.get("shift", 1.0))
        if scheduler.get("use_dynamic_shifting"):
            _, height, width = self.latent_shape(config)
            shift = dynamic_shift(scheduler, (height // PATCH) * (width // PATCH))
        return FlowPath(steps, shift, even=True)

    def check_schedule(self, place: str, scheduler: Mapping[str, Any]) -> None:
        flow.check_schedule(place, scheduler)
        for entry, default in DYNAMIC.items():
            if not is_number(value := scheduler.get(entry, default)):
                raise InputError(f"{place}: {entry} is {value_text(value)}; it must be a number", OTHER_COPY)

    def check_fit(self, name: str, networks: Mapping[str, Mapping[str, Any]], places: Mapping[str, str]) -> None:
        net, place = networks[self.component], places[self.component]
        packed = positive_integer(net, "in_channels", place)
        check_latents(name, packed // PATCH**2, networks["vae"], places["vae"])
        check_outputs(net, place, packed)
        check_states(name, net, "joint_attention_dim", networks[T5], (place, places[T5]))
        pooled = positive_integer(net, "pooled_projection_dim", place)
        given = positive_integer(networks[CLIP], "hidden_size", places[CLIP])
        if pooled != given:
            raise InputError(f"{name}: pooled_projection_dim is {pooled}, and the CLIP text encoder gives {given}", OTHER_COPY)

    def places(self, config: Mapping[str, Any]) -> Places:
        places = {name: Place(key) for name, key in LAYERS.items()}
        places["norm_out.linear."] = Place("final_layer.adaLN_modulation.1.", swapped=True)
        for block in range(config["num_layers"]):
            places |= block_places(f"transformer_blocks.{block}.", f"double_blocks.{block}.", BLOCK, JOINED)
        for block in range(config["num_single_layers"]):
            places |= block_places(f"single_transformer_blocks.{block}.", f"single_blocks.{block}.", SINGLE_BLOCK, SINGLE_JOINED)
        return places

    def single_file_problem(self, config: Mapping[str, Any]) -> str:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if width == WIDTH:
            return ""
        return f"programs read single files of transformers of {WIDTH} channels, and this one has {width}"

    def in_comfyui(self, config: Mapping[str, Any]) -> bool:
        """Return whether the transformer has the sizes of published models, which ComfyUI assumes, other than its number of blocks."""
        return all(
            tuple(config[entry]) == value if isinstance(value, tuple) else config[entry] == value for entry, value in SIZES.items()
        )

    def usual_guidance(self, config: Mapping[str, Any]) -> float:
        return 3.5 if config.get("guidance_embeds") else 1.0

    # Sizes

    def patch(self, config: Mapping[str, Any], place: str) -> int:
        return PATCH

    def frame_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        channels, height, width = super().frame_shape(config)
        return channels // PATCH**2, height, width

    # Text

    def text_tokens(self, config: Mapping[str, Any]) -> int:
        return 512 if config.get("guidance_embeds") else 256

    def cond(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tokens], config: Mapping[str, Any]) -> Cond:
        cond = Cond(encoders[T5](tokens[T5].ids)[0], {"pooled_projections": encoders[CLIP](tokens[CLIP].ids).pooler_output})
        return with_guidance(cond, 1.0) if config.get("guidance_embeds") else cond

    def meta_cond(self, networks: Mapping[str, Mapping[str, Any]]) -> Cond:
        config = networks[self.component]
        states = torch.empty(1, self.text_tokens(config), config["joint_attention_dim"], device="meta")
        cond = Cond(states, {"pooled_projections": torch.empty(1, config["pooled_projection_dim"], device="meta")})
        return with_guidance(cond, 1.0) if config.get("guidance_embeds") else cond

    # The denoiser

    def denoise(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = (side // PATCH for side in x.shape[2:])
        packed = functional.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)
        predicted: Tensor = net(
            packed,
            cond.states,
            cond.added["pooled_projections"],
            t / 1000,
            positions(height, width, x.device),
            torch.zeros(cond.states.shape[1], 3, device=x.device),
            cond.added[GUIDANCE].flatten() if GUIDANCE in cond.added else None,
        ).sample
        return functional.pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), PATCH)

    def guided(self, denoise: Denoise, x_t: Tensor, t: Tensor, cond: Cond, empty: Cond, scales: Sequence[float]) -> list[Tensor]:
        """Return predictions under guidance. A scale above 0 is an input of FLUX.1 dev; the empty prompt is not used.

        Other scales, which no network was trained with, combine the predictions for the prompt and the empty prompt at an input of 1.
        """
        if GUIDANCE not in cond.added:
            return super().guided(denoise, x_t, t, cond, empty, scales)
        found = {
            scale: denoise(x_t, t, with_guidance(cond, scale))
            if scale > 0
            else super(Flux, self).guided(denoise, x_t, t, cond, empty, (scale,))[0]
            for scale in dict.fromkeys(scales)
        }
        return [found[scale] for scale in scales]

    def rows(self, config: Mapping[str, Any], scales: Sequence[float]) -> int:
        if not config.get("guidance_embeds"):
            return super().rows(config, scales)
        return sum(1 if scale > 0 else super(Flux, self).rows(config, (scale,)) for scale in set(scales))

    def blocks(self, net: Any) -> list[nn.Module]:
        return [*net.transformer_blocks, *net.single_transformer_blocks]

    def recomputed(self) -> tuple[type[nn.Module], ...]:
        from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

        return FluxTransformerBlock, FluxSingleTransformerBlock


FLUX = Flux()


def dynamic_shift(scheduler: Mapping[str, Any], tokens: int) -> float:
    """Return the shift of the timesteps for images of this many tokens: e^mu with mu linear in the tokens, as FluxPipeline computes it.

    Raises InputError if the shift is far from that of published sizes.
    """
    base, most, low, high = ({**DYNAMIC, **scheduler}[entry] for entry in DYNAMIC)
    mu = low + (high - low) * (tokens - base) / (most - base)
    if abs(mu) > math.log(MAX_SHIFT):
        raise InputError(
            f"images of {tokens} tokens have a shift of e^{mu:.3g}; it must be at least 1 / {MAX_SHIFT} and at most {MAX_SHIFT}",
            "another --width or --height",
        )
    return round(math.exp(mu), 9)  # the card of a student names it, and libraries differ in the last digits of an exponential


def with_guidance(cond: Cond, scale: float) -> Cond:
    """Return the cond with this guidance scale as the input of FLUX.1 dev."""
    guidance = torch.full((len(cond), 1), scale, device=cond.states.device)
    return dataclasses.replace(cond, added={**cond.added, GUIDANCE: guidance})


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """Return the positions [height * width, 3] of the tokens of an image: 0, row and column."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in (1, height, width))).float()
