"""The real commands on STDiT, STDiT2 and STDiT3: train on one layout, sample what was saved on others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference.find import find_source
from opensora.models.families import build_model, family_of, read_hub_config
from opensora.models.weights.patches import PUBLISHED
from opensora.models.weights.writer import convert_shapes, shapes_of
from opensora.utils.metrics_log import read_metrics
from tests.dist.harness import run_distributed
from tests.integration.test_dit_family_run import OVERRIDES, run_sample, run_train

SHAPE = "in_channels: 16, caption_channels: 32, hidden_size: 48, num_heads: 4, depth: 2, model_max_length: 4"
WINDOWS = "kernel_size: [2, 3, -1], use_spatial_rope: true, cond_embed: true"
MASKS = "masks: {random: 0.3, image_head: 0.3}"
CASES = {
    "stdit": (f"{{kind: stdit, {SHAPE}}}", "iddpm", MASKS),
    "stdit2": (f"{{kind: stdit2, {SHAPE}}}", "iddpm", MASKS),
    "stdit3": (f"{{kind: stdit3, {SHAPE}, freeze_y_embedder: true}}", "rectified_flow_v1", MASKS),
    "windows": (f"{{kind: stdit3, {SHAPE}, {WINDOWS}}}", "rectified_flow_v1", "references: {t2v: 1, i2v_head: 1}"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_train_and_sample(case: str, config: Path, tmp_path: Path) -> None:
    """Two processes and one: the same losses. Run and export give the same samples; the export has the family's names
    and all of its tensors."""
    model, objective, conditioning = CASES[case]
    before, _, rest = config.read_text().partition("model:\n")
    written = config.parent / "written.yaml"
    written.write_text(f"{before}model: {model}\n{rest[rest.index('vae:') :]}")
    told = f"conditioning={{dropout: {{text: 0.3, pooled: 0.0}}, {conditioning}}}"
    folders: dict[int, Path] = {}
    for world, extra in ((2, []), (1, ["parallel.mesh.ulysses=1"])):
        folder = tmp_path / f"on{world}"
        argv = [str(written), *OVERRIDES, told, f"objective={{kind: {objective}}}", f"output={folder}", *extra]
        assert run_distributed(run_train, world, argv, timeout=300, init=False) == [0] * world
        folders[world] = folder / "run"
    two, one = ([record["loss"] for record in read_metrics(folders[world] / "metrics.jsonl")[0]] for world in (2, 1))
    assert len(one) == 6 and two == pytest.approx(one, rel=1e-9)

    exported = folders[2] / "exported"
    cfg: Any = load_config(RunConfig, folders[2] / "config.yaml").model
    assert find_source(SampleConfig(weights=str(exported), prompt="a red circle")).model == cfg
    tensors, format = load_file(exported / "model.safetensors"), family_of(cfg).weights
    with torch.device("meta"):
        ours = shapes_of(build_model(cfg).state_dict())
    assert shapes_of(tensors) == convert_shapes(ours, format, source=format.layout(cfg), to=PUBLISHED)
    if case != "stdit":
        assert json.loads((exported / "config.json").read_text())["model_type"] == cfg.kind.replace("stdit", "STDiT")
        found: Any = read_hub_config(exported)
        assert (found.hidden_size, found.in_channels, found.kind) == (48, 16, cfg.kind)

    made: dict[Path, dict[str, bytes]] = {}
    for world, weights in ((2, folders[2]), (1, exported)):
        job, out = tmp_path / f"job{world}.yaml", tmp_path / f"samples{world}"
        job.write_text(f"weights: {weights}\nprompt: a red circle\n")
        sampling = "sampling={width: 40, height: 32, num_frames: 9, num_steps: 2, fps: 8, guidance: 3.0}"
        argv = [str(job), f"save_dir={out}", "precision=fp64", sampling, f"parallel.mesh.ulysses={world}"]
        assert run_distributed(run_sample, world, argv, timeout=300, init=False) == [0] * world
        made[weights] = {file.name: file.read_bytes() for file in out.rglob("*") if file.suffix in (".mp4", ".png")}
    assert made[exported] and made[exported] == made[folders[2]]
