"""Saturation, contrast and diversity of images against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sidcli.metrics.appearance import contrast, diversity, saturation


def test_saturation_is_the_distance_between_the_channels() -> None:
    gray, red = np.full((4, 4, 3), 90, np.uint8), np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert saturation([gray]) == 0 and saturation([red]) == 1 and saturation([gray, red]) == pytest.approx(0.5)


def test_contrast_is_the_deviation_of_the_brightness_within_images_and_not_between_them() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    halves = np.concatenate([black, white])
    assert contrast([black, white]) == pytest.approx(0, abs=1e-6) and contrast([halves]) == pytest.approx(0.5)


def test_diversity_is_the_mean_cosine_distance_of_all_pairs() -> None:
    same, angles = np.eye(3)[[0, 0, 0]], np.eye(3)
    assert diversity(same) == pytest.approx(0) and diversity(angles) == pytest.approx(1)
    assert diversity(np.eye(3)[[0, 0, 1]]) == pytest.approx(2 / 3)
