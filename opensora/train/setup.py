"""Where models and acceleration meet: from a configuration to a run that can take steps.

What a user can get wrong is checked before the process group exists, so that a mistake costs a second and one line.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from acceleration import lora
from acceleration import mesh as meshes
from acceleration import runtime as runtimes
from acceleration.checkpoint import CheckpointManager
from acceleration.checkpoint import SaveError as SaveError  # what saving raises, also for the command line
from acceleration.engines import Engine, build_engine, check_engine
from acceleration.memory import device_bytes
from acceleration.mesh import Mesh
from acceleration.optim import lr_at
from acceleration.parallelize import parallelize
from acceleration.plan import Fill
from acceleration.runtime import Runtime
from acceleration.sequence import SequenceParallel
from acceleration.signals import Interrupted as Interrupted  # what building raises, for the command line
from acceleration.signals import StopRequest
from opensora import config
from opensora.config import RunConfig
from opensora.datasets.index import IndexedTable
from opensora.datasets.plan import BatchPlan
from opensora.inference.load import FromFile, check_attention, check_layout, tile_runner, weight_layout
from opensora.models import build_model
from opensora.models.base import latent_grid
from opensora.models.mmdit.convert import load_state_dict_for
from opensora.models.text import build_text_encoder
from opensora.models.vae import autoencoder_shape, build_autoencoder
from opensora.train import features
from opensora.train.data import StepData, open_data, sharing
from opensora.train.disk import check_disk
from opensora.train.export import exported, write_export
from opensora.train.forecast import Traffic, check_memory
from opensora.train.guard import Guard
from opensora.train.guard import Hopeless as Hopeless  # what training raises, for the command line
from opensora.train.metrics import Metrics
from opensora.train.phases import Phases, start_phases
from opensora.train.preflight import check_processes
from opensora.train.reads import Reads
from opensora.train.resume import check_fresh, checkpoint_info, resume
from opensora.train.run_folder import RunLock
from opensora.train.step import Preparation
from opensora.utils import signals
from opensora.utils.errors import UserError
from opensora.utils.logging import MetricsLogger, announce
from opensora.utils.rng import torch_generator
from opensora.utils.weights import fingerprint
from opensora.utils.work import RunAll, one_by_one


@dataclass(kw_only=True)
class Run:
    """A run in memory. ``step`` counts updates made or left out and is, with the engine's tensors and what the guard
    remembers, its whole state."""

    cfg: RunConfig
    runtime: Runtime
    mesh: Mesh
    engine: Engine
    data: StepData
    prepare: Preparation
    checkpoints: CheckpointManager
    metrics: Metrics
    reads: Reads
    stop: StopRequest
    guard: Guard
    phases: Phases
    step: int
    traffic: Traffic | None  # on the process that writes records
    base: str | None = None  # fingerprint of the weights that adapters are trained beside
    lock: RunLock | None = None  # on the main process

    def lr_at(self, step: int) -> float:
        """Learning rate of update ``step``."""
        return lr_at(step, self.cfg.optim, self.cfg.train.steps)

    def at(self, phase: str) -> None:
        """``phase`` begins: for the watchdog, and the account of times."""
        self.phases.at(phase, self.step)

    def zero_loss(self) -> Tensor:
        """Where the shares of a step are added up."""
        return torch.zeros((), dtype=torch.float64 if self.runtime.device.type == "cpu" else torch.float32).to(
            self.runtime.device
        )

    def tokens(self, step: int) -> int:
        """Image tokens that update ``step`` works on, all processes together."""
        return self.data.global_elements(step) // self.cfg.model.in_channels

    def save(self) -> None:
        """Write a checkpoint of the state after ``step`` updates. Collective."""
        self.at("save")
        self.reads.check_agreement()
        with self.metrics.aside("save", self.mesh), signals.remember().saving():
            info = checkpoint_info(self.cfg, self.runtime, self.data.table, self.base) | {"guard": self.guard.state()}
            self.checkpoints.save(self.step, self.engine.state_dict(), info)

    def finish_saving(self) -> None:
        """Wait until the checkpoint is on disk. Collective."""
        self.at("save")
        with signals.remember().saving():
            self.checkpoints.wait()

    def export(self) -> None:
        """Write what sampling should use: of weights or adapters the moving average, if there is one. Collective.

        Raises:
            SaveError: it could not be written; the state is in the last checkpoint.
        """
        self.at("export")
        problem = write_export(self.cfg, self.engine, self.step, self.base, write=self.runtime.is_main)
        problem = self.checkpoints.from_main(problem)
        if problem:
            raise SaveError(f"not exported, {problem}; the run itself is saved: start it again when this is mended")
        announce(f"exported {exported(self.cfg)} weights of step {self.step} to {self.cfg.folder / 'exported'}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """End the data workers and leave the process group. Collective, unless an error is on its way out.

        Signals kill again: a process that failed must not outlive its launcher's patience.
        """
        self.data.close()
        self.metrics.close()
        self.checkpoints.close()
        self.phases.close()
        signals.forget()
        if kind is None:
            runtimes.stop()
        if self.lock is not None:
            self.lock.release()


def start_run(cfg: RunConfig) -> Run:
    """Check, join the process group, build, and load the newest checkpoint.

    Raises:
        UserError: what the user can mend, before the process group exists where possible.
        Interrupted: a process was asked to stop meanwhile.
    """
    ranks = runtimes.ranks_from_environment()
    table, plan = check(cfg, ranks.world_size)
    signals.remember()
    lock = RunLock(cfg.folder) if ranks.rank == 0 else None
    phases = None
    try:
        runtime = runtimes.start(cfg.parallel.timeout_s)
        phases = start_phases(cfg, runtime)
        run = build_run(cfg, table, plan, runtime, phases)
    except BaseException as error:
        if phases and isinstance(error, Interrupted):  # on every process
            phases.close()
            runtimes.stop()
        if lock is not None:
            lock.release()
        raise
    run.lock = lock
    return run


def check(cfg: RunConfig, world_size: int) -> tuple[IndexedTable, BatchPlan]:
    """Everything about the run that can be refused without a process group; reads the clip table.

    Raises:
        UserError: the layout or the table does not fit, with the key to change.
    """
    check_layout(cfg.parallel.mesh, world_size, cfg.model)
    check_attention(cfg.parallel.attention)
    try:
        check_engine(cfg.parallel)
    except ValueError as error:
        raise UserError(f"parallel.{error}") from None
    check_memory(cfg, world_size, device_bytes())
    shape = autoencoder_shape(cfg.vae)
    for resolution, rows in cfg.data.buckets.items():
        for frames in rows:
            try:
                latent_grid(int(frames), shape.stride[1], shape.stride[2], shape)
            except ValueError as error:
                raise UserError(f"data.buckets.{resolution}.{frames}: {error}") from None
    check_fresh(cfg)
    for key in ("init_from", "resume"):
        path = getattr(cfg.train, key)
        if path not in (None, "auto", "none") and not Path(path).exists():
            raise UserError(f"train.{key}={path}: no such file or folder")
    with torch.device("meta"):
        model = build_model(cfg.model)
        if cfg.lora.rank:
            add_adapters(cfg, model)
    check_disk(cfg, model)
    table, plan = open_data(cfg)
    if cfg.data.features:
        features.check(cfg, table, plan)
    return table, plan


def build_run(cfg: RunConfig, table: IndexedTable, plan: BatchPlan, runtime: Runtime, phases: Phases) -> Run:
    """Build, shard and load everything. Collective.

    Raises:
        Interrupted: a process was asked to stop meanwhile.
    """
    folder = cfg.folder
    asked = signals.remember()
    stop = StopRequest(lambda: asked.name is not None)
    stop.check()
    phases.at("build", 0)
    if cfg.train.preflight:
        check_processes(cfg, runtime)
    mesh = meshes.build(cfg.parallel.mesh, runtime.world_size, runtime.device)
    announce(f"{config.to_yaml(cfg)}\n{plan.report()}\n{layout(cfg, mesh)}")

    with torch.device("meta"):
        model = build_model(cfg.model)
    fill = initial_weights(cfg, model)
    base = None
    if cfg.lora.rank:
        assert cfg.train.init_from is not None
        base = fingerprint(cfg.train.init_from)
        fill = lora.Filled(fill, add_adapters(cfg, model))
        announce(adapted(model, cfg))
    parallelize(model, cfg.parallel, mesh, runtime.device, fill)
    engine = build_engine(model, cfg.parallel, cfg.optim, mesh)
    checkpoints = CheckpointManager(
        folder / "checkpoints",
        cfg.train.checkpoint_keep,
        in_background=cfg.train.checkpoint_async,
        report=announce,
    )
    stop.check()
    phases.at("load", 0)
    manifest = resume(cfg, engine, checkpoints, table.content, base)
    step = int(manifest["step"]) if manifest else 0
    stop.check()
    asked.lost = lambda: f"what was trained since the newest of {checkpoints.folder} will be trained again"
    if runtime.is_main:
        config.save(cfg, folder / config.SAVED_NAME)

    data = open_batches(cfg, table, plan, mesh, step)
    logger = open_logger(cfg, plan, step) if runtime.is_main else None
    metrics = Metrics(logger, every=cfg.train.log_every, start_step=step, total_steps=cfg.train.steps)
    return Run(
        cfg=cfg,
        runtime=runtime,
        mesh=mesh,
        engine=engine,
        data=data,
        prepare=build_preparation(cfg, mesh, runtime.device),
        checkpoints=checkpoints,
        metrics=metrics,
        reads=Reads(folder / "unreadable", table, mesh, cfg.data.max_bad_share),
        stop=stop,
        guard=Guard(cfg.guard, step, manifest.get("guard") if manifest else None),
        phases=phases,
        step=step,
        base=base,
        traffic=Traffic(cfg, mesh, data.assigned) if logger and has_formulas(cfg) else None,
    )


def open_batches(cfg: RunConfig, table: IndexedTable, plan: BatchPlan, mesh: Mesh, step: int) -> StepData:
    """What this process reads from update ``step`` on."""
    shape = autoencoder_shape(cfg.vae)
    return StepData(
        table,
        plan,
        cfg.data,
        mesh,
        shape,
        start_step=step,
        stop_step=cfg.train.steps,
        seed=cfg.seed,
        sharing=sharing(cfg, mesh),
    )


def has_formulas(cfg: RunConfig) -> bool:
    """Whether the bytes of a step can be predicted: by the native engine, all weights trained, one shape at a time."""
    return cfg.parallel.engine == "native" and not cfg.lora.rank and not cfg.data.tokens_per_sequence


def build_preparation(cfg: RunConfig, mesh: Mesh, device: torch.device) -> Preparation:
    """What turns batches into tokens; autoencoder and text encoder only where something is left to encode."""
    frozen = features.encoder_dtype(cfg)
    stored = bool(cfg.data.features)
    encoders = not stored or cfg.validate.every > 0  # samples while training need them
    autoencoder = build_autoencoder(cfg.vae, device, frozen) if encoders else None

    def tiles(peers: Mesh) -> RunAll:
        return tile_runner(cfg.train.vae_parallel, autoencoder, peers) if autoencoder else one_by_one

    whole = Preparation(
        autoencoder=autoencoder,
        text_encoder=build_text_encoder(cfg.text, device, frozen) if encoders else features.stored_text(cfg, device),
        flow=cfg.flow,
        patch=cfg.model.patch_size,
        cond_embed=cfg.model.cond_embed,
        guidance_embed=cfg.model.guidance_embed,
        sequence=SequenceParallel(mesh),
        seed=cfg.seed,
        device=device,
        run_tiles=tiles(mesh),
        stored=stored,
    )
    if not cfg.parallel.mesh.dynamic:
        return whole
    parts = [(degree, mesh.narrow(degree)) for degree in mesh.parts]
    narrow = {d: replace(whole, sequence=SequenceParallel(part), run_tiles=tiles(part)) for d, part in parts}
    return replace(whole, narrow=narrow)


def initial_weights(cfg: RunConfig, model: nn.Module) -> Fill:
    """What every parameter starts from: the weights at ``train.init_from``, or draws keyed by (seed, name).

    Raises:
        UserError: weights that do not fit the model, with a report of what is missing.
    """

    def draw(name: str, tensor: Tensor) -> None:
        model.init_parameter_(name, tensor, torch_generator(cfg.seed, "init", name))  # type: ignore[operator]

    if cfg.train.init_from is None:
        return draw
    # A file without cond_in (Flux) starts as if nothing were conditioned: cond_in is drawn, which is zero. Beside
    # adapters it would stay so, and sampling would miss it in the file: the model should be built without.
    missing = () if cfg.lora.rank else ("cond_in.*",)
    file, report = load_state_dict_for(model, cfg.train.init_from, to=weight_layout(cfg.model), allow_missing=missing)
    announce(str(report))
    return FromFile(file, otherwise=draw)


def add_adapters(cfg: RunConfig, model: nn.Module) -> Fill:
    """Give the model ``cfg.lora``'s adapters; returns what their parameters start from, draws keyed by (seed, name).

    Raises:
        UserError: a target that names no layer.
    """
    try:
        lora.apply(model, cfg.lora)
    except ValueError as error:
        raise UserError(f"lora.targets: {error}; layers are called as in single_blocks.0.linear1") from None
    return lambda name, tensor: lora.init_parameter_(name, tensor, torch_generator(cfg.seed, "init", name))


def adapted(model: nn.Module, cfg: RunConfig) -> str:
    """One line on what is trained."""
    sizes = [(lora.is_adapter(name), parameter.numel()) for name, parameter in model.named_parameters()]
    trained, total = sum(size for is_adapter, size in sizes if is_adapter), sum(size for _, size in sizes)
    layers = sum(is_adapter for is_adapter, _ in sizes) // 2
    return f"LoRA of rank {cfg.lora.rank} on {layers} layers: {trained:,} of {total:,} parameters are trained"


def open_logger(cfg: RunConfig, plan: BatchPlan, step: int) -> MetricsLogger:
    """Where the run's records go, from ``step`` on."""
    logger = MetricsLogger(
        cfg.folder,
        tensorboard=cfg.log.tensorboard,
        wandb=cfg.log.wandb,
        wandb_project=cfg.log.wandb_project,
        name=cfg.name,
        config=asdict(cfg),
        resumed_step=step,
    )
    if step:
        logger.note("resumed", step)
    report = plan.report()
    buckets = {str(bucket): count for bucket, count in report.per_bucket}
    left_out = dict(report.left_out)
    logger.note("started", step, steps=cfg.train.steps, rows=report.rows, buckets=buckets, left_out=left_out)
    return logger


def layout(cfg: RunConfig, mesh: Mesh) -> str:
    """One line on how the run is spread."""
    p = cfg.parallel
    return (
        f"{mesh.world_size} processes: {mesh}; {p.engine} engine, ZeRO {p.zero}, recompute {p.recompute.kind}, "
        f"{p.precision.compute}"
    )
