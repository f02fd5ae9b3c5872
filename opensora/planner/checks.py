"""Forecasts that a run uses itself: that its state fits the device, and the bytes that each step should send."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from acceleration.accounting import comm_volume
from acceleration.accounting.rank_layout import RankLayout
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from opensora.config.run import RunConfig
from opensora.datasets.plan.batch_plan import MicroBatch as PlannedBatch
from opensora.datasets.plan.batch_plan import PackedSequence
from opensora.planner.forecast import Forecaster, _as_seen, structure
from opensora.utils.errors import UserError


def check_memory(cfg: RunConfig, world: int, device_bytes: int | None) -> None:
    """That weights, optimizer state, average and gradients alone, all held when the optimizer steps, fit the device.

    A lower bound: activations, buffers and frozen models are left out, so what is refused could never have run.

    Args:
        device_bytes: memory of a device; None: unknown, nothing is refused.

    Raises:
        UserError: they do not fit, with the key to change.
    """
    # Adapters keep no state of the weights, and what is offloaded is not on the device.
    if device_bytes is None or cfg.lora.rank or cfg.parallel.offload != "none" or cfg.parallel.engine != "native":
        return
    place = RankLayout(meshes.view(meshes.resolve(cfg.parallel.mesh, world)), cfg.parallel)  # the first has most
    least = Forecaster(cfg.model, cfg.optim, device_type="cuda").state(place).total
    if least <= device_bytes:
        return
    need = f"{least / 2**30:.0f} GiB for weights, optimizer and gradients, and a device has {device_bytes / 2**30:.0f}"
    if cfg.parallel.zero < 2:
        raise UserError(f"parallel.zero={cfg.parallel.zero}: a process needs {need}: set parallel.zero=3")
    raise UserError(
        f"parallel.mesh: a process of {world} needs {need}: start more processes, lower parallel.mesh.replicate, "
        "or choose a smaller model.size"
    )


class Traffic:
    """Bytes that this process should send in every step of a run, by formula."""

    def __init__(
        self, cfg: RunConfig, mesh: Mesh, assigned: Callable[[int], Sequence[PlannedBatch | PackedSequence]]
    ) -> None:
        """``assigned``: step -> this process's micro-batches."""
        self._cfg, self._assigned = cfg, assigned
        self._place = RankLayout(mesh, cfg.parallel)
        self._structure = structure(cfg.model, bool(cfg.conditioning.masks))

    def of_step(self, step: int) -> dict[str, int]:
        """Axis -> bytes in update ``step``."""
        mine = [part for m in self._assigned(step) for part in m.parts]  # packs have no forecast
        batches = [_as_seen(self._cfg, m.bucket.frames, (m.bucket.height, m.bucket.width)) for m in mine]
        sized = [
            replace(batch, samples=len(m.sample_ids), degree=m.degree) for batch, m in zip(batches, mine, strict=True)
        ]
        return comm_volume.step_bytes(self._structure, self._place, sized)
