"""Which process takes which rank, so that the axes with the most traffic stay within a host.

A launcher numbers processes as it likes: host by host (block), in turns (cyclic), or in any order. On the mesh groups
of tensor are consecutive ranks, so are those of tensor x ulysses, then x ring, x cfg, x shard: blocks of ranks that
nest. Ranks are handed out such that at every level as few blocks as possible have processes of several hosts. That
can be had at all levels at once: a host of c processes holds at most floor(c / size) whole blocks of a size, and
because sizes divide one another the blocks of one level can be cut out of those of the next.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from acceleration.distributed.mesh import AXES
from acceleration.distributed.peers import Peer


def place(hosts: Sequence[Hashable], degrees: Mapping[str, int]) -> list[int]:
    """The rank in the process group of every launcher rank; the same on every process that calls it.

    Launcher rank 0 is rank 0, processes of one host keep their order, and hosts follow one another in the order in
    which the launcher names them first, unless that would make more groups cross hosts.

    Args:
        hosts: of every launcher rank, anything that tells hosts apart.
        degrees: of every axis; their product is the number of launcher ranks.
    """
    processes = Counter(hosts)
    names = list(processes)
    waiting = {host: iter([i for i, one in enumerate(hosts) if one == host]) for host in names}
    ranks = [0] * len(hosts)
    for rank, number in enumerate(arrange(list(processes.values()), block_sizes(degrees))):
        ranks[next(waiting[names[number]])] = rank
    return ranks


def host_names(peers: Sequence[Peer]) -> list[str]:
    """A name for the host of each process: the host's own, with its address where several hosts are called alike."""
    ids = {peer.host: {one.host_id for one in peers if one.host == peer.host} for peer in peers}
    order = list(dict.fromkeys(peer.host_id for peer in peers))
    return [
        peer.host if len(ids[peer.host]) == 1 else f"{peer.host} ({peer.address or order.index(peer.host_id)})"
        for peer in peers
    ]


def block_sizes(degrees: Mapping[str, int]) -> list[int]:
    """Ranks in a group of tensor, of tensor x ulysses, ..., of all but replicate; ascending, each once, without 1."""
    sizes, size = [], 1
    for axis in reversed(AXES[1:]):
        size *= degrees[axis]
        if degrees[axis] > 1:
            sizes.append(size)
    return sizes


def arrange(counts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The host of every rank, as its place in ``counts``.

    Args:
        counts: processes of every host.
        sizes: of the blocks at every level, ascending; each divides the next, the last divides the number of ranks.
    """
    consecutive = [host for host, count in enumerate(counts) for _ in range(count)]
    if _at_bound(consecutive, counts, sizes):
        return consecutive
    packed = _pack(dict(enumerate(counts)), sizes)
    return min(consecutive, packed, key=lambda ranks: cost(ranks, sizes))  # of equals the first


def _at_bound(hosts: Sequence[Hashable], counts: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether no arrangement can be better than ``hosts``: as many whole blocks as hosts can hold, and no mixed block
    with more hosts than it takes. So it is where all hosts have alike many, which are many in large worlds."""
    most = max(counts)
    for size in sizes:
        spans = Counter(len(set(hosts[i : i + size])) for i in range(0, len(hosts), size))
        if spans[1] < sum(count // size for count in counts) or not spans.keys() <= {1, -(-size // most)}:
            return False
    return True


def cost(hosts: Sequence[Hashable], sizes: Sequence[int]) -> tuple[int, ...]:
    """What an arrangement is judged by: blocks with several hosts, by level, the innermost first; then, by level, the
    hosts that all blocks have."""
    spans = [[len(set(hosts[i : i + size])) for i in range(0, len(hosts), size)] for size in sizes]
    return (*(sum(span > 1 for span in level) for level in spans), *(sum(level) for level in spans))


def _pack(counts: Mapping[int, int], sizes: Sequence[int]) -> list[int]:
    """As ``arrange``: whole blocks of one host each, and what is left of all hosts together in mixed ones."""
    if not sizes:
        return sorted(Counter(counts).elements())
    *inner, size = sizes
    blocks = [[host] * size for host, count in counts.items() for _ in range(count // size)]
    left = {host: count % size for host, count in counts.items() if count % size}
    blocks += [_pack(mixed, inner) for mixed in _mixed(left, inner, size)]
    return [host for block in sorted(blocks) for host in block]


def _mixed(left: Mapping[int, int], inner: Sequence[int], size: int) -> list[Counter[int]]:
    """What each block of ``size`` ranks has of every host, from hosts that have less than a block left.

    What a host has left is divided into whole blocks of the inner levels only, so that none of those is lost. Largest
    first they fill the blocks without a gap, because their sizes divide one another.
    """
    blocks: list[Counter[int]] = []
    todo = dict(left)
    for host in left:  # two that fill a block
        other = next((b for b in todo if b > host and host in todo and todo[host] + todo[b] == size), None)
        if other is not None:
            blocks.append(Counter({host: todo.pop(host), other: todo.pop(other)}))
    filled = len(blocks)
    blocks += [Counter() for _ in range(sum(todo.values()) // size)]
    for piece in sorted((1, *inner), reverse=True):
        for host in todo:
            while todo[host] >= piece:
                open_blocks = [block for block in blocks[filled:] if size - block.total() >= piece]
                # One that has this host already, else one that all it has left will fill, else the first.
                best = min(open_blocks, key=lambda block: (not block[host], size - block.total() != todo[host]))
                best[host] += piece
                todo[host] -= piece
    return [+block for block in blocks]
