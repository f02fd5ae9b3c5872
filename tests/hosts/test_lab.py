"""The lab itself: hosts are apart, what is between them is as asked for, and nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hosts.conftest import MakeLab
from tests.hosts.lab import ELSEWHERE, NOBODY, Host, HostProcess, Lab, until

pytestmark = pytest.mark.timeout(600)
PYTHON = (sys.executable, "-I", "-S", "-c")
PORT = 7000


def slow(*values: Any) -> Any:
    """A case that others in the default suite are like."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Sends back what it gets, on every address.
ECHO = """
import socket, sys, threading
def serve(one):
    while got := one.recv(65536):
        one.sendall(got)
server = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
# Prints what became of connecting, and the seconds.
KNOCK = """
import socket, sys, time
begun = time.monotonic()
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])) as one:
        one.sendall(b"x")
        said = "echo" if one.recv(1) == b"x" else "closed"
except OSError as error:
    said = type(error).__name__
print(said, time.monotonic() - begun)
"""
# Talks for ever, a byte each 20 ms, and prints how the connection ends.
TALK = """
import socket, sys, time
one = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
one.settimeout(float(sys.argv[3]))
try:
    while True:
        one.sendall(b"x")
        if not one.recv(1):
            sys.exit("closed")
        print("talking", flush=True)
        time.sleep(0.02)
except OSError as error:
    sys.exit(type(error).__name__)
"""
NAMES = """
import json, socket, sys
def find(name):
    try:
        return sorted({one[4][0] for one in socket.getaddrinfo(name, 1)})
    except socket.gaierror as error:
        return error.args[0]
print(json.dumps([socket.gethostname(), *map(find, sys.argv[1:])]))
"""
# Receives and counts: by TCP until the end of it, by UDP until nothing has come for a second.
SINK = """
import socket, sys, time
if sys.argv[2] == "tcp":
    server = socket.create_server(("", int(sys.argv[1])))
    print("ready", flush=True)
    one, total = server.accept()[0], 0
    begun = time.monotonic()
    while got := one.recv(1 << 20):
        total += len(got)
    print(total, time.monotonic() - begun)
else:
    one = socket.socket(type=socket.SOCK_DGRAM)
    one.bind(("", int(sys.argv[1])))
    print("ready", flush=True)
    one.settimeout(20)
    count = 0
    try:
        while one.recv(2000):
            count += 1
            one.settimeout(1)
    except TimeoutError:
        print(count)
"""


def echo(host: Host, port: int = PORT) -> HostProcess:
    """A server that sends back what it gets."""
    server = host.popen([*PYTHON, ECHO, port])
    server.wait_for("ready", 30)
    return server


def knock(host: Host, address: str, port: int = PORT, limit_s: float = 1.5) -> tuple[str, float]:
    """What becomes of a connection, and the seconds that it took."""
    said, seconds = host.run([*PYTHON, KNOCK, address, port, limit_s]).stdout.split()
    return said, float(seconds)


def test_hosts_are_apart(make_lab: MakeLab) -> None:
    """Names, boot ids, processes and shared memory are of each host; files are shared."""
    lab = make_lab(hosts=3, host_names=("alpha", "beta", "gamma"))
    look = "hostname; cat /etc/hostname; cat /proc/sys/kernel/random/boot_id; echo $$; ls /dev/shm /sys/class/net"
    said = [host.run(["sh", "-c", f"touch /dev/shm/$(hostname); {look}"]).stdout.split() for host in lab.hosts]
    assert [one[:2] for one in said] == [[name, name] for name in ("alpha", "beta", "gamma")]
    assert len({one[2] for one in said}) == 3 and all(int(one[3]) < 100 for one in said)
    assert [one[4:] for one in said] == [
        ["/dev/shm:", name, "/sys/class/net:", "eth0", "lo"] for name in lab.host_names
    ]
    assert lab.hosts[0].run(["cat", ROOT / "README.md"]).stdout == (ROOT / "README.md").read_text()


NOT_FOUND = -2  # EAI_NONAME
NAMED: dict[str, tuple[Any, Any]] = {  # what the first host finds of itself, and of the second
    "full": (["10.77.0.1", "fd77::1"], ["10.77.0.2", "fd77::2"]),
    "loopback": (["127.0.1.1"], ["10.77.0.2", "fd77::2"]),
    "loopback only": (["127.0.1.1"], NOT_FOUND),
    "none": (NOT_FOUND, NOT_FOUND),
    "different": (["10.77.99.1"], ["10.77.0.201", "fd77::201"]),
}


@pytest.mark.parametrize("names", NAMED)
def test_names(names: str, make_lab: MakeLab) -> None:
    """Only the hosts file is asked."""
    lab = make_lab(names=names, family="both", dead_interface=True)
    asked = lab.hosts[0].run([*PYTHON, NAMES, "h0", "h1", "localhost", "example.com"]).stdout
    assert json.loads(asked) == ["h0", *NAMED[names], ["127.0.0.1", "::1"], NOT_FOUND]


@pytest.mark.parametrize(
    ("family", "shaped"),
    [
        ("both", False),
        ("ipv6", True),
        *(slow(*case) for case in (("ipv4", False), ("ipv6", False), ("both", True))),
    ],
)
def test_who_reaches_whom(family: str, shaped: bool, make_lab: MakeLab) -> None:
    """By all of a host's addresses, and by no other; what leads nowhere does not answer."""
    lab = make_lab(hosts=3, family=family, dead_interface=True, shaped=shaped)
    echo(lab.hosts[0])
    assert len(lab.hosts[0].addresses) == 1 + (family == "both")
    for host in lab.hosts:
        for address in lab.hosts[0].addresses:
            assert knock(host, address, limit_s=20)[0] == "echo"
    assert knock(lab.hosts[0], lab.hosts[0].dead_address)[0] == "echo"  # it is up, and has the address
    assert knock(lab.hosts[1], lab.hosts[0].dead_address, limit_s=0.5)[0] == "TimeoutError"
    if family != "ipv6":
        assert {knock(lab.hosts[1], there, limit_s=0.5)[0] for there in (NOBODY, ELSEWHERE)} == {"TimeoutError"}


def test_delay(make_lab: MakeLab) -> None:
    """Of both ends; to connect and to hear the echo are two round trips."""
    lab = make_lab(shaped=True, family="ipv6")
    echo(lab.hosts[0])
    before = min(knock(lab.hosts[1], lab.hosts[0].address)[1] for _ in range(3))
    lab.shape(delay_ms=100)
    assert 0.4 <= min(knock(lab.hosts[1], lab.hosts[0].address, limit_s=20)[1] for _ in range(2)) < 0.6 + before


def send(lab: Lab, size: int, kind: str = "tcp") -> list[float]:
    """What the first host received of the second."""
    sink = lab.hosts[0].popen([*PYTHON, SINK, PORT, kind])
    sink.wait_for("ready", 30)
    address = lab.hosts[0].address
    script = f"import socket, time; one = socket.create_connection(({address!r}, {PORT})); one.sendall(bytes({size}))"
    if kind == "udp":
        script = f"import socket, time; one = socket.socket(type=socket.SOCK_DGRAM); one.connect(({address!r}, {PORT}))"
        script += f"\nfor i in range({size}): one.send(bytes(100)); time.sleep(2e-4)"
    lab.hosts[1].run([*PYTHON, script], limit_s=100)
    sink.finish(60)
    return [float(word) for word in sink.out.split()[1:]]


@pytest.mark.parametrize("shaped", [False, slow(True)], ids=["bridge", "relay"])
def test_rate(shaped: bool, make_lab: MakeLab) -> None:
    """20 Mbit/s, headers included: 2 MB in 0.8 s and a little."""
    lab = make_lab(shaped=shaped)
    lab.hosts[0].shape(rate_mbit=20)
    sent = lab.hosts[1].sent_bytes()
    total, seconds = send(lab, 2_000_000)
    assert total == 2e6 and 0.7 < seconds < 1.6
    assert 1 <= (lab.hosts[1].sent_bytes() - sent) / 2e6 < 1.2
    lab.hosts[0].shape(rate_mbit=0)
    assert send(lab, 2_000_000)[1] < 0.7


@pytest.mark.slow
def test_the_relay_is_fast_enough(make_lab: MakeLab) -> None:
    """At least 100 Mbit/s through it."""
    total, seconds = send(make_lab(shaped=True), 50_000_000)
    print(f"\nrelay: {total * 8 / seconds / 1e6:.0f} Mbit/s")
    assert total * 8 / seconds >= 100e6


def test_loss(make_lab: MakeLab) -> None:
    """A fifth of the frames; what TCP carries comes whole."""
    lab = make_lab(shaped=True)
    lab.hosts[1].shape(loss=0.2)
    assert 0.7 < send(lab, 1000, "udp")[0] / 1000 < 0.9
    lab.hosts[1].shape(loss=0.02)
    assert send(lab, 100_000)[0] == 100_000


@pytest.mark.parametrize("shaped", [slow(False), True], ids=["bridge", "relay"])
def test_a_cable(shaped: bool, make_lab: MakeLab) -> None:
    """Pulled, both sides hear nothing, not even an end; plugged in, the connection goes on."""
    lab = make_lab(shaped=shaped)
    echo(lab.hosts[0])
    talk = lab.hosts[1].popen([*PYTHON, TALK, lab.hosts[0].address, PORT, 60])
    talk.wait_for("talking", 30)
    lab.hosts[0].pull_cable()
    time.sleep(0.3)
    before = len(talk.out)
    time.sleep(1)
    assert len(talk.out) == before and talk.poll() is None
    assert "NO-CARRIER" in lab.hosts[0].run(["ip", "link", "show", "eth0"]).stdout
    lab.hosts[0].plug_in()
    until(lambda: len(talk.out) > before, 30)


@pytest.mark.parametrize(("power_cut", "shaped"), [(True, False), (False, True), slow(True, True), slow(False, False)])
def test_a_killed_host(power_cut: bool, shaped: bool, make_lab: MakeLab) -> None:
    """A power cut says nothing to anybody, the kernel of a host whose processes are killed does; it can come back."""
    lab = make_lab(shaped=shaped)
    server = echo(lab.hosts[0])
    talk = lab.hosts[1].popen([*PYTHON, TALK, lab.hosts[0].address, PORT, 2])
    talk.wait_for("talking", 30)
    boot_id = lab.hosts[0].run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout
    lab.hosts[0].kill(power_cut)
    assert server.returncode == -signal.SIGKILL
    assert talk.finish(30) == 1
    assert talk.err.strip() in (("TimeoutError",) if power_cut else ("closed", "ConnectionResetError"))
    lab.hosts[0].boot()
    assert lab.hosts[0].run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout != boot_id
    assert knock(lab.hosts[1], lab.hosts[0].address)[0] == "ConnectionRefusedError"
    echo(lab.hosts[0])
    assert knock(lab.hosts[1], lab.hosts[0].address, limit_s=20)[0] == "echo"


@pytest.mark.parametrize("family", ["ipv4", slow("ipv6")])
def test_filters(family: str, make_lab: MakeLab) -> None:
    """Of one port and of all, vanishing and refused, and one direction only."""
    lab = make_lab(shaped=True, family=family)
    server, client = lab.hosts
    echo(server), echo(server, PORT + 1), echo(client)

    def said(host: Host, address: str, port: int) -> str:
        return knock(host, address, port, 0.7)[0]

    server.filter(PORT)
    assert said(client, server.address, PORT) == "TimeoutError"
    assert said(client, server.address, PORT + 1) == said(server, client.address, PORT) == "echo"
    server.refuse(PORT + 1)
    assert said(client, server.address, PORT + 1) == "ConnectionRefusedError"
    server.clear_filters()
    server.filter(PORT, "out")
    assert said(client, server.address, PORT) == "echo" and said(server, client.address, PORT) == "TimeoutError"
    server.clear_filters()
    assert said(server, client.address, PORT) == "echo"
    server.firewall(PORT)
    assert said(client, server.address, PORT) == said(server, client.address, PORT) == "echo"
    assert said(client, server.address, PORT + 1) == "TimeoutError"
    server.clear_filters()
    server.filter()
    assert said(server, client.address, PORT) == said(client, server.address, PORT + 1) == "TimeoutError"


def test_a_private_folder(make_lab: MakeLab, tmp_path: Path) -> None:
    """A host has another folder in the same place; the others and this machine go on sharing."""
    lab = make_lab()
    (tmp_path / "shared.txt").write_text("a")
    lab.hosts[1].private(tmp_path, copy=True)
    assert lab.hosts[1].run(["ls", tmp_path]).stdout.split() == ["shared.txt"]
    lab.hosts[1].private(tmp_path)
    lab.hosts[1].run(["touch", tmp_path / "own.txt"])
    assert lab.hosts[1].run(["ls", tmp_path]).stdout.split() == ["own.txt"]
    assert lab.hosts[0].run(["ls", tmp_path]).stdout.split() == os.listdir(tmp_path) == ["shared.txt"]


def test_processes_are_ended_and_answered_for(make_lab: MakeLab) -> None:
    """Exit codes and signals come through, to the process and to its group."""
    (host,) = make_lab(hosts=1).hosts
    assert host.run(["sh", "-c", "exit 75"], check=False).returncode == 75
    waiting = host.popen(["sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done"])
    waiting.wait_for("ready", 30)
    waiting.send_signal(signal.SIGSTOP)
    waiting.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert waiting.poll() is None
    waiting.send_signal(signal.SIGCONT)
    assert waiting.finish(30) == 3
    group = host.popen(["sh", "-c", "sleep 1000 & echo ready; wait"])
    group.wait_for("ready", 30)
    group.signal_group(signal.SIGINT)
    assert group.finish(30) in (-signal.SIGINT, 130)
    with pytest.raises(AssertionError, match=r"still running after 0\.2 s"):
        host.run(["sleep", "1000"], limit_s=0.2)


# --- nothing is left

LEAVES = """
import sys, time
from tests.hosts.lab import Lab
with Lab(hosts=2, shaped=sys.argv[1] == "True", dead_interface=True) as lab:
    stubborn = "trap '' TERM INT HUP; echo ready; setsid sleep 54321 & while :; do sleep 0.05; done"
    for host in lab.hosts:
        host.popen(["sh", "-c", f": {sys.argv[2]}; {stubborn}"]).wait_for("ready", 30)
    print("ready", flush=True)
    if sys.argv[3] == "an error":
        sys.stdin.readline()
        raise RuntimeError("fails with the lab up")
    time.sleep(100)
"""
ENDS = (
    ("an error", True),
    ("SIGINT", False),
    ("SIGKILL", True),
    *(slow(*case) for case in (("an error", False), ("SIGINT", True), ("SIGKILL", False))),
    *(slow("SIGTERM", shaped) for shaped in (False, True)),
)


def state_of_the_machine() -> dict[str, Any]:
    """What a lab could leave: devices, named namespaces, files of names, mounts."""
    folders = {name: sorted(os.listdir(name)) for name in ("/run/netns", "/etc/netns") if Path(name).exists()}
    links = sorted(os.listdir("/sys/class/net"))
    return {**folders, "links": links, "mounts": len(Path("/proc/self/mounts").read_text().splitlines())}


def processes_with(token: str) -> list[int]:
    """Those that have it in their command or hold a namespace of a lab of such a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if token in command and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize(("end", "shaped"), ENDS)
def test_nothing_is_left(end: str, shaped: bool, make_lab: MakeLab, tmp_path: Path) -> None:
    """However it ends, processes that ignore signals or have left their group included."""
    make_lab(hosts=1)  # where there can be none, this is skipped
    before, token = state_of_the_machine(), f"lab-{os.getpid()}-{tmp_path.name}"
    command = [sys.executable, "-c", LEAVES, str(shaped), token, end]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout and process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
        children = all_descendants(process.pid)
        assert len(children) >= 10
        if end != "an error":
            process.send_signal(getattr(signal, end))
        process.communicate("go\n" if end == "an error" else None, timeout=60)
    until(lambda: not processes_with(token) and not any(map(alive, children)), 20, f"{token} is left")
    assert state_of_the_machine() == before


def all_descendants(pid: int) -> list[int]:
    """Of every thread of it."""
    from tests.faults.runs import descendants

    return descendants(pid)


def alive(pid: int) -> bool:
    """Whether the process is there, a zombie included."""
    return Path(f"/proc/{pid}").exists()
