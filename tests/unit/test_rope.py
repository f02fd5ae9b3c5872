"""Two ways to turn interleaved pairs: complex numbers on a CPU, real ones on devices and in graphs; the same bits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from opensora.models.layers import rope
from opensora.models.layers.rope import RopeTable, apply_rope, rope_table

AXES = (4, 6, 6)
TYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]


def drawn(table: torch.dtype, x: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Positions, tokens, and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (2, 37, 3), generator=generator).to(table)
    tokens, grad = (torch.randn(2, 37, 3, 16, generator=generator, dtype=table).to(x) for _ in range(2))
    return ids.to(device), tokens.to(device).requires_grad_(), grad.to(device)


def as_complex(x: Tensor, table: RopeTable) -> Tensor:
    """By the definition, with e^ia made here."""
    turns = torch.complex(table[0][..., 0], table[0][..., 1])
    pairs = x.to(turns.real.dtype).unflatten(-1, (-1, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x.dtype)


def in_real_numbers(x: Tensor, table: RopeTable) -> Tensor:
    pairs = x.to(table[0].dtype).unflatten(-1, (-1, 2)).contiguous()
    return rope._turned_real(pairs, table[0]).flatten(-2).to(x.dtype)


def with_gradient(turn: Any, x: Tensor, table: RopeTable, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = turn(x, table)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize(("exact", "dtype"), TYPES)
def test_both_forms_have_the_same_bits(exact: torch.dtype, dtype: torch.dtype) -> None:
    """Forward and backward; the CPU keeps those of the complex product, so that runs of before go on with theirs."""
    ids, x, grad = drawn(exact, dtype)
    table = rope_table(ids, AXES, 10000.0, "interleaved")
    truth = with_gradient(as_complex, x, table, grad)
    for turn in (in_real_numbers, lambda x, table: apply_rope(x, table, "interleaved")):
        found = with_gradient(turn, x, table, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def operators(turn: Any, *given: Any) -> set[str]:
    """Names of the operators of the graphs that a compiler gets of ``turn``, forward and backward."""
    names: set[str] = set()

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            names.add(str(node.target) + (" complex" if isinstance(value, Tensor) and value.is_complex() else ""))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(turn, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    out, x_grad = with_gradient(lambda x, table: compiled(x, table), *given)
    true_out, true_grad = with_gradient(as_complex, *given)
    assert torch.equal(out, true_out) and torch.equal(x_grad, true_grad)
    return names


def test_graphs_hold_no_complex_number() -> None:
    """Also one that is traced on a CPU: compilers leave complex numbers to kernels that nothing is fused with."""
    ids, x, grad = drawn(torch.float32, torch.float32)
    table = rope_table(ids, AXES, 10000.0, "interleaved")
    found = operators(lambda x, table: apply_rope(x, table, "interleaved"), x, table, grad)
    assert "aten.flip.default" in found and not any("complex" in name for name in found)


def test_a_device_gets_real_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Tensor) -> Tensor:
        raise AssertionError("complex numbers on a device")

    monkeypatch.setattr(rope, "_turned_complex", refused)
    ids, x, _ = drawn(torch.float32, torch.bfloat16, "meta")
    table = rope_table(ids, AXES, 10000.0, "interleaved")
    assert not table[0].is_complex()
    assert apply_rope(x, table, "interleaved").shape == x.shape
    with pytest.raises(AssertionError, match="complex numbers"):
        apply_rope(x.detach().new_zeros(2, 37, 3, 16, device="cpu"), (torch.zeros(2, 37, 1, 8, 2),), "interleaved")
