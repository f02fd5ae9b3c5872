"""What to sample: one prompt, several, or a table."""

import csv
from dataclasses import dataclass
from pathlib import Path

from opensora.config import SampleConfig
from opensora.utils.errors import UserError

COLUMNS = ("text", "name", "neg", "ref")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to make."""

    text: str
    neg: str
    name: str  # of the file, without suffix
    seed: int


def read_jobs(cfg: SampleConfig) -> list[Job]:
    """Every prompt ``num_sample`` times, with seeds seed, seed+1, ...; names do not collide.

    Raises:
        UserError: no prompt, or a table that cannot be read.
    """
    rows = [{"text": text} for text in ([cfg.prompt] if cfg.prompt is not None else []) + list(cfg.prompts)]
    stem = "sample"
    if cfg.prompt_csv is not None:
        rows += _read_table(Path(cfg.prompt_csv))
        stem = Path(cfg.prompt_csv).stem
    if not rows:
        raise UserError("prompt: missing; give --prompt TEXT, prompts=[TEXT, ...] or prompt_csv=FILE")
    jobs = []
    for index, row in enumerate(rows):
        name = row.get("name") or f"{stem}_{index:04d}"
        for k in range(cfg.num_sample):
            suffix = f"_{k}" if cfg.num_sample > 1 else ""
            seed = cfg.sampling.seed + k
            jobs.append(Job(text=row["text"], neg=row.get("neg") or "", name=name + suffix, seed=seed))
    names = [job.name for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{cfg.prompt_csv}: name {twice!r} stands for two clips; names must differ")
    return jobs


def _read_table(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"prompt_csv={path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"prompt_csv={path}: the table is empty; it needs a header with the column text, and rows")
    if "text" not in rows[0]:
        raise UserError(f"prompt_csv={path}: no column text; found {', '.join(map(str, rows[0]))}")
    for number, row in enumerate(rows, start=2):
        if not row["text"]:
            raise UserError(f"prompt_csv={path}: line {number} has no text")
        if row.get("ref"):
            raise UserError(f"prompt_csv={path}: line {number} has a ref; only text to video can be sampled")
        if set(row.get("name") or "") & set("/\\\0"):
            raise UserError(f"prompt_csv={path}: line {number} name {row['name']!r} must be a file name, not a path")
    return [{key: row[key] for key in COLUMNS if row.get(key)} for row in rows]
