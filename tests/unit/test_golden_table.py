"""No golden file is left out of ``python -m tests.golden_table``, and no row of it is of a file that is not there."""

from fnmatch import fnmatch
from pathlib import Path

from tests.golden_table import ROWS

# What says how others were made: versions, arguments, shapes of weights.
DESCRIPTIONS = {"v1/models", "v1/schedulers", "v1/vae"}
PATTERNS = [pattern for row in ROWS for pattern in row.file.split(", ")]


def test_every_golden_file_has_a_row(golden: Path) -> None:
    stored = {
        path.relative_to(golden).with_suffix("").as_posix()
        for folder in (golden, golden / "v1")
        for path in folder.iterdir()
        if path.suffix in (".json", ".safetensors")
    }
    found = {name for name in stored if any(fnmatch(name, pattern) for pattern in PATTERNS)}
    assert stored - found == DESCRIPTIONS
    assert {pattern for pattern in PATTERNS if not any(fnmatch(name, pattern) for name in stored)} == set()
