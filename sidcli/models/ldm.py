"""Tensor names of Stable Diffusion 1, 2 and XL in the original (ldm) code, and what all tables of such names share.

One table is used for reading and writing: name in the diffusers or transformers network -> Place in the file. It is computed from
the configuration of the network, so it holds for any number of levels and layers.

    unet            model.diffusion_model.                            blocks numbered across all levels
    vae             first_stage_model.                                levels of the decoder numbered in reverse order
    text_encoder    cond_stage_model.transformer.text_model.          SD 1, named as in transformers
                    cond_stage_model.model.                           SD 2, named as in OpenCLIP: one matrix for q, k and v
                    conditioner.embedders.0.transformer.text_model.   SDXL
    text_encoder_2  conditioner.embedders.1.model.                    SDXL, OpenCLIP with text_projection

Published files of SD 2 contain 24 text encoder layers. Every program uses the first 23, the number in the configuration. Reading
ignores the last layer, and writing omits it: diffusers skips it, ComfyUI reports that it is missing and continues,
stable-diffusion.cpp lists it as optional.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sidcli.errors import InputError

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
"""Family -> component -> its prefixes. sid writes the first one; files of other programs can have the second one."""
OPENCLIP = {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}
"""Text encoders with the tensor names of OpenCLIP. The others have those of transformers."""


@dataclass(frozen=True)
class Place:
    """The location of one tensor in the file: its key, and how the file stores it."""

    key: str
    part: int | None = None
    """0, 1 or 2: the tensor is the q, k or v rows of one matrix in the file. The single blocks of FLUX.1 have a part 3 of other size."""
    transposed: bool = False
    """Whether the tensor is transposed in the file."""
    conv: bool = False
    """Whether the tensor is a matrix in the network and a 1x1 convolution in the file."""
    swapped: bool = False
    """Whether the file has the second half of the rows before the first. The last layers of transformers compute a scale and a shift in
    diffusers, a shift and a scale in the original code."""

    def shape(self, shape: Sequence[int]) -> list[int]:
        """Return the shape in the file of a tensor that has `shape` in the network."""
        if self.part is not None:
            return [3 * shape[0], *shape[1:]]
        if self.conv and len(shape) == 2:
            return [*shape, 1, 1]
        return list(reversed(shape)) if self.transposed else list(shape)


Places = dict[str, Place]
"""Prefix of a name in the network -> Place with the prefix of its key. The longest matching prefix is used."""

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
    """Return a UNet's table. ldm numbers one block per layer and per downsampler; a block is [resnet, attention, upsampler]."""
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
    """Convert a table of names to Places. Each resnet becomes one entry per layer."""
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
    places = {"text_projection.weight": Place("text_projection", transposed=True)}
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
    """Return the table of one component, with `prefix` before each key."""
    if component == "unet":
        places = unet_places(config)
    elif component == "vae":
        places = vae_places(config)
    else:
        places = openclip_places(config) if (family, component) in OPENCLIP else clip_places()
    return {name: replace(place, key=prefix + place.key) for name, place in places.items()}


def locate(places: Places, name: str) -> Place | None:
    """Return the place of a tensor, or None if the layout has no name for it.

    The prefix `text_model.` is removed first, because some versions of transformers use it in text encoders and others do not.
    """
    name = name.removeprefix("text_model.")
    for end in range(len(name), 0, -1):
        if name[:end] in places:
            place = places[name[:end]]
            return replace(place, key=place.key + name[end:])
    return None


def block_places(ours: str, theirs: str, layers: Mapping[str, str], joined: Mapping[str, Sequence[str]]) -> Places:
    """Return the places of a block, whose prefix is `ours` in the network and `theirs` in the file.

    `layers` maps layers to their keys, `joined` keys to the layers of which they have the rows, in order.
    """
    places = {ours + name: Place(theirs + key) for name, key in layers.items()}
    parts = [(name, Place(theirs + key, part=part)) for key, names in joined.items() for part, name in enumerate(names)]
    return places | {ours + name: place for name, place in parts}


def arranged(tensors: Mapping[str, Tensor], places: Mapping[str, Place], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a network under their keys in the file, on the CPU. `places` has the place of each name."""
    found: dict[str, Tensor] = {}
    shared: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: places[item[0]].part or 0):
        place, tensor = places[name], tensor.detach().to("cpu", dtype)
        if place.part is not None:
            shared.setdefault(place.key, []).append(tensor)
        elif place.swapped:
            found[place.key] = tensor.roll(len(tensor) // 2, 0)
        else:
            found[place.key] = (tensor.T if place.transposed else tensor.reshape(place.shape(tensor.shape))).contiguous()
    return found | {key: torch.cat(parts) for key, parts in shared.items()}


def located(places: Places, names: Iterable[str], title: str) -> dict[str, Place]:
    """Return the place of each tensor of a network. Raises InputError, naming the network `title`, if the layout has none for one."""
    found = {}
    for name in names:
        place = locate(places, name)
        if place is None:
            raise InputError(f"the {title} has {name}, for which single files have no name", "use --format diffusers")
        found[name] = place
    return found
