"""``offload``: the same clips bit for bit, and no more on the device than was forecast, counted to the byte."""

import pytest
import torch

from opensora.assembly.turns import AUTOENCODER, DENOISER, TEXT, forecast
from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.inference.check import check_offload
from opensora.sampling.caches import FirstBlockCache, NoCache, TeaCache
from opensora.utils.errors import UserError
from tests.device.offload import every_way
from tests.dist.harness import run_distributed

TURNS = (TEXT, DENOISER, AUTOENCODER)


@pytest.mark.parametrize(
    ("world", "degrees"),
    [(1, {}), *(pytest.param(2, {axis: 2}, marks=pytest.mark.slow) for axis in ("ulysses", "tensor"))],
    ids=str,
)
def test_clips_and_bytes(world: int, degrees: dict[str, int]) -> None:
    for found in run_distributed(every_way, world, degrees, timeout=100):
        plain = found["none"]
        for offload in ("models", "blocks"):
            one = found[offload]
            assert torch.equal(one.clips, plain.clips)
            outside = one.outside if world == 1 else 0
            for turn in TURNS:
                limit = forecast(offload, turn, plain.peaks[turn], plain.kept, block=one.block, outside=outside)
                print(f"{world} {offload} {turn}: {plain.peaks[turn]} -> {one.peaks[turn]}, forecast {limit}")
                if "tensor" not in degrees:  # which cuts layers, so that bytes of blocks are others
                    assert 0.5 * limit < one.peaks[turn] <= 1.05 * limit
                assert one.peaks[turn] < plain.peaks[turn]
            assert all(turn in one.lines for turn in TURNS) and "GiB" in one.lines
        assert max(found["blocks"].peaks.values()) < max(found["models"].peaks.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_block", "teacache"])
def test_blocks_that_stream_may_be_reused(name: str) -> None:
    """A step cache looks at a block that is not there, and passes by blocks that are on their way."""
    caches = {
        "first_block": FirstBlockCache(threshold=2.0),
        "teacache": TeaCache(threshold=9.0, coefficients=(1.0, 0.0)),
    }
    (found,) = run_distributed(every_way, 1, {}, caches[name], timeout=100)
    (plain,) = run_distributed(every_way, 1, {}, NoCache(), timeout=100)
    assert torch.equal(found["models"].clips, found["none"].clips)
    assert torch.equal(found["blocks"].clips, found["none"].clips)
    assert not torch.equal(found["none"].clips, plain["none"].clips)


@pytest.mark.parametrize("offload", ["models", "blocks"])
def test_without_a_gpu_it_is_refused(offload: str) -> None:
    with pytest.raises(
        UserError, match=f"^offload={offload}: needs a GPU, and this machine shows none; use offload=no"
    ):
        check_offload(offload)
    check_offload("none")


def test_what_does_not_fit_together_is_refused() -> None:
    base = {"weights": "x", "prompt": "y", "offload": "models"}
    with pytest.raises(UserError, match=r"^parallel\.offload=parameters: must be none with offload=models"):
        load_config(SampleConfig, base, ["parallel.offload=parameters"])
    with pytest.raises(UserError, match=r"^offload='model': did you mean models\?"):
        load_config(SampleConfig, base, ["offload=model"])
