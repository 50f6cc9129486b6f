"""The core: the four roles of a distillation and the two updates that make a step. Knows no files, no terminal, no arguments.

paper        here           what it is
phi          teacher        the pretrained network, frozen
psi          fake_score     starts as the teacher, follows the score of what the generator draws
G_theta      generator      starts as the teacher, draws in one denoising at t_init
G_ema        average        the generator's weights averaged over time; this is the student
kappa1..4    kappa1..4      guidance scales, see config.DistillConfig
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sidcli import randomness
from sidcli.config import DistillConfig
from sidcli.diffusion import guided, one_step
from sidcli.objectives import sid
from sidcli.prompts import Prompts
from sidcli.sampler import Sampler
from sidcli.teachers import Model

FAKE, GENERATOR = "fake", "generator"


def pick_bf16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


@dataclass(frozen=True)
class StepResult:
    """What a step measured, as tensors on the device: reading them waits for the device, so it is left to whoever logs."""

    fake_loss: Tensor
    generator_loss: Tensor
    ratio: Tensor
    sample_std: Tensor

    def numbers(self) -> dict[str, float]:
        return {name: float(value) for name, value in vars(self).items()}


class Engine:
    """The networks, optimizers and average of one distillation. A step is a pure function of the state and the step number."""

    def __init__(self, teacher: Model, config: DistillConfig, prompts: Prompts, device: torch.device):
        self.config, self.prompts, self.device = config, prompts, device
        self.sampler = Sampler(teacher, device)
        self.schedule = teacher.schedule
        self.teacher = self.sampler.unet
        self.fake_score = copy.deepcopy(self.teacher).requires_grad_(True)
        self.generator = copy.deepcopy(self.teacher).requires_grad_(True)
        self.average = copy.deepcopy(self.teacher)
        adam: dict[str, Any] = {"betas": (0.0, 0.999), "eps": config.adam_eps, "fused": True}
        self.optimizer_fake = torch.optim.Adam(self.fake_score.parameters(), lr=config.lr_fake, **adam)
        self.optimizer_generator = torch.optim.Adam(self.generator.parameters(), lr=config.lr_generator, **adam)
        self.empty = self.sampler.encode([""])
        self.bf16 = pick_bf16(config.precision, device)
        self.step = 0

    def advance(self) -> StepResult:
        """One training step: update the fake score, then the generator and its average."""
        fake_loss = self.fake_score_step()
        generator_loss, ratio, sample_std = self.generator_step()
        self.update_average()
        self.step += 1
        return StepResult(fake_loss, generator_loss, ratio, sample_std)

    def fake_score_step(self) -> Tensor:
        """One Adam update of psi towards the score of the generator's samples (method 1.4). Returns the loss."""
        config = self.config
        total = torch.zeros((), device=self.device)
        for samples in self._micro_batches():
            states = self._texts(FAKE, samples)
            noise, t = self._draw(FAKE, samples)
            with torch.no_grad():
                x = self._generate(FAKE, samples, states)
            x_t = self.schedule.noised(x, noise, t)
            predicted = self._predict(self.fake_score, x_t, t, states, (config.kappa1,))[0]
            loss = sid.fake_score_loss(self.schedule.noise(predicted, x_t, t), noise, config.batch_size)
            loss.backward()
            total += loss.detach()
        self.optimizer_fake.step()
        self.optimizer_fake.zero_grad(set_to_none=True)
        return total

    def generator_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """One Adam update of theta (method 1.5). Returns the loss, the health ratio and the spread of the samples."""
        config = self.config
        total, ratio, spread = (torch.zeros((), device=self.device) for _ in range(3))
        self.fake_score.requires_grad_(False)
        for samples in self._micro_batches():
            states = self._texts(GENERATOR, samples)
            noise, t = self._draw(GENERATOR, samples)
            x = self._generate(GENERATOR, samples, states)
            x_t = self.schedule.noised(x, noise, t)
            fakes = self._predict(self.fake_score, x_t, t, states, (config.kappa2, config.kappa3))
            y_fake, y_fake_target = (self.schedule.clean(predicted, x_t, t) for predicted in fakes)
            (real,) = self._predict(self.teacher, x_t, t, states, (config.kappa4,))
            y_real = self.schedule.clean(real, x_t, t)
            loss = sid.generator_loss(x, y_real, y_fake, y_fake_target, config.alpha, config.batch_size)
            loss.backward()
            share = len(samples) / config.batch_size
            total += loss.detach()
            ratio += share * sid.health(x, y_real, y_fake)
            spread += share * x.detach().std()
        self.fake_score.requires_grad_(True)
        self.optimizer_generator.step()
        self.optimizer_generator.zero_grad(set_to_none=True)
        return total, ratio, spread

    def update_average(self) -> None:
        """G_ema <- beta G_ema + (1 - beta) G, beta by half-life in images with a ramp-up (method 1.7)."""
        beta = ema_beta(self.step * self.config.batch_size, self.config)
        pairs = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        averages, values = zip(*((average.data, value.data) for average, value in pairs), strict=True)
        torch._foreach_lerp_(averages, values, 1.0 - beta)

    def _micro_batches(self) -> Iterator[range]:
        size = self.config.micro_batch
        for start in range(0, self.config.batch_size, size):
            yield range(start, min(start + size, self.config.batch_size))

    def _texts(self, phase: str, samples: range) -> Tensor:
        """Text states of this step's prompts; in the fake score's step some captions are emptied, for generator and score alike."""
        config = self.config
        first = (2 * self.step + (phase == GENERATOR)) * config.batch_size
        prompts = [self.prompts.at(config.seed, first + sample) for sample in samples]
        if phase == FAKE and (config.kappa1 != 1.0 or config.kappa2 != 1.0 or config.kappa3 != 1.0):
            drops = randomness.uniform(config.seed, "caption dropout", self.step, samples) < config.dropout
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, drops.tolist(), strict=True)]
        return self.sampler.encode(prompts)

    def _draw(self, phase: str, samples: range) -> tuple[Tensor, Tensor]:
        """Noise [b, C, h, w] and timesteps [b] in t_min .. t_max - 1 for the score comparison."""
        config = self.config
        noise = randomness.normal(self.sampler.model.latent_shape, config.seed, f"{phase} noise", self.step, samples)
        t = randomness.integers(config.t_min, config.t_max, config.seed, f"{phase} timestep", self.step, samples)
        return noise.to(self.device), t.to(self.device)

    def _generate(self, phase: str, samples: range, states: Tensor) -> Tensor:
        z = randomness.normal(self.sampler.model.latent_shape, self.config.seed, f"{phase} latent", self.step, samples)
        return one_step(lambda x, t: self._run(self.generator, x, t, states), z.to(self.device), self.schedule, self.config.t_init)

    def _run(self, net: UNet2DConditionModel, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """The network's prediction in float32, computed in bf16 where that was chosen."""
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            return net(x, t, states).sample.float()

    def _predict(
        self, net: UNet2DConditionModel, x_t: Tensor, t: Tensor, states: Tensor, scales: tuple[float, ...]
    ) -> list[Tensor]:
        """Guided predictions for each scale from one call: the unconditional half only runs if a scale is not 1, and vice versa."""
        empty = self.empty.expand_as(states)
        if all(scale == 1.0 for scale in scales):
            return [self._run(net, x_t, t, states)] * len(scales)
        if all(scale == 0.0 for scale in scales):
            return [self._run(net, x_t, t, empty)] * len(scales)
        both = self._run(net, torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([states, empty]))
        conditional, unconditional = both.chunk(2)
        return [guided(conditional, unconditional, scale) for scale in scales]

    def student(self) -> Model:
        """The model the run is about: the teacher's text encoder and VAE around the averaged generator."""
        return self.sampler.model.with_unet(self.average)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The state by file: three networks and two optimizers. Adam's first moment is zero by definition (beta1 = 0) yet kept,
        because torch's Adam insists on it."""
        files = {
            "generator": dict(self.generator.state_dict()),
            "average": dict(self.average.state_dict()),
            "fake_score": dict(self.fake_score.state_dict()),
        }
        for name, optimizer in (("optimizer_generator", self.optimizer_generator), ("optimizer_fake", self.optimizer_fake)):
            state = optimizer.state_dict()["state"]
            files[name] = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
        return files

    def load(self, step: int, files: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `tensors()` of an engine with the same config. Raises RuntimeError where shapes or names differ."""
        self.generator.load_state_dict(files["generator"])
        self.average.load_state_dict(files["average"])
        self.fake_score.load_state_dict(files["fake_score"])
        for name, optimizer in (("optimizer_generator", self.optimizer_generator), ("optimizer_fake", self.optimizer_fake)):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in files[name].items():
                index, entry = key.split(".", 1)
                state.setdefault(int(index), {})[entry] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step = step


def ema_beta(images: int, config: DistillConfig) -> float:
    """Weight of the old average after `images` images: half-life config.ema_images, at most a share of the images seen."""
    half_life = min(config.ema_images, config.ema_rampup * images)
    return 0.5 ** (config.batch_size / half_life) if half_life > 0 else 0.0
