"""Clips inside archives are read in place, by name or by range."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora.datasets.decode.api import DECODERS, DecodeError, is_image, probe, read_frames
from opensora.datasets.table.clip_storage import archive_members, locate
from tests.unit.test_decode import encode
from tests.unit.test_decoders import needs

LONG = "a/" * 60 + "long name.mp4"


@pytest.fixture
def members(tmp_path: Path) -> dict[str, bytes]:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / "p.png")
    files = {
        "first.mp4": Path(encode(tmp_path / "1.mp4", 20)).read_bytes(),
        "sub/second #2.mkv": Path(encode(tmp_path / "2.mkv", 30, size=(64, 48))).read_bytes(),
        LONG: Path(encode(tmp_path / "3.mp4", 9)).read_bytes(),
        "p.png": (tmp_path / "p.png").read_bytes(),
        "text.mp4": b"no video " * 100,
    }
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("small.mp4", files["first.mp4"], compress_type=zipfile.ZIP_DEFLATED)
    return files


@pytest.mark.parametrize("archive", ["s.tar", "s.zip"])
def test_a_member_is_as_the_file_alone(tmp_path: Path, members: dict[str, bytes], archive: str) -> None:
    places = archive_members(str(tmp_path / archive))
    for name, alone in {"first.mp4": "1.mp4", "sub/second #2.mkv": "2.mkv", LONG: "3.mp4", "p.png": "p.png"}.items():
        place = places[name]
        assert place is not None
        by_name, by_range = f"{tmp_path / archive}#{name}", f"{tmp_path / archive}#x{name[-4:]}@{place[0]}+{place[1]}"
        with locate(by_name).open() as file:
            assert file.read() == members[name]
        for path in (by_name, by_range):
            assert probe(path) == probe(str(tmp_path / alone))
            assert is_image(path) == (name == "p.png")
            count = 1 if name == "p.png" else 5
            start = 0 if name == "p.png" else 3
            assert np.array_equal(read_frames(path, start, count), read_frames(str(tmp_path / alone), start, count))


def test_a_range_ends_where_it_ends(tmp_path: Path, members: dict[str, bytes]) -> None:
    (tmp_path / "blob").write_bytes(b"head" + members["first.mp4"] + members["first.mp4"])
    size = len(members["first.mp4"])
    path = f"{tmp_path}/blob#a.mp4@{4 + size}+{size}"
    assert np.array_equal(read_frames(path, 7, 3), read_frames(str(tmp_path / "1.mp4"), 7, 3))
    with locate(path).open() as file:
        assert file.seek(-3, 2) == size - 3 and file.read() == members["first.mp4"][-3:]
        assert file.seek(size + 5) and file.read() == b""
    with pytest.raises(DecodeError, match=r"the range ends at"):
        read_frames(f"{tmp_path}/blob#a.mp4@4+{2 * size + 1}", 0, 1)
    with pytest.raises(DecodeError):
        read_frames(f"{tmp_path}/blob#a.mp4@4+{size // 2}", 19, 1)


def test_what_is_not_there_or_cannot_be_read_in_place(tmp_path: Path, members: dict[str, bytes]) -> None:
    (tmp_path / "text.tar").write_text("no archive" * 99)
    (tmp_path / "text.zip").write_text("no archive" * 99)
    bad = {
        "s.tar#other.mp4": "has no member other.mp4",
        "s.zip#small.mp4": "compressed",
        "s.zip#text.mp4": "Invalid data",
        "no.tar#first.mp4": "No such file",
        "text.tar#a.mp4": "text.tar",
        "text.zip#a.mp4": "not a zip file",
    }
    for path, cause in bad.items():
        with pytest.raises(DecodeError, match=cause) as error:
            read_frames(str(tmp_path / path), 0, 1)
        assert error.value.path == str(tmp_path / path) and "\n" not in str(error.value)


def test_a_file_whose_name_looks_like_a_member(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.tar#b.mp4", 5)
    assert read_frames(path, 0, 5).shape[0] == 5


def test_an_archive_written_anew_is_another(tmp_path: Path, members: dict[str, bytes]) -> None:
    path = tmp_path / "s.tar"
    assert "p.png" in archive_members(str(path))
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "1.mp4", "only.mp4")
    assert read_frames(f"{path}#only.mp4", 0, 2).shape[0] == 2
    with pytest.raises(DecodeError, match="has no member"):
        read_frames(f"{path}#p.png", 0, 1)


@pytest.mark.parametrize("decoder", DECODERS)
def test_other_decoders_read_members_too(tmp_path: Path, members: dict[str, bytes], decoder: str) -> None:
    needs(decoder)
    alone = read_frames(str(tmp_path / "1.mp4"), 3, 5, decoder=decoder)
    assert np.array_equal(read_frames(f"{tmp_path / 's.zip'}#first.mp4", 3, 5, decoder=decoder), alone)
