"""Base classes of objectives with a generator and a fake score, a network that learns the score of the generator's samples."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from sidcli.objectives.base import (
    FAKE,
    GENERATOR,
    Batch,
    Inputs,
    Networks,
    Objective,
    Pass,
    Phase,
    Role,
    RunConfig,
    Values,
    generate,
)

if TYPE_CHECKING:
    from torch import Tensor


class ScoreDistillation(Objective):
    """Objective with `fake_updates` updates of the fake score per step and, after its warm-up, one update of the generator."""

    generator, fake = Role(0.0), Role(0.0)
    """Fields of the two roles other than the learning rate and the LoRA rank."""

    @property
    def roles(self) -> dict[str, Role]:
        fake = dataclasses.replace(self.fake, lr=self.config.lr_fake, lora=self.config.fake_lora)
        return {GENERATOR: self.student_role(self.generator), FAKE: fake}

    def phases(self, step: int) -> list[Phase]:
        """Return the fake score's updates, then the generator's update, each with its own random inputs."""
        phases = [self.fake_phase(step, update) for update in range(self.config.fake_updates)]
        return phases + ([self.generator_phase(step)] if self.trains_generator(step) else [])

    @abstractmethod
    def fake_phase(self, step: int, update: int) -> Phase:
        """Return update number `update` of the fake score in this step."""

    @abstractmethod
    def generator_phase(self, step: int) -> Phase:
        """Return the generator's update in this step."""

    def fake_inputs(self, step: int, update: int, t_range: tuple[int, int], dropout: float = 0.0) -> Inputs:
        updates = self.config.fake_updates
        return Inputs("fake", step * updates + update, (updates + 1) * step + update, t_range, dropout)

    def generator_inputs(self, step: int) -> Inputs:
        config, updates = self.config, self.config.fake_updates
        return Inputs("generator", step * updates, (updates + 1) * step + updates, (config.t_min, config.t_max))

    @staticmethod
    def first_step(config: RunConfig) -> int:
        return config.fake_warmup

    def trains_generator(self, step: int) -> bool:
        return step >= self.first_step(self.config)

    def generator_update(
        self,
        step: int,
        gradient: Callable[[Networks, Tensor, Batch], tuple[Tensor, Values]],
        passes: tuple[Pass, ...],
        split: bool = False,
    ) -> Phase:
        update = step - self.first_step(self.config)
        return Phase(GENERATOR, self.generator_inputs(step), generate, gradient, passes, update, split)


class OnSharedSamples(ScoreDistillation):
    """Objective that updates the generator first. The first update of the fake score reuses the samples of that update."""

    def phases(self, step: int) -> list[Phase]:
        fakes = [self.fake_phase(step, update) for update in range(self.config.fake_updates)]
        if not self.trains_generator(step):
            return fakes
        generator, first = self.generator_phase(step), fakes[0]
        inputs = dataclasses.replace(first.inputs, position=generator.inputs.position, reuse=True)
        passes = tuple(one for one in first.passes if one.role != GENERATOR)
        return [generator, dataclasses.replace(first, inputs=inputs, passes=passes), *fakes[1:]]


def predict_noise(nets: Networks, batch: Batch, scale: float = 1.0) -> Tensor:
    """Return the noise [B, C, h, w] that the fake score predicts in noised samples of the generator."""
    x = nets.generate(batch) if batch.samples is None else batch.samples
    return nets.noise(FAKE, nets.path.noised(x, batch.noise, batch.t), batch, scale)[0]


def denoising_gradient(nets: Networks, noise: Tensor, batch: Batch, weight: Tensor | float = 1.0) -> tuple[Tensor, Values]:
    """Return the gradient of `weight` || eps_psi(x_t) - eps ||^2 with respect to eps_psi, and the loss as a measurement.

    The loss is summed over elements and averaged over the global batch. The prediction of a network that predicts v is converted to
    noise first: the same loss, equal to the v error weighted by a^2. On a path of flow matching, `Path.noise_weight` makes it the
    error of the velocity.
    """
    difference, weight = noise - batch.noise, weight * nets.path.noise_weight(batch.t)
    return difference * (2.0 * weight / batch.size), {"fake_loss": (weight * difference.square()).sum() / batch.size}


def health(x: Tensor, y_real: Tensor, y_fake: Tensor) -> Tensor:
    """Return |y_real - y_fake| / |y_real - x|, averaged over the samples: the relative distance of the two scores, a scalar."""
    apart = (y_real - y_fake).abs().mean((1, 2, 3)) / (y_real - x).abs().mean((1, 2, 3)).clamp_min(1e-5)
    return apart.mean()
