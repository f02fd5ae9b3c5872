"""What a scorer is, and the files that it is made of."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from opensora.utils.errors import UserError
from opensora.utils.files.user_files import absence

_BLOCK = 1 << 22
_OF_A_MODEL = (".json", ".safetensors", ".txt")  # of a folder: weights, configuration, vocabulary
_OVERHEAD_MIB = 768  # torch and its libraries


class ScorerFiles:
    """Files and folders of one scorer, and what is in them."""

    def __init__(self, key: str, paths: Mapping[str, str]) -> None:
        """
        Args:
            key: of its section, for messages.
            paths: key below it -> path.

        Raises:
            UserError: one is not there, or is no model.
        """
        self.key, self.paths = key, {name: os.path.abspath(path) for name, path in paths.items()}
        for name, path in paths.items():
            if reason := absence(path):
                raise UserError(f"{key}.{name}={path}: {reason}; nothing is downloaded, name a local one")
        self._model = _files_of(self.paths["model"])
        if os.path.isdir(self.paths["model"]) and not any(path.suffix == ".safetensors" for path in self._model):
            raise UserError(f"{key}.model={paths['model']}: no *.safetensors in it; save the model by transformers")
        self.digests = {"model": _digest(self._model)}
        self.digests |= {name: _digest([Path(self.paths[name])]) for name in sorted(paths) if name != "model"}

    def said(self, name: str) -> str:
        """The key of one of them with its value, as messages begin."""
        return f"{self.key}.{name}={self.paths[name]}"

    def check_memory(self, limit_mib: int) -> None:
        """Weights are in memory twice while they are read. Raises: UserError: more than a worker may ask for."""
        size = sum(path.stat().st_size for path in self._model) >> 20
        need = _OVERHEAD_MIB + 2 * size
        if need > limit_mib and size > 64:
            raise UserError(
                f"{self.said('model')}: {size} MiB of weights do not fit into limits.memory_mib={limit_mib}; "
                f"give limits.memory_mib={need}"
            )


class Scorer(Protocol):
    """A score of a clip."""

    @property
    def files(self) -> ScorerFiles:
        """What it is made of."""

    def score(self, frames: Sequence[np.ndarray], file: str) -> float | None:
        """
        Args:
            frames: one or more of the clip, each (H, W, 3) uint8 RGB.
            file: the video that it is from.

        Returns:
            None: there is nothing to compare it with.

        Raises:
            UserError: the model cannot be loaded.
        """


def _files_of(path: str) -> list[Path]:
    place = Path(path)
    if not place.is_dir():
        return [place]
    return sorted(entry for entry in place.iterdir() if entry.suffix in _OF_A_MODEL and entry.is_file())


def _digest(paths: Sequence[Path]) -> str:
    """16 hex digits of names and contents."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size};".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
