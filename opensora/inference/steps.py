"""What the loop of steps is given for a batch of clips: solver, noise, channels that are guided, frames that are given.

Whole clips become this process's tokens here; what is drawn depends on the seeds of clips and the number of the step.
"""

from collections.abc import Callable, Sequence
from itertools import count
from math import prod

import torch
from torch import Tensor, nn

from opensora.assembly.components import Components, LowNoiseExpert
from opensora.assembly.token_layout import TokenLayout
from opensora.inference.check import solver_of
from opensora.models.base import Denoising
from opensora.sampling.experts import Expert, Phase, phases
from opensora.sampling.given_frames import CleanFrames, EditedFrames, GivenFrames, SDEdit, StepNoise
from opensora.sampling.options import SamplingOption
from opensora.schedulers import ObjectiveConfig, build_solver
from opensora.schedulers.base import EditingSolver, Solver, SolverOptions
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import Grid


def solver_for(opt: SamplingOption, objective: ObjectiveConfig, grid: Grid) -> Solver:
    """The solver of a job, for clips of this size.

    Raises:
        UserError: one that does not fit what the model was trained for.
    """
    options = SolverOptions(
        opt.num_steps, opt.shift, opt.flow_shift, opt.timestep_respacing, opt.eta, opt.clip_denoised
    )
    return build_solver(solver_of("sampling", opt, objective), objective, options, grid)


def phases_of(solver: Solver, low: LowNoiseExpert | None) -> list[Phase]:
    """The steps of a clip, of one model or of two."""
    latest = getattr(solver, "pure_noise", 1.0)
    return phases([time / latest for time in solver.times], None if low is None else low.boundary)


def model_of(parts: Components, expert: Expert) -> nn.Module:
    """The model that makes the steps of an expert."""
    return parts.low_noise.model if expert == "low" and parts.low_noise is not None else parts.model


def guided_channels(denoising: Denoising, opt: SamplingOption) -> int | None:
    """Channels of a token's prediction that guidance is of; None: all."""
    if opt.cfg_channel is None and denoising.outputs == 1:
        return None
    channels = denoising.latent_channels if opt.cfg_channel is None else opt.cfg_channel
    return min(channels, denoising.latent_channels) * prod(denoising.patch)


def keeps_known(objective: ObjectiveConfig) -> bool:
    """Whether the pass without references is told which frames they would give, as in Open-Sora 1.3."""
    return isinstance(objective, RectifiedFlowV1Config) and objective.version == "1.3"


def noise_of_steps(layout: TokenLayout, grid: Grid, seeds: Sequence[int], x: Tensor, purpose: str) -> StepNoise:
    """Normal values by the number of a step: this process's part of those that each clip's seed gives.

    Args:
        x: the tokens, for precision and device.
    """
    shape = (layout.denoising.latent_channels, *grid.latents)

    def draw(step: int) -> Tensor:
        drawn = [torch.randn(shape, generator=torch_generator(seed, purpose, step)) for seed in seeds]
        return layout.shard(layout.patchify(torch.stack(drawn)).to(x))

    return draw


def drawn_in_turn(noise: StepNoise) -> Callable[[], Tensor]:
    """For a solver, which draws once in every step, if it draws at all."""
    turns = count()
    return lambda: noise(next(turns))


def given_frames(
    opt: SamplingOption,
    solver: Solver,
    layout: TokenLayout,
    grid: Grid,
    ratios: Tensor | None,
    noise: StepNoise,
    *,
    references: bool,
) -> GivenFrames | None:
    """What steps do with frames that are given; None: nothing.

    Args:
        ratios: (B, T') edit ratios of latent frames that stand in the noise; None: none do.
        references: whether some are known otherwise, by what the model is told.

    Raises:
        UserError: a model or a solver that cannot.
    """
    edits = ratios is not None
    if references and layout.denoising.references == "in_place" and not edits:
        return CleanFrames()
    if not edits and not (opt.use_sdedit and references):
        return None
    if edits and layout.denoising.references != "in_place":
        raise UserError("edit ratios: the model takes no clean frames in the place of noisy ones")
    if not isinstance(solver, EditingSolver):
        raise UserError(
            f"sampling.solver={opt.solver or 'null'}: keeps no given frames; use another, or give no references"
        )
    if ratios is None:
        return SDEdit(solver, noise)
    return EditedFrames(layout.shard(ratios_of_tokens(layout, ratios, grid)), solver, noise)


def ratios_of_tokens(layout: TokenLayout, ratios: Tensor, grid: Grid) -> Tensor:
    """(B, T') -> (B, N) or (B, T, S) fp32: that of the first latent frame of each token."""
    latents = ratios.float()[:, None, :, None, None].expand(-1, 1, -1, *grid.latents[1:])
    return layout.patchify(latents)[..., 0]
