"""Sealed JSON: anything but what was written is refused; shapes name the first place that does not fit."""

import hashlib
import json
from typing import Any

import pytest

from acceleration.files.sealed_json import (
    ANY,
    COUNT,
    FLAG,
    NULL,
    NUMBER,
    SHA256,
    TEXT,
    WHOLE,
    Each,
    Shape,
    mismatch,
    seal,
    unseal,
)

BODY = {"b": [1, 2.5, None, "é"], "a": {"x": True}}


def refused(text: str | bytes) -> str:
    with pytest.raises(ValueError) as error:
        unseal(text if isinstance(text, bytes) else text.encode(), ValueError)
    return str(error.value)


def test_what_was_written_is_read_back() -> None:
    assert unseal(seal(BODY).encode(), ValueError) == BODY
    assert unseal(seal({}).encode(), ValueError) == {}


def test_every_other_spelling_is_refused() -> None:
    text = seal(BODY)
    digest = hashlib.sha256(json.dumps(BODY, sort_keys=True).encode()).hexdigest()
    spellings = [
        text + " ",
        text + "\n",
        " " + text,
        text.replace(": ", ":"),
        text.replace('{"b"', '{"b": 0, "b"'),  # twice: JSON keeps the last, and nobody knows which was meant
        text.replace("2.5", "2.50"),
        text.replace("\\u00e9", "é"),
        json.dumps({"a": BODY["a"], "b": BODY["b"], "sha256": digest})[:-1],
        text.replace(digest, digest.upper()),
        text.replace("true", "false"),
    ]
    for spelling in spellings:
        assert spelling != text and refused(spelling)
    assert refused("[]") == "holds no digest of itself" == refused('{"a": 1}')
    assert "not what was written" in refused(text.replace("2.5", "3.5"))
    assert "nested too deeply" in refused("[" * 10**5)
    assert refused(b"\xff\xfe")


FITS: list[tuple[Any, Shape]] = [
    (0, COUNT),
    (-1, WHOLE),
    (1.5, NUMBER),
    ({"a": 1, "b": "x"}, {"a": COUNT, "b?": TEXT}),
    ({"a": 1}, {"a": COUNT, "b?": TEXT}),
    ({"a": 1, "z": []}, {"a": COUNT, "...": ANY}),
    ({"x": [1, 2], "y": []}, Each(Each(COUNT, list))),
    ([1, "a"], [COUNT, TEXT]),
    (None, (TEXT, NULL)),
    ("0" * 64, SHA256),
]
MISFITS: list[tuple[Any, Shape, str]] = [
    (True, COUNT, "the file is true, must be a whole number from 0"),
    (-1, COUNT, "the file is -1, must be"),
    (2**63, WHOLE, "of at most 64 bits"),
    (float("nan"), NUMBER, "must be a number"),
    (float("inf"), NUMBER, "must be a number"),
    (1, FLAG, "must be true or false"),
    ([], {"a": COUNT}, "the file is a list, must be an object"),
    ({}, {"a": COUNT}, "a is missing"),
    ({"a": 1, "z": 1}, {"a": COUNT}, "z should not be there"),
    ({"x": {"y": [1, "2"]}}, Each(Each(Each(COUNT, list))), 'x.y.1 is "2", must be a whole number'),
    ([1], [COUNT, TEXT], "is a list of 1, must be one of 2"),
    (1, (TEXT, NULL), "must be text"),
    ("0" * 63, SHA256, "must be a SHA-256"),
    ({"a\nb": 1}, Each(TEXT), "'a\\nb' is 1"),
]


@pytest.mark.parametrize("number", range(len(FITS)))
def test_what_fits(number: int) -> None:
    assert mismatch(*FITS[number]) is None


@pytest.mark.parametrize("number", range(len(MISFITS)))
def test_what_does_not_is_named(number: int) -> None:
    value, shape, expected = MISFITS[number]
    said = mismatch(value, shape)
    assert said is not None and expected in said and "\n" not in said, said
