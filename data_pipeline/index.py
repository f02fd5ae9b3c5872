"""Folder of clips and stills -> clip table.

    python -m data_pipeline.index DIR --out table.csv [--captions captions.csv]

Captions come from a csv with columns path,text (paths relative to that csv; DIR/captions.csv or the one in the folder
above is found by itself), else from a text file beside the clip (a.txt or a.mp4.txt). What cannot be used is counted
by reason on the screen and listed in OUT.left_out.csv.
"""

import csv
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from opensora.datasets.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeError, MediaInfo, probe
from opensora.utils.arguments import Parser, place, whole
from opensora.utils.command import call
from opensora.utils.errors import UserError
from opensora.utils.signals import stopped_in_one_line

MAX_WORKERS = 1024
COLUMNS = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps")


def index_folder(folder: Path, out: Path, captions: Path | None = None, workers: int = 0) -> tuple[int, Counter[str]]:
    """Write the clip table of a folder, sorted by path.

    Paths in the table are relative to it where the clip lies below the table's folder, absolute elsewhere.

    Returns:
        (rows written, files left out by reason).

    Raises:
        UserError: no folder, a captions file that cannot be used, or nothing to write.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = _media_files(folder)
    if not files:
        raise UserError(
            f"{folder}: no video or image in it (looked for {' '.join((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))})"
        )
    known = _read_captions(captions or _find_captions(folder))
    rows: list[dict[str, object]] = []
    left_out: list[tuple[Path, str, str]] = []
    for file, found in zip(files, _probe_all(files, workers), strict=True):
        caption = known.get(file.resolve()) or _caption_beside(file)
        if isinstance(found, str):
            left_out.append((file, "cannot be read", found))
        elif not caption:
            left_out.append((file, "no caption", "not in a captions file, and no text file beside it"))
        else:
            rows.append(_row(_table_path(file, out), caption, found))
    counts = Counter(reason for _, reason, _ in left_out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out.with_name(f"{out.name}.left_out.csv"), ("path", "reason", "detail"), left_out)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise UserError(f"{folder}: none of {len(files)} files can be used ({reasons}); see {out}.left_out.csv")
    _write(out, COLUMNS, [tuple(row[name] for name in COLUMNS) for row in rows])
    return len(rows), counts


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return call(_main, argv)


def _main(argv: list[str]) -> None:
    parser = Parser(description="Make a clip table from a folder of videos and images.")
    parser.add_argument("folder", type=place)
    parser.add_argument("--out", type=place, required=True, help="csv to write")
    parser.add_argument("--captions", type=place, help="csv with columns path,text")
    parser.add_argument("--workers", type=whole(0, MAX_WORKERS), default=0, help="processes; 0: one per core")
    args = parser.parse_args(argv)
    count, left_out = index_folder(args.folder, args.out, args.captions, args.workers)
    print(f"{args.out}: {count} rows")
    for reason, number in left_out.items():
        print(f"left out {number}: {reason} (listed in {args.out}.left_out.csv)")


def _media_files(folder: Path) -> list[Path]:
    suffixes = {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES}
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def _probe_all(files: list[Path], workers: int) -> list[MediaInfo | str]:
    processes = min(workers or os.cpu_count() or 1, len(files))
    with ProcessPoolExecutor(processes) as pool:
        chunk = max(1, min(64, len(files) // (4 * processes)))
        results = pool.map(_probe, map(str, files), chunksize=chunk)
        return list(tqdm(results, total=len(files), desc="probing", unit="file", disable=None))


def _probe(path: str) -> MediaInfo | str:
    """What the file holds, or why it cannot be read."""
    try:
        return probe(path)
    except DecodeError as error:
        return error.cause


def _find_captions(folder: Path) -> Path | None:
    places = (folder / "captions.csv", folder.resolve().parent / "captions.csv")
    return next((path for path in places if path.is_file()), None)


def _read_captions(path: Path | None) -> dict[Path, str]:
    """Caption by resolved path; nothing without a file."""
    if path is None:
        return {}
    if not path.is_file():
        raise UserError(f"{path}: no such captions file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            missing = [name for name in ("path", "text") if name not in names]
            if missing:
                raise UserError(f"{path}: column {missing[0]!r} is missing; it has {', '.join(names) or 'none'}")
            return {(path.parent / row["path"]).resolve(): (row["text"] or "").strip() for row in reader}
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}), save it again as UTF-8") from error


def _caption_beside(file: Path) -> str:
    for path in (file.with_suffix(".txt"), file.with_name(f"{file.name}.txt")):
        if path.is_file():
            return path.read_text(encoding="utf-8-sig", errors="replace").strip()
    return ""


def _table_path(file: Path, out: Path) -> str:
    absolute, home = Path(os.path.abspath(file)), Path(os.path.abspath(out)).parent
    return str(absolute.relative_to(home)) if absolute.is_relative_to(home) else str(absolute)


def _row(path: str, caption: str, info: MediaInfo) -> dict[str, object]:
    return {
        "path": path,
        "text": caption,
        "num_frames": info.num_frames,
        "height": info.height,
        "width": info.width,
        "aspect_ratio": round(info.height / info.width, 6),
        "resolution": info.height * info.width,
        "fps": "" if info.fps is None else round(info.fps, 6),
    }


def _write(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    with stopped_in_one_line():
        sys.exit(main())
