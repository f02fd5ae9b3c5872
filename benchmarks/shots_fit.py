"""The weights of ``data_pipeline/shots/gradual.py``: fitted to labelled clips of the tuning half, and printed.

    python -m benchmarks.shots_fit [--media DIR] [--clips N]

Logistic regression on stretches between two thumbnails. A stretch that covers a transition, and little more, is one;
one that touches none is not. What is weighed is events, not stretches: of the stretches of one transition the surest
must be above zero, and of the stretches of one second without a transition the surest must be below, so every round
fits the surest ones of the round before. Clips are drawn as the tuning half is, with other numbers and no encoder.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch

from data_pipeline.analysis.base import Clock
from data_pipeline.analysis.content import THUMB_HEIGHT, THUMB_WIDTH, ContentConfig
from data_pipeline.shots.gradual import all_ends, are_kinds, possible
from data_pipeline.shots.thumbs import Thumbs
from data_pipeline.shots.views import MEASURES, Ends, Views
from tests.shot_set import CLIPS, LabelledClip, hard_clip, labelled_clip, one_shot_clip

_MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"
_ROUNDS, _DECAY = 6, 1e-3
_COVERED, _SLACK_S, _BESIDE_S = 0.15, 0.05, 0.7  # of a transition may be missed; so much more a stretch may hold

Event = tuple[str, int, str]  # clip, number of the transition or of the second, its kind: "" of none


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both sums."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shots_fit", description=__doc__.splitlines()[0])
    parser.add_argument("--media", type=Path, default=_MEDIA)
    parser.add_argument("--clips", type=int, default=120, help="of each kind, common and hard")
    chosen = parser.parse_args(argv)
    measured, events, are_wipes = [], list[Event](), []
    for clip in _clips(chosen.media, chosen.clips):
        for values, event, is_wipe in _examples(clip):
            measured.append(values)
            events.append(event)
            are_wipes.append(is_wipe)
    values, wipes = np.array(measured), np.array(are_wipes)
    for name, mask, other in (("DISSOLVE", ~wipes, "wipe"), ("WIPE", wipes, "dissolve")):
        mask = mask & np.array([event[2] not in (other, "black", "white") for event in events])
        weights, bias, found, false = _fitted(
            values[mask], [each for each, one in zip(events, mask, strict=True) if one]
        )
        print(f"{name} = (({', '.join(f'{weight:.2f}' for weight in weights)}), {bias:.2f})  # {found}, false: {false}")


def _clips(media: Path, count: int) -> Iterator[LabelledClip]:
    for number in range(count):
        yield labelled_clip(CLIPS + 2 * number, media)
        if number % 2 == 0:
            yield hard_clip(number, media)
            yield one_shot_clip(number, media)


def thumbs_of_clip(clip: LabelledClip) -> Thumbs:
    """As ``ContentAnalyser`` leaves them, but for the encoder."""
    due = Clock(ContentConfig().thumbs_per_second)
    frames = [n for n in range(len(clip.frames)) if due(SimpleNamespace(time_s=n / clip.fps))]  # type: ignore[arg-type]
    pictures = [
        cv2.resize(clip.frames[n][..., ::-1], (THUMB_WIDTH, THUMB_HEIGHT), interpolation=cv2.INTER_AREA) for n in frames
    ]
    return Thumbs(np.array(frames), np.array(frames) / clip.fps, np.stack(pictures))


def _examples(clip: LabelledClip) -> Iterator[tuple[np.ndarray, Event, bool]]:
    """(measurements, event, whether it is like a wipe) of the stretches that are weighed."""
    thumbs = thumbs_of_clip(clip)
    cuts = [each.first for each in clip.transitions if each.kind == "cut"]
    edges = [0, *np.searchsorted(thumbs.frames, cuts).tolist(), len(thumbs)]
    for first, end in pairwise(edges):
        views = Views(thumbs.part(first, end).without_flashes())
        for ends in all_ends(views, 0, end - first):
            ends = ends.only(possible(views, ends))
            if len(ends):
                yield from _labelled(clip, views, ends)


def _labelled(clip: LabelledClip, views: Views, ends: Ends) -> Iterator[tuple[np.ndarray, Event, bool]]:
    measured = views.measure(ends)
    measured[:, MEASURES.index("alike")] = views.alike(ends)
    dissolves, wipes = are_kinds(views, ends, measured)
    for which in np.flatnonzero(dissolves | wipes):
        begin, stop = (float(views.thumbs.seconds[side[which]]) for side in (ends.i, ends.j))
        label = _label(clip, begin, stop)
        if label is not None:
            yield measured[which], (clip.name, *label), bool(wipes[which])


def _label(clip: LabelledClip, begin: float, stop: float) -> tuple[int, str] | None:
    """(number, kind) of the transition that it covers; (second, "") of none; None: of a part of one."""
    for number, each in enumerate(clip.transitions):
        first, end = each.first / clip.fps, each.end / clip.fps
        if each.kind == "cut" or stop < first + _SLACK_S or begin > end - _SLACK_S:
            continue
        missed = _COVERED * (end - first) + _SLACK_S
        covers = begin <= first + missed and stop >= end - missed and stop - begin <= end - first + _BESIDE_S
        return (number, each.kind) if covers else None
    return round(begin), ""


def _fitted(values: np.ndarray, events: Sequence[Event]) -> tuple[np.ndarray, float, str, str]:
    """(weights, bias, how many of the transitions are found, of how many seconds without one some stretch is sure)."""
    groups = defaultdict[Event, list[int]](list)
    for index, event in enumerate(events):
        groups[event].append(index)
    mean, scale = values.mean(axis=0), values.std(axis=0) + 1e-6
    inputs = torch.tensor((values - mean) / scale)
    is_one = torch.tensor([float(bool(event[2])) for event in events], dtype=torch.float64)
    chosen = np.concatenate(list(groups.values()))
    shares = np.concatenate([np.full(len(group), 1.0 / len(group)) for group in groups.values()])
    for _ in range(_ROUNDS):
        weights, bias = _regressed(inputs[chosen], is_one[chosen], torch.tensor(shares))
        sure = (inputs @ weights + bias).numpy()
        chosen = np.array([group[int(np.argmax(sure[group]))] for group in groups.values()])
        shares = np.ones(len(chosen))
    best = {event: sure[group].max() for event, group in groups.items()}
    ones, none = ([value > 0 for event, value in best.items() if bool(event[2]) is kind] for kind in (True, False))
    plain = weights.numpy() / scale
    return plain, float(bias - plain @ mean), f"{sum(ones)} of {len(ones)}", f"{sum(none)} of {len(none)}"


def _regressed(inputs: torch.Tensor, is_one: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Weights and bias of a logistic regression with weight decay."""
    found = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        sums = inputs @ found[:-1] + found[-1]
        each = torch.nn.functional.binary_cross_entropy_with_logits(sums, is_one, reduction="none")
        value = (each * shares).sum() / shares.sum() + _DECAY * (found[:-1] ** 2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return found[:-1].detach(), float(found[-1].detach())


if __name__ == "__main__":
    main()
