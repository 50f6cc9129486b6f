"""The questions to vision language models, how answers are read, and a local model of transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sidcli.curation import open_judge
from sidcli.curation.questions import answer_of, verdict_of
from sidcli.curation.vlm import Vlm, folder_of
from sidcli.errors import InputError
from tests.curation.rendered import noise_pair
from tests.tiny_vlm import write_vlm

CPU = torch.device("cpu")
PAIR = noise_pair(0)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("1. A key.\n2. Both are gold.\n3. They agree.\nANSWER: YES", True),
        ("They differ.\n\n**Answer: no.**\n", False),
        ("I would say ANSWER: YES", None),
        ("ANSWER: YES or NO", None),
        ("ANSWER: YES\nOn second thought, the teeth differ.\nANSWER: NO", False),
        ("YES", None),
        ("answer - yes", True),
        ("", None),
    ],
)
def test_the_last_answer_line_counts_and_nothing_else_does(words: str, answer: bool | None) -> None:
    assert answer_of(words) is answer


def test_a_long_answer_of_punctuation_is_read_at_once() -> None:
    # With a pattern that crosses lines this would take an hour.
    assert answer_of("*\n" * 500_000 + "answer" + "-" * 500_000) is None


class Interviewed:
    """Answers the questions in turn and keeps what was shown and asked."""

    def __init__(self, *answers: str):
        self.answers, self.seen = list(answers), list[tuple[list[np.ndarray], str]]()

    def __call__(self, images: Sequence[np.ndarray], question: str) -> str:
        self.seen.append((list(images), question))
        return self.answers[len(self.seen) - 1]


YES, NO, LOST = "Alike.\nANSWER: YES", "Not alike.\nANSWER: NO", "I cannot see images."


@pytest.mark.parametrize(
    ("answers", "same", "caption"),
    [
        ((YES, YES, YES), 1.0, 1.0),
        ((YES, NO, YES), 0.5, 1.0),
        ((NO, YES, NO), 0.5, 0.0),
        ((NO, NO, YES), 0.0, 1.0),
        ((YES, LOST, YES), 0.0, 1.0),
        ((LOST, YES, LOST), 0.0, 0.0),
    ],
)
def test_a_pair_is_the_same_if_the_answer_is_yes_in_both_orders(answers: tuple[str, str, str], same: float, caption: float) -> None:
    verdict = verdict_of(PAIR, Interviewed(*answers))
    assert (verdict.same, verdict.caption) == (same, caption)
    assert all(answer in verdict.words for answer in answers)


def test_the_second_question_shows_the_panels_in_the_other_order_and_the_third_names_the_captions() -> None:
    asked = Interviewed(YES, YES, YES)
    verdict_of(PAIR, asked)
    (first, same), (swapped, again), (last, captions) = asked.seen
    assert first[0] is PAIR.first and first[1] is PAIR.second and last[0] is PAIR.first
    assert swapped[0] is PAIR.second and swapped[1] is PAIR.first
    assert same == again and "individual key?" in same and all(caption not in same for caption in PAIR.captions)
    assert all(f"image {number}: {caption}" in captions for number, caption in enumerate(PAIR.captions, 1))


@pytest.mark.parametrize(("words", "scores"), [("ANSWER: YES", (1, 1)), ("ANSWER: NO", (0, 0))])
def test_a_local_model_is_asked_and_its_words_are_kept(tmp_path: Path, words: str, scores: tuple[float, float]) -> None:
    judge = open_judge("vlm", None, CPU, model=str(write_vlm(tmp_path / "vlm", words)))
    told = list[float]()
    first, second = judge.judge([PAIR, noise_pair(1)], lambda count, text="": told.append(count))
    assert (first.same, first.caption) == scores and first == second and told == [1, 1]
    assert first.words == f"same:\n{words}\n\nsame, other order:\n{words}\n\ncaptions:\n{words}"


def test_a_local_model_that_answers_none_of_the_questions_as_asked_is_an_error_that_shows_an_answer(tmp_path: Path) -> None:
    judge = open_judge("vlm", None, CPU, model=str(write_vlm(tmp_path / "vlm", "Both are keys. ANSWER: YES")))
    with pytest.raises(InputError, match=r"ends none of its answers .* Both are keys\. ANSWER: YES") as caught:
        judge.judge([PAIR])
    assert str(tmp_path / "vlm") in caught.value.message and "--set judge_model" in caught.value.hint


def test_a_local_model_sees_the_pixels_and_the_question(tmp_path: Path) -> None:
    vlm = Vlm(str(write_vlm(tmp_path / "vlm", "ANSWER: YES")), CPU)
    seen = list[dict[str, torch.Tensor]]()
    generate = vlm.network.generate
    vlm.network.generate = lambda **inputs: (seen.append(inputs), generate(**inputs))[1]
    black, white = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 255, np.uint8)
    vlm.ask([black, white], "Both are keys.")
    pixels = seen[0]["pixel_values"]
    assert pixels.shape[0] == 2 and (pixels[0] < pixels[1]).all()
    words = vlm.processor.tokenizer.decode(seen[0]["input_ids"][0])
    assert words.count("<image>") == 2 * 4 and words.endswith(
        "Both are keys. Assistant:"
    )  # each of 32 x 32 pixels in patches of 16


def damaged(folder: Path, file: str, **entries: object) -> None:
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(content | entries))


def test_a_model_with_code_or_an_adapter_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = write_vlm(tmp_path / "vlm", "ANSWER: YES")
    damaged(folder, "adapter_config.json", base_model_name_or_path="somebody/else")
    with pytest.raises(InputError, match="would change the weights"):
        folder_of(str(folder))
    (folder / "adapter_config.json").unlink()
    damaged(folder, "processor_config.json", auto_map={"AutoProcessor": "processing.Mine"})
    (folder / "processing.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match=r"processor_config\.json brings code of its own, which is never run"):
        open_judge("vlm", None, CPU, model=str(folder))
    assert not (tmp_path / "ran").exists()


def test_weights_that_can_run_code_a_missing_template_and_other_models_are_refused(
    tmp_path: Path, sd_folder: Path, stand_ins: dict[str, Path]
) -> None:
    folder = write_vlm(tmp_path / "vlm", "ANSWER: YES")
    (folder / "chat_template.jinja").rename(tmp_path / "template")
    with pytest.raises(InputError, match="has no chat template"):
        open_judge("vlm", None, CPU, model=str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for model in (str(folder), str(sd_folder), str(stand_ins["dino"]), "nobody/nothing", str(tmp_path / "nowhere"), ""):
        with pytest.raises(InputError) as caught:
            open_judge("vlm", None, CPU, model=model)
        assert "--set judge_model=FOLDER" in caught.value.hint and model in caught.value.message


def test_a_model_in_the_cache_of_the_hub_is_found_by_its_id_and_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--some--vlm"
    snapshot = write_vlm(repo / "snapshots" / commit, "ANSWER: YES")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert folder_of("some/vlm") == folder_of(f"some/vlm@{commit}") == snapshot
    with pytest.raises(InputError, match="no vision language model some/vlm@other"):
        folder_of("some/vlm@other")
