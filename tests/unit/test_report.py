"""The report: its numbers against counts written out, which examples it shows, and files that are whole and safe."""

import io
import random
import re
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_pipeline.report import amounts, bins
from data_pipeline.report.buckets import predict
from data_pipeline.report.charts import sparkline
from data_pipeline.report.clips import Clips, nearest_misses, some_kept
from data_pipeline.report.collect import album_of, middle_picture, read_work
from data_pipeline.report.config import ReportConfig
from data_pipeline.report.data import Failure, ReportData, Shot, Work
from data_pipeline.report.funnel import funnel, grid, in_words
from data_pipeline.report.sheets import duplicate_pairs
from data_pipeline.report.write import is_written, write_report
from data_pipeline.stages.filter import FilterRule
from opensora.utils.errors import UserError

FILTERS = {
    "short": FilterRule(column="duration_s", min=2),
    "dark": FilterRule(column="luma", min=16, max=240),
    "shaky": FilterRule(column="camera_motion", forbid=("shake",)),
    "duplicates": FilterRule(column="duplicate_of", present="reject"),
}
NAMES = ("00aa", "00bb", "00cc", "00dd", "00ee", "00ff")


def clip(number: int, seconds: float, luma: float | None, by: str = "", **others: Any) -> dict[str, Any]:
    """A row; ``by``: the filters that reject it."""
    rejected = by.split()
    row = {
        "source": "a.mp4", "clip_id": NAMES[number], "first": 25 * number, "last": 25 * number + 20,
        "start_s": 100.0 * number, "end_s": 100.0 * number + seconds, "height": 480, "width": 854, "fps": 24.0,
        "num_frames": round(24 * seconds), "luma": luma, "camera_motion": "static", "duplicate_of": None,
        "duplicate_kind": None, "duplicate_distance": None, "keep": not rejected, "rejected_by": rejected,
        "reason": f"{rejected[0]}: ..." if rejected else None,
    }  # fmt: skip
    return row | others


ROWS = [
    clip(0, 5.0, 100.0),
    clip(1, 1.9, 15.0, "short dark"),
    clip(2, 8.0, 250.0, "dark"),
    clip(3, 8.0, 12.5, "dark shaky", camera_motion="shake"),
    clip(4, 1.0, None, "short"),
    clip(5, 5.0, 90.0, "duplicates", duplicate_of="00aa", duplicate_kind="near", duplicate_distance=1.5),
]
TEXT = pa.string()
TYPES = {"luma": pa.float64(), "duplicate_of": TEXT, "duplicate_kind": TEXT, "rejected_by": pa.list_(TEXT)}


def data_of(rows: list[dict[str, Any]], **others: Any) -> ReportData:
    """A run of which nothing but its clips matters."""
    kinds = {name: TYPES.get(name) or pa.array([row[name] for row in ROWS]).type for name in ROWS[0]}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    given: dict[str, Any] = {"clips": pa.table(columns), "filters": FILTERS, "sources": 3, "seconds": 600.0}
    return ReportData(**given | others)


def jpeg(level: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (16, 9), (level, level, level)).save(sink, "JPEG")
    return sink.getvalue()


def test_the_funnel_counts_each_clip_where_it_is_rejected_first() -> None:
    found = {}
    for step in funnel(Clips(data_of(ROWS))):
        each = (step.left, step.dropped, step.rejects, step.alone)
        found[step.name] = [(amount.clips, round(amount.seconds, 3)) for amount in each]
    assert found == {
        "short": [(4, 26.0), (2, 2.9), (2, 2.9), (1, 1.0)],
        "dark": [(2, 10.0), (2, 16.0), (3, 17.9), (1, 8.0)],
        "shaky": [(2, 10.0), (0, 0.0), (1, 8.0), (0, 0.0)],
        "duplicates": [(1, 5.0), (1, 5.0), (1, 5.0), (1, 5.0)],
    }
    assert funnel(Clips(data_of(ROWS)))[-1].left.clips == sum(row["keep"] for row in ROWS)


def test_what_later_stages_reject_is_behind_the_filters() -> None:
    steps = funnel(Clips(data_of([*ROWS[:5], clip(5, 5.0, 90.0, "captions")])))
    assert [(step.name, step.left.clips) for step in steps[-2:]] == [("duplicates", 2), ("captions", 1)]
    assert steps[-1].rule is None and in_words(steps[-1].rule) == "of a later stage"


def test_the_nearest_misses_are_in_order_of_their_distance_to_the_threshold() -> None:
    clips = Clips(data_of(ROWS))
    assert nearest_misses(clips, "dark", 10, 0).tolist() == [1, 3, 2]  # 1, 3.5 and 10 away
    assert nearest_misses(clips, "dark", 2, 0).tolist() == [1, 3]
    assert nearest_misses(clips, "short", 10, 0).tolist() == [1, 4]


def test_of_equally_near_misses_those_that_nothing_else_rejects_come_first() -> None:
    rows = [clip(0, 9.0, 14.0, "dark shaky"), clip(1, 9.0, 14.0, "dark"), clip(2, 9.0, 15.0, "dark shaky")]
    assert nearest_misses(Clips(data_of(rows)), "dark", 10, 0).tolist() == [2, 1, 0]


def test_examples_are_drawn_by_the_seed() -> None:
    rows = [clip(0, 9.0, float(luma)) for luma in np.random.default_rng(0).uniform(20, 200, 300)]
    clips = Clips(data_of(rows))
    drawn = some_kept(clips, "dark", 10, 0)
    assert drawn.tolist() == some_kept(Clips(data_of(rows)), "dark", 10, 0).tolist()
    assert set(drawn) != set(some_kept(clips, "dark", 10, 1)) != set(some_kept(clips, "short", 10, 1))
    values = clips.numbers("luma")[drawn]
    assert len(drawn) == 10 and (np.diff(values) >= 0).all() and drawn.max() > 150


@pytest.mark.parametrize("marks", [(), (2.0,), (2.0, 30.0)])
@pytest.mark.parametrize("kind", ["even", "skewed", "one value", "with zeros", "negative"])
def test_histograms_count_every_value_between_the_edges_of_its_bar(kind: str, marks: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    values = {
        "even": rng.uniform(1, 40, 500), "skewed": rng.lognormal(1, 1.5, 500), "one value": np.full(7, 24.0),
        "with zeros": np.maximum(rng.normal(size=500), 0), "negative": rng.normal(-3, 1, 500),
    }[kind]  # fmt: skip
    axis = bins.axis_of(values, marks)
    found = bins.counts(values, axis)
    assert found.sum() == len(values) and axis.is_log == (kind == "skewed")
    edges = np.array([axis.value(place / bins.BINS) for place in range(bins.BINS + 1)])
    edges[0], edges[-1] = -np.inf, np.inf
    expected, _ = np.histogram(values, edges - 1e-9 * np.abs(np.where(np.isfinite(edges), edges, 0)))
    assert np.abs(found - expected).sum() <= 2
    for mark in marks:
        assert axis.low <= mark <= axis.high
    if marks:  # bars are of one side of the first threshold or of the other
        begin = round(float(axis.at(marks[0])) * bins.BINS)
        assert found[begin:].sum() == (values >= marks[0]).sum()
    assert 3 <= len(axis.ticks()) <= 12 and all(axis.low <= tick * (1 + 1e-9) for tick in axis.ticks())


def test_far_values_do_not_flatten_a_histogram() -> None:
    values = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 1000), [1e6]])
    found = bins.counts(values, bins.axis_of(values, ()))
    assert (found > 10).sum() > 25


def test_a_line_of_blocks() -> None:
    assert sparkline(np.array([0, 1, 400, 800])) == "·▁▄█"


AMOUNTS = {
    "length": {
        0.0: "0 s",
        1.234: "1.23 s",
        42.0: "42 s",
        59.97: "1.0 min",
        90.0: "1.5 min",
        3599.0: "1.0 h",
        4e6: "1,111 h",
    },
    "clock": {0.0: "0:00", 7.9: "0:07", 750.0: "12:30", 3723.0: "1:02:03"},
    "number": {1234567.0: "1,234,567", 0.03125: "0.0312", 12.0: "12", float("nan"): "none"},
}


@pytest.mark.parametrize("name", AMOUNTS)
def test_numbers_as_people_read_them(name: str) -> None:
    assert {value: getattr(amounts, name)(value) for value in AMOUNTS[name] if value == value} == {
        value: text for value, text in AMOUNTS[name].items() if value == value
    }


def test_what_is_not_all_is_never_told_as_all() -> None:
    assert [amounts.share(*pair) for pair in ((1, 1), (9999, 10000), (1, 100000), (0, 0), (1, 3))] == [
        "100 %", "99 %", "< 0.1 %", "0 %", "33 %",
    ]  # fmt: skip


def test_kept_clips_by_shape_size_and_length() -> None:
    rows = [
        clip(0, 5.0, 1.0), clip(1, 3.0, 1.0), clip(2, 3.0, 1.0, "short"), clip(3, 40.0, 1.0, height=1280, width=720),
        clip(4, 2.0, 1.0, height=1080, width=1080),
    ]  # fmt: skip
    found = {key: counts.tolist() for key, counts in grid(Clips(data_of(rows))).items()}
    assert found == {
        ("tall", "720p"): [0, 0, 0, 0, 0, 1],
        ("square", "1080p"): [0, 1, 0, 0, 0, 0],
        ("16:9", "480p"): [0, 1, 1, 0, 0, 0],
    }


def test_pairs_of_duplicates_are_there_the_least_alike_first() -> None:
    rows = [
        clip(0, 5.0, 1.0),
        clip(1, 5.0, 1.0, "duplicates", duplicate_of="00aa", duplicate_kind="exact", duplicate_distance=0.0),
        clip(2, 5.0, 1.0, "duplicates", duplicate_of="00aa", duplicate_kind="near", duplicate_distance=2.5),
        clip(3, 5.0, 1.0, "duplicates", duplicate_of="gone", duplicate_kind="near", duplicate_distance=2.5),
    ]
    assert duplicate_pairs(Clips(data_of(rows)), 9) == [(0, 2, "near, distance 2.5"), (0, 1, "exact")]


def test_the_picture_of_a_shot_is_the_one_nearest_its_middle() -> None:
    frames, pictures = np.array([0, 25, 50, 75]), [b"0", b"25", b"50", b"75"]
    assert middle_picture(frames, pictures, Shot("a", 0, 100)) == b"50"
    assert middle_picture(frames, pictures, Shot("a", 20, 49)) == b"25"
    assert middle_picture(frames, pictures, Shot("a", 51, 75)) is None  # the end is not of it


def test_pictures_are_read_from_the_shards_that_have_them() -> None:
    table = pa.table({"picture_frame": [[0, 25]], "picture_jpeg": [[b"x", b"y"]]})
    done = [SimpleNamespace(source="a", error=""), SimpleNamespace(source="b", error="damaged")]
    output = SimpleNamespace(by_source=lambda: iter([(done[0], table), (done[1], table.slice(0, 0))]))
    shards = [SimpleNamespace(name=name, sources=[SimpleNamespace(name=name)]) for name in ("a", "never")]

    def read(stage: str, shard: Any) -> Any:
        assert stage == "frames" and shard.name == "a"
        return output

    pipeline: Any = SimpleNamespace(plan=SimpleNamespace(shards=shards), read=read)
    assert album_of(pipeline)([Shot("a", 20, 30), Shot("a", 0, 9), Shot("gone", 0, 9)]) == [b"y", b"x", None]


def test_times_are_added_up_over_logs_whatever_a_crash_left(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    lines = '{"stage": "probe", "source": "a", "seconds": 1.5}\n{"stage": "probe", "source": "a", "seconds": 2}\n'
    (tmp_path / "log/a.jsonl").write_text(lines + '{"stage": "pro')
    (tmp_path / "log/b.jsonl").write_text('{"stage": "probe", "source": "b", "seconds": 0.5}\n[]\n{"stage": "old"}\n')
    pipeline: Any = SimpleNamespace(out=tmp_path, stages={"probe": None, "frames": None})
    assert read_work(pipeline) == (Work(stage="probe", sources=2, seconds=4.0),)


class _Tags(HTMLParser):
    """What a page has, and whether every element that opens is closed."""

    VOID = ("meta", "img", "br", "rect", "line")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID or (tag == "rect" and not self.get_starttag_text().endswith("/>")):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def whole(rows: list[dict[str, Any]] = ROWS, **others: Any) -> ReportData:
    """A run with everything that a report has a section for."""
    given: dict[str, Any] = {
        "failures": tuple(Failure(source=f"{n}.mp4", stage="probe", kind="still", message="a still") for n in range(5)),
        "work": (Work(stage="probe", sources=3, seconds=4.0),),
        "album": lambda shots: [jpeg(10 * number) for number, _ in enumerate(shots)],
    }
    return data_of(rows, **given | others)


def written(data: ReportData, out: Path, **config: Any) -> tuple[str, str]:
    write_report(data, ReportConfig(**config), out)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md"]
    return (out / "report.html").read_text("utf-8"), (out / "report.md").read_text("utf-8")


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    page, _ = written(whole(), tmp_path)
    tags = _Tags(page)
    assert not tags.open
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags.seen}
    assert "http" not in page and "url(" not in page and "@import" not in page
    pictures = [attributes["src"] or "" for tag, attributes in tags.seen if tag == "img"]
    assert len(pictures) > 10 and all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    assert not any(name.startswith("on") for _, attributes in tags.seen for name in attributes)
    anchors = {attributes["id"] for _, attributes in tags.seen if "id" in attributes}
    links = [attributes["href"] or "" for tag, attributes in tags.seen if tag == "a"]
    assert links and all(link[0] == "#" and link[1:] in anchors for link in links)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_names_from_outside_are_text_and_nothing_else(tmp_path: Path) -> None:
    evil = "<script>alert(1)<img onerror=x>\"' | a\n.mp4"
    rows = [row | {"source": evil, "reason": evil if row["reason"] else None, "camera_motion": evil} for row in ROWS]
    failure = Failure(source=evil, stage="probe", kind=evil, message=evil)
    page, text = written(whole(rows, failures=(failure,)), tmp_path)
    tags = _Tags(page)
    assert not tags.open and "script" not in {tag for tag, _ in tags.seen}
    assert not any(name.startswith("on") for _, attributes in tags.seen for name in attributes)
    assert evil in "".join(tags.text)
    (line,) = [line for line in text.splitlines() if line.startswith("| <script>")]
    assert line.count(" | ") == 3 + 0 and "\\|" in line


def test_equal_tables_give_equal_files(tmp_path: Path) -> None:
    first = written(whole(), tmp_path / "a", training="configs/train/demo_clips.yaml")
    assert first == written(whole(), tmp_path / "b", training="configs/train/demo_clips.yaml")
    assert first != written(whole(ROWS[:5]), tmp_path / "a")  # in its place


def test_the_text_has_the_numbers(tmp_path: Path) -> None:
    _, text = written(whole(), tmp_path)
    assert "# From 3 videos to 1 clip" in text
    assert "3 videos (10 min), 6 clips found (29 s), 1 kept (5 s, 17 %), 5 errors." in text
    assert "| dark: 16 <= luma <= 240 | 2 | 10 s | 2 | 3 | 1 |" in text
    assert "| still | probe | 5 | 0.mp4: a still |" in text
    assert "| probe | 3 | 4 s |" in text
    assert "1 near" in text


def test_the_page_has_the_numbers(tmp_path: Path) -> None:
    page, _ = written(whole(), tmp_path)
    text = " ".join("".join(_Tags(page).text).split())
    assert "From 3 videos to 1 clip" in text and "5 errors" in text and "and 2 more" in text
    assert re.search(r"dark16 <= luma <= 240−2 ?2 clips 10 s", text)
    assert "rejects 3 clips (18 s), 1 of them rejected by nothing else" in text
    assert "1 clip without a value" in text  # of luma
    assert "at least 16" in text and "at most 240" in text  # beside their lines


def test_bars_of_a_histogram_are_of_the_clips(tmp_path: Path) -> None:
    """Red ones are those beyond the thresholds: 15 and 12.5 below 16, 250 above 240; blue and grey 100 and 90."""
    page, _ = written(whole(), tmp_path)
    (chart,) = re.findall(r'<svg[^>]*aria-label="histogram of luma">.*?</svg>', page)
    bars: dict[str, list[float]] = {}
    for kind, left, title in re.findall(
        r'<rect class="(keep|other|drop)" x="([\d.]+)"[^>]*><title>([^<]*)</title>', chart
    ):
        bars.setdefault(kind, []).append(float(left))
        assert title.endswith(": 1") or title.endswith(": 2")
    marks = [float(at) for at in re.findall(r'<line class="mark" x1="([\d.]+)"', chart)]
    assert len(marks) == 2 and len(bars["keep"]) == 1 and len(bars["other"]) == 1
    assert all(left < marks[0] or left > marks[1] - 10 for left in bars["drop"])
    assert all(marks[0] <= left <= marks[1] for left in bars["keep"] + bars["other"])


@pytest.mark.parametrize("kind", ["no clips", "no filters", "nothing kept", "no errors"])
def test_runs_with_little_in_them(kind: str, tmp_path: Path) -> None:
    data = {
        "no clips": lambda: whole([]),
        "no filters": lambda: whole(filters={}),
        "nothing kept": lambda: whole([row for row in ROWS if not row["keep"]]),
        "no errors": lambda: whole(failures=(), work=()),
    }[kind]()
    page, text = written(data, tmp_path, training="configs/train/demo_clips.yaml", examples=3)
    assert not _Tags(page).open and text.startswith("# From 3 videos")
    if kind in ("no clips", "nothing kept"):
        assert "no clip is kept" in text


def test_a_column_that_no_stage_wrote(tmp_path: Path) -> None:
    filters = FILTERS | {"ugly": FilterRule(column="aesthetic", min=4)}
    page, _ = written(whole(filters=filters), tmp_path)
    assert "This column was not measured." in page


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(whole(), tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(whole(ROWS[:2]), ReportConfig(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert before == tuple((tmp_path / name).read_text("utf-8") for name in ("report.html", "report.md"))


def test_buckets_are_those_that_training_fills(tmp_path: Path) -> None:
    """Against the command's own way, from a table on disk."""
    import pyarrow.parquet as papq

    from opensora.config.load import load_config
    from opensora.config.run import RunConfig
    from opensora.train.step_data import open_data

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        size = {"height": int(rng.integers(20, 90)), "width": int(rng.integers(20, 90))}
        frames = {"fps": float(rng.choice([12, 24, 50])), "num_frames": int(rng.integers(2, 70))}
        rows.append(clip(0, 2.0, 50.0, "" if rng.random() < 0.7 else "dark", **size, **frames))
    data = data_of(rows)
    training = "configs/train/demo_clips.yaml"
    predicted = predict(Clips(data), training)
    kept = data.clips.filter(data.clips["keep"]).select(["num_frames", "height", "width", "fps"])
    texts = [pa.array(["a"] * kept.num_rows)] * 2
    papq.write_table(kept.append_column("path", texts[0]).append_column("text", texts[1]), tmp_path / "clips.parquet")
    cfg = load_config(RunConfig, training, [f"data.table={tmp_path / 'clips.parquet'}", "data.unused_rows=report"])
    expected = open_data(cfg)[1].report()
    found = [(b.resolution, b.frames, b.height, b.width, b.batch_size, b.samples) for b in predicted.buckets]
    assert found == [
        (b.resolution, b.frames, b.height, b.width, b.batch_size, count) for b, count in expected.per_bucket
    ]
    assert predicted.left_out == expected.left_out and predicted.unused == expected.unused_rows and len(found) > 5
    assert predicted.buckets[0].batches == Fraction(predicted.buckets[0].samples, predicted.buckets[0].batch_size)


def test_a_clip_is_counted_in_the_size_of_its_own_file() -> None:
    data = data_of([clip(0, 5.0, 1.0, height=1080, width=1920), clip(1, 5.0, 1.0)])
    clips = data.clips
    for name, value in {"height": 720, "width": 1280, "num_frames": 99, "fps": 20}.items():
        clips = clips.append_column(f"final.{name}", pa.array([value, None], pa.float64()))
    assert set(grid(Clips(data_of([], clips=clips)))) == {("16:9", "720p"), ("16:9", "480p")}
    assert Clips(data_of([], clips=clips)).final("num_frames").tolist() == [99, 120]


def test_a_training_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone"):
        write_report(whole(), ReportConfig(training="gone.yaml"), tmp_path)


def test_a_report_that_is_not_as_it_was_written_is_noticed(tmp_path: Path) -> None:
    """Of another key, gone, or with any byte of either file changed."""
    write_report(whole(ROWS[:2]), ReportConfig(), tmp_path, "a key")
    assert is_written(tmp_path, "a key") and not is_written(tmp_path, "another key")
    draw = random.Random(5)
    for path in (tmp_path / "report.html", tmp_path / "report.md", tmp_path / ".report.json"):
        content = path.read_bytes()
        for _ in range(20):
            at = draw.randrange(len(content))
            damaged = content[:at] + bytes([content[at] ^ draw.randint(1, 255)]) + content[at + 1 :]
            path.write_bytes(draw.choice((damaged, content[:at], b"")))
            assert not is_written(tmp_path, "a key"), (path, at)
        path.unlink()
        assert not is_written(tmp_path, "a key")
        path.write_bytes(content)
    assert is_written(tmp_path, "a key")
