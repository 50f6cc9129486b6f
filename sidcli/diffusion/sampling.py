"""Sampling along a path: the one- and few-step student, and the many-step teacher (DDIM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sidcli.diffusion.path import Path

Renoise = Literal["ddim", "fixed", "fresh"]
NoiseAt = Callable[[int], Tensor]
"""visit -> standard normal noise [B, C, h, w]."""
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, h, w], t int64 [B]) -> the network's raw prediction [B, C, h, w]."""


def exit_grid(t_init: int, steps: int) -> tuple[int, ...]:
    """The timesteps of a generator of `steps` steps: t_init (1 - i / steps), rounded down; 625, 468, 312, 156 for four.

    Trained with a random exit (arXiv 2505.12674), it may stop after any of them.
    """
    return tuple(t_init * (steps - index) // steps for index in range(steps))


def trailing_grid(timesteps: int, steps: int) -> tuple[int, ...]:
    """`steps` evenly spaced timesteps that end at T / steps - 1 and begin at T - 1, where nothing but noise is left."""
    return tuple(round(timesteps * (steps - index) / steps) - 1 for index in range(steps))


def denoise_along(
    denoise: Denoiser,
    x_t: Tensor,
    path: Path,
    grid: Sequence[int],
    renoise: Renoise = "ddim",
    noise_at: NoiseAt | None = None,
) -> Tensor:
    """Predict the clean latent at each timestep of `grid` and noise it again to the next one; returns the last prediction.

    `x_t` is the latent at grid[0]. Noise of the next timestep: `ddim` takes the predicted noise (arXiv 2010.02502, deterministic),
    `fixed` takes noise_at(0) each time, `fresh` takes noise_at(visit). Gradients flow through the last visit alone.
    """
    last = len(grid) - 1
    with torch.no_grad():
        for visit in range(last):
            t = grid[visit]
            predicted = denoise(x_t, every(t, x_t)).float()
            if noise_at is None or renoise == "ddim":
                noise = path.noise(predicted, x_t, t)
            else:
                noise = noise_at(visit + 1 if renoise == "fresh" else 0)
            x_t = path.noised(path.clean(predicted, x_t, t), noise, grid[visit + 1])
    return path.clean(denoise(x_t, every(grid[last], x_t)).float(), x_t, grid[last])


def every(t: int, x: Tensor) -> Tensor:
    """Timestep t for each latent of x, int64 [B]."""
    return torch.full((x.shape[0],), t, device=x.device)


def few_steps(denoise: Denoiser, noise_at: NoiseAt, path: Path, grid: Sequence[int], renoise: Renoise = "ddim") -> Tensor:
    """The generator x = G(z) with z = noise_at(0): `denoise_along` from sigma_t z at t = grid[0].

    With one timestep it is the one-step generator of SiD-LSG (equation 3 of arXiv 2406.01561). The input is sigma_t z
    (standard deviation 0.9286 for Stable Diffusion at 625), neither z nor 2.5 z. Latents are float32 [B, C, h, w].
    """
    z = noise_at(0)
    _, sigma = path.scale(grid[0])
    return denoise_along(denoise, sigma * z, path, grid, renoise, noise_at)


def many_steps(denoise: Denoiser, noise: Tensor, path: Path, steps: int) -> Tensor:
    """Deterministic DDIM sampling of a teacher (arXiv 2010.02502) on `steps` evenly trailing timesteps."""
    return denoise_along(denoise, noise, path, trailing_grid(path.steps, steps))
