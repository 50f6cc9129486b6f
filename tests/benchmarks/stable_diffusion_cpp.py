"""Draw an image of a one-step student with stable-diffusion.cpp, from the single file that `sid export` writes, and compare it with
the image of `sid sample`.

    python -m venv cpp
    cpp/bin/pip install cyllama                                                   (Python bindings of stable-diffusion.cpp)
    python -m tests.benchmarks.stable_diffusion_cpp --python cpp/bin/python

The student has the architecture of Stable Diffusion 1.5 at full size and random weights. stable-diffusion.cpp gets what the model card
says: Euler, the student's sigmas, no guidance, and the random numbers of torch on a CPU. Writes results/stable_diffusion_cpp.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from sidcli import api
from sidcli.files import write_json
from sidcli.formats import export
from sidcli.formats.order import Order
from sidcli.formats.single_file_folder import FILE, sigmas
from sidcli.models.families import BETAS, FAMILIES, clip_tokenizer
from sidcli.models.loading import load, quiet_libraries
from sidcli.models.sources import find
from sidcli.progress import silent
from tests.tiny_students import student_of

RESULT = Path(__file__).parent / "results" / "stable_diffusion_cpp.json"
PROMPT = "a red bicycle on a beach"
DRAW = """
import json, sys
from importlib.metadata import version
from cyllama.sd import RngType, SampleMethod, SDContext, SDContextParams, SDImageGenParams

given = json.loads(sys.argv[1])
context = SDContextParams()
context.model_path, context.rng_type, context.sampler_rng_type = given["file"], RngType.CPU, RngType.CPU
order = SDImageGenParams()
order.prompt, order.width, order.height, order.seed = given["prompt"], given["size"], given["size"], 0
sampling = order.sample_params
sampling.sample_steps, sampling.cfg_scale, sampling.sample_method = len(given["sigmas"]) - 1, 1.0, SampleMethod.EULER
sampling.custom_sigmas = given["sigmas"]
SDContext(context).generate_with_params(order)[0].save_png(given["output"])
print(version("cyllama"))
"""
"""The program that draws with stable-diffusion.cpp, in the Python that has its bindings."""


def write_teacher(folder: Path, size: int) -> Path:
    """Write a pipeline with the configurations of Stable Diffusion 1.5, random weights, and images of `size` pixels on a side."""
    torch.manual_seed(0)
    parts = FAMILIES["sd1"].components
    networks: dict[str, Any] = {
        "unet": UNet2DConditionModel(**parts["unet"] | {"sample_size": size // 8}),
        "vae": AutoencoderKL(**parts["vae"] | {"sample_size": size}),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])),
        "tokenizer": clip_tokenizer("<|endoftext|>"),
        "scheduler": EulerDiscreteScheduler(**BETAS, steps_offset=1),
    }
    networks |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**networks).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the Python that has cyllama")
    parser.add_argument("--size", type=int, default=256, help="pixels on a side")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "fp16"])
    options = parser.parse_args()
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        student = student_of(load(find(str(write_teacher(Path(temporary) / "teacher", options.size)))))
        for dtype in options.dtype:
            folder = Path(temporary) / dtype
            stock = export.run(student, "single-file", folder, Order(dtype=dtype), True, silent)
            given = {"file": str(folder / FILE), "prompt": PROMPT, "size": options.size, "sigmas": [*sigmas(student), 0.0]}
            given |= {"output": str(folder / "theirs.png")}
            started = time.monotonic()
            drawn = subprocess.run([options.python, "-c", DRAW, json.dumps(given)], check=True, capture_output=True, text=True)
            seconds = time.monotonic() - started
            api.sample(PROMPT, model=given["file"], seed=0, output=folder / "ours.png")
            ours, theirs = (
                np.asarray(Image.open(folder / f"{name}.png").convert("RGB")).astype(int) for name in ("ours", "theirs")
            )
            difference = np.abs(ours - theirs)
            row = {"dtype": dtype, "size": options.size, "spread_255": round(float(ours.std()), 1)}
            row |= {"largest_255": int(difference.max()), "mean_255": round(float(difference.mean()), 3)}
            row |= {"stock_diffusers_255": stock.difference, "cyllama": drawn.stdout.split()[-1], "seconds": round(seconds, 1)}
            rows.append(row)
            print(row, flush=True)
    write_json(RESULT, {"rows": rows})


if __name__ == "__main__":
    main()
