"""Filters: verdicts by rows that are written out, which stage asks which filter, and what a configuration may say."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from data_pipeline.config import PipelineConfig
from data_pipeline.outputs import digest_of
from data_pipeline.rows import to_rows, to_table
from data_pipeline.stages.base import Unit
from data_pipeline.stages.filter import DEFAULT_FILTERS, FilterRule, FilterStage, make_filter, make_screen
from opensora.config.load import load_config
from opensora.config.schema import plain
from opensora.config.strict_yaml import read_yaml
from opensora.utils.errors import UserError

DEFAULT = Path(__file__).resolve().parents[2] / "configs/pipeline/default.yaml"


def stage(name: str, **columns: pa.DataType) -> Any:
    """A stage of which only the columns matter here."""
    return SimpleNamespace(name=name, columns=pa.schema(columns.items()))


REAL, WHOLE, TEXT, TRUTH = pa.float64(), pa.int32(), pa.string(), pa.bool_()
BEFORE = [
    stage("probe", height=WHOLE, width=WHOLE, fps=REAL, codec=TEXT),
    stage("frames", pts=pa.list_(pa.int64()), damaged_packets=WHOLE),
    stage("shots", clip=WHOLE, start_s=REAL, end_s=REAL, fps=REAL),
    stage(
        "measure", luma=REAL, black_share=REAL, frozen_share=REAL, sharpness=REAL, picture_share=REAL, damaged=TRUTH,
        motion_score=REAL, camera_motion=TEXT,
    ),
]  # fmt: skip
BEHIND = [
    stage("duplicates", duplicate_of=TEXT, duplicate_kind=TEXT),
    stage("text", text_share=REAL, text=TEXT),
    stage("scores", aesthetic=pa.float32()),
]


def both(**filters: FilterRule) -> tuple[FilterStage, FilterStage]:
    """(screen, filter) of a run with all stages."""
    screen = make_screen(filters, BEFORE)
    return screen, make_filter(filters, screen, [*BEFORE, screen, *BEHIND])


def verdicts(stage: FilterStage, **rows: list[dict[str, Any]]) -> list[tuple[bool, str | None, list[str]]]:
    """Of all clips; they go through a table, as between stages."""
    found = to_rows(to_table(stage.run(Unit(source="a", file="a", rows=rows)), stage.columns))
    return [(row["keep"], row["reason"], row["rejected_by"]) for row in found]


def of_column(rule: FilterRule, *values: Any) -> list[str | None]:
    """The reasons of clips with these values of a column of ``measure``."""
    screen, _ = both(name=rule)
    shots = [{"clip": number} for number in range(len(values))]
    found = verdicts(screen, shots=shots, measure=[{rule.column: value} for value in values])
    return [reason for _, reason, _ in found]


def test_a_range() -> None:
    rule = FilterRule(column="luma", min=16, max=240.5)
    assert of_column(rule, 15.9, 16.0, 100, 240.5, 240.6, None) == [
        "name: luma=15.9, must be >= 16", None, None, None, "name: luma=240.6, must be <= 240.5", None,
    ]  # fmt: skip


def test_a_value_close_to_the_threshold_is_written_so_that_it_differs() -> None:
    found = of_column(FilterRule(column="luma", min=1.0), 0.999996, 1 - 2**-53)
    assert found == ["name: luma=0.999996, must be >= 1", "name: luma=0.9999999999999999, must be >= 1"]


def test_values_that_are_allowed_and_forbidden() -> None:
    pans = FilterRule(column="camera_motion", allow=("pan left", "pan right"))
    assert of_column(pans, "pan left", "shake") == [None, "name: camera_motion=shake, must be pan left or pan right"]
    assert of_column(FilterRule(column="camera_motion", forbid=("shake",)), "pan left", "shake") == [
        None, "name: camera_motion=shake, must not be shake",
    ]  # fmt: skip
    found = of_column(FilterRule(column="damaged", allow=(False,)), False, True, None)
    assert found == [None, "name: damaged=true, must be false", None]


def test_what_is_missing() -> None:
    rule = FilterRule(column="luma", min=1, missing="reject")
    assert of_column(rule, None, float("nan"), 2.0) == ["name: luma is missing", "name: luma is missing", None]


def test_all_filters_that_reject_are_listed_and_the_first_of_the_file_is_the_reason() -> None:
    screen, _ = both(
        dark=FilterRule(column="luma", min=10), short=FilterRule(column="duration_s", min=2),
        small=FilterRule(column="short_side", min=240),
    )  # fmt: skip
    found = verdicts(
        screen,
        probe=[{"height": 1920, "width": 200}],
        shots=[{"clip": 0, "start_s": 0.0, "end_s": 1.5}, {"clip": 1, "start_s": 1.5, "end_s": 9.0}],
        measure=[{"luma": 5.0}, {"luma": 50.0}],
    )
    assert found[0] == (False, "dark: luma=5, must be >= 10", ["dark", "short", "small"])
    assert found[1] == (False, "small: short_side=200, must be >= 240", ["small"])


def test_each_filter_is_asked_by_the_first_stage_that_has_its_column() -> None:
    screen, last = both(**DEFAULT_FILTERS)
    assert list(last.rules) == ["duplicates", "text"]
    assert list(screen.rules) == [name for name in DEFAULT_FILTERS if name not in last.rules]
    assert set(screen.reads) == {"probe", "shots", "measure"}
    assert set(last.reads) == {"shots", "screen", "duplicates", "text"}


def test_only_columns_that_are_asked_for_are_read() -> None:
    screen, last = both(dark=FilterRule(column="luma", min=10), text=FilterRule(column="text_share", max=0.1))
    assert screen.reads == {"shots": ("clip",), "measure": ("luma",)}
    assert last.reads == {"shots": ("clip",), "text": ("text_share",), "screen": ("keep", "reason", "rejected_by")}


def test_the_verdict_of_the_screen_comes_first() -> None:
    filters = {
        "text": FilterRule(column="text_share", max=0.1, missing="reject"), "dark": FilterRule(column="luma", min=10),
        "duplicates": FilterRule(column="duplicate_of", present="reject"),
    }  # fmt: skip
    _, last = both(**filters)
    found = verdicts(
        last,
        shots=[{"clip": number} for number in range(5)],
        screen=[{"keep": False, "reason": "dark: luma=5, must be >= 10", "rejected_by": ["dark"]}]
        + [{"keep": True, "reason": None, "rejected_by": []}] * 4,
        duplicates=[{"duplicate_of": value} for value in (None, "00aa", None, None, None)],
        text=[{"text_share": value} for value in (None, None, None, 0.5, 0.0)],
    )
    assert found == [
        (False, "dark: luma=5, must be >= 10", ["dark"]),  # its text was not looked for: that is no objection
        (False, "duplicates: duplicate of 00aa", ["duplicates"]),  # nor here
        (False, "text: text_share is missing", ["text"]),  # it was, and is not there
        (False, "text: text_share=0.5, must be <= 0.1", ["text"]),
        (True, None, []),
    ]


def test_a_stage_that_had_nothing_to_say_of_a_source() -> None:
    _, last = both(duplicates=FilterRule(column="duplicate_of", present="reject"))
    kept = {"keep": True, "reason": None, "rejected_by": []}
    assert verdicts(last, shots=[{"clip": 0}], screen=[kept], duplicates=[]) == [(True, None, [])]


def test_a_source_without_clips_has_no_verdict() -> None:
    screen, _ = both(small=FilterRule(column="short_side", min=240))
    assert verdicts(screen, probe=[{"height": 100, "width": 100}], shots=[]) == []


def test_the_last_stage_that_has_a_column_is_meant_unless_one_is_named() -> None:
    screen, _ = both(rate=FilterRule(column="fps", min=10), file_rate=FilterRule(column="probe.fps", min=20))
    assert screen.reads == {"shots": ("clip", "fps"), "probe": ("fps",)}
    found = verdicts(screen, shots=[{"clip": 0, "fps": 9.0}], probe=[{"fps": 15.0}])
    assert found[0][2] == ["rate", "file_rate"]


MOVES = "camera_motion"
REFUSED = {
    "filters.dark.column=lumma: no stage of this run writes it; did you mean luma?": FilterRule(column="lumma", min=1),
    "filters.dark.min=1: column camera_motion holds text; write allow or forbid": FilterRule(
        column="camera_motion", min=1
    ),
    "filters.dark.max=1: column damaged holds true or false": FilterRule(column="damaged", max=1),
    "filters.dark: value pan left can never be there, column luma holds numbers; write min or max": FilterRule(
        column="luma", allow=("pan left",)
    ),
    "filters.dark: value true can never be there, column camera_motion holds text": FilterRule(
        column="camera_motion", forbid=(True,)
    ),
    "filters.dark: value pan lefft can never be there in column camera_motion; did you mean pan left?": FilterRule(
        column="camera_motion", forbid=("pan lefft",)
    ),
    "filters.dark.column=pts: no stage of this run writes it": FilterRule(column="pts", min=1),
    "filters.dark.column=keep: no stage of this run writes it": FilterRule(column="keep", allow=(True,)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_filter_that_cannot_be_asked(said: str) -> None:
    with pytest.raises(UserError) as caught:
        both(dark=REFUSED[said])
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_filter_on_a_score_that_there_is_not() -> None:
    screen = make_screen({}, BEFORE)
    with pytest.raises(UserError, match="a score is a column only where scores names it"):
        make_filter({"ugly": FilterRule(column="aesthetic", min=4)}, screen, [*BEFORE, screen, *BEHIND[:-1]])


BAD = {
    "filters.a={}": "filters.a.column='': must name a column",
    "filters.a.min=3": "filters.a.column='': must name a column",
    "filters={'': {column: luma, min: 3}}": "filters: '' is no name: must be letters",
    "filters={'a|b': {column: luma, min: 3}}": "filters: 'a|b' is no name: must be letters",
    "filters.a={column: luma}": "filters.a.column: a rule needs min, max, allow, forbid",
    "filters.a={column: luma, min: 3, max: 2}": "filters.a.min=3: must be at most max=2",
    "filters.a={column: luma, min: 3, forbid: [x]}": "filters.a.column: a rule has min and max, or allow and forbid",
    "filters.a={column: camera_motion, allow: []}": "filters.a.allow=[]: must list at least one value",
    "filters.a={column: camera_motion, forbid: [3]}": "filters.a.forbid.0=3: must be text or true or false",
    "filters.a={column: luma, least: 3}": "filters.a.least: unknown key; must be one of column, min",
    "filters.a={column: '', min: 3}": "filters.a.column='': must name a column",
    "pictures.per_second=0": "pictures.per_second=0: must be a number above 0",
}


@pytest.mark.parametrize("override", BAD)
def test_a_configuration_that_is_refused(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(PipelineConfig, {"source": "x", "out": "y"}, [override])
    assert str(caught.value).startswith(BAD[override]) and "\n" not in str(caught.value)


def test_one_threshold_from_the_command_line_leaves_the_others() -> None:
    cfg = load_config(PipelineConfig, DEFAULT, ["source=x", "out=y", "filters.dark.min=20"])
    assert cfg.filters["dark"] == FilterRule(column="luma", min=20.0)
    assert list(cfg.filters) == list(DEFAULT_FILTERS)


def test_a_filter_that_is_null_is_off() -> None:
    cfg = load_config(PipelineConfig, DEFAULT, ["source=a", "out=b", "filters.dark=null", "filters.duplicates=null"])
    screen = make_screen(cfg.filters, BEFORE)
    asked = [*screen.rules, *make_filter(cfg.filters, screen, [*BEFORE, screen, *BEHIND]).rules]
    assert set(asked) == set(DEFAULT_FILTERS) - {"dark", "duplicates"}


def test_the_shipped_configuration_states_the_defaults() -> None:
    cfg = load_config(PipelineConfig, DEFAULT, ["source=x", "out=y"])
    assert list(cfg.filters.items()) == list(DEFAULT_FILTERS.items())
    assert plain(cfg) == plain(PipelineConfig(source="x", out="y"))
    stated, _ = read_yaml(DEFAULT)
    assert set(plain(cfg)) - set(stated) == {"probe"}  # which has no keys
    assert set(plain(cfg)["cut"]) == set(stated["cut"])


def test_stages_of_filters_are_keyed_by_rules_and_their_order_and_go_to_workers() -> None:
    dark, bright = FilterRule(column="luma", min=16), FilterRule(column="luma", max=240)
    screens = [make_screen(filters, BEFORE) for filters in (
        {"a": dark, "b": bright}, {"b": bright, "a": dark}, {"a": dark, "b": FilterRule(column="luma", max=241)},
    )]  # fmt: skip
    assert len({digest_of(plain(screen.config)) for screen in screens}) == 3
    rows: Any = {"shots": [{"clip": 0}], "measure": [{"luma": 250.0}]}
    again = pickle.loads(pickle.dumps(screens[0]))
    assert again.run(Unit(source="a", file="a", rows=rows)) == screens[0].run(Unit(source="a", file="a", rows=rows))
