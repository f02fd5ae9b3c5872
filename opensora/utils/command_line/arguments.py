"""Options of commands: numbers with their ranges, places on the disk; a mistake is a ``UserError`` of one line."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short

_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?(?:\.[0-9]{1,300}|[0-9]{1,300}(?:\.[0-9]{0,300})?)(?:[eE][-+]?[0-9]{1,3})?")


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` without abbreviations, whose errors are ``UserError``: one line instead of the usage.

    An option is given once; only one that collects values (``action="append"``) may be there again.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._given: set[argparse.Action] = set()
        for name in ("store", "store_const", "store_true", "store_false"):
            self.register("action", name, _once(self._registry_get("action", name)))
        self.register("action", None, self._registry_get("action", "store"))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, whose Python 3.11 takes ``--option=--`` for an option with no value at all."""
        words = sys.argv[1:] if args is None else list(args)
        lost = next((word for word in words if re.fullmatch(r"--[A-Za-z-]+=--", word)), None)
        if lost:
            self.error(f"{lost}: a value is missing")
        self._given.clear()
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            UserError: always; ``--option=value: what is allowed`` for values that the types of this module refuse.
        """
        raise UserError(message.removeprefix("argument ").replace(": =", "=", 1))


def _once(action: Any) -> Any:
    """An action of argparse that refuses to be called twice for an option: the last one would win without a word."""

    class Once(action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            if option_string is not None and self in parser._given:
                parser.error(f"{option_string} is there twice; give it once")
            parser._given.add(self)
            super().__call__(parser, namespace, values, option_string)

    return Once


def whole(least: int, most: int) -> Callable[[str], int]:
    """A type for ``add_argument``: integers from ``least`` to ``most``, in ASCII digits."""

    def convert(text: str) -> int:
        value = int(text) if _WHOLE.fullmatch(text) else None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"={_short(text)}: must be an integer from {least} to {most}")
        return value

    return convert


def number(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """A type for ``add_argument``: finite numbers from ``least`` (``above`` it) to ``most``."""

    def convert(text: str) -> float:
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        fits = (least < value if above else least <= value) and value <= most
        if not fits:
            start = f"above {least:g} and" if above else f"from {least:g}"
            raise argparse.ArgumentTypeError(f"={_short(text)}: must be a number {start} up to {most:g}")
        return value

    return convert


def place(text: str) -> Path:
    """A type for ``add_argument``: the path of a file or folder, there or not."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"={text!r}: must be the path of a file or folder")
    return Path(text)


def word(text: str) -> str:
    """A type for ``add_argument``: text on one line."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"={short(repr(text), 40)}: must be printable text on one line")
    return text


def _short(text: str) -> str:
    return short(repr(text)[1:-1], 40)
