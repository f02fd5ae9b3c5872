"""Where the processes of a start that no launcher introduced to each other meet; sockets only, torch is not needed.

Rank 0 listens on the first free of a few ports that all ranks compute alike, on every address of its machine, and
greets whoever connects with what it belongs to. A stranger on one of these ports (another job would do) greets
otherwise or not at all, and is passed over. The others ask all addresses of all names under which rank 0 may be known,
at the same time, as a name may lead nowhere, to several addresses, or to the machine that asks. Whoever finds rank 0
says who it is, and keeps the connection until rank 0 says that all have come, or why they will not: then every process
says it.
"""

import contextlib
import errno
import json
import queue
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from acceleration.distributed import addresses
from acceleration.distributed.addresses import endpoint
from acceleration.distributed.peers import PROTOCOL, Peer, misfits, ranges, shared_devices
from acceleration.files.untrusted import short

GREETING = "opensora"
CONNECT_S = 4.0  # three tries of a connection: a packet may be lost
ANSWER_S = 2.0  # rank 0's server answers at once; whoever takes longer is a stranger
PAUSE_S = 0.2  # between two times that one address is asked; grows to MAX_PAUSE_S
MAX_PAUSE_S = 2.0
PREFER_S = 0.3  # how long an address that was found waits for a better one
RESOLVE_S, RESOLVE_PAUSE_S = 10.0, 1.0  # how long an unknown name is looked up again, and how often
FIRST_LINE_S, MAX_LINE_PAUSE_S = 5.0, 50.0  # of waiting: until a line says for whom, and the longest until the next
LINGER_S = 3.0  # how long rank 0 tells those who are late why there will be no start
MAX_BYTES = 1 << 16  # of one line
MAX_TARGETS = 64  # addresses and ports that are asked at the same time
MAX_NAMED = 8  # hosts in one line


class StartError(Exception):
    """The processes did not find each other. One line: which port of which host, or which ranks."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        """``exit_code``: for a command line; 1: it may go well the next time, 2: it will not."""
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Place:
    """A name or an address under which rank 0's machine may be known here."""

    host: str
    variable: str  # that it is from
    expected: bool = False  # rank 0's own machine is to know it too


class Waiting:
    """Says what is waited for: after five seconds, and again and again with growing pauses."""

    def __init__(self, say: Callable[[str], None] | None, quiet: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            say: one line; None: another process speaks.
            quiet: True: nothing is said any more, as this process was asked to stop.
        """
        self._say, self._quiet, self._pause = say, quiet, FIRST_LINE_S
        self._next = time.monotonic() + FIRST_LINE_S

    def look(self, describe: Callable[[], str]) -> str:
        """Say it if it is time; returns what is to be said now, also where another process speaks."""
        now = time.monotonic()
        if now < self._next or self._quiet():
            return ""
        self._pause = min(2 * self._pause, MAX_LINE_PAUSE_S)
        self._next = now + self._pause
        text = describe()
        self.tell(text)
        return text

    def tell(self, text: str) -> None:
        """Say it now."""
        if self._say is not None and not self._quiet():
            self._say(text)


class Channel:
    """A connection over which each line is a JSON object."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self._read = connection, b""
        self.local = addresses.address_of(connection.getsockname())  # the address that this end has
        name = connection.getpeername()
        self.remote, self.port = addresses.address_of(name), int(name[1])
        self.hello: dict[str, Any] = {}  # what rank 0's server said in its greeting

    def line(self, timeout_s: float) -> bytes:
        """The next line without its end; empty when the other end has closed, or sent what is no line.

        Raises:
            TimeoutError: nothing came for ``timeout_s`` seconds.
            OSError: the connection broke.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._read:
            self.socket.settimeout(max(1e-3, deadline - time.monotonic()))
            came = self.socket.recv(MAX_BYTES)
            if not came or len(self._read) > MAX_BYTES:
                return b""
            self._read += came
        line, _, self._read = self._read.partition(b"\n")
        return line

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None when the other end has closed, or is nobody of ours. Raises as ``line``."""
        try:
            message = json.loads(self.line(timeout_s))
        except ValueError:
            return None
        return message if isinstance(message, dict) else None

    def send(self, message: Mapping[str, Any]) -> None:
        """Without waiting: messages are short, and who does not read them is not waited for."""
        with suppress(OSError):
            self.socket.settimeout(ANSWER_S)
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """What was sent still arrives."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.socket.close()


# --- rank 0


@dataclass(eq=False)
class _Visitor:
    """A connection to rank 0's server."""

    channel: Channel
    read: bytes = b""
    peer: Peer | None = None  # once it has said who it is
    told: bool = False  # something, by rank 0


class RendezvousServer:
    """Rank 0's side: greets every connection, and gathers those of the same start until it is closed."""

    def __init__(
        self,
        me: Peer,
        ports: Sequence[int],
        token: str,
        places: Sequence[Place] = (),
        host_of: Mapping[int, str] | None = None,
    ) -> None:
        """
        Args:
            me: rank 0.
            places: where the other processes look for it, as far as this machine knows.
            host_of: host of each rank, as far as the launcher says so.

        Raises:
            StartError: every port is in use.
        """
        self.me, self.token, self.places, self.host_of = me, token, places, host_of or {}
        self.instance = secrets.token_hex(8)  # tells this server from that of another rank 0
        self.came: dict[int, _Visitor] = {}
        self.left: dict[int, Peer] = {}  # those that came, and are gone again
        self.problem: StartError | None = None
        self._visitors: set[_Visitor] = set()
        self._complete = threading.Event()  # all have come, or there is a problem
        self._lock = threading.RLock()
        self._wake, self._woken = socket.socketpair()
        self._listener, self.port = _listen(me, ports, token, places)
        self._thread = threading.Thread(target=self._serve, name="rendezvous", daemon=True)
        self._thread.start()
        if me.problem:
            self.refuse(StartError(me.problem, exit_code=2))
        self._look()

    def gather(self, timeout_s: float, waiting: Waiting) -> list[Peer]:
        """All processes, by rank, as soon as all have come.

        Raises:
            StartError: some did not come within ``timeout_s`` seconds, or cannot be of this start; all have been told.
        """
        deadline = time.monotonic() + timeout_s
        threading.Thread(target=self._look_for_another, daemon=True).start()
        while not self._complete.wait(PAUSE_S / 4):
            if time.monotonic() > deadline:
                self.refuse(StartError(self._failure(timeout_s)))
            elif text := waiting.look(self.awaited):
                self._tell({"waiting": text})
        if self.problem is not None:
            if self.problem.exit_code == 2:  # it was found at once: some are still on their way
                self._linger()
            raise self.problem
        with self._lock:
            peers = [self.me, *(self._peer(rank) for rank in range(1, self.me.world_size))]
        return [replace(self.me, address=self._own_address(peers)), *peers[1:]]

    def hand_over(self) -> int:
        """The listening socket, for the store that follows on the same port; nobody is greeted from now on."""
        self._stop()
        return self._listener.detach()

    def dismiss(self) -> None:
        """Tell all that the store is there."""
        self._stop()
        self._tell({"go": True})
        self._close_visitors()

    def refuse(self, problem: StartError) -> None:
        """There will be no start; the first reason counts, and everyone is told."""
        with self._lock:
            if self.problem is not None or self._complete.is_set():
                return
            self.problem = problem
            self._tell(self._refusal(problem))
            self._complete.set()

    def close(self) -> None:
        """Nobody else will come."""
        self._stop()
        self._listener.close()
        self._close_visitors()

    def awaited(self) -> str:
        """Who has not come yet, in words."""
        missing, world = self._missing(), self.me.world_size
        return (
            f"rank 0 on {self.me.host} waits at port {self.port} for {len(missing)} of {world} processes: "
            f"{_with_hosts(missing, self.host_of)}{self._who_left(missing)}"
        )

    # --- what the thread does

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        self._read(selector, key.data)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it is gone again, or no more files may be open
            time.sleep(PAUSE_S / 4)
            return
        with suppress(OSError):
            visitor = _Visitor(Channel(connection))
            hello = json.dumps({"instance": self.instance, "host": self.me.host})
            connection.sendall(f"{GREETING} {self.token} {PROTOCOL} {hello}\n".encode())
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, visitor)
            with self._lock:
                self._visitors.add(visitor)
            return
        connection.close()

    def _read(self, selector: selectors.BaseSelector, visitor: _Visitor) -> None:
        try:
            visitor.channel.socket.setblocking(False)
            came = visitor.channel.socket.recv(MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            came = b""
        visitor.read += came
        try:
            *lines, visitor.read = visitor.read.split(b"\n")
            for line in lines:
                self._hear(visitor, json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):  # a stranger
            came = b""
        if not came or len(visitor.read) > MAX_BYTES:
            selector.unregister(visitor.channel.socket)
            self._gone(visitor)

    def _gone(self, visitor: _Visitor) -> None:
        with self._lock:
            visitor.channel.close()
            self._visitors.discard(visitor)
            peer = visitor.peer
            if peer is not None and self.came.get(peer.rank) is visitor and not self._complete.is_set():
                del self.came[peer.rank]
                self.left[peer.rank] = peer

    def _hear(self, visitor: _Visitor, message: dict[str, Any]) -> None:
        with self._lock:
            if self.problem is not None:
                visitor.channel.send(self._refusal(self.problem))
                visitor.told = True
            elif "leaving" in message and visitor.peer is not None:
                self.refuse(StartError(self._failure(float(message["leaving"]))))
            elif "peer" in message:
                peer = Peer.from_text(json.dumps(message["peer"]))
                problem = self._misfit(peer, self.came.get(peer.rank))
                if self._complete.is_set():  # one too many, who is not to spoil it for those that have met
                    visitor.channel.send(self._refusal(problem or StartError("all processes have met already")))
                    return
                visitor.peer = peer
                if problem:
                    self.refuse(problem)
                else:
                    self.came[peer.rank] = visitor
                    self._look()

    def _misfit(self, peer: Peer, other: _Visitor | None) -> StartError | None:
        if problem := peer.problem or misfits([self.me, peer]):
            return StartError(problem, exit_code=2)
        twin = self.me if peer.rank == 0 else other.peer if other is not None else None
        if twin is None:
            return None
        name = "RANK" if peer.rank else "RANK=0"
        return StartError(
            f"rank {peer.rank} is there twice: {twin.where()} and {peer.where()}; each process needs its own {name}, "
            "and a start its own MASTER_PORT",
            exit_code=2,
        )

    def _look(self) -> None:
        """Whether all are there."""
        with self._lock:
            if len(self.came) < self.me.world_size - 1:
                return
            problem = shared_devices([self.me, *(self._peer(rank) for rank in sorted(self.came))])
        if problem:
            self.refuse(StartError(problem, exit_code=2))
        self._complete.set()

    # --- what is told

    def _tell(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            told = [visitor for visitor in self._visitors if visitor.peer is not None]
        for visitor in told:
            visitor.channel.send(message)
            visitor.told = True

    def _refusal(self, problem: StartError) -> dict[str, Any]:
        return {"problem": str(problem), "exit_code": problem.exit_code}

    def _linger(self) -> None:
        """Until all have been told, or have had time to come."""
        limit = time.monotonic() + LINGER_S
        while time.monotonic() < limit:
            with self._lock:
                told = sum(visitor.told for visitor in self._visitors)
            if told >= self.me.world_size - 1:
                return
            time.sleep(PAUSE_S / 4)

    def _peer(self, rank: int) -> Peer:
        visitor = self.came[rank]
        assert visitor.peer is not None
        return visitor.peer

    def _missing(self) -> list[int]:
        with self._lock:
            return [rank for rank in range(1, self.me.world_size) if rank not in self.came]

    def _who_left(self, missing: Sequence[int]) -> str:
        with self._lock:
            gone = [self.left[rank] for rank in missing if rank in self.left]
        return "".join(f"; {peer.where(rank=True)} came and left again" for peer in gone[:3])

    def _failure(self, timeout_s: float) -> str:
        missing, world = self._missing(), self.me.world_size
        return (
            f"{world - len(missing)} of {world} processes came within {timeout_s:.0f} s; missing: "
            f"{_with_hosts(missing, self.host_of)}; see their logs{self._who_left(missing)}; {self._likely(missing)}"
        )

    def _likely(self, missing: Sequence[int]) -> str:
        """Where rank 0 is to be found, and what may keep the others from it."""
        own = [one for addresses_ in addresses.interfaces().values() for one in addresses_]
        outward = [one for one in own if not addresses.is_loopback(one) and not addresses.is_link_local(one)]
        where = ", ".join(endpoint(one, self.port) for one in outward[:4]) or f"port {self.port}"
        text = f"rank 0 listens on {self.me.host} at {where}"
        odd = "".join(_leads(place, outward) for place in self.places[:1])
        return text + (odd or ", where nothing of them arrived: not started, looking elsewhere, or filtered")

    def _own_address(self, peers: Sequence[Peer]) -> str:
        """The end at which another host's connection arrived; on one host, that of any."""
        with self._lock:
            arrived = [(peer.host_id == self.me.host_id, self.came[peer.rank].channel.local) for peer in peers[1:]]
        arrived.sort(key=lambda one: one[0] or addresses.is_loopback(one[1]))
        return arrived[0][1] if arrived else ""

    def _look_for_another(self) -> None:
        """Where the others look for rank 0 there may be another one: then there are two, and neither can start."""
        begun = time.monotonic()
        while not self._complete.is_set():
            for place in self.places[:1]:
                try:
                    found = addresses.resolve(place.host)
                except OSError as error:
                    self._unknown(place, error.strerror or str(error), time.monotonic() - begun)
                    continue
                for answer in [ask(address, self.port, self.token) for address in found[:8]]:
                    if isinstance(answer, Channel):
                        self._meet_another(answer)
            self._complete.wait(RESOLVE_PAUSE_S)

    def _unknown(self, place: Place, reason: str, waited: float) -> None:
        """A name that rank 0's own machine does not know, nor anybody who came, is a mistake."""
        if place.expected and not self.came and (waited >= RESOLVE_S or reason == addresses.NO_NAME):
            self.refuse(StartError(f"{_unknown(place, reason)}, tried for {waited:.1f} s); {GIVE}", exit_code=2))

    def _meet_another(self, answer: Channel) -> None:
        """Nothing, where that is this very server."""
        with contextlib.closing(answer):
            if answer.hello.get("instance") == self.instance:
                return
            if problem := _introduce(answer, self.me):
                self.refuse(problem)

    # --- the end

    def _stop(self) -> None:
        self._complete.set()
        with suppress(OSError):  # it has been stopped before
            self._wake.send(b"x")
        self._thread.join(timeout=ANSWER_S)
        self._wake.close()
        self._woken.close()

    def _close_visitors(self) -> None:
        with self._lock:
            leaving, self._visitors = self._visitors, set()
        for visitor in leaving:
            visitor.channel.close()


def _listen(me: Peer, ports: Sequence[int], token: str, places: Sequence[Place]) -> tuple[socket.socket, int]:
    """A listening socket on all addresses of this machine, at the first port that is free."""
    reason = "in use by another program"
    for port in ports:
        try:
            return _bound(port), port
        except PermissionError as error:
            reason = (error.strerror or str(error)).lower()
        except OSError:
            answer = ask("127.0.0.1", port, token)
            if isinstance(answer, Channel):
                with contextlib.closing(answer):
                    problem = _introduce(answer, me) or StartError(f"port {port} of {me.host}: another rank 0 is there")
                raise problem from None
    where = places[0].host if places else me.host
    raise StartError(f"{where}: port {ranges(sorted(ports))} {reason}; set MASTER_ADDR and a free MASTER_PORT")


def _bound(port: int) -> socket.socket:
    """For IPv4 and IPv6; for IPv4 alone where the system has no other."""
    try:
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError:
        return _bound_to(socket.socket(socket.AF_INET, socket.SOCK_STREAM), "0.0.0.0", port)
    try:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        return _bound_to(listener, "::", port)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise
        return _bound_to(socket.socket(socket.AF_INET, socket.SOCK_STREAM), "0.0.0.0", port)


def _bound_to(listener: socket.socket, address: str, port: int) -> socket.socket:
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an attempt that just ended is no obstacle
        listener.bind((address, port))
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    return listener


def _leads(place: Place, outward: Sequence[str]) -> str:
    """What is odd about where the others look for rank 0, if they know its name as this machine does."""
    name = f"{place.variable}={short(place.host)}"
    try:
        found = addresses.resolve(place.host)
    except OSError as error:
        return f"; {name} is no name that is known here ({error.strerror})"
    leads_to = "" if found == [place.host] else f" ({', '.join(found[:3])})"
    if all(map(addresses.is_loopback, found)):
        better = f", as {outward[0]}" if outward else ""
        return (
            f"; {name}{leads_to} is loopback here, and who knows it so elsewhere reaches only itself: with several "
            f"machines, give an address that all reach{better}"
        )
    if not any(map(addresses.is_here, found)):
        return f"; {name}{leads_to} is no address of this machine, which is right behind NAT or a service only"
    return ""


def _with_hosts(ranks: Sequence[int], host_of: Mapping[int, str]) -> str:
    """``rank 2-5 (n2: 2-3, n3: 4-5)``; without hosts where they are not known."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(host_of.get(rank, ""), []).append(rank)
    if list(by_host) in ([], [""]):
        return f"rank {ranges(ranks)}"
    named = [f"{host or 'unknown host'}: {ranges(them)}" for host, them in by_host.items()]
    more = f", and {len(named) - MAX_NAMED} more hosts" if len(named) > MAX_NAMED else ""
    return f"rank {ranges(ranks)} ({', '.join(named[:MAX_NAMED])}{more})"


# --- the others


def join(
    me: Peer, places: Sequence[Place], ports: Sequence[int], token: str, timeout_s: float, waiting: Waiting
) -> tuple[str, int]:
    """Find rank 0, say who this is, and wait until all have come.

    Returns:
        the numeric address and the port at which rank 0 was reached, and its store is now.

    Raises:
        StartError: rank 0 was not found within ``timeout_s`` seconds, or said why there will be no start.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.closing(Search(me, places, ports, partial(ask, token=token)).find(timeout_s, waiting)) as channel:
        where = endpoint(channel.remote, channel.port)
        channel.send({"peer": asdict(replace(me, address=channel.local))})
        awaited, asked = "", False
        while True:
            try:
                message = channel.receive(PAUSE_S)
            except TimeoutError:
                late = time.monotonic() - deadline
                if late > 0 and not asked:  # rank 0 knows who is missing, and says it to all
                    asked = True
                    channel.send({"leaving": timeout_s})
                if late > ANSWER_S:
                    who = me.where(rank=True)
                    raise StartError(
                        f"{who} came to {where}, and rank 0 gave no sign within {timeout_s:.0f} s{awaited}"
                    ) from None
                continue
            except OSError as error:
                raise _lost(me, where, error.strerror or str(error)) from None
            if message is None:
                raise _lost(me, where, "it ended")
            if "problem" in message:
                raise StartError(str(message["problem"]), exit_code=int(message.get("exit_code", 1)))
            if "waiting" in message:
                awaited = f"; {message['waiting']}"
                waiting.tell(f"{me.where(rank=True)} is connected to {where}: {message['waiting']}")
            if "go" in message:
                return channel.remote, channel.port


def _lost(me: Peer, where: str, reason: str) -> StartError:
    return StartError(
        f"{where}: rank 0 was gone before all had come ({reason}), says {me.where(rank=True)}: see its log"
    )


def _introduce(channel: Channel, me: Peer) -> StartError | None:
    """Say who this is; the reason why there will be no start, if rank 0 at the other end knows one at once."""
    channel.send({"peer": asdict(replace(me, address=channel.local))})
    try:
        message = channel.receive(ANSWER_S) or {}
    except OSError:
        return None
    if "problem" not in message:
        return None
    return StartError(str(message["problem"]), exit_code=int(message.get("exit_code", 1)))


GIVE = "give the name or the address of the machine of rank 0"


def _unknown(place: Place, reason: str) -> str:
    """That a name has no address, in words, with an open bracket."""
    return f"{place.variable}={short(place.host)}: no machine of this name is known here ({reason}"


class _Lookup:
    """Addresses of a name, asked for again and again: names of a cluster that is starting come late."""

    def __init__(self, place: Place) -> None:
        self.place, self.reason = place, "the name servers do not answer"
        self.addresses: list[str] = []
        self.tried = threading.Event()
        self._over = threading.Event()
        threading.Thread(target=self._run, name="lookup", daemon=True).start()

    @property
    def hopeless(self) -> bool:
        """It can be no name at all."""
        return self.reason == addresses.NO_NAME

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.addresses = addresses.resolve(self.place.host)
            except OSError as error:
                self.reason = error.strerror or str(error)
            self.tried.set()
            self._over.wait(RESOLVE_PAUSE_S)

    def close(self) -> None:
        """Ask no more."""
        self._over.set()


Target = tuple[str, int]  # address and port
Ask = Callable[[str, int], Channel | str]  # a connection to what is looked for; in words what is there instead


class Search:
    """Asks all addresses of all places, and all ports, at the same time: one that gives no answer holds up no other."""

    def __init__(self, me: Peer, places: Sequence[Place], ports: Sequence[int], ask: Ask) -> None:
        self.me, self.ports, self._ask_at = me, ports, ask
        self._lookups = [_Lookup(place) for place in places]
        self._answers: queue.SimpleQueue[tuple[Target, Channel | str]] = queue.SimpleQueue()
        self._said: dict[Target, str] = {}  # what was found instead of rank 0
        self._running: set[Target] = set()
        self._again: dict[Target, tuple[float, float]] = {}  # when to ask again, and the pause after that
        self._over = threading.Event()

    def find(self, timeout_s: float, waiting: Waiting) -> Channel:
        """A connection to rank 0's server.

        Raises:
            StartError: none within ``timeout_s`` seconds, with what was found instead; or no name is known here.
        """
        begun = time.monotonic()
        try:
            while True:
                self._ask_all()
                if (channel := self._collect()) is not None:
                    return channel
                self._check(time.monotonic() - begun, timeout_s)
                waiting.look(lambda: f"{self.me.where(rank=True)} looks for rank 0: {self.describe()}")
        finally:
            self._over.set()
            for lookup in self._lookups:
                lookup.close()
            self._drop_answers()

    def _targets(self) -> list[Target]:
        """Best first."""
        every = ((address, port) for one in self._lookups for address in one.addresses for port in self.ports)
        return list(dict.fromkeys(every))[:MAX_TARGETS]

    def _ask_all(self) -> None:
        for target in self._targets():
            due, _ = self._again.get(target, (0.0, 0.0))
            if target not in self._running and time.monotonic() >= due:
                self._running.add(target)
                threading.Thread(target=self._ask, args=target, name="search", daemon=True).start()

    def _ask(self, address: str, port: int) -> None:
        self._answers.put(((address, port), self._ask_at(address, port)))
        if self._over.is_set():
            self._drop_answers()

    def _drop_answers(self) -> None:
        with suppress(queue.Empty):
            while True:
                _, answer = self._answers.get_nowait()
                if isinstance(answer, Channel):
                    answer.close()

    def _collect(self) -> Channel | None:
        """What came in a moment; of several that found rank 0 the best."""
        order = {target: index for index, target in enumerate(self._targets())}
        found: dict[int, Channel] = {}
        limit = time.monotonic() + PAUSE_S / 4
        while (left := limit - time.monotonic()) > 0:
            try:
                target, answer = self._answers.get(timeout=left)
            except queue.Empty:
                break
            self._running.discard(target)
            if isinstance(answer, Channel):
                if not found:
                    limit = time.monotonic() + PREFER_S
                found[order.get(target, MAX_TARGETS)] = answer
            else:
                pause = self._again.get(target, (0.0, PAUSE_S))[1]
                self._said[target] = answer
                self._again[target] = (time.monotonic() + pause, min(2 * pause, MAX_PAUSE_S))
            if found and not any(order.get(other, MAX_TARGETS) < min(found) for other in self._running):
                break
        best = found.pop(min(found)) if found else None
        for other in found.values():
            other.close()
        return best

    def _check(self, waited: float, timeout_s: float) -> None:
        limit = min(RESOLVE_S, timeout_s)
        unknown = all(lookup.tried.is_set() and not lookup.addresses for lookup in self._lookups)
        if unknown and (waited > limit or all(lookup.hopeless for lookup in self._lookups)):
            names = "; ".join(_unknown(lookup.place, lookup.reason) for lookup in self._lookups)
            raise StartError(f"{names}, tried for {waited:.1f} s); {GIVE}", exit_code=2)
        if waited > timeout_s:
            hosts = " or ".join(dict.fromkeys(lookup.place.host for lookup in self._lookups))
            raise StartError(
                f"rank 0 did not answer at {hosts} within {waited:.0f} s, says {self.me.where(rank=True)}: "
                f"{self.describe()}; {self._remedy()}"
            )

    def _remedy(self) -> str:
        found = [address for lookup in self._lookups for address in lookup.addresses]
        if found and all(map(addresses.is_here, found)):
            return "see its log; if it is on another machine, set MASTER_ADDR to an address by which others reach that"
        return "see its log, or set MASTER_ADDR and MASTER_PORT"

    def describe(self) -> str:
        """What was found at each address and port so far."""
        found: list[str] = []
        for lookup in self._lookups:
            place, numbers = lookup.place, lookup.addresses
            name = f"{place.variable}={short(place.host)} is " if numbers != [place.host] else ""
            each = [one for address in numbers[:MAX_NAMED] for one in self._describe(address)]
            found.append(f"{name}{', '.join(each)}" if numbers else f"{_unknown(place, lookup.reason)})")
        return "; ".join(dict.fromkeys(found))

    def _describe(self, address: str) -> list[str]:
        """One address: ports that answer alike together."""
        alike: dict[str, list[int]] = {}
        for port in self.ports:
            alike.setdefault(self._said.get((address, port), "no answer yet"), []).append(port)
        itself = "this machine itself, " if addresses.is_here(address) else ""
        return [
            f"{endpoint(address, ports[0])}{''.join(f' and {port}' for port in ports[1:])} ({itself}{said})"
            for said, ports in alike.items()
        ]


NO_ANSWER = "no answer: filtered, or no machine has this address"


def ask(address: str, port: int, token: str | None = None) -> Channel | str:
    """A connection to the server of this start at an address; in words what is there instead.

    Args:
        token: of the start; None: whoever takes the connection will do.
    """
    connection: socket.socket | None = None
    said = NO_ANSWER
    try:
        family, name = addresses.socket_address(address, port)
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_S)
        connection.connect(name)
        if connection.getsockname() == connection.getpeername():  # both ends of the port that nobody listens at
            raise ConnectionRefusedError
        said = "takes connections and says nothing: another program, or a run that has begun"
        channel = Channel(connection)
        said = "" if token is None else _greeting(channel, token)
        if not said:
            return channel
    except TimeoutError:
        pass
    except ConnectionRefusedError:
        said = "refused: nothing listens there, or a firewall rejects it"
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        if error.errno == errno.EHOSTUNREACH:
            said += ": no machine there has this address, or it is off"
    if connection is not None:
        connection.close()
    return said


def _greeting(channel: Channel, token: str) -> str:
    """Empty if the server of this start greets; in words who else does."""
    line = channel.line(ANSWER_S).decode(errors="replace")
    words = line.split(maxsplit=3)
    if words[:1] != [GREETING]:
        says = f" (says {short(ascii(line.strip()))})" if line.strip() else ""
        return f"is another program{says}"
    if words[1:2] != [token]:
        return "is another job"
    with suppress(ValueError):
        hello = json.loads(words[3]) if len(words) > 3 else {}
        channel.hello = hello if isinstance(hello, dict) else {}
    return ""
