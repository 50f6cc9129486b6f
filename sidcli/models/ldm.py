"""The names of the original (ldm) code for the tensors of Stable Diffusion.

One table serves both directions: name in the diffusers or transformers network -> Place in the file. It is derived from the
description of the network, so it holds for any number of levels and layers.

    unet            model.diffusion_model.                            blocks numbered through, over all levels
    vae             first_stage_model.                                levels of the decoder counted from the other end
    text_encoder    cond_stage_model.transformer.text_model.          SD 1, named as in transformers
                    cond_stage_model.model.                           SD 2, named as in OpenCLIP: one matrix for q, k and v
                    conditioner.embedders.0.transformer.text_model.   SDXL
    text_encoder_2  conditioner.embedders.1.model.                    SDXL, OpenCLIP with text_projection

Published files of SD 2 hold 24 layers of text encoder, of which every program uses 23, as many as the description has. Reading
ignores the last one. Writing leaves it out: diffusers skips it, ComfyUI notes its absence and goes on, stable-diffusion.cpp lists
it as optional.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

UNET = "model.diffusion_model."
VAE = "first_stage_model."
PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd1": {
        "unet": (UNET,),
        "vae": (VAE,),
        "text_encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    },
    "sd2": {
        "unet": (UNET,),
        "vae": (VAE,),
        "text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    },
    "sdxl": {
        "unet": (UNET,),
        "vae": (VAE,),
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.",),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
}
"""Family -> component -> its prefix. Where there are two, the first is written; the other is met in files of other programs."""
OPENCLIP = {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}
"""Text encoders under the names of OpenCLIP; the others keep those of transformers."""


@dataclass(frozen=True)
class Place:
    key: str
    part: int | None = None
    """0, 1 or 2: the rows of q, k or v in a matrix of all three."""
    turned: bool = False
    """Transposed in the file."""
    conv: bool = False
    """A matrix in the network, a 1x1 convolution in the file."""

    def shape(self, shape: Sequence[int]) -> list[int]:
        """The shape in the file of a tensor that has `shape` in the network."""
        if self.part is not None:
            return [3 * shape[0], *shape[1:]]
        if self.conv and len(shape) == 2:
            return [*shape, 1, 1]
        return list(reversed(shape)) if self.turned else list(shape)


Places = dict[str, Place]
"""Start of a name in the network -> the start of its key. The longest start that fits decides."""

RESNET = {
    "unet": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "vae": {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"},
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_places(config: Mapping[str, Any]) -> Places:
    """ldm counts one block per layer, and one more per change of size on the way down; a block is [resnet, attention, upsampler]."""
    names = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    down, up, layers = config["down_block_types"], config["up_block_types"], config["layers_per_block"]
    layers = list(layers) if isinstance(layers, list | tuple) else [layers] * len(down)
    block = 0
    for level, kind in enumerate(down):
        for layer in range(layers[level]):
            block += 1
            names[f"down_blocks.{level}.resnets.{layer}."] = f"input_blocks.{block}.0."
            if "CrossAttn" in kind:
                names[f"down_blocks.{level}.attentions.{layer}."] = f"input_blocks.{block}.1."
        if level < len(down) - 1:
            block += 1
            names[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{block}.0.op."
    block = 0
    for level, kind in enumerate(up):
        for layer in range(layers[len(up) - 1 - level] + 1):
            names[f"up_blocks.{level}.resnets.{layer}."] = f"output_blocks.{block}.0."
            if "CrossAttn" in kind:
                names[f"up_blocks.{level}.attentions.{layer}."] = f"output_blocks.{block}.1."
            block += 1
        position = 2 if "CrossAttn" in kind else 1
        names[f"up_blocks.{level}.upsamplers.0.conv."] = f"output_blocks.{block - 1}.{position}.conv."
    return with_resnets(names, "unet")


def vae_places(config: Mapping[str, Any]) -> Places:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    names = {"quant_conv.": "quant_conv.", "post_quant_conv.": "post_quant_conv."}
    places: Places = {}
    for half in ("encoder", "decoder"):
        names |= {f"{half}.conv_in.": f"{half}.conv_in.", f"{half}.conv_out.": f"{half}.conv_out."}
        names |= {f"{half}.conv_norm_out.": f"{half}.norm_out."}
        names |= {f"{half}.mid_block.resnets.{index}.": f"{half}.mid.block_{index + 1}." for index in (0, 1)}
        for ours, theirs in VAE_ATTENTION.items():
            places[f"{half}.mid_block.attentions.0.{ours}."] = Place(f"{half}.mid.attn_1.{theirs}.", conv=True)
    for level in range(levels):
        for layer in range(layers):
            names[f"encoder.down_blocks.{level}.resnets.{layer}."] = f"encoder.down.{level}.block.{layer}."
        names[f"encoder.down_blocks.{level}.downsamplers.0.conv."] = f"encoder.down.{level}.downsample.conv."
        up = levels - 1 - level
        for layer in range(layers + 1):
            names[f"decoder.up_blocks.{up}.resnets.{layer}."] = f"decoder.up.{level}.block.{layer}."
        names[f"decoder.up_blocks.{up}.upsamplers.0.conv."] = f"decoder.up.{level}.upsample.conv."
    return with_resnets(names, "vae") | places


def with_resnets(names: dict[str, str], component: str) -> Places:
    """The same as places, with resnets spelled out to their layers."""
    places: Places = {}
    for ours, theirs in names.items():
        inside = RESNET[component] if re.search(r"\.resnets\.\d+\.$", ours) else {}
        places |= {f"{ours}{layer}.": Place(f"{theirs}{key}.") for layer, key in inside.items()} or {ours: Place(theirs)}
    return places


def openclip_places(config: Mapping[str, Any]) -> Places:
    names = {
        "embeddings.token_embedding.": "token_embedding.",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.": "ln_final.",
    }
    places = {"text_projection.weight": Place("text_projection", turned=True)}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
        inner |= {"self_attn.out_proj": "attn.out_proj"}
        names |= {f"{ours}{name}.": f"{theirs}{key}." for name, key in inner.items()}
        for part, letter in enumerate("qkv"):
            places[f"{ours}self_attn.{letter}_proj."] = Place(f"{theirs}attn.in_proj_", part=part)
    return {ours: Place(theirs) for ours, theirs in names.items()} | places


def clip_places() -> Places:
    return {start: Place(start) for start in ("embeddings.", "encoder.", "final_layer_norm.")}


def places_of(family: str, component: str, config: Mapping[str, Any], prefix: str) -> Places:
    """The table of one component, under `prefix`."""
    if component == "unet":
        places = unet_places(config)
    elif component == "vae":
        places = vae_places(config)
    else:
        places = openclip_places(config) if (family, component) in OPENCLIP else clip_places()
    return {name: replace(place, key=prefix + place.key) for name, place in places.items()}


def locate(places: Places, name: str) -> Place | None:
    """The place of one tensor, None where the layout has none for it.

    `text_model.` is dropped first: transformers has named its text encoders with it and without.
    """
    name = name.removeprefix("text_model.")
    for end in range(len(name), 0, -1):
        if name[:end] in places:
            place = places[name[:end]]
            return replace(place, key=place.key + name[end:])
    return None
