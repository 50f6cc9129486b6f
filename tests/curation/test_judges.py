"""Judges that compute: features of the teacher, CLIP, DINOv2 and the oracle, on tiny networks and on rendered panels."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sidcli.curation import clip, features, open_judge, oracle
from sidcli.curation.agreement import agreement, auc
from sidcli.curation.clip import ClipJudge
from sidcli.curation.crops import subject
from sidcli.curation.features import FeaturesJudge, Relevance
from sidcli.curation.judge import Judge, Pair
from sidcli.curation.oracle import OracleJudge
from sidcli.emoji import identities, world
from sidcli.emoji.reader import Reader
from sidcli.emoji.world import COLOR_LIST, NOUN_LIST
from sidcli.errors import InputError, UsageError
from sidcli.metrics.clip import Clip
from sidcli.metrics.features import DinoFeatures
from sidcli.models.loading import Model, load
from sidcli.models.sampler import Sampler
from sidcli.models.sources import find
from sidcli.randomness import normal
from tests import tiny_sd3
from tests.curation.rendered import noise_pair, rendered

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def emoji() -> Model:
    return load(find("emoji-teacher"))


def scores(judge: Judge, pairs: list[Pair]) -> np.ndarray:
    """The scores [pairs, 2] of a judge."""
    return np.array([(verdict.same, verdict.caption) for verdict in judge.judge(pairs)])


# The teacher


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_relevance_is_how_much_the_caption_improves_the_predicted_noise(
    kind: str, sd_folder: Path, v_folder: Path, tmp_path: Path
) -> None:
    folder = {"epsilon": sd_folder, "v": v_folder}.get(kind) or tiny_sd3.write_sd3(tmp_path / "sd3")
    model = load(find(str(folder)))
    relevance, pair = Relevance(model, CPU, seed=3), noise_pair(0, *model.size)
    latents, captions = relevance.encode(pair.panels), list(pair.captions)

    expected = torch.zeros(2)
    encode = Sampler(model, CPU).encode
    for time in features.CAPTION_TIMES:
        t = int(time * model.path.steps)
        eps = normal(model.latent_shape, 3, "judge", t, [0])
        a, sigma = model.path.scale(t)
        x_t = a * latents + sigma * eps
        with torch.no_grad():
            told, untold = (
                model.path.noise(model.kind.denoise(model.denoiser, x_t, torch.tensor([t, t]), encode(texts)), x_t, t)
                for texts in (captions, ["", ""])
            )
        expected += ((eps - untold) ** 2 - (eps - told) ** 2).mean((1, 2, 3)) / len(features.CAPTION_TIMES)

    torch.testing.assert_close(relevance(latents, captions), expected, rtol=1e-3, atol=1e-6)
    assert FeaturesJudge(model, CPU, seed=3).judge([pair])[0].caption == pytest.approx(float(expected.min()), rel=1e-3, abs=1e-6)


def test_features_compares_crops_of_the_subjects_in_the_middle_block(sd: Model) -> None:
    (pair,), _ = rendered(1)
    t = int(features.SAME_TIME * sd.path.steps)
    encoded = Relevance(sd, CPU).encode([subject(panel) for panel in pair.panels])
    x_t = sd.path.noised(encoded, normal(sd.latent_shape, 0, "judge", t, [0]), t)
    seen: list[torch.Tensor] = []
    hook = sd.denoiser.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        sd.kind.denoise(sd.denoiser, x_t, torch.tensor([t, t]), Sampler(sd, CPU).encode([pair.subject] * 2))
    hook.remove()
    expected = F.cosine_similarity(*seen[0].mean((2, 3)).split(1))
    assert FeaturesJudge(sd, CPU).judge([pair])[0].same == pytest.approx(float(expected), abs=1e-5)


def test_features_gives_one_subject_in_one_place_the_highest_score_and_depends_on_the_seed(sd: Model) -> None:
    pair = noise_pair(0)
    twice = replace(pair, second=pair.first)
    first, other = scores(FeaturesJudge(sd, CPU), [twice, pair]), scores(FeaturesJudge(sd, CPU, seed=1), [twice, pair])
    assert first[0, 0] == pytest.approx(1.0, abs=1e-5) and first[1, 0] < 0.9999
    assert first[1, 0] != other[1, 0] and first[1, 1] != other[1, 1]


def test_verdicts_do_not_depend_on_the_other_pairs_and_progress_counts_each_pair(sd: Model) -> None:
    pairs, told = [noise_pair(seed) for seed in range(features.BATCH + 1)], list[float]()
    judge = FeaturesJudge(sd, CPU)
    together = [(verdict.same, verdict.caption) for verdict in judge.judge(pairs, lambda count, text="": told.append(count))]
    assert told == [features.BATCH, 1]
    np.testing.assert_allclose(together[3:5], scores(judge, pairs[3:5]), atol=1e-5)
    assert judge.judge([]) == []


def test_panels_of_another_size_are_judged_at_the_size_of_the_teacher(sd: Model) -> None:
    large = noise_pair(0, 96, 96)
    judge = FeaturesJudge(sd, CPU)
    assert judge.relevance.encode(large.panels).shape[1:] == sd.latent_shape
    assert np.isfinite(scores(judge, [large])).all()


def test_features_of_the_emoji_teacher_tell_identities_apart_better_than_chance(
    emoji: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CAPTION_TIMES", (0.9,))
    pairs, truth = rendered(20)
    judge = open_judge("features", emoji, CPU)
    same = scores(judge, pairs)[:, 0]
    assert auc(same.tolist(), truth) > 0.75
    found = agreement((same >= judge.same_threshold).tolist(), truth)
    assert found.precision and found.recall and min(found.precision.value, found.recall.value) > 0.6


def test_relevance_to_the_emoji_teacher_tells_true_captions_from_others(emoji: Model) -> None:
    shown = [world.scene(99, index) for index in range(16)]
    relevance = Relevance(emoji, CPU)
    latents = relevance.encode([world.render(scene) for scene in shown])
    captions = [identities.sheet_caption(scene.noun, (scene.color,)) for scene in shown]
    true, other = relevance(latents, captions).tolist(), relevance(latents, [*captions[1:], captions[0]]).tolist()
    assert auc(true + other, [True] * 16 + [False] * 16) > 0.9


# CLIP and DINOv2


def test_clip_of_the_emoji_world_tells_identities_apart_better_than_chance() -> None:
    pairs, truth = rendered(60)
    judge = ClipJudge(clip.EMOJI, CPU)
    same = scores(judge, pairs)[:, 0]
    assert auc(same.tolist(), truth) > 0.85
    found = agreement((same >= judge.same_threshold).tolist(), truth)
    assert found.precision and found.recall and min(found.precision.value, found.recall.value) > 0.75


def test_clip_compares_crops_with_each_other_and_panels_with_captions(stand_ins: dict[str, Path]) -> None:
    pairs, _ = rendered(2)
    net = Clip(str(stand_ins["clip"]), CPU, "")
    found = scores(ClipJudge(str(stand_ins["clip"]), CPU), pairs)
    for pair, (same, caption) in zip(pairs, found, strict=True):
        one, other = net.see([subject(panel) for panel in pair.panels])
        assert same == pytest.approx(float(one @ other), abs=1e-5)
        assert caption == pytest.approx(float((net.see(pair.panels) * net.read(pair.captions)).sum(1).min()), abs=1e-5)


def test_dino_compares_class_tokens_of_crops_and_takes_captions_from_the_teacher(sd: Model, stand_ins: dict[str, Path]) -> None:
    pairs, _ = rendered(2)
    net = DinoFeatures(str(stand_ins["dino"]), CPU)
    found = scores(open_judge("dino", sd, CPU, model=str(stand_ins["dino"])), pairs)
    for pair, (same, caption) in zip(pairs, found, strict=True):
        one, other = (torch.from_numpy(value) for value in net([subject(panel) for panel in pair.panels], ()))
        assert same == pytest.approx(float(F.cosine_similarity(one, other, dim=0)), abs=1e-5)
        assert caption == pytest.approx(FeaturesJudge(sd, CPU).judge([pair])[0].caption, abs=1e-6)


# The oracle


@pytest.fixture(scope="module")
def reader() -> Reader:
    torch.manual_seed(0)
    return Reader()


def test_the_oracle_compares_the_attributes_that_the_reader_sees(reader: Reader) -> None:
    pairs, _ = rendered(30)
    pairs += [replace(pair, second=pair.first, captions=(pair.captions[0],) * 2) for pair in pairs[:2]]
    for pair, (same, caption) in zip(pairs, scores(OracleJudge(reader, CPU), pairs), strict=True):
        seen = reader.read(torch.from_numpy(np.stack(pair.panels)))
        agreeing = np.mean([seen[0].noun == seen[1].noun, *np.equal(seen[0].identity, seen[1].identity)])
        assert same == (1.0 if agreeing == 1 else pytest.approx(0.9 * agreeing))
        true = [
            np.mean([NOUN_LIST[one.noun] in text.split(), f"{COLOR_LIST[one.color]} background" in text])
            for one, text in zip(seen, pair.captions, strict=True)
        ]
        assert caption == (1.0 if min(true) == 1 else pytest.approx(0.9 * min(true)))


def test_the_oracle_gives_1_to_nothing_but_full_agreement() -> None:
    assert [oracle.agreeing((0, 1, 2, 3), (*range(count), *[9] * (4 - count))) for count in range(5)] == [
        pytest.approx(score) for score in (0.0, 0.225, 0.45, 0.675, 1.0)
    ]
    assert OracleJudge.same_threshold == OracleJudge.caption_threshold == 1.0


def test_the_oracle_knows_the_captions_of_the_emoji_world_only(reader: Reader) -> None:
    assert oracle.named("an owl on a pink background") == (NOUN_LIST.index("owl"), COLOR_LIST.index("pink"))
    with pytest.raises(UsageError, match="not 'a dragon over London'"):
        OracleJudge(reader, CPU).judge([replace(noise_pair(0), captions=("a dragon over London", "an owl on a pink background"))])


def test_the_oracle_reads_panels_of_any_size(reader: Reader) -> None:
    panel = identities.render(identities.sheet(1, 0, 1).panels[0])
    large = np.repeat(np.repeat(panel, 2, 0), 2, 1)
    assert len(OracleJudge(reader, CPU).read([panel, large])) == 2


def test_the_oracle_without_weights_is_an_error_that_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sidcli.metrics.reader.READER", tmp_path / "reader.safetensors")
    with pytest.raises(InputError, match=r"reader\.safetensors is missing"):
        open_judge("oracle", None, CPU)


# Opening


def test_the_names_and_interfaces_of_judges_are_known_without_torch() -> None:
    program = (
        "import sys, sidcli.curation, sidcli.curation.judge, sidcli.curation.gates, sidcli.curation.agreement; "
        "print([name for name in ('torch', 'transformers', 'httpx2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_clip_is_that_of_the_emoji_world_for_its_teachers(emoji: Model, sd: Model, stand_ins: dict[str, Path]) -> None:
    judge = open_judge("clip", emoji, CPU, model=None)
    assert isinstance(judge, ClipJudge) and judge.clip.model == clip.EMOJI
    other = open_judge("clip", emoji, CPU, model=str(stand_ins["clip"]))
    assert isinstance(other, ClipJudge) and other.clip.model == str(stand_ins["clip"])
    assert (judge.same_threshold, judge.caption_threshold) != (other.same_threshold, other.caption_threshold)
    for teacher in (None, sd):
        public = open_judge("clip", teacher, CPU)
        assert isinstance(public, ClipJudge) and public.clip.name == clip.PUBLIC


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("people", {}, "no judge 'people'; choose one of features, clip, dino, vlm, http, oracle"),
        ("clip", {"url": "http://here", "seed": 1}, "the judge clip has no option seed, url; its options: model"),
        ("oracle", {"model": "x"}, "the judge oracle has no option model; its options: none"),
        ("features", {}, "the judge features scores with a teacher; name the teacher, or choose another judge"),
        ("dino", {}, "the judge dino scores with a teacher; name the teacher, or choose another judge"),
        ("vlm", {"model": None}, "the judge vlm needs model; --set judge_model=..."),
        ("http", {}, "the judge http needs url and model; --set judge_url=... --set judge_model=..."),
    ],
)
def test_a_judge_that_cannot_be_opened_as_asked_is_refused(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_judge(name, None, CPU, **options)
    assert f"{caught.value.message}; {caught.value.hint}" == said


def test_a_missing_model_of_a_judge_is_named_with_the_option_that_gives_another(sd: Model, tmp_path: Path) -> None:
    opened = open_judge("dino", sd, CPU, model=str(tmp_path))
    for ask in (lambda: opened.judge([noise_pair(0)]), lambda: open_judge("clip", sd, CPU, model=str(tmp_path))):
        with pytest.raises(InputError) as caught:
            ask()
        assert str(tmp_path) in caught.value.message and "--set judge_model" in caught.value.hint
