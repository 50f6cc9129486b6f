"""Paths x_t = a(t) x + sigma(t) eps between clean latents and noise, and conversions of network predictions.

A network predicts out = p x + q eps. Together with x_t, the prediction gives the clean latent and the noise:

    x   = (q x_t - sigma out) / (a q - sigma p)
    eps = (a out - p x_t) / (a q - sigma p)

With these conversions, no other code depends on the prediction type.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Coefficient = Tensor | float
"""A tensor [B, 1, 1, 1] for timesteps [B] (float32, except in `exact`); a float for a single timestep."""
Timestep = Tensor | int
"""A tensor [B] with one timestep per latent, or one int for all latents."""


def predicted(prediction: Prediction, a: Coefficient, sigma: Coefficient) -> tuple[Coefficient, Coefficient]:
    """Return (p, q) of a prediction type; the network predicts p x + q eps."""
    match prediction:
        case "epsilon":
            return 0.0, 1.0
        case "v_prediction":  # arXiv 2202.00512
            return -sigma, a
        case "sample":
            return 1.0, 0.0
        case "flow":  # the velocity d x_t / d t of x_t = (1 - t) x + t eps, arXiv 2210.02747
            return -1.0, 1.0


class Path(ABC):
    """A path and the prediction type of a network that was trained on it. Subclasses define `exact` and `steps`."""

    prediction: Prediction

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of timesteps. Timesteps are counted from 0 to this number (`DiscretePath`: to this number minus 1)."""

    @abstractmethod
    def exact(self, t: Timestep) -> tuple[Coefficient, Coefficient]:
        """Return a(t) and sigma(t) in float64."""

    def scale(self, t: Timestep) -> tuple[Coefficient, Coefficient]:
        """Return a(t) and sigma(t); tensors are float32."""
        a, sigma = self.exact(t)
        return _single(a), _single(sigma)

    def noised(self, x: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """Return x_t = a x + sigma eps."""
        a, sigma = self.scale(t)
        return a * x + sigma * noise

    def clean(self, out: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """Return the clean latent that the network output `out` at `x_t` corresponds to."""
        _, sigma, p, q, determinant = self._form(t)
        if isinstance(q, float) and q == 0.0:
            return out / p
        return (q * x_t - sigma * out) / determinant

    def noise(self, out: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """Return the noise that the network output `out` at `x_t` corresponds to."""
        a, _, p, q, determinant = self._form(t)
        if isinstance(p, float) and p == 0.0:
            return out / q
        return (a * out - p * x_t) / determinant

    def _form(self, t: Timestep) -> tuple[Coefficient, ...]:
        """Return a, sigma, p, q and the determinant a q - sigma p.

        The determinant of v prediction and flow matching is 1 only if it is computed in float64.
        """
        a, sigma = self.exact(t)
        p, q = predicted(self.prediction, a, sigma)
        return tuple(map(_single, (a, sigma, p, q, a * q - sigma * p)))


def _single(value: Coefficient) -> Coefficient:
    return value.float() if isinstance(value, Tensor) else value


@dataclass(frozen=True, eq=False)
class DiscretePath(Path):
    """A discrete variance-preserving path: a = sqrt(abar), sigma = sqrt(1 - abar).

    `abar` is a float64 tensor [T] with the cumulative products of 1 - beta; t is an integer in 0 .. T - 1.
    """

    abar: Tensor
    prediction: Prediction

    @classmethod
    def from_betas(cls, betas: Tensor, prediction: Prediction) -> DiscretePath:
        return cls(torch.cumprod(1.0 - betas.double(), 0), prediction)

    @property
    def steps(self) -> int:
        return len(self.abar)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """`abar` as Python floats, which an exported graph stores as constants."""
        return tuple(self.abar.tolist())

    def exact(self, t: Timestep) -> tuple[Coefficient, Coefficient]:
        if isinstance(t, int):
            return math.sqrt(self.values[t]), math.sqrt(1.0 - self.values[t])
        abar = self.abar.to(t.device)[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1.0 - abar).sqrt()


@dataclass(frozen=True)
class FlowPath(Path):
    """The straight path of flow matching (arXiv 2209.03003, 2210.02747): x_t = (1 - t) x + t eps with t in 0 .. 1.

    Timesteps are t times `steps`, as published networks expect them: t = 0.25 is timestep 250 of 1,000.
    """

    steps: int = 1000
    prediction: Prediction = "flow"

    def exact(self, t: Timestep) -> tuple[Coefficient, Coefficient]:
        if isinstance(t, int):
            return 1.0 - t / self.steps, t / self.steps
        sigma = t.double().view(-1, 1, 1, 1) / self.steps
        return 1.0 - sigma, sigma
