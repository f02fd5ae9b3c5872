"""Text encoder, denoiser and autoencoder take turns on the device (``offload``), and say what memory each needed.

Who calls one of them need not know: a call brings it in and sends the others out. The order of sampling, text, then all
steps, then pixels, makes that three moves for a batch of clips.

=======  ====================================  ==================================================================
offload  text encoder and autoencoder          denoiser
=======  ====================================  ==================================================================
none     on the device                         on the device, in pieces
models   on the device while they are called   on the device while it is called
blocks   on the device while they are called   in pinned CPU memory; the block that runs and the next on the device
=======  ====================================  ==================================================================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from acceleration.blocks.module_offload import OffloadedModule
from acceleration.config import ParallelConfig
from acceleration.diagnostics.memory_usage import peak_gib, reset_peak
from acceleration.distributed.mesh import Mesh

SampleOffload: TypeAlias = Literal["none", "models", "blocks"]
TEXT, IMAGE, DENOISER, AUTOENCODER = "text encoder", "image encoder", "denoiser", "autoencoder"
LOW_NOISE = "denoiser for low noise"  # the second of two experts, whose turn follows that of the first


class InTurn:
    """An autoencoder or another encoder whose calls take their turn; all else is asked of it as it is."""

    def __init__(self, owner: Any, name: str, turns: "Turns") -> None:
        self._owner, self._name, self._turns = owner, name, turns

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._owner, attribute)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        self._turns.take(self._name)
        return self._owner.encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        self._turns.take(self._name)
        return self._owner.decode(*args, **kwargs)


class Turns:
    """Whose turn it is on the device."""

    def __init__(
        self,
        device: torch.device,
        peak: Callable[[torch.device], float] = peak_gib,
        reset: Callable[[torch.device], None] = reset_peak,
    ) -> None:
        """``peak``: GiB in use at most since ``reset``; on a CPU, which has none, since the process began."""
        self.device = device
        self.peaks: dict[str, float] = {}  # GiB, by whose turn it was
        self._peak, self._reset = peak, reset
        self._movable: dict[str, list[OffloadedModule]] = {}
        self._now: str | None = None

    def add(self, name: str, modules: Sequence[nn.Module]) -> None:
        """Modules that wait outside until it is their turn."""
        self._movable[name] = [OffloadedModule(module, self.device) for module in modules]

    def of(self, name: str, owner: Any, offload: SampleOffload) -> Any:
        """An autoencoder or another encoder whose calls take their turn; with ``offload`` it waits outside."""
        if offload != "none":
            self.add(name, modules_of(owner))
        return InTurn(owner, name, self)

    def told_by(self, model: nn.Module, name: str = DENOISER) -> None:
        """Every forward of a denoiser takes its turn, before sharding looks for its pieces."""
        model.register_forward_pre_hook(lambda module, args: self.take(name), prepend=True)

    def forget(self, *names: str) -> None:
        """These will have no turn any more, and are kept no longer."""
        if self._now in names:
            self.note()
            self._now = None
        for name in names:
            self._movable.pop(name, None)

    def take(self, name: str) -> None:
        """It is the turn of ``name``: all others are outside, before it comes in."""
        if name == self._now:
            return
        self.note()
        for module in self._movable.get(self._now or "", []):
            module.send_out()
        self._reset(self.device)
        for module in self._movable.get(name, []):
            module.bring_in()
        self._now = name

    def note(self) -> None:
        """Remember how much memory the turn that is on has needed until now."""
        if self._now is not None:
            self.peaks[self._now] = max(self.peaks.get(self._now, 0.0), self._peak(self.device))

    def summary(self) -> str:
        """One line for the log: the peak of every turn."""
        self.note()
        where = "device" if self.device.type == "cuda" else "process, from its start"
        peaks = ", ".join(f"{name} {gib:.2f} GiB" for name, gib in self.peaks.items())
        return f"memory of the {where}, at most: {peaks}"


def for_sampling(parallel: ParallelConfig, offload: SampleOffload) -> dict[str, Any]:
    """What ``offload`` changes in a layout: blocks are gathered from CPU memory, one ahead of their use."""
    if offload != "blocks":
        return {}
    return {"offload": "parameters", "zero": 3, "prefetch": max(1, parallel.prefetch)}


def forecast(
    offload: SampleOffload, turn: str, without: int, kept: Mapping[str, int], *, block: int = 0, outside: int = 0
) -> int:
    """Most bytes of a turn, where ``without`` offload they are so many.

    Args:
        kept: bytes of weights that this process keeps of every model, by its turn.
        block: of the largest block, whole; outside: of the denoiser's weights outside of blocks, where blocks stream.
    """
    others = sum(size for name, size in kept.items() if name != turn)
    if offload == "none":
        return without
    if offload == "models":
        return without - others
    if turn == DENOISER:
        return without - others - kept[DENOISER] + block  # the next one
    return without - others + outside


def streams_blocks(mesh: Mesh) -> bool:
    """Whether every process keeps all weights (of its place on tensor), so that blocks stream without sharding."""
    return mesh.world_size == mesh["tensor"].degree


def modules_of(owner: Any) -> list[nn.Module]:
    """The torch modules that an autoencoder or a text encoder is made of."""
    if isinstance(owner, nn.Module):
        return [owner]
    return [value for value in vars(owner).values() if isinstance(value, nn.Module)]
