"""The command line as a person or a script meets it: real processes where exit codes and imports matter."""

import inspect
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from sidcli.cli.common import IMPORTERS, open_console
from sidcli.cli.distill import hidden
from sidcli.formats.order import FORMATS
from sidcli.models.loading import load
from sidcli.models.sources import find
from sidcli.settings import CHOICES, FITTED, MEMORY, STRATEGIES, DistillConfig
from tests.commands import Running
from tests.commands import from_server as sid
from tests.inprocess import sid as in_process

HEAVY = ("torch", "diffusers", "transformers", "numpy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["distill", "--help"],
        ["sample", "--num", "0", "a cat"],
        ["distill", "--steps", "0"],
        ["distill", "--lr", "-1"],
        ["distill", "--plan-for", "0gb"],
        ["distill", "--plan-for", "24gb", "--device", "cpu"],
        ["distill", "-o", ""],
        ["export", "emoji", "-o", ""],
        ["sample"],
        ["eval", "--fail-above", "fud=3"],
        ["eval", "--protocol", "coco"],
        ["eval", "emoji,steps=x"],
        ["nonsense"],
    ],
)
def test_help_and_usage_errors_never_import_anything_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; sys.argv = ['sid', *sys.argv[1:]]\n"
        "from sidcli.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules], code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    wanted = 0 if "--help" in arguments else 2
    assert f"LOADED [] {wanted}" in done.stdout, done.stdout + done.stderr


def help_of(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("TERMINAL_WIDTH", "250")
    assert in_process(command, "--help") == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["distill", "sample", "eval", "export"])
def test_help_shows_no_ranges(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, monkeypatch, capsys)
    assert "<=" not in text and ">=" not in text and "range" not in text


def test_the_help_of_distill_shows_the_defaults_of_its_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of("distill", monkeypatch, capsys)
    rows = {words[1].split(",")[0]: line for line in text.splitlines() if (words := line.split()) and len(words) > 1}
    for option, default in {
        "--teacher": "emoji-teacher",
        "--batch-size": "512; 16 for emoji-teacher",
        "--lr": "1e-06; 0.0001 for emoji-teacher",
        "--kappa4": "from --guidance",
        "--t-init": "625",
        "--ema-images": "50000; 500 for emoji-teacher",
        "--split-backward": "off",
    }.items():
        assert f"[default: ({default})]" in rows[option], rows[option]
    defaulted = {name for name in DistillConfig.__dataclass_fields__ if f"--{name.replace('_', '-')}" in rows}
    assert all("[default: " in rows[f"--{name.replace('_', '-')}"] for name in defaulted - {"model_config", "column"})


def test_a_value_outside_of_its_range_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in [
        (["sample", "a cat", "--num", "0"], "--num must be at least 1 and at most 100000, not 0"),
        (["sample", "a cat", "--width", "-8"], "--width must be at least 0, not -8"),
        (["distill", "--save-minutes", "nan"], "--save-minutes must be at least 0.01, not nan"),
        (["eval", "--processes", "0"], "--processes must be at least 1, not 0"),
        (["export", "emoji", "-o", "x", "--rank", "1025"], "--rank must be at least 1 and at most 1024, not 1025"),
    ]:
        assert in_process(*arguments) == 2
        assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("distill --guidance-strategy ", list(STRATEGIES)),
        ("distill --guidance-strategy l", ["lsg", "long"]),
        ("distill --memory ", ["auto", *MEMORY, *FITTED]),
        ("distill --precision ", list(CHOICES["precision"])),
        ("distill --renoise f", ["fixed", "fresh"]),
        ("distill --optimizer ", list(CHOICES["optimizer"])),
        ("distill --tracker w", ["wandb"]),
        ("distill --prompts g", ["general"]),
        ("distill --teacher /tmp/", [""]),  # then the shell completes the path
        ("sample --device c", ["cpu", "cuda", "cuda:0"]),
        ("sample --backend o", ["onnx", "openvino"]),
        ("eval --protocol c", ["coco2014-30k", "custom"]),
        ("eval --fail-above fid", ["fid=", "fid_infinity=", "fid_teacher="]),
        ("eval emoji-", ["emoji-teacher"]),
        ("export emoji --format ", list(FORMATS)),
        ("export emoji --dtype fp", ["fp32", "fp16"]),
    ],
)
def test_values_complete_in_the_shell(
    typed: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_SID_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"sid {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(f"sid {typed}".split(" ")) - 1))
    assert in_process() == 0
    assert capsys.readouterr().out.rstrip("\n").split("\n") == wanted


@pytest.mark.check(14)
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["distill", "--steps", "3", "--images", "9"], 2, "--steps and --images"),
        (["distill", "--batch-size", "0"], 2, "--batch-size must be at least 1, not 0"),
        (["sample", "a cat", "--model", "emoji", "--steps", "4"], 2, "emoji is a one-step model; --steps 4 is not possible"),
        (["sample", "a cat", "--model", "no-such-model"], 3, "no model 'no-such-model'"),
        (["sample", "a cat", "--model", "weights.ckpt"], 3, "no model 'weights.ckpt': there is no such file"),
        (["distill", "--prompts", "missing.txt"], 3, "missing.txt"),
        (["distill", "--device", "cuda:7"], 4, "no device cuda:7"),
        (["sample", "a cat", "--device", "gpu"], 2, "--device must be auto, cpu, cuda or cuda:INDEX, not 'gpu'"),
        (["sample", "a cat", "--model", "emoji-teacher", "--guidance", "nan"], 2, "--guidance must be finite"),
        (["sample", "cat \udcff"], 2, "not valid UTF-8"),
        (["distill", "--images", "-5"], 2, "--images must be at least 1, not -5"),
        (["distill", "--width", "68"], 2, "--width must be a multiple of 8, in which pipelines of diffusers draw, not 68"),
        (["distill", "--height", "-8"], 2, "--height must be at least 0, not -8"),
        (["distill", "--tracker", "foo"], 2, "Invalid value for '--tracker': 'foo' is not one of 'tensorboard', 'wandb'."),
        (["distill", "--resume", "nowhere"], 3, "nowhere is not a checkpoint"),
        (
            ["distill", "--dry-run", "--t-init", "1000"],
            2,
            "--t-init must be at most 999, as the teacher's schedule has 1000 timesteps, not 1000",
        ),
        (["distill", "--dry-run", "--t-max", "1001"], 2, "--t-max must be at most 1000, as the teacher's schedule has"),
        (["distill", "--t-init", "0"], 2, "--t-init must be at least 1, not 0"),
        (["distill", "--t-min", "990"], 2, "--t-min must be at least 0 and below --t-max 980, not 990"),
        (["distill", "--student-steps", "626"], 2, "--student-steps must be at least 1 and at most --t-init 625, not 626"),
        (["distill", "--dry-run", "--teacher", "emoji"], 3, "student already"),
        (["distill", "--dry-run", "--prompts", "missing.txt"], 3, "missing.txt"),
        (["export", "emoji-teacher", "-o", "x"], 3, "not a student"),
        (["export", "emoji", "-o", "x", "--format", "gif"], 2, "unknown format"),
        (["export", "emoji", "-o", "x", "--format", "onnx", "--dtype", "bf16"], 2, "fp32 or fp16"),
        (["export", "emoji", "-o", "x", "--variant", "../x"], 2, "--variant must be fp16"),
        (["export", "emoji", "-o", "n" * 300], 4, "cannot hold files"),
        (["export", "emoji", "-o", ".", "--overwrite"], 2, "is not an export, and --overwrite replaces nothing else"),
        (["export", "their.pkl", "-o", "x"], 2, "--teacher ID"),
        (["export", "emoji", "-o", "x", "--push-to-hub", "me"], 2, "OWNER/NAME"),
        (["export", "emoji", "-o", "x", "--dtype", "int4"], 2, "unknown --dtype 'int4'"),
        (["sample", "a cat", "--model", "their.pkl"], 3, "no model 'their.pkl': there is no such file"),
        (["sample", "a cat", "--backend", "onnx"], 2, "sid export emoji --format onnx"),
        (["sample", "a cat", "--precision", "fp8"], 2, "Invalid value for '--precision': 'fp8' is not one of 'fp32', 'bf16'"),
        (["eval", "emoji", "--precision", "fp8"], 2, "Invalid value for '--precision': 'fp8' is not one of 'fp32', 'bf16'"),
        (
            ["sample", "a cat", "--width", "63"],
            2,
            "--width must be a multiple of 4, in which this model draws, and at most 8192, not 63",
        ),
        (["sample", "a cat", "--prediction-type", "x0"], 2, "--prediction-type must be one of"),
        (["sample", "a cat", "--reference", ""], 2, "--reference must be a path, not ''"),
        (["sample", "a cat", "--prompts="], 2, "--prompts must be a path, not ''"),
        (["eval", "emoji", "--reference", ""], 2, "--reference must be a path, not ''"),
        (["distill", "--config", ""], 2, "--config must be a path, not ''"),
        *(
            (
                ["sample", "a cat", "--reference", "x.png", "--reference-guidance", scale],
                2,
                f"--reference-guidance must be at least 0 and at most 100, not {scale}",
            )
            for scale in ("-1", "101", "nan")
        ),
        (["eval", "emoji", "--protocol", "coco2014-30k"], 2, "--reference FOLDER with val2014/"),
        (["eval", "emoji", "--prdc", "--num", "5"], 2, "try: 6 images or more"),
        (["eval", "emoji", "--reference", "nowhere"], 3, "nowhere"),
        (["eval", "emoji", "--steps", "0"], 2, "--steps must be at least 1, not 0"),
        (["eval", "emoji", "--guidance", "nan"], 2, "--guidance must be finite, not nan"),
        (["distill", "--guidance", "nan"], 2, "--guidance must be finite, not nan"),
        (["distill", "--objective", "dmd2", "--guidance", "inf"], 2, "--guidance must be finite, not inf"),
        (["eval", "emoji", "--untrained", "4"], 2, "--untrained 4 applies to teachers, and none is measured"),
        (["eval", "emoji", "--steps", "4"], 2, "--steps 4 applies to teachers, and none is measured"),
        (["eval", "emoji", "--guidance", "2"], 2, "--guidance 2 applies to teachers, and none is measured"),
        (["eval", "emoji", "--picture", "x.jpg"], 2, "--picture must end in .png, not x.jpg; try: --picture x.png"),
        (["eval", "emoji", "--cmmd-model", "x"], 2, "--cmmd-model x: the protocol emoji has a network of its own for this"),
        (["eval", "emoji", "--judge", "vlm"], 2, "--judge must be http, not 'vlm'"),
        (["eval", "emoji", "--judge", "http", "--judge-model", "x"], 2, "--judge http needs an endpoint"),
        (["eval", "emoji", "--judge-url", "http://here"], 2, "--judge-url http://here has no effect without a judge"),
        (["eval", "emoji", "--inception", "x"], 2, "--inception x: the protocol emoji has a network of its own for this"),
        (
            ["export", "emoji", "-o", "x", "--rank", "8"],
            2,
            "--rank 8 is the rank of a LoRA, which --format diffusers does not write",
        ),
        (["export", "emoji", "-o", "x", "--teacher", "emoji-teacher"], 2, "only --format lora and a model in a .pkl use a teacher"),
        (["export", "emoji", "-o", "x", "--public"], 2, "--public applies to --push-to-hub, which is not given"),
        (["export", "emoji", "-o", "x", "--variant", "fp16"], 2, "--dtype is fp32; try: --dtype fp16, or leave --variant out"),
        (["eval", "no-such-model"], 3, "no model 'no-such-model'"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = sid(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["distill", "--json", "--nonsense"], "UsageError", 2),
        (["sample", "--json", "--num", "0", "a cat"], "UsageError", 2),
        (["eval", "emoji", "--fail-above", "fud=3", "--json"], "UsageError", 2),
        (["sample", "a cat", "--model", "no-such-model", "--json"], "InputError", 3),
        (["export", "emoji", "-o", "n" * 300, "--json"], "EnvironmentProblem", 4),
    ],
)
def test_with_json_an_error_is_one_object_in_the_last_line_of_stderr(
    arguments: list[str], kind: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process(*arguments) == code
    said = capfd.readouterr()
    (error,) = json.loads(said.err.splitlines()[-1]).values()
    assert (error["type"], error["exit_code"], said.out) == (kind, code, "") and error["message"] and error.keys() >= {"hint"}


def test_json_behind_two_dashes_is_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process("sample", "--model", "no-such-model", "--", "--json") == 3
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: no model 'no-such-model'")


def test_a_hub_teacher_without_a_network_ends_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    done = sid("distill", "--teacher", "runwayml/stable-diffusion-v1-5", cwd=tmp_path, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in last and "try:" in last
    assert "has left the hub" in done.stderr


@pytest.mark.check(28)
def test_sample_needs_no_more_than_a_prompt_and_signs_the_picture(tmp_path: Path) -> None:
    done = sid("sample", "a cat", "-o", "out.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out.png\n" and "drawing with emoji" in done.stderr and "--model" in done.stderr
    with Image.open(tmp_path / "out.png") as picture:
        made = json.loads(picture.info["sid"])
        assert picture.size == (64, 64)
    assert made["prompt"] == "a cat" and made["seed"] == 0 and made["model"] == "embedded:emoji"
    again = sid("sample", "a cat", "-o", "out.png", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr
    below = sid("sample", "a cat", "-o", "out.png/below.png", cwd=tmp_path)
    assert below.returncode == 4 and "is a file, not a folder" in below.stderr and "Traceback" not in below.stderr


@pytest.mark.check(28)
def test_images_without_a_place_get_a_new_name_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = []
    for arguments in (
        ["A Cat/../!"],
        ["A Cat/../!"],
        ["猫", "--seed", "7"],
        ["a cat", "-n", "2"],
        ["a cat", "a dog"],
        ["a cat", "a dog"],
    ):
        assert in_process("sample", *arguments) == 0
        drawn.append(capsys.readouterr().out.splitlines()[0])
    assert drawn == [
        "a-cat-0.png",
        "a-cat-0-2.png",
        "image-7.png",
        "a-cat-0/000000.png",
        "samples-0/000000.png",
        "samples-0-2/000000.png",
    ]


@pytest.mark.check(30)
def test_a_path_with_a_slash_is_a_folder_and_neither_stdout_nor_nothing_is_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process("sample", "a cat", "-o", "x.png/") == 0
    assert sorted(file.name for file in (tmp_path / "x.png").iterdir()) == ["000000.png", "sheet.png"]
    for output in ("-", ""):
        capsys.readouterr()
        assert in_process("sample", "a cat", "-o", output) == 2
        assert f"--output must be a .png file or a folder, not {output!r}" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_several_prompts_make_a_folder_with_a_contact_sheet_and_json_lists_it(tmp_path: Path) -> None:
    hostile = "../../[red]x\x1b]0;title\x07"
    done = sid("sample", "a cat", hostile, "--num", "2", "--seed", "7", "-o", "many", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert [item["seed"] for item in listed["images"]] == [7, 8, 7, 8]
    assert listed["images"][2]["prompt"] == hostile
    names = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert names == [f"many/{index:06d}.png" for index in range(4)] + ["many/sheet.png"]


def test_overwrite_leaves_the_images_of_this_call_alone_in_a_folder_and_removes_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process("sample", "a cat", "--num", "4", "-o", "many") == 0
    drawn = (tmp_path / "many" / "000003.png").read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "many" / "000005.png")  # not made by sid
    for kept in ("7.png", "000006.PNG", "0000007.png", "cat.png"):
        (tmp_path / "many" / kept).write_bytes(drawn)
    (tmp_path / "many" / "000008.png").symlink_to(tmp_path / "many" / "7.png")
    others = {"000005.png", "7.png", "000006.PNG", "0000007.png", "cat.png", "000008.png"}
    (tmp_path / "many" / "000000.png").rename(tmp_path / "first.png")
    assert in_process("sample", "a dog", "-o", "many") == 2, "sheet.png is there"
    assert (tmp_path / "many" / "000003.png").exists()
    capsys.readouterr()
    assert in_process("sample", "a dog", "--num", "2", "-o", "many", "--overwrite") == 0
    assert "removed 2 images of an earlier call from many" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "many").iterdir()} == {"000000.png", "000001.png", "sheet.png"} | others


def test_export_verifies_itself_against_sample(tmp_path: Path) -> None:
    done = sid("export", "emoji", "--format", "diffusers", "-o", "student", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["difference_255"] <= 1 and "unet/diffusion_pytorch_model.safetensors" in report["files"]
    assert (tmp_path / "student" / "sid.json").is_file()


@pytest.mark.check(20)
def test_an_export_that_is_told_to_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    export = Running("export", "emoji", "--format", "onnx", "-o", "graphs", cwd=tmp_path)
    while not any(tmp_path.glob(".tmp-*")) and export.poll() is None:
        time.sleep(0.05)
    while export.poll() is None:  # a callback inside a library can lose what a signal raises; people ask again
        os.kill(export.pid, signal.SIGTERM)
        until = time.monotonic() + 60
        while export.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    assert export.returncode == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.check(21)
def test_a_released_pickle_becomes_a_student_and_a_hostile_one_an_error(sd_folder: Path, tmp_path: Path) -> None:
    own = load(find(str(sd_folder))).denoiser
    unet = UNet2DConditionModel.from_config({name: value for name, value in own.config.items() if not name.startswith("_")})
    unet.load_state_dict(own.state_dict())
    (tmp_path / "batch512_cfg1.51.51.5_t600_8806_v2.pkl").write_bytes(pickle.dumps({"ema": unet}))
    released = ["export", "batch512_cfg1.51.51.5_t600_8806_v2.pkl", "--teacher", str(sd_folder), "-o", "student"]
    done = sid(*released, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "student" / "sid.json").read_text())
    assert card["t_init"] == 600 and card["imported"]["file"] == released[1]
    exported = load(find(str(tmp_path / "student"))).denoiser.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in unet.state_dict().items())
    (tmp_path / "bad.pkl").write_bytes(b"cposix\nsystem\n(S'touch canary'\ntR.")
    refused = sid("export", "bad.pkl", "--teacher", str(sd_folder), "-o", "other", cwd=tmp_path)
    assert refused.returncode == 3 and "posix.system" in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
    assert not (tmp_path / "canary").exists() and not (tmp_path / "other").exists()


def test_what_is_typed_wins_over_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('teacher = "emoji"\nkappa1 = 1\nkappa4 = 3\n')
    typed = ["--teacher", "emoji-teacher", "--guidance-strategy", "lsg"]
    done = sid("distill", "--config", "own.toml", *typed, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["config"]
    assert "own.toml" not in done.stderr
    other = sid("distill", "--config", "own.toml", *typed[:2], "--objective", "dmd2", "--dry-run", cwd=tmp_path)
    assert "the table [objective] of own.toml is of sid and is not used: kappa1 = 1, kappa4 = 3" in other.stderr
    assert config["teacher"] == "emoji-teacher" and [config["objective"][f"kappa{n}"] for n in (1, 2, 3, 4)] == [2.0] * 4


@pytest.mark.usefixtures("small_batch")
def test_distill_on_the_emoji_world_with_two_steps_leaves_a_student_and_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    small = ["--steps", "2", "--batch-size", "2", "--json"]
    dry = sid("distill", *small, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0 and json.loads(dry.stdout)["config"]["objective"]["kappa1"] == 2.0
    sharded = sid("distill", *small, "--dry-run", "--shard", cwd=tmp_path)
    assert sharded.returncode == 0, sharded.stderr
    assert list(tmp_path.iterdir()) == []
    done = sid("distill", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["student"] == "runs/emoji-teacher-g2/student"
    assert (tmp_path / "runs/emoji-teacher-g2/student/model_index.json").is_file()


def test_a_continued_run_keeps_the_memory_recipe_it_began_with(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('optimizer = "adam8bit"\nfake_lora = 4\nmicro_batch = 3\nkappa1 = 7.0\n')
    asked = ["distill", "-o", "run", "--dry-run", "--json"]
    config = json.loads(sid(*asked, cwd=tmp_path).stdout)["config"]
    assert (config["fake_lora"], config["micro_batch"], config["objective"]["kappa1"]) == (4, 3, 2.0)
    typed = json.loads(sid(*asked, "--memory", "fast", "--micro-batch", "2", cwd=tmp_path).stdout)["config"]
    assert (typed["fake_lora"], typed["micro_batch"]) == (0, 2)


def test_a_training_hides_bitsandbytes_unless_its_optimizer_is_from_there(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('optimizer = "adam8bit"\n')
    for config, settings, needed in ((None, {}, False), (file, {}, True), (file, {"optimizer": "adam"}, False)):
        assert hidden(config, settings) == (() if needed else ("bitsandbytes",))
    assert not hidden(None, {"optimizer": "adam8bit"})


def test_bitsandbytes_tells_errors_but_not_which_kernels_it_lacks() -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert logger.isEnabledFor(logging.ERROR) and not logger.isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_package_is_hidden_only_before_a_library_could_find_it(monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    monkeypatch.setattr(logging, "disable", lambda: None)
    modules = {name: module for name, module in sys.modules.items() if name not in (*IMPORTERS, "some_package")}
    monkeypatch.setattr(sys, "modules", modules | ({"diffusers": sys} if loaded else {}))
    with open_console(False, True, ("", ""), "", ("some_package",)):
        assert ("some_package" in sys.modules) is not loaded


def test_no_installed_library_requires_a_package_that_a_command_hides() -> None:
    hidden = inspect.signature(open_console).parameters["unused"].default
    requires = {
        (library.name, re.split(r"[^\w.-]", requirement)[0].lower())
        for library in distributions()
        for requirement in library.requires or ()
        if "extra ==" not in requirement and library.name != "sid-distill"
    }
    assert hidden and not {pair for pair in requires if pair[1] in hidden}
    assert ("clean-fid", "scipy") in requires, "scikit-learn requires it too: sid sample failed beside it while it was hidden"
