"""Bad clip tables through the command itself: refused before any process group, with the file and what to mend.

Kinds of wrong values are the matter of tests/unit/test_manifest.py; here are files, names of columns, and encodings.
"""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as papq
import pytest

from tests.faults.conftest import Tally
from tests.faults.test_bad_config import TABLE, config, line_of, tree

__all__ = ["config"]  # a fixture
HEADER, *ROWS = TABLE.splitlines(keepends=True)


def parquet(path: Path) -> bytes:
    papq.write_table(
        pa.table({"path": ["a.mp4"], "text": ["x"], "num_frames": [9], "height": [32], "width": [32]}), path
    )
    content = path.read_bytes()
    path.unlink()
    return content


# name -> (content of table.csv, what the line must contain)
CASES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "column missing": (HEADER.replace("text,", "") + "a.mp4,9,32,32,8\n", ("column 'text' is missing", "add 'text'")),
    "column renamed": (TABLE.replace("text,", "caption,", 1), ("rename 'caption' to 'text'?",)),
    "column misspelt": (TABLE.replace("num_frames", "num_frame"), ("rename 'num_frame' to 'num_frames'?",)),
    "column twice": (HEADER.replace("fps", "path") + "a.mp4,x,9,32,32,b.mp4\n", ("'path' is there 2 times",)),
    "a word for a number": (TABLE.replace("two,9", "two,nine"), ("row 2", "num_frames is 'nine'")),
    "no caption": (TABLE.replace("two", "NaN"), ("row 2", "text is", "write a caption")),
    "no path": (TABLE.replace("b.mp4", ""), ("row 2", "path is empty")),
    "a clip without a rate": (TABLE.replace("two,9,32,32,8", "two,9,32,32,"), ("row 2", "fps is empty")),
    "an endless clip": (TABLE.replace("two,9", "two,99999999999"), ("row 2", "num_frames is")),
    "a size beyond all": (TABLE.replace("two,9,32,", "two,9,999999,"), ("row 2", "height is", "at most 65535")),
    "a value too many": (TABLE.replace("b.mp4", "b,b.mp4"), ("cannot be read as csv", "got 7: b,b.mp4")),
    "a value too few": (TABLE.replace("two,", ""), ("cannot be read as csv", "got 5: b.mp4")),
    "a quote that does not end": (TABLE.replace("two", '"two'), ("table.csv",)),
    "two quotes that do not end": (
        "path,text,num_frames,height,width,fps\n" + 2 * 'a.mp4,"a cat,9,32,32,8\n',
        ("table.csv line", "text behind a closing quote"),
    ),
    "a quote in a column that is not read": (
        "path,text,num_frames,height,width,fps,more\n" + 2 * 'a.mp4,a cat,9,32,32,8,"x\n',
        ("table.csv line",),
    ),
    "a caption of 20 MB": (TABLE.replace("two", "x" * 20_000_000), ("row 2", "text is 'xxx", "at most 1048576 bytes")),
    "UTF-16": (TABLE.encode("utf-16"), ("table.csv",)),
    "Latin-1": (TABLE.replace("two", "zw\xf6lf").encode("latin-1"), ("cannot be read as csv", "UTF-8")),
    "semicolons": (TABLE.replace(",", ";"), ("is missing",)),
    "only a header": (HEADER, ("the table has no rows",)),
    "empty": ("", ("the file is empty",)),
    "zero bytes": (bytes(4096), ("table.csv",)),
    "parquet by another name": (parquet, ("table.csv",)),  # type: ignore[dict-item]
}


def write(path: Path, content: str | bytes | Callable[[Path], bytes]) -> None:
    data = content(path) if callable(content) else content
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def test_bad_tables(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    folder, wrong = config.parent, []
    before = tree(folder)
    for case, (content, expected) in CASES.items():
        write(folder / "table.csv", content)
        said = line_of([str(config), f"data.index={folder}/index"], 2, capsys, monkeypatch)
        if not said.startswith("error: ") or not all(word in said for word in expected) or len(said) > 600:
            wrong.append(f"{case}: {said[:600]}")
        if [name for name in tree(folder) if not name.startswith("index/")] != before:
            wrong.append(f"{case}: wrote {tree(folder)}")
    tally("bad tables: exit 2, one line, file and row", len(CASES) - len(wrong), len(CASES))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("how", ["cut short", "zeros in it", "a column of lists"])
def test_bad_parquet(
    how: str, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    path = config.parent / "table.parquet"
    columns = {"path": ["a.mp4"], "text": ["x"], "num_frames": [9], "height": [32], "width": [32], "fps": [8.0]}
    papq.write_table(pa.table(columns | ({"height": [[32]]} if how == "a column of lists" else {})), path)
    content = path.read_bytes()
    if how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "zeros in it":
        path.write_bytes(content[:8] + bytes(200) + content[208:])
    said = line_of([str(config), f"data.index={config.parent}/index", f"data.table={path}"], 2, capsys, monkeypatch)
    assert said.startswith("error: ") and str(path) in said, said
    tally("bad tables: exit 2, one line, file and row", 1, 1)
