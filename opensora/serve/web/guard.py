"""Around the application, for every request: who may ask, how many at once, what every answer carries, one line in the
log, and mistakes of ours that end as an answer. Plain ASGI; the log holds no prompt, no query and no key.
"""

import asyncio
import json
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from opensora.serve.refusal import Refused
from opensora.serve.web.body import Receive
from opensora.serve.web.metrics import OTHER
from opensora.serve.web.service import Service
from opensora.utils.console import announce
from opensora.utils.errors import one_line
from opensora.utils.files.untrusted import short

Send = Callable[[Any], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]

MOST_OPEN = 500  # requests that are being answered
DRAIN_S, DRAIN_IDLE_S, DRAIN_TIMES = 5.0, 0.25, 4  # rest of a body that is not read: so long, so quiet, so many times
VERSIONS = ("1.0", "1.1")
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")
PROBES = ("/healthz", "/readyz", "/metrics")  # asked every few seconds: their lines would bury all others
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
EVERY_ANSWER = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def answer_of(refused: Refused) -> tuple[dict[str, str], bytes]:
    """(headers, body) of a refusal. What another try would not change, clients are told not to try again."""
    headers = {"content-type": "application/json", **refused.headers}
    if refused.status in (409, 501, 507):
        headers["x-should-retry"] = "false"
    return headers, json.dumps(refused.plain()).encode()


class Guard:
    """The application with all that is in front of it."""

    def __init__(self, application: Application, service: Service) -> None:
        self._application, self._service = application, service

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        await _Exchange(self._service, scope, receive, send).run(self._application)


class _Exchange:
    """One request and its answer."""

    def __init__(self, service: Service, scope: Any, receive: Receive, send: Send) -> None:
        self._service, self._scope = service, scope
        self._receive, self._send = receive, send
        self._headers = headers_of(scope)
        length = self._headers.get("content-length", "0")
        self._unread = length != "0" or "transfer-encoding" in self._headers
        self._status, self._bytes = 0, 0

    async def run(self, application: Application) -> None:
        requests, began = self._service.requests, time.monotonic()
        requests.open += 1
        try:
            self._check()
            await application(self._scope, self.receive, self.send)
        except Refused as refused:
            await self._refuse(refused)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            requests.mistakes += 1
            frames = " < ".join(f"{one.filename.rsplit('/')[-1]}:{one.lineno}" for one in _frames(error))
            announce(f"a mistake: {type(error).__name__} at {frames}")  # its text may hold a prompt
            await self._refuse(Refused(500, "a mistake of this service; its log says where", code="mistake"))
        finally:
            requests.open -= 1
            self._tell(time.monotonic() - began)

    def _check(self) -> None:
        if self._scope["http_version"] not in VERSIONS:  # answers to others may be read otherwise than they are meant
            raise Refused(400, "must be HTTP/1.1, or 1.0", code="invalid_http_version")
        if self._service.requests.open > MOST_OPEN:
            raise Refused(503, "too many requests at once; try again", code="busy", headers={"Retry-After": "2"})
        self._service.origins.check(self._scope["method"], self._headers)

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            self._unread = False
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [*message.get("headers", ()), *EVERY_ANSWER]
            if self._unread and not await self._drained():
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        self._bytes += len(message.get("body", b""))
        await self._send(message)

    async def _drained(self) -> bool:
        """Take what is left of a body, so that its sender reads the answer instead of a reset connection. Not for
        long, and not where the sender waits to be asked for it."""
        if "expect" in self._headers:
            return False
        most, end = DRAIN_TIMES * self._service.body_bytes, time.monotonic() + DRAIN_S
        while self._unread and most > 0 and time.monotonic() < end:
            try:
                message = await asyncio.wait_for(self.receive(), DRAIN_IDLE_S)
            except asyncio.TimeoutError:
                return False
            most -= len(message.get("body", b""))
        return not self._unread

    async def _refuse(self, refused: Refused) -> None:
        if self._status:
            return  # the answer has begun; its connection ends without the rest
        headers, body = answer_of(refused)
        headers["content-length"] = str(len(body))
        pairs = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})

    def _tell(self, seconds: float) -> None:
        method = self._scope["method"] if self._scope["method"] in METHODS else OTHER
        route = getattr(self._scope.get("route"), "path", OTHER)
        self._service.requests.answered(method, route, self._status, seconds)
        if route in PROBES and self._status in (200, 503):
            return
        path = one_line(short(self._scope["raw_path"].decode("ascii", "replace"), 100))
        announce(f"{method} {path} {self._status} {1000 * seconds:.0f} ms {self._bytes} B")


def headers_of(scope: Any) -> dict[str, str]:
    """Headers by small letters; of one that is there twice the first."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return headers


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where it arose, the innermost first, a few."""
    return traceback.extract_tb(error.__traceback__)[::-1][:6]


def cors_headers(origins: tuple[str, ...]) -> Mapping[str, Any]:
    """What pages of other addresses may do."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST", "DELETE"],
        "allow_headers": ["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
        "expose_headers": ["openai-poll-after-ms", "Retry-After", "Content-Range", "ETag"],
        "max_age": 600,
    }
