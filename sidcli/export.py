"""`sid export`: a student for other programs. Whatever is written is read back and compared before it gets its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from sidcli.errors import EnvironmentProblem, GateError, InputError, UsageError
from sidcli.files import atomic_folder, check_writable, sha256
from sidcli.formats.diffusers_folder import DTYPES, student_scheduler, write_pipeline
from sidcli.sampler import Sampler, plan_for
from sidcli.teachers import Model

FORMATS = ("diffusers",)
PROMPT = "a cat on a blue background"
TOLERANCE = {"fp32": 1, "fp16": 16, "bf16": 64}
"""Largest difference allowed between the exported model's image and ours, in 1/255."""


@dataclass(frozen=True)
class Exported:
    folder: Path
    files: dict[str, dict[str, object]]
    difference: int | None
    """Largest pixel difference between stock diffusers and `sid sample`, in 1/255; None if it was not verified."""


def run(model: Model, format_name: str, output: Path, dtype: str, verify: bool, overwrite: bool) -> Exported:
    """Write the student. Raises GateError where stock diffusers draws something else; nothing is left behind then."""
    if format_name not in FORMATS:
        raise UsageError(f"unknown format {format_name!r}", f"one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UsageError(f"unknown --dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
    if model.card.get("renoise", "ddim") != "ddim" and model.card.get("student_steps", 1) > 1:
        raise InputError(
            f"{model.source.name} renoises with {model.card['renoise']} noise, which no stock scheduler does",
            "draw with `sid sample`, or distil with --renoise ddim",
        )
    if not model.is_student:
        raise InputError(f"{model.source.name} is not a student", "export a run folder, its student/, or `emoji`")
    check_writable(output)
    if output.exists() and not overwrite:
        raise EnvironmentProblem(f"{output} exists already", "choose another --output, or pass --overwrite")
    difference = None
    with atomic_folder(output) as folder:
        write_pipeline(folder, model, student_scheduler(model.scheduler_config, int(model.card["t_init"])), model.card, dtype)
        if verify:
            difference = compare(model, folder, dtype)
            if difference > TOLERANCE[dtype]:
                raise GateError(
                    f"stock diffusers draws another image from the export: {difference}/255 apart, {TOLERANCE[dtype]}/255 allowed",
                    "please report this model; nothing was written",
                )
    files = {
        str(file.relative_to(output)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(output.rglob("*"))
        if file.is_file()
    }
    return Exported(output, files, difference)


def compare(model: Model, folder: Path, dtype: str) -> int:
    """Draw one prompt with stock diffusers and with our sampler, from the same noise; the largest difference in 1/255."""
    sampler = Sampler(model, torch.device("cpu"))
    plan = plan_for(model, None, None)
    ours = sampler.decode(sampler.latents([PROMPT], sampler.noise([0], plan.noises), plan))[0].numpy()
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES[dtype], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    visits: dict[str, object] = {"num_inference_steps": 1} if plan.steps == 1 else {"timesteps": list(plan.grid)}
    theirs = np.asarray(pipe(PROMPT, **visits, guidance_scale=0, generator=generator).images[0])
    return int(np.abs(ours.astype(np.int16) - theirs.astype(np.int16)).max())
