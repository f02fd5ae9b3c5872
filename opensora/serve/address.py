"""Where a service listens, and how it is called. Standard library only."""

import socket

from opensora.utils.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address is none of this host, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(1024)
    except OSError as error:
        raise UserError(f"host={host} port={port}: {error.strerror}; take another, or port=0 for a free one") from error
    return opened


def url_of(opened: socket.socket) -> str:
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def free_port(host: str, port: int = 0) -> int:
    """``port``, or one that nobody listens on at the moment.

    Raises:
        UserError: as ``listen``.
    """
    with listen(host, port) as opened:
        return int(opened.getsockname()[1])


def address_of(host: str, port: int) -> str:
    """For a browser on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
