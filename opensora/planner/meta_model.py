"""A denoiser without memory, and what it is given: on the meta device every bucket of every layout can be run."""

from dataclasses import replace
from functools import lru_cache, partial
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn

from acceleration import lora, protocol
from acceleration.accounting.model_profile import ModelProfile
from acceleration.accounting.profiling import extended, profile_of
from acceleration.accounting.rank_layout import MicroBatch
from acceleration.config import LoraConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceContext, SequenceParallel
from opensora.assembly.token_layout import forward_arguments, token_layout
from opensora.conditioning import ConditioningConfig
from opensora.models.base import ModelConfig
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.families import build_model, describe

MORE_SIZES = {"txt_here": 7, "picture": 5}  # of the runs that a profile is found by; any that are positive do
REPEATED = 3  # blocks of a list that are run to know them all: the first, one like all between, the last


def run_denoiser(model: nn.Module, *, known: bool = False, **sizes: int) -> Tensor:
    """The forward of a denoiser on the meta device, for one sample: ``txt`` text tokens, which have a mask, and ``img``
    image tokens or ``frames`` x ``places``; where the model reads them ``picture`` tokens; where it cuts text itself,
    ``txt_here`` tokens that it goes on with.

    ``known``: frames are given in the place of noisy ones.
    """
    frames, txt = sizes.get("frames"), sizes["txt"]
    img = sizes["img"] if frames is None else frames * sizes["places"]
    picture = sizes.get("picture", 0)
    batch = MicroBatch(samples=1, txt=txt, img=img, frames=frames, has_mask=True, picture=picture)
    given = denoiser_inputs(model.cfg, batch, SequenceParallel(meshes.view({})), known=known)
    if "txt_here" in sizes:
        given["context"] = SequenceContext((sizes["txt_here"] + img,), text=(0, sizes["txt_here"]))
    return model(**given)


def denoiser_inputs(
    cfg: Any,
    batch: MicroBatch,
    sequence: SequenceParallel,
    *,
    known: bool = False,
    device: torch.device | str = "meta",
) -> dict[str, Any]:
    """Arguments of a denoiser's forward, with the shapes and types that ``Preparation`` gives them; zeros.

    ``known``: with frames that are given in the place of noisy ones.
    """
    layout = token_layout(cfg, sequence)
    denoising, samples = layout.denoising, batch.samples
    factored, values = denoising.token_axes == "factored", denoising.latent_channels * prod(denoising.patch)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(samples, *shape, device=device)

    def by_sample(*shape: int) -> Tensor:
        return torch.zeros(batch.count, *shape, device=device)

    def tokens_of(*channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Image tokens, whole."""
        sizes = (batch.frames or 1, batch.places) if factored else (batch.img,)
        return zeros(*sizes, *channels).to(dtype)

    numbers = {"fps": by_sample(), "size": by_sample(2), "num_frames": by_sample(), "guidance": by_sample()}
    conditions = Conditions(
        text=zeros(batch.txt, denoising.text_dim) if denoising.text != "none" else None,
        text_mask=torch.ones(samples, batch.txt, dtype=torch.bool, device=device) if batch.has_mask else None,
        pooled=by_sample(denoising.pooled_dim) if denoising.pooled_dim else None,
        image_tokens=zeros(batch.picture, denoising.image_dim) if denoising.image_dim else None,
        label=by_sample().to(torch.int64) if denoising.num_classes else None,
        dropped=by_sample().to(torch.bool) if denoising.null_text == "learned" else None,
        known=tokens_of(dtype=torch.bool) if known else None,
        reference=tokens_of(values) if known and denoising.references == "channels" and factored else None,
        **{name: x for name, x in numbers.items() if name in denoising.wants},
    )
    x = tokens_of(values)
    grid = (batch.frames or 1, *_sides(batch.places if batch.frames else batch.img))
    tokens = TokenBatch(x=layout.shard(x), positions=layout.shard(tokens_of(3)), grid=grid)
    told = layout.shard_conditions(conditions, x)
    if batch.packed:
        texts, places = (torch.arange(n)[None] * batch.packed // max(1, n) for n in (batch.txt, batch.img))
        mine = layout.shard_text(texts).to(device), layout.shard(places).to(device)
        tokens = replace(tokens, sample_of=mine)
        told = replace(told, context=sequence.packed_context(texts, places, device))
    return forward_arguments(cfg, tokens, by_sample(), told)


def _sides(places: int) -> tuple[int, int]:
    """A frame of so many tokens, as near to a square as it can be: formulas know areas alone."""
    rows = next(n for n in range(max(1, isqrt(places)), 0, -1) if places % n == 0)
    return rows, places // rows


def meta_model(cfg: ModelConfig, adapters: LoraConfig | None = None) -> nn.Module:
    """The denoiser without memory, with its adapters if it has any."""
    with torch.device("meta"):
        model = build_model(cfg)
    if adapters is not None and adapters.rank:
        lora.apply(model, adapters)
    return model


def structure(cfg: ModelConfig, known: bool = False, adapters: LoraConfig | None = None) -> ModelProfile:
    """What a model of this shape is made of. ``known``: as trained with frames that it is given, ``told_frames``."""
    return _structure(cfg, known, adapters if adapters and adapters.rank else None)


def told_frames(model: ModelConfig, conditioning: ConditioningConfig) -> bool:
    """Whether training gives the model frames in the place of noisy ones, or beside them where that changes what a
    model of separate axes computes."""
    beside = describe(model).token_axes == "factored" and describe(model).references == "channels"
    return bool(conditioning.masks) or (beside and bool(conditioning.references or conditioning.mask_types))


def more_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Those that the work of this model depends on, beside text and image tokens, for a profile's first run."""
    denoising = describe(cfg)
    depends = {"txt_here": denoising.cuts_text, "picture": denoising.image_dim > 0}
    return {name: size for name, size in MORE_SIZES.items() if depends[name]}


@lru_cache
def _structure(cfg: ModelConfig, known: bool, adapters: LoraConfig | None) -> ModelProfile:
    """Run with a few of the blocks, which the others are like but for their names."""
    short = meta_model(cfg, adapters)
    shown = stand_ins(short)
    forward, more = partial(run_denoiser, known=known), more_sizes(cfg)
    found = extended(profile_of(short, forward, more), meta_model(cfg, adapters), shown)
    # Who exchanges what is decided by the one in a run, and by the other in formulas.
    assert not found.is_factored or found.heads_along_space == describe(cfg).heads, "Denoising.heads: along space"
    return found


def shortened(model: nn.Module) -> nn.Module:
    """The model with the blocks of every list that are run to know them all, in place."""
    for name in protocol.block_lists(model):
        blocks = list(model.get_submodule(name).children())
        made_of = [[(p.shape, p.requires_grad) for p in block.parameters()] for block in blocks[REPEATED - 2 : -1]]
        if len(blocks) > REPEATED and all(one == made_of[0] for one in made_of):  # adapters may be in some alone
            setattr(model, name, nn.ModuleList([*blocks[: REPEATED - 1], blocks[-1]]))
    return model


def stand_ins(model: nn.Module) -> list[int]:
    """For every block the number of one like it in the model that ``shortened`` leaves; shortens the model."""
    names = protocol.block_names(model)
    depths = {name: len(list(model.get_submodule(name).children())) for name in protocol.block_lists(model)}
    shown = protocol.block_names(shortened(model))
    left_of = {name: len(list(model.get_submodule(name).children())) for name in protocol.block_lists(model)}
    found = []
    for name in names:
        blocks, _, key = name.rpartition(".")
        depth, left, index = depths[blocks], left_of[blocks], int(key)
        like = index if index < left - 1 else left - 1 if index == depth - 1 else left - 2
        found.append(shown.index(f"{blocks}.{like}"))
    return found
