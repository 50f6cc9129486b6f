"""Adversarial terms against float64 versions that are written sample by sample from the equations."""

import copy
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
    "scflow": {"gan": 0.3, "joined_images": 0, "backward": 0.5, "correction": 0.2, "huber": 0.1},
    "act": {"gan": 0.4, "r1": 0.05, "intervals": 12, "growing_images": 1, "huber": 0.1},
}
"""Settings under which each term has a visible part in the gradients."""
LATER = {"act": 1}
"""Step whose losses are compared, if it is not the first one. In its first step ACT has one interval."""


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


class Discriminating(Naive):
    """The losses with their adversarial terms."""

    def __init__(self, built: Engine, model: Model):
        super().__init__(built, model)
        self.nets |= {name: copy.deepcopy(follower.net).double() for name, follower in built.followers.items()}

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

    def logit(self, x_t: Tensor, t: int, prompt: str) -> Tensor:
        return self.nets["psi"].discriminator(self.features(x_t, t, prompt))

    def point(self, x: Tensor, noise: Tensor, t: int) -> Tensor:
        return self.abar[t].sqrt() * x + (1 - self.abar[t]).sqrt() * noise

    def huber(self, x: Tensor, target: Tensor) -> Tensor:
        c = self.config.objective.huber
        return torch.stack(
            [((one - two) ** 2 + c**2).sqrt() - c for one, two in zip(x.flatten(), target.flatten(), strict=True)]
        ).sum()

    def scflow_fake(self, draw: Batch) -> Tensor:
        """gan CHW times BCE(D(real), 1) + BCE(D(generated), 0), both with the same noise at the timestep s before t."""
        assert draw.real is not None and draw.span is not None and draw.real.samples is not None
        total = torch.zeros((), dtype=torch.float64)
        for i, prompt in enumerate(draw.prompts):
            s, noise = max(0, int(draw.t[i] - draw.span[i])), draw.noise[i : i + 1].double()
            x, real = self.generate(draw.latents[0][i : i + 1].double(), prompt).detach(), draw.real.samples[i : i + 1].double()
            total = total - (1 - self.logit(self.point(x, noise, s), s, prompt).sigmoid()).log().sum()
            total = total - self.logit(self.point(real, noise, s), s, draw.real.prompts[i]).sigmoid().log().sum()
        return self.config.objective.gan * draw.noise[0].numel() * total / len(draw.prompts)

    def scflow_generator(self, draw: Batch) -> Tensor:
        """Consistency with an earlier and a later point of the teacher's guided step, the way to the student's own image, and the GAN."""
        s, total, last = self.config.objective, torch.zeros((), dtype=torch.float64), len(self.abar) - 1
        assert draw.real is not None and draw.span is not None and draw.real.samples is not None
        for i, prompt in enumerate(draw.prompts):
            t, d, caption = int(draw.t[i]), int(draw.span[i]), draw.real.prompts[i]
            before, after = max(0, t - d), min(last, t + d)
            image, noise = draw.real.samples[i : i + 1].double(), draw.noise[i : i + 1].double()
            start, x_t = draw.latents[0][i : i + 1].double(), self.point(image, noise, t)
            with torch.no_grad():
                end = self.clean("phi", x_t, t, caption, s.guidance)
                eps = (x_t - self.abar[t].sqrt() * end) / (1 - self.abar[t]).sqrt()
                targets = [self.clean("target", self.point(end, eps, at), at, caption, 1.0) for at in (before, after)]
            first = image if before < 100 else targets[0]
            clean = self.clean("theta", x_t, t, caption, 1.0)
            x = self.generate(start, prompt)
            again = self.clean("theta", self.point(x.detach(), start, t), t, prompt, 1.0)
            total = total + self.huber(clean, first) + s.backward * self.huber(clean, targets[1])
            total = total + s.correction * (again - x.detach()).square().sum()
            fooling = -self.logit(self.point(x, noise, before), before, prompt).sigmoid().log().sum()
            total = total + s.gan * x.numel() * fooling
        return total / len(draw.prompts)

    def pair(self, draw: Batch, i: int) -> tuple[Tensor, Tensor, int, int]:
        """An image, its noise, and the two timesteps of a pair of ACT: T - 1 and its equal parts."""
        assert draw.samples is not None
        n, count = int(draw.t[i]), self.config.objective.intervals
        t, s = (max(0, number * 1000 // count - 1) for number in (n, n - 1))
        return draw.samples[i : i + 1].double(), draw.noise[i : i + 1].double(), t, s

    def consistency(self, net: str, x_t: Tensor, t: int, prompt: str) -> Tensor:
        skip, out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
        return skip * x_t + out * self.clean(net, x_t, t, prompt, 1.0)

    def act_fake(self, draw: Batch) -> Tensor:
        """gan CHW (BCE(D(image), 1) + BCE(D(prediction), 0) + r1 / 2 || dD / dx ||^2), the last one by a difference."""
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        for i, prompt in enumerate(draw.prompts):
            image, noise, t, _ = self.pair(draw, i)
            with torch.no_grad():
                x = self.consistency("theta", self.point(image, noise, t), t, prompt)
            real, near = self.logit(image, t, prompt), self.logit(image + 0.1 * noise, t, prompt)
            total = total - (1 - self.logit(x, t, prompt).sigmoid()).log().sum() - real.sigmoid().log().sum()
            total = total + s.r1 / 2 * ((near - real) / 0.1).square().sum()
        return s.gan * draw.noise[0].numel() * total / len(draw.prompts)

    def act_generator(self, draw: Batch) -> Tensor:
        """(1 - gan) d(f(x_t), f_target(x_s)) + gan CHW BCE(D(f(x_t)), 1) with the same image and noise at both timesteps."""
        s, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        for i, prompt in enumerate(draw.prompts):
            image, noise, t, before = self.pair(draw, i)
            x = self.consistency("theta", self.point(image, noise, t), t, prompt)
            with torch.no_grad():
                target = self.consistency("target", self.point(image, noise, before), before, prompt)
            fooling = -self.logit(x, t, prompt).sigmoid().log().sum()
            total = total + (1 - s.gan) * self.huber(x, target) + s.gan * x.numel() * fooling
        return total / len(draw.prompts)

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
    built.step = LATER.get(name, 0)
    naive = Discriminating(built, model)
    draw = built.draw_batch(inputs(built, role, built.step), built.step, range(2))
    if not draw.latents:  # dmd2's fake score learns from the samples of the generator's phase
        draw = dataclasses.replace(draw, latents=built.draw_batch(inputs(built, GENERATOR), 0, range(2)).latents)
    wanted = getattr(naive, f"{name}_{'fake' if role == FAKE else 'generator'}")(draw)
    trained = naive.nets["psi" if role == FAKE else "theta"]
    slopes = [torch.zeros_like(value) if one is None else one for value, one in _gradients(wanted, trained)]
    caught, values = caught_in(built, role)
    flat = torch.cat([slope.flatten() for slope in slopes])
    assert (caught - flat).norm() < 1e-4 * flat.norm()
    if role == FAKE and draw.real is not None and draw.span is None:
        logit = naive.nets["psi"].discriminator if name == "dmd2" else lambda found: found.mean(1)
        assert values["discriminator_loss"] == pytest.approx(naive.discriminator_loss(draw, logit).item(), rel=1e-4)
    elif role == FAKE:
        total = values["discriminator_loss"] + values.get("gradient_penalty", 0.0)
        assert built.config.objective.gan * draw.noise[0].numel() * total == pytest.approx(wanted.item(), rel=1e-4)
    elif name != "dmd2":
        assert values["generator_loss"] == pytest.approx(wanted.item(), rel=1e-4)
    without = dataclasses.replace(built.config.objective, **dict.fromkeys(built.config.objective.weights[-2:], 0.0))
    naive.config = dataclasses.replace(built.config, objective=without)
    plain = getattr(naive, f"{name}_{'fake' if role == FAKE else 'generator'}")(draw)
    rest = torch.cat([torch.zeros_like(v).flatten() if one is None else one.flatten() for v, one in _gradients(plain, trained)])
    assert (rest - flat).norm() > 0.01 * flat.norm(), "the adversarial term is a visible part"


@pytest.mark.parametrize("divergence", ["kl", "js", "jeffreys"])
def test_a_divergence_weights_the_score_difference_of_each_sample(model: Model, config: DistillConfig, divergence: str) -> None:
    built = engine(model, config, "dmd2", WITH_GAN["dmd2"] | {"divergence": divergence})
    naive = Discriminating(built, model)
    wanted = _gradients(naive.dmd2_generator(built.draw_batch(inputs(built, GENERATOR), 0, range(2))), naive.nets["theta"])
    flat = torch.cat([torch.zeros_like(v).flatten() if one is None else one.flatten() for v, one in wanted])
    caught, _ = caught_in(built, GENERATOR)
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


def caught_in(built: Engine, role: str) -> tuple[Tensor, dict[str, float]]:
    """The gradient and the measurements of a phase. The first update of dmd2's fake score uses the samples of the generator's phase."""
    phase = phase_of(built, role, built.step)
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
    (one, measured), (two, again) = caught_in(plain, role), caught_in(other, role)
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
    assert any("discriminator." in key for key in saved["fake_score"]) == (name != "sida")
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


def test_the_timesteps_of_act_come_closer_together_as_a_square_root(model: Model, config: DistillConfig) -> None:
    built = engine(model, config, "act", WITH_GAN["act"] | {"intervals": 150, "growing_images": 2000})
    counts = [built.objective.intervals(step) for step in (0, 10, 250, 500, 1000, 2000)]  # type: ignore[attr-defined]
    assert counts == [1, 15, 75, 106, 150, 150]
    draw = dataclasses.replace(drawn_at(built, GENERATOR, 1000), t=torch.tensor([1, 150]))
    ends = [built.objective.point(built.nets, draw, 150, back)[1].t.tolist() for back in (0, 1)]  # type: ignore[attr-defined]
    assert ends == [[5, 999], [0, 992]]


def test_two_terms_of_scflow_join_later(model: Model, config: DistillConfig) -> None:
    built = engine(model, config, "scflow", WITH_GAN["scflow"] | {"joined_images": 3})
    roles = [[phase.role for phase in built.objective.phases(step)] for step in range(3)]
    assert roles == [[GENERATOR], [GENERATOR], [FAKE, GENERATOR]]
    terms = []
    for step in (0, 2):
        built.step = step
        terms.append({*built.run_phase(phase_of(built, GENERATOR, step))[0]})
    alone, joined = terms
    assert joined - alone == {"backward_loss", "adversarial_loss"}
    settings = objectives.settings({"name": "scflow", "gan": 0.0, "joined_images": 0})
    without = objectives.Scflow(dataclasses.replace(config, objective=settings), 1000)
    assert FAKE not in without.roles and [phase.role for phase in without.phases(0)] == [GENERATOR]


def test_below_a_tenth_of_the_timesteps_the_target_of_scflow_is_the_image(model: Model, config: DistillConfig) -> None:
    built = engine(model, config, "scflow", WITH_GAN["scflow"])
    draw = drawn_at(built, GENERATOR, 0)
    t, span = torch.tensor([180, 180]), torch.tensor([81, 80])
    assert draw.real is not None and draw.real.samples is not None
    near = dataclasses.replace(draw, t=t, span=span, real=dataclasses.replace(draw.real, t=t, span=span))
    with torch.no_grad():
        first, _ = built.objective.targets(built.nets, near, True)  # type: ignore[attr-defined]
    assert torch.equal(first[0], draw.real.samples[0]) and not torch.equal(first[1], draw.real.samples[1])
    assert int(draw.span.min()) >= 1 and int(draw.span.max()) <= 100  # type: ignore[union-attr]


def drawn_at(built: Engine, role: str, step: int) -> Batch:
    """A batch of a phase, with the cond of its prompts."""
    return built._batch((inputs(built, role, step), step, range(2)))


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
