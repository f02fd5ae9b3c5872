"""Run a function as N gloo processes inside a test.

The processes are forked from a fork server that has imported torch once, so a group of four starts in a fraction
of a second. The parent hosts the rendezvous store on a port the system picks, as torchrun's agent does, so groups
never fight over a port and code under test may read the usual variables (RANK, WORLD_SIZE, MASTER_ADDR, ...).
"""

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

GRACE_S = 2.0  # after the first failure: how long the other ranks may still report their own
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "transformers.models.byt5",
    "opensora.train.loop",
    "tests.dist.preloaded",
]


class DistributedFailure(AssertionError):
    """One or more ranks failed; the message holds each failing rank's traceback."""


def warm_up() -> None:
    """Start the fork server and wait until it has imported ``PRELOAD``, which takes minutes on a busy machine.

    The first call of ``run_distributed`` does so; done before a test, it does not count in the test's time limit.
    """
    global _warm
    if not _warm:
        process = _context().Process(target=_nothing)
        process.start()
        process.join()
        _warm = True


_warm = False


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _nothing() -> None:
    """What the first process does."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, init: bool = True
) -> list[Any]:
    """Call ``fn(*args)`` in ``world_size`` processes and return the results in rank order.

    Args:
        fn: a top-level function of an importable module. Its result is pickled by value: return plain tensors
            (``full_tensor()`` of a DTensor), numbers, containers of those.
        timeout: seconds for the whole group, from when the fork server is ready; then every process is killed.
        init: start the gloo group before ``fn`` and end it after. False: ``fn`` starts the group itself from the
            environment, as under torchrun; what is still alive when it returns is ended all the same.

    Raises:
        DistributedFailure: a rank raised, died or ran out of time; no process is left behind.
    """
    warm_up()
    context = _context()
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout), multi_tenant=False
    )
    call = pickle.dumps((fn, args))  # by value: torch's own pickler would share memory that dies with its process
    processes: list[Any] = []
    connections: list[Connection] = []
    try:
        for rank in range(world_size):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(rank, world_size, store.port, call, sending, timeout, init)
            )
            process.start()
            sending.close()  # only the child holds it now, so its death is an end of file here
            processes.append(process)
            connections.append(receiving)
        return _collect(processes, connections, timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in connections:
            connection.close()


def _rank_main(
    rank: int, world_size: int, port: int, call: bytes, sending: Connection, timeout: float, init: bool
) -> None:
    """The life of one process: environment, group, the call, its result, a clean end."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent hosts the store; rank 0 must not try to
        OMP_NUM_THREADS="1",
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve must not matter
    try:
        fn, args = pickle.loads(call)
        if init:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        result = pickle.dumps(fn(*args))
        if dist.is_initialized():
            dist.barrier()  # leaving while a peer still talks aborts it now and then
            dist.destroy_process_group()
        sending.send_bytes(b"R" + result)
    except BaseException:
        sending.send_bytes(b"E" + traceback.format_exc().encode())
        sending.close()
        os._exit(1)  # a broken group must not be torn down: that can hang
    sending.close()


def _collect(processes: list[Any], connections: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        left = deadline - time.monotonic()
        ready = wait(list(waiting), timeout=max(left, 0))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                message = connection.recv_bytes()
            except EOFError:
                processes[rank].join(timeout=GRACE_S)
                failures[rank] = f"died without a word, exit code {processes[rank].exitcode}"
                continue
            if message[:1] == b"R":
                results[rank] = pickle.loads(message[1:])
            else:
                failures[rank] = message[1:].decode()
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        raise DistributedFailure("\n".join(f"rank {rank} failed: {text}" for rank, text in failures.items()))
    if waiting:
        raise DistributedFailure(f"ranks {sorted(waiting.values())} had not finished after {timeout} s")
    for rank, process in enumerate(processes):
        process.join(timeout=GRACE_S + 10)
        if process.exitcode != 0:
            raise DistributedFailure(f"rank {rank} returned its result, then ended with exit code {process.exitcode}")
    return [results[rank] for rank in range(len(processes))]
