"""A small rendered data set and a configuration that trains on it in seconds."""

from pathlib import Path

import pytest

from tests.integration.page_browser import chromium, page, service, start_service  # noqa: F401  (fixtures)

CONFIG = """
name: run
output: {output}
seed: 3
model:
  kind: mmdit
  size: debug
  patch_size: 1
  context_in_dim: 32
  vec_in_dim: 32
  cond_embed: false
vae: {{kind: dct, channels: 16}}
text: {{kind: bytes, dim: 32, mask: true}}
data:
  table: {table}
  micro_batches: 3
  workers: 1
  buckets:
    32px:
      1: [1.0, 3]
      5: [1.0, 2]
      9: [[1.0, 0.5], 2]
parallel:
  zero: 3
  mesh: {{ulysses: 2}}
  recompute: {{kind: full}}
  precision: {{compute: fp64, reduce: fp64, master: fp64}}
  timeout_s: 60
optim: {{lr: 1.0e-3, ema_decay: 0.9, warmup_steps: 3}}
train: {{steps: 6, log_every: 2, checkpoint_every: 100}}
"""


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.csv and its files."""
    from data_pipeline.shapes.__main__ import main

    folder = tmp_path_factory.mktemp("shapes")
    main(["--out", str(folder), "--clips", "20", "--images", "6", "--durations", "5,9", "--processes", "1"])
    return folder


@pytest.fixture
def config(shapes: Path, tmp_path: Path) -> Path:
    """A training configuration whose run folder is tmp_path/runs/run."""
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", table=shapes / "train.csv"))
    return path
