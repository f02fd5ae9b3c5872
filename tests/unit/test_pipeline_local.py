"""data_pipeline.worker, engines.local and the parts of a run that need no process of its own."""

import contextlib
import glob
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as papq
import pytest

from data_pipeline import run as run_module
from data_pipeline.config import PipelineConfig
from data_pipeline.engines.local import LocalEngine
from data_pipeline.engines.progress import StageProgress
from data_pipeline.limits import SourceLimits
from data_pipeline.log import RunLog
from data_pipeline.outputs import Done, list_outputs, read_done, read_output, write_output
from data_pipeline.plan import SourceFile, list_sources, make_plan, save_plan
from data_pipeline.shard import ShardRun, ShardTask
from data_pipeline.stages.base import Resources, Unit
from data_pipeline.table import caption_errors
from data_pipeline.worker import Failed, Worker, WorkerClosed, WorkerLost
from opensora.utils.console import shown_bytes
from opensora.utils.errors import UserError
from tests.faults.pipeline_stages import HostileStage

LIMITS = SourceLimits(time_s=60, memory_mib=600, attempts=2)
STAGE = HostileStage()


def unit(name: str) -> Unit:
    return Unit(source=name, file=name, rows={"probe": [{"sha256": "0"}], "frames": [{"pts": range(3)}]})


@pytest.fixture
def worker() -> Any:
    made = Worker({"hostile": STAGE}, LIMITS)
    yield made
    made.close()


def test_a_worker_answers_and_stays(worker: Worker) -> None:
    assert worker.run("hostile", unit("a.mp4")).num_rows == 3
    first = worker.pid
    with pytest.raises(Failed, match="not today") as failed:
        worker.run("hostile", unit("refuses-1.mp4"))
    assert failed.value.kind == "mood"
    assert worker.run("hostile", unit("b.mp4")).num_rows == 3 and worker.pid == first


def test_a_worker_that_dies_is_followed_by_another(worker: Worker) -> None:
    worker.run("hostile", unit("a.mp4"))
    first = worker.pid
    with pytest.raises(WorkerLost, match="SIGSEGV"):
        worker.run("hostile", unit("dies-1.mp4"))
    assert worker.run("hostile", unit("a.mp4")).num_rows == 3 and worker.pid != first


def test_a_worker_that_was_killed_while_it_had_nothing_to_do_is_no_source_s_fault(worker: Worker) -> None:
    worker.run("hostile", unit("a.mp4"))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # with all of its threads
    assert worker.run("hostile", unit("a.mp4")).num_rows == 3


def test_memory_that_is_gone_is_tried_in_a_process_that_holds_nothing(worker: Worker) -> None:
    worker.run("hostile", unit("a.mp4"))
    first = worker.pid
    with pytest.raises(Failed, match=r"more than limits\.memory_mib=600 MiB") as failed:
        worker.run("hostile", unit("hogs-1.mp4"))
    assert failed.value.kind == "memory"
    worker.run("hostile", unit("a.mp4"))
    assert worker.pid != first


def test_memory_that_others_hold_is_no_source_s_fault(worker: Worker) -> None:
    failed = []
    for name in ("leaves-1.mp4", "asks-1.mp4"):
        try:
            worker.run("hostile", unit(name))
        except Failed as error:
            failed.append((name, error.kind))
    assert failed == []


class Alone(HostileStage):
    """Reads nothing, and says which process it ran in."""

    reads = {}  # noqa: RUF012

    def run(self, unit: Unit) -> list[dict[str, Any]]:
        return [{"pts": os.getpid()}]


class Reader(Alone):
    """Of another name, and it loads models."""

    name = "reader"
    resources = Resources(models=True)


def test_what_comes_behind_models_begins_in_a_process_without_them() -> None:
    worker = Worker({"hostile": Alone(), "reader": Reader()}, LIMITS)
    try:
        pids = [worker.run(name, unit("a.mp4"))["pts"][0].as_py() for name in ("hostile", *("reader",) * 2, "hostile")]
    finally:
        worker.close()
    assert pids[0] == pids[1] == pids[2] != pids[3]


def test_a_closed_worker_starts_no_process(worker: Worker) -> None:
    worker.close()
    with pytest.raises(WorkerClosed):
        worker.run("hostile", unit("a.mp4"))


def task(out: Path, sources: int = 3, shard: str = "000000", name: str = "{}.mp4") -> ShardTask:
    """Of a stage without inputs: ``_identity`` is what the listing says."""
    listed = tuple(SourceFile(name.format(i), str(out / name.format(i)), -1, 0) for i in range(sources))
    return ShardTask(
        out=out,
        stage=Alone(),
        stage_key="k",
        shard=shard,
        key="0" * 16,
        sources=listed,
        inputs={},
        shared={},
        attempts=2,
    )


def test_workers_outlive_a_stage(tmp_path: Path) -> None:
    """The system ends a process with the thread that started it: a thread for each stage would end them all."""
    engine = LocalEngine(tmp_path, {"hostile": Alone()}, LIMITS, 1)
    pids = set()
    try:
        for number in range(3):
            one = replace(task(tmp_path), shard=f"00000{number}")
            engine.run("hostile", [one])
            (path,) = [path for (shard, _), path in list_outputs(one.folder).items() if shard == one.shard]
            output = read_output(path)
            assert output is not None
            pids |= set(output.table["pts"].to_pylist())
    finally:
        engine.close()
    assert len(pids) == 1


def test_an_engine_ends_with_the_first_error_and_leaves_no_process(tmp_path: Path) -> None:
    one = task(tmp_path)
    (tmp_path / "hostile").write_text("a file where the folder of outputs belongs")
    engine = LocalEngine(tmp_path, {"hostile": Alone()}, LIMITS, 2)
    with pytest.raises(OSError):
        engine.run("hostile", [one])
    engine.close()


def test_long_sources_come_first(tmp_path: Path) -> None:
    sizes = {"a": 1 << 20, "b": 5 << 20, "c": 3 << 20}
    for name, size in sizes.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    seen: list[str] = []

    class Recording:
        def run(self, stage: str, unit: Unit) -> Any:
            seen.append(unit.source)
            return STAGE.columns.empty_table()

    from data_pipeline.shard import run_shard

    listed, _ = list_sources(str(tmp_path))
    run_shard(replace(task(tmp_path / "out"), sources=tuple(listed)), Recording(), RunLog(tmp_path / "out"))  # type: ignore[arg-type]
    assert seen == ["b", "c", "a"]


def test_weights_and_what_became_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(bytes(3 << 20))
    (found,), _ = list_sources(str(tmp_path))
    assert found.weight == 3 << 20 and found.changed() == ""
    path.write_bytes(b"other")
    assert found.changed() == "changed"
    path.unlink()
    assert found.changed() == "gone"
    assert SourceFile("b", str(tmp_path / "b"), -1, 0).changed() == "" and SourceFile("b", "b", -1, 0).weight == 1


def test_a_glob_reads_a_folder_once_though_links_go_round_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/1.mp4", "2.mp4"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to("a")
    found, _ = list_sources(f"{tmp_path}/**/*.mp4")
    assert [entry.name for entry in found] == [f"{tmp_path}/2.mp4", f"{tmp_path}/a/1.mp4"]


def test_an_empty_name_of_a_source_is_not_this_folder() -> None:
    for names in ([], ["", "b"], ["a", ""]):
        with pytest.raises(UserError, match="source: an empty name"):
            list_sources(names)
        with pytest.raises(ValueError, match="source='': must name the folder"):
            PipelineConfig(source=names, out="out")
    with pytest.raises(ValueError, match=r"source=2024: must be a folder.*; write \./ before"):
        PipelineConfig(source=2024, out="out")


def test_a_home_folder_is_not_guessed() -> None:
    for words in ({"source": "~/videos", "out": "out"}, {"source": ["a", "~"], "out": "out"}):
        with pytest.raises(ValueError, match=r"^source='~\S*': ~ is no home folder here; write \$HOME"):
            PipelineConfig(**words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^out='~/first': .* write \$HOME/first, or"):
        PipelineConfig(source="~videos", out="~/first")


def test_what_names_no_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing yet\n\n")
    with pytest.raises(UserError, match=r"empty\.txt: names no file; write one path per line"):
        list_sources(str(tmp_path / "empty.txt"))
    for pattern in ("*.nope", "**/*.nope"):
        with pytest.raises(UserError, match=r"\.nope: no file matches this pattern, as seen from /"):
            list_sources(str(tmp_path / pattern))
    with pytest.raises(UserError, match=r"gone\.mp4: no such folder or file"):
        list_sources(str(tmp_path / "gone.mp4"))


def test_help_tells_of_what_this_command_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run_module.main(["--help"])
    assert "CONFIG.yaml [section.key=value" in (said := capsys.readouterr().out) and "family" not in said
    (tmp_path / "config.py").write_text("dtype = 'bf16'\n")
    assert run_module.main([str(tmp_path / "config.py")]) == 2
    assert (
        "config.py: a file of the Open-Sora family, for training and sampling; give a .yaml" in capsys.readouterr().err
    )


def test_another_shard_size_says_what_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sources").mkdir()
    for name in "abcde":
        (tmp_path / "sources" / f"{name}.mp4").write_bytes(b"1")
    for size, more, shards in [(2, 0, 3), (2, 0, 3), (1, 0, 3), (9, 3, 4), (2, 0, 4)]:
        for number in range(more):
            (tmp_path / "sources" / f"{number}.mp4").write_bytes(b"1")
        cfg = PipelineConfig(source=str(tmp_path / "sources"), out=str(tmp_path / "out"), shard_size=size)
        run_module.run(cfg, run_module.Options(until="plan"))
        said = capsys.readouterr()
        line = (
            f"shard_size={size}: {tmp_path}/out was begun with shard_size=2, and its shards stay as they are; only new"
        )
        assert (line in said.out + said.err) == (size != 2)
        plan = make_plan(tmp_path / "out", cfg.source, size)
        assert len(plan.shards) == shards


def test_a_plan_only_grows(tmp_path: Path) -> None:
    folder, out = tmp_path / "sources", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    for name in "abcde":
        (folder / f"{name}.mp4").write_bytes(b"1")
    first = make_plan(out, str(folder), 2)
    save_plan(out, first)
    (folder / "a.mp4").unlink()
    (folder / "b.mp4").write_bytes(b"22")
    (folder / "f.mp4").write_bytes(b"1")
    second = make_plan(out, str(folder), 2)
    names = [[source.name for source in shard.sources] for shard in second.shards]
    assert names[:3] == [[source.name for source in shard.sources] for shard in first.shards]
    assert names[3:] == [["f.mp4"]]
    assert {source.name: source.size for source in second.sources}["b.mp4"] == 2


def test_a_stage_reads_the_columns_that_it_declares(tmp_path: Path) -> None:
    """Pictures of another stage beside them may be as large as memory."""
    columns = pa.schema([("sha256", pa.string()), ("pictures", pa.list_(pa.uint8()))])
    rows = pa.table({"sha256": ["0"], "pictures": [[0] * 4_000_000]}, schema=columns)
    path = write_output(tmp_path, "000000", "0" * 16, columns, [(Done("0.mp4", "k", 1), rows)])
    output = read_output(path, ["sha256"])
    assert output is not None and output.table.column_names == ["sha256"] and output.done == (Done("0.mp4", "k", 1),)
    reading = replace(task(tmp_path / "out", 1), inputs={"probe": path}, stage=Reading())
    with monkeypatched_read() as held:
        ShardRun(reading, RunLog(tmp_path / "out")).close()
    assert held and max(held) < 1_000_000


@contextlib.contextmanager
def monkeypatched_read() -> Iterator[list[int]]:
    """What Arrow holds behind every output that is read."""
    held: list[int] = []
    original = papq.read_table

    def read(*args: Any, **options: Any) -> pa.Table:
        table = original(*args, **options)
        held.append(table.nbytes)
        return table

    with mock.patch.object(papq, "read_table", read):
        yield held


class Reading(HostileStage):
    """Of probe one column."""

    reads = {"probe": ("sha256",)}  # noqa: RUF012


def test_what_became_of_sources_is_read_without_their_rows(tmp_path: Path) -> None:
    done = Done("a", "k", 0, "why", "mood")
    path = write_output(tmp_path, "000000", "0" * 16, STAGE.columns, [(done, STAGE.columns.empty_table())])
    assert read_done(path) == (done,)
    path.write_bytes(path.read_bytes()[:-9])
    assert read_done(path) == () and read_done(tmp_path / "gone.parquet") == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--worker", "5/5"], "--worker 5/5: must be I/N"),
        (["--worker"], "--worker: a value is missing; write --worker I/N"),
        (["--until", "--dry-run"], "--until: a value is missing"),
        (["--until", "a", "--only=b"], "--until a --only b: give one of them"),
        (["--until="], "--until: a value is missing; write --until STAGE"),
        (["--only", ""], "--only: a value is missing"),
        (["--retry=1"], "--retry=1: --retry takes no value"),
        (["--retyr", "a=1"], "--retyr: unknown option; did you mean --retry"),
        (["--untill=cut"], "--untill: unknown option; did you mean --until"),
    ],
)
def test_options_that_cannot_be(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_module.parse_options(words)


def test_options_stand_anywhere() -> None:
    options, rest = run_module.parse_options(["a.yaml", "--retry", "x=1", "--worker=1/4", "--only", "shots"])
    assert rest == ["a.yaml", "x=1"] and options == run_module.Options(retry=True, only="shots", worker=(1, 4))


def test_time_that_is_left_is_by_size_and_without_what_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("opensora.utils.console.time.monotonic", lambda: now[0])
    listed = (
        SourceFile("a", "a", 99 << 20, 0), SourceFile("b", "b", 9 << 20, 0), SourceFile("c", "c", 29 << 20, 0),
    )  # fmt: skip
    progress = StageProgress("frames", [replace(task(tmp_path), sources=listed)])
    progress.known(1, 99 << 20)  # by an earlier run
    now[0] += 5.0
    progress.add(1, 9 << 20)
    assert capsys.readouterr().err == "frames: 108 MiB of 137 MiB, 2 of 3 sources, ETA 0:00:16\n"


def test_small_files_are_no_mebibytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = (SourceFile("a", "a", 900, 0), SourceFile("b", "b", 1500, 0), SourceFile("gone", "gone", -1, 0))
    progress = StageProgress("probe", [replace(task(tmp_path), sources=listed)])
    progress.add(1, listed[0].weight)
    assert capsys.readouterr().err.startswith("probe: 900 B of 2.3 KiB, 1 of 3 sources, ")
    assert [shown_bytes(each) for each in (0, 999, 1000, 1023 << 10, 10 << 20, 3 << 40)] == [
        "0 B", "999 B", "1.0 KiB", "1.0 MiB", "10 MiB", "3.0 TiB"
    ]  # fmt: skip


def test_a_summary_counts_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources/a.mp4").write_bytes(b"no video")
    cfg = PipelineConfig(source=str(tmp_path / "sources"), out=str(tmp_path / "out"))
    run_module.run(cfg, run_module.Options(dry_run=True))
    assert capsys.readouterr().out.startswith("1 source, 8 B, in 1 shard\n")
    for said in ("", "nothing to do: what probe finds is there\n"):
        run_module.run(cfg, run_module.Options(until="probe"))
        assert capsys.readouterr().out == f"{said}1 source, 1 of them with an error\n       1  probe: unreadable\n"


def test_errors_of_captions_are_counted_by_kind() -> None:
    each = ["endpoint: timed out: http://a", "file: caption too long: a.txt has 9"]
    assert caption_errors([each[0], each[1], f"{each[0]}/b", None]) == (
        "3 clips have a caption_error: 2 endpoint: timed out, 1 file: caption too long"
    )
    several = [f"kind {number}" for number in range(9)]
    assert caption_errors(several).endswith("1 kind 3, 1 kind 4 and 4 others")
    assert caption_errors([None]) == "" and caption_errors([each[0]]).startswith("1 clip has a caption_error: 1 end")


def test_a_pattern_of_files_below_is_read_as_glob_reads_it(tmp_path: Path) -> None:
    for name in ("a/1.mp4", "a/b/2.mkv", "3.mp4", "a/x1.mov", "a/[4].mp4", "c/b/12.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    for pattern in ("**/*.mp4", "a/**/*", "**/b/*", "**/[0-9].m??", "**/[!0-9]*.*", "*/**/1*.mp4", "**/[[]4].mp4"):
        wanted = sorted(path for path in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if os.path.isfile(path))
        assert [entry.file for entry in list_sources(f"{tmp_path}/{pattern}")[0]] == wanted, pattern
