"""The caption of every file: from a captions file, or from a text beside it. Nothing in them is replaced or guessed."""

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from opensora.utils.errors import UserError
from opensora.utils.files.user_files import MAX_FIELD, absence, read_csv, read_text

NO_VALUE = ("", "nan", "NaN")  # what the reader of clip tables takes for an empty field


@dataclass(frozen=True)
class Caption:
    """A text to train with; or, where ``reason`` is given, why there is none."""

    text: str = ""
    reason: str = ""
    detail: str = ""


@dataclass
class CaptionsFile:
    """A csv with the columns path,text; paths relative to it."""

    path: Path
    rows: dict[str, tuple[str, int, str]] = field(default_factory=dict)  # by real path: as written, line, text
    composed: dict[str, str] = field(default_factory=dict)  # real path by its composed form, see ``of``

    def add(self, real: str, row: tuple[str, int, str]) -> tuple[str, int, str]:
        """The first row of this file."""
        self.composed.setdefault(unicodedata.normalize("NFC", real), real)
        return self.rows.setdefault(real, row)

    def of(self, file: Path) -> tuple[str, int, str] | None:
        """The row of a file: by its name as it is, else by the same letters. File systems of Apple, and archives made
        there, write an accent as a character of its own, where a table has one character for both."""
        return self.rows.get(self._named(os.path.realpath(file)))

    def _named(self, real: str) -> str:
        alike = self.composed.get(unicodedata.normalize("NFC", real), real)
        return real if real in self.rows or os.path.lexists(alike) else alike

    def unused(self, used: Iterable[str]) -> list[str]:
        """Paths, as written, of rows that none of these real paths is."""
        named = {self._named(real) for real in used}
        return [written for real, (written, _, _) in self.rows.items() if real not in named]


def find_captions(folder: Path) -> Path | None:
    """The captions file that is used where none is named."""
    places = (folder / "captions.csv", folder.resolve().parent / "captions.csv")
    return next((path for path in places if path.is_file()), None)


def read_captions(path: Path) -> CaptionsFile:
    """
    Raises:
        UserError: it cannot be read as such, a row has no path, or two rows give one file different texts.
    """
    if reason := absence(path, "captions file"):
        raise UserError(f"{path}: {reason}")
    captions = CaptionsFile(path)
    for line, row in read_csv(path, ("path", "text")):
        if not row["path"].strip():
            raise UserError(f"{path} line {line} has no path; write one, or take the row out")
        text = row["text"].strip()
        real = os.path.realpath(path.parent / row["path"])
        before = captions.add(real, (row["path"], line, text))
        if before[2] != text:
            raise UserError(f"{path} line {line}: {row['path']!r} has another text in line {before[1]}; keep one")
    return captions


class Texts:
    """The text files of a folder tree, found by the files that they may be beside: a.txt or a.mp4.txt of a.mp4."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._by_name = {path.with_suffix(""): path for path in paths if path.suffix.lower() == ".txt"}

    def beside(self, file: Path) -> list[Path]:
        """Those that may hold its caption, the first one first."""
        found = (self._by_name.get(file.with_suffix("")), self._by_name.get(file))
        return [path for path in found if path is not None and path != file]


def caption_of(file: Path, known: CaptionsFile | None, texts: Texts) -> Caption:
    """Of the captions file if it has one, else of the first text beside the file that is not empty."""
    faults: list[Caption] = []
    if known is not None and (row := known.of(file)) is not None:
        found = judged(row[2], f"{known.path.name} line {row[1]}")
        if not found.reason:
            return found
        faults.append(found)
    for path in texts.beside(file):
        try:
            found = judged(read_text(path, path.name).strip(), path.name)
        except UserError as error:
            found = Caption(reason="caption cannot be read", detail=str(error))
        if not found.reason:
            return found
        faults.append(found)
    missing = Caption(reason="no caption", detail="not in a captions file, and no text file beside it")
    return next(iter(sorted(faults, key=lambda fault: fault.reason == "no caption")), missing)


def judged(text: str, name: str) -> Caption:
    """The text, or what is wrong with it; ``name``: how messages call where it is from."""
    size = len(text.encode())
    if not text:
        return Caption(reason="no caption", detail=f"{name} is empty")
    if text in NO_VALUE:
        return Caption(reason="no caption", detail=f"{name} says {text!r}, which tables write for no value")
    if "\ufffd" in text:
        detail = f"{name} holds U+FFFD, the mark of characters that a conversion has lost; write it again"
        return Caption(reason="caption cannot be read", detail=detail)
    if size > MAX_FIELD:
        detail = f"{name} has {size} bytes, a caption may have at most {MAX_FIELD}"
        return Caption(reason="caption too long", detail=detail)
    return Caption(text)
