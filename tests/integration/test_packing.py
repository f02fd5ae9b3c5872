"""The real commands with samples of several buckets in one sequence: the run is the one without, step by step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opensora.cli.buckets import main as buckets
from opensora.cli.forecast import main as plan
from opensora.cli.precompute import main as precompute
from opensora.models.families import FAMILIES
from opensora.models.mmdit.model import FAMILY, describe
from opensora.utils.errors import UserError
from tests.integration.test_train_and_sample import LAYOUT_B, train_on, weights

# SGD: Adam would make steps of the roundings of gradients that are zero at the start.
OPTIM = ["optim.kind=sgd", "optim.lr=0.1", "optim.warmup_steps=0", "train.log_every=1"]
ALONE = ["data.micro_batches=6", "data.balance_group=3", *OPTIM]
PACKS = [*ALONE, "data.tokens_per_sequence=200"]


def errors(found: Path, truth: Path) -> float:
    """The largest relative difference of any exported weight."""
    right = weights(truth)
    return max(
        ((value - right[name]).abs().max() / right[name].abs().max().clamp(min=1e-12)).item()
        for name, value in weights(found).items()
    )


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture
def stored(config: Path, tmp_path: Path) -> list[str]:
    """Features of the data: encoders compute in fp32, and round as the batch they are given makes them."""
    lengths = "data.buckets={32px: {1: [1.0, 3], 5: [1.0, 2], 9: [1.0, 2]}}"  # without draws: they fit any epoch
    assert precompute([str(config), "--out", str(tmp_path / "features"), *PACKS, lengths]) == 0
    return [lengths, f"data.features={tmp_path / 'features'}"]


def compare(found: Path, truth: Path) -> None:
    assert errors(found, truth) <= 1e-10
    for record, right in zip(records(found), records(truth), strict=True):
        for name in ("loss", "grad_norm"):
            assert record[name] == pytest.approx(right[name], rel=1e-10)
        for name in right:
            assert not name.startswith("samples/") or record[name] == right[name]


@pytest.mark.timeout(300)
def test_a_run_with_packs_is_the_run_without(config: Path, stored: list[str], tmp_path: Path) -> None:
    """On one process without, on two that share every token with; stills and clips of two lengths, masked text."""
    steps = [*stored, "train.steps=3"]
    finished, wanted = train_on(1, config, [f"output={tmp_path / 'alone'}", *ALONE, *LAYOUT_B, *steps])
    assert finished
    finished, found = train_on(2, config, [f"output={tmp_path / 'packs'}", *PACKS, *steps])
    assert finished and found == wanted
    compare(tmp_path / "packs/run", tmp_path / "alone/run")
    for record in records(tmp_path / "packs/run"):
        assert record["comm/ulysses_gib"] > 0 and "comm/ulysses_predicted_gib" not in record


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_may_begin_to_pack_and_cease(config: Path, stored: list[str], tmp_path: Path) -> None:
    """Stopped with packs and resumed without them on another layout."""
    steps = [*stored, "train.steps=5"]
    finished, wanted = train_on(1, config, [f"output={tmp_path / 'alone'}", *ALONE, *LAYOUT_B, *steps])
    assert finished
    changed = [f"output={tmp_path / 'changed'}", *steps]
    finished, first = train_on(2, config, [*changed, *PACKS], kill_at=2)
    assert not finished
    finished, second = train_on(2, config, [*changed, *ALONE, *LAYOUT_B])
    assert finished and first + second == wanted
    compare(tmp_path / "changed/run", tmp_path / "alone/run")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_packs_of_files(config: Path, tmp_path: Path) -> None:
    """Encoded on the way, two data-parallel processes: as far apart as the encoder's roundings bring it."""
    for name, given in {"packs": PACKS, "alone": ALONE}.items():
        finished, _ = train_on(2, config, [f"output={tmp_path / name}", *given, *LAYOUT_B, "train.steps=4"])
        assert finished
    assert 0 < errors(tmp_path / "packs/run", tmp_path / "alone/run") <= 1e-5


def test_what_is_said_before(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert buckets([str(config), *PACKS]) == 0
    assert "sequences of at most 200 image tokens" in capsys.readouterr().out
    assert plan([str(config), "--world", "2", "--top", "1", *PACKS]) == 0
    assert "configured: " in capsys.readouterr().out
    without = replace(FAMILY, describe=lambda cfg: replace(describe(cfg), packs=False))
    monkeypatch.setitem(FAMILIES, "mmdit", without)
    with pytest.raises(UserError, match=r"data\.tokens_per_sequence=200: model\.kind=mmdit takes one sample"):
        buckets([str(config), *PACKS])
