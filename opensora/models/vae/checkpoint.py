"""Weights of an autoencoder at ``vae.path``: the single file that was published, or a folder, found out by looking."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from opensora.models.pretrained import not_finite
from opensora.models.vae.folder import KEY, config_file, place_of, stated_shape
from opensora.models.weights.format import Layout
from opensora.models.weights.plain import PlainWeights
from opensora.models.weights.reader import LoadReport, WeightFile, load_state_dict_for
from opensora.models.weights.rows import Shape
from opensora.utils.errors import UserError
from opensora.utils.files.published_files import how_to_fetch
from opensora.utils.files.safetensors_files import open_weights
from opensora.utils.files.untrusted import parse_json, parsing
from opensora.utils.files.user_files import absence

CONFIG = "config"  # a file's metadata may hold what config.json of a folder holds, as JSON
_OF_FOLDERS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_INDEX = ".index.json"
_IMAGE = ("encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight")
_WAN22 = "encoder.down_blocks.0.resnets.0.norm1.gamma"


class _Sign(NamedTuple):
    """Names of tensors that tell files of a kind of autoencoder."""

    one_of: tuple[str, ...]
    has: str | None = None  # beside it
    lacks: str | None = None

    def fits(self, names: set[str]) -> bool:
        return not names.isdisjoint(self.one_of) and self.has in {None, *names} and self.lacks not in names


_SIGNS = {
    "hunyuan": _Sign(("encoder.down_blocks.0.resnets.0.conv1.conv.weight",)),
    "flux2d": _Sign(_IMAGE, lacks="quant_conv.weight"),
    "sd": _Sign(_IMAGE, has="post_quant_conv.weight", lacks=_WAN22),
    "wan": _Sign(("encoder.down_blocks.0.norm1.gamma",)),
    "wan22": _Sign((_WAN22,)),
    "sd_temporal_decoder": _Sign(("decoder.time_conv_out.weight",)),
    "dc_ae": _Sign(("encoder.project_in.conv.weight",)),
    "opensora_v1_2": _Sign(("temporal_vae.encoder.conv_in.conv.weight",)),
    "opensora_v1_3": _Sign(("encoder.down.0.block.0.conv1.conv.weight",)),
}
_HOLDERS = ("spatial_vae", "temporal_vae")  # of autoencoders in one that is made of two


@dataclass(kw_only=True)
class AutoencoderWeights(PlainWeights):
    """What files of a kind of autoencoder look like; by default they have the names of the network."""

    kind: str
    published: str  # what the file is called that people have
    advice: str = "fetch the file again"

    def __post_init__(self) -> None:
        self.top_level = (*self.top_level, *(name for name in _HOLDERS if name not in self.top_level))

    def other_format(self, names: Iterable[str]) -> str | None:
        found = set(names)
        fitting = [kind for kind, sign in _SIGNS.items() if sign.fits(found)]
        if not fitting or self.kind in fitting:
            return None
        return f"holds an autoencoder of another kind: set vae.kind={fitting[0]}, or give {self.published}"


@dataclass(frozen=True)
class Checkpoint:
    """What is at ``vae.path``, as far as headers say."""

    path: str  # as configured
    weights: Path  # a file, an index or a folder of shards
    stated: Mapping[str, Any]  # config.json of the folder, or the same in the file's metadata; may be empty
    shapes: Mapping[str, Shape]  # of all tensors, by the names of the network
    format: AutoencoderWeights
    to: Layout  # of the network

    def number(self, name: str, otherwise: int, most: int) -> int:
        """A whole number that is stated.

        Raises:
            UserError: it is none, or absurd.
        """
        value = self.stated.get(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise UserError(f"{KEY}={self.path}: config.json has {name}={value!r}; must be an integer from 1 to {most}")
        return value

    def levels(self, name: str, otherwise: int, most: int) -> int:
        """How often a size is halved, where the ratio is stated.

        Raises:
            UserError: it is no power of two.
        """
        ratio = self.number(name, otherwise, most)
        if ratio & (ratio - 1):
            raise UserError(f"{KEY}={self.path}: config.json has {name}={ratio}; must be a power of 2")
        return int(log2(ratio))

    def widths(self, name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
        """Output channels of as many layers as there are, ``name`` with 0, 1, ... in place of its {}."""
        return tuple(self.shapes[layer][0] for layer in _numbered(name, self.shapes)) or otherwise

    def count(self, name: str, otherwise: int) -> int:
        """How many layers there are under such a name."""
        return sum(1 for _ in _numbered(name, self.shapes)) or otherwise

    def check(self, build: Callable[[], nn.Module]) -> LoadReport:
        """That names and shapes of all tensors are those of a network; reads no values.

        Raises:
            UserError: they are not; all that is missing, unexpected or of another shape, in one line.
        """
        return self._compare(build)[2]

    def load(self, build: Callable[[], nn.Module], device: torch.device | str, dtype: torch.dtype) -> Any:
        """The network with these weights, in eval mode, without gradients. Beside it one tensor is held at a time.

        Raises:
            UserError: as of ``check``; values that are not finite.
        """
        network, file, _ = self._compare(build)
        network = _of_type(network, dtype).to_empty(device=device)
        for name, tensor in network.state_dict().items():
            with parsing(lambda reason: UserError(f"{KEY}={self.path}: {name} cannot be read ({reason})")):  # noqa: B023
                values = file[name]
            if not_finite([(name, values)]):
                raise UserError(f"{KEY}={self.path}: {name} holds NaN or infinite values; give weights without")
            tensor.copy_(values)
        return network

    def _compare(self, build: Callable[[], nn.Module]) -> tuple[nn.Module, WeightFile, LoadReport]:
        try:
            with torch.device("meta"):
                network = build()
            file, report = load_state_dict_for(network, self.weights, self.format, to=self.to)
        except UserError as error:
            raise UserError(f"{KEY}={error}") from None
        except ValueError as error:  # of a layer: groups that do not divide its channels
            raise UserError(f"{KEY}={self.path}: no such autoencoder ({error}); {self.format.advice}") from None
        return network, file, report


def build_network(
    build: Callable[[], nn.Module],
    path: str,
    format: AutoencoderWeights,
    device: torch.device | str,
    dtype: torch.dtype,
    to: Layout | None = None,
) -> Any:
    """The network with the weights at ``vae.path``; on the meta device without. Errors as of ``Checkpoint.load``."""
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return _of_type(build(), dtype)
    return open_checkpoint(path, format, to).load(build, device, dtype)


def _of_type(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Frozen."""
    return nn.Module.to(network, dtype).eval().requires_grad_(False)  # diffusers' own ``to`` warns of nothing


def find_checkpoint(path: str, format: AutoencoderWeights, to: Layout | None = None) -> Checkpoint | None:
    """As ``open_checkpoint``; None where nothing is at ``vae.path``, or no weights in that folder, yet.

    Raises:
        UserError: what is there is something else.
    """
    path = place_of(path)
    if not path or absence(path) or (Path(path).is_dir() and not any(Path(path).glob("*.safetensors"))):
        return None
    return open_checkpoint(path, format, to)


def open_checkpoint(path: str, format: AutoencoderWeights, to: Layout | None = None) -> Checkpoint:
    """Look at what is at ``vae.path``: headers only.

    Raises:
        UserError: nothing is there, it cannot be read, or is something else.
    """
    to, path = format.original if to is None else to, place_of(path)
    weights = _weights(path, format)
    try:
        file = WeightFile(weights, format, to)
        stated = stated_shape(path) if config_file(path) else _in_metadata(weights)
    except UserError as error:
        raise error if str(error).startswith(KEY) else UserError(f"{KEY}={error}") from None
    return Checkpoint(path, weights, stated, file.shapes, format, to)


def _weights(path: str, format: AutoencoderWeights) -> Path:
    """The file to read at a path, or the folder of shards."""
    wanted = f"give {format.published}, or the folder of the same in diffusers' names"
    if not path:
        raise UserError(f"{KEY} is not set: {wanted}, or use vae.kind=dct, which needs none")
    if reason := absence(path):
        raise UserError(f"{KEY}={path}: {reason}; {wanted}{how_to_fetch(path)}")
    place = Path(path)
    if not place.is_dir():
        return place
    for name in _OF_FOLDERS:
        for file in (place / name, place / f"{name}{_INDEX}"):
            if file.is_file():
                return file
    found = sorted(place.glob("*.safetensors"))
    if not found and config_file(path) is None:
        raise UserError(f"{KEY}={path}: no config.json there, and no *.safetensors; {wanted}")
    if not found:
        raise UserError(f"{KEY}={path}: cannot be loaded, no *.safetensors beside config.json; fetch them")
    if len(found) > 1 and not list(place.glob(f"*.safetensors{_INDEX}")):
        some = ", ".join(file.name for file in found[:3])
        raise UserError(f"{KEY}={path}: holds {len(found)} files of weights ({some}); give one of them")
    return found[0] if len(found) == 1 else place


def _in_metadata(file: Path) -> dict[str, Any]:
    """What a single file states of its network; nothing if it does not."""
    if file.is_dir() or file.suffix == ".json":
        return {}
    text = open_weights(file).metadata.get(CONFIG, "{}")
    try:
        found = parse_json(text, UserError)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _numbered(name: str, shapes: Mapping[str, Shape]) -> Iterable[str]:
    index = 0
    while (layer := name.format(index)) in shapes:
        yield layer
        index += 1
