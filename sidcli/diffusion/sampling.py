"""Sampling along a path: the one- and few-step student, and the many-step teacher (DDIM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sidcli.diffusion.grids import Renoise
from sidcli.diffusion.path import Path, Timestep

SCALING, SPREAD = 10.0, 0.5
"""Factor of the timesteps, and standard deviation of the data, in the consistency function."""

NoiseAt = Callable[[int], Tensor]
"""Index of a denoising step -> standard normal noise [B, C, h, w]."""
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, h, w], t [B]) -> the network's raw prediction [B, C, h, w]."""


def denoise_along(
    denoise: Denoiser,
    x_t: Tensor,
    path: Path,
    grid: Sequence[float],
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


def every(t: float, x: Tensor) -> Tensor:
    """Return timestep t for each latent of x: int64 [B], or float32 if it is not an int."""
    return torch.full((x.shape[0],), t, device=x.device)


def few_steps(denoise: Denoiser, noise_at: NoiseAt, path: Path, grid: Sequence[float], renoise: Renoise = "ddim") -> Tensor:
    """Return the output x = G(z) of the student for z = noise_at(0): `denoise_along` from sigma_t z at t = grid[0].

    With one timestep, G is the one-step generator of SiD-LSG (equation 3 of arXiv 2406.01561). The network input is sigma_t z
    (standard deviation 0.9286 for Stable Diffusion at timestep 625), not z and not 2.5 z. Latents are float32 [B, C, h, w].
    """
    z = noise_at(0)
    _, sigma = path.scale(grid[0])
    return denoise_along(denoise, sigma * z, path, grid, renoise, noise_at)


def consistent(clean: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
    """Return the consistency function c_skip x_t + c_out x of a clean prediction x at timestep t (arXiv 2303.01469, 2310.04378).

    c_skip = d^2 / (s^2 + d^2) and c_out = s / sqrt(s^2 + d^2) with d = 0.5 and s = 10 t, as in LCMScheduler of diffusers. It is x_t
    at t = 0, and almost x at other timesteps.
    """
    scaled = SCALING * (t.double().view(-1, 1, 1, 1) if isinstance(t, Tensor) else t)
    square = scaled**2 + SPREAD**2
    skip, out = SPREAD**2 / square, scaled / square**0.5
    if isinstance(skip, Tensor):
        skip, out = skip.float(), out.float()
    return skip * x_t + out * clean


def consistency_steps(denoise: Denoiser, noise_at: NoiseAt, path: Path, grid: Sequence[float]) -> Tensor:
    """Return the output of multistep consistency sampling (algorithm 1 of arXiv 2303.01469), as LCMScheduler of diffusers computes it.

    The input at grid[0] is noise_at(0) itself. Before each other step, noise_at(its index) is added to the last prediction.
    """
    x = x_t = noise_at(0)
    for visit, t in enumerate(grid):
        x_t = path.noised(x, noise_at(visit), t) if visit else x_t
        x = consistent(path.clean(denoise(x_t, every(t, x_t)).float(), x_t, t), x_t, t)
    return x


def many_steps(denoise: Denoiser, noise: Tensor, path: Path, steps: int) -> Tensor:
    """Sample from the teacher at the `steps` timesteps of `Path.teacher_grid`: with deterministic DDIM (arXiv 2010.02502), which is
    Euler's method on the path of flow matching."""
    return denoise_along(denoise, noise, path, path.teacher_grid(steps))
