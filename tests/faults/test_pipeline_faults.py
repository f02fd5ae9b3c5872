"""The data pipeline and what goes wrong around it: hostile files, disks, damaged outputs, sources that change."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults import media_fuzz
from tests.faults.conftest import Tally
from tests.faults.pipeline_runs import Command, errors, journals, outputs, records, results, run
from tests.faults.pipeline_stages import PAUSE
from tests.faults.test_pipeline_kill import SLOWLY, write_config

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def clip() -> bytes:
    return media_fuzz.video("libx264", "yuv420p", "mp4")


@pytest.fixture
def folder(tmp_path: Path, clip: bytes) -> Path:
    """Six clips, each of other content: what follows the end of a file is read by nobody."""
    made = tmp_path / "sources"
    made.mkdir()
    for number in range(6):
        (made / f"clip-{number}.mp4").write_bytes(clip + bytes([0, 0, 0, 9]) + b"free" + bytes([number]))
    return made


def good(out: Path, stage: str = "verdict") -> set[str]:
    """Sources that came to the end of the last stage."""
    return {name for name, (done, _) in results(out, stage).items() if not done.error}


CLIPS = {f"clip-{number}.mp4" for number in range(6)}


def test_hostile_files_are_rows_with_an_error_and_the_rest_is_done(folder: Path, clip: bytes, tmp_path: Path) -> None:
    for word in ("dies", "exits", "hangs", "hogs", "raises", "refuses"):
        (folder / f"{word}-1.mp4").write_bytes(clip + bytes([0, 0, 0, 8 + len(word)]) + b"free" + word.encode())
    config = write_config(tmp_path, folder)
    said = run(config, "limits.time_s=4", "limits.memory_mib=600", "limits.attempts=2")
    found = errors(tmp_path / "run", "probe", "frames", "hostile", "verdict")
    assert {name: (done.kind, done.error) for name, done in found.items()} == {
        "dies-1.mp4": ("poison", "its process was killed by SIGSEGV, 2 times in a row"),
        "exits-1.mp4": ("poison", "its process ended with exit code 0, 2 times in a row"),
        "hangs-1.mp4": ("timeout", "took longer than limits.time_s=4 s"),
        "hogs-1.mp4": ("memory", "it asks for more than limits.memory_mib=600 MiB of memory"),
        "raises-1.mp4": ("mistake", "ZeroDivisionError: a mistake of a library in two lines"),
        "refuses-1.mp4": ("mood", "not today"),
    }
    assert good(tmp_path / "run") == CLIPS
    assert "12 sources, 6 of them with an error" in said and "2  hostile: poison" in said
    before = outputs(tmp_path / "run")
    run(config, "limits.time_s=4", "limits.memory_mib=600", "limits.attempts=2")
    assert outputs(tmp_path / "run") == before


def test_sources_that_failed_are_tried_again_where_this_is_asked(folder: Path, clip: bytes, tmp_path: Path) -> None:
    (folder / "dies-1.mp4").write_bytes(clip)
    config = write_config(tmp_path, folder)
    run(config)
    assert set(errors(tmp_path / "run", "hostile")) == {"dies-1.mp4"}
    log = tmp_path / "run/log"

    def tried() -> list[str]:
        lines = "".join(path.read_text() for path in log.iterdir()).splitlines()
        return [line for line in lines if '"stage": "hostile"' in line]

    before = tried()
    run(config)
    assert tried() == before  # nothing is done again
    run(config, "--retry")
    again = tried()[len(before) :] if tried()[: len(before)] == before else [x for x in tried() if x not in before]
    assert len(again) == 3 and all("dies-1.mp4" in line for line in again)


def test_a_stage_that_finds_the_disk_full_ends_the_run_and_blames_no_source(
    folder: Path, clip: bytes, tmp_path: Path
) -> None:
    (folder / "full-1.mp4").write_bytes(clip)
    command = Command(write_config(tmp_path, folder))
    assert command.end() == 2
    assert "error: /somewhere/clip.mp4: cannot be written (No space left on device)" in command.said
    assert errors(tmp_path / "run", "probe", "frames") == {} and not list((tmp_path / "run").glob("hostile/*.parquet"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_full_disk_ends_the_run_in_one_line_and_costs_nothing_that_was_done(
    folder: Path, tmp_path: Path, small_disk: Path
) -> None:
    config = write_config(small_disk, folder)
    run(write_config(tmp_path, folder, "wanted"))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(380_000))
    endings = set()
    for size in range(380_000, -1, -20_000):  # a little more room each time: it fails at another place
        os.truncate(ballast, size)
        command = Command(config)
        code = command.end()
        assert "Traceback" not in command.said, command.said
        if code == 0:
            break
        endings.add(command.said.strip().splitlines()[-1])
        assert code in (1, 2)
    assert code == 0 and endings
    assert all(line.startswith("error: ") and "No space left on device" in line for line in endings), endings
    assert outputs(small_disk / "run") == outputs(tmp_path / "wanted")


def test_sources_that_cannot_be_written_are_enough(folder: Path, tmp_path: Path) -> None:
    mode = folder.stat().st_mode
    where = tmp_path / "mounted"
    where.mkdir()
    bound = os.geteuid() == 0 and not subprocess.run(["mount", "--bind", str(folder), str(where)]).returncode
    if bound:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(where)], check=True)
    else:
        where = folder
        folder.chmod(0o555)
    try:
        run(write_config(tmp_path, where))
    finally:
        if bound:
            subprocess.run(["umount", "-l", str(where)], check=True)
        folder.chmod(mode)
    assert good(tmp_path / "run") == CLIPS


def test_an_output_folder_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    command = Command(write_config(tmp_path, folder))
    assert command.end() == 2 and command.said.startswith("error: out="), command.said


def test_a_source_that_is_deleted_meanwhile_is_a_row_that_says_so(folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, folder)
    run(config, "--until", "probe")
    (folder / "clip-2.mp4").rename(tmp_path / "away.mp4")
    # The plan of before lists it still: this is the instant behind the listing.
    run(config, "--worker", "0/1", "--until", "hostile")
    done = errors(tmp_path / "run", "frames")["clip-2.mp4"]
    assert done.kind == "gone" and "gone since the sources were listed" in done.error
    assert good(tmp_path / "run", "hostile") == CLIPS - {"clip-2.mp4"}
    (tmp_path / "away.mp4").rename(folder / "clip-2.mp4")
    run(config, "--retry")
    assert good(tmp_path / "run") == CLIPS


def test_a_source_that_changes_meanwhile_is_done_anew_by_the_next_command(
    folder: Path, clip: bytes, tmp_path: Path
) -> None:
    config = write_config(tmp_path, folder)
    run(config, "--until", "probe")
    (folder / "clip-2.mp4").write_bytes(media_fuzz.video("libx264", "yuv420p", "mp4", size=(96, 96)))
    run(config, "--worker", "0/2", "--until", "frames")
    run(config, "--worker", "1/2", "--until", "frames")
    done = errors(tmp_path / "run", "frames")["clip-2.mp4"]
    assert done.kind == "changed" and "the same command takes it as it is now" in done.error
    run(config)
    assert good(tmp_path / "run") == CLIPS
    shutil.rmtree(tmp_path / "run")
    after = results(write_and_run(tmp_path, folder, "anew"), "frames")["clip-2.mp4"][1].to_pylist()
    assert after[0]["height"] == 96


def write_and_run(tmp_path: Path, folder: Path, name: str) -> Path:
    run(write_config(tmp_path, folder, name))
    return tmp_path / name


def test_new_sources_are_added_and_old_ones_left_alone(folder: Path, clip: bytes, tmp_path: Path) -> None:
    config = write_config(tmp_path, folder)
    run(config)
    before = {name for name in outputs(tmp_path / "run") if name.split("/")[0] in ("probe", "frames", "hostile")}
    (folder / "new.mp4").write_bytes(clip)
    run(config)
    assert before < outputs(tmp_path / "run").keys() and good(tmp_path / "run") == {*CLIPS, "new.mp4"}


def damages(content: bytes, draw: random.Random, regions: int) -> Iterator[bytes]:
    """A byte changed in every region of a file, its end cut off, nothing left of it, and more behind it."""
    step = max(1, len(content) // regions)
    for start in range(0, len(content), step):
        at = min(len(content) - 1, start + draw.randrange(step))
        yield content[:at] + bytes([content[at] ^ draw.randint(1, 255)]) + content[at + 1 :]
    yield content[: draw.randrange(1, len(content))]
    yield b""
    yield content + b"\0"


@pytest.mark.parametrize(
    ("stage", "regions"),
    [
        ("frames", 2),
        ("census", 1),
        *(pytest.param(stage, 24, marks=pytest.mark.slow) for stage in ("probe", "frames", "hostile", "census")),
    ],
)
def test_a_damaged_output_is_made_again(folder: Path, tmp_path: Path, tally: Tally, stage: str, regions: int) -> None:
    """What depends on it is asked for anew, so that it is read."""
    out, draw = write_and_run(tmp_path, folder, "run"), random.Random(7)
    wanted = outputs(out)
    victim = next((out / stage).glob("*.parquet"))
    content, tried = victim.read_bytes(), 0
    for damaged in damages(content, draw, regions):
        victim.write_bytes(damaged)
        for path in (out / "verdict").glob("*.parquet"):
            path.unlink()
        if stage != "census":
            next((out / "census").glob("*.parquet")).unlink()
        said = run(tmp_path / "run.yaml")
        assert outputs(out) == wanted
        assert f"{victim} is damaged: it is put aside and made again" in said
        tried += 1
    tally(f"pipeline: damaged output of {stage}, made again", tried, tried)


def test_a_damaged_journal_costs_what_is_behind_the_damage(folder: Path, tmp_path: Path, tally: Tally) -> None:
    wanted = outputs(write_and_run(tmp_path, folder, "run"))
    shutil.rmtree(tmp_path / "run")
    # A pause so long that the shard cannot become whole between the look and the kill.
    command = Command(tmp_path / "run.yaml", env={PAUSE: "3"})
    command.wait_until(lambda: any(records(path) >= 2 for path in (tmp_path / "run").glob("hostile/.*.journal")))
    command.kill_group()
    command.end()
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "run", kept)
    journal = max(journals(kept), key=records)
    assert records(journal) >= 2
    content, tried = journal.read_bytes(), 0
    for damaged in [content[:-300] + b"?" + content[-299:], content[:40] + bytes(4096)]:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(kept, tmp_path / "run")
        (tmp_path / "run" / journal.relative_to(kept)).write_bytes(damaged)
        run(tmp_path / "run.yaml")
        assert outputs(tmp_path / "run") == wanted and journals(tmp_path / "run") == []
        tried += 1
    tally("pipeline: damaged journal, same outputs", tried, tried)


def plan_damages(content: bytes) -> Iterator[bytes]:
    yield from (b"", b"{", b"[]", b'{"shards": [{"name": 3}]}', b"\xff\xfe", b'{"shards": null}', b"null")
    yield content.replace(b"clip-2", b"clip-7")  # another name, in a plan that can be read
    yield content.replace(b'"size": ', b'"size": 1', 1)
    yield content.replace(b'"digest"', b'"digesu"')


def test_a_damaged_plan_mends_itself(folder: Path, clip: bytes, tmp_path: Path, tally: Tally) -> None:
    """Also one that has grown, whose shards no listing of now would give."""
    config = write_config(tmp_path, folder)
    run(config)
    (folder / "0.mp4").write_bytes(clip)
    run(config)
    out, tried = tmp_path / "run", 0
    wanted, plan = outputs(out), (out / "plan.json").read_bytes()
    for content in plan_damages(plan):
        assert content != plan
        (out / "plan.json").write_bytes(content)
        said = run(config)
        assert f"{out}/plan.json is damaged: it is put aside, and the sources are listed anew" in said
        assert outputs(out) == wanted and (out / "plan.json").read_bytes() == plan
        assert (out / "plan.damaged").read_bytes() == content
        tried += 1
    (out / "plan.json").write_bytes(b"{")
    refused = Command(config, "--worker", "0/2")  # of several tasks none may list the sources for itself
    assert refused.end() == 2 and "the same command with --until plan lists the sources anew" in refused.said
    tally("pipeline: damaged plan, the same again", tried, tried)


def test_two_commands_at_once_on_one_folder(folder: Path, tmp_path: Path) -> None:
    wanted = outputs(write_and_run(tmp_path, folder, "wanted"))
    config = write_config(tmp_path, folder)
    commands = [Command(config, env=SLOWLY) for _ in range(2)]
    assert [command.end() for command in commands] == [0, 0], [command.said for command in commands]
    assert outputs(tmp_path / "run") == wanted and journals(tmp_path / "run") == []


def test_one_of_two_commands_is_killed_and_the_other_does_all(folder: Path, tmp_path: Path) -> None:
    wanted = outputs(write_and_run(tmp_path, folder, "wanted"))
    config = write_config(tmp_path, folder)
    first, second = (Command(config, env={PAUSE: "0.2"}) for _ in range(2))
    first.wait_until(partial(any_journal, tmp_path / "run"))
    first.kill_group()
    first.end()
    assert second.end() == 0, second.said
    assert outputs(tmp_path / "run") == wanted


@pytest.mark.parametrize("words", [("engine.workers=1",), ("shard_size=1",), ("shard_size=100", "engine.workers=3")])
def test_rows_do_not_depend_on_workers_and_shards(folder: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    write_and_run(tmp_path, folder, "wanted")
    run(write_config(tmp_path, folder), *words)
    for stage in ("probe", "frames", "hostile", "census", "verdict"):
        wanted, found = (results(tmp_path / name, stage) for name in ("wanted", "run"))
        assert {name: (done, rows.to_pylist()) for name, (done, rows) in found.items()} == {
            name: (done, rows.to_pylist()) for name, (done, rows) in wanted.items()
        }


def test_tasks_of_an_array_make_what_one_command_makes(folder: Path, tmp_path: Path) -> None:
    """As launch/submit.py pipeline calls them; the global stage is none of theirs."""
    wanted = outputs(write_and_run(tmp_path, folder, "wanted"))
    config = write_config(tmp_path, folder)
    refused = Command(config, "--worker", "0/2")
    assert refused.end() == 2 and "no plan in it yet" in refused.said
    run(config, "--until", "plan")
    tasks = [Command(config, "--worker", f"{number}/2") for number in range(2)]
    assert [task.end() for task in tasks] == [0, 0], [task.said for task in tasks]
    assert {name.split("/")[0] for name in outputs(tmp_path / "run")} == {"probe", "frames", "hostile"}
    run(config, "--until", "census")
    for number in range(2):
        run(config, "--worker", f"{number}/2")
    assert outputs(tmp_path / "run") == wanted


def test_a_second_run_starts_no_worker_and_writes_no_output(folder: Path, tmp_path: Path) -> None:
    out = write_and_run(tmp_path, folder, "run")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.parent.name != "log"}
    logs = {path: path.read_bytes() for path in (out / "log").iterdir()}
    run(tmp_path / "run.yaml")
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.parent.name != "log"} == before
    assert {path: path.read_bytes() for path in (out / "log").iterdir()} == logs


def test_a_stage_alone_and_what_would_run(folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, folder)
    said = run(config, "--dry-run")
    assert "6 sources" in said and "hostile: 0 of 2 outputs are there" in said and not (tmp_path / "run").exists()
    refused = Command(config, "--only", "hostile")
    assert refused.end() == 2 and "--only hostile: it reads what probe finds, which is not all there" in refused.said
    run(config, "--until", "frames")
    run(config, "--only", "hostile")
    assert not (tmp_path / "run/census").exists()
    assert "hostile: 2 of 2 outputs are there, nothing to do" in run(config, "--dry-run")


def any_journal(out: Path) -> bool:
    return any(out.glob("hostile/.*.journal"))


def test_a_terminal_that_stops_it_gets_one_line_and_no_process_is_left(folder: Path, tmp_path: Path) -> None:
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        command = Command(write_config(tmp_path, folder, number.name), env={PAUSE: "0.5"})
        command.wait_until(partial(any_journal, tmp_path / number.name))
        os.killpg(command.process.pid, number)
        assert command.end() == 128 + number, command.said
        assert f"stopped by {number.name}: the same command goes on from here" in command.said
        assert "Traceback" not in command.said
        command.wait_gone()


def test_what_a_killed_process_wrote_aside_is_removed_later(folder: Path, tmp_path: Path) -> None:
    out = write_and_run(tmp_path, folder, "run")
    old, young = out / "probe/.0123456789ab.tmp.parquet", out / "probe/.0123456789ac.tmp.parquet"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    run(tmp_path / "run.yaml")
    assert not old.exists() and young.exists()  # it may be at work
