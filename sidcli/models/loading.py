"""Load the networks of Stable Diffusion 1, 2 and XL from a diffusers folder or a single file.

Only JSON and safetensors files are read, and this module selects the network classes, not the model's files. An untrusted model
therefore cannot run code.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DDPMScheduler
from torch import nn
from transformers import CLIPTokenizer

from sidcli.diffusion.path import DiscretePath
from sidcli.errors import InputError, UsageError, first_line
from sidcli.files import read_json, readable
from sidcli.models import card as cards
from sidcli.models import single_file
from sidcli.models.codec import Codec, codec_factor
from sidcli.models.compatibility import (
    OTHER_COPY,
    OTHER_MODEL,
    SCHEDULE,
    check_entries,
    check_pipeline,
    check_scale,
    check_schedule,
    check_scheduler_class,
    positive_integer,
    positive_integers,
    value_text,
)
from sidcli.models.families import FAMILIES, build, clip_tokenizer, network_class, text_config
from sidcli.models.hub import PICKLES, VARIANTS, WEIGHTS, check_weights, weights_by_variant
from sidcli.models.overrides import Overrides
from sidcli.models.rehearsal import rehearse
from sidcli.models.sources import PARTS, Source, find, graph_format, read_card
from sidcli.models.tokenizers import CLASSES as TOKENIZERS
from sidcli.models.tokenizers import check_tokenizer, read_tokenizer
from sidcli.printable import with_article
from sidcli.progress import Listener, Silence

LARGEST = 8192
"""Maximum pixels on a side. A larger value is probably a typing error."""
TIMESTEPS = 1000
"""Timesteps of the published models' noise schedules."""

STOCK = (None, "diffusers", "transformers", "stable_diffusion")
"""Libraries that a pipeline's classes may come from. diffusers lists its safety checker under the last name."""
DESCRIBED = ("config.json", "scheduler_config.json", "tokenizer_config.json")
OWN_WORDS = {"vocab", "merges", "tokenizer_object", "fast_tokenizer_files"}
"""Entries of tokenizer_config.json that override the vocabulary files in the same folder. They can be paths of any file."""
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError, RecursionError)


class Known:
    """Properties of a model that its card, the content of sid.json, defines. A model that sid did not write has an empty card."""

    card: dict[str, Any]

    @property
    def is_student(self) -> bool:
        return self.card.get("kind") == "student"

    @property
    def is_emoji(self) -> bool:
        """Whether the model generates the emoji world, for which sid can measure against the ground truth."""
        return self.card.get("world") == "emoji"

    @property
    def default_guidance(self) -> float:
        return float(self.card.get("guidance", 7.5))


@dataclass(frozen=True)
class Description(Known):
    """A model without its weights: the configurations of the networks and the scheduler, and the tokenizers."""

    source: Source
    networks: dict[str, dict[str, Any]]
    scheduler_config: dict[str, Any]
    path: DiscretePath
    card: dict[str, Any]
    empty_is_zero: bool
    size: tuple[int, int]
    """Height and width in pixels."""
    tokenizers: tuple[CLIPTokenizer, ...]
    """One tokenizer per text encoder."""
    file: single_file.SingleFile | None = None

    @property
    def texts(self) -> list[str]:
        return [name for name in ("text_encoder", "text_encoder_2") if name in self.networks]


@dataclass(eq=False)
class Model(Known):
    """A text-to-image model: its networks in float32 and eval mode, its tokenizers and its configuration."""

    source: Source
    denoiser: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    path: DiscretePath
    scheduler_config: dict[str, Any]
    card: dict[str, Any] = field(default_factory=dict)
    empty_is_zero: bool = False
    """Whether the empty prompt is encoded as zeros, as in SDXL."""

    @property
    def is_xl(self) -> bool:
        return len(self.text_encoders) == 2

    def with_denoiser(self, denoiser: Any) -> Model:
        """Return the same model with another denoiser."""
        return dataclasses.replace(self, denoiser=denoiser)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent at the model's image size."""
        return latent_shape(self.denoiser.config)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        _, height, width = self.latent_shape
        factor = self.codec.factor
        return height * factor, width * factor

    @property
    def codec(self) -> Codec:
        return Codec(self.vae)


def latent_shape(unet_config: Any) -> tuple[int, int, int]:
    size = unet_config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return unet_config["in_channels"], height, width


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars, log messages and warnings, so that stdout and stderr contain only sid's output."""
    import warnings

    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="diffusers|transformers|torch|open_clip|huggingface_hub|PIL")


def describe(source: Source, overrides: Overrides | None = None, listener: Listener | None = None) -> Description:
    """Read a model's configuration, and check that all its components exist and fit together. The weights are not read.

    The listener is notified if a missing prediction type is assumed. Raises InputError if the model is not Stable Diffusion 1, 2 or
    XL, contains custom code, or needs something that sid does not compute.
    """
    try:
        with readable(source.name):
            return _described(source, overrides or Overrides(), listener or Silence())
    except DAMAGE as error:  # an entry is missing, has the wrong type, or is an invalid network size
        raise InputError(
            f"the description of {source.name} is damaged: {type(error).__name__} {error}", "take another copy of the model"
        ) from error


def _described(source: Source, overrides: Overrides, listener: Listener) -> Description:
    if source.is_file:
        prediction = None if overrides.prediction_type == "auto" else overrides.prediction_type
        file = single_file.read(source.path, Path(overrides.model_config) if overrides.model_config else None, prediction)
        if file.assumed:
            listener.note(f"nothing says what {source.name} predicts: epsilon is assumed; --prediction-type v_prediction otherwise")
        networks, scheduler_config = dict(file.configs), dict(file.scheduler_config)
        card = cards.in_header(file.path, file.metadata)
        empty_is_zero = bool(FAMILIES[file.family].pipeline.get("force_zeros_for_empty_prompt", False))
        places = {name: f"{source.name}: the {single_file.TITLES[name]}" for name in networks}
    else:
        if graph_format(source.path):
            raise InputError(
                f"{source.name} holds exported graphs, which only draw", "`sid sample`, or the run that they came from"
            )
        if overrides.model_config:
            raise UsageError(f"--model-config describes a single file; {source.name} is a folder and describes itself")
        file = None
        networks, scheduler_config, empty_is_zero = _read_folder(source)
        card = read_card(source)
        if not card and (start := start_of(scheduler_config)) is not None:
            listener.note(
                f"{source.name} has the scheduler of a student that starts at timestep {start}, but no sid.json: it is read as a teacher;"
                f' put its sid.json back (for a one-step student {{"kind": "student", "t_init": {start}}} is enough)'
            )
        if overrides.prediction_type != "auto":
            scheduler_config["prediction_type"] = overrides.prediction_type
        places = {name: str(source.part(name) / "config.json") for name in networks}
    size = _size(overrides, networks, places)
    _check_fit(source.name, networks, places)
    path = read_path(scheduler_config)
    cards.check_start(card, cards.place_of(source.path), path.steps)
    if (start := start_of(scheduler_config)) is not None:
        cards.check_agrees(card, cards.place_of(source.path), start)
    texts = [name for name in networks if name.startswith("text_encoder")]
    tokenizers = tuple(_tokenizer(source, file, name, networks[name], places[name]) for name in texts)
    if not source.is_embedded:  # a test rehearses the embedded models
        rehearse(networks, places, latent_shape(networks["unet"]), min(tokenizer.model_max_length for tokenizer in tokenizers))
    return Description(source, networks, scheduler_config, path, card, empty_is_zero, size, tokenizers, file)


def _read_folder(source: Source) -> tuple[dict[str, dict[str, Any]], dict[str, Any], bool]:
    """Return a diffusers folder's network configurations, its scheduler configuration, and whether the empty prompt is zeros."""
    index = read_json(source.path / "model_index.json")
    kind = index.get("_class_name")
    if kind is None:
        raise InputError(
            f"{source.path / 'model_index.json'} has no _class_name",
            'add the class of the pipeline: "_class_name": "StableDiffusionPipeline"',
        )
    if not isinstance(kind, str):
        raise InputError(f"{source.name} brings code of its own ({kind}), which is never run", "use a model of stock classes")
    texts = ["text_encoder", *(["text_encoder_2"] if "text_encoder_2" in index else [])]
    if kind.startswith("StableDiffusionXL") and len(texts) == 1:
        raise InputError(f"{source.path / 'model_index.json'} is of {with_article(kind)} and names no text_encoder_2", OTHER_MODEL)
    names = ["unet", "vae", *texts]
    refuse_code(source, index)
    check_pipeline(source.name, index, PARTS)
    networks = {}
    for name in names:
        asked, wanted = _class_of(source, index, name), network_class(name).__name__
        if asked != wanted:
            raise InputError(
                f"{source.name}: its {name} is {with_article(asked)}, not {with_article(wanted)}", "use a stock pipeline"
            )
        place = source.part(name) / "config.json"
        networks[name] = read_json(place)
        if networks[name].get("_class_name", asked) != asked:
            raise InputError(
                f"{source.name}: its {name} is {with_article(str(networks[name]['_class_name']))}, not {with_article(asked)}",
                "use a stock pipeline",
            )
        if "quantization_config" in networks[name]:
            raise InputError(f"{source.name}: its {name} is quantized", "use the model in half precision or better")
        check_entries(name, str(place), networks[name])
    for name in (text.replace("text_encoder", "tokenizer") for text in texts):
        asked = _class_of(source, index, name)
        if asked not in TOKENIZERS:
            raise InputError(f"{source.name}: its {name} is {with_article(asked)}, not a CLIPTokenizer", OTHER_MODEL)
    check_scheduler_class(source.name, asked := _class_of(source, index, "scheduler"))
    place = source.part("scheduler") / "scheduler_config.json"
    scheduler = {"_class_name": asked} | read_json(place)
    check_scheduler_class(str(place), scheduler["_class_name"])
    check_entries("scheduler", str(place), scheduler)
    check_schedule(str(place), scheduler)
    if not source.missing:
        _check_files(source, names)
    return networks, scheduler, bool(index.get("force_zeros_for_empty_prompt", False)) and len(texts) == 2


def start_of(scheduler: dict[str, Any]) -> int | None:
    """Return the timestep at which a student starts if its scheduler configuration is one that sid writes for students, else None.

    That scheduler is trailing Euler over the timesteps up to the start only.
    """
    kind = (scheduler.get("_class_name"), scheduler.get("timestep_spacing"))
    steps = scheduler.get("num_train_timesteps", TIMESTEPS)
    return steps - 1 if kind == ("EulerDiscreteScheduler", "trailing") and steps < TIMESTEPS else None


def _class_of(source: Source, index: dict[str, Any], part: str) -> str:
    """Return the class that model_index.json names for a component. Raises InputError if it names none."""
    match index.get(part):
        case [str(), str(found)]:
            return found
    raise InputError(f"{source.path / 'model_index.json'} names no {part}", OTHER_MODEL)


def _check_files(source: Source, names: Sequence[str]) -> None:
    """Raises InputError if a network's weights are missing or cannot be read. A folder without any weights is accepted: its
    configuration is enough for a plan."""
    files = {name: [file.name for file in source.part(name).iterdir()] for name in names}
    if not any(name.endswith((".safetensors", *PICKLES)) for found in files.values() for name in found):
        return
    for name in names:
        check_weights(str(source.part(name)), name, files[name])
        check_files(source.part(name))


def _check_fit(name: str, networks: dict[str, dict[str, Any]], places: dict[str, str]) -> None:
    """Raises InputError if the inputs and outputs of a model's networks do not match each other."""
    unet, vae, text = networks["unet"], networks["vae"], networks["text_encoder"]
    channels = positive_integer(unet, "in_channels", places["unet"])
    latent = positive_integer({"latent_channels": 4} | vae, "latent_channels", places["vae"])
    if channels > latent:
        raise InputError(f"{name} takes {channels} channels in: an inpainting or editing model", OTHER_MODEL)
    if channels < latent:
        raise InputError(f"{name}: the UNet takes latents of {channels} channels, its VAE gives {latent}", OTHER_COPY)
    if unet.get("out_channels", 4) != channels:
        raise InputError(
            f"{places['unet']}: out_channels is {unet['out_channels']} where in_channels is {channels}: "
            "a learned variance is an output that sid does not use",
            OTHER_MODEL,
        )
    check_scale(places["vae"], vae)
    if "sample_size" in vae and _sides(vae) is None:
        raise InputError(
            f"{places['vae']}: sample_size is {value_text(vae['sample_size'])}, which is not an image size", OTHER_COPY
        )
    second = networks.get("text_encoder_2")
    width = positive_integer(text, "hidden_size", places["text_encoder"])
    if second:
        width += positive_integer(second, "hidden_size", places["text_encoder_2"])
    heard = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim")
    widths = set(heard) if isinstance(heard, list) else {heard}
    if widths != {width}:
        raise InputError(
            f"{name}: the UNet's cross_attention_dim {heard} does not match the text encoders' width {width}", OTHER_COPY
        )
    added = unet.get("addition_embed_type") == "text_time"
    if added != bool(second):
        have = "has no text_encoder_2" if added else "has a text_encoder_2"
        raise InputError(
            f"{places['unet']}: addition_embed_type is {value_text(unet.get('addition_embed_type'))}, but the model {have}",
            OTHER_COPY,
        )
    if second:
        pooled, each = (
            positive_integer(second, "projection_dim", places["text_encoder_2"]),
            positive_integer(unet, "addition_time_embed_dim", places["unet"]),
        )
        wanted = positive_integer(unet, "projection_class_embeddings_input_dim", places["unet"])
        if wanted != pooled + 6 * each:
            raise InputError(
                f"{places['unet']}: projection_class_embeddings_input_dim is {wanted}; prompt and image sizes give {pooled + 6 * each}"
                + (": an aesthetic score is an input that sid cannot give" if wanted == pooled + 5 * each else ""),
                OTHER_MODEL,
            )


def refuse_code(source: Source, index: dict[str, Any]) -> None:
    """Raises InputError if a folder's JSON files name classes that are not from diffusers or transformers.

    sid would not run these classes. But a model that depends on custom code generates other images without it.
    """
    for name, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] not in STOCK:
            raise InputError(
                f"{source.name}: its {name} is of {entry[0]}: code of its own, which is never run", "use a stock pipeline"
            )
    if index["_class_name"] not in dir(diffusers):
        raise InputError(
            f"{source.name} is {with_article(index['_class_name'])}, which diffusers does not know: code of its own, which is never run",
            "use a stock pipeline",
        )
    described = [source.part(part) / name for part in PARTS for name in DESCRIBED]
    for file in (file for file in described if file.is_file()):
        if "auto_map" in read_json(file):
            raise InputError(f"{file} brings code of its own, which is never run", "use a stock pipeline")
        if file.name == "tokenizer_config.json" and not OWN_WORDS.isdisjoint(read_json(file)):
            raise InputError(f"{file} takes its words from another place", "take another copy of the model")
    adapters = [source.part(part) / "adapter_config.json" for part in PARTS]
    for file in (file for file in adapters if file.exists()):
        raise InputError(f"{file} would change the weights beside it", "merge the adapter into the model, or remove it")


def _size(overrides: Overrides, networks: dict[str, dict[str, Any]], places: dict[str, str]) -> tuple[int, int]:
    """Return height and width in pixels, from the overrides or the model, and set the UNet's sample_size to match."""
    positive_integers(networks["vae"], "block_out_channels", places["vae"])
    factor = codec_factor(networks["vae"])
    wanted = (overrides.height, overrides.width)
    if not all(wanted):
        height, width = _sample_size(networks["unet"], places["unet"])
        wanted = (overrides.height or height * factor, overrides.width or width * factor)
    for name, side in zip(("height", "width"), wanted, strict=True):
        if not factor <= side <= LARGEST or side % factor:
            raise UsageError(
                f"--{name} must be a multiple of {factor}, in which this model draws, and at most {LARGEST}, not {side}"
            )
    inner = [side // factor for side in wanted]
    networks["unet"] = networks["unet"] | {"sample_size": inner[0] if inner[0] == inner[1] else inner}
    return wanted


def _sample_size(config: dict[str, Any], place: str) -> tuple[int, int]:
    """Return height and width of a latent. Raises InputError if the configuration does not define them."""
    sides, value = _sides(config), config.get("sample_size")
    if sides is None:
        raise InputError(
            f"{place}: sample_size is {value_text(value)}, which is not an image size", "pass --width and --height, in pixels"
        )
    if re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version"))) and type(value) is int and value < 64:
        return 64, 64  # diffusers before 0.9 wrote a wrong number, and stock pipelines correct it
    return sides


def _sides(config: dict[str, Any]) -> tuple[int, int] | None:
    """Return the two sides that sample_size defines, or None if it is invalid."""
    value = config.get("sample_size")
    sides: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        return None
    return sides[0], sides[1]


def open_model(name: str, listener: Listener, known: Overrides) -> Model:
    """Find a model by its name and load it."""
    listener.note(f"loading {name}")
    quiet_libraries()
    return load(find(name, listener), known, listener)


def describe_model(name: str, known: Overrides) -> Description:
    """Find a model by its name and return its Description. Its weights are neither read nor downloaded."""
    quiet_libraries()
    return describe(find(name, descriptions_only=True), known)


def load(source: Source, overrides: Overrides | None = None, listener: Listener | None = None) -> Model:
    """Load the model of a source. Raises InputError if it is not a Stable Diffusion 1, 2 or XL model in safetensors."""
    known = describe(source, overrides, listener)
    try:
        nets = {name: _network(known, name) for name in known.networks}
    except (*DAMAGE, OSError, RuntimeError) as error:
        raise InputError(
            f"{source.name} is not a Stable Diffusion model in safetensors: {first_line(error)}", "see `sid distill --help`"
        ) from error
    for name, net in nets.items():
        check_finite(known, name, net)
        net.eval().requires_grad_(False)
    nets["unet"].register_to_config(sample_size=known.networks["unet"]["sample_size"])
    return Model(
        source,
        nets["unet"],
        nets["vae"],
        tuple(nets[name] for name in known.texts),
        known.tokenizers,
        known.path,
        known.scheduler_config,
        known.card,
        known.empty_is_zero,
    )


def _network(known: Description, name: str) -> Any:
    if known.file:
        with init_empty_weights():  # only parameters stay empty; buffers that no file contains (position ids) are created
            net = build(name, known.networks[name])
        net.load_state_dict({key: value.float() for key, value in known.file.tensors(name).items()}, assign=True)
        return net
    folder = known.source.part(name)
    check_weights(str(folder), name, [file.name for file in folder.iterdir()])
    options: dict[str, Any] = {"dtype": torch.float32, **_stored(folder, name)}
    if name in known.texts:  # the folder's config.json can select another implementation, even a downloaded one
        options |= {"config": text_config(known.networks[name]), "attn_implementation": "sdpa"}
    # The libraries only warn when they initialize missing weights randomly and ignore weights that do not fit.
    net, report = network_class(name).from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    misshaped = [f"{key} of shape {list(found)}, where {list(wanted)} belongs" for key, found, wanted in report["mismatched_keys"]]
    spare = [key for key in report["unexpected_keys"] if not single_file.UNUSED.search(key)]
    for found, what in ((misshaped, "has"), (report["missing_keys"], "lacks"), (spare, "has no place for")):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise InputError(f"{folder} {what} {', '.join(sorted(found)[:3])}{more}", "take another copy of the model")
    return net


def check_files(folder: Path) -> None:
    """Raises InputError if a weight file is incomplete or quantized, or if a shard index names files that are not in the folder."""
    for file in sorted(folder.glob("*.safetensors.index.json")):
        named = read_json(file).get("weight_map")
        for shard in named.values() if isinstance(named, dict) else [named]:
            if not (isinstance(shard, str) and WEIGHTS.fullmatch(shard) and (folder / shard).is_file()):
                raise InputError(f"{file} names {shard}, which is not beside it", "take another copy of the model")
    for file in sorted(file for file in folder.glob("*.safetensors") if WEIGHTS.fullmatch(file.name)):
        with single_file.opened(file) as content:
            for key in content.keys():  # noqa: SIM118 - not a mapping
                kind = content.get_slice(key).get_dtype()
                if kind not in single_file.FLOATS and not single_file.UNUSED.search(key):
                    raise InputError(
                        f"{file} holds {key} as {kind}, which is not a floating-point type",
                        "use the model in half precision or better",
                    )


def check_finite(known: Description, name: str, net: nn.Module) -> None:
    """Raises InputError if a weight is not finite. The check takes 0.2 seconds for the weights of SD 1.5."""
    for key, value in net.state_dict().items():
        # A finite sum means that all terms are finite. A sum that is not finite can also be an overflow of large terms.
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
            raise InputError(
                f"{known.source.name}: {key} of its {name} holds values that are not finite", "take another copy of the model"
            )


def _tokenizer(source: Source, file: single_file.SingleFile | None, name: str, config: dict[str, Any], place: str) -> CLIPTokenizer:
    """Return the tokenizer of a text encoder. A single file has no tokenizer; the published models use CLIP's."""
    folder = name.replace("text_encoder", "tokenizer")
    if file is None:
        return read_tokenizer(source.part(folder), config, place)
    tokenizer = clip_tokenizer(FAMILIES[file.family].tokenizers[folder]["pad_token"])
    check_tokenizer(tokenizer, "CLIP's tokenizer", config, place)
    return tokenizer


def _stored(folder: Path, name: str) -> dict[str, Any]:
    """Return the `from_pretrained` options for a network's folder: only safetensors, of the preferred variant that exists."""
    variants = weights_by_variant(name, [file.name for file in folder.iterdir()])
    variant = next(variant for variant in VARIANTS if variant in variants)
    return {"use_safetensors": True, "local_files_only": True, "variant": variant or None}


def read_path(scheduler_config: dict[str, Any]) -> DiscretePath:
    """Return a scheduler configuration's diffusion path. Raises InputError for an unsupported prediction type or invalid betas."""
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"prediction type {prediction!r} is not supported", "teachers predict epsilon or v_prediction")
    try:
        scheduler = DDPMScheduler(**{key: value for key, value in scheduler_config.items() if key in SCHEDULE})
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"the scheduler does not describe a noise schedule: {first_line(error)}", OTHER_COPY) from error
    if not ((scheduler.betas >= 0) & (scheduler.betas <= 1)).all():  # also rejects NaN
        raise InputError("the scheduler does not describe a noise schedule: betas must lie between 0 and 1", OTHER_COPY)
    path = DiscretePath.from_betas(scheduler.betas, prediction)
    if prediction == "epsilon" and path.abar[-1] == 0:
        raise InputError(
            "a schedule with zero terminal SNR needs a teacher that predicts v: noise says nothing where no signal is left",
            "--prediction-type v_prediction, if that is what it predicts",
        )
    return path
