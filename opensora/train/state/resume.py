"""Going on where a run stopped: which checkpoint, does it belong to this configuration, what has changed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acceleration.checkpoint import CheckpointManager, steps_in
from acceleration.checkpoint.atomic_dir import MANIFEST, step_name
from acceleration.checkpoint.listing import candidates
from acceleration.distributed.runtime import Runtime
from acceleration.engines import Engine
from acceleration.files.sealed_json import ANY, COUNT, FLAG, NULL, NUMBER, OBJECT, TEXT, WHOLE, Each, Shape, mismatch
from opensora.config.compare import differences, with_defaults
from opensora.config.load import config_hash
from opensora.config.renamed_keys import with_new_names
from opensora.config.run import SAVED_NAME, RunConfig
from opensora.config.schema import plain
from opensora.config.strict_yaml import read_yaml
from opensora.inference.find import part_of_run
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.published_files import how_to_fetch
from opensora.utils.files.user_files import absence

# Settings that may differ from one start of a run to the next and leave it the same run.
FREE = (
    *("output", "parallel", "log", "train", "lora.export_names"),
    *("data.index", "data.workers", "data.prefetch", "data.prefetch_mib", "data.cache_mib", "data.decode_threads"),
    *("data.decode_timeout_s", "data.worker_timeout_s", "data.max_bad_share"),
    *("guard.hang_s", "guard.start_s", "guard.save_s", "guard.straggler", "guard.replicas_every"),
)
NOT_FREE = ("parallel.precision",)  # but those that may not
SAID_LAST = ("name", "validate")  # settings that leave the numbers of training as they are
_GUARD: Shape = {  # of what ``AnomalyGuard.state`` gives, as a manifest holds it
    **dict.fromkeys(("skipped?", "left_out?", "row?", "returns?"), COUNT),
    "bad?": [WHOLE, WHOLE],
    **dict.fromkeys(("losses?", "norms?"), Each(NUMBER, list)),
    "...": ANY,
}
_INFO: Shape = {  # of ``checkpoint_info`` in a manifest; what came later may be missing
    "model": OBJECT,
    "optimizer": TEXT,
    "average": FLAG,
    "lora?": (OBJECT, NULL),
    "base?": (TEXT, NULL),
    "table?": TEXT,
    "config?": OBJECT,
    "config_hash?": TEXT,
    "world_size?": COUNT,
    "guard?": _GUARD,
    "...": ANY,
}


def checkpoint_info(cfg: RunConfig, runtime: Runtime, table: str, base: str | None = None) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that wrote it.

    Args:
        table: content hash of the clip table.
        base: fingerprint of the weights that the checkpoint's adapters belong to.
    """
    return {
        "table": table,
        "config": _told(cfg),
        "config_hash": config_hash(cfg),
        "world_size": runtime.world_size,
        "model": plain(cfg.model),
        "optimizer": cfg.optim.kind,
        "average": cfg.optim.ema_decay > 0,
        "lora": _adapters(cfg),
        "base": base,
    }


def wrong_info(manifest: Mapping[str, Any]) -> str | None:
    """What of ``checkpoint_info`` in a manifest is missing or of the wrong kind, if anything."""
    return mismatch(manifest, _INFO)


def check_paths(cfg: RunConfig) -> None:
    """That ``train.resume`` and ``train.init_from`` are paths of the right kind, as far as a look at them tells.

    Raises:
        UserError: with what is there instead, and what to give.
    """
    for key in ("init_from", "resume"):
        path = getattr(cfg.train, key)
        if path not in (None, "auto", "none") and (reason := absence(path)):
            weights = f"give a safetensors file or an export folder{how_to_fetch(path)}"
            give = weights if key == "init_from" else "give the folder of a run or of one of its checkpoints"
            raise UserError(f"train.{key}={path}: {reason}; {give}")
    if cfg.train.resume not in ("auto", "none"):
        _check_checkpoint(Path(cfg.train.resume))
    if cfg.train.init_from:
        _check_weights(Path(cfg.train.init_from))


def _check_checkpoint(path: Path) -> None:
    give = f"give the folder of a run, or one of its checkpoints, called as {step_name(8)}"
    if not path.is_dir():
        raise UserError(f"train.resume={path}: a file; {give}")
    if os.path.lexists(path / MANIFEST) or candidates(path) or candidates(path / "checkpoints"):
        return
    if list(path.glob("*.safetensors")):
        raise UserError(f"train.resume={path}: exported weights; start from them by train.init_from, or {give}")
    raise UserError(f"train.resume={path}: no checkpoint there; {give}")


def _check_weights(path: Path) -> None:
    kind, run = part_of_run(path)
    if run is not None:
        pieces = ", whose tensors are in pieces" if run != path else ""
        raise UserError(
            f"train.init_from={path}: {kind}{pieces}; give {run / 'exported'}, or go on with it by train.resume"
        )


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
        if path is None:
            return None
        manifest = checkpoints.manifest(path)
    except ValueError as error:
        raise UserError(f"train.resume={cfg.train.resume}: {error}") from None
    check_same(cfg, path, manifest, base)
    announce_changes(cfg, manifest)
    if manifest.get("table", table) != table:
        announce("resuming with another clip table than before: from here on other samples come than would have")
    try:
        load(engine, checkpoints, path)
    except ValueError as error:
        raise UserError(f"train.resume={cfg.train.resume}: {error}; move it away, or give an older one") from None
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


def announce_changes(cfg: RunConfig, manifest: Mapping[str, Any] | None = None) -> None:
    """Say every setting that is not what the checkpoint was trained with; from here on it is another run than it would
    be. What changes the numbers comes first.

    Args:
        manifest: of the checkpoint; without a configuration in it, that of the run's folder is looked at.
    """
    before = with_new_names((manifest or {}).get("config") or {}) or _saved(cfg)
    if before is None:
        return
    complete = _as_json(with_defaults(RunConfig, before))  # a key that there was not yet had no other value
    lines = [line for line in differences(complete, _told(cfg)) if _matters(line, cfg)]
    lines.sort(key=lambda line: _is_below(line, SAID_LAST))  # stable
    if lines:
        announce(f"resuming with other settings than before: {'; '.join(lines)}")


def _matters(line: str, cfg: RunConfig) -> bool:
    if _is_below(line, ("train.steps",)):
        return cfg.optim.schedule != "constant"  # else the learning rate knows nothing of it
    return _is_below(line, NOT_FREE) or not _is_below(line, FREE)


def _saved(cfg: RunConfig) -> dict[str, Any] | None:
    """The configuration in the run's folder; None if there is none, or it is damaged, which is said when it is
    replaced."""
    path = cfg.folder / SAVED_NAME
    try:
        return _as_json(with_new_names(read_yaml(path)[0])) if path.is_file() else None
    except UserError:
        return None


def _told(cfg: RunConfig) -> dict[str, Any]:
    return _as_json(plain(cfg))


def _as_json(value: Any) -> dict[str, Any]:
    """As a manifest holds it, where keys are text."""
    return dict(json.loads(json.dumps(value)))


def _is_below(line: str, keys: Any) -> bool:
    return any(line.startswith((f"{key}.", f"{key}=")) for key in keys)
