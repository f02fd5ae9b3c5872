"""Folder of clips and stills -> clip table.

    python -m data_pipeline.index DIR --out table.csv [--captions captions.csv] [--workers N] [--timeout SECONDS]

Captions come from a csv with columns path,text (paths relative to that csv; DIR/captions.csv or the one in the folder
above is found by itself), else from a text file beside the clip (a.txt or a.mp4.txt). Links are followed; what a file
is its content says. What becomes no row is counted by reason on the screen and listed in OUT.left_out.csv: rows and
what is left out are all files that were seen, but for captions.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

import argparse
import csv
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from tqdm import tqdm

from data_pipeline.captions import NO_VALUE, Caption, CaptionsFile, Texts, caption_of, find_captions, read_captions
from data_pipeline.walk import Entry, LeftOut, by_identity, walk
from opensora.datasets.decode.api import DecodeError, MediaInfo, sniff
from opensora.datasets.decode.process import DecoderProcess, ReaderClosed
from opensora.utils.command_line.arguments import Parser, number, place, whole
from opensora.utils.command_line.command import call
from opensora.utils.errors import UserError, one_line
from opensora.utils.files.user_files import absence, try_output, write_whole
from opensora.utils.signal_handler import stopped_in_one_line

MAX_WORKERS = 1024
COLUMNS = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
TIMEOUT_S = 60.0  # for one file, as data.decode_timeout_s
MAX_TIMEOUT_S = 86_400.0
NO_MEDIA = "no video or image"  # the reason of a file whose content is none
_SHOWN = 3  # names in a line
_RATE = 24.0  # frames a second beyond which training takes every second frame
_RATE_ERROR = 5e-4  # by which a rate measured from rounded times may be above a multiple of it


@dataclass(frozen=True)
class Report:
    """What became of a folder."""

    rows: int
    left_out: Counter[str]  # by reason
    unmatched: tuple[str, ...] = ()  # paths of the captions file, as written, that are no file of the folder
    notes: tuple[tuple[str, str, int], ...] = ()  # (what there is to know, the first file, of how many)

    @property
    def seen(self) -> int:
        """Files of the folder, captions aside, and what else was there instead of a file."""
        return self.rows + sum(self.left_out.values())


def index_folder(
    folder: Path, out: Path, captions: Path | None = None, workers: int = 0, timeout_s: float = TIMEOUT_S
) -> tuple[int, Counter[str]]:
    """Write the clip table of a folder, sorted by path.

    Paths in the table are relative to it where the clip lies below the table's folder, absolute elsewhere.

    Returns:
        (rows written, files left out by reason).

    Raises:
        UserError: no folder, a captions file that cannot be used, a place that cannot be written, or nothing to write.
    """
    report = _index(folder, out, captions, workers, timeout_s)
    return report.rows, report.left_out


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return call(_main, argv)


def _main(argv: list[str]) -> int:
    args = _parse(argv)
    try:
        report = _index(args.folder, args.out, args.captions, args.workers or 0, args.timeout)
    except KeyboardInterrupt as stop:
        print("interrupted: the clip table was not written", file=sys.stderr)
        return 128 + int(getattr(stop, "number", signal.SIGINT))
    print(_line(f"{args.out}: {report.rows} rows of {report.seen} files"))
    for reason, count in report.left_out.items():
        print(_line(f"left out {count}: {reason} (listed in {args.out}.left_out.csv)"))
    for note, first, count in report.notes:
        others = f" and {count - 1} more" if count > 1 else ""
        print(_line(f"{first}{others}: {note}"))
    if report.unmatched:
        print(_line(_unmatched(report.unmatched)))
    return 0


def _index(folder: Path, out: Path, captions: Path | None, workers: int, timeout_s: float) -> Report:
    if reason := absence(folder, "folder"):
        raise UserError(f"{folder}: {reason}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no folder; give the one that holds the clips")
    listed = out.with_name(f"{out.name}.left_out.csv")
    for path in (out, listed):
        try_output(path, "--out")
    source = captions or find_captions(folder)
    if source is not None and not absence(source) and not absence(out) and source.samefile(out):
        raise UserError(f"--out={out}: is the captions file; name another file to write")
    known = read_captions(source) if source is not None else None
    files, left_out = walk(folder, {Path(os.path.realpath(path)) for path in (out, listed, source) if path})
    content = _Content(files, known)
    found = _probe_all([file.path for file in content.files], workers, timeout_s)
    rows, notes = content.rows(found, out)
    left_out += content.left_out
    if left_out:
        left_out.sort(key=lambda item: os.fsencode(item.path))
        written = [(_printable(item.path), item.reason, _printable(item.detail)) for item in left_out]
        write_whole(listed, lambda file: _write(file, ("path", "reason", "detail"), written))
    counts = Counter(item.reason for item in left_out)
    unmatched = tuple(known.unused(content.real)) if known is not None else ()
    report = Report(len(rows), counts, unmatched, notes)
    if not rows:
        raise UserError(_nothing(folder, listed, report))
    if not left_out:  # that of an earlier time says what is no longer so
        write_whole(listed, lambda file: _write(file, ("path", "reason", "detail"), []))
    write_whole(out, lambda file: _write(file, COLUMNS, rows))
    return report


class _Content:
    """Files of a folder with their captions, each file once; texts that are captions are none of them."""

    def __init__(self, entries: Sequence[Entry], known: CaptionsFile | None) -> None:
        texts = Texts(entry.path for entry in entries)
        others = [entry for entry in entries if entry.path.suffix.lower() != ".txt"]
        self._beside: dict[Path, list[Path]] = {entry.path: texts.beside(entry.path) for entry in others}
        used = {path for paths in self._beside.values() for path in paths}
        self.files: list[Entry] = []
        self._ways: list[list[Entry]] = []  # to each of these files
        self.captions: list[Caption] = []
        self.left_out: list[LeftOut] = []
        self.real: set[str] = set()  # paths of all files, as captions name them
        for ways in by_identity([entry for entry in entries if entry.path not in used]):
            captions = [caption_of(way.path, known, texts) for way in ways]
            # The way that has a caption, else the one without links, else the first.
            best = min(range(len(ways)), key=lambda i: (bool(captions[i].reason), ways[i].linked, i))
            self.files.append(ways[best])
            self._ways.append(ways)
            self.captions.append(captions[best])
            self.real.update(os.path.realpath(way.path) for way in ways)
            detail = f"is {ways[best].path}, which is read once"
            self.left_out += [LeftOut(way.path, "file reached twice", detail) for way in ways if way is not ways[best]]

    def rows(
        self, found: Iterable[MediaInfo | LeftOut], out: Path
    ) -> tuple[list[tuple], tuple[tuple[str, str, int], ...]]:
        """The rows of the table, in its order, and notes; the rest is ``left_out``."""
        rows: list[tuple] = []
        notes: dict[str, list[Path]] = {}
        captions_of_media: set[Path] = set()
        for file, ways, caption, facts in zip(self.files, self._ways, self.captions, found, strict=True):
            if not (isinstance(facts, LeftOut) and facts.reason == NO_MEDIA):
                captions_of_media.update(path for way in ways for path in self._beside.get(way.path, ()))
            path = _table_path(file.path, out)
            if isinstance(facts, LeftOut):
                self.left_out.append(facts)
            elif not _is_utf8(path):
                self.left_out.append(LeftOut(file.path, "file name is not UTF-8", "rename it"))
            elif caption.reason:
                self.left_out.append(LeftOut(file.path, caption.reason, caption.detail))
            else:
                rows.append(_row(path, caption.text, facts))
                if facts.note:
                    notes.setdefault(facts.note, []).append(file.path)
        all_captions = {path for paths in self._beside.values() for path in paths}
        detail = "a text file beside no video or image"
        self.left_out += [LeftOut(path, NO_MEDIA, detail) for path in sorted(all_captions - captions_of_media)]
        return rows, tuple((note, str(files[0]), len(files)) for note, files in notes.items())


def _probe_all(files: Sequence[Path], workers: int, timeout_s: float) -> list[MediaInfo | LeftOut]:
    """What every file holds. Threads take one file after the other, each with a decoding process that it alone talks
    to: one that hangs, dies or wants too much memory is replaced, and costs its file only."""
    results: list[Any] = [None] * len(files)
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    jobs, guard, probers = iter(enumerate(files)), threading.Lock(), _Probers(timeout_s)

    def work() -> None:
        try:
            with probers.one() as probe:
                while (job := _next_of(jobs, guard)) is not None:
                    results[job[0]] = probe(job[1])
                    done.put(None)
        except ReaderClosed:
            pass  # the main thread is on its way out
        except BaseException as error:
            done.put(error)

    count = min(workers or os.cpu_count() or 1, len(files))
    threads = [threading.Thread(target=work, name=f"probe-{number}", daemon=True) for number in range(count)]
    try:
        for thread in threads:
            thread.start()
        for _ in tqdm(files, desc="probing", unit="file", disable=None):
            if (error := done.get()) is not None:
                raise error
    finally:
        probers.close()
    return results


class _Probers:
    """The decoding processes of ``_probe_all``; started when a thread meets its first clip or still."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._guard = threading.Lock()
        self._processes: list[DecoderProcess] = []
        self._closed = False

    def one(self) -> "_Prober":
        return _Prober(self, self._timeout_s)

    def start(self) -> DecoderProcess:
        with self._guard:
            if self._closed:
                raise ReaderClosed
            self._processes.append(DecoderProcess())
            return self._processes[-1]

    def close(self) -> None:
        """End all of them, also those at work. May be called twice."""
        with self._guard:
            self._closed = True
        for process in self._processes:
            process.close()


class _Prober:
    """Probes files one after the other."""

    def __init__(self, probers: _Probers, timeout_s: float) -> None:
        self._probers, self._timeout_s = probers, timeout_s
        self._process: DecoderProcess | None = None

    def __enter__(self) -> "_Prober":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.close()

    def __call__(self, file: Path) -> MediaInfo | LeftOut:
        """What the file holds, or why it is left out."""
        kind = sniff(str(file))
        if kind.kind == "neither":
            return LeftOut(file, "archive" if " archive" in kind.what else NO_MEDIA, kind.what)
        if self._process is None:
            self._process = self._probers.start()
        try:
            return self._process.probe(str(file), timeout_s=self._timeout_s)
        except DecodeError as error:
            cause = error.cause.replace("data.decode_timeout_s", "--timeout")
            return LeftOut(file, "cannot be read", cause)


def _next_of(jobs: Iterator[tuple[int, Path]], guard: threading.Lock) -> tuple[int, Path] | None:
    with guard:
        return next(jobs, None)


def _nothing(folder: Path, listed: Path, report: Report) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.left_out.items())
    media = report.seen - report.left_out[NO_MEDIA] - report.left_out["archive"] - report.left_out["hidden"]
    if not media:
        found = f" ({reasons}); see {listed}" if reasons else ""
        return f"{folder}: no video or image in it{found}"
    unmatched = f"; {_unmatched(report.unmatched)}" if report.unmatched else ""
    return f"{folder}: none of {report.seen} files can be used ({reasons}); see {listed}{unmatched}"


def _unmatched(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{len(paths)} rows of the captions file are of no file here: {', '.join(paths[:_SHOWN])}{more}"


def _table_path(file: Path, out: Path) -> str:
    absolute, home = Path(os.path.abspath(file)), Path(os.path.abspath(out)).parent
    path = str(absolute.relative_to(home)) if absolute.is_relative_to(home) else str(absolute)
    return f"./{path}" if path.strip() in NO_VALUE else path  # a file may be called nan


def _is_utf8(path: str) -> bool:
    """Undecodable bytes of a name are lone surrogates in Python."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _row(path: str, caption: str, info: MediaInfo) -> tuple:
    ratio = round(info.height / info.width, 6)
    fps = "" if info.fps is None else _rate(info.fps)
    return path, caption, info.num_frames, info.height, info.width, ratio, info.height * info.width, fps


def _rate(fps: float) -> float:
    """A rate a little above 24, 48, ... is that: measured from times in whole milliseconds, and not to be halved."""
    below = max(_RATE, fps // _RATE * _RATE)
    return below if below <= fps <= below * (1 + _RATE_ERROR) else round(fps, 6)


def _write(file: IO[str], header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows(rows)


def _printable(text: str | Path) -> str:
    r"""Bytes of a file name that are no UTF-8 as \udcff."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _line(text: str) -> str:
    return one_line(_printable(text))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m data_pipeline.index",
        description="Make a clip table from a folder of videos and images.",
        allow_abbrev=False,
    )
    workers, seconds = whole(1, MAX_WORKERS), number(0.001, MAX_TIMEOUT_S)
    parser.add_argument("folder", type=place)
    parser.add_argument("--out", type=place, required=True, help="csv to write")
    parser.add_argument("--captions", type=place, help="csv with columns path,text")
    parser.add_argument("--workers", type=workers, help="decoding processes (default: one per core)")
    parser.add_argument("--timeout", type=seconds, default=TIMEOUT_S, help="seconds for one file (default: 60)")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != ".csv":
        raise UserError(f"--out={args.out}: a clip table is written as csv; let its name end in .csv")
    return args


if __name__ == "__main__":
    with stopped_in_one_line():
        sys.exit(main())
