"""Where models and acceleration meet: from a configuration to a run that can take steps.

What a user can get wrong is checked before the process group exists, so that a mistake costs a second and one line.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from acceleration import lora, protocol
from acceleration.accounting import host_traffic
from acceleration.checkpoint import CheckpointManager
from acceleration.checkpoint import SaveError as SaveError  # what saving raises, also for the command line
from acceleration.diagnostics import links
from acceleration.diagnostics.lost_peers import naming_lost_peers
from acceleration.diagnostics.memory_usage import device_bytes, machine_bytes
from acceleration.distributed import launcher_variables
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.agreement import Interrupted as Interrupted  # what building raises, for the command line
from acceleration.distributed.agreement import StopRequest
from acceleration.distributed.mesh import Mesh
from acceleration.distributed.placement import host_names
from acceleration.distributed.runtime import Runtime
from acceleration.engines import build_engine, check_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.assembly import stored_features
from opensora.assembly.components import tile_runner
from opensora.assembly.encoders import Encoders
from opensora.assembly.initial_weights import FileSource, adapted, add_adapters, check_initial, initial_weights
from opensora.assembly.layout import check_kernels, check_layout
from opensora.assembly.sharded_text import image_encoder_of, text_encoder_of
from opensora.assembly.token_layout import token_layout
from opensora.config.load import to_yaml
from opensora.config.run import SAVED_NAME, RunConfig
from opensora.datasets.decode import api
from opensora.datasets.loading import feature_store
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.table.index import IndexedTable
from opensora.inference.check import check_offload, fit_option, solver_of
from opensora.inference.load import verify_export
from opensora.models.base import AutoencoderShape, Width
from opensora.models.families import build_model, describe, family_of, other_encoders
from opensora.models.image import check_image_encoder
from opensora.models.text import check_text_encoder, has_mask
from opensora.models.vae import autoencoder_shape, build_autoencoder, check_autoencoder
from opensora.planner.checks import Traffic, check_memory
from opensora.schedulers import build_objective
from opensora.train.health.anomaly_guard import AnomalyGuard
from opensora.train.health.data_health import DataHealth
from opensora.train.health.preflight import check_processes
from opensora.train.health.step_timer import StepTimer, start_timer
from opensora.train.held_out import announce_held_out, held_out_loss, open_held_out
from opensora.train.metrics import Metrics
from opensora.train.preparation import Preparation
from opensora.train.run import Run
from opensora.train.state.disk_check import check_disk
from opensora.train.state.resume import check_fresh, check_paths, resume, wrong_info
from opensora.train.state.run_lock import check_places, write_config
from opensora.train.state.same_files import content, take_folder
from opensora.train.step_data import check_buckets, open_batches, open_data
from opensora.train.validate import announce_weights, check_prompts, check_references, read_prompts
from opensora.utils import signal_handler
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import fingerprint
from opensora.utils.files.user_files import absence
from opensora.utils.metrics_log import MetricsLogger, check_installed


def start_run(cfg: RunConfig) -> Run:
    """Check, join the process group, build, and load the newest checkpoint.

    Raises:
        UserError: what the user can mend, before the process group exists where possible.
        Interrupted: a process was asked to stop meanwhile.
    """
    ranks = launcher_variables.ranks_from_environment()
    launcher_variables.check_visible_devices()
    table, plan = check(cfg, ranks.world_size)
    if not cfg.data.features or (cfg.validate.every and cfg.validate.table):
        api.require(cfg.data.decoder)
    launcher_variables.check_meeting(ranks)  # before the run's folder is made
    if device_bytes() is None:  # the machine that it is started on, which a submitting one need not be
        check_memory(cfg, ranks.world_size, machine_bytes())
    check_prompts(cfg, ranks.world_size)
    signal_handler.install()
    lock = timer = None
    try:
        parallel, asked = cfg.parallel, signal_handler.install()
        runtime = runtimes.start(parallel.timeout_s, lambda: asked.name is not None, parallel.mesh, parallel.interface)
        timer = start_timer(cfg, runtime)
        with naming_lost_peers(runtime, "building"):
            lock = take_folder(cfg.folder, runtime)
            run = build_run(cfg, table, plan, runtime, timer)
    except BaseException as error:
        if timer and isinstance(error, Interrupted):  # on every process
            timer.close()
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
    check_kernels(cfg.parallel, cfg.optim)
    check_offload(cfg.lora.offload, "lora.offload")
    try:
        check_engine(cfg.parallel)
    except ValueError as error:
        raise UserError(f"parallel.{error}") from None
    check_memory(cfg, world_size, device_bytes())
    shape = autoencoder_shape(cfg.vae)
    check_buckets(cfg.data, shape, describe(cfg.model))
    check_places(cfg.folder)
    check_fresh(cfg)
    check_paths(cfg)
    with torch.device("meta"):
        model = build_model(cfg.model)
        if cfg.lora.rank:
            add_adapters(cfg, model)
    check_files(cfg, shape)
    check_disk(cfg, model)
    if jobs := read_prompts(cfg):
        check_references(cfg, jobs)
    if cfg.data.features:
        feature_store.read_manifest(Path(cfg.data.features))
    table, plan = open_data(cfg)  # after what a look can tell: the index of a large table takes its time
    open_held_out(cfg)
    if cfg.data.features:
        stored_features.check(cfg, table, plan)
    return table, plan


def check_files(cfg: RunConfig, shape: AutoencoderShape) -> None:
    """That the files and packages that the run will want are there, as far as names and headers tell.

    Raises:
        UserError: one is not, with its key.
    """
    check_initial(cfg)
    _announce_other_encoders(cfg)
    if cfg.data.root and (reason := absence(cfg.data.root, "folder")):
        raise UserError(f"data.root={cfg.data.root}: {reason}; give the one that paths in data.table start at")
    if not cfg.data.features or cfg.validate.every:
        check_autoencoder(cfg.vae)
        check_text_encoder(cfg.text, Width(shape.channels, f"vae.kind={cfg.vae.kind}"), cfg.model)
        check_image_encoder(cfg.image_encoder, cfg.model)
    if cfg.validate.every and cfg.validate.makes_clips:
        fit_option("validate.sampling", cfg.validate.sampling, cfg.model, shape)
        solver_of("validate.sampling", cfg.validate.sampling, cfg.objective)
    check_installed(cfg.log)


def _announce_other_encoders(cfg: RunConfig) -> None:
    """Say so where published weights are trained on features of encoders that they were not made with."""
    if cfg.train.init_from is None:
        return
    place = Path(cfg.train.init_from)
    of_a_run = ((place if place.is_dir() else place.parent) / SAVED_NAME).is_file()
    if not of_a_run and (other := other_encoders(cfg.model, cfg.vae, cfg.text)):
        announce(other)


def build_run(cfg: RunConfig, table: IndexedTable, plan: BatchPlan, runtime: Runtime, timer: StepTimer) -> Run:
    """Build, shard and load everything. Collective.

    Raises:
        Interrupted: a process was asked to stop meanwhile.
    """
    folder = cfg.folder
    asked = signal_handler.install()
    stop = StopRequest(lambda: asked.name is not None)
    stop.check()
    timer.enter("build", 0)
    if cfg.train.preflight:
        rates = folder / links.NAME if runtime.world_size > 1 else None
        check_processes(cfg, runtime, content(cfg, table), rates)
    mesh = meshes.build(cfg.parallel.mesh, runtime.world_size, runtime.device)
    announce(f"{to_yaml(cfg)}\n{plan.report()}\n{layout(cfg, mesh)}")

    with torch.device("meta"):
        model = build_model(cfg.model)
    if cfg.train.init_from:
        verify_export(Path(cfg.train.init_from))
    fill = weights = initial_weights(cfg, model)
    base = None
    if cfg.lora.rank:
        assert cfg.train.init_from is not None
        base = fingerprint(cfg.train.init_from)
        fill = lora.LoraSource(fill, add_adapters(cfg, model))
        announce(adapted(model, cfg))
    streams = cfg.lora.offload == "blocks"
    parallelize(model, cfg.parallel, mesh, runtime.device, fill, streams_frozen=streams)
    if isinstance(weights, FileSource):
        weights.check_values()
    engine = build_engine(model, cfg.parallel, cfg.optim, mesh)
    checkpoints = CheckpointManager(
        folder / "checkpoints",
        cfg.train.checkpoint_keep,
        in_background=cfg.train.checkpoint_async,
        report=announce,
        wrong=wrong_info,
    )
    stop.check()
    timer.enter("load", 0)
    manifest = resume(cfg, engine, checkpoints, table.content, base)
    step = int(manifest["step"]) if manifest else 0
    stop.check()
    asked.lost = lambda: f"what was trained since the newest of {checkpoints.folder} will be trained again"
    asked.promise = "saving the state and stopping after this step"
    if runtime.is_main:
        write_config(cfg)

    data, held_out = open_batches(cfg, table, plan, mesh, step), open_held_out(cfg)
    prepare = build_preparation(cfg, mesh, runtime.device)
    if held_out and runtime.is_main:
        announce_held_out(held_out, table)
    announce_weights(cfg)
    logger = open_logger(cfg, plan, step) if runtime.is_main else None
    hosts = host_names(runtime.peers)
    several = len(set(hosts)) > 1
    metrics = Metrics(
        logger,
        every=cfg.train.log_every,
        start_step=step,
        total_steps=cfg.train.steps,
        # NCCL may send past the kernel and by interfaces of its own.
        interface=runtime.peers[runtime.rank].interface if several and runtime.device.type == "cpu" else "",
    )
    traffic = Traffic(cfg, mesh, data.assigned_to, hosts) if logger and has_formulas(cfg) else None
    if several:
        announce(
            host_traffic.summary(
                {name: mesh[name].degree for name in meshes.AXES},
                hosts,
                [peer.rank for peer in runtime.peers],
                traffic.leaving_host(step) if traffic else {},
            )
        )
    return Run(
        cfg=cfg,
        runtime=runtime,
        mesh=mesh,
        engine=engine,
        data=data,
        prepare=prepare,
        checkpoints=checkpoints,
        metrics=metrics,
        reads=DataHealth(folder / "unreadable", table, mesh, cfg.data.max_bad_share),
        stop=stop,
        guard=AnomalyGuard(cfg.guard, step, manifest.get("guard") if manifest else None),
        timer=timer,
        step=step,
        base=base,
        traffic=traffic,
        prompts=read_prompts(cfg),
        held_out=held_out_loss(cfg, held_out, prepare, mesh),
    )


def has_formulas(cfg: RunConfig) -> bool:
    """Whether the bytes of a step can be predicted exactly: those of the native engine, but for packs of texts with
    padding, which they leave out; for adapters on some layers alone, below which nothing goes backward, as below a
    first block that is not trained; and for a base that streams."""
    packs_padding = cfg.data.tokens_per_sequence and has_mask(cfg.text)
    if cfg.parallel.engine != "native" or packs_padding:
        return False
    if cfg.lora.rank:
        return set(cfg.lora.targets or ()) == set(family_of(cfg.model).lora_targets) and cfg.lora.offload == "none"
    with torch.device("meta"):
        first = protocol.blocks(build_model(cfg.model))[0]
    return any(parameter.requires_grad for parameter in first.parameters())


def build_preparation(cfg: RunConfig, mesh: Mesh, device: torch.device) -> Preparation:
    """What turns batches into tokens, for all processes of a sample and, with ``mesh.dynamic``, for parts of them."""
    encoders = build_encoders(cfg, mesh, device)

    def of(peers: Mesh) -> Preparation:
        tiles = tile_runner(cfg.train.vae_parallel, encoders.autoencoder, peers)
        return Preparation(
            encoders=replace(encoders, run_tiles=tiles),
            objective=build_objective(cfg.objective),
            conditioning=cfg.conditioning,
            model=cfg.model,
            layout=token_layout(cfg.model, SequenceParallel(peers)),
            autoencoder=autoencoder_shape(cfg.vae),
            seed=cfg.seed,
            reduction=cfg.train.loss_reduction,
        )

    by_degree = {degree: of(mesh.submesh(degree)) for degree in mesh.subgroups} if cfg.parallel.mesh.dynamic else {}
    return replace(of(mesh), by_degree=by_degree)


def build_encoders(cfg: RunConfig, mesh: Mesh, device: torch.device) -> Encoders:
    """Autoencoder and text encoder, only where something is left to encode. Collective."""
    dtype, stored = stored_features.encoder_dtype(cfg), bool(cfg.data.features)
    if stored and not cfg.validate.every:  # samples while training need them
        return Encoders(
            autoencoder=None, text_encoder=stored_features.stored_text(cfg, device), device=device, stored=True
        )
    return Encoders(
        autoencoder=build_autoencoder(cfg.vae, device, dtype),
        text_encoder=text_encoder_of(cfg.text, mesh, device, dtype),
        image_encoder=image_encoder_of(cfg.image_encoder, mesh, device, dtype),
        device=device,
        stored=stored,
        seed=cfg.seed,
    )


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
        logger.log_event("resumed", step)
    report = plan.report()
    buckets = {str(bucket): count for bucket, count in report.per_bucket}
    left_out = dict(report.left_out)
    logger.log_event("started", step, steps=cfg.train.steps, rows=report.rows, buckets=buckets, left_out=left_out)
    return logger


def layout(cfg: RunConfig, mesh: Mesh) -> str:
    """One line on how the run is spread."""
    p = cfg.parallel
    return (
        f"{mesh.world_size} processes: {mesh}; {p.engine} engine, ZeRO {p.zero}, recompute {p.recompute.kind}, "
        f"{p.precision.compute}"
    )
