"""The Python API, as a notebook or a script uses it."""

import dataclasses
import inspect
import json
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tomli_w
from PIL import Image

import sidcli
from sidcli import distill, evaluate, export, load, objectives, sample
from sidcli.api import SILENT, Bars
from sidcli.errors import InputError, UsageError
from sidcli.numeric import plain
from sidcli.objectives import SelfDistillation
from sidcli.objectives.self_distillation import SHEET_SETTINGS
from sidcli.progress import Silence
from sidcli.settings import MEMORY, DistillConfig, checked, differences, read_toml
from sidcli.training.request import Request, method_of
from tests import REPOSITORY, inprocess
from tests.commands import sid


def test_importing_the_package_and_the_five_functions_imports_neither_torch_nor_the_terminal() -> None:
    code = (
        "import sys, sidcli\nassert 'sidcli.api' not in sys.modules\n"
        "from sidcli import load, sample, distill, evaluate, export\n"
        "assert not {'torch', 'rich', 'typer', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"load", "sample", "distill", "evaluate", "export"} <= set(dir(sidcli))
    with pytest.raises(AttributeError, match="'sidcli' has no attribute 'train'"):
        _ = sidcli.train  # type: ignore[attr-defined]


def test_sample_returns_the_images_that_the_command_writes(tmp_path: Path) -> None:
    assert sid("sample", "a cat", "a dog", "--num", "2", "-o", "out", cwd=tmp_path).returncode == 0
    student = load("emoji", listener=SILENT)
    drawn = sample(["a cat", "a dog"], student, num=2, listener=SILENT)
    assert [(one.prompt, one.seed, one.file) for one in drawn.drawn] == [
        (prompt, seed, None) for prompt in ("a cat", "a dog") for seed in (0, 1)
    ]
    for index, image in enumerate(drawn.images):
        with Image.open(tmp_path / "out" / f"{index:06d}.png") as written:
            assert image.tobytes() == written.convert("RGB").tobytes()
    again = sample("a cat", student, output=tmp_path / "cat.png", listener=SILENT)
    difference = np.asarray(again.images[0]).astype(int) - np.asarray(drawn.images[0])  # of another batch: rounding
    assert abs(difference).max() <= 1 and again.drawn[0].file == tmp_path / "cat.png"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"prompts": []}, "no prompt given"),
        ({"prompts": [" "]}, "an empty prompt"),
        ({"prompts": "a cat", "num": 0}, "--num must be at least 1, not 0"),
        ({"prompts": "a cat", "steps": 0}, "--steps must be at least 1, not 0"),
        ({"prompts": "a cat", "device": "gpu"}, "--device must be"),
        ({"prompts": "a cat", "backend": "tensorrt"}, "--backend must be one of"),
        ({"prompts": "a cat", "batch_size": 0}, "--batch-size must be at least 1, not 0"),
        ({"prompts": "a cat", "prediction_type": "x0"}, "--prediction-type must be one of"),
    ],
)
def test_sample_refuses_values_that_are_not_possible(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        sample(**arguments, listener=SILENT)  # type: ignore[arg-type]


def test_a_loaded_model_keeps_its_size_and_a_missing_one_is_an_input_error(sd_folder: Path) -> None:
    with pytest.raises(UsageError, match="has its size and prediction already"):
        sample("a cat", load(str(sd_folder), listener=SILENT), width=64, listener=SILENT)
    with pytest.raises(InputError, match="nowhere/model"):
        load("nowhere/model/x", listener=SILENT)


def test_distill_trains_the_same_student_as_the_command_and_continues_its_run(sd_folder: Path, tmp_path: Path) -> None:
    common = ["--steps", "2", "--batch-size", "4", "--lr", "1e-3", "--guidance", "1.5", "--set", "alpha=1.1"]
    common += ["--device", "cpu", "--precision", "fp32"]  # auto measures, and may choose bf16 in one of both runs
    assert inprocess.sid("distill", sd_folder, *common, "-o", tmp_path / "one") == 0
    settings = {"batch_size": 4, "lr": 1e-3, "guidance": 1.5, "alpha": 1.1, "device": "cpu", "precision": "fp32"}
    done = distill(str(sd_folder), tmp_path / "two", steps=2, **settings, listener=SILENT)  # type: ignore[arg-type]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (done.student / weights).read_bytes() == (tmp_path / "one" / "student" / weights).read_bytes()
    more = distill(str(sd_folder), tmp_path / "one", steps=3, **settings, listener=SILENT)  # type: ignore[arg-type]
    assert (done.step, more.step, more.taken) == (2, 3, 1)
    assert json.loads((tmp_path / "one" / "run.json").read_text())["command"] == "sidcli.distill, from Python"


def test_distill_runs_in_a_thread_too_where_no_signal_can_be_handled(sd_folder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        work = partial(distill, str(sd_folder), tmp_path / "run", steps=1, batch_size=2, device="cpu", listener=SILENT)
        assert pool.submit(work).result().step == 1


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"stepz": 3}, "unknown setting 'stepz'; did you mean 'steps'?"),
        ({"steps": "3"}, "steps must be int, not '3'"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"steps": 3, "images": 12}, "exclude each other"),
        ({"objective": "dmd2", "kappa1": 2.0}, "'kappa1' is not a setting of objective dmd2, it is one of sid"),
        ({"data": "teacher"}, "--data teacher: objective sid trains on prompts alone"),
        ({"data_num": 3}, "--data-num 3 is a number of images of --data, which is not given"),
        ({"objective": "sida"}, "objective sida trains on images, and --data is not given"),
        ({"objective": "dmd2", "gan": 0.1}, "objective dmd2 trains on images, and --data is not given"),
        ({"objective": "sida", "data": "teacher", "compile": "on"}, "--compile on does not support the discriminator"),
        ({"objective": "regression"}, "objective regression trains on images, and --data is not given"),
        ({"objective": "regression", "data": "a"}, "--data a: objective regression trains on images with the noise from which"),
        ({"objective": "regression", "data": "teacher", "student_steps": 4}, "trains a one-step student, and --student-steps is 4"),
        ({"objective": "sida", "data": "teacher", "steps": 9}, "sida trains the student from step 11 on, and --steps is 9"),
        ({"objective": "sida", "data": "nowhere"}, "cannot read the images nowhere"),
        ({"data_num": -1}, "--data-num must be at least 0"),
        ({"memory": "8gb"}, "--memory must be one of"),
        ({"tracker": "mlflow"}, "--tracker must be one of tensorboard, wandb"),
        ({"resume": "nowhere"}, "nowhere is not a checkpoint"),
    ],
)
def test_distill_refuses_settings_that_are_not_possible(settings: dict[str, object], problem: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, InputError), match=problem):
        distill("emoji-teacher", tmp_path / "run", listener=SILENT, **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_every_setting_of_a_distillation_may_be_given_by_its_name() -> None:
    given = {"t_init": 600, "student_steps": 2, "fake_lora": 4, "adam_eps": 1e-6, "compile": "off"}
    request = Request.of("emoji-teacher", None, None, None, None, {}, None, None, "auto", None, given)
    config = request.config(request.recipe)
    assert isinstance(config, DistillConfig) and {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(
    ("teacher", "objective", "rates"),
    [
        ("emoji-teacher", "vsd", (1e-3, 1e-4)),
        ("emoji-teacher", "dmd2", (1e-4, 1e-4)),
        ("someone/sd", "vsd", (1e-3, 1e-6)),
        ("someone/sd", "dmd2", (1e-5, 1e-5)),
        ("someone/sd", "sid", (1e-6, 1e-6)),
    ],
)
def test_an_objective_has_learning_rates_of_its_own(teacher: str, objective: str, rates: tuple[float, float]) -> None:
    request = Request.of(teacher, None, objective, None, None, {}, None, None, "auto", None, {})
    config = request.config(request.recipe)
    assert (config.lr_fake, config.lr_generator) == rates


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: load(3), "name must be a model name or a path, not an int"),
        (lambda: sample(Path("list.txt")), "prompts must be a string or a list of strings"),
        (lambda: sample(["a cat", 3]), "prompts must be a string or a list of strings"),
        (lambda: sample("a cat", 3), "model must be a model name or a path, not an int"),
        (lambda: sample("a cat", num="2"), "num must be int, not '2'"),
        (lambda: sample("a cat", output=5), "output must be a path, not 5"),
        (lambda: sample("a cat", device=0), "device must be str, not 0"),
        (lambda: sample("a cat", batch_size=None), "batch_size must be int, not None"),
        (lambda: sample("a cat", overwrite="no"), "overwrite must be bool, not 'no'"),
        (lambda: distill("emoji-teacher", 5), "output must be a path, not 5"),
        (lambda: distill("emoji-teacher", objective_settings={"name": "dmd2"}), "the objective is not one of its own settings"),
        (lambda: distill(kappa1=4.0, objective_settings={"kappa1": 3.0}), "--kappa1 4.0 and --set kappa1=3.0 exclude each other"),
        (lambda: evaluate("emoji", None), "metrics must be a list of names, not None"),
        (lambda: evaluate("emoji", prompts=["a cat"]), "prompts must be a path, not ['a cat']"),
        (lambda: export("emoji", None), "output must be a path, not None"),
        (lambda: sample("a cat", guidance="2"), "guidance must be float, not '2'"),
        (lambda: distill(Silence()), "teacher must be a model name or a path, not a Silence"),
        (lambda: distill(guidance="2"), "guidance must be float, not '2'"),
        (lambda: distill(images=2.5), "images must be int, not 2.5"),
        (lambda: evaluate(Silence()), "models must be a model name or a path, not a Silence"),
        (lambda: evaluate(["emoji", None]), "models must be a model name or a path, not a NoneType"),
        (lambda: evaluate([]), "no model given"),
        (lambda: evaluate("emoji", num="8"), "num must be int, not '8'"),
        (lambda: evaluate("emoji-teacher", untrained=-1), "--untrained must be at least 0 and at most 100, not -1"),
        (lambda: export(Silence(), "x"), "model must be a model name or a path, not a Silence"),
        (lambda: export("emoji", "x", "lora", rank="8"), "rank must be int, not '8'"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_its_name(call: Callable[[], object], problem: str) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)):
        call()


@pytest.mark.parametrize("whole", [np.int64, np.uint8, np.int32])
@pytest.mark.parametrize("real", [np.float64, np.float32, np.float16, np.int64])
def test_a_number_of_numpy_is_a_number(whole: type, real: type) -> None:
    found = checked({"lr_fake": real(2), "seed": whole(3)}, "", "key")
    assert (found, {type(value) for value in found.values()}) == ({"lr_fake": 2.0, "seed": 3}, {float, int})
    scales = objectives.settings({"kappa1": real(2)})
    assert scales == objectives.Sid.Settings(kappa1=2.0) and type(scales.kappa1) is float  # type: ignore[attr-defined]
    options: dict[str, Any] = {"num": whole(2), "seed": whole(1), "steps": whole(1), "batch_size": whole(1), "guidance": real(2)}
    drawn = sample("a cat", "emoji-teacher", **options, width=whole(64), listener=SILENT)
    assert (drawn.plan.guidance, [one.seed for one in drawn.drawn]) == (2, [1, 2]) and json.dumps(drawn.as_dict())


@pytest.mark.parametrize("wrong", [{"lr_fake": True}, {"seed": True}, {"shard": 1}, {"seed": np.float64(1)}, {"seed": np.True_}])
def test_neither_a_boolean_nor_a_number_that_does_not_convert_exactly_is_a_number(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        checked(wrong, "", "key")
    assert (plain(Fraction(1, 4), float), plain(Fraction(1, 3), float)) == (0.25, Fraction(1, 3))
    assert plain(10**400, float) == 10**400 and plain(2**60 + 1, float) == 2**60 + 1


def test_an_empty_path_is_not_the_current_folder() -> None:
    calls: list[Callable[[], object]] = [lambda: sample("a cat", reference=["x", ""]), lambda: evaluate("emoji", reference="")]
    for call in calls:
        with pytest.raises(UsageError, match="reference must be a path, not ''"):
            call()


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: load("emoji", widht=64), "unknown argument 'widht'; did you mean 'width'?"),
        (lambda: sample("a cat", foo=1), "unknown argument 'foo'"),
        (lambda: sample("a cat", promts="x"), "unknown argument 'promts'; did you mean 'prompts'?"),
        (lambda: distill(guidence=2.0), "unknown setting 'guidence'; did you mean 'guidance'?"),
        (lambda: distill(kapa4=2.0), "unknown setting 'kapa4'; did you mean 'kappa"),
        (lambda: evaluate("emoji", metric=["clip"]), "unknown argument 'metric'; did you mean 'metrics'?"),
        (lambda: export("emoji", "x", fromat="lora"), "unknown argument 'fromat'; did you mean 'format'?"),
    ],
)
def test_a_keyword_that_a_function_does_not_have_is_refused_with_the_nearest_name(call: Callable[[], object], problem: str) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)):
        call()
    assert list(inspect.signature(sample).parameters)[:2] == ["prompts", "model"], "help and completion show the arguments"


def test_a_path_is_a_model_name_and_a_list_of_prompts(sd_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a cat\n")
    assert load(sd_folder, listener=SILENT).size == (64, 64)
    settings = {"steps": 1, "batch_size": 2, "device": "cpu", "listener": SILENT}
    done = distill(sd_folder, tmp_path / "run", prompts=tmp_path / "list.txt", **settings)  # type: ignore[arg-type]
    assert sample("a cat", tmp_path / "run", listener=SILENT).images[0].size == (64, 64)
    assert export(tmp_path / "run", tmp_path / "out", verify=False, listener=SILENT).folder == tmp_path / "out" and done.step == 1


def request(teacher: str, objective: str | None, config: Path, **settings: object) -> Request:
    guidance = settings.pop("guidance", None)
    return Request.of(teacher, None, objective, guidance, None, {}, None, None, "auto", config, settings)  # type: ignore[arg-type]


def test_another_objective_than_that_of_the_config_file_keeps_none_of_its_settings_and_says_which(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    dmd2 = DistillConfig(objective=objectives.Dmd2.Settings(guidance=3.0), fake_updates=10, lr_fake=2e-5, lr_generator=1e-5)
    file.write_text(tomli_w.dumps(dataclasses.asdict(dmd2)))
    asked = request("someone/sd", "vsd", file)
    made = asked.config(asked.recipe)
    assert (made.fake_updates, made.lr_fake, made.lr_generator, made.fake_lora) == (1, 2e-5, 1e-6, 64)
    assert made.objective == objectives.Vsd.Settings()
    assert asked.notes == (
        f"--objective vsd: the table [objective] of {file} is of dmd2 and is not used:"
        " guidance = 3.0, gan = 0.0, gan_fake = 0.01, divergence = reverse-kl",
        f"--objective vsd: settings of {file} that are defaults of dmd2 have other values: "
        "lr_generator = 1e-05 -> 1e-06, fake_updates = 10 -> 1, fake_lora = 0 -> 64",
    )
    other = request("someone/sd", "vsd", file, fake_updates=3, fake_lora=0)
    assert other.notes[1].endswith("lr_generator = 1e-05 -> 1e-06, fake_updates = 10 -> 3"), "the values of the run"
    for same in (None, "dmd2"):
        asked = request("someone/sd", same, file)
        assert asked.config(asked.recipe) == dataclasses.replace(dmd2, teacher="someone/sd", prompts="general") and not asked.notes
    file.write_text(tomli_w.dumps(dataclasses.asdict(DistillConfig(steps=7))))
    asked = request("someone/sd", "dmd2", file)
    made = asked.config(asked.recipe)
    assert (made.steps, made.fake_updates, made.lr_generator) == (7, 10, 1e-5) and "kappa1 = 2.0" in asked.notes[0]
    assert "fake_updates = 1 -> 10" in asked.notes[1] and "fake_updates" not in asked.notes[0]


@pytest.mark.parametrize(
    ("content", "said", "hint"),
    [
        ('objective = "dmd2"\n', "objective must be a table, not 'dmd2'", 'write the table [objective] with name = "dmd2"'),
        (
            "guidance = 3\n",
            "guidance is a setting of an objective",
            'the table [objective] with name = "dmd" and guidance below it; sid has kappa1 to kappa4 instead',
        ),
        ('[[objective]]\nname = "dmd2"\n', "objective must be a table, not [{'name': 'dmd2'}]", "write [objective] with single"),
        ('guidance_strategy = "long"\n', "unknown key 'guidance_strategy'", "write kappa1 to kappa4 in the table [objective]"),
        ("lr = 1e-4\n", "unknown key 'lr'", "write lr_fake and lr_generator, which --lr sets"),
        ("eval_every = 5\n", "unknown key 'eval_every'", "give --eval-every, which is an option of the command only"),
    ],
)
def test_a_setting_of_an_objective_outside_of_its_table_is_told_where_it_belongs(
    content: str, said: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(content)
    with pytest.raises(UsageError) as caught:
        read_toml(tmp_path / "own.toml")
    assert caught.value.message == f"{tmp_path / 'own.toml'}: {said}" and hint in caught.value.hint


@pytest.mark.parametrize(
    ("content", "said", "hint"),
    [
        (
            'name = "nope"',
            "name in [objective] must be one of sid, sida, dmd, dmd2, vsd, regression, lcm, tlcm, tlcm2, scflow, act, boot, "
            "self-distillation, "
            "not 'nope'",
            "",
        ),
        (
            "name = [3]",
            "name in [objective] must be one of sid, sida, dmd, dmd2, vsd, regression, lcm, tlcm, tlcm2, scflow, act, boot, "
            "self-distillation, not [3]",
            "",
        ),
        ("kapa1 = 2.0", "'kapa1' is not a setting of objective sid; did you mean 'kappa1'?", ""),
        ('kappa1 = "x"', "kappa1 must be float, not 'x'", ""),
        ("dropout = 2.0", "dropout must be at least 0 and below 1, not 2.0", ""),
        (
            "guidance = 3.0",
            "'guidance' is not a setting of objective sid, it is one of dmd, dmd2, vsd, regression, lcm, tlcm, tlcm2, scflow, boot and "
            "self-distillation; sid has kappa1, kappa2, kappa3, kappa4, alpha, dropout",
            "--guidance SCALE, which sets kappa1, kappa2, kappa3 and kappa4 of sid, or write these",
        ),
        (
            'name = "sida"\nguidance = 3.0',
            "'guidance' is not a setting of objective sida, it is one of dmd, dmd2, vsd, regression, lcm, tlcm, tlcm2, scflow, boot and "
            "self-distillation; sida has",
            "--guidance SCALE, which sets kappa1, kappa2, kappa3 and kappa4 of sida, or write these",
        ),
        (
            'name = "sida"\nguidance_strategy = "long"',
            "'guidance_strategy' is not a setting of objective sida; ",
            "--guidance-strategy NAME, which sets kappa1, kappa2, kappa3 and kappa4 of sida, or write these",
        ),
        (
            'guidance_strategy = "long"',
            "'guidance_strategy' is not a setting of objective sid; ",
            "--guidance-strategy NAME, which sets kappa1, kappa2, kappa3 and kappa4 of sid, or write these",
        ),
        (
            'name = "vsd"\nkappa4 = 3.0',
            "'kappa4' is not a setting of objective vsd, it is one of sid and sida; vsd has",
            "--guidance SCALE, or write guidance",
        ),
    ],
)
def test_an_error_in_the_table_of_the_objective_names_the_file(content: str, said: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(f"[objective]\n{content}\n")
    for read in (lambda: distill(config=file), lambda: method_of(None, file)):
        with pytest.raises(UsageError) as caught:
            read()
        assert caught.value.message.startswith(f"{file}: {said}") and caught.value.hint == hint


def test_the_guidance_scale_is_given_once() -> None:
    with pytest.raises(UsageError, match=r"--guidance 2 and --set guidance=3.0 exclude each other"):
        Request.of("emoji-teacher", None, "dmd2", 2.0, None, {"guidance": 3.0}, None, None, "auto", None, {})
    table = Request.of("emoji-teacher", None, None, 2.0, None, {"kappa4": 3.0}, None, None, "auto", None, {}).start["objective"]
    assert (table.kappa3, table.kappa4) == (2.0, 3.0), "one of the four scales of sid"


def asked_for(**settings: Any) -> Request:
    """A request with this objective (default: sid), config file, guidance options, `lr` or settings."""
    teacher = settings.pop("teacher", "emoji-teacher")
    names = ("objective", "guidance", "guidance_strategy", "lr", "config")
    objective, guidance, strategy, lr, config = (settings.pop(name, None) for name in names)
    return Request.of(teacher, None, objective, guidance, strategy, {}, lr, None, "auto", config, settings)


KAPPAS = {f"kappa{index}": 1.5 for index in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (KAPPAS | {"guidance": 2.0}, "--guidance 2.0 has no effect: kappa1 to kappa4 set every scale"),
        (KAPPAS | {"guidance_strategy": "long"}, "--guidance-strategy long has no effect: kappa1 to kappa4 set every scale"),
        ({"lr": 1e-3, "lr_fake": 1e-4, "lr_generator": 1e-4}, "--lr 0.001 has no effect: --lr-fake and --lr-generator set both"),
    ],
)
def test_a_shortcut_beside_all_of_the_settings_that_it_sets_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        asked_for(**settings)
    asked_for(**{name: value for name, value in settings.items() if name not in ("kappa3", "lr_fake")})


def test_settings_of_an_objective_without_a_fake_score_are_checked_too() -> None:
    lcm: dict[str, Any] = {"objective": "lcm", "data": "a"}
    with pytest.raises(UsageError, match=r"--lr 0\.001 has no effect: --lr-generator sets the only rate of objective lcm"):
        asked_for(**lcm, lr=1e-3, lr_generator=1e-4)
    assert asked_for(**lcm, lr=1e-3, lr_fake=1e-4).config({}).lr_generator == 1e-3
    for setting, said in (({"lr_fake": -1.0}, "--lr-fake must be positive"), ({"renoise": "x"}, "--renoise must be one of")):
        with pytest.raises(UsageError, match=said):
            asked_for(**lcm, **setting).config({})


def test_an_error_about_a_value_of_the_config_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("t_init = 1000\nt_max = 990\n")

    def refused(*options: object) -> str:
        done = sid("distill", "--dry-run", "--device", "cpu", "--config", file, "--teacher", "emoji-teacher", *options)
        assert done.returncode == 2
        return done.stderr.strip()

    schedule = "must be at most 999, as the teacher's schedule has 1000 timesteps, not 1000"
    assert refused() == f"error: {file}: t_init {schedule}; try: write another value there, or give --t-init"
    assert refused("--t-init", 1000) == f"error: --t-init {schedule}"
    assert refused("--t-min", 995) == f"error: {file}: --t-min must be at least 0 and below t_max 990, not 995; " + (
        "try: write another value there, or give --t-max"
    )
    file.write_text('student_steps = 4\ndata = "teacher"\n[objective]\nname = "regression"\n')
    assert refused() == f"error: {file}: objective regression trains a one-step student, and student_steps is 4; " + (
        "try: leave it out, or choose another --objective"
    )


def test_a_setting_that_others_turn_off_is_noted() -> None:
    assert asked_for(renoise="fresh").notes == (
        "note: --renoise fresh has no effect on a student of one step; --student-steps N sets more",
    )
    assert asked_for(dropout=0.2, guidance_strategy="none").notes == (
        "note: --dropout 0.2 has no effect: no guidance uses the unconditional branch of the fake score",
    )
    assert not asked_for(renoise="fresh", student_steps=2, dropout=0.2).notes
    assert asked_for(objective="dmd2", gan_fake=0.02).notes == (
        "note: --set gan_fake=0.02 has no effect without a GAN; --set gan=0.001 adds it",
    )
    assert not asked_for(objective="dmd2", gan_fake=0.02, gan=0.001).notes
    pairs: dict[str, object] = {"objective": "regression", "data": "teacher"}
    assert asked_for(**pairs, fake_lora=8, t_min=50).notes == (
        "note: --fake-lora 8 has no effect on objective regression",
        "note: --t-min 50 has no effect on objective regression",
    )
    assert asked_for(objective="lcm", data="a", t_init=500, renoise="ddim", student_steps=1).notes == (
        "note: --t-init 500 has no effect on objective lcm",
        "note: --renoise ddim has no effect on objective lcm",
    )
    assert not asked_for(**pairs, lr=1e-4).notes


def test_a_setting_of_another_judge_or_of_another_kind_of_sheets_is_noted() -> None:
    own: dict[str, Any] = {"objective": "self-distillation"}
    assert asked_for(**own, judge="clip", judge_url="http://here", judge_model="x").notes == (
        "note: --set judge_url=http://here has no effect on the judge clip; it is a setting of http",
    )
    assert asked_for(**own, judge_model="x").notes == (
        "note: --set judge_model=x has no effect on the judge features; it is a setting of clip, dino, vlm, http",
    )
    assert asked_for(**own, judge="none", same="0.5", copy=0.5).notes == (
        "note: --set same=0.5 has no effect on the judge none, which accepts every pair",
    )
    assert asked_for(**own, pairs="shared-attention", cut=0.5).notes == (
        "note: --set cut=0.5 has no effect with pairs=shared-attention, which draws each panel alone",
    )
    assert asked_for(**own, layout="channels", reference_weight=0.5).notes == (
        "note: --set reference_weight=0.5 has no effect with layout=channels, which does not draw the first image",
    )
    assert not asked_for(**own, judge="http", judge_url="http://here", judge_model="x", same="0.5", cut=0.5, sheets=4).notes


def test_settings_of_prompts_and_sheets_are_noted_beside_pairs_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "pairs.jsonl").touch()
    given: dict[str, Any] = {"prompts": "general", "data_num": 5}
    captions = f"has no effect beside the pairs of {tmp_path}, which have captions"
    said = [f"note: --prompts general {captions}", f"note: --data-num 5 {captions}"]
    sheets: dict[str, Any] = {name: getattr(SelfDistillation.Settings(), name) for name in SHEET_SETTINGS}
    unused = [f"note: --{name} 8 has no effect on objective self-distillation" for name in ("fake-lora", "t-init")]
    drawn = [
        f"note: --set {name}={value} has no effect beside the pairs of {tmp_path}, which are" for name, value in sheets.items()
    ]
    notes = asked_for(objective="self-distillation", data=str(tmp_path), fake_lora=8, t_init=8, **given, **sheets).notes
    assert [note.removesuffix(" drawn and judged") for note in notes] == [*unused, *said, *drawn]
    assert asked_for(objective="sid", data=str(tmp_path), **given).notes == (*said,)
    assert asked_for(teacher=str(tmp_path), objective="sid", **given).notes == (*said,), "its pairs are the default"
    drawn_now = {name: value for name, value in sheets.items() if not name.startswith(("judge_", "scenes_"))}
    assert not asked_for(teacher=str(tmp_path), objective="self-distillation", **given, **drawn_now).notes


def test_a_setting_without_effect_does_not_prevent_a_run_from_being_continued() -> None:
    for objective, changed in (("regression", []), ("sid", ["lr_fake: 0.1 -> 0.0001"])):
        config = asked_for(objective=objective, data="teacher" if objective == "regression" else "").config({})
        assert differences(dataclasses.asdict(config) | {"lr_fake": 0.1}, config) == changed


def test_a_setting_without_effect_keeps_its_default_in_the_record_of_the_run() -> None:
    pairs: dict[str, Any] = {"objective": "regression", "data": "teacher"}
    request = asked_for(**pairs, fake_lora=8, student_lora=4)
    for recipe in MEMORY.values():
        config = request.config(recipe)
        assert (config.fake_lora, config.student_lora) == (0, 4)
    assert asked_for(objective="sid").config(MEMORY["12gb"]).fake_lora == MEMORY["12gb"]["fake_lora"] > 0


def test_a_run_that_ends_before_the_adversarial_term_of_sida_joins_is_noted(tmp_path: Path) -> None:
    def notes(**settings: object) -> tuple[str, ...]:
        return asked_for(objective="sida", batch_size=16, **settings).notes

    said = "note: the adversarial term joins after {} images, and the run has {}".format
    assert notes(steps=20) == (said("320", "320"),)
    assert notes(steps=100, gan_images=1590) == (said("1,600", "1,600"),)
    assert not notes(steps=21) and not notes(steps=20, lsg_gan=0.0) and not asked_for(steps=1, batch_size=16).notes
    file = tmp_path / "own.toml"
    file.write_text('steps = 20\n[objective]\nname = "sida"\ngan_images = 4000\n')
    assert asked_for(config=file, batch_size=16).notes == (said("4,000", "320"),)


def test_prompts_or_images_that_are_given_take_their_column_or_number_from_no_config_file(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('prompts = "a.csv"\ncolumn = "said"\ndata = "a"\ndata_num = 5\n[objective]\nname = "sida"\n')

    def chosen(**settings: object) -> tuple[object, ...]:
        request = asked_for(config=file, **settings)
        config = request.config(request.recipe)
        return config.prompts, config.column, config.data, config.data_num

    assert chosen() == ("a.csv", "said", "a", 5)
    assert chosen(data="b") == ("a.csv", "said", "b", 0) and chosen(data="b", data_num=3) == ("a.csv", "said", "b", 3)
    assert chosen(prompts="b.csv") == ("b.csv", "", "a", 5) and chosen(prompts="b.csv", column="x") == ("b.csv", "x", "a", 5)


def test_evaluate_returns_rows_with_intervals_and_the_table_of_the_command(tmp_path: Path) -> None:
    outcome = evaluate("emoji", ["clip", "accuracy"], num=20, listener=SILENT)
    assert outcome is not None
    (row,) = [row for row in outcome.rows if not row.is_real]
    assert row.n == 20 and row.metrics["clip"].low < row.metrics["clip"].value < row.metrics["clip"].high
    done = sid("eval", "emoji", "--clip", "--accuracy", "--num", "20", "--json", cwd=tmp_path)
    printed = json.loads(done.stdout)["models"]
    assert [one["metrics"] for one in printed] == [one["metrics"] for one in outcome.as_dict()["models"]]


def test_evaluate_refuses_unknown_metrics_and_no_models_and_writes_to_paths_that_are_strings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown metric 'foo'"):
        evaluate("emoji", ["foo"], num=20, listener=SILENT)
    with pytest.raises(UsageError, match="no model given"):
        evaluate([], listener=SILENT)
    outcome = evaluate("emoji", "clip", num=4, listener=SILENT)
    assert outcome is not None
    outcome.write(str(tmp_path / "picture.png"), str(tmp_path / "report.html"))
    assert {file.name for file in tmp_path.iterdir()} >= {"picture.png", "report.html"}


def test_export_returns_what_was_written_and_refuses_what_the_command_refuses(tmp_path: Path) -> None:
    done = export("emoji", tmp_path / "student", dtype="fp16", listener=SILENT)
    assert done.folder == tmp_path / "student" and done.difference is not None and "unet/config.json" in done.files
    for arguments, problem in (
        (("emoji", tmp_path / "student"), "exists already"),
        (("emoji", tmp_path / "new", "gguf"), "unknown format 'gguf'"),
        (("authors.pkl", tmp_path / "new"), "a .pkl holds a UNet alone"),
    ):
        with pytest.raises(UsageError, match=problem):
            export(*arguments, listener=SILENT)  # type: ignore[arg-type]


def test_bars_show_notes_and_progress_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    bars.note("loading a model")
    with bars.progress("draw", 4, "images") as advance:
        advance(4)
    bars.started(1, 3)
    for step in (2, 3):
        bars.stepped({"step": step, "images_per_second": 2.0})
    out, err = capsys.readouterr()
    assert not out and "loading a model" in err and "3/3" in err and "2 img/s" in err


def test_bars_write_control_characters_out(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    bars.note("loading \x1b]0;t\x07")
    with bars.progress("draw \x1b[31m", 4, "images") as advance:
        time.sleep(1.1)  # a bar appears after a second
        advance(2, "step \x9b31m")
    said = capsys.readouterr().err
    assert all(text in said for text in (r"loading \u001b]0;t\u0007", r"draw \u001b[31m", r"step \u009b31m")), ascii(said)
    assert not {"\x07", "\x9b"} & set(said) and "\x1b[31m" not in said


@pytest.mark.usefixtures("small_batch")
def test_the_python_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(REPOSITORY / "examples" / "distill.py"))
    example["main"](tmp_path, 1, 20)
    assert "noun" in capsys.readouterr().out and (tmp_path / "3.png").is_file() and (tmp_path / "student" / "unet").is_dir()


def test_a_license_that_replaces_the_one_that_a_model_states_is_noted(tmp_path: Path) -> None:
    class Notes(Silence):
        said: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    export("emoji", tmp_path / "same", license="apache-2.0", verify=False, listener=Notes())
    assert not any("--license" in text for text in Notes.said)
    export("emoji", tmp_path / "other", license="mit", verify=False, listener=Notes())
    assert "note: --license mit replaces apache-2.0, the license that the model states" in Notes.said
