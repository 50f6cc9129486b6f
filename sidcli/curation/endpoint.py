"""A language model behind an endpoint that speaks the chat completions protocol of OpenAI, and the judge `http`, which asks it."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from threading import Event
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2
import numpy as np
from PIL import Image

from sidcli import environment
from sidcli.curation.judge import Item, Made, Pair, Verdict, in_batches
from sidcli.curation.questions import BEGINNING, Ask, Reading, answer_of, content_of, verdict_of
from sidcli.errors import EnvironmentProblem, UsageError, first_line
from sidcli.printable import printable
from sidcli.progress import Progress, silent

KEY = "SID_API_KEY"
"""The environment variable with the key that is sent to the endpoint."""
PATH = "/chat/completions"
LONGEST = 768
"""Maximum number of tokens of an answer."""
MOST = 1 << 20
"""Bytes of an answer that are read."""
WAITS = (1.0, 2.0, 4.0)
"""Seconds before each further attempt of a request, after a busy or failing endpoint, or an answer that is not of the protocol."""
BUSY = (408, 425, 429)
"""HTTP statuses other than 5xx after which a request is sent again."""
HINTS = {401: f"set {KEY} to a key that it accepts", 403: f"set {KEY} to a key that may use this model"}
OTHER_HINT = "check --set judge_url and --set judge_model"
AGAIN = "run it again when the endpoint answers; scores so far are kept"
NO_PROTOCOL = "the endpoint must speak the chat completions protocol of OpenAI; scores so far are kept"


class Chat:
    """Asks a model at an endpoint, about `parallel` items at a time.

    `url` is the address of the protocol, for example http://localhost:8000/v1, and `model` the name of a model there. The value of
    SID_API_KEY is sent as a bearer token. A request that takes longer than `seconds`, that a busy endpoint refuses, or whose answer is
    not of the protocol, is sent again three times; then EnvironmentProblem is raised, and at once if the endpoint refuses it for
    another reason. Raises UsageError for an invalid URL. `hint` says in errors how URL and model are changed.
    """

    def __init__(self, url: str, model: str, seconds: float = 120.0, parallel: int = 4, hint: str = OTHER_HINT):
        self.url, self.model, self.seconds, self.parallel = address(url), model, seconds, parallel
        self.headers, self.hint = headers(), hint
        self.stopped = Event()

    def each(
        self, items: Sequence[Item], work: Callable[[Item, Ask], Made], read: Callable[[str], object], advance: Progress = silent
    ) -> list[Made]:
        """Return `work(item, ask)` of items, in order. An answer of which `read` returns None is asked for once more."""
        self.stopped.clear()
        with httpx2.Client(headers=self.headers, timeout=self.seconds) as client, ThreadPoolExecutor(self.parallel) as threads:

            def ask(images: Sequence[np.ndarray], question: str) -> str:
                words = self.ask(client, images, question)
                return self.ask(client, images, question) if read(words) is None else words

            def some_of(some: Sequence[Item]) -> list[Made]:
                asked = [threads.submit(work, item, ask) for item in some]
                for finished in as_completed(asked):
                    finished.result()  # raises the first error, whichever item it is of
                return [finished.result() for finished in asked]

            try:
                return in_batches(items, self.parallel, some_of, advance)
            except BaseException:
                self.stopped.set()  # the other threads would send their requests again, while this one waits for them
                raise

    def ask(self, client: httpx2.Client, images: Sequence[np.ndarray], question: str) -> str:
        """Return the model's words about images uint8 [H, W, 3]."""
        shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        messages = [{"role": "user", "content": content_of(shown, question)}]
        return self.send(client, {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": LONGEST})

    def send(self, client: httpx2.Client, body: dict[str, Any]) -> str:
        """Return the model's words in the answer to a request. Raises EnvironmentProblem if there are none."""
        happened = hint = ""
        for wait in (0.0, *WAITS):
            if self.stopped.wait(wait):
                break
            try:
                status, content = self.post(client, body)
            except httpx2.TimeoutException:
                happened, hint = f"did not answer within {self.seconds:g} seconds", AGAIN
            except httpx2.RequestError as error:
                happened, hint = f"cannot be reached: {printable(first_line(error))}", AGAIN
            else:
                if status == 200 and (words := words_of(content)) is not None:
                    return words
                if status == 200:
                    happened, hint = f"answered without words of a model: {excerpt(content)}", f"{self.hint}: {NO_PROTOCOL}"
                    continue
                happened, hint = f"answered with status {status}: {excerpt(content)}", AGAIN
                if status < 500 and status not in BUSY:
                    raise EnvironmentProblem(f"{self.url} {happened}", HINTS.get(status, self.hint))
        raise EnvironmentProblem(f"{self.url} {happened}", hint)

    def post(self, client: httpx2.Client, body: dict[str, Any]) -> tuple[int, bytes]:
        """Return status and content of the answer to one request. The time limit of httpx is one per read, this one is for all."""
        end, content = time.monotonic() + self.seconds, b""
        with client.stream("POST", self.url, content=json.dumps(body).encode()) as answer:
            for part in answer.iter_bytes():
                content += part
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout("the answer is incomplete")
                if len(content) > MOST:
                    break
        return answer.status_code, content


class HttpJudge(Chat):
    """Asks the questions of `questions` about pairs.

    Words without a verdict are asked for once more and then count as no; `judge` raises InputError if the first words are all without
    one.
    """

    name = "http"
    unit = 4
    same_threshold = 1.0
    caption_threshold = 1.0

    @cached_property
    def reading(self) -> Reading:
        return Reading(f"{self.model} at {self.url}")

    def judge(self, pairs: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        return in_batches(pairs, self.parallel, lambda some: self.reading.check(self.each(some, verdict_of, answer_of)), advance)


def address(url: str) -> str:
    """Return the URL of the chat completions of an endpoint. Raises UsageError for one that is not of HTTP, or has a password."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(httpx2.URL(url).host.encode("idna")) and parts.port != 0
    except (ValueError, httpx2.InvalidURL):
        is_valid = False
    if not is_valid or not url.isprintable():
        raise UsageError(f"{printable(url)!r} is not the URL of an endpoint", "give one such as http://localhost:8000/v1")
    if "@" in parts.netloc:
        raise UsageError("the URL of the endpoint has a user or a password", f"set {KEY} to the key of the endpoint instead")
    path = parts.path.rstrip("/")
    if not path.endswith(PATH):
        path = (path or "/v1") + PATH
    return urlunsplit(parts._replace(path=path, fragment=""))


def headers() -> dict[str, str]:
    """Return the headers of requests, with the key in SID_API_KEY if it is set. Raises EnvironmentProblem if a header cannot have it."""
    secret = (environment.variable(KEY) or "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise EnvironmentProblem(f"{KEY} holds characters that a key cannot have", "set it to the key of the endpoint")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})


def data_url(image: np.ndarray) -> str:
    """Return an image uint8 [H, W, 3] as a URL that contains it, in PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def words_of(content: bytes) -> str | None:
    """Return the words of the model in an answer of the protocol; None if it has none."""
    try:
        words = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    # Without halves of surrogate pairs, which no file can hold.
    return words.encode("utf-8", "replace").decode("utf-8") if isinstance(words, str) else None


def excerpt(content: bytes) -> str:
    """Return the start of an answer on one line."""
    return printable(content[:BEGINNING].decode("utf-8", "replace")) or "no content"
