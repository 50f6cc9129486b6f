"""From a model that was found to its networks: Stable Diffusion 1 and 2 and SDXL, from a diffusers folder or a single file.

Only JSON and safetensors are read, and the classes of the networks are chosen here, never by the file: nothing in a stranger's model
can run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sidcli.diffusion import Schedule
from sidcli.errors import InputError, UsageError
from sidcli.families import FAMILIES, build, clip_tokenizer, text_config
from sidcli.files import read_json
from sidcli.formats import single_file
from sidcli.hub import WEIGHTS
from sidcli.sources import PARTS, Source, graph_format, read_card

LARGEST = 8192
"""Pixels on a side; more is a slip of the finger."""
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


@dataclass(frozen=True)
class Overrides:
    """What the user knows better than a model's files: what the network predicts, a folder whose JSON files describe a single file,
    and the size in pixels to draw at (0: the model's own)."""

    prediction_type: str = "auto"
    model_config: str = ""
    width: int = 0
    height: int = 0


STOCK = (None, "diffusers", "transformers", "stable_diffusion")
"""Where the classes of a pipeline may be from; diffusers has its safety checker under the last name."""
DESCRIBED = ("config.json", "scheduler_config.json", "tokenizer_config.json")
OWN_WORDS = {"vocab", "merges", "tokenizer_object"}
"""Entries with which a tokenizer's description goes before the files beside it; they may be paths of any file."""
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError, RecursionError)


class Known:
    """What a model's card, the content of its sid.json, says of it; the card of a model that is not ours is empty."""

    card: dict[str, Any]

    @property
    def is_student(self) -> bool:
        return self.card.get("kind") == "student"

    @property
    def is_emoji(self) -> bool:
        """Whether the model draws the emoji world, whose ground truth we can then measure against."""
        return self.card.get("world") == "emoji"

    @property
    def default_guidance(self) -> float:
        return float(self.card.get("guidance", 7.5))


@dataclass(frozen=True)
class Description(Known):
    """What is known of a model before a weight is read: the configuration of each network and of its scheduler."""

    source: Source
    networks: dict[str, dict[str, Any]]
    scheduler_config: dict[str, Any]
    schedule: Schedule
    card: dict[str, Any]
    empty_is_zero: bool
    size: tuple[int, int]
    """Height and width in pixels."""
    file: single_file.SingleFile | None = None

    @property
    def texts(self) -> list[str]:
        return [name for name in ("text_encoder", "text_encoder_2") if name in self.networks]


@dataclass(eq=False)
class Model(Known):
    """The networks of one text-to-image model, float32 and in eval mode, and what is known about it."""

    source: Source
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    schedule: Schedule
    scheduler_config: dict[str, Any]
    card: dict[str, Any] = field(default_factory=dict)
    empty_is_zero: bool = False
    """Whether the empty prompt is given as zeros, as SDXL has it."""

    @property
    def is_xl(self) -> bool:
        return len(self.text_encoders) == 2

    def with_unet(self, unet: UNet2DConditionModel) -> Model:
        """The same model around another drawing network."""
        return dataclasses.replace(self, unet=unet)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of a latent at the model's own size."""
        return latent_shape(self.unet.config)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        _, height, width = self.latent_shape
        factor = vae_factor(self.vae.config)
        return height * factor, width * factor


def latent_shape(unet_config: Any) -> tuple[int, int, int]:
    size = unet_config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return unet_config["in_channels"], height, width


def vae_factor(vae_config: Any) -> int:
    """Pixels along one side of a latent's pixel."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def quiet_libraries() -> None:
    """No progress bars and no advice from the libraries: what they print belongs to neither stdout nor our stderr."""
    import warnings

    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="diffusers|transformers|torch|open_clip|huggingface_hub|PIL")


def describe(source: Source, overrides: Overrides | None = None) -> Description:
    """Read what describes a model. Raises InputError for what is not Stable Diffusion 1, 2 or XL, or brings code of its own."""
    try:
        return _described(source, overrides or Overrides())
    except DAMAGE as error:  # an entry that is missing, of another type, or no size that a network can have
        raise InputError(
            f"the description of {source.name} is damaged: {type(error).__name__} {error}", "take another copy of the model"
        ) from error


def _described(source: Source, wishes: Overrides) -> Description:
    if source.is_file:
        prediction = None if wishes.prediction_type == "auto" else wishes.prediction_type
        file = single_file.read(source.path, Path(wishes.model_config) if wishes.model_config else None, prediction)
        networks, scheduler_config, card = dict(file.configs), dict(file.scheduler_config), _card_in(file)
        empty_is_zero = bool(FAMILIES[file.family].pipeline.get("force_zeros_for_empty_prompt", False))
    else:
        if graph_format(source.path):
            raise InputError(
                f"{source.name} holds exported graphs, which only draw", "`sid sample`, or the run that they came from"
            )
        if wishes.model_config:
            raise UsageError(f"--model-config describes a single file; {source.name} is a folder and describes itself")
        file = None
        networks, empty_is_zero = _read_folder(source)
        scheduler_config, card = read_json(source.part("scheduler") / "scheduler_config.json"), read_card(source)
        if wishes.prediction_type != "auto":
            scheduler_config["prediction_type"] = wishes.prediction_type
    channels, height, width = latent_shape(networks["unet"])
    if channels != networks["vae"].get("latent_channels", 4):
        raise InputError(
            f"{source.name} takes {channels} channels in: an inpainting or editing model", "use a plain text-to-image model"
        )
    heard = networks["unet"].get("cross_attention_dim")
    told = sum(networks[name].get("hidden_size", 0) for name in ("text_encoder", "text_encoder_2") if name in networks)
    if heard != told:
        raise InputError(
            f"{source.name}: the UNet listens to text {heard} wide, its text encoders give {told}", "take another copy of the model"
        )
    size = _size(wishes, networks, height, width)
    schedule = read_schedule(scheduler_config)
    return Description(source, networks, scheduler_config, schedule, card, empty_is_zero, size, file)


def _read_folder(source: Source) -> tuple[dict[str, dict[str, Any]], bool]:
    """The configurations of a diffusers folder's networks, and whether the empty prompt is zeros."""
    index = read_json(source.path / "model_index.json")
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise InputError(f"{source.name} brings code of its own ({kind}), which is never run", "use a model of stock classes")
    names = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if "text_encoder_2" in index else [])]
    if not kind.startswith("StableDiffusion") or "transformer" in index or index.get("text_encoder", [None])[0] is None:
        raise InputError(
            f"{source.name} is a {kind}, which is not supported", "use a Stable Diffusion 1, 2 or XL text-to-image model"
        )
    refuse_code(source, index)
    networks = {}
    for name in names:
        asked = index.get(name, [None, None])[-1]
        if asked != CLASSES[name].__name__:
            raise InputError(f"{source.name}: its {name} is a {asked}, not a {CLASSES[name].__name__}", "use a stock pipeline")
        networks[name] = read_json(source.part(name) / "config.json")
        if networks[name].get("_class_name", asked) != asked:
            raise InputError(
                f"{source.name}: its {name} is a {networks[name]['_class_name']}, not a {asked}", "use a stock pipeline"
            )
        if "quantization_config" in networks[name]:
            raise InputError(f"{source.name}: its {name} is quantized", "use the model in half precision or better")
    return networks, bool(index.get("force_zeros_for_empty_prompt", False)) and len(names) == 4


def refuse_code(source: Source, index: dict[str, Any]) -> None:
    """Raises InputError where a folder's descriptions ask for classes that are not those of diffusers and transformers.

    None of them would be run. But a model that counts on its own code is not what its weights alone would draw.
    """
    for name, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] not in STOCK:
            raise InputError(
                f"{source.name}: its {name} is of {entry[0]}: code of its own, which is never run", "use a stock pipeline"
            )
    if index["_class_name"] not in dir(diffusers):
        raise InputError(
            f"{source.name} is a {index['_class_name']}, which diffusers does not know: code of its own, which is never run",
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


def _size(wishes: Overrides, networks: dict[str, dict[str, Any]], height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels, as wished; then the UNet's configuration says so too."""
    factor = vae_factor(networks["vae"])
    wanted = (wishes.height or height * factor, wishes.width or width * factor)
    for name, side in zip(("height", "width"), wanted, strict=True):
        if not factor <= side <= LARGEST or side % factor:
            raise UsageError(f"--{name} must be a multiple of {factor} for this model, at most {LARGEST}, not {side}")
    inner = [side // factor for side in wanted]
    networks["unet"] = networks["unet"] | {"sample_size": inner[0] if inner[0] == inner[1] else inner}
    return wanted


def load(source: Source, overrides: Overrides | None = None) -> Model:
    """Read a model found before. Raises InputError for what is not a Stable Diffusion 1, 2 or XL model in safetensors."""
    known = describe(source, overrides)
    try:
        nets = {name: _network(known, name) for name in known.networks}
        tokenizers = [_tokenizer(known, name) for name in known.texts]
    except (*DAMAGE, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source.name} is not a Stable Diffusion model in safetensors: {reason}", "see `sid distill --help`"
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
        tuple(tokenizers),
        known.schedule,
        known.scheduler_config,
        known.card,
        known.empty_is_zero,
    )


def _card_in(file: single_file.SingleFile) -> dict[str, Any]:
    """The sid.json that our own single files carry in their header; {} for others."""
    try:
        card = json.loads(file.metadata.get("sid.card", "{}"))
    except (ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def _network(known: Description, name: str) -> Any:
    if known.file:
        with init_empty_weights():  # parameters alone stay empty; buffers that no file holds, such as position ids, are made
            net = build(name, known.networks[name])
        net.load_state_dict({key: value.float() for key, value in known.file.tensors(name).items()}, assign=True)
        return net
    folder = known.source.part(name)
    check_files(folder)
    options: dict[str, Any] = {"dtype": torch.float32, **_stored(folder)}
    if name in known.texts:  # whose description may also choose an implementation, even one to be downloaded
        options |= {"config": text_config(known.networks[name]), "attn_implementation": "sdpa"}
    # The libraries would fill gaps with noise and leave over what does not fit, each with a warning.
    net, report = CLASSES[name].from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    misshaped = [f"{key} of shape {list(found)}, where {list(wanted)} belongs" for key, found, wanted in report["mismatched_keys"]]
    spare = [key for key in report["unexpected_keys"] if not single_file.SPARE.search(key)]
    for found, what in ((misshaped, "has"), (report["missing_keys"], "lacks"), (spare, "has no place for")):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise InputError(f"{folder} {what} {', '.join(sorted(found)[:3])}{more}", "take another copy of the model")
    return net


def check_files(folder: Path) -> None:
    """Raises InputError where a file of weights is no whole safetensors file, is quantized, or a list of shards leads elsewhere."""
    for file in sorted(folder.glob("*.safetensors.index.json")):
        named = read_json(file).get("weight_map")
        for shard in named.values() if isinstance(named, dict) else [named]:
            if not (isinstance(shard, str) and WEIGHTS.fullmatch(shard) and (folder / shard).is_file()):
                raise InputError(f"{file} names {shard}, which is no shard beside it", "take another copy of the model")
    for file in sorted(file for file in folder.glob("*.safetensors") if WEIGHTS.fullmatch(file.name)):
        with single_file.opened(file) as content:
            for key in content.keys():  # noqa: SIM118 - no mapping
                kind = content.get_slice(key).get_dtype()
                if kind not in single_file.FLOATS and not single_file.SPARE.search(key):
                    raise InputError(
                        f"{file} holds {key} as {kind}, which is no float", "use the model in half precision or better"
                    )


def check_finite(known: Description, name: str, net: nn.Module) -> None:
    """Raises InputError where a weight is not a finite number; those of SD 1.5 take a fifth of a second to look at."""
    for key, value in net.state_dict().items():
        # A sum is finite only if all its terms are; where it is not, two large ones may have overflowed it.
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
            raise InputError(
                f"{known.source.name}: {key} of its {name} holds values that are not finite", "take another copy of the model"
            )


def _tokenizer(known: Description, name: str) -> CLIPTokenizer:
    folder = name.replace("text_encoder", "tokenizer")
    if known.file:
        return clip_tokenizer(FAMILIES[known.file.family].tokenizers[folder]["pad_token"])
    return CLIPTokenizer.from_pretrained(known.source.part(folder), local_files_only=True)


def _stored(folder: Path) -> dict[str, Any]:
    """How the libraries are to read a network's folder: safetensors alone, those of half precision where there are no others."""
    names = [file.name for file in folder.glob("*.safetensors")]
    variant = "fp16" if names and all(".fp16" in name for name in names) else None
    return {"use_safetensors": True, "local_files_only": True, "variant": variant}


def read_schedule(scheduler_config: dict[str, Any]) -> Schedule:
    """The schedule of any diffusers scheduler config. Raises InputError for a prediction type we cannot convert."""
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"prediction type {prediction!r} is not supported", "teachers predict epsilon or v_prediction")
    known = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}
    try:
        scheduler = DDPMScheduler(**{key: value for key, value in scheduler_config.items() if key in known})
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"the scheduler's description makes no schedule: {error}", "take another copy of the model") from error
    schedule = Schedule.from_betas(scheduler.betas, prediction)
    if prediction == "epsilon" and schedule.abar[-1] == 0:
        raise InputError(
            "a schedule with zero terminal SNR needs a teacher that predicts v: noise says nothing where nothing else is left",
            "--prediction-type v_prediction, if that is what it predicts",
        )
    return schedule
