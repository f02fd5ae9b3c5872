"""What a network interface of this host has sent, as the kernel counts it."""

from pathlib import Path

COUNTERS = Path("/proc/net/dev")  # of the network namespace of the process that reads it
SENT = 8  # field of a line: bytes sent, after eight fields about what was received


def bytes_sent(interface: str) -> int | None:
    """Bytes sent since the interface was made, headers and acknowledgements and other programs' included.

    None where the system does not count, or has no such interface. What a network card sends past the kernel (RDMA)
    is not in it.
    """
    try:
        lines = COUNTERS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, colon, numbers = line.rpartition(":")
        if colon and name.strip() == interface:
            fields = numbers.split()
            return int(fields[SENT]) if len(fields) > SENT and fields[SENT].isdigit() else None
    return None
