"""The data pipeline, killed at any instant and fed with what kills: what comes out is what an undisturbed run makes."""

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import media_fuzz
from tests.faults.conftest import Tally
from tests.faults.pipeline_runs import CONFIG, Command, journals, outputs, run
from tests.faults.pipeline_stages import PAUSE

pytestmark = pytest.mark.timeout(1200)
STAGES = ("probe", "frames", "hostile", "census", "verdict")
SLOWLY = {PAUSE: "0.03"}  # so that there is an instant to be killed at


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos of several kinds, one of them twice, and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        size = (32 + 2 * number, 64 - 2 * number)
        (folder / f"clip-{number}.mp4").write_bytes(media_fuzz.video("libx264", "yuv420p", "mp4", size=size))
    (folder / "below").mkdir()
    (folder / "below/a.webm").write_bytes(media_fuzz.video("libvpx", "yuv420p", "webm"))
    (folder / "below/b.mkv").write_bytes(media_fuzz.video("mpeg4", "yuv420p", "matroska"))
    (folder / "below/cut short.mp4").write_bytes(media_fuzz.video("libx264", "yuv420p", "mp4")[:-700])
    shutil.copy(folder / "clip-3.mp4", folder / "again.mp4")
    (folder / "letter.mp4").write_text("not a video")
    return folder


def write_config(folder: Path, source: Path, name: str = "run") -> Path:
    config = folder / f"{name}.yaml"
    config.write_text(CONFIG.format(source=source, out=folder / name))
    return config


@pytest.fixture(scope="module")
def wanted(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing disturbs leaves."""
    folder = tmp_path_factory.mktemp("wanted")
    run(write_config(folder, clips))
    assert journals(folder / "run") == []
    found = outputs(folder / "run")
    assert {name.split("/")[0] for name in found} == set(STAGES)
    return found


def kill_group(command: Command, draw: random.Random) -> None:
    command.kill_group()


def kill_command(command: Command, draw: random.Random) -> None:
    command.kill()
    command.process.wait()
    command.wait_gone()  # its workers do not outlive it


def kill_worker(command: Command, draw: random.Random) -> None:
    if found := command.others("data_pipeline.worker"):
        os.kill(draw.choice(found), signal.SIGKILL)


KILLS = {"group": kill_group, "command": kill_command, "worker": kill_worker}


def disturbed(folder: Path, clips: Path, seed: int, kill: str, longest_s: float, *words: str) -> tuple[Path, int]:
    """The folder of a run that was killed two to four times before it could end, and how often it was."""
    draw, config, kills = random.Random(seed), write_config(folder, clips), 0
    asked = ("limits.attempts=100", *words)  # nothing here is to blame
    for _ in range(draw.randint(2, 4)):
        command = Command(config, *asked, env=SLOWLY)
        try:
            command.process.wait(draw.uniform(0.2, longest_s))
            break
        except subprocess.TimeoutExpired:
            KILLS[kill](command, draw)
            kills += 1
        if kill == "worker":
            assert command.end() == 0, command.said
            break
        command.end()
    run(config, *asked, env=SLOWLY)
    return folder / "run", kills


def trials(count: int, longest_s: float) -> Iterator[tuple[int, str, float]]:
    """(seed, kind of kill, the latest instant): kinds take turns."""
    for seed in range(count):
        yield seed, tuple(KILLS)[seed % len(KILLS)], longest_s


@pytest.mark.parametrize(("seed", "kill", "longest_s"), list(trials(6, 3.0)))
def test_killed_at_any_instant(
    clips: Path, wanted: dict[str, bytes], tmp_path: Path, tally: Tally, seed: int, kill: str, longest_s: float
) -> None:
    out, kills = disturbed(tmp_path, clips, seed, kill, longest_s)
    assert outputs(out) == wanted and journals(out) == []
    tally(f"pipeline: kills of the {kill}, same outputs", kills, kills)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_a_hundred_instants(clips: Path, wanted: dict[str, bytes], tmp_path: Path, tally: Tally) -> None:
    kills = 0
    for seed, kill, longest_s in trials(1000, 3.5):
        if kills >= 100:
            break
        folder = tmp_path / str(seed)
        folder.mkdir()
        out, more = disturbed(folder, clips, 1000 + seed, kill, longest_s)
        assert outputs(out) == wanted and journals(out) == [], (seed, kill)
        tally(f"pipeline: kills of the {kill}, same outputs", more, more)
        kills += more
        shutil.rmtree(folder)
