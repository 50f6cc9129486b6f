"""Export of a student's transformer alone as one file under the names of the original code, as its authors publish it.

Text encoders and VAE are those of the teacher. ComfyUI and diffusers read such files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sidcli.files import save_tensors
from sidcli.formats.card import call, call_options, write_card
from sidcli.formats.comfyui import flow_settings
from sidcli.formats.diffusers_folder import assembled, run_pipeline, scheduler_of, stock
from sidcli.formats.order import DTYPES, Order
from sidcli.models.drawing import student_plan
from sidcli.models.ldm import arranged, located
from sidcli.models.loading import Model
from sidcli.models.sampler import plan_for

FILE = "student.safetensors"
USAGE = """- **diffusers**:

  ```python
  import torch
  from diffusers import {transformer}, {pipeline}

  options = {{"config": "FOLDER", "subfolder": "{component}", "dtype": torch.{dtype}}}
  net = {transformer}.from_single_file("FOLDER/{file}", **options)
  pipe = {pipeline}.from_pretrained("TEACHER", {component}=net{absent}, dtype=torch.{dtype})
  {call}.images[0].save("cat.png")
  ```

  `FOLDER` is this folder, `TEACHER` a folder of {teacher} or its id on the hub. The scheduler is that of the teacher."""
COMFYUI = """
- **ComfyUI** (not tested): put `{file}` into `models/diffusion_models` and load it with the node Load Diffusion Model.
  {settings}"""


def write(folder: Path, model: Model, order: Order) -> None:
    """Write a student's transformer as a single file, its configuration and a model card to an empty folder.

    Raises InputError if the original code has no name for a tensor.
    """
    kind, net = model.kind, model.denoiser
    card = model.card | {"format": "single-file", "dtype": order.dtype}
    weights = net.state_dict()
    places = located(kind.places(net.config), weights, kind.title)
    header = {"format": "pt", "modelspec.title": Path(FILE).stem, "sid.card": json.dumps(card)}
    save_tensors(arranged(weights, places, order.torch_dtype), folder / FILE, header)
    net.save_config(folder / kind.component)
    write_card(folder, model, card, usage(model, order))


def usage(model: Model, order: Order) -> str:
    """Return Markdown that explains how other programs run the file."""
    kind = model.kind
    text = USAGE.format(
        transformer=type(model.denoiser).__name__,
        pipeline=stock(model).__name__,
        component=kind.component,
        file=FILE,
        dtype=DTYPES[order.dtype],
        absent="".join(f", {part}=None" for part in kind.absent(model.texts)),
        call=call(student_plan(model.card), call_options(model)),
        teacher=model.card.get("teacher", {}).get("name", "the teacher"),
    )
    if kind.in_comfyui(model.denoiser.config):
        text += COMFYUI.format(file=FILE, settings=flow_settings(model))
    return text


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """Draw one image, uint8 [H, W, 3], with stock diffusers, in float32 from the weights in the file."""
    options = {"config": str(folder), "subfolder": model.kind.component, "local_files_only": True}
    net = type(model.denoiser).from_single_file(str(folder / FILE), **options)
    return run_pipeline(assembled(model, scheduler_of(model), net), plan_for(model), prompt, seed, **call_options(model))
