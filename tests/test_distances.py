"""KID and precision / recall / density / coverage against implementations that follow the definitions word by word."""

import numpy as np
import pytest
import torch

from sidcli.metrics import prdc as rooms
from sidcli.metrics.kid import kid, squared_mmd
from sidcli.metrics.prdc import prdc


def features(seed: int, count: int, shift: float = 0.0, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, width))


def test_the_squared_mmd_is_the_double_sum_of_its_definition() -> None:
    x, y = features(0, 7), features(1, 7, 0.5)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / (7 * 6)
    across = sum(kernel(a, b) for a in x for b in y) / 49
    assert squared_mmd(x, y) == pytest.approx(within - 2 * across, rel=1e-12)


def test_the_kid_of_one_law_is_nothing_within_its_spread_and_of_two_laws_is_not() -> None:
    same = kid(features(0, 400), features(1, 400), subsets=50, size=100)
    other = kid(features(0, 400), features(1, 400, 0.5), subsets=50, size=100)
    assert abs(same.mean) < 2 * same.deviation and other.mean > 4 * other.deviation
    assert kid(features(0, 400), features(1, 400), subsets=50, size=100) == same, "the seed decides the subsets"
    assert kid(features(0, 30), features(1, 400), subsets=3, size=100).size == 30


def by_definition(real: np.ndarray, drawn: np.ndarray, k: int) -> list[float]:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(images: np.ndarray, index: int) -> float:
        return sorted(distance(images[index], other) for position, other in enumerate(images) if position != index)[k - 1]

    real_radii = [radius(real, index) for index in range(len(real))]
    drawn_radii = [radius(drawn, index) for index in range(len(drawn))]
    near_real = [[distance(image, other) < limit for other, limit in zip(real, real_radii, strict=True)] for image in drawn]
    near_drawn = [[distance(image, other) < limit for other, limit in zip(drawn, drawn_radii, strict=True)] for image in real]
    covered = [min(distance(image, other) for other in drawn) < limit for image, limit in zip(real, real_radii, strict=True)]
    return [
        np.mean([any(row) for row in near_real]),
        np.mean([any(row) for row in near_drawn]),
        np.sum(near_real) / (k * len(drawn)),
        np.mean(covered),
    ]


@pytest.mark.parametrize("chunk", [1000, 7])
def test_precision_recall_density_and_coverage_follow_their_definitions(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "CHUNK", chunk)
    real, drawn = features(0, 40), features(1, 30, 0.7)
    found = prdc(torch.from_numpy(real), torch.from_numpy(drawn), 3)
    assert list(vars(found).values()) == pytest.approx(by_definition(real, drawn, 3))
    assert 0 < found.recall < 1 and 0 < found.precision <= 1


def test_recall_and_coverage_fall_when_modes_are_dropped_and_precision_does_not() -> None:
    centres = np.eye(6) * 20
    real = np.concatenate([features(index, 60) + centre for index, centre in enumerate(centres)])
    drawn = np.concatenate([features(10 + index, 60) + centre for index, centre in enumerate(centres)])
    everything, half = (prdc(torch.from_numpy(real), torch.from_numpy(images)) for images in (drawn, drawn[:180]))
    assert half.recall < 0.6 * everything.recall and half.coverage < 0.6 * everything.coverage
    assert half.precision > 0.9 * everything.precision


def test_too_few_images_for_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="5 images have no 5 neighbours"):
        prdc(torch.rand(5, 3), torch.rand(50, 3))
