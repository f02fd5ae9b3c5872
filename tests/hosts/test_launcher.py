"""launch/torchrun.sh on several hosts: they meet on any network or say why not, and go on without one that dies."""

import re
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hosts.conftest import MakeLab
from tests.hosts.heard import Heard
from tests.hosts.lab import ELSEWHERE, NOBODY, Host, HostProcess, Lab, until
from tests.hosts.training import LIMIT_S, PORT, STEPS, TRAIN, all_said, arguments, bracketed, difference, environment

pytestmark = pytest.mark.timeout(600)
WORKER = ROOT / "tests/hosts/meeting_worker.py"
QUICK = ("--heartbeat-timeout", 3, "--last-call", 1, "--timeout", 60)
SLACK_S = 30.0  # for launchers to begin and end on a machine that does other things too
STAYS_S = 300  # of a worker that is to be ended
TOLERANCE = 1e-10


def launch(
    host: Host, where: str, *command: object, nodes: object = 2, processes: int = 1, options: Sequence[object] = QUICK
) -> HostProcess:
    """The launcher of one host."""
    together = ["--nodes", nodes, "--rendezvous", f"{bracketed(where)}:{PORT}", *options]
    return host.popen(["bash", ROOT / "launch/torchrun.sh", *together, processes, *command], env=environment())


def codes(launchers: list[HostProcess]) -> list[int]:
    """Exit codes; nobody ends with a traceback."""
    found = [one.finish(LIMIT_S) for one in launchers]
    assert "Traceback" not in all_said(launchers), all_said(launchers)
    return found


def ranks(launchers: Sequence[HostProcess]) -> list[str]:
    """What the workers said, of all hosts."""
    return sorted(line for one in launchers for line in one.out.splitlines() if line.startswith("attempt"))


# --- networks


# What the names are like, the name of the rendezvous ("" for the address of the first host).
PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "names to loopback": ({"names": "loopback only", "dead_interface": True}, ""),
    "own name to loopback": ({"names": "loopback"}, "h0"),
    "IPv6 only, no names": ({"names": "none", "family": "ipv6"}, ""),
    "no names": ({"names": "none"}, ""),
    "wrong names": ({"names": "different", "dead_interface": True}, ""),
    "good names": ({"names": "full", "family": "both"}, "h0"),
}
DEFAULT = ("names to loopback", "IPv6 only, no names")


@pytest.mark.parametrize(
    "place", [one if one in DEFAULT else pytest.param(one, marks=pytest.mark.slow) for one in PLACES]
)
def test_uneven_hosts_meet_wherever_names_lead(place: str, make_lab: MakeLab) -> None:
    about, where = PLACES[place]
    lab = make_lab(hosts=2, **about)
    address = where or lab.hosts[0].address
    launchers = [launch(host, address, WORKER, 0, processes=i + 1) for i, host in enumerate(lab.hosts)]
    assert codes(launchers) == [0, 0], all_said(launchers)
    reached = lab.hosts[0].addresses
    said = [re.fullmatch(r"attempt 0: rank (\d) of 3 by (\S+)", line) for line in ranks(launchers)]
    assert [one and one[1] for one in said] == ["0", "1", "2"], all_said(launchers)
    assert {one[2] for one in said if one} <= set(reached)
    assert all("2 machines, 3 processes: h0 (rank 0), h1 (rank 1-2)" in one.err for one in launchers)


# --- who does not meet: where -> how it is started on each host, exit codes, what every host says


def same(where: str, **more: Any) -> list[dict[str, Any]]:
    """Of both hosts alike."""
    return [{"where": where, **more}] * 2


ALONE: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[int], list[str]]] = {
    "each its own rendezvous": (
        {},
        same("localhost"),
        [2, 2],
        [rf"1 of 2 machines came within 6 s: h{i};.*leads every machine to itself.*10\.77\.0\.{i + 1}" for i in (0, 1)],
    ),
    "address of nobody": ({}, same(NOBODY), [1, 1], [f"{NOBODY}:{PORT} does not answer.*is it the address of one"] * 2),
    "address beyond the router": ({}, same(ELSEWHERE), [1, 1], [rf"{ELSEWHERE}:{PORT} does not answer \(no an"] * 2),
    "name of nobody": ({}, same("nowhere"), [2, 2], ["nowhere: no machine of this name is known here"] * 2),
    "name that leads to loopback on both": (
        {"names": ["127.0.1.1 h0\n"] * 2},
        same("h0"),
        [1, 2],
        ["1 of 2 machines came within 6 s: h0;", "h0 leads to a loopback address here, though this machine is h1"],
    ),
    "other numbers of machines": (
        {},
        [{"where": "h0"}, {"where": "h0", "nodes": 3}],
        [2, 2],
        ["--nodes is not the same: 3 on h1, 2 on h0"] * 2,
    ),
    "other arguments": (
        {},
        [{"where": "h0"}, {"where": "h0", "more": ["seed=4"]}],
        [2, 2],
        ["configuration is not the same: seed=4 on h1, nothing on h0"] * 2,
    ),
    "another run": (
        {},
        [{"where": "h0", "more": ["name=a"]}, {"where": "h0", "more": ["name=b"]}],
        [2, 2],
        ["1 of 2.*; h1: refused, as it starts another run:.*name=b", "another run meets at h0.*name=a; this one"],
    ),
    "nobody else": ({}, [{"where": "h0"}], [1], ["1 of 2 machines came within 6 s: h0; 1 did not reach h0:29400"]),
}  # fmt: skip
# Seconds to meet in; more where both have to come, which takes a busy machine long. The first two end when they do.
WITHIN_S = {"other numbers of machines": 60, "other arguments": 60, "another run": 25}


@pytest.mark.parametrize(
    "case", [one if one == "each its own rendezvous" else pytest.param(one, marks=pytest.mark.slow) for one in ALONE]
)
def test_who_does_not_meet_is_told_why(case: str, make_lab: MakeLab) -> None:
    """Each launcher by one line, on time; and it says before that for whom it waits."""
    about, starts, exits, says = ALONE[case]
    lab = make_lab(hosts=2, **about)
    within_s = WITHIN_S.get(case, 6)
    begun, options, launchers = time.monotonic(), ("--timeout", within_s), []
    for host, start in zip(lab.hosts, starts, strict=False):
        more = {"nodes": start["nodes"]} if "nodes" in start else {}
        command = [WORKER, STAYS_S, *start.get("more", [])]
        launchers.append(launch(host, start["where"], *command, options=options, **more))
        if len(starts) > 1 and start != starts[1]:  # the first is the one that the second is compared with
            until(partial(listening, host), LIMIT_S, "a coordinator")
    assert codes(launchers) == exits, all_said(launchers)
    assert time.monotonic() - begun < within_s + 2 * SLACK_S
    for one, pattern in zip(launchers, says, strict=True):
        errors = [line for line in one.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and re.search(pattern, errors[0]), all_said(launchers)
        assert 2 in exits or "awaited" in one.err or "waiting: " in one.err, all_said(launchers)


def listening(host: Host) -> bool:
    """Whether there is a coordinator."""
    return host.run(["sh", "-c", f"ss -Hltn 'sport = :{PORT}' | grep -q ."], check=False).returncode == 0


# --- hosts that die


def die(lab: Lab, launchers: list[HostProcess], nodes: object, restarts: int, cut: bool = True) -> Heard:
    """Both hosts run workers that stay; then the second one dies. What the first says from there on."""
    options = (*QUICK, "--restarts", restarts)
    launchers += [
        launch(host, lab.hosts[0].address, WORKER, STAYS_S, nodes=nodes, options=options) for host in lab.hosts
    ]
    for one in launchers:
        one.wait_for("attempt 0: rank . of 2", LIMIT_S)
    heard = Heard(launchers)
    lab.hosts[1].kill(power_cut=cut)
    return heard


@pytest.mark.parametrize("cut", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["power cut", "killed"])
def test_a_host_that_dies_is_named_and_the_rest_goes_on(cut: bool, make_lab: MakeLab) -> None:
    """Without a packet from it, too; and a signal then stops what is left with 75."""
    lab, launchers = make_lab(hosts=2), list[HostProcess]()
    die(lab, launchers, "1:2", 1, cut)
    assert launchers[0].wait_for("attempt 1: rank 0 of 1 by 127.0.0.1", LIMIT_S) < SLACK_S
    why = "it has not been heard of for 3 s" if cut else "its connection ended"
    assert re.search(rf"h1 is gone: {why}.*; starting again \(1 of 1\)", launchers[0].err), launchers[0].said
    launchers[0].terminate()
    assert codes(launchers[:1]) == [75]


@pytest.mark.slow
def test_a_host_that_dies_ends_a_run_without_restarts(make_lab: MakeLab) -> None:
    lab, launchers = make_lab(hosts=2), list[HostProcess]()
    heard = die(lab, launchers, 2, 0)
    assert codes(launchers[:1]) == [1] and heard.now() < SLACK_S
    assert launchers[0].err.splitlines()[-1] == "error: h1 is gone: it has not been heard of for 3 s"


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, "1:2"])
def test_a_host_that_dies_and_comes_back_is_taken_in(nodes: object, make_lab: MakeLab) -> None:
    lab, launchers = make_lab(hosts=2), list[HostProcess]()
    die(lab, launchers, nodes, 1)
    waits = "1 of 2 machines came: h0; the other one is awaited.*h1: it has not been heard of"
    launchers[0].wait_for(waits if nodes == 2 else "attempt 1: rank 0 of 1", LIMIT_S)
    lab.hosts[1].boot()
    again = (*QUICK, "--restarts", 1)
    launchers[1] = launch(lab.hosts[1], lab.hosts[0].address, WORKER, STAYS_S, nodes=nodes, options=again)
    for i in (0, 1):
        launchers[i].wait_for(f"attempt 1: rank {i} of 2", LIMIT_S)
    launchers[1].terminate()
    assert codes(launchers) == [75, 75], all_said(launchers)
    assert nodes == 2 or "h1 came: the processes save and start again with it" in launchers[0].err


@pytest.mark.slow
@pytest.mark.parametrize("back", [True, False])
def test_the_host_of_the_rendezvous_dies(back: bool, make_lab: MakeLab) -> None:
    lab = make_lab(hosts=2)
    options = ("--heartbeat-timeout", 3, "--timeout", 40 if back else 10, "--restarts", 1)
    where = lab.hosts[0].address
    launchers = [launch(host, where, WORKER, STAYS_S, options=options) for host in lab.hosts]
    for one in launchers:
        one.wait_for("attempt 0: rank . of 2", LIMIT_S)
    lab.hosts[0].kill()
    launchers[1].wait_for(r"has not been reached for \d+ s; starting again \(1 of 1\) when it is back", LIMIT_S)
    if not back:
        assert codes(launchers[1:]) == [1]
        last = launchers[1].err.splitlines()[-1]
        assert re.fullmatch(r"error: 10\.77\.0\.1:29400 does not answer .*has not come back within 10 s", last), last
        return
    lab.hosts[0].boot()
    launchers[0] = launch(lab.hosts[0], where, WORKER, STAYS_S, options=options)
    for one in launchers:
        one.wait_for("attempt 1: rank . of 2", LIMIT_S)
    launchers[0].terminate()
    assert codes(launchers) == [75, 75], all_said(launchers)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "ends"), [(3, 3), (2, 2), (-9, 137), (75, 75)])
def test_a_process_that_fails_ends_all_launchers_with_its_code(code: int, ends: int, make_lab: MakeLab) -> None:
    lab = make_lab(hosts=2)
    launchers = [launch(host, lab.hosts[0].address, WORKER, STAYS_S, 1, code) for host in lab.hosts]
    launchers[0].wait_for("attempt 0", LIMIT_S)
    begun = time.monotonic()
    assert codes(launchers) == [ends, ends], all_said(launchers)
    assert time.monotonic() - begun < SLACK_S
    how = "stopped" if code == 75 else "failed"
    assert all(f"rank 1 on h1 {how} first, exit code {ends}" in one.err for one in launchers)


@pytest.mark.slow
def test_a_launcher_that_has_finished_may_leave(make_lab: MakeLab) -> None:
    """Its host too; the other one's processes run to their end."""
    lab = make_lab(hosts=2)
    where, script = lab.hosts[0].address, "import os, time; time.sleep(8 if os.environ['GROUP_RANK'] == '0' else 0)"
    worker = Path("/dev/shm/worker.py")
    launchers = []
    for host in lab.hosts:
        host.run(["sh", "-c", 'echo "$1" > "$2"', "sh", script, worker])
        launchers.append(launch(host, where, worker))
    launchers[0].wait_for("2 machines", LIMIT_S)
    time.sleep(3)
    lab.hosts[1].kill()
    assert codes(launchers[:1]) == [0], all_said(launchers)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_they_wait(which: int, number: int, make_lab: MakeLab) -> None:
    """Ends the one that gets it; the other one goes on waiting, and meets whoever comes instead."""
    lab = make_lab(hosts=2)
    where = lab.hosts[0].address
    launchers = [launch(host, where, WORKER, 0, nodes=3) for host in lab.hosts]
    for one in launchers:
        one.wait_for("2 of 3 machines came: h[01], h[01]", LIMIT_S)
    launchers[which].send_signal(number)
    assert codes([launchers[which]]) == [75]
    launchers[1 - which].wait_for("1 of 3 machines came|does not answer", LIMIT_S)
    launchers[which] = launch(lab.hosts[which], where, WORKER, 0, nodes=3)
    launchers.append(launch(lab.hosts[1], where, WORKER, 0, nodes=3))
    assert codes(launchers) == [0, 0, 0], all_said(launchers)


# --- training


def training(lab: Lab, config: Path, folder: Path, nodes: object, *overrides: str) -> list[HostProcess]:
    """Launchers of a run of two hosts whose steps take a second, and which are at their fourth when this returns."""
    folder.mkdir(exist_ok=True)
    env = environment(FAULTY_SLEEP_S="1", FAULTY_HOOKS=str(folder))
    command = trained(lab, config, nodes, *overrides)
    launchers = [host.popen(command, env=env) for host in lab.hosts]
    until(lambda: (folder / "step-3").exists() or any(one.poll() is not None for one in launchers), LIMIT_S, "steps")
    assert all(one.poll() is None for one in launchers), all_said(launchers)
    return launchers


def trained(lab: Lab, config: Path, nodes: object, *overrides: str) -> list[object]:
    """The command of every host."""
    options = ["--nodes", nodes, "--rendezvous", f"{lab.hosts[0].address}:{PORT}", *QUICK, "--restarts", 2]
    steps = [f"train.steps={STEPS + 2}", "train.checkpoint_every=2", *overrides]
    return ["bash", ROOT / "launch/torchrun.sh", *options, 1, *TRAIN, *arguments(config, *steps)]


@pytest.fixture(scope="module")
def undisturbed(stills: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of one process that nothing happens to."""
    from tests.dist.harness import run_distributed
    from tests.faults.conftest import CONFIG
    from tests.faults.runs import run_with

    folder = tmp_path_factory.mktemp("undisturbed")
    config = folder / "train.yaml"
    config.write_text(CONFIG.format(output=folder, table=stills))
    overrides = [*arguments(config)[1:], f"train.steps={STEPS + 2}"]
    (outcome,) = run_distributed(run_with, 1, config, overrides, init=False)
    assert outcome.end == "finished"
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("host", [1, 0])
@pytest.mark.parametrize(("nodes", "back"), [("1:2", False), ("1:2", True), (2, True)])
def test_training_goes_on_when_a_host_dies(
    nodes: object, back: bool, host: int, make_lab: MakeLab, config: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """From the newest checkpoint, on what is left or with the host that comes back, to the same weights."""
    if host == 0 and not back:
        pytest.skip("without the host of the rendezvous nobody decides")
    lab = make_lab(hosts=2, names="loopback")
    launchers = training(lab, config, tmp_path / "hooks", nodes)
    lab.hosts[host].kill()
    if back:
        launchers[1 - host].wait_for("starting again", LIMIT_S)
        lab.hosts[host].boot()
        launchers[host] = lab.hosts[host].popen(trained(lab, config, nodes), env=environment(FAULTY_SLEEP_S="1"))
    else:
        del launchers[host]
    assert set(codes(launchers)) == {0}, all_said(launchers)
    assert difference(config.parent / "run", undisturbed) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_training_stopped_on_one_host_is_saved_and_goes_on(
    which: int, make_lab: MakeLab, config: Path, tmp_path: Path, undisturbed: Path
) -> None:
    lab = make_lab(hosts=2, names="loopback")
    launchers = training(lab, config, tmp_path / "hooks", 2)
    launchers[which].terminate()
    assert codes(launchers) == [75, 75], all_said(launchers)
    again = [host.popen(trained(lab, config, 2), env=environment()) for host in lab.hosts]
    assert codes(again) == [0, 0], all_said(again)
    assert difference(config.parent / "run", undisturbed) <= TOLERANCE
