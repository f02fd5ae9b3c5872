"""Training on several hosts, whatever their names say and whichever interfaces they have, is the run of one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.hosts.conftest import MakeLab
from tests.hosts.training import STARTS, STEPS, difference, train

pytestmark = pytest.mark.timeout(600)
TOLERANCE = 1e-10
# What the network and the names are like -> arguments of the lab.
PLACES: dict[str, dict[str, Any]] = {
    "names to loopback": {"names": "loopback"},
    "own name to loopback, no others": {"names": "loopback only"},
    "no names": {"names": "none"},
    "wrong names, an interface that leads nowhere": {"names": "different", "dead_interface": True},
    "IPv6 only": {"names": "loopback", "family": "ipv6", "dead_interface": True},
    "good names": {"names": "full", "family": "both"},
}


def told(start: str, place: str, lab_address: str) -> dict[str, Any]:
    """What a person tells beside the command: SLURM's names serve only where they lead to the hosts."""
    if start == "srun" and place not in ("names to loopback", "good names", "IPv6 only"):
        return {"where": lab_address}
    return {"where": "h0"} if place == "good names" else {}


SIZES = ((2, 1), (3, 2), (2, 2), (3, 1))  # hosts, processes on each
QUICK = (
    ("names to loopback", "torchrun.sh", 2, 1),
    ("wrong names, an interface that leads nowhere", "srun", 2, 1),
    ("IPv6 only", "variables", 3, 1),
)
# Every place with every start, and each of these with every size.
EVERY = [(place, start, *SIZES[(i + j) % 4]) for i, place in enumerate(PLACES) for j, start in enumerate(STARTS)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in QUICK]


@pytest.mark.parametrize(("place", "start", "hosts", "per_host"), [*QUICK, *SLOW])
def test_hosts_train_as_one_process(
    place: str, start: str, hosts: int, per_host: int, make_lab: MakeLab, config: Path, truth: Path
) -> None:
    """To the end, and to its weights."""
    lab = make_lab(hosts=hosts, **PLACES[place])
    train(lab, STARTS[start], per_host, config, f"train.steps={STEPS}", **told(start, place, lab.hosts[0].address))
    assert difference(config.parent / "run", truth) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "first", "then"),
    [("torchrun.sh", (2, 2), (3, 1)), ("variables", (3, 1), (2, 1)), ("srun", (3, 2), (1, 2))],
)
def test_resumed_on_another_number_of_hosts(
    start: str, first: tuple[int, int], then: tuple[int, int], make_lab: MakeLab, config: Path, truth: Path
) -> None:
    """(hosts, processes on each): half of the run on the first, the rest on the other."""
    lab = make_lab(hosts=3, names="loopback")
    for (hosts, per_host), steps in ((first, STEPS // 2), (then, STEPS)):
        train(lab, STARTS[start], per_host, config, f"train.steps={steps}", hosts=hosts)
    assert difference(config.parent / "run", truth) <= TOLERANCE
