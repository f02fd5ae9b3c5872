"""What a run leaves for sampling: whole weights or adapters, in files of at most 5 GB, with the configuration
and the digest of each."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from acceleration.engines import Engine, Weights
from acceleration.files.atomic_write import replacing
from opensora.assembly.initial_weights import parameter_shapes
from opensora.config.load import save
from opensora.config.run import SAVED_NAME, RunConfig
from opensora.models.families import HUB_CONFIG, family_of, hub_config
from opensora.models.weights.adapter_export import export_adapter, trained_adapter
from opensora.models.weights.format import Layout, WeightFormat
from opensora.models.weights.writer import convert_state_dict
from opensora.utils.files import digests
from opensora.utils.files.safetensors_files import write_weights


def _converted(
    weights: Iterable[tuple[str, Tensor]], format: WeightFormat, source: Layout, to: Layout
) -> Iterator[tuple[str, Tensor]]:
    """The weights in layout ``to``, a tensor at a time."""
    for name, tensor in weights:
        yield from convert_state_dict({name: tensor}, format, source=source, to=to).items()


def _write_json(path: Path, values: dict[str, Any]) -> str:
    """Its SHA-256."""
    content = json.dumps(values, indent=2).encode()
    digests.forget(path.parent, [path.name])
    with replacing(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def exported(cfg: RunConfig) -> Weights:
    """Which weights are written: the moving average, if there is one and it is wanted."""
    return "ema" if cfg.optim.ema_decay and not cfg.train.export_live else "live"


def write_export(cfg: RunConfig, engine: Engine, step: int, base: str | None, *, write: bool) -> str | None:
    """Write to ``exported/`` of the run's folder; tensors are put together one at a time. Collective.

    Args:
        base: fingerprint of the weights that adapters belong to.
        write: False on the processes that only help to put tensors together.

    Returns:
        Why it could not be written, on the process that writes.
    """
    folder, which, adapters = cfg.folder / "exported", exported(cfg), cfg.lora
    format = family_of(cfg.model).weights
    layout, original = format.layout(cfg.model), format.original
    described = {"step": str(step), "weights": which}
    weights = engine.full_weights(which)
    found: dict[str, str] = {}  # SHA-256 of every file
    try:
        if adapters.rank:
            tensors = dict(weights)
            if write:
                made = replace(trained_adapter(tensors, adapters.scale), base=cfg.train.init_from)
                more: dict[str, Any] = {"metadata": described | {"base": base or ""}, "digests": found}
                shapes = parameter_shapes(cfg.model)
                export_adapter(folder, made, adapters.export_names, shapes=shapes, format=format, layout=layout, **more)
        else:
            to = original if getattr(format, "exports_original", False) else layout
            named = weights if to is layout else _converted(weights, format, layout, to)
            write_weights(folder, named, to.metadata() | described, write=write, digests=found)
            if write and (said := hub_config(cfg.model)) is not None:
                found[HUB_CONFIG] = _write_json(folder / HUB_CONFIG, said)
        if write:
            digests.forget(folder, [SAVED_NAME])
            found[SAVED_NAME] = save(cfg, folder / SAVED_NAME)
            digests.write_digests(folder, found)
    except OSError as error:
        for _ in weights:  # the others are still putting tensors together
            pass
        return str(error)
    return None
