"""What goes into the attention slots and axis switches of a model: a table by what attention runs along.

=========  ==================================================================================================
along      on a mesh that cuts tokens over ring and ulysses
=========  ==================================================================================================
joint      over ulysses an exchange of tokens for heads, over a ring its own attention, or the one in the other
space      as joint; but where the switches before it have made the axis whole nothing is exchanged for heads
time       the core as it is: every process has all frames of its places
window     an exchange of places for heads, over ulysses and then over the ring: windows are whole behind it
cross      the core as it is: queries of this process, keys and values whole on every process
=========  ==================================================================================================

The core is the model's own, or a kernel's if one is named. What gathers tokens into windows has its core inside.
"""

import torch
from torch import nn

from acceleration import protocol
from acceleration.attention.core import KernelCore
from acceleration.attention.kernels import Kernel, kernel_for
from acceleration.distributed.mesh import Mesh
from acceleration.sequence.axis_switch import AxisExchange
from acceleration.sequence.head_exchange import HeadExchange
from acceleration.sequence.ring import RingAttention
from acceleration.sequence.ulysses import UlyssesAttention

IS_SPREAD = {
    "joint": True,
    "space": True,
    "time": False,
    "window": True,
    "cross": False,
}  # over the processes that share tokens


def fill_slots(model: nn.Module, mesh: Mesh, kernel: str = "auto", *, keeps: bool = False) -> None:
    """Put into every attention slot and switch what this mesh and kernel need; the model's own stays where it will do.

    Ulysses takes whatever core is inside; the ring works on the parts of a kernel and takes the core's place. With
    ``keeps`` selective recomputation must find what attention computed, which only a kernel of ours hands over.

    Raises:
        ValueError: attention along something unknown, or along space without switches.
    """
    chosen = kernel_for(kernel, torch.device(mesh.device_type))
    along: dict[str, protocol.AttentionAxis] = dict(model.attention_cores)  # type: ignore[arg-type]
    switches: dict[str, protocol.TokenAxis] = dict(model.axis_switches)  # type: ignore[arg-type]
    _check(model, along, switches)
    for pattern, axis in along.items():
        for parent, attribute, own in list(protocol.slots(model, [pattern])):
            core = own if kernel == "auto" and not keeps else KernelCore(chosen)
            if axis == "window":
                own.core = own.core if core is own else core
                core = _by_heads(own, mesh)
            elif IS_SPREAD[axis]:
                core = _spread(core, chosen, mesh)
            if core is not own:
                setattr(parent, attribute, core)
    if mesh["ulysses"].degree == 1:
        return
    for pattern, whole in switches.items():
        for parent, attribute, _ in list(protocol.slots(model, [pattern])):
            setattr(parent, attribute, AxisExchange(whole, mesh["ulysses"], mesh["ring"].rank))


def _spread(core: nn.Module, kernel: Kernel, mesh: Mesh) -> nn.Module:
    ring, ulysses = mesh["ring"], mesh["ulysses"]
    if ring.degree > 1:
        core = RingAttention(kernel, ring, ulysses.degree)
    if ulysses.degree > 1:
        core = UlyssesAttention(core, ulysses, ring.rank)
    return core


def _by_heads(core: nn.Module, mesh: Mesh) -> nn.Module:
    ring, ulysses = mesh["ring"], mesh["ulysses"]
    return HeadExchange(core, ring, ulysses) if ring.degree * ulysses.degree > 1 else core


def _check(model: nn.Module, along: dict[str, protocol.AttentionAxis], switches: dict[str, protocol.TokenAxis]) -> None:
    name = type(model).__name__
    if unknown := [f"{pattern}: {axis}" for pattern, axis in along.items() if axis not in IS_SPREAD]:
        raise ValueError(f"{name}.attention_cores: {unknown[0]!r} must be one of {', '.join(IS_SPREAD)}")
    if unknown := [f"{pattern}: {axis}" for pattern, axis in switches.items() if axis not in ("space", "time")]:
        raise ValueError(f"{name}.axis_switches: {unknown[0]!r} must be space or time")
    if "space" in along.values() and set(switches.values()) != {"space", "time"}:
        raise ValueError(f"{name}.axis_switches: attention along space needs a switch to space and one to time")
