"""Training of the emoji models: captions and scenes for further training, schedules, and resumption."""

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sidcli.emoji import examples, fit, train, world
from sidcli.errors import InputError, SidError
from sidcli.models.loading import load
from sidcli.models.sources import Source, find


def test_a_third_of_the_captions_are_nouns_alone_and_all_name_the_noun_of_their_scene() -> None:
    made = [examples.example(index, 1 / 3) for index in range(900)]
    bare = [(scene, text) for scene, text in made if text in {world.bare_caption(n) for n in range(152)}]
    assert 300 <= len(bare) <= 320  # the captions of the other scenes are seldom a noun with its article
    for scene, text in made:
        assert scene.noun in text or world.plural(scene.noun) in text


def test_a_share_of_no_bare_nouns_leaves_the_captions_of_the_first_training() -> None:
    for index in range(50):
        scene = world.scene(world.TEACHER_SEED, index)
        assert examples.example(index, 0.0) == (scene, examples.loose_caption(scene, index).text)


def test_a_bare_noun_has_each_of_its_backgrounds_equally_often() -> None:
    count = len(world.NOUN_LIST)
    for number in (0, 7, 151):
        noun = world.NOUN_LIST[number]
        allowed = {color for color in world.COLOR_LIST if (noun, color) not in world.HELD_OUT_PAIRS}
        scenes = [examples.bare_scene(number + count * turn) for turn in range(3 * len(allowed))]
        assert {scene.noun for scene in scenes} == {noun}
        assert Counter(scene.color for scene in scenes) == dict.fromkeys(allowed, 3)


def fit_of(folder: Path, steps: int = 8, seconds: float | None = None, fails_at: int | None = None) -> fit.Fit:
    """A fit of a linear layer to random points, whose loss fails at one step."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == fails_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        error = (net(x) - x.sum(1, keepdim=True)).square().mean()
        return error, {"loss": error.detach()}

    return fit.Fit("line", net, loss, folder, steps, 0.1, seconds=seconds)


def test_a_resumed_fit_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = fit_of(tmp_path / "whole").run()
    stopped = fit_of(tmp_path / "parts", fails_at=5)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    stopped.save()
    resumed = fit_of(tmp_path / "parts")
    assert resumed.step == 5
    for one, other in zip(whole.parameters(), resumed.run().parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_fit_for_a_given_time_warms_up_and_ends_near_zero_and_a_resumed_one_has_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(clock)))
    first = fit_of(tmp_path, steps=1, seconds=200, fails_at=20)
    assert first.rate() == pytest.approx(0.1 / 20 / fit.WARM_STEPS)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    first.save()
    rest = fit_of(tmp_path, steps=1, seconds=200)
    assert rest.spent == first.spent > 20
    assert rest.rate() == pytest.approx(0.1 * (rest.step + 1) / fit.WARM_STEPS), "the warm-up of the time had ended"
    rest.run()
    assert 200 <= rest.spent < 205
    assert rest.step < 200 and rest.optimizer.param_groups[0]["lr"] < 0.005
    steps = rest.step
    ended = fit_of(tmp_path, steps=1, seconds=200)
    ended.run()
    assert ended.step == steps


def test_a_fit_whose_loss_is_not_finite_stops_and_names_the_step(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return net(torch.ones(1)).sum() * (math.nan if step > 60 else 1.0), {}

    with pytest.raises(SidError, match="not finite at step 100"):
        fit.Fit("line", net, loss, tmp_path, 120, 0.1).run()


class Exact(nn.Module):
    """A network that knows that all latents are zero, and so finds the noise."""

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> SimpleNamespace:
        a = train.models.new_scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
        self.seen = states
        return SimpleNamespace(sample=x / (1 - a).sqrt())


def test_the_loss_is_that_of_the_noise_and_drops_a_tenth_of_the_captions() -> None:
    zeros = examples.Examples(torch.zeros(7, 4, 2, 2).half(), (torch.ones(7, 24, 2).half(),))
    net = Exact()
    loss = train.denoising_loss(net, zeros, (torch.zeros(1, 24, 2),), 500, "test")
    assert float(loss(3)[0]) == pytest.approx(0, abs=1e-6)
    first = net.seen
    assert 0.05 < float((first == 0).float().mean()) < 0.15
    loss(3)
    assert torch.equal(net.seen, first)
    loss(4)
    assert not torch.equal(net.seen, first)


def test_a_teacher_that_is_trained_further_starts_at_the_shipped_weights_and_keeps_the_other_networks(tmp_path: Path) -> None:
    train.train_teacher_further(tmp_path, 1, batch=2, scenes=6)
    shipped = load(find("emoji-teacher"))
    more = load(Source("more", tmp_path / "teacher-more", "here"))
    assert more.card == shipped.card | {"steps_trained": shipped.card["steps_trained"] + 1}
    moved = [float((a - b).abs().max()) for a, b in zip(more.denoiser.parameters(), shipped.denoiser.parameters(), strict=True)]
    assert 0 < max(moved) < 2e-3 and all(math.isfinite(distance) for distance in moved)
    for one, other in ((more.vae, shipped.vae), (more.text_encoders[0], shipped.text_encoders[0])):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_training_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    fit.check_same(tmp_path / "settings.json", {"lr": 1.0, "scenes": 6})
    fit.check_same(tmp_path / "settings.json", {"lr": 1.0, "scenes": 6})
    with pytest.raises(InputError, match="holds a training with other settings: scenes: 6 -> 8"):
        fit.check_same(tmp_path / "settings.json", {"lr": 1.0, "scenes": 8})


def test_only_a_teacher_of_the_emoji_world_is_trained_further(sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sd is not a teacher of the emoji world that predicts epsilon"):
        train.train_teacher_further(tmp_path, 1, start=sd_folder, scenes=6)
