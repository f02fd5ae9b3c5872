"""The port that rank 0 listens at, on all addresses of its machine; sockets only, torch is not needed."""

import contextlib
import errno
import socket
from collections.abc import Sequence
from contextlib import suppress

from acceleration.distributed.peers import Peer, ranges
from acceleration.distributed.search import Channel, Place, StartError, ask, introduce


def allow_files(count: int) -> None:
    """As many open files for this process as the system lets it have, where that is not enough."""
    with suppress(ImportError, OSError, ValueError):  # ImportError: Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(me: Peer, ports: Sequence[int], token: str, places: Sequence[Place]) -> tuple[socket.socket, int]:
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
                    problem = introduce(answer, me) or StartError(f"port {port} of {me.host}: another rank 0 is there")
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
