"""Who is to blame for an exception: the file, or this project's code."""

import json
import struct

import pytest

from opensora.utils.errors import UserError
from opensora.utils.files import untrusted
from opensora.utils.files.untrusted import parse_json, parsing
from tests.conftest import ROOT


class Refused(Exception):
    pass


def in_a_library() -> None:
    json.loads("{")


def in_the_block(error: Exception) -> None:
    with parsing(Refused):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        struct.error("x"),
        TypeError("x"),
        AttributeError("x"),
        MemoryError(),
        RecursionError(),
        OSError("x"),
        Exception(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_block_raises_is_the_files_fault(error: Exception) -> None:
    with pytest.raises(Refused) as found:
        in_the_block(error)
    assert "\n" not in str(found.value) and str(found.value)


def test_what_a_library_raises_is_the_files_fault() -> None:
    with pytest.raises(Refused), parsing(Refused):
        in_a_library()
    with pytest.raises(Refused), parsing(Refused):
        None.upper()  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [NameError("x"), UnboundLocalError("x"), AssertionError(), ImportError("x")])
def test_a_typo_in_the_block_is_ours(error: Exception) -> None:
    with pytest.raises(type(error)):
        in_the_block(error)


def test_an_error_in_a_function_of_ours_is_ours() -> None:
    with pytest.raises(AttributeError), parsing(Refused):
        untrusted.is_our_mistake(ValueError(), 3)  # type: ignore[arg-type]


def test_who_has_judged_already_is_not_judged_again() -> None:
    with pytest.raises(UserError):
        in_the_block(UserError("x"))
    with pytest.raises(KeyboardInterrupt), parsing(Refused):
        raise KeyboardInterrupt


def test_a_panic_of_a_parser_in_rust_is_the_files_fault() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with pytest.raises(Refused), parsing(Refused):
        raise panic("index out of bounds")


def test_deeply_nested_json() -> None:
    for text in ("[" * 10**6, '{"a":' * 10**5, "nul", b"\xff"):
        with pytest.raises(Refused):
            parse_json(text, Refused)
    assert parse_json('{"a": [1]}', Refused) == {"a": [1]}


BLOCK = """
def reads(parse, items):
    with parsing(Refused):
        return {kind}

def helper(items):
    return [item["a"] for item in items]
"""


KINDS = ("[parse(i) for i in items]", "{i: parse(i) for i in items}", "list(parse(i) for i in items)")


@pytest.mark.parametrize("kind", KINDS)
def test_a_comprehension_in_the_block_is_the_block(kind: str) -> None:
    """Until Python 3.12 it has a frame of its own; a function of ours that has one stays ours."""
    place = str(ROOT / "acceleration" / "made.py")
    scope = {"parsing": parsing, "Refused": Refused}
    exec(compile(BLOCK.replace("{kind}", kind), place, "exec"), scope)
    with pytest.raises(Refused):
        scope["reads"](int, ["x"])  # type: ignore[operator]
    with pytest.raises(TypeError):
        scope["reads"](scope["helper"], [[1]])  # type: ignore[operator]
