"""The configurations that sample from published weights of Wan and HunyuanVideo say what their publishers say."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from opensora.conditioning.references import kinds_of
from opensora.config.load import load_config
from opensora.config.run import SampleConfig, check_fit, check_objective
from opensora.inference.check import fit_option, solver_of
from opensora.inference.find import default_objective
from opensora.inference.references import check_references
from opensora.models.families import MODEL_SIZES, describe
from opensora.models.vae import autoencoder_shape

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "sample"
PROMPTS = ["--prompt", "a cat"]
AVOIDED = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
SHAKING = "镜头晃动，"  # is put before it for I2V of 2.1


class Published(NamedTuple):
    size: str
    width: int
    height: int
    frames: int
    fps: float
    solver: str
    steps: int
    shift: float
    guidance: float
    low: tuple[float, float] | None = None  # boundary, and guidance below it
    picture: bool = False
    neg: str = AVOIDED


TABLE = {
    "wan/t2v_1_3b": Published("t2v_1_3b", 832, 480, 81, 16, "unipc", 50, 5, 5),
    "wan/t2v_14b": Published("t2v_14b", 1280, 720, 81, 16, "unipc", 50, 5, 5),
    "wan/i2v_14b_480p": Published("i2v_14b", 832, 480, 81, 16, "unipc", 40, 3, 5, None, True, SHAKING + AVOIDED),
    "wan/i2v_14b_720p": Published("i2v_14b", 1280, 720, 81, 16, "unipc", 40, 5, 5, None, True, SHAKING + AVOIDED),
    "wan/t2v_a14b": Published("t2v_a14b", 1280, 720, 81, 16, "unipc", 40, 12, 4, (0.875, 3)),
    "wan/i2v_a14b": Published("i2v_a14b", 1280, 720, 81, 16, "unipc", 40, 5, 3.5, (0.9, 3.5), True),
    "wan/ti2v_5b": Published("ti2v_5b", 1280, 704, 121, 24, "unipc", 50, 5, 5),
    "hunyuan_video/13b": Published("13b", 1280, 720, 129, 24, "euler", 50, 7, 6, neg=""),
}


@pytest.mark.parametrize("name", TABLE)
def test_numbers(name: str) -> None:
    said = TABLE[name]
    cfg = load_config(SampleConfig, CONFIGS / f"{name}.yaml", [*PROMPTS, *(["ref=a.png"] if said.picture else [])])
    assert cfg.model is not None and cfg.vae is not None and cfg.text is not None
    assert cfg.model == MODEL_SIZES[cfg.model.kind][said.size]
    check_fit(cfg.model, cfg.vae, cfg.text, cfg.image_encoder)
    check_objective(cfg.model, default_objective(cfg.model))
    option = fit_option("sampling", cfg.sampling, cfg.model, autoencoder_shape(cfg.vae))
    assert (option.width, option.height) == (said.width, said.height), "made as it is asked for"
    assert (option.num_frames, option.fps, option.num_steps) == (said.frames, said.fps, said.steps)
    assert (option.flow_shift, option.guidance) == (said.shift, said.guidance)
    assert solver_of("sampling", option, default_objective(cfg.model)) == said.solver
    assert cfg.neg == said.neg
    low = None if cfg.low_noise is None else (cfg.low_noise.boundary, option.guidance_low)
    assert low == said.low and (low is None) == (option.guidance_low is None)
    assert cfg.cond_type == ("i2v_head" if said.picture else "t2v")
    if said.picture:
        check_references(cfg.model, default_objective(cfg.model), cfg.cond_type)


def test_every_configuration_is_compared() -> None:
    files = (path for folder in ("wan", "hunyuan_video") for path in (CONFIGS / folder).glob("*.yaml"))
    assert {str(path.relative_to(CONFIGS).with_suffix("")) for path in files} == set(TABLE)
    assert {said.size for name, said in TABLE.items() if name.startswith("wan")} == set(MODEL_SIZES["wan"]) - {
        "debug",
        "demo",
    }


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sampling.num_steps=8"], {"num_steps": 8, "flow_shift": 12.0}),
        (["sampling.guidance=1", "sampling.guidance_low=1"], {"guidance": 1.0, "guidance_low": 1.0, "solver": "unipc"}),
    ],
)
def test_a_job_says_otherwise(words: list[str], found: dict[str, Any]) -> None:
    cfg = load_config(SampleConfig, CONFIGS / "wan/t2v_a14b.yaml", [*PROMPTS, *words])
    assert {name: getattr(cfg.sampling, name) for name in found} == found


def test_a_picture_for_the_model_that_takes_it_in_place() -> None:
    words = [*PROMPTS, "ref=a.png", "cond_type=i2v_head"]
    cfg = load_config(SampleConfig, CONFIGS / "wan/ti2v_5b.yaml", words)
    assert cfg.model is not None and describe(cfg.model).references == "in_place"
    check_references(cfg.model, default_objective(cfg.model), cfg.cond_type)
    assert "i2v_head" in kinds_of("in_place")
