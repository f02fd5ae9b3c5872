"""The boundary around parsers of other people's bytes: whatever they raise on a user's file is a fact about that file.

A parser may raise anything on a damaged file: Pillow ``struct.error``, an FFmpeg binding ``AttributeError``, a JSON
reader ``RecursionError``. No list of exceptions is ever complete, and ``except Exception`` would hide mistakes of ours.
So ``parsing`` decides by *where* the exception arose:

* in a library, or in the ``with`` block itself: the file's fault; the exception that ``refuse`` makes of it is raised;
* in a function of this project that the block called: a mistake of ours, which goes through as it is.

Blocks therefore hold calls into the parser and nothing else; callbacks are called outside.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
OUR_PACKAGES = ("acceleration", "opensora", "data_pipeline")
# A name that does not exist, or a broken invariant, is a mistake also where the block itself made it.
_ALWAYS_OURS = (NameError, AssertionError, ImportError)
# Until Python 3.12 these have frames of their own.
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
_LONG_NUMBER = re.compile(r"(?<![0-9A-Za-z])[0-9]{41,}(?![0-9A-Za-z])")
_RUST_PANIC = "PanicException"  # of parsers in Rust; no subclass of Exception


class parsing:
    """A ``with`` block that holds calls into a parser of untrusted bytes.

    Args:
        refuse: makes the exception to raise from one line that says what is wrong with the file.

    Raises:
        what ``refuse`` returns, for an exception that arose in a library or in the block itself. Exceptions of this
        project's own classes (``UserError``, ``DecodeError``) go through: somebody has judged already.
    """

    def __init__(self, refuse: Callable[[str], Exception]) -> None:
        self._refuse = refuse

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None or error is None:
            return
        if not issubclass(kind, Exception) and kind.__name__ != _RUST_PANIC:
            return  # KeyboardInterrupt, SystemExit
        if kind.__module__.split(".")[0] in OUR_PACKAGES or is_our_mistake(error, trace):
            return
        raise self._refuse(short_reason(error)) from error


def is_our_mistake(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether an exception arose in code of this project that a block of ``parsing`` called.

    Args:
        trace: its traceback, beginning at the frame of the block.
    """
    if trace is None:
        return False
    last, in_block = trace, True
    while last.tb_next is not None:
        last = last.tb_next
        in_block = in_block and _is_comprehension_in(last, trace)
    if in_block or _is_ours(last):
        if isinstance(error, _ALWAYS_OURS):
            return True
        return not in_block and not isinstance(error, OSError)  # an error of the disk is not ours, wherever it shows
    return False


def _is_comprehension_in(trace: TracebackType, block: TracebackType) -> bool:
    code = trace.tb_frame.f_code
    return code.co_name in _COMPREHENSIONS and code.co_filename == block.tb_frame.f_code.co_filename


def _is_ours(trace: TracebackType) -> bool:
    file = Path(trace.tb_frame.f_code.co_filename)
    return file.is_relative_to(_ROOT) and file.relative_to(_ROOT).parts[0] in OUR_PACKAGES


def short_reason(error: BaseException) -> str:
    """What went wrong, on one line; the kind of error too where its text alone says little."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    if isinstance(error, KeyError):
        reason = f"{reason} is missing"
    if not reason:
        return type(error).__name__
    tells = isinstance(error, (OSError, ValueError, EOFError, SyntaxError)) or " " in reason
    return (reason if tells else f"{type(error).__name__}: {reason}")[:200]


def short(value: object, most: int = 80) -> str:
    """A value, name or path as it is shown in a message: of a long text both ends, of a long number how many digits.

    Every message shortens what it quotes by this, so that a value never fills the screen.
    """
    try:
        text = str(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    text = _LONG_NUMBER.sub(lambda found: f"{found[0][:8]}... ({len(found[0])} digits)", text)
    return text if len(text) <= most else f"{text[: most - most // 4 - 3]}...{text[-(most // 4) :]}"


def parse_json(data: bytes | str, refuse: Callable[[str], Exception]) -> Any:
    """JSON from a file that may be damaged.

    Raises:
        what ``refuse`` returns: it is no UTF-8, no JSON, or nested too deeply.
    """
    with parsing(refuse):
        return json.loads(data)
