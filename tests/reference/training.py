"""A whole training run: what each update's loss, norm and learning rate are, and the state at its end."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from tests.reference import draws, mmdit, references, samples
from tests.reference.encoders import BlockTransform, Text, TextEncoder
from tests.reference.samples import Clip, Shapes

PATCH = 2


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer and all that varies with the step."""

    kind: Literal["adamw", "sgd"]
    lr: float
    weight_decay: float
    clip_norm: float
    warmup_steps: int
    schedule: Literal["constant", "cosine"]
    ema_decay: float
    ema_warmup: bool
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    min_lr: float = 0.0

    def lr_at(self, step: int, steps: int) -> float:
        """Linear warm-up from lr / warmup_steps, then constant, or half a cosine down to min_lr."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        along = (step - self.warmup_steps) / (steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * along)) / 2

    def decay_at(self, step: int) -> float:
        """Of the moving average."""
        return min(self.ema_decay, (1 + step) / (10 + step)) if self.ema_warmup else self.ema_decay


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A run, as its configuration states it."""

    seed: int
    steps: int
    micro_batches: int
    clips: list[Clip]
    shapes: Shapes
    model: mmdit.Shape
    autoencoder: BlockTransform
    text: TextEncoder
    text_dropout: float
    optim: Optimizer
    cond: bool = True  # the model has cond_in
    guidance: bool = True  # and guidance_in
    sigma_min: float = 1e-5
    alpha: float | None = None  # of the shift; None: by the formula
    times: tuple[float, float] | None = None  # least and greatest that are drawn; None: all
    crop: Literal["random", "center"] = "random"
    suffix: bool = True  # prompts name frame rate and motion
    pack: int = 1  # micro-batches joined before steps are cut
    damaged: frozenset[int] = frozenset()  # samples that cannot be read
    lora: tuple[int, float] | None = None  # rank and alpha of adapters, which are then all that is trained
    references: Mapping[str, float] = field(default_factory=dict)  # kinds of known frames, by weight
    known_in_loss: bool = True  # latents of known frames are learned


@dataclass(frozen=True)
class State:
    """What a run keeps of every parameter, by name."""

    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    first: dict[str, Tensor] = field(default_factory=dict)  # Adam's moments
    second: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Of one update."""

    loss: float
    grad_norm: float
    lr: float


def train(problem: Problem, start: Mapping[str, Tensor]) -> tuple[list[Record], State]:
    """The records and the last state of a run from these weights."""
    base = {name: weight.double() for name, weight in start.items()}
    trained = mmdit.adapters(base, problem.lora[0], problem.seed) if problem.lora else base
    state = State(copied(trained), copied(trained))
    planned = samples.steps(
        problem.clips,
        problem.shapes,
        micro_batches=problem.micro_batches,
        pack=problem.pack,
        seed=problem.seed,
        count=problem.steps,
    )
    records = []
    for step, (epoch, chosen) in enumerate(planned):
        loss, gradients = _backward(problem, base, state.weights, chosen, step, epoch)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        lr = problem.optim.lr_at(step, problem.steps)
        update(problem.optim, state, gradients, norm, lr, step)
        records.append(Record(loss=loss, grad_norm=norm, lr=lr))
    return records, state


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def _backward(
    problem: Problem,
    base: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    chosen: list[tuple[int, int]],
    step: int,
    epoch: int,
) -> tuple[float, dict[str, Tensor]]:
    """The mean over all latent values of all samples of a step, and its gradient."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in trained.items()}
    weights = leaves
    if problem.lora:
        rank, alpha = problem.lora
        weights = mmdit.with_adapters(base, leaves, alpha / rank)
    parts = [squared_error(problem, weights, sample, length, step, epoch) for sample, length in chosen]
    loss = torch.stack([error for error, _ in parts]).sum() / sum(count for _, count in parts)
    loss.backward()
    zero = torch.zeros((), dtype=torch.float64)
    return loss.item(), {n: zero.expand_as(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}


def squared_error(
    problem: Problem, weights: Mapping[str, Tensor], sample: int, length: int, step: int, epoch: int
) -> tuple[Tensor, int]:
    """Sum over latent values of |v(x_t, t) - ((1 - s) x1 - x0)|^2, and how many these are, for one sample."""
    seed, shapes = problem.seed, problem.shapes
    read = samples.substitute(problem.clips, shapes, sample, problem.damaged, seed, epoch)  # all else is the sample's
    clip = problem.clips[read]
    raw = samples.pixels(clip, read, length=length, side=shapes.side, crop=problem.crop, seed=seed, epoch=epoch)
    pixels = torch.from_numpy(raw.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1
    x0 = problem.autoencoder.encode(pixels)
    x1 = draws.normal(tuple(x0.shape), seed, step, sample, "noise")
    alpha = problem.alpha or shift(x0.shape[1], x0.shape[2] // PATCH * (x0.shape[3] // PATCH))
    t = time(problem, alpha, draws.normal((), seed, step, sample, "timestep"))
    text = dropped(problem, samples.prompt(clip) if problem.suffix else clip.text, sample, step)
    x_t = (1 - t) * x0 + (1 - (1 - problem.sigma_min) * (1 - t)) * x1
    tokens = packed(x_t)
    chosen = references.kind(problem.references, x0.shape[1], not problem.known_in_loss, seed, step, sample)
    mask, known = references.given(chosen, pixels, problem.autoencoder, tuple(x0.shape[1:]))
    found = mmdit.velocity(
        weights,
        problem.model,
        img=tokens,
        ids=coordinates(x0.shape[1:]),
        txt=text.rows,
        vec=text.vec,
        time=t,
        cond=packed(torch.cat([mask.to(known), known])) if problem.cond else None,
        guidance=1.0 if problem.guidance else None,
    )
    target = packed((1 - problem.sigma_min) * x1 - x0)
    learned = torch.ones_like(x0) if problem.known_in_loss else (1 - mask).expand_as(x0)
    return ((found - target).square() * packed(learned)).sum(), int(learned.sum())


def time(problem: Problem, alpha: float, normal: Tensor) -> Tensor:
    """The sigmoid of a normal draw, moved by alpha; within a part of all times the draw is of those that end there."""
    if problem.times is None:
        u = torch.sigmoid(normal)
        return alpha * u / (1 + (alpha - 1) * u)
    law = NormalDist()
    low, high = (law.cdf(math.log(t / (alpha * (1 - t)))) for t in problem.times)
    place = math.exp(law.inv_cdf(low + (high - low) * law.cdf(normal.item())))
    return torch.tensor(alpha * place / (1 + alpha * place))


def dropped(problem: Problem, prompt: str, sample: int, step: int) -> Text:
    """Rows and pooled vector of the prompt, each replaced on its own by those of the empty prompt."""
    text, empty = problem.text.encode(prompt), problem.text.encode("")
    drop_rows, drop_vec = (
        draws.philox(problem.seed, step, sample, purpose).random() < problem.text_dropout
        for purpose in ("drop_txt", "drop_vec")
    )
    return Text(empty.rows if drop_rows else text.rows, empty.vec if drop_vec else text.vec)


def shift(latent_frames: int, tokens_per_frame: int) -> float:
    """alpha: 1 at 256 tokens a frame to 3 at 4096, times the root of the latent frames."""
    return (1 + 2 * (tokens_per_frame - 256) / 3840) * math.sqrt(latent_frames)


def packed(x: Tensor) -> Tensor:
    """(C, T, H, W) -> (T h w, C p p): a token is p x p latents, channel by channel."""
    c, t, h, w = x.shape
    return x.reshape(c, t, h // PATCH, PATCH, w // PATCH, PATCH).permute(1, 2, 4, 0, 3, 5).reshape(-1, c * PATCH**2)


def unpacked(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of ``packed``; grid = (T, H, W) of the latents."""
    t, h, w = grid
    blocks = tokens.reshape(t, h // PATCH, w // PATCH, -1, PATCH, PATCH).permute(3, 0, 1, 4, 2, 5)
    return blocks.reshape(-1, t, h, w)


def coordinates(grid: tuple[int, ...]) -> Tensor:
    """(N, 3): (t, h, w) of every token."""
    t, h, w = grid
    return torch.tensor([(i, j, k) for i in range(t) for j in range(h // PATCH) for k in range(w // PATCH)])


def update(optim: Optimizer, state: State, gradients: Mapping[str, Tensor], norm: float, lr: float, step: int) -> None:
    """Clip by the global norm, then AdamW with decoupled decay, or SGD with decay in the gradient; then the average."""
    factor = min(1.0, optim.clip_norm / (norm + 1e-6)) if optim.clip_norm else 1.0
    first_beta, second_beta = optim.betas
    for name, p, g in _with_gradients(state, gradients):
        g = g * factor
        if optim.kind == "sgd":
            p -= lr * (g + optim.weight_decay * p)
        else:
            m = first_beta * state.first.get(name, torch.zeros_like(p)) + (1 - first_beta) * g
            v = second_beta * state.second.get(name, torch.zeros_like(p)) + (1 - second_beta) * g * g
            state.first[name], state.second[name] = m, v
            p *= 1 - lr * optim.weight_decay
            unbiased_m, unbiased_v = m / (1 - first_beta ** (step + 1)), v / (1 - second_beta ** (step + 1))
            p -= lr * unbiased_m / (unbiased_v.sqrt() + optim.eps)
        decay = optim.decay_at(step)
        state.ema[name] = decay * state.ema[name] + (1 - decay) * p


def _with_gradients(state: State, gradients: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    return ((name, weight, gradients[name]) for name, weight in state.weights.items())
