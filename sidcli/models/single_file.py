"""Read and write one .safetensors file with all networks of a model, under the names of the original (ldm) code.

Other programs share models in this format. Their files contain little information about the networks and no reliable prediction
type; `read` infers both or raises InputError. Files that sid writes contain both in their header.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sidcli.errors import InputError, first_line
from sidcli.files import NOT_READ, atomic_file, read_bytes, read_json, save_tensors
from sidcli.models.compatibility import check_entries, check_schedule, check_scheduler_class
from sidcli.models.families import FAMILIES, TEXT_KEYS, build, describe, family_of
from sidcli.models.ldm import OPENCLIP, PREFIXES, UNET, Place, arranged, located, places_of
from sidcli.models.sources import check_links

PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""Prediction type in a header -> prediction type of a scheduler."""
SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
"""Class in a .yaml of SDXL's original code -> prediction type of a scheduler."""
ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd1", "v_prediction"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("sdxl", "v_prediction"): "stable-diffusion-xl-v1-base",
}
"""(Family, prediction type) -> architecture in the model specification that programs write to headers (modelspec.*)."""

OTHER_KINDS = (
    (r"lora_|lycoris_|\.hada_|\.lokr_|\.oft_", "a LoRA: weights that change another model"),
    (r"^control_model\.|^controlnet_|^input_hint_block\.", "a ControlNet"),
    (r"motion_modules\.", "a motion module"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"(^|\.)double_blocks\.", "a Flux model"),
    (r"^edm_(mean|std)$|^edm_vpred\.", "a model of continuous (EDM) noise levels"),
    (r"^(emb_params|string_to_param|clip_[gl])(\.|$)", "a textual inversion: an embedding for another model"),
    (r"^(down_blocks|decoder\.up_blocks|encoder\.layers|text_model)\.", "one network out of a diffusers folder"),
    (r"^input_blocks\.", "a UNet alone"),
    (r"^decoder\.up\.", "a VAE alone"),
)
"""(Pattern of tensor names, kind of file) of unsupported files, searched in this order."""
CHANNELS = {5: "a depth-to-image", 7: "an upscaling", 8: "an image-editing", 9: "an inpainting"}
WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of the text states that a UNet reads -> published family."""
MAX_HEADER = 1 << 23
"""Maximum bytes of a header. safetensors allows 100 MB and allocates ten times the header. SDXL's has 0.4 MB; training metadata can
add a few MB."""
LFS = b"version https://git-lfs.github.com/spec/v1"
"""Start of the text file that git checks out in place of a large file if Git LFS did not fetch it."""
MAX_YAML = 1 << 16
"""Maximum bytes of a .yaml next to a file. The published ones have 4 kB."""
UNUSED = re.compile(
    r"(^|\.)(position_ids|text_projection|logit_scale|attn_mask)(\.|$)"
    r"|^(vision_model|visual_projection|transformer\.resblocks|loss|model_ema)\."
)
"""Tensors under a component's prefix that no program uses to generate images: the rest of CLIP, training tensors of the VAE."""
FLOATS = {"F64", "F32", "F16", "BF16"}

TITLES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
FIRST_TENSORS = {"unet": "input_blocks.0.0.weight", "vae": "encoder.conv_in.weight"}
"""Component -> a tensor that is present if the component is. For text encoders it is the token embedding."""

WANTED = "pass a whole checkpoint of Stable Diffusion 1, 2 or XL, or a diffusers folder"
DECIDE = "pass --prediction-type epsilon or --prediction-type v_prediction"
VARIANT = "if it is a variant of this architecture, pass a diffusers folder with its descriptions"

Description = tuple[dict[str, dict[str, Any]], dict[str, Any]]
"""(Component -> its configuration, scheduler configuration)."""


@dataclass(frozen=True)
class SingleFile:
    """A file with complete components. `configs` maps a component to its configuration, `prefixes` to its prefix in the file."""

    path: Path
    family: str
    configs: dict[str, dict[str, Any]]
    scheduler_config: dict[str, Any]
    metadata: dict[str, str]
    prefixes: dict[str, str]
    assumed: bool = False
    """Whether epsilon is assumed, because nothing defines the prediction type."""

    def tensors(self, component: str) -> dict[str, Tensor]:
        """Return the state dict of `families.build(component, configs[component])`, in the file's precision.

        The tensors do not share memory with each other, but they may be backed by the file.
        """
        found = {}
        with opened(self.path) as file:
            for name, (place, shape) in self.index(component).items():
                if place.part is None:
                    tensor = file.get_tensor(place.key)
                else:
                    tensor = file.get_slice(place.key)[place.part * shape[0] : (place.part + 1) * shape[0]].clone()
                found[name] = (tensor.T.contiguous() if place.transposed else tensor).reshape(shape)
        return found

    def index(self, component: str) -> dict[str, tuple[Place, list[int]]]:
        """Return name in the network -> (place in this file, shape in the network)."""
        try:
            with torch.device("meta"):
                network = build(component, self.configs[component])
        except Exception as error:  # libraries raise any kind of error for an invalid configuration
            raise InputError(
                f"the description of the {TITLES[component]} of {self.path} does not describe a network: {error}"
            ) from error
        places = places_in_file(self.family, component, network, self.prefixes[component])
        return {name: (places[name], list(tensor.shape)) for name, tensor in network.state_dict().items()}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file without running code. Raises InputError if it is not a whole safetensors file or its header is too large."""
    hint = "download it again, or convert the model to safetensors"
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS))
        header = int.from_bytes(start[:8], "little")
        if start == LFS:
            raise InputError(f"{path} is a Git LFS pointer, not the weights themselves", "run `git lfs pull` in its repository")
        size = path.stat().st_size
        if header > size - 8:
            raise InputError(f"{path} is not a whole safetensors file: its header would have {header} bytes, it has {size}", hint)
        if header > MAX_HEADER:
            raise InputError(
                f"{path} has a header of {header / 1e6:.1f} MB; {MAX_HEADER / 1e6:.1f} MB are read",
                "save the model again without the notes of its training",
            )
        with safe_open(path, "pt") as file:
            yield file
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", NOT_READ) from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {invalid_entry(path)}{error}", hint) from error


def invalid_entry(path: Path) -> str:
    """Return `NAME: ` of the first tensor with an invalid header entry, or "". Errors of safetensors do not always name it."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError), path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            numbers = [*entry["shape"], *entry["data_offsets"]] if name != "__metadata__" else []
            if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
                return f"{name}: "
            if numbers and (
                math.prod(entry["shape"]) >= 2**60
                or not re.fullmatch(r"BOOL|BF16|C64|[FIU](4|6|8|16|32|64)(_\w+)?", entry["dtype"])
            ):
                return f"{name}: "
    return ""


def read(path: Path, config: Path | None = None, prediction: str | None = None) -> SingleFile:
    """Identify a checkpoint and check all its tensors. Only the header is read.

    Configurations come from `config` (a diffusers folder; its JSON files are enough), else from the header if `write` stored them,
    else from the published family with the same text width. `prediction` overrides the prediction type of all of them. Raises
    InputError for any other kind of file, naming the probable kind, and for a Stable Diffusion 2 model whose prediction type is
    unknown.
    """
    if prediction is not None and prediction not in PREDICTIONS.values():
        raise InputError(f"prediction type {prediction!r} is not supported", "models predict epsilon or v_prediction")
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    check_kind(path, shapes)
    described = from_folder(config) if config else from_header(path, metadata)
    family = family_of(described[0]["unet"]) if described else family_by_width(path, shapes)
    prefixes = prefixes_in(path, family, shapes)
    stated = prediction or stated_prediction(path, family, shapes, metadata)
    zero_snr = "ztsnr" in shapes or metadata.get("ss_zero_terminal_snr") == "True"
    if described:
        configs, scheduler = described
        scheduler |= {"prediction_type": agreed_prediction(path, scheduler.get("prediction_type", "epsilon"), prediction, stated)}
        if zero_snr and scheduler["prediction_type"] == "v_prediction":
            scheduler |= {"rescale_betas_zero_snr": True}
    else:
        predicted = stated or default_prediction(path, family)
        published = describe(family, predicted, predicted == "v_prediction" and zero_snr)
        configs, scheduler = published.components, published.scheduler
    found = SingleFile(path, family, configs, scheduler, metadata, prefixes, assumed=not (described or stated))
    for component in configs:
        check(found, component)
    return found


def check_kind(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    for pattern, kind in OTHER_KINDS:
        if any(re.search(pattern, name) for name in shapes):
            raise InputError(f"{path} seems to be {kind}", WANTED)
    if UNET + FIRST_TENSORS["unet"] not in shapes:
        raise InputError(f"{path} holds no UNet of Stable Diffusion: no tensor is named {UNET}{FIRST_TENSORS['unet']}", WANTED)
    channels = shapes[UNET + FIRST_TENSORS["unet"]][1]
    if channels in CHANNELS:
        raise InputError(f"{path} seems to be {CHANNELS[channels]} model: its UNet takes {channels} channels instead of 4", WANTED)


def family_by_width(path: Path, shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the published family with the text width of the UNet's cross-attention. Raises InputError if there is none."""
    widths = {shape[-1] for name, shape in shapes.items() if name.startswith(UNET) and name.endswith(".attn2.to_k.weight")}
    if widths == {1280}:
        raise InputError(f"{path} seems to be the refiner of Stable Diffusion XL, which finishes images of another model", WANTED)
    family = WIDTHS.get(widths.pop()) if len(widths) == 1 else None
    if family is None:
        raise InputError(f"{path} seems to be another architecture: its UNet reads no text of width 768, 1024 or 2048", VARIANT)
    if family == "sd2" and f"{UNET}label_emb.0.0.weight" in shapes:
        raise InputError(f"{path} seems to be Stable Diffusion 2 unCLIP, which draws by an image besides the text", WANTED)
    return family


def prefixes_in(path: Path, family: str, names: Iterable[str]) -> dict[str, str]:
    """Return component -> its prefix in this file. Raises InputError if a component is missing."""
    names = set(names)
    prefixes: dict[str, str] = {}
    for component, candidates in PREFIXES[family].items():
        text = "token_embedding.weight" if (family, component) in OPENCLIP else "embeddings.token_embedding.weight"
        there = [prefix for prefix in candidates if prefix + FIRST_TENSORS.get(component, text) in names]
        if there:
            prefixes[component] = there[0]
    missing = [TITLES[component] for component in PREFIXES[family] if component not in prefixes]
    if missing:
        held = " and ".join(TITLES[component] for component in prefixes)
        raise InputError(f"{path} holds the {held} of {FAMILIES[family].title}, but no {' and no '.join(missing)}", WANTED)
    return prefixes


def stated_prediction(path: Path, family: str, names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """Return the prediction type from the marker tensor, else from the .yaml next to the file or the header, or None if unknown.

    The marker has priority because programs use it, while a header can be outdated after a merge. Raises InputError if .yaml and
    header disagree.
    """
    if "v_pred" in names:
        return "v_prediction"
    beside, header = prediction_in_yaml(path, family), prediction_in_header(metadata)
    if beside and header and beside != header:
        raise InputError(f"{path} says that it predicts {header}, the .yaml beside it says {beside}", DECIDE)
    return beside or header


def prediction_in_header(metadata: Mapping[str, str]) -> str | None:
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if metadata.get(key) in PREDICTIONS:
            return PREDICTIONS[metadata[key]]
    trained = {"True": "v_prediction", "False": "epsilon"}.get(metadata.get("ss_v_parameterization", ""))
    if trained:
        return trained
    architecture = metadata.get("modelspec.architecture")
    return next((kind for (family, kind), name in ARCHITECTURES.items() if family == "sd2" and name == architecture), None)


def prediction_in_yaml(path: Path, family: str) -> str | None:
    """Return the prediction type from NAME.yaml, the original code's configuration, which programs look for next to a checkpoint.

    Returns None if there is no such configuration. Raises InputError if it cannot be read or configures another diffusion process.
    """
    file = path.with_suffix(".yaml")
    if not file.exists():
        return None
    try:
        content = yaml.safe_load(read_bytes(file, MAX_YAML))
        params = content["model"]["params"]
        scaling = params.get("denoiser_config", {}).get("params", {}).get("scaling_config", {}).get("target")
        found = str(scaling).rpartition(".")[2] if scaling else str(params.get("parameterization", "eps"))
        schedule = {key: float(params[key]) for key in ("linear_start", "linear_end", "timesteps", "scale_factor") if key in params}
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", DECIDE) from error
    except (KeyError, TypeError, AttributeError):  # a configuration of something else
        return None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{file} is damaged: {first_line(error)}", DECIDE) from error
    predicted = (SCALINGS if scaling else PREDICTIONS).get(found)
    if predicted is None:
        raise InputError(f"{file} says that the model predicts {found!r}, which is not supported", WANTED)
    published = FAMILIES[family]
    own = {
        "linear_start": published.scheduler["beta_start"],
        "linear_end": published.scheduler["beta_end"],
        "timesteps": published.scheduler["num_train_timesteps"],
        "scale_factor": published.components["vae"]["scaling_factor"],
    }
    for key, value in schedule.items():
        if value != own[key]:
            raise InputError(f"{file}: {key} is {value:g}, not the {own[key]:g} of {published.title}", VARIANT)
    return predicted


def agreed_prediction(path: Path, described: str, asked: str | None, stated: str | None) -> str:
    """Return `asked` or else `described`. Raises InputError if the file itself says another prediction type and `asked` is None."""
    if asked is None and stated is not None and stated != described:
        raise InputError(f"{path} says that it predicts {stated}, its description says {described}", DECIDE)
    return asked or described


def default_prediction(path: Path, family: str) -> str:
    if family == "sd2":
        raise InputError(
            f"{path} is Stable Diffusion 2, whose models of 512 pixels predict epsilon and whose models of 768 pixels predict v; "
            "their tensors are alike, and nothing in the file says which it is",
            DECIDE,
        )
    return "epsilon"


def check(file: SingleFile, component: str) -> None:
    """Raises InputError if a tensor of the component is missing, unexpected, quantized or has another shape."""
    index, what = file.index(component), f"the {TITLES[component]} in {file.path}"
    with opened(file.path) as content:
        missing = sorted({place.key for place, _ in index.values()} - set(content.keys()))
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise InputError(
                f"{what} is not that of {FAMILIES[file.family].title}: {', '.join(missing[:3])}{more} missing", VARIANT
            )
        prefix = file.prefixes[component]
        own = {key for key in content.keys() if key.startswith(prefix) and not UNUSED.search(key.removeprefix(prefix))}  # noqa: SIM118
        unused = sorted(own - {place.key for place, _ in index.values()})
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise InputError(f"{what} has no place for {', '.join(unused[:3])}{more}", VARIANT)
        for place, shape in index.values():
            part, wanted = content.get_slice(place.key), place.shape(shape)
            if without_trailing_ones(part.get_shape()) != without_trailing_ones(wanted):
                raise InputError(f"{what} has {place.key} of shape {part.get_shape()}, where {wanted} belongs", VARIANT)
            if part.get_dtype() not in FLOATS:
                raise InputError(f"{what} is quantized: {place.key} is {part.get_dtype()}", WANTED)


def without_trailing_ones(shape: Sequence[int]) -> list[int]:
    """Return a shape without trailing ones. A 1x1 convolution has them, a matrix does not; programs disagree on some tensors."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return list(shape)


def from_folder(folder: Path) -> Description:
    """Return the configurations in the JSON files of a diffusers folder. Raises InputError if a file is missing, if sid does not
    support a configuration, or if a link leads out of the folder."""
    hint = "give --model-config a diffusers folder of the same model family"
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", hint)
    check_links(folder)

    def place(name: str) -> Path:
        return folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")

    def content(name: str) -> dict[str, Any]:
        return read_json(place(name), hint)

    try:
        components = {name: content(name) for name in PREFIXES[family_of(content("unet"))]}
        return check_configs(components, content("scheduler"), lambda name: str(place(name)))
    except InputError as error:
        raise InputError(error.message, hint) from error


def from_header(path: Path, metadata: Mapping[str, str]) -> Description | None:
    """Return the configurations that `write` stored in the header, or None for files of other programs."""
    if "sid.config" not in metadata:
        return None
    try:
        found = json.loads(metadata["sid.config"])
        components = {name: dict(found[name]) for name in PREFIXES[family_of(found["unet"])]}
        scheduler = dict(found["scheduler"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the header of {path} is damaged: sid.config describes no model", VARIANT) from error
    return check_configs(components, scheduler, lambda name: f"the header of {path}: {name}")


def check_configs(components: Mapping[str, dict[str, Any]], scheduler: dict[str, Any], place: Callable[[str], str]) -> Description:
    """Return the configurations. Raises InputError, naming the entry, if sid does not support one of them."""
    for name, config in components.items():
        check_entries(name, place(name), config)
    check_scheduler_class(place("scheduler"), scheduler.get("_class_name", "DDIMScheduler"))
    check_entries("scheduler", place("scheduler"), scheduler)
    check_schedule(place("scheduler"), scheduler)
    return {name: settings(name, config) for name, config in components.items()}, scheduler


def settings(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without metadata about its origin and without entries that select an implementation."""
    if component.startswith("text_encoder"):
        return {key: value for key, value in config.items() if key in TEXT_KEYS}
    return {key: value for key, value in config.items() if not key.startswith("_")}


def write(
    path: Path,
    components: Mapping[str, nn.Module],
    scheduler_config: Mapping[str, Any],
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """Write the networks unet, vae, text_encoder (and text_encoder_2) as one file. `path` is written completely or not at all.

    The header contains the configurations of the networks and the scheduler (`sid.config`), so that `read` needs nothing else;
    `metadata` adds or replaces entries of the header. v_prediction models get the marker tensor v_pred, and ztsnr if they have zero
    terminal SNR, which ComfyUI and other programs recognize. Raises InputError for a network that the layout has no names for,
    EnvironmentProblem if the file cannot be written.
    """
    configs = {name: settings(name, configuration(network)) for name, network in components.items()}
    family = family_of(configs["unet"])
    if set(components) != set(PREFIXES[family]):
        raise InputError(f"{FAMILIES[family].title} consists of {', '.join(PREFIXES[family])}, not {', '.join(components)}")
    tensors: dict[str, Tensor] = {}
    for component, network in components.items():
        tensors |= file_tensors(family, component, network, dtype)
    scheduler = {key: value for key, value in scheduler_config.items() if key == "_class_name" or not key.startswith("_")}
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction == "v_prediction":
        markers = ("v_pred", "ztsnr") if scheduler.get("rescale_betas_zero_snr") else ("v_pred",)
        tensors |= {marker: torch.zeros(0) for marker in markers}
    size, factor = configs["unet"]["sample_size"], 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    height, width = (size, size) if isinstance(size, int) else size
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[family, prediction],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.resolution": f"{width * factor}x{height * factor}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        "sid.config": json.dumps({**configs, "scheduler": scheduler}, sort_keys=True),
        **metadata,
    }
    with atomic_file(path) as temporary:
        save_tensors(tensors, temporary, header)


def file_tensors(family: str, component: str, network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a network under their keys in the file, on the CPU."""
    return arranged(network.state_dict(), places_in_file(family, component, network, PREFIXES[family][component][0]), dtype)


def places_in_file(family: str, component: str, network: nn.Module, prefix: str) -> dict[str, Place]:
    """Return the place of each tensor of a network. Raises InputError if the layout has no name for one."""
    return located(places_of(family, component, configuration(network), prefix), network.state_dict(), TITLES[component])


def configuration(network: nn.Module) -> dict[str, Any]:
    """Return the configuration of a network from diffusers or transformers."""
    config: Any = network.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)
