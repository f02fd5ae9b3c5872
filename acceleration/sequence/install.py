"""What goes into the attention slots of a model."""

import torch
from torch import nn

from acceleration import protocol
from acceleration.attention.core import KernelCore
from acceleration.attention.kernels import kernel_for
from acceleration.distributed.mesh import Mesh
from acceleration.sequence.ring import RingAttention
from acceleration.sequence.ulysses import UlyssesAttention


def fill_slots(model: nn.Module, mesh: Mesh, kernel: str = "auto", *, keeps: bool = False) -> None:
    """Put into every attention slot what this mesh and kernel need; the model's own core stays where it will do.

    Ulysses takes whatever core is inside; the ring works on the parts of a kernel and takes the core's place. With
    ``keeps`` selective recomputation must find what attention computed, which only a kernel of ours hands over.
    """
    ring, ulysses = mesh["ring"], mesh["ulysses"]
    chosen = kernel_for(kernel, torch.device(mesh.device_type))
    for parent, attribute, own in list(protocol.slots(model, model.attention_cores)):  # type: ignore[arg-type]
        core = own if kernel == "auto" and not keeps else KernelCore(chosen)
        if ring.degree > 1:
            core = RingAttention(chosen, ring, ulysses.degree)
        if ulysses.degree > 1:
            core = UlyssesAttention(core, ulysses, ring.rank)
        if core is not own:
            setattr(parent, attribute, core)
