"""What parameters start from: a file, or draws that depend on seed and name alone."""

from pathlib import Path

from torch import Tensor, nn

from acceleration import lora
from acceleration.protocol import Fill
from opensora.config.run import RunConfig
from opensora.inference.load import FromFile, check_weights, weight_layout
from opensora.models.mmdit.convert import load_state_dict_for
from opensora.utils.errors import UserError
from opensora.utils.console import announce
from opensora.utils.rng import torch_generator


def initial_weights(cfg: RunConfig, model: nn.Module) -> Fill:
    """What every parameter starts from: the weights at ``train.init_from``, or draws keyed by (seed, name).

    Raises:
        UserError: weights that do not fit the model, with a report of what is missing.
    """

    def draw(name: str, tensor: Tensor) -> None:
        model.init_parameter_(name, tensor, torch_generator(cfg.seed, "init", name))  # type: ignore[operator]

    if cfg.train.init_from is None:
        return draw
    layout = weight_layout(cfg.model)
    file, report = load_state_dict_for(model, cfg.train.init_from, to=layout, allow_missing=_may_lack(cfg))
    announce(str(report))
    return FromFile(file, Path(cfg.train.init_from), otherwise=draw)


def check_initial(cfg: RunConfig) -> None:
    """That ``train.init_from`` holds this model's weights; reads headers only.

    Raises:
        UserError: it does not.
    """
    if cfg.train.init_from is not None:
        check_weights("train.init_from", cfg.train.init_from, cfg.model, _may_lack(cfg))


def _may_lack(cfg: RunConfig) -> tuple[str, ...]:
    # A file without cond_in (Flux) starts as if nothing were conditioned: cond_in is drawn, which is zero. Beside
    # adapters it would stay so, and sampling would miss it in the file: the model should be built without.
    return () if cfg.lora.rank else ("cond_in.*",)


def add_adapters(cfg: RunConfig, model: nn.Module) -> Fill:
    """Give the model ``cfg.lora``'s adapters; returns what their parameters start from, draws keyed by (seed, name).

    Raises:
        UserError: a target that names no layer.
    """
    try:
        lora.apply(model, cfg.lora)
    except ValueError as error:
        raise UserError(f"lora.targets: {error}; layers are called as in single_blocks.0.linear1") from None
    return lambda name, tensor: lora.init_parameter_(name, tensor, torch_generator(cfg.seed, "init", name))


def adapted(model: nn.Module, cfg: RunConfig) -> str:
    """One line on what is trained."""
    sizes = [(lora.is_adapter(name), parameter.numel()) for name, parameter in model.named_parameters()]
    trained, total = sum(size for is_adapter, size in sizes if is_adapter), sum(size for _, size in sizes)
    layers = sum(is_adapter for is_adapter, _ in sizes) // 2
    return f"LoRA of rank {cfg.lora.rank} on {layers} layers: {trained:,} of {total:,} parameters are trained"
