"""Damage to small files, seeded: of bytes, of the values that JSON holds, and of what is in a file's place."""

import copy
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opensora.utils.errors import UserError

BRACKETS = 10**5
LIMIT_S = 10.0  # for reading one damaged file

# What JSON can hold in place of anything else.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.5, float("nan"), float("inf"), 2**63, -(2**63), 10**300, 1e308),
    *("", "a", "\0", "../x", "/etc/hostname", "x" * 5000, "\ud800", "step-00000002"),
    *([], [[]], [0] * 100, {}, {"a": {}}, {"": None}),
)


def of_bytes(content: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """Flipped bits mostly, also cuts, zeros, noise, doubled parts, brackets; none is the content itself."""
    made = 0
    while made < count:
        damaged = _damaged(content, rng)
        if damaged != content:
            made += 1
            yield damaged


def _damaged(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    to = rng.randrange(at, len(content) + 1)
    kind = rng.random()
    if kind < 0.5 and content:
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind < 0.65:
        return content[:at]
    if kind < 0.75:
        return content[:at] + bytes(to - at) + content[to:]
    if kind < 0.85:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
    if kind < 0.93:
        return content[:at] + content[to:]
    whole = (
        b"",
        bytes(len(content)),
        b"[" * BRACKETS,
        b'{"a":' * BRACKETS,
        b"\xff\xfe" + content,
        content * 2,
        b"null",
    )
    return rng.choice(whole)


def of_values(value: Any, rng: random.Random, count: int) -> Iterator[Any]:
    """One to three places of a JSON value hold something else, are gone, or have a neighbour."""
    for _ in range(count):
        changed = copy.deepcopy(value)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            changed = _changed(changed, rng)
        yield changed


def _changed(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.2:
        del value[key]
    elif kind < 0.3 and isinstance(value, dict):
        value[rng.choice(("extra", "", "\ud800", "x" * 300, "../y"))] = rng.choice(VALUES)
    elif kind < 0.3:
        value.append(rng.choice(VALUES))
    elif isinstance(value[key], (dict, list)) and kind < 0.85:
        value[key] = _changed(value[key], rng)
    else:
        value[key] = rng.choice(VALUES)
    return value


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


# What may be where a file belongs.
IN_PLACE: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link in a circle": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


def outcome(action: Callable[[], Any]) -> str:
    """``fine``, the one line of a refusal, or what is wrong: a traceback, several lines, or more than ``LIMIT_S``."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end in {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        action()
        return "fine"
    except UserError as error:
        line = str(error)
        return line if line.strip() and len(line) < 2000 else f"WRONG: {line[:2000]!r}"
    except Exception as error:
        return f"WRONG: {error!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def replace(path: Path, content: bytes) -> None:
    """Not over what is there, which may be mapped."""
    if path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(content)
