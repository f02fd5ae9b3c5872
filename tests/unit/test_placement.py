"""Ranks on hosts: as few groups as possible have processes of several hosts, proved by trying every arrangement."""

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cache
from math import prod

import pytest

from acceleration.accounting.host_traffic import crossing, members
from acceleration.distributed.mesh import AXES
from acceleration.distributed.peers import Peer
from acceleration.distributed.placement import arrange, block_sizes, cost, host_names, place


def degrees_of(**degrees: int) -> dict[str, int]:
    return {axis: degrees.get(axis, 1) for axis in AXES}


def compositions(total: int, most: int) -> Iterator[tuple[int, ...]]:
    """Every way to have so many processes on at most so many hosts."""
    if total == 0:
        yield ()
    elif most:
        for first in range(1, total + 1):
            yield from ((first, *rest) for rest in compositions(total - first, most - 1))


def every_arrangement(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not any(counts):
        yield ()
    for host, count in enumerate(counts):
        if count:
            left = (*counts[:host], count - 1, *counts[host + 1 :])
            yield from ((host, *rest) for rest in every_arrangement(left))


@cache
def arrangements(counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(every_arrangement(counts))


def meshes_of(world: int) -> list[dict[str, int]]:
    """Every mesh of so many processes on up to three axes."""
    found = []
    for sizes in itertools.product([d for d in range(1, world + 1) if world % d == 0], repeat=5):
        wide = sum(size > 1 for size in sizes)
        if wide <= 3 and world % prod(sizes) == 0:
            tensor, ulysses, ring, cfg, shard = sizes
            replicate = world // prod(sizes)
            found.append(degrees_of(**locals_of(tensor, ulysses, ring, cfg, shard, replicate)))
    return found


def locals_of(*degrees: int) -> dict[str, int]:
    return dict(zip(("tensor", "ulysses", "ring", "cfg", "shard", "replicate"), degrees, strict=True))


@pytest.mark.parametrize("world", [2, 3, 4, 5, 6, 8])
def test_no_arrangement_has_fewer_groups_across_hosts(world: int) -> None:
    """At every level at once, and of those with as few the hosts of all groups are as few as can be, too."""
    for sizes in sorted({tuple(block_sizes(mesh)) for mesh in meshes_of(world)}):
        for counts in compositions(world, 4):
            costs = [cost(one, sizes) for one in arrangements(counts)]
            found = cost(arrange(counts, sizes), sizes)
            assert found == min(costs), (counts, sizes)
            for level in range(len(sizes)):
                assert found[level] == min(one[level] for one in costs), (counts, sizes, level)


def launched(counts: Sequence[int], order: str, seed: int) -> list[str]:
    """The host of each launcher rank."""
    if order == "block":
        return [f"h{host}" for host, count in enumerate(counts) for _ in range(count)]
    if order == "cyclic":
        turns = [(turn, host) for host, count in enumerate(counts) for turn in range(count)]
        return [f"h{host}" for _, host in sorted(turns)]
    hosts = launched(counts, "block", seed)
    random.Random(seed).shuffle(hosts)
    return hosts


@pytest.mark.parametrize("order", ["block", "cyclic", "shuffled"])
def test_any_order_of_the_launcher_comes_to_the_same(order: str) -> None:
    draw = random.Random(order)
    for seed in range(400):
        mesh = degrees_of(**{axis: draw.choice((1, 1, 2, 3, 4)) for axis in draw.sample(AXES, 3)})
        world = prod(mesh.values())
        cuts = sorted(draw.sample(range(1, world), min(world - 1, draw.randint(0, 4)))) if world > 1 else []
        counts = [b - a for a, b in itertools.pairwise([0, *cuts, world])]
        hosts = launched(counts, order, seed)
        ranks = place(hosts, mesh)
        assert sorted(ranks) == list(range(world)) and ranks[0] == 0 and ranks == place(hosts, mesh)
        by_rank = [host for _, host in sorted(zip(ranks, hosts, strict=True))]
        for size in block_sizes(mesh):
            whole = sum(len(set(by_rank[i : i + size])) == 1 for i in range(0, world, size))
            assert whole == sum(count // size for count in counts), (hosts, mesh)
        for host in set(hosts):  # processes of a host keep their order
            own = [rank for rank, one in zip(ranks, hosts, strict=True) if one == host]
            assert own == sorted(own)


def test_a_host_by_host_numbering_that_is_right_is_left_alone() -> None:
    for mesh in meshes_of(8):
        for counts in ((8,), (4, 4), (2, 2, 2, 2)):
            if all(count % size == 0 or size % count == 0 for count in counts for size in block_sizes(mesh)):
                assert place(launched(counts, "block", 0), mesh) == list(range(8))


def test_uneven_hosts_share_one_group_and_not_more() -> None:
    hosts = ["a"] * 3 + ["b"] * 5
    ranks = place(hosts, degrees_of(shard=4, ulysses=2))
    by_rank = [host for _, host in sorted(zip(ranks, hosts, strict=True))]
    assert crossing(degrees_of(shard=4, ulysses=2), by_rank) == {"shard": 2, "ulysses": 1}
    # Hosts in the order in which they are named would share two: 0 0, 0 1, 1 2, 2 2.
    assert arrange((3, 2, 3), [2]) == [0, 0, 0, 2, 1, 1, 2, 2]


def test_in_turns_as_slurm_does_with_cyclic_distribution() -> None:
    hosts = ["a", "b"] * 4
    mesh = degrees_of(shard=2, ulysses=4)
    assert place(hosts, mesh) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert crossing(mesh, hosts)["ulysses"] == 2  # all of them, as the launcher has them
    assert crossing(mesh, ["a"] * 4 + ["b"] * 4) == {"shard": 4, "ulysses": 0}


def test_groups_are_those_of_the_mesh() -> None:
    mesh = degrees_of(replicate=2, shard=2, ulysses=2, tensor=2)
    assert members(mesh, 2, "tensor", 5) == [4, 5]
    assert members(mesh, 2, "ulysses", 5) == [5, 7] and members(mesh, 2, "ulysses", 5, 1) == [5]
    assert members(mesh, 2, "shard", 5) == [1, 5] and members(mesh, 2, "replicate", 5) == [5, 13]
    assert members(mesh, 2, "fsdp", 5) == [1, 3, 5, 7] and members(mesh, 2, "replicas", 5) == [5, 13]
    assert members(mesh, 0, "fsdp", 5) == [5] and members(mesh, 0, "replicas", 5) == list(range(1, 16, 2))


def test_hosts_that_are_called_alike_have_their_address() -> None:
    peers = [
        Peer(rank=rank, world_size=3, host_id=str(host), host=name, address=f"10.0.0.{host}")
        for rank, (host, name) in enumerate(((1, "node"), (2, "node"), (3, "other")))
    ]
    assert host_names(peers) == ["node (10.0.0.1)", "node (10.0.0.2)", "other"]
    assert host_names([*peers[:1], *peers[2:]]) == ["node", "other"]


def test_thousands_of_processes() -> None:
    hosts = [f"h{rank % 129}" for rank in range(129 * 8)]
    ranks = place(hosts, degrees_of(shard=129, ulysses=8))
    assert ranks[0] == 0 and sorted(ranks) == list(range(129 * 8))
    by_rank = [host for _, host in sorted(zip(ranks, hosts, strict=True))]
    assert all(len(set(by_rank[i : i + 8])) == 1 for i in range(0, len(hosts), 8))
