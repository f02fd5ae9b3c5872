"""Kernels that need a GPU, as far as a machine without one can see: shapes by meta tensors, calls by stand-ins."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration.attention import core
from acceleration.attention.kernels import KERNELS, PACKAGES, check_kernel, kernel_for
from acceleration.attention.kernels.base import by_autograd

BATCH, QUERIES, KEYS, HEADS, DIM = 2, 5, 9, 3, 8
MATH = KERNELS["math"]


def inputs(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a gradient of the output."""
    drawn = torch.randn(2, BATCH, QUERIES, HEADS, DIM, device=device, dtype=dtype)
    keys = torch.randn(2, BATCH, KEYS, HEADS, DIM, device=device, dtype=dtype)
    return drawn[0], keys[0], keys[1], drawn[1]


@pytest.mark.parametrize("name", ["cuda", "cudnn"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shapes_are_those_of_the_contract(name: str, masked: bool, dtype: torch.dtype) -> None:
    q, k, v, grad = inputs(dtype, "meta")
    mask = torch.ones(BATCH, KEYS, dtype=torch.bool, device="meta") if masked else None
    out, lse = core.forward(KERNELS[name], q, k, v, mask)
    assert out.shape == q.shape and out.dtype == dtype and lse.shape == (BATCH, HEADS, QUERIES)
    gradients = core.backward(KERNELS[name], grad, q, k, v, out, lse, mask)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    assert all(x.dtype == dtype for x in gradients)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("masked", [False, True])
def test_flex_equals_the_mathematics_in_forward(masked: bool) -> None:
    q, k, v, _ = inputs()
    mask = torch.rand(BATCH, KEYS) > 0.4 if masked else None
    found, truth = (core.forward(KERNELS[name], q, k, v, mask) for name in ("flex", "math"))
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(found, truth, strict=True))


def test_any_differentiable_attention_makes_a_kernel() -> None:
    """Backward of one part of two, given what both together attend to."""
    q, k, v, grad = inputs()
    kernel = by_autograd(differentiable)
    parts = [core.forward(kernel, q, k[:, s], v[:, s], None) for s in (slice(4), slice(4, None))]
    out, lse = core.merge(*parts[0], *parts[1])
    whole, whole_lse = MATH.forward(q, k, v, None)
    assert torch.allclose(out, whole, atol=1e-14) and torch.allclose(lse, whole_lse, atol=1e-14)
    for s in (slice(4), slice(4, None)):
        found = kernel.backward(grad, q, k[:, s], v[:, s], out, lse, None)
        truth = MATH.backward(grad, q, k[:, s], v[:, s], whole, whole_lse, None)
        assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(found, truth, strict=True))


def differentiable(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("blhd,bshd->bhls", q, k) / DIM**0.5
    return torch.einsum("bhls,bshd->blhd", scores.softmax(dim=-1), v), scores.logsumexp(dim=-1)


def two_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Any, ...]:
    """``_flash_attn_forward`` of flash-attn 2.8, as it is declared there."""
    assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
    assert (softcap, alibi_slopes, return_softmax) == (0.0, None, False) and softmax_scale == DIM**-0.5
    return *MATH.forward(q, k, v, None), None, None


def two_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
    assert (softcap, alibi_slopes, rng_state) == (0.0, None, None) and softmax_scale == DIM**-0.5
    for room, gradient in zip((dq, dk, dv), MATH.backward(dout, q, k, v, out, softmax_lse, None), strict=True):
        room.copy_(gradient)
    return softmax_lse


def three_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, ...]:
    """``_flash_attn_forward`` of flash-attn 3; what is not named has its default."""
    assert options == {"softmax_scale": DIM**-0.5}
    return *MATH.forward(q, k, v, None), None, None


def three_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, **options: Any
) -> Tensor:
    assert options.pop("softmax_scale") == DIM**-0.5 and set(options) == {"dq", "dk", "dv"}
    gradients = MATH.backward(dout, q, k, v, out, softmax_lse, None)
    for room, gradient in zip((options[name] for name in ("dq", "dk", "dv")), gradients, strict=True):
        room.copy_(gradient)
    return softmax_lse


@pytest.mark.parametrize(
    ("name", "module", "forward", "backward"),
    [
        ("flash_attn", "flash_attn.flash_attn_interface", two_forward, two_backward),
        ("flash_attn_3", "flash_attn_interface", three_forward, three_backward),
    ],
)
def test_packages_are_called_as_they_are_declared(
    name: str, module: str, forward: Any, backward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType(module)
    vars(package).update(_flash_attn_forward=forward, _flash_attn_backward=backward)
    monkeypatch.setitem(sys.modules, module.split(".")[0], ModuleType("parent"))
    monkeypatch.setitem(sys.modules, module, package)
    q, k, v, grad = inputs()
    out, lse = MATH.forward(q, k, v, None)
    found = core.forward(KERNELS[name], q, k, v, None)
    assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    truth = MATH.backward(grad, q, k, v, out, lse, None)
    assert all(map(torch.equal, core.backward(KERNELS[name], grad, q, k, v, out, lse, None), truth))


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_missing_package_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"attention={name}: .*use attention=auto"):
        check_kernel(name, "cuda")


def test_a_kernel_of_another_device_is_refused() -> None:
    for name in ("cuda", "cudnn", "flash_attn", "flash_attn_3", "flex"):
        with pytest.raises(ValueError, match=f"attention={name}: runs on cuda, this machine computes on cpu"):
            check_kernel(name, "cpu")
    for name in ("auto", "math", "cpu"):
        check_kernel(name, "cpu")
    assert kernel_for("auto", torch.device("cuda")) is KERNELS["cuda"]
    assert kernel_for("auto", torch.device("meta")) is MATH
