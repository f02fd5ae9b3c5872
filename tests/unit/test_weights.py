"""Weights to files: little in memory at a time, all or nothing on the disk."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.models.mmdit.convert import WeightFile
from opensora.utils import weights as module
from opensora.utils.errors import UserError
from opensora.utils.weights import INDEX, write_weights

BYTES = 80  # of a tensor below


def tensors(count: int) -> Iterator[tuple[str, Tensor]]:
    for number in range(count):
        yield f"w{number}", torch.full((4, 5), float(number))


def test_no_more_than_a_shard_and_a_tensor_is_held(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = 0

    def watched() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, tensor in tensors(20):
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    files = write_weights(tmp_path, watched(), {}, shard_bytes=3 * BYTES)
    assert len(files) == 8 and most <= 4, most


def test_a_full_disk_leaves_the_weights_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_weights(tmp_path, tensors(3), {}, shard_bytes=BYTES)
    content = [file.read_bytes() for file in before]
    written, walked, save = 0, 0, module.save_file

    def fill_up(held: dict[str, Tensor], path: Path, **options: object) -> None:
        nonlocal written
        written += 1
        if written == 2:
            path.write_bytes(b"half")
            raise module.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(held, path, **options)  # type: ignore[arg-type]

    def walk() -> Iterator[tuple[str, Tensor]]:
        nonlocal walked
        for item in tensors(6):
            walked += 1
            yield item

    monkeypatch.setattr(module, "save_file", fill_up)
    with pytest.raises(OSError, match="disk full"):
        write_weights(tmp_path, walk(), {}, shard_bytes=BYTES)
    assert walked == 6  # other processes walk as far
    assert sorted(tmp_path.iterdir()) == sorted(before) and [file.read_bytes() for file in before] == content


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    for name in (".part-00007", "..part-00003.4711"):
        (tmp_path / name).write_bytes(b"x")
    files = write_weights(tmp_path, tensors(2), {}, shard_bytes=BYTES)
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_shards_are_read_by_their_index_and_are_wanted_all(tmp_path: Path) -> None:
    write_weights(tmp_path, tensors(3), {}, shard_bytes=BYTES)
    for path in (tmp_path, tmp_path / INDEX):
        found = WeightFile(path)
        assert set(found) == {"w0", "w1", "w2"} and torch.equal(found["w2"], torch.full((4, 5), 2.0))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"names files that are not beside it \(model-00002-of-00003"):
        WeightFile(tmp_path)
