"""What parameters start from: a file, or draws that depend on seed and name alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration import lora
from acceleration.protocol import ParameterSource
from opensora.config.run import RunConfig
from opensora.models.base import ModelConfig
from opensora.models.families import build_model, check_hub_config, family_of
from opensora.models.weights.adapter_fit import FittedAdapter
from opensora.models.weights.reader import Refit, WeightFile, load_state_dict_for
from opensora.models.weights.rows import Shape
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator


def initial_weights(cfg: RunConfig, model: nn.Module) -> ParameterSource:
    """What every parameter starts from: the weights at ``train.init_from``, or draws keyed by (seed, name).

    Raises:
        UserError: weights that do not fit the model, with a report of what is missing.
    """

    def draw(name: str, tensor: Tensor) -> None:
        model.init_parameter_(name, tensor, torch_generator(cfg.seed, "init", name))  # type: ignore[operator]

    if cfg.train.init_from is None:
        return draw
    format, source = family_of(cfg.model).weights, cfg.train.init_from
    layout = format.layout(cfg.model)
    more: dict[str, Any] = {"allow_missing": _may_lack(cfg), "refit": _refit(cfg)}
    file, report = load_state_dict_for(model, source, format, to=layout, **more)
    announce(str(report))
    return FileSource(file, Path(source), otherwise=draw)


def check_initial(cfg: RunConfig) -> None:
    """That ``train.init_from`` holds this model's weights; reads headers only.

    Raises:
        UserError: it does not.
    """
    if cfg.train.init_from is not None:
        check_weights("train.init_from", cfg.train.init_from, cfg.model, _may_lack(cfg), _refit(cfg))


def _may_lack(cfg: RunConfig) -> tuple[str, ...]:
    # What is drawn beside adapters would stay as drawn, and sampling would miss it in the file: the model should be
    # built without.
    return () if cfg.lora.rank else family_of(cfg.model).weights.may_lack


def _refit(cfg: RunConfig) -> Refit | None:
    # Adapters belong to weights as they are in their file.
    return None if cfg.lora.rank else getattr(family_of(cfg.model).weights, "refit", None)


def add_adapters(cfg: RunConfig, model: nn.Module) -> ParameterSource:
    """Give the model ``cfg.lora``'s adapters; returns what their parameters start from, draws keyed by (seed, name).

    Raises:
        UserError: a target that names no layer.
    """
    try:
        lora.apply(model, cfg.lora)
    except ValueError as error:
        example = family_of(cfg.model).weights.example_layer
        raise UserError(f"lora.targets: {error}; layers are called as in {example}") from None
    return lambda name, tensor: lora.init_parameter_(name, tensor, torch_generator(cfg.seed, "init", name))


def adapted(model: nn.Module, cfg: RunConfig) -> str:
    """One line on what is trained."""
    sizes = [(lora.is_adapter(name), parameter.numel()) for name, parameter in model.named_parameters()]
    trained, total = sum(size for is_adapter, size in sizes if is_adapter), sum(size for _, size in sizes)
    layers = sum(is_adapter for is_adapter, _ in sizes) // 2
    return f"LoRA of rank {cfg.lora.rank} on {layers} layers: {trained:,} of {total:,} parameters are trained"


def check_weights(
    key: str, path: str | Path, model: ModelConfig, allow_missing: tuple[str, ...] = (), refit: Refit | None = None
) -> None:
    """That the tensors at ``path`` are this model's, by names, shapes and the config.json beside them; reads headers
    only.

    Raises:
        UserError: no weights, damaged ones, or those of another model.
    """
    with torch.device("meta"):
        empty = build_model(model)
    format = family_of(model).weights
    if refit is None:  # what is refitted is of another model than it was
        try:
            check_hub_config(Path(path), model)
        except UserError as error:
            raise UserError(f"{key}={path}: {error}") from None
    try:
        more: dict[str, Any] = {"allow_missing": allow_missing, "refit": refit}
        load_state_dict_for(empty, path, format, to=format.layout(model), **more)
    except UserError as error:
        raise UserError(f"{key}={path}: {str(error).removeprefix(f'{path}: ')}") from None


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shape of every parameter and buffer of a model, by name; takes no memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build_model(model).state_dict().items()}


@dataclass(frozen=True)
class FileSource:
    """Where parameters get their values: from a file, of which each process reads its pieces, or from elsewhere."""

    file: WeightFile
    path: Path | str  # for messages
    otherwise: Callable[[str, Tensor], None] | None = None  # writes a full parameter that the file lacks
    not_finite: list[str] = field(default_factory=list)  # what this process has read so far that holds NaN or infinity

    def read_part(self, name: str, start: tuple[int, ...], part: Tensor) -> bool:
        """See ``PartialSource`` in acceleration/protocol.py."""
        found = self.file.read_part(name, start, part)
        # Least and greatest take no memory beside the part, as a mask of it would.
        if found and part.numel() and not all(torch.isfinite(end) for end in torch.aminmax(part)):
            self.not_finite.append(f"{name} (as {str(part.dtype).removeprefix('torch.')})")
        return found

    def check_values(self) -> None:
        """That what all processes read are finite numbers. Collective.

        Raises:
            UserError: the first tensor that is not, on every process.
        """
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.not_finite)
        names = list(dict.fromkeys(name for found in everyone for name in found))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{self.path}: {names[0]}{more} holds NaN or infinite values; give weights without")

    def __call__(self, name: str, tensor: Tensor) -> None:
        assert self.otherwise is not None, name  # loading is strict
        self.otherwise(name, tensor)


@dataclass(frozen=True)
class AdapterSource:
    """Where the parameters of adapters get their values: from those of a file, which every process holds."""

    adapter: FittedAdapter

    def __call__(self, name: str, tensor: Tensor) -> None:
        tensor.copy_(self.adapter.tensor(name))
