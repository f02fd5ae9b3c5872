"""LoRA adapters into files: for peft, and for ComfyUI in the layout of the original release."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from opensora.models.weights.adapter_fit import fit_adapter
from opensora.models.weights.adapter_names import COMFYUI_PREFIX, CONFIG, KINDS, METADATA_ALPHAS, PREFIX, WEIGHTS
from opensora.models.weights.adapters import Adapter
from opensora.models.weights.format import Layout, WeightFormat
from opensora.models.weights.rows import Shape
from opensora.models.weights.writer import convert_shapes
from opensora.utils.files.safetensors_files import write_file, write_json


def write_adapter(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    rank: int,
    alpha: float,
    base: str | None,
    metadata: Mapping[str, str],
    write: bool = True,
    digests: dict[str, str] | None = None,
) -> None:
    """Write adapters for peft's ``PeftModel.from_pretrained`` and for ``read_adapter``.

    Args:
        weights: (parameter name, full tensor); may be a collective iterator, which every process has to walk.
        write: False on the processes that only walk.
        digests: gets the SHA-256 of every file by its name.
    """
    tensors = dict(weights)
    if not write:
        return
    named = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    stated = {METADATA_ALPHAS[0]: repr(float(alpha))}  # also without the file beside it
    write_file(folder / WEIGHTS, named, {**metadata, **stated}, digests)
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": [name.removesuffix(KINDS[0]) for name in tensors if name.endswith(KINDS[0])],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    write_json(folder / CONFIG, described, digests)


def convert_adapter(
    tensors: Mapping[str, Tensor],
    scale: float,
    shapes: Mapping[str, Shape],
    format: WeightFormat,
    *,
    source: Layout,
    to: Layout,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Adapters of a model of ours for the layers of the same model in layout ``to``: (tensors, layer -> scale).

    Args:
        tensors: A and B by parameter name.
        scale: alpha/rank of all of them.
        shapes: of all parameters of the model, in layout ``source``.
    """
    scales = {name.removesuffix(KINDS[0]): scale for name in tensors if name.endswith(KINDS[0])}
    ours = Adapter(path=Path(), base=None, tensors=dict(tensors), scales=scales, metadata=source.metadata())
    fitted, _ = fit_adapter(ours, convert_shapes(shapes, format, source=source, to=to), format, to)
    sizes = fitted.sizes()
    names = [f"{layer}{kind}" for layer in sizes for kind in KINDS]
    return {name: fitted.tensor(name) for name in names}, {layer: scale for layer, (_, scale) in sizes.items()}


def write_comfyui(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    scales: Mapping[str, float],
    metadata: Mapping[str, str],
    digests: dict[str, str] | None = None,
) -> None:
    """Write adapters as one file that ComfyUI reads, behind ``diffusion_model.`` and with an alpha per layer.

    Args:
        weights: full tensors by parameter name of the original layout.
        scales: layer -> alpha/rank.
        digests: gets the SHA-256 of the file by its name.
    """
    named = {f"{COMFYUI_PREFIX}{name}": tensor for name, tensor in weights.items()}
    for layer, scale in scales.items():
        alpha = scale * weights[f"{layer}{KINDS[0]}"].shape[0]
        named[f"{COMFYUI_PREFIX}{layer}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    write_file(folder / WEIGHTS, named, metadata, digests)
    (folder / CONFIG).unlink(missing_ok=True)  # of an earlier export, whose names were peft's
