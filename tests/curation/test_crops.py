"""Crops of subjects: the square around what differs from the border, on gray, or the whole image."""

from __future__ import annotations

import numpy as np
import pytest

from sidcli.curation.crops import GRAY, subject
from sidcli.emoji.identities import Portrait, render, sheet
from tests.curation.rendered import noise

RED, WHITE = (200, 30, 30), (250, 250, 250)


def flat(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), RED, np.uint8)


def test_the_crop_is_the_smallest_square_around_the_subject() -> None:
    image = flat(64, 64)
    image[20:30, 10:34] = WHITE
    crop = subject(image)
    assert crop.shape == (24, 24, 3)
    assert (crop[7:17] == WHITE).all() and (crop[:7] == GRAY).all() and (crop[17:] == GRAY).all()


def test_a_square_that_would_leave_the_image_is_moved_or_cut() -> None:
    image = flat(64, 64)
    image[60:, 10:34] = WHITE
    assert subject(image).shape == (24, 24, 3) and (subject(image)[-4:] == WHITE).all()
    wide = flat(20, 64)
    wide[8:12, 10:50] = WHITE
    assert subject(wide).shape == (20, 40, 3)


def test_what_a_subject_encloses_belongs_to_it() -> None:
    image = flat(64, 64)
    image[10:40, 10:40] = WHITE
    image[20:30, 20:30] = RED
    assert (subject(image)[10:20, 10:20] == RED).all()


def test_noise_of_the_background_and_single_pixels_do_not_widen_the_crop() -> None:
    image = flat(64, 64) + np.random.default_rng(0).integers(0, 20, (64, 64, 3), np.uint8)
    image[20:40, 20:40] = WHITE
    image[2, 2] = image[60, 50] = WHITE
    assert subject(image).shape == (20, 20, 3)


@pytest.mark.parametrize("image", [flat(64, 64), noise(0)], ids=["nothing", "no plain border"])
def test_without_a_subject_or_a_plain_border_the_whole_image_is_used(image: np.ndarray) -> None:
    assert subject(image) is image


def test_the_crop_of_a_rendered_panel_is_its_sprite_with_its_outline() -> None:
    def places(panel: Portrait) -> tuple[int, int]:
        return panel.size, subject(render(panel)).shape[0]

    found = [places(sheet(1, index, 1).panels[0]) for index in range(60)]
    assert np.mean([0.6 * size <= side <= size + 8 for size, side in found]) > 0.9
