"""A group from its start to its end: checks, the process group, models, a first step of each, and then jobs."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from acceleration.distributed import launcher_variables
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.agreement import Interrupted
from acceleration.distributed.runtime import Runtime
from opensora.config.load import config_from_argv
from opensora.inference.check import fit_option
from opensora.models.vae import autoencoder_shape
from opensora.serve.config import ServeConfig
from opensora.serve.jobs import LIVES_S, Job, JobQueue
from opensora.serve.queues import open_queue
from opensora.serve.store import Store
from opensora.serve.supervisor import GROUP
from opensora.serve.worker.describe import Costs, device_here, model_info, room_here
from opensora.serve.worker.desk import Desk
from opensora.serve.worker.finish import already_there
from opensora.serve.worker.lease import Lease
from opensora.serve.worker.loop import Loop
from opensora.serve.worker.models import Model, Prepared, load, prepare
from opensora.serve.worker.peers import GroupLost, Peers
from opensora.utils import signal_handler
from opensora.utils.console import announce
from opensora.utils.files.user_files import try_output

ABOUT = "Sample the jobs of a service, as a group of processes."
LOST = 85  # exit code where a process of the group is gone
NO_ID = f"video_{'0' * 32}"  # of the clip that a group warms up with


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 when the group was asked to stop, 85 when a process is lost, 86 when nothing moves any
    more, 87 when memory is beyond help; after these three the group is to be started again."""
    cfg = config_from_argv(ServeConfig, argv, ABOUT)
    stopped = when_asked(cfg)
    prepared = prepare(cfg, launcher_variables.ranks_from_environment().world_size)
    try_output(Path(cfg.out), "out", folder=True)
    parallel = prepared[0].cfg.parallel
    try:
        asked = lambda: stopped() is not None  # noqa: E731
        runtime = runtimes.start(parallel.timeout_s, asked, mesh=parallel.mesh, interface=parallel.interface)
    except Interrupted:
        return 0
    try:
        code = Group(cfg, prepared, runtime, stopped).run()
    except GroupLost as reason:
        announce(f"a process of the group is lost ({reason}); the group leaves", every_rank=True)
        return LOST
    runtimes.stop()
    return code


def when_asked(cfg: ServeConfig) -> Callable[[], float | None]:
    """When this process was first seen to be asked to stop, by ``time.monotonic``; None: it was not."""
    handler, seen = signal_handler.install(), list[float]()
    handler.promise = f"what runs may end within {cfg.workers.grace_s:g} s, then it goes back into the queue"
    handler.lost = lambda: "what runs goes to another group when its lease is over"

    def stopped() -> float | None:
        if handler.name is not None and not seen:
            seen.append(time.monotonic())
        return seen[0] if seen else None

    return stopped


class Group:
    """One process of it."""

    def __init__(
        self, cfg: ServeConfig, prepared: list[Prepared], runtime: Runtime, stopped: Callable[[], float | None]
    ) -> None:
        self.cfg, self.prepared, self.runtime, self.stopped = cfg, prepared, runtime, stopped
        self.store = Store(cfg.out)
        device, room = device_here(runtime.device), room_here(local_processes(runtime))
        self.costs = {one.name: Costs(one, runtime.world_size, device, room) for one in prepared}
        self.peers = Peers(prepared[0].cfg.parallel.timeout_s)
        self.models: dict[str, Model] = {}
        self.queue: JobQueue | None = None
        self.lease: Lease | None = None

    def run(self) -> int:
        """Returns the exit code. Collective.

        Raises:
            GroupLost: a process is gone.
        """
        try:
            if self.runtime.is_main:
                self._open()
            self.models = load(self.prepared, self.runtime)
            desk, exact = self._desk(), self.cfg.workers.exact
            loop = Loop(self.peers, self.store, self.models, self.costs, desk, exact=exact)
            self._warm_up(loop)
            signal_handler.stay_when_asked()
            announce(f"ready: {', '.join(self.models)} on {self.runtime.world_size} processes")
            return loop.run()
        finally:
            if self.lease is not None:
                self.lease.end()
            if self.queue is not None:
                self.queue.close()

    def _open(self) -> None:
        """The queue, a thread that says that this group is there, and what its models can do."""
        self.queue = open_queue(self.cfg, self.store)
        worker = os.environ.get(GROUP) or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._take_over(self.queue, previous(worker))
        timeout_s = self.prepared[0].cfg.parallel.timeout_s
        self.lease = Lease(lambda: open_queue(self.cfg, self.store), worker, self.cfg.workers.lease_s, timeout_s)
        self.lease.say(self._told())
        self.lease.start()
        for one in self.prepared:
            self._publish(one, None)

    def _take_over(self, queue: JobQueue, before: str | None) -> None:
        """Jobs of the group before this one, which is dead; or of all groups, where none has been heard of lately."""
        now = time.time()
        lately = queue.workers(now, LIVES_S)
        if before is None and lately:
            return
        if before in lately:  # its last word was that it is ready
            queue.beat(before, {**lately[before], "ready": False}, now)
        for job in queue.recover(self._finished, now, attempts=self.cfg.workers.attempts, worker=before):
            announce(f"{job.id}: {job.state}, after its group was lost")

    def _finished(self, job: Job) -> Mapping[str, Any] | None:
        """The result of a job whose files are there, whole."""
        owner = next((one for one in self.prepared if one.name == job.model), None)
        try:
            return already_there(self.store, job.id, owner.fps(job)) if owner else None
        except (ValueError, KeyError, TypeError):  # no request of this model: it is told when it is claimed
            return None

    def _told(self) -> dict[str, Any]:
        return {
            "models": [one.name for one in self.prepared],
            "ready": False,
            "job": None,
            "processes": self.runtime.world_size,
            "device": self.runtime.device.type,
            "seconds_per_step": None,
            "mfu": None,
            "memory_bytes": 0,
        }

    def _publish(self, one: Prepared, step_s: float | None) -> None:
        assert self.queue is not None
        self.queue.publish(one.name, model_info(one, self.costs[one.name], step_s).plain(), time.time())

    def _desk(self) -> Desk | None:
        if self.queue is None or self.lease is None:
            return None
        return Desk(self.queue, self.lease, list(self.models), self.cfg.workers, self.stopped, self._most)

    def _most(self, job: Job) -> int:
        """Clips like this one that may be made together: as many as are configured, as fit, and as keep their bits."""
        model = self.models[job.model]
        groups, most = model.parts.mesh.data_degree, self.cfg.workers.batch_size
        try:
            option, kind, shape = model.option(job), model.kind(job), model.shape(job)
            while most > 1 and not self.costs[job.model].fits(option, kind, -(-most // groups)):
                most //= 2
        except (ValueError, KeyError, TypeError):  # it will be refused by itself
            return 1
        refused = [clips for (key, clips), alike in model.batches.items() if key == shape and not alike]
        return max(1, min([most, *((clips - 1) * groups for clips in refused)]))

    def _warm_up(self, loop: Loop) -> None:
        for one in self.prepared:
            step_s = loop.warm_up(first_job(one))
            if self.runtime.is_main:
                self._publish(one, step_s)
        if self.lease is not None:
            self.lease.say({"ready": True})


def previous(worker: str) -> str | None:
    """The group that a supervisor has started before this one; None: this is the first, or nobody counts them."""
    base, _, number = worker.rpartition("-")
    return f"{base}-{int(number) - 1}" if os.environ.get(GROUP) == worker and number not in ("", "0") else None


def first_job(one: Prepared) -> Job:
    """The clip that a group warms up with, of the default size; it is in no queue."""
    option = fit_option("sampling", one.cfg.sampling, one.source.model, autoencoder_shape(one.source.vae))
    return Job(
        id=NO_ID,
        owner="",
        model=one.name,
        prompt="",
        request={"sampling": {"width": option.width, "height": option.height, "num_frames": option.num_frames}},
        steps=option.num_steps,
        batch_key="",
        state="running",
        created_at=time.time(),
    )


def local_processes(runtime: Runtime) -> int:
    """Processes that share this machine's memory."""
    hosts = [peer.host_id for peer in runtime.peers]
    return hosts.count(hosts[runtime.rank]) if hosts else 1
