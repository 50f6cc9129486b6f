import dataclasses

import pytest
import torch

from sidcli.config import DistillConfig
from sidcli.engine import Engine, ema_beta
from sidcli.prompts import open_prompts
from sidcli.teachers import Model, find, load

CPU = torch.device("cpu")


def engine(model: Model, config: DistillConfig) -> Engine:
    return Engine(model, config, open_prompts("general"), CPU)


def gradient(built: Engine, phase: str = "generator") -> torch.Tensor:
    """The gradient of one step, caught before the optimizer uses it."""
    optimizer = built.optimizer_generator if phase == "generator" else built.optimizer_fake
    caught: list[torch.Tensor] = []

    def catch(*_: object) -> None:
        caught.extend(value.grad.flatten() for group in optimizer.param_groups for value in group["params"])

    optimizer.register_step_pre_hook(catch)
    built.generator_step() if phase == "generator" else built.fake_score_step()
    return torch.cat(caught)


@pytest.mark.parametrize("phase", ["fake", "generator"])
def test_the_gradient_of_a_step_is_the_same_for_every_micro_batch(sd_folder: object, config: DistillConfig, phase: str) -> None:
    results = []
    for micro in (4, 3, 1):
        built = engine(load(find(str(sd_folder))), dataclasses.replace(config, micro_batch=micro))
        results.append(gradient(perturbed(built), phase))
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-5 * results[0].norm()


def perturbed(built: Engine) -> Engine:
    """With a fake score that differs from the teacher: at the start both agree and the generator's gradient vanishes."""
    torch.manual_seed(1)
    for value in built.fake_score.parameters():
        value.data += 0.01 * torch.randn_like(value)
    return built


def test_a_fake_score_equal_to_the_teacher_gives_a_loss_of_exactly_zero_and_no_gradient(
    sd_folder: object, config: DistillConfig
) -> None:
    same, other = (engine(load(find(str(sd_folder))), config) for _ in range(2))
    # The two scores' contributions cancel when they are added up, so rounding remains of the gradient.
    assert gradient(same).norm() < 1e-6 * gradient(perturbed(other)).norm()
    loss, _, _ = engine(load(find(str(sd_folder))), config).generator_step()
    assert loss.item() == 0.0


def test_a_step_changes_fake_score_generator_and_average_but_never_the_teacher(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, config)
    before = {name: value.clone() for name, value in built.teacher.state_dict().items()}
    for _ in range(2):
        built.advance()
    for net in (built.fake_score, built.generator, built.average):
        assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in built.teacher.state_dict().items())


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_fast_paths_of_guidance_equal_the_general_one(sd: Model, config: DistillConfig, scale: float) -> None:
    built = engine(sd, config)
    x, t, states = torch.randn(2, *sd.latent_shape), torch.tensor([30, 700]), built.sampler.encode(["a cat", "a dog"])
    (fast,) = built._predict(built.teacher, x, t, states, (scale,))
    general, _ = built._predict(built.teacher, x, t, states, (scale, 2.0))
    torch.testing.assert_close(fast, general, rtol=1e-4, atol=1e-5)


def test_guidance_of_one_runs_no_unconditional_branch(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, config)
    rows = []
    built.teacher.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    x, t, states = torch.randn(2, *sd.latent_shape), torch.tensor([30, 700]), built.sampler.encode(["a cat", "a dog"])
    built._predict(built.teacher, x, t, states, (1.0,))
    built._predict(built.teacher, x, t, states, (2.0,))
    assert rows == [2, 4]


def test_timesteps_reach_t_min_and_never_t_max(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, dataclasses.replace(config, t_min=20, t_max=24))
    drawn = torch.cat([built._draw("fake", range(200))[1]])
    assert sorted(set(drawn.tolist())) == [20, 21, 22, 23]


def test_captions_are_dropped_for_the_fake_score_only_and_only_under_guidance(sd: Model, config: DistillConfig) -> None:
    asked: list[list[str]] = []
    built = engine(sd, dataclasses.replace(config, dropout=0.5))
    real = built.sampler.encode
    built.sampler.encode = lambda prompts: (asked.append(list(prompts)), real(prompts))[1]  # type: ignore[method-assign]
    built._texts("fake", range(40))
    built._texts("generator", range(40))
    built.config = dataclasses.replace(built.config, kappa1=1.0, kappa2=1.0, kappa3=1.0)
    built._texts("fake", range(40))
    assert 10 < asked[0].count("") < 30
    assert asked[1].count("") == asked[2].count("") == 0


def test_the_average_starts_as_the_generator_and_settles_at_the_published_rate() -> None:
    config = DistillConfig(batch_size=512)
    assert ema_beta(0, config) == 0.0
    assert ema_beta(10**9, config) == pytest.approx(0.99293, abs=1e-5)


def test_a_teacher_that_predicts_v_trains(v_folder: object, config: DistillConfig) -> None:
    built = engine(load(find(str(v_folder))), config)
    losses = [built.fake_score_step().item() for _ in range(8)]
    assert all(loss == loss for loss in losses)
    assert built.advance().numbers()["generator_loss"] != 0.0


def test_the_fake_score_learns_the_generators_score(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, dataclasses.replace(config, kappa1=1.0, kappa2=1.0, kappa3=1.0, kappa4=1.0, batch_size=8, micro_batch=8))
    first = built.fake_score_step().item()
    for _ in range(30):
        built.fake_score_step()
    assert built.fake_score_step().item() < 0.9 * first
