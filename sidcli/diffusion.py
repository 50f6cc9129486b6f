"""Diffusion maths: schedule, conversions between what a network predicts and the clean latent, one- and few-step generators.

Everything here is pure and in the paper's terms: x_t = a_t x + sigma_t eps with a_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
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

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and sigma_t for t [B], float32 [B, 1, 1, 1] on t's device; square roots are taken in float64."""
        abar = self.abar.to(t.device)[t].view(-1, 1, 1, 1)
        return abar.sqrt().float(), (1.0 - abar).sqrt().float()

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a_t x + sigma_t eps."""
        a, sigma = self.scale(t)
        return a * x + sigma * noise

    def clean(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent a prediction stands for: (x_t - sigma eps) / a, or a x_t - sigma v."""
        a, sigma = self.scale(t)
        if self.prediction == "epsilon":
            return (x_t - sigma * predicted) / a
        return a * x_t - sigma * predicted

    def noise(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise a prediction stands for: eps itself, or sigma x_t + a v."""
        if self.prediction == "epsilon":
            return predicted
        a, sigma = self.scale(t)
        return sigma * x_t + a * predicted


def one_step(denoise: Denoiser, noise: Tensor, schedule: Schedule, t_init: int) -> Tensor:
    """The one-step generator x = G(z): one denoising of sigma_t z at t = t_init (method 1.2; equation 3 of arXiv 2406.01561).

    The input is sigma_t z (standard deviation 0.9286 for Stable Diffusion at 625), neither z nor 2.5 z.
    noise float32 [B, C, h, w] -> clean latent float32 of the same shape.
    """
    t = torch.full((len(noise),), t_init, device=noise.device)
    _, sigma = schedule.scale(t)
    x_t = sigma * noise
    return schedule.clean(denoise(x_t, t).float(), x_t, t)


def many_steps(denoise: Denoiser, noise: Tensor, schedule: Schedule, steps: int) -> Tensor:
    """Deterministic DDIM sampling (arXiv 2010.02502) on `steps` evenly trailing timesteps T-1 ... T/steps - 1, then to t = 0."""
    grid = [round(schedule.steps * (steps - index) / steps) - 1 for index in range(steps)]
    x_t = noise
    for position, now in enumerate(grid):
        t = torch.full((len(noise),), now, device=noise.device)
        predicted = denoise(x_t, t).float()
        x = schedule.clean(predicted, x_t, t)
        following = grid[position + 1] if position + 1 < steps else None
        if following is None:
            return x
        x_t = schedule.noised(x, schedule.noise(predicted, x_t, t), torch.full_like(t, following))
    raise ValueError(f"steps must be at least 1, not {steps}")


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: e(x, "") + kappa (e(x, c) - e(x, ""))."""
    return unconditional + scale * (conditional - unconditional)
