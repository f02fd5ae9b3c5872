"""Latents and text features on disk: written once, read instead of the files they were made from.

A folder holds ``shard-00000.safetensors``, ... with the features of whole micro-batches, ``null.safetensors`` with
those of the empty prompt, and, written last, ``index.arrow`` (which sample of which epoch lies where) and
``manifest.json``, which is sealed and has the digests of these two. A shard is complete or absent, and so is a folder.

Beside its latents a sample may have its references, frames at its ends that were coded by themselves: as many kinds of
them as the run that wrote it draws from and the clip has room for.

Epoch e of a run reads epoch ``e % epochs`` of the folder: windows and crops repeat, the order does not.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from opensora.datasets.plan.batch_plan import MicroBatch
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import write_file
from opensora.utils.files.untrusted import (
    COUNT,
    OBJECT,
    SHA256,
    TEXT,
    Each,
    Shape,
    mismatch,
    parse_json,
    parsing,
    read_small,
    require_file,
    seal,
    unseal,
)
from opensora.utils.files.user_files import absence, replacing

MANIFEST, INDEX, NULL = "manifest.json", "index.arrow", "null.safetensors"
FORMAT = 3
IMAGE = "image_tokens"  # as it is called in shards that have it
REFERENCE = "reference."  # what the name of a coded reference begins with, as in reference.head_33
_AGAIN = "run python -m opensora.cli.precompute again, which writes what is missing"
_MANIFEST: Shape = {
    **dict.fromkeys(("format", "epochs", "shards", "samples"), COUNT),
    "hash": TEXT,
    "made_for": OBJECT,
    "buckets": Each(TEXT, list),
    "files": {INDEX: SHA256, NULL: SHA256},
}
_BATCHES: Shape = Each({"epoch": COUNT, "bucket": TEXT, "samples": Each(COUNT, list)}, list)
_OPEN_SHARDS = 64
_ROW = np.dtype([("epoch", "i8"), ("sample", "i8"), ("shard", "i4"), ("batch", "i4"), ("row", "i4"), ("bucket", "i4")])


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the autoencoder and the text encoder made of a micro-batch, in their own precision."""

    latents: Tensor  # (B, C, T', H', W')
    txt: Tensor  # (B, L, D)
    y_vec: Tensor  # (B, V)
    mask: Tensor | None = None  # (B, L) bool
    label: Tensor | None = None  # (B,) int64, a class in place of a prompt; L and both widths are then 0
    image_tokens: Tensor | None = None  # (B, K, D) of the first frame

    def tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("latents", "txt", "y_vec", "mask", "label", IMAGE)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, kw_only=True)
class StoredFeatures(Features):
    """With the references of the samples, each coded by itself."""

    references: Mapping[str, Tensor] = field(default_factory=dict)  # (B, C, t, H', W') by the name of what they code


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, parts: Iterable[tuple[MicroBatch, Features]], identity_hash: str) -> Path:
    """The features of some micro-batches as one file, whole or absent."""
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for position, (micro_batch, features) in enumerate(parts):
        references = features.references if isinstance(features, StoredFeatures) else {}
        named = features.tensors() | {f"{REFERENCE}{name}": tensor for name, tensor in references.items()}
        tensors |= {f"{position}.{name}": tensor.cpu().contiguous() for name, tensor in named.items()}
        rows.append(
            {"epoch": micro_batch.epoch, "bucket": str(micro_batch.bucket), "samples": list(micro_batch.sample_ids)}
        )
    return write_file(folder / shard_name(number), tensors, {"hash": identity_hash, "batches": json.dumps(rows)})


def write_null(folder: Path, tensors: Mapping[str, Tensor], identity_hash: str) -> None:
    """Text features of the empty prompt."""
    write_file(folder / NULL, {n: t.cpu().contiguous() for n, t in tensors.items()}, {"hash": identity_hash})


def shard_hash(path: Path) -> str:
    """Which configuration a shard was made for; "" where the file cannot be read."""
    try:
        with parsing(ValueError), safe_open(require_file(path), "pt") as shard:
            return str(shard.metadata()["hash"])
    except ValueError:
        return ""


def write_index(folder: Path, shards: int, epochs: int, identity: Mapping[str, Any], identity_hash: str) -> None:
    """Make the folder complete: where every sample lies, and what it was made for."""
    parts: list[np.ndarray] = []
    names: dict[str, int] = {}  # buckets by number
    for number in range(shards):
        batches = _batches(folder / shard_name(number))
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
    with replacing(folder / INDEX) as whole, pa.ipc.new_file(whole, table.schema) as file:
        file.write_batch(table.combine_chunks().to_batches()[0])
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "hash": identity_hash,
        "epochs": epochs,
        "shards": shards,
        "made_for": identity,
    }
    manifest |= {"samples": samples, "buckets": list(names), "files": {n: _digest(folder / n) for n in (INDEX, NULL)}}
    with replacing(folder / MANIFEST) as manifest_file:
        manifest_file.write(seal(json.loads(json.dumps(manifest))).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a complete folder was made for.

    Raises:
        UserError: there is none, it is not complete, or of another version of this project.
    """
    name = f"data.features={folder}"
    try:
        content = read_small(folder / MANIFEST)
    except FileNotFoundError:
        state = absence(folder, "folder") or "is not complete"
        raise UserError(f"{name}: {state}; run python -m opensora.cli.precompute") from None
    except OSError as error:
        raise UserError(f"{name}: {MANIFEST} cannot be read ({error.strerror}); move it away, and {_AGAIN}") from None
    stated = parse_json(content, lambda why: UserError(f"{name}: {MANIFEST} is damaged ({why}); {_AGAIN}"))
    if isinstance(stated, dict) and stated.get("format", FORMAT) in range(FORMAT):
        raise UserError(f"{name}: written in another format; {_AGAIN}")
    return unseal(content, lambda why: UserError(f"{name}: {MANIFEST} is damaged ({why}); {_AGAIN}"), _MANIFEST)


def has_null(folder: Path, identity_hash: str) -> bool:
    """Whether the features of the empty prompt are there, and what was written as far as a manifest tells."""
    try:
        stated = read_manifest(folder)["files"][NULL]
    except UserError:  # not complete yet, or damaged: then it is written anew with what is there
        stated = None
    return shard_hash(folder / NULL) == identity_hash and stated in (None, _digest(folder / NULL))


def verify(folder: Path) -> None:
    """That the index, and the features of the empty prompt, are what was written; shards are not read.

    Raises:
        UserError: as of ``read_manifest``; one of them is damaged.
    """
    for name, digest in read_manifest(folder)["files"].items():
        if _digest(folder / name) != digest:
            raise UserError(f"data.features={folder}: {name} is damaged or missing; {_AGAIN}")


def _digest(path: Path) -> str:
    """SHA-256 of a file; of none where it cannot be read."""
    digest = hashlib.sha256()
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()


def _batches(path: Path) -> list[dict[str, Any]]:
    """What a shard says is in it."""

    def refuse(why: str) -> UserError:
        return UserError(f"{path}: damaged ({why}); remove it, and precompute again")

    with parsing(refuse), safe_open(require_file(path), "pt") as shard:
        text = shard.metadata()["batches"]
    batches = parse_json(text, refuse)
    wrong = mismatch(batches, _BATCHES)
    if wrong:
        raise refuse(wrong)
    return list(batches)


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
        verify(folder)
        # Mapped, not read: all processes of a node share one copy.
        damaged = parsing(lambda why: UserError(f"data.features={folder}: {INDEX} is damaged ({why}); {_AGAIN}"))
        with damaged, pa.memory_map(str(require_file(folder / INDEX))) as file:
            index = pa.ipc.open_file(file).read_all()
        self._key = index["key"].chunk(0).to_numpy()  # (n,) epoch * samples + sample, ascending
        self._place = tuple(index[name].chunk(0).to_numpy() for name in ("shard", "batch", "row", "bucket"))
        self._names = ("latents", *self.null())
        self._shards: OrderedDict[int, tuple[Any, list[str]]] = OrderedDict()

    def read(self, micro_batch: MicroBatch) -> StoredFeatures:
        """The features of a micro-batch's samples.

        Raises:
            UserError: a sample that is not there in this bucket, or a damaged shard.
        """
        rows = [self._row(sample, micro_batch) for sample in micro_batch.sample_ids]
        found = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        coded = {name.removeprefix(REFERENCE): found.pop(name) for name in list(found) if name.startswith(REFERENCE)}
        return StoredFeatures(**found, references=coded)

    def null(self) -> dict[str, Tensor]:
        """``txt``, ``y_vec`` and perhaps ``mask`` and ``label`` of the empty prompt, (1, ...) each."""
        damaged = parsing(lambda why: UserError(f"data.features={self._folder}: {NULL} is damaged ({why}); {_AGAIN}"))
        with damaged:
            return dict(load_file(require_file(self._folder / NULL)))

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
        shard, more = self._open(number)
        path = self._folder / shard_name(number)
        starts = f"{batch}.{REFERENCE}", f"{batch}.{IMAGE}"
        coded = [name.removeprefix(f"{batch}.") for name in more if name.startswith(starts)]
        with parsing(lambda why: UserError(f"{path}: {why}; remove it, and precompute again")):
            return {name: shard.get_slice(f"{batch}.{name}")[row : row + 1] for name in (*self._names, *coded)}

    def _open(self, number: int) -> tuple[Any, list[str]]:
        """A shard, and the names of the references and of tokens of pictures in it."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        path = self._folder / shard_name(number)
        with parsing(lambda why: UserError(f"{path}: {why}; remove it, and precompute again")):
            shard = safe_open(require_file(path), "pt")
            more = (name for name in shard.keys() if f".{REFERENCE}" in name or name.endswith(f".{IMAGE}"))  # noqa: SIM118
            self._shards[number] = shard, sorted(more)
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)
        return self._shards[number]
