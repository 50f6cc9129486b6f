"""The statistics of the emoji world's reference that ship with the package stand in for its 10,000 scenes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sidcli.data.imagesets import Collection, SceneSet
from sidcli.distributed import Distributed
from sidcli.emoji import world
from sidcli.evaluation import emoji_reference
from sidcli.evaluation.candidates import Candidate
from sidcli.evaluation.protocols import Networks, emoji
from sidcli.evaluation.scores import Evaluation
from sidcli.progress import Silence

CPU = torch.device("cpu")
SCENES = 10_000


def test_the_shipped_statistics_are_those_of_the_shipped_classifier_and_scenes() -> None:
    shipped = emoji_reference.shipped(SCENES)
    assert shipped is not None, "they are of an older classifier or of other scenes: python -m sidcli.evaluation.emoji_reference"
    some = emoji_reference.compute(600)
    error = np.sqrt(np.diag(shipped.covariance) / 600)
    assert np.all(np.abs(some.mean - shipped.mean) < 5 * error)
    assert np.allclose(np.diag(some.covariance), np.diag(shipped.covariance), rtol=0.5)


def test_statistics_of_other_scenes_or_of_another_classifier_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert emoji_reference.shipped(SCENES - 1) is None
    monkeypatch.setattr(world, "digest", lambda: "another world")
    assert emoji_reference.shipped(SCENES) is None


def test_the_fid_needs_no_image_of_the_reference_and_is_that_of_its_features() -> None:
    scenes = Candidate("scenes", "not drawn", SceneSet(world.PROMPT_SEED))
    protocol = replace(emoji(Networks(CPU, Silence())), statistics=emoji_reference.compute(300))
    protocol = replace(protocol, reference=Collection(SceneSet(world.REFERENCE_SEED), 300))

    def measured(metrics: list[str]) -> Evaluation:
        return Evaluation(protocol, [scenes], metrics, 100, Distributed(CPU))

    quick, whole = measured(["fid"]), measured(["fid", "kid"])
    assert quick.reference is None and whole.reference is not None
    for one in (quick, whole):
        one.fill(Silence())
    values = [one.rows(Silence())[0].metrics["fid"].value for one in (quick, whole)]
    protocol = replace(protocol, statistics=None)
    computed = measured(["fid"])
    computed.fill(Silence())
    values.append(computed.rows(Silence())[0].metrics["fid"].value)
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


@pytest.mark.soak
def test_the_shipped_statistics_are_computed_from_all_scenes() -> None:
    shipped, found = emoji_reference.shipped(SCENES), emoji_reference.compute(SCENES)
    assert shipped is not None
    assert np.allclose(found.mean, shipped.mean, atol=1e-4) and np.allclose(found.covariance, shipped.covariance, atol=1e-4)
