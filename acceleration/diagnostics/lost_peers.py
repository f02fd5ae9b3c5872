"""An exchange that fails because another process is gone: which one on which host, instead of a library's traceback."""

import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from acceleration.distributed.peers import Peer, ranges
from acceleration.distributed.runtime import Runtime

LINE = 300  # characters of what the library said
# What gloo and NCCL say, and what it means. A program's own errors match none of these.
_CLOSED = re.compile(
    r"connection (?:was )?(?:closed|reset) by (?:remote )?peer|broken pipe|socket closed|no route to host|"
    r"remote process exited|ncclRemoteError|connection timed out",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed out waiting \d+ ?ms for|watchdog caught collective operation timeout", re.IGNORECASE)
_ADDRESS = re.compile(r"\[([0-9A-Fa-f:.]+)(?:%\w+)?\]:\d+")
_FROM_TRANSPORT = re.compile(r"gloo|nccl|ProcessGroup", re.IGNORECASE)


class PeerLost(Exception):
    """Another process is gone. One line that names it; the run can be started again."""

    exit_code = 1


@contextmanager
def naming_lost_peers(runtime: Runtime, doing: str) -> Iterator[None]:
    """What the library of an exchange raises in the block, because another process has gone, becomes a line.

    Args:
        doing: in words, what this process does now, as ``building``.

    Raises:
        PeerLost: in place of it.
    """
    try:
        yield
    except Exception as error:
        check_lost(error, runtime, doing)
        raise


def check_lost(error: BaseException, runtime: Runtime, doing: str) -> None:
    """
    Raises:
        PeerLost: the error is of an exchange whose other side has gone.
    """
    if not isinstance(error, (RuntimeError, dist.DistError)):
        return
    reason = lost_peer(str(error), runtime.peers, runtime.rank)
    if reason is not None:
        raise PeerLost(f"rank {runtime.rank} on {socket.gethostname()}, {doing}: {reason}") from error


def lost_peer(text: str, peers: Sequence[Peer], rank: int) -> str | None:
    """What an error of an exchange means; None if it is none that another process's end explains.

    Args:
        peers: all processes, by rank; empty where they are not known.
        rank: of this one.
    """
    if not _FROM_TRANSPORT.search(text):
        return None
    said = re.sub(r"\[/[^\]]*\]\s*", "", " ".join(text.split()))[:LINE]
    said = re.split(r"\. (?:This is typically|Exception raised)", said)[0]
    if _CLOSED.search(text):
        who = _named(text, peers, rank)
        return f"{who} has ended or is cut off; look at its log, then start the same command again ({said})"
    if _LATE.search(text):
        who = _named(text, peers, rank)
        return f"{who} has not answered; look at the network and the logs, then start the same command again ({said})"
    return None


def _named(text: str, peers: Sequence[Peer], rank: int) -> str:
    """Host and ranks at the address in an error."""
    found = _ADDRESS.search(text)
    address = found[1] if found else ""
    here = peers[rank].host_id if rank < len(peers) else ""
    there = [i for i, peer in enumerate(peers) if peer.address == address and i != rank]
    if not there or all(peers[i].host_id == here for i in there):
        others = [i for i, peer in enumerate(peers) if i != rank]
        return f"rank {others[0]}" if len(others) == 1 else "another process"
    return f"host {peers[there[0]].host} ({address}; rank {ranges(there)})"
