"""SANA from its folder to a student that the stock pipeline draws with, on a tiny random pipeline."""

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
)
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

from sidcli.errors import UsageError
from sidcli.files import read_json
from sidcli.formats.diffusers_folder import write_student
from sidcli.models import loading
from sidcli.models.drawing import Plan
from sidcli.models.hub import required_files
from sidcli.models.loading import Model, describe, load
from sidcli.models.overrides import Overrides
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sana import SANA
from sidcli.models.sources import find
from sidcli.settings import DistillConfig
from tests import tiny_sana
from tests.inprocess import sid
from tests.models.test_compatibility import change, refusal
from tests.models.test_sd3 import FLOW, INDEX, PROMPT, SCHEDULER, apart, as_student, built, drawn, stock
from tests.training.test_distill import run

NETWORK, VAE, TEXT, TOKENIZER = "transformer/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"
PLAIN: dict[str, Any] = {"height": 32, "width": 32, "use_resolution_binning": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the scheduler of the published folders, a multistep scheduler."""
    return tiny_sana.write_sana(tmp_path_factory.mktemp("models") / "sana")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of its folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "sana")


@pytest.fixture
def sana(folder: Path) -> Model:
    return load(find(str(folder)))


@pytest.fixture
def settings(config: DistillConfig) -> DistillConfig:
    return dataclasses.replace(config, teacher="sana", steps=2, batch_size=2, micro_batch=2, **FLOW)


def with_euler(folder: Path, **options: Any) -> np.ndarray:
    """An image that the stock pipeline draws with the scheduler of students."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return np.asarray(pipe(PROMPT, generator=torch.Generator().manual_seed(3), **PLAIN | options).images[0])


@pytest.mark.parametrize(("guidance", "side"), [(4.5, 32), (1.0, 64)])
def test_a_teacher_draws_as_the_stock_pipeline_does_with_an_euler_scheduler(folder: Path, guidance: float, side: int) -> None:
    model = load(find(str(folder)), Overrides(width=side, height=side))
    theirs = with_euler(folder, num_inference_steps=4, guidance_scale=guidance, width=side, height=side)
    assert apart(drawn(model, Plan(4, guidance)), theirs) <= 1


def test_a_size_is_refused_with_the_step_of_the_teacher(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "codec_factor", lambda _: 32)  # that of published models
    for side in (100, 520):  # the second one is a multiple of 8
        command = ["distill", "--teacher", folder, "--prompts", "general", "--width", side, "--height", side]
        assert sid(*command, "--device", "cpu", "--dry-run") == 2
        assert f"must be a multiple of 32, in which this model draws, and at most 8192, not {side}" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "scale"), [((), 4.5), (("--guidance", 7.5), 7.5), (("--set", "guidance=2"), 2.0)])
def test_a_teacher_draws_the_images_to_train_on_at_its_own_guidance_scale_unless_one_is_given(
    folder: Path, capsys: pytest.CaptureFixture[str], given: tuple[object, ...], scale: float
) -> None:
    command = ["distill", "--teacher", folder, "--objective", "regression", "--data", "teacher", "--prompts", "general"]
    assert sid(*command, *given, "--device", "cpu", "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"\nguidance = {scale}\n" in said
    assert ("-g" in next(line for line in said.splitlines() if line.startswith("# output"))) == bool(given)


def test_gemma_reads_the_instruction_of_the_stock_pipeline_before_a_prompt_and_nothing_before_the_empty_one(
    folder: Path, sana: Model
) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    default = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
    prompts = ["", "a cat", "", "Two dogs. ", "a cat" * 80]
    states, mask, none, none_mask = pipe.encode_prompt(prompts, complex_human_instruction=default)
    cond = Sampler(sana, torch.device("cpu")).encode(prompts)
    ours = cond.added["encoder_attention_mask"]
    assert cond.states.shape == (5, 300, 48) and none_mask.sum(1).tolist() == [1] * 5 and mask.sum(1).tolist()[1] > 6
    for row, prompt in enumerate(prompts):
        wanted, read = (states[row], mask[row]) if prompt else (none[row], none_mask[row])
        torch.testing.assert_close(cond.states[row], wanted)
        assert torch.equal(ours[row], read)
    without = stock(folder, num_inference_steps=2, complex_human_instruction=None, **PLAIN)
    assert apart(stock(folder, num_inference_steps=2, **PLAIN), without) > 1


def test_the_tokens_behind_a_prompt_do_not_matter_and_neither_do_capitals(sana: Model) -> None:
    cond = Sampler(sana, torch.device("cpu")).encode(["a cat", " A CAT "])
    mask = cond.added["encoder_attention_mask"]
    assert torch.equal(cond.states[0], cond.states[1])
    other = dataclasses.replace(cond, states=torch.where(mask[..., None] > 0, cond.states, 7.0))
    x, t = torch.randn(2, *sana.latent_shape), torch.tensor([900.5, 20.25])
    first, second = (SANA.denoise(sana.denoiser, x, t, one) for one in (cond, other))
    assert torch.equal(first, second) and first.shape == x.shape


def test_a_prompt_counts_as_truncated_if_its_end_is_not_read(sana: Model) -> None:
    encoder = SANA.encoder(sana, torch.device("cpu"))
    encoder(["a" * 298, ""])
    assert encoder.truncated == 0
    encoder(["a" * 299, "a", "a" * 400])
    assert encoder.truncated == 2


def test_the_sums_of_linear_attention_are_those_of_float32_under_autocast(sana: Model) -> None:
    attention, states = sana.denoiser.transformer_blocks[0].attn1, torch.randn(2, 64, 32).bfloat16()
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        layer.weight.copy_(torch.eye(32))  # projections without rounding
    attention.to_out[0].bias.zero_()
    plain = attention(states.float())
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(states).float()
        attention.set_processor(SanaLinearAttnProcessor2_0())
        theirs = attention(states).float()
    exact = attention(states.float())
    torch.testing.assert_close(plain, exact)
    torch.testing.assert_close(ours, exact, rtol=2**-8, atol=1e-6)  # only the result is rounded to bf16
    assert ((theirs - exact).abs() > 2**-8 * exact.abs() + 1e-6).any()


SAVING = {"gradient_checkpointing": True, "split_backward": True, "micro_batch": 1, "precision": "bf16", "teacher_bf16": True}


@pytest.mark.parametrize(("steps", "options"), [(1, {}), (4, {"student_lora": 4, "fake_lora": 4, **SAVING})])
def test_the_stock_pipeline_draws_with_a_student_as_sid_does(
    folder: Path, settings: DistillConfig, tmp_path: Path, steps: int, options: dict[str, Any]
) -> None:
    result = run(folder, dataclasses.replace(settings, student_steps=steps, **options), tmp_path / "run")
    student = load(find(str(result.run)))
    how = {"sigmas": [1.0, 0.75, 0.5, 0.25]} if steps == 4 else {"num_inference_steps": 1}
    assert plan_for(student).in_diffusers == how
    image = drawn(student)
    assert apart(image, stock(result.student, guidance_scale=0, **how, **PLAIN)) <= 1
    assert apart(image, drawn(load(find(str(folder))), Plan(1, grid=(1000.0,)))) > 0, "the student has learned"
    said = "height=32, width=32, guidance_scale=0, use_resolution_binning=False"
    assert said in (result.student / "README.md").read_text() and said in (result.run / "report.html").read_text()
    written = read_json(result.student / SCHEDULER)
    assert (written["_class_name"], written["shift"]) == ("FlowMatchEulerDiscreteScheduler", 3.0)


def test_a_student_with_positions_and_another_size_draws_as_the_stock_pipeline_does(
    settings: DistillConfig, tmp_path: Path
) -> None:
    folder = tiny_sana.write_sana(tmp_path / "sana", positions=2.0, multistep=False)
    teacher = load(find(str(folder)), Overrides(width=64, height=64))
    how = {"num_inference_steps": 2, "guidance_scale": 2.0, **PLAIN, "width": 64, "height": 64}
    assert apart(drawn(teacher, Plan(2, 2.0)), stock(folder, **how)) <= 1
    engine = built(teacher, settings, "sid")
    engine.train_step()
    write_student(tmp_path / "student", engine.student(), {"kind": "student", "t_init": 1000, "shift": 3.0})
    student = load(find(str(tmp_path / "student")))
    assert student.size == (64, 64) and student.denoiser.config["interpolation_scale"] == 4.0
    theirs = stock(tmp_path / "student", **how | {"num_inference_steps": 1, "guidance_scale": 0})
    assert apart(drawn(student), theirs) <= 1


def test_the_card_of_a_model_of_1024_pixels_does_not_repeat_the_default_size_of_the_stock_pipeline(folder: Path) -> None:
    known = describe(find(str(folder)))
    wanted = {"guidance_scale": 0, "use_resolution_binning": False}
    assert SANA.call_options(known.denoiser_config, (1024, 1024)) == wanted


def test_images_are_encoded_to_the_latents_of_the_autoencoder(sana: Model) -> None:
    image = np.random.default_rng(1).integers(0, 255, (32, 32, 3), np.uint8)
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = sana.vae.encode(pixels).latent * 0.41407
    torch.testing.assert_close(sana.codec.encode_image(image), wanted)
    assert wanted.shape == (1, *sana.latent_shape)


def test_the_files_of_the_published_models_are_read(copied: Path, sana: Model) -> None:
    assert "-Infinity" in (copied / SCHEDULER).read_text()
    change(copied / INDEX, tokenizer=["transformers", "GemmaTokenizerFast"])
    settings = copied / "tokenizer" / "tokenizer_config.json"
    change(settings, padding_side="left", add_bos_token=True, add_eos_token=False, chat_template="{{ bos_token }}")
    change(copied / TEXT, rope_parameters=..., rope_theta=10000.0, hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid")
    change(copied / NETWORK, guidance_embeds=..., guidance_embeds_scale=..., qk_norm=..., timestep_scale=...)
    for part in ("transformer", "text_encoder"):
        for file in (copied / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".bf16.safetensors"))
    names = [file.relative_to(copied).as_posix() for file in copied.rglob("*") if file.is_file()]
    assert sorted(required_files(names)) == sorted(names)
    assert apart(drawn(load(find(str(copied))), Plan(2, 2.0)), drawn(sana, Plan(2, 2.0))) == 0


@pytest.mark.parametrize("entries", [{}, {"shift": 6.0}])
def test_a_folder_with_an_euler_scheduler_has_its_shift(copied: Path, entries: dict[str, float]) -> None:
    FlowMatchEulerDiscreteScheduler(**entries).save_pretrained(copied / "scheduler")
    change(copied / INDEX, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert describe(find(str(copied))).path.sampling == {"shift": entries.get("shift", 1.0)}


def test_a_discriminator_reads_a_map_of_the_middle_block(sana: Model) -> None:
    cond = Sampler(sana, torch.device("cpu")).encode(["a", "b"])
    assert SANA.middle(sana.denoiser) is sana.denoiser.transformer_blocks[1]
    for wanted in ((2, 32, 8, 8), (2,)):
        with SANA.features(sana.denoiser) as found:
            SANA.denoise(sana.denoiser, torch.randn(2, *sana.latent_shape), torch.tensor([900.0, 20.0]), cond)
        assert found[0].shape == wanted
        SANA.add_head(sana.denoiser)


def test_every_target_of_an_adapter_and_every_block_is_in_the_transformer(sana: Model) -> None:
    names = [name for name, _ in sana.denoiser.named_modules()]
    assert all(any(name.endswith(f".{target}") for name in names) for target in SANA.lora_targets)
    assert [type(block) for block in SANA.blocks(sana.denoiser)] == [*SANA.recomputed()] * 3


def test_a_dry_run_plans_it_with_the_settings_of_flow_matching(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sid("distill", "--teacher", folder, "--prompts", "general", "--device", "cpu", "--dry-run") == 0
    said = capsys.readouterr().out
    assert all(f"\n{line}\n" in said for line in ("t_init = 1000", "t_min = 0", "t_max = 1000", "# parameters    teacher 0.1 M"))


@pytest.mark.parametrize(
    ("form", "reason"),
    [("onnx", ""), ("single-file", ": files of the original code have tensors that a folder of diffusers lacks")],
)
def test_other_formats_are_refused_with_those_that_are_supported(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, reason: str
) -> None:
    student = as_student(copied)
    assert sid("export", student, "--format", form, "-o", tmp_path / "out") == 3
    said = f"is a SANA model, which --format {form} does not support{reason}; try: use --format diffusers or lora\n"
    assert said in capsys.readouterr().err
    assert sid("export", student, "--format", "diffusers", "-o", tmp_path / "out") == 0
    assert sorted(file.name for file in (tmp_path / "out" / "tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (SCHEDULER, {"use_flow_sigmas": False}, "use_flow_sigmas is false; it is true for flow matching"),
        (SCHEDULER, {"prediction_type": ...}, 'prediction_type is null; it is "flow_prediction" for flow matching'),
        (SCHEDULER, {"flow_shift": 0}, "flow_shift is 0; it must be above 0"),
        (SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas is true, which is not supported"),
        (SCHEDULER, {"_class_name": "EulerDiscreteScheduler"}, 'the scheduler "EulerDiscreteScheduler" is not supported'),
        (NETWORK, {"guidance_embeds": True}, "the guidance scale is an input of SANA-Sprint"),
        (NETWORK, {"timestep_scale": 1000.0}, "timestep_scale is 1000.0, which is not supported"),
        (NETWORK, {"in_channels": 4}, "takes latents of 4 channels, its VAE gives 8"),
        (NETWORK, {"out_channels": 16}, "out_channels is 16 where in_channels is 8"),
        (NETWORK, {"caption_channels": 40}, "caption_channels is 40, and the states of Gemma have width 48"),
        (NETWORK, {"sample_size": [8, 12]}, "draws square images; sample_size is [8, 12]"),
        (NETWORK, {"patch_size": 0}, "patch_size is 0; it must be a positive whole number"),
        (NETWORK, {"cross_attention_dim": 40}, "does not describe a network that generates images"),
        (VAE, {"in_channels": 1}, "in_channels is 1, which is not supported: sid draws RGB images"),
        (VAE, {"scaling_factor": 0}, "scaling_factor is 0; it must be a positive number"),
        (VAE, {"encoder_block_out_channels": ...}, "block_out_channels is missing"),
        (VAE, {"decoder_layers_per_block": [1, 1, 10**6]}, "30 layers at most are built"),
        (VAE, {"decoder_block_out_channels": [8, 16]}, "does not describe a network that generates images"),
        (TEXT, {"model_type": "gemma"}, "the text encoder of this family is Gemma 2"),
        (TEXT, {"vocab_size": 20}, "vocab_size 20"),
        (TEXT, {"num_hidden_layers": 10**6}, "100 layers at most are built"),
        (INDEX, {"_class_name": "SanaSprintPipeline"}, "is a SanaSprintPipeline, which is not supported"),
        (INDEX, {"text_encoder": [None, None]}, "names no text_encoder"),
        (INDEX, {"text_encoder": ["transformers", "Gemma2ForCausalLM"]}, "is a Gemma2ForCausalLM, not a Gemma2Model"),
        (INDEX, {"vae": ["diffusers", "AutoencoderKL"]}, "its vae is an AutoencoderKL, not an AutoencoderDC"),
        (INDEX, {"tokenizer": ["transformers", "LlamaTokenizer"]}, "its tokenizer is a LlamaTokenizer, not a GemmaTokenizer"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}, "holds a T5Tokenizer, not a GemmaTokenizer"),
    ],
)
def test_a_description_that_is_not_computed_is_refused(copied: Path, file: str, entries: dict[str, Any], message: str) -> None:
    change(copied / file, **entries)
    assert message in refusal(copied)


def damaged(file: Path) -> None:
    file.write_text("{}")


def without_marks(file: Path) -> None:
    file.write_text(json.dumps(read_json(file) | {"post_processor": None}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "tokenizer has no tokenizer.json"),
        (damaged, "tokenizer holds no tokenizer of Gemma"),
        (without_marks, "tokenizer does not put its begin mark before a prompt"),
    ],
)
def test_a_damaged_tokenizer_is_refused(copied: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copied / TOKENIZER)
    assert message in refusal(copied)


def test_a_size_that_is_not_square_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="this model draws square images, not 48 x 32 pixels"):
        describe(find(str(folder)), Overrides(width=48))


@pytest.mark.parametrize(
    ("component", "kind"),
    [
        ("transformer", SanaTransformer2DModel),
        ("vae", AutoencoderDC),
        ("scheduler", DPMSolverMultistepScheduler),
        ("scheduler", FlowMatchEulerDiscreteScheduler),
    ],
)
def test_every_entry_that_diffusers_knows_is_either_accepted_or_has_its_supported_values(component: str, kind: Any) -> None:
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    accepted, values = SANA.rules.accepted[component], set(SANA.rules.values[component])
    assert known <= accepted | values and accepted.isdisjoint(values)
