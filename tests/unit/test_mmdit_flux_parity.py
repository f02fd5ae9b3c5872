"""Our MMDiT computes what diffusers' Flux computes: outputs and gradients, on random weights."""

from dataclasses import replace

import pytest
import torch

import opensora.models.mmdit.model as model_module
from opensora.models.layers.embedding import sinusoid
from opensora.models.mmdit import MMDiTConfig
from opensora.models.mmdit.convert import flux_to_diffusers
from tests.unit.test_mmdit import DEBUG, inputs, random_model

diffusers = pytest.importorskip("diffusers")


def flux_like(cfg: MMDiTConfig) -> torch.nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=cfg.in_channels,
        num_layers=cfg.depth,
        num_single_layers=cfg.depth_single_blocks,
        attention_head_dim=cfg.head_dim,
        num_attention_heads=cfg.num_heads,
        joint_attention_dim=cfg.context_in_dim,
        pooled_projection_dim=cfg.vec_in_dim,
        guidance_embeds=cfg.guidance_embed,
        axes_dims_rope=cfg.axes_dim,
    )


def fp32_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers has them in fp64 models too; with exact tables there would be 1e-5 between the two.

    What remains is its rotation, which is fp32 too.
    """
    exact = model_module.rope_table
    monkeypatch.setattr(model_module, "sinusoid", lambda t, dim: sinusoid(t.float(), dim).to(t))
    monkeypatch.setattr(model_module, "rope_table", lambda *a: tuple(x.float().to(x) for x in exact(*a)))


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_output_and_every_gradient(
    guidance: bool, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float64:
        fp32_tables(monkeypatch)
    cfg = replace(DEBUG, cond_embed=False, guidance_embed=guidance)
    ours, theirs = random_model(cfg, dtype), flux_like(cfg).to(dtype)
    theirs.load_state_dict(flux_to_diffusers(ours.state_dict()), strict=True)
    given = inputs(cfg, dtype=dtype)
    for run in ("ours", "theirs"):
        if run == "ours":
            out = mine = ours(**given)
        else:
            out = reference = theirs(
                hidden_states=given["img"],
                encoder_hidden_states=given["txt"],
                pooled_projections=given["y_vec"],
                timestep=given["timesteps"].to(dtype),
                img_ids=given["img_ids"][0],
                txt_ids=given["txt_ids"][0],
                guidance=given["guidance"],
                return_dict=False,
            )[0]
        out.square().sum().backward()
    error = ((mine - reference).abs().max() / reference.abs().max()).item()
    slopes = flux_to_diffusers({name: parameter.grad for name, parameter in ours.named_parameters()})
    slope_error = max(
        ((slopes[name] - parameter.grad).abs().max() / parameter.grad.abs().max()).item()
        for name, parameter in theirs.named_parameters()
    )
    print(f"relative error {error:.1e}, of the gradients {slope_error:.1e}")
    assert error <= bound and slope_error <= bound
