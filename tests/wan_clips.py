"""Small Wans, an autoencoder of means, and sampling written out for them: guidance, steps and known frames by formula.

Nothing of the pipeline, the solvers or a wrapper is in it: times, passes and steps are plain loops over whole clips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from acceleration.distributed.mesh import Mesh, view
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import Components
from opensora.assembly.token_layout import token_layout
from opensora.models.families import build_model
from opensora.models.wan import WanConfig
from opensora.sampling.options import SamplingOption
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.utils.rng import torch_generator
from opensora.utils.tasks import TaskRunner, one_by_one
from tests.dist.problem import FakeText
from tests.toy_components import ToyAutoencoder

PLAIN = WanConfig(in_channels=4, hidden_size=48, num_heads=4, depth=2, ffn_dim=60, text_dim=12)
CLIP, IN_PLACE = replace(PLAIN, references="clip"), replace(PLAIN, references="in_place")
MIX = torch.tensor([[0.7, -0.2, 0.4], [0.1, 0.9, -0.3], [-0.5, 0.3, 0.8], [0.6, 0.6, 0.1]])
GREY = torch.tensor([0.3, -0.2, 0.5, -0.4])  # latents of a grey pixel
PROMPTS, NEGATIVES, SEEDS = ["a fox runs", "two"], ["blur", ""], [3, 11]
OPTION = SamplingOption(width=48, height=32, num_frames=9, num_steps=5, guidance=4.0, flow_shift=3.0)
GRID = (3, 4, 6)  # latents of it
Velocity = Callable[[Tensor, float], Tensor]


class Means(ToyAutoencoder):
    """Causal, with a stride of (4, 8, 8); grey is no zero."""

    def __init__(self) -> None:
        super().__init__(MIX)

    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        return super().encode(pixels) + GREY.to(pixels).view(-1, 1, 1, 1)


def fill(expert: str) -> Callable[[str, Tensor], None]:
    """Weights that are all alive, and others for every expert."""

    def filled(name: str, tensor: Tensor) -> None:
        drawn = torch.randn(tensor.shape, generator=torch_generator("wan", expert, name), dtype=torch.float64)
        tensor.copy_(drawn * 0.2 + (tensor.ndim == 1 and "norm" in name))

    return filled


def filled_model(cfg: WanConfig, expert: str = "") -> nn.Module:
    """On one process, in fp64."""
    model = build_model(cfg).double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        fill(expert)(name, parameter)
    return model


def components(cfg: WanConfig, model: nn.Module, mesh: Mesh | None = None, **more: object) -> Components:
    mesh = view({}) if mesh is None else mesh
    return Components(
        model=model,
        cfg=cfg,
        autoencoder=Means(),
        text_encoder=FakeText(),
        objective=RectifiedFlowConfig(),
        layout=token_layout(cfg, SequenceParallel(mesh)),
        mesh=mesh,
        device=torch.device("cpu"),
        prompt_suffix=False,
        **more,  # type: ignore[arg-type]
    )


def packed(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T h w, C 2 2)"""
    b, c, t, h, w = x.shape
    return x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, c * 4)


def unpacked(tokens: Tensor, grid: tuple[int, int, int] = GRID) -> Tensor:
    """The inverse."""
    t, h, w = grid
    x = tokens.unflatten(1, (t, h // 2, w // 2)).unflatten(-1, (-1, 2, 2))
    return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(len(tokens), -1, t, h, w)


def positions(grid: tuple[int, int, int] = GRID) -> Tensor:
    """(N, 3)"""
    t, h, w = grid
    return torch.cartesian_prod(*(torch.arange(n).double() for n in (t, h // 2, w // 2)))


def shifted(steps: int, alpha: float) -> list[float]:
    """Times of Euler from 1 to 0."""
    even = [1 - step / steps for step in range(steps + 1)]
    return [alpha * t / (1 + (alpha - 1) * t) for t in even]


@torch.no_grad()
def by_hand(
    models: Mapping[str, nn.Module],
    option: SamplingOption = OPTION,
    given: Sequence[Tensor | None] = (None, None),
    *,
    boundary: float = 0.0,
    guidance_low: float | None = None,
    picture: Tensor | None = None,
) -> Tensor:
    """(B, C, T', H', W') by Euler steps.

    Args:
        models: "high" for times from ``boundary`` on, and "low" for those below, if there are any.
        given: the first frames (3, k, H, W) of every clip; None: none.
        picture: (B, K, E) tokens, which every pass is told.
    """
    x = torch.cat([noise_of(seed) for seed in SEEDS])
    known, clip = known_by_hand(given), clip_by_hand(given)
    grid_known = known[:, None].expand_as(x)
    for now, then in pairwise(shifted(option.num_steps, option.flow_shift or 1.0)):
        is_high = now >= boundary
        model = models["high" if is_high else "low"]
        scale = option.guidance if is_high or guidance_low is None else guidance_low
        in_place = model.cfg.references == "in_place"  # type: ignore[union-attr]
        if in_place:
            x = torch.where(grid_known, clip, x)
        v = velocity(model, x, now, PROMPTS, known, clip, picture)
        if scale != 1:
            away = velocity(model, x, now, NEGATIVES, known, clip, picture)
            v = away + scale * (v - away)
        x = x + (then - now) * v
        if in_place:
            x = torch.where(grid_known, clip, x)
    return x


def noise_of(seed: int) -> Tensor:
    """As a clip's seed draws it."""
    return torch.randn(1, 4, *GRID, generator=torch_generator(seed, "sampling noise")).double()


def velocity(
    model: nn.Module,
    x: Tensor,
    time: float,
    prompts: list[str],
    known: Tensor,
    clip: Tensor,
    picture: Tensor | None = None,
) -> Tensor:
    """(B, C, T', H', W'); the model is asked one sample at a time, and the text is cut to its own length."""
    found = []
    for row, prompt in enumerate(prompts):
        features = FakeText().encode([prompt])
        assert features.mask is not None
        text = (features.txt * features.mask[..., None]).double()
        told = {"x": packed(x[row : row + 1]), "text": text, "positions": positions()[None]}
        if picture is not None:
            told["image_tokens"] = picture[row : row + 1]
        takes = model.cfg.references  # type: ignore[union-attr]
        mask = known[row, None, None].expand(1, 4, *GRID).double()
        if takes == "clip":
            told["cond"] = torch.cat((packed(mask), packed(clip[row : row + 1])), dim=-1)
        times = torch.tensor([1000 * time], dtype=torch.float64)
        if takes == "in_place":  # a time for every token
            times = torch.tensor([1000 * time, 0.0], dtype=torch.float64)
            told["row_of"] = packed(mask)[..., 0].long()
        found.append(unpacked(model(timestep=times, **told)))
    return torch.cat(found)


def known_by_hand(given: Sequence[Tensor | None]) -> Tensor:
    """(B, T', H', W') bool: of k frames the first 1 + (k - 1) / 4 latent ones."""
    counts = [0 if frames is None else 1 + (frames.shape[1] - 1) // 4 for frames in given]
    return torch.stack([(torch.arange(GRID[0]) < count)[:, None, None].expand(GRID) for count in counts])


def clip_by_hand(given: Sequence[Tensor | None]) -> Tensor:
    """(B, C, T', H', W'): means of whole clips that are grey behind what is given; zeros where nothing is."""
    found = torch.zeros(len(given), 4, *GRID, dtype=torch.float64)
    for row, frames in enumerate(given):
        if frames is None:
            continue
        whole = torch.zeros(3, OPTION.num_frames, *frames.shape[2:], dtype=torch.float64)
        whole[:, : frames.shape[1]] = frames
        for t in range(GRID[0]):
            group = whole[:, :1] if t == 0 else whole[:, 4 * t - 3 : 4 * t + 1]
            blocks = group.mean(1).unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).mean(dim=(2, 4))
            found[row, :, t] = torch.einsum("cd,dhw->chw", MIX.double(), blocks) + GREY.double().view(-1, 1, 1)
    return found
