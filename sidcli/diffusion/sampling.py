"""Sampling along a path: the one- and few-step student, and the many-step teacher (DDIM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sidcli.diffusion.path import Path

Renoise = Literal["ddim", "fixed", "fresh"]
NoiseAt = Callable[[int], Tensor]
"""Index of a denoising step -> standard normal noise [B, C, h, w]."""
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, h, w], t int64 [B]) -> the network's raw prediction [B, C, h, w]."""


def exit_grid(t_init: int, steps: int) -> tuple[int, ...]:
    """Return the timesteps of a student with `steps` steps: t_init (1 - i / steps), rounded down.

    Four steps from t_init 625 are 625, 468, 312, 156. A student that was trained with a random exit (arXiv 2505.12674) may stop
    after any of its timesteps.
    """
    return tuple(t_init * (steps - index) // steps for index in range(steps))


def trailing_grid(timesteps: int, steps: int) -> tuple[int, ...]:
    """Return `steps` evenly spaced timesteps from T - 1, where x_t is only noise, down to T / steps - 1; T is `timesteps`."""
    return tuple(round(timesteps * (steps - index) / steps) - 1 for index in range(steps))


def denoise_along(
    denoise: Denoiser,
    x_t: Tensor,
    path: Path,
    grid: Sequence[int],
    renoise: Renoise = "ddim",
    noise_at: NoiseAt | None = None,
) -> Tensor:
    """Predict the clean latent at each timestep of `grid`, add noise for the next timestep, and return the last prediction.

    `x_t` is the latent at grid[0]. `renoise` selects the noise that is added: `ddim` adds the predicted noise (arXiv 2010.02502,
    deterministic), `fixed` adds noise_at(0) at every step, `fresh` adds noise_at(index of the step). If `noise_at` is None, the
    predicted noise is added. Gradients flow through the last denoising step only.
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
    """Return timestep t for each latent of x, int64 [B]."""
    return torch.full((x.shape[0],), t, device=x.device)


def few_steps(denoise: Denoiser, noise_at: NoiseAt, path: Path, grid: Sequence[int], renoise: Renoise = "ddim") -> Tensor:
    """Return the output x = G(z) of the student for z = noise_at(0): `denoise_along` from sigma_t z at t = grid[0].

    With one timestep, G is the one-step generator of SiD-LSG (equation 3 of arXiv 2406.01561). The network input is sigma_t z
    (standard deviation 0.9286 for Stable Diffusion at timestep 625), not z and not 2.5 z. Latents are float32 [B, C, h, w].
    """
    z = noise_at(0)
    _, sigma = path.scale(grid[0])
    return denoise_along(denoise, sigma * z, path, grid, renoise, noise_at)


def many_steps(denoise: Denoiser, noise: Tensor, path: Path, steps: int) -> Tensor:
    """Sample from the teacher with deterministic DDIM (arXiv 2010.02502) at the `steps` timesteps of `trailing_grid`."""
    return denoise_along(denoise, noise, path, trailing_grid(path.steps, steps))
