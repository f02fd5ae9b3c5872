"""Forecasts that a run uses itself: that its state fits the device, and the bytes that each step should send."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from acceleration.accounting import comm_volume, host_traffic
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from opensora.config.run import RunConfig
from opensora.datasets.plan.batch_plan import MicroBatch as PlannedBatch
from opensora.datasets.plan.batch_plan import PackedSequence
from opensora.planner.forecast import Forecaster, micro_batch_of_clip
from opensora.planner.meta_model import structure, told_frames
from opensora.utils.errors import UserError


def check_memory(cfg: RunConfig, world: int, device_bytes: int | None) -> None:
    """That weights, optimizer state, average and gradients alone, all held when the optimizer steps, fit the device.

    A lower bound: activations, buffers and frozen models are left out, so what is refused could never have run.

    Args:
        device_bytes: memory of a device; None: unknown, nothing is refused.

    Raises:
        UserError: they do not fit, with the key to change.
    """
    if device_bytes is None:
        return
    place = RankLayout(meshes.view(meshes.resolve(cfg.parallel.mesh, world)), cfg.parallel)  # the first has most
    least = Forecaster(cfg.model, cfg.optim, device_type="cuda", adapters=cfg.lora).state(place).total
    if least <= device_bytes:
        return
    need = f"{least / 2**30:.0f} GiB for weights, optimizer and gradients, and a device has {device_bytes / 2**30:.0f}"
    if cfg.lora.rank and cfg.lora.offload == "none":
        raise UserError(f"lora.offload=none: a process needs {need}: set lora.offload=blocks, or start more processes")
    if cfg.parallel.zero < 2:
        raise UserError(f"parallel.zero={cfg.parallel.zero}: a process needs {need}: set parallel.zero=3")
    raise UserError(
        f"parallel.mesh: a process of {world} needs {need}: start more processes, lower parallel.mesh.replicate, "
        "or choose a smaller model.size"
    )


class Traffic:
    """Bytes that this process, and this process's host, should send in every step of a run, by formula."""

    def __init__(
        self,
        cfg: RunConfig,
        mesh: Mesh,
        assigned: Callable[[int, Mesh], Sequence[PlannedBatch | PackedSequence]],
        hosts: Sequence[str] = (),
    ) -> None:
        """
        Args:
            assigned: (step, the mesh as a process sees it) -> that process's micro-batches.
            hosts: of every rank, this process's being the first; nothing where there is one.
        """
        self._cfg, self._assigned, self._hosts = cfg, assigned, hosts if len(set(hosts)) > 1 else ()
        self._mesh, self._place = mesh, RankLayout(mesh, cfg.parallel)
        whole = structure(cfg.model, told_frames(cfg.model, cfg.conditioning), cfg.lora)
        self._structure = whole.without_frozen() if cfg.lora.offload == "blocks" else whole

    def of_step(self, step: int) -> dict[str, int]:
        """Axis -> bytes of this process in update ``step``; of several hosts also ``hosts``: bytes leaving its own."""
        sent = comm_volume.step_bytes(self._structure, self._place, self._batches(step, self._mesh))
        return sent | ({"hosts": sum(self.leaving_host(step).values())} if self._hosts else {})

    def leaving_host(self, step: int) -> dict[str, int]:
        """Axis -> bytes that this process's host sends to other hosts in update ``step``; {} where there is one."""
        if not self._hosts:
            return {}
        degrees = {name: self._mesh[name].degree for name in meshes.AXES}
        backend = "nccl" if self._mesh.device_type == "cuda" else "gloo"
        seen = {rank: meshes.view(degrees, rank) for rank, host in enumerate(self._hosts) if host == self._hosts[0]}
        return host_traffic.leaving_host(
            self._structure,
            self._cfg.parallel,
            degrees,
            self._hosts,
            {rank: self._batches(step, mesh) for rank, mesh in seen.items()},
            self._hosts[0],
            backend,
        )

    def _batches(self, step: int, mesh: Mesh) -> list[MicroBatch]:
        """Of the process that sees ``mesh``, as formulas want them."""
        return [self._sizes(planned) for planned in self._assigned(step, mesh)]

    def _sizes(self, planned: PlannedBatch | PackedSequence) -> MicroBatch:
        """Of a pack all tokens together: what is sent does not depend on whose they are."""
        parts = [
            (micro_batch_of_clip(self._cfg, m.bucket.frames, (m.bucket.height, m.bucket.width)), len(m.sample_ids))
            for m in planned.parts
        ]
        if not isinstance(planned, PackedSequence):
            ((batch, samples),) = parts
            return replace(batch, samples=samples, degree=planned.degree)
        txt = sum(samples * batch.txt for batch, samples in parts)
        img = sum(samples * batch.img for batch, samples in parts)
        return MicroBatch(samples=1, txt=txt, img=img, packed=sum(samples for _, samples in parts))
