"""Prompts that a language model writes out, against a server here that stands in for it: what is sent, and every way in
which there is no answer."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from opensora.config.run import SampleConfig
from opensora.inference import job as whole_job
from opensora.inference import refine
from opensora.inference.job import with_motions
from opensora.inference.prompts import Job, final_prompt, read_jobs
from opensora.inference.refine import check_refine, motion_of, refined, rewritten
from opensora.sampling.options import SamplingOption
from opensora.utils.chat import ChatError, RefineConfig, ask
from opensora.utils.errors import UserError

KEY = "A_KEY_FOR_TESTS"


class Server:
    """Answers with what it is told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.answers: list[tuple[int, bytes, dict[str, str]]] = []  # the last one is repeated
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.paths.append(self.path)
                outer.keys.append(self.headers.get("Authorization"))
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                at = min(len(outer.asked), len(outer.answers)) - 1
                status, body, headers = outer.answers[at]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def says(self, *texts: str) -> None:
        for text in texts:
            answer = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            self.answers.append((200, json.dumps(answer).encode(), {}))

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(KEY, "secret")
    one = Server()
    yield one
    one.close()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only process."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects: None)


def of(server: Server, **more: Any) -> RefineConfig:
    return RefineConfig(prompts=True, url=server.url, key_variable=KEY, timeout_s=5.0, **more)


def test_what_is_sent(server: Server) -> None:
    """As published: the instruction, three pairs of examples, the prompt; the key as a bearer."""
    server.says(" A cat\n sits. ")
    assert rewritten(of(server, model="some-model"), "a cat", is_video=True) == "A cat sits."
    (asked,) = server.asked
    assert (asked["model"], asked["temperature"], asked["top_p"], asked["max_tokens"]) == ("some-model", 0.01, 0.7, 250)
    roles = [message["role"] for message in asked["messages"]]
    assert roles == ["system", *["user", "assistant"] * 3, "user"]
    assert asked["messages"][-1]["content"] == "a cat" and "video" in asked["messages"][0]["content"]
    assert server.keys == ["Bearer secret"] and server.paths == ["/v1/chat/completions"]
    rewritten(of(server), "a cat", is_video=False)
    assert "picture" in server.asked[1]["messages"][0]["content"]
    server.says("12 motion score")
    assert motion_of(of(server), "a race") == 12 and server.asked[2]["max_tokens"] == 100


def test_a_server_without_a_key(server: Server) -> None:
    server.says("x")
    ask(RefineConfig(url=server.url + "/", key_variable=""), [("user", "a")], 5)
    assert server.keys == [None] and server.paths == ["/v1/chat/completions"]


FAILURES: dict[str, tuple[int, bytes]] = {
    "HTTP status 500": (500, b"out of order"),
    "HTTP status 302": (302, b""),
    "an answer that is no JSON": (200, b"hello"),
    "an answer without choices": (200, b'{"choices": []}'),
    "an answer that is no text": (200, b'{"choices": [{"message": {"content": null}}]}'),
    "an empty answer": (200, b'{"choices": [{"message": {"content": "  "}}]}'),
}


@pytest.mark.parametrize("said", FAILURES)
def test_a_failure_leaves_the_prompt_and_says_so(server: Server, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """After three tries. Nobody is followed elsewhere, as the key is for this server."""
    heard: list[str] = []
    monkeypatch.setattr(refine, "announce", heard.append)
    status, body = FAILURES[said]
    elsewhere = Server()
    server.answers = [(status, body, {"Location": f"{elsewhere.url}/chat/completions"} if status == 302 else {})]
    assert rewritten(of(server), "a cat", is_video=True) == "a cat"
    assert len(server.asked) == 3 and not elsewhere.asked
    elsewhere.close()
    (line,) = heard
    assert line.startswith(f"refine.url={server.url}: {said}") and "'a cat' stays as it is" in line and "\n" not in line
    assert "secret" not in line


def test_a_server_that_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(refine, "announce", heard.append)
    monkeypatch.setenv(KEY, "secret")
    cfg = RefineConfig(prompts=True, url="http://127.0.0.1:9/v1", key_variable=KEY, timeout_s=2.0, tries=2)
    assert rewritten(cfg, "a cat", is_video=True) == "a cat" and motion_of(cfg, "a cat") == 4
    assert len(heard) == 2 and "refused" in heard[0] and "the motion score of 'a cat' is 4" in heard[1]


def test_a_second_try_is_enough(server: Server) -> None:
    server.answers = [(503, b"", {})]
    server.says("better")
    assert rewritten(of(server), "a cat", is_video=True) == "better" and len(server.asked) == 2
    server.answers.pop()
    with pytest.raises(ChatError, match="HTTP status 503"):
        ask(of(server, tries=1), [("user", "x")], 5)


@pytest.mark.parametrize(("said", "score"), [("7", 7), ("7 motion score.", 7), ("0", 1), ("99 motion score", 15)])
def test_scores_are_within_range(server: Server, said: str, score: int) -> None:
    server.says(said)
    assert motion_of(of(server), "x") == score


def jobs_of(cfg: SampleConfig) -> tuple[list[Job], dict[int, int]]:
    return refined(cfg, read_jobs(cfg))


def test_jobs(server: Server, alone: None) -> None:
    """Equal prompts are asked once; every clip of a prompt has the same words; names do not change."""
    server.says("said")
    cfg = SampleConfig(weights="w", prompts=("a", "b", "a"), num_sample=2, refine=of(server))
    jobs, motions = jobs_of(cfg)
    assert [job.text for job in jobs] == ["said"] * 6 and motions == {} and len(server.asked) == 2
    assert [job.name for job in jobs] == [job.name for job in read_jobs(cfg)]
    dynamic = SampleConfig(
        weights="w",
        prompts=("a", "b"),
        refine=RefineConfig(url=server.url, key_variable=KEY, motion_score=True),
    )
    server.answers.clear()
    server.says("9 motion score")
    jobs, motions = jobs_of(dynamic)
    assert [job.text for job in jobs] == ["a", "b"] and motions == {0: 9, 1: 9}


def test_nothing_is_asked_by_default(server: Server, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    cfg = SampleConfig(weights="w", prompt="a", refine=RefineConfig(url=server.url))
    check_refine(cfg, tells_motion=False)
    assert jobs_of(cfg) == (read_jobs(cfg), {}) and not server.asked


@pytest.mark.parametrize("more", [{"prompts": True}, {"motion_score": True}])
def test_without_a_key(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"^refine\.key_variable=OPENAI_API_KEY: the environment has no such variable"):
        check_refine(SampleConfig(weights="w", prompt="a", refine=RefineConfig(**more)), tells_motion=True)


def test_a_motion_score_that_no_prompt_would_name(server: Server) -> None:
    cfg = SampleConfig(weights="w", prompt="a", refine=of(server, motion_score=True), prompt_suffix=False)
    with pytest.raises(
        UserError, match=r"^refine\.motion_score=true: prompts name no motion score; set prompt_suffix=true"
    ):
        check_refine(cfg, tells_motion=False)


@pytest.mark.parametrize("trained_here", [True, False])
def test_words_about_rate_and_motion(trained_here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts end as training had them, or for weights without a configuration as the published sampler ends them."""

    def changed(one: Any, **changes: Any) -> Any:
        return SimpleNamespace(**vars(one) | changes) if isinstance(one, SimpleNamespace) else replace(one, **changes)

    monkeypatch.setattr(whole_job, "replace", changed)

    def told(motions: dict[int, int] | None = None, suffix: bool = True, **more: Any) -> tuple[list[str], bool]:
        """What the model is given."""
        cfg = SampleConfig(weights="w", prompts=("a cat", "B."), **more)
        parts: Any = SimpleNamespace(prompt_suffix=suffix, published_prompts=not trained_here)
        jobs, parts = with_motions(cfg, read_jobs(cfg), parts, motions or {})
        rule: dict[str, Any] = {"suffix": parts.prompt_suffix, "published": parts.published_prompts}
        return [final_prompt(job.text, cfg.sampling, **rule) for job in jobs], parts.prompt_suffix

    assert told(suffix=False) == (["a cat", "B."], False) == told({0: 3, 1: 9}, suffix=False)
    dynamic = {"sampling": SamplingOption(fps=8.0)}
    if trained_here:
        assert told() == (["a cat 24 FPS. 4 motion score.", "B. 24 FPS. 4 motion score."], True)
        texts = ["a cat 8 FPS. 3 motion score.", "B. 8 FPS. 9 motion score."]
    else:
        assert told() == (["a cat. 24 FPS. 4 motion score.", "B. 24 FPS. 4 motion score."], True)
        still = SamplingOption(num_frames=1, motion_score=None)
        assert told(sampling=still) == (["a cat.", "B."], True)
        texts = ["a cat. 8 FPS. 3 motion score.", "B. 8 FPS. 9 motion score."]
    assert told({0: 3, 1: 9}, **dynamic) == (texts, False)


@pytest.mark.parametrize(("field", "value"), [("url", "ftp://x"), ("model", ""), ("timeout_s", 0.0), ("tries", 0)])
def test_what_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}="):
        RefineConfig(**{field: value})
