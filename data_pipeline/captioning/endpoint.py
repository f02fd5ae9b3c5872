"""Captions of a model that sees pictures, by any server with OpenAI's interface (``POST URL/chat/completions``)."""

import base64
import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, NamedTuple

import httpx

from data_pipeline.captions import judged
from opensora.utils.errors import UserError, one_line
from opensora.utils.files.untrusted import parse_json, parsing, short
from opensora.utils.limits import SECONDS, Limits

MAX_ANSWER = 1 << 20  # bytes of an answer that are read
PROMPT = (
    "These are frames of one video clip, in order of time. Describe the clip in one paragraph of plain English: what "
    "is seen, what happens, how the camera moves. Write the description alone."
)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_PASSING = (408, 409, 425, 429)  # statuses besides 5xx behind which the next answer may be another one
_MOST_SHOWN = 200  # characters of what a server says of an error


class CaptionError(Exception):
    """No caption; says why in one line."""


class _NotNow(CaptionError):
    """The next try may go better."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        """``pause_s``: how long the server asks to be left alone."""
        super().__init__(reason)
        self.pause_s = pause_s


class Answer(NamedTuple):
    """What a model wrote."""

    text: str
    model: str  # as the server calls it
    prompt_tokens: int | None
    tokens: int | None  # that it wrote


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A model that is asked. What it is asked is part of what captions depend on; how patiently is not."""

    url: str = ""  # of the server, such as http://localhost:8000/v1
    model: str = ""  # that the server has
    prompt: str = PROMPT
    key_variable: str = ""  # environment variable that holds the key; empty: the server wants none
    frames: int = 8  # of a clip that are sent, spread over it
    frame_side: int = 512  # of their longer side, at most
    max_tokens: int = 300  # of an answer
    temperature: float = 0.0
    concurrency: int = 8  # requests at a time of one worker
    timeout_s: float = 120.0  # for one answer
    retries: int = 5  # after refusals that pass by: too many requests, errors of the server, no or senseless answers
    give_up_s: float = 600.0  # for all tries of one clip together

    LIMITS: ClassVar[Limits] = {
        "frames": (256, "no model sees more"),
        "frame_side": (4096, "no model sees more"),
        "max_tokens": (10**6, "no caption is so long"),
        "temperature": (10, "that is noise"),
        "concurrency": (1024, "each is a thread"),
        "timeout_s": SECONDS,
        "retries": (1000, "the server is not there"),
        "give_up_s": SECONDS,
    }

    def __post_init__(self) -> None:
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={short(repr(self.url), 60)}: must begin with http:// or https://")
        if not self.prompt.strip():
            raise ValueError("prompt='': must say what the model is to write")
        for name in ("frames", "frame_side", "max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        for name in ("timeout_s", "give_up_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name):g}: must be a number above 0")
        for name in ("retries", "temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name):g}: must be a number >= 0")

    @property
    def asked(self) -> dict[str, Any]:
        """What an answer depends on."""
        names = ("model", "prompt", "frames", "frame_side", "max_tokens", "temperature")
        return {name: getattr(self, name) for name in names}

    @property
    def prompt_hash(self) -> str:
        """16 hex digits."""
        return hashlib.blake2b(self.prompt.encode(), digest_size=8).hexdigest()


def key_of(cfg: EndpointConfig) -> str:
    """The key, or nothing where none is wanted.

    Raises:
        UserError: the environment has none.
    """
    key = os.environ.get(cfg.key_variable, "").strip() if cfg.key_variable else ""
    if cfg.key_variable and not key:
        raise UserError(
            f"captions.endpoint.key_variable={cfg.key_variable}: the environment has no such variable; export the key "
            "in it, or leave it empty for a server that wants none"
        )
    return key


class Endpoint:
    """A server; any number of threads may ask at once."""

    def __init__(self, cfg: EndpointConfig, sleep: Callable[[float], object] = time.sleep) -> None:
        """Raises: UserError: the environment holds no key."""
        self._cfg, self._sleep, self._key = cfg, sleep, key_of(cfg)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=cfg.concurrency)
        self._client = httpx.Client(headers=headers, timeout=cfg.timeout_s, limits=limits, follow_redirects=False)
        self._url = f"{cfg.url.rstrip('/')}/chat/completions"
        self._is_lost = False  # nothing of it was heard for all tries of a clip; then the next ones have one each

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def caption(self, pictures: Sequence[bytes], until: float) -> Answer:
        """What the model writes about a clip.

        Args:
            pictures: frames as JPEG, in order of time.
            until: monotonic seconds at which there has to be an answer.

        Raises:
            CaptionError: there is none, after all tries.
        """
        until = min(until, time.monotonic() + self._cfg.give_up_s)
        wanted, tries = self._question(pictures), 1 if self._is_lost else self._cfg.retries + 1
        for attempt in range(tries):
            try:
                answer = self._ask(wanted, until)
                self._is_lost = False
                return answer
            except _NotNow as error:
                pause = _pause_s(attempt, error.pause_s)
                if attempt + 1 == tries or time.monotonic() + pause >= until:
                    self._is_lost = True
                    raise CaptionError(f"{error}, after {_count(attempt + 1, 'try', 'tries')}") from None
                self._sleep(pause)
        raise AssertionError("unreachable")

    def _question(self, pictures: Sequence[bytes]) -> dict[str, Any]:
        cfg = self._cfg
        shown = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(one).decode()}"}}
            for one in pictures
        ]
        content = [*shown, {"type": "text", "text": cfg.prompt}]
        messages = [{"role": "user", "content": content}]
        settings = {"max_tokens": cfg.max_tokens, "temperature": cfg.temperature}
        return {"model": cfg.model, "messages": messages, **settings}

    def _ask(self, wanted: dict[str, Any], until: float) -> Answer:
        left = until - time.monotonic()
        if left <= 0:
            raise CaptionError("no time was left to ask")
        seconds = min(self._cfg.timeout_s, left)
        try:
            with self._client.stream("POST", self._url, json=wanted, timeout=seconds) as response:
                content = _read(response, time.monotonic() + seconds)
        except httpx.TimeoutException:
            raise _NotNow(f"no answer within {seconds:.3g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _NotNow(self._said(f"cannot be reached ({type(error).__name__}: {error})")) from None
        if response.status_code != 200:
            raise self._refusal(response, content)
        return self._parsed(content)

    def _refusal(self, response: httpx.Response, content: bytes) -> CaptionError:
        status = response.status_code
        reason = self._said(f"HTTP status {status} ({_message(content)})")
        if status in _PASSING or status >= 500:
            return _NotNow(reason, _retry_after_s(response.headers.get("Retry-After", "")))
        return CaptionError(reason)

    def _parsed(self, content: bytes) -> Answer:
        found = parse_json(content, lambda why: _NotNow(f"an answer that is no JSON ({short(why, 80)})"))
        with parsing(lambda _: _NotNow("an answer without choices[0].message.content")):
            text = _text_of(found["choices"][0]["message"]["content"])
        text = " ".join(self._without_key(text).split())
        verdict = judged(text, "the answer")
        if verdict.reason or not text.isprintable():
            raise _NotNow(verdict.detail or "the answer holds control characters")
        model, usage = found.get("model"), found.get("usage")  # it is a dict: it has choices
        counts = usage if isinstance(usage, dict) else {}
        prompt_tokens, tokens = (_whole(counts.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        return Answer(text, model if isinstance(model, str) and model else self._cfg.model, prompt_tokens, tokens)

    def _said(self, text: str) -> str:
        return short(one_line(self._without_key(text)), _MOST_SHOWN)

    def _without_key(self, text: str) -> str:
        """Some servers repeat what they were sent."""
        return text.replace(self._key, "***") if self._key else text


def _read(response: httpx.Response, until: float) -> bytes:
    content = b""
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > MAX_ANSWER:
            raise _NotNow(f"an answer of more than {MAX_ANSWER} bytes")
        if time.monotonic() > until:
            raise httpx.ReadTimeout("slow")
    return content


def _text_of(content: Any) -> str:
    """Some servers answer in parts, as they are asked."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = " ".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        raise _NotNow("an answer that is no text")
    return content


def _message(content: bytes) -> str:
    """What a server says of an error."""
    with contextlib.suppress(Exception):  # whatever it is: it is words for a person
        found = parse_json(content, ValueError)["error"]
        return str(found["message"] if isinstance(found, dict) else found)
    return content[:_MOST_SHOWN].decode("utf-8", "replace") or "no words"


def _retry_after_s(value: str) -> float | None:
    """Seconds, which the header says as such or as a time of day."""
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if seconds == seconds else None
    with contextlib.suppress(ValueError, TypeError):
        at = parsedate_to_datetime(value)
        at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
        return max(0.0, (at - datetime.now(timezone.utc)).total_seconds())
    return None


def _pause_s(attempt: int, asked: float | None) -> float:
    """Twice as long as before, and never less than the server asks for."""
    return max(asked or 0.0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**attempt))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62 else None


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
