"""Going on where a run stopped: which checkpoint, does it belong to this configuration, what has changed."""

from pathlib import Path
from typing import Any

from acceleration.checkpoint import CheckpointManager, steps_in
from acceleration.engines import Engine
from acceleration.runtime import Runtime
from opensora import config
from opensora.config import RunConfig, load_config
from opensora.utils.errors import UserError
from opensora.utils.logging import announce
from opensora.utils.typed import plain

# Settings that may differ from one start of a run to the next and leave it the same run.
FREE = (
    *("output", "parallel", "log", "train", "lora.export_names"),
    *("data.index", "data.workers", "data.prefetch", "data.prefetch_mib", "data.cache_mib", "data.decode_threads"),
    *("data.decode_timeout_s", "data.worker_timeout_s", "data.max_bad_share"),
    *("guard.hang_s", "guard.start_s", "guard.aside_s", "guard.straggler", "guard.replicas_every"),
)
SHOWN = 4  # changed keys in an announcement


def checkpoint_info(cfg: RunConfig, runtime: Runtime, table: str, base: str | None = None) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that wrote it.

    Args:
        table: content hash of the clip table.
        base: fingerprint of the weights that the checkpoint's adapters belong to.
    """
    return {
        "table": table,
        "config_hash": config.config_hash(cfg),
        "world_size": runtime.world_size,
        "model": plain(cfg.model),
        "optimizer": cfg.optim.kind,
        "average": cfg.optim.ema_decay > 0,
        "lora": _adapters(cfg),
        "base": base,
    }


def _adapters(cfg: RunConfig) -> dict[str, Any] | None:
    """What of the adapters' configuration their tensors depend on; None without adapters."""
    if not cfg.lora.rank:
        return None
    return {key: value for key, value in plain(cfg.lora).items() if key != "export_names"}


def check_fresh(cfg: RunConfig) -> None:
    """That a run asked to start anew has nothing to lose.

    Raises:
        UserError: its folder holds checkpoints, which a later resume would take for this run's.
    """
    found = steps_in(cfg.folder / "checkpoints")
    if cfg.train.resume == "none" and found:
        raise UserError(
            f"train.resume=none: {cfg.folder} already has {found[-1].name}; choose another name, or move it away"
        )


def resume(
    cfg: RunConfig, engine: Engine, checkpoints: CheckpointManager, table: str, base: str | None = None
) -> dict[str, Any] | None:
    """Load the checkpoint that ``train.resume`` names, and return its manifest, None for a fresh start. Collective.

    ``table``: content hash of the clip table; another one than before is announced.

    Raises:
        UserError: none of the run's checkpoints is complete, the named one is not, or it is of another model or lacks
            a part of the state.
    """
    if cfg.train.resume == "none":
        return None
    try:
        path = checkpoints.latest() if cfg.train.resume == "auto" else checkpoints.named(Path(cfg.train.resume))
    except ValueError as error:
        raise UserError(f"train.resume={cfg.train.resume}: {error}") from None
    if path is None:
        return None
    manifest = checkpoints.manifest(path)
    check_same(cfg, path, manifest, base)
    announce_changes(cfg)
    if manifest.get("table", table) != table:
        announce("resuming with another clip table than before: from here on other samples come than would have")
    try:
        load(engine, checkpoints, path)
    except ValueError as error:
        raise UserError(f"train.resume={cfg.train.resume}: {error}") from None
    announce(f"resumed {path} at step {manifest['step']}")
    return manifest


def load(engine: Engine, checkpoints: CheckpointManager, path: Path) -> None:
    """Take the state of a complete checkpoint. Collective.

    Raises:
        ValueError: it lacks a part of the state.
    """
    state = engine.state_dict()
    checkpoints.load(path, state)
    engine.load_state_dict(state)


def check_same(cfg: RunConfig, path: Path, manifest: dict[str, Any], base: str | None = None) -> None:
    """That the checkpoint's tensors are those of this configuration.

    Raises:
        UserError: the first keys that differ, as they were and as they are.
    """
    before = {
        "model": manifest["model"],
        "optim": {"kind": manifest["optimizer"], "ema_decay": "on" if manifest["average"] else 0},
        "lora": manifest.get("lora") or {"rank": 0},
    }
    now = {
        "model": plain(cfg.model),
        "optim": {"kind": cfg.optim.kind, "ema_decay": "on" if cfg.optim.ema_decay else 0},
        "lora": _adapters(cfg) or {"rank": 0},
    }
    changed = differences(before, now)
    if changed:
        raise UserError(f"{changed[0]}: {path} was trained otherwise; change it back, or start a run of another name")
    if manifest.get("base") != base:
        raise UserError(
            f"train.init_from={cfg.train.init_from}: not the weights that the adapters of {path} were trained beside; "
            "give those, or start a run of another name"
        )


def announce_changes(cfg: RunConfig) -> None:
    """Say which settings are not those the run was started with; from here on it is another run than it would be."""
    saved = cfg.folder / config.SAVED_NAME
    if not saved.is_file():
        return
    changed = [
        line
        for line in differences(plain(load_config(RunConfig, saved)), plain(cfg))
        if not any(line.startswith((f"{key}.", f"{key}=")) for key in FREE)
    ]
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        announce(f"resuming with other settings than before: {'; '.join(changed[:SHOWN])}{more}")


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """``key=new (was old)`` for every leaf that differs between two plain trees."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*now, *(name for name in before if name not in now)]
        path = f"{key}." if key else ""
        return [line for name in names for line in differences(before.get(name), now.get(name), f"{path}{name}")]
    return [] if before == now else [f"{key}={now} (was {before})"]
