"""Whether the state can be true: all of it is finite, and copies are copies.

Of every process's part 64 bits are compared where parts must be equal.
Updates keep copies equal bit for bit. A copy that differs has been altered by something else, as by faulty memory, and
no loss would show it for a long time.
"""

from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration.distributed.mesh import REPLICATE, Axis, Mesh
from acceleration.engines.base import Engine
from acceleration.sharding import tensor_parallel

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements hashed at once: as many times 24 bytes are needed
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd; 2^64 / golden ratio


@torch.no_grad()
def digest(tensors: Iterable[Tensor]) -> Tensor:
    """int64 scalar, on the device of the tensors, that changes with any bit of them.

    The sum of all words, each times an odd number of its own, modulo 2^64: a single changed bit changes it always.
    """
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        words = tensor.contiguous().view(-1).view(_WORDS[tensor.element_size()])
        total = total.to(words.device) * _FACTOR
        for start in range(0, len(words), _CHUNK):
            part = words[start : start + _CHUNK]
            odd = torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=words.device)
            total += (part * odd).sum()
    return total


def differing(engine: Engine, model: nn.Module, mesh: Mesh) -> list[int]:
    """Ranks whose copy of the state is not what most others of its copies are; both, of two. Collective."""
    device = torch.device(mesh.device_type)
    suspect = torch.zeros(mesh.world_size, dtype=torch.int64, device=device)
    cuts = tensor_parallel.cuts(model)
    alike = (x for name, x in engine.held() if not any(name == cut or name.startswith(f"{cut}.") for cut in cuts))
    whole = (x for _, x in engine.held())
    for axis, tensors in ((mesh[REPLICATE], whole), (mesh["tensor"], alike)):
        if axis.degree > 1:
            mine = digest(tensors).to(device)
            suspect[dist.get_rank()] += _stands_alone(mine, axis)
    dist.all_reduce(suspect)
    return suspect.nonzero().flatten().tolist()


def is_finite(engine: Engine, mesh: Mesh) -> bool:
    """Whether weights, moments and average of all processes are. Collective."""
    finite = torch.tensor(1, device=torch.device(mesh.device_type))
    for _, held in engine.held():
        finite *= held.isfinite().all().to(finite.device)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def _stands_alone(mine: Tensor, axis: Axis) -> bool:
    everyone = [torch.empty_like(mine) for _ in range(axis.degree)]
    dist.all_gather(everyone, mine, group=axis.group)
    counts = Counter(int(one) for one in everyone)
    most = max(counts.values())
    usual = [value for value, count in counts.items() if count == most]
    return len(usual) > 1 or int(mine) != usual[0]
