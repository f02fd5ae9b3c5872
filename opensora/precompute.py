"""Latents and text features ahead of training: made in parallel, in pieces that can be resumed.

What is encoded are the micro-batches of the run's own plan, with its windows, crops and substitutes, so that training
from the folder is training from the files. Which process encodes a shard changes nothing.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from acceleration.config import MeshConfig
from acceleration.distributed.launcher_variables import Ranks, ranks_from_environment
from opensora.assembly.encoders import Encoders
from opensora.assembly.reference_codes import code_clip, code_part, codes_whole, stored_name
from opensora.assembly.sharded_text import image_encoder_of, text_encoder_of
from opensora.assembly.stored_features import encoder_dtype, identity, identity_hash
from opensora.conditioning.references import needed_parts
from opensora.config.run import RunConfig
from opensora.datasets.decode import api
from opensora.datasets.loading import feature_store
from opensora.datasets.loading.loader import read_batches
from opensora.datasets.loading.reader import Batch
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch
from opensora.datasets.table.manifest import ClipTable
from opensora.models.families import describe
from opensora.models.vae import autoencoder_shape, build_autoencoder
from opensora.train.setup import check
from opensora.utils import signal_handler
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import try_output

SHARD_BATCHES = 64  # micro-batches in a file


def precompute(cfg: RunConfig, folder: Path, epochs: int) -> bool:
    """Encode this process's share of the shards that are not there yet. Processes do not talk: any number of them may
    work on a folder, now or later, and whoever finishes last makes it complete.

    Returns:
        Whether the folder is complete now.

    Raises:
        UserError: the folder holds features of another configuration or cannot be written, or the configuration cannot
            be trained.
    """
    # How training will be spread, and what will share a sequence, is of no interest here.
    cfg = replace(
        cfg,
        data=replace(cfg.data, features="", tokens_per_sequence=0),
        parallel=replace(cfg.parallel, mesh=MeshConfig()),
    )
    ranks = ranks_from_environment()
    table, plan = check(cfg, ranks.world_size)
    try_output(folder, "--out", folder=True)
    _check_no_folders(folder)
    made_for = identity(cfg, table)
    hash_ = identity_hash(made_for)
    shards = -(-sum(1 for _ in _micro_batches(plan, epochs)) // SHARD_BATCHES)
    there = {number for number in range(shards) if _is_there(folder / feature_store.shard_name(number), hash_)}
    todo = (number for number in range(shards) if number not in there)
    local_shards = [number for number in todo if number % ranks.world_size == ranks.rank]
    announce(f"{folder}: {len(there)} of {shards} shards are there; this process makes {len(local_shards)}")
    if local_shards or (ranks.rank == 0 and not feature_store.has_null(folder, hash_)):
        api.require(cfg.data.decoder)
        _encode(cfg, table, plan, folder, epochs, local_shards, hash_, _device(ranks))
    complete = all((folder / feature_store.shard_name(number)).is_file() for number in range(shards))
    complete = complete and feature_store.has_null(folder, hash_)
    if complete:
        with signal_handler.writing():
            feature_store.write_index(folder, shards, epochs, made_for, hash_)
        announce(f"{folder} is complete: data.features={folder}")
    return complete


def _check_no_folders(folder: Path) -> None:
    """That no folder is where a file of features will be renamed to, hours later.

    Raises:
        UserError: one is.
    """
    for path in sorted(folder.iterdir()):
        ours = path.name in (feature_store.MANIFEST, feature_store.INDEX, feature_store.NULL) or path.name.startswith(
            "shard-"
        )
        if ours and path.is_dir():
            raise UserError(f"--out={folder}: {path.name} in it is a folder, must be a file; move it away")


def _is_there(path: Path, hash_: str) -> bool:
    if not path.is_file():
        return False
    found = feature_store.shard_hash(path)
    if found not in (hash_, ""):
        raise UserError(
            f"--out={path.parent}: {path.name} was made for {found}, this is {hash_}; choose another folder"
        )
    return found == hash_


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _encode(
    cfg: RunConfig,
    table: ClipTable,
    plan: BatchPlan,
    folder: Path,
    epochs: int,
    local_shards: list[int],
    hash_: str,
    device: torch.device,
) -> None:
    dtype = encoder_dtype(cfg)
    encoders = Encoders(
        autoencoder=build_autoencoder(cfg.vae, device, dtype),
        text_encoder=text_encoder_of(cfg.text, None, device, dtype),
        image_encoder=image_encoder_of(cfg.image_encoder, None, device, dtype),
        device=device,
        seed=cfg.seed,
    )
    null = encoders.null
    named = {"txt": null.txt, "y_vec": null.y_vec, "mask": null.mask, "label": null.label}
    with signal_handler.writing():
        feature_store.write_null(folder, {name: x for name, x in named.items() if x is not None}, hash_)
    if not local_shards:
        return
    chosen = set(local_shards)
    wanted = {number: shard for number, shard in enumerate(_shards(plan, epochs)) if number in chosen}
    batches = read_batches(table, plan, cfg.data, (m for shard in wanted.values() for m in shard), cfg.seed)
    try:
        for number, shard in wanted.items():
            parts = []
            for micro_batch, batch in zip(shard, islice(batches, len(shard)), strict=True):
                assert isinstance(batch, Batch)  # nothing is packed here
                for sample, other, why in batch.replaced:
                    announce(f"sample {sample} is replaced by {other}: {why}")
                encoded = encoders.encode(batch)
                references = _references(cfg, encoders, batch, encoded.latents.shape[2])
                stored = {name: x.cpu() for name, x in encoded.tensors().items()}
                parts.append((micro_batch, feature_store.StoredFeatures(**stored, references=references)))
            with signal_handler.writing():
                path = feature_store.write_shard(folder, number, parts, hash_)
            announce(f"wrote {path}")
    finally:
        batches.close()


def _references(cfg: RunConfig, encoders: Encoders, batch: Batch, latent_frames: int) -> dict[str, Tensor]:
    """Whatever a run may draw of these samples, on the CPU."""
    needed = needed_parts(cfg.conditioning.references, latent_frames, autoencoder_shape(cfg.vae))
    whole = codes_whole(describe(cfg.model))
    code = code_clip if whole else code_part
    return {stored_name(part, whole=whole): code(encoders, batch, part).cpu() for part in needed}


def _shards(plan: BatchPlan, epochs: int) -> Iterator[tuple[MicroBatch, ...]]:
    """The micro-batches of the first epochs in order, so many to a file; steps do not matter."""
    every = _micro_batches(plan, epochs)
    while shard := tuple(islice(every, SHARD_BATCHES)):
        yield shard


def _micro_batches(plan: BatchPlan, epochs: int) -> Iterator[MicroBatch]:
    step = 0
    for epoch in range(epochs):
        for _ in range(plan.steps_in_epoch(epoch)):
            yield from (part for batch in plan.step(step) for part in batch.parts)
            step += 1
