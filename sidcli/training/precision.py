"""Choice of the arithmetic of a training: float32, or bf16 over float32 weights where the device computes it faster."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from sidcli.devices import has_bf16_units
from sidcli.distributed import count
from sidcli.engine import FP32, Arithmetic, default_arithmetic
from sidcli.files import read_json
from sidcli.models.kinds import kind_of
from sidcli.models.loading import Model
from sidcli.models.sampler import Sampler
from sidcli.progress import Progress, RunListener
from sidcli.settings import DistillConfig

CANDIDATES = (FP32, Arithmetic(bf16=True), Arithmetic(bf16=True, attention="math"))
IMAGES = 8
"""Maximum number of images in a measured pass."""
RECORD_HINT = "restore it from a copy, because it holds the precision of the run; or choose another --output for a new run"
REPEATS = 3
"""Passes per candidate; the fastest counts, because the first one also prepares kernels."""


def choose(
    teacher: Model, config: DistillConfig, device: torch.device, record: Path, listener: RunListener
) -> tuple[Arithmetic, dict[str, float]]:
    """Return the arithmetic of a run and, if it was measured, the seconds per image of each candidate by name.

    `--precision auto` measures on a CPU with bf16 units (AMX or AVX512-BF16), in a run of one process. A run that continues on a CPU
    keeps the choice in its `record`, run.json, because another precision would change its results.
    """
    if config.precision != "auto" or device.type != "cpu":
        return default_arithmetic(config.precision, device), {}
    before = read_json(record, RECORD_HINT) if record.exists() else {}
    if before.get("device") == "cpu" and isinstance(before.get("bf16"), bool):
        kept = Arithmetic(before["bf16"], "math" if before.get("attention") == "math" else "auto")
        return kept, before.get("seconds_per_image") or {}
    if count() > 1 or not has_bf16_units():
        return FP32, {}
    # A run that recomputes activations may have no memory for those of several images.
    images = 1 if config.gradient_checkpointing else min(config.micro_batch, IMAGES)
    measured = measure(teacher, images, listener)
    return min(measured, key=lambda one: measured[one]), {one.name: round(value, 5) for one, value in measured.items()}


def measure(teacher: Model, images: int, listener: RunListener) -> dict[Arithmetic, float]:
    """Return the seconds per image of a forward and backward pass of the teacher's denoiser on the CPU, for each candidate."""
    sampler = Sampler(teacher, torch.device("cpu"))
    net, cond = sampler.denoiser, sampler.encode([""]).expand(images)
    x, t = torch.zeros(images, *teacher.latent_shape), torch.zeros(images, dtype=torch.int64)
    found = dict.fromkeys(CANDIDATES, math.inf)
    net.requires_grad_(True)
    try:
        with listener.progress("compare precisions", len(CANDIDATES) * REPEATS, "passes") as advance:
            # In turns, so that other work on the machine slows no candidate alone.
            for one in CANDIDATES * REPEATS:
                found[one] = min(found[one], _pass(net, (x, t, cond), one, advance) / images)
    finally:
        net.requires_grad_(False)
    return found


def _pass(net: Any, inputs: tuple[Any, ...], arithmetic: Arithmetic, advance: Progress) -> float:
    begun = time.perf_counter()
    with torch.enable_grad(), arithmetic.kernels():
        with arithmetic.autocast("cpu"):
            output = kind_of(net).denoise(net, *inputs)
        torch.autograd.grad(output.float().square().mean(), [value for value in net.parameters() if value.requires_grad])
    advance(1)
    return time.perf_counter() - begun
