"""Export of a student as a diffusers pipeline folder. Stock diffusers runs a one-step student with num_inference_steps=1,
guidance_scale=0.

The scheduler makes this possible: EulerDiscreteScheduler over the first t_init + 1 betas with trailing spacing starts at t_init
with sigma_t_init z and takes one step to the clean latent. This equals the computation of the one-step student. A student that draws
by multistep consistency sampling gets LCMScheduler.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from transformers import CLIPTokenizer

from sidcli.diffusion.path import FlowPath
from sidcli.files import atomic_folder, read_json, write_json
from sidcli.formats.card import PROMPT, add_licenses, call, call_options, has_stock_sampler, write_card
from sidcli.formats.order import DTYPES, Order
from sidcli.models.compatibility import SCHEDULE
from sidcli.models.drawing import Plan, is_consistency, student_plan
from sidcli.models.kind import tokenizer_of
from sidcli.models.loading import Model
from sidcli.models.sampler import plan_for

USAGE = """```python
{imports}from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("FOLDER"{options})
{call}.images[0].save("cat.png")
```

`FOLDER` is this folder or its id on the hub. Keep the scheduler: {keep}.
Keep `guidance_scale={scale}`: the model needs no guidance at inference."""
OPTIONAL = ("feature_extractor", "image_encoder")
"""Components of stock pipelines that models of sid do not have."""
KEEP = "its first timestep is the one this model was\ntrained at"
KEEP_FLOW = "its shift moves the timesteps to those\nthat this model was trained at"
KEEP_CONSISTENCY = "this model was trained for its timesteps\nand its sampling. It draws in 1 to {most} steps"
OWN_NOISE = """```bash
sid sample "{prompt}" --model FOLDER
```

This model adds its own noise between its steps (`{renoise}`), which no scheduler of diffusers does."""
REFERENCE = """```bash
sid sample "{prompt}" --reference reference.png --model FOLDER
```

The model draws the subject of a reference image. No pipeline of diffusers gives it one; `sid export --format onnx` writes graphs that other
programs run."""
SID_ONLY = """```bash
sid sample "{prompt}" --model FOLDER
```

Other programs do not draw with this model: {problem}."""


def student_scheduler(teacher_config: dict[str, Any], t_init: int) -> EulerDiscreteScheduler:
    """Return a scheduler with a truncated schedule, for which one Euler step equals the one-step student at t_init.

    The first betas of a scaled-linear (or linear) schedule form a scaled-linear (or linear) schedule again, so the config takes
    600 bytes. The betas of any other schedule are stored as `trained_betas`.
    """
    first = {key: teacher_config[key] for key in ("beta_schedule", "beta_start", "beta_end") if key in teacher_config}
    steps = int(teacher_config.get("num_train_timesteps", 1000))
    begin, end = float(first.get("beta_start", 0.0001)), float(first.get("beta_end", 0.02))
    kind = first.get("beta_schedule", "linear")
    options: dict[str, Any] = {
        "num_train_timesteps": t_init + 1,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # no effect with trailing spacing; pipelines warn about any other value
        "prediction_type": teacher_config.get("prediction_type", "epsilon"),
    }
    plain = teacher_config.get("trained_betas") is None and not teacher_config.get("rescale_betas_zero_snr", False)
    if plain and kind == "scaled_linear":
        end = (begin**0.5 + (end**0.5 - begin**0.5) * t_init / (steps - 1)) ** 2
    elif plain and kind == "linear":
        end = begin + (end - begin) * t_init / (steps - 1)
    else:
        known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
        betas = DDPMScheduler(**{key: teacher_config[key] for key in known if key in teacher_config}).betas
        return EulerDiscreteScheduler(trained_betas=betas[: t_init + 1].tolist(), **options)
    return EulerDiscreteScheduler(beta_schedule=kind, beta_start=begin, beta_end=end, **options)


def consistency_scheduler(teacher_config: dict[str, Any], solver_steps: int) -> LCMScheduler:
    """Return the scheduler of multistep consistency sampling over the noise schedule of the teacher."""
    schedule = {key: teacher_config[key] for key in SCHEDULE if key in teacher_config}
    return LCMScheduler(
        **schedule,
        prediction_type=teacher_config.get("prediction_type", "epsilon"),
        original_inference_steps=solver_steps,
        clip_sample=False,
        steps_offset=1,  # no effect; pipelines warn about any other value
    )


def scheduler_of(model: Model) -> Any:
    """Return the scheduler of diffusers that draws as a student does; for a model of many steps, that of its teacher."""
    if not model.is_student:
        return getattr(diffusers, model.scheduler_config["_class_name"]).from_config(model.scheduler_config)
    if is_consistency(model.card):
        return consistency_scheduler(model.scheduler_config, int(model.card["solver_steps"]))
    if isinstance(model.path, FlowPath):  # a student starts at pure noise, as the teacher does
        return FlowMatchEulerDiscreteScheduler.from_config(model.scheduler_config)
    return student_scheduler(model.scheduler_config, int(model.card["t_init"]))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer as tokenizer.json, and CLIP's also as vocab.json and merges.txt, which other programs read."""
    tokenizer.save_pretrained(folder)
    if not isinstance(tokenizer, CLIPTokenizer):
        return
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def write_student(
    path: Path, model: Model, card: dict[str, Any], dtype: str = "fp32", licenses: Sequence[tuple[str, Path]] = ()
) -> None:
    """Write `model` with its scheduler as a pipeline folder. `path` is written completely or not at all.

    `licenses` are the LICENSE files of the models that it started from; see `card.add_licenses`.
    """
    with atomic_folder(path) as folder:
        write(folder, dataclasses.replace(model, card=card), Order(dtype))
        add_licenses(folder, licenses)


def write(folder: Path, model: Model, order: Order) -> None:
    """Write a student's pipeline with its scheduler to an empty folder."""
    write_pipeline(folder, model, scheduler_of(model), model.card, order)


def draw(folder: Path, model: Model, order: Order, prompt: str, seed: int) -> np.ndarray:
    """Draw one image, uint8 [H, W, 3], with stock diffusers."""
    options: dict[str, Any] = {"dtype": order.torch_dtype, "variant": order.variant, "local_files_only": True}
    pipe = stock(model).from_pretrained(folder, **options, **dict.fromkeys(model.kind.absent(model.texts)))
    return run_pipeline(pipe, plan_for(model), prompt, seed, **call_options(model))


def stock(model: Model) -> Any:
    """Return the diffusers pipeline class for a model."""
    return model.kind.pipeline(model.texts)


def assembled(model: Model, scheduler: Any, denoiser: Any) -> Any:
    """Return the stock pipeline with the text encoders, the tokenizers and the VAE of `model`, and with this scheduler and denoiser."""
    kind = stock(model)
    taken, tokenizers = inspect.signature(kind.__init__).parameters, map(tokenizer_of, model.texts)
    parts: dict[str, Any] = {name: None for name in OPTIONAL if name in taken}
    parts |= {name: None if value == [None, None] else value for name, value in model.kind.index_entries(model).items()}
    parts |= model.networks | dict(zip(tokenizers, model.tokenizers, strict=True)) | {model.kind.component: denoiser}
    return kind(**parts, scheduler=scheduler)


def run_pipeline(pipe: Any, plan: Plan, prompt: str, seed: int, **options: Any) -> np.ndarray:
    """Draw one image, uint8 [H, W, 3], with a stock pipeline that contains a student."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipe(prompt, **plan.in_diffusers, generator=generator, **options).images[0])


def write_pipeline(folder: Path, model: Model, scheduler: Any, card: dict[str, Any], order: Order, weights: bool = True) -> None:
    """Write a pipeline folder with the given scheduler. If `weights` is False, the weights of the networks are left out."""
    index: dict[str, Any] = {"_class_name": stock(model).__name__, **model.kind.index_entries(model)}
    for name, network in model.networks.items():
        if weights:
            # The dtype of a copy is changed, so that the caller's network keeps its dtype.
            copy.deepcopy(network).to("cpu", order.torch_dtype).save_pretrained(folder / name, variant=order.variant)
        else:
            network.config.save_pretrained(folder / name) if name in model.texts else network.save_config(folder / name)
        described = read_json(folder / name / "config.json")
        described.pop("_name_or_path", None)  # the local path that the network was loaded from
        write_json(folder / name / "config.json", described)
        index[name] = [type(network).__module__.split(".")[0], type(network).__name__]
    for name, tokenizer in zip(map(tokenizer_of, model.texts), model.tokenizers, strict=True):
        save_tokenizer(tokenizer, folder / name)
        index[name] = ["transformers", type(tokenizer).__name__]
    scheduler.save_pretrained(folder / "scheduler")
    taken = inspect.signature(stock(model).__init__).parameters
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index |= {name: [None, None] for name in OPTIONAL if name in taken}
    write_json(folder / "model_index.json", index)
    if card.get("kind") == "student":
        card = card | {"format": "diffusers", "dtype": order.dtype, "call": call_options(model)}
        write_card(folder, model, card, usage(model, card, order))
    else:
        write_card(folder, model, card, "")


def usage(model: Model, card: dict[str, Any], order: Order) -> str:
    """Return Markdown that explains how to run a student's folder."""
    if not has_stock_sampler(card):
        return OWN_NOISE.format(prompt=PROMPT, renoise=card["renoise"])
    if model.layout:
        return REFERENCE.format(prompt=PROMPT)
    if problem := model.kind.stock_problem(model.texts):
        return SID_ONLY.format(prompt=PROMPT, problem=problem)
    options = "" if order.dtype == "fp32" else f", dtype=torch.{DTYPES[order.dtype]}"
    absent = "".join(f", {part}=None" for part in model.kind.absent(model.texts))
    return USAGE.format(
        imports="import torch\n" if options else "",
        pipeline=stock(model).__name__,
        options=options + (f', variant="{order.variant}"' if order.variant else "") + absent,
        call=call(student_plan(card), card["call"]),
        scale=card["call"]["guidance_scale"],
        keep=reason_to_keep(model, card),
    )


def reason_to_keep(model: Model, card: Mapping[str, Any]) -> str:
    """Return Markdown that says why a student needs its scheduler. `card` is the content of the student's sid.json."""
    if is_consistency(card):
        return KEEP_CONSISTENCY.format(most=card["solver_steps"])
    return KEEP_FLOW if isinstance(model.path, FlowPath) else KEEP
