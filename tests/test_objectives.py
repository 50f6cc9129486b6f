"""The losses against a naive float64 version written straight from the equations of method 1.4 and 1.5."""

import pytest
import torch

from sidcli.objectives import sid


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
    assert sid.fake_score_loss(torch.full((2, 4, 8, 8), 3.0), torch.ones(2, 4, 8, 8), batch=2).item() == 4 * 4 * 8 * 8


def test_the_health_ratio_is_one_when_the_fake_score_returns_the_sample_itself() -> None:
    x, real = torch.randn(2, 3, 4, 4, 4)
    assert sid.health(x, real, x).item() == pytest.approx(1.0)
