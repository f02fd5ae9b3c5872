"""A real run in which some samples are cut over two processes and others are not: the run of one process."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.train.loop import train
from opensora.train.setup import start_run
from tests.dist.harness import run_distributed
from tests.integration.test_train_and_sample import LAYOUT_B, train_on, weights

DYNAMIC = ["parallel.mesh.ulysses=2", "parallel.mesh.dynamic=true"]
# Three samples are cut over two processes, two are not. SGD: Adam divides by gradients that are nothing but rounding.
DATA = ["data.cost.exchange_tokens=0", "data.buckets.32px.5=[1.0, 3]", "train.steps=3", "train.log_every=1"]
DATA += ["optim.kind=sgd", "optim.lr=0.1"]


class Noting:
    """A run's Preparation that notes what it is given."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.given: list[tuple[int, tuple[int, ...], int | None, float]] = []

    def __call__(self, batch: Any, step: int) -> Any:
        self.given.append((step, batch.sample_ids, batch.degree, batch.weight))
        return self._inner(batch, step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def train_noting(config: Path, overrides: list[str]) -> Any:
    with start_run(load_config(RunConfig, config, overrides)) as run:
        run.prepare = noting = Noting(run.prepare)  # type: ignore[assignment]
        assert train(run)
    return noting.given


@pytest.mark.timeout(240)
@pytest.mark.parametrize("tiles", ["auto", pytest.param("on", marks=pytest.mark.slow)])
def test_samples_cut_and_not_cut_are_the_run_of_one_process(config: Path, tmp_path: Path, tiles: str) -> None:
    """Every sample as often, bytes as predicted; also where who cuts a sample shares its tiles.

    Weights to what the autoencoder rounds, which works in fp32 and on other samples together than before; it is
    tests/dist/test_dynamic.py that compares to 1e-10. Many weights start at zero, and hold nothing but gradients.
    """
    _, wanted = train_on(1, config, [f"output={tmp_path / 'one'}", *LAYOUT_B, *DATA])
    overrides = [f"output={tmp_path / 'two'}", f"train.vae_parallel={tiles}", *DYNAMIC, *DATA]
    results = run_distributed(train_noting, 2, config, overrides, timeout=110, init=False)
    found: Counter[tuple[int, int]] = Counter()
    for rank, given in enumerate(results):
        for step, ids, degree, weight in given:
            if weight and (degree == 1 or rank == 0):
                found.update((step, i) for i in ids)
    assert found == wanted
    assert [degree for _, _, degree, _ in results[0]] == [degree for _, _, degree, _ in results[1]]
    assert {degree for _, _, degree, _ in results[0]} == {1, 2}

    one, two = (weights(tmp_path / name / "run") for name in ("one", "two"))
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() <= 1e-4 * weight.abs().max().clamp(min=1e-12), name
    lines = (tmp_path / "two/run/metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert len(records) == 3
    for record in records:
        assert record["comm/fsdp_gib"] == record["comm/fsdp_predicted_gib"] > 0
        if tiles == "auto":  # what is sent of tiles is not predicted
            assert record.get("comm/ulysses_gib") == record.get("comm/ulysses_predicted_gib")
    assert any("comm/ulysses_gib" in record for record in records)
