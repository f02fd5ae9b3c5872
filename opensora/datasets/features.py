"""Latents and text features on disk: written once, read instead of the files they were made from.

A folder holds ``shard-00000.safetensors``, ... with the features of whole micro-batches, ``null.safetensors`` with
those of the empty prompt, and, written last, ``index.arrow`` (which sample of which epoch lies where) and
``manifest.json``, which has the checksums of these two and its own. A shard is complete or absent, and so is the
folder. One whose small files are damaged is refused when it is opened; precompute makes them anew from the shards.

Epoch e of a run reads epoch ``e % epochs`` of the folder: windows and crops repeat, the order does not.
"""

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.datasets.plan import MicroBatch
from opensora.utils.errors import UserError
from opensora.utils.untrusted import parse_json, parsing

MANIFEST, INDEX, NULL = "manifest.json", "index.arrow", "null.safetensors"
FORMAT = 3
_OPEN_SHARDS = 64
_ROW = np.dtype([("epoch", "i8"), ("sample", "i8"), ("shard", "i4"), ("batch", "i4"), ("row", "i4"), ("bucket", "i4")])


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
        with parsing(UserError), safe_open(path, "pt") as shard:
            return str(shard.metadata()["hash"])
    except UserError:
        return ""


def null_is_there(folder: Path, identity_hash: str) -> bool:
    """Whether the features of the empty prompt are there and, where the folder is complete, undamaged."""
    if not (folder / NULL).is_file() or shard_hash(folder / NULL) != identity_hash:
        return False
    try:
        return bool(read_manifest(folder)["crc32"][NULL] == _checksum(folder / NULL))
    except UserError:
        return True


def write_index(folder: Path, shards: int, epochs: int, identity: Mapping[str, Any], identity_hash: str) -> None:
    """Make the folder complete: where every sample lies, and what it was made for."""
    parts: list[np.ndarray] = []
    names: dict[str, int] = {}  # buckets by number
    for number in range(shards):
        path = folder / shard_name(number)
        with parsing(partial(_damaged_shard, path)), safe_open(path, "pt") as shard:
            batches = json.loads(shard.metadata()["batches"])
        for position, batch in enumerate(batches):
            part = np.empty(len(batch["samples"]), dtype=_ROW)
            part["epoch"], part["sample"], part["row"] = batch["epoch"], batch["samples"], np.arange(len(part))
            part["shard"], part["batch"] = number, position
            part["bucket"] = names.setdefault(batch["bucket"], len(names))
            parts.append(part)
    rows = np.concatenate(parts)
    samples = int(rows["sample"].max()) + 1
    rows = rows[np.argsort(rows["epoch"] * samples + rows["sample"], kind="stable")]
    columns = {"key": rows["epoch"] * samples + rows["sample"]} | {n: rows[n] for n in ("shard", "batch", "row")}
    columns["bucket"] = rows["bucket"]
    table = pa.table({name: np.ascontiguousarray(column) for name, column in columns.items()})
    aside = folder / f".{INDEX}.{os.getpid()}"
    with pa.ipc.new_file(aside, table.schema) as file:
        file.write_batch(table.combine_chunks().to_batches()[0])
    os.replace(aside, folder / INDEX)
    manifest = {"format": FORMAT, "hash": identity_hash, "epochs": epochs, "shards": shards, "made_for": identity}
    manifest |= {"samples": samples, "buckets": list(names)}
    manifest |= {"crc32": {name: _checksum(folder / name) for name in (INDEX, NULL)}}
    aside = folder / f".{MANIFEST}.{os.getpid()}"
    aside.write_text(json.dumps(manifest | {"digest": _digest(manifest)}, indent=1))
    os.replace(aside, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a complete folder was made for.

    Raises:
        UserError: there is none, it is not complete, or of another version of this project.
    """
    if not (folder / MANIFEST).exists():
        state = "is not complete" if folder.is_dir() else "does not exist"
        raise UserError(f"data.features={folder}: {state}; run python -m opensora.cli.precompute")
    refuse = partial(_damaged, folder, MANIFEST)
    if not (folder / MANIFEST).is_file():
        raise refuse("not a regular file")
    with parsing(refuse):
        raw = (folder / MANIFEST).read_bytes()
    manifest = parse_json(raw, refuse)
    if not isinstance(manifest, dict):
        raise refuse("not the bytes that were written")
    if manifest.get("format") != FORMAT:
        raise UserError(f"data.features={folder}: written in another format; run python -m opensora.cli.precompute")
    digest = manifest.pop("digest", None)
    with parsing(refuse):
        found = _digest(manifest)
    if digest != found:
        raise refuse("not the bytes that were written")
    return dict(manifest)


def _damaged(folder: Path, name: str, problem: str) -> UserError:
    return UserError(
        f"data.features={folder}: {name} is damaged ({problem}); run python -m opensora.cli.precompute again, which "
        "keeps the shards"
    )


def _damaged_shard(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; remove it, and precompute again")


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


class FeatureStore:
    """Reads a complete folder."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: the folder is not complete.
        """
        self._folder = folder
        manifest = read_manifest(folder)
        self.epochs, self._samples = int(manifest["epochs"]), int(manifest["samples"])
        self._buckets: list[str] = manifest["buckets"]
        for name, checksum in manifest["crc32"].items():
            refuse = partial(_damaged, folder, name)
            if not (folder / name).is_file():
                raise refuse("missing, or not a regular file")
            with parsing(refuse):
                found = _checksum(folder / name)
            if found != checksum:
                raise refuse("not the bytes that were written")
        # Mapped, not read: all processes of a node share one copy.
        with pa.memory_map(str(folder / INDEX)) as file:
            index = pa.ipc.open_file(file).read_all()
        self._key = index["key"].chunk(0).to_numpy()  # (n,) epoch * samples + sample, ascending
        self._place = tuple(index[name].chunk(0).to_numpy() for name in ("shard", "batch", "row", "bucket"))
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
        found = at < len(self._key) and self._key[at] == key
        number, batch, row, bucket = (int(column[at]) if found else 0 for column in self._place)
        if not found or self._buckets[bucket] != str(micro_batch.bucket):
            raise UserError(
                f"data.features={self._folder}: sample {sample} of epoch {micro_batch.epoch} is not there in bucket "
                f"{micro_batch.bucket}; run python -m opensora.cli.precompute again"
            )
        shard = self._open(number)
        try:
            return {name: shard.get_slice(f"{batch}.{name}")[row : row + 1] for name in self._names}
        except (SafetensorError, OSError) as error:
            raise _damaged_shard(self._folder / shard_name(number), str(error)) from None

    def _open(self, number: int) -> Any:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        path = self._folder / shard_name(number)
        try:
            self._shards[number] = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise _damaged_shard(path, str(error)) from None
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)
        return self._shards[number]


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(tensors), aside, metadata=dict(metadata))
    os.replace(aside, path)
    return path
