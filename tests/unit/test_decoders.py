"""The table of decoders, deadlines, and how decoding behaves in many processes and over many clips."""

import statistics
import subprocess
import sys
import time
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora.datasets import DataConfig
from opensora.datasets.decode import pyav_backend, torchcodec_backend
from opensora.datasets.decode.api import DECODERS, DecodeError, probe, read_frames, require
from opensora.datasets.decode.common import ResizeToFill
from opensora.datasets.decode.process import DecoderProcess
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tests.unit.test_decode import MEDIA, encode, needs_media

others = pytest.mark.parametrize("decoder", ["decord", "torchcodec"])


def needs(decoder: str) -> None:
    """Skip, with the reason, what a package that is not installed, or a library that it wants, should do."""
    try:
        require(decoder)
    except UserError as why:
        pytest.skip(str(why))


@others
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("gop", [4, 100])
def test_another_decoder_gives_the_same_frames(tmp_path: Path, suffix: str, gop: int, decoder: str) -> None:
    """Frame by frame the same numbers; colours differ by rounding of the conversion."""
    needs(decoder)
    path = encode(tmp_path / f"c{suffix}", 40, gop=gop)
    for start, count, interval in ((0, 40, 1), (17, 9, 2), (39, 1, 1)):
        ours = read_frames(path, start, count, interval).astype(int)
        theirs = read_frames(path, start, count, interval, decoder=decoder)
        assert theirs.dtype == np.uint8 and theirs.shape == ours.shape
        assert abs(ours - theirs).mean() < 1.5
    small = read_frames(path, 5, 10, resize=ResizeToFill(24, 24), decoder=decoder)
    assert small.shape == (10, 24, 32, 3)
    with pytest.raises(DecodeError, match="it has 40 frames, the window needs 41"):
        read_frames(path, 40, 1, decoder=decoder)


@others
@pytest.mark.parametrize("width", [8, 10, 16, 24, 48, 50, 64])
def test_another_decoder_reads_narrow_clips(tmp_path: Path, width: int, decoder: str) -> None:
    """Decord pads rows of some widths, and then miscounts."""
    needs(decoder)
    path = encode(tmp_path / "c.mp4", 20, size=(48, width))
    for numbers in ((0, 20), (3, 9)):
        theirs = read_frames(path, *numbers, decoder=decoder).astype(int)
        assert theirs.shape[1:] == (48, width, 3)
        assert abs(theirs - read_frames(path, *numbers)).mean() < 1.5


@others
def test_another_decoder_refuses_what_is_broken_in_one_line(tmp_path: Path, decoder: str) -> None:
    needs(decoder)
    path = tmp_path / "c.mp4"
    path.write_bytes(b"not a clip" * 50)
    with pytest.raises(DecodeError) as error:
        read_frames(str(path), 0, 1, decoder=decoder)
    assert error.value.path == str(path) and "\n" not in str(error.value)


@others
@needs_media
def test_decoders_number_real_frames_alike(decoder: str) -> None:
    needs(decoder)
    for name in ("clips/bird.mkv", "edge_cases/test_non_zero_start.mp4"):
        path = str(MEDIA / name)
        total = probe(path).num_frames
        every = read_frames(path, 0, min(total, 12), resize=ResizeToFill(64, 64)).astype(int)
        for i in (0, 3, len(every) - 1):
            one = read_frames(path, i, 1, resize=ResizeToFill(64, 64), decoder=decoder).astype(int)
            assert abs(every - one).mean(axis=(1, 2, 3)).argmin() == i, (name, i)


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_a_decoder_that_is_not_installed_is_one_line(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, decoder, None)
    with pytest.raises(UserError, match=rf"^data.decoder={decoder}: pip install .*, or use pyav") as error:
        require(decoder)
    assert "\n" not in str(error.value)
    require("pyav")


def test_torchcodec_without_ffmpeg_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Could not load libtorchcodec.\nLikely causes:\n 1. FFmpeg is not installed")

    monkeypatch.setitem(sys.modules, "torchcodec", Broken("torchcodec"))
    with pytest.raises(UserError, match="install FFmpeg's shared libraries") as error:
        require("torchcodec")
    assert "\n" not in str(error.value)


def test_torchcodec_is_called_as_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that has its interface: the package needs FFmpeg on the system."""

    class Decoder:
        def __init__(self, source: Any, *, dimension_order: str, num_ffmpeg_threads: int) -> None:
            assert dimension_order == "NHWC" and num_ffmpeg_threads == 3
            self.frames = read_frames(source, 0, 20)

        def __len__(self) -> int:
            return len(self.frames)

        def get_frames_at(self, indices: list[int]) -> Any:
            import torch

            assert len(indices) <= 8
            return types.SimpleNamespace(data=torch.from_numpy(self.frames[indices]))

    monkeypatch.setattr(torchcodec_backend, "load", lambda: types.SimpleNamespace(VideoDecoder=Decoder))
    path = encode(tmp_path / "c.mp4", 20)
    frames = read_frames(path, 1, 10, 2 - 1, decoder="torchcodec", threads=3)
    assert np.array_equal(frames, read_frames(path, 1, 10))
    with pytest.raises(DecodeError, match="it has 20 frames, the window needs 21"):
        read_frames(path, 20, 1, decoder="torchcodec", threads=3)


def test_choices() -> None:
    assert set(DECODERS) == {"pyav", "decord", "torchcodec"}
    for bad in ({"decoder": "opencv"}, {"decode_timeout_s": 0}, {"decode_timeout_s": 300}, {"max_bad_share": 2}):
        with pytest.raises(ValueError, match=rf"^{next(iter(bad))}=.*: must be"):
            DataConfig(**bad)


def test_what_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "c.mp4", 60)
    plain = pyav_backend.decode_packet
    monkeypatch.setattr(pyav_backend, "decode_packet", lambda *of: time.sleep(0.05) or plain(*of))
    began = time.monotonic()
    with pytest.raises(DecodeError, match=r"not read within 0.5 s \(data.decode_timeout_s\)"):
        read_frames(path, 0, 60, timeout_s=0.5)
    assert time.monotonic() - began < 5
    assert len(read_frames(path, 0, 3, timeout_s=60)) == 3


def test_frames_go_where_they_are_wanted(tmp_path: Path) -> None:
    path = encode(tmp_path / "c.mp4", 20, size=(50, 66))  # no line of 66 pixels is a multiple of 32 bytes
    memory = np.full(10**6, 7, np.uint8)
    frames = read_frames(path, 2, 5, allocate=lambda shape: memory[: np.prod(shape)].reshape(shape))
    assert np.shares_memory(frames, memory) and np.array_equal(frames, read_frames(path, 2, 5))


def frames_of(path: str) -> np.ndarray:
    return read_frames(path, 5, 9, threads=2)


POOL = """
import multiprocessing, sys
import numpy as np
from tests.unit.test_decoders import frames_of
if __name__ == "__main__":
    method, path = sys.argv[1:]
    expected = frames_of(path)
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map_async(frames_of, [path] * 4).get(timeout=60)
    sys.exit(not all(np.array_equal(frames, expected) for frames in found))
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_may_be_forked_or_spawned_after_decoding(tmp_path: Path, method: str) -> None:
    """In a process of its own: threads of other tests could hold a lock in the moment of the fork."""
    path = encode(tmp_path / "c.mp4", 20)
    done = subprocess.run([sys.executable, "-c", POOL, method, path], cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 0


def resident_mib(pid: int | str) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def growth(tmp_path: Path, warm: int, clips: int) -> float:
    """MiB that a decoding process grows by over so many clips, good and broken, after the first ``warm``.

    Ten times the median of ten parts: the allocator takes memory for a further arena at once, at any time, and what
    leaks does so in all of them.
    """
    good = [encode(tmp_path / f"{i}.mp4", 12 + i, size=(48 + 2 * i, 64)) for i in range(4)]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(good[0]).read_bytes()[:3000])
    paths = [*good, str(broken)]
    process = DecoderProcess()
    held: list[float] = []
    for i in range(warm + clips):
        if i >= warm and (i - warm) % (clips // 10) == 0:
            held.append(resident_mib(process.pid))
        try:
            process(paths[i % 5], i % 7, 3, resize=ResizeToFill(32, 32), threads=1, decoder="pyav", timeout_s=30)
        except DecodeError:
            assert i % 5 == 4
    held.append(resident_mib(process.pid))
    process.close()
    return 10 * statistics.median(after - before for before, after in pairwise(held))


def test_memory_does_not_grow_with_clips(tmp_path: Path) -> None:
    assert growth(tmp_path, 1500, 1000) < 2  # the allocator's own arenas are nearly all made after some 1,200 clips


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_ten_thousand_clips(tmp_path: Path) -> None:
    grown = growth(tmp_path, 1000, 10_000)
    print(f"10,000 clips: {grown:.2f} MiB")
    assert grown < 4
