"""Files that were made to do harm: nothing of theirs is run, nothing is written, each is refused in one line."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from acceleration.checkpoint import CheckpointManager, atomic_dir
from acceleration.checkpoint.listing import contents, newest
from acceleration.files.sealed_json import seal
from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.datasets.decode.common import DecodeError
from opensora.datasets.loading import feature_store
from opensora.datasets.table.clip_storage import locate
from opensora.inference.find import find_source
from opensora.models.mmdit.convert import WEIGHTS as FORMAT
from opensora.models.weights.adapter_names import CONFIG, WEIGHTS
from opensora.models.weights.adapters import read_adapter
from opensora.models.weights.reader import WeightFile
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import INDEX
from tests.dist.harness import run_distributed
from tests.faults.conftest import Tally
from tests.faults.saving import state


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "hacked"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def pickled(folder: Path) -> bytes:
    return pickle.dumps({"model": Trap(folder)})


def torch_file(folder: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Trap(folder)}, buffer)
    return buffer.getvalue()


def numpy_file(folder: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap(folder)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def header(table: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": pickled,
    "a file of torch.save": torch_file,
    "a numpy file of objects": numpy_file,
    "a header of 2^63 bytes": lambda _: header({}, size=2**63),
    "a header longer than the file": lambda _: header({}, size=10**6),
    "a header that is no JSON": lambda _: header(b"{" * 1000),
    "a header of a hundred thousand brackets": lambda _: header(b'{"a":' + b"[" * 10**5),
    "a header that is a list": lambda _: header([1, 2]),
    "offsets beyond the file": lambda _: header({"w": entry([4], [0, 16])}, bytes(4)),
    "offsets below zero": lambda _: header({"w": entry([1], [-4, 0])}, bytes(4)),
    "offsets that overlap": lambda _: header({"w": entry([1], [0, 4]), "v": entry([1], [0, 4])}, bytes(8)),
    "offsets with a gap": lambda _: header({"w": entry([1], [0, 4]), "v": entry([1], [8, 12])}, bytes(12)),
    "a shape of 2^64 elements": lambda _: header({"w": entry([2**32, 2**32], [0, 4])}, bytes(4)),
    "a shape that is not its size": lambda _: header({"w": entry([100], [0, 4])}, bytes(4)),
    "a type that is none": lambda _: header({"w": entry([1], [0, 4], "OBJ")}, bytes(4)),
    "bytes behind the end": lambda _: header({"w": entry([1], [0, 4])}, bytes(400)),
}


def refused(read: Callable[[], object]) -> str:
    """What is said, or what is wrong with it."""
    try:
        found = read()
    except (UserError, ValueError) as error:
        line = str(error)
        return line if line.strip() and "\n" not in line else f"WRONG: {line!r}"
    except Exception as error:
        return f"WRONG: {error!r}"
    return f"WRONG: accepted {found!r}"


def as_shard(path: Path, content: bytes) -> None:
    """A checkpoint whose manifest vouches for the file."""
    staged = atomic_dir.stage(path.parent, path.name)
    shard = staged / "shard-00000.safetensors"
    shard.write_bytes(content)
    about = {"size": len(content), "sha256": atomic_dir.digest_of(str(shard))}
    atomic_dir.commit(
        staged, path, {"step": 1, "tensors": {"model.w": ["F32", [1]]}, "values": {}}, {shard.name: about}
    )


@pytest.mark.parametrize("case", SAFETENSORS)
def test_what_is_no_safetensors(case: str, tmp_path: Path, tally: Tally) -> None:
    """As weights, as adapters, and as part of a checkpoint that is whole by its own account."""
    content = SAFETENSORS[case](tmp_path)
    weights = tmp_path / "weights/model.safetensors"
    adapters = tmp_path / "adapters"
    for folder in (weights.parent, adapters):
        folder.mkdir()
    weights.write_bytes(content)
    (adapters / WEIGHTS).write_bytes(content)
    (adapters / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    as_shard(tmp_path / "step-00000001", content)
    before = sorted(tmp_path.rglob("*"))
    said = [
        refused(lambda: WeightFile(weights, FORMAT)),
        refused(lambda: WeightFile(weights.parent, FORMAT)),
        refused(lambda: read_adapter(adapters)),
        refused(lambda: contents(tmp_path / "step-00000001")),
    ]
    assert not any(line.startswith("WRONG") for line in said), said
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path / "hacked").exists()
    tally("hostile files: no code, no write, refused", len(said), len(said))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".npy", ".pkl"])
def test_pickles_by_their_own_names_are_not_opened(suffix: str, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(numpy_file(tmp_path) if suffix == ".npy" else torch_file(tmp_path))
    job = tmp_path / "sample.yaml"
    job.write_text(f"prompt: a cat\nweights: {path}\n")
    said = [
        refused(lambda: WeightFile(path, FORMAT)),
        refused(lambda: WeightFile(tmp_path, FORMAT)),
        refused(lambda: find_source(load_config(SampleConfig, job))),
    ]
    assert not any(line.startswith("WRONG") for line in said), said
    assert not (tmp_path / "hacked").exists()
    tally("hostile files: no code, no write, refused", len(said), len(said))


def test_a_checkpoint_of_torch_is_none_of_ours(tmp_path: Path, tally: Tally) -> None:
    """torch.distributed.checkpoint unpickles ``.metadata``; here it lies beside and is never looked at."""
    folder = tmp_path / "checkpoints/step-00000001"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickled(tmp_path))
    (folder / "__0_0.distcp").write_bytes(torch_file(tmp_path))
    assert "no checkpoint is complete" in refused(lambda: newest(folder.parent))
    assert "not a complete checkpoint" in refused(lambda: contents(folder))
    assert not (tmp_path / "hacked").exists()
    tally("hostile files: no code, no write, refused", 2, 2)


ZEROS = "0" * 64
MANIFESTS: dict[str, dict[str, object]] = {
    "a file above": {"../secret": {"size": 6, "sha256": ZEROS}},
    "a file anywhere": {"/etc/hostname": {"size": 1, "sha256": ZEROS}},
    "no name": {"": {"size": 0, "sha256": ZEROS}},
    "a size that is none": {"shard": {"size": "many", "sha256": ZEROS}},
    "nothing about a file": {"shard": None},  # type: ignore[dict-item]
}


def remove_by_manifest(folder: Path) -> None:
    """What retention would do to it."""
    manager = CheckpointManager(folder, keep=1)
    for step in (2, 3):
        manager.save(step, state(step, 0, 1), {})


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_cannot_reach_out_of_its_folder(case: str, tmp_path: Path, tally: Tally) -> None:
    """With a digest that is right, as anybody can compute it: not read, and nothing removed by it."""
    folder = tmp_path / "checkpoints"
    (folder / "step-00000001").mkdir(parents=True)
    (folder / "secret").write_text("secret")
    body = {"schema": atomic_dir.SCHEMA, "step": 1, "tensors": {}, "values": {}, "files": MANIFESTS[case]}
    (folder / "step-00000001" / atomic_dir.MANIFEST).write_text(seal(body))
    assert "not a complete checkpoint" in refused(lambda: contents(folder / "step-00000001"))
    run_distributed(remove_by_manifest, 1, folder)
    assert (folder / "secret").read_text() == "secret" and Path("/etc/hostname").exists()
    tally("hostile files: no code, no write, refused", 2, 2)


@pytest.mark.parametrize("target", ["file", "folder", "step"])
def test_links_are_not_followed_when_something_is_removed(target: str, tmp_path: Path, tally: Tally) -> None:
    folder, outside = tmp_path / "checkpoints", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("precious")
    if target == "file":
        as_shard(folder / "step-00000001", header({"model.w@0": entry([1], [0, 4])}, bytes(4)))
        shard = folder / "step-00000001/shard-00000.safetensors"
        shard.rename(outside / "shard")
        shard.symlink_to(outside / "shard")
    elif target == "folder":
        (folder / ".tmp-step-00000001-deadbeef").symlink_to(outside)
    else:
        as_shard(outside / "step-00000001", header({"model.w@0": entry([1], [0, 4])}, bytes(4)))
        (folder / "step-00000001").symlink_to(outside / "step-00000001")
    before = sorted(outside.rglob("*"))
    run_distributed(remove_by_manifest, 1, folder)
    assert sorted(outside.rglob("*")) == before
    tally("hostile files: no code, no write, refused", 1, 1)


def test_an_index_of_weights_cannot_reach_out_of_its_folder(tmp_path: Path, tally: Tally) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
        assert "beside" in refused(lambda: WeightFile(folder, FORMAT))
    for content in ("[]", "{", "[" * 10**5, '{"weight_map": {"w": 3}}', '{"weight_map": {"w": ["a"]}}', "\0"):
        (folder / INDEX).write_text(content)
        said = refused(lambda: WeightFile(folder, FORMAT))
        assert "is not a safetensors index" in said, said
    tally("hostile files: no code, no write, refused", 8, 8)


def test_archives_of_clips_are_never_unpacked(tmp_path: Path, tally: Tally) -> None:
    """A member that would be written above its folder, and one that is a bomb: neither is written at all."""
    archive = tmp_path / "clips/clips.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../escaped.mp4", "x")
        file.writestr("bomb.mp4", bytes(10**7))
    for name in ("../escaped.mp4", "bomb.mp4"):
        with pytest.raises(DecodeError):
            locate(f"{archive}#{name}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["clips", "clips.zip"]
    tally("hostile files: no code, no write, refused", 2, 2)


def test_stored_features_are_not_unpickled(tmp_path: Path, tally: Tally) -> None:
    (tmp_path / "manifest.json").write_bytes(pickled(tmp_path))
    said = refused(lambda: feature_store.read_manifest(tmp_path))
    assert not said.startswith("WRONG"), said
    assert not (tmp_path / "hacked").exists()
    tally("hostile files: no code, no write, refused", 1, 1)
