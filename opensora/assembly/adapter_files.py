"""LoRA files for a model: read for its layers, and written in another form."""

from collections.abc import Sequence
from pathlib import Path

from opensora.assembly.initial_weights import parameter_shapes
from opensora.models.base import ModelConfig
from opensora.models.families import family_of
from opensora.models.weights.adapter_export import FORMS, export_adapter, forms_of
from opensora.models.weights.adapter_fit import FittedAdapter, fit_adapter
from opensora.models.weights.adapter_names import CONFIG, WEIGHTS
from opensora.models.weights.adapters import Adapter, read_adapter
from opensora.utils.command_line.command import naming
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files import digests
from opensora.utils.files.user_files import absence, try_output

FORM_NAMES = tuple(FORMS)  # of the forms to write, the default first


def fitted_adapters(path: Path, model: ModelConfig, key: str) -> FittedAdapter:
    """Adapters of a folder or a file, as the model's layers need them. What they are is said.

    Raises:
        UserError: they do not fit the model.
    """
    format = family_of(model).weights
    if reason := absence(path):
        raise UserError(f"{key}={path}: {reason}; give a LoRA file, or a folder that peft or a LoRA run wrote")
    try:
        adapter = read_adapter(path)
    except UserError as error:
        if path.is_dir():
            digests.verify(path, [WEIGHTS, CONFIG])  # then damage is the better reason
        raise UserError(f"{key}={error}") from None  # which begins with the file or folder
    try:
        fitted, plan = fit_adapter(adapter, parameter_shapes(model), format, format.layout(model))
    except ValueError as error:
        raise UserError(f"{key}={path}: {error}; these adapters belong to another model") from None
    announce(f"{key}={path}: {_described(adapter, plan.left_out)}{f', names behind {plan.prefix}' * bool(plan.prefix)}")
    if plan.guess:
        announce(f"{key}={path}: {plan.guess}")
    return fitted


def convert_adapters(model: ModelConfig, source: Path, target: Path, form: str) -> Path:
    """Write the adapters at ``source`` in another form; the file written.

    Args:
        target: a folder, or a file ``*.safetensors``; of peft's form a folder.

    Raises:
        UserError: they do not fit the model, its family has no such form, or ``target`` cannot be written.
    """
    format, layout = family_of(model).weights, family_of(model).weights.layout(model)
    if form not in (forms := forms_of(format)):
        raise UserError(f"--form {form}: model.kind={model.kind} has no such names; must be one of {', '.join(forms)}")
    is_file = target.suffix == ".safetensors"
    if form == "peft" and is_file:
        raise UserError(f"--to {target}: peft's form is a folder of two files; give a folder")
    made = fitted_adapters(source, model, "lora").plain()
    stated = {key: value for key, value in made.metadata.items() if key in ("base", "step", "weights")}
    if made.differences and not FORMS[form].differences:
        layer, kind = next(iter(made.differences))
        raise UserError(f"--form {form}: has no name for the difference of the {kind} of {layer}; use comfyui")
    try_output(target, "--to", folder=not is_file)
    with naming(target):
        shapes = parameter_shapes(model)
        return export_adapter(target, made, form, shapes=shapes, format=format, layout=layout, metadata=stated)


def _described(adapter: Adapter, left_out: Sequence[str]) -> str:
    """How many adapters, of which rank and scale, and what else is in the file."""

    def span(values: list[float]) -> str:
        low, high = f"{min(values):g}", f"{max(values):g}"
        return low if low == high else f"{low} to {high}"

    kept = [layer for layer in adapter.layers if layer not in left_out]
    ranks = [float(adapter.matrices(layer)[0].shape[0]) for layer in kept]
    scales = [adapter.scales[layer] for layer in kept]
    parts = [f"adapters of {len(kept)} layers, rank {span(ranks)}, alpha/rank {span(scales)}"] if kept else []
    if count := sum(layer not in left_out for layer, _ in adapter.differences):
        parts.append(f"differences of {count} tensors, which are added as they are")
    if left_out:
        lacked = "layers that this size of the model lacks, or has with other inputs, are left out"
        parts.append(f"{len(left_out)} {lacked}, as {left_out[0]}")
    return ", ".join(parts)
