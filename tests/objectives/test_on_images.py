"""Objectives without a discriminator that train on images, and those without a second network, against float64 versions of their
equations."""

import copy
import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidcli import objectives
from sidcli.data.latents import Latents, TeacherImages, prepare
from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine
from sidcli.errors import UsageError
from sidcli.models.loading import load
from sidcli.models.sampler import plan_for
from sidcli.models.sources import find
from sidcli.objectives.base import GENERATOR, TARGET, Batch
from sidcli.progress import Silence
from sidcli.settings import MEMORY, DistillConfig
from sidcli.training import plan
from tests.gradients import gradient, perturbed
from tests.test_engine import Naive, inputs, phase_of, snapshot

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "regression": {},
    "dmd": {"regression": 0.02},
    "lcm": {"huber": 0.1},
    "tlcm": {"guidance": 2.0},
    "tlcm2": {"guidance": 2.0},
    "boot": {"guidance": 2.0},
}
"""Settings of each objective here under which every term has a visible part in the gradient."""


class Pairs:
    """Pairs in place of `Latents`: noise and images that are functions of the position."""

    digest = name = "pairs"

    def at(self, seed: int, position: int) -> tuple[Tensor, str]:
        return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(position)), f"image number {position}"

    def noise(self, seed: int, position: int) -> Tensor:
        return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(position + 1000))


def engine(folder: Path, config: DistillConfig, name: str, settings: dict[str, Any] | None = None, **more: Any) -> Engine:
    """An engine whose student differs from the teacher."""
    objective = objectives.settings({"name": name, **(SETTINGS[name] if settings is None else settings)})
    given = dataclasses.replace(config, objective=objective, **more)
    built = Engine(load(find(str(folder))), given, open_prompts("general"), CPU)
    built.data = Pairs()  # type: ignore[assignment]
    for role, trained in built.roles.items():
        trained.role = dataclasses.replace(trained.role, clip=0.0)  # the gradient of the loss itself
        perturbed(built, role)
    with torch.no_grad():
        for follower in built.followers.values():
            for _, value in follower.weights:
                value += 0.01 * torch.randn(value.shape)
    return built


def drawn(built: Engine, samples: range = range(4)) -> Batch:
    return built.draw_batch(inputs(built, GENERATOR), 0, samples)


class OnImages(Naive):
    """The losses, image by image and element by element."""

    def __init__(self, built: Engine):
        super().__init__(built, built.sampler.model)
        target = built.followers[TARGET].net if built.followers else built.roles[GENERATOR].net
        self.nets["target"] = copy.deepcopy(target).double()

    def distance(self, x: Tensor, target: Tensor) -> Tensor:
        c = getattr(self.config.objective, "huber", 0.0)
        parts = [
            ((one - two) ** 2 + c**2).sqrt() - c if c else (one - two) ** 2
            for one, two in zip(x.flatten(), target.flatten(), strict=True)
        ]
        return torch.stack(parts).sum()

    def regression(self, draw: Batch) -> Tensor:
        """|| G(z, c) - y ||^2 for the image y that the teacher drew from z."""
        assert draw.samples is not None
        images = [
            self.distance(self.generate(draw.latents[0][i : i + 1].double(), prompt), draw.samples[i : i + 1].double())
            for i, prompt in enumerate(draw.prompts)
        ]
        return torch.stack(images).sum() / len(images)

    def dmd(self, draw: Batch) -> Tensor:
        """|| x - sg(x - (f_psi - f_phi) / mean |x - f_phi|) ||^2 / 2 and the regression loss of the pairs."""
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        assert draw.real is not None
        for x, x_t, _, _, _, prompt, t in self.losses(draw):
            real, fake = self.clean("phi", x_t, t, prompt, s.guidance), self.clean("psi", x_t, t, prompt, 1.0)
            target = (x - (fake - real) / (x - real).abs().mean()).detach()
            total = total + (x - target).square().sum() / 2
        return total / len(draw.prompts) + s.regression * self.regression(draw.real)

    def signal(self, z: Tensor, t: int, prompt: str) -> Tensor:
        """g(z, t): the network sees the start noise, and a timestep that grows as t falls."""
        a, s = self.abar[self.config.t_init].sqrt(), (1 - self.abar[self.config.t_init]).sqrt()
        out = self.nets["theta"](s * z, torch.tensor([self.config.t_init + self.config.t_min - t]), self.encode(prompt)).sample
        return (s * z - s * out) / a if self.prediction == "epsilon" else a * s * z - s * out

    def boot(self, draw: Batch) -> Tensor:
        """|| g(z, s) - y_s ||^2 / D^2 for the signal y_s after a DDIM step of the teacher from g(z, t), and the loss at t_init."""
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        for i, prompt in enumerate(draw.prompts):
            z, t = draw.latents[0][i : i + 1].double(), int(draw.t[i])
            before, first = t - s.stride, self.config.t_init
            (a, sigma), (a_s, sigma_s) = ((self.abar[at].sqrt(), (1 - self.abar[at]).sqrt()) for at in (t, before))
            with torch.no_grad():
                now = self.signal(z, t, prompt)
                x_t = a * now + sigma * z
                end = self.clean("phi", x_t, t, prompt, s.guidance)
                ddim = a_s * end + sigma_s * (x_t - a * end) / sigma
                wanted = (ddim - sigma_s * z) / a_s
                edge = self.clean("phi", (1 - self.abar[first]).sqrt() * z, first, prompt, s.guidance)
            size = ((wanted - now) / (end - now)).mean()  # the step is a part D of the way to the teacher's prediction
            total = total + ((self.signal(z, before, prompt) - wanted) / size).square().sum()
            total = total + s.boundary * (self.signal(z, first, prompt) - edge).square().sum()
        return total / len(draw.prompts)

    def consistency(self, net: str, x_t: Tensor, t: int, prompt: str) -> Tensor:
        """c_skip(t) x_t + c_out(t) x0 with the scalings of the published code."""
        skip, out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
        return skip * x_t + out * self.clean(net, x_t, t, prompt, 1.0)

    def step(self, net: str, x_t: Tensor, t: int, end: int, prompt: str, scale: float) -> Tensor:
        """A DDIM step."""
        (a, sigma), (a_end, sigma_end) = ((self.abar[at].sqrt(), (1 - self.abar[at]).sqrt()) for at in (t, end))
        clean = self.clean(net, x_t, t, prompt, scale)
        return a_end * clean + sigma_end * (x_t - a * clean) / sigma

    def tlcm(self, draw: Batch) -> Tensor:
        """|| g(x_t, t) - sg g(x_s, s) ||^2 with the segments' ends at the timesteps at which the student draws."""
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        count, first = self.config.student_steps, self.config.t_init
        grid = [int(first * (count - index) / count) for index in range(count)]
        assert draw.samples is not None
        for i, prompt in enumerate(draw.prompts):
            t = int(draw.t[i])
            end = max([bound for bound in grid if bound < t], default=0)
            closer = max(t - s.stride, end)
            a, sigma = self.abar[t].sqrt(), (1 - self.abar[t]).sqrt()
            x_t = a * draw.samples[i : i + 1].double() + sigma * draw.noise[i : i + 1].double()
            with torch.no_grad():
                x_s = self.step("phi", x_t, t, closer, prompt, s.guidance)
                target = x_s if closer == end else self.step("theta", x_s, closer, end, prompt, 1.0)
            total = total + (self.step("theta", x_t, t, end, prompt, 1.0) - target).square().sum()
        return total / len(draw.prompts)

    def tlcm2(self, draw: Batch) -> Tensor:
        """|| f(x_t, t) - sg f(x_s, s) ||^2 at the student's own samples with noise, and DDIM of the teacher between both."""
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        count, first = self.config.student_steps, self.config.t_init
        grid = [*(int(first * (count - index) / count) for index in range(count)), 0]
        for i, prompt in enumerate(draw.prompts):
            position = int(draw.t[i])
            t, end = grid[position], grid[position + 1]
            with torch.no_grad():
                x = (1 - self.abar[first]).sqrt() * draw.latents[0][i : i + 1].double()
                for one, other in pairwise(grid[:-1]):
                    x = self.step("theta", x, one, other, prompt, 1.0)
                x = self.clean("theta", x, grid[-2], prompt, 1.0)
                x_t = self.abar[t].sqrt() * x + (1 - self.abar[t]).sqrt() * draw.noise[i : i + 1].double()
                x_s, at = x_t, t
                for left in range(s.teacher_steps, 0, -1):
                    following = at + (end - at) // left
                    x_s, at = self.step("phi", x_s, at, following, prompt, s.guidance), following
                target = self.clean("theta", x_s, end, prompt, 1.0)
            total = total + (self.clean("theta", x_t, t, prompt, 1.0) - target).square().sum()
        return total / len(draw.prompts)

    def lcm(self, draw: Batch) -> Tensor:
        """d(f_theta(x_t, c, t), f_target(x_t - k, c, t - k)), and DDIM with guidance between both points."""
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        assert draw.samples is not None
        for i, prompt in enumerate(draw.prompts):
            x, noise, k = draw.samples[i : i + 1].double(), draw.noise[i : i + 1].double(), 1000 // s.solver_steps
            t = k - 1 + k * int(draw.t[i])
            before = t - k if t > k else 0
            x_t = self.abar[t].sqrt() * x + (1 - self.abar[t]).sqrt() * noise
            with torch.no_grad():
                end = self.clean("phi", x_t, t, prompt, s.guidance)
                direction = (x_t - self.abar[t].sqrt() * end) / (1 - self.abar[t]).sqrt()
                earlier = self.abar[before].sqrt() * end + (1 - self.abar[before]).sqrt() * direction
                target = self.consistency("target", earlier, before, prompt)
            total = total + self.distance(self.consistency("theta", x_t, t, prompt), target)
        return total / len(draw.prompts)


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("regression", {}, "sd"),
    ("regression", {"huber": 0.3}, "v"),
    ("dmd", SETTINGS["dmd"], "sd"),
    ("tlcm", SETTINGS["tlcm"], "sd"),
    ("tlcm", {"stride": 300, "guidance": 1.0}, "v"),
    ("tlcm2", SETTINGS["tlcm2"], "sd"),
    ("tlcm2", {"teacher_steps": 1, "guidance": 1.0}, "v"),
    ("boot", SETTINGS["boot"], "sd"),
    ("boot", {"stride": 200, "boundary": 0.3, "guidance": 1.0}, "v"),
    ("lcm", {}, "sd"),
    ("lcm", {"huber": 0.0, "target": 0.0, "guidance": 1.0}, "sd"),
    ("lcm", {"huber": 0.2, "solver_steps": 2, "guidance": 3.0}, "v"),
]


@pytest.mark.parametrize(("name", "settings", "kind"), CASES)
def test_the_loss_and_its_gradient_equal_the_equation(
    sd_folder: Path, v_folder: Path, config: DistillConfig, name: str, settings: dict[str, Any], kind: str
) -> None:
    built = engine(sd_folder if kind == "sd" else v_folder, config, name, settings)
    naive, draw = OnImages(built), drawn(built)
    assert settings.get("solver_steps") != 2 or set(draw.t.tolist()) == {0, 1}
    wanted = getattr(naive, name)(draw)
    wanted.backward()
    slopes = torch.cat([value.grad.flatten() for value in naive.nets["theta"].parameters() if value.grad is not None])
    found = gradient(built)
    assert (found - slopes).norm() < 1e-4 * slopes.norm()
    values, _ = engine_values(engine(sd_folder if kind == "sd" else v_folder, config, name, settings))
    total = values["generator_loss"] + values.get("regression_loss", 0.0) * settings.get("regression", 0.0)
    assert total == pytest.approx(wanted.item(), rel=1e-4)


def test_each_term_of_dmd_is_a_visible_part_of_its_gradient(sd_folder: Path, config: DistillConfig) -> None:
    whole, without = (gradient(engine(sd_folder, config, "dmd", {"regression": weight})) for weight in (0.02, 0.0))
    assert 0.1 * whole.norm() < (whole - without).norm() < 0.9 * whole.norm()


def test_the_fake_score_of_dmd_learns_from_the_samples_of_new_noise(sd_folder: Path, config: DistillConfig) -> None:
    built = engine(sd_folder, config, "dmd")
    generator, fake = built.objective.phases(0)
    assert fake.inputs.reuse
    _, samples = built.run_phase(generator, keep=True)
    again = engine(sd_folder, config, "dmd")
    batch = drawn(again)
    cond = again.sampler.encode(batch.prompts)
    torch.testing.assert_close(torch.cat(samples), again.nets.generate(dataclasses.replace(batch, cond=cond)).detach())


def engine_values(built: Engine) -> tuple[dict[str, float], Engine]:
    values, _ = built.run_phase(phase_of(built, GENERATOR, built.step))
    return {name: float(value) for name, value in values.items()}, built


SMALLEST = {"micro_batch": 1, "split_backward": True, "gradient_checkpointing": True}


@pytest.mark.parametrize(("name", "variant"), [("dmd", {"micro_batch": 3}), *((name, SMALLEST) for name in SETTINGS)])
def test_memory_options_do_not_change_the_gradient_and_the_loss(
    sd_folder: Path, config: DistillConfig, name: str, variant: dict[str, Any]
) -> None:
    plain, other = (engine(sd_folder, config, name, **more) for more in ({}, variant))
    one, two = gradient(plain), gradient(other)
    # The predictions of tlcm near t = 999, divided by a small a_t, carry larger rounding errors.
    assert (two - one).norm() < (1e-4 if name == "tlcm" else 1e-5) * one.norm()
    (values, _), (again, _) = (engine_values(engine(sd_folder, config, name, **more)) for more in ({}, variant))
    assert again == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize(("name", "lora"), [("lcm", 2), *((name, 0) for name in SETTINGS)])
def test_training_goes_on_bit_for_bit_from_saved_tensors(sd_folder: Path, config: DistillConfig, name: str, lora: int) -> None:
    if lora:
        pytest.importorskip("peft")
    whole, again = (engine(sd_folder, config, name, student_lora=lora) for _ in range(2))
    whole.train_step()
    again.load(1, snapshot(whole))
    assert whole.train_step().numbers() == again.train_step().numbers()
    one, other = snapshot(whole), snapshot(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[file][key]) for file, tensors in one.items() for key, value in tensors.items())
    saved = sum(value.nbytes for tensors in one.values() for value in tensors.values())
    assert saved == pytest.approx(whole.state_bytes, rel=0.01)


@pytest.mark.parametrize(("name", "memory"), [("lcm", "24gb"), ("dmd", "12gb"), ("tlcm2", "12gb")])
def test_memory_recipes_take_a_step_in_bf16(sd_folder: Path, config: DistillConfig, name: str, memory: str) -> None:
    recipe = MEMORY[memory] | {"micro_batch": 1, "precision": "bf16"}
    result = engine(sd_folder, config, name, **recipe).train_step()
    assert result.skipped.item() == 0 and all(number == number for number in result.numbers().values())


@pytest.mark.parametrize("name", ["regression", "dmd", "lcm", "tlcm"])
def test_a_batch_is_of_other_images_in_each_step_and_the_same_in_parts(sd_folder: Path, config: DistillConfig, name: str) -> None:
    built = engine(sd_folder, config, name)
    first, second = (images(built.draw_batch(inputs(built, GENERATOR, step), step, range(4))) for step in (0, 1))
    assert first.prompts + second.prompts == [f"image number {number}" for number in range(8)]
    halves = [images(drawn(built, part)) for part in (range(2), range(2, 4))]
    for field in ("samples", "noise", "t"):
        assert torch.equal(torch.cat([getattr(half, field) for half in halves]), getattr(first, field))
    assert first.real is None


def images(draw: Batch) -> Batch:
    """The batch of images, which is that of the prompts unless an objective has both."""
    return draw.real or draw


# TLCM


def test_segments_of_tlcm_end_where_the_student_draws(sd_folder: Path, config: DistillConfig) -> None:
    built = engine(sd_folder, config, "tlcm", student_steps=4, t_init=999)
    t = torch.tensor([999, 750, 749, 500, 499, 250, 249, 1])
    assert built.objective.end(t).tolist() == [749, 749, 499, 499, 249, 249, 0, 0]  # type: ignore[attr-defined]
    plan = plan_for(dataclasses.replace(built.student(), card={"kind": "student", **built.objective.sampling}))
    assert plan.grid == (999, 749, 499, 249) and plan.renoise == "ddim"


@pytest.mark.parametrize(("name", "setting", "most"), [("tlcm", "stride", 250), ("tlcm2", "teacher_steps", 249)])
def test_the_teacher_of_tlcm_stays_in_a_segment(config: DistillConfig, name: str, setting: str, most: int) -> None:
    def built(value: int) -> object:
        method = objectives.find(name)
        own = method.Settings(**{setting: value})
        return method(dataclasses.replace(config, t_init=999, student_steps=4, objective=own), 1000)

    built(most)
    with pytest.raises(UsageError, match=f"{setting} must be at most {most}, the timesteps of the .* segment, not {most + 1}"):
        built(most + 1)


# BOOT


def test_the_image_of_boot_is_the_signal_at_the_last_timestep(sd_folder: Path, config: DistillConfig) -> None:
    built = engine(sd_folder, config, "boot")
    batch = drawn(built)
    batch = dataclasses.replace(batch, cond=built.sampler.encode(batch.prompts))
    with torch.no_grad():
        image = built.objective.signal(built.nets, batch, batch.t * 0 + config.t_min)  # type: ignore[attr-defined]
        torch.testing.assert_close(image, built.nets.generate(batch))


def test_boot_refuses_a_step_longer_than_the_trajectory(sd_folder: Path, config: DistillConfig) -> None:
    for stride in (0, config.t_init - config.t_min + 1):
        with pytest.raises(
            UsageError, match=f"stride must be at least 1 and at most {config.t_init - config.t_min}, .*, not {stride}"
        ):
            engine(sd_folder, config, "boot", {"stride": stride})
    for t_init in (20, 5):
        with pytest.raises(UsageError, match=f"--t-init must be above --t-min 20, where the trajectory .* ends, not {t_init}"):
            objectives.Boot(dataclasses.replace(config, t_init=t_init, objective=objectives.Boot.Settings()), 1000)


# LCM


@pytest.mark.parametrize("lora", [0, 2])
def test_the_target_network_is_the_average_of_the_student_after_each_update(
    sd_folder: Path, config: DistillConfig, lora: int
) -> None:
    built = engine(sd_folder, config, "lcm", {"target": 0.75}, student_lora=lora)
    before, _ = snapshot(built), built.train_step()
    after = snapshot(built)
    assert after["target"].keys() == after["generator"].keys()
    for name, value in after["target"].items():
        torch.testing.assert_close(value, 0.75 * before["target"][name] + 0.25 * after["generator"][name])
    assert any(not torch.equal(value, before["generator"][name]) for name, value in after["generator"].items())
    target = built.followers[TARGET].net
    assert not any(value.requires_grad for value in target.parameters())
    shared = {value.data_ptr() for value in built.teacher.parameters()} & {value.data_ptr() for value in target.parameters()}
    assert bool(shared) == bool(lora)
    assert "optimizer_target" not in after


def test_the_target_network_starts_as_the_student_does(sd_folder: Path, config: DistillConfig) -> None:
    model, given = load(find(str(sd_folder))), dataclasses.replace(config, objective=objectives.Lcm.Settings())
    start = {name: value + 0.1 for name, value in model.denoiser.state_dict().items()}
    built = Engine(model, given, open_prompts("general"), CPU, start=start)
    for file in ("generator", "target", "average"):
        assert all(torch.equal(value, start[name]) for name, value in built.tensors()[file].items())


def test_a_student_that_is_its_own_target_needs_no_other_network(sd_folder: Path, config: DistillConfig) -> None:
    built = engine(sd_folder, config, "lcm", {"target": 0.0})
    assert not built.followers and set(built.tensors()) == {"generator", "average", "optimizer_generator"}
    with_target = engine(sd_folder, config, "lcm", {})
    sizes = [sum(value.numel() for _, value in built.roles[GENERATOR].weights), with_target.state_bytes - built.state_bytes]
    assert sizes[1] == 4 * sizes[0]


def test_the_plan_counts_the_target_network(sd_folder: Path, config: DistillConfig) -> None:
    for target in (0.0, 0.95):
        objective = objectives.settings({"name": "lcm", "target": target})
        given = dataclasses.replace(config, teacher=str(sd_folder), objective=objective, data="folder")
        made = plan.make(given, Path("run"), "cpu", 1, Silence())
        known = plan.describe_teacher(given, Silence())
        sizes = plan.Sizes.of(known, given)
        assert ("target" in made.parameters) == bool(target) and made.device_memory.get("target", 0) == bool(
            target
        ) * 4 * sizes.weights
        assert sizes.state(given) == engine(sd_folder, config, "lcm", {"target": target}).state_bytes
        assert plan.forwards_per_image(given, known) == 3 + 2 + 1


def test_a_student_of_lcm_learns_the_guided_step_of_the_teacher(sd_folder: Path, config: DistillConfig) -> None:
    settings = {"solver_steps": 1, "huber": 0.0, "guidance": 7.5}  # the step ends at timestep 0, where the target is its end
    built = engine(sd_folder, dataclasses.replace(config, lr_generator=3e-3), "lcm", settings)
    losses = [engine_values(built)[0]["generator_loss"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_lcm_refuses_steps_that_its_solver_does_not_have(config: DistillConfig) -> None:
    def lcm(steps: int = 1, **settings: Any) -> None:
        given = dataclasses.replace(config, objective=objectives.settings({"name": "lcm", **settings}), student_steps=steps)
        objectives.Lcm(given, 1000)

    lcm(50)
    with pytest.raises(UsageError, match="--student-steps 51: a student of lcm draws in at most solver_steps, 50"):
        lcm(51)
    for number in (0, 1001):
        with pytest.raises(UsageError, match=f"solver_steps must be at least 1 and at most 1000, .* not {number}"):
            lcm(solver_steps=number)
    with pytest.raises(UsageError, match="target must be at least 0 and below 1, not 1"):
        lcm(target=1.0)


# Regression


def pairs_of(built: Engine, count: int, broken: int | None = None) -> Latents:
    """The teacher's images of a run; the one with the number `broken` is not finite."""
    model, numbers = built.sampler.model, iter(range(count))

    def draw(prompts: Any, noise: Tensor, stepped: Any) -> Tensor:
        latents = built.teacher_latents(plan_for(model), prompts, noise, stepped)
        latents[[index for index in range(len(latents)) if next(numbers) == broken]] = float("nan")
        return latents

    source = TeacherImages(model, "teacher", plan_for(model), built.prompts, count, 2, "fp32", draw)
    return prepare(source, built.distributed, Silence())


def test_the_teacher_draws_the_images_of_a_batch_from_its_noise(sd_folder: Path, config: DistillConfig) -> None:
    built = engine(sd_folder, config, "regression")
    built.data = pairs_of(built, 6, broken=2)
    assert len(built.data) == 5
    seen = set()
    for step in range(3):
        batch = built.draw_batch(inputs(built, GENERATOR, step), step, range(4))
        assert batch.samples is not None
        again = built.teacher_latents(plan_for(built.sampler.model), batch.prompts, batch.latents[0], lambda: None)
        torch.testing.assert_close(again, batch.samples, rtol=1e-4, atol=1e-4)
        seen |= set(batch.prompts)
    assert len(seen) == 5


def test_regression_approaches_the_teachers_images(sd_folder: Path, config: DistillConfig) -> None:
    built = engine(sd_folder, dataclasses.replace(config, lr_generator=3e-3), "regression")
    built.data = pairs_of(built, 4)
    losses = [engine_values(built)[0]["generator_loss"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_constant_of_the_distance_is_not_negative() -> None:
    with pytest.raises(UsageError, match="huber must be at least 0, not -1"):
        objectives.settings({"name": "regression", "huber": -1.0})
