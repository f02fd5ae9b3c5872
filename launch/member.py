"""A launcher among those of several machines: finds the coordinator, or is it, and follows its orders.

The machine that has an address of the rendezvous listens there; whether it has one is asked of its interfaces, not of
names. Every launcher connects, the coordinator's own too, and a thread keeps that connection for as long as it lives.
"""

import errno
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from acceleration.distributed.addresses import (
    address_of,
    endpoint,
    interfaces,
    is_here,
    is_link_local,
    is_loopback,
    resolve,
    socket_address,
)
from launch.coordinator import Limits
from launch.coordinator_server import BEATS, MIXED, CoordinatorServer
from launch.rendezvous import (
    LINE_BYTES,
    SAVED,
    About,
    Order,
    ProtocolError,
    RunEnded,
    State,
    VersionError,
    decode,
    encode,
)

CONNECT_S = 3.0  # for one address to answer
ANSWER_S = 8.0  # for a coordinator to answer a hello; whoever takes longer is none
RESOLVE_S = 30.0  # names of a cluster that is starting may come late
PAUSE_S = 0.5  # between two rounds over the addresses
LOOK_S = 0.05  # between two looks of the main thread
REFUSED_S = 5.0  # without a coordinator on a machine that answers, until it is gone
LINGER_S = 5.0  # for the others to hear of the end
FIRST_LINE_S, LONGEST_PAUSE_S = 5.0, 60.0  # until a line says for whom this launcher waits, and between later ones


@dataclass(frozen=True)
class Place:
    """Of this machine in a round.

    Attributes:
        address, port: where rank 0 listens, as this machine reaches it.
    """

    group_rank: int
    group_size: int
    first_rank: int
    world_size: int
    address: str
    port: int
    failures: int


class Member:
    """The thread keeps the connection; the other methods are for the launcher's main thread."""

    def __init__(
        self, host: str, port: int, about: About, limits: Limits, say: Callable[[str], None], asked: Callable[[], int]
    ) -> None:
        """
        Args:
            host, port: of the rendezvous, as they were given.
            say: prints a line.
            asked: the signal that this launcher got, 0 if none.
        """
        self._host, self._port, self._about, self._limits = host, port, about, limits
        self._say, self._asked = say, asked
        self._endpoint = endpoint(host, port)
        self._lock = threading.Lock()
        self._state = State("waits")
        self._order: Order | None = None  # the last one of this connection
        self._order_heartbeat_s = limits.heartbeat_s
        self._epoch = ""  # of the coordinator of the last round
        self._peer = ""  # its address
        self._trouble = f"{self._endpoint} is looked up"  # why there is no connection, in words
        self._likely, self._code = UNANSWERED, 1  # what to do about it, and the exit code if it stays so
        self._asking = False  # somebody is there, and has not answered yet
        self._refusing = False  # its machine answers, and nobody listens there
        self._away_since: float | None = time.monotonic()  # since when there is no connection
        self._heard_at = time.monotonic()
        self._fatal: RunEnded | None = None
        self._found = False  # there was a connection
        self._closing = False
        self._server: CoordinatorServer | None = None
        self._doubtful_since: float | None = None  # since when somebody listens there who may be no launcher
        self._wake_reading, self._wake_writing = socket.socketpair()
        self._wake_writing.setblocking(False)
        self._thread = threading.Thread(target=self._keep, name="member", daemon=True)
        self._thread.start()

    # --- for the main thread

    def meet(self) -> Place:
        """Waits for the next round; says for whom after five seconds, and again.

        Raises:
            RunEnded: it will not come; what to print, and the exit code.
        """
        self.tell(State("waits", self._state.round))
        begun, lines = time.monotonic(), Lines()
        while True:
            if self._asked():
                self.leave(self._asked())
                raise RunEnded("", SAVED)
            with self._lock:
                order, fatal, away = self._order, self._fatal, self._away_since
            if fatal is not None:
                raise fatal
            if order is not None and order.is_ == "end":
                raise RunEnded(order.text, order.code)
            if order is not None and self._is_new(order):
                return self._begin(order)
            if away is not None and time.monotonic() - max(away, begun) > self._limits.timeout_s:
                raise self._nobody_there(self._limits.timeout_s)
            trouble = f"waiting: {self._trouble}" if not self._asking else ""
            lines.show(order.text if order is not None else trouble, self._say)
            time.sleep(LOOK_S)

    def _is_new(self, order: Order) -> bool:
        """Whether it starts a round that this machine has not begun."""
        return order.is_ == "start" and (order.epoch != self._epoch or order.round > self._state.round)

    def _begin(self, order: Order) -> Place:
        self._epoch = order.epoch
        self._about = replace(self._about, epoch=order.epoch, round=order.round, failures=order.failures)
        self.tell(State("runs", order.round))
        self._say(order.text)
        address = self._peer if order.group_rank else order.own_address or _loopback()
        return Place(
            order.group_rank, order.group_size, order.first_rank, order.world_size, address, order.port, order.failures
        )

    def order(self) -> Order | None:
        """What to do other than go on with the round: ``stop`` or ``end``."""
        with self._lock:
            order, away, state = self._order, self._away_since, self._state
        if order is None:
            return self._alone(away, state)
        if order.epoch != self._epoch and order.is_ != "end":
            return self._lost(f"the launcher at {self._endpoint} was started anew", state)
        if order.is_ == "end" or (order.is_ == "stop" and order.round >= state.round):
            return order
        return Order("stop") if self._is_new(order) else None

    def _alone(self, away: float | None, state: State) -> Order | None:
        """What to do without a connection: nothing yet, or what a lost coordinator means."""
        gone_s = time.monotonic() - away if away is not None else 0.0
        if gone_s < (min(REFUSED_S, self._order_heartbeat_s) if self._refusing else self._order_heartbeat_s):
            return None
        return self._lost(f"the launcher at {self._endpoint} has not been reached for {gone_s:.0f} s", state)

    def _lost(self, why: str, state: State) -> Order:
        """The round is over without its coordinator; the next one counts that as a failure."""
        if state.is_ == "finished":
            return Order("end", code=0)
        failures, most = self._about.failures + 1, self._about.restarts
        if failures > most:
            advice = "is its machine on, and the network up?"
            return Order("end", text=f"error: {why}: {advice}", code=state.code if state.is_ == "failed" else 1)
        return Order("stop", text=f"{why}; starting again ({failures} of {most}) when it is back")

    def tell(self, state: State) -> None:
        """The coordinator hears this now, and on every connection to come."""
        with self._lock:
            self._state = state
        self._wake()

    @property
    def round(self) -> int:
        """The last one that this machine took part in."""
        return self._state.round

    def leave(self, number: int = 0) -> None:
        """The others hear that this launcher goes, because of a signal if it is one; nothing is told after this."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._state = replace(self._state, is_="leaves", signal=number)
        self._wake()
        self._thread.join(1.0)

    def close(self) -> None:
        """Leaves; where the coordinator is, once the others know the end."""
        self.leave()
        if self._server is not None:
            self._server.close(LINGER_S)

    def _wake(self) -> None:
        with suppress(OSError):
            self._wake_writing.send(b"x")

    # --- the thread

    def _keep(self) -> None:
        """Connects again and again, until this launcher leaves."""
        while not self._closing:
            try:
                link = self._connected()
            except RunEnded as error:
                with self._lock:
                    self._fatal = error
                return
            if link is None:
                select.select([self._wake_reading], [], [], PAUSE_S)
                self._drain()
                continue
            try:
                self._talk(link)
            finally:
                link.close()
                with self._lock:
                    ended = self._order is not None and self._order.is_ == "end"
                    if not ended:
                        self._order, self._away_since = None, self._heard_at
            if ended:
                return

    def _drain(self) -> None:
        while select.select([self._wake_reading], [], [], 0)[0]:
            self._wake_reading.recv(4096)

    def _connected(self) -> socket.socket | None:
        """A connection to the coordinator, with its first order; None: not now, ``_trouble`` says why.

        Raises:
            RunEnded: it will never be.
        """
        addresses = self._addresses()
        here = sorted((one for one in addresses if self._is_own(one)), key=is_loopback)
        in_use = bool(here) and self._server is None and not self._serve(here)
        outside = here or [one for one in addresses if not is_loopback(one)] or addresses
        found: dict[str, str] = {}
        for address in [*outside, *(("127.0.0.1", "::1") if here else ())]:
            if self._closing:
                return None
            if address not in found:
                link = self._try(address, found)
                if link is not None:
                    return link
        if addresses:
            self._explain(found, in_use, misled=not here and self._leads_to_itself(addresses))
        return None

    def _leads_to_itself(self, addresses: Sequence[str]) -> bool:
        """Whether the name of another machine leads to this one here."""
        return all(map(is_loopback, addresses))

    def _addresses(self) -> list[str]:
        try:
            return resolve(self._host)
        except OSError as error:
            reason = error.strerror or str(error)
            self._no_address(f"{self._host}: no machine of this name is known here ({reason})")
            return []

    def _no_address(self, trouble: str) -> None:
        """The name leads nowhere, and why; the end, if it has for long and there never was a connection."""
        self._trouble, self._refusing = trouble, False
        self._likely, self._code = "give --rendezvous the name or the address of one of these machines", 2
        away = self._away_since
        if not self._found and away is not None and time.monotonic() - away > RESOLVE_S:
            raise self._nobody_there(time.monotonic() - away)

    def _is_own(self, address: str) -> bool:
        """Whether this machine is the rendezvous. Its loopback is meant only by its own name, and by localhost."""
        if address in ("0.0.0.0", "::"):
            raise RunEnded(f"error: {address} is no machine's address; {_own_addresses()}", 2)
        return _is_own_name(self._host) if is_loopback(address) else is_here(address)

    def _serve(self, here: Sequence[str]) -> bool:
        """Become the coordinator; False if the port is in use, by another launcher of this machine perhaps."""
        advice = ""
        if all(map(is_loopback, here)) and self._host.lower() != socket.gethostname().lower():
            advice = f"{self._host} leads every machine to itself: {_own_addresses()}"
        where = self._endpoint if self._host == here[0] else f"{self._endpoint} ({here[0]})"
        about = replace(self._about, round=self._state.round)
        try:
            self._server = CoordinatorServer(self._port, about, self._limits, where, self._say, advice)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            reason = (error.strerror or str(error)).lower()
            raise RunEnded(f"error: nobody can listen on port {self._port} of this machine ({reason})", 2) from None
        return True

    def _try(self, address: str, found: dict[str, str]) -> socket.socket | None:
        """A connection with the first order, or in ``found`` what there was instead."""
        try:
            family, name = socket_address(address, self._port)
            link = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            found[address] = (error.strerror or str(error)).lower()
            return None
        try:
            link.settimeout(CONNECT_S)
            link.connect(name)
            if link.getsockname()[:2] == link.getpeername()[:2]:  # a socket that found itself, as nobody listens
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            self._asking = True
            order = self._greet(link)
        except TimeoutError:
            found[address] = "no answer"
        except ProtocolError as error:
            found[address] = str(error)
        except OSError as error:
            found[address] = (error.strerror or str(error)).lower()
        else:
            if order.is_ != "later":
                self._arrived(link, order)
                return link
            found[address] = order.text
        finally:
            self._asking = False
        link.close()
        return None

    def _greet(self, link: socket.socket) -> Order:
        """Says hello, and reads the answer.

        Raises:
            ProtocolError: whoever listens there is no launcher.
            OSError: the connection failed.
        """
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.settimeout(ANSWER_S)
        received, deadline = b"", time.monotonic() + ANSWER_S
        try:
            link.sendall(encode(self._about))
            while b"\n" not in received:
                came = link.recv(LINE_BYTES)
                received += came
                if not came and not received:
                    raise ProtocolError(CLOSED)
                if not came or len(received) > LINE_BYTES or time.monotonic() > deadline:
                    raise ProtocolError(STRANGER)
        except TimeoutError:
            raise ProtocolError(STRANGER) from None
        line, _, self._rest = received.partition(b"\n")
        try:
            order: Order = decode(line, Order)
        except VersionError:
            raise RunEnded(f"error: {self._endpoint}: {MIXED}", 2) from None
        except ProtocolError:
            raise ProtocolError(STRANGER) from None
        return order

    def _arrived(self, link: socket.socket, order: Order) -> None:
        link.setblocking(False)
        with self._lock:
            self._order, self._away_since = order, None
        self._heard_at = time.monotonic()
        self._order_heartbeat_s = float(max(1, order.heartbeat_s))
        self._peer, self._found, self._doubtful_since = address_of(link.getpeername()), True, None

    def _explain(self, found: dict[str, str], in_use: bool, misled: bool) -> None:
        """Puts into words why no address led to a coordinator.

        Raises:
            RunEnded: it is no use to try again.
        """
        if misled:
            own = f"{self._host} leads to a loopback address here, though this machine is {socket.gethostname()}"
            self._no_address(f"{own} (see /etc/hosts)")
            return
        words = [why if address == self._host else f"{address}: {why}" for address, why in list(found.items())[:4]]
        self._trouble = f"{self._endpoint} does not answer ({'; '.join(words)})"
        self._refusing = any("refused" in why for why in found.values())
        self._likely, self._code = (REFUSED if self._refusing else UNANSWERED), 1
        stranger = STRANGER in found.values()
        doubtful = stranger or in_use or CLOSED in found.values()
        self._doubtful_since = (self._doubtful_since or time.monotonic()) if doubtful else None
        if self._found or self._doubtful_since is None:
            return
        if stranger or time.monotonic() - self._doubtful_since > ANSWER_S:
            advice = f"give --rendezvous another port ({'; '.join(words)})"
            raise RunEnded(f"error: {self._endpoint} is in use by another program; {advice}", 1)

    def _nobody_there(self, tried_s: float) -> RunEnded:
        """After too long."""
        if self._found:
            return RunEnded(f"error: {self._trouble}; the launcher there has not come back within {tried_s:.0f} s", 1)
        return RunEnded(f"error: {self._trouble}, tried for {tried_s:.0f} s: {self._likely}", self._code)

    def _talk(self, link: socket.socket) -> None:
        """Until the connection ends, is silent for too long, or this launcher leaves."""
        beat_s, told, told_at = self._order_heartbeat_s / BEATS, None, 0.0
        received = bytearray(self._rest)
        while True:
            with self._lock:
                state, closing = self._state, self._closing
            now = time.monotonic()
            try:
                if state != told or now - told_at > beat_s:
                    _send(link, encode(state))
                    told, told_at = state, now
                if closing:
                    return
                readable = select.select([link, self._wake_reading], [], [], min(beat_s, 1.0))[0]
                if self._wake_reading in readable:
                    self._drain()
                if link in readable:
                    came = link.recv(65536)
                    if not came:
                        raise ConnectionResetError(errno.ECONNRESET, "the connection ended")
                    received += came
                    self._heard_at = time.monotonic()
                    if self._heard(received):
                        _send(link, encode(replace(state, is_="leaves")))
                        return
                elif time.monotonic() - self._heard_at > self._order_heartbeat_s:
                    raise TimeoutError(errno.ETIMEDOUT, "silent")
            except (OSError, ProtocolError) as error:
                reason = (getattr(error, "strerror", None) or str(error)).lower()
                self._trouble, self._refusing = f"{self._endpoint} does not answer ({self._peer}: {reason})", False
                return

    def _heard(self, received: bytearray) -> bool:
        """Takes the orders out of what came; True at the end of the run.

        Raises:
            ProtocolError: they are none.
        """
        *lines, rest = bytes(received).split(b"\n")
        received[:] = rest
        if len(rest) > LINE_BYTES:
            raise ProtocolError("a line is too long")
        for line in lines:
            order: Order = decode(line, Order)
            with self._lock:
                self._order = order
            if order.is_ == "end":
                return True
        return False


STRANGER = "another program listens there"
CLOSED = "it ends the connection without a word"
UNANSWERED = "is it the address of one of these machines, and does a firewall let the port through?"
REFUSED = "is the same command started on that machine, and is this its own address?"


class Lines:
    """Says for whom a launcher waits: after five seconds, then with growing pauses, sooner when that has changed."""

    def __init__(self) -> None:
        self._text, self._pause_s = "", FIRST_LINE_S
        self._due = time.monotonic() + FIRST_LINE_S

    def show(self, text: str, say: Callable[[str], None]) -> None:
        """To call often, with what would be said now."""
        now = time.monotonic()
        if self._text and text != self._text:
            self._due, self._pause_s = min(self._due, now + FIRST_LINE_S), FIRST_LINE_S
            self._text = ""
        if text and now >= self._due:
            say(text)
            self._text, self._due = text, now + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def _send(link: socket.socket, line: bytes) -> None:
    """All of it: lines are short, and who does not read them for seconds is gone."""
    deadline = time.monotonic() + CONNECT_S
    while line:
        if not select.select([], [link], [], max(0.0, deadline - time.monotonic()))[1]:
            raise TimeoutError(errno.ETIMEDOUT, "it does not read")
        line = line[link.send(line) :]


def _is_own_name(host: str) -> bool:
    """Whether a name that leads to loopback means this machine: by its own name, by localhost, or by a number."""
    name, own = host.lower().strip("[]").rstrip("."), socket.gethostname().lower()
    if is_loopback(name) or re.fullmatch(r"(ip6-)?localhost|localhost[46]?\.localdomain[46]?|.*\.localhost", name):
        return True
    if name == own or name.split(".")[0] == own.split(".")[0]:
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    except (OSError, UnicodeError):
        return False
    return found[0][3].lower().split(".")[0] == own.split(".")[0]


def _own_addresses() -> str:
    """What to give instead."""
    own = [one for found in interfaces().values() for one in found if not is_loopback(one) and not is_link_local(one)]
    known = f", as {' or '.join(own[:3])}" if own else ""
    return f"give --rendezvous an address of this machine that the others reach{known}"


def _loopback() -> str:
    return "127.0.0.1" if is_here("127.0.0.1") else "::1"
