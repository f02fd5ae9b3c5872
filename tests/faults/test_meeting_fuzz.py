"""Meetings at random: who comes, twice or not at all, when, with which names, past whom. Threads and sockets, no torch.

Whatever the situation, within its limit every process that came has met all others, or has one line that says why not.
"""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from acceleration.distributed import addresses, rendezvous, search
from acceleration.distributed.peers import Peer
from acceleration.distributed.rendezvous import RendezvousServer
from acceleration.distributed.search import Channel, Place, Search, StartError, Waiting, ask, join

CASES, AT_ONCE = 300, 24
LIMIT_S = 0.8  # of a start that cannot go well
PATIENCE_S = 30.0  # of one that can, on a busy machine
REFUSED, FILTERED = "192.0.2.1", "192.0.2.2"  # faked: nothing is sent there
HERE = "127.0.0.1"
NAMES: dict[str, tuple[list[str], bool]] = {  # addresses, and whether rank 0 is found
    "good": ([HERE], True),
    "refused first": ([REFUSED, HERE], True),
    "filtered first": ([FILTERED, REFUSED, HERE], True),
    "late": ([HERE], True),
    "elsewhere": ([REFUSED], False),
    "filtered": ([FILTERED], False),
    "unknown": ([], False),
}


@dataclass
class Case:
    """One start."""

    world: int
    ports: list[int]
    comers: list[tuple[Peer, str, float]]  # who, by which name it looks for rank 0, and after how many seconds
    strangers: dict[int, str]  # what else is at a port
    leaver: int | None  # a rank that comes and goes again
    goes_well: bool
    surplus: bool = False  # a rank is there twice


@dataclass
class Names:
    """What the faked name servers know; late names are unknown at first."""

    asked: dict[str, int] = field(default_factory=dict)

    def resolve(self, host: str) -> list[str]:
        name = host.partition("/")[0]
        self.asked[host] = self.asked.get(host, 0) + 1
        found = NAMES[name][0]
        if not found or (name == "late" and self.asked[host] < 3):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and dead addresses are faked, and pauses are short."""

    def fake(address: str, port: int, token: str | None = None) -> Channel | str:
        if address == REFUSED:
            return "refused"
        if address == FILTERED:
            time.sleep(0.2)
            return "no answer"
        return ask(address, port, token)

    monkeypatch.setattr(addresses, "resolve", Names().resolve)
    quicker = {
        "PAUSE_S": 0.02,
        "RESOLVE_PAUSE_S": 0.02,
        "RESOLVE_S": PATIENCE_S,  # a late name may be asked for the third time late, on a busy machine
        "LINGER_S": 0.4,
        "ANSWER_S": 0.4,
        "ask": fake,
    }
    for module in (rendezvous, search):
        for name, value in quicker.items():
            monkeypatch.setattr(module, name, value, raising=False)


def free_ports(rng: random.Random) -> Iterator[int]:
    """Ports, each once, that nothing on this machine uses."""
    for port in rng.sample(range(20000, 30000), 10000):
        try:
            socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
        except OSError:
            continue
        yield port


def drawn(rng: random.Random, ports: Iterator[int]) -> Case:
    """A start; most have nothing or one thing wrong with them."""
    world = rng.randint(1, 5)
    case = Case(world, [next(ports) for _ in range(rng.randint(1, 3))], [], {}, None, True)
    who = list(range(world))
    fault = rng.choice(
        ["", "", "", "missing", "twice", "world", "torch", "device", "ports", "name", "leaver", "other rank 0"]
    )
    if world == 1 and fault != "missing":
        fault = rng.choice(["", "ports"])
    if fault == "missing":
        who.remove(rng.choice(who))
    elif fault == "twice":
        who.append(rng.randint(1, world - 1))
        case.surplus = True
    elif fault == "other rank 0":
        who.append(0)
        case.surplus = True
    hosts = rng.randint(1, 3)
    for rank in who:
        host = f"h{rng.randrange(hosts)}"
        peer = replace(Peer.here(rank, world), host=host, host_id=host)
        name = rng.choice([name for name, (_, found) in NAMES.items() if found])
        case.comers.append((peer, f"{name}/{rng.random()}", rng.choice([0.0, 0.0, rng.uniform(0, 0.3)])))
    case.goes_well = fault in ("", "ports")
    if fault in ("world", "torch", "device", "name"):
        odd(case, rng, fault)
    if fault == "leaver":
        case.leaver, case.goes_well = rng.randint(1, world - 1), False
    taken = len(case.ports) if fault == "ports" and rng.random() < 0.5 else rng.randint(0, len(case.ports) - 1)
    case.strangers = {port: rng.choice(["silent", "talks", "other job", "closes"]) for port in case.ports[:taken]}
    case.goes_well &= taken < len(case.ports) and bool(case.comers)
    return case


def odd(case: Case, rng: random.Random, fault: str) -> None:
    """Gives one that is not rank 0 something that the others do not have."""
    index = rng.randrange(1, len(case.comers))
    peer, name, delay = case.comers[index]
    if fault == "world":
        peer = replace(peer, world_size=case.world + 1)
    elif fault == "torch":
        peer = replace(peer, torch="0.1")
    elif fault == "device":
        case.comers = [(replace(one, device=f"gpu {one.rank}"), *more) for one, *more in case.comers]  # type: ignore[misc]
        peer = replace(peer, device="gpu 0")
    else:
        name = f"{rng.choice(['elsewhere', 'filtered', 'unknown'])}/{rng.random()}"
    case.comers[index], case.goes_well = (peer, name, delay), False


def stranger(port: int, kind: str, stack: ExitStack) -> None:
    """Something else that listens at a port until the end of the case."""
    if kind == "other job":
        stack.enter_context(closing(RendezvousServer(Peer.here(0, 9), [port], "other")))
        return
    listener = stack.enter_context(socket.create_server(("", port)))
    held: list[socket.socket] = []

    def serve() -> None:
        try:
            while True:
                held.append(listener.accept()[0])
                if kind == "talks":
                    held[-1].sendall(b"220 ready\r\n")
                if kind == "closes":
                    held[-1].close()
        except OSError:
            return

    if kind != "silent":
        threading.Thread(target=serve, daemon=True).start()


def come(case: Case, peer: Peer, name: str, delay: float, limit_s: float) -> Any:
    """What became of one process."""
    time.sleep(delay)
    place, waiting = Place(name, "MASTER_ADDR", expected=True), Waiting(None)
    try:
        if peer.rank == 0:
            with closing(RendezvousServer(peer, case.ports, "token", [place])) as server:
                peers = server.gather(limit_s, waiting)
                server.dismiss()
            return [one.rank for one in peers]
        if peer.rank == case.leaver:
            Search(peer, [place], case.ports, lambda address, port: search.ask(address, port, "token")).find(
                limit_s, waiting
            ).close()
            return StartError("left")
        return join(peer, [place], case.ports, "token", limit_s, waiting)
    except StartError as error:
        return error


def outcomes(case: Case) -> list[Any]:
    """Of all who came."""
    limit_s = PATIENCE_S if case.goes_well else LIMIT_S
    with ExitStack() as stack:
        for port, kind in case.strangers.items():
            stranger(port, kind, stack)
        found: list[Any] = [None] * len(case.comers)

        def run(index: int, call: Callable[..., Any], *args: Any) -> None:
            try:
                found[index] = call(*args)
            except BaseException as error:
                found[index] = error

        threads = [
            threading.Thread(target=run, args=(index, come, case, *comer, limit_s), daemon=True)
            for index, comer in enumerate(case.comers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S + 10)
        return found


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_any_meeting_ends_in_one_of_two_ways(quick: None) -> None:
    rng = random.Random(20261129)
    ports = free_ports(rng)
    cases = [drawn(rng, ports) for _ in range(CASES)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = list(pool.map(outcomes, cases))
    assert {case.goes_well for case in cases} == {True, False}
    for case, found in zip(cases, ended, strict=True):
        context = f"{case}\n{found}"
        met = [one for one in found if not isinstance(one, StartError)]
        refused = [one for one in found if isinstance(one, StartError)]
        assert all(isinstance(one, (list, tuple)) for one in met), context
        if case.goes_well:
            assert not refused and [*range(case.world)] in met, context
        elif met:  # one too many, who came after all others had met
            assert case.surplus and len(met) == case.world and len(refused) == 1, context
        for error in refused:
            assert str(error) == "left" or (10 < len(str(error)) < 1200 and "\n" not in str(error)), context
