"""Training as in Open-Sora 1.x by the real command: buckets by its rules, windows of frames, frames that are given.
Interrupted and resumed on another number of processes it computes what one process does in one go."""

from pathlib import Path

import pytest

from opensora.utils.metrics_log import read_metrics
from tests.dist.harness import run_distributed
from tests.integration.test_dit_family_run import run_train

SHAPE = "in_channels: 16, caption_channels: 32, hidden_size: 48, num_heads: 4, depth: 2, model_max_length: 4"
WINDOWS = "kernel_size: [2, 3, -1], use_spatial_rope: true, cond_embed: true"
DATA = [
    "data.bucket_rule=open_sora_1_0",
    "data.frame_interval=2",
    "data.interpolation=bilinear",
    "data.unused_rows=report",
    "data.buckets={24x40: {1: [1.0, 3], 5: [0.6, 2], 9: [1.0, 2]}}",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "optim.warmup_steps=1",
]
TYPES = "mask_types: {none: 1, i2v_head: 1, v2v_head_noisy: 2, other: 2}, known_weight: 0.4"
CASES = {
    "masks": (
        f"{{kind: stdit3, {SHAPE}}}",
        "{dropout: {text: 0.3, pooled: 0.0}, masks: {random: 0.4, image_head_tail: 0.3}}",
    ),
    "types": (
        f"{{kind: stdit3, {SHAPE}, {WINDOWS}}}",
        f'{{dropout: {{text: 0.3, pooled: 0.0, conditions: {{cond: 1, text: 1, "null": 1, keep: 2}}}}, {TYPES}}}',
    ),
}


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "run/metrics.jsonl")[0]]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_resumed_on_another_layout(case: str, config: Path, tmp_path: Path) -> None:
    model, conditioning = CASES[case]
    before, _, rest = config.read_text().partition("model:\n")
    written = config.parent / "written.yaml"
    written.write_text(f"{before}model: {model}\n{rest[rest.index('vae:') :]}")
    told = [*DATA, f"conditioning={conditioning}", "objective={kind: rectified_flow_v1}"]

    def run(folder: str, world: int, steps: int, *more: str) -> Path:
        argv = [str(written), *told, f"output={tmp_path / folder}", f"train.steps={steps}", *more]
        assert run_distributed(run_train, world, argv, timeout=400, init=False) == [0] * world
        return tmp_path / folder

    whole = losses(run("whole", 1, 6, "parallel.mesh.ulysses=1", "train.loss_reduction=samples"))
    run("parts", 2, 2, "train.loss_reduction=samples")  # ZeRO 3, a sample cut over both
    parts = run("parts", 2, 4, "train.loss_reduction=samples", "parallel.mesh.ulysses=1", "parallel.zero=2")
    parts = run("parts", 1, 6, "train.loss_reduction=samples", "parallel.mesh.ulysses=1", "parallel.zero=0")
    assert len(whole) == 6 and losses(parts) == pytest.approx(whole, rel=1e-9)
