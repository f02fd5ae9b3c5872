"""What comes out is what a viewer shows, however it is stored: depth, colours, transparency, shape, turn, matrix."""

import io
import re
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from opensora.datasets import DataConfig
from opensora.datasets.decode import pyav_backend
from opensora.datasets.decode.api import DecodeError, probe, read_frames
from opensora.datasets.decode.common import MAX_PIXELS, MAX_SIDE, Deadline, Turn
from opensora.datasets.loading.loader import build_loader
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.table.clip_storage import locate
from opensora.datasets.table.manifest import read_table
from opensora.utils.errors import UserError

HEIGHT, WIDTH = 32, 64
RAMP = np.linspace(0, 1, 256, dtype=np.float64)[None].repeat(4, axis=0)  # (4, 256), black to white
BLACK_TO_WHITE = np.arange(256, dtype=np.uint8)[None, :, None].repeat(4, axis=0).repeat(3, axis=2)


def still(path: Path) -> np.ndarray:
    """The picture, after a look whether ``probe`` says the same size."""
    frame = read_frames(str(path), 0, 1)[0]
    info = probe(str(path))
    assert (info.num_frames, info.height, info.width, info.fps) == (1, *frame.shape[:2], None)
    return frame


def quarters(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3): red, green, blue and white quarters, so that every turn and flip shows."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (255, 0, 0)
    picture[: height // 2, width // 2 :] = (0, 255, 0)
    picture[height // 2 :, : width // 2] = (0, 0, 255)
    picture[height // 2 :, width // 2 :] = (255, 255, 255)
    return picture


def close(found: np.ndarray, expected: np.ndarray, most: float) -> bool:
    return found.shape == expected.shape and float(np.abs(found.astype(int) - expected).mean()) <= most


GREY: dict[str, tuple[str, np.ndarray]] = {
    "16 bits": (".png", (RAMP * 65535).round().astype(np.uint16)),
    "16 bits in TIFF": (".tiff", (RAMP * 65535).round().astype(np.uint16)),
    "32 bits": (".tiff", (RAMP * 65535).round().astype(np.int32)),
    "32 bits of 8-bit values": (".tiff", (RAMP * 255).round().astype(np.int32)),
    "32 bits of large values": (".tiff", (RAMP * 2e9).round().astype(np.int32)),
    "0..1": (".tiff", RAMP.astype(np.float32)),
    "0..255": (".tiff", (RAMP * 255).astype(np.float32)),
    "0..65535": (".tiff", (RAMP * 65535).astype(np.float32)),
    "-1..1": (".tiff", (RAMP * 2 - 1).astype(np.float32)),
    "0..3": (".tiff", (RAMP * 3).astype(np.float32)),
    "of hundreds of thousands": (".tiff", (RAMP * 4e5 - 1e5).astype(np.float32)),
}


@pytest.mark.parametrize("kind", GREY)
def test_grey_of_any_depth_is_a_ramp(kind: str, tmp_path: Path) -> None:
    suffix, values = GREY[kind]
    Image.fromarray(values).save(tmp_path / f"ramp{suffix}")
    found = still(tmp_path / f"ramp{suffix}").astype(int)
    assert abs(found - BLACK_TO_WHITE).max() <= 1
    assert found[0, 0, 0] == 0 and found[0, -1, 0] == 255


def with_tag(image: Image.Image, tag: int, value: int) -> bytes:
    """A TIFF of the image in which a short number has become another."""
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    raw = bytearray(buffer.getvalue())
    directory = struct.unpack("<I", raw[4:8])[0]
    entries = [directory + 2 + 12 * i for i in range(struct.unpack_from("<H", raw, directory)[0])]
    at = next(entry for entry in entries if struct.unpack_from("<H", raw, entry)[0] == tag)
    struct.pack_into("<H", raw, at + 8, value)
    return bytes(raw)


def test_a_big_endian_tiff_and_one_whose_zero_is_white(tmp_path: Path) -> None:
    values = (RAMP * 65535).round().astype(np.uint16)
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big.tiff")
    assert abs(still(tmp_path / "big.tiff").astype(int) - BLACK_TO_WHITE).max() <= 1
    (tmp_path / "inverted.tiff").write_bytes(with_tag(Image.fromarray(values), 262, 0))  # photometric interpretation
    assert abs(still(tmp_path / "inverted.tiff").astype(int) - BLACK_TO_WHITE[:, ::-1]).max() <= 1


def test_unsigned_integers_of_32_bits(tmp_path: Path) -> None:
    image = Image.fromarray((RAMP * (2**32 - 1)).round().astype(np.uint32).view(np.int32))
    (tmp_path / "a.tiff").write_bytes(with_tag(image, 339, 1))  # sample format
    assert abs(still(tmp_path / "a.tiff").astype(int) - BLACK_TO_WHITE).max() <= 1


def test_floats_that_are_no_numbers_are_black(tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[0, 0], values[0, 1], values[1, :] = np.inf, -np.inf, np.nan
    Image.fromarray(values).save(tmp_path / "a.tiff")
    found = still(tmp_path / "a.tiff")
    assert found[0, 0, 0] == found[0, 1, 0] == found[1].max() == 0 and found[2, -1, 0] == 255
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "none.tiff")
    assert still(tmp_path / "none.tiff").max() == 0


def opaque_modes() -> dict[str, Image.Image]:
    picture = Image.fromarray(quarters())
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    converted = ImageCms.applyTransform(picture, lab)
    assert converted is not None
    return {
        "palette": picture.quantize(8),
        "CMYK": picture.convert("CMYK"),
        "YCbCr": picture.convert("YCbCr"),
        "L*a*b*": converted,
        "RGBX": picture.convert("RGBX"),
    }


@pytest.mark.parametrize("kind", ["palette", "CMYK", "YCbCr", "L*a*b*", "RGBX"])
def test_colour_models(kind: str, tmp_path: Path) -> None:
    opaque_modes()[kind].save(tmp_path / "a.tiff")
    assert close(still(tmp_path / "a.tiff"), quarters(), 3)


def test_lab_is_what_a_colour_management_makes_of_it(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    stored = ImageCms.applyTransform(Image.fromarray(colours), ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    assert stored is not None
    stored.save(tmp_path / "a.tiff")
    back = ImageCms.applyTransform(stored, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    assert close(still(tmp_path / "a.tiff"), np.asarray(back), 1.5)


def test_cmyk_of_adobe_and_of_others(tmp_path: Path) -> None:
    """Adobe stores it inverted, and everybody reads it so."""
    Image.fromarray(quarters()).convert("CMYK").save(tmp_path / "a.jpg", quality=95, subsampling=0)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert close(still(tmp_path / "a.jpg"), quarters(), 4)


def test_one_bit(tmp_path: Path) -> None:
    pattern = np.indices((16, 16)).sum(0) % 2 == 0
    Image.fromarray(pattern).save(tmp_path / "a.png")
    assert np.array_equal(still(tmp_path / "a.png")[..., 1], pattern * 255)


def hidden_noise(mode: str) -> tuple[Image.Image, dict[str, Any], np.ndarray]:
    """(an image whose left half is transparent and noise, options to save it, what it looks like on white)."""
    colours = np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH, 3), np.uint8)
    colours[:, WIDTH // 2 :] = 100
    expected = colours.copy()
    expected[:, : WIDTH // 2] = 255
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, : WIDTH // 2] = 0
    if mode == "RGBA":
        return Image.fromarray(np.dstack([colours, alpha])), {}, expected
    if mode == "LA":
        return Image.fromarray(np.dstack([colours[..., 0], alpha])), {}, expected[..., :1].repeat(3, axis=2)
    values = np.where(alpha == 0, 7, 100).astype(np.uint8)
    shown = np.where(alpha == 0, 255, 100).astype(np.uint8)[..., None].repeat(3, axis=2)
    if mode == "P":
        image = Image.fromarray(values, mode="P")
        image.putpalette([i for i in range(256) for _ in range(3)])
        return image, {"transparency": 7}, shown
    if mode == "L":
        return Image.fromarray(values), {"transparency": 7}, shown
    if mode == "16 bits":
        return Image.fromarray(values.astype(np.uint16) * 257), {"transparency": 7 * 257}, shown
    return Image.fromarray(values[..., None].repeat(3, axis=2)), {"transparency": (7, 7, 7)}, shown


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "16 bits"])
def test_what_is_transparent_is_on_white(mode: str, tmp_path: Path) -> None:
    image, options, expected = hidden_noise(mode)
    image.save(tmp_path / "a.png", **options)
    assert np.array_equal(still(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff", ".avif"])
def test_half_transparent_on_any_colour_in_any_format(suffix: str, tmp_path: Path) -> None:
    rgba = np.full((HEIGHT, WIDTH, 4), (200, 100, 0, 128), np.uint8)
    Image.fromarray(rgba).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    for background in ((255, 255, 255), (0, 0, 0), (0, 0, 255)):
        found = read_frames(str(tmp_path / f"a{suffix}"), 0, 1, background=background)[0]
        expected = np.array((200, 100, 0)) * (128 / 255) + np.array(background) * (127 / 255)
        assert abs(found - expected).max() < (6 if suffix == ".avif" else 1), background


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_puts_it_on_its_background(workers: int, tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 4), (200, 100, 0, 0), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("path,text,num_frames,height,width,fps\na.png,a,1,64,64,\n")
    table = read_table(str(tmp_path / "t.csv"))
    cfg = DataConfig(buckets={"64px": {1: [1.0, 1]}}, workers=workers, micro_batches=1, background="#0000ff")
    plan = BatchPlan(table, cfg, 16, seed=0)
    batches: Any = build_loader(table, plan, cfg, start_step=0, stop_step=1, dp_rank=0, dp_degree=1, seed=0)
    (batch,) = list(batches)
    assert batch.pixels[0, :, 0].reshape(3, -1).unique(dim=1).tolist() == [[0], [0], [255]]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff", ".avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations(suffix: str, orientation: int, tmp_path: Path) -> None:
    """Stored so that turning it by its tag gives the same picture each time."""
    shown = quarters()
    undo = {
        1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1], 5: shown.transpose(1, 0, 2),
        6: np.rot90(shown, 1), 7: shown[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(shown, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo[orientation])).save(tmp_path / f"a{suffix}", exif=exif)
    assert close(still(tmp_path / f"a{suffix}"), shown, 6)


def movie(
    path: Path,
    pictures: list[np.ndarray],
    codec: str = "libx264",
    pixels: str = "yuv444p",
    *,
    matrix: list[int] | None = None,
    ratio: Fraction | None = None,
    rate: int = 10,
    options: dict[str, str] | None = None,
    tags: dict[str, int] | None = None,
    **container: Any,
) -> Path:
    """Pictures (H, W, 3 or 4) as a clip, nearly without loss."""
    options = {"crf": "1"} if codec.startswith("libx26") and options is None else options or {}
    with av.open(str(path), "w", **container) as out:
        stream: Any = out.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            out.mux(stream.encode(frame.reformat(format=pixels)))
        out.mux(stream.encode())
    return path


ONE = 1 << 16
MATRICES = {  # rows (a b u) (c d v) (x y w), and what they do to the stored picture
    "as it is": ([ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30], lambda p: p),
    "90": ([0, ONE, 0, -ONE, 0, 0, HEIGHT * ONE, 0, 1 << 30], lambda p: np.rot90(p, -1)),
    "180": ([-ONE, 0, 0, 0, -ONE, 0, WIDTH * ONE, HEIGHT * ONE, 1 << 30], lambda p: np.rot90(p, 2)),
    "270": ([0, -ONE, 0, ONE, 0, 0, 0, WIDTH * ONE, 1 << 30], lambda p: np.rot90(p, 1)),
    "mirrored": ([-ONE, 0, 0, 0, ONE, 0, WIDTH * ONE, 0, 1 << 30], lambda p: p[:, ::-1]),
    "upside down": ([ONE, 0, 0, 0, -ONE, 0, 0, HEIGHT * ONE, 1 << 30], lambda p: p[::-1]),
    "transposed": ([0, ONE, 0, ONE, 0, 0, 0, 0, 1 << 30], lambda p: p.transpose(1, 0, 2)),
    "other diagonal": (
        [0, -ONE, 0, -ONE, 0, 0, HEIGHT * ONE, WIDTH * ONE, 1 << 30], lambda p: np.rot90(p, 2).transpose(1, 0, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("kind", MATRICES)
def test_display_matrices(kind: str, decoder: str, tmp_path: Path) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    matrix, shown = MATRICES[kind]
    path = movie(tmp_path / "a.mp4", [quarters()] * 3, matrix=matrix)
    frames = read_frames(str(path), 1, 2, decoder=decoder)
    assert close(frames[0], shown(quarters()), 8) and np.array_equal(frames[0], frames[1])
    info = probe(str(path))
    assert (info.height, info.width) == frames.shape[1:3]
    small = read_frames(str(path), 0, 1, resize=lambda h, w: (h // 2, w // 2), decoder=decoder)
    assert small.shape[1:3] == (info.height // 2, info.width // 2)
    assert close(small[0], np.asarray(Image.fromarray(np.ascontiguousarray(shown(quarters()))).resize(
        (info.width // 2, info.height // 2), Image.Resampling.BICUBIC)), 12)  # fmt: skip


def test_a_turn_by_other_angles_is_the_nearest_quarter() -> None:
    from opensora.datasets.decode.pyav_pixels import _turn_of

    for degrees in range(0, 360, 5):
        if degrees % 90 == 45:
            continue
        cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        a, b, c, d = (int(v * ONE) for v in (cosine, sine, -sine, cosine))
        turned = _turn_of([a, b, 0, c, d, 0, 0, 0, 1 << 30])(quarters())
        assert np.array_equal(turned, np.rot90(quarters(), -round(degrees / 90)))
    assert _turn_of([0] * 9) == Turn()


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("ratio", [Fraction(64, 45), Fraction(8, 9), Fraction(2), Fraction(1)])
def test_pixels_that_are_not_square(ratio: Fraction, suffix: str, decoder: str, tmp_path: Path) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    path = movie(tmp_path / f"a{suffix}", [quarters(96, 120)] * 3, ratio=ratio)
    wide = round(120 * ratio)
    info = probe(str(path))
    assert (info.height, info.width) == (96, wide)
    frames = read_frames(str(path), 0, 3, decoder=decoder)
    assert frames.shape == (3, 96, wide, 3) and close(frames[0], quarters(96, wide), 12)
    asked = []
    read_frames(str(path), 0, 1, resize=lambda h, w: asked.append((h, w)) or (48, 48), decoder=decoder)  # type: ignore[func-returns-value]
    assert asked == [(96, wide)]


def test_pixels_that_are_not_square_in_a_turned_clip(tmp_path: Path) -> None:
    path = movie(tmp_path / "a.mp4", [quarters()] * 2, ratio=Fraction(2), matrix=MATRICES["90"][0])
    info = probe(str(path))
    assert (info.height, info.width) == (2 * WIDTH, HEIGHT)
    assert close(read_frames(str(path), 0, 1)[0], np.rot90(quarters(HEIGHT, 2 * WIDTH), -1), 12)


def test_a_ratio_that_is_damage_is_refused_and_a_rounded_one_passed_over(tmp_path: Path) -> None:
    path = movie(tmp_path / "a.mp4", [quarters()] * 2, ratio=Fraction(2))
    raw = path.read_bytes()
    at = raw.index(b"pasp") + 4
    path.write_bytes(raw[:at] + struct.pack(">II", 1000, 1) + raw[at + 8 :])
    with pytest.raises(DecodeError, match="times as wide as high"):
        probe(str(path))
    info = probe(str(movie(tmp_path / "b.mkv", [quarters(112, 200)] * 2, ratio=Fraction(224, 225))))
    assert (info.height, info.width) == (112, 200)


def transparent() -> list[np.ndarray]:
    """Frames of red whose left half is transparent and noise."""
    frames = []
    for i in range(4):
        rgba = np.full((HEIGHT, WIDTH, 4), (255, 0, 0, 255), np.uint8)
        rgba[:, : WIDTH // 2, :3] = np.random.default_rng(i).integers(0, 255, (HEIGHT, WIDTH // 2, 3))
        rgba[:, : WIDTH // 2, 3] = 0
        frames.append(rgba)
    return frames


def animation(path: Path, pictures: list[np.ndarray], duration: int = 100) -> Path:
    images = [Image.fromarray(picture) for picture in pictures]
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    if path.suffix == ".gif":
        options = {"disposal": 2}
    kind = "PNG" if path.suffix == ".apng" else None
    images[0].save(path, kind, save_all=True, append_images=images[1:], duration=duration, loop=0, **options)
    return path


VIDEOS_WITH_ALPHA = {
    "VP9": (".webm", "libvpx-vp9", "yuva420p"),
    "ProRes": (".mov", "prores_ks", "yuva444p10le"),
    "Animation": (".mov", "qtrle", "argb"),
    "FFV1": (".mkv", "ffv1", "bgra"),
}


@pytest.mark.parametrize("kind", [*VIDEOS_WITH_ALPHA, ".gif", ".apng", ".webp", ".avif"])
def test_transparent_clips(kind: str, tmp_path: Path) -> None:
    if kind.startswith("."):
        path = animation(tmp_path / f"a{kind}", transparent())
    else:
        suffix, codec, pixels = VIDEOS_WITH_ALPHA[kind]
        path = movie(tmp_path / f"a{suffix}", transparent(), codec, pixels)
    info = probe(str(path))
    assert (info.num_frames, info.height, info.width) == (4, HEIGHT, WIDTH) and info.fps == pytest.approx(10, rel=0.02)
    edge = WIDTH // 2
    for background in ((255, 255, 255), (0, 0, 255)):
        for start, count in ((0, 4), (2, 2)):
            frames = read_frames(str(path), start, count, background=background).astype(int)
            assert abs(frames[:, :, : edge - 2] - background).mean() < 2, background
            assert abs(frames[:, :, edge + 2 :] - (255, 0, 0)).mean() < 6
    small = read_frames(str(path), 0, 4, resize=lambda h, w: (h // 2, w // 2))
    assert small.shape == (4, HEIGHT // 2, WIDTH // 2, 3) and small[:, :, : edge // 2 - 3].min() > 240


def palette_movie(path: Path, transparency: bytes | None) -> Path:
    """Four pictures, the left half of colour 1 and the right half of colour 2, in a palette of PNG."""
    indices = np.ones((HEIGHT, WIDTH), np.uint8)
    indices[:, WIDTH // 2 :] = 2
    image = Image.fromarray(indices, "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    encoded = io.BytesIO()
    image.save(encoded, "PNG", **({} if transparency is None else {"transparency": transparency}))
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "pal8"
        for number in range(4):
            packet = av.Packet(encoded.getvalue())
            packet.stream, packet.pts, packet.dts, packet.duration = stream, number, number, 1
            packet.time_base, packet.is_keyframe = Fraction(1, 10), True
            out.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".mov", ".avi"])
@pytest.mark.parametrize(
    ("transparency", "left", "right"),
    [
        (None, (255, 0, 0), (0, 0, 255)),
        (b"\xff\x00\xff", (0, 255, 0), (0, 0, 255)),
        (b"\xff\x80\x00", (128, 127, 0), (0, 255, 0)),
        (b"\x00\x00\x00", (255, 0, 0), (0, 0, 255)),  # nothing would be seen: decoders leave the byte 0 as well
    ],
)
def test_transparent_colours_of_a_palette(
    suffix: str, transparency: bytes | None, left: tuple[int, ...], right: tuple[int, ...], tmp_path: Path
) -> None:
    path = palette_movie(tmp_path / f"a{suffix}", transparency)
    assert probe(str(path)).num_frames == 4
    frames = read_frames(str(path), 0, 4, background=(0, 255, 0)).astype(int)
    assert abs(frames[:, :, : WIDTH // 2] - left).max() <= 1 and abs(frames[:, :, WIDTH // 2 :] - right).max() <= 1


@pytest.mark.parametrize("suffix", [".webp", ".apng", ".gif", ".avif", ".png"])
def test_animated_pictures_are_clips(suffix: str, tmp_path: Path) -> None:
    """Also by a name of a still; their frames, times and windows."""
    pictures = [np.full((HEIGHT, WIDTH, 3), 20 * i, np.uint8) for i in range(8)]
    path = animation(tmp_path / f"a{suffix}", pictures)
    info = probe(str(path))
    assert (info.num_frames, info.height, info.width, info.note) == (8, HEIGHT, WIDTH, "")
    assert info.fps == pytest.approx(10)
    frames = read_frames(str(path), 0, 8)
    assert abs(frames.mean(axis=(1, 2, 3)) - np.arange(8) * 20).max() < 3
    assert np.array_equal(read_frames(str(path), 3, 2, 2), frames[3:6:2])
    with pytest.raises(DecodeError, match="it has 8 frames, the window needs 9"):
        read_frames(str(path), 8, 1)


@pytest.mark.parametrize("count", [1, 8])
def test_gif_without_times_keeps_its_frames(count: int, tmp_path: Path) -> None:
    """FFmpeg takes all of them for one."""
    pages = [Image.new("L", (WIDTH, HEIGHT), 20 * i) for i in range(count)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=100)
    content = re.sub(rb"\x21\xf9\x04.{4}\0", b"", (tmp_path / "a.gif").read_bytes(), flags=re.DOTALL)
    (tmp_path / "a.gif").write_bytes(content)
    info = probe(str(tmp_path / "a.gif"))
    assert (info.num_frames, info.height, info.width, info.fps) == (count, HEIGHT, WIDTH, 10)
    frames = read_frames(str(tmp_path / "a.gif"), 0, count)
    assert np.array_equal(frames[:, 0, 0, 0], np.arange(count) * 20)


def test_only_the_first_of_several_pages_is_said(tmp_path: Path) -> None:
    pages = [Image.new("L", (8, 8), 50 * i) for i in range(3)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    info = probe(str(tmp_path / "a.tiff"))
    assert info.num_frames == 1 and info.note == "only the first of its 3 pictures is used"


GREEN = np.full((48, 64, 3), (0, 255, 0), np.uint8)
# Y, Cb, Cr of pure green, by matrix and range.
STORED = {"709": (173, 42, 26), "601": (145, 54, 34), "709 full": (182, 30, 12), "601 full": (150, 44, 21)}


def flat(path: Path, size: tuple[int, int], stored: tuple[int, int, int], codec: str, pixels: str, **tags: int) -> Path:
    """A clip of one colour, whose samples are these."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=24, options={"crf": "1"} if codec.startswith("libx26") else {})
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for _ in range(3):
            frame = av.VideoFrame(size[1], size[0], pixels)
            for plane, value in zip(frame.planes, stored, strict=True):
                wide = plane.buffer_size > plane.line_size * plane.height - 1 and "10le" in pixels
                data = np.full(plane.buffer_size // 2, value * 4, np.uint16) if wide else np.full(
                    plane.buffer_size, value, np.uint8)  # fmt: skip
                plane.update(data.tobytes())
            for name, value in tags.items():
                setattr(frame, name, value)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


COLOURS = {
    "BT.709": ((48, 64), "709", "libx264", "yuv420p", {"colorspace": 1, "color_range": 1}),
    "BT.601": ((48, 64), "601", "libx264", "yuv420p", {"colorspace": 6, "color_range": 1}),
    "BT.601 of PAL": ((48, 64), "601", "libx264", "yuv420p", {"colorspace": 5, "color_range": 1}),
    "BT.709, full range": ((48, 64), "709 full", "libx264", "yuv420p", {"colorspace": 1, "color_range": 2}),
    "BT.601 although large": ((720, 1280), "601", "libx264", "yuv420p", {"colorspace": 6, "color_range": 1}),
    "BT.709, 10 bits": ((48, 64), "709", "libx264", "yuv420p10le", {"colorspace": 1, "color_range": 1}),
    "BT.709, 4:4:4": ((48, 64), "709", "libx264", "yuv444p", {"colorspace": 1, "color_range": 1}),
    "BT.709 in VP9": ((48, 64), "709", "libvpx-vp9", "yuv420p", {"colorspace": 1, "color_range": 1}),
    "no tag, small": ((48, 64), "601", "libx264", "yuv420p", {}),
    "no tag, 576 lines": ((576, 704), "601", "libx264", "yuv420p", {}),
    "no tag, 720 lines": ((720, 1280), "709", "libx264", "yuv420p", {}),
    "no tag, 1280 columns": ((480, 1280), "709", "libx264", "yuv420p", {}),
    "no tag, 10 bits, large": ((720, 1280), "709", "libx264", "yuv420p10le", {}),
    "motion JPEG": ((48, 64), "601 full", "mjpeg", "yuvj420p", {}),
    "motion JPEG, large": ((720, 1280), "601 full", "mjpeg", "yuvj420p", {}),
}


@pytest.mark.parametrize("kind", COLOURS)
def test_matrix_and_range(kind: str, tmp_path: Path) -> None:
    size, stored, codec, pixels, tags = COLOURS[kind]
    suffix = {"mjpeg": ".avi", "libvpx-vp9": ".webm"}.get(codec, ".mp4")
    path = flat(tmp_path / f"a{suffix}", size, STORED[stored], codec, pixels, **tags)
    found = read_frames(str(path), 1, 1)[0]
    assert found.shape[:2] == size
    assert abs(found.astype(int) - (0, 255, 0)).max() <= 4, found[4, 4]


@pytest.mark.parametrize("codec", ["ffv1", "libx265"])
def test_grey_clips_of_limited_range(codec: str, tmp_path: Path) -> None:
    for value, shown in ((16, 0), (235, 255), (126, 128)):
        path = flat(tmp_path / "a.mkv", (64, 64), (value,), codec, "gray", color_range=1)  # type: ignore[arg-type]
        assert abs(read_frames(str(path), 0, 1).astype(int) - shown).max() <= 1
    full = flat(tmp_path / "b.mkv", (64, 64), (16,), "ffv1", "gray", color_range=2)  # type: ignore[arg-type]
    assert abs(read_frames(str(full), 0, 1).astype(int) - 16).max() <= 1


def test_a_matrix_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    path = flat(tmp_path / "a.mp4", (48, 64), (126, 235, 16), "libx264", "yuv420p", colorspace=8)  # YCgCo
    with pytest.raises(DecodeError, match="colour matrix"):
        read_frames(str(path), 0, 1)


@pytest.mark.parametrize(("curve", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_said(curve: int, name: str, tmp_path: Path) -> None:
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": curve, "color_range": 1}
    path = flat(tmp_path / "a.mp4", (48, 64), (100, 128, 128), "libx264", "yuv420p10le", **tags)
    assert f"high dynamic range ({name}) is not tone-mapped" in probe(str(path)).note


def test_one_limit_for_probe_and_table(tmp_path: Path) -> None:
    """What one accepts the other accepts too."""
    sizes = ((1, MAX_SIDE, True), (1, MAX_SIDE + 1, False), (8193, 8192, False), (14000, 14000, False))
    for height, width, allowed in sizes:
        Image.new("1", (width, height)).save(tmp_path / "a.png")
        (tmp_path / "t.csv").write_text(f"path,text,num_frames,height,width,fps\na.png,a,1,{height},{width},\n")
        if allowed:
            assert probe(str(tmp_path / "a.png")).width == width and len(read_table(str(tmp_path / "t.csv"))) == 1
            continue
        with pytest.raises(DecodeError, match=rf"at most {MAX_SIDE} of a side and {MAX_PIXELS} in all"):
            probe(str(tmp_path / "a.png"))
        with pytest.raises(UserError, match=r"row 1: (height|width) is .* scale it down"):
            read_table(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    "content", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + bytes(40), b"BM" + bytes(12) + b"\x28" + bytes(9)]
)
def test_what_only_begins_as_a_picture_is_told_in_words(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DecodeError) as error:
        probe(str(tmp_path / "a"))
    assert "<" not in error.value.cause


@pytest.mark.parametrize(
    ("suffix", "codec", "form"),
    [
        (".h264", "libx264", "h264"),
        (".hevc", "libx265", "hevc"),
        (".m4v", "mpeg4", "m4v"),
        (".m2v", "mpeg2video", "mpeg2video"),
    ],
)
@pytest.mark.parametrize("rate", [24, 30])
def test_a_stream_without_a_container_has_the_rate_that_its_codec_says(
    suffix: str, codec: str, form: str, rate: int, tmp_path: Path
) -> None:
    """At 25, which demuxers make up, every second frame of 24 would be left out."""
    path = movie(tmp_path / f"a{suffix}", [quarters()] * 12, codec, "yuv420p", rate=rate, format=form)
    info = probe(str(path))
    assert info.num_frames == 12 and info.fps == pytest.approx(rate, rel=1e-9)


OPEN_GROUPS = {
    "H.264": ("libx264", {"x264-params": "bframes=3:keyint=8:min-keyint=8:open-gop=1:scenecut=0", "crf": "5"}),
    "H.265": ("libx265", {"x265-params": "bframes=3:keyint=8:min-keyint=8:open-gop=1:log-level=none"}),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("kind", OPEN_GROUPS)
def test_a_clip_cut_out_of_a_longer_one_without_coding_it_anew(kind: str, suffix: str, tmp_path: Path) -> None:
    """It begins with frames that are predicted from what was cut off: players begin at the first whole one."""
    codec, options = OPEN_GROUPS[kind]
    pictures = [np.roll(quarters(48, 64), 2 * number, axis=1) for number in range(30)]
    whole, path = movie(tmp_path / "whole.mp4", pictures, codec, "yuv420p", options=options), tmp_path / f"cut{suffix}"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        given: Any = source.streams.video[0]
        copied: Any = target.add_stream_from_template(given)
        packets = [packet for packet in source.demux(given) if packet.dts is not None]
        second = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second:]:
            packet.stream = copied
            target.mux(packet)
    with av.open(str(path)) as source:
        expected = [frame.to_ndarray(format="rgb24") for frame in source.decode(source.streams.video[0])]
    assert 0 < len(expected) < len(packets) - second
    assert probe(str(path)).num_frames == len(expected)
    for start in (0, 3, len(expected) - 2):
        found = read_frames(str(path), start, 2)
        assert close(found, np.stack(expected[start : start + 2]), 2)
    with pytest.raises(DecodeError, match=f"it has {len(expected)} frames"):
        read_frames(str(path), len(expected), 1)
    assert not pyav_backend.is_plain(locate(str(path)), Deadline(str(path), None))  # others count what shows nothing
    assert pyav_backend.is_plain(locate(str(whole)), Deadline(str(whole), None))
