"""The sources of a run and the shards they are in. A plan only grows: what was planned once keeps its shard."""

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from data_pipeline.outputs import digest_of, outputs_of, read_done
from data_pipeline.walk import LeftOut, walk
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parse_json
from opensora.utils.files.user_files import absence, read_text, write_whole

PLAN = "plan.json"
FIRST_STAGE = "probe"  # which every source has a row of
_LISTS = (".txt", ".list")
_SIDE_FILES = (".txt", ".csv", ".json", ".jsonl", ".srt", ".vtt", ".md", ".parquet")  # beside videos, and none


class PlanDamaged(UserError):
    """A plan that is not as it was written."""


@dataclass(frozen=True)
class SourceFile:
    """A file of the listing."""

    name: str  # as tables name it: relative to the folder of the sources where it lies in it
    file: str  # absolute
    size: int
    mtime_ns: int

    @property
    def weight(self) -> int:
        """How long it takes beside others: bytes, of which every file has one."""
        return max(1, self.size)

    def changed(self) -> str:
        """What became of the file since it was listed; empty: nothing. Times are compared in seconds, as not every
        machine that sees a folder sees parts of them."""
        try:
            found = os.stat(self.file)
        except OSError:
            return "" if self.size < 0 else "gone"
        same = found.st_size == self.size and found.st_mtime_ns // 10**9 == self.mtime_ns // 10**9
        return "" if same else "changed"


@dataclass(frozen=True)
class Shard:
    """Sources that are worked on together."""

    name: str
    sources: tuple[SourceFile, ...]

    @property
    def weight(self) -> int:
        return sum(source.weight for source in self.sources)


@dataclass(frozen=True)
class Plan:
    """All shards of a run, and what of the listing is in none."""

    shards: tuple[Shard, ...]
    left_out: tuple[LeftOut, ...] = ()
    shard_size: int = 0  # that its first shards were made with; 0: not known

    @property
    def sources(self) -> list[SourceFile]:
        return [source for shard in self.shards for source in shard.sources]


def list_sources(source: str | Sequence[str]) -> tuple[list[SourceFile], list[LeftOut]]:
    """Files behind ``source=``: a folder (with all below it), a file, a glob, a text file with one path per line, or a
    list of these.

    Raises:
        UserError: nothing is there.
    """
    names = [source] if isinstance(source, str) else list(source)
    if not names or not all(names):  # "" would be the folder that the command is called in
        raise UserError("source: an empty name; give the folder that holds the videos, as source=DIR")
    found, left_out = dict[str, SourceFile](), list[LeftOut]()
    for name in names:
        for file, root in _expanded(name, left_out):
            entry = _entry(file, root)
            found.setdefault(entry.file, entry)
    if not found:
        raise UserError(f"source={names[0]}: no file in it that could be a video; name the folder that holds them")
    return sorted(found.values(), key=lambda entry: os.fsencode(entry.name)), left_out


def _expanded(name: str, left_out: list[LeftOut]) -> Iterable[tuple[Path, Path | None]]:
    """(file, the folder that its name starts at)."""
    path = Path(name)
    if path.is_dir():
        files, others = walk(path, set())
        left_out += others
        return [(entry.path, path) for entry in files if entry.path.suffix.lower() not in _SIDE_FILES]
    if path.is_file() and path.suffix.lower() in _LISTS:
        lines = [line.strip() for line in read_text(path).splitlines()]
        listed = [(path.parent / line, None) for line in lines if line and not line.startswith("#")]
        if not listed:
            raise UserError(f"source={name}: names no file; write one path per line, or give the folder itself")
        return listed
    if path.is_file():
        return [(path, path.parent)]
    matches = _below(path) if "**" in path.parts else [Path(match) for match in sorted(glob.glob(name))]
    if not matches and glob.has_magic(name):
        raise UserError(f"source={name}: no file matches this pattern, as seen from {os.getcwd()}; ** is for all below")
    if not matches:
        raise UserError(f"source={name}: {absence(path, 'folder or file') or 'no such folder or file'}")
    return [(match, None) for match in matches if match.is_file()]


def _below(pattern: Path) -> list[Path]:
    """Files of a pattern with ``**``. Links to folders are followed, each folder is read once: they may go round in a
    circle, or in several, which glob follows forty times, and in all orders."""
    fixed = list(takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    root, rest = Path(*fixed), pattern.parts[len(fixed) :]
    each = [r"(?:[^/]+/)*" if part == "**" else _of_name(part) + "/" for part in rest]
    wanted = re.compile("".join(each).removesuffix("/"))
    files, _ = walk(root, set()) if root.is_dir() else ([], [])
    return [entry.path for entry in files if wanted.fullmatch(entry.path.relative_to(root).as_posix())]


def _of_name(part: str) -> str:
    """A pattern of one name, as a regular expression that passes no /."""
    pieces = re.split(r"(\[!?\]?[^]]*\]|[*?])", part)
    return "".join({"*": "[^/]*", "?": "[^/]"}.get(piece) or _of_piece(piece) for piece in pieces)


def _of_piece(piece: str) -> str:
    """Text as it stands, or a set of characters."""
    if not piece.startswith("["):
        return re.escape(piece)
    inside = piece[1:-1].replace("\\", "\\\\").replace("[", "\\[")
    return f"[{'^' + inside[1:] if inside.startswith('!') else inside}]"


def _entry(file: Path, root: Path | None) -> SourceFile:
    """Of a file that is gone the size is -1: it becomes a row that says so."""
    absolute = os.path.abspath(file)
    name = os.path.relpath(absolute, os.path.abspath(root)) if root is not None else absolute
    try:
        found = os.stat(absolute)
    except OSError:
        return SourceFile(_printable(name), absolute, -1, 0)
    return SourceFile(_printable(name), absolute, found.st_size, found.st_mtime_ns)


def _printable(name: str) -> str:
    """As tables can hold it: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def make_plan(out: Path, source: str | Sequence[str], shard_size: int) -> Plan:
    """The plan of before, with sources that are new in new shards, and sizes and times as they are now.

    One that is damaged is put aside and made anew, with the shards that there are outputs of.
    """
    listed, left_out = list_sources(source)
    now = {entry.name: entry for entry in listed}
    try:
        known = read_plan(out)
    except PlanDamaged:
        known = _from_outputs(out, now)
        announce(f"{out / PLAN} is damaged: it is put aside, and the sources are listed anew", every_rank=True)
        with contextlib.suppress(OSError):
            (out / PLAN).replace((out / PLAN).with_suffix(".damaged"))
    before = {entry.name for entry in known.sources} if known else set()
    shards = [_as_now(shard, now) for shard in known.shards] if known else []
    new = sorted((entry for entry in listed if entry.name not in before), key=lambda entry: _order(entry.name))
    for first in range(0, len(new), shard_size):
        shards.append(Shard(f"{len(shards):06d}", tuple(new[first : first + shard_size])))
    before_size = known.shard_size or max(shard_size, *(len(shard.sources) for shard in known.shards)) if known else 0
    return Plan(tuple(shards), tuple(left_out), before_size or shard_size)


def _from_outputs(out: Path, now: Mapping[str, SourceFile]) -> Plan | None:
    """The shards that a plan had, by the outputs of the first stage; from the first one on that cannot be told, its
    sources are new ones."""
    shards = list[Shard]()
    while paths := outputs_of(out / FIRST_STAGE, f"{len(shards):06d}"):
        names = [done.source for done in read_done(paths[0])]
        if not names or not all(name in now for name in names):
            break
        shards.append(Shard(f"{len(shards):06d}", tuple(now[name] for name in names)))
    return Plan(tuple(shards)) if shards else None


def _as_now(shard: Shard, now: dict[str, SourceFile]) -> Shard:
    """A source that is no longer listed keeps what is known of it: what was made of it stays in the table."""
    return replace(shard, sources=tuple(now.get(entry.name, entry) for entry in shard.sources))


def _order(name: str) -> str:
    """Neighbours in a folder are often alike, and as long as each other: shards mix them."""
    return hashlib.sha1(os.fsencode(name)).hexdigest()


def save_plan(out: Path, plan: Plan) -> None:
    """Raises: UserError: it cannot be written."""
    shards = [{"name": shard.name, "sources": [asdict(entry) for entry in shard.sources]} for shard in plan.shards]
    content: dict[str, Any] = {"shards": shards, "shard_size": plan.shard_size}
    content["digest"] = digest_of(content)
    write_whole(out / PLAN, lambda file: json.dump(content, file, indent=0))


def read_plan(out: Path) -> Plan | None:
    """None: there is none yet.

    Raises:
        PlanDamaged: it is not as it was written.
    """
    path = out / PLAN
    if not path.exists():
        return None

    def refuse(reason: str) -> UserError:
        return PlanDamaged(f"{path}: {reason}; the same command with --until plan lists the sources anew")

    content = parse_json(path.read_bytes(), refuse)
    try:
        digest = content.pop("digest", None)
        if digest != digest_of(content) and content.keys() != {"shards"}:  # an older one has nothing else
            raise refuse("not as it was written")
        shards = [
            Shard(shard["name"], tuple(SourceFile(**entry) for entry in shard["sources"]))
            for shard in content["shards"]
        ]
        return Plan(tuple(shards), shard_size=content.get("shard_size", 0))
    except (AttributeError, TypeError, KeyError) as error:
        raise refuse("not as it was written") from error
