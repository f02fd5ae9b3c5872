import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist.harness import DistributedFailure, run_distributed


def _sum_of_ranks(offset: torch.Tensor) -> tuple[int, torch.Tensor]:
    value = offset + dist.get_rank()
    dist.all_reduce(value)
    return dist.get_rank(), value


def _one_rank_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("planted")
    dist.barrier()


def _one_rank_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _one_rank_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def _starts_its_own_group() -> int:
    dist.init_process_group("gloo")
    value = torch.ones(1)
    dist.all_reduce(value)
    return int(value)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order(world_size: int) -> None:
    results = run_distributed(_sum_of_ranks, world_size, torch.tensor([10.0], dtype=torch.float64))
    assert [rank for rank, _ in results] == list(range(world_size))
    expected = 10.0 * world_size + sum(range(world_size))
    assert all(value.item() == expected and value.dtype == torch.float64 for _, value in results)


def test_the_function_may_start_the_group_itself() -> None:
    assert run_distributed(_starts_its_own_group, 2, init=False) == [2, 2]


def test_a_rank_that_raises_surfaces_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(DistributedFailure, match=r"rank 1 failed: (?s:.)*ValueError: planted"):
        run_distributed(_one_rank_raises, 2)
    assert time.monotonic() - start < 30


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(DistributedFailure, match="rank 1 failed: died without a word, exit code 7"):
        run_distributed(_one_rank_dies, 2)


def test_a_hanging_rank_ends_with_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(DistributedFailure, match=r"had not finished after 2 s|rank 0 failed"):
        run_distributed(_one_rank_hangs, 2, timeout=2)
    assert time.monotonic() - start < 30


def _calls_one_that_does() -> None:
    _does()


def _does() -> None:
    run_distributed(_sum_of_ranks, 2)


def test_processes_are_prepared_for_whoever_reaches_them() -> None:
    """A test's time limit must not hold the minutes that importing torch takes on a busy machine."""
    from tests import conftest

    assert conftest._reaches(_calls_one_that_does, set()) and not conftest._reaches(_one_rank_dies, set())
    assert not conftest._reaches(_calls_itself, set())


def _calls_itself() -> None:
    _calls_itself()
