"""The one decode of the data pipeline: the frames that other readers give, small, in order, at their times."""

import gc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from data_pipeline.media.facts import read_facts
from data_pipeline.media.scan import ScanReport, scan
from opensora.datasets.decode.api import DecodeError, probe, read_frames
from opensora.utils.files.video_writer import write_video


def frames_of(path: Path, report: ScanReport, side: int = 64) -> list[tuple[int, int, float, np.ndarray]]:
    found = scan(str(path), report, frames=10**6, timeout_s=600)
    return [(frame.index, frame.pts, frame.time_s, frame.bgr(side).copy()) for frame in found]


def clip(path: Path, frames: int = 12, height: int = 48, width: int = 80, fps: float = 10) -> np.ndarray:
    """Large, smooth, different in every frame and corner: what scaling and coding leave recognizable."""
    rows, columns = np.mgrid[:height, :width] / [[[height]], [[width]]]
    pixels = [np.stack([255 * rows, 255 * columns, np.full_like(rows, 20 * t % 255)], -1) for t in range(frames)]
    clip = np.array(pixels).astype(np.uint8)
    write_video(path, clip, fps, crf=4)
    return clip


def test_frames_are_those_that_training_reads(shared_media: Path) -> None:
    """Another reader, that seeks and scales by itself: the same pictures under the same numbers."""
    clips = sorted(shared_media.glob("clips/*.mkv"))  # short ones; the edge cases have all else
    for path in [*clips, *sorted(shared_media.glob("edge_cases/*.m*"))]:
        report = ScanReport()
        found = frames_of(path, report)
        info = probe(str(path))
        assert (report.height, report.width) == (info.height, info.width), path
        if "corrupted" in path.name:
            continue
        assert len(found) == info.num_frames, path
        for number in (0, len(found) // 2, len(found) - 1):
            *_, bgr = found[number]
            read = read_frames(str(path), number, 1, resize=lambda *_, size=bgr.shape[:2]: size)[0]
            assert np.abs(read[..., ::-1].astype(int) - bgr).mean() < 8, (path, number)


def test_times_are_those_of_the_packets(shared_media: Path) -> None:
    """Of variable rates, of files that do not begin at zero: written out from the packets."""
    for name in ("traffic_camera_vfr.mp4", "test_non_zero_start.mp4", "unordered.mov"):
        path = shared_media / "edge_cases" / name
        report = ScanReport()
        found = frames_of(path, report)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            pts = sorted(packet.pts for packet in container.demux(stream) if packet.size)
            base = stream.time_base
        assert [frame[1] for frame in found] == pts and report.time_base == base, name
        expected = [float((at - pts[0]) * Fraction(base)) for at in pts]
        np.testing.assert_allclose([frame[2] for frame in found], expected, atol=1e-9)


def test_damage_is_counted_and_decoding_goes_on(shared_media: Path) -> None:
    report = ScanReport()
    found = frames_of(shared_media / "edge_cases" / "corrupted.mp4", report)
    assert len(found) > 20 and report.damaged_packets + report.damaged_frames > 0
    assert frames_of(shared_media / "clips" / "bird.mkv", clean := ScanReport())
    assert clean.damaged_packets == clean.damaged_frames == 0


def test_pictures_are_scaled_by_the_longer_side_and_keep_their_colours(tmp_path: Path) -> None:
    written = clip(tmp_path / "a.mp4")
    for index, _, time_s, bgr in frames_of(tmp_path / "a.mp4", ScanReport(), side=40):
        assert bgr.shape == (24, 40, 3) and time_s == pytest.approx(index / 10)
        wanted = written[index].reshape(24, 2, 40, 2, 3).mean((1, 3))[..., ::-1]
        assert np.abs(bgr - wanted).max() < 12
    for frame in scan(str(tmp_path / "a.mp4"), ScanReport(), frames=99, timeout_s=60):
        red, green, blue = (written[frame.index][..., channel].astype(float) for channel in range(3))
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # BT.709, which the file is tagged with
        assert np.abs(frame.grey(80) - luma).max() < 10
        assert frame.grey(1000).shape == (48, 80)  # never larger than it is


def test_a_file_with_more_frames_than_allowed_fails(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", frames=12)
    assert len(list(scan(str(tmp_path / "a.mp4"), ScanReport(), frames=12, timeout_s=60))) == 12
    with pytest.raises(DecodeError, match=r"more than 11 frames \(limits.frames\)"):
        list(scan(str(tmp_path / "a.mp4"), ScanReport(), frames=11, timeout_s=60))


def test_facts_of_real_files(shared_media: Path) -> None:
    """What the README of the clips says of them."""
    edge = shared_media / "edge_cases"
    assert read_facts(str(edge / "traffic_camera_vfr.mp4"), 60)["variable_rate"]
    assert not read_facts(str(shared_media / "clips" / "bird.mkv"), 60)["variable_rate"]
    assert read_facts(str(edge / "nasa_13013.mp4"), 60)["video_streams"] == 2
    assert read_facts(str(edge / "nasa_13013_hdr.mp4"), 60)["hdr"] == "PQ"
    assert read_facts(str(edge / "video_90.mov"), 60)["rotation"] == 90
    assert read_facts(str(edge / "h264_10bits.mp4"), 60)["pixel_format"] == "yuv420p10le"
    assert read_facts(str(shared_media / "clips" / "sintel_trailer_30s.mp4"), 60)["key_frames"] == 1


def test_a_frame_is_freed_with_the_next_one(tmp_path: Path) -> None:
    """Not by a collection, which comes when hundreds of large pictures are there."""
    clip(tmp_path / "clip.mp4", frames=30)
    gc.collect()
    gc.disable()
    try:
        alive, before = 0, frames_alive()  # those that tests before this one have left
        for frame in scan(str(tmp_path / "clip.mp4"), ScanReport(), frames=100, timeout_s=60):
            frame.grey(32)
            alive = max(alive, frames_alive() - before)
    finally:
        gc.enable()
    assert 0 < alive < 5


def frames_alive() -> int:
    return sum(type(each) is VideoFrame for each in gc.get_objects())
