"""A switch in user space: frames between tap devices, delayed, lost, slowed down, filtered. Started by ``lab.py``.

Orders come as lines of JSON on standard input and are answered by ``done``:
``{"do": "plug", "host": 0, "pid": P}`` makes eth0 in the network namespace of process P; ``unplug``; ``cable`` (up);
``shape`` (rate_mbit both ways, delay_ms and loss of what the host sends); ``rule`` (port, direction, action);
``clear``.
"""

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import Any

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETCARRIER = 0x400454CA, 0x400454E2
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_QUEUE_S = 0.2  # what waits longer for a slow link is dropped, as a switch with a full queue does
_BATCH = 64  # frames read from one host before the others get their turn
_TCP, _UDP, _SYN, _ACK, _RST_ACK = 6, 17, 0x02, 0x10, 0x14


@dataclass
class Port:
    """Where a host is plugged in."""

    fd: int
    cable: bool = True
    bytes_per_s: float = 0.0
    delay_s: float = 0.0
    loss: float = 0.0
    rules: list[dict[str, Any]] = field(default_factory=list)
    up_free: float = 0.0  # when the link has sent what waits for it, in each direction
    down_free: float = 0.0


class Relay:
    """All ports; one thread."""

    def __init__(self) -> None:
        self.ports: dict[int, Port] = {}
        self.where: dict[bytes, int] = {}  # host by hardware address
        self.waiting: list[tuple[float, int, int, bytes]] = []
        self.order = itertools.count()
        self.poll = select.epoll()
        self.chance = random.Random(0)
        self.own_namespace = os.open("/proc/self/ns/net", os.O_RDONLY)

    def run(self) -> None:
        """Until standard input ends."""
        self.poll.register(0, select.EPOLLIN)
        while True:
            now = time.monotonic()
            limit = min(max(self.waiting[0][0] - now, 0), 1) if self.waiting else 1
            by_fd = {port.fd: host for host, port in self.ports.items()}
            for fd, event in self.poll.poll(limit):
                if fd == 0 and not self.obey():
                    return
                if fd in by_fd and by_fd[fd] in self.ports:
                    self.read(by_fd[fd], event)
            self.deliver(time.monotonic())

    def obey(self) -> bool:
        """One order; False at the end of them."""
        line = _line()
        if not line:
            return False
        asked = json.loads(line)
        try:
            getattr(self, "do_" + asked.pop("do"))(**asked)
            answer = "done"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(1, (answer + "\n").encode())
        return True

    def do_plug(self, host: int, pid: int) -> None:
        """A tap device called eth0 in the network namespace of a process."""
        enter(pid)
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP | _IFF_NO_PI))
        finally:
            setns(self.own_namespace)
        self.ports[host] = Port(fd)
        self.poll.register(fd, select.EPOLLIN)

    def do_unplug(self, host: int) -> None:
        """The host is gone."""
        port = self.ports.pop(host)
        self.poll.unregister(port.fd)
        os.close(port.fd)
        self.where = {address: there for address, there in self.where.items() if there != host}

    def do_cable(self, host: int, up: bool) -> None:
        """With the carrier, so that the host's kernel knows."""
        port = self.ports[host]
        port.cable = up
        fcntl.ioctl(port.fd, _TUNSETCARRIER, struct.pack("i", up))

    def do_shape(self, host: int, rate_mbit: float | None, delay_ms: float | None, loss: float | None) -> None:
        """What is None stays."""
        port = self.ports[host]
        port.bytes_per_s = port.bytes_per_s if rate_mbit is None else rate_mbit * 1e6 / 8
        port.delay_s = port.delay_s if delay_ms is None else delay_ms / 1e3
        port.loss = port.loss if loss is None else loss

    def do_rule(self, host: int, port: int | None, direction: str, action: str) -> None:
        """For packets to this port (None: any)."""
        self.ports[host].rules.append({"port": port, "direction": direction, "action": action, "but": None})

    def do_firewall(self, host: int, open_ports: list[int]) -> None:
        """For what begins a connection to the host, but to these ports."""
        self.ports[host].rules.append({"port": None, "direction": "in", "action": "drop", "but": open_ports})

    def do_clear(self, host: int) -> None:
        """No rules."""
        self.ports[host].rules.clear()

    def read(self, host: int, event: int) -> None:
        """What a host has sent."""
        port = self.ports[host]
        for _ in range(_BATCH):
            try:
                frame = os.read(port.fd, 65536)
            except BlockingIOError:
                return
            except OSError:  # the interface is down, or its host gone
                if event & (select.EPOLLERR | select.EPOLLHUP):
                    self.do_unplug(host)
                return
            if port.cable:
                self.take(host, port, frame)

    def take(self, host: int, port: Port, frame: bytes) -> None:
        """Decides when a frame arrives where, if it does."""
        self.where[frame[6:12]] = host
        if port.rules and self.stopped(port, "out", frame, answer_to=host):
            return
        if port.loss and self.chance.random() < port.loss:
            return
        now = time.monotonic()
        if port.bytes_per_s:
            port.up_free = max(port.up_free, now) + len(frame) / port.bytes_per_s
            if port.up_free - now > _QUEUE_S:
                port.up_free -= len(frame) / port.bytes_per_s
                return
            now = port.up_free
        for there in self.receivers(host, frame):
            self.send(now + port.delay_s, host, there, frame)

    def receivers(self, host: int, frame: bytes) -> list[int]:
        """One host, or all others for a group's address; what nobody is known to have goes nowhere."""
        if frame[0] & 1:
            return [other for other in self.ports if other != host]
        there = self.where.get(frame[:6])
        return [] if there is None or there == host else [there]

    def send(self, at: float, host: int, there: int, frame: bytes) -> None:
        """Through the other end's link."""
        port = self.ports.get(there)
        if port is None or (port.rules and self.stopped(port, "in", frame, answer_to=host)):
            return
        if port.bytes_per_s:
            begun = max(port.down_free, at)
            if begun - at > _QUEUE_S:
                return
            at = port.down_free = begun + len(frame) / port.bytes_per_s
        heapq.heappush(self.waiting, (at, next(self.order), there, frame))

    def deliver(self, now: float) -> None:
        """What is due."""
        while self.waiting and self.waiting[0][0] <= now:
            _, _, there, frame = heapq.heappop(self.waiting)
            port = self.ports.get(there)
            if port is not None and port.cable:
                try:
                    os.write(port.fd, frame)
                except OSError:
                    continue  # an interface that is down takes nothing

    def stopped(self, port: Port, direction: str, frame: bytes, answer_to: int) -> bool:
        """Whether a rule ends a frame here; answers for it where the rule says so."""
        packet = parse(frame)
        if packet is None:
            return False
        for rule in port.rules:
            if rule["but"] is not None and (not begins(frame, packet) or packet.to_port in rule["but"]):
                continue
            if rule["direction"] in (direction, "both") and rule["port"] in (None, packet.to_port):
                sender = self.ports.get(answer_to)
                if rule["action"] == "refuse" and packet.protocol == _TCP and sender is not None:
                    heapq.heappush(self.waiting, (0.0, next(self.order), answer_to, reset(frame, packet)))
                return True
        return False


@dataclass(frozen=True)
class Packet:
    """What a rule asks of a frame. ``at``: where its TCP or UDP header begins."""

    version: int
    protocol: int
    at: int
    to_port: int


def parse(frame: bytes) -> Packet | None:
    """None for what is not IP, such as ARP, and for what finds neighbours in IPv6."""
    kind = frame[12:14]
    if kind == b"\x08\x00":
        version, protocol, at = 4, frame[23], 14 + (frame[14] & 15) * 4
    elif kind == b"\x86\xdd":
        version, protocol, at = 6, frame[20], 54
    else:
        return None
    if version == 6 and protocol == 58:
        return None
    port = struct.unpack_from("!H", frame, at + 2)[0] if protocol in (_TCP, _UDP) and len(frame) >= at + 4 else -1
    return Packet(version, protocol, at, port)


def begins(frame: bytes, packet: Packet) -> bool:
    """Whether a packet is the first of a connection of TCP."""
    return packet.protocol == _TCP and len(frame) > packet.at + 13 and frame[packet.at + 13] & (_SYN | _ACK) == _SYN


def reset(frame: bytes, packet: Packet) -> bytes:
    """The answer of a host where nobody listens, to a segment of TCP."""
    from_port, to_port, number = struct.unpack_from("!HHI", frame, packet.at)
    segment = struct.pack("!HHIIBBHHH", to_port, from_port, 0, number + 1 & 0xFFFFFFFF, 5 << 4, _RST_ACK, 0, 0, 0)
    if packet.version == 4:
        source, destination = frame[26:30], frame[30:34]
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0x4000, 64, _TCP, 0, destination, source)
        head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    else:
        source, destination = frame[22:38], frame[38:54]
        head = struct.pack("!IHBB16s16s", 6 << 28, 20, _TCP, 64, destination, source)
    whole = checksum(destination + source + struct.pack("!HH", _TCP, len(segment)) + segment)
    segment = segment[:16] + struct.pack("!H", whole) + segment[18:]
    return frame[6:12] + frame[:6] + frame[12:14] + head + segment


def checksum(data: bytes) -> int:
    """Of IP and TCP: the complement of the sum of 16-bit words."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def enter(pid: int) -> None:
    """Moves this process to the network namespace of another."""
    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        setns(fd)
    finally:
        os.close(fd)


def setns(fd: int) -> None:
    """os.setns of Python 3.12."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _line() -> str:
    """One order; they come one at a time, so nothing is read ahead."""
    return sys.stdin.readline()


if __name__ == "__main__":
    Relay().run()
