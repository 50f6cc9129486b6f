"""One .safetensors file with UNet, VAE and text encoders under the names of the original (ldm) code, as other programs share models.

One table of names serves both directions: name in the diffusers or transformers network -> Place in the file. It is derived from the
description of the network, so it holds for any number of blocks and layers.

    unet            model.diffusion_model.
    vae             first_stage_model.                                            decoder blocks counted from the other end
    text_encoder    cond_stage_model.transformer.text_model.                      SD 1; names as in transformers
                    cond_stage_model.model.                                       SD 2; OpenCLIP: q, k and v in one matrix
                    conditioner.embedders.0.transformer.text_model.               SDXL
    text_encoder_2  conditioner.embedders.1.model.                                SDXL; OpenCLIP, with text_projection

OpenCLIP files of SD 2 hold 24 layers, of which every program uses 23, as does the description. Reading ignores the last. Writing
leaves it out: diffusers skips it, ComfyUI reports it as missing and goes on, stable-diffusion.cpp lists it as optional.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sidcli.errors import InputError
from sidcli.families import FAMILIES, TEXT_KEYS, build, describe, family_of
from sidcli.files import atomic_file

PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""What headers call the prediction -> what schedulers call it."""

ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd1", "v_prediction"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("sdxl", "v_prediction"): "stable-diffusion-xl-v1-base",
}

PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")},
    "sd2": {"text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model.")},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.",),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
}
"""Per family and component; the first is written, the others are met in files of other programs."""
for _family in PREFIXES.values():
    _family |= {"unet": ("model.diffusion_model.",), "vae": ("first_stage_model.",)}
UNET = "model.diffusion_model."

TITLES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
PROBES = {"unet": "conv_in.weight", "vae": "encoder.conv_in.weight"}
TOKENS = "embeddings.token_embedding.weight"
WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
WANTED = "pass a whole checkpoint of Stable Diffusion 1, 2 or XL, or a diffusers folder"
FLOATS = {"F64", "F32", "F16", "BF16"}

OTHERS = (
    (r"lora_|\.hada_|\.lokr_|\.oft_", "a LoRA, which changes a model and is none"),
    (r"^control_model\.|^controlnet_|^input_hint_block\.", "a ControlNet"),
    (r"motion_modules\.", "a motion module"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"(^|\.)double_blocks\.", "a Flux model"),
    (r"^edm_(mean|std)$|^edm_vpred\.", "a model of continuous (EDM) noise levels"),
    (r"^(emb_params|string_to_param|clip_[gl])(\.|$)", "a textual inversion"),
    (r"^(down_blocks|decoder\.up_blocks|encoder\.layers|text_model)\.", "one network out of a diffusers folder"),
    (r"^input_blocks\.", "a UNet alone"),
    (r"^decoder\.up\.", "a VAE alone"),
)
"""Tensor names that give other kinds of files away, searched in this order."""
INPUTS = {5: "a depth-to-image", 7: "an upscaling", 8: "an image-editing", 9: "an inpainting"}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: under `key`; `part` 0, 1 or 2 of rows shared by q, k and v; `turned`: transposed; `conv`: a matrix kept as a
    1x1 convolution."""

    key: str
    part: int | None = None
    turned: bool = False
    conv: bool = False

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
    "vae": {"conv_shortcut": "nin_shortcut"},
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
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    layers = list(layers) if isinstance(layers, list | tuple) else [layers] * levels
    block = 0
    for level in range(levels):
        for layer in range(layers[level]):
            block += 1
            names[f"down_blocks.{level}.resnets.{layer}."] = f"input_blocks.{block}.0."
            names[f"down_blocks.{level}.attentions.{layer}."] = f"input_blocks.{block}.1."
        if level < levels - 1:
            block += 1
            names[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{block}.0.op."
    block = 0
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers[levels - 1 - level] + 1):
            names[f"up_blocks.{level}.resnets.{layer}."] = f"output_blocks.{block}.0."
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
    """The same as places, with the layers inside each resnet spelled out."""
    places = {ours: Place(theirs) for ours, theirs in names.items()}
    for ours, theirs in names.items():
        if re.search(r"\.resnets\.\d+\.$", ours):
            places |= {f"{ours}{inner}.": Place(f"{theirs}{key}.") for inner, key in RESNET[component].items()}
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


def clip_places(config: Mapping[str, Any]) -> Places:
    return {"embeddings.": Place("embeddings."), "encoder.": Place("encoder."), "final_layer_norm.": Place("final_layer_norm.")}


def places_of(family: str, component: str, config: Mapping[str, Any]) -> Places:
    tables: dict[str, Callable[[Mapping[str, Any]], Places]] = {"unet": unet_places, "vae": vae_places}
    openclip = (family, component) in {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}
    return tables.get(component, openclip_places if openclip else clip_places)(config)


def locate(places: Places, name: str) -> Place | None:
    """The place of one tensor, None where the layout has none for it.

    `text_model.` is dropped first: transformers has written its text encoders with it and without.
    """
    name = name.removeprefix("text_model.")
    for end in range(len(name), 0, -1):
        if name[:end] in places:
            place = places[name[:end]]
            return replace(place, key=place.key + name[end:])
    return None


@dataclass(frozen=True)
class SingleFile:
    """A checked file: `configs` describes each component as its config.json would, `prefixes` says where it lies in this file."""

    path: Path
    family: str
    configs: dict[str, dict[str, Any]]
    scheduler_config: dict[str, Any]
    metadata: dict[str, str]
    prefixes: dict[str, str]

    def tensors(self, component: str) -> dict[str, Tensor]:
        """By the names, and in the shapes, of `families.build(component, configs[component])`; in the precision of the file.

        They are backed by the file, as a load_state_dict wants them.
        """
        with opened(self.path) as file:
            found = {}
            for name, (key, place, shape) in self._index(component).items():
                if place.part is None:
                    tensor = file.get_tensor(key)
                else:
                    rows = shape[0]
                    tensor = file.get_slice(key)[place.part * rows : (place.part + 1) * rows]
                found[name] = (tensor.T.contiguous() if place.turned else tensor).reshape(shape)
        return found

    def check(self) -> None:
        """Raises InputError where a component lacks a tensor or has one of another shape. Reads the header alone."""
        with opened(self.path) as file:
            present = set(file.keys())
            for component in self.configs:
                index = self._index(component)
                missing = sorted({key for key, _, _ in index.values()} - present)
                if missing:
                    raise InputError(
                        f"the {TITLES[component]} in {self.path} is not that of {FAMILIES[self.family].title}: "
                        f"{few(missing)} missing, of {len(index)} tensors",
                        "if it is a variant of this architecture, pass its descriptions with --config FOLDER",
                    )
                for key, place, shape in index.values():
                    part = file.get_slice(key)
                    if part.get_dtype() not in FLOATS:
                        raise InputError(f"{self.path} is quantized: {key} is kept as {part.get_dtype()}", WANTED)
                    if trimmed(part.get_shape()) != trimmed(place.shape(shape)):
                        raise InputError(
                            f"{key} in {self.path} has the shape {part.get_shape()}; {FAMILIES[self.family].title} has "
                            f"{place.shape(shape)}",
                            "if it is a variant of this architecture, pass its descriptions with --config FOLDER",
                        )

    def _index(self, component: str) -> dict[str, tuple[str, Place, list[int]]]:
        """Name in the network -> key in this file, place, shape in the network."""
        places = places_of(self.family, component, self.configs[component])
        try:
            with torch.device("meta"):
                network = build(component, self.configs[component])
        except Exception as error:  # libraries answer a stranger's description with any kind of error
            raise InputError(f"the description of the {TITLES[component]} of {self.path} makes no network: {error}") from error
        index = {}
        for name, tensor in network.state_dict().items():
            place = located(places, name, component)
            index[name] = (self.prefixes[component] + place.key, place, list(tensor.shape))
        return index


def located(places: Places, name: str, component: str) -> Place:
    place = locate(places, name)
    if place is None:
        raise InputError(
            f"the {TITLES[component]} has {name}, for which single files have no name", "use --format diffusers for this architecture"
        )
    return place


def trimmed(shape: Sequence[int]) -> list[int]:
    """Without ones at the end, by which a 1x1 convolution differs from a matrix."""
    shape = list(shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file by its header; nothing in it can run. Raises InputError where it is no safetensors file, or not all of one."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file: {error}", "download it again, or convert the model to safetensors"
        ) from error


def read(path: Path, config: Path | None = None, prediction: str | None = None) -> SingleFile:
    """Recognise a checkpoint and check every tensor of it by its header.

    Descriptions come from `config` (a diffusers folder, JSON files suffice), else from the header where `write` left them, else from
    the published family of the same text width. `prediction` overrides what they, the header or marker tensors say. Raises InputError
    for any other kind of file, with what it seems to be, and where nothing says what a Stable Diffusion 2 model predicts.
    """
    if prediction is not None and prediction not in PREDICTIONS.values():
        raise InputError(f"prediction type {prediction!r} is not supported", "teachers predict epsilon or v_prediction")
    with opened(path) as file:
        names = set(file.keys())
        metadata = dict(file.metadata() or {})
        widths = {name: file.get_slice(name).get_shape() for name in names if re.search(r"attn2\.to_k\.weight$", name)}
        channels = file.get_slice(f"{UNET}input_blocks.0.0.weight").get_shape() if f"{UNET}input_blocks.0.0.weight" in names else None
    refuse_others(path, names)
    if channels is None:
        raise InputError(f"{path} holds no model that sid knows: no tensor is named {UNET}input_blocks.0.0.weight", WANTED)
    if len(channels) == 4 and channels[1] in INPUTS:
        raise InputError(f"{path} is {INPUTS[channels[1]]} model: its UNet takes {channels[1]} channels, not 4", WANTED)
    described = from_folder(config) if config else from_header(path, metadata)
    if described is None:
        family = by_width(path, names, {shape[-1] for name, shape in widths.items() if name.startswith(UNET)})
        prediction = prediction or announced(names, metadata) or default_prediction(path, family)
        published = describe(family, prediction, prediction == "v_prediction" and "ztsnr" in names)
        described = published.components, published.scheduler
    configs, scheduler = described
    family = family_of(configs["unet"])
    scheduler = scheduler | ({"prediction_type": prediction} if prediction else {})
    found = SingleFile(path, family, configs, scheduler, metadata, prefixes_in(path, family, configs, names))
    found.check()
    return found


def refuse_others(path: Path, names: Iterable[str]) -> None:
    for pattern, kind in OTHERS:
        if any(re.search(pattern, name) for name in names):
            raise InputError(f"{path} is {kind}", WANTED)


def by_width(path: Path, names: set[str], widths: set[int]) -> str:
    """The published family whose text is as wide as the UNet's cross-attention."""
    if widths == {1280}:
        raise InputError(f"{path} is the refiner of Stable Diffusion XL, which finishes the images of another model", WANTED)
    if len(widths) != 1 or (width := min(widths)) not in WIDTHS:
        raise InputError(
            f"{path} is not Stable Diffusion 1, 2 or XL: its UNet reads text of width {sorted(widths)}, theirs is {sorted(WIDTHS)}",
            "pass the descriptions of its networks with --config FOLDER",
        )
    if WIDTHS[width] == "sd2" and f"{UNET}label_emb.0.0.weight" in names:
        raise InputError(f"{path} is Stable Diffusion 2 unCLIP, which is told an image besides the text", WANTED)
    return WIDTHS[width]


def announced(names: set[str], metadata: Mapping[str, str]) -> str | None:
    """The prediction by marker tensor, else by header. The marker goes first: programs act on it, while merges inherit stale headers."""
    if "v_pred" in names:
        return "v_prediction"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if metadata.get(key) in PREDICTIONS:
            return PREDICTIONS[metadata[key]]
    architecture = metadata.get("modelspec.architecture")
    return next((kind for (family, kind), name in ARCHITECTURES.items() if family == "sd2" and name == architecture), None)


def default_prediction(path: Path, family: str) -> str:
    if family == "sd2":
        raise InputError(
            f"{path} is Stable Diffusion 2, whose 512-pixel models predict epsilon and whose 768-pixel models predict v; "
            "their tensors are alike and nothing in the file says which it is",
            "pass --prediction-type epsilon or --prediction-type v_prediction",
        )
    return "epsilon"


def prefixes_in(path: Path, family: str, configs: Mapping[str, Any], names: set[str]) -> dict[str, str]:
    """Component -> the prefix it has in this file. Raises InputError for components that are missing."""
    prefixes, missing = {}, []
    for component, config in configs.items():
        probe = locate(places_of(family, component, config), PROBES.get(component, TOKENS))
        assert probe is not None
        prefix = next((prefix for prefix in PREFIXES[family][component] if prefix + probe.key in names), None)
        if prefix is None:
            missing.append(TITLES[component])
        else:
            prefixes[component] = prefix
    if missing:
        there = " and ".join(TITLES[component] for component in prefixes)
        raise InputError(f"{path} holds the {there} of {FAMILIES[family].title}, but no {' and no '.join(missing)}", WANTED)
    return prefixes


def needed(unet_config: Mapping[str, Any]) -> list[str]:
    return list(FAMILIES[family_of(unet_config)].components)


def from_folder(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Descriptions and scheduler out of the JSON files of a diffusers folder."""

    def content(*parts: str) -> dict[str, Any]:
        file = folder.joinpath(*parts)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}", "pass a diffusers folder of the same architecture") from error
        if not isinstance(found, dict):
            raise InputError(f"{file} is not a JSON object", "pass a diffusers folder of the same architecture")
        return found

    unet = content("unet", "config.json")
    configs = {component: content(component, "config.json") for component in needed(unet)}
    return {name: settings(name, config) for name, config in configs.items()}, content("scheduler", "scheduler_config.json")


def from_header(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]] | None:
    """What `write` left in the header, None for files of others."""
    if "sid.config" not in metadata:
        return None
    try:
        found = json.loads(metadata["sid.config"])
        configs = {component: settings(component, found[component]) for component in needed(found["unet"])}
        return configs, dict(found["scheduler"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the header of {path} is damaged: sid.config holds no descriptions", "pass --config FOLDER") from error


def settings(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A description without notes about where it came from, and without settings that choose an implementation."""
    text = component.startswith("text_encoder")
    return {key: value for key, value in config.items() if (key in TEXT_KEYS if text else not key.startswith("_"))}


def write(
    path: Path,
    components: Mapping[str, nn.Module],
    scheduler_config: Mapping[str, Any],
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """Write the networks unet, vae, text_encoder (and text_encoder_2) as one file; `path` appears whole or not at all.

    The header describes the networks and the scheduler (`sid.config`), so that `read` needs nothing else; `metadata` adds to it or
    replaces entries. Models that predict v get the marker tensors v_pred and ztsnr, by which ComfyUI and others know them. Raises
    InputError for a network that the layout has no names for.
    """
    configs = {name: settings(name, description(network)) for name, network in components.items()}
    family = family_of(configs["unet"])
    if set(components) != set(PREFIXES[family]):
        raise InputError(f"{FAMILIES[family].title} consists of {', '.join(needed(configs['unet']))}; given: {', '.join(components)}")
    tensors: dict[str, Tensor] = {}
    for component, network in components.items():
        tensors |= stored(family, component, configs[component], network.state_dict(), dtype)
    scheduler = {key: value for key, value in scheduler_config.items() if key == "_class_name" or not key.startswith("_")}
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)
        if scheduler.get("rescale_betas_zero_snr"):
            tensors["ztsnr"] = torch.zeros(0)
    pixels = configs["unet"]["sample_size"] * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[family, prediction],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.resolution": f"{pixels}x{pixels}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        "sid.config": json.dumps({**configs, "scheduler": scheduler}, sort_keys=True),
        **metadata,
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, header)


def description(network: nn.Module) -> dict[str, Any]:
    config: Any = network.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def stored(
    family: str, component: str, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of one network as they lie in a file, on the CPU."""
    places, prefix = places_of(family, component, config), PREFIXES[family][component][0]
    found: dict[str, Tensor] = {}
    shared: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        place = located(places, name, component)
        tensor = value.detach().to("cpu", dtype)
        if place.part is not None:
            shared.setdefault(prefix + place.key, {})[place.part] = tensor
            continue
        tensor = tensor.T if place.turned else tensor.reshape(place.shape(tensor.shape))
        found[prefix + place.key] = tensor.contiguous()
    return found | {key: torch.cat([parts[index] for index in range(3)]) for key, parts in shared.items()}


def comfyui_workflow(
    checkpoint_name: str,
    sigmas: Sequence[float],
    width: int,
    height: int,
    prompt: str,
    seed: int,
    prediction: str = "epsilon",
    zero_snr: bool = False,
) -> dict[str, Any]:
    """A workflow for ComfyUI's "Open", of core nodes only, that draws as `sid sample` does: Euler from sigmas[0] over the others to 0.

    ComfyUI guesses from the weights what a Stable Diffusion 2 model predicts, and takes any SD 1 for epsilon; ModelSamplingDiscrete
    tells it.
    """
    steps = ", ".join([*(f"{sigma:.6f}" for sigma in sigmas), "0"])  # ManualSigmas reads no exponents
    sampling = {"epsilon": "eps"}.get(prediction, prediction)
    model, text, noise = "MODEL", "CLIP", "LATENT"
    nodes: list[tuple[str, list[Any], list[tuple[str, str, int]], list[str]]] = [
        # type, widgets, inputs (name, type, node it comes from), outputs
        ("CheckpointLoaderSimple", [checkpoint_name], [], [model, text, "VAE"]),
        ("ModelSamplingDiscrete", [sampling, zero_snr], [("model", model, 1)], [model]),
        ("CLIPTextEncode", [prompt], [("clip", text, 1)], ["CONDITIONING"]),
        ("CLIPTextEncode", [""], [("clip", text, 1)], ["CONDITIONING"]),
        ("EmptyLatentImage", [width, height, 1], [], [noise]),
        ("KSamplerSelect", ["euler"], [], ["SAMPLER"]),
        ("ManualSigmas", [steps], [], ["SIGMAS"]),
        (
            "SamplerCustom",
            [True, seed, "fixed", 1.0],
            [
                ("model", model, 2),
                ("positive", "CONDITIONING", 3),
                ("negative", "CONDITIONING", 4),
                ("sampler", "SAMPLER", 6),
                ("sigmas", "SIGMAS", 7),
                ("latent_image", noise, 5),
            ],
            [noise, noise],
        ),
        ("VAEDecode", [], [("samples", noise, 8), ("vae", "VAE", 1)], ["IMAGE"]),
        ("SaveImage", ["sid"], [("images", "IMAGE", 9)], []),
    ]
    columns = [0, 1, 1, 1, 1, 1, 1, 2, 3, 4]
