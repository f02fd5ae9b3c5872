import itertools
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opensora.models.base import AutoencoderShape, latent_grid
from opensora.sampling.denoisers import DENOISERS, DistilledDenoiser, I2VDenoiser
from opensora.sampling.guidance import oscillate
from opensora.sampling.noise import get_noise
from opensora.sampling.options import SamplingOption, image_size, sanitize_sampling_option
from opensora.schedulers.timesteps import coded_frames, flow_shift, get_schedule, latent_frames, time_shift
from opensora.utils.files.video_writer import write_image, write_video


def test_flow_shift_by_hand() -> None:
    assert flow_shift(256, 1) == 1
    assert flow_shift(4096, 1) == 3
    assert flow_shift(2176, 1) == 2
    assert flow_shift(256, 9) == 3
    assert flow_shift(4096, 33) == pytest.approx(3 * 33**0.5)
    assert flow_shift(8 * 1024, 1) == pytest.approx(3 + 2 * 4096 / 3840)  # goes on beyond the table


def test_time_shift_by_hand() -> None:
    assert torch.allclose(time_shift(3.0, torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.0, 0.75, 1.0]))


def test_schedule() -> None:
    assert get_schedule(4, 256, 1) == [1, 0.75, 0.5, 0.25, 0]
    assert get_schedule(2, 4096, 1) == [1, 0.75, 0]
    assert get_schedule(2, 4096, 1, shift=False) == [1, 0.5, 0]
    assert get_schedule(2, 256, 1, alpha=3) == [1, 0.75, 0]


@pytest.mark.parametrize(
    ("resolution", "ratio", "size"),
    [
        ("256px", "16:9", (192, 336)),
        ("256px", "1:1", (256, 256)),
        ("768px", "16:9", (576, 1024)),
        ("768px", "1:1", (768, 768)),
        ("256px", "9:16", (336, 192)),
        ("144p", "1:1", (192, 192)),
    ],
)
def test_image_size(resolution: str, ratio: str, size: tuple[int, int]) -> None:
    assert image_size(resolution, ratio) == size


def test_options_are_sanitized() -> None:
    option = sanitize_sampling_option(SamplingOption())
    assert (option.height, option.width, option.num_frames) == (192, 336, 129)
    option = sanitize_sampling_option(SamplingOption(width=100, height=33, num_frames=1), multiple=32)
    assert (option.height, option.width) == (64, 128)
    assert sanitize_sampling_option(SamplingOption(num_frames=8)).num_frames == 8


def test_any_number_of_frames_is_rounded_up_to_what_can_be_coded() -> None:
    for stride, causal, multiple in itertools.product((1, 4, 8), (True, False), (1, 2, 3)):
        shape = AutoencoderShape(4, (stride, 8, 8), causal)
        possible = [
            frames
            for frames in range(2, 120)
            if (frames - causal) % stride == 0 and (frames - causal) // stride + causal > (not causal and stride > 1)
        ]
        whole = [frames for frames in possible if latent_grid(frames, 8, 8, shape)[0] % multiple == 0]
        assert coded_frames(1, stride, causal, multiple) == 1
        for asked in range(2, 80):
            made = coded_frames(asked, stride, causal, multiple)
            assert made == next(frames for frames in whole if frames >= asked)
            assert latent_frames(made, stride, causal) == latent_grid(made, 8, 8, shape)[0]


@pytest.mark.parametrize(
    "bad",
    [
        {"resolution": "big"},
        {"aspect_ratio": "16x9"},
        {"aspect_ratio": "0:9"},
        {"width": 64},
        {"num_frames": 0},
        {"num_steps": 0},
        {"method": "magic"},
        {"flow_shift": 0.0},
        {"guidance": -1.0},
    ],
)
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
        SamplingOption(**bad)


def test_noise_is_a_function_of_the_seed() -> None:
    noise = get_noise(2, 48, 64, 9, seed=0)
    assert noise.shape == (2, 16, 3, 6, 8) and noise.dtype == torch.float32
    assert torch.equal(noise, get_noise(2, 48, 64, 9, seed=0))
    assert not torch.equal(noise, get_noise(2, 48, 64, 9, seed=1))
    assert get_noise(1, 40, 40, 1, seed=0).shape == (1, 16, 1, 6, 6)  # whole patches
    assert get_noise(1, 64, 64, 8, seed=0, channels=128, stride=(4, 32, 32), causal=False, patch_size=1).shape == (
        1,
        128,
        2,
        2,
        2,
    )


class Scripted:
    """A model whose velocity is a known number per kind of pass; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *, img: Tensor, txt: Tensor, cond: Tensor | None = None, **others: Any) -> Tensor:
        self.calls.append({"img": img, "txt": txt, "cond": cond, **others})
        value = txt.mean() + (0 if cond is None else 10 * cond.mean())
        return torch.full_like(img, value.item())


def texts(*values: float) -> Tensor:
    """A row of features for each part of the batch."""
    return torch.tensor(values)[:, None, None].expand(-1, 2, 3)


def run(
    denoiser: Any, model: Any, timesteps: list[float], guidance: float, guidance_img: float = 1.0, **more: Any
) -> Tensor:
    """Three latent frames of two tokens; the prompt is 5, the negative one 3."""
    ids = torch.zeros(1, 6, 3)
    ids[0, :, 0] = torch.tensor([0, 0, 1, 1, 2, 2])
    inputs = {"txt": texts(5.0, 3.0, 3.0), "img_ids": ids.expand(3, -1, -1)}
    if denoiser.method == "distill":
        inputs = {name: x[:1] for name, x in inputs.items()}
    noise = torch.zeros(len(inputs["txt"]), 6, 2)
    return denoiser.denoise(model, noise, timesteps, guidance, guidance_img=guidance_img, **inputs, **more)


def test_two_passes_without_references() -> None:
    model, seen = Scripted(), []
    x = run(
        I2VDenoiser(),
        model,
        [1.0, 0.5, 0.0],
        4.0,
        context="whose tokens",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert x.shape == (1, 6, 2) and torch.allclose(x, torch.tensor(-(3 + 4.0 * 2)))  # u + g (c - u) over a time of -1
    assert len(model.calls) == 4 and seen == [(0, 2), (1, 2), (2, 2)]
    assert all(call["context"] == "whose tokens" for call in model.calls)
    assert model.calls[2]["timesteps"].tolist() == [0.5] and model.calls[2]["timesteps"].dtype == torch.float32
    assert all(call["guidance"].tolist() == [4.0] and "cond" in call for call in model.calls)  # as by the family


def test_one_pass_when_guidance_is_off() -> None:
    model = Scripted()
    assert torch.allclose(run(I2VDenoiser(), model, [1.0, 0.0], 1.0), torch.tensor(-5.0)) and len(model.calls) == 1


def test_a_denoiser_needs_no_more_than_noise_times_and_a_scale() -> None:
    """As in tours of the interface: one pass, and guidance is the model's to read."""
    asked: list[dict[str, Any]] = []

    def model(**given: Any) -> Tensor:
        asked.append(given)
        return 2 * given["img"] + given["guidance"][:, None, None]

    noise = torch.ones(2, 3, 4)
    x = I2VDenoiser().denoise(model, img=noise, timesteps=[1.0, 0.5, 0.0], guidance=3.0)
    assert torch.allclose(x, torch.full_like(x, -3.0 / 2))  # 1 - 5/2 = -3/2, and -3/2 - (-3 + 3)/2
    assert [set(given) for given in asked] == [{"img", "timesteps", "guidance"}] * 2


@pytest.mark.parametrize("rows", [(1, 2), (2, 6), (4, 4), (3, 1), (0, 0)])
def test_a_batch_that_is_not_in_three_parts(rows: tuple[int, int]) -> None:
    img, txt = (torch.zeros(count, 6, 2) for count in rows)
    if rows == (2, 6):  # once for every clip
        assert len(I2VDenoiser().denoise(Scripted(), img, [1.0, 0.0], 2.0, guidance_img=1.0, txt=txt)) == 2
        return
    with pytest.raises(ValueError, match=rf"img has {rows[0]} rows, other inputs \[{rows[1]}\]: .* three parts"):
        I2VDenoiser().denoise(Scripted(), img, [1.0, 0.0], 2.0, guidance_img=1.0, txt=txt)


def test_three_way_guidance() -> None:
    model = Scripted()
    x = run(I2VDenoiser(), model, [1.0, 0.0], 4.0, 2.5, cond=torch.ones(1, 6, 3))
    c, u, u2 = 15, 13, 3
    assert torch.allclose(x, torch.tensor(-(u2 + 2.5 * (u - u2) + 4.0 * (c - u))))
    assert len(model.calls) == 3 and model.calls[2]["cond"].abs().sum() == 0


def test_references_as_latents_are_packed_like_the_noise() -> None:
    """cat(mask, mask * latents) along channels, per token c, ph, pw."""
    model = Scripted()
    masks, latents = torch.zeros(1, 1, 3, 2, 4), torch.randn(1, 2, 3, 2, 4)
    masks[:, :, 0] = 1
    run(I2VDenoiser(), model, [1.0, 0.0], 4.0, 2.5, masks=masks, masked_ref=masks * latents)
    tokens = model.calls[0]["cond"]
    assert tokens.shape == (1, 6, 12) and model.calls[2]["cond"].abs().sum() == 0
    assert torch.equal(tokens[0, 1, 4:8], latents[0, 0, 0, :, 2:].flatten()) and not tokens[:, 2:].any()


def test_a_model_that_reads_no_references_is_given_none() -> None:
    class Deaf(Scripted):
        cfg = SimpleNamespace(cond_embed=False, guidance_embed=False)

    model, masks = Deaf(), torch.zeros(1, 1, 3, 2, 4)
    run(I2VDenoiser(), model, [1.0, 0.0], 4.0, masks=masks, masked_ref=torch.zeros(1, 2, 3, 2, 4))
    assert all(call["cond"] is None and "guidance" not in call for call in model.calls)
    with pytest.raises(ValueError, match=r"masked_ref: the model reads no reference frames"):
        run(I2VDenoiser(), model, [1.0, 0.0], 4.0, masks=masks + 1, masked_ref=torch.ones(1, 2, 3, 2, 4))


def test_text_oscillation() -> None:
    assert [oscillate(7.0, step) for step in (0, 9, 10, 11, 12, 13)] == [7, 7, 7, 1, 7, 1]
    assert [oscillate(7.0, step, 2) for step in (0, 1, 2, 3)] == [7, 7, 7, 1]
    model = Scripted()
    times = get_schedule(12, 256, 1)
    x = run(I2VDenoiser(), model, times, 4.0, text_osci=True)
    assert torch.allclose(x, torch.tensor(-(11 * 11 + 5) / 12))  # only the last of 12 steps is without guidance
    assert len(model.calls) == 2 * 11 + 1


def test_image_guidance_grows_along_the_clip_and_fades() -> None:
    x = run(I2VDenoiser(), Scripted(), [1.0, 0.5, 0.0], 1.0, 3.0, cond=torch.ones(1, 6, 3), scale_temporal_osci=True)
    # u2 = 3, u - u2 = 10, c - u = 2; limits linspace(3, 1, 3)[:2] = 3, 2; frames linspace(1, limit, 3)
    first, second = [torch.linspace(1, limit, 3) for limit in (3.0, 2.0)]
    wanted = -(3 + 10 * (first + second) / 2 + 2).repeat_interleave(2)
    assert torch.allclose(x, wanted[None, :, None].expand_as(x))


def test_image_oscillation() -> None:
    times, cond = get_schedule(12, 256, 1), torch.ones(1, 6, 3)
    x = run(I2VDenoiser(), Scripted(), times, 1.0, 3.0, cond=cond, image_osci=True)
    assert torch.allclose(x, torch.tensor(-(11 * (3 + 30 + 2) + (3 + 10 + 2)) / 12))


def test_distilled_denoiser_hands_over_the_guidance() -> None:
    model = Scripted()
    x = run(DistilledDenoiser(), model, [1.0, 0.0], 4.0)
    assert len(model.calls) == 1 and model.calls[0]["guidance"].tolist() == [4.0]
    assert torch.allclose(x, torch.tensor(-5.0))
    assert set(DENOISERS) == {"i2v", "distill"}


def test_texts_of_all_passes() -> None:
    assert I2VDenoiser().prepare_guidance(["a", "b"], neg=["c", "d"])[0] == ["a", "b", "c", "d", "c", "d"]
    assert I2VDenoiser().prepare_guidance(["a"], guidance_img=2.0) == (["a", "", ""], {"guidance_img": 2.0})
    assert DistilledDenoiser().prepare_guidance(["a"], neg=["c"], guidance_img=2.0) == (["a"], {})


def test_a_linear_flow_is_integrated_exactly() -> None:
    noise, data = torch.randn(1, 6, 2, dtype=torch.float64), torch.randn(1, 6, 2, dtype=torch.float64)
    x = I2VDenoiser().denoise(lambda **_: noise - data, noise, get_schedule(7, 100, 3), 1.0)
    assert x.dtype == torch.float64 and torch.allclose(x, data)


def test_utils_do_not_pull_in_inference() -> None:
    code = "import sys, opensora.utils.sampling as s; print('opensora.inference' in sys.modules); s.prepared"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False"
    assert "no attribute 'prepared'" in done.stderr


def test_public_names_of_sampling_are_exported() -> None:
    """Those of the pipeline too, though they are looked up when they are asked for: `import *` and completion."""
    import opensora.utils.sampling as names

    wanted = {"SamplingOption", "sanitize_sampling_option", "prepare", "prepare_models", "prepare_api"}
    wanted |= {"process_and_save", "I2VDenoiser", "DistilledDenoiser", "get_noise", "get_schedule", "pack", "unpack"}
    wanted |= {"SamplingMethod", "SamplingMethodDict", "get_oscillation_gs", "prepare_ids", "time_shift"}
    given: dict[str, object] = {}
    exec("from opensora.utils.sampling import *", given)
    assert wanted <= given.keys() and wanted <= {*dir(names)}


def moving_square(frames: int, height: int, width: int) -> np.ndarray:
    clip = np.full((frames, height, width, 3), (40, 90, 160), np.uint8)
    for index in range(frames):
        clip[index, 4:12, index : index + 8] = (200, 60, 40)
    return clip


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_video_is_h264_and_keeps_its_colours(tmp_path: Path, height: int, width: int) -> None:
    av = pytest.importorskip("av")
    clip = moving_square(7, height, width)
    path = write_video(tmp_path / "new" / "clip.mp4", clip, 12, crf=1)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12)
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert read.shape == (7, height + height % 2, width + width % 2, 3)
    error = np.abs(read[:, :height, :width].astype(int) - clip)
    assert error.mean() < 3 and np.abs(read[:, 20, 30].astype(int) - (40, 90, 160)).max() <= 3


def test_image_round_trip(tmp_path: Path) -> None:
    from PIL import Image

    frame = moving_square(1, 17, 23)[0]
    assert np.array_equal(np.asarray(Image.open(write_image(tmp_path / "a" / "x.png", frame))), frame)


def test_writers_refuse_other_pixels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "x.mp4", np.zeros((2, 8, 8, 3), np.float32), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "x.mp4", np.zeros((0, 8, 8, 3), np.uint8), 8)
    with pytest.raises(ValueError, match="uint8"):
        write_image(tmp_path / "x.png", np.zeros((8, 8), np.uint8))


PLAIN = {"green": (0, 255, 0), "red": (255, 0, 0), "blue": (0, 0, 255), "white": (255,) * 3, "gray": (128,) * 3}


@pytest.mark.parametrize("colour", PLAIN)
def test_colours_are_bt709_and_say_so(tmp_path: Path, colour: str) -> None:
    """By the samples that are stored: a reader of BT.709 written out here, which sees no tag."""
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "a.mp4", np.full((5, 96, 128, 3), PLAIN[colour], np.uint8), 24)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
    assert b"colrnclx\0\1\0\1\0\1\0" in path.read_bytes()  # primaries, transfer, matrix, limited range
    y, u, v = (float(np.frombuffer(plane, np.uint8)[10 * plane.line_size + 10]) for plane in frame.planes)
    luma, blue, red = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    assert np.abs(np.array([r, g, b]) * 255 - PLAIN[colour]).max() < 4


@pytest.mark.parametrize(
    ("fps", "stored"),
    [
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (24, Fraction(24)),
        (12.5, Fraction(25, 2)),
        (24.0, Fraction(24)),
        (0.5, Fraction(1, 2)),
    ],
)
def test_rates_of_television(tmp_path: Path, fps: float, stored: Fraction) -> None:
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "a.mp4", moving_square(6, 96, 171), fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == stored and (stream.height, stream.width) == (96, 172)
        assert sum(1 for _ in container.decode(stream)) == 6
