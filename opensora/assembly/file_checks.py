"""Whether the files that a configuration names are there and fit, each by itself; headers are read, values are not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from opensora.assembly.initial_weights import check_initial
from opensora.config.run import RunConfig
from opensora.models.text import TEXT_ENCODERS
from opensora.models.vae import check_autoencoder
from opensora.utils.errors import UserError
from opensora.utils.files.published_files import set_of
from opensora.utils.files.user_files import absence

_GLOB = "*?["


@dataclass(frozen=True)
class Finding:
    """What became of one file or folder."""

    key: str  # of the configuration
    path: str
    problem: str | None  # None: it is there and fits
    missing: bool = False  # nothing is there at all

    @property
    def published(self) -> str | None:
        """The set of ``opensora.cli.download`` that would bring it, if it is not there."""
        return set_of(self.path) if self.missing else None


def look(key: str, path: str, check: Callable[[], Any] | None = None) -> Finding:
    """Whether something is at ``path``, and what ``check`` says of it."""
    if reason := absence(path) if path else "not set":
        return Finding(key, path, reason, missing=True)
    try:
        if check is not None:
            check()
    except UserError as error:
        return Finding(key, path, str(error).removeprefix(f"{key}={path}: "))
    return Finding(key, path, None)


def autoencoder_files(vae: Any) -> list[Finding]:
    """Of the autoencoder, if it has any."""
    return [look("vae.path", vae.path, partial(check_autoencoder, vae))] if hasattr(vae, "path") else []


def encoder_files(vae: Any, text: Any) -> list[Finding]:
    """Of the autoencoder and the text encoder."""
    found = autoencoder_files(vae)
    for name, check in TEXT_ENCODERS[text.kind].files.items():
        path = getattr(text, name)
        found.append(look(f"text.{name}", path, partial(check, name, path)))
    return found


def run_files(cfg: RunConfig) -> list[Finding]:
    """Of a training run."""
    tables: Sequence[str] = [cfg.data.table] if isinstance(cfg.data.table, str) else list(cfg.data.table)
    found = [look("data.table", table) for table in tables if not set(table) & set(_GLOB)]
    for name in ("root", "features"):
        if path := getattr(cfg.data, name):
            found.append(look(f"data.{name}", path))
    if cfg.train.init_from is not None:
        found.append(look("train.init_from", cfg.train.init_from, partial(check_initial, cfg)))
    if not cfg.data.features or cfg.validate.every:
        found += encoder_files(cfg.vae, cfg.text)
    return found
