"""Stable Diffusion 3 from its folder to a student that the stock pipeline draws with, on a tiny random pipeline."""

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from sidcli.data.prompts import open_prompts
from sidcli.diffusion.path import FlowPath
from sidcli.engine import Engine
from sidcli.errors import InputError, Interrupted, UsageError
from sidcli.files import read_json
from sidcli.formats.diffusers_folder import write_student
from sidcli.models.drawing import Plan
from sidcli.models.hub import required_files
from sidcli.models.kind import guided_predictions
from sidcli.models.loading import Model, describe, load
from sidcli.models.overrides import Overrides
from sidcli.models.sampler import Sampler, plan_for, untrained_plan
from sidcli.models.sd3 import SD3, T5_TOKENS
from sidcli.models.sources import find, fingerprint
from sidcli.objectives import OBJECTIVES
from sidcli.objectives.base import FAKE, GENERATOR, TEACHER
from sidcli.progress import Silence
from sidcli.report.page import render
from sidcli.report.run import run_page
from sidcli.settings import NO_PATH, DistillConfig
from sidcli.training import plan
from tests import tiny_sd3
from tests.inprocess import sid
from tests.models.test_compatibility import change, refusal
from tests.training.test_distill import KillAt, Silent, run, state

FLOW: dict[str, Any] = {"t_init": 1000, "t_min": 0, "t_max": 1000}
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
PROMPT = "a cat on a mat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3.write_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of its folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "sd3")


@pytest.fixture
def sd3(folder: Path) -> Model:
    return load(find(str(folder)))


@pytest.fixture
def settings(config: DistillConfig) -> DistillConfig:
    return dataclasses.replace(config, teacher="sd3", steps=2, batch_size=2, micro_batch=2, **FLOW)


def drawn(model: Model, how: Plan | None = None) -> np.ndarray:
    return Sampler(model, torch.device("cpu")).images([PROMPT], [3], how or plan_for(model))[0]


def stock(folder: Path, **options: Any) -> np.ndarray:
    """An image that the stock pipeline draws from the same noise."""
    absent = [name for name, part in read_json(folder / INDEX).items() if part == [None, None]]
    pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(PROMPT, generator=torch.Generator().manual_seed(3), **options).images[0])


def apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape and one.std() > 10
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize(("steps", "guidance", "shift"), [(28, 4.5, 3.0), (1, 7.0, 3.0), (5, 1.0, 1.0)])
def test_a_teacher_draws_as_the_stock_pipeline_does(
    folder: Path, tmp_path: Path, steps: int, guidance: float, shift: float
) -> None:
    copied = shutil.copytree(folder, tmp_path / "sd3")
    change(copied / SCHEDULER, shift=shift)
    ours = drawn(load(find(str(copied))), Plan(steps, guidance))
    assert apart(ours, stock(copied, num_inference_steps=steps, guidance_scale=guidance)) <= 1


def test_a_teacher_draws_at_another_size_as_the_stock_pipeline_does(folder: Path) -> None:
    model = load(find(str(folder)), Overrides(width=48, height=48))
    assert model.size == (48, 48)
    theirs = stock(folder, num_inference_steps=3, guidance_scale=2.0, width=48, height=48)
    assert apart(drawn(model, Plan(3, 2.0)), theirs) <= 1


def test_without_t5_its_tokens_are_zeros_as_in_the_stock_pipeline(tmp_path: Path) -> None:
    folder = tiny_sd3.write_sd3(tmp_path / "sd3", tiny_sd3.TEXTS[:2])
    model = load(find(str(folder)))
    assert model.texts == tiny_sd3.TEXTS[:2]
    assert apart(drawn(model, Plan(4, 3.0)), stock(folder, num_inference_steps=4, guidance_scale=3.0)) <= 1
    shutil.copytree(as_student(folder), tmp_path / "run" / "student")
    assert "text_encoder_3=None, tokenizer_3=None)" in render(run_page(tmp_path / "run"))


@pytest.mark.parametrize("lost", [(0,), (1,), (0, 1), (2,), (0, 2)])
def test_the_part_of_a_missing_text_encoder_is_zeros_and_the_others_stay(copied: Path, sd3: Model, lost: tuple[int, ...]) -> None:
    whole = Sampler(sd3, torch.device("cpu")).encode(["a cat", ""])
    for name in (tiny_sd3.TEXTS[index] for index in lost):
        change(copied / INDEX, **{name: [None, None], name.replace("text_encoder", "tokenizer"): [None, None]})
    found = Sampler(load(find(str(copied))), torch.device("cpu")).encode(["a cat", ""])
    states, pooled = whole.states.clone(), whole.added["pooled_projections"].clone()
    columns = slice(0, 16), slice(16, 40)
    for index in lost:
        if index < 2:
            states[:, : tiny_sd3.TOKENS, columns[index]] = pooled[:, columns[index]] = 0.0
        else:
            states[:, tiny_sd3.TOKENS :] = 0.0
    if {0, 1} <= set(lost):  # without any CLIP encoder there are the 77 tokens of the published ones
        states = torch.cat([torch.zeros(2, 77 - tiny_sd3.TOKENS, 48), states], 1)
    torch.testing.assert_close(found.states, states)
    torch.testing.assert_close(found.added["pooled_projections"], pooled)


def test_guidance_needs_one_call_of_the_transformer(sd3: Model) -> None:
    encode, calls = Sampler(sd3, torch.device("cpu")).encode, []

    def denoise(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        calls.append(len(x))
        return SD3.denoise(sd3.denoiser, x, t, cond)

    x, t = torch.randn(2, *sd3.latent_shape), torch.tensor([999.5, 20.25])
    cond, empty = encode(["a cat", "a dog"]), encode([""])
    (guided,) = guided_predictions(denoise, x, t, cond, empty, (3.0,))
    plain, nothing = denoise(x, t, cond), denoise(x, t, empty.expand(2))
    torch.testing.assert_close(guided, nothing + 3.0 * (plain - nothing), rtol=1e-4, atol=1e-5)
    assert calls == [4, 2, 2] and not torch.allclose(plain, nothing)


def test_a_discriminator_reads_a_map_of_the_middle_block(sd3: Model) -> None:
    x, t, cond = (
        torch.randn(2, *sd3.latent_shape),
        torch.tensor([900.0, 20.0]),
        Sampler(sd3, torch.device("cpu")).encode(["a", "b"]),
    )
    for wanted in ((2, 32, 4, 4), (2,)):
        with SD3.features(sd3.denoiser) as found:
            SD3.denoise(sd3.denoiser, x, t, cond)
        assert found[0].shape == wanted
        SD3.add_head(sd3.denoiser)


def test_every_target_of_an_adapter_and_every_block_is_in_the_transformer(sd3: Model) -> None:
    names = [name for name, _ in sd3.denoiser.named_modules()]
    assert all(any(name.endswith(f".{target}") for name in names) for target in SD3.lora_targets)
    assert [type(block) for block in SD3.blocks(sd3.denoiser)] == [*SD3.recomputed()] * 3


def built(model: Model, settings: DistillConfig, name: str, **own: Any) -> Engine:
    objective = OBJECTIVES[name].Settings(**own)
    return Engine(model, dataclasses.replace(settings, objective=objective), open_prompts("general"), torch.device("cpu"))


def test_the_fake_score_learns_the_velocity_and_the_student_the_weighted_score_difference(
    sd3: Model, settings: DistillConfig
) -> None:
    engine = built(sd3, settings, "sid", kappa1=1.0, kappa2=1.0, kappa3=1.0, kappa4=2.0)
    fake, generator = engine.objective.phases(0)
    with torch.no_grad():
        for value in engine.roles[FAKE].net.parameters():
            value += 0.02 * torch.randn_like(value)
    engine.nets.training = FAKE
    batch = engine._on_device(engine.draw_batch(fake.inputs, 0, range(2)))
    time = (batch.t.double() / 1000).view(-1, 1, 1, 1)
    with torch.no_grad():
        z = batch.latents[0]
        start = engine.denoise(engine.roles[GENERATOR].net, z, torch.full((2,), 1000.0), batch.cond)
        x = engine.nets.generate(batch)
        torch.testing.assert_close(x, z - start)  # one step from pure noise, t = 1
        x_t = ((1 - time) * x + time * batch.noise).float()
        velocity = engine.denoise(engine.roles[FAKE].net, x_t, batch.t, batch.cond)
        loss = (velocity - (batch.noise - x)).square().sum() / 2
        output = fake.forward(engine.nets, batch)
        slope, values = fake.gradient(engine.nets, output, batch)
        torch.testing.assert_close(values["fake_loss"], loss, rtol=1e-3, atol=1e-3)
        # d loss / d velocity: the output, a noise, is x_t + (1 - t) velocity
        torch.testing.assert_close(slope * (1 - time).float(), velocity - (batch.noise - x), rtol=1e-3, atol=1e-3)
        engine.nets.training = GENERATOR
        _, measured = generator.gradient(engine.nets, x, batch)
        y_fake = x_t - time * velocity
        y_real = x_t - time * engine.nets.predict(TEACHER, x_t, batch, 2.0)[0]
        wanted = ((1 - time) * (y_real - y_fake) * (y_fake - x)).sum() / 2
    torch.testing.assert_close(measured["generator_loss"].double(), wanted, rtol=1e-3, atol=1e-3)


class Images:
    """Images in place of `Latents`: noise that is a function of the position."""

    digest = name = "images"

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def at(self, seed: int, position: int) -> tuple[torch.Tensor, str]:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(position)), f"image {position}"


@pytest.mark.parametrize(("name", "own"), [("dmd2", {}), ("vsd", {}), ("scflow", {"joined_images": 0})])
def test_other_objectives_train_on_it(sd3: Model, settings: DistillConfig, name: str, own: dict[str, Any]) -> None:
    engine = built(sd3, settings, name, **own)
    engine.data = Images(sd3.latent_shape)  # type: ignore[assignment]
    before = {key: value.detach().clone() for key, value in engine.roles[GENERATOR].weights}
    for _ in range(2):  # in the first step the fake score of VSD is still the teacher
        assert all(np.isfinite(value) for value in engine.train_step().numbers().values())
    assert any(not torch.equal(value, before[key]) for key, value in engine.roles[GENERATOR].weights)


def test_the_timesteps_of_a_sample_do_not_depend_on_its_batch(sd3: Model, settings: DistillConfig) -> None:
    engine = built(sd3, settings, "sid")
    inputs = engine.objective.phases(0)[1].inputs
    whole, last = engine.draw_batch(inputs, 0, range(4)).t, engine.draw_batch(inputs, 0, [3]).t
    assert torch.equal(whole[3:], last) and whole.dtype == torch.float32 and len(set(whole.tolist())) == 4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full", {}),
        ("lora", {"student_lora": 4, "fake_lora": 4}),
        ("four", {"student_steps": 4}),
        ("saving", {"gradient_checkpointing": True, "split_backward": True, "micro_batch": 1}),
    ],
)
def test_the_stock_pipeline_draws_with_a_student_as_sid_does(
    folder: Path, settings: DistillConfig, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    result = run(folder, dataclasses.replace(settings, **options), tmp_path / name)
    student = load(find(str(result.run)))
    how = {"sigmas": [1.0, 0.75, 0.5, 0.25]} if name == "four" else {"num_inference_steps": 1}
    assert plan_for(student).in_diffusers == how
    image = drawn(student)
    assert apart(image, stock(result.student, guidance_scale=0, **how)) <= 1
    assert apart(image, drawn(load(find(str(folder))), Plan(1, grid=(1000.0,)))) > 0, "the student has learned"
    if name == "four":
        assert plan_for(student).describe() == "4 steps at t = 1000, 900, 750, 500"
        assert untrained_plan(student.path, 4).grid == plan_for(student).grid
        two = stock(result.student, guidance_scale=0, sigmas=[1.0, 0.75])
        assert apart(drawn(student, plan_for(student, 2)), two) <= 1
        assert "sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=0" in (result.run / "report.html").read_text()


@pytest.mark.parametrize(("texts", "tokens"), [(tiny_sd3.TEXTS, 7), (tiny_sd3.TEXTS[:2], 1)])
def test_a_model_of_another_number_of_t5_tokens_tells_it_to_the_stock_pipeline(
    settings: DistillConfig, tmp_path: Path, texts: tuple[str, ...], tokens: int
) -> None:
    folder = tiny_sd3.write_sd3(tmp_path / "sd3", texts)
    change(folder / "transformer/config.json", max_sequence_length=tokens)
    teacher = load(find(str(folder)))
    cond = Sampler(teacher, torch.device("cpu")).encode([PROMPT])
    assert cond.states.shape == (1, tiny_sd3.TOKENS + tokens, 48)
    assert cond.shapes == SD3.meta_cond(describe(teacher.source).networks).shapes
    asked = {"num_inference_steps": 4, "guidance_scale": 3.0}
    assert apart(drawn(teacher, Plan(4, 3.0)), stock(folder, **asked, max_sequence_length=tokens)) <= 1
    result = run(folder, settings, tmp_path / "run")
    image = drawn(load(find(str(result.run))))
    call = json.loads((result.student / "sid.json").read_text())["call"]
    assert call == {"guidance_scale": 0, "max_sequence_length": tokens}
    assert apart(image, stock(result.student, num_inference_steps=1, **call)) <= 1
    assert apart(image, stock(result.student, num_inference_steps=1, guidance_scale=0)) > 1
    said = f'pipe("a cat", num_inference_steps=1, guidance_scale=0, max_sequence_length={tokens})'
    assert said in (result.student / "README.md").read_text()
    assert sid("export", result.run, "--format", "diffusers", "-o", tmp_path / "out") == 0
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_an_interrupted_run_continues_bit_for_bit(folder: Path, settings: DistillConfig, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, student_steps=2)
    run(folder, settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(folder, settings, tmp_path / "halves", KillAt(1), save=100)
    continued = Silent()
    run(folder, settings, tmp_path / "halves", continued)
    assert "continuing from step 1" in continued.notes
    one, two = state(tmp_path / "whole", 2), state(tmp_path / "halves", 2)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_plan_counts_what_a_forward_pass_of_the_transformer_keeps(sd3: Model, settings: DistillConfig) -> None:
    net, kept = sd3.denoiser.requires_grad_(True), {}
    weights = {value.untyped_storage().data_ptr() for value in net.parameters()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    cond = Sampler(sd3, torch.device("cpu")).encode(["a cat"] * 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        alive = SD3.denoise(net, torch.randn(4, *sd3.latent_shape), torch.full((4,), 500.0), cond)
    described = describe(sd3.source)
    with torch.device("meta"):
        empty = SD3.build("transformer", described.denoiser_config)
    meta = SD3.meta_cond(described.networks)
    counted, _ = plan.activations(empty, 4, settings, meta, trained=True)
    assert alive.requires_grad and counted == pytest.approx(sum(kept.values()), rel=0.1)
    recomputing = dataclasses.replace(settings, gradient_checkpointing=True)
    assert plan.activations(empty, 4, recomputing, meta, trained=True)[0] < 0.6 * counted


def test_a_dry_run_plans_it_with_the_settings_of_flow_matching(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sid("distill", "--teacher", folder, "--prompts", "general", "--device", "cpu", "--dry-run") == 0
    said = capsys.readouterr().out
    for line in ("t_init = 1000", "t_min = 0", "t_max = 1000", "# parameters    teacher 0.1 M"):
        assert f"\n{line}\n" in said


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--t-min", "985", "--student-steps", "700"], ("t_min = 985", "t_max = 1000", "student_steps = 700")),
        (["--t-max", "10"], ("t_min = 0", "t_max = 10")),
    ],
)
def test_timesteps_are_checked_against_the_defaults_of_flow_matching(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], wanted: tuple[str, ...]
) -> None:
    assert sid("distill", "--teacher", folder, "--prompts", "general", "--device", "cpu", "--dry-run", *options) == 0
    said = capsys.readouterr().out
    assert all(f"\n{line}\n" in said for line in wanted)


def test_a_default_of_an_objective_gives_way_to_that_of_flow_matching(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", "--teacher", folder, "--prompts", "general", "--device", "cpu", "--dry-run", "-o", tmp_path / "run"]
    assert sid(*command, "--objective", "scflow", "--data", "teacher", "--steps", 30, "--batch-size", 4, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["config"]["t_init"] == 1000
    assert "the adversarial term joins after 20,000 images, and the run has 120" in said.err
    assert sid(*command, "--objective", "scflow", "--data", "teacher", "--t-init", 999) == 2


def test_settings_that_the_path_sets_exclude_nothing_before_it_is_known() -> None:
    assert FlowPath().settings.keys() == NO_PATH.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "lcm", "--data", "teacher"], "objective lcm needs the discrete timesteps of a diffusion"),
        *((["--objective", name], f"objective {name} needs the discrete timesteps") for name in ("lcm", "tlcm", "tlcm2", "boot")),
        (["--objective", "tlcm", "--data", "missing"], "objective tlcm needs the discrete timesteps of a diffusion"),
        (["--t-init", "625"], "--t-init must be 1000, pure noise in the time of flow matching, where students of"),
        (["--t-init", "1001"], "--t-init must be 1000, pure noise in the time of flow matching, where students of"),
        (["--t-max", "1001"], "--t-max must be at most 1000, pure noise in the time of flow matching, not 1001"),
        (["--t-min", "1000"], "--t-min must be at least 0 and below --t-max 1000, not 1000"),
        (["--student-steps", "1001"], "--student-steps must be at least 1 and at most --t-init 1000, not 1001"),
        (["--t-min", "-1"], "--t-min must be at least 0, not -1"),
        (["--student-steps", "0"], "--student-steps must be at least 1, not 0"),
        (
            ["--width", "104", "--height", "104"],
            "--height must be a multiple of 8, in which this model draws, and at most 96, not 104",
        ),
        (["--width", "48"], "this model draws square images, not 48 x 32 pixels"),
    ],
)
def test_what_needs_another_path_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert sid("distill", "--teacher", folder, "--prompts", "general", "--device", "cpu", "--dry-run", *options) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def as_student(folder: Path, **card: Any) -> Path:
    told = {"kind": "student", "t_init": 1000, "student_steps": 1, "renoise": "ddim", "shift": 3.0} | card
    (folder / "sid.json").write_text(json.dumps({name: value for name, value in told.items() if value is not ...}))
    return folder


@pytest.mark.parametrize("form", ["onnx", "openvino", "torch-export"])
def test_other_formats_are_refused_with_those_that_are_supported(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    assert sid("export", as_student(copied), "--format", form, "-o", tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert (
        f"is a Stable Diffusion 3 model, which --format {form} does not support; try: use --format diffusers or single-file or lora"
        in said
    )


def test_an_exported_student_without_t5_says_how_the_stock_pipeline_loads_it(tmp_path: Path) -> None:
    folder = as_student(tiny_sd3.write_sd3(tmp_path / "sd3", tiny_sd3.TEXTS[:2]), student_steps=4)
    assert sid("export", folder, "--format", "diffusers", "-o", tmp_path / "out") == 0
    said = (tmp_path / "out" / "README.md").read_text()
    assert 'StableDiffusion3Pipeline.from_pretrained("FOLDER", text_encoder_3=None, tokenizer_3=None)' in said
    assert 'pipe("a cat", sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=0)' in said


def test_the_card_of_a_student_that_the_stock_pipeline_cannot_draw_with_says_that_sid_does(tmp_path: Path) -> None:
    model = load(find(str(as_student(tiny_sd3.write_sd3(tmp_path / "sd3", tiny_sd3.TEXTS[1:])))))
    write_student(tmp_path / "student", model, model.card)
    said = (tmp_path / "student" / "README.md").read_text()
    assert 'sid sample "a cat" --model FOLDER' in said and "StableDiffusion3Pipeline" not in said
    assert "Other programs do not draw with this model: the stock pipeline cannot read prompts without text_encoder." in said


@pytest.mark.parametrize(("texts", "tokens"), [(tiny_sd3.TEXTS, T5_TOKENS), (tiny_sd3.TEXTS[:2], tiny_sd3.TOKENS)])
def test_a_prompt_counts_as_truncated_if_the_encoder_that_reads_most_of_it_does_not_read_all(
    folder: Path, tmp_path: Path, texts: tuple[str, ...], tokens: int
) -> None:
    model = load(find(str(folder if texts == tiny_sd3.TEXTS else tiny_sd3.write_sd3(tmp_path / "sd3", texts))))
    encoder = SD3.encoder(model, torch.device("cpu"))
    one_token = "b" if texts == tiny_sd3.TEXTS else "cat "
    around = 1 if texts == tiny_sd3.TEXTS else 2  # T5 adds a token at the end, CLIP also one at the start
    encoder([one_token * (tokens - around - 1), one_token])
    assert encoder.truncated == 0
    encoder([one_token * 2 * tokens, one_token, one_token * (tokens + 1)])
    assert encoder.truncated == 2


def test_a_student_that_the_stock_pipeline_cannot_draw_with_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_student(tiny_sd3.write_sd3(tmp_path / "sd3", tiny_sd3.TEXTS[1:]))
    assert sid("export", folder, "--format", "diffusers", "-o", tmp_path / "out") == 3
    assert "the stock pipeline cannot read prompts without text_encoder; try: draw with `sid sample`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"t_init": 625}, "t_init is 625; students of this model start at 1000"),
        ({"shift": 1.0}, "shift is 1.0; the scheduler of the model has 3.0"),
        ({"shift": ...}, "shift is null; the scheduler of the model has 3.0"),
        ({"shift": 0}, "shift is 0; it must be a number above 0"),
    ],
)
def test_a_card_that_contradicts_the_scheduler_is_refused(copied: Path, card: dict[str, Any], message: str) -> None:
    assert message in refusal(as_student(copied, **card))


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting is true, which is not supported"),
        (SCHEDULER, {"shift": 0}, "shift is 0; it must be above 0"),
        (SCHEDULER, {"_class_name": "EulerDiscreteScheduler"}, 'the scheduler "EulerDiscreteScheduler" is not supported'),
        ("transformer/config.json", {"in_channels": 4}, "takes latents of 4 channels, its VAE gives 16"),
        (
            "transformer/config.json",
            {"pooled_projection_dim": 41},
            "pooled_projection_dim is 41, and the CLIP text encoders give 16 + 24",
        ),
        ("transformer/config.json", {"joint_attention_dim": 56}, "joint_attention_dim is 56, and the states of T5 have width 48"),
        ("transformer/config.json", {"sample_size": [8, 12]}, "draws square images; sample_size is [8, 12]"),
        ("transformer/config.json", {"pos_embed_max_size": 10**6}, "pos_embed_max_size is 1000000, more than 1024"),
        ("transformer/config.json", {"max_sequence_length": 0}, "max_sequence_length is 0; it must be a positive whole number"),
        ("transformer/config.json", {"max_sequence_length": 513}, "max_sequence_length is 513, more than 512"),
        ("transformer/config.json", {"num_layers": 10**6}, "120 layers at most are built"),
        (
            "transformer/config.json",
            {"sample_size": 32},
            "sample_size is 32, a height of 128 pixels; it must be a multiple of 8, in which this model draws, and at most 96",
        ),
        ("transformer/config.json", {"patch_size": 3}, "sample_size is 8, a height of 32 pixels; it must be a multiple of 12"),
        ("transformer/config.json", {"patch_size": 0}, "patch_size is 0; it must be a positive whole number"),
        ("transformer/config.json", {"patch_size": "2"}, 'patch_size is "2"; it must be a positive whole number'),
        ("transformer/config.json", {"pos_embed_max_size": None}, "pos_embed_max_size is null; it must be a positive whole number"),
        ("text_encoder_3/config.json", {"model_type": "umt5"}, "this text encoder of the family is T5"),
        ("text_encoder_3/config.json", {"vocab_size": 20}, "text_encoder_3/config.json has vocab_size 20"),
        ("vae/config.json", {"shift_factor": "a"}, 'shift_factor is "a"; it must be a number'),
        (INDEX, {name: [None, None] for name in tiny_sd3.TEXTS}, "names no text encoder"),
        (INDEX, {"text_encoder": 3}, "text_encoder is 3; it must be a library and a class, or [null, null]"),
        (INDEX, {"text_encoder": []}, "text_encoder is []; it must be a library and a class, or [null, null]"),
        (INDEX, {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "its transformer is a FluxTransformer2DModel"),
        (INDEX, {"tokenizer_3": ["transformers", "CLIPTokenizer"]}, "its tokenizer_3 is a CLIPTokenizer, not a T5Tokenizer"),
    ],
)
def test_a_description_that_is_not_computed_is_refused(copied: Path, file: str, entries: dict[str, Any], message: str) -> None:
    change(copied / file, **entries)
    assert message in refusal(copied)


@pytest.mark.parametrize(
    ("component", "kind"),
    [("transformer", SD3Transformer2DModel), ("vae", AutoencoderKL), ("scheduler", FlowMatchEulerDiscreteScheduler)],
)
def test_every_entry_that_diffusers_knows_is_either_accepted_or_has_its_supported_values(component: str, kind: Any) -> None:
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    accepted, values = SD3.rules.accepted[component], set(SD3.rules.values[component])
    assert known <= accepted | values and accepted.isdisjoint(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has neither a tokenizer.json nor a spiece.model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "holds no tokenizer of T5"),
        (lambda folder: change(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer"), "holds a BertTokenizer"),
    ],
)
def test_a_damaged_tokenizer_of_t5_is_refused(copied: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copied / "tokenizer_3")
    assert message in refusal(copied)


def test_another_prediction_type_size_or_kind_of_model_to_start_from_is_refused(
    folder: Path, sd_folder: Path, tmp_path: Path, settings: DistillConfig
) -> None:
    assert "prediction type 'epsilon' is not supported" in refusal(folder, Overrides(prediction_type="epsilon"))
    with pytest.raises(InputError, match="is a Stable Diffusion 1, 2 or XL model, and the teacher is a Stable Diffusion 3 model"):
        plan.describe_teacher(dataclasses.replace(settings, teacher=str(folder), init=str(sd_folder)), Silence())
    with pytest.raises(UsageError, match="must be a multiple of 8"):
        describe(find(str(folder)), Overrides(width=36, height=36))


def test_all_files_of_the_pipeline_are_downloaded_and_hashed(copied: Path) -> None:
    names = [file.relative_to(copied).as_posix() for file in copied.rglob("*") if file.is_file()]
    assert sorted(required_files(names)) == sorted(names)
    before = fingerprint(find(str(copied)))
    change(copied / "text_encoder_3" / "config.json", d_ff=64)
    assert fingerprint(find(str(copied))) != before


def test_half_of_the_timesteps_of_scores_are_above_two_thirds() -> None:
    draws: Any = SimpleNamespace(uniform=lambda: [(index + 0.5) / 1000 for index in range(1000)])
    free, bounded = FlowPath().draw((0, 1000), draws), FlowPath().draw((200, 900), draws)
    assert free.median() == pytest.approx(2000 / 3, abs=1)  # sigmoid(ln 2)
    logits = (free / 1000).double().logit()
    assert logits.std() == pytest.approx(1.6, rel=0.01)
    assert 200 < bounded.min() < 205 and 895 < bounded.max() < 900
    inside = free[(free > 200) & (free < 900)]
    assert bounded.median() == pytest.approx(float(inside.median()), rel=0.01)
