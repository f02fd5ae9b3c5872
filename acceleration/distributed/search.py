"""How processes find rank 0: all addresses of all names under which it may be known, at the same time; sockets only.

A name may lead nowhere, to several addresses, to the machine that asks, or be unknown for a while; an address may
refuse connections or give no answer; and another program, or another job, may be there. None of them holds up the
others, and what was found is said in words: after a while, and in the end.
"""

import contextlib
import errno
import json
import queue
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
from acceleration.distributed.peers import MAX_NAMED, Peer
from acceleration.files.untrusted import short

GREETING = "opensora"
CONNECT_S = 4.0  # three tries of a connection: a packet may be lost
ANSWER_S = 2.0  # rank 0's server answers at once; whoever takes longer is a stranger
PAUSE_S = 0.2  # between two times that one address is asked; grows to MAX_PAUSE_S
MAX_PAUSE_S = 2.0
PREFER_S = 0.3  # how long an address that was found waits for a better one
RESOLVE_S, RESOLVE_PAUSE_S = 10.0, 1.0  # how long an unknown name is looked up again, and how often
FIRST_LINE_S, MAX_LINE_PAUSE_S = 5.0, 50.0  # of waiting: until a line says for whom, and the longest until the next
MAX_BYTES = 1 << 16  # of one line
MAX_TARGETS = 64  # addresses and ports that are asked at the same time
NO_ANSWER = "no answer: filtered, or no machine has this address"
GIVE = "give the name or the address of the machine of rank 0"


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

    def look(self, describe: Callable[[], str]) -> None:
        """Say it if it is time."""
        now = time.monotonic()
        if now < self._next or self._quiet():
            return
        self._pause = min(2 * self._pause, MAX_LINE_PAUSE_S)
        self._next = now + self._pause
        if self._say is not None:
            self._say(describe())


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
        awaited, asked, connected = "", False, f"{me.where(rank=True)} is connected to {where}, and waits"
        while True:
            waiting.look(partial(str.__add__, connected, awaited))
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
            if "go" in message:
                return channel.remote, channel.port


def _lost(me: Peer, where: str, reason: str) -> StartError:
    return StartError(
        f"{where}: rank 0 was gone before all had come ({reason}), says {me.where(rank=True)}: see its log"
    )


def introduce(channel: Channel, me: Peer) -> StartError | None:
    """Say who this is; the reason why there will be no start, if rank 0 at the other end knows one at once."""
    channel.send({"peer": asdict(replace(me, address=channel.local))})
    try:
        message = channel.receive(ANSWER_S) or {}
    except OSError:
        return None
    if "problem" not in message:
        return None
    return StartError(str(message["problem"]), exit_code=int(message.get("exit_code", 1)))


def unknown(place: Place, reason: str) -> str:
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
        none_known = all(lookup.tried.is_set() and not lookup.addresses for lookup in self._lookups)
        if none_known and (waited > limit or all(lookup.hopeless for lookup in self._lookups)):
            names = "; ".join(unknown(lookup.place, lookup.reason) for lookup in self._lookups)
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
            found.append(f"{name}{', '.join(each)}" if numbers else f"{unknown(place, lookup.reason)})")
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
