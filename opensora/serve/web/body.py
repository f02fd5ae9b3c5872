"""Bodies of requests: limits while they are read, and what is in them: JSON, a form, or a form with files.

Nothing here knows the framework: what is read comes from an ASGI ``receive``.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from opensora.serve.refusal import Refused
from opensora.utils.files.untrusted import parsing, short

Receive = Callable[[], Awaitable[Any]]

IDLE_S = 10.0  # between two pieces of a body
START_S, LEAST_RATE = 20.0, 16_384.0  # a body of so many bytes a second, and some time besides
MAX_DEPTH = 16  # of JSON
MAX_FIELDS, MAX_FILES = 200, 8
MAX_NAME = 200  # characters of a field's name


class Gone(Exception):
    """The client has closed the connection."""


@dataclass(frozen=True)
class Body:
    """What a request holds."""

    fields: Mapping[str, Any] = field(default_factory=dict)  # of JSON
    pairs: Sequence[tuple[str, str]] = ()  # of a form, in order
    files: Sequence[tuple[str, bytes]] = ()  # (name of the field, bytes); the client's name of a file is not read

    def digest(self) -> str:
        """The same for the same request: the border between parts of a form, which clients draw, is left out."""
        files = [(name, hashlib.sha256(data).hexdigest()) for name, data in self.files]
        told = [dict(self.fields), list(self.pairs), files]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class Budget:
    """Bytes of bodies that are held at once, of all requests: one process answers them all."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0


class Share:
    """What one request has of the budget, until it is answered."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._held = budget, 0

    def take(self, count: int) -> None:
        """
        Raises:
            Refused: 503; others hold too much.
        """
        if self._budget.held + count > self._budget.most:
            raise Refused(503, "too many large requests at once; try again", code="busy", headers={"Retry-After": "2"})
        self._budget.held += count
        self._held += count

    def give_back(self) -> None:
        self._budget.held -= self._held
        self._held = 0


async def read_body(receive: Receive, headers: Mapping[str, str], most: int, share: Share) -> bytes:
    """All bytes of a body.

    Raises:
        Refused: 413 beyond ``most`` bytes, by what was announced or by what came; 408 where it comes too slowly; 503.
        Gone: the client has left.
    """
    too_large = Refused(413, f"the body: must be at most {most} bytes", code="too_large")
    announced = headers.get("content-length", "")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > most):
        raise too_large
    pieces: list[bytes] = []
    size, began = 0, time.monotonic()
    while True:
        left = began + START_S + size / LEAST_RATE - time.monotonic()
        message = await _next(receive, min(IDLE_S, left))
        piece: bytes = message.get("body", b"")
        share.take(len(piece))
        size += len(piece)
        if size > most:
            raise too_large
        pieces.append(piece)
        if not message.get("more_body"):
            return b"".join(pieces)


async def _next(receive: Receive, wait_s: float) -> Any:
    try:
        message = await asyncio.wait_for(receive(), max(wait_s, 0.001))
    except asyncio.TimeoutError:
        raise Refused(408, "the body came too slowly", code="too_slow", headers={"Connection": "close"}) from None
    if message["type"] == "http.disconnect":
        raise Gone
    return message


def parse(content_type: str, data: bytes) -> Body:
    """What the bytes say.

    Raises:
        Refused: 415 for another type, 400 for what cannot be read.
    """
    kind = content_type.split(";")[0].strip().lower()
    if kind == "application/json":
        return Body(fields=parse_object(data))
    if kind == "application/x-www-form-urlencoded":
        with parsing(_broken("form")):
            pairs = parse_qsl(data.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
        return Body(pairs=pairs)
    if kind == "multipart/form-data":
        return _parse_parts(content_type, data)
    takes = "application/json or multipart/form-data"
    raise Refused(415, f"Content-Type={short(kind) or 'none'}: must be {takes}", code="unsupported_media_type")


def parse_object(data: bytes) -> dict[str, Any]:
    """An object of JSON: UTF-8, no name twice, no NaN, not deep.

    Raises:
        Refused: 400.
    """
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH * 100:
        raise _broken("JSON")("more brackets than a request has")
    with parsing(_broken("JSON")):
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    if not isinstance(value, dict):
        raise _broken("JSON")("must be an object {...}")
    if _depth(value) > MAX_DEPTH:
        raise _broken("JSON")(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _broken(what: str) -> Callable[[str], Refused]:
    return lambda reason: Refused(400, f"the body is no {what} that can be read: {reason}", code="invalid_body")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise Refused(400, "the body: a name is there twice in an object of JSON", code="invalid_body")
    return result


def _no_constant(constant: str) -> Any:
    raise Refused(400, f"the body: {constant} is no number of JSON", code="invalid_body")


def _depth(value: Any) -> int:
    """Levels of lists and objects; not by recursion, which what is deep would end."""
    level, deep = [value], 0
    while level:
        deep += 1
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [item for items in inside for item in items if isinstance(item, (dict, list))]
    return deep


class _Parts:
    """Collects the parts of a form, as the parser calls."""

    def __init__(self) -> None:
        self.done = False
        self.parts: list[tuple[dict[str, str], bytes]] = []
        self._headers: dict[str, str] = {}
        self._name, self._value = b"", b""
        self._data: list[bytes] = []

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self.begin,
            "on_part_data": lambda data, start, end: self._data.append(data[start:end]),
            "on_part_end": self.end_part,
            "on_header_field": self.name,
            "on_header_value": self.value,
            "on_header_end": self.end_header,
            "on_end": self.end,
        }

    def begin(self) -> None:
        if len(self.parts) >= MAX_FIELDS:
            raise Refused(400, f"the body: more than {MAX_FIELDS} fields", code="invalid_body")
        self._headers, self._data = {}, []

    def name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def end_header(self) -> None:
        self._headers[_utf8(self._name).lower()] = _utf8(self._value)
        self._name = self._value = b""

    def end_part(self) -> None:
        self.parts.append((self._headers, b"".join(self._data)))

    def end(self) -> None:
        self.done = True


def _parse_parts(content_type: str, data: bytes) -> Body:
    from python_multipart.multipart import MultipartParser, parse_options_header

    found = _Parts()
    with parsing(_broken("multipart form")):
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        parser = MultipartParser(boundary, found.callbacks())  # type: ignore[arg-type]
        parser.write(data)
        parser.finalize()
    if not boundary or not found.done:
        raise _broken("multipart form")("it ends before its last boundary" if boundary else "no boundary is named")
    named = [(_disposition(headers), value) for headers, value in found.parts]
    pairs = [(name, _utf8(value)) for (name, is_file), value in named if not is_file]
    files = [(name, value) for (name, is_file), value in named if is_file]
    if len(files) > MAX_FILES:
        raise Refused(400, f"the body: more than {MAX_FILES} files", code="invalid_body")
    return Body(pairs=pairs, files=files)


def _disposition(headers: Mapping[str, str]) -> tuple[str, bool]:
    """(name of the field, whether it is a file)."""
    from python_multipart.multipart import parse_options_header

    with parsing(_broken("multipart form")):
        kind, options = parse_options_header(headers.get("content-disposition", "").encode())
    name = _utf8(options.get(b"name", b""))
    if kind.lower() != b"form-data" or not 0 < len(name) <= MAX_NAME:
        raise _broken("multipart form")("a part of it has no name")
    return name, b"filename" in options


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise _broken("multipart form")("a text of it is not UTF-8") from None
