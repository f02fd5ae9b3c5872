"""Light, change, bars and sharpness of frames, against values written out; and freezes and bars of clips."""

import numpy as np
import pytest

from data_pipeline.analysis.base import Video
from data_pipeline.analysis.luma import BAR_LEVELS, LARGE, SMALL, LumaAnalyser, LumaConfig, dark_depths, sharpness
from data_pipeline.media.scan import Frame
from data_pipeline.quality.bars import find_bars
from data_pipeline.quality.freezes import frozen_s, still_frames

VIDEO = Video(file="a", num_frames=50, fps=25.0, height=90, width=160)


def measured(pictures: list[np.ndarray], rate: float = 10.0, **config: float) -> dict[str, np.ndarray]:
    """Columns of frames that are these pictures, at every size that is asked for."""
    measurement = LumaAnalyser(LumaConfig(**config)).start(VIDEO)
    for index, picture in enumerate(pictures):
        measurement.see(Frame(index, index, index / rate, lambda side, pixels, seen=picture: seen))
    return measurement.columns()


def flat(value: float) -> np.ndarray:
    return np.full((54, 96), value, np.uint8)


def test_mean_and_change_of_every_frame() -> None:
    spot = flat(100)
    spot[3, 5] = 190
    found = measured([flat(100), flat(100), spot, flat(40)])
    np.testing.assert_allclose(found["luma_mean"], [100, 100, 100 + 90 / (54 * 96), 40], rtol=1e-6)
    np.testing.assert_allclose(found["luma_change"], [0, 0, 90 / (54 * 96), 60 + 90 / (54 * 96)], rtol=1e-6)
    assert found["luma_peak"].tolist() == [0, 0, 90, 150]


def test_a_frame_of_another_size_is_a_change() -> None:
    found = measured([flat(100), flat(100)[:20]])
    assert found["luma_change"][1] == 255 and found["luma_peak"][1] == 255


def test_samples_are_so_many_a_second() -> None:
    assert measured([flat(9)] * 20, samples_per_s=2.5)["luma_frame"].tolist() == [0, 4, 8, 12, 16]
    assert measured([flat(9)] * 20, samples_per_s=100)["luma_frame"].tolist() == list(range(20))


def test_pictures_are_asked_for_at_two_sizes() -> None:
    asked = []
    measurement = LumaAnalyser(LumaConfig(samples_per_s=1)).start(VIDEO)
    for index in range(3):
        measurement.see(Frame(index, index, index / 10, lambda side, pixels: (asked.append(side), flat(1))[1]))
    assert asked == [SMALL, LARGE, SMALL, SMALL]


def test_the_bright_end() -> None:
    picture = flat(10)
    picture.ravel()[:80] = 200  # of 5184 pixels: 1.5 %
    assert measured([picture])["luma_bright"].tolist() == [10]
    picture.ravel()[:130] = 200  # 2.5 %
    assert measured([picture])["luma_bright"].tolist() == [200]


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 60)).astype(np.uint8)
    mirrored = np.pad(picture.astype(float), 1, mode="reflect")
    laplacian = mirrored[:-2, 1:-1] + mirrored[2:, 1:-1] + mirrored[1:-1, :-2] + mirrored[1:-1, 2:] - 4.0 * picture
    assert sharpness(picture, [0, 0, 0, 0]) == pytest.approx(laplacian.var(), rel=1e-9)


def test_bars_do_not_count_for_sharpness() -> None:
    picture = np.random.default_rng(0).integers(60, 200, (80, 120)).astype(np.uint8)
    boxed = np.zeros((100, 120), np.uint8)
    boxed[10:90] = picture
    assert sharpness(boxed, [10, 10, 0, 0]) == pytest.approx(sharpness(picture[2:-2], [0, 0, 0, 0]), rel=0.05)
    found = measured([boxed], samples_per_s=1)
    assert found["luma_sharpness"][0] == pytest.approx(sharpness(boxed, [10, 10, 0, 0]))
    assert sharpness(boxed, [100, 100, 120, 120]) == 0


def test_dark_lines_from_each_side() -> None:
    picture = np.full((40, 60), 120, np.uint8)
    picture[:, :4], picture[:, 58:] = 20, 30
    picture[:7], picture[35:] = 0, 12
    dark, dim = dark_depths(picture)
    for found in (dark, dim):
        assert found[0].tolist() == [7] * len(BAR_LEVELS)  # top
        assert found[1].tolist() == [5] * len(BAR_LEVELS)  # bottom
    # Columns hold some of the bars above and below: 0, 12 and their own luma.
    column = picture[::4, 0].astype(float)
    luma = column.mean() + 2 * column.std()
    assert dark[2].tolist() == [4 * (luma < level) for level in BAR_LEVELS]


def test_noise_makes_no_line_bright_but_a_few_bright_pixels_do() -> None:
    noise = np.abs(np.random.default_rng(0).normal(0, 4, (40, 400))).astype(np.uint8)
    noise[20:] = 120
    at_24 = BAR_LEVELS.index(24)
    assert dark_depths(noise)[0, 0, at_24] == 20
    noise[10, 100:112] = 220  # 3 %
    assert dark_depths(noise)[0, 0, at_24] == 10
    assert dark_depths(noise)[1, 0, at_24] == 20


def sides(*rows: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(rows, np.float64)


def bars_of(dark: np.ndarray, dim: np.ndarray | None = None, inside: list[bool] | None = None) -> list[float]:
    of_clip = np.ones(len(dark), bool) if inside is None else np.array(inside)
    return list(find_bars(dark, dark if dim is None else dim, of_clip, 0.9))


def test_bars_are_what_nine_of_ten_pictures_have() -> None:
    dark = np.tile(sides((0.12, 0.1, 0, 0)), (20, 1))
    assert bars_of(dark) == [0.12, 0.1, 0, 0]
    dark[:2, 1] = 0.03  # a subtitle in it, for a tenth of the time
    assert bars_of(dark) == [0.12, 0.1, 0, 0]
    dark[2, 1] = 0.03
    assert bars_of(dark) == [0.12, 0.03, 0, 0]


def test_black_pictures_tell_nothing_of_bars() -> None:
    black, boxed = sides((1, 1, 1, 1)), sides((0.1, 0.1, 0, 0))
    assert bars_of(np.concatenate([np.repeat(black, 30, 0), boxed])) == [0.1, 0.1, 0, 0]
    assert bars_of(np.repeat(black, 5, 0)) == [0, 0, 0, 0]
    assert bars_of(boxed[:0]) == [0, 0, 0, 0]


def test_a_dark_scene_of_a_letterboxed_film_has_the_bars_of_the_film() -> None:
    dark = np.concatenate([np.tile(sides((0.1, 0.1, 0, 0)), (20, 1)), np.tile(sides((0.3, 0.35, 0.2, 0)), (5, 1))])
    found = bars_of(dark, inside=[False] * 20 + [True] * 5)
    assert found[:2] == [0.1, 0.1]


def test_a_bright_spot_in_the_dark_has_no_bars() -> None:
    dark = np.tile(sides((0.3, 0.3, 0.2, 0.2)), (10, 1))
    assert bars_of(dark, dim=dark + 0.2) == [0, 0, 0, 0]
    dim = dark + 0.2
    dim[4] = dark[4]  # the picture is bright up to its edges at one moment of ten
    assert bars_of(dark, dim=dim) == [0.3, 0.3, 0.2, 0.2]


def test_a_freeze_is_as_long_as_its_picture_is_shown() -> None:
    times = np.arange(101) / 10
    still = np.zeros(100, bool)
    still[21:40] = True  # frame 20 is shown from 2.0 to 4.0 s
    assert frozen_s(times, still, 0.75) == pytest.approx(2.0)
    still[60:66] = True  # 0.7 s
    assert frozen_s(times, still, 0.75) == pytest.approx(2.0)
    assert frozen_s(times, still, 0.7 - 1e-9) == pytest.approx(2.7)
    still[:] = True
    assert frozen_s(times, still, 0.75) == pytest.approx(10)


def test_the_first_frame_begins_a_freeze_whatever_is_before_it() -> None:
    times = np.arange(21) / 10
    still = np.array([False] + [True] * 9 + [False] * 10)
    assert (
        frozen_s(times, still, 0.75) == frozen_s(times, np.array([True] * 10 + [False] * 10), 0.75) == pytest.approx(1)
    )


def test_what_an_encoder_adds_to_a_still_picture_is_no_change() -> None:
    change, peak = np.zeros(30), np.zeros(30)
    change[3::4], peak[3::4] = 0.5, 7
    assert still_frames(change, peak, 0.1, 4)[3:28].all()
    peak[11] = 9  # something small moves
    assert np.flatnonzero(~still_frames(change, peak, 0.1, 4)[3:28]).tolist() == [8]
    twice = np.where(np.arange(30) % 2, 0.5, 0.0)  # a slow motion whose frames come twice
    assert not still_frames(twice, np.full(30, 4), 0.1, 4)[1::2].any()


def test_one_frame_that_is_shown_for_long_is_a_freeze() -> None:
    assert frozen_s(np.array([0, 0.1, 0.2, 3.2, 3.3]), np.zeros(4, bool), 0.75) == pytest.approx(3)


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_refusals(rate: float) -> None:
    with pytest.raises(ValueError, match="samples_per_s"):
        LumaConfig(samples_per_s=rate)
