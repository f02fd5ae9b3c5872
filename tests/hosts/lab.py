"""Two to four hosts on one Linux machine, for tests of what happens between machines.

A host has network, mount, PID, IPC and UTS namespaces of its own: its own host name, ``/etc/hosts``, boot id, shared
memory and process table. All other files are shared, like a cluster's file system, but for what ``Host.private`` takes
out. The namespaces have no names: they are held by a process per host (``sleep``), which the kernel kills when the
process that made the lab dies, however it dies. With it go the host's other processes, its interfaces and its mounts,
so that nothing can be left behind, nothing has to be swept, and labs of concurrent runs cannot collide.

Hosts are joined by veth pairs and a bridge, which are fast. ``Lab(shaped=True)`` joins them by tap devices and
``relay.py``, a switch in user space that delays, loses, filters and refuses, on kernels without netem and nftables too.

    with Lab(hosts=2, names="loopback") as lab:
        server = lab.hosts[0].popen(["python3", "-m", "http.server", "8000"])
        lab.hosts[1].run(["curl", f"http://{lab.hosts[0].address}:8000"])
        lab.hosts[0].pull_cable()

There is no way from a host to the machine's own network. Names are looked up in ``/etc/hosts`` only.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from tests.patience import patience

T = TypeVar("T")
Family = Literal["ipv4", "ipv6", "both"]
TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv", "setsid", "mount")
NETWORK, NETWORK_V6 = "10.77.0", "fd77::"
DEAD_NETWORK, DEAD_NETWORK_V6 = "10.77.99", "fd77:99::"
NOBODY, NOBODY_V6 = "10.77.0.200", "fd77::200"  # in the network of the hosts, and no host's
ELSEWHERE, ELSEWHERE_V6 = "10.77.200.1", "fd77:200::1"  # reached by a router that answers nothing
_MAC = "02:77:00:00:00:"
_ROUTER_MAC = f"{_MAC}fe"
_LOCALHOST = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
_FIRST_PROCESS = Path(__file__).with_name("first_process.sh")
NAMES = ("full", "loopback", "loopback only", "none", "different")


class LabUnavailable(Exception):
    """This machine cannot hold a lab; says why."""


class HostProcess(subprocess.Popen[str]):
    """A process in a host, leader of a session there. ``pid`` is of the process that waits for it from outside.

    What it prints is kept in files without names: ``out`` and ``err`` are all of it so far.
    """

    def __init__(self, inside: Sequence[str], command: Sequence[object], **more: Any) -> None:
        self._files = (_unnamed_file(), _unnamed_file())
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": self._files[0], "stderr": self._files[1]}
        options |= {"text": True, "errors": "replace", "start_new_session": True, **more}
        super().__init__([*inside, *map(str, command)], **options)
        self._inner: int | None = None

    @property
    def out(self) -> str:
        """Everything on its standard output so far."""
        return _whole(self._files[0])

    @property
    def err(self) -> str:
        """Everything on its standard error so far."""
        return _whole(self._files[1])

    @property
    def said(self) -> str:
        """Both."""
        return self.out + self.err

    @property
    def inner(self) -> int | None:
        """The process itself, by the number that it has outside the host; None once it is gone."""
        limit = time.monotonic() + 100  # not patience(), which would measure between two signals
        while self._inner is None and time.monotonic() < limit and self.poll() is None:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
                self._inner = int(children[0]) if children else None
            time.sleep(0 if self._inner else 0.005)
        return self._inner if self.poll() is None else None

    def send_signal(self, sig: int) -> None:
        """To the process itself."""
        self._signal(sig, os.kill)

    def signal_group(self, sig: int) -> None:
        """To the process and all of its process group, as a terminal does."""
        self._signal(sig, os.killpg)

    def kill(self) -> None:
        """SIGKILL to the process itself."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM to the process itself."""
        self.send_signal(signal.SIGTERM)

    def finish(self, limit_s: float) -> int:
        """The exit code (minus the number of the signal that ended it).

        Raises:
            AssertionError: it still runs after ``limit_s`` seconds; with all that it said.
        """
        try:
            return self.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit_s:g} s: {self.args!r}\n{self.said}") from None

    def wait_for(self, pattern: str, limit_s: float) -> float:
        """Seconds until something that it printed matches.

        Raises:
            AssertionError: it ended, or ``limit_s`` seconds passed, without.
        """
        begun = time.monotonic()
        while True:
            ended = self.poll() is not None
            if re.search(pattern, self.said):
                return time.monotonic() - begun
            if ended or time.monotonic() - begun > limit_s:
                raise AssertionError(f"no {pattern!r} within {limit_s:g} s (exit {self.returncode}):\n{self.said}")
            time.sleep(0.05)

    def _signal(self, sig: int, send: Callable[[int, int], None]) -> None:
        inner = self.inner
        if inner is None:
            return
        with contextlib.suppress(ProcessLookupError):
            send(inner, sig)
        if sig == signal.SIGCONT:  # what waits for it has stopped with it
            super().send_signal(sig)


class Host:
    """One host of a lab; made by ``Lab``.

    Attributes:
        name: its host name.
        address: the numeric address by which the others reach it: IPv4 if the lab has it.
        addresses: all such addresses.
        dead_address: of the interface that leads nowhere, "" without one.
        processes: what was started in it, in order.
    """

    def __init__(self, lab: "Lab", index: int) -> None:
        self.lab, self.index, self.name = lab, index, lab.host_names[index]
        number = index + 1
        v4, v6 = [f"{NETWORK}.{number}"] * (lab.family != "ipv6"), [f"{NETWORK_V6}{number}"] * (lab.family != "ipv4")
        self.addresses = (*v4, *v6)
        self.address = self.addresses[0]
        dead = f"{DEAD_NETWORK}.{number}" if lab.family != "ipv6" else f"{DEAD_NETWORK_V6}{number}"
        self.dead_address = dead if lab.dead_interface else ""
        self.processes: list[HostProcess] = []
        self.up = False
        self._port = f"port{index}"

    # --- processes

    def popen(
        self, command: Sequence[object], env: Mapping[str, str] | None = None, cwd: object = None, **more: Any
    ) -> HostProcess:
        """Starts a command; it is killed with the host. ``env``: all of its environment, by default ours."""
        if not self.up:
            raise RuntimeError(f"{self.name} is down")
        folder = ["env", f"--chdir={cwd or os.getcwd()}"]
        started = HostProcess([*self._inside, "setsid", *folder], command, env=env, **more)
        self.processes.append(started)
        return started

    def run(
        self, command: Sequence[object], limit_s: float = 60, check: bool = True, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end.

        Raises:
            AssertionError: it takes longer, or (with ``check``) fails; with all that it said.
        """
        process = self.popen(command, **more)
        try:
            code = process.finish(limit_s)
        finally:
            process.kill()
        done = subprocess.CompletedProcess([*map(str, command)], code, process.out, process.err)
        assert not check or code == 0, f"{self.name}: {[*map(str, command)]} ended with {code}\n{process.said}"
        return done

    def kill(self, power_cut: bool = True) -> None:
        """Ends every process of the host by SIGKILL, and the host.

        With ``power_cut`` nothing of it reaches the others. Without, its kernel still closes its connections.
        """
        if not self.up:
            return
        if power_cut:
            self.pull_cable()
        else:
            # -1 is every process of the PID namespace but its first and the sender.
            subprocess.run([*self._inside, "sh", "-c", "kill -9 -1"], capture_output=True, timeout=30, check=False)
            time.sleep(0.3)  # for what its kernel has to say
        self.up = False
        _end(self._holder)
        for process in self.processes:
            process.wait(30)
        self.lab._unplug_dead(self)

    def boot(self) -> None:
        """Starts the host again after ``kill``: same name and addresses, another boot id, no processes."""
        assert not self.up, f"{self.name} is up"
        self._start()

    def private(self, folder: object, copy: bool = False) -> None:
        """From now on the host has a folder of its own there, empty or with a copy of what is there now."""
        script = 'mkdir -p "$1"; held=$(mktemp -d /dev/shm/was.XXXXXX); mount --bind "$1" "$held"; '
        script += 'mount -t tmpfs private "$1"; '
        script += '[ -z "$2" ] || cp -a "$held/." "$1/"; umount "$held"; rmdir "$held"'
        self.run(["sh", "-ec", script, "sh", folder, "copy" if copy else ""], cwd="/")

    def set_hosts_file(self, text: str) -> None:
        """Replaces its /etc/hosts; the names of this machine itself are kept."""
        self.run(["sh", "-ec", 'printf "%s" "$1" > /etc/hosts', "sh", _LOCALHOST + text], cwd="/")

    # --- network

    def pull_cable(self) -> None:
        """No more frames, no carrier; interface and addresses stay."""
        if self.lab.shaped:
            self.lab._relay_say(do="cable", host=self.index, up=False)
        else:
            self.lab._ip(f"link set {self._port} down")

    def plug_in(self) -> None:
        """Undoes ``pull_cable``."""
        if self.lab.shaped:
            self.lab._relay_say(do="cable", host=self.index, up=True)
        else:
            self.lab._ip(f"link set {self._port} up")

    def shape(self, rate_mbit: float | None = None, delay_ms: float | None = None, loss: float | None = None) -> None:
        """Changes what is given: ``rate_mbit`` (0: no limit) both ways; ``delay_ms`` and ``loss`` (0 to 1) of the
        frames that the host sends, so that a round trip takes the delays of both ends.

        Raises:
            RuntimeError: delay or loss without ``Lab(shaped=True)``.
        """
        if self.lab.shaped:
            self.lab._relay_say(do="shape", host=self.index, rate_mbit=rate_mbit, delay_ms=delay_ms, loss=loss)
            return
        if delay_ms or loss:
            raise RuntimeError("delay and loss need Lab(shaped=True)")
        if rate_mbit is not None:
            self._limit(rate_mbit)

    def filter(self, port: int | None = None, direction: Literal["in", "out", "both"] = "in") -> None:
        """Packets to ``port`` (any host's, where it sends them; None: all packets) vanish from now on."""
        self._rule(port, direction, "drop")

    def refuse(self, port: int | None = None, direction: Literal["in", "out", "both"] = "in") -> None:
        """Connections to ``port`` are answered with a reset, as a firewall that rejects does."""
        self._rule(port, direction, "refuse")

    def firewall(self, *open_ports: int) -> None:
        """What would begin a connection of TCP to any other port of it vanishes; what it begins itself passes."""
        self.lab._relay_say(do="firewall", host=self.index, open_ports=open_ports)

    def clear_filters(self) -> None:
        """Forgets all filters of this host."""
        self.lab._relay_say(do="clear", host=self.index)

    def sent_bytes(self) -> int:
        """Bytes that its interface has sent to the other hosts since it came up, with headers."""
        return self._counters()[8]

    def received_bytes(self) -> int:
        """The same, from them."""
        return self._counters()[0]

    # --- how it is made

    def _start(self) -> None:
        self._holder, self._init = _hold(self.name, self.lab._hosts_file(self.index))
        self._inside = ["nsenter", "-t", str(self._init), "-n", "-u", "-m", "-p", "-i", "--"]
        try:
            self.lab._plug(self)
            self._configure()
        except BaseException:
            _end(self._holder)
            raise
        self.up = True

    def _configure(self) -> None:
        """Addresses and routes of its interfaces."""
        lab, lines = self.lab, []
        if lab.dead_interface:
            lines += [_add(self.dead_address, "dead0"), "link set dead0 up"]
        lines += [_add(address, "eth0") for address in self.addresses]
        lines += [f"link set eth0 address {_MAC}{self.index + 1:02x} mtu {lab.mtu} up"]  # the same after it was down
        routers = [f"{NETWORK}.254"] * (lab.family != "ipv6") + [f"{NETWORK_V6}fe"] * (lab.family != "ipv4")
        for router in routers * lab.router:
            lines += [f"neigh add {router} lladdr {_ROUTER_MAC} dev eth0 nud permanent"]
            lines += [f"route add default via {router} dev eth0"]
        _call(["nsenter", "-t", str(self._init), "-n", "ip", "-batch", "-"], input="\n".join(lines))

    def _limit(self, rate_mbit: float) -> None:
        """By a token bucket at both ends of the cable."""
        ends = ((self._init, "eth0"), (self.lab._switch_init, self._port))
        for pid, device in ends:
            command = ["nsenter", "-t", str(pid), "-n", "tc", "qdisc"]
            if rate_mbit:
                burst = max(int(rate_mbit * 1e6 / 8 * 0.004), 16 * self.lab.mtu)  # bytes: 4 ms, or some frames
                limits = ["rate", f"{int(rate_mbit * 1e6)}bit", "burst", str(burst), "latency", "100ms"]
                _call([*command, "replace", "dev", device, "root", "tbf", *limits])
            else:
                subprocess.run([*command, "del", "dev", device, "root"], capture_output=True, timeout=30, check=False)

    def _rule(self, port: int | None, direction: str, action: str) -> None:
        self.lab._relay_say(do="rule", host=self.index, port=port, direction=direction, action=action)

    def _counters(self) -> list[int]:
        table = Path(f"/proc/{self._init}/net/dev").read_text()
        found = re.search(r"^\s*eth0:(.*)$", table, re.M)
        assert found, table
        return [int(word) for word in found[1].split()]


class Lab:
    """Hosts, from ``__enter__`` to ``__exit__``. Made by a thread that outlives it, since it ends with that thread.

    Args:
        hosts: how many, 1 to 4.
        names: what /etc/hosts of a host says. ``"full"``: all hosts by their addresses. ``"loopback"``: itself as
            127.0.1.1, as Debian and Ubuntu set it up, the others by their addresses. ``"loopback only"``: itself as
            127.0.1.1, nobody else. ``"none"``: nobody, not even itself. ``"different"``: itself by the address of the
            interface that leads nowhere if there is one, else 127.0.1.1, and the others by addresses that nobody has.
            Or the text of each host's file.
        family: of the addresses of hosts to each other. Loopback has both always.
        dead_interface: every host has, before eth0, an interface that is up and has an address, and leads nowhere.
        shaped: joined by the relay, which delays, loses and filters.
        router: a default route, to a router that swallows everything; else what is not in the network is unreachable.
        host_names: their names, by default h0, h1, ...

    Raises:
        LabUnavailable: on entering; says what this machine lacks.
    """

    def __init__(
        self,
        hosts: int = 2,
        names: str | Sequence[str] = "full",
        family: Family = "ipv4",
        *,
        dead_interface: bool = False,
        shaped: bool = False,
        router: bool = True,
        mtu: int = 1500,
        host_names: Sequence[str] | None = None,
    ) -> None:
        assert 1 <= hosts <= 4 and (not isinstance(names, str) or names in NAMES), (hosts, names)
        self.names, self.family, self.dead_interface = names, family, dead_interface
        self.shaped, self.router, self.mtu = shaped, router, mtu
        self.host_names = tuple(host_names or (f"h{i}" for i in range(hosts)))
        self.hosts = [Host(self, i) for i in range(hosts)]
        self._relay: subprocess.Popen[str] | None = None
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Lab":
        reason = unavailable(self.shaped)
        if reason:
            raise LabUnavailable(reason)
        try:
            self._switch, self._switch_init = _hold("switch", "")
            if self.shaped:
                self._start_relay()
            else:
                self._ip("link add bridge0 type bridge forward_delay 0 mcast_snooping 0", "link set bridge0 up")
            for host in self.hosts:
                host._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes everything down, at once and from any state."""
        for host in self.hosts:
            host.up = False
            if hasattr(host, "_holder"):
                _end(host._holder)
        for process in itertools.chain.from_iterable(host.processes for host in self.hosts):
            process.wait(30)
        for made in (self._relay, self._switch):
            if made is not None:
                _end(made)

    def shape(self, **more: float | None) -> None:
        """``Host.shape`` for all."""
        for host in self.hosts:
            host.shape(**more)

    # --- between the hosts

    def _hosts_file(self, index: int) -> str:
        if not isinstance(self.names, str):
            return _LOCALHOST + self.names[index]
        lines = [_LOCALHOST]
        for host in self.hosts:
            itself = host.index == index
            for address in host.addresses:
                lines += [f"{one} {host.name}\n" for one in self._named(host, address, itself)]
        return "".join(dict.fromkeys(lines))

    def _named(self, host: Host, address: str, itself: bool) -> list[str]:
        """The address under which a host's name is found by one that asks, if at all."""
        if self.names == "full":
            return [address]
        if self.names == "none" or (self.names == "loopback only" and not itself):
            return []
        if self.names == "different":
            wrong = NOBODY_V6 if ":" in address else NOBODY
            return [(host.dead_address or "127.0.1.1") if itself else f"{wrong[:-1]}{host.index}"]
        return ["127.0.1.1" if itself else address]

    def _plug(self, host: Host) -> None:
        """Gives a host its interfaces, still down."""
        lines = []
        if self.dead_interface:  # first, so that whoever takes the first interface takes this one
            dead = f"dead{host.index}"
            lines += [f"link add {dead} type veth peer name dead0 netns {host._init}", f"link set {dead} up"]
        if not self.shaped:
            ends = f"type veth peer name eth0 netns {host._init}"
            lines += [f"link add {host._port} mtu {self.mtu} {ends}", f"link set {host._port} master bridge0 up"]
        self._ip(*lines)
        if self.shaped:
            self._relay_say(do="plug", host=host.index, pid=host._init)

    def _unplug_dead(self, host: Host) -> None:
        """The kernel removes the interfaces of a host that is gone a little later; a new one needs their names."""
        devices = [f"dead{host.index}"] * self.dead_interface + [host._port] * (not self.shaped)
        for device in devices:
            command = ["nsenter", "-t", str(self._switch_init), "-n", "ip", "link", "del", device]
            subprocess.run(command, capture_output=True, timeout=30, check=False)
        if self.shaped:
            self._relay_say(do="unplug", host=host.index)

    def _ip(self, *lines: str) -> None:
        """Commands of ``ip`` in the switch."""
        if lines:
            _call(["nsenter", "-t", str(self._switch_init), "-n", "ip", "-batch", "-"], input="\n".join(lines))

    def _start_relay(self) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-I", "-S", Path(__file__).with_name("relay.py")]
        self._relay = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def _relay_say(self, **order: Any) -> None:
        if self._relay is None:
            raise RuntimeError("filters need Lab(shaped=True)")
        assert self._relay.stdin and self._relay.stdout
        self._relay.stdin.write(json.dumps(order) + "\n")
        self._relay.stdin.flush()
        answer = self._relay.stdout.readline()
        if answer != "done\n":
            raise RuntimeError(f"relay: {order}: {answer or 'it ended'}")


def unavailable(shaped: bool = False) -> str:
    """Why this machine cannot hold a lab, "" if it can."""
    if sys.platform != "linux":
        return "a lab of hosts needs Linux"
    if os.geteuid() != 0:
        return "a lab of hosts needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"a lab of hosts needs {', '.join(missing)} (iproute2, util-linux)"
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, timeout=30, check=False)
    if tried.returncode:
        return f"no permission to make namespaces: {tried.stderr.strip()}"
    if shaped and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "a shaped lab of hosts needs /dev/net/tun"
    return ""


def until(what: Callable[[], T], limit_s: float, why: str = "") -> T:
    """The first true value.

    Raises:
        AssertionError: none within ``limit_s`` seconds.
    """
    limit = time.monotonic() + patience(limit_s)
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < limit, f"not within {limit_s:g} s: {why}"
        time.sleep(0.05)


_UNSHARE = ("unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")


def _hold(name: str, hosts_file: str) -> tuple[subprocess.Popen[str], int]:
    """A process that holds the namespaces of a new host, and the first process in them."""
    command = ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, "sh", str(_FIRST_PROCESS), name, hosts_file]
    holder = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert holder.stdout and holder.stderr
    if holder.stdout.readline() != "ready\n":
        said = holder.stderr.read()
        _end(holder)
        raise LabUnavailable(f"a host could not be made: {said.strip()}")
    init = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])
    return holder, init


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(30)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _add(address: str, device: str) -> str:
    """The command of ``ip``, which needs not ask whether somebody else has the address."""
    return f"addr add {address}/64 dev {device} nodad" if ":" in address else f"addr add {address}/24 dev {device}"


def _call(command: Sequence[str], **more: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {more.get('input', '')}: {done.stdout}{done.stderr}")
    return done.stdout


def _unnamed_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="replace")


def _whole(file: IO[str]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")
