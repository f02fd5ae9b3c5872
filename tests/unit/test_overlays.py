"""Burned-in text and marks: read from rendered footage, and what is passed over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.limits import SourceLimits
from data_pipeline.overlays.logo import LEAST_FRAMES, logo_share
from data_pipeline.overlays.reading import TextReader, Words
from data_pipeline.rows import Row
from data_pipeline.stages import text as text_stage
from data_pipeline.stages.base import Unit
from data_pipeline.stages.text import TextConfig, TextStage
from opensora.utils.files.video_writer import write_video
from tests.copies import Pile
from tests.planted_text import OVERLAYS, TEXTS, laid_over

HEIGHT, WIDTH, FRAMES = 240, 432, 40


def footage(speed: float = 6.0) -> np.ndarray:
    """(n, h, w, 3): a camera that glides over soft ground."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT, 0 : WIDTH + round(speed * FRAMES) + 1] / HEIGHT
    ground = np.stack(
        [
            sum(
                np.cos(2 * np.pi * (rng.uniform(0.5, 5) * y + rng.uniform(0.5, 5) * x) + rng.uniform(0, 6.3))
                for _ in range(8)
            )
            for _ in range(3)
        ],
        axis=2,
    )
    ground = np.clip(120 + 28 * ground, 0, 220).astype(np.uint8)
    return np.stack([ground[:, round(speed * t) : round(speed * t) + WIDTH] for t in range(FRAMES)])


def rows_of(path: Path, **more: Any) -> dict[str, list[Row]]:
    pile = Pile()
    pile.add("a", path)
    return pile.rows["a"] | {"duplicates": [{"duplicate_of": None}]} | more


def run(path: Path, config: TextConfig | None = None, **more: Any) -> Row:
    unit = Unit(source="a", file=str(path), rows=rows_of(path, **more))
    (row,) = TextStage(config or TextConfig(), SourceLimits()).run(unit)
    return row


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The footage with an overlay, as a file."""
    folder, frames = tmp_path_factory.mktemp("films"), footage()

    def make(overlay: str) -> Path:
        path = folder / f"{overlay}.mp4"
        return path if path.exists() else write_video(path, laid_over(frames, overlay), 20.0)

    return make


@pytest.mark.parametrize("overlay", ["clean", *OVERLAYS])
def test_what_is_laid_over_is_found(overlay: str, film: Callable[[str], Path]) -> None:
    row = run(film(overlay))
    assert (row["text_share"] > 0.005) == (overlay in TEXTS), row
    assert (row["logo_share"] > 0) == (overlay != "clean"), row
    words = {"subtitle": "thought", "title": "ROAD", "channel": "ACME", "watermark": "stock", "clock": "2024"}
    assert words.get(overlay, "") in row["text"]
    assert overlay in TEXTS or row["text"] == ""


def test_its_share_is_that_of_the_lines(film: Callable[[str], Path]) -> None:
    """Of white letters on black ground, the area that is not black."""
    frames = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    lit = np.argwhere(laid_over(frames, "title")[0, ..., 0] > 128)
    (top, left), (bottom, right) = lit.min(axis=0), lit.max(axis=0)
    area = (bottom - top) * (right - left) / (HEIGHT * WIDTH)
    assert area < run(film("title"))["text_share"] < 2.5 * area


def test_bars_are_cut_away_before(tmp_path: Path) -> None:
    """A subtitle in the black below is no text of the clip, as that is cut away."""
    frames = np.pad(footage(), ((0, 0), (48, 48), (0, 0), (0, 0)))
    path = write_video(tmp_path / "barred.mp4", laid_over(frames, "subtitle"), 20.0)
    bars = {"bar_top": 48 / 336, "bar_bottom": 48 / 336, "bar_left": 0.0, "bar_right": 0.0}
    row = run(path, measure=[bars])
    assert row["text_share"] == 0 and row["text"] == "" and row["logo_share"] == 0


def test_a_camera_at_rest_says_nothing_of_marks(tmp_path: Path) -> None:
    frames = laid_over(footage(speed=0.0), "mark")
    path = write_video(tmp_path / "rest.mp4", frames, 20.0)
    assert run(path, TextConfig(method="none"))["logo_share"] is None
    assert logo_share(frames[::5, ..., 1]) is None


def test_a_camera_that_stands_says_nothing_of_marks_whatever_moves(film: Callable[[str], Path]) -> None:
    """A light that goes on changes all of a picture, and the edges of the scene stay."""
    measured = {"bar_top": 0.0, "bar_bottom": 0.0, "bar_left": 0.0, "bar_right": 0.0}
    config = TextConfig(method="none")
    assert run(film("mark"), config, measure=[measured | {"camera_motion": "static"}])["logo_share"] is None
    assert run(film("mark"), config, measure=[measured | {"camera_motion": "pan right"}])["logo_share"] > 0


def test_an_edge_along_the_way_of_a_camera_is_no_mark() -> None:
    """A roof that a camera pans along stays where it is in the picture, and is one line."""
    grey = footage()[::5, ..., 1].copy()
    roof = grey.copy()
    roof[:, 100:104, 150:190] = 255
    assert logo_share(roof) == 0
    sign = roof.copy()
    sign[:, 90:120, 165:170] = 255
    assert logo_share(sign) > 0


@pytest.mark.parametrize(
    ("more", "looked_at"),
    [
        ({}, True),
        ({"screen": [{"keep": False}]}, False),
        ({"duplicates": [{"duplicate_of": "00aa"}]}, False),
    ],
)
def test_only_clips_that_are_kept_and_no_duplicates(
    more: dict[str, Any], looked_at: bool, film: Callable[[str], Path]
) -> None:
    row = run(film("channel"), **more)
    assert row == {} if not looked_at else row["text_share"] > 0


def test_nothing_is_decoded_where_nothing_is_asked_for(tmp_path: Path, film: Callable[[str], Path]) -> None:
    rows = rows_of(film("clean"))
    gone = Unit(source="a", file=str(tmp_path / "gone.mp4"), rows=rows)
    assert TextStage(TextConfig(method="none", logo=False), SourceLimits()).run(gone) == [{}]
    rejected = Unit(source="a", file=gone.file, rows=rows | {"screen": [{"keep": False}]})
    assert TextStage(TextConfig(), SourceLimits()).run(rejected) == [{}]


class Reader:
    """In place of the networks: what is read, picture by picture."""

    def __init__(self, *pictures: list[Words]) -> None:
        self._pictures, self.reads = list(pictures), 0

    def read(self, bgr: np.ndarray) -> list[Words]:
        self.reads += 1
        return self._pictures.pop(0)


def with_reader(reader: Reader, film: Path) -> Row:
    stage = TextStage(TextConfig(logo=False), SourceLimits())
    stage._reader = reader  # type: ignore[assignment]
    (row,) = stage.run(Unit(source="a", file=str(film), rows=rows_of(film)))
    return row


def test_more_frames_are_read_where_there_is_text(film: Callable[[str], Path]) -> None:
    none, line = Reader([]), [Words("so it goes", 0.9, 0.03)]
    assert with_reader(none, film("clean")) == {"text_share": 0.0, "text": ""} and none.reads == 1
    some = Reader(line, [], [*line, Words("ACME TV", 0.95, 0.03)])
    row = with_reader(some, film("clean"))
    assert row["text_share"] == pytest.approx((0.03 + 0 + 0.06) / 3)
    assert row["text"] == "so it goes / ACME TV" and some.reads == 3


def test_what_looks_like_letters_is_none(film: Callable[[str], Path]) -> None:
    """A hand that is read as M, and a pattern that is read badly."""
    reader = Reader([Words("M", 0.98, 0.056), Words("JISVFNS", 0.73, 0.016), Words("", 0.9, 0.3)], [], [])
    assert with_reader(reader, film("clean")) == {"text_share": 0.0, "text": ""}


def test_a_box_of_the_whole_picture_is_no_text() -> None:
    """PP-OCR's detector finds one where there is no text."""
    reader = TextReader(736)
    whole = np.array([[0, 0], [WIDTH, 0], [WIDTH, HEIGHT], [0, HEIGHT]], np.float32)

    class Found:
        boxes, txts, scores = np.stack([whole, whole / 10]), ("abc", "def"), (0.9, 0.9)

    reader._engine = lambda picture: Found
    assert reader.read(np.zeros((HEIGHT, WIDTH, 3), np.uint8)) == [Words("def", 0.9, pytest.approx(0.01))]


def test_the_networks_find_nothing_in_clean_footage(shared_media: Path) -> None:
    """Whole-frame boxes and single letters that they do find there are passed over."""
    for name in ("book.mkv", "elf.mp4", "help.mkv"):
        pile = Pile()
        pile.add("a", shared_media / "clips" / name)
        rows = pile.rows["a"] | {"duplicates": [{"duplicate_of": None}]}
        unit = Unit(source="a", file=str(shared_media / "clips" / name), rows=rows)
        (row,) = TextStage(TextConfig(logo=False), SourceLimits()).run(unit)
        assert row == {"text_share": 0.0, "text": ""}, name


def test_marks_need_frames() -> None:
    grey = laid_over(footage(), "mark")[..., 1]
    assert logo_share(grey[:: len(grey) // LEAST_FRAMES]) is not None
    assert logo_share(grey[: LEAST_FRAMES - 1]) is None


def test_frames_of_a_clip_lie_in_equal_parts() -> None:
    assert text_stage._spread({"first": 100, "last": 180}) == [105, 115, 125, 135, 145, 155, 165, 175]
    assert text_stage._spread({"first": 3, "last": 6}) == [3, 4, 5]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "magic"}, "method='magic'"),
        ({"score": -1.0}, "score=-1"),
        ({"letters": 0}, "letters=0"),
        ({"side": 10}, "side=10"),
    ],
)
def test_settings_that_make_no_sense(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TextConfig(**config)
