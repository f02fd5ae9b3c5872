"""The shapes data set is reproducible and keeps out what it says; the judge reads clips and knows its limits."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data_pipeline.shapes import judge
from data_pipeline.shapes import write as shapes
from data_pipeline.shapes.render import (
    COLOURS,
    DIRECTIONS,
    MARGIN,
    SHAPES,
    ClipSpec,
    Layout,
    combinations,
    draw_spec,
    held_out_combinations,
    render,
    training_combinations,
)
from opensora.models.vae.dct import DCTAutoencoder, DCTConfig

SIZES = [(32, 32), (32, 48), (48, 32)]
DURATIONS = [5, 9, 17]


def specs(count: int, durations: list[int] = DURATIONS) -> list[ClipSpec]:
    return [draw_spec(7, "test", i, combinations(), SIZES, durations) for i in range(count)]


def accuracy(clips: list[np.ndarray], wanted: list[ClipSpec]) -> float:
    """Share of clips with colour, shape and direction all judged right."""
    result = judge.score([judge.judge_clip(clip) for clip in clips], [spec.truth for spec in wanted])
    return result.all_three / result.clips


@pytest.fixture(scope="module")
def wanted() -> list[ClipSpec]:
    return specs(len(combinations()))


@pytest.fixture(scope="module")
def clips(wanted: list[ClipSpec]) -> list[np.ndarray]:
    return [render(spec) for spec in wanted]


def test_enough_of_everything_and_a_tenth_is_kept_out() -> None:
    assert len(COLOURS) >= 6 and len(SHAPES) >= 4 and len(DIRECTIONS) >= 5
    held_out, kept = held_out_combinations(), training_combinations()
    assert len(held_out) == round(0.1 * len(combinations()))
    assert not set(held_out) & set(kept)
    assert len(set(held_out) | set(kept)) == len(combinations())
    for axis, values in enumerate((COLOURS, SHAPES, DIRECTIONS)):
        assert {combination[axis] for combination in kept} == set(values)
        assert {combination[axis] for combination in held_out} == set(values)
        assert max(Counter(combination[axis] for combination in held_out).values()) <= -(-len(held_out) // len(values))


def test_clips_depend_on_seed_and_index_only() -> None:
    again = specs(30)
    assert specs(30) == again
    assert [draw_spec(7, "test", i, combinations(), SIZES, DURATIONS) for i in (29, 3)] == [again[29], again[3]]
    assert draw_spec(8, "test", 3, combinations(), SIZES, DURATIONS) != again[3]
    assert np.array_equal(render(again[0]), render(specs(1)[0]))


def test_shapes_stay_inside_and_visibly_move(wanted: list[ClipSpec], clips: list[np.ndarray]) -> None:
    for spec, clip in zip(wanted, clips, strict=True):
        assert clip.shape == (spec.frames, spec.height, spec.width, 3)
        assert clip.dtype == np.uint8
        border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1)
        assert (border == clip[0, 0, 0]).all()
        changed = (clip[0].astype(int) - clip[-1].astype(int) != 0).any()
        assert changed == (spec.direction != "still")


def test_layout_of_large_shapes_near_the_middle() -> None:
    layout = Layout(radius=(0.24, 0.26), travel=(0.32, 0.36), off_centre=0.25)
    wanted = [draw_spec(7, "test", i, combinations(), [(32, 32)], [9], layout) for i in range(len(combinations()))]
    for spec in wanted:
        step_x, step_y = DIRECTIONS[spec.direction]
        assert 0.24 * 32 <= spec.radius <= 0.26 * 32
        assert spec.direction == "still" or 0.32 * 32 <= spec.travel <= 0.36 * 32
        middle = (spec.x + step_x * spec.travel / 2, spec.y + step_y * spec.travel / 2)
        assert max(abs(centre - 16) for centre in middle) <= 0.25 * (16 - MARGIN - spec.radius)
        edges = [spec.x, spec.y, spec.x + step_x * spec.travel, spec.y + step_y * spec.travel]
        assert spec.radius + MARGIN <= min(edges) and max(edges) <= 32 - spec.radius - MARGIN
    assert accuracy([render(spec) for spec in wanted], wanted) == 1.0


def test_captions() -> None:
    by_direction = {spec.direction: spec for spec in specs(60)}
    moving = by_direction["left"]
    assert moving.caption == f"a {moving.colour} {moving.shape} moves left on a {moving.background} background"
    assert "stays still" in by_direction["still"].caption
    still = specs(1, durations=[1])[0]
    assert still.caption == f"a {still.colour} {still.shape} on a {still.background} background"


def test_judge_is_right_on_rendered_clips(wanted: list[ClipSpec], clips: list[np.ndarray]) -> None:
    assert accuracy(clips, wanted) >= 0.99


def test_judge_is_right_after_the_block_transform(wanted: list[ClipSpec], clips: list[np.ndarray]) -> None:
    autoencoder = DCTAutoencoder(DCTConfig(channels=64))
    decoded = []
    for clip in clips:
        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        pixels = autoencoder.decode(autoencoder.encode(pixels))[0].permute(1, 2, 3, 0)
        decoded.append(((pixels + 1) * 127.5).round().to(torch.uint8).numpy())
    assert accuracy(decoded, wanted) >= 0.99


def test_judge_survives_blur_and_noise(wanted: list[ClipSpec], clips: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    damaged = []
    for clip in clips:
        soft = np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(1.2))) for f in clip])
        damaged.append(np.clip(soft + rng.normal(0, 12, soft.shape), 0, 255).astype(np.uint8))
    assert accuracy(damaged, wanted) >= 0.98


def test_judge_says_unsure_and_notices_wrong_answers(wanted: list[ClipSpec], clips: list[np.ndarray]) -> None:
    empty = judge.judge_clip(np.full((5, 32, 32, 3), 90, dtype=np.uint8))
    assert (empty.colour, empty.shape, empty.direction) == (judge.UNSURE,) * 3
    noise = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    assert judge.judge_clip(noise).shape == judge.UNSURE
    gray = np.full((5, 32, 32, 3), 20, dtype=np.uint8)
    gray[:, 8:22, 8:22] = 150
    verdict = judge.judge_clip(gray)
    assert (verdict.colour, verdict.shape, verdict.direction) == (judge.UNSURE, "square", "still")
    for spec, clip in list(zip(wanted, clips, strict=True))[:20]:
        reverse = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still"}
        assert judge.judge_clip(clip[::-1]).direction == reverse[spec.direction]
        assert judge.judge_clip(clip[:1]).direction == "still"


def write_small(folder: Path, processes: str = "1") -> int:
    return shapes.main(
        ["--out", str(folder), "--clips", "6", "--images", "3", "--heldout", "1", "--processes", processes]
    )


def test_data_set_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_small(tmp_path / "one") == 0
    assert write_small(tmp_path / "two", "2") == 0
    for name in ("train", "heldout", "prompts_train", "prompts_heldout"):
        assert (tmp_path / "one" / f"{name}.csv").read_bytes() == (tmp_path / "two" / f"{name}.csv").read_bytes()
    with open(tmp_path / "one" / "train.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [*shapes.TABLE_COLUMNS, *shapes.TRUTH_COLUMNS]
    assert [row["path"].split("/")[0] for row in rows] == ["clips"] * 6 + ["images"] * 3
    held_out = set(held_out_combinations())
    for row in rows:
        one, two = tmp_path / "one" / row["path"], tmp_path / "two" / row["path"]
        frames = judge.read_clip(one)
        assert frames.shape == (int(row["num_frames"]), int(row["height"]), int(row["width"]), 3)
        assert np.abs(frames.astype(int) - judge.read_clip(two)).mean() < 2  # the encoder may round otherwise
        assert (row["colour"], row["shape"], row["direction"]) not in held_out
    with open(tmp_path / "one" / "prompts_heldout.csv", newline="") as stream:
        prompts = list(csv.DictReader(stream))
    assert {(row["colour"], row["shape"], row["direction"]) for row in prompts} == held_out
    capsys.readouterr()
    for name, files in (("heldout", 12), ("train", 9)):
        assert judge.main([str(tmp_path / "one"), "--table", str(tmp_path / "one" / f"{name}.csv")]) == 0
        printed = capsys.readouterr().out.splitlines()[1:]
        assert [line.split()[-2:] for line in printed] == [[str(files), "100.0%"]] * 4


def test_clip_table_reads_it(tmp_path: Path) -> None:
    from opensora.datasets.table.manifest import read_table

    assert write_small(tmp_path) == 0
    table = read_table(str(tmp_path / "train.csv"))
    assert len(table) == 9
    assert table.is_image.tolist() == [False] * 6 + [True] * 3
    assert table.fps[0] == 8
    assert Path(table.path(8)).is_file()


def test_samples_are_matched_by_name(tmp_path: Path) -> None:
    spec = specs(1)[0]
    name = f"{spec.colour}_{spec.shape}_{spec.direction}_{spec.background}"
    for suffix in ("", "_1"):
        Image.fromarray(render(spec)[0]).save(tmp_path / f"{name}{suffix}.png")
    Image.fromarray(render(spec)[0]).save(tmp_path / "sheet.png")
    pairs = judge.match_files(tmp_path, {name: {**spec.truth, "name": name}})
    assert [path.stem for path, _ in pairs] == [name, f"{name}_1"]


@pytest.mark.parametrize(
    "wrong",
    [
        ("--sizes", "32"),
        ("--sizes", "8x32"),
        ("--durations", "5,x"),
        ("--durations", "1"),
        ("--clips", "-1"),
        ("--fps", "0"),
        ("--radius", "0.3"),
        ("--radius", "0.3,0.2"),
        ("--travel", "0.4,0.5"),  # with the default radius it leaves the frame
        ("--off-centre", "2"),
    ],
)
def test_wrong_arguments_are_one_line(
    wrong: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shapes.main(["--out", str(tmp_path), *wrong]) == 2
    error = capsys.readouterr().err.strip()
    assert wrong[0] in error and "\n" not in error


def test_judge_refuses_tables_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    assert judge.main([str(tmp_path), "--table", str(table)]) == 2
    table.write_text("name,colour\na,red\n")
    assert judge.main([str(tmp_path), "--table", str(table)]) == 2
    table.write_text("name,colour,shape,direction\na,red,circle,left\n")
    assert judge.main([str(tmp_path), "--table", str(table)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
