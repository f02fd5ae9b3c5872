"""Clips, buckets, sizes and given frames as the Open-Sora 1.x files say them: against the values of the real files and
the published tables of sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.datasets.buckets.sizes_1x import FRAME_COUNTS
from opensora.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAINING = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/train/*.py") if path.stem not in ("stage1_feat",)
)


def trained(name: str, *words: str) -> RunConfig:
    return load_config(RunConfig, CONFIGS / name, ["--data-path", "c.csv", "--ckpt-path", "FILE", *words])


def sampled(name: str, *words: str) -> SampleConfig:
    return load_config(SampleConfig, CONFIGS / name, ["--prompt", "a cat", "--ckpt-path", "FILE", *words])


def real_values(golden: Path, name: str) -> dict[str, Any] | None:
    """Of the newest version that has the file; None: of none."""
    versions = json.loads((golden / "v1/configs.json").read_text())
    found = [version["values"][name] for version in versions.values() if name in version["values"]]
    return found[-1] if found else None


@pytest.mark.parametrize("name", TRAINING)
def test_clips_are_those_of_the_real_files(golden: Path, name: str) -> None:
    real, cfg = real_values(golden, name), trained(name)
    if real is None:
        pytest.skip(f"configs.json has no {name}")
    data, told = real.get("dataset", real), cfg.data  # files of 1.0 have no section for it
    assert told.frame_interval == data.get("frame_interval")
    assert (told.interpolation, told.crop, told.unused_rows) == ("bilinear", "center", "report")
    if told.bucket_rule == "open_sora_1_0":
        height, width = data["image_size"]
        assert told.buckets == {f"{height}x{width}": {data["num_frames"]: [1.0, real["batch_size"]]}}
        return
    version = {"opensora-v1-1": "1_1", "opensora-v1-2": "1_2", "opensora-v1-3": "1_3"}[name.split("/")[0]]
    assert told.bucket_rule == f"open_sora_{version}"
    rows = {(size, int(n)): row for size, lines in real["bucket_config"].items() for n, row in lines.items()}
    ours = {(size, n): row for size, lines in told.buckets.items() for n, row in lines.items()}
    assert list(ours) == list(rows)  # rows are numbered in this order
    if "benchmark" not in name:  # which searches for a batch size
        assert {key: list(row) for key, row in rows.items()} == ours


def real_masks(real: dict[str, Any]) -> dict[str, float]:
    names = {"mask_head": "quarter_head", "mask_tail": "quarter_tail", "mask_head_tail": "quarter_head_tail"}
    ratios = {names.get(name, name): p for name, p in real.get("mask_ratios", {}).items()}
    return {name: p for name, p in ratios.items() if name not in ("identity", "mask_no")}


@pytest.mark.parametrize("name", TRAINING)
def test_given_frames_are_those_of_the_real_files(golden: Path, name: str) -> None:
    real, cfg = real_values(golden, name), trained(name).conditioning
    if real is None:
        pytest.skip(f"configs.json has no {name}")
    assert cfg.masks == real_masks(real)
    types = real.get("mask_types", {"none": 1.0} if name.startswith("opensora-v1-3") else {})
    assert cfg.mask_types == types and not cfg.references
    assert cfg.dropout.conditions == real["scheduler"].get("drop_condition", {})
    assert cfg.known_weight == real["scheduler"].get("x_cond_weight", 1.0)


@pytest.mark.parametrize(
    ("name", "version"), [("opensora-v1-2/inference/sample.py", "1_2"), ("opensora-v1-3/inference/t2v.py", "1_3")]
)
def test_sizes_are_those_of_the_tables(golden: Path, name: str, version: str) -> None:
    """``--resolution`` and ``--aspect-ratio``, the 17 names, height first."""
    tables = json.loads((golden / f"v1/aspect_tables_v{version}.json").read_text())
    for resolution in ("240p", "480p", "512"):
        for ratio, key in tables["aspect_ratio_map"].items():
            sizes = {float(name): size for name, size in tables["resolutions"][resolution]["sizes"].items()}
            words = ("--resolution", resolution, "--aspect-ratio", ratio)
            if float(key) not in sizes:
                with pytest.raises(
                    UserError, match=f"aspect_ratio='{ratio}': {resolution} has no size of {ratio}; must be"
                ):
                    sampled(name, *words)
                continue
            found = sampled(name, *words).sampling
            assert [found.height, found.width] == sizes[float(key)], (resolution, ratio)
    wide = sampled(name, "--resolution", "480p", "--aspect-ratio", "9:16").sampling
    assert (wide.height, wide.width) == (480, 854)
    assert (sampled(name, "--resolution", "720p").sampling.width) == 1280  # 9:16, unless it says otherwise


@pytest.mark.parametrize("name", FRAME_COUNTS)
def test_lengths_by_name(golden: Path, name: str) -> None:
    counts = json.loads((golden / "v1/aspect_tables_v1_2.json").read_text())["num_frames_map"]
    assert sampled("opensora-v1-2/inference/sample.py", "--num-frames", name).sampling.num_frames == counts[name]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--resolution", "481p"], "resolution='481p': 481p: not a resolution of Open-Sora 1.2; must be one of 144p"),
        (["--resolution", "480p", "--aspect-ratio", "5:7"], "aspect_ratio='5:7': no ratio '5:7' (height to width)"),
        (["--num-frames", "3s"], "num_frames='3s': must be a whole number, or one of 1x, 2x"),
    ],
)
def test_sizes_that_there_are_not(words: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        sampled("opensora-v1-2/inference/sample.py", *words)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


GIVEN = {
    "mask_ratios = {'identity': 0.5, 'random': 0.2}": "probabilities add up to 0.7; must add up to 1",
    "mask_ratios = {'everything': 0.5}": "masks.everything: no such strategy",
    "mask_ratios = {'random': 0.8, 'image_head': 0.4}": "probabilities add up to 1.2: must be at most 1",
    "mask_types = {'i2v_hed': 1}": "mask_types",
    "bucket_config = {'146p': {16: (1.0, 2)}}": "146p: not a resolution of Open-Sora 1.1",
    "bucket_config = {'144p': {16: (0.5, None)}}": "the batch size must be an integer >= 1",
    "bucket_config = {'144p': {16: ((0.5, 0.5), 2)}}": "must have one probability a row",
    "dataset = dict(type='VariableVideoTextDataset', transform_name='stretch')": "must be center or resize_crop",
    "dataset = dict(type='VariableVideoTextDataset', frame_interval=0)": "frame_interval=0: must be an integer >= 1",
}


@pytest.mark.parametrize("line", GIVEN)
def test_lines_that_cannot_be(line: str, tmp_path: Path) -> None:
    """One line with the key, what must hold, and the file."""
    text = (CONFIGS / "opensora-v1-1/train/stage1.py").read_text()
    key = line.partition(" =")[0]
    start = text.find(f"\n{key} = ")
    if start >= 0:
        end = min(found for mark in ("\n}\n", "\n)\n") if (found := text.find(mark, start)) > 0) + 3
        text = text[: start + 1] + text[end:]
    (tmp_path / "stage1.py").write_text(f"{text}\n{line}\n")
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, tmp_path / "stage1.py", ["--data-path", "c.csv", "--ckpt-path", "FILE"])
    assert GIVEN[line] in str(caught.value) and "\n" not in str(caught.value)
    assert "stage1.py" in str(caught.value)
