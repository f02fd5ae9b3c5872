"""A tiny run to break."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import add_rows

Tally = Callable[[str, int, int], None]

CONFIG = """
name: run
output: {output}
seed: 3
model:
  kind: mmdit
  size: debug
  depth: 1
  depth_single_blocks: 1
  patch_size: 1
  context_in_dim: 32
  vec_in_dim: 32
  cond_embed: false
vae: {{kind: dct, channels: 16}}
text: {{kind: bytes, dim: 32, mask: true}}
data:
  table: {table}
  micro_batches: 3
  workers: 0
  buckets: {{32px: {{1: [1.0, 2]}}}}
parallel:
  zero: 2
  precision: {{compute: fp64, reduce: fp64, master: fp64}}
  timeout_s: 60
optim: {{lr: 1.0e-3, ema_decay: 0.9, warmup_steps: 3}}
train: {{steps: 8, log_every: 1, checkpoint_every: 2, checkpoint_keep: 0, export: false}}
"""


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """``tally(row, passed, of)`` adds to a row of the table at the end."""
    return lambda row, passed, of: add_rows(request.config, {row: (passed, of)})


@pytest.fixture
def config(stills: Path, tmp_path: Path) -> Path:
    """A training configuration; run folders are chosen by ``output=``."""
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", table=stills))
    return path
