import numpy as np
import pytest
import torch

from sidcli.emoji import world
from sidcli.metrics.features import EmojiExtractor, extract, resize, scene_statistics
from sidcli.metrics.fid import frechet_distance, statistics


def test_the_frechet_distance_of_gaussians_equals_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200_000, 2)), rng.normal((3, 0), (2, 1), (200_000, 2))
    # 3^2 from the means, (2 - 1)^2 from the spreads.
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(10.0, rel=0.01)


def test_the_frechet_distance_equals_clean_fid() -> None:
    fid = pytest.importorskip("cleanfid.fid")
    rng = np.random.default_rng(1)
    a, b = (statistics(rng.normal(size=(300, 16)) @ rng.normal(size=(16, 16))) for _ in range(2))
    try:
        theirs = fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    except TypeError:
        pytest.skip("clean-fid calls an option that scipy 1.18 removed")
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)


def test_a_set_is_at_no_distance_from_itself_even_with_fewer_images_than_dimensions() -> None:
    features = np.random.default_rng(2).normal(size=(20, 64))
    assert frechet_distance(statistics(features), statistics(features)) < 1e-6


def test_images_at_the_extractors_size_are_not_resized_and_others_go_through_clean_fids_resizer() -> None:
    from cleanfid.resize import build_resizer

    images = torch.from_numpy(world.render_many(0, range(2)))
    assert torch.equal(resize(images, 64), images.permute(0, 3, 1, 2).float())
    theirs = build_resizer("clean")(images[0].numpy()).transpose(2, 0, 1)
    np.testing.assert_array_equal(resize(images, 299)[0].numpy(), theirs)


def test_the_emoji_fid_is_small_between_scenes_and_grows_with_noise_blur_wrong_colours_and_missing_nouns() -> None:
    extractor = EmojiExtractor()
    reference = scene_statistics(extractor, world.REFERENCE_SEED, 600)
    scenes = torch.from_numpy(world.render_many(world.FLOOR_SEED, range(600)))

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(statistics(extract(extractor, images)), reference)

    floor = distance(scenes)
    noise = (scenes.float() + 30 * torch.randn(scenes.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    small = scenes.permute(0, 3, 1, 2).float()
    blur = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(small, 4), scale_factor=4).permute(0, 2, 3, 1).byte()
    few = torch.stack([scenes[index % 60] for index in range(600)])
    for worse in (noise, blur, scenes.flip(3), few):
        assert distance(worse) > 1.5 * floor


def test_scene_statistics_are_cached_and_come_back_the_same() -> None:
    extractor = EmojiExtractor()
    first, second = (scene_statistics(extractor, 0, 50) for _ in range(2))
    np.testing.assert_array_equal(first.covariance, second.covariance)
    assert second.n == 50
