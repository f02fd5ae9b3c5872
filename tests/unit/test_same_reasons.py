"""The two ways to a clip table, of raw videos and of what is cut already, say the same of a file that is broken."""

import csv
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline.index import index_folder
from data_pipeline.limits import SourceLimits
from data_pipeline.stages.base import SourceError, Unit
from data_pipeline.stages.probe import ProbeConfig, ProbeStage
from opensora.datasets.decode.api import DecodeError
from opensora.utils.files.video_writer import write_video


def broken_files(folder: Path) -> None:
    """A good video, and others that none can be made of."""
    whole = write_video(folder / "good.mp4", np.zeros((8, 32, 32, 3), np.uint8), 8.0).read_bytes()
    (folder / "good.txt").write_text("A caption.")
    for name, content in {
        "half.mp4": whole[: len(whole) // 2],
        "head.mp4": whole[:40],
        "empty.mp4": b"",
        "zeros.mp4": b"\0" * 5000,
        "text.mp4": b"This is no video.\n" * 50,
        "paper.pdf": b"%PDF-1.4\n" + b"x" * 100,
        "things.zip": b"PK\3\4" + b"\0" * 100,
        "flipped.mp4": whole.replace(b"avcC", b"avcX").replace(b"stsz", b"stsy"),
    }.items():
        (folder / name).write_bytes(content)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("broken")
    broken_files(found)
    return found


def test_reasons(folder: Path, tmp_path: Path) -> None:
    index_folder(folder, tmp_path / "table.csv", workers=1)
    with (tmp_path / "table.csv.left_out.csv").open(newline="") as file:
        listed = {Path(row["path"]).name: row["detail"] for row in csv.DictReader(file)}
    stage, said = ProbeStage(ProbeConfig(), SourceLimits()), dict[str, str]()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".txt":
            continue
        try:
            stage.run(Unit(source=path.name, file=str(path)))
        except SourceError as error:
            said[path.name] = str(error).removeprefix("no video: ")
        except DecodeError as error:
            said[path.name] = error.cause
    assert said == listed and len(said) == 9
