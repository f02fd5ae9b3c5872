"""screen and filter: which clips are kept, by thresholds on what earlier stages measured. Nothing is measured here.

A filter is a name and a rule on one column. ``screen`` applies those whose columns are there before the expensive
stages, so that these pass over what is rejected already; ``filter`` adds the others. A rejected clip keeps its row,
with the first filter that rejects it as the reason and all of them beside it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from data_pipeline.rows import Row
from data_pipeline.stages.base import GlobalStage, Resources, Stage, Unit
from data_pipeline.stages.filter_columns import (
    NUMBERS,
    TEXT,
    TRUTHS,
    WORDS,
    Column,
    find_column,
    kind_of,
    unknown_column,
    values_of,
)
from opensora.config.schema import plain, suggestion
from opensora.utils.errors import UserError

SCREEN, FILTER = "screen", "filter"
_MOST_DIGITS = 17  # of a float: with so many no two are written alike


@dataclass(frozen=True, kw_only=True)
class FilterRule:
    """What a clip must be to pass. A clip without a value passes unless ``missing`` says otherwise."""

    column: str = ""  # of an earlier stage, or STAGE.column; must be given
    min: float | None = None  # the least that passes
    max: float | None = None  # the most that passes
    allow: tuple[str | bool, ...] | None = None  # the only values that pass
    forbid: tuple[str | bool, ...] = ()  # values that do not
    missing: Literal["keep", "reject"] = "keep"  # a clip without a value
    present: Literal["keep", "reject"] = "keep"  # a clip with any value at all, such as a duplicate of another

    def __post_init__(self) -> None:
        if not self.column:
            raise ValueError(
                "column='': must name a column of an earlier stage, such as luma; or is this name misspelt?"
            )
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min:g}: must be at most max={self.max:g}; as it is, no clip passes")
        if self.allow is not None and not self.allow:
            raise ValueError("allow=[]: must list at least one value; as it is, no clip passes")
        if self.has_range and self.has_values:
            raise ValueError("column: a rule has min and max, or allow and forbid; write two filters")
        if not (self.has_range or self.has_values) and self.missing == self.present == "keep":
            raise ValueError("column: a rule needs min, max, allow, forbid, missing: reject or present: reject")

    @property
    def has_range(self) -> bool:
        return self.min is not None or self.max is not None

    @property
    def has_values(self) -> bool:
        return self.allow is not None or bool(self.forbid)

    def objection(self, value: Any) -> str | None:
        """Why a clip with this value does not pass; None: it does. A value that is not there is None."""
        if value is None:
            return f"{self.column} is missing" if self.missing == "reject" else None
        if self.present == "reject":
            return f"{self.column.replace('_', ' ')} {value}"
        if self.min is not None and value < self.min:
            return f"{self.column}={_number(value, self.min)}, must be >= {self.min:g}"
        if self.max is not None and value > self.max:
            return f"{self.column}={_number(value, self.max)}, must be <= {self.max:g}"
        if self.allow is not None and value not in self.allow:
            return f"{self.column}={_word(value)}, must be {_words(self.allow)}"
        if value in self.forbid:
            return f"{self.column}={_word(value)}, must not be {_words(self.forbid)}"
        return None


# What is applied where a configuration says nothing; configs/pipeline/default.yaml states the same, with reasons.
DEFAULT_FILTERS: Mapping[str, FilterRule] = {
    "short": FilterRule(column="duration_s", min=2.0),
    "small": FilterRule(column="short_side", min=240.0),
    "shape": FilterRule(column="aspect_ratio", min=0.25, max=4.0),
    "slow_rate": FilterRule(column="fps", min=10.0),
    "damaged": FilterRule(column="damaged", allow=(False,)),
    "black": FilterRule(column="black_share", max=0.5),
    "frozen": FilterRule(column="frozen_share", max=0.5),
    "dark": FilterRule(column="luma", min=16.0),
    "bright": FilterRule(column="luma", max=240.0),
    "blurred": FilterRule(column="sharpness", min=15.0),
    "bars": FilterRule(column="picture_share", min=0.6),
    "still": FilterRule(column="motion_score", min=0.05),
    "hectic": FilterRule(column="motion_score", max=20.0),
    "duplicates": FilterRule(column="duplicate_of", present="reject"),
    "text": FilterRule(column="text_share", max=0.005),
}


class FilterStage:
    """One row per clip: whether it is kept, and why not. ``screen`` and ``filter`` are two of these."""

    version: ClassVar[int] = 1
    resources: ClassVar[Resources] = Resources()
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("keep", pa.bool_()),
            ("reason", pa.string()),  # the first filter that rejects the clip: "name: column=value, must be ..."
            ("rejected_by", pa.list_(pa.string())),  # all that do
        ]
    )

    def __init__(self, name: str, rules: Mapping[str, tuple[FilterRule, Column]], *, after: str = "") -> None:
        """
        Args:
            rules: filter -> its rule and where its column is from; in the order in which they are asked.
            after: the stage of filters whose verdicts are the beginning of these.
        """
        self.name, self._rules, self._after = name, rules, after
        self.reads = _reads(rules.values(), after)
        self.config: Any = [{"name": name, "rule": plain(rule)} for name, (rule, _) in rules.items()]

    @property
    def rules(self) -> dict[str, FilterRule]:
        """By name, in order."""
        return {name: rule for name, (rule, _) in self._rules.items()}

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        count = len(unit.rows["shots"])
        values = {name: values_of(column, unit.rows, count) for name, (_, column) in self._rules.items()}
        before: Sequence[Row] = unit.rows[self._after] if self._after else [{"keep": True}] * count
        return [
            self._verdict({name: of_all[clip] for name, of_all in values.items()}, before[clip])
            for clip in range(count)
        ]

    def _verdict(self, values: Mapping[str, Any], before: Row) -> Row:
        """Of one clip. Stages that measure only what is kept so far have no values of one that was rejected before
        them, which is no objection to it."""
        reason, rejected = before.get("reason"), list(before.get("rejected_by") or ())
        reached = 0 if rejected else None  # the stage that it was rejected behind
        for name, (rule, column) in self._rules.items():
            if values[name] is None and reached is not None and column.position > reached:
                continue
            if (objection := rule.objection(values[name])) is None:
                continue
            if not rejected:
                reason, reached = f"{name}: {objection}", column.position
            rejected.append(name)
        return {"keep": not rejected, "reason": reason, "rejected_by": rejected}


def make_screen(filters: Mapping[str, FilterRule | None], stages: Sequence[Stage | GlobalStage]) -> FilterStage:
    """The filters whose columns are in ``stages``, all of which are before it and measure every clip.

    Raises:
        UserError: a rule that does not fit its column.
    """
    found = {name: (rule, find_column(rule.column, stages, SCREEN)) for name, rule in filters.items() if rule}
    return FilterStage(
        SCREEN, {name: (rule, _fitting(name, rule, column)) for name, (rule, column) in found.items() if column}
    )


def make_filter(
    filters: Mapping[str, FilterRule | None], screen: FilterStage, stages: Sequence[Stage | GlobalStage]
) -> FilterStage:
    """The filters that ``screen``, one of ``stages``, has not; in the order of the stages they look at.

    Raises:
        UserError: a column that no stage has, or a rule that does not fit its column.
    """
    found: dict[str, tuple[FilterRule, Column]] = {}
    for name, rule in filters.items():
        if rule is None or name in screen.rules:
            continue
        column = find_column(rule.column, stages, SCREEN)
        if column is None:
            raise UserError(f"filters.{name}.column={rule.column}: {unknown_column(rule.column, stages)}")
        found[name] = (rule, _fitting(name, rule, column))
    in_order = sorted(found.items(), key=lambda item: item[1][1].position)
    return FilterStage(FILTER, dict(in_order), after=SCREEN)


def _fitting(name: str, rule: FilterRule, column: Column) -> Column:
    """Raises: UserError: a range of what has no order, or values that a column cannot have."""
    kind = kind_of(column.type)
    held = f"column {rule.column} holds {kind}"
    if rule.has_range and kind != NUMBERS:
        key = "min" if rule.min is not None else "max"
        raise UserError(f"filters.{name}.{key}={getattr(rule, key):g}: {held}; write allow or forbid")
    for value in (*(rule.allow or ()), *rule.forbid):
        if kind != (TRUTHS if isinstance(value, bool) else TEXT):
            remedy = "write min or max" if kind == NUMBERS else f"write values that are {kind}"
            raise UserError(f"filters.{name}: value {_word(value)} can never be there, {held}; {remedy}")
        words = WORDS.get(rule.column.rpartition(".")[2])
        if words and value not in words:
            said = suggestion(str(value), words)
            raise UserError(f"filters.{name}: value {value} can never be there in column {rule.column}; {said}")
    return column


def _reads(rules: Iterable[tuple[FilterRule, Column]], after: str) -> dict[str, tuple[str, ...]]:
    """Only what is asked for, so that nothing else makes verdicts be given again."""
    found: dict[str, set[str]] = {"shots": {"clip"}}
    for _, column in rules:
        for stage, name in column.inputs:
            found.setdefault(stage, set()).add(name)
    reads = {stage: tuple(sorted(names)) for stage, names in sorted(found.items())}
    return reads | ({after: tuple(FilterStage.columns.names)} if after else {})


def _number(value: float, bound: float) -> str:
    """With as many digits as tell it from the bound."""
    for digits in range(4, _MOST_DIGITS):
        text = f"{value:.{digits}g}"
        if float(text) != bound and (float(text) < bound) == (value < bound):
            return text
    return repr(value)


def _word(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else value


def _words(values: Sequence[str | bool]) -> str:
    return " or ".join(_word(value) for value in values)
