"""Adversarial terms against float64 versions that are written sample by sample from the equations."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidcli import objectives
from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine
from sidcli.errors import UsageError
from sidcli.models.kind import Head
from sidcli.models.loading import Model, load
from sidcli.models.sources import find
from sidcli.models.unet import UNET
from sidcli.objectives.adversarial import divergence_weight
from sidcli.objectives.base import FAKE, GENERATOR, Batch
from sidcli.progress import Silence
from sidcli.settings import MEMORY, DistillConfig, strategy
from sidcli.training import plan
from tests import tiny
from tests.gradients import perturbed
from tests.test_engine import Naive, inputs, phase_of, snapshot

WITH_GAN: dict[str, dict[str, Any]] = {
    "sida": {"frozen_images": 0, "gan_images": 0, "lsg_gan": 2.0, "lsd": 500.0, "kappa4": 1.5},
    "dmd2": {"gan": 0.5, "gan_fake": 0.3},
}
"""Settings under which each term has a visible part in the gradients."""


class Stripes:
    """Real images in place of `Latents`: noise that is a function of the position."""

    digest = name = "stripes"

    def at(self, seed: int, position: int) -> tuple[Tensor, str]:
        return torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(position)), f"a striped image number {position}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose middle block has maps of 2 x 2."""
    return tiny.write_two_levels(tmp_path_factory.mktemp("adversarial") / "sd", size=4)


@pytest.fixture
def model(folder: Path) -> Model:
    return load(find(str(folder)))


def engine(model: Model, config: DistillConfig, name: str, settings: dict[str, Any], **more: Any) -> Engine:
    objective = objectives.settings({"name": name, **settings})
    given = dataclasses.replace(config, **{"objective": objective, "batch_size": 2, "micro_batch": 2} | more)
    built = Engine(model, given, open_prompts("general"), torch.device("cpu"))
    built.data = Stripes()  # type: ignore[assignment]
    for trained in built.roles.values():
        trained.role = dataclasses.replace(trained.role, clip=0.0)  # the gradient of the loss itself
    return perturbed(built)


class Judging(Naive):
    """The losses with their adversarial terms."""

    def features(self, x_t: Tensor, t: int, prompt: str) -> Tensor:
        seen: list[Tensor] = []
        hook = self.nets["psi"].mid_block.register_forward_hook(lambda module, given, output: seen.append(output))
        self.nets["psi"](x_t, torch.tensor([t]), self.encode(prompt))
        hook.remove()
        return seen[0]

    def real(self, draw: Batch, i: int) -> Tensor:
        assert draw.real is not None and draw.real.samples is not None
        t = int(draw.t[i])
        a, s = self.abar[t].sqrt(), (1 - self.abar[t]).sqrt()
        return a * draw.real.samples[i : i + 1].double() + s * draw.noise[i : i + 1].double()

    def discriminator_loss(self, draw: Batch, logit: Callable[[Tensor], Tensor]) -> Tensor:
        """BCE(D(real), 1) + BCE(D(generated), 0), each a mean over the logits of an image and over the images."""
        assert draw.real is not None
        total = torch.zeros((), dtype=torch.float64)
        for i, (_, x_t, _, _, _, prompt, t) in enumerate(self.losses(draw)):
            real = logit(self.features(self.real(draw, i), t, draw.real.prompts[i])).flatten().sigmoid()
            fake = logit(self.features(x_t.detach(), t, prompt)).flatten().sigmoid()
            total = total - real.log().mean() - (1 - fake).log().mean()
        return total / len(draw.prompts)

    def sida_fake(self, draw: Batch) -> Tensor:
        s = self.config.objective
        return self.fake_loss(draw) + s.lsd / 2 * self.discriminator_loss(draw, lambda found: found.mean(1))

    def sida_generator(self, draw: Batch) -> Tensor:
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        for x, x_t, _, _, _, prompt, t in self.losses(draw):
            weight = (x - self.clean("phi", x_t, t, prompt, s.kappa4)).abs().mean().detach()
            bce = -self.features(x_t, t, prompt).mean(1).clamp(-10, 10).sigmoid().log().mean()
            total = total + s.lsg_gan / 2 * x.numel() * bce / weight
        return s.lsg / 2 * self.generator_loss(draw) + total / len(draw.prompts)

    def dmd2_fake(self, draw: Batch) -> Tensor:
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        for _, x_t, noise, a, sigma, prompt, t in self.losses(draw):
            predicted = (x_t.detach() - a * self.clean("psi", x_t.detach(), t, prompt, 1.0)) / sigma
            total = total + (predicted - noise).square().sum()
        found = self.discriminator_loss(draw, self.nets["psi"].discriminator)
        return total / len(draw.prompts) + s.gan_fake * draw.noise[0].numel() * found

    def dmd2_generator(self, draw: Batch) -> Tensor:
        """|| x - sg(x - (f_psi - f_phi) / mean |x - f_phi|) ||^2 / 2 with the adversarial term."""
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        for x, x_t, _, _, _, prompt, t in self.losses(draw):
            real, fake = self.clean("phi", x_t, t, prompt, s.guidance), self.clean("psi", x_t, t, prompt, 1.0)
            logit = self.nets["psi"].discriminator(self.features(x_t, t, prompt))
            r = float(logit.detach().exp())
            weight = {"reverse-kl": 1.0, "kl": r, "js": 1 - 1 / (1 + r), "jeffreys": 1 + r}[s.divergence]
            target = (x - weight * (fake - real) / (x - real).abs().mean()).detach()
            total = total + (x - target).square().sum() / 2 - s.gan * x.numel() * logit.sigmoid().log().sum()
        return total / len(draw.prompts)


@pytest.mark.parametrize("role", [FAKE, GENERATOR])
@pytest.mark.parametrize("name", WITH_GAN)
def test_the_gradients_equal_the_equations(model: Model, config: DistillConfig, name: str, role: str) -> None:
    built = engine(model, config, name, WITH_GAN[name])
    naive = Judging(built, model)
    draw = built.draw_batch(inputs(built, role), 0, range(2))
    if not draw.latents:  # dmd2's fake score learns from the samples of the generator's phase
        draw = dataclasses.replace(draw, latents=built.draw_batch(inputs(built, GENERATOR), 0, range(2)).latents)
    wanted = getattr(naive, f"{name}_{'fake' if role == FAKE else 'generator'}")(draw)
    trained = naive.nets["psi" if role == FAKE else "theta"]
    slopes = [torch.zeros_like(value) if one is None else one for value, one in _gradients(wanted, trained)]
    caught, values = _caught(built, role)
    flat = torch.cat([slope.flatten() for slope in slopes])
    assert (caught - flat).norm() < 1e-4 * flat.norm()
    if role == FAKE:
        logit = naive.nets["psi"].discriminator if name == "dmd2" else lambda found: found.mean(1)
        assert values["discriminator_loss"] == pytest.approx(naive.discriminator_loss(draw, logit).item(), rel=1e-4)
    elif name == "sida":
        assert values["generator_loss"] == pytest.approx(wanted.item(), rel=1e-4)
    without = dataclasses.replace(built.config.objective, **dict.fromkeys(built.config.objective.weights[-2:], 0.0))
    naive.config = dataclasses.replace(built.config, objective=without)
    plain = getattr(naive, f"{name}_{'fake' if role == FAKE else 'generator'}")(draw)
    rest = torch.cat([torch.zeros_like(v).flatten() if one is None else one.flatten() for v, one in _gradients(plain, trained)])
    assert (rest - flat).norm() > 0.01 * flat.norm(), "the adversarial term is a visible part"


@pytest.mark.parametrize("divergence", ["kl", "js", "jeffreys"])
def test_a_divergence_weights_the_score_difference_of_each_sample(model: Model, config: DistillConfig, divergence: str) -> None:
    built = engine(model, config, "dmd2", WITH_GAN["dmd2"] | {"divergence": divergence})
    naive = Judging(built, model)
    wanted = _gradients(naive.dmd2_generator(built.draw_batch(inputs(built, GENERATOR), 0, range(2))), naive.nets["theta"])
    flat = torch.cat([torch.zeros_like(v).flatten() if one is None else one.flatten() for v, one in wanted])
    caught, _ = _caught(built, GENERATOR)
    assert (caught - flat).norm() < 1e-4 * flat.norm()
    assert f"{divergence} weights of f-distill (arXiv 2502.15681)" in built.objective.method


def test_the_density_ratio_of_a_divergence_is_limited() -> None:
    weights = divergence_weight("kl", torch.tensor([-100.0, 0.0, 1.0, 100.0]))
    assert isinstance(weights, Tensor)
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.1, 1.0, math.e, 10.0]))


def test_a_divergence_needs_a_discriminator() -> None:
    with pytest.raises(UsageError, match="divergence=kl reads the discriminator, and gan is 0"):
        objectives.settings({"name": "dmd2", "divergence": "kl"})
    with pytest.raises(UsageError, match="divergence must be one of reverse-kl, kl, js, jeffreys, not 'tv'"):
        objectives.settings({"name": "dmd2", "gan": 0.1, "divergence": "tv"})


def _gradients(loss: Tensor, net: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    weights = list(net.parameters())
    return list(zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True))


def _caught(built: Engine, role: str) -> tuple[Tensor, dict[str, float]]:
    """The gradient and the measurements of a phase. The first update of dmd2's fake score uses the samples of the generator's phase."""
    phase = phase_of(built, role)
    samples: list[Tensor] = []
    if phase.inputs.reuse:
        batches = [built._batch((inputs(built, GENERATOR), 0, piece)) for piece in built._micro_batches()]
        samples = [built.nets.generate(batch).detach() for batch in batches]
    found: list[Tensor] = []
    step = built.roles[role].optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.extend(v.grad.flatten() for group in optimizer.param_groups for v in group["params"])
    )
    values, _ = built.run_phase(phase, samples)
    step.remove()
    return torch.cat(found), {name: float(value) for name, value in values.items()}


VARIANTS = [{"micro_batch": 1}, {"split_backward": True, "gradient_checkpointing": True}]


@pytest.mark.parametrize("role", [FAKE, GENERATOR])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", WITH_GAN)
def test_memory_options_do_not_change_the_gradients_and_the_losses(
    folder: Path, config: DistillConfig, name: str, variant: dict[str, Any], role: str
) -> None:
    plain, other = (engine(load(find(str(folder))), config, name, WITH_GAN[name], **more) for more in ({}, variant))
    (one, measured), (two, again) = _caught(plain, role), _caught(other, role)
    assert (two - one).norm() < 1e-5 * one.norm()
    assert "discriminator_loss" in measured or "adversarial_loss" in measured
    assert again == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("memory", ["24gb", "12gb"])
@pytest.mark.parametrize("name", WITH_GAN)
def test_memory_recipes_take_a_step_in_bf16(model: Model, config: DistillConfig, name: str, memory: str) -> None:
    pytest.importorskip("peft")
    recipe = MEMORY[memory] | {"micro_batch": 1, "precision": "bf16"} | ({"fake_lora": 2} if memory == "12gb" else {})
    result = engine(model, config, name, WITH_GAN[name], **recipe).train_step()
    assert result.skipped.item() == 0 and all(number == number for number in result.numbers().values())


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("name", WITH_GAN)
def test_training_goes_on_bit_for_bit_from_saved_tensors(folder: Path, config: DistillConfig, name: str, lora: int) -> None:
    if lora:
        pytest.importorskip("peft")
    whole, again = (engine(load(find(str(folder))), config, name, WITH_GAN[name], fake_lora=lora) for _ in range(2))
    whole.train_step()
    saved = snapshot(whole)
    assert any("discriminator." in key for key in saved["fake_score"]) == (name == "dmd2")
    again.load(1, saved)
    assert whole.train_step().numbers() == again.train_step().numbers()
    one, other = snapshot(whole), snapshot(again)
    assert all(torch.equal(value, other[file][key]) for file, tensors in one.items() for key, value in tensors.items())
    if name == "dmd2":
        moved = [key for key, value in one["fake_score"].items() if not torch.equal(value, saved["fake_score"][key])]
        assert any(key.startswith("discriminator.") for key in moved)
    assert not any("discriminator" in key for key in whole.student().denoiser.state_dict())


@pytest.mark.parametrize("lora", [0, 2])
def test_the_plan_counts_the_head_and_the_passes_of_real_images(
    folder: Path, model: Model, config: DistillConfig, lora: int
) -> None:
    def sizes(name: str, settings: dict[str, Any]) -> tuple[plan.Sizes, int, int]:
        objective = objectives.settings({"name": name, **settings})
        given = dataclasses.replace(config, teacher=str(folder), objective=objective, fake_lora=lora)
        made = plan.make(given, Path("run"), "cpu", 1, Silence())
        found = plan.Sizes.of(plan.describe_teacher(given, Silence()), given)
        return found, found.state(given), made.flops_per_image

    built = engine(model, config, "dmd2", WITH_GAN["dmd2"], fake_lora=lora)
    (with_head, state, more), (_, _, plain) = sizes("dmd2", WITH_GAN["dmd2"]), sizes("dmd2", {})
    assert state == built.state_bytes
    assert with_head.roles[FAKE][1] == sum(value.numel() for _, value in built.roles[FAKE].weights)
    # One update of the fake score: 3 forwards of it on generated and 3 on real images; its own backward in the generator's phase: 1.
    assert more / plain == pytest.approx((3 + 3 + 3 + 2 + 2) / (3 + 3 + 1 + 2))
    if lora:
        return
    (_, _, sida), (_, _, sid) = sizes("sida", {"frozen_images": 0}), sizes("sid", {})
    assert sida / sid == pytest.approx((18 + 3) / 18)
    drawn = dataclasses.replace(config, teacher=str(folder), objective=objectives.Sida.Settings(frozen_images=0))
    drawn = dataclasses.replace(drawn, data="teacher", data_num=10)
    made = plan.make(drawn, Path("run"), "cpu", 1, Silence())
    assert made.drawing_flops * 21 == made.flops_per_image * 10 * 5 * 2
    assert any("10 images that the teacher draws first" in line for line in made.lines())
    assert not plan.make(dataclasses.replace(drawn, data="folder"), Path("run"), "cpu", 1, Silence()).drawing_flops


def test_without_weight_the_gan_leaves_the_gradient_of_dmd2_as_it_is(model: Model, config: DistillConfig) -> None:
    built = engine(model, config, "dmd2", WITH_GAN["dmd2"])
    batch = built._batch((inputs(built, GENERATOR), 0, range(2)))
    with torch.no_grad():
        x = built.nets.generate(batch)
        wanted, values = built.objective.matching_gradient(built.nets, x, batch)  # type: ignore[attr-defined]
    settings = dataclasses.replace(built.config.objective, gan=0.0)
    built.objective.settings = settings
    found, again = built.objective.adversarial_gradient(built.nets, x, batch)  # type: ignore[attr-defined]
    torch.testing.assert_close(found, wanted)
    assert again["generator_loss"] == pytest.approx(float(values["generator_loss"]), rel=1e-5)
    assert not settings.needs_images and objectives.find("dmd2")(dataclasses.replace(built.config, objective=settings), 1000).roles[
        FAKE
    ] == dataclasses.replace(built.objective.roles[FAKE], head=False)


def test_sida_trains_the_fake_score_alone_at_first_and_its_adversarial_term_joins_later(
    model: Model, config: DistillConfig
) -> None:
    built = engine(model, config, "sida", {"frozen_images": 3, "gan_images": 8, "lsg_gan": 2.0}, fake_warmup=1)
    roles = [[phase.role for phase in built.objective.phases(step)] for step in range(4)]
    assert roles == [[FAKE], [FAKE], [FAKE, GENERATOR], [FAKE, GENERATOR]]
    assert [built.objective.phases(step)[1].update for step in (2, 5)] == [0, 3]
    assert all(phase.inputs.real for phase in built.objective.phases(0))
    batch = built._batch((built.objective.phases(2)[1].inputs, 2, range(2)))
    with torch.no_grad():
        x = built.nets.generate(batch)
        alone, joined = (built.objective.phases(step)[1].gradient(built.nets, x, batch)[0] for step in (3, 4))
        plain = super(objectives.Sida, built.objective).score_gradient(built.nets, x, batch)[0]  # type: ignore[misc]
    torch.testing.assert_close(alone, 50 * plain, rtol=1e-4, atol=1e-4)
    assert (joined - alone).norm() > 0.01 * alone.norm()


def test_without_guidance_on_captions_the_discriminator_reads_none(model: Model, config: DistillConfig) -> None:
    settings = WITH_GAN["sida"] | strategy("zero-cfg", None)
    built = engine(model, config, "sida", settings)
    batch = built._batch((inputs(built, FAKE), 0, range(2)))
    with torch.no_grad():
        found = phase_of(built, FAKE).forward(built.nets, batch)
        assert batch.real is not None and batch.real.samples is not None
        net, nothing = built.roles[FAKE].net, built.empty.states.expand(2, -1, -1)
        with UNET.features(net) as seen:
            net(built.path.noised(batch.real.samples, batch.noise, batch.t), batch.t, nothing)
    torch.testing.assert_close(found[2], seen[0].mean(1))
    with pytest.raises(UsageError, match="reads captions where it is trained and none where it is used") as refused:
        objectives.settings({"name": "sida", "kappa1": 0.0})
    assert "zero-cfg" in refused.value.hint


def test_the_head_is_the_published_one_for_maps_of_eight_and_fits_others(model: Model) -> None:
    layers = [layer for layer in Head(64, 8, 8, 32).layers]
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Conv2d", "GroupNorm", "SiLU", "Conv2d", "GroupNorm", "SiLU", "Conv2d"]
    convolutions = [(layer.kernel_size, layer.stride) for layer in layers if isinstance(layer, nn.Conv2d)]
    assert convolutions == [((4, 4), (2, 2)), ((4, 4), (1, 1)), ((1, 1), (1, 1))]
    for height, width in ((1, 1), (2, 2), (4, 4), (5, 7), (8, 3), (9, 1), (32, 32), (16, 24)):
        assert Head(8, height, width, 2)(torch.randn(3, 8, height, width)).shape == (3,)
    UNET.add_head(model.denoiser)
    with UNET.features(model.denoiser) as found:
        model.denoiser(torch.randn(2, 4, 4, 4), torch.tensor([5, 900]), torch.randn(2, 77, 32))
    assert found[0].shape == (2,)


def test_heads_of_one_seed_are_equal(folder: Path, config: DistillConfig) -> None:
    def head(seed: int) -> Tensor:
        objective = objectives.settings({"name": "dmd2", "gan": 0.001})
        given = dataclasses.replace(config, objective=objective, seed=seed)
        built = Engine(load(find(str(folder))), given, open_prompts("general"), torch.device("cpu"))
        return built.roles[FAKE].net.discriminator.layers[-1].weight.detach()

    assert torch.equal(head(0), head(0)) and not torch.equal(head(0), head(1))


def test_weights_and_numbers_of_images_are_not_negative() -> None:
    for name, setting, value in (("sida", "lsd", -1.0), ("sida", "gan_images", -1), ("dmd2", "gan", -0.1)):
        with pytest.raises(UsageError, match=f"{setting} must be at least 0, not {value:g}"):
            objectives.settings({"name": name, setting: value})


def test_the_method_of_a_model_card_says_whether_there_was_a_gan(model: Model, config: DistillConfig) -> None:
    assert engine(model, config, "dmd2", {"gan": 0.001}).objective.method == "DMD2 (arXiv 2405.14867)"
    assert "without its GAN" in engine(model, config, "dmd2", {}).objective.method
