"""Objectives on flow matching: their losses against a float64 version written from velocities, and their limit on Gaussian data."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sidcli import objectives
from sidcli.data.prompts import open_prompts
from sidcli.diffusion.path import FlowPath
from sidcli.engine import Engine
from sidcli.models.loading import load
from sidcli.models.sources import find
from sidcli.objectives.base import FAKE, GENERATOR, TEACHER, Batch
from sidcli.randomness import Draws
from sidcli.settings import DistillConfig
from tests import tiny_sd3
from tests.gradients import perturbed
from tests.objectives.test_adversarial import caught_in
from tests.test_engine import SYMBOLS, inputs, phase_of

SETTINGS: dict[str, dict[str, Any]] = {
    "sid": {"kappa1": 1.5, "kappa2": 1.5, "kappa3": 2.0, "kappa4": 3.0, "alpha": 0.8, "dropout": 0.0},
    "dmd2": {"guidance": 3.0},
    "vsd": {"guidance": 2.0, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3.write_sd3(tmp_path_factory.mktemp("flow") / "sd3")


class Velocities:
    """The losses on x_t = (1 - t) x + t eps, image by image in float64. The networks predict v = eps - x."""

    def __init__(self, built: Engine, draw: Batch):
        self.s, self.draw = built.config.objective, draw
        nets = {"phi": built.teacher} | {name: built.roles[role].net for name, role in SYMBOLS.items() if role in built.roles}
        self.nets = {name: copy.deepcopy(net).double().requires_grad_(True) for name, net in nets.items()}
        self.conds = [built.sampler.encode([prompt]) for prompt in draw.prompts]
        self.empty = built.sampler.encode([""])

    def velocity(self, net: str, x_t: Tensor, t: Tensor, i: int, kappa: float) -> Tensor:
        def of(cond: Any) -> Tensor:
            pooled = cond.added["pooled_projections"].double()
            return self.nets[net](x_t, cond.states.double(), pooled, t.view(1) * 1000).sample

        nothing = of(self.empty)
        return nothing + kappa * (of(self.conds[i]) - nothing)

    def loss(self, each: Callable[..., Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(self.draw.prompts)):
            z, eps = (value[i : i + 1].double() for value in (self.draw.latents[0], self.draw.noise))
            x = z - self.velocity("theta", z, torch.ones(1, dtype=torch.float64), i, 1.0)
            t = self.draw.t[i].double() / 1000
            total = total + each(x, eps, t, (1 - t) * x + t * eps, i)
        return total / len(self.draw.prompts)

    def clean(self, net: str, x_t: Tensor, t: Tensor, i: int, kappa: float) -> Tensor:
        return x_t - t * self.velocity(net, x_t, t, i, kappa)

    def fake(self, x: Tensor, eps: Tensor, t: Tensor, x_t: Tensor, i: int) -> Tensor:
        """|| v_psi - (eps - x) ||^2; VSD weights it by (1 - t)^2, which makes it the error of the noise."""
        kappa = self.s.kappa1 if self.s.name == "sid" else 1.0
        error = (self.velocity("psi", x_t.detach(), t, i, kappa) - (eps - x.detach())).square().sum()
        return error * (1 - t) ** 2 if self.s.name == "vsd" else error

    def sid(self, x: Tensor, eps: Tensor, t: Tensor, x_t: Tensor, i: int) -> Tensor:
        """(1 - t) (y_r - y_f) . [(y_f' - x) + (1 - alpha) (y_r - y_f)]"""
        real = self.clean("phi", x_t, t, i, self.s.kappa4)
        fake, target = (self.clean("psi", x_t, t, i, kappa) for kappa in (self.s.kappa2, self.s.kappa3))
        return (1 - t) * ((real - fake) * (target - x + (1 - self.s.alpha) * (real - fake))).sum()

    def dmd2(self, x: Tensor, eps: Tensor, t: Tensor, x_t: Tensor, i: int) -> Tensor:
        """|| x - sg(x - (y_f - y_r) / mean |x - y_r|) ||^2 / 2"""
        real, fake = self.clean("phi", x_t, t, i, self.s.guidance), self.clean("psi", x_t, t, i, 1.0)
        return (x - (x - (fake - real) / (x - real).abs().mean()).detach()).square().sum() / 2

    def vsd(self, x: Tensor, eps: Tensor, t: Tensor, x_t: Tensor, i: int) -> Tensor:
        """|| x - sg(x - t^2 (eps_phi - eps_psi)) ||^2 / 2, where the noise is x_t + (1 - t) v."""
        real, fake = (self.velocity(net, x_t, t, i, self.s.guidance) for net in ("phi", "psi"))
        return (x - (x - t**2 * (1 - t) * (real - fake)).detach()).square().sum() / 2


@pytest.mark.parametrize("role", [FAKE, GENERATOR])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_losses_and_their_gradients_equal_the_equations(folder: Path, config: DistillConfig, name: str, role: str) -> None:
    objective = objectives.settings({"name": name, **SETTINGS[name]})
    path = {"t_init": 1000, "t_min": 0, "t_max": 1000}
    given = dataclasses.replace(config, objective=objective, batch_size=2, micro_batch=2, **path)
    built = Engine(load(find(str(folder))), given, open_prompts("general"), torch.device("cpu"))
    for trained in built.roles.values():
        trained.role = dataclasses.replace(trained.role, clip=0.0)  # the gradient of the loss itself
    perturbed(built)
    draw = built.draw_batch(inputs(built, role), 0, range(2))
    if not draw.latents:  # the fake score learns from the samples of the generator's phase
        draw = dataclasses.replace(draw, latents=built.draw_batch(inputs(built, GENERATOR), 0, range(2)).latents)
    naive = Velocities(built, draw)
    wanted = naive.loss(naive.fake if role == FAKE else getattr(naive, name))
    wanted.backward()
    weights = naive.nets["psi" if role == FAKE else "theta"].parameters()
    slopes = torch.cat([(torch.zeros_like(value) if value.grad is None else value.grad).flatten() for value in weights])
    found, values = caught_in(built, role)
    assert (found - slopes).norm() < 1e-3 * slopes.norm()
    measured = next(iter(values.values()))
    assert measured == pytest.approx(wanted.item(), rel=1e-3, abs=1e-3 * abs(measured) + 1e-4)


class Gaussian:
    """Networks in closed form: x is normal, and so is x given x_t. The teacher's data have mean 1.5 and standard deviation 0.4."""

    path = FlowPath()

    def __init__(self, own: Tensor):
        self.laws = {TEACHER: torch.tensor([1.5, 0.4], dtype=torch.float64), FAKE: own}

    def velocity(self, role: str, x_t: Tensor, batch: Batch) -> Tensor:
        """(x_t - E[x | x_t]) / t with E[x | x_t] = m + (1 - t) s^2 / ((1 - t)^2 s^2 + t^2) (x_t - (1 - t) m)"""
        (m, s), t = self.laws[role].detach(), batch.t.view(-1, 1, 1, 1) / 1000
        mean = m + (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2) * (x_t - (1 - t) * m)
        return (x_t - mean) / t

    def clean(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        return [self.path.clean(self.velocity(role, x_t, batch), x_t, batch.t) for _ in scales]

    def noise(self, role: str, x_t: Tensor, batch: Batch, *scales: float) -> list[Tensor]:
        return [self.path.noise(self.velocity(role, x_t, batch), x_t, batch.t) for _ in scales]

    @torch.enable_grad()
    def gradient_through(self, x: Tensor, networks: Any, loss: Any) -> tuple[Tensor, Any]:
        x = x.detach().requires_grad_()
        value, measured = loss(x, *(y for network in networks for y in network(x)))
        return torch.autograd.grad(value, x)[0], measured


@pytest.mark.parametrize("name", SETTINGS)
def test_on_gaussian_data_with_exact_velocities_the_generator_becomes_the_data(config: DistillConfig, name: str) -> None:
    scales: dict[str, Any] = dict.fromkeys(("kappa1", "kappa2", "kappa3", "kappa4"), 1.0) if name == "sid" else {"guidance": 1.0}
    objective = objectives.settings({"name": name, **scales})
    method = objectives.find(name)(dataclasses.replace(config, objective=objective), 1000)
    gradient = phase_of(SimpleNamespace(objective=method), GENERATOR).gradient  # type: ignore[arg-type]
    own = torch.tensor([-1.0, 1.2], dtype=torch.float64, requires_grad=True)
    optimizer, draws, count = torch.optim.Adam([own], lr=0.02, betas=(0.0, 0.999)), torch.Generator().manual_seed(0), 16
    nets = Gaussian(own)
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1200)
        z, noise = torch.randn(2, count, 1, 8, 8, generator=draws, dtype=torch.float64)
        t = nets.path.draw((1, 1000), Draws(0, "timestep", step, range(count))).double()
        x = own[0] + own[1] * z
        slope, _ = gradient(nets, x.detach(), Batch([""] * count, [z], noise, t, count))  # type: ignore[arg-type]
        optimizer.zero_grad()
        x.backward(slope)
        optimizer.step()
    assert own[0].item() == pytest.approx(1.5, abs=0.05)
    assert abs(own[1].item()) == pytest.approx(0.4, abs=0.05)
