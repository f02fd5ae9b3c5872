"""Which address and network interface each host of a start uses, and that every host reaches every other there.

Groups on the CPU (gloo) connect every process with every other. Left alone, gloo takes the address that the host name
resolves to, which on many machines is loopback. So the interface is chosen here: that by which the processes have met.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace

import torch.distributed as dist

from acceleration.distributed import addresses, gloo_address
from acceleration.distributed.addresses import endpoint, is_loopback
from acceleration.distributed.meeting import awaited
from acceleration.distributed.peers import MAX_NAMED, Peer, ranges, ranks_by_host
from acceleration.distributed.search import ANSWER_S, NO_ANSWER, Channel, StartError, Waiting, ask
from acceleration.files.untrusted import short

VARIABLES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")  # usual ones that choose an interface, first to last
KEY = "parallel.interface"
PROBES, PROBE_TRIES = 64, 2  # hosts that are tried at the same time, and how often each
LOOK_S = 60.0  # for all hosts to try all others, at most


@dataclass(frozen=True)
class Chosen:
    """An interface that a person chose."""

    interface: str
    by: str  # the variable or the key; empty: nobody chose
    problem: str = ""  # there is no such interface on this machine, or it has no address; one line


_ours: str | None = None  # what ``use`` has put into the environment, which then is nobody's choice


def chosen_interface(configured: str, env: Mapping[str, str] = os.environ) -> Chosen:
    """What the environment says, else the configuration."""
    given = [(name, env.get(name, "").strip()) for name in VARIABLES]
    given = [one for one in given if one[1] and not (env is os.environ and one == (VARIABLES[0], _ours))]
    by, value = [*given, (KEY, configured.strip())][0]
    names, there = [name.strip() for name in value.split(",") if name.strip()], addresses.interfaces()
    found = [name for name in names if there.get(name)]
    if not names:
        return Chosen("", "")
    if (
        not there or len(found) == len(names) or (found and by == KEY)
    ):  # the key is for all hosts, a variable for this one
        return Chosen((found or names)[0], by)
    listed = ", ".join(f"{one} ({', '.join(own[:3])})" for one, own in sorted(there.items()))
    problem = f"{by}={short(value)}: no such network interface on {socket.gethostname()}, or it has no address"
    return Chosen(names[0], by, f"{problem}; there are {listed}; choose one of them, or none")


def settle(
    store: dist.Store, rank: int, peers: Sequence[Peer], chosen: Chosen, timeout_s: float, waiting: Waiting
) -> list[Peer]:
    """Address and interface of every host, tried from every other. Collective over all processes.

    Args:
        rank: of this process.
        peers: all, by rank.

    Returns:
        the peers with them.

    Raises:
        StartError: a host has no address, or does not reach another; the same on all ranks.
    """
    hosts = ranks_by_host(peers)
    if len(hosts) == 1:
        address, interface = _within_host(chosen)
        return [replace(peer, address=address, interface=interface) for peer in peers]
    me, leaders = peers[rank], [peers[ranks[0]] for ranks in hosts.values()]
    inside, limit = dist.PrefixStore("network", store), min(timeout_s, LOOK_S)
    if me not in leaders:
        at = _places(inside, limit, waiting)
        _judged(inside, limit, waiting)
    else:
        with ExitStack() as opened:
            own = _own_addresses(me, leaders, chosen)
            listeners = [opened.enter_context(closing(_Listener(address, me.host_id))) for address in own]
            inside.set(f"at/{me.host_id}", json.dumps([listener.at for listener in listeners]))
            if rank == 0:
                _collect(inside, leaders, limit, waiting)
            at = _places(inside, limit, waiting)
            inside.set(f"reached/{me.host_id}", json.dumps(_unreached(me, leaders, at)))
            if rank == 0:
                _judge(inside, peers, at, limit, waiting)
            _judged(inside, limit, waiting)
    return [replace(peer, address=at[peer.host_id][0], interface=at[peer.host_id][1]) for peer in peers]


def use(me: Peer, chosen: Chosen) -> None:
    """Make groups on the CPU use this process's address and interface; the latter in its child processes too."""
    global _ours
    if chosen.by != VARIABLES[0] and me.interface:
        os.environ[VARIABLES[0]] = _ours = me.interface
    interfaces = os.environ.get(VARIABLES[0], "")
    other = me.address and "," not in interfaces and gloo_address.first_address(interfaces) != me.address
    gloo_address.listen_at(me.address if other else "")


def describe(peers: Sequence[Peer], backend: str, env: Mapping[str, str] = os.environ) -> str:
    """One line: the address and interface of each host, and what nccl will use, if it is; empty on one host."""
    hosts = ranks_by_host(peers)
    if len(hosts) == 1:
        return ""
    named = []
    for ranks in list(hosts.values())[:MAX_NAMED]:
        first = peers[ranks[0]]
        named.append(f"{first.host} (rank {ranges(sorted(peers[rank].rank for rank in ranks))}) {first.address}")
        named[-1] += f" ({first.interface})" if first.interface else ""
    more = f" and {len(hosts) - MAX_NAMED} more" if len(hosts) > MAX_NAMED else ""
    line = f"network: {len(hosts)} hosts: {', '.join(named)}{more}"
    if backend != "nccl":
        return line
    nccl = env.get("NCCL_SOCKET_IFNAME", "").strip()
    nccl = f"NCCL_SOCKET_IFNAME={short(nccl)}" if nccl else "its own choice (NCCL_SOCKET_IFNAME is not set)"
    return f"{line}; nccl uses {nccl}"


def _within_host(chosen: Chosen) -> tuple[str, str]:
    """Loopback, which no change of a network ends; what else there is where it is down."""
    there = addresses.interfaces()
    if chosen.interface:
        return next(iter(there.get(chosen.interface, [])), ""), chosen.interface
    every = [(address, name) for name, own in there.items() for address in own]
    return min(every, key=lambda one: not is_loopback(one[0]), default=("", ""))


def _own_addresses(me: Peer, leaders: Sequence[Peer], chosen: Chosen) -> list[str]:
    """This host's addresses for the others, best first, at most one of IPv4 and one of IPv6.

    Where the hosts met, or where the routing table leaves to the others; and of the same interface the other family.
    """
    others = [peer.address for peer in leaders if peer.host_id != me.host_id and peer.address]
    outward = [me.address] if me.address and not is_loopback(me.address) else []
    for other in others[:MAX_NAMED]:
        with suppress(OSError):
            outward.append(addresses.source_address(other))
    outward = [one for one in outward if not is_loopback(one)]
    own = addresses.interfaces().get(chosen.interface or (addresses.interface_of(outward[0]) if outward else ""), [])
    if chosen.interface:
        family = bool(outward) and ":" in outward[0]
        outward = [one for one in outward if one in own] or sorted(own, key=lambda one: (":" in one) != family)
    outward += [one for one in own if not addresses.is_link_local(one)]
    best = {":" in address: addresses.lasting(address) for address in reversed(outward)}
    return [best.pop(":" in address) for address in outward if (":" in address) in best]


At = tuple[str, str, int]  # where a host listens: address, interface and port


def _agreed(every: Mapping[str, Sequence[At]]) -> dict[str, At]:
    """Of every host the address of the family that all have: gloo connects no IPv4 with an IPv6 address.

    Args:
        every: all of each host, best first; rank 0's host first, whose best family wins if all have it.
    """
    for first, *_ in next(iter(every.values())):
        found = {host: [one for one in own if (":" in one[0]) == (":" in first)] for host, own in every.items()}
        if all(found.values()):
            return {host: own[0] for host, own in found.items()}
    return {host: own[0] if own else ("", "", 0) for host, own in every.items()}


class _Listener:
    """Says on which host it is, at the address that the host will use, to whoever connects."""

    def __init__(self, address: str, host_id: str) -> None:
        self._socket: socket.socket | None = None
        port = 0
        with suppress(OSError):
            family, name = addresses.socket_address(address, 0)
            self._socket = socket.create_server(name, family=family, backlog=1024)
            port = self._socket.getsockname()[1]
        self.at: At = (address, addresses.interface_of(address), port)
        self._answer = f"{host_id}\n".encode()
        threading.Thread(target=self._serve, name="network", daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while self._socket is not None:
                connection, _ = self._socket.accept()
                with connection, suppress(OSError):
                    connection.sendall(self._answer)

    def close(self) -> None:
        """All have tried."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing alone does not
            self._socket.close()


def _collect(inside: dist.Store, leaders: Sequence[Peer], limit: float, waiting: Waiting) -> None:
    """Let all know where every host listens, or which host does not say so: one key for all, as there may be many."""
    found: dict[str, list[At]] = {}
    for peer in leaders:
        text = awaited(inside, f"at/{peer.host_id}", limit, waiting, f"waiting for the address of {peer.where()}")
        if text is None:
            problem = f"{peer.where(rank=True)} came, and said no more within {limit:.0f} s: see its log"
            inside.set("at", json.dumps({"problem": problem}))
            time.sleep(ANSWER_S / 2)  # the others read it before the store is gone
            return
        found[peer.host_id] = [
            (str(address), str(interface), int(port)) for address, interface, port in json.loads(text)
        ]
    inside.set("at", json.dumps(_agreed(found)))


def _places(inside: dist.Store, limit: float, waiting: Waiting) -> dict[str, At]:
    """Where every host listens, by host_id."""
    text = awaited(inside, "at", limit + ANSWER_S, waiting, "waiting for the addresses of all hosts")
    if text is None:
        raise StartError(f"rank 0 was gone before all hosts had said where they are within {limit:.0f} s: see its log")
    found = json.loads(text)
    if "problem" in found:
        raise StartError(str(found["problem"]))
    return {host: (str(address), str(interface), int(port)) for host, (address, interface, port) in found.items()}


def _unreached(me: Peer, leaders: Sequence[Peer], at: Mapping[str, At]) -> dict[str, str]:
    """Why this host does not reach another, by host_id; nothing for those it reaches."""
    others = [peer for peer in leaders if peer.host_id != me.host_id and at[peer.host_id][2]]
    with ThreadPoolExecutor(PROBES) as pool:
        said = list(pool.map(lambda peer: _probe(peer, *at[peer.host_id]), others))
    return {peer.host_id: reason for peer, reason in zip(others, said, strict=True) if reason}


def _probe(peer: Peer, address: str, interface: str, port: int) -> str:
    reason = ""
    for _ in range(PROBE_TRIES):  # packets may be lost
        answer = ask(address, port)
        if isinstance(answer, Channel):
            with closing(answer), suppress(OSError):
                if answer.line(ANSWER_S).decode(errors="replace") == peer.host_id:
                    return ""
            return "another machine has this address too"
        reason = answer
    return "no answer (filtered, or another network)" if reason == NO_ANSWER else reason


def _verdict(inside: dist.Store, peers: Sequence[Peer], at: Mapping[str, At], limit: float, waiting: Waiting) -> str:
    """What keeps the hosts from one another, in words; empty if nothing does."""
    hosts = ranks_by_host(peers)
    name = {one: f"host {peers[ranks[0]].host} (rank {ranges(ranks)})" for one, ranks in hosts.items()}
    found = [f"{name[one]} has no address by which other hosts reach it" for one in hosts if not at[one][0]]
    found += [f"{name[one]} cannot listen at {at[one][0]}" for one in hosts if at[one][0] and not at[one][2]]
    for one in hosts:
        text = awaited(inside, f"reached/{one}", limit, waiting, f"waiting for {name[one]} to try the other hosts")
        unreached = {} if text is None else json.loads(text)
        if text is None:
            found.append(f"{name[one]} was gone before it had tried the other hosts")
        found += [
            f"{name[one]} cannot reach {name[other]} at {endpoint(at[other][0], at[other][2])}: {reason}"
            for other, reason in unreached.items()
        ]
    more = f"; and {len(found) - MAX_NAMED // 2} more" if len(found) > MAX_NAMED // 2 else ""
    remedy = f"; {KEY} (or {VARIABLES[0]}) chooses another interface"
    return f"{'; '.join(found[: MAX_NAMED // 2])}{more}{remedy}" if found else ""


def _judge(inside: dist.Store, peers: Sequence[Peer], at: Mapping[str, At], limit: float, waiting: Waiting) -> None:
    """Let all know the verdict, also that it is bad, before the store ends with rank 0."""
    verdict = _verdict(inside, peers, at, limit, waiting)
    inside.set("verdict", verdict)
    if verdict:
        time.sleep(ANSWER_S / 2)


def _judged(inside: dist.Store, limit: float, waiting: Waiting) -> None:
    problem = awaited(inside, "verdict", limit + ANSWER_S, waiting, "waiting for all hosts to try one another")
    if problem is None:
        raise StartError(f"rank 0 was gone before all hosts had tried one another within {limit:.0f} s: see its log")
    if problem:
        raise StartError(problem)
