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
