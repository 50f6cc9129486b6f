import numpy as np
import pytest
import torch

from sidcli import randomness


def test_a_draw_depends_on_all_four_of_its_coordinates_and_on_nothing_else() -> None:
    here = randomness.key(1, "noise", 2, 3)
    assert here == randomness.key(1, "noise", 2, 3)
    others = {
        randomness.key(0, "noise", 2, 3),
        randomness.key(1, "latent", 2, 3),
        randomness.key(1, "noise", 0, 3),
        randomness.key(1, "noise", 2, 0),
    }
    assert len(others | {here}) == 5
    assert 0 <= here < 2**63


def test_a_row_of_noise_is_the_same_in_every_batch_it_is_drawn_in() -> None:
    whole = randomness.normal((2, 3), 0, "noise", 5, range(8))
    torch.randn(100)  # somebody else's draw in between
    assert torch.equal(whole[5:7], randomness.normal((2, 3), 0, "noise", 5, range(5, 7)))


def test_integers_stay_below_their_upper_bound_and_reach_both_ends() -> None:
    drawn = randomness.integers(3, 6, 0, "t", 0, range(200))
    assert sorted(set(drawn.tolist())) == [3, 4, 5]


@pytest.mark.parametrize("shape", [(1,), (2,), (15,), (16,), (17,), (1000,), (4, 1, 2), (4, 16, 16), (3, 40, 50)])
def test_noise_without_torch_is_that_of_torch(shape: tuple[int, ...]) -> None:
    for seed in (0, 1, 5, 2**32 - 1, 2**32 + 1, 2**62, *range(1000, 1100)):
        wanted = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
        found = randomness.torch_noise(shape, seed)
        assert found.dtype == np.float32 and found.shape == shape
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert np.array_equal(found, wanted)
        assert np.abs(found - wanted).max() < 3e-6
