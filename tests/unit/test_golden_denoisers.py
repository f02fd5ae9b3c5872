"""Three-way guidance, its oscillations and the distilled method, against trajectories of the published code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from opensora.sampling.denoisers import DENOISERS
from opensora.schedulers.timesteps import get_schedule
from opensora.utils.tokens import image_ids, pack
from tests.toy_components import toy_velocity

TOLERANCE = 1e-5
NAMES = (
    "t2v_plain", "t2v_text_osci", "i2v_plain", "i2v_text_osci", "i2v_image_osci", "i2v_temporal", "i2v_all",
    "i2v_all_flow_shift", "i2v_no_shift_weak_image", "i2v_guidance_1", "distill_4", "distill_shift",
)  # fmt: skip
OPTIONS = ("guidance", "guidance_img", "text_osci", "image_osci", "scale_temporal_osci", "flow_shift", "shift")


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def cases(golden: Path) -> dict[str, Any]:
    return {case["name"]: case for case in json.loads((golden / "denoisers.json").read_text())["cases"]}


def trajectory(golden: Path, case: dict[str, Any]) -> Tensor:
    """(steps + 1, B, N, C): every step by the product's denoiser, option and schedule."""
    with safe_open(golden / "denoisers.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    t = load_file(golden / "denoisers.safetensors")
    grid, patch = tuple(config["grid"]), config["patch_size"]
    samples, steps = config["batch"], case["steps"]
    options = {name: case[name] for name in OPTIONS if name in case}
    denoiser = DENOISERS[case["method"]]()

    def parts(name: str) -> Tensor:
        """Of the texts that the denoiser says."""
        texts, _ = denoiser.prepare_guidance([""], neg=["_negative"])
        return torch.cat([t[f"in.{name}{suffix}"] for suffix in texts])

    inputs: dict[str, Any] = {"txt": parts("txt"), "y_vec": parts("y_vec")}
    inputs["txt_ids"] = torch.zeros(*inputs["txt"].shape[:2], 3)
    copies = len(inputs["txt"]) // samples
    inputs["img_ids"] = image_ids(grid, patch).expand(copies * samples, -1, -1)
    if case["cond"]:
        inputs["masks"] = t[f"in.mask.{case['cond']}"]
        inputs["masked_ref"] = inputs["masks"] * t["in.reference"]

    tokens = grid[1] // patch * (grid[2] // patch)
    times = get_schedule(steps, tokens, grid[0], alpha=case["flow_shift"], shift=options.pop("shift"))
    assert torch.allclose(torch.tensor(times), torch.tensor(case["timesteps"]), rtol=1e-6, atol=1e-7)
    seen: list[Tensor] = []

    def model(txt_ids: Tensor, cond: Tensor | None = None, **given: Any) -> Tensor:
        if not seen or not torch.equal(seen[-1], given["img"]):
            seen.append(given["img"])
        return toy_velocity(t, cond=cond, **given)

    noise = pack(t["in.noise"], patch).repeat(copies, 1, 1)
    last = denoiser.denoise(model, noise, timesteps=times, patch_size=patch, **options, **inputs)
    return torch.stack([*seen, last])


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_the_published_one(golden: Path, name: str) -> None:
    found = trajectory(golden, cases(golden)[name])
    wanted = load_file(golden / "denoisers.safetensors")[f"out.{name}.trajectory"]
    assert found.shape == wanted.shape
    assert relative(found, wanted) <= TOLERANCE


def test_all_cases_are_compared(golden: Path) -> None:
    assert set(cases(golden)) == set(NAMES)
