"""The losses against a naive float64 version written straight from the equations of arXiv 2406.01561."""

import pytest
import torch

from sidcli.objectives import scores, sid
from sidcli.objectives.base import Batch


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
    gradient, values = scores.denoising_gradient(None, predicted.detach(), batch)  # type: ignore[arg-type]
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
