"""What data sets really hold: every kind of broken or odd clip gives its frames or one line, in bounded time."""

import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from opensora.datasets import DataConfig
from opensora.datasets.decode.api import DecodeError, is_image, probe, read_frames
from opensora.datasets.decode.process import DecoderProcess
from opensora.datasets.loading.loader import build_loader
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.table.manifest import read_table
from opensora.utils.errors import UserError
from tests.unit.test_decode import MEDIA, assert_windows_equal, encode, needs_media

LIMIT_S = 20.0


def video(path: Path, codec: str, pixels: str, size: tuple[int, int], frames: int = 12, **options: Any) -> None:
    """A clip of noise in any codec and pixel format; ``rate`` and codec context attributes as options."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=options.pop("rate", 24))
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        for _ in range(frames):
            picture = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def patched(path: Path, box: bytes, offset: int, data: bytes) -> None:
    """Overwrite bytes of an mp4 box, ``offset`` after its name."""
    raw = bytearray(path.read_bytes())
    at = raw.index(box) + len(box) + offset
    raw[at : at + len(data)] = data
    path.write_bytes(raw)


def clip(path: Path, **options: Any) -> Path:
    return Path(encode(path, 20, **options))


def cut(path: Path, keep: Callable[[bytes], bytes]) -> None:
    path.write_bytes(keep(clip(path).read_bytes()))


def flip_bits(path: Path) -> None:
    raw = bytearray(clip(path).read_bytes())
    start, size = raw.index(b"mdat") + 4, int.from_bytes(raw[raw.index(b"mdat") - 4 : raw.index(b"mdat")], "big")
    for at in np.random.default_rng(1).integers(start + 800, start + size - 8, 40).tolist():
        raw[at] ^= 0x55
    path.write_bytes(raw)


def moov_first(path: Path) -> bytes:
    """The bytes of a clip whose header comes first, so that its end can be cut off."""
    encode(path, 40)
    target = path.with_suffix(".first.mp4")
    with av.open(str(path)) as source, av.open(str(target), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    raw = target.read_bytes()
    target.unlink()
    return raw


def many_pixels(path: Path) -> None:
    """A png whose header says 16384 x 16384."""
    header = struct.pack(">IIBBBBB", 16384, 16384, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def many_pixels_clip(path: Path) -> None:
    """An avi whose headers say 16384 x 16384."""
    video(path, "rawvideo", "yuv420p", (32, 32), 3)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"strf") + 8
    raw[at + 4 : at + 12] = struct.pack("<ii", 16384, 16384)
    path.write_bytes(raw)


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def two_rates(path: Path) -> None:
    clip(path, pts=[0, 1, 2, 3, 40, 41, 43, 47, 60, 61, 62, 63, 64, 65, 66, 80, 81, 82, 83, 99])


def turned(path: Path) -> None:
    one = 1 << 16  # a 16.16 matrix: (a, b, u, c, d, v, x, y, w)
    clip(path)
    patched(path, b"tkhd", 40, struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30))


def high_dynamic_range(path: Path) -> None:
    video(path, "libx265", "yuv420p10le", (64, 64), color_primaries=9, color_trc=16, colorspace=9)


def picture_called_clip(path: Path) -> None:
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(path, format="png")


BROKEN: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "0 byte": (".mp4", lambda p: p.write_bytes(b"")),
    "text": (".mp4", lambda p: p.write_text("not a video\n" * 99)),
    "truncated header": (".mp4", lambda p: cut(p, lambda raw: raw[:300])),
    "truncated in the middle": (".mp4", lambda p: p.write_bytes(moov_first(p)[:-3000])),
    "header missing": (".mp4", lambda p: cut(p, lambda raw: raw[: raw.index(b"moov") - 4])),
    "bits flipped": (".mp4", flip_bits),
    "16k x 16k picture": (".png", many_pixels),
    "16k x 16k clip": (".avi", many_pixels_clip),
    "audio only": (".mp4", audio_only),
    "symlink loop": (".mp4", lambda p: p.symlink_to(p)),
    "pipe": (".mp4", os.mkfifo),
    "folder": (".mp4", Path.mkdir),
    "deleted": (".mp4", lambda p: None),
}
ODD: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "rate 0": (".mp4", lambda p: (clip(p), patched(p, b"mdhd", 12, struct.pack(">I", 0)))),
    "rate 1e6": (".mp4", lambda p: (clip(p), patched(p, b"mdhd", 12, struct.pack(">I", 2**31 - 1)))),
    "one frame": (".mp4", lambda p: encode(p, 1)),
    "variable rate": (".mkv", two_rates),
    "odd size": (".mkv", lambda p: video(p, "ffv1", "yuv420p", (37, 53))),
    "1 x 1": (".mkv", lambda p: video(p, "ffv1", "bgr0", (1, 1))),
    "turned": (".mp4", turned),
    "10 bit": (".mp4", lambda p: video(p, "libx264", "yuv420p10le", (64, 64))),
    "4:4:4": (".mp4", lambda p: video(p, "libx264", "yuv444p", (64, 64))),
    "high dynamic range": (".mp4", high_dynamic_range),
    "other container": (".mp4", lambda p: shutil.move(clip(p.with_suffix(".mkv")), p)),
    "picture called clip": (".mp4", picture_called_clip),
    "clip called picture": (".png", lambda p: shutil.move(clip(p.with_suffix(".mp4")), p)),
}


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 2 * LIMIT_S


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_one_line(kind: str, tmp_path: Path) -> None:
    suffix, make = BROKEN[kind]
    path = tmp_path / f"clip{suffix}"
    make(path)
    last = {"truncated in the middle": 39, "bits flipped": 0}.get(kind, 0)  # frame that must be asked for
    errors = 0
    for start in range(last, 20 if kind == "bits flipped" else last + 1):
        try:
            frames = read_frames(str(path), start, 1, timeout_s=LIMIT_S)
        except DecodeError as error:
            assert error.path == str(path) and error.cause and "\n" not in str(error)
            errors += 1
        else:
            assert kind == "bits flipped" and frames.shape == (1, 48, 64, 3)
    assert errors > 0


@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_is_read(kind: str, tmp_path: Path) -> None:
    suffix, make = ODD[kind]
    path = tmp_path / f"clip{suffix}"
    make(path)
    assert_windows_equal(str(path), 6)
    info = probe(str(path), timeout_s=LIMIT_S)
    if kind == "picture called clip":
        assert info.fps is None and info.num_frames == 1
    else:
        assert info.fps is not None and 0 < info.fps < 1e5
    if kind == "turned":
        assert (info.height, info.width) == (64, 48)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_permission(tmp_path: Path) -> None:
    path = clip(tmp_path / "clip.mp4")
    path.chmod(0)
    with pytest.raises(DecodeError, match="Permission denied"):
        read_frames(str(path), 0, 1)


@pytest.mark.parametrize("fps", ["0", "nan", "1e6", "-5"])
def test_rates_that_no_clip_has_are_refused_with_the_table(tmp_path: Path, fps: str) -> None:
    (tmp_path / "t.csv").write_text(f"path,text,num_frames,height,width,fps\na.mp4,a,20,48,64,{fps}\n")
    with pytest.raises(UserError, match="row 1: fps is"):
        read_table(str(tmp_path / "t.csv"))


def test_in_a_run_each_is_counted_and_none_stops_it(tmp_path: Path) -> None:
    """All kinds in one table, as if they were good; one more is deleted while the epoch runs."""
    lines = ["path,text,num_frames,height,width,fps"]
    bad, good = [], 12
    for kind, (suffix, make) in BROKEN.items():
        path = tmp_path / f"{kind}{suffix}"
        make(path)
        frames = 40 if kind == "truncated in the middle" else 20
        bad.append(path.name)
        lines.append(f"{path.name},bad,{1 if is_image(path.name) else frames},48,64,24")
    for i in range(good):
        clip(tmp_path / f"good {i}.mp4")
        Image.fromarray(np.full((48, 64, 3), i, np.uint8)).save(tmp_path / f"good {i}.jpg")
        lines += [f"good {i}.mp4,good,20,48,64,24", f"good {i}.jpg,good,1,48,64,"]
    (tmp_path / "t.csv").write_text("\n".join(lines).replace("bad,1,48,64,24", "bad,1,48,64,"))
    table = read_table(str(tmp_path / "t.csv"))
    buckets = {"48px": {1: [1.0, 1], 20: [1.0, 1]}}
    cfg = DataConfig(buckets=buckets, workers=1, prefetch=1, micro_batches=1, decode_timeout_s=LIMIT_S)
    plan = BatchPlan(table, cfg, 16, seed=0)
    total = plan.steps_in_epoch(0)
    batches: Any = build_loader(table, plan, cfg, start_step=0, stop_step=total, dp_rank=0, dp_degree=1, seed=0)
    found = []
    for batch in batches:
        found.append(batch)
        if len(found) == 3:
            later = [s for step in range(8, total) for m in plan.step(step) for s in m.sample_ids]
            gone = next(os.path.basename(table.path(s)) for s in later if table.caption(s) == "good")
            (tmp_path / gone).unlink()
    replaced = {os.path.basename(table.path(b)): (s, why) for batch in found for b, s, why in batch.replaced}
    assert len(found) == total == len(lines) - 1
    in_part = {"bits flipped.mp4", "truncated in the middle.mp4"}  # their window may be readable
    assert set(replaced) - in_part == {*bad, gone} - in_part
    for name, (substitute, why) in replaced.items():
        assert name in why
        assert table.caption(substitute) == "good" or os.path.basename(table.path(substitute)) in in_part


@needs_media
@pytest.mark.parametrize("name", sorted(p.name for p in (MEDIA / "edge_cases").glob("*")))
def test_real_odd_files_in_a_decoding_process(name: str) -> None:
    """The process is the same before and after: it neither hangs nor dies."""
    path = str(MEDIA / "edge_cases" / name)
    settings: Any = {"resize": None, "threads": 1, "decoder": "pyav", "timeout_s": LIMIT_S}
    process = DecoderProcess()
    pid = process.pid
    try:
        total = probe(path).num_frames
    except DecodeError:
        total = 30
    read, errors = 0, 0
    for start in sorted({0, total // 3, total - 1}):
        try:
            frames = process(path, start, 1, **settings)
            assert np.array_equal(frames, read_frames(path, start, 1))
            read += 1
        except DecodeError as error:
            assert error.path == path and "\n" not in str(error)
            errors += 1
    with pytest.raises(DecodeError):
        process(path, total, 1, **settings)
    assert process.pid == pid
    process.close()
    assert errors == 0 or name in ("corrupted.mp4", "truncated.jpg")
    assert read or name == "truncated.jpg"
