"""Fields of a form, which are texts, as the values that they write. Imports no torch."""

import json
import re
from collections.abc import Sequence
from typing import Any, get_args

from opensora.config.schema import wants_text
from opensora.serve.refusal import Refused
from opensora.serve.request import ALIASES, HINTS, OWN, SAMPLING
from opensora.utils.files.untrusted import short

MAX_VALUE = 4096  # characters of a field that is no prompt; calibrated ratios of a cache take the most
MAX_NAME, MAX_LEVELS = 200, 4
TEXTS = ("prompt", "neg", "negative_prompt", "input_reference")  # of any length here
_KEYS = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")


def from_form(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Fields of a form with values of their types: ``seed=7``, ``cache[kind]=first_block``, ``list[]=1``. An empty
    value is a field that was left empty.

    Raises:
        Refused: a field that is there twice, or a name or value that cannot be read.
    """
    result: dict[str, Any] = {}
    for name, text in pairs:
        found = _KEYS.fullmatch(name)
        if not found or len(name) > MAX_NAME:
            raise Refused(400, f"{short(name)}: no name of a field", param=short(name), code="unknown_field")
        head, below = found[1], re.findall(r"\[([^\[\]]*)\]", found[2])
        if text == "" and head not in ("neg", "negative_prompt"):
            continue
        if head not in TEXTS and len(text) > MAX_VALUE:
            raise Refused(400, f"{head}: more than {MAX_VALUE} characters", param=head, code="invalid_value")
        _put(result, [head, *below], _typed(head, text, bool(below)))
    return result


def _put(into: dict[str, Any], keys: list[str], value: Any) -> None:
    """``{a: {b: value}}`` for a, b; a list for a, ""."""
    refused = Refused(400, f"{keys[0]}: there twice; give it once", param=keys[0], code="invalid_value")
    if len(keys) > MAX_LEVELS:
        raise Refused(400, f"{keys[0]}: nested too deeply", param=keys[0], code="invalid_value")
    place: Any = into
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        if key == "":
            if following is not None:
                raise refused
            place.append(value)
            return
        if not isinstance(place, dict) or (following is None and key in place):
            raise refused
        if following is None:
            place[key] = value
            return
        place = place.setdefault(key, [] if following == "" else {})
        if isinstance(place, list) != (following == ""):
            raise refused


def _typed(name: str, text: str, nested: bool) -> Any:
    """A text of a form as the value that it writes, where the field is no text."""
    own = ALIASES.get(name, name)
    if own in OWN and own != "priority":
        return text
    if own in SAMPLING and not nested and wants_text(HINTS[own]):
        return None if text == "null" and type(None) in get_args(HINTS[own]) else text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text, parse_constant=lambda constant: constant)
    except (ValueError, RecursionError):
        return text
