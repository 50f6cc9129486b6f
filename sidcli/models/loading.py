"""Load the networks of Stable Diffusion 1, 2 and XL from a diffusers folder or a single file, those of transformers from a folder.

Only JSON and safetensors files are read, and this module selects the network classes, not the model's files. An untrusted model
therefore cannot run code.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from sidcli.diffusion.path import Path as DiffusionPath
from sidcli.errors import InputError, UsageError, first_line
from sidcli.files import read_json, readable
from sidcli.models import card as cards
from sidcli.models import single_file
from sidcli.models.codec import Codec, codec_factor, levels_entry
from sidcli.models.compatibility import (
    OTHER_MODEL,
    check_entries,
    check_parts,
    check_scheduler_class,
    positive_integers,
    sides_of,
    value_text,
)
from sidcli.models.families import FAMILIES, clip_tokenizer
from sidcli.models.hub import PICKLES, VARIANTS, WEIGHTS, check_weights, weights_by_variant
from sidcli.models.kind import Kind, tokenizer_of
from sidcli.models.kinds import kind_of, kind_of_pipeline
from sidcli.models.overrides import Overrides
from sidcli.models.reference import Layout, layout_of
from sidcli.models.rehearsal import rehearse
from sidcli.models.sources import PARTS, Source, find, graph_format, read_card
from sidcli.models.tokenizers import check_tokenizer
from sidcli.models.unet import UNET
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


class Known(ABC):
    """Properties of a model that its card, the content of sid.json, defines. A model that sid did not write has an empty card."""

    card: dict[str, Any]

    @property
    @abstractmethod
    def usual_guidance(self) -> float:
        """Guidance scale at which models with such a denoiser draw by default."""

    @property
    def is_student(self) -> bool:
        return self.card.get("kind") == "student"

    @property
    def is_emoji(self) -> bool:
        """Whether the model generates the emoji world, for which sid can measure against the ground truth."""
        return self.card.get("world") == "emoji"

    @property
    def default_guidance(self) -> float:
        return float(self.card.get("guidance", self.usual_guidance))


@dataclass(frozen=True)
class Description(Known):
    """A model without its weights: the configurations of the networks and the scheduler, and the tokenizers."""

    source: Source
    networks: dict[str, dict[str, Any]]
    scheduler_config: dict[str, Any]
    path: DiffusionPath
    card: dict[str, Any]
    empty_is_zero: bool
    size: tuple[int, int]
    """Height and width in pixels."""
    tokenizers: tuple[Any, ...]
    """One tokenizer per text encoder."""
    file: single_file.SingleFile | None = None
    kind: Kind = UNET

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(name for name in self.kind.texts if name in self.networks)

    @property
    def denoiser_config(self) -> dict[str, Any]:
        return self.networks[self.kind.component]

    @property
    def layout(self) -> Layout | None:
        """How the denoiser takes a reference image; None if it takes none."""
        return layout_of(self.denoiser_config)

    @property
    def size_entries(self) -> dict[str, Any]:
        """Entries of the denoiser's configuration that depend on the size of the images."""
        return {entry: self.denoiser_config[entry] for entry in self.kind.size_entries if entry in self.denoiser_config}

    @property
    def usual_guidance(self) -> float:
        return self.kind.usual_guidance(self.denoiser_config)


@dataclass(eq=False)
class Model(Known):
    """A text-to-image model: its networks in float32 and eval mode, its tokenizers and its configuration."""

    source: Source
    denoiser: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    path: DiffusionPath
    scheduler_config: dict[str, Any]
    card: dict[str, Any] = field(default_factory=dict)
    empty_is_zero: bool = False
    """Whether the empty prompt is encoded as zeros, as in SDXL."""
    texts: tuple[str, ...] = ()
    """Names of the text encoders; by default the first ones of the kind."""
    text_on_cpu: bool = False
    """Whether the text encoders stay in CPU memory and encode there, wherever the denoiser is."""
    text_bf16: bool = False
    """Whether the weights of the language model are in bf16; its states in a cond are float32."""

    def __post_init__(self) -> None:
        self.texts = self.texts or self.kind.texts[: len(self.text_encoders)]

    @property
    def kind(self) -> Kind:
        return kind_of(self.denoiser)

    @property
    def text_precision(self) -> str:
        """What the names of cached images of this model end with."""
        return " text in bf16" if self.text_bf16 else ""

    @property
    def networks(self) -> dict[str, Any]:
        """All networks by the name of their component."""
        return {self.kind.component: self.denoiser, "vae": self.vae, **dict(zip(self.texts, self.text_encoders, strict=True))}

    @property
    def usual_guidance(self) -> float:
        return self.kind.usual_guidance(self.denoiser.config)

    @property
    def is_xl(self) -> bool:
        return self.denoiser.config.get("addition_embed_type") == "text_time"

    def with_denoiser(self, denoiser: Any) -> Model:
        """Return the same model with another denoiser."""
        return dataclasses.replace(self, denoiser=denoiser)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the denoiser denoises at the model's image size; see `Kind.latent_shape`."""
        return self.kind.latent_shape(self.denoiser.config)

    @property
    def layout(self) -> Layout | None:
        """How the denoiser takes a reference image; None if it takes none."""
        return layout_of(self.denoiser.config)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        _, height, width = self.kind.frame_shape(self.denoiser.config)
        factor = self.codec.factor
        return height * factor, width * factor

    @property
    def codec(self) -> Codec:
        return Codec(self.vae)


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars, log messages and warnings, so that stdout and stderr contain only sid's output."""
    import warnings

    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers imports it; it warns about kernels that nothing here uses
    warnings.filterwarnings("ignore", module="diffusers|transformers|torch|open_clip|huggingface_hub|PIL")


def describe(source: Source, overrides: Overrides | None = None, listener: Listener | None = None) -> Description:
    """Read a model's configuration, and check that all its components exist and fit together. The weights are not read.

    The listener is notified if a missing prediction type is assumed. Raises InputError if the model is of no kind in `kinds`, contains
    custom code, or needs something that sid does not compute.
    """
    try:
        with readable(source.name):
            return _described(source, overrides or Overrides(), listener or Silence())
    except DAMAGE as error:  # an entry is missing, has the wrong type, or is an invalid network size
        raise InputError(
            f"the description of {source.name} is damaged: {type(error).__name__} {error}", "take another copy of the model"
        ) from error


def _described(source: Source, overrides: Overrides, listener: Listener) -> Description:
    kind: Kind = UNET
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
        kind, networks, scheduler_config, empty_is_zero = _read_folder(source)
        card = read_card(source)
        if not card and (start := start_of(scheduler_config)) is not None:
            listener.note(
                f"{source.name} has the scheduler of a student that starts at timestep {start}, but no sid.json: it is read as a teacher;"
                f' put its sid.json back (for a one-step student {{"kind": "student", "t_init": {start}}} is enough)'
            )
        elif not card and scheduler_config.get("_class_name") == "LCMScheduler":
            listener.note(
                f"{source.name} has the scheduler of a consistency student (LCMScheduler), but no sid.json: it is read as a teacher"
            )
        if overrides.prediction_type != "auto":
            scheduler_config["prediction_type"] = overrides.prediction_type
        places = {name: str(source.part(name) / "config.json") for name in networks}
    size = _size(overrides, kind, networks, places)
    kind.check_fit(source.name, networks, places)
    path = kind.read_path(scheduler_config, networks[kind.component])
    shift = path.sampling.get("shift")
    if (overrides.width or overrides.height) and shift is not None and card.get("shift") not in (None, shift):
        raise UsageError(f"{source.name} draws in one size: its timesteps depend on it", "leave --width and --height out")
    cards.check_start(card, cards.place_of(source.path), path.starts, path.sampling)
    if (start := start_of(scheduler_config)) is not None:
        cards.check_agrees(card, cards.place_of(source.path), start)
    texts = [name for name in kind.texts if name in networks]
    tokenizers = tuple(_tokenizer(source, file, kind, name, networks[name], places[name]) for name in texts)
    if not source.is_embedded:  # a test rehearses the embedded models
        rehearse(kind, networks, places, min(tokenizer.model_max_length for tokenizer in tokenizers))
    return Description(source, networks, scheduler_config, path, card, empty_is_zero, size, tokenizers, file, kind)


def _read_folder(source: Source) -> tuple[Kind, dict[str, dict[str, Any]], dict[str, Any], bool]:
    """Return a diffusers folder's kind, network configurations and scheduler configuration, and whether the empty prompt is zeros."""
    index = read_json(source.path / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline is None:
        raise InputError(
            f"{source.path / 'model_index.json'} has no _class_name",
            'add the class of the pipeline: "_class_name": "StableDiffusionPipeline"',
        )
    if not isinstance(pipeline, str):
        raise InputError(f"{source.name} brings code of its own ({pipeline}), which is never run", "use a model of stock classes")
    refuse_code(source, index)
    kind = kind_of_pipeline(source.name, index)
    texts = kind.text_names(index, str(source.path / "model_index.json"))
    names = [kind.component, "vae", *texts]
    check_parts(source.name, index, kind.parts)
    networks = {}
    for name in names:
        asked, wanted = _class_of(source, index, name), kind.network_class(name).__name__
        same = (wanted, kind.former_classes.get(name))
        if asked not in same:
            raise InputError(
                f"{source.name}: its {name} is {with_article(asked)}, not {with_article(wanted)}", "use a stock pipeline"
            )
        place = source.part(name) / "config.json"
        networks[name] = read_json(place)
        if networks[name].get("_class_name", asked) not in (asked, *same):
            raise InputError(
                f"{source.name}: its {name} is {with_article(str(networks[name]['_class_name']))}, not {with_article(asked)}",
                "use a stock pipeline",
            )
        if "quantization_config" in networks[name]:
            raise InputError(f"{source.name}: its {name} is quantized", "use the model in half precision or better")
        check_entries(name, str(place), networks[name], kind.rules)
    for name in map(tokenizer_of, texts):
        asked = _class_of(source, index, name)
        if asked not in kind.tokenizers[name]:
            raise InputError(f"{source.name}: its {name} is {with_article(asked)}, not a {kind.tokenizers[name][0]}", OTHER_MODEL)
    scheduler = _read_scheduler(source, _class_of(source, index, "scheduler"), kind)
    if not source.missing:
        _check_files(source, names)
    return kind, networks, scheduler, bool(index.get("force_zeros_for_empty_prompt", False)) and len(texts) == 2


def _read_scheduler(source: Source, asked: str, kind: Kind) -> dict[str, Any]:
    """Return the scheduler configuration of a folder whose model_index.json names the class `asked`."""
    check_scheduler_class(source.name, asked, kind.rules)
    place = source.part("scheduler") / "scheduler_config.json"
    scheduler = {"_class_name": asked} | read_json(place)
    check_scheduler_class(str(place), scheduler["_class_name"], kind.rules)
    check_entries("scheduler", str(place), scheduler, kind.rules)
    kind.check_schedule(str(place), scheduler)
    return kind.known_schedule(scheduler)


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


def _size(overrides: Overrides, kind: Kind, networks: dict[str, dict[str, Any]], places: dict[str, str]) -> tuple[int, int]:
    """Return height and width in pixels, from the overrides or the model, and set the denoiser's sample_size to match."""
    positive_integers(networks["vae"], levels_entry(networks["vae"]), places["vae"])
    factor, config, place = codec_factor(networks["vae"]), networks[kind.component], places[kind.component]
    if kind.default_side:
        config = {"sample_size": kind.default_side, **config}
    step, most = factor * kind.patch(config, place), min(LARGEST, factor * kind.largest(config, place))
    asked = (overrides.height, overrides.width)
    own = (0, 0) if all(asked) else _sample_size(config, place)
    wanted = asked[0] or factor * own[0], asked[1] or factor * own[1]
    rule = f"a multiple of {step}, in which this model draws, and at most {most}"
    for name, side, given in zip(("height", "width"), wanted, asked, strict=True):
        if step <= side <= most and side % step == 0:
            continue
        if given:
            raise UsageError(f"--{name} must be {rule}, not {side}")
        said = f"sample_size is {value_text(config['sample_size'])}, a {name} of {side} pixels"
        raise InputError(f"{place}: {said}; it must be {rule}", "pass --width and --height")
    if kind.is_square and any(asked) and wanted[0] != wanted[1]:
        raise UsageError(f"this model draws square images, not {wanted[1]} x {wanted[0]} pixels", "--width equal to --height")
    inner = [side // factor for side in wanted]
    networks[kind.component] = kind.resized(config, inner[0] if inner[0] == inner[1] else inner)
    return wanted


def _sample_size(config: dict[str, Any], place: str) -> tuple[int, int]:
    """Return height and width of a latent. Raises InputError if the configuration does not define them."""
    sides, value = sides_of(config), config.get("sample_size")
    if sides is None:
        raise InputError(
            f"{place}: sample_size is {value_text(value)}, which is not an image size", "pass --width and --height, in pixels"
        )
    if re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version"))) and type(value) is int and value < 64:
        return 64, 64  # diffusers before 0.9 wrote a wrong number, and stock pipelines correct it
    return sides


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
    """Load the model of a source. Raises InputError if it is not a supported Stable Diffusion model in safetensors."""
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
    denoiser = nets[known.kind.component]
    denoiser.register_to_config(**known.size_entries)
    known.kind.prepare(denoiser)
    return Model(
        source,
        denoiser,
        nets["vae"],
        tuple(nets[name] for name in known.texts),
        known.tokenizers,
        known.path,
        known.scheduler_config,
        known.card,
        known.empty_is_zero,
        known.texts,
    )


def with_texts_of_files(model: Model, overrides: Overrides) -> Model:
    """Return a model with the text encoders of its files in float32, if a training has changed their precision. `overrides` are those
    with which it was loaded."""
    if not model.text_bf16:
        return model
    known = describe(model.source, overrides)
    texts = tuple(_network(known, name).eval().requires_grad_(False) for name in known.texts)
    return dataclasses.replace(model, text_encoders=texts, text_bf16=False)


def _network(known: Description, name: str) -> Any:
    if known.file:
        with init_empty_weights():  # only parameters stay empty; buffers that no file contains (position ids) are created
            net = known.kind.build(name, known.networks[name])
        net.load_state_dict({key: value.float() for key, value in known.file.tensors(name).items()}, assign=True)
        return net
    folder = known.source.part(name)
    check_weights(str(folder), name, [file.name for file in folder.iterdir()])
    options: dict[str, Any] = {"dtype": torch.float32, **_stored(folder, name)}
    if name in known.texts:  # the folder's config.json can select another implementation, even a downloaded one
        options |= {"config": known.kind.text_config(name, known.networks[name]), "attn_implementation": known.kind.text_attention}
    if name == known.kind.component:
        options |= known.size_entries
    # The libraries only warn when they initialize missing weights randomly and ignore weights that do not fit.
    net, report = known.kind.network_class(name).from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
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


def _tokenizer(
    source: Source, file: single_file.SingleFile | None, kind: Kind, name: str, config: dict[str, Any], place: str
) -> Any:
    """Return the tokenizer of a text encoder. A single file has no tokenizer; the published models use CLIP's."""
    folder = tokenizer_of(name)
    if file is None:
        return kind.read_tokenizer(name, source.part(folder), config, place)
    tokenizer = clip_tokenizer(FAMILIES[file.family].tokenizers[folder]["pad_token"])
    check_tokenizer(tokenizer, "CLIP's tokenizer", config, place)
    return tokenizer


def _stored(folder: Path, name: str) -> dict[str, Any]:
    """Return the `from_pretrained` options for a network's folder: only safetensors, of the preferred variant that exists."""
    variants = weights_by_variant(name, [file.name for file in folder.iterdir()])
    variant = next(variant for variant in VARIANTS if variant in variants)
    return {"use_safetensors": True, "local_files_only": True, "variant": variant or None}
