"""What to sample, and what the files are called: one prompt, several, or a table of them.

Every clip has a file name of its own, on any file system: names that differ in case or in the way Unicode writes the
same letters count as the same. A name that is there already gets ``_1``, ``_2``, ..., and so do further clips of the
same prompt: ``cat``, ``cat_1``.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensora.config.run import SampleConfig
from opensora.inference.opensora_1x.prompts import split_json, split_prompt
from opensora.sampling.options import SamplingOption
from opensora.utils.errors import UserError
from opensora.utils.files.parquet_rows import read_parquet
from opensora.utils.files.untrusted import short
from opensora.utils.files.user_files import absence, read_csv, read_text
from opensora.utils.names import name_problem
from opensora.utils.prompt_suffix import published_suffix, with_suffix

SHEET = "contact_sheet"  # a file beside the clips, so no clip is called so
ONE_PROMPT = "prompt"  # what clips of --prompt are called, as by the family, which makes a table of that name of it
COLUMNS = ("name", "neg", "ref", "mask_strategy")  # that a table may have beside text
MAX_PROMPT = 100_000  # characters; text encoders read a few hundred words
SUFFIX = ".mp4"  # .png and .txt are as long
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to make."""

    text: str
    neg: str
    ref: str = ""  # files of its references, joined by ";"; empty: none
    strategy: str = ""  # which frames of them go where, see ``conditioning.placed_frames``
    name: str  # of the file, without suffix
    seed: int
    row: int  # which prompt, from 0
    wanted: str  # what the prompt's clips were to be called, before anything else was in the way
    number: int | None  # of a prompt without a name of its own, which is called ``wanted`` and this
    copy: int | None  # which of several clips of the same prompt
    place: str = ""  # where the prompt stands, as "prompt_csv=a.csv line 3", for messages; empty: on the command line
    digits: int = 4  # of ``number``, or more
    joint: str = "_"  # what stands between a name and the number of its clip; with another one the first has it too

    def called(self, base: str) -> str:
        """The file's name where the prompt's is ``base``."""
        plain = self.copy is None or (self.copy == 0 and self.joint == "_")
        return base if plain else f"{base}{self.joint}{self.copy}"


def read_jobs(cfg: SampleConfig) -> list[Job]:
    """Every prompt ``num_sample`` times, with seeds seed, seed+1, ...; names do not collide.

    Prompts are numbered from the first of all, whichever of them ``start_index`` and ``end_index`` choose.

    Raises:
        UserError: no prompt, a table that cannot be read, or a name that no file can have.
    """
    prompts = ([cfg.prompt] if cfg.prompt is not None else []) + list(cfg.prompts)
    rows = [{"text": _checked(text, "prompt"), "ref": cfg.ref or ""} for text in prompts]
    stem = "sample" if cfg.prompts else ONE_PROMPT
    if cfg.prompt_csv is not None:
        path = Path(cfg.prompt_csv)
        if reason := absence(path, "file"):
            raise UserError(f"prompt_csv={path}: {reason}")
        rows += _read_lines(path) if path.suffix.lower() == ".txt" else _read_table(path)
        stem = _safe_stem(path.stem)
    if not rows:
        raise UserError("prompt: missing; give --prompt TEXT, prompts=[TEXT, ...] or prompt_csv=FILE")
    numbered = list(enumerate(rows))[cfg.start_index : cfg.end_index]
    if not numbered:
        raise UserError(f"start_index={cfg.start_index}: must be below the number of prompts, {len(rows)}")
    if cfg.goes_on:
        numbered = _with_references(cfg, numbered, len(rows))
    jobs = [_job(cfg, row, index, stem, k) for index, row in numbered for k in range(cfg.num_sample)]
    return with_names(jobs)


@contextmanager
def told_of(job: Job) -> Iterator[None]:
    """Errors of the block begin with the place that a clip's prompt is from."""
    try:
        yield
    except UserError as error:
        raise (UserError(f"{job.place}: {error}") if job.place else error) from None


def _with_references(
    cfg: SampleConfig, rows: Sequence[tuple[int, dict[str, str]]], count: int
) -> list[tuple[int, dict[str, str]]]:
    """Rows with what the job lists for every prompt, or what JSON behind a prompt says in its place.

    Args:
        rows: those that are sampled, with their numbers among ``count``; lists are of these, or of all.

    Raises:
        UserError: a list of another length, JSON that cannot be read, or parts of a prompt that are none.
    """
    found = []
    for place, (index, row) in enumerate(rows):
        changed = dict(row)
        for key, name, entries in (
            ("reference_path", "ref", cfg.reference_path),
            ("mask_strategy", "mask_strategy", cfg.mask_strategy),
            ("neg_prompts", "neg", cfg.neg_prompts),
        ):
            if entries and len(entries) not in (count, len(rows)):
                raise UserError(f"{key}: {len(entries)} entries for {count} prompts; give one for each, null for none")
            if entries:
                changed[name] = entries[index if len(entries) == count else place] or ""
        folder = Path(cfg.prompt_csv).parent if cfg.prompt_csv and row.get("place") else Path(".")
        try:
            changed["text"], told = split_json(row["text"], cfg.release) if cfg.release else (row["text"], {})
            split_prompt(changed["text"])
        except ValueError as error:
            raise UserError(f"{row.get('place') or f'prompt {index}'}: {error}") from None
        changed["ref"] = located(told.get("reference_path", changed.get("ref", "")), folder)
        changed["mask_strategy"] = told.get("mask_strategy", changed.get("mask_strategy", ""))
        found.append((index, changed))
    return found


def jobs_of_batch(
    cfg: SampleConfig, batch: Mapping[str, Any], clips: int, *, copy: int = 0, start_index: int = 0
) -> list[Job]:
    """What the clips of a script's batch are called.

    Args:
        batch: text, and optionally neg, ref, name, and index (the prompts' numbers), one of each per clip.
        copy: which of several clips of the same prompts.
        start_index: number of the first prompt, where the batch has no numbers.

    Raises:
        UserError: a name that no file can have.
    """
    stem = _safe_stem(Path(cfg.prompt_csv).stem) if cfg.prompt_csv else ONE_PROMPT
    jobs = []
    for clip in range(clips):
        row = {key: batch[key][clip] or "" for key in ("text", "neg", "ref", "name") if batch.get(key) is not None}
        if problem := row.get("name") and name_problem(row["name"], SUFFIX):
            raise UserError(f"batch.name: {short(repr(row['name']), 40)} {problem}")
        row["ref"] = ""
        index = int(batch["index"][clip]) if batch.get("index") is not None else start_index + clip
        job = _job(cfg, row, index, stem, copy)
        jobs.append(replace(job, row=clip, copy=job.copy if copy == 0 else copy))
    return jobs


def _job(cfg: SampleConfig, row: dict[str, str], index: int, stem: str, copy: int) -> Job:
    """Clip ``copy`` of a prompt."""
    named = row.get("name", "")
    if cfg.prompt_as_path:
        named = _portable(row["text"].strip("." if cfg.release is None else ". "))
    job = Job(
        text=row["text"],
        neg=row.get("neg") or cfg.neg,
        ref=row.get("ref", ""),
        strategy=row.get("mask_strategy", ""),
        name="",
        seed=cfg.sampling.seed + copy,
        row=index,
        wanted=f"{cfg.save_prefix}{named or stem}",
        number=None if named else index,
        copy=copy if cfg.num_sample > 1 or cfg.prompt_as_path else None,
        place=row.get("place", ""),
        joint="-" if cfg.prompt_as_path else "_",
    )
    return job if cfg.release is None else _called_by_release(cfg, job, named)


def _called_by_release(cfg: SampleConfig, job: Job, named: str) -> Job:
    """A job's file under the name that Open-Sora 1.x gives it: ``sample_0003``, of several clips of a prompt
    ``sample_0003-1``."""
    return replace(
        job,
        wanted=f"{cfg.save_prefix}{named}" if named else cfg.save_prefix.removesuffix("_") or "sample",
        copy=job.copy if cfg.num_sample > 1 else None,
        digits=1 if cfg.release in ("1.0", "1.1") else 4,
        joint="-",
    )


def with_names(jobs: Sequence[Job], taken: Collection[str] = ()) -> list[Job]:
    """The jobs with file names that differ from each other and from those in ``taken``.

    Names that the user gave come first and stay as they are where they can, else ``_1``, ``_2``, ... is added. Prompts
    without a name have their number, or follow the highest number in ``taken``.

    Args:
        jobs: in the order of their prompts.
        taken: names of files that are there, without suffix.

    Raises:
        UserError: a name that becomes too long for a file.
    """
    used = {_key(name) for name in (*taken, SHEET)}
    ahead = _shifts(jobs, used)
    clips: dict[int, list[Job]] = {}
    for job in jobs:
        clips.setdefault(job.row, []).append(job)
    tried: dict[str, int] = {}
    names: dict[tuple[int, int | None], str] = {}
    for row in _in_turn([of_row[0] for of_row in clips.values()]):
        job = clips[row][0]
        base = job.wanted if job.number is None else f"{job.wanted}_{ahead[job.wanted] + job.number:0{job.digits}d}"
        for candidate in _candidates(base, tried):
            found = {job.copy: job.called(candidate) for job in clips[row]}
            keys = {_key(name) for name in found.values()}
            if not keys & used:
                used |= keys
                names |= {(row, copy): _fitting(name) for copy, name in found.items()}
                break
    return [replace(job, name=names[job.row, job.copy]) for job in jobs]


def final_prompt(
    text: str, option: SamplingOption, *, suffix: bool, published: bool = False, motion: int | None = None
) -> str:
    """What the model is given for a prompt.

    Args:
        suffix: whether training told the model frame rate and motion score, in words after the caption.
        published: these words as the family's own sampler writes them.
        motion: a score of this prompt's own.
    """
    if not suffix:
        return text
    rule = published_suffix if published else with_suffix
    return rule(
        text,
        fps=option.fps if option.num_frames > 1 else None,
        motion=option.motion_score if motion is None else motion,
        camera=option.camera_motion,
    )


def _in_turn(jobs: Sequence[Job]) -> list[int]:
    """Rows in the order in which they choose: names that were given, their repetitions, numbered ones."""
    seen: set[str] = set()
    turns: list[tuple[int, int]] = []
    for job in jobs:
        key = _key(job.wanted)
        turns.append((2 if job.number is not None else int(key in seen), job.row))
        seen.add(key)
    return [row for _, row in sorted(turns)]


def _candidates(base: str, tried: dict[str, int]) -> Iterator[str]:
    """``base``, ``base_1``, ``base_2``, ...; a second call with the same name goes on where the first one stopped."""
    key = _key(base)
    while True:
        number = tried.get(key, 0)
        tried[key] = number + 1
        yield f"{base}_{number}" if number else base


def _key(name: str) -> str:
    """Equal for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _shifts(jobs: Sequence[Job], used: Collection[str]) -> dict[str, int]:
    """What to add to the numbers of each stem so that they follow the highest number of a file called so."""
    lowest: dict[str, int] = {}
    digits = {job.wanted: job.digits for job in jobs}
    for job in jobs:
        if job.number is not None:
            lowest[job.wanted] = min(job.number, lowest.get(job.wanted, job.number))
    shifts = {}
    for stem, number in lowest.items():
        numbered = re.compile(rf"{re.escape(_key(stem))}_([0-9]{{{digits[stem]},18}})([_-][0-9]+)*")
        found = [int(match[1]) for name in used if (match := numbered.fullmatch(name))]
        shifts[stem] = max(0, max(found, default=-1) + 1 - number)
    return shifts


def _fitting(name: str) -> str:
    if problem := name_problem(name, SUFFIX):
        raise UserError(f"name {short(repr(name), 40)} {problem}")
    return name


def _read_table(path: Path) -> list[dict[str, str]]:
    name = f"prompt_csv={path}"
    rows = []
    parquet = path.suffix.lower() == ".parquet"
    for number, row in (read_parquet if parquet else read_csv)(path, ["text"], name, optional=COLUMNS):
        place = f"{name} {'row' if parquet else 'line'} {number}"
        if not row["text"].strip():
            raise UserError(f"{place} has no text")
        kept = {"text": _checked(row["text"], place), "neg": _checked(row.get("neg", ""), f"{place} neg")}
        kept |= {"ref": located(row.get("ref", ""), path.parent), "place": place}
        kept |= {"mask_strategy": row.get("mask_strategy", "").strip()}
        given = row.get("name", "").strip()
        if problem := given and name_problem(given, SUFFIX):
            raise UserError(f"{place}: name {short(repr(given), 40)} {problem}")
        rows.append(kept | ({"name": given} if given else {}))
    if not rows:
        raise UserError(f"{name}: the table is empty; it needs a header with the column text, and rows")
    return rows


def _read_lines(path: Path) -> list[dict[str, str]]:
    """A prompt per line; empty lines are passed over."""
    name = f"prompt_csv={path}"
    lines = re.split(r"\r\n|\r|\n", read_text(path, name))
    rows = [
        {"text": _checked(line, f"{name} line {i}"), "place": f"{name} line {i}"}
        for i, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{name}: the file is empty; it needs a prompt per line")
    return rows


def _checked(text: str, place: str) -> str:
    """A prompt that a text encoder can read and a .txt file can hold.

    Raises:
        UserError: it is too long, or holds what no UTF-8 text can.
    """
    if len(text) > MAX_PROMPT:
        raise UserError(f"{place}: a prompt of {len(text)} characters, must be at most {MAX_PROMPT}; shorten it")
    if _NO_TEXT.search(text):
        start = short(repr(text), 40)
        raise UserError(f"{place}: {start} is not UTF-8 text; type it again, or give it in a file as UTF-8")
    return text


def located(ref: str, folder: Path) -> str:
    """The files of a table's references: those that are not where the command runs are looked for beside the table."""
    files = [one.strip() for one in ref.split(";") if one.strip()]
    beside = [str(folder / one) if not Path(one).exists() and (folder / one).exists() else one for one in files]
    return ";".join(beside)


def _safe_stem(stem: str) -> str:
    """What the prompts of a table without names are called: its own name, as far as a clip can have it."""
    shown = _portable(stem.strip()).strip().lstrip(".-")
    return "sample" if name_problem(shown, SUFFIX) else shown


def _portable(text: str) -> str:
    """The beginning of a text, without what separates folders or lines."""
    shown = "".join("_" if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") else one for one in text)
    return shown.replace("\\", "_").replace("/", "_").encode()[:200].decode(errors="ignore")
