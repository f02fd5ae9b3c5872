"""Print what a kind of denoiser takes: ``python -m tests.model_lines [kind ...]``.

Its own folder, and every line of ``opensora``, ``acceleration`` and ``data_pipeline`` outside of it that imports from
the folder, or has the kind in a name or a text of the code (docstrings do not count). Autoencoders and encoders of
text and pictures are looked up by kinds of their own; their folders are left out. Configurations and pages of docs that
name the kind are counted beside it.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from opensora.models.families import FAMILIES
from tests.conftest import ROOT

PACKAGES = ("opensora", "acceleration", "data_pipeline")
CODERS = ("opensora/models/vae/", "opensora/models/text/", "opensora/models/image/")


def folder_of(kind: str) -> Path:
    return Path(inspect.getfile(FAMILIES[kind].model)).parent


def words_of_lines(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name, attribute and text of a file with its line, but for docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield line, node.value
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            if isinstance(word := getattr(node, field, None), str):
                yield line, word


@cache
def words_in(code: str) -> tuple[tuple[int, str], ...]:
    return tuple(words_of_lines(ast.parse(code)))


def name_of(kind: str) -> re.Pattern[str]:
    """The kind, or the folder that has it, as a whole word of a snake_case, CamelCase or dotted name."""
    words = {kind, folder_of(kind).name}
    camel = {"".join(part.capitalize() for part in word.split("_")) for word in words}
    snake = "|".join(sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![a-zA-Z0-9])(?:{snake})(?![a-z0-9])|(?:{'|'.join(camel)})(?![a-z])")


def lines_elsewhere(kind: str) -> dict[str, list[int]]:
    """Lines that know the kind, by file, outside its folder."""
    pattern, own, found = name_of(kind), folder_of(kind), {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if own in path.parents or name.startswith(CODERS):
            continue
        if lines := {line for line, word in words_in(path.read_text(encoding="utf-8")) if pattern.search(word)}:
            found[name] = sorted(lines)
    return found


def count_lines(paths: Iterator[Path]) -> str:
    counts = [len(path.read_text(encoding="utf-8").splitlines()) for path in paths]
    return f"{len(counts)} files, {sum(counts)} lines"


def main() -> None:
    for kind in sys.argv[1:] or FAMILIES:
        named = [path for path in (ROOT / "configs").rglob("*.yaml") if re.search(rf"kind: {kind}\b", path.read_text())]
        print(f"{kind}: {count_lines(folder_of(kind).glob('*.py'))}; configurations: {count_lines(iter(named))}")
        for name, lines in lines_elsewhere(kind).items():
            text = (ROOT / name).read_text(encoding="utf-8").splitlines()
            for line in lines:
                print(f"  {name}:{line}: {text[line - 1].strip()}")


if __name__ == "__main__":
    main()
