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
from statistics import NormalDist
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sidcli.diffusion.grids import exit_grid, flow_grid, flow_teacher_grid, trailing_grid

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Coefficient = Tensor | float
"""A tensor [B, 1, 1, 1] for timesteps [B] (float32, except in `exact`); a float for a single timestep."""
Timestep = Tensor | float
"""A tensor [B] with one timestep per latent, or one number for all latents. Those of `DiscretePath` are integers."""
LARGEST_WEIGHT = 10.0
"""Limit of `Path.debiased_weight`, without which the timesteps of nearly pure noise would outweigh all others."""
LOGIT = NormalDist(math.log(2.0), 1.6)
"""Distribution of log(t / (1 - t)) for the timesteps of score distillation on flow matching (arXiv 2509.25127)."""


class Draws(Protocol):
    """Random values of the samples of a batch."""

    def integers(self, low: int, high: int) -> Tensor:
        """Return uniform integers in [low, high), int64 [B]."""

    def uniform(self) -> list[float]:
        """Return B uniform numbers in [0, 1)."""


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
    """A path and the prediction type of a network that was trained on it, with the timesteps of students, teachers and scores."""

    prediction: Prediction

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of timesteps. Timesteps are counted from 0 to this number (`DiscretePath`: to this number minus 1)."""

    @abstractmethod
    def exact(self, t: Timestep) -> tuple[Coefficient, Coefficient]:
        """Return a(t) and sigma(t) in float64."""

    @property
    @abstractmethod
    def starts(self) -> tuple[int, int]:
        """The first and the last timestep at which a student can start."""

    @abstractmethod
    def student_grid(self, t_init: int, steps: int) -> tuple[float, ...]:
        """Return the timesteps of a student of `steps` steps that starts at `t_init`."""

    @abstractmethod
    def teacher_grid(self, steps: int) -> tuple[float, ...]:
        """Return the timesteps at which a teacher draws in `steps` steps, the first one of pure noise."""

    @abstractmethod
    def draw(self, t_range: tuple[int, int], draws: Draws) -> Tensor:
        """Return random timesteps [B] in [t_range[0], t_range[1]) at which scores are compared."""

    @abstractmethod
    def noise_weight(self, t: Tensor) -> Coefficient:
        """Return the weight at t of the squared error of a predicted noise, in the loss of a fake score."""

    @abstractmethod
    def debiased_weight(self, t: Tensor) -> Tensor:
        """Return a weight [B, 1, 1, 1] of the squared error of a predicted noise with which high noise counts more: 1 / sqrt(SNR), at
        most LARGEST_WEIGHT (arXiv 2310.08442), on a path of discrete timesteps; `noise_weight` on one of flow matching."""

    @abstractmethod
    def loss_scale(self, t: Tensor) -> Tensor | None:
        """Return w [B, 1, 1, 1], by which SiD divides its loss at t; None: the mean |x - y_real| of each sample."""

    @property
    def sampling(self) -> dict[str, Any]:
        """Entries of a student's card that its timesteps depend on, other than those of its objective."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a distillation that have other defaults on this path."""
        return {}

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
        if not isinstance(t, Tensor):
            value = self.values[int(t)]
            return math.sqrt(value), math.sqrt(1.0 - value)
        abar = self.abar.to(t.device)[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1.0 - abar).sqrt()

    @property
    def starts(self) -> tuple[int, int]:
        return 1, self.steps - 1

    def student_grid(self, t_init: int, steps: int) -> tuple[float, ...]:
        return exit_grid(t_init, steps)

    def teacher_grid(self, steps: int) -> tuple[float, ...]:
        return trailing_grid(self.steps, steps)

    def draw(self, t_range: tuple[int, int], draws: Draws) -> Tensor:
        return draws.integers(*t_range)

    def noise_weight(self, t: Tensor) -> Coefficient:
        return 1.0

    def debiased_weight(self, t: Tensor) -> Tensor:
        a, sigma = self.exact(t)
        assert isinstance(a, Tensor)
        return (sigma / a).clamp(max=LARGEST_WEIGHT).float()

    def loss_scale(self, t: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class FlowPath(Path):
    """The straight path of flow matching (arXiv 2209.03003, 2210.02747): x_t = (1 - t) x + t eps with t in 0 .. 1.

    Timesteps are t times `steps`, as published networks expect them: t = 0.25 is timestep 250 of 1,000. Students start at pure noise,
    because a stock pipeline does. `shift` moves the timesteps of students and teachers towards noise; see `grids.shifted`.
    """

    steps: int = 1000
    shift: float = 1.0
    prediction: Prediction = "flow"
    even: bool = False
    """Whether teachers draw at the timesteps of students, whose times before the shift are evenly spaced from 1 to 1 / steps."""

    def exact(self, t: Timestep) -> tuple[Coefficient, Coefficient]:
        if not isinstance(t, Tensor):
            return 1.0 - t / self.steps, t / self.steps
        sigma = t.double().view(-1, 1, 1, 1) / self.steps
        return 1.0 - sigma, sigma

    @property
    def starts(self) -> tuple[int, int]:
        return self.steps, self.steps

    def student_grid(self, t_init: int, steps: int) -> tuple[float, ...]:
        return flow_grid(t_init, self.shift, steps)

    def teacher_grid(self, steps: int) -> tuple[float, ...]:
        return flow_grid(self.steps, self.shift, steps) if self.even else flow_teacher_grid(self.steps, self.shift, steps)

    def draw(self, t_range: tuple[int, int], draws: Draws) -> Tensor:
        """Return timesteps float32 [B] from the part of the distribution LOGIT that lies in the range (arXiv 2509.25127)."""
        low, high = (self._share_below(t) for t in t_range)
        drawn = [LOGIT.inv_cdf(max(low + (high - low) * share, 2.0**-53)) for share in draws.uniform()]
        return self.steps * torch.tensor(drawn, dtype=torch.float64).sigmoid().float()

    def _share_below(self, t: int) -> float:
        """Return the probability of a timestep below t in the distribution LOGIT."""
        if not 0 < t < self.steps:
            return float(t > 0)
        return LOGIT.cdf(math.log(t / (self.steps - t)))

    def noise_weight(self, t: Tensor) -> Coefficient:
        """Return 1 / (1 - t)^2, with which the squared error of the noise is that of the velocity."""
        a, _ = self.scale(t)
        return a**-2

    def debiased_weight(self, t: Tensor) -> Tensor:
        weight = self.noise_weight(t)
        assert isinstance(weight, Tensor)
        return weight

    def loss_scale(self, t: Tensor) -> Tensor | None:
        """Return 1 / (1 - t): the loss has the weight 1 - t (arXiv 2509.25127)."""
        a, _ = self.exact(t)
        assert isinstance(a, Tensor)
        return (1.0 / a).float()

    @property
    def sampling(self) -> dict[str, Any]:
        return {"shift": self.shift}

    @property
    def settings(self) -> dict[str, Any]:
        return {"t_init": self.steps, "t_min": 0, "t_max": self.steps}
