"""Objectives that train the student on images without a discriminator, against float64 versions of their equations."""

import dataclasses
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
from sidcli.objectives.base import GENERATOR, Batch
from sidcli.progress import Silence
from sidcli.settings import MEMORY, DistillConfig
from tests.gradients import gradient, perturbed
from tests.test_engine import Naive, inputs, phase_of, snapshot

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {"regression": {}}
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
    return perturbed(built, GENERATOR)


def drawn(built: Engine, samples: range = range(4)) -> Batch:
    return built.draw_batch(inputs(built, GENERATOR), 0, samples)


class OnImages(Naive):
    """The losses, image by image and element by element."""

    def distance(self, x: Tensor, target: Tensor) -> Tensor:
        c = self.config.objective.huber
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


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("regression", {}, "sd"),
    ("regression", {"huber": 0.3}, "v"),
]


@pytest.mark.parametrize(("name", "settings", "kind"), CASES)
def test_the_loss_and_its_gradient_equal_the_equation(
    sd_folder: Path, v_folder: Path, config: DistillConfig, name: str, settings: dict[str, Any], kind: str
) -> None:
    built = engine(sd_folder if kind == "sd" else v_folder, config, name, settings)
    naive = OnImages(built, built.sampler.model)
    wanted = getattr(naive, name)(drawn(built))
    wanted.backward()
    slopes = torch.cat([value.grad.flatten() for value in naive.nets["theta"].parameters() if value.grad is not None])
    found = gradient(built)
    assert (found - slopes).norm() < 1e-4 * slopes.norm()
    values, _ = engine_values(engine(sd_folder if kind == "sd" else v_folder, config, name, settings))
    assert values["generator_loss"] == pytest.approx(wanted.item(), rel=1e-4)


def engine_values(built: Engine) -> tuple[dict[str, float], Engine]:
    values, _ = built.run_phase(phase_of(built, GENERATOR, built.step))
    return {name: float(value) for name, value in values.items()}, built


VARIANTS: list[dict[str, Any]] = [{"micro_batch": 3}, {"micro_batch": 1, "split_backward": True, "gradient_checkpointing": True}]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_memory_options_do_not_change_the_gradient_and_the_loss(
    sd_folder: Path, config: DistillConfig, name: str, variant: dict[str, Any]
) -> None:
    plain, other = (engine(sd_folder, config, name, **more) for more in ({}, variant))
    one, two = gradient(plain), gradient(other)
    assert (two - one).norm() < 1e-5 * one.norm()
    (values, _), (again, _) = (engine_values(engine(sd_folder, config, name, **more)) for more in ({}, variant))
    assert again == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("name", SETTINGS)
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


@pytest.mark.parametrize("memory", ["24gb", "12gb"])
@pytest.mark.parametrize("name", SETTINGS)
def test_memory_recipes_take_a_step_in_bf16(sd_folder: Path, config: DistillConfig, name: str, memory: str) -> None:
    recipe = MEMORY[memory] | {"micro_batch": 1, "precision": "bf16"}
    result = engine(sd_folder, config, name, **recipe).train_step()
    assert result.skipped.item() == 0 and all(number == number for number in result.numbers().values())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_is_of_other_images_in_each_step_and_the_same_in_parts(sd_folder: Path, config: DistillConfig, name: str) -> None:
    built = engine(sd_folder, config, name)
    first, second = (built.draw_batch(inputs(built, GENERATOR, step), step, range(4)) for step in (0, 1))
    assert first.prompts + second.prompts == [f"image number {number}" for number in range(8)]
    halves = [drawn(built, part) for part in (range(2), range(2, 4))]
    for field in ("samples", "noise", "t"):
        assert torch.equal(torch.cat([getattr(half, field) for half in halves]), getattr(first, field))
    assert first.real is None


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
