"""What is added without touching anything else: a solver, an objective, an autoencoder, a text encoder, a guidance.

Each test is the whole of what a newcomer writes, in the place of a file, and the line of a table. A denoiser is added
in the same way by tests/factored_family.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from opensora import schedulers
from opensora.assembly.components import Components
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig, DropoutConfig
from opensora.config.load import load_config, to_yaml
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference.check import solver_of
from opensora.inference.pipeline import build_api
from opensora.models import text, vae
from opensora.models.base import AutoencoderShape, TextFeatures
from opensora.models.conditions import Conditions
from opensora.models.families import build_model
from opensora.models.text import TextEncoderKind
from opensora.models.vae import AutoencoderKind
from opensora.sampling.guidance import NoGuidance
from opensora.sampling.loop import denoise
from opensora.sampling.options import SamplingOption
from opensora.schedulers.base import Noised, SolverOptions
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.schedulers.timesteps import draw_per_sample
from opensora.train.preparation import Preparation, loss_share
from opensora.utils.tokens import Grid
from tests.dist.problem import MODEL, FakeText, PassThrough, batches

CPU = torch.device("cpu")


# A solver: steps that end a little noisy, drawn anew at every step.
@dataclass(frozen=True)
class Stochastic:
    times: tuple[float, ...]

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        clean = x - self.times[index] * prediction
        later = self.times[index + 1]
        return (1 - later) * clean + later * noise()


def stochastic(objective: RectifiedFlowConfig, options: SolverOptions, grid: Grid) -> Stochastic:
    return Stochastic(tuple(torch.linspace(1, 0, options.num_steps + 1).tolist()))


@pytest.fixture
def with_a_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schedulers.SOLVERS, "stochastic", stochastic)
    monkeypatch.setattr(RectifiedFlow, "solvers", ("euler", "stochastic"))


@pytest.mark.usefixtures("with_a_solver")
def test_a_solver() -> None:
    data, noise = torch.randn(1, 6, 2), torch.randn(1, 6, 2)
    option = SamplingOption(solver="stochastic")
    assert solver_of("sampling", option, RectifiedFlowConfig()) == "stochastic"
    solver = schedulers.build_solver("stochastic", RectifiedFlowConfig(), SolverOptions(4), Grid((1, 2, 3), (1, 1, 1)))
    found = denoise(
        lambda x, t, known: (x - data) / t[:, None, None],
        noise,
        solver,
        NoGuidance(),
        Conditions(),
        None,
        noise=lambda: torch.randn(1, 6, 2),
    )
    assert torch.allclose(found, data, atol=1e-5)


@pytest.mark.usefixtures("with_a_solver")
def test_a_solver_that_draws_gives_every_layout_and_batch_the_same_clip() -> None:
    """By the pipeline: draws belong to the seed of a clip and the step, whatever else is in the batch."""
    model = build_model(MODEL).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.15)
    parts = Components(
        model=model,
        cfg=MODEL,
        autoencoder=PassThrough(),
        text_encoder=FakeText(),
        objective=RectifiedFlowConfig(),
        layout=token_layout(MODEL, SequenceParallel(view({}))),
        mesh=view({}),
        device=CPU,
        prompt_suffix=False,
    )
    option = SamplingOption(width=4, height=3, num_frames=2, num_steps=3, guidance=3.0, solver="stochastic")
    api = build_api(parts)
    together = api(option, seed=[5, 6], text=["a", "b"])
    alone = api(option, seed=[6], text=["b"])
    assert torch.allclose(together[1:], alone, atol=1e-12)
    assert not torch.allclose(api(replace(option, solver="euler"), seed=[6], text=["b"]), alone)


# An objective: the noise itself is predicted.
@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    kind: Literal["noise_prediction"] = "noise_prediction"
    most: float = 1.0  # the latest time

    def __post_init__(self) -> None:
        if not 0 < self.most <= 1:
            raise ValueError(f"most={self.most}: must be a number above 0, at most 1")


@dataclass(frozen=True)
class NoisePrediction:
    cfg: NoiseConfig
    outputs: ClassVar[int] = 1
    solvers: ClassVar[tuple[str, ...]] = ("euler",)

    def times(self, seed: int, step: int, sample_ids: tuple[int, ...], grid: Grid) -> Tensor:
        return draw_per_sample(seed, step, sample_ids, "timestep", ()).sigmoid() * self.cfg.most

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor, known: Tensor | None = None) -> Noised:
        at = t.view(-1, *[1] * (x0.ndim - 1))
        return Noised((1 - at) * x0 + at * noise, {"noise": noise})

    def loss(self, prediction: Tensor, targets: Mapping[str, Tensor], t: Tensor) -> Tensor:
        return (prediction - targets["noise"]).abs()


@pytest.fixture
def with_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schedulers.OBJECTIVES, "noise_prediction", (NoiseConfig, NoisePrediction))
    monkeypatch.setitem(schedulers.OBJECTIVE_CONFIGS, "noise_prediction", NoiseConfig)


RUN = {
    "name": "run",
    "model": {"kind": "mmdit", "size": "debug", "in_channels": 64, "context_in_dim": 256, "vec_in_dim": 256},
    "vae": {"kind": "dct", "channels": 16},
    "text": {"kind": "bytes"},
    "data": {"table": "clips.csv", "buckets": {"256px": {1: [1.0, 1]}}},
    "train": {"steps": 1},
}


@pytest.mark.usefixtures("with_an_objective")
def test_an_objective(tmp_path: Path) -> None:
    cfg = load_config(RunConfig, RUN, ["objective.kind=noise_prediction", "objective.most=0.5"])
    assert cfg.objective == NoiseConfig(most=0.5)
    (tmp_path / "saved.yaml").write_text(to_yaml(cfg))
    assert load_config(RunConfig, tmp_path / "saved.yaml") == cfg
    with pytest.raises(Exception, match=r"objective\.most=2\.0: must be a number above 0"):
        load_config(RunConfig, RUN, ["objective.kind=noise_prediction", "objective.most=2"])
    assert load_config(SampleConfig, {"weights": "x", "prompt": "a", "objective": {"kind": "noise_prediction"}})

    prepare = Preparation(
        encoders=Encoders(autoencoder=PassThrough(), text_encoder=FakeText(), device=CPU),
        objective=schedulers.build_objective(cfg.objective),
        conditioning=ConditioningConfig(dropout=DropoutConfig(text=0.0, pooled=0.0)),
        model=MODEL,
        layout=token_layout(MODEL, SequenceParallel(view({}))),
        seed=3,
    )
    batch = batches(0)[0]
    tokens = prepare(batch, 0)  # type: ignore[arg-type]
    assert set(tokens.targets) == {"noise"} and tokens.times.max() <= 0.5
    model = build_model(MODEL)
    wanted = (model(**tokens.inputs) - tokens.targets["noise"]).abs().sum() / 100
    assert torch.allclose(loss_share(model, tokens, 100), wanted)


# An autoencoder and a text encoder.
@dataclass(frozen=True, kw_only=True)
class MeanConfig:
    kind: Literal["mean"] = "mean"
    side: int = 4


class MeanAutoencoder:
    causal, is_costly = False, False

    def __init__(self, cfg: MeanConfig, device: object, dtype: object) -> None:
        self.channels, self.stride = 3, (1, cfg.side, cfg.side)


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    kind: Literal["length"] = "length"


class LengthEncoder:
    context_dim = vec_dim = 256

    def __init__(self, cfg: LengthConfig, device: object, dtype: object) -> None:
        pass

    def encode(self, prompts: list[str]) -> TextFeatures:
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.float32)
        return TextFeatures(txt=lengths[:, None, None].expand(-1, 1, 256), y_vec=lengths[:, None].expand(-1, 256))


def test_an_autoencoder_and_a_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = AutoencoderKind(
        MeanConfig, MeanAutoencoder, lambda cfg: AutoencoderShape(3, (1, cfg.side, cfg.side), False)
    )
    monkeypatch.setitem(vae.AUTOENCODERS, "mean", entry)
    monkeypatch.setitem(vae.AUTOENCODER_CONFIGS, "mean", MeanConfig)
    kind = TextEncoderKind(LengthConfig, LengthEncoder, lambda cfg: 1, lambda cfg: False, lambda cfg: (256, 256))
    monkeypatch.setitem(text.TEXT_ENCODERS, "length", kind)
    monkeypatch.setitem(text.TEXT_ENCODER_CONFIGS, "length", LengthConfig)
    wanted = ["vae={kind: mean}", "text.kind=length", "model.in_channels=12"]
    cfg = load_config(RunConfig, RUN, wanted)
    assert isinstance(vae.build_autoencoder(cfg.vae, CPU, torch.float32), MeanAutoencoder)
    assert vae.autoencoder_shape(cfg.vae).channels == 3 and text.text_tokens(cfg.text) == 1
    assert text.build_text_encoder(cfg.text, CPU, torch.float32).encode(["abc"]).txt[0, 0, 0] == 3
    with pytest.raises(Exception, match=r"model\.in_channels=64: vae\.kind=mean with model\.patch_size=2 gives 12"):
        load_config(RunConfig, RUN, wanted[:2])
