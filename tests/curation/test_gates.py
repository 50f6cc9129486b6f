"""Gates: structural similarity and cuts by hand and on rendered sheets, and the order of the reasons."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from sidcli.curation.gates import Gates, cut_score
from sidcli.curation.judge import Verdict
from sidcli.emoji.identities import render, render_sheet, sheet
from sidcli.metrics.appearance import LUMA
from sidcli.metrics.ssim import copy_score
from tests.curation.rendered import noise

GATES = Gates(same=0.9, caption=0.2)
GOOD = Verdict(0.9, 0.2)


def flat(height: int, width: int, *color: int) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def test_a_pair_that_passes_every_gate_is_kept_and_a_rejected_one_has_the_first_gate_that_it_fails() -> None:
    assert GATES.rejection(GOOD, copy=0.89, cut=0.8) is None
    assert GATES.rejection(Verdict(0.89, 0.1), copy=1.0, cut=0.0) == "same"
    assert GATES.rejection(Verdict(0.9, 0.19), copy=1.0, cut=0.0) == "caption"
    assert GATES.rejection(GOOD, copy=0.9, cut=0.0) == "copy"
    assert GATES.rejection(GOOD, copy=0.5, cut=0.79) == "cut"
    assert replace(GATES, copy=1.0, cut=0.0).rejection(GOOD, copy=0.95, cut=0.0) is None


def test_a_score_that_is_not_a_number_is_rejected() -> None:
    nothing = float("nan")
    assert GATES.rejection(Verdict(nothing, 1.0), 0.0, 1.0) == "same"
    assert GATES.rejection(Verdict(1.0, nothing), 0.0, 1.0) == "caption"
    assert GATES.rejection(GOOD, nothing, 1.0) == "copy"
    assert GATES.rejection(GOOD, 0.0, nothing) == "cut"


def test_the_copy_score_is_the_structural_similarity_of_another_implementation() -> None:
    first = noise(0, 40, 52)
    second = np.clip(first.astype(int) + np.random.default_rng(1).integers(-60, 60, first.shape), 0, 255).astype(np.uint8)
    bright = [torch.from_numpy(image.astype(np.float32) @ LUMA)[None, None] for image in (first, second)]
    # torchmetrics pads with reflections, averages over the padded part too, and computes in float32: compare inside of the border.
    _, whole = structural_similarity_index_measure(*bright, data_range=255.0, return_full_image=True)
    assert copy_score(first, second) == pytest.approx(float(whole[..., 5:-5, 5:-5].mean()), abs=1e-4)


def test_the_copy_score_is_1_for_equal_images_and_low_for_two_renderings_of_one_subject() -> None:
    panels = [render(panel) for index in range(12) for panel in sheet(3, index, 2, broken=0.0).panels]
    assert all(copy_score(panel, panel) == pytest.approx(1.0) for panel in panels[:4])
    assert max(copy_score(*panels[start : start + 2]) for start in range(0, 24, 2)) < 0.6
    gray, white = flat(32, 32, 90, 90, 90), flat(32, 32, 255, 255, 255)
    c1 = (0.01 * 255) ** 2
    assert copy_score(gray, white) == pytest.approx((2 * 90 * 255 + c1) / (90**2 + 255**2 + c1), abs=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_two_plain_backgrounds_that_meet_are_a_good_cut_and_one_that_continues_is_a_bad_one(axis: int) -> None:
    red, blue = flat(64, 64, 200, 30, 30), flat(64, 64, 30, 30, 200)
    assert cut_score(np.concatenate([red, blue], axis), 64, axis) == 1.0
    assert cut_score(np.concatenate([red, red], axis), 64, axis) == 0.0
    ramp = np.linspace(0, 255, 128).astype(np.uint8)
    shades = np.broadcast_to(ramp[:, None, None] if axis == 0 else ramp[None, :, None], (128, 128, 3))
    assert cut_score(shades, 64, axis) == 0.0


def test_a_subject_that_crosses_the_cut_is_a_bad_cut_where_it_crosses() -> None:
    sheet_of_two = np.concatenate([flat(64, 64, 200, 30, 30), flat(64, 64, 30, 30, 200)], 1)
    sheet_of_two[16:48, 40:90] = 255
    assert cut_score(sheet_of_two, 64, 1) == 0.5
    stripes = np.where(np.arange(32) // 5 % 2, 255, 0).astype(np.uint8)
    sheet_of_two[16:48, 40:90] = stripes[:, None, None]
    assert cut_score(sheet_of_two, 64, 1) == 0.5
    stretched = np.repeat(sheet_of_two, 8, 0).repeat(8, 1)  # and 512 pixels wide
    assert cut_score(stretched, 512, 1) == 0.5


def test_rendered_sheets_pass_at_the_default_threshold_and_wrong_cuts_of_them_do_not() -> None:
    least = Gates(0, 0).cut
    pairs = [render_sheet(sheet(3, index, 2)) for index in range(40)]
    singles = [render(sheet(4, index, 1).panels[0]) for index in range(40)]
    fours = [render_sheet(sheet(5, index, 4)) for index in range(10)]
    assert min(cut_score(image, 64, 1) for image in pairs) >= least
    assert min(cut_score(image[rows], 64, 1) for image in fours for rows in (slice(64), slice(64, 128))) >= least
    assert min(cut_score(image[:, columns], 64, 0) for image in fours for columns in (slice(64), slice(64, 128))) >= least
    assert max(cut_score(image, 32, axis) for image in singles for axis in (0, 1)) < least
    assert max(cut_score(image, 64 + 10, 1) for image in pairs) < least


def test_bands_grow_with_the_panels_so_that_a_blurred_cut_of_a_large_sheet_is_seen() -> None:
    step = np.clip((np.arange(1024) - 502) / 20, 0, 1) * 60  # over 20 pixels
    image = np.broadcast_to(step.astype(np.uint8)[None, :, None], (64, 1024, 3))
    assert cut_score(image, 512, 1) == 1.0 and cut_score(image[:, 512 - 64 : 512 + 64], 64, 1) == 0.0
