"""What launchers start in tests: meets rank 0 at the address that it was told, and stays for as long as it is told.

``python meeting_worker.py SECONDS [FAILING_RANK CODE]``. SIGTERM ends it with 75, as training does. The rank that fails
does so in the first attempt, by its exit code or (a negative one) by a signal.
"""

import os
import signal
import socket
import sys
import time

LIMIT_S = 60.0
RANK, WORLD, ATTEMPT = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
ADDRESS, PORT = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def meet() -> None:
    """Rank 0 listens on all addresses; the others connect to the one that they were told."""
    if RANK == 0:
        with socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True) as server:
            server.settimeout(LIMIT_S)
            for _ in range(WORLD - 1):
                server.accept()[0].close()
        return
    limit = time.monotonic() + LIMIT_S
    while True:
        try:
            socket.create_connection((ADDRESS, PORT), 5).close()
            return
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    meet()
    said = f"attempt {ATTEMPT}: rank {RANK} of {WORLD} by {ADDRESS}\n"
    print(said, end="", flush=True)  # one write: lines of several ranks stay whole
    fails, code = (int(one) for one in (sys.argv[2:] or ("-1", "0")))
    if fails == RANK and ATTEMPT == 0:
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)
    time.sleep(float(sys.argv[1]))
