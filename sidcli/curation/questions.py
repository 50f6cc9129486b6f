"""What vision language models are asked about pairs and drawings, and how their answers are read. The wording is our own.

As in Diffusion Self-Distillation (arXiv 2411.18616, section 3.1.3), a model reasons in three steps before it answers: it names what
both images show, describes both, and concludes. Models tend to prefer an answer for the order of the images, so each pair is shown in
both orders.

A drawing of the subject of a reference image is scored from 0 to 4 in two questions, as in DreamBench++ (arXiv 2406.16855): how well it
preserves the concept of the reference, and how well it follows its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from sidcli.curation.judge import Pair, Verdict
from sidcli.errors import InputError
from sidcli.printable import printable

SAME = """Do both images show the same individual {subject}? Work in three steps.
1. Name the object, character or scene that the two images have in common.
2. Describe it in detail in each image: shape, proportions, colors, materials, patterns, markings and small parts.
3. Compare the two descriptions and conclude whether both images show one and the same individual, not just two of one kind. \
Background, place, size, pose, viewpoint and light may differ. Any other difference means that they are not the same.
Then write a last line that is either "ANSWER: YES" or "ANSWER: NO"."""
CAPTIONS = """Are both captions true?
Caption of image 1: {captions[0]}
Caption of image 2: {captions[1]}
Compare each image with its caption, part by part: the subject, its attributes, the background and everything else that it names. \
What a caption does not name may be anything.
Then write a last line that is either "ANSWER: YES" if both captions are true, or "ANSWER: NO"."""
CONCEPT = """Image 1 is a reference. Image 2 was drawn to show {subject} of image 1 again; its scene, pose, light and style may differ.
How well does image 2 keep what identifies {subject} of image 1? Compare shape, proportions, colors, materials, markings and small parts, \
and of persons the face. If image 1 stands for a style, compare the styles.
0: it is not there. 1: only its kind is the same. 2: similar, with large differences. 3: the same, with small differences. 4: the same in \
every visible detail.
Write one sentence, and then a last line "SCORE: N" with N from 0 to 4."""
PROMPT = """The image was drawn for this prompt: {prompt}
How much of what the prompt says does the image show? Check the subject, its attributes and actions, the place, everything else that \
the prompt names, and the style. What the prompt does not name may be anything.
0: nothing of it. 1: a small part. 2: about half. 3: most of it. 4: all of it.
Write one sentence, and then a last line "SCORE: N" with N from 0 to 4."""
HIGHEST = 4
"""The best score of a drawing."""
SCORE = re.compile(r"\bscore[^a-z0-9\n-]+([0-4])(?: */ *4)?[^a-z0-9\n]*$", re.IGNORECASE | re.MULTILINE)
ANSWER = re.compile(r"^[^a-z0-9\n]*answer[^a-z0-9\n]+(yes|no)[^a-z0-9\n]*$", re.IGNORECASE | re.MULTILINE)

BEGINNING = 200
"""Characters of an answer in an error message."""

Ask = Callable[[Sequence[np.ndarray], str], str]
"""(images uint8 [H, W, 3], question) -> the words of a model."""


def beginning(words: str, most: int = BEGINNING) -> str:
    """Return the first `most` characters of an answer on one line, for an error message."""
    return printable(" ".join(words.split()))[:most]


def answer_of(words: str) -> bool | None:
    """Return whether the last answer line of a text says yes. None if the text has no such line."""
    found = ANSWER.findall(words)
    return found[-1].lower() == "yes" if found else None


def score_of(words: str) -> int | None:
    """Return the score, 0 to 4, in the last score line of a text. None if the text has no such line."""
    found = SCORE.findall(words)
    return int(found[-1]) if found else None


def question_concept(subject: str) -> str:
    """`subject` is a noun phrase, "" if unknown."""
    return CONCEPT.format(subject=f"the subject ({subject})" if subject else "the subject")


def question_prompt(prompt: str) -> str:
    return PROMPT.format(prompt=prompt)


def question_same(pair: Pair) -> str:
    return SAME.format(subject=pair.subject)


def question_captions(pair: Pair) -> str:
    return CAPTIONS.format(captions=pair.captions)


def verdict_of(pair: Pair, ask: Ask) -> Verdict:
    """Return the verdict of a model on a pair, from three questions.

    `same` is 1 if the answer is yes in both orders of the panels, 0.5 if the answers differ, else 0. `caption` is 1 if both captions are
    true, else 0. An answer that cannot be read counts as no, in both orders. `words` holds all answers.
    """
    orders = [ask(panels, question_same(pair)) for panels in (pair.panels, pair.panels[::-1])]
    about_captions = ask(pair.panels, question_captions(pair))
    answers = [answer_of(words) for words in orders]
    same = 0.0 if None in answers else sum(map(bool, answers)) / 2
    words = "\n\n".join(
        f"{title}:\n{words.strip()}"
        for title, words in zip(("same", "same, other order", "captions"), (*orders, about_captions), strict=True)
    )
    return Verdict(same, float(answer_of(about_captions) is True), words)


class Reading:
    """Tells a model that does not understand the questions from one that leaves some of them open."""

    def __init__(self, name: str):
        self.name, self.has_read = name, False

    def check(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """Return the verdicts. Raises InputError if none of their answers can be read, and none could be before."""
        self.has_read = self.has_read or any(answer_of(verdict.words) is not None for verdict in verdicts)
        if not self.has_read:
            raise InputError(
                f'{self.name} ends none of its answers with "ANSWER: YES" or "ANSWER: NO": {beginning(verdicts[0].words)}',
                "--set judge_model: a vision language model that follows instructions",
            )
        return list(verdicts)


def content_of(images: Sequence[object], question: str) -> list[object]:
    """Return the parts of a message: each image, after its number, then the question."""
    numbered = [part for number, image in enumerate(images, 1) for part in (text_part(f"Image {number}:"), image)]
    return [*numbered, text_part(question)]


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
