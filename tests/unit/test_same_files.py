"""All machines see one run folder and the same files, or a line says which does not."""

import os
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from acceleration.distributed.runtime import Runtime
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.table.index import open_table
from opensora.train.state import same_files
from opensora.train.state.run_lock import RunLock
from opensora.utils.errors import UserError
from tests.dist.harness import run_distributed

MOUNTS = r"""
22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw
30 22 0:25 / /mnt/my\040disk rw - nfs4 server:/disk rw
31 30 0:26 / /mnt/my\040disk/fast rw shared:7 master:2 - lustre 10.1.1.1@tcp:/fast rw
32 22 0:27 / /mnt/twice rw - ext4 /dev/vdb rw
33 22 0:28 / /mnt/twice rw - xfs /dev/vdc rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/outputs/first", "ext4"),
        ("/mnt/my disk/outputs", "nfs4"),
        ("/mnt/my disk/fast/outputs", "lustre"),
        ("/mnt/my disk/faster", "nfs4"),
        ("/mnt/twice", "xfs"),
    ],
)
def test_the_file_system_of_a_folder_that_need_not_exist(path: str, kind: str) -> None:
    with mock.patch.object(Path, "read_text", lambda self: MOUNTS):
        assert same_files.file_system(Path(path)) == kind


def look(folders: list[Path], cached_s: float) -> tuple[str, float]:
    """What ``take_folder`` says in each of as many processes, and the length of the longest wait in looks."""
    rank = dist.get_rank()
    runtime = Runtime(rank, dist.get_world_size(), rank, torch.device("cpu"))
    lock = None
    waits: list[float] = []
    with (
        mock.patch.object(same_files.time, "sleep", lambda s: waits.append(s)),
        mock.patch.object(same_files, "file_system", lambda path: "nfs4" if cached_s else "ext4"),
        mock.patch.object(same_files.time, "monotonic", lambda: sum(waits)),
    ):
        try:
            lock = same_files.take_folder(folders[rank], runtime)
            said = ""
        except UserError as error:
            said = str(error)
    dist.barrier()
    if lock is not None:
        lock.release()
    return said, sum(waits)


def test_one_folder_is_one_folder(tmp_path: Path) -> None:
    assert [said for said, _ in run_distributed(look, 3, [tmp_path / "run"] * 3, 40.0)] == ["", "", ""]


@pytest.mark.parametrize("cached_s", [0.0, 40.0], ids=["own disk", "nfs"])
def test_who_sees_another_folder_is_named(tmp_path: Path, cached_s: float) -> None:
    """On every process, in the same words; a disk of the machine itself is not waited for."""
    RunLock(tmp_path / "b").release()
    results = run_distributed(look, 3, [tmp_path / "a", tmp_path / "a", tmp_path / "b"], cached_s)
    (line,) = {said.replace(f"{tmp_path / 'b'}: not", f"{tmp_path / 'a'}: not") for said, _ in results}
    assert "(rank 2) does not see what" in line and "owner.json is not there" in line and "output=" in line
    assert "\n" not in line
    assert (cached_s or same_files.LOCAL_S) <= results[2][1] < (cached_s or same_files.LOCAL_S) + 3


def test_all_hear_that_another_run_has_the_folder(tmp_path: Path) -> None:
    with mock.patch.dict(os.environ, {"SLURM_JOB_ID": ""}):
        other = RunLock(tmp_path)
    try:
        lines = {said for said, _ in run_distributed(look, 3, [tmp_path] * 3, 0.0)}
    finally:
        other.release()
    (line,) = lines
    assert f"in use by process {os.getpid()} on " in line


def wait_longer_than_an_exchange_may_take(folder: Path, hidden: bool) -> list[str]:
    """The folder's content when an earlier owner has been waited for, and when another process saw it late."""
    rank = dist.get_rank()
    assert RunLock.__init__.__kwdefaults__ is not None
    RunLock.__init__.__kwdefaults__["stale_s"] = 4.0
    groups = mock.patch.object(same_files, "cpu_group", lambda: dist.new_group(timeout=timedelta(seconds=2.5)))
    late = time.monotonic() + 4.0
    read = same_files.read_owner
    seen = mock.patch.object(same_files, "read_owner", lambda path: read(path) if time.monotonic() > late else None)
    nfs = mock.patch.object(same_files, "file_system", lambda path: "nfs4")
    with groups, nfs, seen if hidden and rank else nullcontext():
        lock = same_files.take_folder(folder, Runtime(rank, dist.get_world_size(), rank, torch.device("cpu")))
    found = sorted(os.listdir(folder))
    dist.barrier()
    if lock is not None:
        lock.release()
    return found


@pytest.mark.parametrize(
    "hidden", [pytest.param(False, id="an earlier owner"), pytest.param(True, id="a cache", marks=pytest.mark.slow)]
)
def test_waiting_may_take_longer_than_an_exchange(tmp_path: Path, hidden: bool) -> None:
    if not hidden:
        (tmp_path / "owner.json").write_text("damaged")
    assert run_distributed(wait_longer_than_an_exchange_may_take, 2, tmp_path, hidden) == [[".lock", "owner.json"]] * 2


def test_the_folder_is_given_up_where_another_process_is_gone(tmp_path: Path) -> None:
    def gone(value: tuple[str, str], *_: object) -> tuple[str, str]:
        if value[0]:
            raise RuntimeError("Connection closed by peer")
        return value

    runtime = Runtime(0, 2, 0, torch.device("cpu"))
    with (
        mock.patch.object(same_files, "cpu_group", lambda: None),
        mock.patch.object(same_files, "from_main", gone),
        pytest.raises(RuntimeError, match="closed by peer"),
    ):
        same_files.take_folder(tmp_path, runtime)
    assert not (tmp_path / "owner.json").exists()
    RunLock(tmp_path).release()


def test_a_folder_that_another_run_holds_elsewhere_is_named(tmp_path: Path) -> None:
    with mock.patch.dict(os.environ, {"SLURM_JOB_ID": ""}):
        other = RunLock(tmp_path / "b")
    try:
        line = run_distributed(look, 2, [tmp_path / "a", tmp_path / "b"], 0.0)[0][0]
    finally:
        other.release()
    assert f"owner.json is of process {os.getpid()} on " in line


def test_every_difference_changes_what_is_compared(tmp_path: Path) -> None:
    """Rows of the table, sizes of clips, a clip that is missing, weights."""
    clips, table = tmp_path / "clips", tmp_path / "table.csv"
    clips.mkdir()
    for index in range(3):
        (clips / f"{index}.mp4").write_bytes(bytes(10 + index))
    rows = "".join(f"clips/{index}.mp4,a clip,16,64,64,8\n" for index in range(3))
    table.write_text("path,text,num_frames,height,width,fps\n" + rows)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1000))
    cfg = load_config(
        RunConfig, "configs/train/demo.yaml", [f"data.table={table}", f"train.init_from={weights}", "name=x"]
    )

    def compared() -> dict[str, str]:
        return same_files.content(cfg, open_table(str(table)))

    first = compared()
    assert compared() == first
    (clips / "1.mp4").write_bytes(bytes(99))
    resized = compared()
    (clips / "1.mp4").unlink()
    missing = compared()
    weights.write_bytes(b"1" + bytes(999))
    other = compared()
    table.write_text("path,text,num_frames,height,width,fps\n" + rows.replace("a clip", "another"))
    renamed = compared()
    assert len({tuple(found.items()) for found in (first, resized, missing, other, renamed)}) == 5
    assert "1.mp4" in missing["the clips of the table"]
