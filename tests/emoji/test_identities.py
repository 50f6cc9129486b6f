"""Identities of the emoji world and their sheets: exact, disjoint, and visible."""

from collections import Counter

import numpy as np
import pytest

from sidcli.emoji import identities, world
from sidcli.emoji.identities import COUNTS, IDENTITIES, Identity
from sidcli.emoji.reader import HEADS
from sidcli.emoji.train_identities import SHARES, panels_at, sheets_at
from sidcli.metrics.reader import ReaderFeatures


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


def test_the_kinds_of_sheets_have_their_shares_of_the_training_and_each_step_as_many_panels() -> None:
    kinds = Counter(panels_at(step) for step in range(1000))
    assert {panels: count / 1000 for panels, count in kinds.items()} == pytest.approx(SHARES, abs=0.01)
    for step in range(30):
        assert sum(len(sheet.panels) for sheet in sheets_at(step, 8)) == 8
