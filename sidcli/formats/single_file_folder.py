"""A student as one file in the original (ldm) layout, with a ComfyUI workflow that runs it exactly and the settings for other programs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from sidcli.errors import InputError
from sidcli.families import clip_tokenizer
from sidcli.files import write_json
from sidcli.formats import single_file
from sidcli.formats.card import write_card
from sidcli.formats.comfyui import workflow
from sidcli.formats.diffusers_folder import run_pipeline, stock, student_scheduler, write_pipeline
from sidcli.formats.order import Order
from sidcli.sampler import plan_for
from sidcli.teachers import Model

FILE = "student.safetensors"
PROMPT = "a cat"
USAGE = """- **ComfyUI**: put `{file}` into `models/checkpoints` and open `comfyui_workflow.json`. The ordinary KSampler begins at another
  noise level; the workflow's sigmas ({sigmas}) are what this model was trained for.
- **AUTOMATIC1111, Forge**: sampler Euler, schedule type Karras, steps {steps}, CFG scale 1, and in the settings for sampler parameters
  `sigma max` = {first}{only}.
- **stable-diffusion.cpp**: `sd-cli -m {file} --sampling-method euler --steps {steps} --cfg-scale 1 --sigmas "{sigmas}" -p "{prompt}"`
- **diffusers**: `from_single_file` takes a scheduler that does not fit; use `sid export --format diffusers`.
- **sid**: `sid sample "{prompt}" --model {file}`"""


def sigmas(model: Model) -> list[float]:
    """Noise levels sigma / a of the student's timesteps, as these programs count them."""
    values = []
    for t in plan_for(model).grid:
        a, sigma = model.schedule.scale(t)
        values.append(float(sigma) / float(a))
    return values


def write(folder: Path, model: Model, order: Order) -> None:
    """Raises InputError for a model with words of its own, which the programs that read such files would not know."""
    if model.tokenizers[0].get_vocab() != clip_tokenizer().get_vocab():
        raise InputError(
            f"{model.source.name} has a tokenizer of its own; programs that read single files bring CLIP's",
            "use --format diffusers",
        )
    names = ["unet", "vae", "text_encoder", "text_encoder_2"]
    networks = dict(zip(names, [model.unet, model.vae, *model.text_encoders], strict=False))
    card = model.card | {"format": "single-file"}
    single_file.write(folder / FILE, networks, model.scheduler_config, {"sid.card": json.dumps(card)}, order.torch_dtype)
    levels, (height, width) = sigmas(model), model.size
    zero_snr = bool(model.scheduler_config.get("rescale_betas_zero_snr"))
    steps = workflow(FILE, levels, width, height, PROMPT, 0, model.schedule.prediction, zero_snr)
    write_json(folder / "comfyui_workflow.json", steps)
    usage = USAGE.format(
        file=FILE,
        sigmas=", ".join([*(f"{level:.6f}" for level in levels), "0"]),
        steps=len(levels),
        first=f"{levels[0]:.4f}",
        only="" if len(levels) == 1 else " (exact for one step; with more, its own levels lie elsewhere than this model's)",
        prompt=PROMPT,
    )
    write_card(folder, model, card, usage)


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """One image, uint8 [H, W, 3], by stock diffusers, told by descriptions without weights what the file holds."""
    scheduler = student_scheduler(model.scheduler_config, int(model.card["t_init"]))
    with tempfile.TemporaryDirectory() as described:
        write_pipeline(Path(described), model, scheduler, model.card, order, weights=False)
        options = {"config": described, "local_files_only": True, "torch_dtype": order.torch_dtype}
        pipe = stock(model).from_single_file(str(folder / FILE), **options, scheduler=scheduler)
    return run_pipeline(pipe, plan_for(model), prompt, seed)
