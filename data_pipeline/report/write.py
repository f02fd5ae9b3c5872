"""Tables to ``report.html`` and ``report.md``: the same files for the same tables."""

import hashlib
import json
from pathlib import Path

from data_pipeline.report import sections
from data_pipeline.report.amounts import plural
from data_pipeline.report.buckets import Prediction, predict
from data_pipeline.report.clips import Clips, column_order, nearest_misses, some_kept
from data_pipeline.report.config import ReportConfig
from data_pipeline.report.data import ReportData
from data_pipeline.report.funnel import funnel
from data_pipeline.report.markdown import markdown
from data_pipeline.report.markup import page
from data_pipeline.report.sheets import Sheets, duplicate_pairs
from opensora.utils.files.user_files import write_whole, written_whole

HTML, MARKDOWN = "report.html", "report.md"
MADE_OF = ".report.json"  # the key that both were made of, and digests of their bytes
# Worth a look, with a filter or without.
_MEASURED = (
    "duration_s", "fps", "short_side", "aspect_ratio", "luma", "black_share", "frozen_share", "sharpness",
    "picture_share", "motion_score", "camera_speed", "shake", "foreground_motion", "text_share", "logo_share",
)  # fmt: skip


def write_report(data: ReportData, config: ReportConfig, out: Path, made_of: str = "") -> None:
    """Both files, whole or not at all.

    Args:
        out: the folder.
        made_of: a key of all that is in the report, see ``is_written``; "": it is not kept.

    Raises:
        UserError: one cannot be written, or ``report.training`` cannot be used.
    """
    clips = Clips(data)
    steps, columns = funnel(clips), column_order(clips, (*_MEASURED, *scores_of(data)))
    predicted = predict(clips, config.training) if config.training else None
    title = f"From {plural(data.sources, 'video')} to {plural(int(clips.keep.sum()), 'clip')}"
    html = _html(title, data, clips, config, columns, predicted)
    text = markdown(title, data, clips, steps, columns, predicted)
    for name, content in ((MARKDOWN, text), (HTML, html)):
        with written_whole(out / name) as aside:
            aside.write_text(content, encoding="utf-8")
    if made_of:  # last: what has a key is whole
        write_whole(out / MADE_OF, lambda file: json.dump(_as_it_is(out, made_of), file))


def is_written(out: Path, made_of: str) -> bool:
    """Whether both files are there, of this key and undamaged."""
    try:
        told = json.loads((out / MADE_OF).read_bytes())
        return bool(told == _as_it_is(out, made_of))
    except (OSError, ValueError):
        return False


def _as_it_is(out: Path, made_of: str) -> dict[str, str]:
    digests = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in (HTML, MARKDOWN)}
    return {"made_of": made_of, **digests}


def _html(
    title: str,
    data: ReportData,
    clips: Clips,
    config: ReportConfig,
    columns: list[str],
    predicted: Prediction | None,
) -> str:
    steps, pairs = funnel(clips), duplicate_pairs(clips, config.pairs)
    shown = [row for pair in pairs for row in pair[:2]]
    for name in clips.filters:
        shown += nearest_misses(clips, name, config.examples, config.seed).tolist()
        shown += some_kept(clips, name, config.examples, config.seed).tolist()
    sheets = Sheets(clips, data.album, shown)
    return page(
        title,
        sections.tiles(data, clips),
        [
            ("funnel", "What is left", sections.funnel_section(steps, clips)),
            ("kept", "Kept clips", sections.kept_section(clips)),
            ("buckets", "Buckets", sections.buckets_section(predicted)),
            ("filters", "Filters", sections.filters_section(steps, clips, sheets, config)),
            ("scores", "Other scores", sections.scores_section(clips, columns)),
            ("duplicates", "Duplicates", sections.duplicates_section(pairs, clips, sheets)),
            ("errors", "Errors", sections.errors_section(data.failures)),
            ("time", "Time", sections.work_section(data.work, data.seconds)),
        ],
    )


def scores_of(data: ReportData) -> list[str]:
    """Columns that pluggable scorers wrote: each has the hash of its model beside it."""
    names = data.clips.column_names
    return [name for name in names if f"{name}_model" in names]
