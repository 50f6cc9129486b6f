"""Diffusion maths: schedule, conversions between what a network predicts and the clean latent, one- and few-step generators.

Everything here is pure and in the paper's terms: x_t = a_t x + sigma_t eps with a_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
Renoise = Literal["ddim", "fixed", "fresh"]
NoiseAt = Callable[[int], Tensor]
"""visit -> standard normal noise [B, C, h, w]."""
Timestep = Tensor | int
"""One for each latent, int64 [B], or one for all."""
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, h, w], t int64 [B]) -> the network's raw prediction [B, C, h, w]."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete variance-preserving schedule. `abar` is float64 [T], cumulative products of 1 - beta."""

    abar: Tensor
    prediction: Prediction

    @classmethod
    def from_betas(cls, betas: Tensor, prediction: Prediction) -> Schedule:
        return cls(torch.cumprod(1.0 - betas.double(), 0), prediction)

    @property
    def steps(self) -> int:
        return len(self.abar)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """abar as plain numbers, which a graph that is exported keeps as constants."""
        return tuple(self.abar.tolist())

    def scale(self, t: Timestep) -> tuple[Tensor | float, Tensor | float]:
        """a_t and sigma_t: float32 [B, 1, 1, 1] on t's device for t [B], numbers for one t; square roots are taken in float64."""
        if isinstance(t, int):
            return math.sqrt(self.values[t]), math.sqrt(1.0 - self.values[t])
        abar = self.abar.to(t.device)[t].view(-1, 1, 1, 1)
        return abar.sqrt().float(), (1.0 - abar).sqrt().float()

    def noised(self, x: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """x_t = a_t x + sigma_t eps."""
        a, sigma = self.scale(t)
        return a * x + sigma * noise

    def clean(self, predicted: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """The clean latent a prediction stands for: (x_t - sigma eps) / a, or a x_t - sigma v."""
        a, sigma = self.scale(t)
        if self.prediction == "epsilon":
            return (x_t - sigma * predicted) / a
        return a * x_t - sigma * predicted

    def noise(self, predicted: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """The noise a prediction stands for: eps itself, or sigma x_t + a v."""
        if self.prediction == "epsilon":
            return predicted
        a, sigma = self.scale(t)
        return sigma * x_t + a * predicted


def exit_grid(t_init: int, steps: int) -> tuple[int, ...]:
    """The timesteps of a generator of `steps` steps: t_init (1 - i / steps), rounded down; 625, 468, 312, 156 for four.

    Trained with a random exit (arXiv 2505.12674, method 4.3), it may stop after any of them.
    """
    return tuple(t_init * (steps - index) // steps for index in range(steps))


def trailing_grid(timesteps: int, steps: int) -> tuple[int, ...]:
    """`steps` evenly spaced timesteps that end at T / steps - 1 and begin at T - 1, where nothing but noise is left."""
    return tuple(round(timesteps * (steps - index) / steps) - 1 for index in range(steps))


def denoise_along(
    denoise: Denoiser,
    x_t: Tensor,
    schedule: Schedule,
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
                noise = schedule.noise(predicted, x_t, t)
            else:
                noise = noise_at(visit + 1 if renoise == "fresh" else 0)
            x_t = schedule.noised(schedule.clean(predicted, x_t, t), noise, grid[visit + 1])
    return schedule.clean(denoise(x_t, every(grid[last], x_t)).float(), x_t, grid[last])


def every(t: int, x: Tensor) -> Tensor:
    """Timestep t for each latent of x, int64 [B]."""
    return torch.full((x.shape[0],), t, device=x.device)


def few_steps(denoise: Denoiser, noise_at: NoiseAt, schedule: Schedule, grid: Sequence[int], renoise: Renoise = "ddim") -> Tensor:
    """The generator x = G(z) with z = noise_at(0): `denoise_along` from sigma_t z at t = grid[0].

    With one timestep it is the one-step generator of SiD-LSG (method 1.2; equation 3 of arXiv 2406.01561). The input is sigma_t z
    (standard deviation 0.9286 for Stable Diffusion at 625), neither z nor 2.5 z. Latents are float32 [B, C, h, w].
    """
    z = noise_at(0)
    _, sigma = schedule.scale(grid[0])
    return denoise_along(denoise, sigma * z, schedule, grid, renoise, noise_at)


def many_steps(denoise: Denoiser, noise: Tensor, schedule: Schedule, steps: int) -> Tensor:
    """Deterministic DDIM sampling of a teacher (arXiv 2010.02502) on `steps` evenly trailing timesteps."""
    return denoise_along(denoise, noise, schedule, trailing_grid(schedule.steps, steps))


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: e(x, "") + kappa (e(x, c) - e(x, ""))."""
    return unconditional + scale * (conditional - unconditional)
