"""Which configuration stored features belong to, and whether a run may train from them."""

import hashlib
import json
from collections.abc import Collection
from math import lcm
from pathlib import Path
from typing import Any

import torch

from opensora.assembly.reference_codes import codes_whole, stored_name
from opensora.conditioning.references import parts_of
from opensora.config.compare import differences
from opensora.config.run import RunConfig
from opensora.config.schema import plain
from opensora.datasets.config import bucket_rows
from opensora.datasets.loading import feature_store
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.table.index import IndexedTable
from opensora.models.base import TextFeatures
from opensora.models.families import describe
from opensora.models.vae import autoencoder_shape, latents_depend_on
from opensora.utils.console import launched_rank
from opensora.utils.errors import UserError

_SHOWN = 3  # differing keys in an error


def identity(cfg: RunConfig, table: IndexedTable) -> dict[str, Any]:
    """Everything that latents and text features depend on."""
    data = cfg.data
    return {
        "vae": latents_depend_on(cfg.vae),
        "text": _without(plain(cfg.text), getattr(cfg.text, "PLACEMENT", ())),
        "model": {"patch_size": lcm(*describe(cfg.model).patch[1:])},  # bucket sizes are multiples of it
        "seed": cfg.seed,
        "encoders": str(encoder_dtype(cfg)),
        "data": {
            "table": table.content,
            "buckets": [plain(row) for row in bucket_rows(data)],
            "crop": data.crop,
            "prompt_suffix": data.prompt_suffix,
            "decoder": data.decoder,
            "background": data.background,
            **({} if data.bucket_rule == "even" else {"bucket_rule": data.bucket_rule}),
            **({} if data.frame_interval is None else {"frame_interval": data.frame_interval}),
            **({} if data.interpolation == "bicubic" else {"interpolation": data.interpolation}),
        },
        **({"references": names} if (names := reference_names(cfg)) else {}),
        **({"image_encoder": picture} if (picture := _picture(cfg)) else {}),
    }


def _picture(cfg: RunConfig) -> dict[str, Any]:
    """What tokens of first frames depend on; nothing where there are none."""
    encoder = cfg.image_encoder
    return {} if encoder.kind == "none" else _without(plain(encoder), encoder.PLACEMENT)


def _without(section: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in names}


def reference_names(cfg: RunConfig) -> list[str]:
    """What is coded of clips beside their latents, for the kinds of references that the run draws from."""
    shape, whole = autoencoder_shape(cfg.vae), codes_whole(describe(cfg.model))
    kinds = [kind for kind, weight in cfg.conditioning.references.items() if weight > 0]
    return sorted({stored_name(part, whole=whole) for kind in kinds for part in parts_of(kind, shape)})


def identity_hash(made_for: dict[str, Any]) -> str:
    """16 hex digits."""
    return hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()[:16]


def encoder_dtype(cfg: RunConfig) -> torch.dtype:
    """What the frozen encoders compute in."""
    return torch.bfloat16 if cfg.parallel.precision.compute == "bf16" else torch.float32


def check(cfg: RunConfig, table: IndexedTable, plan: BatchPlan) -> None:
    """That ``data.features`` is what this run would encode itself.

    Raises:
        UserError: it is not complete, was made for something else, or does not reach far enough.
    """
    folder = Path(cfg.data.features)
    manifest = feature_store.read_manifest(folder)
    if launched_rank() == 0:
        feature_store.verify(folder)
    wanted = identity(cfg, table)
    stored = manifest["made_for"].get("references", [])
    if isinstance(stored, list) and set(wanted.get("references", [])) <= set(map(str, stored)):
        wanted |= {"references": stored} if stored else {}  # more than the run needs does no harm
    if manifest["hash"] != identity_hash(wanted):
        changed = differences(manifest["made_for"], json.loads(json.dumps(wanted)))
        raise UserError(
            f"data.features={folder}: made for {manifest['hash']}, this run is {identity_hash(wanted)}: "
            f"{'; '.join(changed[:_SHOWN])}; run python -m opensora.cli.precompute into another folder"
        )
    draws = any(0 < p < 1 for row in bucket_rows(cfg.data) for p in (row.keep, row.accept))
    epochs = plan.epoch_of(cfg.train.steps - 1) + 1
    if draws and epochs > manifest["epochs"]:
        raise UserError(
            f"data.features={folder}: holds {manifest['epochs']} epochs, the run has {epochs}, and data.buckets draws "
            f"other buckets in each; run python -m opensora.cli.precompute with --epochs {epochs}"
        )


class StoredText:
    """In place of a text encoder where all prompts of the table are encoded already."""

    def __init__(self, null: TextFeatures) -> None:
        self.context_dim, self.vec_dim = null.txt.shape[-1], null.y_vec.shape[-1]
        self._null = null

    def encode(self, prompts: list[str]) -> TextFeatures:
        """The empty prompt only."""
        assert prompts == [""], prompts
        return self._null


def stored_text(cfg: RunConfig, device: torch.device) -> StoredText:
    """The empty prompt as ``data.features`` has it."""
    null = feature_store.FeatureStore(Path(cfg.data.features)).null()
    return StoredText(TextFeatures(**{name: tensor.to(device) for name, tensor in null.items()}))
