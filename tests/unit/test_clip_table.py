"""The clip table: rows of all that became of every source, the same bytes however they were made, clips in archives."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest

import data_pipeline.engines.local
import data_pipeline.media.storage
import data_pipeline.pipeline
import data_pipeline.run
import data_pipeline.table
from data_pipeline.captioning.endpoint import EndpointConfig
from data_pipeline.config import PipelineConfig
from data_pipeline.engines.config import EngineConfig
from data_pipeline.media.storage import Clip, find_clip, pack
from data_pipeline.run import Options, run
from data_pipeline.stages.captions import CaptionsConfig
from data_pipeline.stages.cut import CutConfig
from data_pipeline.worker import Worker
from opensora.datasets.decode.api import read_frames
from opensora.datasets.table.index import open_table
from opensora.utils.files.video_writer import write_video
from tests import pipeline_fakes
from tests.caption_server import CaptionServer, Reply, says
from tests.pipeline_fakes import CLIP_FRAMES

SIZE = (48, 64)


def write_videos(folder: Path, **clips: int) -> Path:
    """name -> a video of so many clips; frames of clip i are of grey 20 * i."""
    folder.mkdir(exist_ok=True)
    for name, count in clips.items():
        greys = np.repeat(20 * np.arange(count, dtype=np.uint8) + ord(name[0]) % 20, CLIP_FRAMES)
        frames = np.broadcast_to(greys[:, None, None, None], (len(greys), *SIZE, 3))
        write_video(folder / f"{name}.mp4", frames, 12.0)
    return folder


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_pipeline.pipeline, "make_stages", pipeline_fakes.stages_of)
    monkeypatch.setattr(data_pipeline.run, "make_report", lambda pipeline: None)
    monkeypatch.setattr(data_pipeline.run, "say_summary", lambda pipeline: None)
    monkeypatch.setattr(data_pipeline.engines.local, "Worker", pipeline_fakes.Here)


def config(source: Path, out: Path, **more: Any) -> PipelineConfig:
    given: dict[str, Any] = {"engine": EngineConfig(workers=1), "cut": CutConfig(preset="ultrafast", short_side=32)}
    return PipelineConfig(**{"source": str(source), "out": str(out), **given, **more})


def table_of(source: Path, out: Path, *, retry: bool = False, **more: Any) -> pa.Table:
    assert run(config(source, out, **more), Options(retry=retry)) == 0
    return papq.read_table(out / "clips.parquet")


def rows_by(table: pa.Table, *names: str) -> list[tuple]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def test_a_row_for_every_clip_and_every_source(tmp_path: Path) -> None:
    source = write_videos(tmp_path / "videos", b=3, a=2)
    (source / "a_broken.mp4").write_bytes((source / "a.mp4").read_bytes()[:200])
    (source / "notes.pdf").write_bytes(b"%PDF-1.4 no video")
    write_video(source / "short.mp4", np.zeros((3, *SIZE, 3), np.uint8), 12.0)
    table = table_of(source, tmp_path / "out")
    assert rows_by(table, "source", "start_s", "keep", "failed_in") == [
        ("a.mp4", 0.0, False, None),
        ("a.mp4", 1.0, True, None),
        ("a_broken.mp4", None, False, "probe"),
        ("b.mp4", 0.0, False, None),
        ("b.mp4", 1.0, True, None),
        ("b.mp4", 2.0, True, None),
        ("notes.pdf", None, False, "probe"),
        ("short.mp4", None, False, None),
    ]
    reasons = table["reason"].to_pylist()
    assert reasons[0] == "still: motion_score=0, must be >= 1" and reasons[1] == ""
    assert reasons[2].startswith("error: unreadable: ") and reasons[6].startswith("error: no video: ")
    assert reasons[7] == "no clip: no range of it is long enough"
    assert table["rejected_by"].to_pylist() == [["still"], [], ["error"], ["still"], [], [], ["error"], ["shots"]]
    kept = table.slice(1, 1).to_pylist()[0]
    assert (kept["num_frames"], kept["height"], kept["width"], kept["fps"]) == (CLIP_FRAMES, 32, 42, 12.0)
    assert (kept["aspect_ratio"], kept["resolution"]) == (round(32 / 42, 6), 32 * 42)
    assert (kept["motion_score"], kept["camera_motion"], kept["luma"]) == (1.0, "pan left", 100.0)
    rejected = table.slice(0, 1).to_pylist()[0]
    assert (rejected["height"], rejected["width"], rejected["path"], rejected["text"]) == (*SIZE, None, None)
    assert not {"flow", "pts", "measure_flow"} & set(table.column_names)
    assert table.column_names[:8] == [
        "path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps",
    ]  # fmt: skip
    assert len(set(table["config_hash"].to_pylist())) == 1 and "cut 1" in table["versions"][0].as_py()
    assert json.loads(table.schema.metadata[b"pipeline"])["filter"]["config"] == {"least": 1.0}


def test_the_same_bytes_whoever_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_videos(tmp_path / "videos", **{name * 3: 3 for name in "abcde"})
    tables = []
    for name, workers, shard_size in (("one", 1, 64), ("two", 2, 64), ("small", 2, 2)):
        monkeypatch.setattr(data_pipeline.engines.local, "Worker", Worker if name == "two" else pipeline_fakes.Here)
        table_of(source, tmp_path / name, engine=EngineConfig(workers=workers), shard_size=shard_size)
        tables.append((tmp_path / name / "clips.parquet").read_bytes())
    assert tables[0] == tables[1] == tables[2]
    files = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name / "media").rglob("*.mp4")}
        for name in ("one", "small")
    ]
    assert files[0] == files[1] and len(files[0]) == 10


def test_a_second_run_does_nothing_and_damage_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = write_videos(tmp_path / "videos", a=3, b=3), tmp_path / "out"
    table_of(source, out)
    path = out / "clips.parquet"
    whole, before = path.read_bytes(), path.stat().st_mtime_ns
    table_of(source, out)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(whole[:-40] + b"x" + whole[-39:])
    table_of(source, out)
    assert path.read_bytes() == whole
    clips = sorted((out / "media").rglob("*.mp4"))
    contents = [clip.read_bytes() for clip in clips]
    clips[0].unlink()
    clips[1].write_bytes(contents[1][:50])
    assert "4 of 6 clips kept" in capsys.readouterr().out
    table_of(source, out)
    assert [clip.read_bytes() for clip in clips] == contents and path.read_bytes() == whole
    assert "4 of 6 clips kept" in capsys.readouterr().out


def test_a_source_that_fails_late_says_so_in_its_clips(tmp_path: Path) -> None:
    source, out = write_videos(tmp_path / "videos", a=3, b=2), tmp_path / "out"
    assert run(config(source, out), Options(until="filter")) == 0
    stats = (source / "a.mp4").stat()
    content = (source / "a.mp4").read_bytes()
    (source / "a.mp4").write_bytes(b"\0" * len(content))
    os.utime(source / "a.mp4", ns=(stats.st_atime_ns, stats.st_mtime_ns))
    table = table_of(source, out)
    assert table["source"].to_pylist() == ["a.mp4"] * 3 + ["b.mp4"] * 2
    assert table["keep"].to_pylist() == [False] * 4 + [True]
    assert table["failed_in"].to_pylist() == ["cut"] * 3 + [None] * 2
    reasons = table["reason"].to_pylist()
    assert reasons[0].startswith("still: ") and all(reason.startswith("error: unreadable: ") for reason in reasons[1:3])
    (source / "a.mp4").write_bytes(content)
    os.utime(source / "a.mp4", ns=(stats.st_atime_ns, stats.st_mtime_ns))
    assert table_of(source, out, retry=True)["keep"].to_pylist() == [False, True, True, False, True]


def test_clips_without_a_caption_are_not_kept_and_retry_asks_for_them_only(tmp_path: Path) -> None:
    source, out = write_videos(tmp_path / "videos", a=3, b=2), tmp_path / "out"
    server = CaptionServer()
    try:
        server.replies = [Reply(400, b"no"), says("Of a."), says("Of b.")]
        endpoint = {"url": server.url, "model": "seer", "concurrency": 1}
        captions = CaptionsConfig(kinds=["endpoint"], endpoint=EndpointConfig(**endpoint))
        table = table_of(source, out, captions=captions)
        assert len(server.asked) == 3 and table["keep"].to_pylist().count(True) == 2
        (lost,) = table.filter(pa.array([bool(error) for error in table["caption_error"].to_pylist()])).to_pylist()
        assert lost["reason"] == "no caption: endpoint: HTTP status 400 (no)" and lost["rejected_by"] == ["captions"]
        assert lost["path"] and lost["sha256"] and not lost["keep"]
        table_of(source, out, captions=captions)
        assert len(server.asked) == 3
        table = table_of(source, out, captions=captions, retry=True)
        assert len(server.asked) == 4 and table["keep"].to_pylist().count(True) == 3
        assert set(table["text"].drop_null().to_pylist()) == {"Of a.", "Of b.", "A cat sits."}
    finally:
        server.stop()


def test_a_caption_beside_a_video_that_changes_is_read_again(tmp_path: Path) -> None:
    source, out = write_videos(tmp_path / "videos", a=2, b=2), tmp_path / "out"
    (source / "a.txt").write_text("Before.")
    assert set(table_of(source, out)["caption_source"].to_pylist()) == {"file", "template", None}
    (source / "a.txt").write_text("Later.")
    (source / "b.txt").write_text("Of b.")
    assert table_of(source, out)["text"].drop_null().to_pylist() == ["Later.", "Of b."]


def tar_of(out: Path) -> list[Path]:
    return sorted((out / "media").glob("*.tar"))


def test_archives_hold_the_same_clips(tmp_path: Path) -> None:
    source = write_videos(tmp_path / "videos", a=3, b=4)
    loose, packed = tmp_path / "loose", tmp_path / "packed"
    settings = {"preset": "ultrafast", "short_side": 32}
    plain = table_of(source, loose)
    table = table_of(source, packed, cut=CutConfig(container="tar", **settings))
    (archive,) = tar_of(packed)
    assert archive.name.startswith("000000-") and not list((packed / "media").rglob("*.mp4"))
    for row, other in zip(table.to_pylist(), plain.to_pylist(), strict=True):
        moved = {"path", "offset", "length"}
        assert {name: row[name] for name in row if name not in moved} == {
            name: other[name] for name in other if name not in moved
        }
        if row["keep"]:
            content = (loose / other["path"]).read_bytes()
            assert archive.read_bytes()[row["offset"] : row["offset"] + row["length"]] == content
            name = Path(other["path"]).name
            assert row["path"] == f"media/{archive.name}#{name}@{row['offset']}+{row['length']}"
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [Path(p).name for p in plain["path"].drop_null().to_pylist()]
        assert {(member.mtime, member.uid, member.mode, member.uname) for member in members} == {(0, 0, 0o644, "")}
    before = archive.read_bytes()
    assert table_of(source, packed, cut=CutConfig(container="tar", **settings)).equals(table)
    assert tar_of(packed) == [archive]
    again = tmp_path / "again"
    table_of(source, again, cut=CutConfig(container="tar", **settings))
    assert [path.read_bytes() for path in tar_of(again)] == [before]


def test_clips_are_taken_from_archives_and_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_videos(tmp_path / "videos", a=3, b=4), tmp_path / "out"
    cut = CutConfig(preset="ultrafast", short_side=32, container="tar")
    table_of(source, out, cut=cut)
    (first,) = tar_of(out)
    monkeypatch.setattr(pipeline_fakes, "LEAST", 2.0)
    (source / "a.mp4").rename(tmp_path / "a.mp4")
    (source / "b.mp4").rename(tmp_path / "b.mp4")  # nothing can be encoded
    monkeypatch.setattr(data_pipeline.run, "_plan", lambda cfg, options: data_pipeline.run.read_plan(Path(cfg.out)))
    table = table_of(source, out, cut=cut)
    assert table["keep"].to_pylist() == [False, False, True, False, False, True, True]
    assert len(tar_of(out)) == 1 and first not in tar_of(out)  # no table names it any more
    rows = [row for row in table.to_pylist() if row["keep"]]
    assert all(read_frames(str(out / row["path"]), 0, CLIP_FRAMES).shape == (CLIP_FRAMES, 32, 42, 3) for row in rows)
    assert find_clip(out, "media/00/none.mp4") is None


@pytest.mark.parametrize("killed_in", ["_write", "write_table", "remove_packed", "remove_archives"])
def test_a_kill_on_the_way_from_one_archive_to_the_next_loses_no_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    source, out = write_videos(tmp_path / "videos", a=3, b=4), tmp_path / "out"
    cut = CutConfig(preset="ultrafast", short_side=32, container="tar")
    table_of(source, out, cut=cut)
    (first,) = tar_of(out)
    monkeypatch.setattr(pipeline_fakes, "LEAST", 2.0)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    owner = {"_write": data_pipeline.media.storage, "write_table": data_pipeline.table.papq}
    with monkeypatch.context() as context:
        context.setattr(owner.get(killed_in, data_pipeline.table), killed_in, killed)
        with pytest.raises(KeyboardInterrupt):
            run(config(source, out, cut=cut))
    assert first in tar_of(out)
    clips_that_can_be_read(out)  # those of the table that is there, an old or a new one
    assert table_of(source, out, cut=cut)["keep"].to_pylist() == [False, False, True, False, False, True, True]
    assert len(tar_of(out)) == 1 and first not in tar_of(out)
    assert clips_that_can_be_read(out) == 3
    newer = out / "media/000009-0123456789abcdef.tar"  # of another command, whose table is not there yet
    newer.write_bytes(first.name.encode())
    table_of(source, out, cut=cut)
    assert newer in tar_of(out)


def test_archives_become_files_again_without_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_videos(tmp_path / "videos", a=3, b=2), tmp_path / "out"
    settings = {"preset": "ultrafast", "short_side": 32}
    wanted = table_of(source, tmp_path / "loose", cut=CutConfig(**settings))
    table_of(source, out, cut=CutConfig(container="tar", **settings))
    monkeypatch.setattr("data_pipeline.stages.cut.write_clip", None)
    assert table_of(source, out, cut=CutConfig(**settings)).equals(wanted) and not tar_of(out)
    for path in wanted["path"].drop_null().to_pylist():
        assert (out / path).read_bytes() == (tmp_path / "loose" / path).read_bytes()


@pytest.mark.parametrize("container", ["files", "tar"])
def test_check_reads_every_clip_and_cuts_again_what_is_damaged(tmp_path: Path, container: Any) -> None:
    source, out = write_videos(tmp_path / "videos", a=3), tmp_path / "out"
    cfg = config(source, out, cut=CutConfig(preset="ultrafast", short_side=32, container=container))
    run(cfg)
    row = papq.read_table(out / "clips.parquet").to_pylist()[-1]
    file = out / row["path"].partition("#")[0]
    whole = file.read_bytes()
    at = (row["offset"] or 0) + row["bytes"] // 2
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])  # of the same size
    run(cfg)
    assert file.read_bytes() != whole  # sizes alone are looked at
    run(cfg, Options(check=True))
    assert file.read_bytes() == whole


def clips_that_can_be_read(out: Path) -> int:
    rows = [row for row in papq.read_table(out / "clips.parquet").to_pylist() if row["keep"]]
    assert all(read_frames(str(out / row["path"]), 0, CLIP_FRAMES).shape == (CLIP_FRAMES, 32, 42, 3) for row in rows)
    return len(rows)


def test_archives_have_a_size_and_are_mended(tmp_path: Path) -> None:
    source, out = write_videos(tmp_path / "videos", a=5), tmp_path / "out"
    cut = CutConfig(preset="ultrafast", short_side=32, container="tar")
    table = table_of(source, out, cut=cut)
    rows = [row for row in table.to_pylist() if row["keep"]]
    names = [Path(row["path"].split("#")[1].split("@")[0]).name for row in rows]
    paths = [f"media/{name[:2]}/{name}" for name in names]
    clips = [Clip(path, row["bytes"], row["sha256"]) for path, row in zip(paths, rows, strict=True)]
    places = pack(out, "000009", clips, 2 * clips[0].bytes + 10)
    assert len({place.path.split("#")[0] for place in places}) == 2
    (archive,) = [path for path in tar_of(out) if path.name.startswith("000000")]
    whole = archive.read_bytes()
    for path in tar_of(out):
        path.unlink()
    archive.write_bytes(whole[:1500])
    assert table_of(source, out, cut=cut).equals(table) and archive.read_bytes() == whole


@pytest.mark.parametrize("container", ["files", "tar"])
def test_training_reads_what_is_kept(tmp_path: Path, container: Any) -> None:
    source, out = write_videos(tmp_path / "videos", a=3, b=2), tmp_path / "out"
    (source / "notes.pdf").write_bytes(b"%PDF-1.4 no video")
    table = table_of(source, out, cut=CutConfig(preset="ultrafast", short_side=32, container=container))
    rows = [row for row in table.to_pylist() if row["keep"]]
    clips = open_table(str(out / "clips.parquet"), index=str(tmp_path / "index"))
    assert len(clips) == len(rows) == 3
    for number, row in enumerate(rows):
        assert clips.caption(number) == row["text"] and clips.camera_motion(number) == row["camera_motion"]
        assert (int(clips.num_frames[number]), float(clips.fps[number])) == (CLIP_FRAMES, 12.0)
        frames = read_frames(clips.path(number), 0, CLIP_FRAMES)
        assert frames.shape == (CLIP_FRAMES, 32, 42, 3)
        grey = 20 * row["clip"] + ord(row["source"][0]) % 20
        assert abs(float(frames.mean()) - grey) < 4


def test_two_files_of_equal_content_are_rows_of_their_own(tmp_path: Path) -> None:
    source = write_videos(tmp_path / "videos", a=2)
    (source / "copy.mp4").write_bytes((source / "a.mp4").read_bytes())
    (source / "copy.txt").write_text("Of the copy.")
    table = table_of(source, tmp_path / "out")
    assert table["source"].to_pylist() == ["a.mp4", "a.mp4", "copy.mp4", "copy.mp4"]
    ids, texts = table["clip_id"].to_pylist(), table["text"].to_pylist()
    assert ids[:2] == ids[2:] and texts[3] == "Of the copy." and texts[1].startswith("A wide video clip")
    assert table["path"][1] == table["path"][3]
