"""Layouts on several hosts, numbered as launchers may: what one process computes, and bytes as predicted."""

import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import addresses
from acceleration.distributed import runtime as runtimes
from tests.dist import test_dynamic
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.test_parity import TOLERANCE, Outcome, on_one_process, on_this_layout, worst_error


@pytest.fixture(scope="module")
def truth() -> Outcome:
    return on_one_process()


def on_hosts(hosts: Sequence[str], cfg: ParallelConfig, dealt: Any) -> tuple[list[str], int, Outcome]:
    """In every process, which takes itself for one of a host by its launcher rank: (host of every rank, rank, ...)."""
    with mock.patch.object(addresses, "host_id", lambda: hosts[int(os.environ["RANK"])]):
        runtime = runtimes.start(90, mesh=cfg.mesh)
    assert runtime.rank == dist.get_rank() and runtime.peers[runtime.rank].rank == int(os.environ["RANK"])
    return [peer.host_id for peer in runtime.peers], runtime.rank, on_this_layout(cfg, *dealt)


def layout(zero: Any, mesh: dict[str, Any]) -> ParallelConfig:
    return ParallelConfig(zero=zero, mesh=MeshConfig(**mesh), precision=FP64)


CASES = [
    pytest.param("abab", 3, {"ulysses": 2}, "aabb", id="in turns"),
    pytest.param("abbb", 2, {"shard": 1, "ring": 2, "ulysses": 2}, "abbb", id="uneven"),
    pytest.param(
        "abcabcab", 3, {"shard": 2, "ulysses": 2, "tensor": 2}, "aaabbbcc", marks=pytest.mark.slow, id="three"
    ),
    pytest.param("abababbb", 1, {"replicate": 2, "ulysses": 2}, "aaabbbbb", marks=pytest.mark.slow, id="3 + 5"),
    pytest.param("acabcbac", 3, {"replicate": 2, "ring": 2}, "aaabbccc", marks=pytest.mark.slow, id="any order"),
]


@pytest.mark.parametrize(("hosts", "zero", "mesh", "arranged"), CASES)
def test_the_numbering_changes_nothing(truth: Outcome, hosts: str, zero: int, mesh: Any, arranged: str) -> None:
    found = run_distributed(on_hosts, len(hosts), hosts, layout(zero, mesh), (), init=False, timeout=110)
    assert sorted(rank for _, rank, _ in found) == list(range(len(hosts))) and found[0][1] == 0
    for by_rank, _, outcome in found:
        assert sorted(by_rank) == sorted(arranged)
        assert worst_error(outcome, truth) <= TOLERANCE
        assert all(counted == formula for counted, formula in outcome.traffic)


@pytest.mark.slow
def test_parts_of_ulysses_on_hosts_in_turns(truth: Outcome) -> None:
    cfg = layout(3, {"shard": 1, "ulysses": 4, "dynamic": True})
    for by_rank, _, outcome in run_distributed(
        on_hosts, 4, "abab", cfg, (test_dynamic.divided,), init=False, timeout=110
    ):
        assert by_rank == list("aabb")
        assert worst_error(outcome, truth) <= TOLERANCE
        assert all(counted == formula for counted, formula in outcome.traffic)
