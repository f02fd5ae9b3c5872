"""``python -m opensora.cli.config_reference [--check]``: docs/configuration.md, from the dataclasses themselves.

Type and default are the field's, the meaning is the comment beside it in the source.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from data_pipeline.config import PipelineConfig
from opensora.cli.main import run_cli
from opensora.config.run import RunConfig, SampleConfig
from opensora.config.schema import plain, wanted
from opensora.config.strict_yaml import MAX_VALUES, to_yaml_text
from opensora.serve.config import ServeConfig
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import try_output, write_whole
from opensora.utils.limits import Limits
from opensora.utils.sections import SIZES, TABLE

TARGET = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
COMMAND = "python -m opensora.cli.config_reference"
HEAD = f"""\
# Configuration

Written by `{COMMAND}` from the dataclasses; do not edit.

A configuration is a YAML file. `include: FILE` or `include: [FILE, ...]` names files, relative to it, that it builds
on; later ones win key by key. On the command line `section.key=value`, `--section.key value` and
`--section.key=value` win over all files. A section that changes its `kind`, and a free mapping such as
`data.buckets`, is replaced as a whole. Unknown, duplicate and mistyped keys are refused with exit code 2.
Numbers follow YAML 1.2 (`1e-4` is a number); only `true` and `false` are booleans; aliases, tags and `${{...}}` are
refused, and so are control characters and bytes that are not UTF-8 in texts, and files of more than {MAX_VALUES:,} keys
and values. A number beyond the most that is given here is refused with the reason.

Files and flags of the Open-Sora family are taken as well, and become what is here:
[training.md](training.md#configurations-of-the-open-sora-family).
"""


def render() -> str:
    """The whole document."""
    parts, seen = [HEAD], set[tuple[str, type]]()
    for cls, title, command in (
        (RunConfig, "Training", "scripts/diffusion/train.py"),
        (SampleConfig, "Sampling", "scripts/diffusion/inference.py"),
        (PipelineConfig, "Data pipeline", "python -m data_pipeline.run"),
        (ServeConfig, "Service", "python -m opensora.cli.serve"),
    ):
        parts.append(f"## {title}: `{command}`\n")
        parts.extend(_sections(cls, "", seen))
    return "\n".join(parts)


def field_comments(cls: type) -> dict[str, str]:
    """Field name -> the comment at the end of its line, or else on the lines below it."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments: dict[int, tuple[bool, str]] = {}  # line -> (has code before it, text)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.string.startswith("# type: "):  # for mypy
                continue
            comments[token.start[0]] = (bool(token.line[: token.start[1]].strip()), token.string.lstrip("# "))
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.end_lineno or node.lineno
            lines = [comments[last][1]] if last in comments else []
            below = last + 1
            while below in comments and not comments[below][0] and last not in comments:
                lines.append(comments[below][1])
                below += 1
            found[node.target.id] = " ".join(lines)
    return found


def inherited_comments(cls: type) -> dict[str, str]:
    """Field name -> its comment, or that of the class that a field without one is from."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            found |= {name: comment for name, comment in field_comments(owner).items() if comment}
    return found


def main(argv: list[str]) -> int:
    """Write the document, or with ``--check`` say whether it is up to date."""
    if argv not in ([], ["--check"]):
        raise UserError(f"{' '.join(argv)}: the only option is --check")
    if not argv:
        try_output(TARGET, "docs")
    text = render()
    if argv:
        current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
        if current != text:
            raise UserError(f"docs/{TARGET.name}: not up to date with the dataclasses; run {COMMAND}")
        return 0
    write_whole(TARGET, lambda file: file.write(text))
    return 0


def _sections(cls: type, path: str, seen: set[tuple[str, type]], note: str = "") -> Iterator[str]:
    """A table of the section's own keys, then its subsections; nothing for a section ``seen`` before."""
    if (path, cls) in seen:
        return
    seen.add((path, cls))
    hints = get_type_hints(cls)
    rows: list[str] = []
    below: list[str] = []
    shared: list[str] = []
    comments = inherited_comments(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key = f"{path}.{field.name}" if path else field.name
        hint, comment = hints[field.name], comments.get(field.name, "")
        if TABLE in field.metadata:
            known = all((key, chosen) in seen for chosen in field.metadata[TABLE].values())
            shared.extend([f"`{key}`" + (f" ({comment})" if comment else "")] if known else [])
            below.extend(_kinds(field, key, comment, seen))
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            shared.extend([f"`{key}`"] if (key, hint) in seen else [])
            below.extend(_sections(hint, key, seen))
        else:
            cells = (f"`{field.name}`", wanted(hint) + _most(cls, field.name), _default(field), comment)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if path:
        yield f"### `{path}`{note}\n"
    yield f"{_summary(cls)}\n"
    if rows:
        yield "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"
    if shared:
        yield f"As above: {', '.join(shared)}.\n"
    yield from below


def _kinds(field: "dataclasses.Field[Any]", key: str, comment: str, seen: set[tuple[str, type]]) -> Iterator[str]:
    """The section once per kind it can have."""
    for kind, cls in field.metadata[TABLE].items():
        if (key, cls) in seen:
            continue
        yield from _sections(cls, key, seen, f" with `kind: {kind}`{', ' + comment if comment else ''}")
        sizes = field.metadata[SIZES].get(kind)
        if sizes:
            names = ", ".join(f"`{name}`" for name in sizes)
            yield f"`{key}.size` starts from a named size instead of the defaults above: {names}.\n"


def _most(cls: type, name: str) -> str:
    limits: Limits = getattr(cls, "LIMITS", {})
    return f", at most {limits[name][0]:g}" if name in limits else ""


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
        return ", ".join(f"`{key}`" for key in value)  # sections of their own, which the shipped file writes out
    text = to_yaml_text([plain(value)]).strip()
    return f"`{text[1:-1] if text.startswith('[') else text.removeprefix('- ')}`"


def _summary(cls: type) -> str:
    """The first paragraph of the docstring."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).replace("``", "`")


if __name__ == "__main__":
    run_cli(main)
