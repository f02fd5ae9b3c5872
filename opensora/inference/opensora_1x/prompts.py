"""Prompts as the sampling commands of Open-Sora 1.0 to 1.3 take them.

``|0| a |2| b`` is one prompt for clips that go on from one another: b from clip 2 on. ``text{"reference_path": ...,
"mask_strategy": ...}`` has its references behind it. Scores follow a prompt as they followed the captions of training.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

from opensora.config.opensora_1x import Release, Score
from opensora.config.schema import suggestion
from opensora.utils.files.untrusted import parse_json

JSON_KEYS = ("reference_path", "mask_strategy")
FIRST = "|0|"
MOST_PARTS = 1000
_BRACES = {"1.1": re.compile(r"(?=[{\[])")}  # where JSON begins; from 1.2 on:
_BRACE = re.compile(r"(?=[{])")
_INDEX = re.compile(r"\s*[0-9]{1,9}\s*")
Levels: TypeAlias = Sequence[tuple[float, str]]  # (below, word)
AESTHETIC: Levels = (
    *((4, "terrible"), (4.5, "very poor"), (5, "poor"), (5.5, "fair"), (6, "good"), (6.5, "very good")),
    (math.inf, "excellent"),
)
MOTION: Levels = (
    *((0.5, "very low"), (2, "low"), (5, "fair"), (10, "high"), (20, "very high")),
    (math.inf, "extremely high"),
)


def split_prompt(prompt: str) -> tuple[list[str], list[int] | None]:
    """(parts without spaces around them, from which clip on each holds); a prompt without parts, and None.

    Raises:
        ValueError: parts that are not ``|n| text`` with rising n.
    """
    if not prompt.startswith(FIRST):
        return [prompt], None
    pieces = _pieces(prompt)
    return [text.strip() for _, text in pieces], [index for index, _ in pieces]


def merge_prompt(parts: Sequence[str], indices: Sequence[int] | None) -> str:
    """The inverse of ``split_prompt``."""
    if indices is None:
        return parts[0]
    return "".join(f"|{index}|{text}" for index, text in zip(indices, parts, strict=True))


def prompt_of_clip(prompt: str, clip: int) -> str:
    """The part of a prompt that clip number ``clip`` is made from, with the spaces around it.

    Raises:
        ValueError: see ``split_prompt``.
    """
    if not prompt.startswith(FIRST):
        return prompt
    return [text for index, text in _pieces(prompt) if index <= clip][-1]


def _pieces(prompt: str) -> list[tuple[int, str]]:
    words = prompt.split("|")[1:]
    found = list(zip(words[::2], words[1::2], strict=False))
    if len(words) % 2 or not all(_INDEX.fullmatch(index) for index, _ in found) or len(found) > MOST_PARTS:
        raise ValueError(
            "parts of a prompt are |0| text |2| text, with the numbers of clips; no other | may stand there"
        )
    indices = [int(index) for index, _ in found]
    if any(one >= other for one, other in pairwise(indices)):
        raise ValueError(f"the numbers of clips must rise: {', '.join(map(str, indices[:20]))}")
    return [(index, text) for index, (_, text) in zip(indices, found, strict=True)]


def for_each_part(prompt: str, change: Callable[[str], str]) -> str:
    """A prompt with ``change`` of each of its parts."""
    parts, indices = split_prompt(prompt)
    return merge_prompt([change(part) for part in parts], indices)


def split_json(prompt: str, release: Release) -> tuple[str, dict[str, str]]:
    """(prompt, what the JSON at its end says); 1.0 knows no JSON, in 1.1 a ``[`` begins it as well.

    Raises:
        ValueError: no JSON object of texts by the two keys.
    """
    if release == "1.0":
        return prompt, {}
    pieces = _BRACES.get(release, _BRACE).split(prompt)
    if len(pieces) == 1:
        return prompt, {}
    if len(pieces) > 2:
        raise ValueError(
            f"has {pieces[1][0]!r} and {pieces[2][0]!r}; must have one {{...}} at its end, and none in the text"
        )
    found = parse_json(pieces[1], lambda reason: ValueError(f"what follows {pieces[1][0]!r} is no JSON: {reason}"))
    if not isinstance(found, dict):
        raise ValueError(f"what follows {pieces[1][0]!r} must be {{...}} with {' and '.join(JSON_KEYS)}")
    for key, value in found.items():
        if key not in JSON_KEYS:
            raise ValueError(f"{key!r:.40}: unknown key in the JSON; {suggestion(key, JSON_KEYS)}")
        if not isinstance(value, str):
            raise ValueError(f"{key}: must be a text in the JSON")
    return pieces[0], found


def with_scores(
    prompt: str, release: Release, aes: Score | None = None, flow: Score | None = None, camera_motion: str | None = None
) -> str:
    """One part of a prompt with sentences about its scores and the camera; each unless the prompt has one already.

    Raises:
        ValueError: a score that is no number, for 1.2.
    """
    if release in ("1.0", "1.1"):
        return prompt
    aesthetic, motion = {
        "1.2": (("aesthetic score:", "aesthetic score: {}."), ("motion score:", "motion score: {}.")),
        "1.3": (
            ("aesthetic score is", "The aesthetic score is {}."),
            ("motion strength is", "The motion strength is {}."),
        ),
    }[release]
    told = prompt
    for (phrase, sentence), value, levels in ((aesthetic, aes, AESTHETIC), (motion, flow, MOTION)):
        if value is not None and phrase not in prompt:
            told += " " + sentence.format(_decimal(value) if release == "1.2" else _word(value, levels))
    if camera_motion is not None and "camera motion:" not in prompt:
        told += f" camera motion: {camera_motion}."
    return told


def _decimal(value: Score) -> str:
    number = _number(value)
    if number is None:
        raise ValueError(f"{value!r:.40}: must be a number, which release=1.2 writes out")
    return f"{number:.1f}"


def _word(value: Score, levels: Levels) -> str:
    """That of a number; a word passes."""
    number = _number(value)
    return str(value) if number is None else next(word for below, word in levels if number < below or below == math.inf)


def _number(value: Score) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
