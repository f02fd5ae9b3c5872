"""From processes that know how many they are to a store that all share, and a list of all of them on each."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from datetime import timedelta

import torch.distributed as dist

from acceleration.distributed import addresses
from acceleration.distributed.peers import Peer, misfits, ranges, shared_devices
from acceleration.distributed.rendezvous import RendezvousServer
from acceleration.distributed.search import (
    ANSWER_S,
    MAX_PAUSE_S,
    PAUSE_S,
    Place,
    Search,
    StartError,
    Waiting,
    ask,
    join,
)
from acceleration.files.untrusted import parsing

TELL_S = 5.0  # for a process that cannot start to tell the others why
PREFIX = "check-in"  # of keys in the store


def rendezvous(
    me: Peer,
    places: Sequence[Place],
    ports: Sequence[int],
    token: str,
    timeout_s: float,
    waiting: Waiting,
    host_of: Mapping[int, str] | None = None,
) -> tuple[dist.Store, list[Peer]]:
    """A store that all ranks share, and all of them. Rank 0 hosts it, on the port where the others found it.

    Args:
        places: where rank 0 may be, best first; need not be the same on all ranks.
        ports: where its server may be, the same on all ranks, best first.
        token: without spaces; the same on all ranks of this attempt of this job and on nobody else.
        host_of: host of each rank, as far as the launcher says so.

    Raises:
        StartError: no port is free, a rank did not come within ``timeout_s`` seconds, or they cannot be one start.
    """
    deadline = time.monotonic() + timeout_s
    if me.rank == 0:
        with closing(RendezvousServer(me, ports, token, places, host_of)) as server:
            peers = server.gather(timeout_s, waiting)
            store = _hosted(server, timeout_s)
            _publish(store, {"peers": [asdict(peer) for peer in peers]})
            server.dismiss()
        return store, peers
    try:
        address, port = join(me, places, ports, token, min(timeout_s, TELL_S) if me.problem else timeout_s, waiting)
    except StartError:
        if me.problem:  # known before the others were asked
            raise StartError(me.problem, exit_code=2) from None
        raise
    with parsing(lambda reason: StartError(f"{addresses.endpoint(address, port)}: rank 0 has ended ({reason})")):
        limit = timedelta(seconds=max(ANSWER_S, deadline - time.monotonic()))
        store = dist.TCPStore(address, port, me.world_size, False, limit, wait_for_workers=False)
        text = dist.PrefixStore(PREFIX, store).get("all").decode()
    store.set_timeout(timedelta(seconds=timeout_s))
    return store, _peers(text)


def _hosted(server: RendezvousServer, timeout_s: float) -> dist.TCPStore:
    """The store on the port of the server, whose listening socket it takes over."""
    own = [one for every in addresses.interfaces().values() for one in every]
    here = next(one for one in ("127.0.0.1", "::1", *own, "127.0.0.1") if addresses.is_here(one))
    limit = timedelta(seconds=timeout_s)
    world, descriptor = server.me.world_size, server.hand_over()
    with parsing(lambda reason: StartError(f"rank 0 cannot host the store on {server.me.host} ({reason})")):
        return dist.TCPStore(here, server.port, world, True, limit, wait_for_workers=False, master_listen_fd=descriptor)


def agent_store(
    me: Peer, places: Sequence[Place], port: int, timeout_s: float, waiting: Waiting
) -> tuple[dist.Store, list[Peer]]:
    """The store that torchrun's agent hosts, and all ranks.

    Raises:
        StartError: it was not found, or as ``check_in``.
    """
    begun = time.monotonic()
    with closing(Search(me, places, [port], ask).find(timeout_s, waiting)) as channel:
        address = channel.remote
        me = replace(me, address="" if addresses.is_here(address) else channel.local)
    left = max(ANSWER_S, timeout_s - (time.monotonic() - begun))
    where = addresses.endpoint(address, port)
    with parsing(lambda reason: StartError(f"{where}: no store of torchrun's agent answers there ({reason})")):
        store, _, _ = next(dist.rendezvous(f"tcp://{where}", me.rank, me.world_size, timeout=timedelta(seconds=left)))
    store.set_timeout(timedelta(seconds=timeout_s))
    return store, check_in(store, me, left, waiting)


def check_in(store: dist.Store, me: Peer, timeout_s: float, waiting: Waiting | None = None) -> list[Peer]:
    """Wait until every rank has come. Every rank calls this once for a store.

    Returns:
        what all of them said of themselves, by rank.

    Raises:
        StartError: some did not come within ``timeout_s`` seconds, or they cannot be one start; the same on all ranks.
    """
    waiting = waiting or Waiting(None)
    inside = dist.PrefixStore(PREFIX, store)
    inside.set(str(me.rank), me.to_text())
    if me.rank == 0:
        try:
            peers = _gathered(inside, me, timeout_s, waiting)
        except StartError as problem:
            _publish(store, {"problem": str(problem), "exit_code": problem.exit_code})
            time.sleep(ANSWER_S / 2)  # the others read it before the store is gone
            raise
        _publish(store, {"peers": [asdict(peer) for peer in peers]})
        return peers
    text = awaited(inside, "all", timeout_s + ANSWER_S, waiting, f"{me.where(rank=True)} waits for rank 0 to call all")
    if text is None:
        raise StartError(f"{me.where(rank=True)} came, others did not within {timeout_s:.0f} s")
    return _peers(text)


def _gathered(inside: dist.Store, me: Peer, timeout_s: float, waiting: Waiting) -> list[Peer]:
    world, deadline = me.world_size, time.monotonic() + timeout_s
    missing = list(range(world))
    while missing := [other for other in missing if not inside.check([str(other)])]:
        if time.monotonic() > deadline:
            raise StartError(
                f"{world - len(missing)} of {world} processes came within {timeout_s:.0f} s; "
                f"missing: rank {ranges(missing)}; see their logs"
            )
        waiting.look(
            lambda: f"rank 0 on {me.host} waits for {len(missing)} of {world} processes: rank {ranges(missing)}"
        )
        time.sleep(PAUSE_S / 4)
    peers = [_peer(text) for text in inside.multi_get([str(other) for other in range(world)])]
    own = next((peer.problem for peer in peers if peer.problem), "")
    if problem := own or misfits(peers) or shared_devices(peers):
        raise StartError(problem, exit_code=2)
    return peers


def awaited(store: dist.Store, key: str, timeout_s: float, waiting: Waiting, what: str) -> str | None:
    """The value of a key that another process sets; None if it does not within ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    pause = PAUSE_S / 20
    while time.monotonic() < deadline:  # store.wait would write lines of its own when it runs out of time
        with suppress(dist.DistError, RuntimeError):
            if store.check([key]):
                return store.get(key).decode()
        waiting.look(lambda: what)
        time.sleep(pause)
        pause = min(1.5 * pause, MAX_PAUSE_S / 4)
    return None


def _publish(store: dist.Store, said: Mapping[str, object]) -> None:
    dist.PrefixStore(PREFIX, store).set("all", json.dumps(said))


def _peer(text: bytes) -> Peer:
    try:
        return Peer.from_text(text.decode())
    except ValueError as error:
        raise StartError(f"a process of this start runs other code ({error}): install the same", exit_code=2) from None


def _peers(text: str) -> list[Peer]:
    """What rank 0 has published."""
    said = json.loads(text)
    if "problem" in said:
        raise StartError(said["problem"], exit_code=said["exit_code"])
    return [Peer(**one) for one in said["peers"]]
