"""What a denoiser is told: from latents and prompts to the arguments of a model's forward, cut over processes."""

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from opensora.assembly.token_layout import TokenLayout, forward_arguments, token_layout
from opensora.conditioning import ConditioningConfig
from opensora.conditioning.frames import MASKS, draw_known, known_frames
from opensora.models.base import Denoising
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.mmdit import MMDiTConfig
from opensora.utils.tokens import Grid, pack, unpack

MODEL = MMDiTConfig(
    in_channels=12, patch_size=2, vec_in_dim=5, context_in_dim=6, hidden_size=24, num_heads=2, axes_dim=(4, 4, 4)
)
JOINT = Denoising(latent_channels=3, patch=(1, 2, 2), width=8, heads=2)
FACTORED = Denoising(latent_channels=3, patch=(1, 2, 2), width=8, heads=2, token_axes="factored", text="cross")


def layout(denoising: Denoising, rank: int = 0, degree: int = 1) -> TokenLayout:
    return TokenLayout(denoising, SequenceParallel(view({"ulysses": degree}, rank)))


def test_known_frames_of_an_mmdit_are_its_packed_mask_and_masked_latents() -> None:
    """cond = pack(cat(mask, mask * latents)), written out here by its definition."""
    latents = torch.randn(2, 3, 5, 4, 6)
    known = torch.zeros(2, 5, 4, 6, dtype=torch.bool)
    known[0, 0], known[1, 3:] = True, True
    whole = torch.cat((known[:, None].float(), known[:, None] * latents), dim=1)
    wanted = rearrange(whole, "b c t (h p) (w q) -> b (t h w) (c p q)", p=2, q=2)

    tokens = token_layout(MODEL, SequenceParallel(view({})))
    conditions = Conditions(
        text=torch.randn(2, 7, 6), pooled=torch.randn(2, 5), reference=latents * known[:, None], known=known
    )
    x = tokens.patchify(latents)
    cut = tokens.shard_conditions(tokens.patchify_conditions(conditions), x)
    positions = tokens.positions(Grid((5, 4, 6), (1, 2, 2)), 2, "cpu")
    given = forward_arguments(MODEL, TokenBatch(x=x, positions=positions), torch.rand(2), cut)
    assert torch.equal(given["cond"], wanted)
    nothing = forward_arguments(MODEL, TokenBatch(x=x, positions=positions), torch.rand(2), cut.without_reference())
    assert torch.equal(nothing["cond"], torch.zeros_like(wanted))


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 1), (1, 1, 1)])
def test_patchify_and_back(patch: tuple[int, int, int]) -> None:
    latents = torch.randn(2, 3, 4, 6, 8)
    tokens = pack(latents, patch)
    assert torch.equal(unpack(tokens, (4, 6, 8), patch), latents)
    second = tokens[1, 1].view(3, *patch)  # the token beside the first, along w
    assert torch.equal(second, latents[1, :, : patch[0], : patch[1], patch[2] : 2 * patch[2]])


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_joint_tokens_are_cut_in_their_order_and_factored_ones_by_place(degree: int) -> None:
    latents, text = torch.randn(2, 3, 3, 6, 10), torch.randn(2, 7, 4)
    known = torch.rand(2, 3, 1, 1).expand(-1, -1, 6, 10) > 0.5
    conditions = Conditions(text=text, text_mask=torch.ones(2, 7, dtype=torch.bool), reference=latents, known=known)

    def held(denoising: Denoising, rank: int) -> tuple[Tensor, Conditions]:
        part = layout(denoising, rank, degree)
        x = part.patchify(latents)
        return part.shard(x), part.shard_conditions(part.patchify_conditions(conditions), x)

    for denoising, dim, shape in ((JOINT, 1, (2, 45, 12)), (FACTORED, 2, (2, 3, 15, 12))):
        parts = [held(denoising, rank) for rank in range(degree)]
        whole = layout(denoising).patchify(latents)
        assert whole.shape == shape
        assert torch.equal(torch.cat([x for x, _ in parts], dim=dim), whole)
        for name in ("reference", "known"):
            pieces = [getattr(cut, name) for _, cut in parts]
            assert [piece.shape[dim] for piece in pieces] == [x.shape[dim] for x, _ in parts]
        grid = Grid((3, 6, 10), (1, 2, 2))
        assert torch.equal(layout(denoising).unpatchify(whole, grid), latents)
    # Text in the sequence is cut, text that is read by cross-attention is whole everywhere.
    texts = [held(JOINT, rank)[1].text for rank in range(degree)]
    assert torch.equal(torch.cat([t for t in texts if t is not None], dim=1), text)
    assert all(torch.equal(held(FACTORED, rank)[1].text, text) for rank in range(degree))  # type: ignore[arg-type]
    for denoising, total in ((JOINT, 52), (FACTORED, 15)):
        context = held(denoising, 0)[1].context
        assert (context is None) == (degree == 1)
        assert context is None or (sum(context.lengths), context.frames) == (total, {52: None, 15: 3}[total])


def test_guidance_takes_away_one_thing_at_a_time() -> None:
    known = Conditions(text=torch.ones(1), pooled=torch.ones(1), reference=torch.ones(1), fps=torch.ones(1), context=1)
    null = Conditions(text=torch.zeros(1), pooled=torch.zeros(1), context=2)
    without = known.without_text(null)
    assert without.text is null.text and without.context == 2
    assert without.reference is known.reference and without.fps is known.fps
    assert without.without_reference().reference is None and without.without_reference().fps is known.fps


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9, 16])
def test_masks_give_some_frames_and_leave_some(name: str, frames: int) -> None:
    for sample in range(60):
        known = draw_known(7, 3, sample, frames, {name: 1.0})
        assert known is None or (known.shape == (frames,) and 0 < known.sum() < frames)
        if known is None:
            continue
        size, _, end = name.partition("_")
        if end in ("head", "head_tail"):
            assert known[0]
        if end == "tail" or (end == "head_tail" and frames > 2):  # of two frames one is learned
            assert known[-1]
        if size == "image" and end != "head_tail":
            assert known.sum() == 1
        if size == "quarter" and end in ("head", "tail", "random"):
            assert known.sum() <= max(1, frames // 4) and np.ptp(np.flatnonzero(known)) == known.sum() - 1
        if name == "intepolate":
            assert (np.diff(np.flatnonzero(known)) == 2).all()


def test_masks_are_drawn_by_their_probabilities_and_belong_to_samples() -> None:
    masks = {"image_head": 0.25, "image_tail": 0.5}
    drawn = [draw_known(1, 2, sample, 4, masks) for sample in range(4000)]
    heads = sum(known is not None and bool(known[0]) for known in drawn) / 4000
    tails = sum(known is not None and bool(known[-1]) for known in drawn) / 4000
    assert abs(heads - 0.25) < 0.03 and abs(tails - 0.5) < 0.03
    together = known_frames(1, 2, (5, 9), (4, 2, 3), masks)
    assert together is not None and together.shape == (2, 4, 2, 3)
    for row, sample in zip(together, (5, 9), strict=True):
        known = drawn[sample]
        expected = np.zeros(4, bool) if known is None else known
        assert (row.numpy() == expected[:, None, None]).all()
    assert known_frames(1, 2, (5, 9), (4, 2, 3), {}) is None
    assert draw_known(1, 2, 5, 4, {"random": 0.0}) is None


@pytest.mark.parametrize(
    ("masks", "problem"),
    [
        ({"everything": 0.5}, "masks.everything: no such strategy"),
        ({"random": 1.5}, "masks.random=1.5: must be a probability"),
        ({"random": True}, "masks.random=True: must be a probability"),
        ({"random": 0.7, "image_head": 0.7}, "masks: probabilities add up to 1.4: must be at most 1"),
    ],
)
def test_bad_masks_are_named(masks: dict[str, float], problem: str) -> None:
    with pytest.raises(ValueError, match=problem.replace(".", r"\.")):
        ConditioningConfig(masks=masks)
