"""Addresses of this machine and of others, from the system's tables and from connections, never from what names say.

A host name may resolve to loopback, to nothing, or differently on every host. What can be relied on is which addresses
the interfaces have, which one the routing table leaves from, and the two ends of a connection that was made. Neither
torch nor anything of ours is imported here, so that a launcher may use it before either is loaded.
"""

import ctypes
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

NO_NAME = "it can be no name of a machine"  # why a text has no address
DISCARD = 9  # any port does: a datagram socket that is connected sends nothing


class _Interface(ctypes.Structure):
    """The first members of ``struct ifaddrs``, which are the same on Linux, macOS and the BSDs."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def resolve(host: str) -> list[str]:
    """Numeric addresses, IPv4 and IPv6, of a name, in the order in which the system would try them.

    A numeric address gives itself; brackets around one are ignored. A link-local address keeps its interface:
    ``fe80::1%eth0``. May take as long as the name servers do.

    Raises:
        OSError: no address, or this can be no name; ``strerror`` says why.
    """
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not name or "\0" in name:
        raise socket.gaierror(socket.EAI_NONAME, NO_NAME)
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except UnicodeError:  # two dots in a row, a part of more than 63 characters
        raise socket.gaierror(socket.EAI_NONAME, NO_NAME) from None
    addresses = [address_of(one[4]) for one in found if one[0] in (socket.AF_INET, socket.AF_INET6)]
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, "no address belongs to it")
    return list(dict.fromkeys(addresses))


def address_of(name: Sequence[Any]) -> str:
    """The address in what getsockname, getpeername, accept and getaddrinfo give.

    An IPv4 address that came in by an IPv6 socket is an IPv4 address; a link-local one has its interface.
    """
    address = str(name[0])
    with suppress(ValueError):
        parsed = ipaddress.ip_address(address)
        if isinstance(parsed, ipaddress.IPv6Address):
            if parsed.ipv4_mapped is not None:
                return str(parsed.ipv4_mapped)
            if parsed.is_link_local and "%" not in address and len(name) > 3 and name[3]:
                return f"{parsed}%{_interface_name(int(name[3]))}"
        return str(parsed)
    return address


def _interface_name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it has just been removed
        return str(index)


def socket_address(address: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """(family, what bind and connect take) of a numeric address.

    Raises:
        OSError: it is no numeric address, or has an interface that does not exist.
    """
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    family, _, _, _, name = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)[0]
    return family, name


def endpoint(address: str, port: int) -> str:
    """``10.0.0.1:29500``, ``[fd00::1]:29500``, ``node1:29500``: as people write it, and ``parse_endpoint`` reads it."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 address may stand in brackets, and has to where that is ambiguous.

    Raises:
        ValueError: it is not of this form; one line.
    """
    host, colon, port = text.strip().rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or "[" in host or "]" in host:
        raise ValueError("must be HOST:PORT, as node1:29400, 10.0.0.1:29400 or [fd00::1]:29400")
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
        raise ValueError("the port, after the last colon, must be an integer from 1 to 65535")
    return host, int(port)


def is_loopback(address: str) -> bool:
    """Whether a numeric address never leaves the machine that uses it (127.0.0.0/8, ::1, the unspecified ones)."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_loopback or parsed.is_unspecified


def is_link_local(address: str) -> bool:
    """Whether a numeric address means nothing without the interface that it is reached by."""
    try:
        return ipaddress.ip_address(address).is_link_local
    except ValueError:
        return False


def is_here(address: str) -> bool:
    """Whether a numeric address is one of this machine: its loopback, of an interface, or routed to itself.

    Binding to it says so, but for machines that may bind to any address (net.ipv4.ip_nonlocal_bind), and for multicast
    and broadcast addresses: there the tables have to agree.
    """
    if is_loopback(address):
        return True
    if any(_same(address, own) for addresses in interfaces().values() for own in addresses):
        return True
    try:
        family, name = socket_address(address, 0)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(name)
        return _same(source_address(address), address)
    except OSError:
        return False


def source_address(destination: str) -> str:
    """The numeric address of this machine from which the routing table would leave to ``destination``; sends nothing.

    Raises:
        OSError: no route leads there, or it is no numeric address.
    """
    family, name = socket_address(destination, DISCARD)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(name)
        return address_of(probe.getsockname())


def interface_of(address: str) -> str:
    """Name of the interface that has a numeric address; empty where none has it, or the system does not tell.

    Of several, the one that is named in a link-local address, else the first.
    """
    if is_loopback(address):
        return next((name for name, own in interfaces().items() if any(map(is_loopback, own))), "")
    return next((name for name, own in interfaces().items() if any(_same(address, one) for one in own)), "")


def interfaces() -> dict[str, list[str]]:
    """Numeric addresses of every interface that is up and has one, by name; empty where the system does not tell.

    IPv4 before IPv6, and those that only this link knows last.
    """
    found: dict[str, list[str]] = {}
    for name, address in listed():
        found.setdefault(name, []).append(address)
    return {name: sorted(own, key=lambda one: (is_link_local(one), ":" in one)) for name, own in found.items()}


def lasting(address: str, table: str = "/proc/net/if_inet6") -> str:
    """The address itself, or in place of a temporary IPv6 address that of the same interface and network that stays.

    Connections are made from temporary addresses (RFC 8981), as they do not name the machine; they go after some days.
    """
    try:
        with open(table) as file:
            rows = [line.split() for line in file]
        mine = ipaddress.IPv6Address(address.partition("%")[0])
        own = next(row for row in rows if int(row[0], 16) == int(mine))
        if not int(own[4], 16) & _TEMPORARY:
            return address
        network = ipaddress.IPv6Network((int(mine), int(own[2], 16)), strict=False)
        others = [row for row in rows if row[5] == own[5] and not int(row[4], 16) & (_TEMPORARY | _UNUSABLE)]
        found = (ipaddress.IPv6Address(int(row[0], 16)) for row in others)
        return next((str(one) for one in found if one in network), address)
    except (OSError, ValueError, IndexError, StopIteration):
        return address


_TEMPORARY, _UNUSABLE = 0x01, 0x08 | 0x20 | 0x40  # flags of an address; duplicate, deprecated, not yet tried
UP = 0x1  # IFF_UP
_SIZES = {socket.AF_INET: 16, socket.AF_INET6: 28}  # of struct sockaddr_in and sockaddr_in6


def listed() -> list[tuple[str, str]]:
    """(interface, address) of all interfaces that are up, in the order of getifaddrs."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        first = ctypes.POINTER(_Interface)()
        if library.getifaddrs(ctypes.byref(first)) != 0:
            return []
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return []
    found, one = [], first
    try:
        while one:
            entry = one.contents
            address = _numeric(entry.address) if entry.flags & UP else ""
            if address:
                found.append((os.fsdecode(entry.name), address))
            one = entry.next
    finally:
        library.freeifaddrs(first)
    return found


def _numeric(pointer: int | None) -> str:
    """The address in a ``struct sockaddr``; empty if it is of another family."""
    if not pointer:
        return ""
    # The BSDs have a byte of length before a byte of family, Linux has two bytes of family.
    head = ctypes.string_at(pointer, 2)
    family = int.from_bytes(head, sys.byteorder) if sys.platform == "linux" else head[1]
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, ctypes.string_at(pointer, _SIZES[socket.AF_INET])[4:8])
    if family == socket.AF_INET6:
        raw = ctypes.string_at(pointer, _SIZES[socket.AF_INET6])
        scope = int.from_bytes(raw[24:28], sys.byteorder)
        return address_of((socket.inet_ntop(socket.AF_INET6, raw[8:24]), 0, 0, scope))
    return ""


def _same(one: str, other: str) -> bool:
    """Whether two numeric addresses are one; an interface counts only where both name theirs."""
    (mine, _, scope), (yours, _, other_scope) = one.partition("%"), other.partition("%")
    try:
        equal = ipaddress.ip_address(mine) == ipaddress.ip_address(yours)
    except ValueError:
        return one == other
    return equal and (not scope or not other_scope or scope == other_scope)


def host_id() -> str:
    """The same in all processes that share a network stack, and on no other host; names do not count.

    Two containers of one machine with a network each are two hosts, whatever they are called; two that share it are
    one.
    Where the system has no network namespaces it is the host name.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()
