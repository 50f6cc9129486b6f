"""Export of a student as one file in the original (ldm) layout, with a ComfyUI workflow that runs it exactly and with settings for
other programs. Of a transformer, the file contains the transformer alone; see `transformer_file`."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidcli.diffusion.path import DiscretePath
from sidcli.errors import InputError
from sidcli.files import write_json
from sidcli.formats import transformer_file
from sidcli.formats.card import PROMPT, call_options, write_card
from sidcli.formats.comfyui import workflow
from sidcli.formats.diffusers_folder import run_pipeline, stock, student_scheduler, write_pipeline
from sidcli.formats.order import Order
from sidcli.formats.transformer_file import FILE
from sidcli.models import single_file
from sidcli.models.families import clip_tokenizer
from sidcli.models.loading import Description, Model
from sidcli.models.sampler import plan_for
from sidcli.models.unet import read_path

SCHEDULE = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
"""The noise schedule of Stable Diffusion 1, 2 and XL. Programs that read single files assume this schedule."""

COMFYUI = """- **ComfyUI** 0.7.0 or newer, which has the node ManualSigmas: put `{file}` into `models/checkpoints` and open
  `comfyui_workflow.json`. A KSampler node would start at another noise level; this model was trained for the workflow's sigmas,
  {sigmas}."""
A1111 = """- **AUTOMATIC1111, Forge** (not tested): sampling method Euler, schedule type Karras, sampling steps 1, CFG scale 1, size
  {width} x {height}, and in the settings under sampler parameters `sigma max` = {first:.4f}.{first_step}"""
SD_CPP = """- **stable-diffusion.cpp**:

  ```bash
  {command}
  ```
"""
OTHERS = """- **AUTOMATIC1111, Forge, stable-diffusion.cpp**: they have no exact settings for this model, whose schedule has a zero terminal
  SNR."""
SID = """- **sid**:

  ```bash
  {commands}
  ```

  The second command writes a folder for diffusers, whose `from_single_file` would not use this model's scheduler."""


def sigmas(model: Model) -> list[float]:
    """Return the noise levels of the student's timesteps as sigma / a, as programs that read single files define them."""
    values = []
    for t in plan_for(model).grid:
        a, sigma = model.path.scale(t)
        values.append(float(sigma) / float(a))
    return values


def has_zero_snr(known: Model | Description) -> bool:
    """Return whether a noise schedule is Stable Diffusion's, rescaled to zero terminal SNR (arXiv 2305.08891).

    Returns False for the schedule without rescaling. A student's schedule ends at its first timestep. Raises InputError for any
    other schedule, because programs that read single files do not support it.
    """
    assert isinstance(known.path, DiscretePath)
    own = known.path.abar
    for rescaled in (False, True):
        config = SCHEDULE | {"rescale_betas_zero_snr": rescaled, "prediction_type": "v_prediction"}
        usual = read_path(config).abar[: len(own)]
        if usual.shape == own.shape and torch.allclose(usual, own, rtol=0, atol=1e-6):
            return rescaled
    raise InputError(
        f"{known.source.name} has a noise schedule of its own; programs that read single files use Stable Diffusion's",
        "use --format diffusers",
    )


def check(known: Description, denoiser: Any) -> None:
    """Raises InputError if programs cannot read a single file of the described model. `denoiser` can be on the meta device."""
    if known.kind.is_ldm:
        has_zero_snr(known)
    elif problem := known.kind.single_file_problem(denoiser.config):
        raise InputError(f"{known.source.name}: {problem}", "use --format diffusers")


def is_readable(model: Model) -> bool:
    """Return whether programs that read single files can run the model: whether it has CLIP's vocabulary and their noise schedule."""
    try:
        has_zero_snr(model)
    except InputError:
        return False
    return has_clip_vocabulary(model)


def has_clip_vocabulary(model: Model) -> bool:
    return model.tokenizers[0].get_vocab() == clip_tokenizer().get_vocab()


def write(folder: Path, model: Model, order: Order) -> None:
    """Write a student as a single file, with a ComfyUI workflow and a model card.

    Raises InputError if the model does not use CLIP's vocabulary or Stable Diffusion's schedule, because programs that read single
    files support nothing else.
    """
    if not model.kind.is_ldm:
        transformer_file.write(folder, model, order)
        return
    if not has_clip_vocabulary(model):
        raise InputError(
            f"{model.source.name} has a tokenizer of its own; programs that read single files use CLIP's", "use --format diffusers"
        )
    zero_snr, prediction = has_zero_snr(model), model.path.prediction
    card = model.card | {"format": "single-file", "dtype": order.dtype}
    scheduler = SCHEDULE | {"rescale_betas_zero_snr": zero_snr, "prediction_type": prediction}
    single_file.write(folder / FILE, model.networks, scheduler, {"sid.card": json.dumps(card)}, order.torch_dtype)
    levels, (height, width) = sigmas(model), model.size
    steps = workflow(FILE, levels, width, height, PROMPT, 0, prediction, zero_snr)
    write_json(folder / "comfyui_workflow.json", steps)
    write_card(folder, model, card, usage(model))


def usage(model: Model) -> str:
    """Return Markdown that explains how other programs run the file. Settings that would not be exact are left out."""
    levels, (height, width) = sigmas(model), model.size
    programs = [COMFYUI.format(file=FILE, sigmas=", ".join(f"{level:.6f}" for level in [*levels, 0]))]
    if has_zero_snr(model):
        programs.append(OTHERS)
    else:
        if model.path.prediction == "epsilon":  # for other types it depends on the program's version and on files beside the model
            more = f" This runs the first of the model's {len(levels)} steps alone: there is no setting for the others."
            programs.append(A1111.format(width=width, height=height, first=levels[0], first_step=more if len(levels) > 1 else ""))
        programs.append(SD_CPP.format(command=shlex.join(sd_cpp(model))).rstrip())
    draw = ["sid", "sample", PROMPT, "--model", FILE]
    convert = ["sid", "export", FILE, "--format", "diffusers", "-o", "diffusers"]
    programs.append(SID.format(commands=f"{shlex.join(draw)}\n  {shlex.join(convert)}"))
    return "\n".join(programs)


def sd_cpp(model: Model) -> list[str]:
    """Return the command of stable-diffusion.cpp that draws the same image as `sid sample` with seed 0."""
    levels, (height, width) = sigmas(model), model.size
    options = {
        "-m": FILE,
        "--prediction": "eps" if model.path.prediction == "epsilon" else "v",
        "--sampling-method": "euler",
        "--steps": len(levels),
        "--sigmas": ",".join(f"{level:.6f}" for level in [*levels, 0]),
        "--cfg-scale": 1,
        "-W": width,
        "-H": height,
        "--rng": "cpu",
        "-s": 0,
        "-p": PROMPT,
    }
    return ["sd-cli", *(str(word) for pair in options.items() for word in pair)]


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """Draw one image, uint8 [H, W, 3], with stock diffusers. A temporary pipeline folder without weights provides the configs."""
    if not model.kind.is_ldm:
        return transformer_file.draw(folder, model, order, prompt, seed)
    scheduler = student_scheduler(model.scheduler_config, int(model.card["t_init"]))
    with tempfile.TemporaryDirectory() as described:
        write_pipeline(Path(described), model, scheduler, model.card, order, weights=False)
        options = {"config": described, "local_files_only": True, "dtype": order.torch_dtype}
        pipe = stock(model).from_single_file(str(folder / FILE), **options, scheduler=scheduler)
    return run_pipeline(pipe, plan_for(model), prompt, seed, **call_options(model))
