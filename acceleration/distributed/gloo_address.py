"""Groups on the CPU at one address of an interface that has several.

Told an interface, gloo listens at the first address that the system lists of it, which need not be the one by which the
other hosts reach this one: IPv4 that was never configured beside IPv6 that works, an address of another network. torch
passes on an interface only, so where the two differ its class for such groups is replaced by one with the address.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from acceleration.distributed import addresses

_GLOO: Any = getattr(distributed_c10d, "ProcessGroupGloo", None)  # a build of torch may lack it


def listen_at(address: str) -> None:
    """Groups that are made from now on listen at this address of this machine; empty: where torch would."""
    if _GLOO is not None:
        setattr(distributed_c10d, "ProcessGroupGloo", _at(address) if address else _GLOO)  # noqa: B010


def first_address(interface: str) -> str:
    """The address that gloo would take of an interface; empty if it has none."""
    return next((address for name, address in addresses.listed() if name == interface), "")


def _at(address: str) -> type:
    """What torch takes for ``ProcessGroupGloo``."""

    class ProcessGroupGloo(_GLOO):
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options = _GLOO._Options()
            options._devices = [_GLOO.create_device(hostname=address)]
            options._timeout = timeout
            options._threads = 2  # as torch has for one device
            super().__init__(store, rank, size, options)

    return ProcessGroupGloo
