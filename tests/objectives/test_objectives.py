"""The losses against a naive float64 version written straight from the equations of arXiv 2406.01561."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidcli import objectives
from sidcli.data.prompts import open_prompts
from sidcli.diffusion.path import DiscretePath
from sidcli.engine import Engine
from sidcli.errors import UsageError
from sidcli.models.loading import Model
from sidcli.objectives import scores, sid
from sidcli.objectives.base import FAKE, GENERATOR, Batch, Phase
from sidcli.settings import FIELDS, DistillConfig
from tests.gradients import perturbed


def naive_generator_loss(
    x: torch.Tensor, y_real: torch.Tensor, y_fake: torch.Tensor, y_target: torch.Tensor, alpha: float
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(x)):
        weight = (x[i] - y_real[i]).abs().mean().detach()
        for real, fake, target, sample in zip(
            y_real[i].flatten(), y_fake[i].flatten(), y_target[i].flatten(), x[i].flatten(), strict=True
        ):
            total = total + ((real - fake) * (target - sample) + (1 - alpha) * (real - fake) ** 2) / weight
    return total / len(x)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 1.2])
def test_the_generator_loss_and_its_gradients_equal_the_equation(alpha: float) -> None:
    values = [torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    loss = sid.generator_loss(*values, alpha=alpha, batch=2)
    wanted = naive_generator_loss(*values, alpha=alpha)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, values), torch.autograd.grad(wanted, values))


def test_with_one_scale_the_loss_is_the_form_of_the_official_code() -> None:
    x, real, fake = torch.randn(3, 2, 4, 3, 3).double()
    weight = (x - real).abs().mean((1, 2, 3), keepdim=True)
    wanted = ((real - fake) * ((real - x) - 0.7 * (real - fake)) / weight).sum() / 2
    torch.testing.assert_close(sid.generator_loss(x, real, fake, fake, 0.7, 2), wanted)


def test_the_fake_score_loss_sums_over_elements_and_averages_over_the_batch() -> None:
    zeros, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    batch = Batch(["a cat", "a dog"], [zeros], torch.ones(2, 4, 8, 8), t, size=4)  # half of the global batch
    predicted = torch.full((2, 4, 8, 8), 3.0, requires_grad=True)
    nets: Any = SimpleNamespace(path=DiscretePath(torch.linspace(0.9, 0.1, 3).double(), "epsilon"))
    gradient, values = scores.denoising_gradient(nets, predicted.detach(), batch)
    loss = (predicted - batch.noise).square().sum() / 4
    assert values["fake_loss"] == loss == 2 * 4 * 4 * 8 * 8 / 4
    assert torch.equal(gradient, torch.autograd.grad(loss, predicted)[0])


def test_the_health_ratio_is_one_when_the_fake_score_returns_the_sample_itself() -> None:
    x, real = torch.randn(2, 3, 4, 4, 4)
    assert scores.health(x, real, x).item() == pytest.approx(1.0)


def test_with_stopped_gradients_in_both_networks_the_direction_is_that_of_score_distillation() -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    (slope,) = torch.autograd.grad(sid.generator_loss(x, real, fake, fake, 1.0, 2), x)
    weight = (x - real).abs().mean((1, 2, 3), keepdim=True).detach()
    torch.testing.assert_close(slope, (fake - real) / weight / 2)


def test_on_gaussian_data_with_exact_scores_the_generator_becomes_the_data() -> None:
    """Teacher and fake score in closed form: for x ~ N(m, s^2), E[x | x_t] = m + a s^2 / (a^2 s^2 + sigma^2) (x_t - a m)."""
    mean, spread = torch.tensor(1.5, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    own = torch.tensor([-1.0, 1.2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([own], lr=0.02, betas=(0.0, 0.999))
    draws = torch.Generator().manual_seed(0)

    def posterior(x_t: torch.Tensor, a: torch.Tensor, sigma: torch.Tensor, m: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return m + a * s**2 / (a**2 * s**2 + sigma**2) * (x_t - a * m)

    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 1500)
        z, noise = torch.randn(2, 64, 1, 1, 1, generator=draws, dtype=torch.float64)
        a = 0.1 + 0.85 * torch.rand(64, 1, 1, 1, generator=draws, dtype=torch.float64)
        sigma = (1 - a**2).sqrt()
        x = own[0] + own[1] * z
        x_t = a * x + sigma * noise
        fake = posterior(x_t, a, sigma, *own.detach())
        loss = sid.generator_loss(x, posterior(x_t, a, sigma, mean, spread), fake, fake, 1.0, 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert own[0].item() == pytest.approx(1.5, abs=0.03)
    assert abs(own[1].item()) == pytest.approx(0.4, abs=0.03)


# Other objectives, on a tiny pipeline

SHARING = ["dmd2", "vsd"]
"""Objectives whose fake score learns from the samples of the generator's update."""


def engine(model: Model, config: DistillConfig, name: str, **settings: Any) -> Engine:
    given = dataclasses.replace(config, objective=objectives.settings({"name": name, **settings}), batch_size=2, micro_batch=2)
    return perturbed(Engine(model, given, open_prompts("general"), torch.device("cpu")))


def phase_of(built: Engine, role: str) -> Phase:
    return next(phase for phase in built.objective.phases(0) if phase.role == role)


def seen(built: Engine) -> tuple[Phase, Batch, torch.Tensor, torch.Tensor]:
    """The generator's phase, a batch of it, samples and noised samples."""
    phase = phase_of(built, GENERATOR)
    batch = built._batch((phase.inputs, 0, range(2)))
    with torch.no_grad():
        x = phase.forward(built.nets, batch)
    return phase, batch, x, built.path.noised(x, batch.noise, batch.t)


def predicted(built: Engine, net: Any, batch: Batch, x_t: torch.Tensor, scale: float) -> torch.Tensor:
    """The noise that a network predicts under guidance, by the definition."""
    empty = built.empty.states.expand(2, -1, -1)
    with torch.no_grad():
        given, nothing = (net(x_t, batch.t, states).sample for states in (batch.cond.states, empty))
    return nothing + scale * (given - nothing)


def test_the_gradient_of_dmd2_is_the_normalized_difference_of_the_scores(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, config, "dmd2", guidance=3.0)
    phase, batch, x, x_t = seen(built)
    a, sigma = built.path.scale(batch.t)
    real = (x_t - sigma * predicted(built, built.teacher, batch, x_t, 3.0)) / a
    fake = (x_t - sigma * predicted(built, built.roles[FAKE].net, batch, x_t, 1.0)) / a
    wanted = torch.stack([(fake[i] - real[i]) / (x[i] - real[i]).abs().mean() for i in range(2)]) / 2
    with torch.no_grad():
        gradient, values = phase.gradient(built.nets, x, batch)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert values["generator_loss"].item() == pytest.approx(float((2 * wanted).square().sum() / 4), rel=1e-4)


def test_the_gradient_of_vsd_is_the_weighted_difference_of_the_predicted_noise(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, config, "vsd", guidance=4.5)
    phase, batch, x, x_t = seen(built)
    sigma = built.path.scale(batch.t)[1]
    difference = predicted(built, built.teacher, batch, x_t, 4.5) - predicted(built, built.roles[FAKE].net, batch, x_t, 4.5)
    with torch.no_grad():
        gradient, values = phase.gradient(built.nets, x, batch)
    torch.testing.assert_close(gradient, sigma**2 * difference / 2, rtol=1e-4, atol=1e-5)
    assert values["generator_loss"].item() == pytest.approx(float((sigma**2 * difference).square().sum() / 4), rel=1e-4)


def test_the_fake_score_of_vsd_weights_its_error_by_the_signal(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, config, "vsd", dropout=0.0)
    batch = built._batch((phase_of(built, GENERATOR).inputs, 0, range(2)))
    noise = torch.randn(batch.noise.shape, requires_grad=True)
    loss = (built.path.abar[batch.t].float().view(-1, 1, 1, 1) * (noise - batch.noise).square()).sum() / 2
    gradient, values = phase_of(built, FAKE).gradient(built.nets, noise.detach(), batch)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, noise)[0])
    assert values["fake_loss"].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", SHARING)
def test_the_generator_learns_first_and_the_fake_score_from_the_samples_of_that_update(
    sd: Model, config: DistillConfig, name: str
) -> None:
    built = engine(sd, dataclasses.replace(config, fake_updates=3), name)
    generator, first, second, third = built.objective.phases(4)
    assert [generator.role, first.role, second.role, third.role] == [GENERATOR, FAKE, FAKE, FAKE]
    assert first.inputs.reuse and not second.inputs.reuse and first.inputs.position == generator.inputs.position
    assert len({phase.inputs.position for phase in (first, second, third)}) == 3
    assert generator.inputs.t_range == (20, 980) and first.inputs.t_range == (0, 1000)
    trained, given = [], []

    def forward(nets: Any, batch: Batch) -> torch.Tensor:
        given.append(batch.samples)
        assert batch.latents == []
        return first.forward(nets, batch)

    built.step = 4
    _, samples = built.run_phase(generator, keep=True)
    trained.append(samples[0].clone())
    built.run_phase(dataclasses.replace(first, forward=forward), samples)
    assert torch.equal(given[0], trained[0])
    again = built.nets.generate(built._batch((generator.inputs, 4, range(2))))
    assert not torch.equal(again, trained[0]), "the generator has changed since it drew them"
    assert not any(value.requires_grad for value in samples)


@pytest.mark.parametrize("name", SHARING)
def test_a_warm_up_of_the_fake_score_draws_samples_of_its_own(sd: Model, config: DistillConfig, name: str) -> None:
    built = engine(sd, dataclasses.replace(config, fake_warmup=2), name)
    assert [(phase.role, phase.inputs.reuse) for phase in built.objective.phases(1)] == [(FAKE, False)]
    assert [phase.update for phase in built.objective.phases(5) if phase.role == GENERATOR] == [3]


def test_every_setting_has_a_help_text_and_a_finite_default() -> None:
    for objective in objectives.OBJECTIVES.values():
        assert all("=" in line and line.endswith(".") for line in objectives.listed(objective))
        assert len(objectives.listed(objective)) == len(objectives.names(objective))
        assert objective.title and objective.reads
        assert not set(objectives.names(objective)) & set(FIELDS), "a setting would hide one of the run"
        assert objective.Settings.scale in (*objectives.names(objective), "")


def test_a_setting_of_another_objective_is_refused_by_name_with_what_this_one_has() -> None:
    with pytest.raises(
        UsageError, match="'kappa1' is not a setting of objective dmd2, it is one of sid and sida; dmd2 has guidance,"
    ):
        objectives.settings({"name": "dmd2", "kappa1": 2.0})
    with pytest.raises(UsageError, match="'kapa3' is not a setting of objective sid; did you mean 'kappa3'"):
        objectives.settings({"kapa3": 2.0})
    for name in ("dmd3", ["sid"], 3):
        with pytest.raises(UsageError, match="--objective must be one of sid, sida, dmd, dmd2, vsd"):
            objectives.settings({"name": name})
    with pytest.raises(UsageError, match="guidance must be float, not '3'"):
        objectives.settings({"name": "dmd2", "guidance": "3"})
    with pytest.raises(UsageError, match="guidance must be finite, not nan"):
        objectives.settings({"name": "dmd2", "guidance": float("nan")})
    assert objectives.settings({"name": "dmd2", "guidance": 3}).guidance == 3.0
    assert objectives.parse(objectives.find("dmd2"), ["guidance=2.5"]) == {"guidance": 2.5}
    for wrong, said in ((["guidance"], "--set takes NAME=VALUE"), (["guidance=x"], "--set guidance takes a number, not 'x'")):
        with pytest.raises(UsageError, match=said):
            objectives.parse(objectives.find("dmd2"), wrong)
