"""Pictures whose data end early are refused, whatever their decoder would fill in; real ones are never."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora.datasets.decode.api import DecodeError, probe, read_frames

HEIGHT, WIDTH = 90, 130
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
SMOOTH = np.asarray(Image.fromarray(PIXELS[:9, :13]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
SAVED = {
    ".png": {},
    ".jpg": {},
    ".webp": {"lossless": True},
    ".tiff": {"compression": "tiff_deflate"},
    ".bmp": {},
    ".gif": {},
    ".jp2": {},
    ".avif": {},
    ".ppm": {},
    ".tga": {"compression": "tga_rle"},
    ".pcx": {},
    ".sgi": {},
    ".qoi": {},
    ".ico": {},
}
INTERLACE = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(rows: bytes, *, size: tuple[int, int] = (WIDTH, HEIGHT), interlaced: bool = False, depth: int = 8) -> bytes:
    """A file in order in all but how many pixels it has."""
    header = struct.pack(">IIBBBBB", *size, depth, 2 if depth >= 8 else 0, 0, 0, int(interlaced))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def rows_of(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def interlaced_rows(pixels: np.ndarray) -> bytes:
    passes = (pixels[top::down, left::across] for left, top, across, down in INTERLACE)
    return b"".join(rows_of(part) for part in passes if part.shape[1])


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def refused(path: Path, content: bytes) -> str:
    """Why the file is refused, by the index and by training alike; empty: it is not."""
    path.write_bytes(content)
    causes = []
    for ask in (probe, lambda name: read_frames(name, 0, 1)):
        try:
            ask(str(path))
            causes.append("")
        except DecodeError as error:
            causes.append(error.cause)
    assert causes[0] == causes[1]
    return causes[0]


@pytest.mark.parametrize("suffix", SAVED)
def test_a_still_that_is_cut_off(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / f"whole{suffix}", **SAVED[suffix])
    content = (tmp_path / f"whole{suffix}").read_bytes()
    assert refused(tmp_path / f"a{suffix}", content) == ""
    for share in (0.3, 0.5, 0.9):
        assert refused(tmp_path / f"a{suffix}", content[: int(len(content) * share)]), share


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("missing", [1, 400, HEIGHT * WIDTH * 2])
def test_a_png_whose_compressed_data_end_early(missing: int, interlaced: bool, tmp_path: Path) -> None:
    rows = interlaced_rows(PIXELS) if interlaced else rows_of(PIXELS)
    assert refused(tmp_path / "a.png", png(rows, interlaced=interlaced)) == ""
    assert np.array_equal(read_frames(str(tmp_path / "a.png"), 0, 1)[0], PIXELS)
    cut = png(rows[: -missing if missing > 1 else -WIDTH * 3 - 1], interlaced=interlaced)
    said = refused(tmp_path / "a.png", cut)  # Pillow notices what ends within a row
    assert said.startswith("its data end early: ") or ("truncated" in said and missing != 1)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 9), (1, 20), (20, 1)])
@pytest.mark.parametrize("depth", [1, 4, 8, 16])
def test_small_ones_are_counted_right(size: tuple[int, int], depth: int, tmp_path: Path) -> None:
    width, height = size
    channels = 3 if depth >= 8 else 1
    plain = b"".join(bytes(1 + -(-width * depth * channels // 8)) for _ in range(height))
    woven = b""
    for left, top, across, down in INTERLACE:
        columns, rows = len(range(left, width, across)), len(range(top, height, down))
        woven += bytes(rows * (1 + -(-columns * depth * channels // 8))) if columns else b""
    for rows, interlaced in ((plain, False), (woven, True)):
        assert refused(tmp_path / "a.png", png(rows, size=size, interlaced=interlaced, depth=depth)) == ""
        cut = png(rows[:-1], size=size, interlaced=interlaced, depth=depth)
        assert re.search("data end early|truncated", refused(tmp_path / "a.png", cut))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_jpeg_that_says_its_end_early(mode: str, progressive: bool, share: float, tmp_path: Path) -> None:
    """As tools that mend a broken download write it."""
    whole = jpeg(PIXELS, mode, progressive=progressive)
    assert refused(tmp_path / "a.jpg", whole) == ""
    assert "data end early" in refused(tmp_path / "a.jpg", whole[: int(len(whole) * share)] + b"\xff\xd9")


@pytest.mark.parametrize("colour", [(0, 0, 0), (128, 128, 128), (127, 128, 129), (255, 255, 255)])
def test_pictures_that_end_as_if_filled_up(colour: tuple[int, int, int], tmp_path: Path) -> None:
    picture = SMOOTH.copy()
    picture[HEIGHT // 2 :] = colour
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}):
        assert refused(tmp_path / "a.jpg", jpeg(picture, **options)) == ""
    assert refused(tmp_path / "a.png", png(rows_of(picture))) == ""
    assert refused(tmp_path / "a.png", png(interlaced_rows(picture), interlaced=True)) == ""


def frames(count: int) -> list[Image.Image]:
    return [Image.fromarray(np.roll(PIXELS, 7 * i, 0)) for i in range(count)]


def test_an_animated_png_has_the_frames_before(tmp_path: Path) -> None:
    first, *rest = frames(4)
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, duration=100)
    raw = (tmp_path / "a.png").read_bytes()
    at = raw.index(b"fdAT", raw.index(b"fdAT") + 4)  # the data of frame 2
    length = struct.unpack(">I", raw[at - 4 : at])[0]
    short = zlib.compress(zlib.decompress(raw[at + 8 : at + 4 + length])[:3910])
    (tmp_path / "a.png").write_bytes(
        raw[: at - 4] + chunk(b"fdAT", raw[at + 4 : at + 8] + short) + raw[at + 8 + length :]
    )
    assert np.array_equal(read_frames(str(tmp_path / "a.png"), 0, 2)[1], np.roll(PIXELS, 7, 0))
    for ask in (probe, lambda name: read_frames(name, 0, 3)):
        with pytest.raises(DecodeError, match="frame 2: its data end early"):
            ask(str(tmp_path / "a.png"))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_gif_that_is_cut_off_has_the_frames_that_are_whole(share: float, tmp_path: Path) -> None:
    first, *rest = frames(6)
    first.save(tmp_path / "whole.gif", save_all=True, append_images=rest, duration=100)
    content = (tmp_path / "whole.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[: int(len(content) * share)])
    count = probe(str(tmp_path / "a.gif")).num_frames
    assert int(6 * share) - 1 <= count <= int(6 * share)
    expected = read_frames(str(tmp_path / "whole.gif"), 0, count)
    assert np.array_equal(read_frames(str(tmp_path / "a.gif"), 0, count), expected)
    with pytest.raises(DecodeError, match=f"it has {count} frames"):
        read_frames(str(tmp_path / "a.gif"), count, 1)


def blocks_halved(raw: bytes, which: int) -> bytes:
    """The GIF with half of the data blocks of one of its pictures; the file is in order otherwise."""
    at = 13 + (3 * 2 ** ((raw[10] & 7) + 1) if raw[10] & 0x80 else 0)
    out, number = raw[:at], 0
    while raw[at] != 0x3B:
        is_image = raw[at] == 0x2C
        local = 3 * 2 ** ((raw[at + 9] & 7) + 1) if is_image and raw[at + 9] & 0x80 else 0
        start = at + (11 + local if is_image else 2)
        out, at, blocks = out + raw[at:start], start, []
        while raw[at]:
            blocks.append(raw[at : at + 1 + raw[at]])
            at += 1 + raw[at]
        at += 1
        out += b"".join(blocks[: len(blocks) // 2] if is_image and number == which else blocks) + b"\0"
        number += is_image
    return out + raw[at:]


@pytest.mark.parametrize("which", [0, 2, 5])
def test_a_gif_of_which_a_picture_ends_early_has_those_before(which: int, tmp_path: Path) -> None:
    first, *rest = frames(6)
    first.save(tmp_path / "whole.gif", save_all=True, append_images=rest, duration=100)
    (tmp_path / "a.gif").write_bytes(blocks_halved((tmp_path / "whole.gif").read_bytes(), which))
    if which:
        assert probe(str(tmp_path / "a.gif")).num_frames == which
        expected = read_frames(str(tmp_path / "whole.gif"), 0, which)
        assert np.array_equal(read_frames(str(tmp_path / "a.gif"), 0, which), expected)
    said = f"it has {which} frames, the window needs {which + 1}" if which else "no frame of it can be decoded"
    with pytest.raises(DecodeError, match=said):
        read_frames(str(tmp_path / "a.gif"), which, 1)


HEADS = {
    "a.jpg": b"\xff\xd8\xff\xe0",
    "half.jpg": jpeg(SMOOTH)[:300],
    "a.png": b"\x89PNG\r\n\x1a\n",
    "a.gif": b"GIF89a\x10\0\x10\0\0\0\0",
    "a.webp": b"RIFF\xff\xff\xff\x7fWEBPVP8 \xff\xff\xff\x70",
    "a.ppm": b"P6\n#",
    "a.tiff": b"II*\0\x08\0\0\0",
    "a.avif": b"\0\0\0\x20ftypavif",
}


@pytest.mark.timeout(60)  # a second; without the bound minutes
@pytest.mark.parametrize("name", HEADS)
def test_a_huge_file_that_only_begins_as_a_picture(name: str, tmp_path: Path) -> None:
    """2 GB that take no place on the disk: no more of them is read than a header can have."""
    with (tmp_path / name).open("wb") as file:
        file.write(HEADS[name])
        file.truncate(2 << 30)
    with pytest.raises(DecodeError) as caught:
        probe(str(tmp_path / name))
    assert "picture" in caught.value.cause or "PNG" in caught.value.cause


def test_a_picture_with_much_behind_it(tmp_path: Path) -> None:
    """What follows a picture is not looked at."""
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(jpeg(SMOOTH))
        file.truncate(2 << 30)
    assert probe(str(tmp_path / "a.jpg")).width == WIDTH


def test_a_picture_with_a_large_header(tmp_path: Path) -> None:
    """Megabytes of metadata, and thousands of segments, are no reason to refuse one."""
    whole = jpeg(SMOOTH)
    comments = b"".join(b"\xff\xfe" + struct.pack(">H", 65_535) + bytes(65_533) for _ in range(200))
    small = b"\xff\xfe\0\x03x" * 20_000
    assert refused(tmp_path / "a.jpg", whole[:2] + comments + small + whole[2:]) == ""
    notes = b"".join(chunk(b"tEXt", b"k\0" + bytes(f"{i}", "ascii")) for i in range(5000))
    content = png(rows_of(SMOOTH))
    assert refused(tmp_path / "a.png", content[:33] + notes + content[33:]) == ""


# (milliseconds that each frame says, frames a second: one of at most 10 ms lasts 100, and the last does not count)
TIMES = {
    "all the same": ([40] * 5, 25),
    "none": ([0] * 5, 10),
    "too short": ([10] * 5, 10),
    "mixed": ([0, 50, 0, 50, 50], 4000 / 300),
    "last": ([50, 50, 50, 50, 0], 20),
    "short, not too short": ([20] * 5, 50),
}


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
@pytest.mark.parametrize("kind", TIMES)
def test_how_long_frames_last_is_one_rule(kind: str, suffix: str, tmp_path: Path) -> None:
    """As browsers do it, in every format."""
    times, fps = TIMES[kind]
    first, *rest = frames(5)
    options = {"lossless": True, "minimize_size": False} if suffix == ".webp" else {}
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=rest, duration=times, **options)
    info = probe(str(tmp_path / f"a{suffix}"))
    assert (info.num_frames, info.fps) == (5, pytest.approx(fps, rel=1e-9))


def test_frames_of_a_gif_that_say_nothing(tmp_path: Path) -> None:
    first, *rest = frames(5)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=50)
    raw = (tmp_path / "a.gif").read_bytes()
    at = [i for i in range(len(raw)) if raw[i : i + 3] == b"\x21\xf9\x04" and raw[i + 7] == 0]
    assert len(at) == 5
    for start in (at[3], at[1]):
        raw = raw[:start] + raw[start + 8 :]
    (tmp_path / "a.gif").write_bytes(raw)
    info = probe(str(tmp_path / "a.gif"))
    assert (info.num_frames, info.fps) == (5, pytest.approx(4000 / 300))


def test_no_whole_picture_is_refused(tmp_path: Path) -> None:
    """Any size, subsampling, quality and restart interval, of pictures that end in grey, black, noise or a ramp."""
    rng = np.random.default_rng(1)
    for number in range(120):
        height, width = (int(side) for side in rng.integers(1, 70, 2))
        picture = rng.integers(0, 256, (height, width, 3), np.uint8)
        picture[height // 2 :] = rng.choice([0, 126, 128, 130, 255])
        options = {"quality": int(rng.integers(1, 100)), "subsampling": int(rng.integers(0, 3)), "optimize": True}
        options |= {"progressive": True} if number % 2 else {"restart_marker_blocks": int(rng.integers(1, 9))}
        mode = ("RGB", "L", "CMYK")[number % 3]
        assert refused(tmp_path / "a.jpg", jpeg(picture, mode, **options)) == "", (number, options)
        Image.fromarray(picture).convert(("RGB", "L", "P", "1", "RGBA")[number % 5]).save(tmp_path / "b.png")
        assert refused(tmp_path / "b.png", (tmp_path / "b.png").read_bytes()) == "", number
