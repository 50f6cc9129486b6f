"""KID and precision / recall / density / coverage against implementations that follow the definitions word by word."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sidcli.metrics import kid as kernels
from sidcli.metrics import prdc as rooms
from sidcli.metrics.kid import cmmd, kid
from sidcli.metrics.prdc import prdc


def features(seed: int, count: int, shift: float = 0.0, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, width))


def by_pairs(x: np.ndarray, y: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], float], selves: bool) -> float:
    def within(z: np.ndarray) -> float:
        return float(np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if selves or i != j]))

    return within(x) + within(y) - 2 * float(np.mean([kernel(a, b) for a in x for b in y]))


def cubic(a: np.ndarray, b: np.ndarray) -> float:
    return float((a @ b / len(a) + 1) ** 3)


def gaussian(a: np.ndarray, b: np.ndarray) -> float:
    return float(1000 * np.exp(-((a - b) ** 2).sum() / (2 * 10**2)))


def jackknifed(x: np.ndarray, value: Callable[[np.ndarray], float]) -> float:
    left_out = np.array([value(np.delete(x, index, 0)) for index in range(len(x))])
    return float(1.959964 * ((len(x) - 1) / len(x) * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5)


@pytest.mark.parametrize("chunk", [1000, 3])
def test_kid_and_its_interval_follow_their_definitions(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    x, y = features(0, 7), features(1, 9, 0.5)
    found = kid(y)(x)
    assert found.value == pytest.approx(by_pairs(x, y, cubic, selves=False), rel=1e-10)
    assert found.half_width == pytest.approx(jackknifed(x, lambda some: by_pairs(some, y, cubic, selves=False)), rel=1e-8)


def test_cmmd_and_its_interval_follow_their_definitions() -> None:
    x, y = (sample / np.linalg.norm(sample, axis=1, keepdims=True) for sample in (features(0, 7), features(1, 9, 0.5)))
    found = cmmd(y)(x)
    assert found.value == pytest.approx(by_pairs(x, y, gaussian, selves=True), rel=1e-8)
    assert found.half_width == pytest.approx(jackknifed(x, lambda some: by_pairs(some, y, gaussian, selves=True)), rel=1e-6)


def test_the_kid_of_one_law_is_nothing_within_its_interval_and_of_two_laws_is_not() -> None:
    same, other = kid(features(1, 400))(features(0, 400)), kid(features(1, 400, 0.5))(features(0, 400))
    assert same.low < 0 < same.high and other.low > 0


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
    assert [one.value for one in vars(found).values()] == pytest.approx(by_definition(real, drawn, 3))
    assert 0 < found.recall.value < 1 and found.precision.low < found.precision.value <= 1


def test_recall_and_coverage_fall_when_modes_are_dropped_and_precision_does_not() -> None:
    centers = np.eye(6) * 20
    real = np.concatenate([features(index, 60) + center for index, center in enumerate(centers)])
    drawn = np.concatenate([features(10 + index, 60) + center for index, center in enumerate(centers)])
    everything, half = (prdc(torch.from_numpy(real), torch.from_numpy(images)) for images in (drawn, drawn[:180]))
    assert half.recall.high < 0.6 * everything.recall.value and half.coverage.high < 0.6 * everything.coverage.value
    assert half.precision.value > 0.9 * everything.precision.value


def test_too_few_images_for_neighbors_are_refused() -> None:
    with pytest.raises(ValueError, match="5 images have no 5 neighbors"):
        prdc(torch.rand(5, 3), torch.rand(50, 3))
