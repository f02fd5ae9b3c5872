"""Weights to files: little in memory at a time, all or nothing on the disk."""

import errno
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from opensora.models.mmdit.convert import WEIGHTS
from opensora.models.weights.reader import WeightFile
from opensora.utils.errors import UserError
from opensora.utils.files import safetensors_files
from opensora.utils.files.safetensors_files import INDEX, write_file, write_weights

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
    written, walked, parts = 0, 0, safetensors_files.tensor_file.parts

    def fill_up(held: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes]:
        nonlocal written
        written += 1
        if written == 2:
            yield b"half"
            raise OSError(errno.ENOSPC, "No space left on device")
        yield from parts(held, metadata)

    def walk() -> Iterator[tuple[str, Tensor]]:
        nonlocal walked
        for item in tensors(6):
            walked += 1
            yield item

    monkeypatch.setattr(safetensors_files.tensor_file, "parts", fill_up)
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
        found = WeightFile(path, WEIGHTS)
        assert set(found) == {"w0", "w1", "w2"} and torch.equal(found["w2"], torch.full((4, 5), 2.0))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"names files that are not beside it \(model-00002-of-00003"):
        WeightFile(tmp_path, WEIGHTS)


KINDS = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def test_every_type_and_shape_is_read_as_it_was(tmp_path: Path) -> None:
    made = {str(kind): torch.arange(24).view(2, 3, 4).to(kind) for kind in KINDS}
    made |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 7), "turned": torch.arange(6.0).view(2, 3).T}
    path = write_file(tmp_path / "m.safetensors", made, {"b": "2", "a": "é\n"})
    found = load_file(path)
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        ), name
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"a": "é\n", "b": "2"}


def write_in_order(folder: Path, order: int) -> bytes:
    weights = [(f"w{number}", torch.full((4, 5), float(number))) for number in range(6)]
    metadata = [(f"key{number}", str(number)) for number in range(20)]
    write_weights(folder, weights[::order], dict(metadata[::order]))
    return (folder / "model.safetensors").read_bytes()


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    """In another order, and in another process, whose hashes are other."""
    here = write_in_order(tmp_path / "here", 1)
    assert write_in_order(tmp_path / "turned", -1) == here
    root = Path(__file__).resolve().parents[2]
    program = (
        "import sys; from pathlib import Path; from tests.unit.test_weights import write_in_order\n"
        "write_in_order(Path(sys.argv[1]), 1)\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program, str(tmp_path / "there")]
    subprocess.run(command, env=environment, check=True, timeout=100)
    assert (tmp_path / "there/model.safetensors").read_bytes() == here
