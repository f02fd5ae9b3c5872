"""The pipeline as it is, with all stages on pieces of real clips, killed at any instant: the table, both reports, every
clip and every output are those of a run that nothing disturbs, byte for byte.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pyarrow.parquet as papq
import pytest

from data_pipeline.config import PipelineConfig
from data_pipeline.stage_list import make_stages
from opensora.datasets.table.clip_storage import locate
from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.faults.pipeline_runs import Command, journals, outputs
from tests.faults.test_pipeline_kill import kill_command, kill_group
from tests.patience import patience

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]
PROGRAM = "data_pipeline.run"
LIMIT_S = 300
PIECES = {"rabbit": 0, "pig": 0, "car-detection": 0, "sintel_trailer_30s": 270, "frog": 0}  # clip -> its first frame
# Whose clips are not to blame, however often their worker is killed; and pieces as short as these are kept.
WORDS = ("limits.attempts=100", "engine.workers=2", "filters.short.min=1.5", "shots.min_s=0.5")
STAGES = tuple(make_stages(PipelineConfig(source="here", out="there")))
PLACES = ("path", "offset", "length")


def piece(file: Path, out: Path, height: int, first: int, count: int = 48) -> None:
    """Frames of a real clip at this height, as H.264 at 24 frames a second."""
    with av.open(str(file)) as source, av.open(str(out), "w") as target:
        video = source.streams.video[0]
        stream: Any = target.add_stream("libx264", rate=24, options={"crf": "20", "threads": "1"})
        stream.width, stream.height = round(height * video.width / video.height / 2) * 2, height
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(source.decode(video)):
            if first <= number < first + count:
                scaled = frame.reformat(stream.width, stream.height, "yuv420p")
                scaled.pts, scaled.time_base = number - first, Fraction(1, 24)
                target.mux(stream.encode(scaled))
        target.mux(stream.encode())


def make_videos(media: Path, folder: Path) -> Path:
    """Pieces of real clips, one of them twice and once larger, one with a caption; a still, and a file of no kind."""
    clips = {path.stem: path for path in (media / "clips").iterdir()}
    for name, first in PIECES.items():
        piece(clips[name], folder / f"{name}.mp4", 240, first)
    piece(clips["rabbit"], folder / "larger.mp4", 270, 0)
    shutil.copy(folder / "pig.mp4", folder / "again.mp4")
    (folder / "larger.txt").write_text("A rabbit that a person wrote about.")
    (folder / "cut short.mp4").write_bytes((folder / "pig.mp4").read_bytes()[:-9000])
    (folder / "still.jpg").write_bytes((media / "edge_cases/truncated.jpg").read_bytes())
    (folder / "letter.mp4").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def videos(shared_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(shared_media, tmp_path_factory.mktemp("videos"))


def write_config(folder: Path, source: Path, name: str = "run") -> Path:
    """The configuration that users begin with."""
    config = folder / f"{name}.yaml"
    text = (ROOT / "configs/pipeline/default.yaml").read_text()
    for key, value in (("source", source), ("out", folder / name), ("shard_size", 3)):
        text, count = re.subn(rf"^{key}: \S+", f"{key}: {value}", text, flags=re.MULTILINE)
        assert count == 1
    config.write_text(text)
    return config


def run(config: Path, *words: str, **more: Any) -> str:
    command = Command(config, *WORDS, *words, program=PROGRAM, **more)
    assert command.end(LIMIT_S) == 0, command.said
    return command.said


def files(out: Path) -> dict[str, bytes]:
    """Every clip or archive of them."""
    found = (path for path in (out / "media").rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def results(out: Path) -> dict[str, bytes]:
    """Table, reports without the time that it took, and clips: no matter how, and in which shards."""
    markdown = (out / "report.md").read_bytes().partition(b"\n## Time\n")[0]
    html = re.sub(rb'<h2 id="time">.*?\n|<a href="#time">Time</a>', b"", (out / "report.html").read_bytes())
    return {"clips": (out / "clips.parquet").read_bytes(), "md": markdown, "html": html, **files(out)}


def everything(out: Path) -> dict[str, bytes]:
    return results(out) | outputs(out)


@pytest.fixture(scope="module")
def wanted(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("wanted")
    run(write_config(folder, videos))
    rows = papq.read_table(folder / "run/clips.parquet").to_pylist()
    kept = [row for row in rows if row["keep"]]
    assert len(kept) >= 3, kept
    assert len(files(folder / "run")) == len({row["path"] for row in kept})
    assert {row["duplicate_kind"] for row in rows} >= {"exact", "near"}
    assert {row["failed_in"] for row in rows} == {None, "probe"}
    assert {row["caption_source"] for row in kept} == {"file", "template"}
    return folder / "run"


def kill_workers(command: Command, draw: random.Random, longest_s: float) -> int:
    """One after another. Not ten before one has started: that ends a run."""
    kills = 0
    while command.process.poll() is None and kills < 8:
        try:
            command.process.wait(draw.uniform(0.2, longest_s))
        except subprocess.TimeoutExpired:
            if found := command.others("data_pipeline.worker"):
                os.kill(draw.choice(found), signal.SIGKILL)
                kills += 1
    return kills


def state_of(out: Path, stage: str) -> object:
    """What changes when something is done."""
    found = set()
    for path in out.glob("clips.parquet" if stage == "table" else f"{stage}/*"):
        with contextlib.suppress(FileNotFoundError):  # written aside, or a journal of what is whole now
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def wait_for_stage(command: Command, out: Path, draw: random.Random) -> None:
    """Until some stage that is not whole yet goes on, or the table is being made, and a while longer."""
    left = [name for name in STAGES if not list((out / name).glob("*.parquet"))]
    stage = draw.choice([*left, "captions", "table"])
    before, deadline = state_of(out, stage), time.monotonic() + patience(LIMIT_S)
    while command.process.poll() is None and time.monotonic() < deadline and state_of(out, stage) == before:
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 1.5))


def disturbed(config: Path, seed: int, *words: str, most: int = 60) -> Counter[str]:
    """Kills of a run, again and again until it ends by itself; and the stages that it was in."""
    draw, done, out = random.Random(seed), Counter[str](), config.with_suffix("")
    for _ in range(most):
        command = Command(config, *WORDS, *words, program=PROGRAM)
        kind = draw.choice(("group", "group", "command", "command", "worker"))
        if kind == "worker":
            done["worker"] += kill_workers(command, draw, 4.0)
            assert command.end() == 0, command.said
            return done
        wait_for_stage(command, out, draw)
        if command.process.poll() is not None:
            assert command.end() == 0, command.said
            return done
        done["in " + (",".join(sorted({path.parent.name for path in journals(out)})) or "between")] += 1
        (kill_group if kind == "group" else kill_command)(command, draw)
        done[kind] += 1
        command.end()
    run(config, *words)
    return done


def kills(done: Counter[str]) -> int:
    return sum(done[kind] for kind in ("group", "command", "worker"))


VARIANTS = {
    "two workers": (),
    "one worker": ("engine.workers=1",),
    "other shards": ("shard_size=100",),
    "archives": ("cut.container=tar",),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_instants(videos: Path, wanted: Path, tmp_path: Path, tally: Tally, variant: str) -> None:
    words, total = VARIANTS[variant], Counter[str]()
    goal = int(os.environ.get("OPENSORA_TEST_PIPELINE_KILLS", "10"))
    undisturbed = wanted
    if words and "engine" not in words[0]:
        run(write_config(tmp_path, videos, "undisturbed"), *words)
        undisturbed = tmp_path / "undisturbed"
    for seed in range(1000):
        folder = tmp_path / str(seed)
        folder.mkdir()
        done = disturbed(write_config(folder, videos), 100 * len(variant) + seed, *words)
        assert everything(folder / "run") == everything(undisturbed), (variant, seed, done)
        assert journals(folder / "run") == []
        total += done
        shutil.rmtree(folder)
        if kills(total) >= goal:
            break
    print(variant, f"{seed + 1} runs", dict(total))
    tally(f"whole pipeline, {variant}: kills, all the same", kills(total), kills(total))
    if variant == "other shards":
        assert results(undisturbed) == results(wanted)


def content(out: Path, row: dict[str, Any]) -> bytes:
    with locate(str(out / row["path"])).open() as file:
        return file.read()


def test_archives_hold_the_same_clips(videos: Path, wanted: Path, tmp_path: Path) -> None:
    run(write_config(tmp_path, videos), "cut.container=tar")
    found, files_ = (papq.read_table(out / "clips.parquet") for out in (tmp_path / "run", wanted))
    assert found.drop_columns(list(PLACES)).equals(files_.drop_columns(list(PLACES)))
    for packed, alone in zip(found.to_pylist(), files_.to_pylist(), strict=True):
        if alone["keep"]:
            assert content(tmp_path / "run", packed) == content(wanted, alone)


RAY = ("engine.kind=ray", "engine.workers=2")


@pytest.mark.parametrize("word", ["", "data_pipeline.worker", "ray::_make"])
def test_ray(videos: Path, wanted: Path, tmp_path: Path, tally: Tally, word: str) -> None:
    """Undisturbed; with workers that decode killed; with those of Ray's killed that run the tasks."""
    pytest.importorskip("ray")
    draw, kills_ = random.Random(5), 0
    command = Command(write_config(tmp_path, videos), *WORDS, *RAY, program=PROGRAM)
    while word and kills_ < 4 and command.process.poll() is None:
        if found := command.others(word):
            os.kill(draw.choice(found), signal.SIGKILL)
            kills_ += 1
        time.sleep(draw.uniform(0.1, 3.0))
    assert command.end(600) == 0, command.said
    assert everything(tmp_path / "run") == everything(wanted) and journals(tmp_path / "run") == []
    assert kills_ or not word
    tally(f"whole pipeline, Ray, {word or 'nothing killed'}: the same", max(1, kills_), max(1, kills_))
