"""Windows against a full decode, bit for bit: generated clips, and real and odd files where they are at hand."""

import os
import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation
from PIL import Image

from opensora.datasets.decode.api import DecodeError, is_image, probe, read_frames

MEDIA = Path(__file__).resolve().parents[3] / "shared" / "media"
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason=f"real clips are not at {MEDIA}")


def encode(
    path: Path,
    frames: int,
    *,
    size: tuple[int, int] = (48, 64),
    gop: int = 12,
    pts: list[int] | None = None,
    **options: str,
) -> str:
    """A clip whose frame i can be told from every other; times in units of 1/24 s unless ``pts`` says otherwise."""
    rng = np.random.default_rng(0)
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast", "crf": "20"} | options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = 2
        stream.codec_context.time_base = Fraction(1, 24)
        picture = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * i, axis=1), format="rgb24")
            frame.pts = pts[i] if pts else i
            frame.time_base = Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def decode_all(path: str) -> tuple[list[np.ndarray], list[int]]:
    """Every frame and its timestamp, the plain way."""
    frames, pts = [], []
    with av.open(path) as container:
        stream = container.streams.best("video")
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in decoded:
                untagged_hd = frame.colorspace == 2 and (frame.width >= 1280 or frame.height > 576)
                matrix = Colorspace.ITU709 if untagged_hd and frame.format.name.startswith("yuv") else None
                rgb = frame.reformat(
                    format="rgb24", interpolation=Interpolation.BICUBIC, src_colorspace=matrix
                ).to_ndarray()
                frames.append(np.rot90(rgb, round(frame.rotation / 90)))
                pts.append(frame.pts)
    return frames, pts


def windows(total: int, count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """(start, count, interval) inside a clip of ``total`` frames, the borders among them."""
    rng = np.random.default_rng(seed)
    chosen = [(0, 1, 1), (total - 1, 1, 1), (0, min(total, 9), 1)]
    for _ in range(count):
        interval = int(rng.integers(1, 4))
        length = int(rng.integers(1, min(12, (total - 1) // interval + 1) + 1))
        chosen.append((int(rng.integers(0, total - (length - 1) * interval)), length, interval))
    return chosen


def assert_windows_equal(path: str, count: int) -> None:
    full, _ = decode_all(path)
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (len(full), *full[0].shape[:2])
    for start, length, interval in windows(len(full), count):
        got = read_frames(path, start, length, interval)
        expected = np.stack(full[start : start + (length - 1) * interval + 1 : interval])
        assert got.dtype == np.uint8 and np.array_equal(got, expected), (path, start, length, interval)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
@pytest.mark.parametrize("gop", [1, 12, 250])
def test_windows_are_slices_of_the_full_decode(tmp_path: Path, suffix: str, gop: int) -> None:
    assert_windows_equal(encode(tmp_path / f"c{suffix}", 60, gop=gop), 12)


def test_open_gop_and_odd_numbers_of_frames_between_b_frames(tmp_path: Path) -> None:
    options = {"preset": "medium", "x264-params": "open-gop=1:bframes=5:b-adapt=0:b-pyramid=normal"}
    assert_windows_equal(encode(tmp_path / "c.mp4", 77, gop=10, **options), 40)


def test_variable_frame_rate_and_late_start(tmp_path: Path) -> None:
    pts = (np.cumsum(np.random.default_rng(1).integers(1, 9, 50)) + 200).tolist()
    path = encode(tmp_path / "c.mkv", 50, pts=pts)
    assert_windows_equal(path, 30)
    assert probe(path).fps == pytest.approx(49 * 24 / (pts[-1] - pts[0]), rel=0.01)


def test_rates(tmp_path: Path) -> None:
    assert probe(encode(tmp_path / "c.mp4", 30)).fps == 24.0
    assert probe(encode(tmp_path / "c.mkv", 30)).fps == 24.0  # timestamps in whole milliseconds
    assert probe(encode(tmp_path / "one.mp4", 1)).num_frames == 1


def test_several_threads_give_the_same(tmp_path: Path) -> None:
    path = encode(tmp_path / "c.mp4", 60)
    assert np.array_equal(read_frames(path, 17, 20, 2, threads=3), read_frames(path, 17, 20, 2))


def test_only_the_window_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opensora.datasets.decode import pyav_backend

    path = encode(tmp_path / "c.mp4", 240, gop=12)
    released = []
    plain = pyav_backend.decode_packet
    monkeypatch.setattr(pyav_backend, "decode_packet", lambda *of: [released.append(1) or f for f in plain(*of)])
    read_frames(path, 200, 5)
    assert 5 <= len(released) <= 12 + 5 + 3


def test_resize_covers_and_is_antialiased(tmp_path: Path) -> None:
    checker = np.indices((64, 96)).sum(0) % 2 * 255
    Image.fromarray(np.repeat(checker[..., None], 3, 2).astype(np.uint8)).save(tmp_path / "c.png")
    image = read_frames(str(tmp_path / "c.png"), 0, 1, resize=lambda h, w: (h // 4, w // 4))
    assert image.shape == (1, 16, 24, 3)
    assert abs(image[:, 2:-2, 2:-2].astype(float) - 127.5).max() < 12  # nearest sampling would give 0 or 255
    clip = read_frames(encode(tmp_path / "c.mp4", 5, size=(66, 50)), 1, 3, resize=lambda h, w: (33, 25))
    assert clip.shape == (3, 33, 25, 3)


def test_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    path = str(tmp_path / "a.png")
    Image.fromarray(pixels).save(path)
    assert is_image(path) and probe(path) == probe(path)
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.fps) == (1, 20, 30, None)
    assert np.array_equal(read_frames(path, 0, 1)[0], pixels)
    turned = str(tmp_path / "turned.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(turned, exif=exif)
    assert (probe(turned).height, probe(turned).width) == (30, 20)
    with pytest.raises(DecodeError, match="an image has 1 frame, the window needs 5"):
        read_frames(path, 0, 5)


def test_files_that_cannot_be_read_name_path_and_cause(tmp_path: Path) -> None:
    clip = Path(encode(tmp_path / "c.mp4", 30))
    picture = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)).save(picture)
    broken = {
        "missing.mp4": None,
        "empty.mp4": b"",
        "text.mp4": b"this is not a video " * 50,
        "headless.mp4": clip.read_bytes()[:400],
        "cut.jpg": picture.read_bytes()[:900],
        "empty.png": b"",
    }
    for name, data in broken.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        for call in (lambda p=path: probe(str(p)), lambda p=path: read_frames(str(p), 0, 1)):
            with pytest.raises(DecodeError) as error:
                call()
            assert error.value.path == str(path) and error.value.cause and "\n" not in str(error.value)
    with pytest.raises(DecodeError, match="it has 30 frames, the window needs 31"):
        read_frames(str(clip), 21, 10)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DecodeError, match="not a regular file"):
        read_frames(str(tmp_path / "pipe.mp4"), 0, 1)
    copy = pickle.loads(pickle.dumps(DecodeError("p", "c")))
    assert (copy.path, copy.cause, str(copy)) == ("p", "c", "p: c")


def test_audio_only(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DecodeError, match="no video stream"):
        probe(str(path))


def test_a_cover_picture_is_no_clip(tmp_path: Path) -> None:
    path = str(tmp_path / "song.mp4")
    with av.open(path, "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        container.mux([*cover.encode(picture.reformat(format="yuvj420p")), *cover.encode()])
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(DecodeError, match="only a cover picture"):
        probe(path)


EDGE_CASES = [
    "av1_video.mkv", "h264_10bits.mp4", "h265_video.mp4", "nasa_13013.mp4", "nasa_13013_hdr.mp4",
    "nasa_13013_rotated.mp4", "people-detection.gif", "rabbit320.webm", "test_non_zero_start.mp4", "unordered.mov",
    "video_0.mov", "video_90.mov",
]  # fmt: skip


@needs_media
@pytest.mark.parametrize("name", [f"edge_cases/{name}" for name in EDGE_CASES] + ["clips/bird.mkv", "clips/milk.mkv"])
def test_real_files(name: str) -> None:
    assert_windows_equal(str(MEDIA / name), 8)


@needs_media
def test_the_larger_of_two_streams_and_rotation() -> None:
    assert (probe(str(MEDIA / "edge_cases/nasa_13013.mp4")).height) == 270
    rotated = probe(str(MEDIA / "edge_cases/nasa_13013_rotated.mp4"))
    assert (rotated.height, rotated.width) == (480, 270)


@needs_media
def test_a_damaged_clip_gives_right_frames_or_an_error() -> None:
    path = str(MEDIA / "edge_cases/corrupted.mp4")
    full, pts = decode_all(path)
    by_time = dict(zip(pts, full, strict=True))
    read = 0
    for i in range(0, 50, 5):
        try:
            frame = read_frames(path, i, 1)[0]
        except DecodeError:
            continue
        assert np.array_equal(frame, by_time[i * 1024])
        read += 1
    assert read >= 5
    with pytest.raises(DecodeError, match=r"(?i)truncated"):
        probe(str(MEDIA / "edge_cases/truncated.jpg"))


def test_what_reads_clips_can_be_imported_from_the_package() -> None:
    from opensora.datasets import decode
    from opensora.datasets.decode import api, read_frames

    assert read_frames is api.read_frames and decode.probe is api.probe
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        decode.nothing  # noqa: B018
