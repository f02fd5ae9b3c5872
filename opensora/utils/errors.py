"""The one exception a user is meant to read, and how what it says is kept to one line."""

import re

from opensora.utils.files.untrusted import short

MAX_LINE = 1000  # characters of a message; the middle of a longer one is left out
MAX_WORD = 320  # of a path or another value without a space in it; the longest name of a file has 255
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}|[0-9]{{41,}}")


class UserError(ValueError):
    """A mistake in what the user gave us: a key, a file, a layout.

    The message is one line: the dotted key or the file, the value found, what is allowed, what to do.
    Command-line entry points print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text as one printable line: values and file names in it cannot break the line or command a terminal.

    White space becomes single spaces; long values lose their middle (``short``), and so does a long line. Control
    characters, marks that change the direction of writing and lone surrogates are escaped; a byte of a file name that
    is not UTF-8 is written as ``\\xff``.
    """
    line = "".join(char if char.isprintable() else _escaped(char) for char in " ".join(text.split()))
    line = _LONG_WORD.sub(lambda found: short(found[0], MAX_WORD), line)
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # how Python holds an undecodable byte of argv or of a file name
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
