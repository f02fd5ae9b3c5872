"""Every file of configs/ is read, fits together, and has a forecast, on the meta device."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import PipelineConfig
from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig, check_fit, check_objective
from opensora.inference.check import fit_option, solver_of
from opensora.inference.find import Source, default_objective
from opensora.inference.memory import memory_of
from opensora.models.families import describe
from opensora.models.vae import autoencoder_shape
from opensora.planner.devices import DEVICES
from opensora.planner.search import Planner, check_own
from opensora.serve.config import ServeConfig
from opensora.train.step_data import check_buckets

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
RUNS, JOBS = sorted((CONFIGS / "train").rglob("*.yaml")), sorted((CONFIGS / "sample").glob("*.yaml"))
OTHER_JOBS = sorted((CONFIGS / "sample").glob("*/*.yaml"))  # of other families: test_published_sampling.py
PIPELINES = sorted((CONFIGS / "pipeline").rglob("*.yaml"))
SERVICES = sorted((CONFIGS / "serve").rglob("*.yaml"))
PARTS = sorted(set(CONFIGS.rglob("*.yaml")) - set(RUNS) - set(JOBS) - set(OTHER_JOBS) - set(PIPELINES) - set(SERVICES))
STAGES = ("image", "stage1", "stage1_i2v", "stage2", "stage2_i2v", "high_compression")
PUBLISHED = [CONFIGS / "train" / f"{name}.yaml" for name in ("image", "stage1", "stage2", "high_compression")]
GIB = 2**30


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_training(path: Path) -> None:
    """Also as adapters; the autoencoder codes every length, and the mesh takes some number of processes."""
    cfg = load_config(RunConfig, path)
    check_fit(cfg.model, cfg.vae, cfg.text)
    check_objective(cfg.model, cfg.objective)
    check_buckets(cfg.data, autoencoder_shape(cfg.vae), describe(cfg.model))
    assert any(check_own(cfg, world) is None for world in (1, 2, 8, 16))
    adapted = load_config(RunConfig, path, ["lora.rank=4", "train.init_from=weights.safetensors"])
    assert adapted.lora.rank == 4


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_memory_of_the_stages(path: Path) -> None:
    """The published batch sizes, which are for 140 GB cards: what a process keeps of 64 fits, activations included."""
    cfg = load_config(RunConfig, path)
    planner = Planner(cfg, 64, DEVICES["h200"], device_type="cuda")
    heaviest = planner.one(cfg.parallel, planner.shapes[-1])
    assert 8 * GIB < heaviest.memory.total < planner.room
    assert planner.forecaster.frozen < 2 * GIB  # T5 is cut over all of them


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_sampling(path: Path) -> None:
    needs_reference = path.stem in ("i2v", "v2v")
    cfg = load_config(SampleConfig, path, ["--prompt", "a cat", *(["ref=a.mp4"] if needs_reference else [])])
    if cfg.model is None or cfg.vae is None or cfg.text is None:
        assert path.stem in ("demo", "shapes")
        return
    check_fit(cfg.model, cfg.vae, cfg.text)
    objective = cfg.objective or default_objective(cfg.model)
    check_objective(cfg.model, objective)
    option = fit_option("sampling", cfg.sampling, cfg.model, autoencoder_shape(cfg.vae))
    assert solver_of("sampling", cfg.sampling, objective) == "euler"
    assert cfg.prompt_suffix and cfg.cond_type == {"i2v": "i2v_head", "v2v": "v2v_head"}.get(path.stem, "t2v")
    assert (option.text_osci, option.image_osci, option.scale_temporal_osci) == (True, True, True)
    if cfg.still is not None:
        assert cfg.still.model is not None and cfg.still.vae is not None
        check_fit(cfg.still.model, cfg.still.vae, cfg.text)
        assert (cfg.still.resolution, cfg.still.guidance) == ("768px", 4.0)
    assert (cfg.still is not None) == (path.stem.startswith("t2i2v") or path.stem == "high_compression")
    source = Source(
        path=Path(cfg.weights),
        checkpoint=None,
        adapters=None,
        model=cfg.model,
        vae=cfg.vae,
        text=cfg.text,
        objective=objective,
        conditioning=None,
        prompt_suffix=True,
    )
    one, eight = (memory_of(cfg, source, world).kept for world in (1, 8))
    assert 20 * GIB < one["denoiser"] < 25 * GIB and eight["denoiser"] < 3.2 * GIB
    assert one["text encoder"] > 9 * GIB and eight["text encoder"] < 1.3 * GIB


@pytest.mark.parametrize("path", PIPELINES, ids=name_of)
def test_data_pipelines(path: Path) -> None:
    assert load_config(PipelineConfig, path, ["source=videos", "out=run"]).out == "run"


@pytest.mark.parametrize("path", SERVICES, ids=name_of)
def test_services(path: Path) -> None:
    cfg = load_config(ServeConfig, path)
    for served in cfg.models.values():
        words = [f"weights={served.weights}"] if served.weights else []
        load_config(SampleConfig, CONFIGS.parent / served.sample, words)


@pytest.mark.parametrize("path", PARTS, ids=name_of)
def test_parts(path: Path, tmp_path: Path) -> None:
    """What others are made of."""
    whole = tmp_path / "whole.yaml"
    whole.write_text(f"include: [{CONFIGS / 'train' / 'stage1.yaml'}, {path}]\nname: whole\n")
    assert load_config(RunConfig, whole).name == "whole"
    used = [other for other in RUNS if path.name in other.read_text()]
    assert used or path.stem == "many_nodes"  # which is for those who have them


@pytest.mark.parametrize("name", STAGES)
def test_published_numbers(name: str) -> None:
    """Learning rates, warm-up, dropout, optimizer and adapters."""
    cfg = load_config(RunConfig, CONFIGS / "train" / f"{name}.yaml")
    optim = cfg.optim
    assert optim.lr == (5e-5 if name in ("stage1", "stage2") else 1e-5) and optim.initial_lr == 1e-6
    assert (optim.kind, optim.eps, optim.betas, optim.weight_decay) == ("adamw", 1e-15, (0.9, 0.999), 0)
    assert optim.clip_norm == 1 and cfg.data.prompt_suffix
    assert cfg.conditioning.dropout.text == cfg.conditioning.dropout.pooled == 0.31622777
    assert cfg.parallel.mesh.ulysses == (4 if "stage2" in name else 1)
    adapted = load_config(RunConfig, CONFIGS / "train" / "lora" / f"{name}.yaml")
    assert adapted.lora.rank == 32 and adapted.data.buckets == cfg.data.buckets and adapted.name == f"lora_{name}"
    base = "Open_Sora_v2_Video_DC_AE" if name == "high_compression" else "Open_Sora_v2"
    assert adapted.train.init_from == f"ckpts/{base}.safetensors"
    drawn = {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1}
    assert cfg.conditioning.references == ({} if name in ("image", "stage1", "stage2") else drawn)


def test_published_buckets(golden: Path) -> None:
    """Line by line, but for the length that the published stage 2 leaves out at 256px and no other table does."""
    tables: dict[str, Any] = json.loads((golden / "buckets.json").read_text())["tables"]
    for name in ("stage1", "stage2", "stage2_i2v"):
        ours = load_config(RunConfig, CONFIGS / "train" / f"{name}.yaml").data.buckets
        theirs = {r: {int(f): row for f, row in rows.items()} for r, rows in tables[name]["config"].items()}
        if name == "stage2":
            assert 69 not in theirs["256px"] and ours["256px"].pop(69) == [1.0, 7]
        assert {r: {f: list(row) for f, row in rows.items()} for r, rows in ours.items()} == theirs
