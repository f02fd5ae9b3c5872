"""The model that comes with the package is small, whole, and knows what it is said to know."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from acceleration.distributed import runtime as runtimes
from data_pipeline.shapes.judge import ASPECTS, Verdict, judge_clip
from data_pipeline.shapes.render import BACKGROUNDS, ClipSpec, Layout, draw_spec, held_out_combinations, render
from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.inference.find import find_source
from opensora.inference.load import load_components
from opensora.inference.pipeline import build_api, fit
from opensora.inference.save import to_uint8
from opensora.pretrained import SHAPES, SHAPES_PROMPTS
from opensora.utils.files.digests import read_digests
from opensora.utils.files.video_writer import write_image
from tests.conftest import ROOT
from tests.dist.harness import run_distributed

MOST_BYTES = 6_000_000
LOOK = Layout(radius=(0.23, 0.26), travel=(0.22, 0.34), off_centre=0.6)  # of the clips that it was trained on
STEPS = "sampling.num_steps=12"


def prompts() -> list[dict[str, str]]:
    with SHAPES_PROMPTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_is_small_and_whole() -> None:
    path = SHAPES / "model.safetensors"
    assert path.stat().st_size <= MOST_BYTES
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    listed = read_digests(SHAPES)
    assert listed is not None and set(listed) == {"model.safetensors", "config.yaml"}
    assert {name: hashlib.sha256((SHAPES / name).read_bytes()).hexdigest() for name in listed} == listed


def test_its_prompts_are_of_combinations_that_it_never_saw() -> None:
    held_out = set(held_out_combinations())
    rows = prompts()
    assert len(rows) >= 6 and len({row["name"] for row in rows}) == len(rows)
    assert {row["background"] for row in rows} == set(BACKGROUNDS)
    for row in rows:
        assert (row["colour"], row["shape"], row["direction"]) in held_out
        assert all(row[name] in row["text"].split() for name in (*ASPECTS, "background"))


def sampled(overrides: Sequence[str], call: dict[str, Any]) -> list[np.ndarray]:
    """The clips of one call, (T, H, W, 3) uint8 each, on this process alone."""
    cfg = load_config(
        SampleConfig, ROOT / "configs/sample/shapes.yaml", [f"weights={SHAPES}", "prompt=any", *overrides]
    )
    runtime = runtimes.start(60)
    parts = load_components(cfg, find_source(cfg), runtime)
    found = build_api(parts)(fit(cfg.sampling, parts), **call)
    runtimes.stop()
    return [clip.numpy() for clip in to_uint8(found)]


def held_out_clips() -> list[ClipSpec]:
    """A few clips of combinations that it never saw."""
    return [draw_spec(7, "references", i, held_out_combinations(), [(32, 32)], [9], LOOK) for i in range(8)]


def wrong(verdicts: Sequence[Verdict], wanted: Sequence[dict[str, str]]) -> list[str]:
    """What is not as it was asked for."""
    pairs = [(getattr(v, aspect), row[aspect]) for v, row in zip(verdicts, wanted, strict=True) for aspect in ASPECTS]
    return [f"{seen} for {asked}" for seen, asked in pairs if seen != asked]


def centre(frame: np.ndarray) -> np.ndarray:
    """(x, y) of what differs from the upper left corner: the mean place of its pixels."""
    distance = np.linalg.norm(frame - frame[0, 0].astype(np.float64), axis=-1)
    return np.argwhere(distance > 0.5 * distance.max()).mean(axis=0)[::-1] + 0.5


def test_clips_show_what_their_prompts_say() -> None:
    rows = prompts()[::2]
    call = {"text": [row["text"] for row in rows], "seed": list(range(len(rows)))}
    (clips,) = run_distributed(sampled, 1, [STEPS], call, init=False)
    assert len(wrong([judge_clip(clip) for clip in clips], rows)) <= 1


def test_clips_go_on_from_their_first_frames(tmp_path: Path) -> None:
    """The first frame is the reference's, the last ones keep its colour and shape, and motion is the prompt's."""
    specs = held_out_clips()
    first = [render(spec)[0] for spec in specs]
    for number, frame in enumerate(first):
        write_image(tmp_path / f"{number}.png", frame)
    call = {
        "text": [spec.caption for spec in specs],
        "seed": list(range(len(specs))),
        "ref": [str(tmp_path / f"{number}.png") for number in range(len(specs))],
        "cond_type": "i2v_head",
    }
    (clips,) = run_distributed(sampled, 1, [STEPS], call, init=False)
    errors = [np.square(clip[0] - frame.astype(np.float64)).mean() for clip, frame in zip(clips, first, strict=True)]
    assert max(errors) <= 255**2 / 10**3  # 30 dB
    beside = [
        np.linalg.norm(centre(clip[1]) - centre(render(spec)[1])) for clip, spec in zip(clips, specs, strict=True)
    ]
    assert np.mean(beside) <= 2.2  # pixels; a model that sees no reference is wrong by more than 3
    far = [judge_clip(clip[-4:]) for clip in clips]
    seen = [replace(judge_clip(clip), colour=end.colour, shape=end.shape) for clip, end in zip(clips, far, strict=True)]
    assert len(wrong(seen, [spec.truth for spec in specs])) <= 2
