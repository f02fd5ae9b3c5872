"""Engines without processes: what can be refused at once, and runs of elements as boxes."""

from math import prod
from typing import Any

import pytest
import torch

from acceleration.checkpoint import tensor_shards
from acceleration.config import ParallelConfig, PrecisionConfig
from acceleration.engines import check_engine, colossalai_engine, deepspeed_engine


def test_an_engine_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (deepspeed_engine, colossalai_engine):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'^engine=deepspeed: not installed; pip install "deepspeed>=0\.19", or use engin'
    ):
        check_engine(ParallelConfig(engine="deepspeed"))
    with pytest.raises(ValueError, match=r"^engine=colossalai: colossalai, .* not installed; pip install --no-deps "):
        check_engine(ParallelConfig(engine="colossalai"))
    monkeypatch.setattr(colossalai_engine, "find_spec", lambda name: None if name == "galore_torch" else name)
    with pytest.raises(ValueError, match=r"^engine=colossalai: galore_torch not installed; pip install --no-deps "):
        check_engine(ParallelConfig(engine="colossalai"))  # after a plain pip install --no-deps colossalai
    check_engine(ParallelConfig())


@pytest.mark.parametrize(("zero", "plugin"), [(1, "LowLevelZero"), (2, "LowLevelZero"), (3, "Gemini")])
def test_colossalai_on_a_cpu_has_zero_0_only(monkeypatch: pytest.MonkeyPatch, zero: Any, plugin: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(colossalai_engine, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=rf"^zero={zero}: with engine=colossalai this is {plugin}, which needs a GPU"):
        check_engine(ParallelConfig(engine="colossalai", zero=zero))
    check_engine(ParallelConfig(engine="colossalai", zero=0, precision=PrecisionConfig(compute="fp32")))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_a_run_of_elements_is_boxes_that_cover_it_once(shape: tuple[int, ...]) -> None:
    """Every run of every shape: views of what is held, no element twice, none left out, nothing else."""
    size = prod(shape)
    whole = torch.arange(size).view(shape)
    for start in range(size + 1):
        for stop in range(start, size + 1):
            held = whole.reshape(-1)[start:stop].clone()
            run = tensor_shards.run(held, shape, start)
            assert run.slices.shape == whole.shape
            boxes = [
                (whole[tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))], box)
                for offset, box in run.slices.views.items()
            ]
            assert all(torch.equal(there, box) for there, box in boxes)
            assert sum(box.numel() for _, box in boxes) == stop - start
            covered = sorted(int(i) for there, _ in boxes for i in there.reshape(-1))
            assert covered == list(range(start, stop))
            for _, box in boxes:
                box.fill_(-1)
            assert (held == -1).all()
