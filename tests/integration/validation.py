"""The validation loss from its formulas, one sample and one time at a time; and runs that are watched or broken off."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.loading.loader import read_batches
from opensora.datasets.plan.batch_plan import MicroBatch
from opensora.models.families import build_model
from opensora.models.mmdit.convert import WEIGHTS
from opensora.models.text import build_text_encoder
from opensora.models.vae import build_autoencoder
from opensora.models.weights.reader import read_state_dict
from opensora.train import held_out, loop
from opensora.train.held_out import open_held_out
from opensora.train.loop import train
from opensora.train.run import Run
from opensora.train.setup import start_run
from opensora.utils.metrics_log import VALIDATED, read_metrics
from opensora.utils.rng import torch_generator


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The complete rounds in a run's metrics.jsonl."""
    _, events = read_metrics(folder / "metrics.jsonl")
    return [event for event in events if event["event"] == VALIDATED]


def numbers(event: dict[str, Any]) -> list[float]:
    """All numbers of a round, in order of their names."""
    found = []
    for name in sorted(event):
        values = event[name] if isinstance(event[name], list) else [event[name]]
        found += [float(value) for value in values if isinstance(value, (int, float))]
    return found


def by_formula(folder: Path, bins: int, seed: int, left_out: tuple[int, ...] = ()) -> dict[str, Any]:
    """Mean losses of the exported weights on the run's held-out clips: of all, by bin, by bucket.

    t    = (bin + U(0, 1)) / bins
    x_t  = (1 - t) x0 + (1 - (1 - s)(1 - t)) x1
    loss = mean over latent values of (model(x_t, t) - ((1 - s) x1 - x0))^2
    """
    cfg = load_config(RunConfig, folder / "config.yaml")
    held = open_held_out(cfg)
    assert held is not None
    model = build_model(cfg.model).double()
    model.load_state_dict(read_state_dict(folder / "exported", WEIGHTS)[0])
    autoencoder, encoder = (
        build_autoencoder(cfg.vae, "cpu", torch.float64),
        build_text_encoder(cfg.text, "cpu", torch.float64),
    )
    sigma = cfg.objective.sigma_min
    found: list[tuple[int, str, float, int]] = []
    for micro_batch in held.micro_batches:
        for sample in micro_batch.sample_ids:
            if sample in left_out:
                continue
            alone = MicroBatch(micro_batch.bucket, (sample,), 0)
            (batch,) = read_batches(held.table, held.plan, held.data, iter([alone]), seed)
            x0 = autoencoder.encode(batch.pixels.float() / 127.5 - 1).float().double()  # type: ignore[union-attr]
            text = encoder.encode(batch.prompts)  # type: ignore[union-attr]
            for index in range(bins):
                x1 = torch.randn(x0.shape[1:], generator=torch_generator(seed, index, sample, "noise")).double()[None]
                u = torch.rand((), generator=torch_generator(seed, index, sample, "time in bin"))
                t = index / bins + ((index + 1) / bins - index / bins) * u
                x = (1 - t) * x0.float() + (1 - (1 - sigma) * (1 - t)) * x1.float()
                with torch.no_grad():
                    v = model(tokens(x), places(x), text.txt, torch.zeros(1, text.txt.shape[1], 3), t[None],
                              text.y_vec, txt_mask=text.mask)  # fmt: skip
                target = tokens((1 - sigma) * x1.float() - x0.float())
                loss = float((v.double() - target.double()).square().sum())
                found.append((index, str(micro_batch.bucket), loss, x0.numel()))
    return means(found, bins)


def means(found: list[tuple[int, str, float, int]], bins: int) -> dict[str, Any]:
    def mean(chosen: Callable[[int, str], bool]) -> float:
        rows = [(loss, count) for index, name, loss, count in found if chosen(index, name)]
        return sum(loss for loss, _ in rows) / sum(count for _, count in rows)

    result = {"validate/loss": mean(lambda index, name: True), "validate/samples": len(found) // bins}
    for at in range(bins):
        edge = f"{at / bins:.2f}-{(at + 1) / bins:.2f}"
        result[f"validate/bin/{edge}"] = mean(lambda index, name, at=at: index == at)  # type: ignore[misc]
    for bucket in dict.fromkeys(name for _, name, _, _ in found):
        result[f"validate/bucket/{bucket}"] = mean(lambda index, name, b=bucket: name == b)  # type: ignore[misc]
    return result


def tokens(latents: Tensor) -> Tensor:
    """(1, C, T, H, W) -> (1, T H W, C): patches of one latent."""
    return latents.flatten(2).transpose(1, 2)


def places(latents: Tensor) -> Tensor:
    _, _, frames, height, width = latents.shape
    at = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).float()
    return at[None]


def draws() -> tuple[Any, ...]:
    """The state of every generator that code could draw from without a key."""
    _, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), keys.tolist(), rest, random.getstate()  # type: ignore[union-attr]


def held_by(run: Run) -> list[Tensor]:
    return [tensor.clone() for _, tensor in run.engine.held()]


def train_watched(config: Path, overrides: list[str]) -> int:
    """A run whose rounds are looked at; how many there were."""
    seen: list[int] = []
    validate = loop.validate

    def watching(run: Run) -> None:
        before, modes, held = draws(), [m.training for m in run.engine.model.modules()], held_by(run)
        validate(run)
        assert draws() == before and [m.training for m in run.engine.model.modules()] == modes
        assert all(torch.equal(a, b) for a, b in zip(held, held_by(run), strict=True))
        seen.append(run.step)

    loop.validate = watching
    with start_run(load_config(RunConfig, config, overrides)) as run:
        train(run)
    return len(seen)


def killed_in_a_round(config: Path, overrides: list[str], step: int, how: int) -> str:
    """A run that gets a signal in the middle of the round of ``step``; where it stopped, if it did so by itself."""
    sample_losses, now = held_out.sample_losses, [0, 0]

    def losing(*args: Any) -> Any:
        now[1] += now[0] == step
        if now[1] == 4:
            os.kill(os.getpid(), how)
        return sample_losses(*args)

    validate = loop.validate

    def noting(run: Run) -> None:
        now[0] = run.step
        validate(run)

    held_out.sample_losses, loop.validate = losing, noting
    with start_run(load_config(RunConfig, config, overrides)) as run:
        finished = train(run)
        return "finished" if finished else f"stopped at {run.step}"


SIGKILL, SIGTERM = int(signal.SIGKILL), int(signal.SIGTERM)
