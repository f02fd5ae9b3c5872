"""Size tables against the published lists, and on the small multiples that tiny models use."""

import pytest

from opensora.datasets.buckets.aspect import area_of, training_sizes

LIST_256 = [(160, 400), (176, 368), (192, 336), (208, 320), (224, 288), (256, 256)]
LIST_768 = [(496, 1184), (544, 1088), (560, 1056), (576, 1024), (624, 944), (672, 880), (768, 768), (992, 592)]


@pytest.mark.parametrize(("name", "listed"), [("256px", LIST_256), ("768px", LIST_768)])
def test_training_sizes_are_the_published_ones(name: str, listed: list[tuple[int, int]]) -> None:
    assert set(training_sizes(name, 16)) == set(listed) | {(w, h) for h, w in listed}


def test_areas() -> None:
    assert area_of("256px") == 65536
    assert area_of("480p") == 409600
    assert area_of("720p_ar16:9") == 921600


def test_suffixes_keep_one_size() -> None:
    assert training_sizes("256px_ar1:1", 16) == ((256, 256),)
    assert training_sizes("256px_ar16:9", 16) == ((192, 336),)
    assert training_sizes("768px_ar8:5", 16) == ((592, 992),)
    (best,) = training_sizes("256px_max", 16)
    assert best[0] * best[1] == max(h * w for h, w in training_sizes("256px", 16))


@pytest.mark.parametrize("multiple", [8, 16, 32])
@pytest.mark.parametrize("name", ["32px", "48px", "64px", "256px", "480p"])
def test_sizes_are_multiples_near_the_area_and_closed_under_transposing(name: str, multiple: int) -> None:
    sizes = training_sizes(name, multiple)
    assert len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == 0 and width % multiple == 0 and height > 0 and width > 0
    if multiple <= 16:
        assert any(abs(h * w - area_of(name)) <= 0.15 * area_of(name) for h, w in sizes)


@pytest.mark.parametrize(
    ("name", "words"),
    [("256", "256px"), ("0px", "256px"), ("256px_ar7:3", "16:9"), ("256px_big", "256px_ar16:9"), ("8px", "16x16")],
)
def test_bad_names_say_what_is_allowed(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        training_sizes(name, 16)
