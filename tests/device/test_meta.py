"""Preparation, forward and backward with every tensor of the device on meta: no values, so nothing can be read.

The simulated device sees more (test_device_path.py); meta is what a compiler can trace, so compiled blocks are here.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration.blocks import activation_checkpoint, compile
from acceleration.config import CompileConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from opensora.models.families import build_model
from opensora.train.preparation import loss_share
from opensora.train.setup import build_preparation
from tests.device import problem
from tests.device.layouts import MASKS

META = torch.device("meta")
COMPILED = CompileConfig(enabled=True, backend="aot_eager")


def build(changes: dict[str, Any], compiled: bool) -> tuple[nn.Module, Any]:
    cfg = problem.config({**changes, "parallel.precision.compute": "bf16"})
    with META:
        model = build_model(cfg.model).bfloat16()
    torch._dynamo.reset()
    compile.apply(model, COMPILED if compiled else CompileConfig())
    activation_checkpoint.apply(model, RecomputeConfig(kind="none" if compiled else "every"))
    return model, build_preparation(cfg, meshes.view({}), META)


SMALL = {"model.depth": 1, "model.depth_single_blocks": 1}
OTHERS = {**MASKS, "model.guidance_embed": "true", "model.fused_qkv": "false"}


@pytest.mark.parametrize(
    ("changes", "compiled"),
    [
        ({}, False),
        (OTHERS, False),
        pytest.param(SMALL, True, marks=pytest.mark.slow),
        pytest.param(SMALL | OTHERS, True, marks=pytest.mark.slow),
    ],
)
def test_a_step_reads_no_value(changes: dict[str, Any], compiled: bool) -> None:
    model, prepare = build(changes, compiled)
    for batch in problem.batches(problem.config(changes), 0)[: 1 if compiled else None]:
        tokens = prepare(batch, 0)
        given = [x for x in tokens.inputs.values() if isinstance(x, Tensor)]
        assert all(x.is_meta for x in (*given, *tokens.targets.values()))
        share = loss_share(model, tokens, 100)
        assert share.is_meta
        share.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_a_value_that_is_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from opensora.models.layers import joint_blocks

    right = joint_blocks.modulate

    def wrong(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return right(x, shift, scale) * scale.max().item()

    monkeypatch.setattr(joint_blocks, "modulate", wrong)
    model, prepare = build({}, compiled=False)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        loss_share(model, prepare(problem.batches(problem.config(), 0)[0], 0), 100)
