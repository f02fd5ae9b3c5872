"""A tiny run to break, and a table of what was survived."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

Tally = Callable[[str, int, int], None]
_PASSED: Counter[str] = Counter()
_OF: Counter[str] = Counter()

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
def tally() -> Tally:
    """``tally(row, passed, of)`` adds to a row of the table at the end."""

    def add(row: str, passed: int, of: int) -> None:
        _PASSED[row] += passed
        _OF[row] += of

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _OF:
        width = max(map(len, _OF))
        terminalreporter.section("faults survived")
        for row, of in _OF.items():
            terminalreporter.write_line(f"{row:<{width}}  {_PASSED[row]} of {of}")


@pytest.fixture(scope="session")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip table of rendered stills."""
    from data_pipeline.shapes.__main__ import main

    folder = tmp_path_factory.mktemp("stills")
    main(["--out", str(folder), "--clips", "0", "--images", "24", "--durations", "5", "--processes", "1"])
    return folder / "train.csv"


@pytest.fixture
def config(stills: Path, tmp_path: Path) -> Path:
    """A training configuration; run folders are chosen by ``output=``."""
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", table=stills))
    return path
