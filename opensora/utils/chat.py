"""One question to a language model, by any server with OpenAI's interface (``POST URL/chat/completions``)."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parse_json, parsing, short
from opensora.utils.limits import SECONDS, Limits

MAX_ANSWER = 2**20  # bytes of an answer that are read
TEMPERATURE, TOP_P = 0.01, 0.7  # as published

Messages = Sequence[tuple[str, str]]  # (role: system, user or assistant; text)


class ChatError(Exception):
    """No answer; says why in one line."""


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """A language model that writes prompts out, and says how much moves. Nothing is sent unless ``prompts`` is true or
    ``sampling.motion_score`` is dynamic."""

    prompts: bool = False  # rewrite prompts in the way of training's captions before they are sampled
    url: str = "https://api.openai.com/v1"  # of any server with OpenAI's interface
    model: str = "gpt-4o"
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; empty: the server wants none
    timeout_s: float = 60.0  # for one answer
    tries: int = 3  # then a prompt stays as it is

    LIMITS: ClassVar[Limits] = {"timeout_s": SECONDS, "tries": (100, "the server is not there")}

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={short(repr(self.url), 60)}: must begin with http:// or https://")
        if not self.model:
            raise ValueError("model='': must be the name of a model that the server has")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s}: must be a number > 0")
        if self.tries < 1:
            raise ValueError(f"tries={self.tries}: must be an integer >= 1")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere: the key is for the server that was named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def key_of(cfg: RefineConfig) -> str:
    """The key, or nothing where none is wanted.

    Raises:
        UserError: the environment has none.
    """
    key = os.environ.get(cfg.key_variable, "").strip() if cfg.key_variable else ""
    if cfg.key_variable and not key:
        raise UserError(
            f"refine.key_variable={cfg.key_variable}: the environment has no such variable; export the key in it, or "
            "set refine.key_variable='' for a server that wants none"
        )
    return key


def ask(cfg: RefineConfig, messages: Messages, most_tokens: int) -> str:
    """The answer, on one line.

    Raises:
        ChatError: there is none after ``cfg.tries``.
    """
    wanted = {
        "model": cfg.model,
        "messages": [{"role": role, "content": text} for role, text in messages],
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "max_tokens": most_tokens,
    }
    reason = ""
    for _ in range(cfg.tries):
        try:
            answer = " ".join(_answer(cfg, json.dumps(wanted).encode()).split())
        except ChatError as error:
            reason = str(error)
            continue
        if answer:
            return answer
        reason = "an empty answer"
    raise ChatError(reason)


def _answer(cfg: RefineConfig, body: bytes) -> str:
    headers = {"Content-Type": "application/json"}
    if key := key_of(cfg):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{cfg.url.rstrip('/')}/chat/completions", data=body, headers=headers)
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=cfg.timeout_s) as response:
            content = response.read(MAX_ANSWER)
    except urllib.error.HTTPError as error:
        raise ChatError(f"HTTP status {error.code}") from None
    except (OSError, ValueError) as error:  # not there, too slow, cut off, or no address
        raise ChatError(short(str(getattr(error, "reason", error)) or type(error).__name__, 100)) from None
    found = parse_json(content, lambda why: ChatError(f"an answer that is no JSON ({why})"))
    with parsing(lambda _: ChatError("an answer without choices[0].message.content")):
        text = found["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ChatError("an answer that is no text")
    return text
