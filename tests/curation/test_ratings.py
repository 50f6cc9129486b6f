"""Scores of drawings: how answers are read, and which are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sidcli.curation.endpoint import Chat, data_url
from sidcli.curation.questions import question_concept, question_prompt, score_of
from sidcli.curation.ratings import Drawing, Rater, Rating, read_rating
from tests.curation.rendered import noise
from tests.curation.test_endpoint import Endpoint


@pytest.mark.parametrize(
    ("words", "score"),
    [
        ("SCORE: 3", 3),
        ("It is the same teapot.\nScore: 4", 4),
        ("**SCORE: 0**", 0),
        ("**Score:** 2/4\n", 2),
        ("score = 1.", 1),
        ("SCORE: 1\nOn second thought:\nSCORE: 2", 2),
        ("Looks fine. Score: 3", 3),
        ("SCORE: 5", None),
        ("SCORE: -1", None),
        ("SCORE: 3.5", None),
        ("SCORE: 3/5", None),
        ("SCORE: 34", None),
        ("The score is 3", None),
        ("", None),
    ],
)
def test_the_score_is_the_number_of_the_last_line_of_a_score(words: str, score: int | None) -> None:
    assert score_of(words) == score


def test_the_questions_name_the_subject_and_the_prompt_as_they_are() -> None:
    assert "the subject (a {red} teapot) of image 1" in question_concept("a {red} teapot")
    assert "to show the subject of image 1 again" in question_concept("")
    assert "for this prompt: {0} at sea\n" in question_prompt("{0} at sea")


def rater(served: Endpoint) -> Rater:
    return Rater(Chat(served.url, "some-vlm", parallel=2))


def drawing(index: int) -> Drawing:
    return Drawing(noise(index, 16, 16), noise(100 + index, 16, 16), f"prompt {index}", "teapot")


def by_image(scores: Sequence[int]) -> Callable[[dict[str, Any]], str]:
    """Answer with the score of the drawn image, for prompt following with one less."""
    urls = [data_url(noise(index, 16, 16)) for index in range(len(scores))]

    def answer(body: dict[str, Any]) -> str:
        images = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        return f"SCORE: {scores[urls.index(images[-1])] - (len(images) == 1)}"

    return answer


def test_ratings_are_in_the_order_of_the_drawings_and_damaged_ones_are_asked_for_again(tmp_path: Path) -> None:
    expected = [Rating(score, score - 1) for score in (4, 1, 3, 2, 4)]
    told = list[float]()
    with Endpoint([by_image([4, 1, 3, 2, 4])]).running() as served:
        assert rater(served).rate(3, drawing, tmp_path, lambda count, text="": told.append(count)) == expected[:3]
        assert sum(told) == 3 and len(served.requests) == 6
        assert "SCORE: 4" in (tmp_path / "000000.json").read_text()
        for index, content in enumerate(("", '{"concept": 9, "prompt": 1}', '{"concept": [], "prompt": 1}')):
            (tmp_path / f"{index:06d}.json").write_text(content)
            assert read_rating(tmp_path / f"{index:06d}.json") is None
        assert rater(served).rate(5, drawing, tmp_path) == expected and len(served.requests) == 6 + 10
        assert rater(served).rate(5, drawing, tmp_path) == expected and len(served.requests) == 6 + 10
