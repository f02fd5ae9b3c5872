"""Charts as SVG: text that scales, takes the colours of the page, and needs no script."""

from collections.abc import Sequence
from html import escape

import numpy as np

from data_pipeline.report.amounts import number
from data_pipeline.report.bins import BINS, Axis

_WIDTH, _HEIGHT = 360, 150
_LEFT, _TOP, _BOTTOM = 6, 22, 20
_PLOT = _HEIGHT - _TOP - _BOTTOM


def histogram(
    axis: Axis, parts: Sequence[tuple[str, np.ndarray]], marks: Sequence[tuple[float, str]], about: str
) -> str:
    """Bars of stacked parts over an axis.

    Args:
        parts: (class of the style sheet, (BINS,) counts), from the bottom up.
        marks: (value, which side passes: ``min`` or ``max``): thresholds.
        about: what a reader who cannot see it is told.
    """
    total = np.sum([counts for _, counts in parts], axis=0)
    most = max(1, int(total.max()))
    shapes = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(about)}">']
    shapes += [_out_of_bounds(axis, value, side) for value, side in marks]
    for place in range(BINS):
        shapes += _bar(axis, parts, place, most)
    shapes.append(f'<line class="base" x1="0" y1="{_y(0)}" x2="{_WIDTH}" y2="{_y(0)}"/>')
    shapes += [_tick(axis, tick) for tick in axis.ticks()]
    shapes += [_mark(axis, value, side) for value, side in marks]
    return "".join(shapes) + "</svg>"


def _bar(axis: Axis, parts: Sequence[tuple[str, np.ndarray]], place: int, most: int) -> list[str]:
    wide = (_WIDTH - 2 * _LEFT) / BINS
    left, top, found = _LEFT + place * wide, float(_y(0)), []
    between = f"{number(axis.value(place / BINS))} to {number(axis.value((place + 1) / BINS))}"
    for kind, counts in parts:
        if count := int(counts[place]):
            tall = max(1.0, _PLOT * count / most)
            top -= tall
            box = f'x="{left + 0.5:.1f}" y="{top:.1f}" width="{wide - 1:.1f}" height="{tall:.1f}"'
            found.append(f'<rect class="{kind}" {box}><title>{between}: {count:,}</title></rect>')
    return found


def _out_of_bounds(axis: Axis, value: float, side: str) -> str:
    """The side that is rejected, shaded."""
    at = _x(axis, value)
    left, wide = (0.0, at) if side == "min" else (at, _WIDTH - at)
    return f'<rect class="outside" x="{left:.1f}" y="{_TOP - 4}" width="{wide:.1f}" height="{_PLOT + 4}"/>'


def _mark(axis: Axis, value: float, side: str) -> str:
    at = _x(axis, value)
    anchor, text = ("start", max(1.0, at + 3)) if at < _WIDTH / 2 else ("end", at - 3)
    words = f"{'at least' if side == 'min' else 'at most'} {number(value)}"
    line = f'<line class="mark" x1="{at:.1f}" y1="{_TOP - 4}" x2="{at:.1f}" y2="{_y(0)}"/>'
    return f'{line}<text class="mark" x="{text:.1f}" y="12" text-anchor="{anchor}">{words}</text>'


def _tick(axis: Axis, value: float) -> str:
    at = _x(axis, value)
    anchor = "start" if at < 14 else "end" if at > _WIDTH - 14 else "middle"
    return f'<text class="tick" x="{at:.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{number(value)}</text>'


def _x(axis: Axis, value: float) -> float:
    return _LEFT + float(axis.at(value)) * (_WIDTH - 2 * _LEFT)


def _y(tall: float) -> float:
    return _TOP + _PLOT - tall


_BLOCKS = "·▁▂▃▄▅▆▇█"


def sparkline(counts: np.ndarray) -> str:
    """The same in a line of text; what is not empty is seen."""
    most = max(1, int(counts.max()))
    return "".join(_BLOCKS[min(8, -(-8 * int(count) // most))] for count in counts)
