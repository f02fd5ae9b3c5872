"""LoRA adapters out of files: W + alpha/rank * B A, in the formats that tools exchange.

* peft: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``, which says rank and alpha;
* one safetensors file of kohya's tools, ComfyUI or diffusers: ``lora_A``, ``lora_B`` or ``lora_down``, ``lora_up``, and
  an ``alpha`` per layer, or alpha in the metadata, or none.

Beside them there may be differences of whole tensors, mostly of biases and norms, which are added as they are.

What the layers are called is left to the family of the model, see ``adapter_fit.py``.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from opensora.models.weights.adapter_config import PeftConfig, read_peft_config, stated_config
from opensora.models.weights.adapter_names import CONFIG, KINDS, METADATA_ALPHAS, WEIGHTS, sorted_names
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import FLOATS, OpenWeights, check_regular, check_types, open_weights
from opensora.utils.files.untrusted import parsing
from opensora.utils.files.user_files import absence

MAX_SCALE = 1e6  # alpha/rank, either way: beyond it the adapters drown any weights


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Adapters by layer, as the file calls them."""

    path: Path
    base: str | None  # where the weights are that they were trained beside
    tensors: dict[str, Tensor]  # on the CPU, such as "single_blocks.0.linear1.lora_A.weight"
    scales: dict[str, float]  # layer -> alpha/rank, what B A is multiplied by
    metadata: dict[str, str]  # of the safetensors file
    # (layer, weight or bias) -> what is added to that; on the CPU
    differences: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers they belong to."""
        return tuple(self.scales)

    def matrices(self, layer: str) -> tuple[Tensor, Tensor]:
        """A (rank, inputs) and B (outputs, rank)."""
        return self.tensors[f"{layer}{KINDS[0]}"], self.tensors[f"{layer}{KINDS[1]}"]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Layer -> (inputs, outputs)."""
        return {layer: (a.shape[1], b.shape[0]) for layer in self.scales for a, b in (self.matrices(layer),)}


def is_adapter(path: Path) -> bool:
    """Whether a folder holds adapters instead of a whole model."""
    return (path / CONFIG).is_file() or (path / WEIGHTS).is_file()


def read_adapter(path: Path) -> Adapter:
    """Adapters of a folder or a file, in any of the formats above.

    Raises:
        UserError: no adapters there, or of a kind that is not plain LoRA; values that are not finite.
    """
    file, config = _find(path)
    opened = open_weights(file)
    config = config or stated_config(opened)
    names = sorted_names(opened)
    matrices, alphas = names.matrices, names.alphas
    check_types(opened, (name for pair in (*matrices.values(), names.differences.values()) for name in pair))
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    source = ""
    for layer, (down, up) in matrices.items():
        a, b = _flat(*(_read(opened, name) for name in (down, up)))
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise UserError(f"{file}: {down} and {up} are {shapes}: must be (rank, inputs) and (outputs, rank)")
        alpha = _read(opened, alphas[layer]) if layer in alphas else None
        scales[layer], source = _scale(layer, a.shape[0], alpha, config, opened)
        tensors |= {f"{layer}{KINDS[0]}": a, f"{layer}{KINDS[1]}": b}
    if config and (other := [layer for layer in alphas if config.scale(layer, tensors) != scales[layer]]):
        announce(
            f"{config.path}: lora_alpha is not the alpha of {len(other)} layers in {file}; the alpha tensors count"
        )
    if matrices and not source:
        announce(f"{file}: says no alpha, so its adapters are added as they are (alpha = rank)")
    base = config.values.get("base_model_name_or_path") if config else None
    return Adapter(
        path=path,
        base=base if isinstance(base, str) else None,
        tensors=tensors,
        scales=scales,
        metadata=opened.metadata,
        differences=_differences(opened, names.differences, scales),
    )


def _differences(
    opened: OpenWeights, names: Mapping[tuple[str, str], str], scales: Mapping[str, float]
) -> dict[tuple[str, str], Tensor]:
    """What is added to weights and biases; a bias of B as its layer's product, times alpha/rank."""
    found: dict[tuple[str, str], Tensor] = {}
    for (layer, kind), name in names.items():
        if kind != "scaled bias":
            found[layer, kind] = _read(opened, name)
            continue
        if layer not in scales or (layer, "bias") in names:
            why = "two differences for the same place" if layer in scales else f"the matrices of {layer} are missing"
            raise UserError(f"{opened.path}: {name}: {why}; fetch or export the file again")
        found[layer, "bias"] = _read(opened, name).double() * scales[layer]
    return found


def _find(path: Path) -> tuple[Path, PeftConfig | None]:
    """The safetensors file at a path, and peft's configuration if there is one."""
    if reason := absence(path):
        raise UserError(f"{path}: {reason}; give a LoRA file, or a folder that peft or a LoRA run wrote")
    if path.name == CONFIG and path.is_file():
        path = path.parent
    if not path.is_dir():
        check_regular(path)
        beside = path.with_name(CONFIG)
        return path, read_peft_config(beside) if path.name == WEIGHTS and beside.is_file() else None
    config = read_peft_config(path / CONFIG) if os.path.lexists(path / CONFIG) else None
    if (path / WEIGHTS).exists():
        return path / WEIGHTS, config
    with parsing(lambda reason: UserError(f"{path}: cannot be read ({reason})")):
        found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0], config
    if found:
        raise UserError(f"{path}: holds {len(found)} safetensors files, as {found[0].name}; give one of them")
    pickled = next(iter(path.glob("adapter_model.bin")), None)
    if pickled:
        raise UserError(f"{pickled}: is pickled and not opened; save it again by save_pretrained, as safetensors")
    has = f"has no {WEIGHTS}" if config else f"has no {CONFIG} and no safetensors file"
    raise UserError(f"{path}: {has}; give a LoRA file, or a folder that a LoRA run exported, or peft saved")


def _read(opened: OpenWeights, name: str) -> Tensor:
    """A tensor whose values are all finite.

    Raises:
        UserError: they are not, or the file is cut short.
    """
    with parsing(lambda reason: UserError(f"{opened.path}: {name} cannot be read ({reason})")):
        tensor: Tensor = opened.file.get_tensor(name)
        finite = bool(torch.isfinite(tensor).all())
    if not finite:
        raise UserError(f"{opened.path}: {name} holds NaN or infinite values; give adapters without")
    return tensor


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as matrices where they are for a convolution: its inputs are those of all places, in the order of memory."""
    if a.dim() == b.dim() > 2 and b[0].numel() == b.shape[1]:
        return a.flatten(1), b.flatten(1)
    return a, b


def _scale(
    layer: str, rank: int, alpha: Tensor | None, config: PeftConfig | None, opened: OpenWeights
) -> tuple[float, str]:
    """(alpha/rank, where alpha is said), the nearest to the layer: its tensor, the configuration, the metadata."""
    stated = next((opened.metadata[key] for key in METADATA_ALPHAS if opened.metadata.get(key, "None") != "None"), None)
    if alpha is not None:
        source = f"{opened.path}: {layer}.alpha"
        kind = opened.types[f"{layer}.alpha"]
        if alpha.numel() != 1 or (kind not in FLOATS and kind[0] not in "IU"):
            raise UserError(f"{source} has {alpha.numel()} values of {kind}: must be one number")
        found, divisor = float(alpha), float(rank)
    elif config:
        found, divisor, source = config.alpha(layer), config.divisor(layer, rank), f"{config.path}: lora_alpha"
    elif stated is not None:
        source = f"{opened.path}: alpha in its metadata"
        with parsing(lambda reason: UserError(f"{source} is {stated!r}: must be a number")):
            found, divisor = float(stated), float(rank)
    else:
        return 1.0, ""
    if not math.isfinite(found) or found == 0:
        raise UserError(f"{source} is {found:g}: must be a finite number other than 0")
    if abs(found / divisor) > MAX_SCALE:
        raise UserError(f"{source} is {found:g}, for rank {rank}: alpha/rank is at most {MAX_SCALE:g}; mend the file")
    return found / divisor, source
