"""Whose fault it is: what a parser raises on a file is one line about the file, what our own code raises stays loud."""

import io
import os
import struct
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from opensora.datasets.decode import (
    api,
    decord_backend,
    pillow_backend,
    pillow_pixels,
    pyav_backend,
    pyav_container,
    pyav_pixels,
    torchcodec_backend,
)
from opensora.datasets.decode.api import DecodeError, probe, read_frames
from opensora.datasets.decode.common import Deadline
from opensora.datasets.decode.process import DecoderProcess
from opensora.datasets.table import clip_storage
from opensora.datasets.table.clip_storage import archive_members, locate
from tests.unit.test_decode import encode

ERRORS = [
    struct.error("x"), TypeError("x"), AttributeError("x"), KeyError("x"), IndexError(), MemoryError(),
    RecursionError(), ZeroDivisionError("x"), OverflowError(), NotImplementedError(), SystemError("x\ny"), EOFError(),
    OSError(5, "x"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), AssertionError("x"), ImportError("x"),
    type("Odd", (Exception,), {})(),
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """One of each way to be read."""
    clip = encode(tmp_path / "a.mp4", 12)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 20, 30, 4), np.uint8)
    images = [Image.fromarray(picture) for picture in pixels]
    images[0].convert("RGB").save(tmp_path / "a.jpg")
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:])
    with tarfile.open(tmp_path / "a.tar", "w") as tar, zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        tar.add(clip, "a.mp4")
        archive.write(clip, "a.mp4")
    names = {"clip": "a.mp4", "still": "a.jpg", "animation": "a.webp", "tar": "a.tar#a.mp4", "zip": "a.zip#a.mp4"}
    return {kind: str(tmp_path / name) for kind, name in names.items()}


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def refused(path: str, match: str = "") -> str:
    """What both questions about a file say."""
    for ask in (probe, lambda p: read_frames(p, 0, 1)):
        with pytest.raises(DecodeError, match=match) as found:
            ask(path)
        assert found.value.path == path and found.value.cause and "\n" not in found.value.cause
    return found.value.cause


LIBRARY = {
    "opening a still": ("still", Image, "open"),
    "loading a still": ("still", Image.Image, "load"),
    "converting a still": ("still", Image.Image, "convert"),
    "seeking in an animation": ("animation", "WebPImagePlugin.WebPImageFile", "seek"),
    "opening a clip": ("clip", av, "open"),
    "converting a frame": ("clip", pyav_pixels, "VideoReformatter"),
    "a tar": ("tar", tarfile, "open"),
    "the next member of a tar": ("tar", tarfile.TarFile, "next"),
    "a zip": ("zip", zipfile, "ZipFile"),
    "the members of a zip": ("zip", zipfile.ZipFile, "infolist"),
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", LIBRARY)
def test_whatever_a_library_raises_is_about_the_file(
    call: str, error: Exception, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, owner, name = LIBRARY[call]
    if isinstance(owner, str):
        from PIL import WebPImagePlugin

        owner = WebPImagePlugin.WebPImageFile
    if name == "VideoReformatter":
        monkeypatch.setattr(owner, name, lambda: types.SimpleNamespace(reformat=raising(error)))
    else:
        monkeypatch.setattr(owner, name, raising(error))
    clip_storage._directory.cache_clear()
    refused(files[kind])


OURS: list[tuple[str, Any, str]] = [
    *(("clip", pyav_backend, name) for name in ("video_stream", "stream_info", "frame_index", "_decode_into")),
    *(("clip", pyav_backend, name) for name in ("packets", "decode_packet")),
    *(("clip", pyav_pixels, name) for name in ("stored_frame", "check_size")),
    ("clip", pyav_container, "check_size"),
    ("clip", pyav_pixels.Window, "put"),
    ("clip", pyav_pixels.Window, "_convert"),
    ("clip", api, "sniff_source"),
    ("clip", api, "locate"),
    *(("still", pillow_backend, name) for name in ("turn_of", "to_rgb", "check_size", "scale_rgb", "_formats")),
    *(("animation", pillow_backend, name) for name in ("_frames_in_turn", "turn_of")),
    ("animation", pillow_pixels, "on_background"),
    ("tar", clip_storage, "_tar_members"),
    ("zip", clip_storage, "_zip_members"),
    ("tar", clip_storage, "_place_of"),
]  # fmt: skip


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError, ZeroDivisionError])
@pytest.mark.parametrize(("kind", "owner", "name"), OURS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_mistake_in_a_function_of_ours_is_loud(
    kind: str, owner: Any, name: str, error: type[Exception], files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hasattr(owner, name)
    monkeypatch.setattr(owner, name, raising(error("ours")))
    clip_storage._directory.cache_clear()
    with pytest.raises(error, match="ours"):
        read_frames(files[kind], 0, 1)


def divide_by_zero(height: int, width: int) -> tuple[int, int]:
    return height // 0, width


@pytest.mark.parametrize("kind", ["clip", "still", "animation", "tar", "zip"])
def test_callbacks_are_loud_here_and_in_the_decoding_process(kind: str, files: dict[str, str]) -> None:
    with pytest.raises(ZeroDivisionError):
        read_frames(files[kind], 0, 1, resize=divide_by_zero)
    for error in ERRORS:
        with pytest.raises(type(error)):
            read_frames(files[kind], 0, 1, allocate=raising(error))
    process = DecoderProcess()
    try:
        settings: Any = {"threads": 1, "decoder": "pyav", "timeout_s": 60}
        with pytest.raises(RuntimeError, match=r"(?s)the decoding process failed.*ZeroDivisionError"):
            process(files[kind], 0, 1, resize=divide_by_zero, **settings)
        assert process(files[kind], 0, 1, resize=None, **settings).shape[0] == 1
    finally:
        process.close()


class Package:
    """decord or torchcodec, failing at one call."""

    DECORDError = type("DECORDError", (Exception,), {})

    def __init__(self, fails: str, error: Exception) -> None:
        self._fails, self._error = fails, error

    def VideoReader(self, place: object, num_threads: int) -> "Package":
        return self.call("open", self)

    def VideoDecoder(self, place: object, dimension_order: str, num_ffmpeg_threads: int) -> "Package":
        return self.call("open", self)

    def __len__(self) -> int:
        return self.call("count", 12)

    def get_batch(self, numbers: list[int]) -> Any:
        pixels = np.zeros((len(numbers), 48, 64, 3), np.uint8)
        return self.call("read", types.SimpleNamespace(asnumpy=lambda: pixels))

    def get_frames_at(self, indices: list[int]) -> Any:
        pixels = np.zeros((len(indices), 48, 64, 3), np.uint8)
        return self.call("read", types.SimpleNamespace(data=types.SimpleNamespace(numpy=lambda: pixels)))

    def call(self, name: str, result: Any) -> Any:
        if name == self._fails:
            raise self._error
        return result


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fails", ["open", "count", "read"])
@pytest.mark.parametrize("home", [decord_backend, torchcodec_backend], ids=["decord", "torchcodec"])
def test_other_decoders(
    home: Any, fails: str, error: Exception, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "load", lambda: Package(fails, error))
    name = home.__name__.rsplit(".", 1)[1].removesuffix("_backend")
    with pytest.raises(DecodeError) as found:
        read_frames(files["clip"], 0, 2, decoder=name)
    assert "\n" not in found.value.cause
    monkeypatch.setattr(home, "load", lambda: Package("", error))
    assert read_frames(files["clip"], 0, 2, decoder=name).shape == (2, 48, 64, 3)
    with pytest.raises(ZeroDivisionError):
        read_frames(files["clip"], 0, 2, decoder=name, resize=divide_by_zero)
    with pytest.raises(type(error)):
        read_frames(files["clip"], 0, 2, decoder=name, allocate=raising(error))


def test_every_bit_of_a_codec_name(tmp_path: Path) -> None:
    raw = Path(encode(tmp_path / "a.mp4", 5)).read_bytes()
    at = raw.index(b"avc1", raw.index(b"stsd"))
    for bit in range(32):
        damaged = bytearray(raw)
        damaged[at + bit // 8] ^= 1 << bit % 8
        (tmp_path / "b.mp4").write_bytes(damaged)
        try:
            assert read_frames(str(tmp_path / "b.mp4"), 0, 1).shape == (1, 48, 64, 3)
        except DecodeError:
            refused(str(tmp_path / "b.mp4"))


def test_any_exif_leaves_the_picture(tmp_path: Path) -> None:
    """Random changes to EXIF alone: the pixels are whole, so the picture is read, turned or not; a note may say so."""
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x011A], tags[0x0132] = 6, "maker", 72.0, "2024:01:01 00:00:00"
    tags.get_ifd(0x8769)[0x9000] = b"0230"
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=tags)
    raw = buffer.getvalue()
    start = raw.index(b"Exif\0\0") + 6
    size = len(tags.tobytes()) - 6
    stored = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    rng, notes, path = np.random.default_rng(3), 0, tmp_path / "a.jpg"
    for _ in range(1500):
        damaged = bytearray(raw)
        for _ in range(int(rng.integers(1, 6))):
            damaged[start + int(rng.integers(size))] = int(rng.integers(256))
        path.write_bytes(damaged)
        info, frame = probe(str(path)), read_frames(str(path), 0, 1)[0]
        assert frame.shape[:2] == (info.height, info.width)
        back = {np.rot90(flip, turns).tobytes() for flip in (frame, frame[:, ::-1]) for turns in range(4)}
        assert stored.tobytes() in back
        notes += info.note != ""
    assert notes > 5  # some damage was noticed, or this has tried nothing


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_exif_that_makes_pillow_fail_is_ignored_with_a_note(
    error: Exception, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_frames(files["still"], 0, 1)
    monkeypatch.setattr(Image.Image, "getexif", raising(error))
    assert np.array_equal(read_frames(files["still"], 0, 1), before)
    assert probe(files["still"]).note == "its EXIF is damaged; the orientation in it is ignored"


def test_paths_that_are_none(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", 3)
    (tmp_path / "d.tar").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    base = str(tmp_path / "a.mp4")
    for path in (
        "", "\0", f"{base}\0", "a" * 5000, "/".join(["a" * 200] * 30), "\ud800.mp4", f"{base}#x@{'9' * 5000}+1",
        f"{base}#x@0+{'9' * 5000}", f"{base}#x@٣+٤", f"{base}#x@-1+10", f"{base}#x@0+0", f"{base}#x@5+-5",
        f"{base}#x@0+", f"{base}#x@99999999+1", f"{base}#x@1e3+1", f"{tmp_path}/d.tar#a.mp4", f"{tmp_path}/d.tar",
        str(tmp_path), f"{tmp_path}/loop", "/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "/proc/kmsg",
        f"{base}/x", f"{base}#", "#", "@1+1", "#@1+1", f"{tmp_path}/no.zip#\0",
    ):  # fmt: skip
        refused(path)


def test_names_that_ffmpeg_would_take_for_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Path(encode(tmp_path / "a.mp4", 5)).read_bytes()
    monkeypatch.chdir(tmp_path)
    odd = ("12:30.mp4", "concat:a.mp4|a.mp4", "http:x.mp4", "-i.mp4", "a%03d.mp4", "ä ?&#x.mp4")
    for name in (*odd, os.fsdecode(b"\xff.mp4")):
        Path(name).write_bytes(raw)
        assert probe(name).num_frames == 5 and read_frames(name, 4, 1).shape == (1, 48, 64, 3)
        whole = f"{name}#a.mp4@0+{len(raw)}"
        assert probe(whole).num_frames == 5


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".m3u8", ".png"])
def test_a_list_of_other_files_is_not_followed(suffix: str, tmp_path: Path) -> None:
    """Or a file in a data set could make a run open any place."""
    clip = encode(tmp_path / "secret.mp4", 5)
    for text in (
        "ffconcat version 1.0\nfile secret.mp4\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:{clip}\n#EXT-X-ENDLIST\n",
        f"<?xml version='1.0'?><MPD><Period><BaseURL>file:{clip}</BaseURL></Period></MPD>",
        "hello, this is drawn as a video by some\n" * 20,
    ):
        path = str(tmp_path / f"list{suffix}")
        Path(path).write_text(text)
        refused(path)
        with pytest.raises(DecodeError):  # FFmpeg itself, whatever a look at the first bytes said
            pyav_backend.probe(clip_storage.Source(path, path), Deadline(path, 20))


def member(size: int, kind: bytes = tarfile.REGTYPE, name: str = "a.mp4") -> bytes:
    """A tar header that says this size, by 256 where octal digits do not reach."""
    info = tarfile.TarInfo(name)
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "raw",
    [
        member(10**15), member(2**62), member(-512), member(-1024) * 3, member(-1), member(10**6) + bytes(600),
        member(100, tarfile.GNUTYPE_SPARSE) + bytes(512), member(100, tarfile.XHDTYPE) + b"9" * 512,
        member(2**40, tarfile.XHDTYPE), member(2**40, tarfile.GNUTYPE_LONGNAME), member(-512, tarfile.XHDTYPE) * 5,
        member(20, tarfile.XHDTYPE) + b"20 size=-99999999999\n".ljust(512, b"\0") + member(5) + bytes(512),
        member(0, tarfile.SYMTYPE), member(0, tarfile.LNKTYPE), member(0, tarfile.CHRTYPE), b"\0" * 10240,
        b"\xff" * 512, member(0, tarfile.XHDTYPE) * 3000,
    ],
    ids=range(18),
)  # fmt: skip
def test_tars_that_lie(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(raw)
    refused(f"{tmp_path}/a.tar#a.mp4")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_of_its_own_is_named_so(kind: bytes, tmp_path: Path) -> None:
    """It is in the archive: to say that it is not would send its owner to look for it."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("a.mp4")
        member.type, member.linkname = kind, "b.mp4"
        tar.addfile(member)
    refused(f"{tmp_path}/a.tar#a.mp4", "sparse or a link; store it as it is")
    refused(f"{tmp_path}/a.tar#b.mp4", "the archive has no member b.mp4")


def test_a_sparse_member_is_not_read_as_it_lies(tmp_path: Path) -> None:
    header = bytearray(member(512, tarfile.GNUTYPE_SPARSE))
    header[386:398], header[398:410] = b"%011o\0" % 4096, b"%011o\0" % 512  # one piece
    header[483:495] = b"%011o\0" % 8192
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(512) + bytes(1024))
    assert archive_members(str(tmp_path / "a.tar")) == {"a.mp4": None}
    refused(f"{tmp_path}/a.tar#a.mp4", "sparse")


def test_zips_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.mp4", b"x" * 300)
    raw = path.read_bytes()
    directory = raw.index(b"PK\1\2")
    changes = {
        "encrypted": (directory + 8, b"\1\0"),
        "sizes beyond the file": (directory + 20, b"\xff\xff\xff\x7f" * 2),
        "begins elsewhere": (directory + 42, b"\x50\0\0\0"),
        "begins beyond the file": (directory + 42, b"\xff\xff\xff\x7f"),
        "zip64 without a field": (directory + 20, b"\xff" * 8),
        "a method that nobody has": (directory + 10, b"\x63\0"),
        "no directory": (len(raw) - 22, b"\0\0\0\0"),
        "a local header that is none": (0, b"\0\0\0\0"),
        "a name that is no text": (directory + 46, b"\xff\xfe\0\0\0"),
        "extra field beyond the file": (28, b"\xff\xff"),
    }
    for _, (at, data) in changes.items():
        path.write_bytes(raw[:at] + data + raw[at + len(data) :])
        clip_storage._directory.cache_clear()
        refused(f"{path}#a.mp4")


def test_members_with_odd_names(tmp_path: Path) -> None:
    raw = Path(encode(tmp_path / "1.mp4", 5)).read_bytes()
    names = ["a@2x.mp4", "a#b.mp4", "a@1+x.mp4", "x.tar#y.mp4", "ä.mp4", " .mp4", "a\nb.mp4", os.fsdecode(b"\xff.mp4")]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            tar.add(tmp_path / "1.mp4", name)
    for name in names:
        with locate(f"{tmp_path}/a.tar#{name}").open() as file:
            assert file.read() == raw
        assert probe(f"{tmp_path}/a.tar#{name}").num_frames == 5


def test_an_animation_whose_later_frame_is_broken(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 20, 30, 3), np.uint8)
    images = [Image.fromarray(picture) for picture in pixels]
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:], duration=100)
    damaged = bytearray((tmp_path / "a.png").read_bytes())
    second = damaged.index(b"fdAT", damaged.index(b"fdAT") + 4)
    damaged[second + 20 : second + 60] = bytes(40)
    (tmp_path / "a.png").write_bytes(damaged)
    assert np.array_equal(read_frames(str(tmp_path / "a.png"), 0, 2), pixels[:2])
    for ask in (probe, lambda path: read_frames(path, 0, 4)):
        with pytest.raises(DecodeError, match=r"frame 2: "):
            ask(str(tmp_path / "a.png"))


BOMBS = {".png": "PNG", ".tiff": "TIFF", ".bmp": "BMP", ".ppm": "PPM", ".webp": "WEBP", ".jp2": "JPEG2000"}


@pytest.mark.parametrize("suffix", BOMBS)
def test_pictures_that_say_they_are_huge(suffix: str, tmp_path: Path) -> None:
    """A small file with a changed size in its header is refused before memory is asked for."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(buffer, BOMBS[suffix], **options)
    raw = buffer.getvalue()
    large = 16300
    swaps = {
        ".png": (struct.pack(">II", 16, 16), struct.pack(">II", large, large)),
        ".tiff": (struct.pack("<HHII", 256, 4, 1, 16), struct.pack("<HHII", 256, 4, 1, large)),
        ".bmp": (struct.pack("<ii", 16, 16), struct.pack("<ii", large, large)),
        ".ppm": (b"16 16", b"16300 16300"),
        ".webp": (struct.pack("<I", 15 | 15 << 14), struct.pack("<I", 16299 | 16299 << 14)),
        ".jp2": (struct.pack(">II", 16, 16), struct.pack(">II", large, large)),
    }
    old, new = swaps[suffix]
    if suffix == ".tiff" and old not in raw:
        old, new = struct.pack("<HHIHH", 256, 3, 1, 16, 0), struct.pack("<HHIHH", 256, 3, 1, large, 0)
    assert old in raw
    (tmp_path / f"a{suffix}").write_bytes(raw.replace(old, new))
    refused(str(tmp_path / f"a{suffix}"))


def test_nothing_is_printed(files: dict[str, str], tmp_path: Path) -> None:
    """By a process as it is, without what pytest does to warnings."""
    import subprocess

    bad = {
        "cut.jpg": Path(files["still"]).read_bytes()[:400],
        "cut.mp4": Path(files["clip"]).read_bytes()[:-400],
        "text.tiff": b"II*\0" + b"x" * 300,
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    Image.new("1", (15000, 15000)).save(tmp_path / "large.png")
    code = (
        "import sys\nfrom opensora.datasets.decode.api import *\n"
        "for path in sys.argv[1:]:\n    try: probe(path)\n    except DecodeError: pass\n"
    )
    paths = [str(tmp_path / name) for name in (*bad, "large.png")] + list(files.values())
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
