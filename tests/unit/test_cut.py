"""Clips are cut exactly, at a constant rate, at their final size, as shown, and the same bytes every time."""

import hashlib
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_pipeline.limits import SourceLimits
from data_pipeline.media.encode import Bars, framing
from data_pipeline.media.ranges import RangeReader
from data_pipeline.media.rates import at_constant_rate
from data_pipeline.rows import Row, to_rows, to_table
from data_pipeline.stages.base import SourceError, Unit
from data_pipeline.stages.cut import CutConfig, CutStage
from data_pipeline.stages.frames import FramesStage
from opensora.datasets.decode.api import DecodeError, probe, read_frames
from opensora.utils.errors import UserError

LIMITS = SourceLimits()
H, W = 96, 160


def picture(number: int, height: int = H, width: int = W) -> np.ndarray:
    """(H, W, 3) uint8: a grey that says the number, and a corner that says which way up it is."""
    frame = np.full((height, width, 3), 32 + 24 * (number % 8), np.uint8)
    frame[: height // 4, : width // 4] = (220, 30, 30)
    return frame


def number_of(frame: np.ndarray) -> int:
    """Of a frame of ``picture``."""
    return round((float(frame[frame.shape[0] // 2 :, frame.shape[1] // 2 :].mean()) - 32) / 24)


def write_source(
    path: Path, times_ms: list[int], *, height: int = H, width: int = W, options: dict[str, str] | None = None
) -> Path:
    """Frame i is shown at ``times_ms[i]``; key frames are ten frames apart."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"crf": "4", "g": "10"} | (options or {})
        for number, at in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def at_rate(fps: float, count: int) -> list[int]:
    return [round(1000 * number / fps) for number in range(count)]


def frames_row(path: Path) -> Row:
    facts = probe(str(path))
    probed = {"num_frames": facts.num_frames, "fps": facts.fps, "height": facts.height, "width": facts.width}
    stage = FramesStage((), LIMITS)
    rows = stage.run(Unit(source=path.name, file=str(path), rows={"probe": [probed | {"sha256": "0"}]}))
    return to_rows(to_table(rows, stage.columns))[0]


def cut(path: Path, out: Path, *ranges: tuple[int, int], cfg: CutConfig | None = None, **bars: float) -> list[Row]:
    """The rows of these ranges of a video."""
    frames = frames_row(path)
    return run_cut(path, out, frames, list(ranges), cfg or CutConfig(), bars)


def run_cut(
    path: Path, out: Path, frames: Row, ranges: list[tuple[int, int]], cfg: CutConfig, bars: dict[str, float]
) -> list[Row]:
    pts = frames["pts"].tolist()
    ends = [*pts, pts[-1] + 1]
    shots = [
        {"clip_id": f"{first:08x}{last:08x}", "first": first, "last": last, "end_pts": ends[last]}
        for first, last in ranges
    ]
    measured = [{f"bar_{side}": bars.get(side) for side in ("top", "bottom", "left", "right")}] * len(ranges)
    kept = [{"keep": True}] * len(ranges)
    rows: Any = {"frames": [frames], "shots": shots, "measure": measured, "filter": kept}
    return CutStage(cfg, LIMITS, str(out)).run(Unit(source=path.name, file=str(path), rows=rows))


def frames_of(out: Path, row: Row) -> np.ndarray:
    return read_frames(str(out / row["path"]), 0, row["num_frames"])


def test_a_clip_is_its_frames_and_no_others(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(25, 200))
    ranges = [(3, 15), (15, 31), (151, 171)]  # beside each other; and far behind, from within a group of pictures
    for row, (first, last) in zip(cut(source, tmp_path, *ranges), ranges, strict=True):
        found = [number_of(frame) for frame in frames_of(tmp_path, row)]
        assert found == [number % 8 for number in range(first, last)]
        assert (row["fps"], row["num_frames"], row["height"], row["width"]) == (25.0, last - first, H, W)


def test_what_the_row_says_is_what_another_reader_finds(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(24, 60))
    (row,) = cut(source, tmp_path, (0, 60))
    content = (tmp_path / row["path"]).read_bytes()
    assert row["bytes"] == len(content) and row["sha256"] == hashlib.sha256(content).hexdigest()
    assert Path(row["path"]).parts[:2] == ("media", row["path"][6:8]) and Path(row["path"]).name.startswith("00000000")
    with av.open(str(tmp_path / row["path"])) as container:
        (stream,) = container.streams
        context = stream.codec_context
        assert (context.codec.canonical_name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert stream.average_rate == 24 and stream.sample_aspect_ratio == 1
        packets = [packet for packet in container.demux(stream) if packet.size]
        keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        assert keys[0] == 0 and max(np.diff([*keys, len(packets)])) <= 48
        times = sorted(packet.pts * packet.time_base for packet in packets)
        assert [at - times[0] for at in times] == [Fraction(number, 24) for number in range(60)]


def test_every_group_of_pictures_can_be_decoded_alone(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(24, 120))
    (row,) = cut(source, tmp_path, (0, 120))
    with av.open(str(tmp_path / row["path"])) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    assert len(keys) >= 3
    for begin in keys[1:]:
        assert min(packet.pts for packet in packets[begin:]) == packets[begin].pts


def test_bytes_are_the_same_on_every_run(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(30, 80))
    rows = [cut(source, tmp_path / str(run), (0, 40), (40, 80))[1] for run in range(3)]
    rows += [cut(source, tmp_path / "alone", (40, 80))[0]]
    assert len({row["sha256"] for row in rows}) == 1


def test_a_clip_that_is_there_is_not_made_again_and_a_damaged_one_is(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(25, 40))
    (row,) = cut(source, tmp_path, (0, 40))
    path = tmp_path / row["path"]
    whole, before = path.read_bytes(), path.stat().st_mtime_ns
    assert cut(source, tmp_path, (0, 40)) == [row] and path.stat().st_mtime_ns == before
    for damage in (whole[:-1], whole + b"x", whole[:100] + b"!" + whole[101:], b"", whole[: len(whole) // 2]):
        path.write_bytes(damage)
        assert cut(source, tmp_path, (0, 40)) == [row] and path.read_bytes() == whole
    path.write_bytes(whole)
    source.unlink()  # a clip that is whole does not need it
    frames = {"pts": np.arange(40) * 40, "time_base": "1/1000", "height": H, "width": W}
    frames |= {"damaged_packets": 0, "damaged_frames": 0}
    assert run_cut(source, tmp_path, frames, [(0, 40)], CutConfig(), {}) == [row]


def test_settings_give_another_file_and_the_container_does_not(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(25, 20))
    settings = [{}, {"crf": 30}, {"preset": "medium"}, {"short_side": 64}, {"fps": 12.5}]
    paths = [cut(source, tmp_path, (0, 20), cfg=CutConfig(**one))[0]["path"] for one in settings]  # type: ignore[arg-type]
    assert len(set(paths)) == len(settings)
    assert CutStage(CutConfig(container="tar"), LIMITS, "x").config == CutStage(CutConfig(), LIMITS, "y").config


def test_of_a_high_rate_every_second_frame_is_taken(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.mkv", at_rate(60, 48))
    (row,) = cut(source, tmp_path, (1, 31))
    assert row["fps"] == 30.0
    assert [number_of(frame) for frame in frames_of(tmp_path, row)] == [number % 8 for number in range(1, 31, 2)]


def test_a_variable_rate_becomes_constant_by_times(tmp_path: Path) -> None:
    """Twenty frames a second, then two: each moment shows what was shown then."""
    times = [*range(0, 1000, 50), *range(1000, 4000, 500)]
    source = write_source(tmp_path / "a.mkv", times)
    (row,) = cut(source, tmp_path, (0, len(times)))
    found = [number_of(frame) for frame in frames_of(tmp_path, row)]
    assert len(found) == round(times[-1] / 1000 * row["fps"]) + 1
    for number, shown in enumerate(found):
        moment = 1000 * number / row["fps"]
        apart = [abs(at - moment) for at in times]
        nearest = {other % 8 for other, one in enumerate(apart) if one <= min(apart) + 1}
        assert shown in nearest, (number, shown)


def test_a_picture_is_turned_and_its_pixels_made_square(tmp_path: Path) -> None:
    plain = write_source(tmp_path / "plain.mp4", at_rate(25, 12))
    turned = tmp_path / "turned.mp4"
    with av.open(str(plain)) as given, av.open(str(turned), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        stream.sample_aspect_ratio = Fraction(1)
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                made.mux(packet)
    content = turned.read_bytes()
    at = content.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8  # the matrix of the track header
    quarter = b"".join(
        value.to_bytes(4, "big", signed=True) for value in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    )
    turned.write_bytes(content[:at] + quarter + content[at + 36 :])
    (row,) = cut(turned, tmp_path, (0, 12))
    assert (row["height"], row["width"]) == (W, H)
    wanted = read_frames(str(turned), 0, 12).astype(int)
    found = frames_of(tmp_path, row).astype(int)
    assert np.abs(found - wanted).mean() < 2
    assert found[0, 4, -4, 0] > 180 and found[0, 4, 4, 0] < 80  # the red corner is at the top right

    stretched = write_source(tmp_path / "wide.mp4", at_rate(25, 12), options={"x264-params": "sar=2/1"})
    (row,) = cut(stretched, tmp_path, (0, 12))
    assert (row["height"], row["width"]) == (H, 2 * W)


def test_bars_are_cut_away(tmp_path: Path) -> None:
    source = tmp_path / "bars.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number in range(12):
            whole = np.zeros((120, 160, 3), np.uint8)
            whole[15:105, 20:140] = picture(number, 90, 120)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(whole, format="rgb24")))
        container.mux(stream.encode())
    bars = {"top": 15 / 120, "bottom": 15 / 120, "left": 20 / 160, "right": 20 / 160}
    (row,) = cut(source, tmp_path, (0, 12), **bars)
    assert (row["height"], row["width"]) == (88, 120)
    found = frames_of(tmp_path, row).astype(int)
    assert np.abs(found - read_frames(str(source), 0, 12).astype(int)[:, 16:104, 20:140]).mean() < 2.5
    (whole,) = cut(source, tmp_path, (0, 12), cfg=CutConfig(crop_bars=False), **bars)
    assert (whole["height"], whole["width"]) == (120, 160) and whole["path"] != row["path"]


@pytest.mark.parametrize(
    ("height", "width", "bars", "short_side", "wanted"),
    [
        (1080, 1920, Bars(), 720, (720, 1280)),
        (1920, 1080, Bars(), 720, (1280, 720)),
        (480, 854, Bars(top=58 / 480, bottom=58 / 480), 720, (364, 854)),
        (1081, 1921, Bars(), 2000, (1080, 1920)),
        (97, 131, Bars(left=0.1), 96, (96, 116)),
        (200, 300, Bars(top=0.5, bottom=0.45), 720, None),
        (15, 300, Bars(), 720, None),
    ],
)
def test_sizes(height: int, width: int, bars: Bars, short_side: int, wanted: tuple[int, int] | None) -> None:
    found = framing(height, width, bars, short_side)
    assert (found and (found.rows, found.columns)) == wanted
    if found:
        assert min(found.rows, found.columns) <= short_side
        assert found.top % 2 == found.left % 2 == found.rows % 2 == found.columns % 2 == 0
        assert found.top + found.rows <= found.height and found.left + found.columns <= found.width
        assert found.top >= bars.top * found.height - 0.01 and found.left >= bars.left * found.width - 0.01


@pytest.mark.parametrize(
    "fps", [Fraction(24), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(25, 2), Fraction(15)]
)
@pytest.mark.parametrize("base", [Fraction(1, 1000), Fraction(1, 90000)])
def test_a_constant_rate_is_known_however_times_are_rounded(fps: Fraction, base: Fraction) -> None:
    pts = np.array([round(number / fps / base) for number in range(400)])
    found = at_constant_rate(pts + 12345, base, int(pts[-1]) + 12345 + 40, 30.0)
    assert found.rate == fps and found.frames.tolist() == list(range(400))


def test_a_gap_in_a_constant_rate_is_filled() -> None:
    pts = np.array([40 * number for number in range(100) if not 50 <= number < 55])
    found = at_constant_rate(pts, Fraction(1, 1000), 4000, 30.0)
    assert found.rate == 25 and len(found.frames) == 100
    assert found.frames[:50].tolist() == list(range(50)) and found.frames[55:].tolist() == list(range(50, 95))


def test_one_frame_and_frames_without_times_have_a_rate() -> None:
    assert at_constant_rate(np.array([7]), Fraction(1, 1000), 47, 30.0).rate == 25
    still = at_constant_rate(np.zeros(3, np.int64), Fraction(1, 1000), 0, 30.0)
    assert still.rate == 30 and still.frames.tolist() == [0, 1, 2]


def test_a_range_far_away_is_found_by_a_key_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(25, 400))
    pts = frames_row(source)["pts"]
    decoded: list[int] = []
    original = RangeReader._decoded

    def counting(self: RangeReader, position: Any) -> Any:
        for number, frame in original(self, position):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(RangeReader, "_decoded", counting)
    for damaged, most in ((False, 40), (True, 400)):
        decoded.clear()
        with RangeReader(str(source), pts, damaged=damaged, timeout_s=60) as reader:
            taken = [frame.pts for first in (5, 385) for frame in reader.frames(first, first + 8)]
        assert taken == [*pts[5:13].tolist(), *pts[385:393].tolist()]
        assert len(decoded) <= most and (len(decoded) > 380) == damaged


def test_what_is_not_kept_is_not_made(tmp_path: Path) -> None:
    stage = CutStage(CutConfig(), LIMITS, str(tmp_path))
    frames = {"pts": np.arange(20), "time_base": "1/25", "height": H, "width": W, "damaged_packets": 0}
    rows: Any = {
        "frames": [frames | {"damaged_frames": 0}],
        "shots": [{}],
        "measure": [{}],
        "filter": [{"keep": False}],
    }
    assert stage.run(Unit(source="a", file=str(tmp_path / "none.mp4"), rows=rows)) == [{}]
    assert not (tmp_path / "media").exists()


def test_sources_that_are_to_blame(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(25, 30))
    frames = frames_row(source)
    shorter = write_source(tmp_path / "shorter.mp4", at_rate(25, 20))
    shutil.copy(shorter, source)
    with pytest.raises(DecodeError, match="frame 20 cannot be decoded any more; was the file changed"):
        run_cut(source, tmp_path, frames, [(0, 30)], CutConfig(), {})
    source.unlink()
    with pytest.raises(DecodeError):
        run_cut(source, tmp_path, frames, [(0, 30)], CutConfig(), {})
    with pytest.raises(SourceError, match="less than 16 pixels"):
        run_cut(shorter, tmp_path, frames_row(shorter), [(0, 20)], CutConfig(), {"top": 0.5, "bottom": 0.45})
    assert [path for path in (tmp_path / "media").rglob("*") if path.is_file()] == []


def test_a_clip_that_cannot_be_made_costs_no_other(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(25, 60))
    frames = frames_row(source)
    frames["pts"] = frames["pts"] + (np.arange(60) == 25)  # a frame that is not there
    rows = run_cut(source, tmp_path, frames, [(0, 20), (20, 40), (40, 60)], CutConfig(), {})
    assert [bool(row.get("path")) for row in rows] == [True, False, True]
    assert "frame 25 cannot be decoded any more" in rows[1]["cut_error"]
    assert [number_of(frame) for frame in frames_of(tmp_path, rows[2])] == [number % 8 for number in range(40, 60)]


def test_a_full_disk_ends_the_run_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "a.mp4", at_rate(25, 30))
    import errno
    import io

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    original = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Full(self, "wb") if mode == "wb" else original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(UserError, match=r"\.mp4: cannot be written \(No space left on device\)"):
        cut(source, tmp_path, (0, 30))
    assert [path for path in (tmp_path / "media").rglob("*") if path.is_file()] == []
