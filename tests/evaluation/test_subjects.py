"""The protocol of models that draw the subject of a reference image of the emoji world."""

from pathlib import Path

import numpy as np
import pytest

from sidcli import api
from sidcli.emoji import identities
from sidcli.errors import InputError, UsageError
from sidcli.formats.diffusers_folder import write_student
from sidcli.metrics.ssim import copy_score
from sidcli.models.loading import load
from sidcli.models.reference import LAYOUTS
from sidcli.models.sources import find
from sidcli.models.unet import UNET
from sidcli.settings import preset_for

SILENT = api.SILENT


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The emoji teacher with untrained weights for a reference."""
    teacher = load(find("emoji-teacher"))
    UNET.take_reference(teacher.denoiser, LAYOUTS["channels"])
    write_student(tmp_path / "model", teacher, {"kind": "teacher", "world": "emoji", "guidance": 1.0})
    return tmp_path / "model"


def test_a_model_with_a_reference_is_measured_beside_the_true_images(model: Path) -> None:
    outcome = api.evaluate(str(model), num=12, steps=2, listener=SILENT)
    assert outcome is not None and outcome.protocol == "emoji-subjects"
    real, drawn = outcome.rows
    assert set(drawn.metrics) == {"identity", "subject_text", "copy"}
    assert real.metrics["identity"].value > 0.8 and real.metrics["subject_text"].value > 0.9
    assert drawn.metrics["identity"].value < 0.3, "it has not seen the reference"
    pairs = [identities.unknown(index).panels for index in range(12)]
    expected = np.mean([copy_score(identities.render(two), identities.render(one)) for one, two in pairs])
    assert real.metrics["copy"].value == pytest.approx(expected)


def test_sheets_of_unknown_identities_are_in_no_training() -> None:
    for index in range(50):
        one, two = identities.unknown(index).panels
        assert one.identity == two.identity and one.color != two.color
        assert identities.use_of(one.noun, one.identity) == "eval"
        panels = identities.sheet(1, index, 2).panels
        assert identities.use_of(panels[0].noun, panels[0].identity) == "train"


def test_a_model_that_takes_no_reference_draws_from_the_prompt_alone() -> None:
    """It is the chance level of the identity."""
    outcome = api.evaluate("emoji", protocol="emoji-subjects", num=12, listener=SILENT)
    assert outcome is not None
    drawn = outcome.rows[-1]
    assert drawn.sampling.endswith(", from the prompt alone")
    assert drawn.metrics["subject_text"].value > 0.5 and drawn.metrics["identity"].value < 0.3


def test_models_are_refused_by_a_protocol_that_does_not_fit(model: Path) -> None:
    with pytest.raises(InputError, match="needs a reference image, and the protocol emoji gives none"):
        api.evaluate(str(model), protocol="emoji", num=12, listener=SILENT)
    with pytest.raises(UsageError, match="identity needs --protocol emoji-subjects"):
        api.evaluate("emoji", ["identity"], num=12, listener=SILENT)


def test_a_run_of_the_emoji_world_has_its_preset_as_a_teacher(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    model.rename(tmp_path / "run" / "student")
    assert preset_for(str(tmp_path / "run")) == preset_for(str(tmp_path / "run" / "student")) == "emoji"
    assert preset_for(str(tmp_path)) == "sd15"
