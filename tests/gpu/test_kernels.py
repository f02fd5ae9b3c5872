"""Attention kernels on a GPU against the plain mathematics: outputs, log-sum-exps and gradients."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from acceleration.attention import core
from acceleration.attention.core import KernelCore
from acceleration.attention.kernels import KERNELS, PACKAGES
from acceleration.sequence import Segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
BATCH, TOKENS, HEADS, DIM = 2, 321, 3, 64  # a length that fits no tile


def names() -> list[str]:
    """The kernels that this machine can run."""
    return ["cuda", "cudnn", "flex", *(name for name, (module, _) in PACKAGES.items() if find_spec(module))]


@pytest.mark.parametrize("kernel", names())
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kernel_equals_mathematics(kernel: str, masked: bool, dtype: torch.dtype, tolerance: float) -> None:
    if kernel in PACKAGES and dtype == torch.float32:
        pytest.skip("flash-attn has no fp32")
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(BATCH, TOKENS, HEADS, DIM, generator=generator).cuda().to(dtype) for _ in range(4))
    mask = None
    if masked:
        mask = (torch.rand(BATCH, TOKENS, generator=generator) > 0.3).cuda()
        mask[1] = False
    wide = [x.double() for x in (q, k, v)]
    true_out, true_lse = core.forward(KERNELS["math"], *wide, mask)
    truth = core.backward(KERNELS["math"], grad.double(), *wide, true_out, true_lse, mask)
    out, lse = core.forward(KERNELS[kernel], q, k, v, mask)
    found = core.backward(KERNELS[kernel], grad, q, k, v, out, lse, mask)
    assert (out.double() - true_out).abs().max() <= tolerance * true_out.abs().max()
    seen = true_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert (lse.double() - true_lse)[seen].abs().max() <= tolerance * true_lse[seen].abs().max()
    for gradient, true_gradient in zip(found, truth, strict=True):
        assert (gradient.double() - true_gradient).abs().max() <= tolerance * true_gradient.abs().max()


@pytest.mark.parametrize("kernel", names())
def test_samples_of_any_length_share_a_sequence(kernel: str) -> None:
    """The kernel that takes them all at once, against the plain mathematics length by length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 64, 200, 64, 313])
    numbers = torch.arange(5).repeat_interleave(lengths)[torch.randperm(642, generator=generator)].view(2, 321)
    context = SimpleNamespace(segments=Segments.of(numbers, "cuda"))
    qkv = torch.randn(3, BATCH, TOKENS, HEADS, DIM, generator=generator).cuda().bfloat16()
    results = []
    for name, x in ((kernel, qkv.clone()), ("math", qkv.double())):
        x.requires_grad_()
        out = KernelCore(KERNELS[name])(*x, context=context)
        (out.double() ** 2).sum().backward()
        assert x.grad is not None
        results.append((out.detach().double(), x.grad.double()))
    for found, truth in zip(*results, strict=True):
        assert (found - truth).abs().max() <= 2e-2 * truth.abs().max()
