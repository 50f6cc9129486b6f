"""PixArt-Sigma from its folder to a student that the stock pipeline draws with, on a tiny random pipeline."""

import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, PixArtTransformer2DModel
from safetensors.torch import save_file
from transformers import T5Tokenizer

from sidcli.errors import InputError, UsageError
from sidcli.formats.diffusers_folder import write_student
from sidcli.models import spiece
from sidcli.models.drawing import Plan
from sidcli.models.hub import required_files
from sidcli.models.loading import Model, describe, load
from sidcli.models.overrides import Overrides
from sidcli.models.pixart import PIXART
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find
from sidcli.progress import Silence
from sidcli.settings import DistillConfig
from sidcli.training import plan
from tests import tiny_pixart
from tests.inprocess import sid
from tests.models.test_compatibility import change, refusal
from tests.models.test_sd3 import INDEX, PROMPT, SCHEDULER, apart, as_student, built, drawn, stock
from tests.training.test_distill import run

NETWORK = "transformer/config.json"
PLAIN: dict[str, Any] = {"clean_caption": False, "use_resolution_binning": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pixart.write_pixart(tmp_path_factory.mktemp("models") / "pixart")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of its folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "pixart")


@pytest.fixture
def pixart(folder: Path) -> Model:
    return load(find(str(folder)))


@pytest.fixture
def settings(config: DistillConfig) -> DistillConfig:
    return dataclasses.replace(config, teacher="pixart", steps=2, batch_size=2, micro_batch=2)


@pytest.mark.parametrize(("guidance", "side"), [(4.5, 32), (1.0, 48)])
def test_a_teacher_draws_what_the_stock_pipeline_draws_with_ddim(folder: Path, guidance: float, side: int) -> None:
    model = load(find(str(folder)), Overrides(width=side, height=side))
    pipe = DiffusionPipeline.from_pretrained(folder)
    options = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    how = {"guidance_scale": guidance, "width": side, "height": side, "num_inference_steps": 4, **PLAIN}
    assert (
        apart(
            drawn(model, Plan(4, guidance)), np.asarray(pipe(PROMPT, generator=torch.Generator().manual_seed(3), **how).images[0])
        )
        <= 1
    )


def test_the_tokens_behind_a_prompt_do_not_matter_and_neither_do_capitals(pixart: Model) -> None:
    cond = Sampler(pixart, torch.device("cpu")).encode(["a cat", " A CAT "])
    mask = cond.added["encoder_attention_mask"]
    assert torch.equal(cond.states[0], cond.states[1]) and mask.sum(1).tolist() == [7, 7] and mask.shape == (2, 300)
    other = dataclasses.replace(cond, states=torch.where(mask[..., None] > 0, cond.states, 7.0))
    x, t = torch.randn(2, *pixart.latent_shape), torch.tensor([900, 20])
    first, second = (PIXART.denoise(pixart.denoiser, x, t, one) for one in (cond, other))
    assert torch.equal(first, second) and first.shape == x.shape


SAVING = {"gradient_checkpointing": True, "split_backward": True, "micro_batch": 1}


@pytest.mark.parametrize(("steps", "options"), [(1, {}), (4, {"student_lora": 4, "fake_lora": 4, **SAVING})])
def test_the_stock_pipeline_draws_with_a_student_as_sid_does(
    folder: Path, settings: DistillConfig, tmp_path: Path, steps: int, options: dict[str, Any]
) -> None:
    result = run(folder, dataclasses.replace(settings, student_steps=steps, **options), tmp_path / "run")
    student = load(find(str(result.run)))
    how = {"timesteps": [625, 468, 312, 156]} if steps == 4 else {"num_inference_steps": 1}
    assert plan_for(student).in_diffusers == how
    image = drawn(student)
    assert apart(image, stock(result.student, guidance_scale=0, **how, **PLAIN)) <= 1
    assert apart(image, drawn(load(find(str(folder))), Plan(1, grid=(625,)))) > 0, "the student has learned"
    said = "guidance_scale=0, use_resolution_binning=False, clean_caption=False"
    assert said in (result.student / "README.md").read_text() and said in (result.run / "report.html").read_text()


def test_a_student_of_another_size_draws_as_the_stock_pipeline_does_from_its_folder(
    folder: Path, settings: DistillConfig, tmp_path: Path
) -> None:
    teacher = load(find(str(folder)), Overrides(width=48, height=48))
    engine = built(teacher, settings, "sid")
    engine.train_step()
    write_student(tmp_path / "student", engine.student(), {"kind": "student", "t_init": 625})
    student = load(find(str(tmp_path / "student")))
    assert student.size == (48, 48) and student.denoiser.config["interpolation_scale"] == 3.0
    assert apart(drawn(student), drawn(engine.student(), plan_for(student))) == 0
    assert apart(drawn(student), stock(tmp_path / "student", guidance_scale=0, num_inference_steps=1, **PLAIN)) <= 1


def test_the_files_of_the_published_model_are_read(copied: Path, pixart: Model) -> None:
    former = "Transformer2DModel"
    change(copied / INDEX, transformer=["diffusers", former])
    change(copied / NETWORK, _class_name=former, num_vector_embeds=None, only_cross_attention=False)
    assert "-Infinity" in (copied / SCHEDULER).read_text()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz")]
    (copied / "tokenizer" / "tokenizer.json").unlink()
    (copied / "tokenizer" / "spiece.model").write_bytes(tiny_pixart.spiece_model(pieces))
    change(copied / "text_encoder" / "config.json", vocab_size=len(pieces) + 100)
    (tokenizer,) = describe(find(str(copied))).tokenizers
    assert tokenizer.convert_tokens_to_ids("<extra_id_99>") == len(pieces)
    wanted = T5Tokenizer(vocab=pieces, extra_ids=0)
    assert tokenizer("a cat, on").input_ids == wanted("a cat, on").input_ids
    names = [file.relative_to(copied).as_posix() for file in copied.rglob("*") if file.is_file()]
    assert sorted(required_files(names)) == sorted(names)


def test_the_pieces_and_the_map_of_characters_of_a_file_are_read() -> None:
    pieces = [("<pad>", 0.0), ("▁long" * 40, -0.5)]
    assert spiece.parse(tiny_pixart.spiece_model(pieces, b"y" * 300)) == (pieces, b"y" * 300)


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\x0a\x7f", b"\x0b", b"\xff" * 11, b"\x0a\x02\x15\x00", b"\x0a\x03\x0a\x01\xff"]
)
def test_a_damaged_file_of_pieces_is_refused(copied: Path, content: bytes) -> None:
    (copied / "tokenizer" / "tokenizer.json").unlink()
    (copied / "tokenizer" / "spiece.model").write_bytes(content)
    assert "tokenizer holds no tokenizer of T5" in refusal(copied)


def test_a_discriminator_reads_a_map_of_the_middle_block(pixart: Model) -> None:
    cond = Sampler(pixart, torch.device("cpu")).encode(["a", "b"])
    assert PIXART.middle(pixart.denoiser) is pixart.denoiser.transformer_blocks[1]
    for wanted in ((2, 32, 4, 4), (2,)):
        with PIXART.features(pixart.denoiser) as found:
            PIXART.denoise(pixart.denoiser, torch.randn(2, *pixart.latent_shape), torch.tensor([900, 20]), cond)
        assert found[0].shape == wanted
        PIXART.add_head(pixart.denoiser)


def test_every_target_of_an_adapter_and_every_block_is_in_the_transformer(pixart: Model) -> None:
    names = [name for name, _ in pixart.denoiser.named_modules()]
    assert all(any(name.endswith(f".{target}") for name in names) for target in PIXART.lora_targets)
    assert [type(block) for block in PIXART.blocks(pixart.denoiser)] == [*PIXART.recomputed()] * 3


def test_a_dry_run_plans_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sid("distill", "--teacher", folder, "--prompts", "general", "--device", "cpu", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "\nt_init = 625\n" in said and "\n# parameters    teacher 0.1 M\n" in said


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("onnx", ""),
        ("lora", ": its stock pipeline reads no LoRA"),
        ("single-file", ": diffusers reads no single file of its transformer"),
    ],
)
def test_other_formats_are_refused_with_the_one_that_is_supported(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, reason: str
) -> None:
    teacher = ["--teacher", shutil.copytree(copied, tmp_path / "teacher")] if form == "lora" else []
    student = as_student(copied, t_init=625, shift=...)
    assert sid("export", student, "--format", form, "-o", tmp_path / "out", *teacher) == 3
    said = f"is a PixArt-Sigma model, which --format {form} does not support{reason}; try: use --format diffusers\n"
    assert said in capsys.readouterr().err
    assert sid("export", student, "--format", "diffusers", "-o", tmp_path / "out") == 0
    assert PIXART.missing_formats.keys().isdisjoint(PIXART.formats) and not hasattr(PIXART.pipeline(()), "load_lora_weights")


def test_a_lora_to_start_from_is_refused(folder: Path, tmp_path: Path, settings: DistillConfig) -> None:
    save_file({"to_q.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "lora.safetensors")
    init = dataclasses.replace(settings, teacher=str(folder), init=str(tmp_path / "lora.safetensors"))
    with pytest.raises(InputError, match="is a LoRA, which is not read for a PixArt-Sigma model"):
        plan.describe_teacher(init, Silence())


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (
            NETWORK,
            {"use_additional_conditions": True},
            "use_additional_conditions is true, which is not supported: image sizes are",
        ),
        (
            NETWORK,
            {"use_additional_conditions": None, "sample_size": 128},
            "use_additional_conditions is missing: image sizes are an input of PixArt-alpha",
        ),
        (NETWORK, {"in_channels": 8}, "takes latents of 8 channels, its VAE gives 4"),
        (NETWORK, {"out_channels": 12}, "out_channels is 12 where in_channels is 4"),
        (NETWORK, {"caption_channels": 40}, "caption_channels is 40, and the states of T5 have width 48"),
        (NETWORK, {"sample_size": [8, 12]}, "draws square images; sample_size is [8, 12]"),
        (NETWORK, {"patch_size": 0}, "patch_size is 0; it must be a positive whole number"),
        (NETWORK, {"norm_type": "ada_norm_zero"}, "does not describe a network that generates images"),
        (SCHEDULER, {"variance_type": "learned_range"}, 'variance_type is "learned_range", which is not supported'),
        ("text_encoder/config.json", {"model_type": "umt5"}, "this text encoder of the family is T5"),
        (INDEX, {"_class_name": "PixArtAlphaPipeline"}, "is a PixArtAlphaPipeline, which is not supported"),
        (INDEX, {"text_encoder": [None, None]}, "names no text_encoder"),
    ],
)
def test_a_description_that_is_not_computed_is_refused(copied: Path, file: str, entries: dict[str, Any], message: str) -> None:
    change(copied / file, **entries)
    assert message in refusal(copied)


def test_a_size_that_is_not_square_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="this model draws square images, not 48 x 32 pixels"):
        describe(find(str(folder)), Overrides(width=48))


@pytest.mark.parametrize(("component", "kind"), [("transformer", PixArtTransformer2DModel), ("vae", AutoencoderKL)])
def test_every_entry_that_diffusers_knows_is_either_accepted_or_has_its_supported_values(component: str, kind: Any) -> None:
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    accepted, values = PIXART.rules.accepted[component], set(PIXART.rules.values[component])
    assert known <= accepted | values and accepted.isdisjoint(values)
