"""Sampling from noise to pixels against the published code, through the function that the command uses; its tables."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import Components
from opensora.assembly.token_layout import token_layout
from opensora.conditioning.references import KINDS
from opensora.config.run import SampleConfig, StillConfig
from opensora.inference.pipeline import build_api
from opensora.inference.prompts import read_jobs
from opensora.inference.references import code_known
from opensora.inference.save import output_folder
from opensora.inference.stills import still_size
from opensora.models.base import TextFeatures
from opensora.models.mmdit import MMDiTConfig
from opensora.sampling.guidance import build_guidance
from opensora.sampling.noise import get_noise
from opensora.sampling.options import SamplingOption, image_size, sanitize_sampling_option
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.schedulers.timesteps import coded_frames, get_schedule
from opensora.utils.prompt_suffix import published_suffix
from opensora.utils.tokens import image_ids, pack
from tests.toy_components import ToyAutoencoder, toy_velocity

TOLERANCE = 1e-5
MODEL = MMDiTConfig(
    in_channels=16, patch_size=2, vec_in_dim=5, context_in_dim=6, hidden_size=24, num_heads=2, axes_dim=(4, 4, 4)
)
PROMPTS = ["one", "two"]


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()


class TextTable:
    """Features by prompt."""

    context_dim, vec_dim = 6, 5

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def encode(self, prompts: list[str]) -> TextFeatures:
        names = [prompt or "EMPTY" for prompt in prompts]
        return TextFeatures(
            txt=torch.stack([self._tensors[f"in.txt.{name}"] for name in names]),
            y_vec=torch.stack([self._tensors[f"in.y_vec.{name}"] for name in names]),
        )


class Toy(nn.Module):
    """The toy model under the names of ``MMDiTModel.forward``; the published sampler tells it the scale always."""

    def __init__(self, tensors: dict[str, Tensor], guidance: float) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self._tensors, self._guidance, self.calls = tensors, guidance, 0

    def forward(self, *, txt_ids: Tensor, txt_mask: Any, sample_of: Any, context: Any, **given: Any) -> Tensor:
        self.calls += 1
        given["guidance"] = torch.full((len(given["img"]),), self._guidance)
        return toy_velocity(self._tensors, **given)


def components(tensors: dict[str, Tensor], case: dict[str, Any]) -> Components:
    model = replace(MODEL, guidance_embed=case["method"] == "distill")
    return Components(
        model=Toy(tensors, case["guidance_seen"]),
        cfg=model,
        autoencoder=ToyAutoencoder(tensors["ae.mix"], causal=case["causal"]),
        text_encoder=TextTable(tensors),
        objective=RectifiedFlowConfig(),
        layout=token_layout(model, SequenceParallel(view({}))),
        mesh=view({}),
        device=torch.device("cpu"),
        prompt_suffix=False,
    )


def frames_of(tensors: dict[str, Tensor], refs: list[str] | None) -> list[list[Tensor]] | None:
    """References by name, as frames (3, T, H, W)."""
    if refs is None:
        return None
    return [[tensors[f"ref.{name}.pixels8"].float() / 127 for name in one.split(";") if name] for one in refs]


def api_cases(golden: Path) -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in json.loads((golden / "sampling_api.json").read_text())["cases"]}


API = (
    "t2v", "t2v_neg", "image", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail_flow_shift", "distill_image",
    "uncausal_t2v", "uncausal_i2v_head", "uncausal_i2v_loop", "i2v_no_ref_column",
)  # fmt: skip


@pytest.mark.parametrize("name", API)
def test_from_noise_to_pixels(golden: Path, name: str) -> None:
    """Item 0 of clips whose known frames the published code puts back, of others all."""
    tensors, case = load_file(golden / "sampling_api.safetensors"), api_cases(golden)[name]
    parts = components(tensors, case)
    option = SamplingOption(
        width=case["width"],
        height=case["height"],
        num_frames=case["frames"],
        num_steps=case["steps"],
        guidance=case["guidance_seen"],
        method=case["method"],
        flow_shift=case.get("flow_shift"),
    )
    pixels = build_api(parts)(
        option,
        case["cond_type"],
        text=PROMPTS,
        neg=case["neg"],
        ref=frames_of(tensors, case["ref"]),
        noise=tensors[f"in.{name}.noise"],
    )
    assert list(pixels.shape) == case["pixels"]
    found, wanted = pixels[..., ::8, ::8], tensors[f"out.{name}.pixels"]
    rows = 1 if case["ref"] and case["cond_type"].startswith("i2v") else 2
    assert relative(found[:rows], wanted[:rows]) <= TOLERANCE
    passes = 1 if case["method"] == "distill" else 2 if case["cond_type"] == "t2v" else 3
    assert parts.model.calls == case["steps"] * passes


def test_known_frames_of_every_clip_are_put_back(golden: Path) -> None:
    """And a clip without a reference, first or not, is what its text alone gives."""
    tensors = load_file(golden / "sampling_api.safetensors")
    case = api_cases(golden)["i2v_head"]
    option = SamplingOption(width=48, height=32, num_frames=17, num_steps=4)
    refs = [None, *(frames_of(tensors, ["image_1", "clip_40"]) or [])]
    parts = components(tensors, case)
    noise = torch.cat((tensors["in.i2v_head.noise"], tensors["in.i2v_tail.noise"][:1]))
    pixels = build_api(parts)(option, "i2v_head", text=["one", "two", "one"], ref=refs, noise=noise)
    for row in (1, 2):
        reference = refs[row][0][None, :, :1]  # type: ignore[index]
        right = parts.autoencoder.decode(parts.autoencoder.encode(reference))
        assert torch.allclose(pixels[row : row + 1, :, :1], right, atol=1e-6)
    alone = build_api(parts)(option, text=["one"], noise=noise[:1])
    assert relative(pixels[:1], alone) <= TOLERANCE
    assert (pixels[0, :, 0] - pixels[1, :, 0]).abs().max() > 0.1


def test_all_cases_of_the_api_are_compared(golden: Path) -> None:
    assert set(api_cases(golden)) == {*API, "i2v_first_without_ref"}  # the last one fails there


SAMPLE = [f"{kind}.{sort}.T19" for kind in KINDS for sort in ("causal", "uncausal")]
SAMPLE += ["i2v_head.causal.T1", "i2v_head.uncausal.T1"]


@pytest.mark.parametrize("key", SAMPLE)
def test_conditions_of_sampling(golden: Path, key: str) -> None:
    """Masks and latents of three clips, the third without a reference."""
    tensors = load_file(golden / "conditioning.safetensors")
    cases = json.loads((golden / "conditioning.json").read_text())["cases"]
    case = next(case for case in cases if case["side"] == "sample" and case["key"] == key)
    kind, sort, length = key.split(".")
    autoencoder = ToyAutoencoder(tensors["ae.mix"], causal=sort == "causal")
    refs = frames_of(tensors, case["refs"]) or [[]] * 3
    given = code_known(kind, refs, (int(length[1:]), 2, 3), (16, 24), autoencoder)
    masks = tensors[f"sample.{key}.masks"]
    assert torch.equal(given.known[:, None].float(), masks.expand(-1, -1, -1, 2, 3))
    found = given.reference * given.known[:, None]
    assert relative(found, tensors[f"sample.{key}.masked_ref"]) <= TOLERANCE


def test_all_cases_of_sampling_conditions_are_compared(golden: Path) -> None:
    cases = json.loads((golden / "conditioning.json").read_text())["cases"]
    assert {case["key"] for case in cases if case["side"] == "sample"} == set(SAMPLE)


def test_packing(golden: Path) -> None:
    t = load_file(golden / "packing.safetensors")
    assert torch.equal(pack(t["in.z"], 2), t["out.packed"]) and torch.equal(pack(t["in.z"], 1), t["out.packed_patch1"])
    assert torch.equal(image_ids(tuple(t["in.z"].shape[2:]), 2)[None], t["out.img_ids"])
    assert not t["out.txt_ids"].any()


@pytest.fixture(scope="module")
def tables(golden: Path) -> dict[str, Any]:
    return dict(json.loads((golden / "sampling_tables.json").read_text()))


def test_sizes(tables: dict[str, Any]) -> None:
    assert len(tables["size"]) > 150
    for multiple, resolution, ratio, height, width in tables["size"]:
        if resolution == "given":
            tall, wide = map(int, ratio.split("x"))
            option = sanitize_sampling_option(SamplingOption(height=tall, width=wide), multiple=multiple)
            # The published code rounds to 16 whatever a token spans, and then makes noise for whole tokens.
            assert (option.height, option.width) == tuple(-(-x // multiple) * multiple for x in (height, width))
        else:
            assert image_size(resolution, ratio, multiple) == (height, width), (multiple, resolution, ratio)


def test_sizes_of_stills(tables: dict[str, Any]) -> None:
    """Of text to image to video: 768px of training's table."""
    for ratio, height, width, frames, guidance, method, *_ in tables["t2i_size"]:
        assert still_size("768px", ratio, 16) == (height, width) and frames == 1
        assert (StillConfig(weights="w").guidance, method) == (guidance, "distill")


def test_schedules(tables: dict[str, Any]) -> None:
    for row in tables["schedule"]:
        times = get_schedule(row["steps"], row["tokens"], row["frames"], alpha=row["alpha"], shift=row["shift"])
        assert relative(torch.tensor(times), torch.tensor(row["ts"])) <= 1e-6


def test_suffixes(tables: dict[str, Any]) -> None:
    for row in tables["suffix"]:
        assert published_suffix(row["text"], row["fps"]) == row["with_fps"]
        assert published_suffix(row["text"], row["fps"], 4) == row["with_motion"]


def test_noise_of_a_seed(tables: dict[str, Any]) -> None:
    """As the published code draws it; ours is keyed, so that a clip's does not depend on its place in a batch."""
    for row in tables["noise"]:
        samples, channels, frames, height, width = row["shape"]
        dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[row["dtype"]]
        sizes: dict[str, Any] = {"channels": channels, "stride": (4, 8, 8), "patch_size": 2, "dtype": dtype}
        clip = (samples, 8 * height, 8 * width, 4 * frames - 3)
        noise = get_noise(*clip, seed=row["seed"], published=True, **sizes)
        assert list(noise.shape) == row["shape"] and noise.dtype == dtype
        assert relative(noise.flatten()[:6].double(), torch.tensor(row["first"]).double()) <= 1e-6
        assert abs(noise.double().sum().item() - row["sum"]) <= 1e-4 * abs(row["sum"])
        assert not torch.equal(noise, get_noise(*clip, seed=row["seed"], **sizes))


def test_published_noise_is_of_all_clips_together(golden: Path) -> None:
    tensors, case = load_file(golden / "sampling_api.safetensors"), api_cases(golden)["t2v"]
    api = build_api(components(tensors, case))
    option = SamplingOption(width=48, height=32, num_frames=5, num_steps=2, noise="published", seed=7)
    noise = torch.randn(2, 4, 2, 4, 6, generator=torch.Generator().manual_seed(7))
    assert torch.equal(api(option, text=PROMPTS), api(option, text=PROMPTS, noise=noise))


@pytest.mark.parametrize(("asked", "causal"), [(2, True), (16, True), (16, False), (3, False), (7, False), (1, True)])
def test_any_number_of_frames_is_made(golden: Path, asked: int, causal: bool) -> None:
    """Those beyond it are made and cut off, so that 6 are the first of 9."""
    tensors, case = load_file(golden / "sampling_api.safetensors"), api_cases(golden)["t2v"]
    api = build_api(components(tensors, case | {"causal": causal}))
    option = SamplingOption(width=48, height=32, num_frames=asked, num_steps=2)
    made = coded_frames(asked, 4, causal)
    pixels = api(option, text=PROMPTS)
    assert pixels.shape == (2, 3, asked, 32, 48)
    assert torch.equal(pixels, api(replace(option, num_frames=made), text=PROMPTS)[:, :, :asked])


def test_temporal_scaling_is_of_single_frames_alone(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``scale_temporal_osci`` acts where a kind gives the first or last frame, not on longer references."""
    tensors, asked = load_file(golden / "sampling_api.safetensors"), []

    def build(option: SamplingOption, **more: Any) -> Any:
        asked.append(option.scale_temporal_osci)
        return build_guidance(option, **more)

    monkeypatch.setattr("opensora.inference.pipeline.build_guidance", build)
    for name in ("v2v_head", "i2v_head", "i2v_loop"):
        case = api_cases(golden)[name]
        option = SamplingOption(width=48, height=32, num_frames=case["frames"], num_steps=1, scale_temporal_osci=True)
        build_api(components(tensors, case))(option, name, text=PROMPTS, ref=frames_of(tensors, case["ref"]))
    assert asked == [False, True, True]


def test_sixteen_frames_at_720p_have_a_size() -> None:
    """As the published interface asks for them by default."""
    option = sanitize_sampling_option(SamplingOption(resolution="720p", aspect_ratio="16:9", num_frames=16))
    assert (option.height, option.width, coded_frames(option.num_frames)) == (720, 1280, 17)


def test_file_names(tables: dict[str, Any], tmp_path: Path) -> None:
    for row in tables["names"]:
        copy, index = row["num_sample_pos"], row.get("index", 0)
        table = tmp_path / f"{row.get('fallback_name', 'prompt')}.csv"
        lines = [f'"{row.get("prompt", "a")}",{row.get("name", "")}'] * (index + 1)
        table.write_text("text,name\n" + "\n".join(lines) + "\n")
        cfg = SampleConfig(
            weights="w",
            prompt_csv=str(table),
            num_sample=copy + 1,
            start_index=index,
            save_dir="out",
            save_prefix=row.get("save_prefix", ""),
            prompt_as_path=row.get("prompt_as_path", False),
        )
        assert str(output_folder(cfg) / read_jobs(cfg)[copy].name) == row["path"]
