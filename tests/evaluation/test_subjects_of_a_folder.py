"""The protocol of models that draw the subjects of reference images of a folder, and the judge of their drawings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sidcli import api
from sidcli.curation import endpoint
from sidcli.curation.crops import subject
from sidcli.data.imagesets import PanelSet
from sidcli.distributed import Distributed
from sidcli.emoji import identities
from sidcli.errors import EnvironmentProblem, InputError, UsageError
from sidcli.evaluation.candidates import Candidate
from sidcli.evaluation.protocols import REFERENCE_SIZE, SEEDS, Networks, emoji_subjects, subjects
from sidcli.evaluation.run import Outcome
from sidcli.evaluation.scores import RATED, Evaluation, chosen
from sidcli.evaluation.spec import JudgeSpec
from sidcli.formats.diffusers_folder import write_student
from sidcli.metrics.appearance import diversity
from sidcli.metrics.clip import Clip
from sidcli.metrics.features import DinoFeatures
from sidcli.metrics.ssim import copy_score
from sidcli.metrics.transforms import crop_and_resize, square
from sidcli.models.loading import load
from sidcli.models.reference import LAYOUTS
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find
from sidcli.models.unet import UNET
from sidcli.progress import Silence
from tests.curation.test_endpoint import Endpoint

CPU = torch.device("cpu")
PROMPTS = ("at sea", "on a red background", "in a cup")
PAIRS = [(name, f"{name} {prompt}") for name in ("a", "b") for prompt in PROMPTS]


def photo(seed: int, height: int = 80, width: int = 96) -> np.ndarray:
    """A rendered subject on the left of a wide gray image."""
    image = np.full((height, width, 3), 90, np.uint8)
    image[8:72, 4:68] = identities.render(identities.unknown(seed).panels[0])
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs with three prompts each."""
    place = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate("ab"):
        Image.fromarray(photo(seed)).save(place / f"{name}.png")
    rows = [json.dumps({"file_name": f"{name}.png", "text": prompt}) for name, prompt in PAIRS]
    (place / "metadata.jsonl").write_text("\n".join(rows))
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji teacher with random weights for a reference, so that it draws another image with another reference."""
    place, teacher = tmp_path_factory.mktemp("model") / "model", load(find("emoji-teacher"))
    UNET.take_reference(teacher.denoiser, LAYOUTS["channels"])
    torch.manual_seed(0)
    with torch.no_grad():
        weight = teacher.denoiser.conv_in.weight
        weight[:, weight.shape[1] // 2 :].normal_(0, 0.1)
    write_student(place, teacher, {"kind": "teacher", "world": "emoji", "guidance": 1.0})
    return place


@pytest.fixture(autouse=True)
def quick_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SID_API_KEY", raising=False)


def networks(stand_ins: dict[str, Path]) -> Networks:
    return Networks(CPU, Silence(), clip=str(stand_ins["clip"]), dino=str(stand_ins["dino"]))


def evaluated(models: object, metrics: list[str], folder: Path, stand_ins: dict[str, Path], **options: Any) -> Outcome:
    given = {"protocol": "subjects", "clip_model": stand_ins["clip"], "dino_model": stand_ins["dino"]} | options
    outcome = api.evaluate(models, metrics, reference=folder, listener=Silence(), **given)  # type: ignore[arg-type]
    assert outcome is not None
    return outcome


def test_images_are_compared_with_the_reference_image_of_their_prompt(
    model: Path, folder: Path, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    outcome = evaluated(f"{model},steps=1", [], folder, stand_ins, image_folder=tmp_path / "drawn", protocol="auto")
    (row,) = outcome.rows
    assert outcome.protocol == "subjects" and row.n == len(PAIRS) and list(row.metrics) == ["clip", "dino_i", "clip_i", "copy"]
    drawn = [np.asarray(Image.open(file)) for file in sorted(next((tmp_path / "drawn").iterdir()).iterdir())]
    shown = [photo("ab".index(name)) for name, _ in PAIRS]
    loaded = load(find(str(model)))
    for index in (1, 4):
        asked = crop_and_resize(shown[index], *loaded.size)[None]
        plan = plan_for(loaded, 1)
        again = Sampler(loaded, CPU).images([PAIRS[index][1]], [index], plan, references=asked)
        assert np.abs(again[0].astype(int) - drawn[index]).max() <= 1
        other = Sampler(loaded, CPU).images([PAIRS[index][1]], [index], plan, references=asked[:, ::-1].copy())
        assert np.abs(other[0].astype(int) - drawn[index]).max() > 1
    squares = [square(image, REFERENCE_SIZE) for image in shown]
    dino, clip = DinoFeatures(str(stand_ins["dino"]), CPU), Clip(str(stand_ins["clip"]), CPU, "")
    seen, known = (torch.from_numpy(dino([subject(image) for image in images])) for images in (drawn, squares))
    assert row.metrics["dino_i"].value == pytest.approx(torch.cosine_similarity(seen, known).mean().item(), abs=1e-5)
    assert row.metrics["clip_i"].value == pytest.approx((clip.see(drawn) * clip.see(squares)).sum(1).mean().item(), abs=1e-5)
    assert row.metrics["clip"].value == pytest.approx(
        (clip.see(drawn) * clip.read([prompt for _, prompt in PAIRS])).sum(1).mean().item(), abs=1e-5
    )
    copies = [copy_score(image, crop_and_resize(one, 64, 64)) for image, one in zip(drawn, shown, strict=True)]
    assert row.metrics["copy"].value == pytest.approx(np.mean(copies))
    assert row.metrics["copy"].low < row.metrics["copy"].value < row.metrics["copy"].high
    outcome.write(tmp_path / "rows.png", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "reference images" in text and "DINO-I" in text and (tmp_path / "rows.png").is_file()


def test_copies_of_the_reference_images_have_the_highest_scores_and_a_folder_of_images_no_diversity(
    folder: Path, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    for index, (name, _) in enumerate(PAIRS):
        Image.fromarray(square(photo("ab".index(name)), REFERENCE_SIZE)).save(tmp_path / f"{index:06d}.png")
    outcome = evaluated(str(tmp_path), ["identity", "dino_i", "clip_i"], folder, stand_ins)
    (row,) = outcome.rows
    assert [row.metrics[name].value for name in ("dino_i", "clip_i", "copy")] == pytest.approx([1, 1, 1], abs=1e-3)
    with pytest.raises(UsageError, match="diversity needs a model in the table"):
        evaluated(str(tmp_path), ["diversity"], folder, stand_ins)


def test_the_diversity_is_that_of_images_of_one_prompt_with_several_seeds(
    model: Path, folder: Path, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    rules = subjects(networks(stand_ins), folder)
    assert rules.repeated is not None and rules.repeated.references is not None and rules.captions is not None
    asked, references = rules.repeated.first(3 * SEEDS), rules.repeated.references
    for group in range(3):
        places = range(group * SEEDS, (group + 1) * SEEDS)
        assert {asked[place] for place in places} == {asked[places[0]]}
        name = asked[places[0]].split()[0]
        assert {references.of(place) for place in places} == {"ab".index(name)}
    assert len({asked[group * SEEDS] for group in range(3)}) == 3
    (row,) = evaluated(f"{model},steps=1", ["diversity"], folder, stand_ins, image_folder=tmp_path / "drawn").rows
    sets = [[np.asarray(Image.open(file)) for file in sorted(place.iterdir())] for place in (tmp_path / "drawn").iterdir()]
    (repeated,) = [images for images in sets if len(images) == 2 * SEEDS]
    clip = Clip(str(stand_ins["clip"]), CPU, "")
    groups = [diversity(clip.see(repeated[start : start + SEEDS]).numpy()) for start in (0, SEEDS)]
    assert row.metrics["diversity"].value == pytest.approx(np.mean(groups), abs=1e-5) and list(row.metrics) == ["diversity"]
    assert row.metrics["diversity"].value > 0


def test_the_emoji_world_has_the_same_metrics_without_the_weights_of_dino(stand_ins: dict[str, Path]) -> None:
    rules = emoji_subjects(Networks(CPU, Silence()))
    rows = [Candidate("true", "", PanelSet(1), repeated=PanelSet(0)), Candidate("copies", "", PanelSet(0))]
    assert chosen([], rules, True, rows) == ["clip", "identity", "subject_text", "clip_i", "copy", "diversity"]
    evaluation = Evaluation(rules, rows, ["clip_i", "copy", "diversity"], 20, Distributed(CPU))
    evaluation.fill(Silence())
    true, copies = evaluation.rows(Silence())
    assert copies.metrics["clip_i"].value == pytest.approx(1) and copies.metrics["copy"].value == pytest.approx(1)
    assert 0.5 < true.metrics["clip_i"].value < 1 and "diversity" not in copies.metrics
    seen = evaluation.protocol.extractors.embeddings(PanelSet(0).read(range(8)), ())
    assert true.metrics["diversity"].value == pytest.approx((diversity(seen[:4]) + diversity(seen[4:])) / 2, abs=1e-5)
    assert rules.repeated is not None and len(set(rules.repeated.first(8))) == 2


def test_requests_that_do_not_fit_are_refused(model: Path, folder: Path, stand_ins: dict[str, Path], tmp_path: Path) -> None:
    for options, error, said in [
        ({"protocol": "subjects"}, UsageError, "needs reference images with prompts"),
        ({"protocol": "subjects", "reference": folder, "prompts": folder}, UsageError, "those of its --reference"),
        ({"protocol": "subjects", "reference": folder, "cmmd_model": "x"}, UsageError, "has a network of its own"),
        ({"protocol": "subjects", "reference": tmp_path}, InputError, "holds no reference images with prompts"),
        ({"protocol": "custom"}, InputError, "needs a reference image, and the protocol custom gives none"),
    ]:
        with pytest.raises(error, match=said):
            api.evaluate(str(model), listener=Silence(), **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="concept preservation needs --judge http"):
        evaluated(f"{model},steps=1", ["judge"], folder, stand_ins)
    with pytest.raises(UsageError, match="identity needs --protocol emoji-subjects"):
        chosen([], subjects(networks(stand_ins), folder), False, [], ["identity"])
    with pytest.raises(UsageError, match="CLIP-I needs --protocol emoji-subjects or subjects"):
        api.evaluate("emoji", ["clip_i"], num=12, listener=Silence())
    with pytest.raises(InputError, match=r"DINO-I needs .*nowhere") as caught:
        evaluated(f"{model},steps=1", ["dino_i"], folder, stand_ins, dino_model=tmp_path / "nowhere")
    assert "--dino-model FOLDER" in caught.value.hint
    with pytest.raises(InputError, match="nowhere"):
        evaluated(f"{model},steps=1", ["clip_i"], folder, stand_ins, clip_model=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("http", None, "vlm"), "--judge http needs an endpoint"),
        (("http", "http://here", None), "--judge http needs an endpoint"),
        (("vlm", "http://here", "vlm"), "--judge must be http, not 'vlm'"),
        ((None, "http://here", None), "--judge-url http://here has no effect without a judge"),
        ((None, None, "vlm"), "--judge-model vlm has no effect without a judge"),
    ],
)
def test_options_of_the_judge_belong_together(options: tuple[str | None, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        JudgeSpec.of(*options)
    assert JudgeSpec.of(None, None, None) is None


Judged = Callable[[Endpoint], Outcome]


@pytest.fixture
def judged(folder: Path, stand_ins: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    """Judge six images of a folder at an endpoint."""
    monkeypatch.setenv("SID_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for index in range(len(PAIRS)):
        Image.fromarray(photo(index, 72, 72)).save(tmp_path / "images" / f"{index:06d}.png")

    def judge(served: Endpoint) -> Outcome:
        return evaluated(
            str(tmp_path / "images"), [], folder, stand_ins, judge="http", judge_url=served.url, judge_model="some-vlm"
        )

    return judge


@pytest.fixture
def endpoint_of() -> Iterator[Callable[..., Endpoint]]:
    """Start an endpoint with these answers."""
    with ExitStack() as opened:
        yield lambda *answers: opened.enter_context(Endpoint(list(answers)).running())


def question(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][-1]["text"]


def pictures(body: dict[str, Any]) -> int:
    return sum(part["type"] == "image_url" for part in body["messages"][0]["content"])


def scoring(body: dict[str, Any]) -> str:
    """Concept preservation is 4 for images of the first photograph and 2 else, prompt following 1 for "at sea" and 3 else."""
    if pictures(body) == 2:
        return f"It is the same.\n**Score:** {'4' if body['messages'][0]['content'][1] == FIRST else 2}/4"
    return f"SCORE: {1 if 'at sea' in question(body) else 3}"


FIRST = {"type": "image_url", "image_url": {"url": endpoint.data_url(crop_and_resize(photo(0), 72, 72))}}


def test_a_judge_scores_concept_and_prompt_of_each_image_and_is_asked_once(
    judged: Judged, endpoint_of: Callable[..., Endpoint]
) -> None:
    served = endpoint_of(scoring)
    outcome = judged(served)
    (row,) = outcome.rows
    assert list(row.metrics) == list(RATED) and len(served.requests) == 2 * len(PAIRS)
    concept, prompt = np.array([4, 4, 4, 2, 2, 2]) / 4, np.array([1, 3, 3, 1, 3, 3]) / 4
    found = row.metrics
    assert found["concept_preservation"].value == concept.mean() and found["prompt_following"].value == prompt.mean()
    assert found["cp_pf"].value == pytest.approx(concept.mean() * prompt.mean())
    draws = np.random.default_rng(0).integers(0, 6, (20_000, 6))
    error = (concept[draws].mean(1) * prompt[draws].mean(1)).std() * (6 / 5) ** 0.5
    assert found["cp_pf"].half_width == pytest.approx(1.96 * error, rel=0.05)
    assert all(0 <= one.low < one.value < one.high <= 1 for one in found.values())
    assert sorted(question(body).count("at sea") for *_, body in served.requests) == [0] * 10 + [1] * 2
    assert outcome.as_dict()["protocol"]["judge"] == {"url": f"{served.url}/chat/completions", "model": "some-vlm"}
    assert judged(served).rows == outcome.rows and len(served.requests) == 2 * len(PAIRS), "answers are kept"


def test_an_interrupted_evaluation_asks_only_for_missing_answers(judged: Judged, endpoint_of: Callable[..., Endpoint]) -> None:
    served = endpoint_of(*[scoring] * 8, 401)
    with pytest.raises(EnvironmentProblem, match="answered with status 401"):
        judged(served)
    served.answers = [scoring]
    asked = len(served.requests)
    (row,) = judged(served).rows
    assert row.metrics["concept_preservation"].value == 0.75
    assert 4 <= len(served.requests) - asked < 2 * len(PAIRS)


def test_a_refusing_endpoint_is_an_error_that_names_the_options_of_sid_eval(
    judged: Judged, endpoint_of: Callable[..., Endpoint]
) -> None:
    with pytest.raises(EnvironmentProblem, match="answered with status 404") as caught:
        judged(endpoint_of(404))
    assert caught.value.hint == "check --judge-url and --judge-model"


def test_images_whose_answers_have_no_score_are_left_out_and_counted(judged: Judged, endpoint_of: Callable[..., Endpoint]) -> None:
    def unsure(body: dict[str, Any]) -> str:
        return "I cannot say." if question(body).count("a in a cup") else scoring(body)

    served = endpoint_of(unsure)
    outcome = judged(served)
    assert outcome.rows[0].metrics["concept_preservation"].value == np.mean([4, 4, 2, 2, 2]) / 4
    assert any("1 image without a score" in warning for warning in outcome.warnings)
    assert len(served.requests) == 2 * len(PAIRS) + 1
    served.answers = [scoring]
    assert judged(served).rows[0].metrics["concept_preservation"].value == 0.75
    answer = f"I cannot\n\x1bsay. {'x' * 80}"
    for words, said in ((answer, f"it answered: I cannot \\u001bsay. {'x' * 60}"), ("", "its answers are empty")):
        with pytest.raises(EnvironmentProblem) as caught:
            judged(endpoint_of(words))
        assert re.fullmatch(r"some-vlm gave .* no score that can be read; .*", caught.value.message)
        assert caught.value.message.endswith(f"; {said}")
