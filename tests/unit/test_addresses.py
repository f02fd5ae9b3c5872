"""Addresses: what names, tables of the system and connections say, and what is made of it."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from acceleration.distributed import addresses
from acceleration.distributed.addresses import (
    address_of,
    endpoint,
    interface_of,
    interfaces,
    is_here,
    is_link_local,
    is_loopback,
    lasting,
    parse_endpoint,
    resolve,
    source_address,
)
from tests.conftest import ROOT

OWN = [address for own in interfaces().values() for address in own]


def test_it_needs_neither_torch_nor_anything_of_ours() -> None:
    program = "import sys, acceleration.distributed.addresses\nprint([name for name in sys.modules if 'torch' in name])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("10.77.0.1", ["10.77.0.1"]),
        ("[fd77::1]", ["fd77::1"]),
        ("FD77:0:0::1", ["fd77::1"]),
        ("::ffff:10.0.0.1", ["10.0.0.1"]),
        ("fe80::1%lo", ["fe80::1%lo"]),
    ],
)
def test_numeric_addresses_are_their_own(host: str, found: list[str]) -> None:
    assert resolve(host) == found


@pytest.mark.parametrize("host", ["", "a..b", "x" * 300, "a\0b", "no-such-machine.invalid", "fe80::1%nothere0", "[]"])
def test_what_has_no_address_says_so(host: str) -> None:
    with pytest.raises(OSError) as caught:
        resolve(host)
    assert caught.value.strerror and "\n" not in caught.value.strerror


def test_a_name_with_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the system, each once, of both families and of no other."""

    def look_up(*_: Any, **__: Any) -> list[Any]:
        found = [("10.9.9.9", 0), ("fd00::5", 0, 0, 0), ("10.9.9.9", 0), ("::ffff:10.1.1.1", 0, 0, 0)]
        rows = [(socket.AF_INET if len(one) == 2 else socket.AF_INET6, 1, 6, "", one) for one in found]
        return [*rows, (socket.AF_UNIX, 1, 0, "", "/x")]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert resolve("several") == ["10.9.9.9", "fd00::5", "10.1.1.1"]


def test_ends_of_connections() -> None:
    assert address_of(("10.0.0.1", 5)) == "10.0.0.1"
    assert address_of(("::ffff:10.0.0.1", 5, 0, 0)) == "10.0.0.1"
    assert address_of(("fd00:0::1", 5, 0, 0)) == "fd00::1"
    index, name = socket.if_nameindex()[0]
    assert address_of(("fe80::1", 5, 0, index)) == f"fe80::1%{name}" == address_of((f"fe80::1%{name}", 5, 0, index))
    assert address_of(("fe80::1", 5, 0, 10**6)) == "fe80::1%1000000"  # an interface that has just been removed


def test_what_is_here() -> None:
    """The addresses of all interfaces, all of loopback, and nothing else."""
    assert OWN and all(map(is_here, OWN))
    assert all(map(is_here, ["127.0.0.1", "127.0.1.1", "0.0.0.0", "::", "::1"]))
    elsewhere = ["192.0.2.77", "198.51.100.1", "2001:db8::77", "224.0.0.1", "255.255.255.255", "fe80::77%lo"]
    assert not any(map(is_here, [*elsewhere, "localhost", "", "nonsense", "fe80::1%nothere0"]))


def test_a_machine_that_may_bind_to_any_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those with floating addresses: that binding succeeds then says nothing."""
    monkeypatch.setattr(socket.socket, "bind", lambda self, name: None)
    assert not is_here("198.51.100.1") and not is_here("2001:db8::77") and all(map(is_here, OWN))


def test_a_system_that_lists_no_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise OSError("no library")

    monkeypatch.setattr(addresses.ctypes, "CDLL", none)
    assert interfaces() == {} and interface_of("127.0.0.1") == ""
    assert is_here("127.0.0.1") and not is_here("198.51.100.1")
    assert all(is_here(own) for own in OWN if not is_link_local(own))


def test_interfaces_are_those_of_the_system() -> None:
    there = interfaces()
    assert set(there) <= {name for _, name in socket.if_nameindex()}
    assert "127.0.0.1" in there[interface_of("127.0.0.1")] and interface_of("198.51.100.1") == ""
    for name, own in there.items():
        assert all(is_loopback(one) or interface_of(one) == name for one in own)
        assert [is_link_local(one) for one in own] == sorted(is_link_local(one) for one in own)


def test_where_the_routing_table_leaves_from() -> None:
    assert is_loopback(source_address("127.0.0.1")) and is_loopback(source_address("127.5.5.5"))
    for own in OWN:
        if not is_link_local(own):
            assert is_here(source_address(own))
    with pytest.raises(OSError):
        source_address("localhost")


def test_temporary_addresses_are_not_relied_on(tmp_path: Path) -> None:
    table = tmp_path / "if_inet6"
    rows = (
        ("fd770000000000000000000000000abc", "40", "01"),
        ("fd770000000000010000000000000001", "40", "80"),  # of another network
        ("fd770000000000000000000000000005", "40", "20"),  # deprecated
        ("fd770000000000000000000000000006", "40", "80"),
        ("fd780000000000000000000000000abc", "40", "01"),  # has no lasting one beside it
    )
    table.write_text("".join(f"{one} 02 {bits} 00 {flags}     eth0\n" for one, bits, flags in rows))
    assert lasting("fd77::abc", str(table)) == "fd77::6"
    for address in ("fd77::6", "fd77::5", "fd78::abc", "fd79::1", "10.0.0.1", "fe80::1%eth0", "nonsense"):
        assert lasting(address, str(table)) == address
    assert lasting("fd77::abc", str(tmp_path / "none")) == "fd77::abc"
    assert all(is_here(lasting(own)) for own in OWN)


def test_endpoints_are_written_and_read() -> None:
    for address, port in (("10.0.0.1", 1), ("fd00::1", 65535), ("node1.cluster", 29500), ("fe80::1%eth0", 7)):
        assert parse_endpoint(endpoint(address, port)) == (address, port)
    assert parse_endpoint(" fd00::1:29400 ") == ("fd00::1", 29400)


def test_any_text_is_an_endpoint_or_refused() -> None:
    rng = random.Random(0)
    pieces = [
        "node1",
        "10.0.0.1",
        "[fd00::1]",
        "fd00::1",
        ":",
        "::",
        "29400",
        "0",
        "70000",
        "٣",
        "[",
        "]",
        " ",
        "\n",
        "x",
        "",
    ]
    outcomes = set()
    for _ in range(5000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 4)))
        try:
            host, port = parse_endpoint(text)
        except ValueError as error:
            outcomes.add("refused")
            assert "\n" not in str(error)
        else:
            outcomes.add("read")
            assert host and 0 < port < 65536 and "[" not in host and "]" not in host
    assert outcomes == {"refused", "read"}


def test_processes_of_one_host_have_one_identity() -> None:
    program = "from acceleration.distributed.addresses import host_id; print(host_id())"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert said.strip() == addresses.host_id() and len(said) > 5


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_a_network_of_its_own_is_another_host() -> None:
    """Containers of one machine may have one boot id and one name."""
    program = "from acceleration.distributed.addresses import host_id; print(host_id())"
    command = ["unshare", "--net", sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"unshare: {done.stderr}")
    assert done.stdout.strip() != addresses.host_id()


def test_a_system_without_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(os, "stat", none)
    assert addresses.host_id() == socket.gethostname()
