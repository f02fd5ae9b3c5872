"""Numbers as people read them."""

import math


def length(seconds: float) -> str:
    """42 s, 7.5 min, 3.2 h, 1,200 h."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.3g} s" if seconds < 9.995 else f"{seconds:.0f} s"
    if seconds < 3597:
        return f"{seconds / 60:.1f} min" if seconds < 597 else f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 99.95 else f"{hours:,.0f} h"


def clock(seconds: float) -> str:
    """A place in a video: 0:07, 12:30, 1:02:03."""
    whole = max(0, int(seconds + 1e-6))
    minutes = f"{whole // 60 % 60}:{whole % 60:02d}"
    return minutes if whole < 3600 else f"{whole // 3600}:{minutes:0>5}"


def share(part: float, whole: float) -> str:
    """37 %, 0.4 %; what is not all is never 100 %."""
    if not whole:
        return "0 %"
    percent = 100 * part / whole
    if 0 < percent < 9.95:
        return f"{percent:.2g} %" if percent >= 0.095 else "< 0.1 %"
    return f"{min(round(percent), 99) if part < whole else round(percent)} %"


def number(value: float) -> str:
    """1,234; 0.0312; 12.5: what three digits tell."""
    if not math.isfinite(value):
        return "none"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plural(count: int, noun: str) -> str:
    """1 clip, 1,234 clips."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
