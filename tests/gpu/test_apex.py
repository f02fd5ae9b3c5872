"""Norms and AdamW of NVIDIA apex on a GPU against torch's in fp64: outputs, gradients, weights and moments."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from acceleration import nvidia_apex
from acceleration.optim.fused_adamw import FusedAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(
        any(nvidia_apex.missing(part, "cuda") is not None for part in ("norms", "adam")),  # type: ignore[arg-type]
        reason=f"apex is not installed: {nvidia_apex.INSTALL}",
    ),
]
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("kind", ["layer", "layer_affine", "rms"])
@pytest.mark.parametrize("shape", [(2, 321, 1152), (3, 17, 16, 72), (1, 1, 3072)])
def test_norms_equal_torch(kind: str, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).cuda().to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1:], generator=generator).cuda().to(dtype) for _ in range(2))
    rounded = [x, weight, bias] if kind == "layer_affine" else [x, weight] if kind == "rms" else [x]
    found, truth = [leaf(t) for t in rounded], [leaf(t.double()) for t in rounded]
    if kind == "rms":
        pair = (
            nvidia_apex.rms_norm(*found[:1], shape[-1:], found[1], 1e-6),
            rms_norm(truth[0], shape[-1:], truth[1], 1e-6),
        )
    else:
        w, b, w_true, b_true = (*found[1:], *truth[1:]) if kind == "layer_affine" else (None, None, None, None)
        pair = (
            nvidia_apex.layer_norm(found[0], shape[-1:], w, b, 1e-6),
            layer_norm(truth[0], shape[-1:], w_true, b_true, 1e-6),
        )
    pair[0].backward(grad)
    pair[1].backward(grad.double())
    for a, b_ in [pair, *((f.grad, t.grad) for f, t in zip(found, truth, strict=True))]:
        assert a is not None and b_ is not None
        assert (a.double() - b_).abs().max() <= tolerance * b_.abs().max()


def test_adamw_equals_torch() -> None:
    """Tensors of all sizes, one of them empty and the last; one without a gradient in the second step."""
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).cuda() for shape in ((1152, 321), (7,), (1,), (0,))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in drawn] for _ in range(2))
    a, b = FusedAdamW(ours, fused=True, **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    for step in range(4):
        for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            q.grad = torch.randn(q.shape, generator=generator).cuda()
            p.grad = q.grad.clone()
            if (step, index) == (1, 1):
                p.grad = q.grad = None
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
        for name, value in a.state[p].items():
            assert torch.allclose(value, b.state[q][name], rtol=1e-5, atol=1e-7), name
