"""Latents and text features on disk: written once, read instead of the files they were made from.

A folder holds ``shard-00000.safetensors``, ... with the features of whole micro-batches, ``null.safetensors`` with
those of the empty prompt, and, written last, ``index.parquet`` (which sample of which epoch lies where) and
``manifest.json``. A shard is complete or absent, and so is the folder.

Epoch e of a run reads epoch ``e % epochs`` of the folder: windows and crops repeat, the order does not.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.datasets.plan import MicroBatch
from opensora.utils.errors import UserError

MANIFEST, INDEX, NULL = "manifest.json", "index.parquet", "null.safetensors"
FORMAT = 1
_OPEN_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the autoencoder and the text encoder made of a micro-batch, in their own precision."""

    latents: Tensor  # (B, C, T', H', W')
    txt: Tensor  # (B, L, D)
    y_vec: Tensor  # (B, V)
    mask: Tensor | None = None  # (B, L) bool

    def tensors(self) -> dict[str, Tensor]:
        named = {"latents": self.latents, "txt": self.txt, "y_vec": self.y_vec, "mask": self.mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, parts: Iterable[tuple[MicroBatch, Features]], identity_hash: str) -> Path:
    """The features of some micro-batches as one file, whole or absent."""
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for position, (micro_batch, features) in enumerate(parts):
        tensors |= {f"{position}.{name}": tensor.cpu().contiguous() for name, tensor in features.tensors().items()}
        rows.append(
            {"epoch": micro_batch.epoch, "bucket": str(micro_batch.bucket), "samples": list(micro_batch.sample_ids)}
        )
    return _write(folder / shard_name(number), tensors, {"hash": identity_hash, "batches": json.dumps(rows)})


def write_null(folder: Path, tensors: Mapping[str, Tensor], identity_hash: str) -> None:
    """Text features of the empty prompt."""
    _write(folder / NULL, {n: t.cpu().contiguous() for n, t in tensors.items()}, {"hash": identity_hash})


def shard_hash(path: Path) -> str:
    """Which configuration a shard was made for; "" where the file cannot be read."""
    try:
        with safe_open(path, "pt") as shard:
            return str(shard.metadata()["hash"])
    except (SafetensorError, OSError, KeyError, TypeError):
        return ""


def write_index(folder: Path, shards: int, epochs: int, identity: Mapping[str, Any], identity_hash: str) -> None:
    """Make the folder complete: where every sample lies, and what it was made for."""
    columns: dict[str, list[Any]] = {name: [] for name in ("epoch", "sample", "shard", "batch", "row", "bucket")}
    for number in range(shards):
        with safe_open(folder / shard_name(number), "pt") as shard:
            batches = json.loads(shard.metadata()["batches"])
        for position, batch in enumerate(batches):
            for row, sample in enumerate(batch["samples"]):
                values = (batch["epoch"], sample, number, position, row, batch["bucket"])
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
    aside = folder / f".{INDEX}.{os.getpid()}"
    papq.write_table(pa.table(columns), aside)
    os.replace(aside, folder / INDEX)
    manifest = {"format": FORMAT, "hash": identity_hash, "epochs": epochs, "shards": shards, "made_for": identity}
    aside = folder / f".{MANIFEST}.{os.getpid()}"
    aside.write_text(json.dumps(manifest, indent=1))
    os.replace(aside, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a complete folder was made for.

    Raises:
        UserError: there is none, it is not complete, or of another version of this project.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        state = "is not complete" if folder.is_dir() else "does not exist"
        raise UserError(f"data.features={folder}: {state}; run python -m opensora.cli.precompute") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"data.features={folder}: written in another format; run python -m opensora.cli.precompute")
    return dict(manifest)


class FeatureStore:
    """Reads a complete folder."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: the folder is not complete.
        """
        self._folder = folder
        self.epochs = int(read_manifest(folder)["epochs"])
        index = papq.read_table(folder / INDEX)
        epoch, sample = (index[name].to_numpy().astype(np.int64) for name in ("epoch", "sample"))
        self._samples = int(sample.max()) + 1
        key = epoch * self._samples + sample
        order = np.argsort(key, kind="stable")
        self._key = key[order]
        place = np.stack([index[name].to_numpy().astype(np.int32) for name in ("shard", "batch", "row")], axis=1)
        self._place = place[order]
        self._bucket = index["bucket"].combine_chunks().dictionary_encode()
        self._order = order
        self._names = ("latents", *self.null())
        self._shards: OrderedDict[int, Any] = OrderedDict()

    def read(self, micro_batch: MicroBatch) -> Features:
        """The features of a micro-batch's samples.

        Raises:
            UserError: a sample that is not there in this bucket, or a damaged shard.
        """
        rows = [self._row(sample, micro_batch) for sample in micro_batch.sample_ids]
        return Features(**{name: torch.cat([row[name] for row in rows]) for name in self._names})

    def null(self) -> dict[str, Tensor]:
        """``txt``, ``y_vec`` and perhaps ``mask`` of the empty prompt, (1, ...) each."""
        return dict(load_file(self._folder / NULL))

    def _row(self, sample: int, micro_batch: MicroBatch) -> dict[str, Tensor]:
        key = (micro_batch.epoch % self.epochs) * self._samples + sample
        at = int(np.searchsorted(self._key, key))
        missing = at == len(self._key) or self._key[at] != key
        if missing or self._bucket[int(self._order[at])].as_py() != str(micro_batch.bucket):
            raise UserError(
                f"data.features={self._folder}: sample {sample} of epoch {micro_batch.epoch} is not there in bucket "
                f"{micro_batch.bucket}; run python -m opensora.cli.precompute again"
            )
        number, batch, row = (int(value) for value in self._place[at])
        shard = self._open(number)
        try:
            return {name: shard.get_slice(f"{batch}.{name}")[row : row + 1] for name in self._names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._folder / shard_name(number)}: {error}; remove it, and precompute again") from None

    def _open(self, number: int) -> Any:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        path = self._folder / shard_name(number)
        try:
            self._shards[number] = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {error}; remove it, and precompute again") from None
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)
        return self._shards[number]


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(tensors), aside, metadata=dict(metadata))
    os.replace(aside, path)
    return path
