"""Denoisers by name."""

import torch

from opensora.models.mmdit import SIZES as MMDIT_SIZES
from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.utils.rng import torch_generator

MODELS = {"mmdit": (MMDiTConfig, MMDiTModel)}
MODEL_SIZES = {"mmdit": MMDIT_SIZES}


def build_model(cfg: MMDiTConfig) -> MMDiTModel:
    """The denoiser of ``cfg.kind``; under ``torch.device("meta")`` it costs no memory and no draws."""
    return MODELS[cfg.kind][1](cfg)


@torch.no_grad()
def init_model_(model: MMDiTModel, seed: int) -> None:
    """Fill every parameter of an unsharded denoiser.

    Every parameter draws from a generator of its own, keyed (seed, "init", name): the values do not depend on order,
    on the device, or on which parameters another process initialises.
    """
    for name, parameter in model.named_parameters():
        model.init_parameter_(name, parameter, torch_generator(seed, "init", name))
