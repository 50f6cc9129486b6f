from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from sidcli.diffusion.grids import consistency_grid, even_shares
from sidcli.diffusion.guidance import guided
from sidcli.diffusion.path import DiscretePath, FlowPath, Prediction
from sidcli.diffusion.sampling import consistency_steps, consistent, every, few_steps, many_steps
from sidcli.errors import InputError
from sidcli.models.unet import read_path

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def path(prediction: str = "epsilon") -> DiscretePath:
    return read_path(SD | {"prediction_type": prediction})


def test_the_schedule_of_stable_diffusion_has_the_published_values() -> None:
    a, sigma = path().scale(torch.tensor([20, 625, 979]))
    assert a.flatten().tolist() == pytest.approx([0.9906, 0.3712, 0.0769], abs=1e-4)
    assert sigma.flatten().tolist() == pytest.approx([0.1367, 0.9286, 0.9970], abs=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_back_the_clean_latent_and_the_noise(prediction: str) -> None:
    rule = path(prediction)
    x, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([20, 500, 979])
    x_t = rule.noised(x, noise, t)
    a, sigma = rule.scale(t)
    perfect = noise if prediction == "epsilon" else a * noise - sigma * x
    torch.testing.assert_close(rule.clean(perfect, x_t, t), x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rule.noise(perfect, x_t, t), noise, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ("epsilon", lambda x, noise, a, sigma: noise),
        ("v_prediction", lambda x, noise, a, sigma: a * noise - sigma * x),
        ("sample", lambda x, noise, a, sigma: x),
        ("flow", lambda x, noise, a, sigma: noise - x),
    ],
)
@pytest.mark.parametrize("kind", ["discrete", "flow"])
def test_every_prediction_gives_back_the_clean_latent_and_the_noise_on_either_path(
    prediction: Prediction, target: Callable[..., torch.Tensor], kind: str
) -> None:
    rule = FlowPath(prediction=prediction) if kind == "flow" else DiscretePath(path().abar, prediction)
    x, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([20, 500, 979])
    a, sigma = rule.scale(t)
    x_t = rule.noised(x, noise, t)
    torch.testing.assert_close(x_t, a * x + sigma * noise)
    out = target(x, noise, a, sigma)
    torch.testing.assert_close(rule.clean(out, x_t, t), x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rule.noise(out, x_t, t), noise, atol=1e-4, rtol=1e-4)
    one = rule.noised(x[:1], noise[:1], 20)
    torch.testing.assert_close(rule.clean(out[:1], one, 20), rule.clean(out, x_t, t)[:1])


def test_the_flow_path_is_a_straight_line_and_its_velocity_is_constant() -> None:
    x, noise, rule = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), FlowPath()
    torch.testing.assert_close(rule.noised(x, noise, torch.tensor([0, 1000])), torch.stack([x[0], noise[1]]))
    torch.testing.assert_close(rule.noised(x, noise, torch.tensor([250.0, 0.5]))[0], 0.75 * x[0] + 0.25 * noise[0])
    velocity = (rule.noised(x, noise, 600) - rule.noised(x, noise, 400)) / 0.2
    torch.testing.assert_close(velocity, noise - x, atol=1e-5, rtol=1e-5)
    euler = rule.noised(x, noise, 700) - 0.7 * velocity
    torch.testing.assert_close(rule.clean(velocity, rule.noised(x, noise, 700), 700), euler)


def test_epsilon_error_is_abar_times_v_error() -> None:
    rule = path("v_prediction")
    x, noise, wrong, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    x_t = rule.noised(x, noise, t)
    a, sigma = rule.scale(t)
    v_error = (wrong - (a * noise - sigma * x)).square().sum((1, 2, 3))
    eps_error = (rule.noise(wrong, x_t, t) - noise).square().sum((1, 2, 3))
    torch.testing.assert_close(eps_error, a.flatten() ** 2 * v_error, rtol=1e-4, atol=1e-4)


def test_the_one_step_generator_feeds_sigma_z_at_t_init_and_returns_the_clean_latent() -> None:
    z, seen = torch.randn(2, 4, 8, 8), {}

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, t=t)
        return torch.full_like(x, 0.5)

    drawn = few_steps(denoise, lambda _: z, path(), (625,))
    torch.testing.assert_close(seen["x"], 0.928564 * z, rtol=1e-5, atol=1e-6)
    assert seen["t"].tolist() == [625, 625]
    torch.testing.assert_close(drawn, 2.5017056 * z - 0.928564 / 0.3711724 * 0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_many_steps_equal_the_ddim_of_diffusers(prediction: str, zero_snr: bool) -> None:
    rule = SD | {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    scheduler = DDIMScheduler(**rule, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * (t.view(-1, 1, 1, 1) / 1000 + 0.1)

    noise = torch.randn(2, 4, 8, 8)
    scheduler.set_timesteps(10)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(many_steps(denoise, noise, read_path(rule), 10), x, rtol=1e-4, atol=1e-4)


def test_a_schedule_that_ends_in_nothing_but_noise_is_refused_for_epsilon() -> None:
    with pytest.raises(InputError, match="zero terminal SNR needs a teacher that predicts v"):
        read_path(SD | {"prediction_type": "epsilon", "rescale_betas_zero_snr": True})


def test_guidance_of_one_is_the_conditional_and_of_zero_the_unconditional_prediction() -> None:
    conditional, unconditional = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, 0.0), unconditional)


@pytest.mark.parametrize("solver_steps", [1, 7, 50, 1000])
def test_consistency_sampling_visits_the_timesteps_of_diffusers(solver_steps: int) -> None:
    scheduler = LCMScheduler(**SD, original_inference_steps=solver_steps)
    k = 1000 // solver_steps
    for steps in {1, 2, 3, 4, 8, 49, solver_steps} & set(range(1, solver_steps + 1)):
        scheduler.set_timesteps(steps)
        assert consistency_grid(k * solver_steps - 1, solver_steps, steps) == tuple(scheduler.timesteps.tolist())
    assert consistency_grid(999, 50, 4) == (999, 759, 499, 259)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4])
def test_consistency_sampling_equals_that_of_diffusers(prediction: str, steps: int) -> None:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + t.view(-1, 1, 1, 1) / 500)

    scheduler = LCMScheduler(**SD, prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(steps)
    draws, x_t = torch.Generator().manual_seed(0), torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    wanted, noises = x_t, [x_t]
    for t in scheduler.timesteps:
        wanted = scheduler.step(network(wanted, every(int(t), wanted)), int(t), wanted, generator=draws).prev_sample
    again = torch.Generator().manual_seed(0)
    noises += [torch.randn(x_t.shape, generator=again) for _ in range(steps)]
    found = consistency_steps(network, noises.__getitem__, path(prediction), consistency_grid(999, 50, steps))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_consistency_function_is_the_identity_at_timestep_0() -> None:
    x, x_t = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(consistent(x, x_t, 0), x_t)
    found = consistent(x, x_t, torch.tensor([0, 1, 999]))
    assert torch.equal(found[0], x_t[0])
    torch.testing.assert_close(found[1], (0.25 * x_t[1] + 10 * 100.25**0.5 * x[1]) / 100.25)
    torch.testing.assert_close(found[1], consistent(x[1:2], x_t[1:2], 1)[0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_timesteps_of_flow_matching_are_those_of_diffusers(shift: float) -> None:
    scheduler, path = FlowMatchEulerDiscreteScheduler(shift=shift), FlowPath(1000, shift)
    for steps in (1, 2, 7):
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(scheduler.timesteps, torch.tensor(path.teacher_grid(steps)))
        scheduler.set_timesteps(sigmas=list(even_shares(steps)))
        torch.testing.assert_close(scheduler.timesteps, torch.tensor(path.student_grid(1000, steps)))
    assert path.student_grid(1000, 4) == pytest.approx((1000, 900, 750, 500) if shift == 3.0 else (1000, 750, 500, 250))
