"""What a run writes about itself: metrics.jsonl and its copies, console messages, the progress bar."""

import contextlib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_LOGGER = logging.getLogger("opensora")


def launched_rank() -> int:
    """This process's rank as the launcher (torchrun, or a SLURM step) says it; 0 for a plain call.

    Only for who speaks: what is no rank counts as 0, so that the one who refuses it (distributed/runtime.py) is heard.
    """
    name = "RANK" if os.environ.get("RANK") or not os.environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_PROCID"
    text = os.environ.get(name, "").strip()
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else 0


def announce(message: str, *, level: int = logging.INFO, every_rank: bool = False) -> None:
    """One console message, on rank 0 only unless it says what only one process does, whichever it is.

    Above a progress bar if one is drawn.
    """
    if launched_rank() != 0 and not every_rank:
        return
    if not _LOGGER.handlers:
        handler = _TqdmHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        _LOGGER.addHandler(handler)
        _LOGGER.setLevel(logging.INFO)
        _LOGGER.propagate = False
    _LOGGER.log(level, message)


def progress(total: int, initial: int = 0, *, every_s: float = 30.0) -> "Progress":
    """A progress bar over ``total`` steps of which ``initial`` are done."""
    return Progress(total, initial, every_s=every_s)


BYTES = "B"


class Progress:
    """A bar on a terminal; elsewhere one line every ``every_s`` seconds, so that log files stay readable."""

    def __init__(
        self, total: int, initial: int = 0, *, every_s: float = 30.0, unit: str = "step", about: str = ""
    ) -> None:
        """
        Args:
            unit: of what is counted; of bytes (B) as many are named as are read easily.
            about: what is counted, where several follow each other.
        """
        self._about = about
        self._total, self._initial, self._step = total, initial, initial
        self._every_s, self._unit = every_s, unit
        self._start = time.monotonic()
        self._spoke = -math.inf
        self._bar = (
            tqdm(
                total=total,
                initial=initial,
                unit=unit,
                desc=about or None,
                dynamic_ncols=True,
                smoothing=0.1,
                unit_scale=unit == BYTES,
                unit_divisor=1024 if unit == BYTES else 1000,
            )
            if sys.stderr.isatty()
            else None
        )

    def skip(self, steps: int) -> None:
        """So many turned out to be done already: they say nothing of how long the others take."""
        self._step += steps
        self._initial += steps
        if self._bar is not None:
            self._bar.initial += steps
            self._bar.n += steps
            self._bar.last_print_n += steps

    def update_to(self, step: int, values: Mapping[str, Any] | None = None, *, text: str = "") -> None:
        """``step`` steps are done; of ``values`` the loss, the rate and the step time are shown, or ``text``."""
        shown = text or _shown(values or {})
        done, self._step = step - self._step, step
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            with contextlib.suppress(OSError):  # as in _TqdmHandler
                self._bar.update(done)
            return
        now = time.monotonic()
        if now - self._spoke >= self._every_s or step >= self._total:
            self._spoke = now
            with contextlib.suppress(OSError):
                about = f"{self._about}: " if self._about else ""
                line = f"{about}{self._counted(step)}, {shown or 'running'}, {self._eta(now)}\n"
                print(line, end="", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def _counted(self, step: int) -> str:
        if self._unit == BYTES:
            return f"{shown_bytes(step)} of {shown_bytes(self._total)}"
        return f"{self._unit} {step}/{self._total}"

    def _eta(self, now: float) -> str:
        made = self._step - self._initial
        if made <= 0:
            return "ETA unknown"
        left = round((self._total - self._step) * (now - self._start) / made)
        return f"ETA {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"


def shown_bytes(count: int) -> str:
    """812 B, 4.5 KiB, 137 MiB, 2.1 TiB: three digits at most."""
    value, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.0f} {units[power]}" if power == 0 or value >= 9.95 else f"{value:.1f} {units[power]}"


class _TqdmHandler(logging.Handler):
    """Writes through tqdm, which moves a bar out of the way.

    A terminal that was closed, or a reader of a pipe that has ended (Ctrl-C ends ``tee`` too), must not end a run.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            tqdm.write(f"{self.format(record)}\n", end="", file=sys.stderr)  # one write: other ranks' lines stay whole


def _shown(values: Mapping[str, Any]) -> str:
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}")
    if "rate/tokens_per_s" in values:
        parts.append(f"{values['rate/tokens_per_s']:,.0f} tokens/s")
    if "time/step_s" in values:
        parts.append(f"{values['time/step_s']:.3g} s/step")
    return ", ".join(parts)
