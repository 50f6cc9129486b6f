"""Identities of the emoji world and their sheets: exact, disjoint, and visible."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sidcli.emoji import fit, identities, train_identities, world
from sidcli.emoji.identities import COUNTS, IDENTITIES, Identity
from sidcli.emoji.reader import HEADS
from sidcli.emoji.train_identities import SHARES, panels_at, sheets_at
from sidcli.metrics.reader import ReaderFeatures
from sidcli.models.loading import load
from sidcli.models.sources import find


def test_every_noun_has_120_identities_in_three_disjoint_sets() -> None:
    assert len(set(IDENTITIES)) == 120 == np.prod(COUNTS)
    for noun in ("cat", "key"):
        sets = [identities.identities(noun, use) for use in ("train", "judge", "eval")]
        assert sorted(identity for one in sets for identity in one) == sorted(IDENTITIES)
        assert len(sets[0]) > 80 and min(map(len, sets)) >= 5


def test_a_known_share_of_the_sheets_shows_another_identity_in_a_panel() -> None:
    sheets = [identities.sheet(1, index, panels) for panels in (2, 4) for index in range(500)]
    for sheet in sheets:
        shown = {panel.identity for panel in sheet.panels}
        assert sheet.is_broken == (len(shown) > 1)
        assert len({panel.noun for panel in sheet.panels}) == 1 and len(set(sheet.colors)) == len(sheet.panels)
    assert np.mean([sheet.is_broken for sheet in sheets]) == pytest.approx(identities.BROKEN, abs=0.05)
    assert not any(identities.sheet(1, index, 2, broken=0.0).is_broken for index in range(50))


def test_captions_of_sheets_name_all_backgrounds_and_no_identity() -> None:
    assert identities.sheet_caption("key", ("red", "blue")) == "two of the same key, on red, on blue"
    assert identities.sheet_caption("ox", ("white",)) == "an ox on a white background"
    for index in range(50):
        sheet = identities.sheet(1, index, 4)
        text = identities.sheet_caption(sheet.noun, sheet.colors)
        assert [text.index(f"on {color}") for color in sheet.colors] == sorted(text.index(f"on {color}") for color in sheet.colors)


def test_a_sheet_is_its_panels_side_by_side_and_each_attribute_changes_the_image() -> None:
    sheet = identities.sheet(3, 0, 4)
    image = identities.render_sheet(sheet)
    assert image.shape == (128, 128, 3)
    assert np.array_equal(image[64:, :64], identities.render(sheet.panels[2]))
    panel = identities.Portrait("cat", Identity(0, 0, 0), "gray", 40, 10, 12, False, 1.0)
    pictures = [identities.render(panel)]
    for other in (Identity(4, 0, 0), Identity(0, 3, 0), Identity(0, 0, 3)):
        pictures.append(identities.render(identities.Portrait("cat", other, "gray", 40, 10, 12, False, 1.0)))
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_the_shipped_reader_sees_the_identity_of_true_images() -> None:
    sheets = [identities.unknown(index) for index in range(100)]
    seen = ReaderFeatures()([identities.render(sheet.panels[0]) for sheet in sheets])
    assert seen.shape == (100, len(HEADS))
    wanted = [
        (world.NOUN_LIST.index(one.noun), world.COLOR_LIST.index(one.color), *one.identity) for one in (s.panels[0] for s in sheets)
    ]
    right = seen == np.array(wanted)
    assert (right.mean(0) > 0.9).all()


def test_a_training_of_sheets_writes_a_teacher_and_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_identities, "draw_sheets", lambda *_: Image.new("RGB", (4, 4)))
    monkeypatch.setattr(fit, "learning_rate", lambda *_: 1e-3)
    train_identities.train_sheets(tmp_path / "once", 3, batch=4)
    for steps in (2, 3):
        train_identities.train_sheets(tmp_path / "twice", steps, batch=4)
    one, two = (load_file(tmp_path / name / "sheets.state.safetensors") for name in ("once", "twice"))
    assert int(one["step"]) == 3 and all(torch.equal(one[name], two[name]) for name in one if name != "spent")
    (line,) = (tmp_path / "once" / "sheets.log.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["weighted_2"] < record["mse"] < 2.0, "means of the three steps"
    model, shipped = load(find(str(tmp_path / "once" / "sheets"))), load(find("emoji-teacher"))
    assert model.is_emoji and not model.is_student and model.card["sheets"] is True
    for trained, before in ((model.denoiser, shipped.denoiser), (model.text_encoders[0], shipped.text_encoders[0])):
        assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))


def test_the_kinds_of_sheets_have_their_shares_of_the_training_and_each_step_as_many_panels() -> None:
    kinds = Counter(panels_at(step) for step in range(1000))
    assert {panels: count / 1000 for panels, count in kinds.items()} == pytest.approx(SHARES, abs=0.01)
    for step in range(30):
        assert sum(len(sheet.panels) for sheet in sheets_at(step, 8)) == 8
