"""The emoji teacher of flow matching: its training, its networks, its students in the stock pipeline, and the benchmark of both."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor, nn

from sidcli.diffusion.path import FlowPath
from sidcli.emoji import fit, models, train_flow, train_identities
from sidcli.emoji import train as train_emoji
from sidcli.emoji.examples import Examples
from sidcli.errors import InputError
from sidcli.models.drawing import Plan
from sidcli.models.kinds import kind_of
from sidcli.models.loading import load
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find
from tests import REPOSITORY
from tests.benchmarks import beside, flow
from tests.inprocess import sid

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"batch": 4, "scenes": 12, "layers": 2, "heads": 2}
PROMPT = "two foxes on a red background"


def train(output: Path, steps: int = 3, **changes: Any) -> Path:
    torch.manual_seed(0)
    train_flow.train_flow(output, steps, **TINY | changes)
    return output / "flow"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("emoji"), lr=0.02)


def apart(folder: Path, plan: Plan | None = None, **call: Any) -> int:
    """The largest difference between an image of sid and that of the stock pipeline with these arguments."""
    model = load(find(str(folder)))
    ours = Sampler(model, CPU).images([PROMPT], [3], plan or plan_for(model))[0]
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = np.asarray(pipe(PROMPT, generator=torch.Generator().manual_seed(3), **call).images[0])
    assert ours.shape == theirs.shape == (64, 64, 3) and ours.std() > 10
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


def test_a_training_writes_a_teacher_of_the_emoji_world_that_the_stock_pipeline_draws(folder: Path) -> None:
    teacher = load(find(str(folder)))
    assert teacher.kind.component == "transformer" and teacher.path == FlowPath(1000, 1.0)
    assert teacher.is_emoji and not teacher.is_student
    assert teacher.card == load(find("emoji-teacher")).card | {"guidance": train_flow.GUIDANCE, "steps_trained": 3}
    assert apart(folder, Plan(3, 2.0), num_inference_steps=3, guidance_scale=2.0, max_sequence_length=1) <= 1
    assert apart(folder, Plan(3, 2.0), num_inference_steps=3, guidance_scale=2.0) > 1


@pytest.mark.parametrize("part", ["flow", "sheets", "teacher-more"])
def test_a_command_that_trained_a_teacher_ends_with_its_folder_and_the_next_command_and_prints_no_noise_of_libraries(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for library in (diffusers.utils.logging, transformers.utils.logging):  # as they are in a new process
        library.set_verbosity_warning()
        library.enable_progress_bar()
    monkeypatch.setattr(train_identities, "draw_sheets", lambda *_: Image.new("RGB", (8, 8)))  # 24 sheets take half a minute
    few = ["--scenes", "4"] if part != "sheets" else []
    monkeypatch.setattr(sys, "argv", ["train", part, "--output", str(tmp_path / "a b"), "--steps", "1", "--batch", "2", *few])
    train_emoji.main()
    said = capfd.readouterr()
    folder = tmp_path / "a b" / part
    assert said.out.splitlines()[-1] == f"{part}: wrote {folder}; next: sid distill --teacher '{folder}'"
    assert said.err == "" and find(str(folder)).path == folder


def test_its_student_is_exported_and_drawn_by_the_stock_pipeline_as_its_card_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", 2, "--batch-size", 2, "--device", "cpu", "--precision", "fp32", "--student-steps", 2)
    assert sid("distill", "--teacher", folder, *options, "-o", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["prompts"]["name"] == "emoji"
    assert sid("export", tmp_path / "run", "--format", "diffusers", "-o", tmp_path / "out") == 0, capsys.readouterr().err
    card = json.loads((tmp_path / "out/sid.json").read_text())
    assert card["world"] == "emoji" and card["call"] == {"guidance_scale": 0, "max_sequence_length": 1}
    assert "guidance_scale=0, max_sequence_length=1)" in (tmp_path / "out/README.md").read_text()
    assert apart(tmp_path / "out", sigmas=[1.0, 0.5], **card["call"]) <= 1


def test_a_resumed_training_ends_with_the_teacher_of_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", 4)
    monkeypatch.setattr(fit, "SAVE_SECONDS", 0.0)
    original = train_flow.velocity_loss

    def stopping(*given: Any) -> fit.Loss:
        loss = original(*given)

        def stops(step: int) -> tuple[Tensor, dict[str, Tensor]]:
            if step == 2:
                raise KeyboardInterrupt
            return loss(step)

        return stops

    monkeypatch.setattr(train_flow, "velocity_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halves", 4)
    monkeypatch.setattr(train_flow, "velocity_loss", original)
    halves = train(tmp_path / "halves", 4)
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (halves / file).read_bytes() == (whole / file).read_bytes()
    with pytest.raises(InputError, match="holds a training with other settings: lr"):
        train(tmp_path / "halves", 4, lr=0.5)


class Exact(nn.Module):
    """A network that knows that all clean latents are 1, and so finds the velocity."""

    def forward(self, x: Tensor, states: Tensor, pooled_projections: Tensor, timestep: Tensor) -> SimpleNamespace:
        self.states, self.pooled, self.t = states, pooled_projections, timestep / 1000
        return SimpleNamespace(sample=(x - 1) / self.t.view(-1, 1, 1, 1))  # x_t - x = t (eps - x)


def test_the_loss_is_that_of_the_velocity_at_logit_normal_times_and_drops_a_tenth_of_the_captions() -> None:
    examples = Examples(torch.ones(7, 4, 2, 2).half(), (torch.ones(7, 25, 2).half(), torch.ones(7, 2).half()))
    net, empty = Exact(), (torch.zeros(1, 25, 2), torch.zeros(1, 2))
    loss = train_flow.velocity_loss(net, FlowPath(), examples, empty, 1000)
    assert float(loss(3)[0]) == pytest.approx(0, abs=1e-4)
    logits = net.t.double().logit()
    assert float(logits.mean()) == pytest.approx(0, abs=0.02) and float(logits.std()) == pytest.approx(1, abs=0.02)
    dropped = net.pooled[:, 0] == 0
    assert 0.07 < float(dropped.float().mean()) < 0.13 and torch.equal(net.states[:, 0, 0] == 0, dropped)
    times = net.t
    loss(3)
    assert torch.equal(net.t, times)


def test_a_new_transformer_is_as_large_as_the_unet_at_most_and_predicts_zero() -> None:
    net = models.new_transformer()
    sizes = {"transformer": net, "unet": models.new_unet()}
    counts = {name: sum(value.numel() for value in network.state_dict().values()) for name, network in sizes.items()}
    assert 2 * counts["transformer"] < 16e6 and counts["transformer"] < counts["unet"]
    cond = {"encoder_hidden_states": torch.randn(2, 25, 136), "pooled_projections": torch.randn(2, 136)}
    assert kind_of(net).component == "transformer"
    assert not net(torch.randn(2, 4, 16, 16), timestep=torch.tensor([20.0, 900.0]), **cond).sample.any()


def test_it_reads_all_states_of_the_shipped_text_encoder_and_its_pooled_output() -> None:
    shipped, teacher = load(find("emoji-teacher")), train_flow.new_teacher(1, 1)
    tokens = models.tokens(shipped.tokenizers[0], [PROMPT, "", "a cat"])
    with torch.no_grad():
        wanted = shipped.text_encoders[0](tokens)
        states, pooled = train_flow.encode_of(teacher)(tokens)
        normalized = teacher.text_encoders[0].text_model.final_layer_norm(states[:, :24, :128])
    torch.testing.assert_close(normalized, wanted.last_hidden_state)
    torch.testing.assert_close(pooled[:, :128], wanted.pooler_output)
    assert not states[:, 24:].any() and not states[:, :, 128:].any() and not pooled[:, 128:].any()


def given(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    values = {"teacher": "emoji-teacher", "steps": 2, "batch_size": 2, "lr": None, "num": 20, "draw_steps": 2}
    values |= {"beside": 1, "minutes": 1.0, "device": "cpu", "precision": "fp32", "only": None}
    return argparse.Namespace(output=tmp_path / "rows.jsonl", runs=tmp_path / "runs", **values | changes)


def test_a_student_is_compared_with_its_start_and_with_the_best_scale_of_the_teacher() -> None:
    rows = [
        {"name": "a", "kind": "teacher", "of": 1, "fid": 12.0},
        {"name": "b", "kind": "teacher", "of": 1, "fid": 10.0},
        {"name": "c", "kind": "untrained", "of": 1, "fid": 100.0},
        {"name": "d", "kind": "untrained", "of": 4, "fid": 80.0},
        {"name": "one", "kind": "student", "of": 1, "fid": 20.0},
        {"name": "four", "kind": "student", "of": 4, "fid": 16.0},
        {"name": "better", "kind": "student", "of": 4, "fid": 15.0},
        {"name": "worse", "kind": "student", "of": 1, "fid": 21.0},
    ]
    found = {result["name"]: result for result in flow.compared(rows)}
    assert [found[name]["good"] for name in ("one", "four", "better", "worse")] == [True, False, True, False]
    assert (found["four"]["below_start"], found["four"]["above_teacher"]) == (5.0, 1.6)
    assert (
        flow.verdict(found["four"]) == "four: 5.0 times below the untrained start, 1.60 times the teacher's best: NOT GOOD ENOUGH"
    )


def test_every_cell_waits_for_one_before_it_and_a_row_of_another_teacher_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [cell.name for cell in flow.CELLS]
    assert len(names) == len(set(names))
    assert all(cell.after in ("", *names[:place]) for place, cell in enumerate(flow.CELLS))
    options, started = given(tmp_path), list[str]()
    rows = [{"name": name, **flow.settings_of(options)} for name in names[:2]]
    rows[1]["teacher"] = "another"
    options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(beside, "run_beside", lambda tasks, *_: (started.extend(task.name for task in tasks) or [], []))
    flow.TABLE.run(options)
    assert started == names[1:]


def test_the_sizes_in_the_documentation_are_those_of_the_networks() -> None:
    page = (REPOSITORY / "docs/emoji.md").read_text(encoding="utf-8")
    for line in flow.sizes().splitlines()[2:]:
        assert line[line.index("|", 1) :] in page
