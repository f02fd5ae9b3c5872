"""Programs of ``test_meeting.py``, run in the hosts of a lab: ``meeting.py meet`` and ``meeting.py sockets``."""

import json
import os
import sys
import time
from contextlib import closing
from typing import Any


def tell(found: dict[str, Any]) -> None:
    """A line, by one write: lines of several processes stay whole."""
    print(f"{json.dumps(found)}\n", end="", flush=True)


def meet() -> None:
    """Start as every command does, sum over all processes, and print who is where. Limit and interface: arguments."""
    import torch
    import torch.distributed as dist

    from acceleration.distributed import runtime

    torch.set_num_threads(1)
    limit_s, interface = int(sys.argv[2]), sys.argv[3]
    found = runtime.start(limit_s, interface=interface)
    total = torch.ones(1) * (found.rank + 1)
    group = dist.new_group(list(range(found.world_size)), backend="gloo")
    dist.all_reduce(total, group=group)
    listed = [(peer.host, peer.address, peer.interface) for peer in found.peers]
    tell({"sum": total.item(), "peers": listed, "set": os.environ.get("GLOO_SOCKET_IFNAME")})
    runtime.stop()


def sockets() -> None:
    """Only the first part of a start, which needs no torch: rank, world size, port, limit, and names of rank 0."""
    from acceleration.distributed.peers import Peer
    from acceleration.distributed.rendezvous import RendezvousServer
    from acceleration.distributed.search import Place, Waiting, join

    rank, world_size, port, limit_s = map(int, sys.argv[2:6])
    me, places = Peer.here(rank, world_size), [Place(host, "MASTER_ADDR", expected=True) for host in sys.argv[6:]]
    waiting = Waiting(lambda text: print(f"{text}", file=sys.stderr, flush=True))
    if rank == 0:
        with closing(RendezvousServer(me, [port], "lab", places)) as server:
            peers = server.gather(limit_s, waiting)
            server.dismiss()
        tell({"met": [peer.host for peer in peers], "address": peers[0].address})
    else:
        tell({"met": join(me, places, [port], "lab", limit_s, waiting)})


if __name__ == "__main__":
    from acceleration.distributed.rendezvous import StartError

    begun = time.monotonic()
    try:
        {"meet": meet, "sockets": sockets}[sys.argv[1]]()
    except StartError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        tell({"seconds": time.monotonic() - begun})
        os._exit(error.exit_code)
