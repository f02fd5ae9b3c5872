"""Which interface a host uses, who is where by the launcher's word, and what keeps processes from being one start."""

import json
import os
import random
from dataclasses import replace

import pytest

from acceleration.distributed import addresses, gloo_address, network
from acceleration.distributed.launcher_variables import (
    Ranks,
    all_hosts,
    attempt_token,
    hosts_of_ranks,
    places_from_environment,
)
from acceleration.distributed.network import Chosen, chosen_interface, describe, use
from acceleration.distributed.peers import Peer, misfits, ranks_by_host, shared_devices
from acceleration.distributed.search import Place
from opensora.utils.errors import one_line

THERE = {"lo": ["127.0.0.1", "::1"], "eth0": ["169.254.7.1", "10.77.0.1", "fd77::1"], "tun0": ["10.8.0.2"]}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with three interfaces, from which the routing table leaves to 10.77.* and fd77:* by eth0."""

    def source(destination: str) -> str:
        if destination.startswith("fd77"):
            return "fd77::1"
        if destination.startswith("10."):
            return "10.77.0.1"
        raise OSError("no route")

    monkeypatch.setattr(addresses, "listed", lambda: [(name, one) for name, own in THERE.items() for one in own])
    monkeypatch.setattr(addresses, "source_address", source)
    monkeypatch.setattr(network, "_ours", None)
    for name in network.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def peer(rank: int, host: str, address: str = "", **more: object) -> Peer:
    return replace(Peer.here(rank, 4), host=host, host_id=host, address=address, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("configured", "env", "chosen"),
    [
        ("", {}, Chosen("", "")),
        ("", {"GLOO_SOCKET_IFNAME": " "}, Chosen("", "")),
        ("eth0", {}, Chosen("eth0", "parallel.interface")),
        ("ens3, eth0", {}, Chosen("eth0", "parallel.interface")),
        ("eth0", {"GLOO_SOCKET_IFNAME": "tun0"}, Chosen("tun0", "GLOO_SOCKET_IFNAME")),
        ("eth0", {"TP_SOCKET_IFNAME": "tun0"}, Chosen("tun0", "TP_SOCKET_IFNAME")),
        ("", {"GLOO_SOCKET_IFNAME": "eth0,tun0", "TP_SOCKET_IFNAME": "lo"}, Chosen("eth0", "GLOO_SOCKET_IFNAME")),
        ("", {"NCCL_SOCKET_IFNAME": "nothere0"}, Chosen("", "")),
    ],
)
def test_who_chooses(configured: str, env: dict[str, str], chosen: Chosen, tables: None) -> None:
    assert chosen_interface(configured, env) == chosen


def any_text(rng: random.Random) -> str:
    """Names of interfaces, commas, blanks, and what no interface is called."""
    parts = [
        *THERE,
        "ens9",
        "",
        " ",
        ",",
        ",,",
        "\n",
        "\t",
        "\x00",
        "\x1b[2J",
        "é",
        "^lo",
        "=eth0",
        "/" * 9,
        "x" * 5000,
    ]
    return "".join(rng.choice([*parts, ","]) for _ in range(rng.randrange(6)))


def test_whatever_is_asked_for_is_an_interface_or_refused_in_a_line(tables: None) -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        configured, env = any_text(rng), {name: any_text(rng) for name in network.VARIABLES if rng.random() < 0.3}
        chosen = chosen_interface(configured, env)
        named = [one for one in (*(env.get(name, "").strip() for name in network.VARIABLES), configured) if one]
        assert chosen.interface == "" or any(chosen.interface in one for one in named)
        if chosen.problem:
            refused += 1
            said = one_line(chosen.problem)  # as a command does at its end
            assert said.startswith(f"{chosen.by}=") and said.isprintable() and len(said) < 500, said
        else:
            assert chosen.interface in {"", *THERE} and bool(chosen.by) == bool(chosen.interface)
    assert 1000 < refused < 2500


@pytest.mark.parametrize(
    ("configured", "env", "by"),
    [
        ("nothere0", {}, "parallel.interface=nothere0"),
        ("eth", {}, "parallel.interface=eth"),
        ("10.77.0.1", {}, "parallel.interface=10.77.0.1"),
        ("eth0", {"GLOO_SOCKET_IFNAME": "eth0,nothere0"}, "GLOO_SOCKET_IFNAME=eth0,nothere0"),
    ],
)
def test_an_interface_that_is_none_lists_those_there_are(
    configured: str, env: dict[str, str], by: str, tables: None
) -> None:
    problem = chosen_interface(configured, env).problem
    assert problem.startswith(f"{by}: no such network interface on ") and "\n" not in problem
    assert "there are eth0 (10.77.0.1, fd77::1, 169.254.7.1), lo (127.0.0.1, ::1), tun0 (10.8.0.2)" in problem


def test_a_system_that_lists_none_believes_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "listed", lambda: [])
    assert chosen_interface("eth7", {}) == Chosen("eth7", "parallel.interface")
    assert network._within_host(Chosen("", "")) == ("", "")


OTHERS = [peer(2, "b", "10.77.0.2"), peer(3, "c", "fd77::3")]


@pytest.mark.parametrize(
    ("met_at", "interface", "address"),
    [
        ("10.77.0.1", "", "10.77.0.1"),  # the end of the connection
        ("fd77::1", "", "fd77::1"),
        ("", "", "10.77.0.1"),  # no connection is known: as the routing table leaves to the others
        ("127.0.0.1", "", "10.77.0.1"),  # by a tunnel
        ("10.77.0.1", "tun0", "10.8.0.2"),  # a person knows better
        ("fd77::1", "eth0", "fd77::1"),
        ("", "eth0", "10.77.0.1"),
        ("10.77.0.1", "lo", "127.0.0.1"),
        ("fd77::1", "lo", "::1"),
    ],
)
def test_address_of_a_host(met_at: str, interface: str, address: str, tables: None) -> None:
    me = peer(0, "a", met_at)
    found = network._own_addresses(me, [me, *OTHERS], Chosen(interface, "x" if interface else ""))
    assert found[0] == address and len({":" in one for one in found}) == len(found)
    assert not interface or set(found) <= set(THERE[interface])


def test_hosts_agree_on_one_family() -> None:
    """Rank 0's, if all have it: gloo connects no two."""
    v4, v6, other = ("10.0.0.1", "eth0", 1), ("fd00::1", "eth0", 2), ("10.0.0.2", "eth1", 3)
    assert network._agreed({"a": [v4, v6], "b": [v6, other]}) == {"a": v4, "b": other}
    assert network._agreed({"a": [v4, v6], "b": [v6]}) == {"a": v6, "b": v6}
    assert network._agreed({"a": [v4], "b": [v6], "c": []}) == {"a": v4, "b": v6, "c": ("", "", 0)}
    assert network._agreed({"a": [], "b": [v6]}) == {"a": ("", "", 0), "b": v6}


def test_within_a_host_it_is_loopback(tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the network, as of a VPN, does not end a run on one machine."""
    assert network._within_host(Chosen("", "")) == ("127.0.0.1", "lo")
    assert network._within_host(Chosen("tun0", "x")) == ("10.8.0.2", "tun0")
    monkeypatch.setattr(addresses, "listed", lambda: [("eth0", "10.77.0.1")])
    assert network._within_host(Chosen("", "")) == ("10.77.0.1", "eth0")


def test_what_gloo_is_told(tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interface, and the address where it would take another; a person's variable is left alone."""
    told: list[str] = []
    monkeypatch.setattr(gloo_address, "listen_at", told.append)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    use(peer(0, "a", "10.77.0.1", interface="eth0"), Chosen("", ""))
    use(peer(0, "a", "10.8.0.2", interface="tun0"), Chosen("tun0", "parallel.interface"))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "tun0" and chosen_interface("") == Chosen("", "")  # nobody chose it
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    use(peer(0, "a", "169.254.7.1", interface="eth0"), chosen_interface(""))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0" and told == ["10.77.0.1", "", ""]


def test_a_line_says_what_is_used() -> None:
    peers = [peer(rank, host, f"10.77.0.{host}", interface="eth0") for rank, host in enumerate("1122")]
    assert describe(peers[:2], "nccl", {}) == ""
    line = "network: 2 hosts: 1 (rank 0-1) 10.77.0.1 (eth0), 2 (rank 2-3) 10.77.0.2 (eth0)"
    assert describe(peers, "gloo", {"NCCL_SOCKET_IFNAME": "ib0"}) == line
    assert describe(peers, "nccl", {}) == f"{line}; nccl uses its own choice (NCCL_SOCKET_IFNAME is not set)"
    assert describe(peers, "nccl", {"NCCL_SOCKET_IFNAME": "ib0"}).endswith("; nccl uses NCCL_SOCKET_IFNAME=ib0")
    many = [peer(rank, f"n{rank}", "10.0.0.1") for rank in range(1000)]
    assert len(describe(many, "nccl", {})) < 500 and "and 992 more" in describe(many, "nccl", {})


# --- what the launcher says


def test_hosts_of_a_step() -> None:
    step = {"SLURM_STEP_NODELIST": "n[08-10],m1", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}
    assert hosts_of_ranks(7, step) == dict(enumerate(["n08", "n08", "n09", "n09", "n10", "n10", "m1"]))
    assert hosts_of_ranks(8, step) == {} and hosts_of_ranks(7, {**step, "SLURM_STEP_NODELIST": "n[08-09],m1"}) == {}
    assert hosts_of_ranks(7, {**step, "SLURM_STEP_TASKS_PER_NODE": "two"}) == hosts_of_ranks(7, {}) == {}


def test_all_hosts() -> None:
    assert all_hosts("n[3-5,9],m1") == ["n3", "n4", "n5", "n9", "m1"]
    assert all_hosts("r[1-2]n[01-02]x") == ["r1n01x", "r1n02x", "r2n01x", "r2n02x"]
    assert all_hosts("a-1.b,c") == ["a-1.b", "c"] and all_hosts("") == []


def test_any_node_list_is_read() -> None:
    rng = random.Random(0)
    pieces = ["n", "[", "]", "1-3", "3", ",", "-", "9" * 30, "x", " ", "٣", "(x2)", "2"]
    for _ in range(3000):
        text, counts = ("".join(rng.choice(pieces) for _ in range(rng.randint(0, 6))) for _ in range(2))
        found = hosts_of_ranks(4, {"SLURM_STEP_NODELIST": text, "SLURM_STEP_TASKS_PER_NODE": counts})
        assert found == {} or list(found) == [0, 1, 2, 3]


def test_where_rank_0_may_be() -> None:
    step = {"SLURM_STEP_NODELIST": "n[3-5]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3", "SLURM_SRUN_COMM_HOST": "10.0.0.9"}
    slurm, torchrun = Ranks(1, 3, 0, "slurm"), Ranks(1, 3, 0, "torchrun")
    assert [place.host for place in places_from_environment(slurm, step)] == ["n3", "10.0.0.3", "10.0.0.9"]
    chosen = {**step, "MASTER_ADDR": "m", "MASTER_PORT": "9"}
    assert places_from_environment(slurm, chosen) == [Place("m", "MASTER_ADDR")]
    assert places_from_environment(torchrun, chosen) == [Place("m", "MASTER_ADDR", expected=True)]
    for here in ({"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {"LOCAL_WORLD_SIZE": "3"}):
        assert [place.host for place in places_from_environment(torchrun, {**chosen, **here})] == ["m", "127.0.0.1"]
    elsewhere = {**chosen, "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert [place.host for place in places_from_environment(torchrun, elsewhere)] == ["m"]


def test_tokens_are_the_same_on_all_hosts_of_a_start() -> None:
    """Counts of restarts and steps of SLURM may differ between hosts that a person starts."""
    one = {"TORCHELASTIC_RUN_ID": "a b", "TORCHELASTIC_RESTART_COUNT": "0", "SLURM_STEP_ID": "0", "USER": "x"}
    other = {**one, "TORCHELASTIC_RESTART_COUNT": "1", "SLURM_STEP_ID": "1", "USER": "y"}
    assert attempt_token("torchrun", one) == attempt_token("torchrun", other) and " " not in attempt_token(
        "torchrun", one
    )
    assert attempt_token("torchrun", one) != attempt_token("torchrun", {**one, "TORCHELASTIC_RUN_ID": "c"})
    assert attempt_token("slurm", one) != attempt_token("slurm", other)


# --- peers


def test_what_must_be_equal_is_named_with_who_has_what() -> None:
    same = [peer(0, "a"), peer(1, "a"), peer(2, "b"), peer(3, "b")]
    assert misfits(same) == "" and list(ranks_by_host(same).values()) == [[0, 1], [2, 3]]
    for field, value, said in (
        ("torch", "2.0", "the version of torch is not the same on all processes (rank 0-1 on a, rank 2 on b: "),
        ("python", "3.9", "the version of Python is not the same"),
        ("world_size", 8, "the number of processes (WORLD_SIZE) is not the same"),
        ("protocol", 1, "the protocol of the rendezvous is not the same"),
        ("device", "b GPU 1", "the kind of device is not the same on all processes (rank 0-1 on a, rank 2 on b: CPU; "),
    ):
        text = misfits([*same[:3], replace(same[3], **{field: value})])  # type: ignore[arg-type]
        assert text.startswith(said) and "rank 3 on b: " in text and "\n" not in text
    assert shared_devices(same) == ""


def test_any_text_is_a_peer_or_refused() -> None:
    rng, whole = random.Random(0), json.loads(peer(1, "a").to_text())
    assert Peer.from_text(json.dumps({**whole, "later": 1})) == peer(1, "a")
    for text in ("", "[]", "1", "{", "null", *(json.dumps({**whole, name: []}) for name in whole)):
        with pytest.raises(ValueError):
            Peer.from_text(text)
    for _ in range(500):
        some = {
            name: rng.choice([value, None, "x", 1, 1.5, True]) for name, value in whole.items() if rng.random() < 0.9
        }
        try:
            read = Peer.from_text(json.dumps(some))
        except ValueError:
            continue
        assert type(read.rank) is int and type(read.host) is str
