"""What a file is by its content, whatever it is called."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora.datasets.decode.api import DecodeError, is_image, probe, read_frames, sniff
from tests.faults.media_fuzz import BASES, heic
from tests.unit.test_decode import encode

STILLS = [
    "png", "png 16 bits", "png palette", "jpg", "jpg progressive cmyk", "webp", "avif", "tiff", "tiff float", "bmp",
    "jpeg 2000", "qoi", "sgi", "ico", "heic",
]  # fmt: skip
CLIPS = [
    "mp4 h264", "fragmented mp4", "mkv h264", "webm vp9", "avi mpeg4", "mov animation", "gif", "mpeg-ts", "m2ts",
    "mpeg-ps", "flv", "wmv", "3gp h263", "ogg vp8", "ivf", "nut", "mxf", "raw h264", "y4m", "apng", "webp animated",
    "avif animated",
]  # fmt: skip


@pytest.mark.parametrize("kind", [*STILLS, *CLIPS])
def test_the_content_decides(kind: str, tmp_path: Path) -> None:
    """Under its own name, none, and one of the other kind."""
    suffix, make = BASES[kind]
    wrong = ".mp4" if kind in STILLS else ".jpg"
    data = make()
    for name in (f"a{suffix}", "a", f"a{wrong}"):
        path = tmp_path / name
        path.write_bytes(data)
        assert sniff(str(path)).kind == ("still" if kind in STILLS else "clip"), name
        info = probe(str(path))
        assert (info.fps is None) == (kind in STILLS) == is_image(str(path))
        assert read_frames(str(path), 0, 1).shape == (1, info.height, info.width, 3)


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.pam", b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\nabc", "PAM"),
        ("a.pfm", b"PF\n1 1\n-1.0\n" + bytes(12), "PFM"),
        ("a.pnm", b"Pf\n1 1\n-1.0\n" + bytes(4), "PFM"),
    ],
)
def test_relatives_of_a_format_that_is_read(name: str, data: bytes, what: str, tmp_path: Path) -> None:
    """Not damaged, but not read."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DecodeError, match=f"{what}, which is not read here; save it as PNG"):
        probe(str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".txt", ".mp4", ".png", ""])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"\xef\xbb\xbf\n <html>403</html>", "a web page"),
        (b"<?xml version='1.0'?><svg xmlns=''></svg>", "SVG"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"\0\x05\x16\x07" + bytes(100), "companion file of macOS"),
        (b"ID3\x04" + bytes(100), "audio (MP3)"),
        (b"RIFF\0\0\0\0WAVEfmt ", "audio (WAV)"),
        (b"\0\0\0\x18ftypM4A \0\0\0\0", "audio (M4A)"),
        (b"OggS" + bytes(24) + b"\x01vorbis", "audio (Ogg)"),
        (b"\xff\x0a" + bytes(30), "JPEG XL"),
        (b"\x76\x2f\x31\x01" + bytes(30), "OpenEXR"),
        (b"PK\x03\x04" + bytes(30), "a zip archive"),
    ],
)
def test_what_is_neither_says_why(data: bytes, what: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    found = sniff(str(path))
    assert found.kind == "neither" and what in found.what and "\n" not in found.what
    with pytest.raises(DecodeError) as error:
        probe(str(path))
    assert error.value.cause == found.what


@pytest.mark.parametrize(
    "text",
    [
        "a red ball", "BMW drives by", "FLV and GIF files", "P5 is a size", "RIFF raff", "ID3 tags", "II*", "moov", "",
        "G" * 999, "big free dog", "the wide sea", "so, skip it", "1 1moov",
    ],
)  # fmt: skip
def test_captions_are_no_media(text: str, tmp_path: Path) -> None:
    for name in ("a.txt", "a.csv", "a", "a.ts"):
        (tmp_path / name).write_text(text)
        assert sniff(str(tmp_path / name)).kind == "neither", name


def test_camera_raw_is_not_read_as_its_preview(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "TIFF", tiffinfo={50706: b"\1\4\0\0"})
    for name in ("a.dng", "a.nef"):
        (tmp_path / name).write_bytes(buffer.getvalue())
        assert sniff(str(tmp_path / name)).kind == "neither"
    (tmp_path / "a.tif").write_bytes(buffer.getvalue())
    with pytest.raises(DecodeError, match="camera raw"):
        probe(str(tmp_path / "a.tif"))


def test_heic(tmp_path: Path) -> None:
    """Of one picture, turned; of tiles it is refused, as one tile would be read in its place."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48] = (255, 0, 0)
    for turns in range(4):
        (tmp_path / "a.heic").write_bytes(heic(picture, turns))
        assert sniff(str(tmp_path / "a.heic")).kind == "still"
        found = read_frames(str(tmp_path / "a.heic"), 0, 1)[0].astype(int)
        assert np.abs(found - np.rot90(picture, turns)).mean() < 3
    (tmp_path / "a.heic").write_bytes(heic(picture, kind=b"grid"))
    assert "HEIC of tiles" in sniff(str(tmp_path / "a.heic")).what


def test_what_cannot_be_looked_at_is_neither(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (str(tmp_path), str(tmp_path / "no.mp4"), str(tmp_path / "loop"), "\0", "a" * 5000, "/dev/zero"):
        found = sniff(path)
        assert found.kind == "neither" and found.what


def test_where_the_content_says_nothing_the_name_does(tmp_path: Path) -> None:
    for name, kind in (("a.mp4", "clip"), ("a.JPG", "still"), ("a.bin", "neither")):
        (tmp_path / name).write_bytes(b"\x13\x37" * 500)
        assert sniff(str(tmp_path / name)).kind == kind


def test_members_too(tmp_path: Path) -> None:
    raw = Path(encode(tmp_path / "a.mp4", 3)).read_bytes()
    (tmp_path / "blob").write_bytes(b"x" * 100 + raw)
    assert sniff(f"{tmp_path}/blob#no name@100+{len(raw)}").kind == "clip"
    assert sniff(f"{tmp_path}/blob#no name@0+50").kind == "neither"
    shutil.move(tmp_path / "a.mp4", tmp_path / "a.png")
    assert probe(f"{tmp_path}/blob#x.png@100+{len(raw)}").num_frames == 3
