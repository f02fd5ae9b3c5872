"""Where the processes of a start that no launcher introduced to each other meet: rank 0's server; sockets only.

Rank 0 listens on the first free of a few ports that all ranks compute alike, on every address of its machine, and
greets whoever connects with what it belongs to. A stranger on one of these ports (another job would do) greets
otherwise or not at all, and is passed over by those who look for rank 0 (search.py). Whoever finds it says who it is,
and keeps the connection until rank 0 says that all have come, or why they will not: then every process says it.
"""

import contextlib
import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from acceleration.distributed import addresses
from acceleration.distributed.addresses import endpoint
from acceleration.distributed.listening import allow_files, listen
from acceleration.distributed.peers import PROTOCOL, Peer, misfits, shared_devices, with_hosts
from acceleration.distributed.search import (
    ANSWER_S,
    GIVE,
    GREETING,
    MAX_BYTES,
    PAUSE_S,
    RESOLVE_PAUSE_S,
    RESOLVE_S,
    Channel,
    Place,
    Waiting,
    ask,
    introduce,
    unknown,
)
from acceleration.distributed.search import StartError as StartError
from acceleration.files.untrusted import short

TELL_S = 2.0  # between two times that those who came are told who has not
LINGER_S = 3.0  # how long rank 0 tells those who are late why there will be no start


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
        self._found: list[str] | str = "the name servers do not answer"  # addresses of the place, or why there are none
        self._visitors: set[_Visitor] = set()
        self._complete = threading.Event()  # all have come, or there is a problem
        self._lock = threading.RLock()
        allow_files(4 * me.world_size + 1024)  # a connection here, then one of the store, and those of groups
        self._wake, self._woken = socket.socketpair()
        self._listener, self.port = listen(me, ports, token, places)
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
        deadline, tell_at = time.monotonic() + timeout_s, time.monotonic() + TELL_S
        threading.Thread(target=self._look_for_another, daemon=True).start()
        while not self._complete.wait(PAUSE_S / 4):
            if time.monotonic() > deadline:
                self.refuse(StartError(self._failure(timeout_s)))
                break
            if time.monotonic() > tell_at:
                tell_at = time.monotonic() + TELL_S
                self._tell({"waiting": self.awaited()})
            waiting.look(self.awaited)
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
            f"{with_hosts(missing, self._hosts())}{self._who_left(missing)}"
        )

    def _hosts(self) -> Mapping[int, str]:
        """Host of each rank as the launcher says, unless somebody who came is on another of these hosts."""
        with self._lock:
            peers = [visitor.peer for visitor in self.came.values() if visitor.peer is not None]
        known = set(self.host_of.values())
        names = {peer.rank: {peer.host, peer.host.partition(".")[0]} & known for peer in peers}
        return {} if any(own and self.host_of[rank] not in own for rank, own in names.items()) else self.host_of

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
                peer = self._placed(Peer.from_text(json.dumps(message["peer"])), visitor.channel.remote)
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

    def _placed(self, peer: Peer, remote: str) -> Peer:
        """Virtual machines that were copied while they ran have one boot id: who comes from elsewhere is elsewhere."""
        if peer.host_id != self.me.host_id or addresses.is_here(remote):
            return peer
        return replace(peer, host_id=f"{peer.host_id}-{remote}")

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
            f"{with_hosts(missing, self._hosts())}; see their logs{self._who_left(missing)}; {self._likely(missing)}"
        )

    def _likely(self, missing: Sequence[int]) -> str:
        """Where rank 0 is to be found, and what may keep the others from it."""
        own = [one for addresses_ in addresses.interfaces().values() for one in addresses_]
        outward = [one for one in own if not addresses.is_loopback(one) and not addresses.is_link_local(one)]
        where = ", ".join(endpoint(one, self.port) for one in outward[:4]) or f"port {self.port}"
        text = f"rank 0 listens on {self.me.host} at {where}"
        odd = "".join(_leads(place, self._found, outward) for place in self.places[:1])
        them = "it" if len(missing) == 1 else "them"
        return text + (odd or f", where nothing of {them} arrived: {NOT_COME}")

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
                    self._found = found = addresses.resolve(place.host)
                except OSError as error:
                    self._found = error.strerror or str(error)
                    self._unknown(place, self._found, time.monotonic() - begun)
                    continue
                for answer in [ask(address, self.port, self.token) for address in found[:8]]:
                    if isinstance(answer, Channel):
                        self._meet_another(answer)
            self._complete.wait(RESOLVE_PAUSE_S)

    def _unknown(self, place: Place, reason: str, waited: float) -> None:
        """A name that rank 0's own machine does not know, nor anybody who came, is a mistake."""
        if place.expected and not self.came and (waited >= RESOLVE_S or reason == addresses.NO_NAME):
            self.refuse(StartError(f"{unknown(place, reason)}, tried for {waited:.1f} s); {GIVE}", exit_code=2))

    def _meet_another(self, answer: Channel) -> None:
        """Nothing, where that is this very server."""
        with contextlib.closing(answer):
            if answer.hello.get("instance") == self.instance:
                return
            if problem := introduce(answer, self.me):
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


def _leads(place: Place, found: list[str] | str, outward: Sequence[str]) -> str:
    """What is odd about where the others look for rank 0, if they know its name as this machine does.

    Args:
        found: addresses of the name, or why there are none.
        outward: this machine's own.
    """
    name = f"{place.variable}={short(place.host)}"
    if isinstance(found, str):
        return f"; {name} is no name that is known here ({found})"
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


NOT_COME = "not started, started with RANK=0 too, looking elsewhere (MASTER_ADDR, MASTER_PORT), or filtered"
