"""The judge `http` against an endpoint on this machine, which answers, refuses, stalls and breaks as endpoints do."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from sidcli.curation import endpoint
from sidcli.curation.endpoint import HttpJudge, address
from sidcli.curation.judge import Judge
from sidcli.errors import EnvironmentProblem, InputError, UsageError
from tests.curation.rendered import noise_pair

PAIR = noise_pair(0)
YES = "1. A key.\n2. Both are gold.\n3. The same.\nANSWER: YES"
NO = "ANSWER: NO"
Answer = str | bytes | int | Literal["stall", "drip", "flood", "cut"] | Callable[[dict[str, Any]], str | int]
"""The words of the model, a whole body, an HTTP status, or a function of the request that returns one of them; or a trouble."""


@dataclass
class Endpoint:
    """Answers requests in order, and further ones with the last answer. Keeps the requests."""

    answers: list[Answer]
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def running(self) -> Iterator[Endpoint]:
        served = self

        class Handler(Requests):
            endpoint = served

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield self
        finally:
            self.released.set()
            server.shutdown()
            server.server_close()


class Requests(BaseHTTPRequestHandler):
    endpoint: Endpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        served = self.endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with served.lock:
            served.requests.append((self.path, dict(self.headers), body))
            answer = served.answers.pop(0) if len(served.answers) > 1 else served.answers[0]
        match answer(body) if callable(answer) else answer:
            case "stall":
                served.released.wait(20)
                self.close_connection = True
            case "drip":  # a byte at a time: no single read times out
                self.start(200, 1000)
                with suppress(OSError):
                    while not served.released.wait(0.02):
                        self.wfile.write(b" ")
            case "flood":
                self.start(200, 1 << 40)
                with suppress(OSError):
                    while not served.released.is_set():
                        self.wfile.write(b" " * 65536)
            case "cut":
                self.start(200, 1000)
                self.wfile.write(b"{")
                self.close_connection = True
            case int(status):
                self.reply(status, b'{"error": {"message": "not\\u0020now\\u001b"}}')
            case bytes(content):
                self.reply(200, content)
            case words:
                message = {"role": "assistant", "content": words}
                self.reply(
                    200,
                    json.dumps({"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode(),
                )

    def start(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def reply(self, status: int, content: bytes) -> None:
        self.start(status, len(content))
        self.wfile.write(content)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.delenv("SID_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


Serve = Callable[..., Endpoint]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start an endpoint with these answers."""
    with ExitStack() as opened:
        yield lambda *answers: opened.enter_context(Endpoint(list(answers)).running())


def judge_at(served: Endpoint, seconds: float = 20.0, parallel: int = 1) -> Judge:
    return HttpJudge(served.url, "some-vlm", seconds, parallel)


def test_three_questions_are_asked_as_the_protocol_says(serve: Serve) -> None:
    served = serve(YES)
    (verdict,) = judge_at(served).judge([PAIR])
    assert (verdict.same, verdict.caption) == (1.0, 1.0) and verdict.words.count("Both are gold.") == 3
    assert [path for path, _, _ in served.requests] == ["/v1/chat/completions"] * 3
    bodies = [body for _, _, body in served.requests]
    assert {(body["model"], body["temperature"], len(body["messages"])) for body in bodies} == {("some-vlm", 0, 1)}
    contents = [body["messages"][0]["content"] for body in bodies]
    assert [[part["type"] for part in content] for content in contents] == [["text", "image_url", "text", "image_url", "text"]] * 3
    assert "individual key" in contents[0][-1]["text"] and PAIR.captions[1] in contents[2][-1]["text"]

    def pixels(part: dict[str, Any]) -> np.ndarray:
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))

    for content, panels in zip(contents, (PAIR.panels, PAIR.panels[::-1], PAIR.panels), strict=True):
        assert (pixels(content[1]) == panels[0]).all() and (pixels(content[3]) == panels[1]).all()


def test_the_key_is_sent_as_a_bearer_token_and_none_without_one(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(NO)
    judge_at(served).judge([PAIR])
    assert "Authorization" not in served.requests[0][1]
    monkeypatch.setenv("SID_API_KEY", " secret\n")
    judge_at(served).judge([PAIR])
    assert served.requests[-1][1]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("SID_API_KEY", "sec\nret")
    with pytest.raises(EnvironmentProblem) as caught:
        judge_at(served)
    assert "SID_API_KEY" in caught.value.message and "ret" not in caught.value.message


def test_answers_in_both_orders_decide(serve: Serve) -> None:
    (verdict,) = judge_at(serve(YES, NO, YES)).judge([PAIR])
    assert (verdict.same, verdict.caption) == (0.5, 1.0)


@pytest.mark.parametrize("trouble", [429, 500, 503, 408, "cut", "stall", "drip"])
def test_a_busy_or_failing_endpoint_is_asked_again(serve: Serve, trouble: Answer) -> None:
    served = serve(trouble, trouble, YES)
    (verdict,) = judge_at(served, seconds=0.3 if trouble in ("stall", "drip") else 20.0).judge([PAIR])
    assert verdict.same == 1.0 and len(served.requests) == 5


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (429, 'answered with status 429: {"error": {"message": "not\\u0020now\\u001b"}}'),
        ("stall", "did not answer within 0.1 seconds"),
        ("drip", "did not answer within 0.1 seconds"),
        ("cut", "cannot be reached: "),
    ],
)
def test_after_three_more_attempts_the_error_names_the_url_and_what_happened(serve: Serve, trouble: Answer, said: str) -> None:
    served = serve(trouble)
    with pytest.raises(EnvironmentProblem) as caught:
        judge_at(served, seconds=0.1 if trouble in ("stall", "drip") else 20.0).judge([PAIR])
    assert caught.value.message.startswith(f"{served.url}/chat/completions {said}") and len(served.requests) == 4
    assert caught.value.message.isprintable() and "run it again" in caught.value.hint


def test_an_endpoint_that_is_not_there_is_an_error(serve: Serve) -> None:
    with Endpoint([YES]).running() as gone:
        pass
    with pytest.raises(EnvironmentProblem, match="cannot be reached"):
        judge_at(gone).judge([PAIR])


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "SID_API_KEY"), (403, "SID_API_KEY"), (404, "--set judge_url"), (400, "--set judge_model"), (307, "--set judge_url")],
)
def test_an_endpoint_that_refuses_is_an_error_at_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int, hint: str
) -> None:
    monkeypatch.setenv("SID_API_KEY", "very-secret")
    served = serve(status)
    with pytest.raises(EnvironmentProblem) as caught:
        judge_at(served).judge([PAIR, PAIR])
    assert f"status {status}" in caught.value.message and hint in caught.value.hint and len(served.requests) == 1
    assert "very-secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    "nonsense",
    [
        b"<html>",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": "ANSWER: YES"}]}',
        b"ANSWER: YES\nANSWER: YES",
        b"\xff\xfe",
        b"",
        b"[" * 100_000,
        b'"' + b"x" * (2 << 20) + b'"',
    ],
    ids=lambda content: str(content)[:40],
)
def test_an_answer_that_is_not_of_the_protocol_is_asked_for_again_and_then_an_error_that_shows_its_beginning(
    serve: Serve, nonsense: bytes
) -> None:
    (verdict,) = judge_at(served := serve(nonsense, nonsense, YES)).judge([PAIR])
    assert verdict.same == 1.0 and len(served.requests) == 5
    with pytest.raises(EnvironmentProblem) as caught:
        judge_at(served := serve(nonsense)).judge([PAIR])
    assert caught.value.message.startswith(f"{served.url}/chat/completions answered without words of a model: ")
    assert endpoint.excerpt(nonsense) in caught.value.message and len(caught.value.message) < 2000
    assert caught.value.message.isprintable() and "--set judge_url" in caught.value.hint and len(served.requests) == 4


def test_words_without_a_verdict_are_asked_for_once_more_and_then_count_as_no(serve: Serve) -> None:
    served = serve("I am not sure.", YES, "I am not sure.", "I cannot tell.", YES)
    (verdict,) = judge_at(served).judge([PAIR])
    assert (verdict.same, verdict.caption) == (0.0, 1.0) and len(served.requests) == 5
    assert "same, other order:\nI cannot tell." in verdict.words


def test_a_model_that_answers_none_of_the_first_questions_is_an_error_and_one_that_did_before_is_not(serve: Serve) -> None:
    served = serve("Hello!\u202e\nHow can I help you?")
    judge = judge_at(served, parallel=2)
    with pytest.raises(InputError) as caught:
        judge.judge([PAIR, PAIR, PAIR])
    assert f"some-vlm at {served.url}/chat/completions" in caught.value.message and "Hello!" in caught.value.message
    assert caught.value.message.isprintable() and "--set judge_model" in caught.value.hint
    assert len(served.requests) == 2 * 3 * 2, "the third pair is not asked about"
    served.answers = [YES]
    judge.judge([PAIR])
    served.answers = ["Hello!"]
    assert judge.judge([PAIR])[0].same == 0.0


def test_an_endless_answer_is_not_read_to_its_end(serve: Serve) -> None:
    (verdict,) = judge_at(serve("flood", "flood", NO), seconds=5.0).judge([PAIR])
    assert verdict.same == 0.0
    with pytest.raises(EnvironmentProblem, match="answered without words of a model: "):
        judge_at(serve("flood"), seconds=5.0).judge([PAIR])


def test_words_that_no_file_can_hold_are_replaced(serve: Serve) -> None:
    (verdict,) = judge_at(serve(b'{"choices": [{"message": {"content": "\\ud800\\nANSWER: YES"}}]}')).judge([PAIR])
    assert verdict.same == 1.0 and verdict.words.encode()


def test_pairs_that_are_asked_about_at_the_same_time_keep_their_order(serve: Serve) -> None:
    pairs = [noise_pair(seed) for seed in range(7)]
    alike = {endpoint.data_url(panel) for pair in pairs[::3] for panel in pair.panels}

    def answer(body: dict[str, Any]) -> str:
        return YES if body["messages"][0]["content"][1]["image_url"]["url"] in alike else NO

    told = list[float]()
    verdicts = judge_at(serve(answer), parallel=3).judge(pairs, lambda count, text="": told.append(count))
    assert [verdict.same for verdict in verdicts] == [1, 0, 0, 1, 0, 0, 1] and told == [3, 3, 1]


def test_a_refusal_ends_the_waits_of_the_questions_about_other_pairs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (5.0,))
    pairs = [noise_pair(seed) for seed in range(8)]
    refused = {endpoint.data_url(panel) for panel in pairs[1].panels}
    seen = threading.Semaphore(0)

    def answer(body: dict[str, Any]) -> int:
        if body["messages"][0]["content"][1]["image_url"]["url"] not in refused:
            seen.release()
            return 503
        seen.acquire()  # the question about the first pair is there, too
        return 401

    served = serve(answer)
    with pytest.raises(EnvironmentProblem, match="status 401"):
        judge_at(served, parallel=2).judge(pairs)
    assert len(served.requests) == 2
    served.answers = [YES]
    judge = HttpJudge(served.url, "some-vlm")
    judge.stopped.set()
    assert judge.judge([PAIR])[0].same == 1.0  # a judge can be used again


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://here:8000", "http://here:8000/v1/chat/completions"),
        ("http://here:8000/v1/", "http://here:8000/v1/chat/completions"),
        ("https://here/api/v2", "https://here/api/v2/chat/completions"),
        ("https://here/v1/chat/completions", "https://here/v1/chat/completions"),
        ("https://here/openai?version=2#top", "https://here/openai/chat/completions?version=2"),
    ],
)
def test_the_address_is_completed(given: str, used: str) -> None:
    assert address(given) == used


@pytest.mark.parametrize(
    "url",
    [
        "",
        "here:8000",
        "ftp://here",
        "http://",
        "http://here:port",
        "http://here:99999",
        "http://he\nre",
        "http://[::1",
        "http://..",
        "http://1.2.3.999",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not the URL of an endpoint"):
        HttpJudge(url, "some-vlm")


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        HttpJudge("http://me:secret@here/v1", "some-vlm")
    assert "SID_API_KEY" in caught.value.hint and "secret" not in caught.value.message
