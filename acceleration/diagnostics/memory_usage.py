"""How much memory this process used at its peak, and how much its device has."""

import resource
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_gib(device: torch.device) -> float:
    """Peak allocation on a GPU, or peak resident set of the process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere


def reset_peak(device: torch.device) -> None:
    """Let ``peak_gib`` of a GPU count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_bytes() -> int | None:
    """Memory of the smallest GPU that this process sees; None without one, where more can be had by swapping."""
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


def machine_bytes() -> int | None:
    """Memory and swap of this machine, or what its control group allows; None where that cannot be read."""
    try:
        pairs = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = {name: int(value.split()[0]) * 1024 for name, value in pairs if name in ("MemTotal", "SwapTotal")}
        total = sum(sizes.values())
    except (OSError, ValueError, IndexError):
        return None
    return min([total, *_allowed("/sys/fs/cgroup/memory.max")]) or None


def _allowed(path: str) -> list[int]:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []  # "max": no bound


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind these tensors on this process, each piece of memory counted once."""
    storages = {}
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Allocations(TorchDispatchMode):
    """Bytes of CPU tensors that a ``with`` block makes: ``now`` (at the end: what it leaves behind) and ``peak``.

    Every tensor that an operator returns is counted once with the memory behind it until that is freed or resized, in
    whatever thread: exact, where resident memory is not. Not counted are memory that was there before, what an
    operator needs inside, and buffers of the backend. A tensor of a mapped file counts. For a GPU ask its allocator.

    ``device_type="meta"``: bytes that tensors on the meta device would take elsewhere.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self._device_type = device_type
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # by the identity of a storage that is alive
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "Allocations":
        tracker, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            tracker._remember(storage, 0)
            before = storage.nbytes()
            result = resize(storage, size)
            tracker._change(id(storage), storage.nbytes() - before)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # counted where it works on its local tensors
        for tensor in self._tensors((args, kwargs)):
            self._remember(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            self._remember(storage, storage.nbytes())
        return result

    def _remember(self, storage: torch.UntypedStorage, size: int) -> None:
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = 0
            weakref.finalize(storage, self._forget, id(storage)).atexit = False
            self._change(id(storage), size)

    def _change(self, storage: int, by: int) -> None:
        self._sizes[storage] += by
        self.now += by
        self.peak = max(self.peak, self.now)

    def _forget(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)

    def _tensors(self, tree: Any) -> list[Tensor]:
        return [
            leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == self._device_type
        ]
