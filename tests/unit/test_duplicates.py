"""Duplicates: made-up hashes in number, rendered scenes as small pictures, and real files of one rabbit."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.analysis.hashes import thumbnail
from data_pipeline.limits import SourceLimits
from data_pipeline.matching.align import likeness
from data_pipeline.matching.box import inside
from data_pipeline.matching.candidates import find_candidates
from data_pipeline.matching.groups import Groups
from data_pipeline.matching.motion import motion_within, unexplained_motion
from data_pipeline.rows import Row, to_rows, to_table
from data_pipeline.stages.base import Unit
from data_pipeline.stages.duplicates import DuplicatesConfig, DuplicatesStage
from data_pipeline.stages.prints import PrintsConfig, PrintsStage
from tests.copies import Pile
from tests.made_up_prints import made_up_prints

NO_BARS = (0.0, 0.0, 0.0, 0.0)
WHOLE = ((0.0, 1.0), (0.0, 1.0))
LARGE = 160  # pixels of a side of rendered scenes


def scene(room: int, actor: int, frames: int = 33) -> np.ndarray:
    """(n, 160, 160) uint8 of four seconds: a room, and an actor that crosses it on a way of its own."""
    rng = np.random.default_rng(room)
    y, x = np.mgrid[0:LARGE, 0:LARGE] / LARGE
    waves = [
        rng.normal() / (1 + v + h) * np.cos(np.pi * (v * y + h * x) + rng.uniform(0, 6.3))
        for v in range(7)
        for h in range(7)
    ]
    ground = 128 + 25 * np.sum(waves, axis=0)
    draw = np.random.default_rng(1000 + actor)
    place, speed, size = draw.uniform(0.2, 0.8, 2), draw.uniform(-0.15, 0.15, 2), draw.uniform(0.12, 0.2)
    film = []
    for t in np.arange(frames) / 8:
        row, column = place + speed * t
        film.append(np.where((y - row) ** 2 + (x - column) ** 2 < size**2, 30 + 60 * draw.uniform(0.9, 1.1), ground))
    return np.clip(film, 0, 255).astype(np.uint8)


def small(film: np.ndarray) -> np.ndarray:
    return np.stack([thumbnail(frame) for frame in film])


class Made:
    """Rendered scenes as sources of one clip each, and what the stage makes of them."""

    def __init__(self) -> None:
        self.thumbs: dict[str, np.ndarray] = {}
        self.rows: dict[str, dict[str, Row]] = {}

    def add(self, name: str, film: np.ndarray, *, bars: tuple[float, ...] = NO_BARS, **more: Any) -> "Made":
        thumbs = small(film)
        count, sides = len(thumbs), dict(zip(("bar_top", "bar_bottom", "bar_left", "bar_right"), bars, strict=True))
        shot = {"clip_id": more.get("clip_id", name), "first": 0, "last": 10 * count, "start_s": 0.0}
        shot |= {"end_s": count / 8, "num_frames": 10 * count}
        picture = (1 - bars[0] - bars[1]) * (1 - bars[2] - bars[3])
        probe = {"bytes": 1000, "num_frames": 10 * count, "height": 100, "width": 100}
        probe |= {key: value for key, value in more.items() if key in probe}
        self.thumbs[name] = thumbs
        self.rows[name] = {
            "probe": probe,
            "shots": shot,
            "measure": {**sides, "picture_share": picture},
            "screen": {"keep": more.get("keep", True)},
        }
        frames = {
            "hash_frame": np.arange(count) * 10,
            "hash_ms": np.arange(count) * 125,
            "hash_thumb": thumbs.tobytes(),
        }
        unit = Unit(source=name, file=name, rows={"frames": [frames], "shots": [shot], "measure": [sides]})
        stage = PrintsStage(PrintsConfig(), SourceLimits())
        (self.rows[name]["prints"],) = to_rows(to_table(stage.run(unit), stage.columns))
        return self

    def tables(self) -> dict[str, pa.Table]:
        found = {}
        for stage, columns in DuplicatesStage.reads.items():
            if columns:
                rows = [self.rows[name][stage] for name in sorted(self.rows)]
                made = {column: [row[column] for row in rows] for column in columns}
                if stage == "prints":
                    made = {c: pa.array(made[c], PrintsStage.columns.field(c).type) for c in columns}
                found[stage] = pa.table({"source": pa.array(sorted(self.rows), pa.string()), **made})
        return found

    def rows_of(self, stage: str, columns: Iterable[str], sources: Iterable[str]) -> Iterator[tuple[str, pa.Table]]:
        assert (stage, tuple(columns)) == ("frames", ("hash_thumb",))
        for name in sources:
            yield name, pa.table({"hash_thumb": pa.array([self.thumbs[name].tobytes()], pa.large_binary())})

    def found(self, **config: Any) -> dict[str, tuple[str, str]]:
        """Source of a duplicate -> (id of the one that is kept, kind)."""
        stage = DuplicatesStage(DuplicatesConfig(**config), SourceLimits())
        table = stage.run_all(self.tables(), self.rows_of)
        assert table.schema.names == ["source", *stage.columns.names] and table["source"].to_pylist() == sorted(
            self.rows
        )
        rows = [row for row in table.to_pylist() if row["duplicate_of"] is not None]
        return {row["source"]: (row["duplicate_of"], row["duplicate_kind"]) for row in rows}


def cut(film: np.ndarray, top: float, bottom: float, left: float, right: float) -> np.ndarray:
    """Without these shares of the height and width, at the size that it was."""
    rows = slice(round(LARGE * top), LARGE - round(LARGE * bottom))
    columns = slice(round(LARGE * left), LARGE - round(LARGE * right))
    part = film[:, rows, columns]
    down, across = (np.linspace(0, size - 1, LARGE).round().astype(int) for size in part.shape[1:])
    return part[:, down][:, :, across]


def letterboxed(film: np.ndarray, share: float) -> np.ndarray:
    """Between black bars of this share of the height each."""
    inner = np.linspace(0, LARGE - 1, LARGE - 2 * round(LARGE * share)).round().astype(int)
    return np.pad(film[:, inner], ((0, 0), (round(LARGE * share), round(LARGE * share)), (0, 0)))


CHANGED = {
    "the same": lambda film: film,
    "coarser": lambda film: film // 12 * 12,
    "dimmed": lambda film: film // 2 + 40,
    "cropped": lambda film: cut(film, 0.025, 0.025, 0.025, 0.025),
    "cropped at a corner": lambda film: cut(film, 0.05, 0, 0, 0.05),
    "later": lambda film: film[2:],
}


@pytest.mark.parametrize("change", CHANGED)
def test_copies_are_found_and_the_best_is_kept(change: str) -> None:
    made = Made()
    for number in range(6):
        film = scene(room=number, actor=number)
        made.add(f"original {number}", film, bytes=2000).add(f"a copy {number}", CHANGED[change](film))
    assert made.found() == {f"a copy {number}": (f"original {number}", "near") for number in range(6)}


def test_mirrored_ones_are_said_to_be_so() -> None:
    made = Made()
    for number in range(6):
        film = scene(room=number, actor=number)
        made.add(f"original {number}", film, bytes=2000).add(f"mirrored {number}", film[:, :, ::-1])
        made.add(f"mirrored, cropped {number}", cut(film[:, :, ::-1], 0.02, 0.02, 0.02, 0.02))
    kinds = made.found()
    assert {name for name in kinds if name.startswith("mirrored ")} == {f"mirrored {number}" for number in range(6)}
    assert len(kinds) == 12
    assert set(kinds.values()) == {(f"original {number}", "mirrored") for number in range(6)}


def test_bars_do_not_matter_where_they_are_known() -> None:
    made, unknown = Made(), Made()
    for number in range(6):
        film = scene(room=number, actor=number)
        for each, bars in ((made, (0.13, 0.13, 0.0, 0.0)), (unknown, NO_BARS)):
            each.add(f"original {number}", film, bytes=2000)
            each.add(f"letterboxed {number}", letterboxed(film, 0.13), bars=bars)
    assert made.found() == {f"letterboxed {number}": (f"original {number}", "near") for number in range(6)}
    assert unknown.found() == {}


def test_other_moments_of_one_room_are_no_copies() -> None:
    """All hashes of these are within a few bits of each other."""
    made = Made()
    for actor in range(12):
        made.add(f"take {actor:02d}", scene(room=1, actor=actor))
    assert made.found() == {}


def guarded(
    film: np.ndarray, place: tuple[int, int], when: slice, step: int = 0, *, side: int = 26, light: int = 50
) -> np.ndarray:
    """An empty room in which a light passes in a corner for a while: pixels of 160, levels by which it is brighter."""
    seen = film.copy()
    for number in range(*when.indices(len(film))):
        rows, columns = (slice(at + step * number, at + step * number + side) for at in place)
        seen[number, rows, columns] = np.minimum(seen[number, rows, columns].astype(int) + light, 255)
    return seen


def test_what_little_moves_tells_moments_of_an_empty_room_apart() -> None:
    """Of two takes next to everything is the same; of a copy that is coarser, all that moves."""
    empty = np.repeat(scene(room=7, actor=0, frames=1), 33, axis=0)
    places = {"a": ((20, 20), slice(4, 12)), "b": ((20, 20), slice(18, 26)), "c": ((100, 110), slice(4, 12))}
    made = Made()
    for name, (place, when) in places.items():
        made.add(f"take {name}", guarded(empty, place, when, side=12, light=25), bytes=2000)
    assert made.found() == {}
    made.add("copy of b", guarded(empty, *places["b"], side=12, light=25) // 4 * 4)
    assert made.found() == {"copy of b": ("take b", "near")}


def test_a_brighter_copy_is_known_by_what_moves() -> None:
    """By another curve of brightness, which leaves more of the picture than little motion makes of it."""
    film = guarded(np.repeat(scene(room=7, actor=0, frames=1), 33, axis=0), (20, 20), slice(4, 12), step=2)
    made = Made().add("take", film, bytes=2000).add("brighter", (255 * (film / 255) ** 0.6).astype(np.uint8))
    assert made.found() == {"brighter": ("take", "near")}


def test_what_stands_still_is_judged_by_its_picture() -> None:
    """But two parts of one file are other moments of it."""
    still = np.repeat(scene(room=8, actor=0, frames=1), 33, axis=0)
    made = Made().add("a", still, bytes=2000).add("b", still)
    assert made.found() == {"b": ("a", "near")}
    stage = DuplicatesStage(DuplicatesConfig(), SourceLimits())
    rows = [row for name in ("a", "b") for row in [made.rows[name]]]
    tables = made.tables()
    one_file = {name: table.set_column(0, "source", pa.array(["a"] * 2)) for name, table in tables.items()}
    one_file["probe"] = tables["probe"].slice(0, 1)
    both = np.concatenate([made.thumbs["a"], made.thumbs["b"]])
    late = (np.asarray(rows[1]["prints"]["print_sample"]) + 33).tolist()
    samples = pa.array([rows[0]["prints"]["print_sample"], late], tables["prints"]["print_sample"].type)
    place = tables["prints"].schema.get_field_index("print_sample")
    one_file["prints"] = one_file["prints"].set_column(place, "print_sample", samples)

    def rows_of(*_: Any) -> Iterator[tuple[str, pa.Table]]:
        yield "a", pa.table({"hash_thumb": pa.array([both.tobytes()], pa.large_binary())})

    assert stage.run_all(one_file, rows_of)["duplicate_of"].to_pylist() == [None, None]


def test_motion_is_of_the_cells_that_move() -> None:
    """Half a cell of a hundred that moves otherwise is all of what moves; brightness of all cells is no motion."""
    rng = np.random.default_rng(0)
    ground = np.repeat(rng.uniform(0, 255, (1, 10, 10)), 16, axis=0)
    one, two = ground.copy(), ground + 10 * np.sin(np.arange(16))[:, None, None]
    assert unexplained_motion(one, two) is None
    one[2:6, 4, 4] += 20
    two[2:6, 4, 4] += 20
    same = unexplained_motion(one, two)
    assert same is not None and same < 0.01
    two[2:6, 4, 4] -= 20
    two[9:13, 4, 4] += 20
    apart = unexplained_motion(one, two)
    assert apart is not None and apart > 0.9


def test_how_much_of_the_motion_is_in_some_frames() -> None:
    film = np.zeros((16, 8, 8))
    film[[2, 3, 4, 9], 3, 3] = 20
    assert motion_within(film, np.arange(16) > 6) == pytest.approx(0.25)
    assert motion_within(film * 0, np.arange(16) > 6) == 1


def test_what_both_show_must_have_their_motion() -> None:
    """Two visits that end alike, in a room that is empty afterwards: all that they share is the end."""
    empty = np.repeat(scene(room=7, actor=0, frames=1), 33, axis=0)
    one = guarded(guarded(empty, (20, 20), slice(0, 4)), (100, 110), slice(4, 6))
    two = guarded(guarded(empty, (110, 20), slice(0, 4)), (100, 110), slice(4, 6))
    assert Made().add("one", one).add("two", two).found() == {}
    cut_two = guarded(empty, (100, 110), slice(0, 2))
    assert Made().add("one", one).add("cut", cut_two).found() == {}


def test_flat_and_empty_pictures_are_compared_with_none() -> None:
    made = Made()
    for number, grey in enumerate((0, 0, 255, 128, 128)):
        made.add(f"flat {number}", np.full((33, LARGE, LARGE), grey, np.uint8))
    assert made.found() == {}


def test_exact_ones_have_one_id() -> None:
    film, other = scene(room=1, actor=1), scene(room=2, actor=2)
    made = Made().add("b/film", film, clip_id="aa").add("a/film", film, clip_id="aa").add("c/film", other, clip_id="bb")
    made.add("d/small", film, bytes=10)
    expected = {"b/film": ("aa", "exact"), "d/small": ("aa", "near")}
    assert made.found() == expected
    assert made.found(near=False) == {"b/film": ("aa", "exact")}


def test_the_one_of_most_bits_times_pixels_is_kept() -> None:
    film = scene(room=1, actor=1)
    made = Made().add("a", film, bytes=1000).add("b", film, bytes=900, width=120).add("c", film, bytes=1000)
    assert made.found() == {"a": ("b", "near"), "c": ("b", "near")}
    assert Made().add("b", film).add("a", film).found() == {"b": ("a", "near")}  # by name, where nothing else differs


def test_bars_are_no_pixels() -> None:
    film = scene(room=1, actor=1)
    made = Made().add("a", letterboxed(film, 0.13), bars=(0.13, 0.13, 0.0, 0.0), bytes=1100).add("b", film, bytes=1000)
    assert made.found() == {"a": ("b", "near")}


def test_clips_that_are_not_kept_are_not_looked_at() -> None:
    film = scene(room=1, actor=1)
    assert Made().add("a", film, bytes=5000, keep=False).add("b", film).add("c", film).found() == {"c": ("b", "near")}


def test_how_much_both_must_show() -> None:
    film = scene(room=1, actor=1, frames=41)
    made = Made().add("whole", film, bytes=5000).add("half", film[8:29])
    assert made.found() == {}
    assert made.found(overlap=0.5) == {"half": ("whole", "near")}


def test_no_clip_at_all() -> None:
    assert Made().add("a", scene(room=1, actor=1), keep=False).found() == {}
    empty = {name: table.slice(0, 0) for name, table in Made().add("a", scene(room=1, actor=1)).tables().items()}
    assert DuplicatesStage(DuplicatesConfig(), SourceLimits()).run_all(empty, Made().rows_of).num_rows == 0


def test_all_copies_among_many_hashes() -> None:
    prints, copies = made_up_prints(4000, seed=1)
    found = find_candidates(prints, overlap=0.8)
    pairs = {(min(pair), max(pair)) for pair in zip(found.clip.tolist(), found.other.tolist(), strict=True)}
    assert pairs == copies and len(copies) == 200
    assert (np.diff(found.distance) >= 0).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_clips() -> None:
    """Every copy, nothing else, and time that grows with the number of clips, not with that of pairs."""
    seconds = []
    for clips in (25_000, 100_000):
        prints, copies = made_up_prints(clips, seed=2)
        begin = time.process_time()
        found = find_candidates(prints, overlap=0.8)
        seconds.append(time.process_time() - begin)
        pairs = {(min(pair), max(pair)) for pair in zip(found.clip.tolist(), found.other.tolist(), strict=True)}
        assert pairs == copies
    assert seconds[1] < 8 * seconds[0]


def test_moments_are_told_apart_by_what_changes() -> None:
    """The same moments leave next to nothing of the changes, others of the same room about all."""
    one, other = small(scene(room=3, actor=1)), small(scene(room=3, actor=2))
    moments = slice(0, 32, 4)
    same = likeness(one[moments], small(scene(room=3, actor=1) // 3 + 80)[moments], (NO_BARS, NO_BARS), WHOLE)
    apart = likeness(one[moments], other[moments], (NO_BARS, NO_BARS), WHOLE)
    assert same is not None and same.unexplained < 0.05
    assert apart is not None and apart.unexplained > 0.5


def test_a_crop_is_laid_over_what_it_is_of() -> None:
    film = scene(room=4, actor=1)
    for sides in ((0.025, 0.025, 0.025, 0.025), (0.05, 0.0, 0.05, 0.0), (0.0, 0.0, 0.0, 0.05)):
        two = small(cut(film, *sides))
        found = likeness(small(film)[::4], two[::4], (NO_BARS, NO_BARS), WHOLE)
        assert found is not None and found.unexplained < 0.1 and found.distance < 4, sides


def test_a_picture_inside_bars_is_stretched_to_all_cells() -> None:
    film = scene(room=5, actor=1)[:3]
    boxed = inside(small(letterboxed(film, 0.125)), (0.125, 0.125, 0.0, 0.0))
    assert abs(boxed - small(film))[:, 3:-3].mean() < 3
    assert boxed[:, [0, -1]].min() > 20  # nothing of the bars


def test_groups_know_who_is_mirrored() -> None:
    groups = Groups[int]()
    groups.join(1, 2, mirrored=True)
    groups.join(3, 4, mirrored=True)
    groups.join(2, 3, mirrored=True)  # so 3 is as 1, and 4 as 2
    groups.join(1, 4, mirrored=False)  # what is known already stays
    turned = {member: groups.find(member)[1] != groups.find(1)[1] for member in range(1, 6)}
    assert turned == {1: False, 2: True, 3: False, 4: True, 5: False}
    assert sorted(map(sorted, groups.of(range(1, 6)).values())) == [[1, 2, 3, 4], [5]]


def test_a_long_way_to_the_root_is_walked_without_recursion() -> None:
    groups = Groups[int]()
    for member in range(5000, 0, -1):
        groups.join(member - 1, member, mirrored=True)
    assert [groups.find(member)[1] != groups.find(0)[1] for member in (0, 1, 2, 4999, 5000)] == [0, 1, 0, 1, 0]


def test_three_files_of_one_rabbit(shared_media: Path) -> None:
    """Another size and another codec; four other toys on the same table."""
    pile = Pile()
    for name in ("rabbit", "pig", "frog", "elf", "monster"):
        pile.add(f"{name}.mp4", shared_media / f"clips/{name}.mp4")
    for name in ("rabbit320.mp4", "rabbit320.webm"):
        pile.add(name, shared_media / "edge_cases" / name)
    stage = DuplicatesStage(DuplicatesConfig(), SourceLimits())
    rows = stage.run_all(pile.tables(pile.rows), pile.rows_of).to_pylist()
    kept = pile.rows["rabbit.mp4"]["shots"][0]["clip_id"]
    found = {row["source"]: row["duplicate_of"] for row in rows if row["duplicate_of"]}
    assert found == {"rabbit320.mp4": kept, "rabbit320.webm": kept}
    assert all(row["duplicate_distance"] < 3.2 for row in rows if row["duplicate_of"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"distance": -1.0}, "distance=-1"),
        ({"unexplained": -0.1}, "unexplained=-0.1"),
        ({"overlap": 0.2}, "overlap=0.2"),
    ],
)
def test_settings_that_make_no_sense(config: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DuplicatesConfig(**config)  # type: ignore[arg-type]
