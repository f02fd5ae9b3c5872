"""Processes on several hosts meet, whatever their names and networks are like, or say why not, each in one line."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hosts.conftest import MakeLab
from tests.hosts.lab import ELSEWHERE, NOBODY, Host, HostProcess, Lab

PROGRAM = Path(__file__).with_name("meeting.py")
PORT, LIMIT_S, WAIT_S = 29511, 60, 100
CLEAN = ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def environment(**more: str) -> dict[str, str]:
    """Ours, without what would start something here."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEAN and not name.startswith("SLURM_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def variables(lab: Lab, host: Host, local: int, each: int, address: str) -> dict[str, str]:
    """RANK and the others, as a person sets them."""
    return {
        "RANK": str(host.index * each + local),
        "WORLD_SIZE": str(len(lab.hosts) * each),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(each),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(PORT),
    }


def step(lab: Lab, host: Host, local: int, each: int) -> dict[str, str]:
    """As srun sets them."""
    return {
        "SLURM_PROCID": str(host.index * each + local),
        "SLURM_STEP_NUM_TASKS": str(len(lab.hosts) * each),
        "SLURM_LOCALID": str(local),
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "h[0-9]",
        "SLURM_LAUNCH_NODE_IPADDR": lab.hosts[0].address,
    }


def start(lab: Lab, env: Sequence[Mapping[str, str]], limit_s: int = LIMIT_S, interface: str = "") -> list[HostProcess]:
    """One process for each environment, those of a host together."""
    each = len(env) // len(lab.hosts)
    command = [sys.executable, PROGRAM, "meet", limit_s, interface]
    return [lab.hosts[i // each].popen(command, env=environment(**one)) for i, one in enumerate(env)]


def met(lab: Lab, processes: Sequence[HostProcess]) -> dict[str, Any]:
    """That all ended well and know the same; what they know."""
    ends = [process.finish(WAIT_S) for process in processes]
    assert not any(ends), "\n".join(process.said for process in processes)
    said = [json.loads(process.out.splitlines()[-1]) for process in processes]
    world = len(processes)
    assert all(one == said[0] for one in said) and said[0]["sum"] == world * (world + 1) / 2, said
    lines = [line for process in processes for line in process.err.splitlines() if line.startswith("network: ")]
    assert len(lines) == 1 and processes[0].err.count(lines[0]) == 1  # rank 0 says it, once
    for host, (_, address, interface) in zip(lab.hosts, said[0]["peers"][:: world // len(lab.hosts)], strict=True):
        assert f"{host.name} (rank " in lines[0] and f"{address} ({interface})" in lines[0]
    return said[0]


def test_loopback_names_and_an_interface_with_several_addresses(make_lab: MakeLab) -> None:
    """gloo would take the first address of the interface, which leads nowhere, or that of the name: loopback."""
    lab = make_lab(names="loopback only", dead_interface=True)
    for host in lab.hosts:
        script = (
            f"ip addr flush dev eth0; ip addr add 169.254.7.{host.index + 1}/32 dev eth0; ip addr add 192.168.5.5/32 "
        )
        host.run(["sh", "-ec", f"{script} dev eth0; ip addr add {host.address}/24 dev eth0"])
    env = [variables(lab, host, local, 2, lab.hosts[0].address) for host in lab.hosts for local in (0, 1)]
    found = met(lab, start(lab, env))
    assert found["peers"] == [[host.name, host.address, "eth0"] for host in lab.hosts for _ in (0, 1)]
    assert found["set"] == "eth0"


def test_a_step_on_ipv6_only_whose_names_are_unknown(make_lab: MakeLab) -> None:
    """The address where SLURM started the step leads to rank 0."""
    lab = make_lab(names="none", family="ipv6", dead_interface=True)
    found = met(lab, start(lab, [step(lab, host, 0, 1) for host in lab.hosts]))
    assert found["peers"] == [[host.name, host.address, "eth0"] for host in lab.hosts]


@pytest.mark.slow
@pytest.mark.parametrize("names", ["full", "loopback", "loopback only", "none", "different"])
@pytest.mark.parametrize("family", ["ipv4", "ipv6", "both"])
@pytest.mark.parametrize("way", ["variables", "srun"])
def test_every_network(names: str, family: str, way: str, make_lab: MakeLab) -> None:
    """3 hosts, 2 processes each, an interface that leads nowhere."""
    lab = make_lab(hosts=3, names=names, family=family, dead_interface=True)
    places = [(host, local) for host in lab.hosts for local in (0, 1)]
    address = lab.hosts[0].address
    env = [
        variables(lab, host, local, 2, address) if way == "variables" else step(lab, host, local, 2)
        for host, local in places
    ]
    found = met(lab, start(lab, env))
    used = [next(one for one in host.addresses if one == found["peers"][i][1]) for i, (host, _) in enumerate(places)]
    assert len({":" in one for one in used}) == 1
    assert found["peers"] == [[host.name, one, "eth0"] for (host, _), one in zip(places, used, strict=True)]


@pytest.mark.slow
def test_a_name_that_is_of_another_family_on_each_host(make_lab: MakeLab) -> None:
    """They meet by IPv4 and by IPv6, and talk by one of them."""
    lab = make_lab(hosts=3, names="none", family="both")
    for host, address in zip(lab.hosts[1:], lab.hosts[0].addresses, strict=True):
        host.set_hosts_file(f"{address} server\n")
    env = [variables(lab, host, 0, 1, "server" if host.index else host.address) for host in lab.hosts]
    found = met(lab, start(lab, env))
    assert found["peers"] == [[host.name, host.address, "eth0"] for host in lab.hosts]


@pytest.mark.slow
def test_plain_torchrun(make_lab: MakeLab) -> None:
    """Its agents host the store."""
    lab = make_lab(names="loopback")
    torchrun = Path(sys.executable).with_name("torchrun")
    common = ["--nnodes", 2, "--nproc-per-node", 2, "--master-addr", lab.hosts[0].address, "--master-port", PORT]
    agents = [
        host.popen(
            [torchrun, *common, "--node-rank", host.index, "--log-dir", "/dev/null", PROGRAM, "meet", LIMIT_S, ""],
            env=environment(),
        )
        for host in lab.hosts
    ]
    assert [agent.finish(WAIT_S) for agent in agents] == [0, 0], agents[0].said + agents[1].said
    said = [json.loads(line) for agent in agents for line in agent.out.splitlines()]
    assert len(said) == 4 and all(one == said[0] for one in said) and said[0]["sum"] == 10
    assert said[0]["peers"] == [[host.name, host.address, "eth0"] for host in lab.hosts for _ in (0, 1)]


def test_hosts_that_do_not_reach_each_other_are_named(make_lab: MakeLab) -> None:
    """They have met at rank 0's port, but nothing else passes: before gloo tries to connect them, and fails late."""
    lab = make_lab(names="full", shaped=True)
    lab.hosts[0].firewall(PORT)
    env = [variables(lab, host, 0, 1, "h0") for host in lab.hosts]
    processes = start(lab, env)
    assert [process.finish(WAIT_S) for process in processes] == [1, 1]
    for process in processes:
        line = next(line for line in process.err.splitlines() if line.startswith("error: "))
        assert line.startswith("error: host h1 (rank 1) cannot reach host h0 (rank 0) at 10.77.0.1:")
        assert line.endswith("parallel.interface (or GLOO_SOCKET_IFNAME) chooses another interface")
        assert "no answer (filtered, or another network)" in line and "Traceback" not in process.err


# --- the first part, without torch: many at the same time, each on a port of its own

Said = tuple[int, dict[str, Any], list[str]]  # exit code, what it printed, lines


def sockets(host: Host, rank: int, world: int, port: int, limit_s: int, *names: str) -> HostProcess:
    """A process that meets others, and does no more."""
    return host.popen([sys.executable, PROGRAM, "sockets", rank, world, port, limit_s, *names], env=environment())


def ended(*processes: HostProcess) -> list[Said]:
    """All have ended without a traceback."""
    codes = [process.finish(WAIT_S) for process in processes]
    said = []
    for code, process in zip(codes, processes, strict=True):
        assert "Traceback" not in process.err, process.err
        said.append((code, json.loads(process.out.splitlines()[-1]), process.err.splitlines()))
    return said


def test_reasons(make_lab: MakeLab) -> None:
    """Two hosts, each with the name of the other; who waits says so after five seconds, and in the end why."""
    lab = make_lab(names="loopback", shaped=True)
    a, b = lab.hosts
    b.refuse(PORT + 2, "out")
    a.filter(PORT + 3)
    limit_s = 8
    reached = sockets(a, 0, 2, PORT, 60, "h0"), sockets(b, 1, 2, PORT, 60, "h0")
    world = sockets(a, 0, 2, PORT + 1, 60, "h0"), sockets(b, 1, 3, PORT + 1, 60, "h0")
    refused = sockets(a, 0, 2, PORT + 2, limit_s, "h0"), sockets(b, 1, 2, PORT + 2, limit_s, "h0")
    filtered = sockets(a, 0, 2, PORT + 3, limit_s, "h0"), sockets(b, 1, 2, PORT + 3, limit_s, "h0")
    nobody = sockets(a, 0, 2, PORT + 4, limit_s, NOBODY), sockets(b, 1, 2, PORT + 4, limit_s, NOBODY)
    itself = sockets(a, 0, 2, PORT + 5, limit_s, "localhost"), sockets(b, 1, 2, PORT + 5, limit_s, "localhost")
    zeros = sockets(a, 0, 2, PORT + 6, 60, "h0"), sockets(b, 0, 2, PORT + 6, 60, "h0")
    twice = [sockets(host, rank, 4, PORT + 7, 60, "h0") for host, rank in ((a, 0), (a, 1), (b, 1))]
    unknown = [sockets(b, 1, 2, PORT + 8, 60, "no-such-machine")]
    several = sockets(a, 0, 2, PORT + 9, 60, a.address), sockets(b, 1, 2, PORT + 9, 60, "x", ELSEWHERE, NOBODY, "h0")

    assert [one[:2] for one in ended(*reached)] == [
        (0, {"met": ["h0", "h1"], "address": a.address}),
        (0, {"met": [a.address, PORT]}),
    ]
    assert [one[0] for one in ended(*several)] == [0, 0]
    for said in ended(*world):
        assert said[0] == 2 and said[2][-1] == (
            "error: the number of processes (WORLD_SIZE) is not the same on all processes (rank 0 on h0: 2; "
            "rank 1 on h1: 3); start all of them with the same"
        )
    for said in ended(*zeros):
        assert said[0] == 2 and said[2][-1].startswith("error: rank 0 is there twice: host h")
        assert "h0" in said[2][-1] and "h1" in said[2][-1]
    for said in ended(*twice):
        assert said[0] == 2 and said[2][-1].startswith("error: rank 1 is there twice: host h")
    (said,) = ended(*unknown)
    assert said[0] == 2 and said[2][-1].startswith(
        "error: MASTER_ADDR=no-such-machine: no machine of this name is known"
    )

    told = {
        "refused": ended(*refused),
        "filtered": ended(*filtered),
        "nobody": ended(*nobody),
        "itself": ended(*itself),
    }
    for name, (zero, one) in told.items():
        assert zero[0] == one[0] == 1, name
        assert limit_s <= zero[1]["seconds"] < limit_s + 5 and limit_s <= one[1]["seconds"] < limit_s + 5
        assert len(zero[2]) == len(one[2]) == 2, (zero, one)  # one while they wait, one at the end
        assert zero[2][0].startswith("rank 0 on h0 waits at port ") and zero[2][0].endswith(
            " for 1 of 2 processes: rank 1"
        )
        assert one[2][0].startswith("rank 1 on h1 looks for rank 0: ")
        assert zero[2][1].startswith("error: 1 of 2 processes came within 8 s; missing: rank 1;")
        assert one[2][1].startswith("error: rank 0 did not answer at ") and "says rank 1 on h1: " in one[2][1]
    assert "10.77.0.1:29513 (refused: nothing listens there, or a firewall rejects it)" in told["refused"][1][2][1]
    assert "10.77.0.1:29514 (no answer: filtered, or no machine has this address)" in told["filtered"][1][2][1]
    assert f"{NOBODY}:29515 (no route to host: no machine there has this address" in told["nobody"][1][2][1]
    assert f"MASTER_ADDR={NOBODY} is no address of this machine" in told["nobody"][0][2][1]
    assert "127.0.0.1:29516 (this machine itself, refused" in told["itself"][1][2][1]
    assert "is loopback here" in told["itself"][0][2][1] and "as 10.77.0.1" in told["itself"][0][2][1]
