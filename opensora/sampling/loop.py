"""From noise to latents: in every step the passes of guidance, one prediction of them, and a step of the solver."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from opensora.models.conditions import Conditions
from opensora.sampling.evaluation import Evaluation, Watch, unwatched
from opensora.sampling.given_frames import GivenFrames
from opensora.sampling.guidance import Guidance
from opensora.schedulers.base import Solver
from opensora.utils.tasks import Task, TaskRunner, one_by_one

Progress = Callable[[int, int], None]  # (steps done, steps in all)
Predict = Callable[[Tensor, Tensor, Conditions], Tensor]  # (tokens, times (B,), what the pass knows) -> prediction


@torch.no_grad()
def denoise(
    predict: Predict,
    x: Tensor,
    solver: Solver,
    guidance: Guidance,
    known: Conditions,
    null: Conditions | None,
    *,
    outputs: int = 1,
    noise: Callable[[], Tensor] | None = None,
    frames: GivenFrames | None = None,
    progress: Progress | None = None,
    run: TaskRunner = one_by_one,
    watch: Watch = unwatched,
    steps: range | None = None,
) -> Tensor:
    """Tokens at the end of ``steps``, like ``x``, in fp32 (fp64 for fp64 x).

    Args:
        predict: the model, with its tokens' positions; x may be this process's share of the tokens.
        x: (B, N, C) or (B, T, S, C) noise.
        known, null: what is known, and what to move away from, cut as x is.
        outputs: values that the model predicts per latent.
        noise: for solvers that draw some: values like x, other ones at each call.
        frames: those that are given in x, and what each step does with them.
        progress: called before the first step and after every one; what it raises ends the loop between two steps.
        run: evaluates the model for the passes of a step.
        watch: entered around every evaluation, on the process that evaluates.
        steps: that are made, where others make the rest; None: all of the solver's.
    """
    x = x if x.dtype == torch.float64 else x.float()
    total, pure_noise = len(solver.times) - 1, getattr(solver, "pure_noise", 1.0)
    steps = range(total) if steps is None else steps
    if progress is not None and steps.start == 0:
        progress(0, total)
    for index in steps:
        before, told = x, known
        if frames is not None:
            x, told = frames.before(x, known, index)
        t = torch.full((x.shape[0],), solver.times[index], device=x.device, dtype=x.dtype)
        shape = (*x.shape[:-1], x.shape[-1] * outputs)
        work = []
        for number, one in enumerate(guidance.passes(told, null, index)):
            at = Evaluation(number, index, total, solver.times[index] / pure_noise)
            work.append(Task(partial(_watched, watch, at, partial(predict, x, t, one)), shape))
        predictions = [found.to(x.dtype) for found in run(work)]
        x = solver.step(x, guidance.combine(predictions, index), index, noise or _no_noise)
        if frames is not None:
            x = frames.after(before, x, index)
        if progress is not None:
            progress(index + 1, total)
    return x


def _watched(watch: Watch, at: Evaluation, predict: Callable[[], Tensor]) -> Tensor:
    with watch(at):
        return predict()


def _no_noise() -> Tensor:
    raise AssertionError("this solver draws noise: hand it a source")
