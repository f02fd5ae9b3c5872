"""Two opinions on one video: a detector of cuts, and one of transitions that take a while."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_pipeline.shots.gradual import gradual_transitions
from data_pipeline.shots.thumbs import Thumbs
from data_pipeline.shots.transitions import Transition
from data_pipeline.shots.verdict import is_refuted, is_sudden

_NEAR_S = 0.3  # of a transition: a cut that is its begin or end; of a cut: a step that is part of it


def reconciled(
    cuts: Sequence[int], steps: Sequence[int], thumbs: Thumbs, times: np.ndarray, apart_s: float
) -> list[Transition]:
    """What a detector found, without what is no transition, and what it did not see. In order of time.

    A sudden cut stands, and nothing gradual is believed within ``apart_s`` of it: a short shot in which much happens
    looks like a transition. Other cuts count where nothing gradual explains them.

    Args:
        cuts: first frames of shots.
        steps: frames at which less has changed at once, or which the detector left out as too close to another one.
        times: (n,) seconds of all frames.
    """
    cuts = [cut for cut in cuts if not is_refuted(thumbs, cut, times[cut])]
    sudden = [cut for cut in cuts if is_sudden(thumbs, cut, times[cut])]
    sudden = _with_steps(sudden, steps, thumbs, times, apart_s)
    thumbs = thumbs.without_flashes()
    found = gradual_transitions(thumbs, sudden)
    found = [each for each in found if not any(_is_beside(each, cut, thumbs, times, apart_s) for cut in sudden)]
    others = [cut for cut in cuts if cut not in sudden and not any(_explains(each, cut, times) for each in found)]
    found += [Transition("cut", cut, cut) for cut in (*sudden, *others)]
    return _joined(sorted(found, key=lambda each: (each.first, each.end)), thumbs)


def _with_steps(
    sudden: list[int], steps: Sequence[int], thumbs: Thumbs, times: np.ndarray, apart_s: float
) -> list[int]:
    """And those of the steps that are cuts, and not close to one."""
    for step in steps:
        is_alone = all(abs(times[step] - times[cut]) >= max(apart_s, _NEAR_S) for cut in sudden)
        if is_alone and is_sudden(thumbs, step, times[step]) and not is_refuted(thumbs, step, times[step]):
            sudden = sorted([*sudden, step])
    return sudden


def _is_beside(each: Transition, cut: int, thumbs: Thumbs, times: np.ndarray, apart_s: float) -> bool:
    """Whether a cut follows or precedes so closely; black between them is part of the transition."""
    first, end = sorted((each.end, cut)) if cut >= each.end else sorted((cut, each.first))
    return bool(abs(_at(times, end) - _at(times, first)) < apart_s) and not thumbs.are_empty(first, end)


def _explains(each: Transition, cut: int, times: np.ndarray) -> bool:
    return bool(_at(times, each.first) - _NEAR_S <= times[cut] <= _at(times, each.end) + _NEAR_S)


def _joined(found: Sequence[Transition], thumbs: Thumbs) -> list[Transition]:
    """Those with nothing but black, or one colour, between them are one."""
    kept: list[Transition] = []
    for each in found:
        if kept and thumbs.are_empty(kept[-1].end, each.first):
            kept[-1] = replace(kept[-1], kind="gradual", end=max(kept[-1].end, each.end))
        else:
            kept.append(each)
    return kept


def _at(times: np.ndarray, frame: int) -> float:
    return float(times[min(frame, len(times) - 1)])
