"""A tiny run to break, and one table at the end: what the fault tests asked for, and how often it was so."""

from collections.abc import Callable
from pathlib import Path

import pytest

Tally = Callable[[str, int, int], None]
_ROWS = pytest.StashKey[dict[str, tuple[int, int]]]()

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
    """``tally(row, passed, of)`` adds to a row of the table."""
    rows = request.config.stash.setdefault(_ROWS, {})

    def add(row: str, passed: int, of: int) -> None:
        before = rows.get(row, (0, 0))
        rows[row] = (before[0] + passed, before[1] + of)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_ROWS, {})
    if rows:
        terminalreporter.section("faults")
        width = max(map(len, rows))
        for row, (passed, of) in rows.items():
            terminalreporter.line(f"{row:{width}}  {passed:>5} of {of}")


@pytest.fixture
def config(stills: Path, tmp_path: Path) -> Path:
    """A training configuration; run folders are chosen by ``output=``."""
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", table=stills))
    return path
