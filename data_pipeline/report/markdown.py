"""``report.md``: the same without pictures, for terminals, issues and diffs."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.report.amounts import length, number, plural, share
from data_pipeline.report.bins import axis_of, counts
from data_pipeline.report.buckets import Prediction
from data_pipeline.report.charts import sparkline
from data_pipeline.report.clips import Clips
from data_pipeline.report.data import ReportData
from data_pipeline.report.funnel import LENGTHS, Step, amount, grid, in_words
from data_pipeline.report.sections import by_kind
from data_pipeline.report.sheets import count_duplicates


def markdown(
    title: str,
    data: ReportData,
    clips: Clips,
    steps: Sequence[Step],
    columns: Sequence[str],
    predicted: Prediction | None,
) -> str:
    """The whole file."""
    kept, found = amount(clips, clips.keep), float(clips.seconds.sum())
    lead = ", ".join(
        (
            f"{plural(data.sources, 'video')} ({length(data.seconds)})",
            f"{plural(len(clips), 'clip')} found ({length(found)})",
            f"{kept.clips:,} kept ({length(kept.seconds)}, {share(kept.seconds, found)})",
            plural(len(data.failures), "error"),
        )
    )
    parts = [f"# {title}", f"{lead}."]
    parts += _section("Filters", _funnel(steps) if len(clips) else [])
    parts += _section("Scores", _scores(clips, columns) if len(clips) else [])
    parts += _section("Kept clips", _grid(clips))
    parts += _section("Buckets", _buckets(predicted) if predicted else [])
    parts += _section("Duplicates", [f"{count:,} {kind}" for kind, count in count_duplicates(clips).items()])
    parts += _section("Errors", _errors(data))
    parts += _section("Time", _work(data))
    return "\n\n".join(parts) + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if lines else []


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """The first ``words`` columns are text, the others are numbers."""
    if not rows:
        return []
    rule = [*["---"] * words, *["---:"] * (len(heads) - words)]
    return [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in (heads, rule, *rows)]


def _plain(text: str) -> str:
    """A cell: no bar or line end of a file's name ends it."""
    return " ".join(text.replace("|", "\\|").split())


def _funnel(steps: Sequence[Step]) -> list[str]:
    rows = []
    for step in steps:
        left = (f"{step.left.clips:,}", length(step.left.seconds))
        others = (f"{step.dropped.clips:,}", f"{step.rejects.clips:,}", f"{step.alone.clips:,}")
        rows.append([f"{step.name}: {in_words(step.rule)}", *left, *others])
    return _table(["filter", "clips left", "length left", "rejected here", "rejected in all", "by it alone"], rows)


def _scores(clips: Clips, columns: Sequence[str]) -> list[str]:
    rows = []
    for name in columns:
        values = clips.numbers(name)
        values = values[np.isfinite(values)]
        if len(values):
            low, middle, high = (number(float(value)) for value in np.quantile(values, (0.05, 0.5, 0.95)))
            rows.append(
                [name, f"{len(values):,}", low, middle, high, f"`{sparkline(counts(values, axis_of(values, ())))}`"]
            )
    return _table(["score", "clips", "5 %", "50 %", "95 %", "from least to most"], rows)


def _grid(clips: Clips) -> list[str]:
    rows = [
        [f"{shape} {size}", *(f"{n:,}" if n else "" for n in found)] for (shape, size), found in grid(clips).items()
    ]
    return _table(["shape and short side", *(name for _, name in LENGTHS)], rows)


def _buckets(predicted: Prediction) -> list[str]:
    if predicted.problem:
        return [f"`{predicted.training}`: {predicted.problem}"]
    rows = [
        [f"{each.resolution} {each.frames} x {each.height} x {each.width}", f"{each.batch_size}", f"{each.samples:,}",
         number(each.batches)]
        for each in predicted.buckets
    ]  # fmt: skip
    lines = [f"The first epoch of `{predicted.training}`:", ""]
    lines += _table(["bucket", "micro-batch", "samples", "micro-batches"], rows)
    notes = [f"* {count:,} left out: {reason}" for reason, count in predicted.left_out]
    if predicted.unused:
        names = ", ".join(f"{resolution} x {frames}" for resolution, frames in predicted.unused)
        notes.append(f"* rows of its table without a clip: {names}")
    return [*lines, *([""] if notes else []), *notes]


def _errors(data: ReportData) -> list[str]:
    rows = []
    for (stage, kind), found in by_kind(data.failures).items():
        rows.append([kind, stage, f"{len(found):,}", f"{found[0].source}: {found[0].message}"])
    return _table(["kind", "stage", "videos", "for example"], rows, words=4)


def _work(data: ReportData) -> list[str]:
    rows = [[each.stage, f"{each.sources:,}", length(each.seconds)] for each in data.work]
    return _table(["stage", "videos", "time of workers"], rows)
