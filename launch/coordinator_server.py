"""The port of the coordinator: connections of launchers, and of whoever else finds it.

Nothing that a stranger sends or fails to send holds up the others: a connection without a hello lasts ten seconds,
there are few of these at a time, a line has a bounded size, and what waits for one that does not read has one too.
"""

import contextlib
import errno
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable

from acceleration.distributed.addresses import address_of
from launch.coordinator import Coordinator, Limits
from launch.rendezvous import LINE_BYTES, About, Order, ProtocolError, State, VersionError, decode, encode

HELLO_S = 10.0  # for one that connects to say what it is
STRANGERS = 64  # connections that have not said it
WAITING_BYTES = 2**18  # for one that does not read
TICK_S = 0.1
FAREWELL_S = 2.0  # for the last words of a connection to be read
MIXED = "launchers of different versions meet here; use the same code on all machines"
BEATS = 5  # heartbeats in the time that silence may last


class Connection:
    """One that came, launcher or not."""

    def __init__(self, link: socket.socket, now: float) -> None:
        self.link, self.since, self.member = link, now, ""
        self.address, self.reached = address_of(link.getpeername()), address_of(link.getsockname())
        self.received, self.to_send = bytearray(), bytearray()
        self.sent: Order | None = None  # the last order
        self.sent_at = now
        self.closes_at: float | None = None

    def lines(self) -> list[bytes]:
        """Whole lines that came since, without their ends.

        Raises:
            ProtocolError: a line is too long.
        """
        *lines, rest = bytes(self.received).split(b"\n")
        if any(len(line) > LINE_BYTES for line in (*lines, rest)):
            raise ProtocolError("a line is too long")
        self.received = bytearray(rest)
        return lines


class CoordinatorServer:
    """Serves a ``Coordinator`` in a thread of its own until it is closed."""

    def __init__(
        self, port: int, own: About, limits: Limits, endpoint: str, say: Callable[[str], None], advice: str = ""
    ) -> None:
        """
        Args:
            advice: what is likely if nobody comes, and has to be changed then.

        Raises:
            OSError: nobody can listen on the port.
        """
        self._listener = listen(port)
        self._say, self._held = say, reserve()
        self._coordinator = Coordinator(own, limits, endpoint, self._new_port, secrets.token_hex(8), time.monotonic())
        if advice:
            self._coordinator.advice, self._coordinator.advice_code = advice, 2
        self._beat_s = limits.heartbeat_s / BEATS
        self._most = own.nodes_max + STRANGERS
        self._connections: dict[int, Connection] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._close_at: float | None = None
        self._thread = threading.Thread(target=self._serve, name="coordinator", daemon=True)
        self._thread.start()

    def close(self, linger_s: float) -> None:
        """Ends the server when the other launchers have heard of the end, or after ``linger_s`` seconds."""
        self._close_at = time.monotonic() + linger_s
        self._thread.join(linger_s + 5 * TICK_S)

    def _new_port(self) -> int:
        """Held until the next is asked for: a socket that does not listen keeps it from all but those who name it."""
        self._held.close()
        self._held = reserve()
        return int(self._held.getsockname()[1])

    def _serve(self) -> None:
        while not self._over(time.monotonic()):
            for key, events in self._selector.select(TICK_S):
                connection: Connection | None = key.data
                if connection is None:
                    self._accept()
                elif self._connections.get(key.fd) is connection:  # not dropped since
                    self._serve_one(connection, events)
            self._coordinator.tick(time.monotonic())
            self._orders(time.monotonic())
            for notice in self._coordinator.notices:
                self._say(notice)
            self._coordinator.notices.clear()
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._listener.close()
        self._held.close()
        self._selector.close()

    def _over(self, now: float) -> bool:
        if self._close_at is None:
            return False
        told = not any(one.member or one.to_send for one in self._connections.values())
        return told or now > self._close_at

    def _accept(self) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError:  # it is gone again, or there are no descriptors; then it is tried again
            time.sleep(TICK_S)
            return
        try:
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(link, time.monotonic())
        except OSError:
            link.close()
            return
        strangers = [one for one in self._connections.values() if not one.member]
        if len(strangers) >= STRANGERS:
            self._drop(strangers[0])
        if len(self._connections) >= self._most:
            link.close()
            return
        self._connections[link.fileno()] = connection
        self._selector.register(link, selectors.EVENT_READ, connection)

    def _serve_one(self, connection: Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(connection)
            if events & selectors.EVENT_READ:
                came = connection.link.recv(65536)
                if not came:
                    raise ConnectionError
                connection.received += came
                for line in connection.lines():
                    self._line(connection, line)
        except (OSError, ProtocolError):
            self._drop(connection)

    def _line(self, connection: Connection, line: bytes) -> None:
        now = time.monotonic()
        if connection.closes_at is not None:
            return
        if connection.member:
            self._coordinator.heard(connection.member, decode(line, State), now)
            return
        about = decode_hello(line)
        if about is None:  # a launcher of other code
            self._send(connection, Order("end", text=f"error: {MIXED}", code=2))
            connection.closes_at = now + FAREWELL_S
            return
        for other in list(self._connections.values()):
            if other.member == about.member:  # it has lost that connection before we did
                other.member = ""
                self._drop(other)
        order = self._coordinator.hello(about, connection.address, connection.reached, now)
        if about.member in self._coordinator.machines:
            connection.member = about.member
        else:
            connection.closes_at = now + FAREWELL_S
        self._send(connection, order)

    def _orders(self, now: float) -> None:
        """Send what has changed, and heartbeats; end what has been told its last."""
        for connection in list(self._connections.values()):
            machine = self._coordinator.machines.get(connection.member)
            if connection.closes_at is not None:
                expired = now > connection.closes_at
            elif connection.member:
                expired = machine is None  # it has left, or came again by another way
                due = now - connection.sent_at > self._beat_s
                if machine is not None and (due or machine.order != connection.sent):
                    self._send(connection, machine.order)
            else:
                expired = now - connection.since > HELLO_S
            if expired or len(connection.to_send) > WAITING_BYTES:
                self._drop(connection)

    def _send(self, connection: Connection, order: Order) -> None:
        connection.to_send += encode(order)
        connection.sent, connection.sent_at = order, time.monotonic()
        try:
            self._flush(connection)
        except OSError:
            self._drop(connection)

    def _flush(self, connection: Connection) -> None:
        with contextlib.suppress(BlockingIOError):
            while connection.to_send:
                del connection.to_send[: connection.link.send(connection.to_send)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.to_send else 0)
        self._selector.modify(connection.link, wanted, connection)

    def _drop(self, connection: Connection) -> None:
        number = connection.link.fileno()
        if self._connections.get(number) is not connection:  # dropped before
            return
        del self._connections[number]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.link)
        connection.link.close()
        if connection.member:
            self._coordinator.disconnected(connection.member, time.monotonic())


def decode_hello(line: bytes) -> About | None:
    """None for a launcher of another version.

    Raises:
        ProtocolError: it is no launcher's.
    """
    try:
        about: About = decode(line, About)
    except VersionError:
        return None
    if about.processes < 1 or not about.member:
        raise ProtocolError("no launcher")
    return about


def listen(port: int) -> socket.socket:
    """On all addresses, IPv4 and IPv6 where the system has both.

    Raises:
        OSError: nobody can.
    """
    listener = _bound(port)
    try:
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def reserve() -> socket.socket:
    """A socket that holds a free port on all addresses and does not listen: who binds to it with SO_REUSEADDR may."""
    return _bound(0)


def _bound(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return _bound_to(socket.AF_INET6, "::", port)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
    return _bound_to(socket.AF_INET, "0.0.0.0", port)  # the system was told to have no IPv6


def _bound_to(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a launcher that just ended is no obstacle
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound
