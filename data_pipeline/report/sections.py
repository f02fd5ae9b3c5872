"""The sections of ``report.html``."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.report.amounts import length, number, plural, share
from data_pipeline.report.bins import axis_of, counts
from data_pipeline.report.buckets import Filled, Prediction
from data_pipeline.report.charts import histogram
from data_pipeline.report.clips import Clips, nearest_misses, some_kept
from data_pipeline.report.config import ReportConfig
from data_pipeline.report.data import Failure, ReportData, Work
from data_pipeline.report.funnel import LENGTHS, Step, amount, grid, in_words
from data_pipeline.report.markup import bar, escape, key, table
from data_pipeline.report.sheets import Sheets, count_duplicates
from data_pipeline.stages.filter import FilterRule

_EXAMPLES = 3  # of every kind of error


def tiles(data: ReportData, clips: Clips) -> str:
    """The run in six numbers."""
    kept = amount(clips, clips.keep)
    found = float(clips.seconds.sum())
    entries = [
        ("", plural(data.sources, "video"), f"{length(data.seconds)} in all"),
        ("", plural(len(clips), "clip"), f"{length(found)} found"),
        ("good", plural(kept.clips, "clip"), f"kept, {share(kept.clips, len(clips))} of them"),
        ("good", length(kept.seconds), f"kept, {share(kept.seconds, found)} of what was found"),
        ("bad" if data.failures else "", plural(len(data.failures), "error"), "videos that could not be used"),
    ]
    shown = [
        f'<div class="tile {kind}"><b>{escape(value)}</b><small>{escape(name)}</small></div>'
        for kind, value, name in entries
    ]
    return f'<div class="tiles">{"".join(shown)}</div>'


def funnel_section(steps: Sequence[Step], clips: Clips) -> str:
    """What every filter leaves."""
    if not steps or not len(clips):
        return ""
    whole = float(clips.seconds.sum()) or 1.0
    lines = [_step(step, whole) for step in steps]
    said = "Filters in the order in which they are asked. A clip counts where it is rejected first."
    colours = key(("keep", "left"), ("drop", "rejected here"))
    return f'<p class="soft">{said}</p>{colours}<div class="card steps">{"".join(lines)}</div>'


def _step(step: Step, whole: float) -> str:
    link = f'<a class="name" href="#filter-{_anchor(step.name)}">{escape(step.name)}</a>'
    gone = ""
    if step.dropped.clips:
        gone = f'<span class="gone">&minus;{step.dropped.clips:,}</span>'
    left = f'{plural(step.left.clips, "clip")} <span class="soft">{length(step.left.seconds)}</span>'
    shares = bar(("keep", step.left.seconds / whole), ("drop", step.dropped.seconds / whole))
    rule = f'<code class="soft">{escape(in_words(step.rule))}</code>'
    return f'<div class="step"><div class="line">{link}{rule}{gone}<span class="left">{left}</span></div>{shares}</div>'


def filters_section(steps: Sequence[Step], clips: Clips, sheets: Sheets, config: ReportConfig) -> str:
    """Every filter: its histogram, what it nearly let pass, and what was kept."""
    if not len(clips):
        return ""
    return "".join(_filter(step, step.rule, clips, sheets, config) for step in steps if step.rule is not None)


def _filter(step: Step, rule: FilterRule, clips: Clips, sheets: Sheets, config: ReportConfig) -> str:
    name, column = step.name, rule.column
    misses = nearest_misses(clips, name, config.examples, config.seed)
    kept = some_kept(clips, name, config.examples, config.seed)
    said = "rejects none"
    if step.rejects.clips:
        others = f"{step.alone.clips:,} of them rejected by nothing else"
        said = f"rejects {plural(step.rejects.clips, 'clip')} ({length(step.rejects.seconds)}), {others}"
    parts = [
        f'<h3 id="filter-{_anchor(name)}">{escape(name)} <code class="soft">{escape(in_words(step.rule))}</code></h3>'
    ]
    parts.append(f"<small>{said}</small>{chart(clips, column)}")
    if len(misses):
        title = "Nearest misses" if rule.has_range else "Rejected, for example"
        parts.append(f"<h4>{title}</h4>{sheets.sheet(misses, column, 'miss')}")
    if len(kept):
        opened = " open" if len(misses) else ""
        parts.append(f"<details{opened}><summary>Kept, for example</summary>{sheets.sheet(kept, column)}</details>")
    return f'<div class="card">{"".join(parts)}</div>'


def chart(clips: Clips, column: str) -> str:
    """How the values of a column are distributed, with the thresholds of all its filters."""
    if not clips.has(column):
        return '<p class="soft">This column was not measured.</p>'
    if not clips.is_number(column):
        return _words(clips, column)
    values = clips.numbers(column)
    there = np.isfinite(values)
    if not there.any():
        return '<p class="soft">No clip has a value.</p>'
    rules = {name: rule for name, rule in clips.filters.items() if rule.column == column and rule.has_range}
    marks = [mark for rule in rules.values() for mark in _marks(rule)]
    axis = axis_of(values[there], [value for value, _ in marks])
    here = np.any([clips.rejected[name] for name in rules], axis=0) if rules else np.zeros(len(clips), dtype=bool)
    chosen = (("keep", clips.keep), ("other", ~clips.keep & ~here), ("drop", here))
    parts = [(kind, counts(values[there & those], axis)) for kind, those in chosen]
    colours = key(("keep", "kept"), ("other", "rejected by others"), *([("drop", "rejected by this")] if rules else []))
    notes = [f"{plural(int((~there).sum()), 'clip')} without a value"] if not there.all() else []
    notes.append(f"tallest bar {plural(int(np.sum([part for _, part in parts], axis=0).max()), 'clip')}")
    shown = histogram(axis, parts, marks, f"histogram of {column}")
    return f'{shown}{colours} <small class="notes">{", ".join(notes)}</small>'


def _marks(rule: FilterRule) -> list[tuple[float, str]]:
    found = [(rule.min, "min"), (rule.max, "max")]
    return [(value, side) for value, side in found if value is not None]


def _words(clips: Clips, column: str) -> str:
    """Bars of a column of text with few different values."""
    values = clips.words(column)
    found = {word: values.count(word) for word in sorted({value for value in values if value is not None})[:30]}
    if not found or len(set(values)) > 30:
        return ""
    keep = [word for word, is_kept in zip(values, clips.keep, strict=True) if is_kept]
    most = max(found.values())
    rows = []
    for word, count in sorted(found.items(), key=lambda item: (-item[1], item[0])):
        kept = keep.count(word)
        rows.append([escape(word), f"{count:,}", bar(("keep", kept / most), ("other", (count - kept) / most))])
    return table([column, "clips", ""], rows)


def scores_section(clips: Clips, columns: Sequence[str]) -> str:
    """Distributions that no filter has shown."""
    shown = {rule.column for rule in clips.filters.values()}
    cards = [
        f'<div class="card"><h3>{escape(name)}</h3>{chart(clips, name)}</div>' for name in columns if name not in shown
    ]
    return f'<div class="charts">{"".join(cards)}</div>' if cards and len(clips) else ""


def kept_section(clips: Clips) -> str:
    """Resolution, duration and ratio of the kept clips."""
    cells = grid(clips)
    if not cells:
        return ""
    most = max(int(counts.max()) for counts in cells.values())
    rows = []
    for (shape, size), of_lengths in cells.items():
        heat = [
            f'<td class="heat" style="--heat:{0.6 * n / most:.3f}">{n:,}</td>' if n else "<td></td>" for n in of_lengths
        ]
        rows.append([f"{shape} {size}", *heat, f"<b>{int(of_lengths.sum()):,}</b>"])
    total = np.sum(list(cells.values()), axis=0)
    rows.append(["all", *(f"{n:,}" for n in total), f"<b>{int(total.sum()):,}</b>"])
    motion = _words(clips, "camera_motion") if clips.has("camera_motion") else ""
    return table(["shape and short side", *(name for _, name in LENGTHS), "clips"], rows) + motion


def buckets_section(prediction: Prediction | None) -> str:
    """What a training run would make of them."""
    if prediction is None:
        return ""
    head = (
        f'<p class="soft">The first epoch of <code>{escape(prediction.training)}</code> on the clips that are kept.</p>'
    )
    if prediction.problem:
        return f'{head}<p class="gone">{escape(prediction.problem)}</p>'
    rows: dict[tuple[str, int], list[Filled]] = {}
    for bucket in prediction.buckets:
        rows.setdefault((bucket.resolution, bucket.frames), []).append(bucket)
    most = max(sum(each.samples for each in found) for found in rows.values())
    summary = [_bucket_row(name, frames, found, most) for (name, frames), found in rows.items()]
    body = table(["resolution x frames", "sizes", "samples", "micro-batches", ""], summary)
    sizes = [_size_row(bucket) for bucket in prediction.buckets]
    heads = ["bucket", "micro-batch", "samples", "micro-batches"]
    details = f"<details><summary>{plural(len(sizes), 'bucket')} by size</summary>{table(heads, sizes)}</details>"
    lines = [f"<li>{count:,} left out: {escape(reason)}</li>" for reason, count in prediction.left_out]
    if prediction.unused:
        names = ", ".join(f"{resolution} x {frames}" for resolution, frames in prediction.unused)
        lines.append(f'<li class="warn">rows of its table without a clip: {escape(names)}</li>')
    return f"{head}{body}{details}{f'<ul>{chr(10).join(lines)}</ul>' if lines else ''}"


def _bucket_row(resolution: str, frames: int, found: Sequence[Filled], most: int) -> list[str]:
    samples, batches = sum(each.samples for each in found), sum(each.batches for each in found)
    thin = sum(each.batches < 1 for each in found)
    note = f' <small class="warn">{thin} of {len(found)} never full</small>' if thin else ""
    name = f"{escape(resolution)} x {frames}"
    return [name, f"{len(found)}", f"{samples:,}", f"{number(batches)}{note}", bar(("keep", samples / most))]


def _size_row(bucket: Filled) -> list[str]:
    thin = ' class="warn"' if bucket.batches < 1 else ""
    size = f"{escape(bucket.resolution)} {bucket.frames} x {bucket.height} x {bucket.width}"
    return [size, f"{bucket.batch_size}", f"{bucket.samples:,}", f"<span{thin}>{number(bucket.batches)}</span>"]


def duplicates_section(pairs: Sequence[tuple[int, int, str]], clips: Clips, sheets: Sheets) -> str:
    """What was taken for a copy of what."""
    if not pairs:
        return ""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in count_duplicates(clips).items())
    said = f'<p class="soft">{escape(kinds)}{"; " if kinds else ""}the least alike first.</p>'
    return f'{said}<div class="pairs">{"".join(sheets.pair(*pair) for pair in pairs)}</div>'


def errors_section(failures: Sequence[Failure]) -> str:
    """Why videos could not be used."""
    if not failures:
        return ""
    rows = []
    for (stage, kind), found in by_kind(failures).items():
        shown = "<br>".join(f"<code>{escape(each.source)}</code>: {escape(each.message)}" for each in found[:_EXAMPLES])
        more = f"<br><small>and {len(found) - _EXAMPLES:,} more</small>" if len(found) > _EXAMPLES else ""
        rows.append([escape(kind), escape(stage), f"{len(found):,}", f"{shown}{more}"])
    return table(["kind", "stage", "videos", "for example"], rows, wrap=[3])


def by_kind(failures: Sequence[Failure]) -> dict[tuple[str, str], list[Failure]]:
    """(stage, kind) -> failures, the most frequent first."""
    found: dict[tuple[str, str], list[Failure]] = {}
    for each in failures:
        found.setdefault((each.stage, each.kind), []).append(each)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def work_section(work: Sequence[Work], seconds: float) -> str:
    """What the stages took."""
    if not work:
        return ""
    whole = sum(each.seconds for each in work)
    rows = []
    for each in work:
        pace = f"{number(seconds / each.seconds)} x" if each.seconds and seconds else ""
        part = bar(("keep", each.seconds / whole if whole else 0.0))
        rows.append([escape(each.stage), f"{each.sources:,}", length(each.seconds), pace, part])
    said = "Time of worker processes, all runs and tries together; speed as hours of video per hour of one process."
    return f'<p class="soft">{said}</p>' + table(["stage", "videos", "time", "speed", ""], rows)


def _anchor(name: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else f"-{ord(char):x}-" for char in name)
