"""References as people have them: images and clips of any size, read, resized and cropped; pictures laid over clips."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opensora.conditioning.references import KINDS, parts_of
from opensora.datasets.decode.api import read_frames
from opensora.inference.references import check_count, check_length, code_known, read_part, split
from opensora.inference.watermark import read_watermark
from opensora.models.base import AutoencoderShape
from opensora.utils.errors import UserError
from opensora.utils.files.video_writer import write_video
from tests.toy_components import ToyAutoencoder

CAUSAL = AutoencoderShape(4, (4, 8, 8), True)
HEAD = parts_of("i2v_head", CAUSAL)[0]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth, so that filters differ little."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def by_hand(frame: np.ndarray, height: int, width: int) -> Tensor:
    """Resized to cover by Pillow, cropped at the centre, (3, H, W) in [-1, 1]."""
    scale = max(height / frame.shape[0], width / frame.shape[1])
    size = (max(width, round(frame.shape[1] * scale)), max(height, round(frame.shape[0] * scale)))
    scaled = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
    return torch.from_numpy(scaled[top : top + height, left : left + width].copy()).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(("height", "width"), [(32, 48), (16, 200), (300, 24), (31, 47), (64, 96), (1, 1)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_any_size_covers_and_is_cropped(tmp_path: Path, height: int, width: int, as_tensor: bool) -> None:
    frame = picture(height, width)
    Image.fromarray(frame).save(tmp_path / "a.png")
    given = (
        torch.from_numpy(frame.copy()).permute(2, 0, 1)[:, None] / 127.5 - 1 if as_tensor else str(tmp_path / "a.png")
    )
    found = read_part(given, HEAD, (32, 48), "i2v_head")
    right = by_hand(frame, 32, 48)
    assert found.shape == (3, 1, 32, 48) and found.abs().max() <= 1
    assert (found[:, 0] - right).abs().max() <= (0.05 if as_tensor else 1e-6)


def test_frames_of_a_clip_by_end(tmp_path: Path) -> None:
    frames = np.stack([np.full((32, 48, 3), 5 * i, np.uint8) for i in range(40)])
    write_video(tmp_path / "a.mp4", frames, 8.0, crf=0)
    for kind, first, count in (("i2v_head", 0, 1), ("i2v_tail", 39, 1), ("v2v_head", 0, 33), ("v2v_tail", 7, 33)):
        (part,) = parts_of(kind, CAUSAL)
        found = read_part(str(tmp_path / "a.mp4"), part, (32, 48), kind)
        levels = ((found.mean(dim=(0, 2, 3)) + 1) * 127.5 / 5).round().int().tolist()
        assert levels == list(range(first, first + count)), kind


def test_which_reference_a_kind_takes() -> None:
    """Items by themselves: two references, one for both ends, none."""
    autoencoder = ToyAutoencoder(torch.eye(3), causal=True)
    still = {name: torch.full((3, 1, 8, 8), value) for name, value in (("a", 0.25), ("b", 0.5), ("c", -0.5))}
    refs = [[still["a"], still["b"]], [still["c"]], []]
    for kind, ends in (
        ("i2v_head", [(0.25, 0.0), (-0.5, 0.0), (0.0, 0.0)]),
        ("i2v_tail", [(0.0, 0.5), (0.0, -0.5), (0.0, 0.0)]),
        ("i2v_loop", [(0.25, 0.5), (-0.5, -0.5), (0.0, 0.0)]),
    ):
        given = code_known(kind, refs, (3, 1, 1), (8, 8), autoencoder)
        assert [tuple(row[0, [0, 2], 0, 0].tolist()) for row in given.reference] == ends
        assert given.known[:, :, 0, 0].tolist() == [[x != 0, False, y != 0] for x, y in ends]
        kept = given.put_back(torch.ones(3, 3, 3, 1, 1))
        assert [tuple(row[0, [0, 2], 0, 0].tolist()) for row in kept] == [(x or 1.0, y or 1.0) for x, y in ends]


def test_long_references_are_not_put_back() -> None:
    autoencoder = ToyAutoencoder(torch.eye(3), causal=True)
    clip = torch.rand(3, 40, 8, 8)
    for kind in (kind for kind in KINDS if kind.startswith("v2v") and "easy" not in kind):
        given = code_known(kind, [[clip], []], (12, 1, 1), (8, 8), autoencoder)
        assert given.known[0].sum() == 9 and not given.known[1].any() and not given.kept.any()


@pytest.mark.parametrize("kind", ["i2v_head", "i2v_tail", "i2v_loop"])
def test_a_still_is_its_reference(kind: str) -> None:
    """The model is told nothing, and what comes out is the reference."""
    given = code_known(kind, [[torch.full((3, 1, 8, 8), 0.5)], []], (1, 1, 1), (8, 8), ToyAutoencoder(torch.eye(3)))
    assert not given.known.any() and given.kept[:, 0, 0, 0].tolist() == [True, False]
    assert given.put_back(torch.zeros(2, 3, 1, 1, 1))[:, 0, 0, 0, 0].tolist() == [0.5, 0.0]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    frames = np.zeros((20, 16, 16, 3), np.uint8)
    write_video(tmp_path / "short.mp4", frames, 8.0)
    whole = (tmp_path / "short.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (long,) = parts_of("v2v_tail", CAUSAL)
    for name, part, kind, said in (
        ("cut.mp4", HEAD, "i2v_head", "cut.mp4: no frame of it can be decoded; give an image or a video"),
        ("no.png", HEAD, "i2v_head", "no.png: no such file"),
        ("text.png", HEAD, "i2v_head", "text.png: "),
        (
            "short.mp4",
            long,
            "v2v_tail",
            "short.mp4: has 20 frames, cond_type=v2v_tail takes its last 33; give a longer",
        ),
    ):
        with pytest.raises(UserError, match=r"^ref=") as error:
            read_part(str(tmp_path / name), part, (16, 16), kind)
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^ref=its frames: has 3 frames"):
        read_part(torch.zeros(3, 3, 16, 16), long, (16, 16), "v2v_tail")
    with pytest.raises(UserError, match=r"^cond_type=i2v: must be one of t2v, i2v_head"):
        check_count("i2v", 1)
    for kind, most in (("t2v", 0), ("i2v_head", 2), ("i2v_loop", 2), ("v2v_tail_easy", 2)):
        check_count(kind, most)
        with pytest.raises(UserError, match=f"^ref: {most + 1} references? for a clip, cond_type={kind} takes"):
            check_count(kind, most + 1)


def test_the_least_length_that_is_named_will_do() -> None:
    for kind in KINDS:
        for shape in (CAUSAL, AutoencoderShape(4, (4, 8, 8), False)):
            if not kind.startswith("v2v"):
                for latents in (1, 2, 9):
                    check_length(kind, latents, 0, shape)
                continue
            given = sum(part.latents for part in parts_of(kind, shape))
            with pytest.raises(
                UserError, match=rf"num_frames=9: must be at least {4 * given + 1 - 3 * shape.causal} w"
            ):
                check_length(kind, given, 9, shape)
            check_length(kind, given + 1, 9, shape)


def test_files_are_apart() -> None:
    assert split("a.png;b c.mp4") == ["a.png", "b c.mp4"] and split(" a.png ; ") == ["a.png"] and split("") == []


def test_a_watermark(tmp_path: Path) -> None:
    """In the lower right corner, as transparent as it is, at most a fifth of a side, on every frame alike."""
    mark = np.zeros((40, 80, 4), np.uint8)
    mark[..., 0], mark[..., 3] = 255, 128
    Image.fromarray(mark).save(tmp_path / "mark.png")
    frames = torch.full((3, 100, 200, 3), 100, dtype=torch.uint8)
    marked = read_watermark(str(tmp_path / "mark.png"))(frames)  # type: ignore[misc]
    changed = (marked != frames).any(dim=-1)
    assert torch.equal(changed[0], changed[2]) and (frames == 100).all()
    rows, columns = changed[0].any(dim=1).nonzero(), changed[0].any(dim=0).nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (78, 97, 158, 197)
    assert marked[1, 90, 180].tolist() == [178, 50, 50]
    tiny = read_watermark(str(tmp_path / "mark.png"))(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))  # type: ignore[misc]
    assert tiny.shape == (1, 4, 4, 3)
    assert read_watermark(None) is None
    for name in ("no.png", "text.png"):
        (tmp_path / "text.png").write_text("no picture")
        with pytest.raises(UserError, match=f"^watermark={tmp_path / name}: "):
            read_watermark(str(tmp_path / name))


def test_a_smaller_file_of_a_higher_crf(tmp_path: Path) -> None:
    frames = np.stack([picture(64, 64, seed) for seed in range(8)])
    sizes = [write_video(tmp_path / f"{crf}.mp4", frames, 8.0, crf=crf).stat().st_size for crf in (0, 18, 40)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert read_frames(str(tmp_path / "40.mp4"), 0, 8).shape == frames.shape
