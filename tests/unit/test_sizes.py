"""Frame sizes of sampling and of training by one rule, against the formula written out here."""

from math import sqrt

import pytest

from opensora.datasets.buckets.aspect import training_sizes
from opensora.sampling.options import SamplingOption, image_size, sanitize_sampling_option
from opensora.utils.errors import UserError
from opensora.utils.sizes import RATIOS

AREAS = {"256px": 256**2, "360p": int(360**2 * 16 / 9), "512px": 512**2, "720p": int(720**2 * 16 / 9), "768px": 768**2}
LISTED = {
    "2.39:1": 2.39,
    "2:1": 2,
    "16:9": 16 / 9,
    "1.85:1": 1.85,
    "9:16": 9 / 16,
    "5:8": 5 / 8,
    "3:2": 3 / 2,
    "4:3": 4 / 3,
    "1:1": 1,
}
TRANSPOSED = {"1:2.39": "2.39:1", "1:2": "2:1", "1:1.85": "1.85:1", "8:5": "5:8", "2:3": "3:2", "3:4": "4:3"}
CASES = [(name, ratio, d) for name in AREAS for ratio in (*LISTED, *TRANSPOSED) for d in (16, 32)]


def by_formula(area: int, ratio: str, d: int) -> tuple[int, int]:
    """(height, width) of a listed ratio r = w/h."""
    width = int(sqrt(area * LISTED[ratio]) // d) * d
    return int((area / width) // d) * d, width


def expected(name: str, ratio: str, d: int) -> tuple[int, int]:
    """The two ratios that are listed both ways have each other's transposed size."""
    both = {"16:9": "9:16", "9:16": "16:9"}
    other = (TRANSPOSED | both).get(ratio)
    return by_formula(AREAS[name], other, d)[::-1] if other else by_formula(AREAS[name], ratio, d)


def test_every_size_of_sampling_is_the_formulas() -> None:
    assert len(CASES) == 150
    wrong = []
    for name, ratio, d in CASES:
        found = image_size(name, ratio, d)
        option = sanitize_sampling_option(SamplingOption(resolution=name, aspect_ratio=ratio), multiple=d)
        if {found, (option.height, option.width)} != {expected(name, ratio, d)}:
            wrong.append((name, ratio, d, found, expected(name, ratio, d)))
    assert not wrong


def test_sizes_of_a_ratio_that_is_listed_both_ways() -> None:
    """Rounding begins with the width, so a frame of 100x100 pixels differs by which way it lies."""
    assert by_formula(100**2, "16:9", 16) == (64, 128) and by_formula(100**2, "9:16", 16) == (144, 64)
    assert image_size("100px", "16:9") == (64, 144) and image_size("100px", "9:16") == (128, 64)


@pytest.mark.parametrize(("d", "size"), [(16, (336, 256)), (32, (352, 256))])
def test_a_given_size_is_rounded_up(d: int, size: tuple[int, int]) -> None:
    option = sanitize_sampling_option(SamplingOption(width=250, height=333), multiple=d)
    assert (option.height, option.width) == size


def test_the_table_is_the_published_one() -> None:
    assert {name: round(w / h, 9) for name, (w, h) in RATIOS.items()} == {n: round(r, 9) for n, r in LISTED.items()}
    tall = {image_size("256px", ratio) for ratio in ("1:2.39", "1:2", "9:16", "1:1.85", "2:3", "3:4")}
    assert tall == {(384, 160), (352, 176), (336, 192), (304, 208), (288, 224)}
    assert (400, 160) in training_sizes("256px", 16)  # training then moves a multiple towards the area


def test_a_ratio_without_a_name_is_the_transpose_of_itself_on_its_side() -> None:
    for ratio, d in (("21:9", 16), ("7:3", 8), ("1.43:1", 32), ("32:1", 16)):
        tall = ":".join(reversed(ratio.split(":")))
        assert image_size("480p", tall, d) == image_size("480p", ratio, d)[::-1]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("aspect_ratio", "1000000000:1", "must be width:height"),
        ("aspect_ratio", "100:1", "from 1:32 to 32:1"),
        ("aspect_ratio", "1:100", "from 1:32 to 32:1"),
        ("aspect_ratio", "٣:١", "must be width:height"),
        ("aspect_ratio", "9" * 5000 + ":1", "must be width:height"),
        ("aspect_ratio", "1:0", "must be width:height"),
        ("aspect_ratio", "0.000001:1", "from 1:32"),
        ("aspect_ratio", "16:9\n", "must be width:height"),
        ("resolution", "٣px", "at most 5 digits"),
        ("resolution", "²px", "at most 5 digits"),
        ("resolution", "9" * 5000 + "px", "at most 5 digits"),
        ("resolution", "0px", "at most 5 digits"),
        ("resolution", "256px\n", "at most 5 digits"),
    ],
)
def test_names_that_are_none(field: str, value: str, said: str) -> None:
    with pytest.raises((ValueError, UserError), match=f"(?s)^{field}=.*{said}"):
        SamplingOption(**{field: value})
