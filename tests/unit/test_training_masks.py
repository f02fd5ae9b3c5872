"""Frames that training gives the model, as in Open-Sora 1.1 to 1.3: distributions of masks by enumerating every draw,
against the golden ones; frames of 1.3 and what they are coded from; and what the family's files say of them."""

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora.conditioning import ConditioningConfig, frames
from opensora.conditioning.frames import MASKS, draw_known
from opensora.conditioning.mask_types import MASK_TYPES, draw_given, noisy_pixels
from opensora.config.family.masks import masks_of
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.utils.errors import UserError


class Choices:
    """In place of a generator: whole numbers come one after the other from ``path``, and what was asked is noted."""

    def __init__(self, path: tuple[int, ...]) -> None:
        self.path, self.asked = list(path), list[int]()

    def integers(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        self.asked.append(high - low)
        return low + (self.path[len(self.asked) - 1] if len(self.asked) <= len(self.path) else 0)

    def random(self) -> float:
        return 0.0  # the first strategy


def outcomes(draw: Callable[[Any], Any]) -> Iterator[tuple[Any, Fraction]]:
    """Everything that comes out, with its probability."""
    paths: list[tuple[int, ...]] = [()]
    while paths:
        path = paths.pop()
        choices = Choices(path)
        found = draw(choices)
        if len(choices.asked) > len(path):
            paths += [(*path, choice) for choice in range(choices.asked[len(path)])]
        else:
            yield found, Fraction(1) / int(np.prod(choices.asked, initial=1))


def distribution(draw: Callable[[Any], Any], length: int) -> dict[str, float]:
    """{"1" for noisy and "0" for given frames: probability}, as the golden files have it."""
    total: dict[str, Fraction] = {}
    for known, share in outcomes(draw):
        known = np.zeros(length, bool) if known is None else known
        name = "".join("0" if given else "1" for given in known)
        total[name] = total.get(name, Fraction(0)) + share
    return {name: float(share) for name, share in total.items()}


def drawn(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Of ``draw_known``, whose only strategy this is."""
    masks = {} if name == "identity" else {name: 1.0}

    def draw(choices: Choices) -> Any:
        monkeypatch.setattr(frames, "numpy_generator", lambda *key: choices)
        return draw_known(1, 2, 3, length, masks)

    return distribution(draw, length)


@pytest.mark.parametrize("version", ["1_1", "1_2", "1_3"])
def test_distributions_of_masks_are_equal(golden: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But of two and three frames, a quarter of which is none: the original fails there, and here one is given."""
    cases = json.loads((golden / f"v1/mask_generator_v{version}.json").read_text())
    compared = failed = 0
    for case, wanted in cases.items():
        name, _, count = case.partition("|")
        length, name = int(count), {"mask_no": "identity"}.get(name, name.removeprefix("mask_"))
        found = drawn(name, length, monkeypatch)
        if isinstance(wanted, str):
            assert wanted == "ValueError" and length in (2, 3) and name.startswith("quarter")
            as_one = drawn(name.replace("quarter", "image"), length, monkeypatch)
            assert found == as_one
            failed += 1
        elif set(wanted) == {"00"}:  # nothing would be learned: 1.3 gives the first alone
            assert distribution(lambda choices, name=name: MASKS[name](2, choices), 2) == wanted
            assert version != "1_3" and found == {"01": 1.0}
        else:
            assert found == pytest.approx(wanted, abs=1e-11), case
        compared += 1
    assert compared == len(cases) >= 54 and failed == 8


def test_random_gives_each_frame_with_a_common_probability() -> None:
    """U(0.1, 0.9) for all frames of a clip, one at least noisy: how many are given, by chi-square."""
    length, samples = 6, 6000
    counts = np.zeros(length + 1)
    places = np.zeros(length)
    for sample in range(samples):
        known = draw_known(5, 0, sample, length, {"random": 1.0})
        counts[0 if known is None else known.sum()] += 1
        places += 0 if known is None else known
    p = (np.arange(20000) + 0.5) / 20000 * 0.8 + 0.1
    binomial = [np.mean(_choose(length, k) * p**k * (1 - p) ** (length - k)) for k in range(length + 1)]
    wanted = np.array([*binomial[:-2], binomial[-2] + binomial[-1]]) * samples  # all of them: one is made noisy
    assert counts[length] == 0
    assert ((counts[:length] - wanted) ** 2 / wanted).sum() < 20.5  # 0.1 % of 5 degrees of freedom
    assert np.ptp(places) < 6 * np.sqrt(samples / 4)


def _choose(n: int, k: int) -> int:
    return int(np.prod([Fraction(n - i, i + 1) for i in range(k)], initial=1))


def test_frames_of_every_type_are_equal(golden: Path) -> None:
    cases = json.loads((golden / "v1/mask_index_v1_3.json").read_text())
    for case, wanted in cases.items():
        name, _, count = case.partition("|")
        for kind in (name, f"{name}_noisy") if name != "none" else (name,):
            rng = np.random.default_rng(0)
            assert sorted(set(MASK_TYPES[kind](int(count), rng))) == wanted, case
            assert sorted(set(draw_given(1, 2, 3, int(count), {kind: 2.0}).frames)) == wanted
        assert draw_given(1, 2, 3, 1, {name: 1.0}).frames == []  # of a still
    assert len(cases) == 35


@pytest.mark.parametrize("length", [2, 3, 5])
def test_other_gives_some_at_one_end(length: int) -> None:
    found = {tuple(index): share for index, share in outcomes(lambda c: MASK_TYPES["other"](length, c))}
    heads = {tuple(range(n)) for n in range(1, length)}
    tails = {tuple(range(length - n, length)) for n in range(1, length)}
    assert found == dict.fromkeys(heads | tails, Fraction(1, 2 * (length - 1)))


def test_types_are_drawn_by_weight_and_belong_to_samples() -> None:
    weights = {"none": 8, "i2v_head": 2, "v2v_tail_noisy": 6, "i2v_loop": 0}
    found = [draw_given(1, 2, sample, 6, weights) for sample in range(4000)]
    shares = [np.mean([one.frames == frames for one in found]) for frames in ([], [0], [3, 4, 5])]
    assert np.abs(np.array(shares) - np.array([0.5, 0.125, 0.375])).max() < 0.025
    noise = np.array([one.noise for one in found if one.frames == [3, 4, 5]])
    assert 0.1 <= noise.min() < 0.105 and 0.295 < noise.max() <= 0.3 and abs(noise.mean() - 0.2) < 0.01
    assert all(one.noise == 0 for one in found if one.frames != [3, 4, 5])
    assert found[7] == draw_given(1, 2, 7, 6, weights) and found != [
        draw_given(1, 3, s, 6, weights) for s in range(4000)
    ]


def test_noisy_pixels_are_mixed_by_sample() -> None:
    pixels = torch.rand(2, 3, 2, 4, 4) * 2 - 1
    mixed = noisy_pixels(pixels, [0.25, 0.1], 1, 2, (5, 9))
    for row, (part, sample) in enumerate([(0.25, 5), (0.1, 9)]):
        e = (mixed[row] - (1 - part) * pixels[row]) / part
        assert abs(e.mean()) < 0.4 and 0.7 < e.std() < 1.3
        alone = noisy_pixels(pixels[row : row + 1], [part], 1, 2, (sample,))
        assert torch.equal(alone[0], mixed[row])


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (
            {"mask_no": 0.75, "mask_quarter_head": 0.05, "mask_image_random": 0.2},
            {"quarter_head": 0.05, "image_random": 0.2},
        ),
        ({"identity": 0.5, "intepolate": 0.5}, {"intepolate": 0.5}),
        ({"random": 0.2, "image_head": 0.1}, {"random": 0.2, "image_head": 0.1}),
        (
            {"identity": 0.7, "random": 0.15, "mask_head": 0.05, "mask_tail": 0.1},
            {"random": 0.15, "quarter_head": 0.05, "quarter_tail": 0.1},
        ),
    ],
)
def test_names_of_the_family(given: dict[str, float], ours: dict[str, float]) -> None:
    assert masks_of(given) == ours
    assert ConditioningConfig(masks=masks_of(given)).masks == ours


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"mask_no": 0.75, "mask_image_head": 0.05}, "probabilities add up to 0.8; must add up to 1"),
        ({"mask_image_head": 0.5}, "probabilities add up to 0.5; must add up to 1"),
        ({"identity": 0.9, "random": 0.2}, "probabilities add up to 1.1; must add up to 1"),
        ({"mask_head": 0.5, "quarter_head": 0.5}, "names a strategy twice"),
        ({"mask_random": 0.5, "random": 0.5}, "names a strategy twice"),
    ],
)
def test_what_mask_ratios_cannot_say(given: dict[str, float], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        masks_of(given)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"mask_types": {"i2v_hed": 1}}, "mask_types.i2v_hed: no such kind; must be one of none, i2v_head"),
        ({"mask_types": {"none": -1}}, "mask_types.none=-1: must be a weight"),
        ({"mask_types": {"none": 0}}, "mask_types: every weight is 0"),
        ({"mask_types": {"none_noisy": 1}}, "mask_types.none_noisy: no such kind"),
        ({"mask_types": {"none": 1}, "references": {"t2v": 1}}, "mask_types: must be {} with references"),
        ({"mask_types": {"none": 1}, "known_in_loss": False}, "known_in_loss=false: must be true with mask_types"),
        ({"masks": {"random": 0.9, "image_head": 0.2}}, "masks: probabilities add up to 1.1: must be at most 1"),
    ],
)
def test_what_the_section_cannot_say(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        ConditioningConfig(**section)
    assert problem in str(caught.value)


def test_a_key_called_null_is_quoted(tmp_path: Path) -> None:
    """YAML reads it as nothing; the error says what to write."""
    (tmp_path / "run.yaml").write_text("conditioning:\n  dropout: {conditions: {keep: 1, null: 1}}\n")
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, tmp_path / "run.yaml")
    assert (
        'a key under conditioning.dropout.conditions is neither text nor whole number; write "null" in quotes'
        in str(caught.value)
    )
