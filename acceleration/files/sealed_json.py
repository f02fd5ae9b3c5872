"""Small JSON files that show when they are not what was written: an object that holds its own digest.

``seal`` writes one way only, so that whatever is altered (a bit, a key given twice, a space) is noticed. What anybody
could have sealed is still checked against a shape before it is used. Standard library only.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from acceleration.files.untrusted import parsing

DIGEST = "sha256"


class Kind:
    """Values that a place may hold, in words and as a test."""

    def __init__(self, words: str, test: Callable[[Any], bool]) -> None:
        self.words, self.test = words, test


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


WHOLE = Kind("a whole number of at most 64 bits", _is_whole)
COUNT = Kind("a whole number from 0 to 2^63-1", lambda value: _is_whole(value) and value >= 0)
NUMBER = Kind("a number", lambda v: _is_whole(v) or (isinstance(v, float) and math.isfinite(v)))
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
ANY = Kind("a value", lambda value: True)
NULL = Kind("null", lambda value: value is None)
SHA256 = Kind("a SHA-256", lambda v: isinstance(v, str) and len(v) == 64 and set(v) <= set("0123456789abcdef"))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


class Each:
    """An object of any keys, all values alike; or a list, all items alike."""

    def __init__(self, of: "Shape", container: type = dict) -> None:
        self.of, self.container = of, container


# A dict states every key ("key?": may be absent; "...": others may be there), a tuple alternatives, a list the items.
Shape: TypeAlias = "Kind | Each | dict[str, Shape] | tuple[Shape, ...] | list[Shape]"


def mismatch(value: Any, shape: Shape, name: str = "") -> str | None:
    """The first place where a JSON value is not of a shape, with what is there and what should be; None if it fits."""
    if isinstance(shape, Kind):
        return None if shape.test(value) else _wrong(name, value, shape.words)
    if isinstance(shape, tuple):
        wrong = [mismatch(value, one, name) for one in shape]
        return wrong[0] if all(wrong) else None
    if isinstance(shape, list) or (isinstance(shape, Each) and shape.container is list):
        return _mismatch_of_items(value, shape, name) if isinstance(value, list) else _wrong(name, value, "a list")
    if not isinstance(value, dict):
        return _wrong(name, value, "an object")
    if isinstance(shape, Each):
        return _first(mismatch(item, shape.of, _below(name, key)) for key, item in value.items())
    return _mismatch_of_keys(value, shape, name)


def _mismatch_of_items(value: list[Any], shape: Each | list[Any], name: str) -> str | None:
    if isinstance(shape, list) and len(value) != len(shape):
        return f"{name or 'the file'} is a list of {len(value)}, must be one of {len(shape)}"
    shapes = [shape.of] * len(value) if isinstance(shape, Each) else shape
    return _first(mismatch(item, one, _below(name, i)) for i, (item, one) in enumerate(zip(value, shapes, strict=True)))


def _mismatch_of_keys(value: Mapping[str, Any], shape: Mapping[str, Any], name: str) -> str | None:
    known = {key.removesuffix("?"): key for key in shape if key != "..."}
    for key, stated in known.items():
        if key not in value and not stated.endswith("?"):
            return f"{_below(name, key)} is missing"
    for key in value:
        if key not in known and "..." not in shape:
            return f"{_below(name, key)} should not be there"
    return _first(mismatch(value[key], shape[known[key]], _below(name, key)) for key in known if key in value)


def _first(found: Any) -> str | None:
    return next((one for one in found if one is not None), None)


def _below(name: str, key: object) -> str:
    text = str(key) if str(key).isprintable() else ascii(key)
    return f"{name}.{text}"[:200] if name else text[:200]


def _wrong(name: str, value: Any, wanted: str) -> str:
    shown = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else json.dumps(value)[:60]
    return f"{name or 'the file'} is {shown}, must be {wanted}"


def seal(body: Mapping[str, Any]) -> str:
    """``body`` as JSON with its own digest."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, DIGEST: digest})


def unseal(content: bytes, refuse: Callable[[str], Exception], shape: Shape = OBJECT) -> dict[str, Any]:
    """What ``seal`` made ``content`` of.

    Raises:
        what ``refuse`` returns: it is no JSON, not what was written, or not of ``shape``.
    """
    with parsing(refuse):
        text = content.decode("utf-8")
        body = json.loads(text)
    if not isinstance(body, dict) or DIGEST not in body:
        raise refuse("holds no digest of itself")
    del body[DIGEST]
    with parsing(refuse):
        intact = seal(body) == text
    if not intact:
        raise refuse("not what was written")
    wrong = mismatch(body, shape)
    if wrong:
        raise refuse(wrong)
    return body
