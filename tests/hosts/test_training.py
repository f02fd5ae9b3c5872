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


def check(place: str, start: str, hosts: int, per_host: int, make_lab: MakeLab, config: Path, truth: Path) -> None:
    lab = make_lab(hosts=hosts, **PLACES[place])
    train(lab, STARTS[start], per_host, config, f"train.steps={STEPS}", **told(start, place, lab.hosts[0].address))
    assert difference(config.parent / "run", truth) <= TOLERANCE


QUICK = (
    ("names to loopback", "torchrun.sh", 2, 1),
    ("wrong names, an interface that leads nowhere", "srun", 2, 1),
    ("IPv6 only", "variables", 3, 1),
)


@pytest.mark.parametrize(("place", "start", "hosts", "per_host"), QUICK)
def test_hosts_train_as_one_process(
    place: str, start: str, hosts: int, per_host: int, make_lab: MakeLab, config: Path, truth: Path
) -> None:
    check(place, start, hosts, per_host, make_lab, config, truth)


@pytest.mark.slow
@pytest.mark.parametrize("per_host", [1, 2])
@pytest.mark.parametrize("hosts", [2, 3])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_and_start(
    place: str, start: str, hosts: int, per_host: int, make_lab: MakeLab, config: Path, truth: Path
) -> None:
    if (place, start, hosts, per_host) in QUICK:
        pytest.skip("in the default suite")
    check(place, start, hosts, per_host, make_lab, config, truth)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [((2, 2), (3, 1)), ((3, 1), (2, 1)), ((3, 2), (1, 2))])
@pytest.mark.parametrize("start", STARTS)
def test_resumed_on_another_number_of_hosts(
    start: str, first: tuple[int, int], then: tuple[int, int], make_lab: MakeLab, config: Path, truth: Path
) -> None:
    """(hosts, processes on each): half of the run on the first, the rest on the other."""
    lab = make_lab(hosts=3, names="loopback")
    for (hosts, per_host), steps in ((first, STEPS // 2), (then, STEPS)):
        train(lab, STARTS[start], per_host, config, f"train.steps={steps}", hosts=hosts)
    assert difference(config.parent / "run", truth) <= TOLERANCE
