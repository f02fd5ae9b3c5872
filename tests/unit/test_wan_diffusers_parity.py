"""Our Wan computes what diffusers' does: outputs and every gradient, on random weights.

In fp64 what the reference computes in fp32 all the same (norms, modulations, sines of times, rotary tables) is made
exact there: its ``Tensor.float`` is ``Tensor.double``, and its two tables are computed anew.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.models.families import build_model, family_of
from opensora.models.wan import WanConfig
from opensora.models.wan.convert import DIFFUSERS, WEIGHTS
from opensora.models.weights.writer import convert_state_dict
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import image_ids, pack, unpack

diffusers = pytest.importorskip("diffusers")

D, HEADS, HEAD_DIM, TEXT, PICTURE, LATENTS = 96, 3, 32, 20, 28, 3
LENGTH = 512  # text tokens of all prompts, which the reference takes for granted where it reads a picture
GRID = (3, 4, 10)  # latents: 3 x 2 x 5 tokens
_SHAPE: dict[str, Any] = {
    **{"in_channels": LATENTS, "hidden_size": D, "num_heads": HEADS, "depth": 2, "ffn_dim": 200, "text_dim": TEXT}
}
CASES: dict[str, WanConfig] = {
    "t2v": WanConfig(**_SHAPE),
    "i2v_picture": WanConfig(**_SHAPE, references="clip", image_dim=PICTURE),
    "i2v": WanConfig(**_SHAPE, references="clip"),
    "two_times": WanConfig(**_SHAPE, references="in_place"),
    "times_of_tokens": WanConfig(**_SHAPE, references="in_place"),
}


def reference(cfg: WanConfig) -> nn.Module:
    beside = 4 + cfg.in_channels if cfg.references == "clip" else 0
    return diffusers.WanTransformer3DModel(
        patch_size=cfg.patch_size,
        num_attention_heads=cfg.num_heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.in_channels + beside,
        out_channels=cfg.in_channels,
        text_dim=cfg.text_dim,
        ffn_dim=cfg.ffn_dim,
        num_layers=cfg.depth,
        image_dim=cfg.image_dim or None,
        added_kv_proj_dim=cfg.hidden_size if cfg.image_dim else None,
        rope_max_seq_len=16,
    )


def random_(model: nn.Module) -> None:
    """Weights that are all alive; those of norms are around one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=torch_generator("wan", name), dtype=torch.float64)
            parameter.copy_(0.12 * draw + (1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0))


class ExactSines(nn.Module):
    """(S,) -> (S, 256), in fp64."""

    def forward(self, t: Tensor) -> Tensor:
        angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


def made_exact(theirs: Any, cfg: WanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs.condition_embedder.timesteps_proj = ExactSines()
    angles = []
    for dim in (theirs.rope.t_dim, theirs.rope.h_dim, theirs.rope.w_dim):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append((torch.arange(16, dtype=torch.float64)[:, None] * frequencies).repeat_interleave(2, dim=1))
    joined = torch.cat(angles, dim=1)
    theirs.rope.freqs_cos, theirs.rope.freqs_sin = joined.cos(), joined.sin()
    monkeypatch.setattr(Tensor, "float", Tensor.double)


class Given:
    """What both are told of two samples."""

    def __init__(self, case: str, dtype: torch.dtype) -> None:
        cfg, generator = CASES[case], torch_generator("inputs", case)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x, self.text = draw(2, LATENTS, *GRID), draw(2, LENGTH, TEXT)
        self.text[0, 7:], self.text[1, 300:] = 0, 0
        self.image = draw(2, 17, PICTURE) if cfg.image_dim else None
        self.cond = draw(2, 4 + LATENTS, *GRID) if cfg.references == "clip" else None
        self.times = torch.tensor([3.25, 977.0], dtype=dtype)
        self.row_of: Tensor | None = None
        tokens = torch.arange(2 * 30).view(2, 30)
        if case == "two_times":  # the first frame of 10 tokens is known, in the second sample the last one as well
            known = torch.zeros(2, 30, dtype=torch.bool)
            known[:, :10], known[1, 20:] = True, True
            self.row_of = torch.where(known, 2, torch.arange(2)[:, None])
            self.times = torch.cat((self.times, self.times.new_zeros(1)))
        if case == "times_of_tokens":
            self.row_of, self.times = tokens, 1000 * torch.rand(60, generator=generator, dtype=torch.float64).to(dtype)

    def ours(self, model: nn.Module) -> Tensor:
        cond = None if self.cond is None else pack(self.cond, (1, 2, 2))
        positions = image_ids(GRID, (1, 2, 2)).expand(2, -1, -1)
        x = pack(self.x, (1, 2, 2))
        found = model(x, self.times, self.text, self.image, cond, positions=positions, row_of=self.row_of)
        return unpack(found, GRID, 2)

    def theirs(self, model: nn.Module) -> Tensor:
        x = self.x if self.cond is None else torch.cat((self.x, self.cond), dim=1)
        times = self.times if self.row_of is None else self.times[self.row_of]
        return model(x, times, self.text, self.image, return_dict=False)[0]


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize("case", list(CASES))
def test_output_and_every_gradient(
    case: str, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = CASES[case]
    theirs, ours = reference(cfg).to(dtype), build_model(cfg).to(dtype)
    random_(ours)
    theirs.load_state_dict(as_theirs(ours.state_dict(), cfg), strict=True)
    if dtype == torch.float64:
        made_exact(theirs, cfg, monkeypatch)
    given = Given(case, dtype)
    found, truth = given.ours(ours), given.theirs(theirs)
    assert truth.abs().max() > 0.1
    for out in (found, truth):
        out.square().sum().backward()
    slopes = as_theirs(gradients(ours), cfg)
    wanted = gradients(theirs)
    assert len(wanted) == len(dict(theirs.named_parameters()))
    errors = {name: relative(slopes[name], slope) for name, slope in wanted.items()}
    if dtype == torch.float32:  # a bias of keys is a constant under a softmax but for the norm behind it
        keys = {
            name: name.replace(".bias", ".weight") for name in errors if name.endswith(("to_k.bias", "k_proj.bias"))
        }
        for name, weight in keys.items():
            sizes = [wanted[part].abs().max().item() for part in (name, weight)]
            errors[name] *= sizes[0] / max(sizes)
    worst = max(errors, key=lambda name: errors[name])
    print(f"{case}: output {relative(found, truth):.1e}, gradient of {worst} {errors[worst]:.1e}")
    assert relative(found, truth) <= bound and errors[worst] <= bound


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: slope for name, slope in found.items() if slope is not None}


def as_theirs(state: dict[str, Tensor], cfg: WanConfig) -> dict[str, Tensor]:
    return convert_state_dict(state, WEIGHTS, source=family_of(cfg).weights.layout(cfg), to=DIFFUSERS)
