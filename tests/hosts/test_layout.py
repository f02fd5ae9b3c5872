"""Ranks, bytes and records of processes on several hosts, whatever order they are numbered in."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from acceleration.diagnostics.links import Links
from benchmarks.hosts import IN_TURNS, LAYOUTS, in_lab, start_in_any_order
from opensora.cli.forecast import main
from opensora.utils.metrics_log import read_metrics
from tests.hosts.conftest import MakeLab
from tests.hosts.training import STEPS, TRAIN, all_said, arguments, difference, finish

pytestmark = pytest.mark.timeout(600)
RATIO = (1.0, 1.1)  # of counted to predicted bytes: headers, acknowledgements and messages of a few bytes are counted
DYNAMIC = {"ulysses", "ring", "ring x ulysses", "dynamic"}  # that work with any number of hosts


def check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for host, counted in row["counted"].items():
            assert RATIO[0] <= counted / row["predicted"][host] <= RATIO[1], row


def test_counted_bytes_between_hosts_are_those_predicted() -> None:
    """On the sockets of two hosts; a launcher that numbers in turns has not made ulysses cross them."""
    (row,) = in_lab(0, ["shard x ulysses"], 1)["rows"]
    check([row])
    assert row["axes"].keys() == {"fsdp"}
    assert "(the launcher's 0, 2)" in row["summary"] and "ulysses stays within a host, shard crosses" in row["summary"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbering", "names"),
    [(IN_TURNS, LAYOUTS), ((0, 1, 2, 1), DYNAMIC), ((0, 1, 1, 1), DYNAMIC), ((0, 1, 2, 3), LAYOUTS)],
    ids=["in turns", "three hosts", "1 + 3", "four hosts"],
)
def test_every_layout(numbering: tuple[int, ...], names: Any) -> None:
    check(in_lab(0, list(names), 2, numbering)["rows"])


@pytest.mark.slow
def test_a_run_says_and_records_what_crosses(
    make_lab: MakeLab, config: Path, truth: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In turns on two hosts: the weights of one process, the line, the records, rates for the planner."""
    lab = make_lab(hosts=2, names="loopback", mtu=9000)
    command = [*TRAIN, *arguments(config, "parallel.mesh.ulysses=2", "parallel.zero=3", f"train.steps={STEPS}")]
    processes = start_in_any_order(lab, IN_TURNS, [sys.executable, *command])
    assert not any(finish(processes)), all_said(processes)
    said = processes[0].err
    line = re.search(r"2 hosts: h0 has rank 0-1 \(the launcher's 0, 2\), .* sends the others 17.2 MiB per step", said)
    assert line, said
    assert re.search(r"preflight: 4 processes on 2 hosts.* \S+ GB/s within its host, a host \S+ GB/s to others", said)
    run = config.parent / "run"
    assert difference(run, truth) <= 1e-10
    records, _ = read_metrics(run / "metrics.jsonl")
    assert len(records) == STEPS
    for record in records:
        counted, predicted = record["comm/hosts_gib"], record["comm/hosts_predicted_gib"]
        assert RATIO[0] <= counted / predicted <= RATIO[1], record
    assert records[0]["comm/hosts_predicted_gib"] == pytest.approx(17.2 / 2**10, rel=0.01)  # as the line said
    links = Links.read(run)
    assert links.processes == (2, 2) and links.between and links.within
    assert main([str(config), "--world", "4", "--device", "cpu", "--links", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["network"]["between"] == links.between
