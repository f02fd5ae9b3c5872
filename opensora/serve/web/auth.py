"""Who asks: keys, and web pages of other addresses. Standard library only.

Without keys the service listens on this host alone. Any page in a browser of this host could then post forms to it, or
read answers by a name that it has pointed here (DNS rebinding): so the name that is asked for, and the page that asks,
must be this host's own or listed in ``origins``.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from opensora.serve.config import LOOPBACK, ServeConfig
from opensora.serve.refusal import Refused
from opensora.serve.request import MAX_PRIORITY
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import read_text

LEAST_KEY, MOST_KEY, MOST_KEYS = 16, 256, 10_000  # characters, and how many
_LINE = re.compile(r"(?P<key>[!-~]+)(?:\s+priority=(?P<priority>-?[0-9]{1,3}))?")
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?")
SAFE = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Client:
    """Whose request it is."""

    owner: str  # digest of the key; "" where none are asked for
    most_priority: int = MAX_PRIORITY


class Keys:
    """Keys of a file: one per line, ``KEY`` or ``KEY priority=0``, the most that it may ask for; # begins a comment."""

    def __init__(self, path: Path | None) -> None:
        self._clients: dict[bytes, Client] | None = None if path is None else _read(path)

    def client(self, headers: Mapping[str, str]) -> Client:
        """By ``Authorization: Bearer KEY``; all keys are compared, in the same time whichever it is.

        Raises:
            Refused: 401.
        """
        if self._clients is None:
            return Client("")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        found = [client for known, client in self._clients.items() if hmac.compare_digest(known, digest)]
        if not found or scheme.lower() != "bearer":
            told = "is none of this service's" if key else "is missing; send Authorization: Bearer KEY"
            challenge = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, f"the API key {told}", code="invalid_api_key", headers=challenge)
        return found[0]

    @property
    def needed(self) -> bool:
        return self._clients is not None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(path: Path) -> dict[bytes, Client]:
    clients: dict[bytes, Client] = {}
    for number, line in enumerate(read_text(path, f"keys={path}").splitlines(), start=1):
        if not (text := line.split("#")[0].strip()):
            continue
        found = _LINE.fullmatch(text)
        if not found or not LEAST_KEY <= len(found["key"]) <= MOST_KEY:
            wanted = (
                f"a key of {LEAST_KEY} to {MOST_KEY} printable characters without space, priority=N behind it or not"
            )
            raise UserError(f"keys={path} line {number}: must be {wanted}")
        digest = _digest(found["key"])
        most = MAX_PRIORITY if found["priority"] is None else int(found["priority"])
        clients[digest] = Client(hashlib.sha256(digest).hexdigest(), max(-MAX_PRIORITY, min(MAX_PRIORITY, most)))
    if not 0 < len(clients) <= MOST_KEYS:
        raise UserError(f"keys={path}: {len(clients)} keys; must hold 1 to {MOST_KEYS}, one per line")
    return clients


class Origins:
    """Which names this service answers to, and which pages may call it."""

    def __init__(self, cfg: ServeConfig) -> None:
        """
        Raises:
            UserError: an origin that is none.
        """
        for origin in cfg.origins:
            if not _ORIGIN.fullmatch(origin):
                raise UserError(f"origins: {origin!r} must be as a browser writes it: https://host, or with a port")
        self.listed = cfg.origins
        listed = (urlsplit(origin).hostname or "" for origin in cfg.origins)
        self._hosts = None if cfg.keys else {*LOOPBACK, *listed}

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """
        Raises:
            Refused: 403.
        """
        host = headers.get("host", "")
        if self._hosts is not None and _name(f"//{host}") not in self._hosts:
            raise Refused(403, "Host: must be this host's own name, or of a page of origins", code="forbidden")
        origin = headers.get("origin")
        if method in SAFE or origin is None or origin in self.listed:
            return
        if origin == "null" or _place(origin) != host.lower():
            raise Refused(403, "Origin: this page may not call the service; list it in origins", code="forbidden")


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _place(origin: str) -> str:
    """Name and port, as the header Host writes them."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
