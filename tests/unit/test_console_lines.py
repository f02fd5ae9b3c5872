"""Lines of several ranks that share one stderr stay whole, also where PYTHONUNBUFFERED is set, as in containers."""

import io
import sys

import pytest

from acceleration.distributed.runtime import say
from opensora.cli.main import run_cli
from opensora.utils.console import announce, progress
from opensora.utils.errors import UserError


class Writes(io.RawIOBase):
    """Keeps what every call to the system would write."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        self.texts.append(bytes(data).decode())
        return len(data)


def refused(_: list[str]) -> int:
    raise UserError("train.steps=-1: must be at least 1")


def test_a_line_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Writes()
    stream = io.TextIOWrapper(written, encoding="utf-8", write_through=True)  # type: ignore[type-var]
    monkeypatch.setattr(sys, "stderr", stream)
    announce("from every rank", every_rank=True)
    say("from the machine")
    progress(2).update_to(2)
    with pytest.raises(SystemExit):
        run_cli(refused)
    lines = [text for text in written.texts if text]
    assert len(lines) == 4
    assert all(text.count("\n") == 1 and text.endswith("\n") for text in lines)
