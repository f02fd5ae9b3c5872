"""Which code this is, also where there is no git: what runs is compared, not what was committed."""

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("acceleration", "opensora", "scripts")


@cache
def code_digest(root: Path = ROOT) -> str:
    """12 hex digits that change with any source file of the packages that run."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]
