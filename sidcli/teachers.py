"""From the name of a model to its networks: embedded name | run folder | diffusers folder | hub id -> Model.

Only JSON and safetensors are read, and component classes are chosen here by name, never by the file: nothing in a stranger's folder
can run.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from sidcli.diffusion import Schedule
from sidcli.errors import InputError
from sidcli.hub import Listener, Silence, fetch

EMBEDDED = {"emoji-teacher": "teacher", "emoji": "student"}
WEIGHTS = Path(__file__).parent / "emoji" / "weights"

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Source:
    """Where a model was found: `folder` on this disk, `name` as asked for, `origin` and `revision` as actually used."""

    name: str
    folder: Path
    origin: str
    revision: str = ""
    missing: tuple[tuple[str, int], ...] = ()
    """Files of a hub model, with their bytes, that are not on this disk; empty unless only descriptions were asked for."""


@dataclass(eq=False)
class Model:
    """The networks of one text-to-image model, float32 and in eval mode, and what is known about it."""

    source: Source
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: Schedule
    scheduler_config: dict[str, Any]
    card: dict[str, Any] = field(default_factory=dict)
    """The content of sid.json: empty for models that are not ours."""

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

    def with_unet(self, unet: UNet2DConditionModel) -> Model:
        """The same model around another drawing network."""
        return dataclasses.replace(self, unet=unet)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of a latent at the model's own size."""
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, size, size


def quiet_libraries() -> None:
    """No progress bars and no advice from the libraries: what they print belongs to neither stdout nor our stderr."""
    import warnings

    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="diffusers|transformers|torch|open_clip|huggingface_hub")


def find(name: str, listener: Listener | None = None, descriptions_only: bool = False) -> Source:
    """Resolve a model name; of a hub model that is not in the cache, `descriptions_only` fetches no weights.

    Raises InputError where nothing is found, with the ways out.
    """
    if name in EMBEDDED:
        return Source(name, WEIGHTS / EMBEDDED[name], f"embedded:{name}")
    path = Path(name).expanduser()
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{name}: pickled weights can run code and are not read", "convert the model to safetensors first")
    if path.is_file():
        raise InputError(f"{name} is a file; a diffusers folder is wanted", "pass the folder that holds model_index.json")
    if path.is_dir():
        for folder in (path, path / "student"):
            if (folder / "model_index.json").is_file():
                return Source(name, folder, str(folder))
        raise InputError(
            f"{name} holds neither model_index.json nor student/", "pass a diffusers folder, or a run folder that has finished"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) and not name.startswith((".", "/", "runs/")):
        fetched = fetch(name, listener or Silence(), descriptions_only)
        return Source(name, fetched.folder, f"hub:{fetched.repo}", fetched.revision, fetched.missing)
    raise InputError(
        f"no model {name!r}: not a folder, not a hub id, and not one of {', '.join(EMBEDDED)}", "check the spelling of the path"
    )


def read_card(source: Source) -> dict[str, Any]:
    """The content of sid.json beside a model of ours, {} for others. Raises InputError where it cannot be read."""
    file = source.folder / "sid.json"
    try:
        card = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged: {error}", "write the model again, or take another copy of it") from error
    if not isinstance(card, dict):
        raise InputError(f"{file} is damaged: not a JSON object", "write the model again, or take another copy of it")
    return card


def load(source: Source) -> Model:
    """Read a model found before. Raises InputError for a folder that is not a Stable Diffusion 1 or 2 pipeline in safetensors."""
    folder = source.folder
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if "text_encoder_2" in index or "transformer" in index:
            raise InputError(
                f"{source.name} is a {index.get('_class_name')}, which is not supported yet", "use a Stable Diffusion 1 or 2 model"
            )
        scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, **stored(folder / "unet"))
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, **stored(folder / "vae"))
        text = folder / "text_encoder"
        text_encoder = CLIPTextModel.from_pretrained(text, dtype=torch.float32, **stored(text))
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{source.name} is not a Stable Diffusion folder in safetensors: {reason}", "see `sid distill --help`"
        ) from error
    for net in (unet, vae, text_encoder):
        net.eval().requires_grad_(False)
    return Model(source, unet, vae, text_encoder, tokenizer, read_schedule(scheduler_config), scheduler_config, read_card(source))


def stored(folder: Path) -> dict[str, Any]:
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
    scheduler = DDPMScheduler(**{key: value for key, value in scheduler_config.items() if key in known})
    schedule = Schedule.from_betas(scheduler.betas, prediction)
    if prediction == "epsilon" and schedule.abar[-1] == 0:
        raise InputError(
            "a schedule with zero terminal SNR needs a teacher that predicts v: noise says nothing where nothing else is left",
            'set "prediction_type" in scheduler_config.json right, or "rescale_betas_zero_snr" to false',
        )
    return schedule
