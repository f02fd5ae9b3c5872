"""Where the processes of a step that no launcher introduced to each other meet.

Rank 0 keeps a door: it listens on the first free of a few ports that all ranks compute alike, and tells whoever
connects what it belongs to and where its store is. A stranger on one of these ports (another job's store would do)
gives another answer or none, and is passed over; torch's own client would wait for it without end.
"""

import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from acceleration.distributed.peers import Peer

GREETING = "opensora"
ANSWER_S = 2.0  # a door answers at once; whoever takes longer is a stranger
PAUSE_S = 0.2  # between two rounds over the ports


class StartError(Exception):
    """The processes did not find each other. One line: which port of which host, or which ranks."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        """``exit_code``: for a command line; 1: it may go well the next time, 2: it will not."""
        super().__init__(message)
        self.exit_code = exit_code


class RendezvousServer:
    """Rank 0's side: answers every connection with ``opensora TOKEN PORT`` until it is closed."""

    def __init__(self, address: str, ports: Sequence[int], token: str, store_port: int) -> None:
        """
        Raises:
            StartError: every port is in use.
        """
        self._socket, self.port = _listen(address, ports)
        self._answer = f"{GREETING} {token} {store_port}\n".encode()
        self._thread = threading.Thread(target=self._serve, name="door", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:  # closed
                return
            with visitor, suppress(OSError):
                visitor.sendall(self._answer)

    def close(self) -> None:
        """Nobody else will come."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing alone does not
        self._socket.close()
        self._thread.join(timeout=ANSWER_S)


def rendezvous(
    me: Peer, address: str, ports: Sequence[int], token: str, timeout_s: float
) -> tuple[dist.Store, list[Peer]]:
    """A store that all ranks share, hosted by rank 0 on a port that the system picks, and all ranks.

    Args:
        ports: where rank 0's door may be, the same on all ranks, best first.
        token: without spaces; the same on all ranks of this attempt of this job and on nobody else.

    Raises:
        StartError: no port is free, a rank did not come within ``timeout_s`` seconds, or two share a device.
    """
    deadline = time.monotonic() + timeout_s
    rank, world_size = me.rank, me.world_size
    if rank == 0:
        limit = timedelta(seconds=timeout_s)
        store = dist.TCPStore("127.0.0.1", 0, world_size, True, limit, wait_for_workers=False)
        door = RendezvousServer(address, ports, token, store.port)
        try:
            return store, check_in(store, me, deadline - time.monotonic())
        finally:
            door.close()
    port = find_server(address, ports, token, deadline)
    limit = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        store = dist.TCPStore(address, port, world_size, False, limit, wait_for_workers=False)
    except dist.DistError as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise StartError(f"{address}:{port}: rank 0 ended before rank {rank} came ({reason})") from None
    peers = check_in(store, me, deadline - time.monotonic())
    store.set_timeout(timedelta(seconds=timeout_s))
    return store, peers


def check_in(store: dist.Store, me: Peer, timeout_s: float) -> list[Peer]:
    """Wait until every rank has come. Every rank calls this once for a store.

    Returns:
        what all of them said of themselves, by rank.

    Raises:
        StartError: some did not come within ``timeout_s`` seconds, rank 0 names them; or two share a device.
    """
    store = dist.PrefixStore("check-in", store)
    store.set(str(me.rank), me.to_text())
    if me.rank != 0:
        try:
            store.wait(["all"], timedelta(seconds=timeout_s + ANSWER_S))  # rank 0 speaks first
        except (dist.DistError, RuntimeError):
            raise StartError(f"rank {me.rank} on {me.host} came, others did not within {timeout_s:.0f} s") from None
    else:
        _await(store, me.world_size, timeout_s)
        texts = store.multi_get([str(other) for other in range(me.world_size)])
        peers = [Peer.from_text(text.decode()) for text in texts]
        store.set(
            "all", json.dumps({"problem": _shared([peer.device for peer in peers]), "peers": list(map(asdict, peers))})
        )
    said = json.loads(store.get("all"))
    if said["problem"]:
        if me.rank == 0:
            time.sleep(ANSWER_S / 2)  # the others read it before the store is gone
        raise StartError(said["problem"], exit_code=2)
    return [Peer(**one) for one in said["peers"]]


def _await(store: dist.Store, world_size: int, timeout_s: float) -> None:
    missing, deadline = list(range(world_size)), time.monotonic() + timeout_s
    while missing := [other for other in missing if not store.check([str(other)])]:
        if time.monotonic() > deadline:
            raise StartError(
                f"{world_size - len(missing)} of {world_size} processes came within {timeout_s:.0f} s; "
                f"missing: rank {ranges(missing)}; see their logs"
            )
        time.sleep(PAUSE_S / 4)


def _shared(devices: Sequence[str]) -> str:
    """Which ranks have the same device, in words; empty if none do."""
    for device in dict.fromkeys(devices):
        ranks = [rank for rank, one in enumerate(devices) if one == device]
        if device and len(ranks) > 1:
            return f"rank {ranges(ranks)} share one device ({device}): start one process per device"
    return ""


def find_server(address: str, ports: Sequence[int], token: str, deadline: float) -> int:
    """Port of rank 0's store, asked at its door.

    Raises:
        StartError: no door with this token before ``deadline`` (monotonic), with what was found instead.
    """
    begun = time.monotonic()
    while True:
        found: dict[int, str] = {}
        for port in ports:
            answer = _ask(address, port)
            words = answer.split()
            if words[:2] == [GREETING, token] and len(words) == 3:
                return int(words[2])
            found[port] = f"{port} {'is another job' if words[:1] == [GREETING] else answer or 'gives no answer'}"
        if time.monotonic() > deadline:
            raise StartError(
                f"rank 0 did not answer at {address} within {time.monotonic() - begun:.0f} s "
                f"(port {'; '.join(found.values())}): see its log, or set MASTER_ADDR and MASTER_PORT"
            )
        time.sleep(PAUSE_S)


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _listen(address: str, ports: Sequence[int]) -> tuple[socket.socket, int]:
    for port in ports:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an attempt that just ended is no obstacle
        try:
            listener.bind(("0.0.0.0", port))
            listener.listen(1024)
            return listener, port
        except OSError:
            listener.close()
    raise StartError(
        f"{address}: port {ranges(sorted(ports))} in use by another program; set MASTER_ADDR and a free MASTER_PORT"
    )


def _ask(address: str, port: int) -> str:
    """What the door at this port says; why there is none, in words, where nobody listens; '' from who is silent."""
    try:
        with socket.create_connection((address, port), timeout=ANSWER_S) as connection:
            return connection.makefile("r", errors="replace").readline(200).strip()
    except TimeoutError:
        return ""
    except OSError as error:
        return f"says {(error.strerror or str(error)).lower()}"
