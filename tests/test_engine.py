import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sidcli.data.prompts import open_prompts
from sidcli.diffusion.grids import exit_grid
from sidcli.diffusion.sampling import few_steps
from sidcli.engine import Engine, ema_beta
from sidcli.models.drawing import Plan
from sidcli.models.kind import Cond
from sidcli.models.loading import Model, load
from sidcli.models.sources import find
from sidcli.objectives.base import Batch, Inputs, Phase
from sidcli.objectives.sid import SidSettings
from sidcli.settings import MEMORY, DistillConfig, strategy
from tests.gradients import gradient, perturbed

CPU = torch.device("cpu")


def engine(model: Model, config: DistillConfig) -> Engine:
    return Engine(model, config, open_prompts("general"), CPU)


def snapshot(built: Engine) -> dict[str, dict[str, torch.Tensor]]:
    return {file: {name: value.clone() for name, value in tensors.items()} for file, tensors in built.tensors().items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "two pieces": {"micro_batch": 3},
    "one by one": {"micro_batch": 1},
    "split backward": {"split_backward": True},
    "recomputed activations": {"gradient_checkpointing": True},
    "both and in pieces": {"split_backward": True, "gradient_checkpointing": True, "micro_batch": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", ["fake_score", "generator"])
def test_memory_options_do_not_change_the_gradient_of_a_step(
    sd_folder: Path, config: DistillConfig, phase: str, variant: str
) -> None:
    plain, other = (
        gradient(perturbed(engine(load(find(str(sd_folder))), settings)), phase)
        for settings in (config, dataclasses.replace(config, **VARIANTS[variant]))
    )
    assert (other - plain).norm() < 1e-5 * plain.norm()


SYMBOLS = {"psi": "fake_score", "theta": "generator"}


class Naive:
    """The two losses of SiD-LSG, sample by sample in float64, straight from the equations of arXiv 2406.01561."""

    def __init__(self, built: Engine, model: Model):
        self.config, self.prediction = built.config, model.path.prediction
        self.nets = {
            name: copy.deepcopy(net).double().requires_grad_(True)
            for name, net in (
                ("phi", built.teacher),
                *((name, built.roles[role].net) for name, role in SYMBOLS.items() if role in built.roles),
            )
        }
        self.text, self.tokenizer = copy.deepcopy(model.text_encoders[0]).double(), model.tokenizers[0]
        self.abar = torch.cumprod(
            1 - DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").betas.double(), 0
        )

    def encode(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer(
            prompt, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text(ids).last_hidden_state.detach()

    def clean(self, net: str, x_t: torch.Tensor, t: int, prompt: str, kappa: float) -> torch.Tensor:
        a, s = self.abar[t].sqrt(), (1 - self.abar[t]).sqrt()

        def x0(text: str) -> torch.Tensor:
            out = self.nets[net](x_t, torch.tensor([t]), self.encode(text)).sample
            return (x_t - s * out) / a if self.prediction == "epsilon" else a * x_t - s * out

        # Guidance is linear, so it may as well be applied to the clean predictions.
        return x0("") + kappa * (x0(prompt) - x0(""))

    def generate(self, z: torch.Tensor, prompt: str) -> torch.Tensor:
        t = self.config.t_init
        return self.clean("theta", (1 - self.abar[t]).sqrt() * z, t, prompt, 1.0)

    def losses(self, draw: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float, str, int]]:
        for i, prompt in enumerate(draw.prompts):
            t = int(draw.t[i])
            a, s = self.abar[t].sqrt(), (1 - self.abar[t]).sqrt()
            x, noise = self.generate(draw.latents[0][i : i + 1].double(), prompt), draw.noise[i : i + 1].double()
            yield x, a * x + s * noise, noise, a, s, prompt, t

    def fake_loss(self, draw: Batch) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x, _, noise, a, s, prompt, t in self.losses(draw):
            x_t = (a * x + s * noise).detach()
            # || eps_psi - eps ||^2 is the error of the clean prediction times abar / (1 - abar).
            total = (
                total + a**2 / s**2 * (self.clean("psi", x_t, t, prompt, self.config.objective.kappa1) - x.detach()).square().sum()
            )
        return total / len(draw.prompts)

    def generator_loss(self, draw: Batch) -> torch.Tensor:
        c, total = self.config.objective, torch.zeros((), dtype=torch.float64)
        for x, x_t, _, _, _, prompt, t in self.losses(draw):
            real = self.clean("phi", x_t, t, prompt, c.kappa4)
            fake, target = (self.clean("psi", x_t, t, prompt, kappa) for kappa in (c.kappa2, c.kappa3))
            weight = (x - real).abs().mean().detach()
            total = total + ((real - fake) * (target - x) + (1 - c.alpha) * (real - fake) ** 2).sum() / weight
        return total / len(draw.prompts)


CASES = [
    ("lsg", 2.0, 1.0, "sd"),
    ("long", 3.0, 1.2, "sd"),
    ("short", 0.5, 1.0, "v"),
    ("zero-cfg", None, 0.7, "v"),
    ("anti-cfg", None, 1.0, "sd"),
    ("none", None, 1.0, "sd"),
]


@pytest.mark.parametrize(("name", "scale", "alpha", "kind"), CASES)
def test_both_losses_and_their_gradients_equal_the_equations(
    sd_folder: Path, v_folder: Path, config: DistillConfig, name: str, scale: float | None, alpha: float, kind: str
) -> None:
    model = load(find(str(sd_folder if kind == "sd" else v_folder)))
    objective = SidSettings(alpha=alpha, dropout=0.5, **strategy(name, scale))
    settings = dataclasses.replace(config, batch_size=2, micro_batch=2, objective=objective)
    for phase, role in (("fake_score", "psi"), ("generator", "theta")):
        built = perturbed(engine(model, settings))
        naive = Naive(built, model)
        draw = built.draw_batch(inputs(built, phase), 0, range(2))
        wanted = naive.fake_loss(draw) if phase == "fake_score" else naive.generator_loss(draw)
        wanted.backward()
        slopes = torch.cat([value.grad.flatten() for value in naive.nets[role].parameters() if value.grad is not None])
        caught = gradient(built, phase)
        assert (caught - slopes).norm() < 1e-4 * slopes.norm()
        loss = engine_loss(perturbed(engine(model, settings)), phase)
        assert loss == pytest.approx(wanted.item(), rel=1e-4, abs=1e-3)


def phase_of(built: Engine, role: str, step: int = 0, update: int = 0) -> Phase:
    """The phase of a training step that trains this network."""
    return [phase for phase in built.objective.phases(step) if phase.role == role][update]


def inputs(built: Engine, role: str, step: int = 0, update: int = 0) -> Inputs:
    return phase_of(built, role, step, update).inputs


def engine_loss(built: Engine, role: str) -> float:
    values, _ = built.run_phase(phase_of(built, role, built.step))
    return float(next(iter(values.values())))


def test_a_fake_score_equal_to_the_teacher_gives_a_loss_of_exactly_zero_and_no_gradient(
    sd_folder: Path, config: DistillConfig
) -> None:
    same, other = (engine(load(find(str(sd_folder))), config) for _ in range(2))
    # The two scores' contributions cancel when they are added up, so rounding remains of the gradient.
    assert gradient(same).norm() < 1e-6 * gradient(perturbed(other)).norm()
    assert engine_loss(engine(load(find(str(sd_folder))), config), "generator") == 0.0


def test_a_step_changes_fake_score_generator_and_average_but_never_the_teacher(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, config)
    before = {name: value.clone() for name, value in built.teacher.state_dict().items()}
    for _ in range(2):
        built.train_step()
    for name in ("fake_score", "generator", "average"):
        assert any(not torch.equal(value, before[key]) for key, value in built.tensors()[name].items())
    assert all(torch.equal(value, before[name]) for name, value in built.teacher.state_dict().items())


def test_timesteps_reach_t_min_and_never_t_max(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, dataclasses.replace(config, t_min=20, t_max=24))
    drawn = built.draw_batch(inputs(built, "fake_score"), 0, range(200)).t
    assert sorted(set(drawn.tolist())) == [20, 21, 22, 23]


def test_captions_are_dropped_for_the_fake_score_only_and_only_under_guidance(sd: Model, config: DistillConfig) -> None:
    def dropped(role: str, **settings: float) -> int:
        built = engine(sd, dataclasses.replace(config, objective=SidSettings(dropout=0.5, **settings)))
        return built.draw_batch(inputs(built, role), 0, range(40)).prompts.count("")

    assert 10 < dropped("fake_score") < 30
    assert dropped("generator") == 0
    assert dropped("fake_score", kappa1=1.0, kappa2=1.0, kappa3=1.0) == 0


def test_no_prompt_and_no_noise_is_used_twice_in_successive_updates(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, dataclasses.replace(config, fake_updates=2, objective=SidSettings(dropout=0.0)))
    draws = [built.draw_batch(phase.inputs, step, range(4)) for step in range(2) for phase in built.objective.phases(step)]
    noises = [noise.flatten()[0].item() for draw in draws for noise in (*draw.latents[0], *draw.noise)]
    assert len(draws) == 6 and len(set(noises)) == len(noises)
    assert len({prompt for draw in draws for prompt in draw.prompts}) > 20


def test_the_average_starts_as_the_generator_and_settles_at_the_published_rate() -> None:
    config = DistillConfig(batch_size=512)
    assert ema_beta(0, config) == 0.0
    assert ema_beta(10**9, config) == pytest.approx(0.99293, abs=1e-5)


def test_a_teacher_that_predicts_v_trains(v_folder: Path, config: DistillConfig) -> None:
    built = engine(load(find(str(v_folder))), config)
    losses = [engine_loss(built, "fake_score") for _ in range(8)]
    assert all(loss == loss for loss in losses)
    assert built.train_step().numbers()["generator_loss"] != 0.0


def test_the_fake_score_learns_the_generators_score(sd: Model, config: DistillConfig) -> None:
    unguided = SidSettings(kappa1=1.0, kappa2=1.0, kappa3=1.0, kappa4=1.0)
    built = engine(sd, dataclasses.replace(config, objective=unguided, batch_size=8, micro_batch=8))
    losses = [engine_loss(built, "fake_score") for _ in range(32)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("memory", MEMORY)
def test_every_memory_recipe_takes_a_step_in_every_precision(sd: Model, config: DistillConfig, memory: str, precision: str) -> None:
    pytest.importorskip("peft")
    recipe = {**MEMORY[memory], "precision": precision, "fake_lora": min(4, MEMORY[memory].get("fake_lora", 0))}
    built = engine(sd, dataclasses.replace(config, **recipe))
    kinds = {value.dtype for value in built.teacher.parameters()}
    assert kinds == {torch.bfloat16 if recipe.get("teacher_bf16") and precision == "bf16" else torch.float32}
    result = built.train_step()
    assert result.skipped.item() == 0 and all(number == number for number in result.numbers().values())
    drawn = built.teacher_latents(Plan(2, 3.0), ["a cat"], torch.randn(1, *built.latent_shape), lambda: None)
    assert drawn.dtype == torch.float32 and drawn.isfinite().all()


def test_prompts_that_are_encoded_ahead_give_the_same_steps(sd_folder: Path, config: DistillConfig) -> None:
    built = [
        engine(load(find(str(sd_folder))), dataclasses.replace(config, micro_batch=2, offload_text=away)) for away in (False, True)
    ]
    for one in built * 2:
        one.train_step()
    here, ahead = (one.tensors()["generator"] for one in built)
    assert all(torch.equal(value, ahead[name]) for name, value in here.items())


def test_no_prompt_is_encoded_ahead_of_the_last_step(
    sd_folder: Path, config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = engine(load(find(str(sd_folder))), dataclasses.replace(config, steps=1, offload_text=True))
    encoded: list[str] = []
    encode = built.sampler.encode
    monkeypatch.setattr(built.sampler, "encode", lambda prompts: encoded.extend(prompts) or encode(prompts))
    built.train_step()
    built._drawer.shutdown()
    assert len(encoded) == len(built.objective.phases(0)) * config.batch_size


@pytest.mark.parametrize("optimizer", ["adam", "adam8bit"])
def test_an_engine_loaded_from_its_tensors_goes_on_as_if_it_had_never_stopped(
    sd_folder: Path, config: DistillConfig, optimizer: str
) -> None:
    if optimizer == "adam8bit":
        pytest.importorskip("bitsandbytes")
    settings = dataclasses.replace(config, optimizer=optimizer)
    whole, again = (engine(load(find(str(sd_folder))), settings) for _ in range(2))
    for _ in range(2):
        whole.train_step()
    again.load(2, snapshot(whole))
    for built in (whole, again):
        built.train_step()
    one, other = snapshot(whole), snapshot(again)
    for file, tensors in one.items():
        assert tensors.keys() == other[file].keys() and len(tensors) > 100
        assert all(torch.equal(value, other[file][name]) for name, value in tensors.items()), file


def test_a_warm_up_step_moves_the_fake_score_alone(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, dataclasses.replace(config, fake_warmup=1))
    before = snapshot(built)
    first = built.train_step()
    after = built.tensors()
    assert "generator_loss" not in first.values and built.images == 4
    assert all(torch.equal(before["generator"][name], value) for name, value in after["generator"].items())
    assert any(not torch.equal(before["fake_score"][name], value) for name, value in after["fake_score"].items())
    assert "generator_loss" in built.train_step().values and built.images == 8


def test_a_value_that_is_not_finite_leaves_every_weight_as_it_was_and_is_counted(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, config)
    built.train_step()
    before = snapshot(built)
    good = built.empty
    built.empty = Cond(torch.full_like(good.states, float("nan")))
    result = built.train_step()
    assert result.skipped.item() == 2 and result.skipped_in_row.item() == 1
    for name in ("generator", "fake_score", "optimizer_fake_score", "optimizer_generator"):
        assert all(torch.equal(before[name][key], value) for key, value in built.tensors()[name].items())
    built.empty = good
    again = built.train_step()
    assert again.skipped.item() == 2 and again.skipped_in_row.item() == 0


def test_updates_of_one_network_that_are_skipped_in_a_row_are_counted_beside_finite_updates_of_the_other(
    sd: Model, config: DistillConfig
) -> None:
    too_large = dataclasses.replace(config.objective, kappa3=1e38)
    built = perturbed(engine(sd, dataclasses.replace(config, objective=too_large)))
    before = snapshot(built)
    assert [built.train_step().skipped_in_row.item() for _ in range(3)] == [1, 2, 3]
    assert all(torch.equal(before["generator"][name], value) for name, value in built.tensors()["generator"].items())
    assert any(not torch.equal(before["fake_score"][name], value) for name, value in built.tensors()["fake_score"].items())


@pytest.mark.parametrize("renoise", ["ddim", "fixed", "fresh"])
def test_a_few_step_student_learns_through_its_last_step_alone(sd: Model, config: DistillConfig, renoise: str) -> None:
    built = engine(sd, dataclasses.replace(config, student_steps=4, renoise=renoise))
    exits = {len(built.draw_batch(inputs(built, "generator"), step, range(2)).latents) for step in range(40)}
    assert exits == {1, 2, 3, 4}
    for step in range(40):
        draws = [("fake_score", range(2)), ("fake_score", range(2, 4)), ("generator", range(2))]
        assert len({len(built.draw_batch(inputs(built, role, step), step, samples).latents) for role, samples in draws}) == 1
    calls = []
    net = built.roles["generator"].net
    net.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    keys = [(inputs(built, "generator", step), step, range(2)) for step in range(40)]
    batch = next(batch for key in keys if len((batch := built.draw_batch(*key)).latents) == 3)
    built.nets.training = "generator"
    x = built.nets.generate(dataclasses.replace(batch, cond=built.sampler.encode(batch.prompts)))
    assert calls == [False, False, True] and x.requires_grad


def test_four_steps_visit_the_published_timesteps_and_may_end_early() -> None:
    assert exit_grid(625, 4) == (625, 468, 312, 156)
    assert exit_grid(625, 1) == (625,)


def test_one_step_of_a_few_step_student_is_the_one_step_generator(sd: Model) -> None:
    z = torch.randn(2, *sd.latent_shape)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * t.view(-1, 1, 1, 1) / 1000

    one = few_steps(denoise, lambda _: z, sd.path, (625,))
    torch.testing.assert_close(few_steps(denoise, lambda _: z, sd.path, exit_grid(625, 4)[:1], "fixed"), one)


def test_a_lora_fake_score_leaves_the_teachers_weights_alone_and_shares_them(sd: Model, config: DistillConfig) -> None:
    pytest.importorskip("peft")
    built = engine(sd, dataclasses.replace(config, fake_lora=4))
    shared = {value.data_ptr() for value in built.teacher.parameters()}
    assert {value.data_ptr() for value in built.roles["fake_score"].net.parameters() if not value.requires_grad} == shared
    before = {name: value.clone() for name, value in built.teacher.named_parameters()}
    assert engine_loss(built, "generator") == 0.0  # fresh adapters add nothing
    built.train_step()
    assert all(torch.equal(value, before[name]) for name, value in built.teacher.named_parameters())
    assert engine_loss(built, "generator") != 0.0


def test_student_and_fake_score_may_both_be_adapters_on_the_weights_of_one_teacher(sd: Model, config: DistillConfig) -> None:
    pytest.importorskip("peft")
    built = engine(sd, dataclasses.replace(config, fake_lora=4, student_lora=2, steps=3))
    shared = {value.data_ptr() for value in built.teacher.parameters()}
    before = {name: value.clone() for name, value in built.teacher.named_parameters()}
    for name in ("generator", "fake_score"):
        net = built.roles[name].net
        assert {value.data_ptr() for value in net.parameters() if not value.requires_grad} == shared
    assert len({tuple(value.flatten()[:3].tolist()) for role in built.roles.values() for _, value in role.weights}) > 2
    for _ in range(3):
        built.train_step()
    assert all(torch.equal(value, before[name]) for name, value in built.teacher.named_parameters())
    files = built.tensors()
    assert files["generator"].keys() == files["average"].keys() and all("lora_" in name for name in files["generator"])
    assert sum(value.nbytes for tensors in files.values() for value in tensors.values()) < built.state_bytes * 1.01

    student, trained = built.student(), built.roles["generator"].net
    assert all(torch.equal(value, before[name]) for name, value in built.teacher.named_parameters())
    assert student.denoiser.state_dict().keys() == before.keys()
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if value.requires_grad:
                value.copy_(built.roles["generator"].average[name])
        x, t, cond = torch.randn(2, *sd.latent_shape), torch.tensor([30, 625]), built.sampler.encode(["a cat", "a dog"])
        drawn, wanted = student.denoiser(x, t, cond.states).sample, trained(x, t, cond.states).sample
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(drawn, built.teacher(x, t, cond.states).sample, atol=1e-4)


class Numbered:
    """Real images in place of `Latents`: image i is filled with the number i and has the caption `image i`."""

    digest = name = "numbered"

    def at(self, seed: int, position: int) -> tuple[torch.Tensor, str]:
        return torch.full((4, 8, 8), float(position)), f"image {position}"


def test_real_images_come_with_their_captions_and_the_noise_of_the_batch(sd: Model, config: DistillConfig) -> None:
    built = engine(sd, dataclasses.replace(config, objective=SidSettings(dropout=0.5)))
    built.data = Numbered()  # type: ignore[assignment]
    plain = inputs(built, "fake_score", 3)
    asked = dataclasses.replace(plain, real=True)
    without, batch = built.draw_batch(plain, 3, range(4)), built._on_device(built.draw_batch(asked, 3, range(4)))
    assert without.real is None and batch.real is not None and batch.real.samples is not None
    assert batch.prompts == without.prompts and "" in batch.prompts
    assert torch.equal(batch.latents[0], without.latents[0]) and torch.equal(batch.t, without.t), "no stream has changed"
    assert torch.equal(batch.real.noise, batch.noise) and torch.equal(batch.real.t, batch.t) and batch.real.latents == []
    numbers = [plain.turn * 4 + sample for sample in range(4)]
    assert batch.real.samples[:, 0, 0, 0].tolist() == numbers
    # The captions that are emptied for generated images are emptied for real ones.
    assert batch.real.prompts == [f"image {i}" if text else "" for i, text in zip(numbers, batch.prompts, strict=True)]
    torch.testing.assert_close(batch.real.cond.states, built.sampler.encode(batch.real.prompts).states)
    halves = [built.draw_batch(asked, 3, part).real for part in (range(2), range(2, 4))]
    assert torch.equal(torch.cat([half.samples for half in halves]), batch.real.samples)  # type: ignore[union-attr, misc]


def test_an_output_of_several_tensors_gets_the_gradient_of_each(sd_folder: Path, config: DistillConfig) -> None:
    """A loss over two halves of an output, as one tensor and as a tuple."""

    def both(phase: Phase) -> Phase:
        def gradient(nets: Any, output: Any, batch: Batch) -> Any:
            slope, values = phase.gradient(nets, torch.cat(output), batch)
            return slope.chunk(2), values

        return dataclasses.replace(phase, forward=lambda nets, batch: phase.forward(nets, batch).chunk(2), gradient=gradient)

    whole, halves = (perturbed(engine(load(find(str(sd_folder))), config)) for _ in range(2))
    whole.run_phase(phase_of(whole, "fake_score"))
    halves.run_phase(both(phase_of(halves, "fake_score")))
    one, other = snapshot(whole)["fake_score"], snapshot(halves)["fake_score"]
    assert all(torch.equal(value, other[name]) for name, value in one.items())
