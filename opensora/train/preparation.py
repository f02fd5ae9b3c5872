"""One micro-batch: from pixels and prompts to this process's tokens, and from those to its share of the loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from acceleration.sequence import SequenceContext
from opensora.assembly.encoders import Encoders
from opensora.assembly.reference_codes import code_clip, code_part, codes_whole
from opensora.assembly.token_layout import TokenLayout, forward_arguments
from opensora.conditioning import ConditioningConfig
from opensora.conditioning.condition_dropout import draw_drops, without_references
from opensora.conditioning.dropout import drop_text, dropped_labels
from opensora.conditioning.frames import known_frames
from opensora.conditioning.mask_types import draw_given, known_latents, noisy_pixels
from opensora.conditioning.references import Part, code_references, draw_kind, shown
from opensora.config.run import LossReduction
from opensora.datasets.loading.feature_store import Features
from opensora.datasets.loading.reader import PackedBatch
from opensora.models.base import AutoencoderShape, ModelConfig, TextFeatures
from opensora.models.conditions import Conditions, TokenBatch
from opensora.schedulers.base import Objective
from opensora.schedulers.timesteps import draw_per_sample
from opensora.train.loss_weights import loss_weights
from opensora.train.packed_tokens import EncodedTokens, SampleOf, concat_packed, of_samples
from opensora.utils.files.upload import upload
from opensora.utils.tokens import Grid

if TYPE_CHECKING:
    from opensora.datasets.loading.reader import Batch


Times: TypeAlias = Callable[[int, int, tuple[int, ...], Grid], Tensor]  # as ``Objective.times``


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """This process's part of a micro-batch."""

    inputs: dict[str, Any]  # arguments of the model's forward
    targets: dict[str, Tensor]  # (B, N_local, C) or (B, T, S_local, C) each: what the objective compares with
    times: Tensor  # of the samples, with dims to broadcast over tokens and channels
    learned: Tensor | None  # (B, N_local) or (B, T, S_local) bool: tokens that the loss is over; None: all
    inside: Tensor | None = None  # (1, T, S_local, C) bool: values that are latents and no padding; None: all
    weights: Tensor | None  # (B, N_local) or (B, T, S_local), fp64: of tokens in the loss; None: all 1
    objective: Objective
    weight: float  # 0 for a micro-batch that only keeps a process in step with its peers


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Encodes, corrupts and cuts; draws depend on (seed, step, sample) alone, so all layouts agree.

    ``layout`` and ``encoders`` belong to the processes that cut the same samples. Where fewer cut those of some
    micro-batches (``Batch.degree``), ``by_degree`` has the preparation of these.
    """

    encoders: Encoders
    objective: Objective
    conditioning: ConditioningConfig
    model: ModelConfig
    layout: TokenLayout
    autoencoder: AutoencoderShape | None = None  # what references are cut for; None: as ``encoders`` has it
    seed: int
    times: Times | None = None  # of samples, in place of those that the objective draws
    reduction: LossReduction = "elements"  # what the loss of a step is the mean over
    by_degree: Mapping[int, "Preparation"] = field(default_factory=dict)  # by how many processes cut a sample

    @torch.no_grad()
    def __call__(self, batch: "Batch | PackedBatch", step: int) -> Tokens:
        """The tokens of ``batch`` as used by update ``step``; no gradient."""
        if isinstance(batch, PackedBatch):
            texts = self.encoders.encode_prompts(batch.parts)
            parts = [self._encoded(part, step, text) for part, text in zip(batch.parts, texts, strict=True)]
            packed, sample_of = concat_packed(parts)
            context = self.layout.sequence.packed_context(*sample_of, self.encoders.device)
            return self._cut(packed, batch.weight, context, sample_of)
        if batch.degree is not None and batch.degree in self.by_degree:
            return self.by_degree[batch.degree](batch, step)
        tokens = self._encoded(batch, step)
        return self._cut(tokens, batch.weight, self.layout.context(tokens.conditions, tokens.x))

    def _cut(
        self, tokens: EncodedTokens, weight: float, context: SequenceContext | None, sample_of: SampleOf | None = None
    ) -> Tokens:
        """This process's part; ``sample_of`` of a packed sequence, on the CPU."""
        image, text = self.layout.shard, self.layout.shard_text
        mine = None
        if sample_of is not None:
            mine = self._upload(text(sample_of[0])), self._upload(image(sample_of[1]))
        batch = TokenBatch(x=image(tokens.x), positions=image(tokens.positions), grid=tokens.grid, sample_of=mine)
        known = replace(tokens.conditions.map(image=image, text=text), context=context)
        left_out = known.known if self._leaves_out else None
        return Tokens(
            inputs=forward_arguments(self.model, batch, tokens.t, known),
            targets={name: image(target) for name, target in tokens.targets.items()},
            times=of_samples(tokens.t, batch.x, mine),
            learned=None if left_out is None else ~left_out,
            inside=None if tokens.inside is None else image(tokens.inside),
            weights=None if tokens.weights is None else image(tokens.weights),
            objective=self.objective,
            weight=weight,
        )

    def _encoded(self, batch: "Batch", step: int, text: TextFeatures | None = None) -> EncodedTokens:
        """Samples of one shape, encoded and corrupted."""
        encoded = self.encoders.encode(batch, text)
        x0 = encoded.latents.float()  # (B, C, T', H', W')
        grid = self.layout.denoising.grid((x0.shape[2], x0.shape[3], x0.shape[4]))
        if getattr(self.objective, "needs_pixels", False):
            bucket = batch.bucket
            grid = grid._replace(pixels=(bucket.frames, bucket.height, bucket.width))
        ids = batch.sample_ids
        noise = self._upload(draw_per_sample(self.seed, step, ids, "noise", tuple(x0.shape[1:])))
        t = self._upload((self.times or self.objective.times)(self.seed, step, ids, grid))
        known = self._known(batch, step, grid.latents)
        noised = self.objective.noised(x0, noise, t, known)
        reference, given = self._references(batch, step, grid.latents, x0)
        known = given if known is None else known
        drop_txt, drop_vec, drop_reference = self._dropped(ids, step, given)
        if reference is not None and self.conditioning.dropout.conditions:
            reference = without_references(reference, drop_reference)
        prompts = self._text(encoded, drop_txt, drop_vec)
        picture = self._picture(encoded, given, drop_reference)
        conditions = replace(prompts, reference=reference, known=known, image_tokens=picture, **self._numbers(batch, t))
        conditions = self.layout.patchify_conditions(conditions)
        x, inside = self.layout.patchify(noised.x), self.layout.inside(grid, self.encoders.device)
        return EncodedTokens(
            x=x,
            positions=self.layout.positions(grid, len(ids), self.encoders.device),
            targets={name: self.layout.patchify(target) for name, target in noised.targets.items()},
            t=t,
            conditions=conditions,
            inside=inside,
            weights=loss_weights(
                x,
                conditions.known,
                left_out=self._leaves_out,
                known_weight=self.conditioning.known_weight,
                reduction=self.reduction,
                inside=inside,
            ),
            grid=grid.sides,
        )

    @property
    def _leaves_out(self) -> bool:
        """Whether what is known is no part of the loss."""
        denoising = self.layout.denoising
        return denoising.references == "in_place" or (denoising.reads_beside and not self.conditioning.known_in_loss)

    def _dropped(self, ids: tuple[int, ...], step: int, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) bool each: samples without their text tokens, their pooled prompt, and what references give."""
        drop_txt, drop_vec = map(self._upload, drop_text(self.seed, step, ids, self.conditioning.dropout))
        weights = self.conditioning.dropout.conditions
        none = torch.zeros_like(drop_txt)
        if given is not None and self.conditioning.mask_types and not weights:
            has = given.flatten(1).any(1)
            return drop_txt & ~has, drop_vec & ~has, none
        if given is None or not weights:
            return drop_txt, drop_vec, none
        drops = draw_drops(self.seed, step, ids, weights)
        by_kind = self._upload(torch.tensor([drop.text for drop in drops]))
        without = self._upload(torch.tensor([drop.reference for drop in drops]))
        has = given.flatten(1).any(1)
        return torch.where(has, by_kind, drop_txt), torch.where(has, by_kind, drop_vec), has & without

    def _text(self, text: Features, drop_txt: Tensor, drop_vec: Tensor) -> Conditions:
        """Features of the prompts. Those of dropped samples, tokens and pooled vector each on its own, are those of "";
        or the model puts its own null embedding there, which ``dropped`` tells it."""
        null, mask, denoising = self.encoders.null, text.mask, self.layout.denoising
        pooled = text.y_vec if denoising.pooled_dim else None
        label = dropped_labels(text.label, drop_txt, denoising.num_classes)
        if denoising.null_text == "learned":  # behind the mask of the sample's own prompt
            txt = text.txt if denoising.text != "none" else None
            return Conditions(text=txt, text_mask=mask, pooled=pooled, label=label, dropped=drop_txt)
        if pooled is not None:
            pooled = torch.where(drop_vec[:, None], null.y_vec, pooled)
        if mask is not None:
            assert null.mask is not None
            mask = torch.where(drop_txt[:, None], null.mask, mask)
        txt = torch.where(drop_txt[:, None, None], null.txt, text.txt)
        return Conditions(text=txt, text_mask=mask, pooled=pooled, label=label)

    def _picture(self, encoded: Features, given: Tensor | None, dropped: Tensor) -> Tensor | None:
        """(B, K, D) tokens of first frames; zeros of samples that do not know theirs, or lost what they know."""
        if not self.layout.denoising.image_dim:
            return None
        assert encoded.image_tokens is not None, "checked with the configuration: there is an image encoder"
        if given is None:
            return torch.zeros_like(encoded.image_tokens)
        return shown(encoded.image_tokens, given & ~dropped.view(-1, 1, 1, 1))

    def _known(self, batch: "Batch", step: int, latents: tuple[int, int, int]) -> Tensor | None:
        """(B, T', H', W') bool: latents that stand in the place of noisy ones, for models that take them so."""
        if self.layout.denoising.references != "in_place":
            return None
        known = known_frames(self.seed, step, batch.sample_ids, latents, self.conditioning.masks)
        return None if known is None else self._upload(known)

    def _references(
        self, batch: "Batch", step: int, latents: tuple[int, int, int], x0: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """(B, C, T', H', W') fp32 latents of known frames, or of a clip with grey ones behind them, and (B, T', H', W')
        bool where they are, for models that read them beside the noise. ``x0``: those of all frames."""
        cfg, shape = self.conditioning, self.autoencoder or self.encoders.autoencoder
        if not self.layout.denoising.reads_beside:
            return None, None
        if cfg.mask_types:
            return self._of_whole_clips(batch, step, latents, x0)
        if not cfg.references:
            return None, None
        assert shape is not None, "features are read: say what the autoencoder is like"
        learn_some = not cfg.known_in_loss
        kinds = [
            draw_kind(self.seed, step, sample, latents[0], cfg.references, shape, learn_some=learn_some)
            for sample in batch.sample_ids
        ]

        whole = codes_whole(self.layout.denoising)

        def code(part: Part, samples: list[int]) -> Tensor:
            return (code_clip if whole else code_part)(self.encoders, batch, part, samples)

        reference, known = code_references(kinds, latents, shape, code, device=self.encoders.device, whole=whole)
        return reference.float(), known

    def _of_whole_clips(
        self, batch: "Batch", step: int, latents: tuple[int, int, int], x0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same by ``mask_types``; of clips that are given nothing zeros, which the model embeds all the same."""
        weights = self.conditioning.mask_types
        given = [draw_given(self.seed, step, sample, latents[0], weights) for sample in batch.sample_ids]
        known = self._upload(known_latents(given, latents))
        noisy = [row for row, one in enumerate(given) if one.noise]
        if noisy:
            assert batch.pixels is not None, "checked with the configuration: clips are read"
            pixels, ids = batch.pixels[noisy].float() / 127.5 - 1, tuple(batch.sample_ids[row] for row in noisy)
            mixed = noisy_pixels(pixels, [given[row].noise for row in noisy], self.seed, step, ids)
            coded = self.encoders.latents(self._upload(mixed), batch.epoch, ids, "posterior of noisy reference")
            x0 = x0.index_copy(0, torch.tensor(noisy, device=x0.device), coded.to(x0.dtype))
        return torch.where(known[:, None], x0, 0.0), known

    def _numbers(self, batch: "Batch", t: Tensor) -> dict[str, Tensor]:
        """What the family wants of the clip beside its text."""
        wants, found = self.layout.denoising.wants, {}
        if "guidance" in wants:
            found["guidance"] = torch.ones_like(t)
        if "fps" in wants:
            found["fps"] = self._upload(batch.fps)
        if "size" in wants:
            size = torch.tensor((batch.bucket.height, batch.bucket.width), dtype=torch.float32)
            found["size"] = self._upload(size.expand(len(batch.sample_ids), 2))
        if "num_frames" in wants:
            found["num_frames"] = torch.full_like(t, batch.bucket.frames)
        return found

    def _upload(self, x: Tensor) -> Tensor:
        return upload(x, self.encoders.device)


def loss_share(model: nn.Module, tokens: Tokens, global_elements: int) -> Tensor:
    """This process's share of the global mean of the objective over ``global_elements`` latent values, fp32.

    The sum over all processes and micro-batches of a step is the loss, and the sum of their gradients its gradient.
    With ``Preparation.reduction`` samples it is that of the mean over samples, which ``global_elements`` counts then.
    """
    loss = tokens.objective.loss(model(**tokens.inputs), tokens.targets, tokens.times)
    if tokens.learned is not None:
        loss = torch.where(tokens.learned[..., None], loss, 0.0)
    if tokens.inside is not None:
        loss = torch.where(tokens.inside, loss, 0.0)
    if tokens.weights is not None:
        loss = loss * tokens.weights[..., None].to(loss.dtype)
    return loss.sum() * (tokens.weight / global_elements)
