"""Distances and scores, against closed forms, other libraries, and what they are for: telling worse images from better ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sidcli.data.imagefiles import open_images
from sidcli.data.imagesets import Collection, FileSet
from sidcli.distributed import Share
from sidcli.emoji import world
from sidcli.metrics.catalog import METRICS
from sidcli.metrics.features import EmojiFeatures, InceptionFeatures, resize
from sidcli.metrics.fid import fid, fid_infinity, frechet_distance, statistics
from sidcli.metrics.intervals import mean, share
from sidcli.metrics.kid import kid
from sidcli.metrics.prdc import prdc
from sidcli.progress import silent
from tests.stand_ins import write_inception

CPU = torch.device("cpu")


def test_the_frechet_distance_of_gaussians_equals_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200_000, 2)), rng.normal((3, 0), (2, 1), (200_000, 2))
    # 3^2 from the means, (2 - 1)^2 from the spreads.
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(10.0, rel=0.01)


def test_a_set_is_at_no_distance_from_itself_even_with_fewer_images_than_dimensions() -> None:
    features = np.random.default_rng(2).normal(size=(20, 64))
    assert frechet_distance(statistics(features), statistics(features)) < 1e-6


@pytest.mark.parametrize(("n", "m"), [(20, 200), (200, 20), (20, 30), (64, 65)])
def test_fewer_images_than_dimensions_change_the_way_of_computing_and_not_the_distance(n: int, m: int) -> None:
    rng = np.random.default_rng(7)
    a, b = statistics(rng.normal(size=(n, 64))), statistics(rng.normal(0.3, 2.0, (m, 64)))
    assert (a.factor is not None) == (n <= 64)
    plainly = frechet_distance(replace(a, factor=None), replace(b, factor=None))
    for quick in (False, True):
        assert frechet_distance(a, b, quick) == pytest.approx(plainly, rel=1e-6)
        assert frechet_distance(b, a, quick) == pytest.approx(plainly, rel=1e-6)


def test_images_at_the_networks_size_are_not_resized_and_others_go_through_clean_fids_resizer() -> None:
    from cleanfid.resize import build_resizer

    image = world.render(world.scene(0, 0))
    assert np.array_equal(resize(image, 64), image.astype(np.float32))
    np.testing.assert_array_equal(resize(image, 299), build_resizer("clean")(image))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of 60 photographs each, as it were: scenes of several sizes, the second set with noise."""
    rng, root = np.random.default_rng(3), tmp_path_factory.mktemp("photos")
    for name, strength in (("a", 0), ("b", 40)):
        (root / name).mkdir()
        for index in range(60):
            image = Image.fromarray(world.render(world.scene(len(name) + strength, index)))
            image = image.resize([(320, 240), (240, 320), (299, 299)][index % 3], Image.Resampling.BICUBIC)
            pixels = np.asarray(image) + rng.normal(0, strength, (*image.size[::-1], 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{index:03d}.png")
    return root / "a", root / "b"


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> InceptionFeatures:
    return InceptionFeatures(write_inception(tmp_path_factory.mktemp("nets") / "inception.pt"), CPU)


@pytest.fixture(scope="module")
def seen(folders: tuple[Path, Path], inception: InceptionFeatures) -> list[np.ndarray]:
    """The features of both folders."""
    found = []
    for folder in folders:
        files = open_images(folder)
        collection = Collection(FileSet(files), len(files))
        collection.fill([inception], Share(), silent)
        found.append(collection.features(inception))
    return found


FIRST = 256
"""So many of the 2,048 features are compared with other libraries, whose matrix square root takes the cube of the number."""


def test_the_fid_of_two_folders_equals_clean_fids(
    folders: tuple[Path, Path], inception: InceptionFeatures, seen: list[np.ndarray]
) -> None:
    from cleanfid.fid import compute_fid

    first = frechet_distance(*(statistics(features[:, :FIRST]) for features in seen))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = compute_fid(
                *(str(folder) for folder in folders),
                custom_feat_extractor=lambda images: inception.net(images)[:, :FIRST],
                num_workers=0,
                device=CPU,
                use_dataparallel=False,
                verbose=False,
            )
    except TypeError:
        pytest.skip("clean-fid calls an option that scipy 1.18 removed")
    # Theirs carries the rounding of 200 eigenvalues that are zero; the nuclear norm of both factors has none.
    assert first == pytest.approx(theirs, rel=5e-6)
    a, b = map(statistics, seen)
    ours = frechet_distance(a, b)
    assert a.factor is not None and b.factor is not None
    difference, root = a.mean - b.mean, np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    exact = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root
    assert ours == pytest.approx(exact, rel=1e-9)


def test_fid_and_kid_equal_those_of_torchmetrics_up_to_its_other_resize(
    folders: tuple[Path, Path], inception: InceptionFeatures, seen: list[np.ndarray]
) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Behind(torch.nn.Module):
        """torchmetrics hands over uint8 of any size; here torch resizes, antialiased, where clean-fid lets PIL do it."""

        num_features = FIRST

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return inception.net(
                torch.nn.functional.interpolate(images.float(), (299, 299), mode="bicubic", antialias=True).clamp(0, 255)
            )[:, :FIRST]

    theirs_fid = FrechetInceptionDistance(feature=Behind(), input_img_size=(3, 64, 64))
    theirs_kid = KernelInceptionDistance(feature=Behind(), subsets=1, subset_size=60)
    for folder, real in zip(folders, (False, True), strict=True):
        for file in sorted(folder.iterdir()):
            image = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None]
            theirs_fid.update(image, real=real)
            theirs_kid.update(image, real=real)
    a, b = (features[:, :FIRST] for features in seen)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(float(theirs_fid.compute()), rel=2e-3)
    # float32 inside torchmetrics, and the resize.
    assert kid(b)(a).value == pytest.approx(float(theirs_kid.compute()[0]), rel=2e-3)


def test_the_interval_of_an_fid_is_about_as_wide_as_fids_of_fresh_samples_spread() -> None:
    rng = np.random.default_rng(4)
    reference = statistics(rng.normal(size=(20_000, 8)))
    samples = [rng.normal(0.3, 1.2, (300, 8)) for _ in range(40)]
    spread = np.std([frechet_distance(statistics(sample), reference) for sample in samples], ddof=1)
    claimed = np.mean([fid(sample, reference).half_width / 1.96 for sample in samples[:10]])
    assert 0.8 * spread < claimed < 1.6 * spread


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompt_following", 1.0), ("cp_pf", 0.75), ("concept_preservation", 0.0), ("copy", 1.0), ("diversity", 0.0)],
)
def test_a_mean_keeps_an_interval_where_all_images_have_one_score(name: str, value: float) -> None:
    metric = METRICS[name]
    widths = []
    for count in (4, 400):
        found = mean(value * (1 - 1e-9 * np.arange(count)), name)
        assert metric.low <= found.low <= found.value <= found.high <= metric.high
        assert found.value == pytest.approx(value, abs=1e-6)
        widths.append(found.high - found.low)
    assert widths[0] / (metric.high - metric.low) > 0.02 and widths[1] < widths[0] / 5
    assert mean(np.ones(4), "prompt_following") == share(np.ones(4, bool))
    usual = mean(np.array([1.0, 0.75, 1.0, 0.5]), "prompt_following")
    assert usual.high - usual.value == pytest.approx(1.96 * np.std([1.0, 0.75, 1.0, 0.5], ddof=1) / 2, rel=1e-3)


def test_a_share_keeps_an_interval_where_every_image_is_right() -> None:
    everything = share(np.ones(100, bool))
    assert everything.value == everything.high == 1.0
    assert everything.low == pytest.approx(0.963, abs=1e-3)  # Wilson's, from a table


def test_fid_infinity_is_nearer_to_the_truth_than_the_fid_of_few_images() -> None:
    rng = np.random.default_rng(5)
    reference = statistics(rng.normal(size=(50_000, 16)))
    biases = []
    for _ in range(6):
        few = rng.normal(0.2, 1.0, (400, 16))  # the truth is 16 * 0.2^2 = 0.64
        plain = fid(few, reference)
        limit = fid_infinity(few, reference, plain)
        assert limit.half_width > plain.half_width
        biases.append((plain.value - 0.64, limit.value - 0.64))
    plain_bias, limit_bias = np.mean(biases, 0)
    assert plain_bias > 0.2 and abs(limit_bias) < 0.3 * plain_bias


def test_features_that_are_not_finite_have_no_fid() -> None:
    features = np.random.default_rng(6).normal(size=(30, 4))
    reference = statistics(features)
    broken = features.copy()
    broken[3, 2] = np.nan
    assert np.isnan(fid(broken, reference).value) and np.isnan(fid(features, statistics(broken)).value)


@pytest.fixture(scope="module")
def scenes() -> tuple[list[np.ndarray], EmojiFeatures]:
    """A half of 1200 real scenes, and the network that looks at them."""
    return list(world.render_many(world.FLOOR_SEED, range(0, 1200, 2))), EmojiFeatures()


@pytest.fixture(scope="module")
def halves(scenes: tuple[list[np.ndarray], EmojiFeatures]) -> tuple[np.ndarray, np.ndarray]:
    """The features of that half and of the other."""
    half, look = scenes
    return look(half), look(list(world.render_many(world.FLOOR_SEED, range(1, 1200, 2))))


def noise(image: np.ndarray, strength: float) -> np.ndarray:
    rng = np.random.default_rng(int(image.sum()))
    return (image + rng.normal(0, 60 * strength, image.shape)).clip(0, 255).astype(np.uint8)


def blur(image: np.ndarray, strength: float) -> np.ndarray:
    size = round(64 / (1 + 4 * strength))
    small = Image.fromarray(image).resize((size, size), Image.Resampling.BOX)
    return np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))


def wrong_colors(image: np.ndarray, strength: float) -> np.ndarray:
    return (image * (1 - strength) + image[..., [2, 0, 1]] * strength).astype(np.uint8)


@pytest.mark.parametrize("worse", [noise, blur, wrong_colors])
def test_fid_and_kid_are_near_zero_between_halves_of_real_scenes_and_rise_as_images_get_worse(
    worse: Callable[[np.ndarray, float], np.ndarray],
    scenes: tuple[list[np.ndarray], EmojiFeatures],
    halves: tuple[np.ndarray, np.ndarray],
) -> None:
    (half, look), (good, real) = scenes, halves
    unit = float(np.sqrt((real**2).mean()))
    levels = [good, *(look([worse(image, strength) for image in half]) for strength in (0.25, 1))]
    fids = [fid(features, statistics(real)) for features in levels]
    kids = [kid(real / unit)(features / unit) for features in levels]
    for found in (fids, kids):
        values = [one.value for one in found]
        assert values == sorted(values) and values[-1] > found[0].high, f"{worse.__name__}: {values}"
    assert abs(kids[0].value) < 2 * kids[0].half_width
    assert fids[0].value < 0.3 * fids[-1].value


def test_fid_rises_and_recall_and_coverage_fall_as_nouns_are_dropped(halves: tuple[np.ndarray, np.ndarray]) -> None:
    half, real = halves
    nouns = [world.scene(world.FLOOR_SEED, 2 * index).noun for index in range(600)]
    of_nouns = [half[[world.NOUN_LIST.index(noun) % 10 < 10 - dropped for noun in nouns]] for dropped in (0, 5, 8)]
    # The same number of images each time, so that only what they show changes.
    sets = [features[np.arange(600) % len(features)] for features in of_nouns]
    fids = [fid(features, statistics(real)).value for features in sets]
    neighbors = [prdc(torch.from_numpy(real), torch.from_numpy(features)) for features in of_nouns]
    assert fids == sorted(fids) and fids[1] > 1.2 * fids[0]
    for name in ("recall", "coverage"):
        values = [getattr(found, name).value for found in neighbors]
        assert values == sorted(values, reverse=True) and values[2] < 0.8 * values[0]
    assert neighbors[2].precision.value > 0.9 * neighbors[0].precision.value
