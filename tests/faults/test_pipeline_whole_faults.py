"""The pipeline as it is, and what goes wrong around it: full disks, sources that go away, damaged outputs and clips."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as papq
import pytest

from data_pipeline.config import PipelineConfig
from data_pipeline.stage_list import make_stages
from tests.faults.conftest import Tally
from tests.faults.pipeline_runs import Command, errors, journals
from tests.faults.test_pipeline_whole import (
    LIMIT_S,
    PROGRAM,
    STAGES,
    WORDS,
    content,
    everything,
    files,
    results,
    run,
    videos,
    wanted,
    write_config,
)
from tests.patience import patience

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]
__all__ = ["videos", "wanted"]
DISK_KIB = 6000
READS = {name: stage.reads for name, stage in make_stages(PipelineConfig(source="here", out="there")).items()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(disk)]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_full_disk_ends_the_run_in_one_line_and_blames_no_source(
    videos: Path, wanted: Path, small_disk: Path, tally: Tally
) -> None:
    config, ballast, endings = write_config(small_disk, videos), small_disk / "ballast", list[str]()
    room = 48 << 10
    while True:
        free = os.statvfs(small_disk).f_bavail * 4096
        ballast.write_bytes(bytes(ballast.stat().st_size + free - room if ballast.exists() else free - room))
        command = Command(config, *WORDS, program=PROGRAM)
        code = command.end(LIMIT_S)
        assert "Traceback" not in command.said, command.said
        if code == 0:
            break
        assert code in (1, 2)
        endings.append(command.said.strip().splitlines()[-1])
        room *= 2  # beyond what is there already: it fails at another place
    assert len(endings) >= 3, endings
    assert all(line.startswith("error: ") and "No space left on device" in line for line in endings), endings
    assert everything(small_disk / "run") == everything(wanted) and journals(small_disk / "run") == []
    tally("whole pipeline: disk full, then with room the same", len(endings), len(endings))


def test_sources_that_cannot_be_written_are_enough(videos: Path, wanted: Path, tmp_path: Path) -> None:
    where = tmp_path / "mounted"
    where.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "--bind", str(videos), str(where)]).returncode:
        pytest.skip("binding a folder needs root")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(where)], check=True)
    try:
        run(write_config(tmp_path, where))
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)
    assert everything(tmp_path / "run") == everything(wanted)


def test_a_source_that_is_deleted_meanwhile_is_a_row_until_it_is_back(
    videos: Path, wanted: Path, tmp_path: Path
) -> None:
    """Read for the last time when its clips are cut: what goes before is missed by the next stage."""
    mine, away = tmp_path / "mine", tmp_path / "away.mp4"
    shutil.copytree(videos, mine)
    config = write_config(tmp_path, mine)
    command = Command(config, *WORDS, program=PROGRAM)
    deadline = time.monotonic() + patience(LIMIT_S)
    while not list((tmp_path / "run/prints").glob("*.parquet")):
        assert time.monotonic() < deadline and command.process.poll() is None, command.said
        time.sleep(0.005)
    (mine / "car-detection.mp4").rename(away)
    assert command.end(LIMIT_S) == 0, command.said
    found = errors(tmp_path / "run", "text", "cut")
    assert {name: done.kind for name, done in found.items()} == {"car-detection.mp4": "gone"}
    rows = papq.read_table(tmp_path / "run/clips.parquet").to_pylist()
    (row,) = (row for row in rows if row["source"] == "car-detection.mp4")
    assert not row["keep"] and row["reason"].startswith("error: gone") and row["rejected_by"] == ["error"]
    assert "| gone |" in (tmp_path / "run/report.md").read_text()
    away.rename(mine / "car-detection.mp4")
    run(config, "--retry")
    assert results(tmp_path / "run") == results(wanted)


def damage(path: Path, draw: random.Random) -> None:
    """One byte changed, its end cut off, or nothing left of it."""
    old = path.read_bytes()
    at = draw.randrange(len(old))
    kinds = (old[:at] + bytes([old[at] ^ draw.randint(1, 255)]) + old[at + 1 :], old[:at], b"")
    path.write_bytes(draw.choice(kinds))


def copy_of(wanted: Path, videos: Path, folder: Path) -> Path:
    """The configuration of a run that is done."""
    shutil.copytree(wanted, folder / "run")
    return write_config(folder, videos)


@pytest.mark.parametrize("stage", STAGES)
def test_damaged_outputs_are_made_again(videos: Path, wanted: Path, tmp_path: Path, tally: Tally, stage: str) -> None:
    config, draw, tried = copy_of(wanted, videos, tmp_path), random.Random(stage), 0
    for path in sorted((tmp_path / "run" / stage).glob("*.parquet")):
        damage(path, draw)
        tried += 1
    reader = next((name for name in STAGES if stage in READS[name]), "clips")
    for path in (tmp_path / "run" / reader).glob("*.parquet"):  # so that it is read
        path.unlink()
    (tmp_path / "run/clips.parquet").unlink()
    run(config)
    assert everything(tmp_path / "run") == everything(wanted)
    tally("whole pipeline: damaged outputs, made again the same", tried, tried)


@pytest.mark.parametrize("container", ["files", "tar"])
def test_clips_that_are_gone_or_damaged_are_made_again(
    videos: Path, wanted: Path, tmp_path: Path, tally: Tally, container: str
) -> None:
    config, draw, tried = copy_of(wanted, videos, tmp_path), random.Random(container), 0
    words = (f"cut.container={container}",)
    run(config, *words)
    before, clips = everything(tmp_path / "run"), sorted(files(tmp_path / "run"))
    for name in clips:
        path = tmp_path / "run" / name
        for kind in ("gone", "short", "empty", "changed"):
            old = path.read_bytes()
            at = draw.randrange(600, len(old) - 600)
            if kind == "gone":
                path.unlink()
            else:
                new = {"short": old[:at], "empty": b"", "changed": old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :]}
                path.write_bytes(new[kind])
            said = run(config, *words, *(["--check"] if kind == "changed" else []))
            assert everything(tmp_path / "run") == before, (name, kind, said)
            tried += 1
        if tried >= 12:
            break
    tally(f"whole pipeline: clips damaged ({container}), made again the same", tried, tried)


def test_a_table_and_a_report_that_are_damaged_are_made_again(videos: Path, wanted: Path, tmp_path: Path) -> None:
    config, draw = copy_of(wanted, videos, tmp_path), random.Random(2)
    for name in ("clips.parquet", "report.md", "report.html", ".clips.json"):
        damage(tmp_path / "run" / name, draw)
        run(config)
        assert everything(tmp_path / "run") == everything(wanted), name


def test_clips_move_into_archives_and_back(videos: Path, wanted: Path, tmp_path: Path) -> None:
    config = copy_of(wanted, videos, tmp_path)
    run(config, "cut.container=tar")
    packed = papq.read_table(tmp_path / "run/clips.parquet").to_pylist()
    alone = papq.read_table(wanted / "clips.parquet").to_pylist()
    assert not list((tmp_path / "run/media").rglob("*.mp4"))
    for one, other in zip(packed, alone, strict=True):
        assert not one["keep"] or content(tmp_path / "run", one) == content(wanted, other)
    run(config, "cut.container=files")
    for path in (tmp_path / "run/media").glob("*.tar"):
        path.unlink()
    assert everything(tmp_path / "run") == everything(wanted)
