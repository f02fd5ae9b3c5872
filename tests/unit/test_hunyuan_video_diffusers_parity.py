"""Our HunyuanVideo computes what diffusers' does: outputs and every gradient, on random weights.

In fp64 what the reference computes in fp32 all the same (sines of times, rotary tables and turns, norms of queries and
keys) is made exact there: its ``Tensor.float`` is ``Tensor.double``, its norms and tables are computed anew.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.models.families import build_model, family_of
from opensora.models.hunyuan_video import HunyuanVideoConfig
from opensora.models.hunyuan_video.convert import DIFFUSERS, WEIGHTS
from opensora.models.weights.writer import convert_state_dict
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import image_ids, pack, unpack

diffusers = pytest.importorskip("diffusers")

torch.set_num_threads(1)

GRID, TEXT_TOKENS = (4, 6, 10), 9  # latents; tokens of the longest prompt
_SHAPE: dict[str, Any] = {
    **{"in_channels": 3, "hidden_size": 48, "num_heads": 3, "depth": 2, "depth_single_blocks": 2},
    **{"axes_dim": (4, 8, 4), "context_in_dim": 20, "vec_in_dim": 12},
}
CASES: dict[str, HunyuanVideoConfig] = {
    "guidance": HunyuanVideoConfig(**_SHAPE),
    "no_guidance": HunyuanVideoConfig(
        **{**_SHAPE, "depth": 1, "depth_refiner_blocks": 3}, guidance_embed=False, mlp_ratio=2.5, patch_size=(2, 2, 2)
    ),
}
# Lengths of the two prompts; ``at``: times from 0 to 1; ``scale``: what the guidance is.
LENGTHS, AT, SCALES = (4, 9), (0.0325, 0.977), (6.0, 1.25)


def reference(cfg: HunyuanVideoConfig) -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=cfg.in_channels,
        out_channels=cfg.in_channels,
        num_attention_heads=cfg.num_heads,
        attention_head_dim=cfg.head_dim,
        num_layers=cfg.depth,
        num_single_layers=cfg.depth_single_blocks,
        num_refiner_layers=cfg.depth_refiner_blocks,
        mlp_ratio=cfg.mlp_ratio,
        patch_size=cfg.patch_size[1],
        patch_size_t=cfg.patch_size[0],
        guidance_embeds=cfg.guidance_embed,
        text_embed_dim=cfg.context_in_dim,
        pooled_projection_dim=cfg.vec_in_dim,
        rope_theta=cfg.theta,
        rope_axes_dim=cfg.axes_dim,
    )


def random_(model: nn.Module) -> None:
    """Weights that are all alive; those of norms are around one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=torch_generator("hunyuan", name), dtype=torch.float64)
            parameter.copy_(0.12 * draw + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


class ExactSines(nn.Module):
    """(S,) -> (S, 256), in fp64."""

    def forward(self, t: Tensor) -> Tensor:
        angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class ExactTable(nn.Module):
    """Latents -> (cos, sin), (N, Dh) each, in fp64."""

    def __init__(self, cfg: HunyuanVideoConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        sides = [n // p for n, p in zip(latents.shape[2:], self.cfg.patch_size, strict=True)]
        places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in sides))  # (N, 3)
        angles = []
        for axis, dim in enumerate(self.cfg.axes_dim):
            frequencies = float(self.cfg.theta) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles.append((places[:, axis, None] * frequencies).repeat_interleave(2, dim=1))
        joined = torch.cat(angles, dim=1)
        return joined.cos(), joined.sin()


class ExactNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp64."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt() * self.weight


def made_exact(theirs: Any, cfg: HunyuanVideoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs.time_text_embed.time_proj = ExactSines()
    theirs.context_embedder.time_text_embed.time_proj = ExactSines()
    theirs.rope = ExactTable(cfg)
    for module in list(theirs.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "RMSNorm":
                setattr(module, name, ExactNorm(child))
    monkeypatch.setattr(Tensor, "float", Tensor.double)


class Given:
    """What both are told of two samples, whose prompts are of two lengths."""

    def __init__(self, cfg: HunyuanVideoConfig, dtype: torch.dtype) -> None:
        generator = torch_generator("inputs")

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.patch, self.x = cfg.patch_size, draw(2, cfg.in_channels, *GRID)
        self.text, self.pooled = draw(2, TEXT_TOKENS, cfg.context_in_dim), draw(2, cfg.vec_in_dim)
        self.mask = torch.arange(TEXT_TOKENS) < torch.tensor(LENGTHS)[:, None]
        self.t = torch.tensor(AT, dtype=dtype) * 1000
        self.guidance = torch.tensor(SCALES, dtype=dtype) * 1000 if cfg.guidance_embed else None

    def ours(self, model: nn.Module) -> Tensor:
        x, positions = pack(self.x, self.patch), image_ids(GRID, self.patch).expand(2, -1, -1)
        told = (self.text, self.mask, self.pooled, self.guidance)
        return unpack(model(x, self.t, *told, positions=positions), GRID, self.patch)

    def theirs(self, model: nn.Module) -> Tensor:
        return model(
            self.x, self.t, self.text, self.mask.to(self.x.dtype), self.pooled, self.guidance, return_dict=False
        )[0]


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).abs().max() / truth.abs().max()).item()


def as_theirs(state: Mapping[str, Any], cfg: HunyuanVideoConfig) -> dict[str, Tensor]:
    return convert_state_dict(state, WEIGHTS, source=family_of(cfg).weights.layout(cfg), to=DIFFUSERS)


def slope_errors(ours: Mapping[str, Tensor], theirs: nn.Module) -> dict[str, float]:
    """Of every gradient, relative to its greatest value. A softmax does not know a constant that is added to all keys:
    the bias of those without a norm behind it is compared with the greatest value of their weight."""
    found = {}
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        size = parameter.grad
        if "refiner_blocks" in name and name.endswith("to_k.bias"):
            size = theirs.get_parameter(name.replace("bias", "weight")).grad  # type: ignore[assignment]
        found[name] = ((ours[name] - parameter.grad).abs().max() / size.abs().max()).item()
    return found


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
    given = Given(cfg, dtype)
    found, truth = given.ours(ours), given.theirs(theirs)
    assert truth.abs().max() > 0.1
    for out in (found, truth):
        out.square().sum().backward()
    slopes = as_theirs({name: parameter.grad for name, parameter in ours.named_parameters()}, cfg)
    errors = slope_errors(slopes, theirs)
    worst = max(errors, key=lambda name: errors[name])
    print(f"{case}: output {relative(found, truth):.1e}, gradient of {worst} {errors[worst]:.1e}")
    assert relative(found, truth) <= bound and errors[worst] <= bound
