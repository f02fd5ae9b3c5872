"""Which latent frames of a clip that is sampled come from references: mask strategies of Open-Sora 1.1 to 1.3, and the
kinds of conditions of 1.3.

A mask strategy is tuples by ``;`` of fields by ``,``: clip, reference, first frame in the reference, first frame in the
clip, length, edit ratio. Fields that are missing are 0, 0, 0, 0, 1, 0; negative first frames count from the end. Edit
ratio 0 keeps frames as they are, 1 makes them anew. All numbers of frames are of latent ones.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

KEPT, FREE = 0.0, 1.0  # edit ratios
PREVIOUS = -1  # in place of the number of a reference: the clip before
KINDS_1_3 = ("t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head")
_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,9}\s*")
_NUMBER = re.compile(r"\s*[+-]?([0-9]{1,9}(\.[0-9]{0,20})?|\.[0-9]{1,20})(e[+-]?[0-9]{1,2})?\s*", re.IGNORECASE)


class Placement(NamedTuple):
    """One tuple of a mask strategy."""

    clip: int = 0  # from 0, of those that go on from one another
    reference: int = 0
    reference_start: int = 0
    start: int = 0
    length: int = 1
    edit_ratio: float = KEPT


class Source(NamedTuple):
    """Where a latent frame comes from."""

    reference: int  # or PREVIOUS
    frame: int


@dataclass(frozen=True)
class PlacedFrames:
    """Of every latent frame of a clip."""

    edit_ratios: tuple[float, ...]
    sources: tuple[Source | None, ...]  # None: noise

    @property
    def given(self) -> list[int]:
        """Frames that come from somewhere."""
        return [frame for frame, source in enumerate(self.sources) if source is not None]


def parse_mask_strategy(text: str | None) -> list[Placement]:
    """The tuples of a strategy; none for "" and None.

    Raises:
        ValueError: what cannot be read, or is no length, ratio or number of a clip or reference.
    """
    return [_placement(part) for part in text.split(";")] if text else []


def _placement(text: str) -> Placement:
    fields, names = text.split(","), Placement._fields
    if len(fields) > len(names):
        raise ValueError(f"{text.strip()!r:.60} has {len(fields)} fields, must have at most {len(names)}: {_names()}")
    values: list[float] = []
    for name, field in zip(names, fields, strict=False):
        pattern, kind = (_NUMBER, "a number") if name == "edit_ratio" else (_WHOLE, "a whole number")
        if not pattern.fullmatch(field):
            raise ValueError(
                f"{text.strip()!r:.60}: {name}={field.strip()!r:.20} must be {kind}; fields are {_names()}"
            )
        values.append(float(field) if name == "edit_ratio" else int(field))
    found = Placement(*values)  # type: ignore[arg-type]
    for name in ("clip", "reference"):
        if getattr(found, name) < 0:
            raise ValueError(f"{text.strip()!r:.60}: {name}={getattr(found, name)} must be 0 or more")
    if found.length < 1:
        raise ValueError(f"{text.strip()!r:.60}: length={found.length} must be 1 or more")
    if not KEPT <= found.edit_ratio <= FREE:
        raise ValueError(f"{text.strip()!r:.60}: edit_ratio={found.edit_ratio:g} must be from 0 (keep) to 1 (free)")
    return found


def _names() -> str:
    return ", ".join(Placement._fields)


def nearest_block(frame: int, align: int, length: int) -> int:
    """The multiple of ``align`` that is nearest to a frame, half rounded down; rounding up never leaves the last whole
    block of ``length`` frames."""
    block, beyond = divmod(frame, align)
    if 2 * beyond > align and block + 1 < length // align:
        block += 1
    return block * align


def apply_mask_strategy(
    placements: Sequence[Placement],
    latent_frames: int,
    reference_lengths: Sequence[int],
    clip: int = 0,
    align: int | None = None,
    *,
    shortens: bool = True,
) -> PlacedFrames:
    """What a strategy puts into one clip; a later tuple wins over an earlier one.

    Args:
        reference_lengths: latent frames of every reference.
        align: both first frames become multiples of it, see ``nearest_block``.
        shortens: lengths end with the clip and the reference, as from Open-Sora 1.2 on; else they must fit.

    Raises:
        ValueError: a reference that is not there, a first frame outside, or a length that does not fit.
    """
    ratios = [FREE] * latent_frames
    given: list[Source | None] = [None] * latent_frames
    for placed in placements:
        if placed.clip != clip:
            continue
        if placed.reference >= len(reference_lengths):
            count = len(reference_lengths)
            there = f"there {'is' if count == 1 else 'are'} {count or 'none'}, counted from 0"
            raise ValueError(f"{_shown(placed)}: reference={placed.reference}: {there}")
        length = reference_lengths[placed.reference]
        first = _first(placed, "reference_start", length, "the reference", align)
        start = _first(placed, "start", latent_frames, "the clip", align)
        count = min(placed.length, latent_frames - start, length - first)
        if count < placed.length and not shortens:
            raise ValueError(
                f"{_shown(placed)}: length={placed.length} must be at most {count}: the clip has {latent_frames} "
                f"latent frames, the reference {length}"
            )
        for offset in range(count):
            ratios[start + offset] = placed.edit_ratio
            given[start + offset] = Source(placed.reference, first + offset)
    return PlacedFrames(tuple(ratios), tuple(given))


def _first(placed: Placement, name: str, length: int, of: str, align: int | None) -> int:
    value: int = getattr(placed, name)
    if not -length <= value < length:
        raise ValueError(
            f"{_shown(placed)}: {name}={value} must be from {-length} to {length - 1}, latent frames of {of}"
        )
    frame = value + length if value < 0 else value
    return frame if align is None else nearest_block(frame, align, length)


def _shown(placed: Placement) -> str:
    return repr(",".join(f"{value:g}" for value in placed))


def kind_of_clip(
    kind: str, length: int, latent_frames: int, reference_lengths: Sequence[int], *, clip: int = 0, clips: int = 1
) -> PlacedFrames:
    """The frames that a kind of Open-Sora 1.3 gives to one of ``clips`` that go on from one another.

    The first clip has the head of the first reference, each after it the last frames of the one before. A clip alone
    has a tail, with i2v_loop every later clip, with i2v_tail the last one: the first frame of the second reference, or
    the last one of the first. The tail of a clip alone with i2v_tail is always the latter.

    Args:
        kind: one of ``KINDS_1_3``; t2v: nothing but what a clip goes on from.
        length: latent frames of the clip before, or of v2v_head, if the reference has so many.
        reference_lengths: none: t2v.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS_1_3:
        raise ValueError(f"{kind!r:.40}: must be one of {', '.join(KINDS_1_3)}")
    kind, given = kind if reference_lengths else "t2v", dict[int, Source]()
    if clip:
        given |= {frame: Source(PREVIOUS, latent_frames - length + frame) for frame in range(length)}
    elif kind == "v2v_head":
        given |= {frame: Source(0, frame) for frame in range(min(length, reference_lengths[0], latent_frames))}
    elif kind in ("i2v_head", "i2v_loop"):
        given[0] = Source(0, 0)
    ends = kind == "i2v_loop" or (kind == "i2v_tail" and clip == clips - 1)
    if ends and (clip or clips == 1):
        second = len(reference_lengths) > 1 and (kind == "i2v_loop" or clip > 0)
        given[latent_frames - 1] = Source(1, 0) if second else Source(0, reference_lengths[0] - 1)
    ratios = tuple(KEPT if frame in given else FREE for frame in range(latent_frames))
    return PlacedFrames(ratios, tuple(given.get(frame) for frame in range(latent_frames)))
