"""Names of files and tensors in the formats of LoRA that tools exchange: peft, diffusers, kohya's tools, ComfyUI.

All of them hold the same two matrices of a layer and perhaps their alpha; what was extracted from two sets of weights
has differences of biases and norms beside them. Other kinds of adapters than plain LoRA are known by their names and
refused, and parts for text encoders left out with a word.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import OpenWeights

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # peft's wrapper around a model
COMFYUI_PREFIX = "diffusion_model."
KINDS = (".lora_A.weight", ".lora_B.weight")
_OTHER_KINDS = (  # what a name has that is no plain LoRA, and what that is called
    (r"\.(dora_scale|lora_magnitude_vector|magnitude)\b", "DoRA"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.(oft|boft)_", "OFT"),
    (r"\.lora_mid\b", "LoCon with a third matrix"),
    (r"\.(on_input|ia3_l)\b", "IA3"),
    (r"\.vera_lambda", "VeRA"),
    (r"\.(set|reshape)_weight$", "whole weights"),
    (r"lora_embedding_", "LoRA of embeddings"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.processor\.", "LoRA as XLabs writes it, or an old diffusers"),
    (r"\blora_?(A|down)(\.\w+)?\.bias$", "LoRA with biases of A"),
)
_FOR_TEXT = re.compile(
    r"(lora_te\d?_|lora_prior_te_|(base_model\.model\.)?text_encoders?(_\d)?\.|te\d?\.|bundle_emb\.)"
)
_MATRIX = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.([^.]+))?\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
# What is added to a weight or a bias as it is; peft's bias of B, with alpha/rank.
_DIFFERENCES = {
    "weight": re.compile(r"(.+)\.(?:diff|w_norm)"),
    "bias": re.compile(r"(.+)\.(?:diff_b|b_norm)"),
    "scaled bias": re.compile(r"(.+?)[._]lora[._](?:B|up)(?:\.[^.]+)?\.bias"),
}
METADATA_ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha")  # ours, others', kohya's


@dataclass(frozen=True, kw_only=True)
class AdapterNames:
    """What the tensors of a file are, all by their names in it."""

    matrices: dict[str, tuple[str, str]]  # layer -> its A and B
    alphas: dict[str, str]  # layer -> its alpha
    differences: dict[tuple[str, str], str]  # (layer, one of weight, bias, scaled bias) -> what is added to that


def sorted_names(opened: OpenWeights) -> AdapterNames:
    """Which tensors of a file are what.

    Raises:
        UserError: anything else in the file.
    """
    differences = _differences(opened)
    halves: dict[str, dict[bool, str]] = {}
    alphas: dict[str, str] = {}
    versions: dict[str, str] = {}
    words: dict[bool, str] = {}
    for_text = [name for name in opened.shapes if _FOR_TEXT.match(name)]
    others = {*for_text, *differences.values()}
    for name in [name for name in opened.shapes if name not in others]:
        for pattern, kind in _OTHER_KINDS:
            if re.search(pattern, name):
                raise UserError(
                    f"{opened.path}: {name}: these are {kind}; must be plain LoRA. Merge them into the weights with "
                    "the tool that made them, and give those"
                )
        if match := _MATRIX.fullmatch(name):
            layer, is_up = match[1], match[2] in ("B", "up")
            versions.setdefault(match[3] or "", name)
            words.setdefault(match[2] in ("A", "B"), name)
            if is_up in halves.setdefault(layer, {}):
                raise UserError(f"{opened.path}: {halves[layer][is_up]} and {name}: two matrices for the same place")
            halves[layer][is_up] = name
        elif match := _ALPHA.fullmatch(name):
            alphas[match[1]] = name
        else:
            raise UserError(
                f"{opened.path}: {name} is no part of LoRA: names end in lora_A.weight and lora_B.weight, or "
                "lora_down.weight, lora_up.weight and alpha. Weights of a whole model are given as weights="
            )
    _check_pairs(opened.path, halves, alphas, versions, empty=not differences)
    if len(words) > 1:
        both = " and ".join(words.values())
        raise UserError(f"{opened.path}: {both}: names of two forms in one file; give a file of one")
    if for_text:
        announce(f"{opened.path}: {len(for_text)} tensors are for text encoders, as {for_text[0]}, and are left out")
    matrices = {layer: (half[False], half[True]) for layer, half in sorted(halves.items())}
    return AdapterNames(matrices=matrices, alphas=alphas, differences=differences)


def _differences(opened: OpenWeights) -> dict[tuple[str, str], str]:
    """(layer, kind) -> name of what is added to its weight or its bias.

    Raises:
        UserError: two for the same place.
    """
    found: dict[tuple[str, str], str] = {}
    for name in (name for name in opened.shapes if not _FOR_TEXT.match(name)):
        kind, match = next(
            ((k, m) for k, pattern in _DIFFERENCES.items() if (m := pattern.fullmatch(name))), ("", None)
        )
        if match is None:
            continue
        if (match[1], kind) in found:
            both = f"{found[match[1], kind]} and {name}"
            raise UserError(f"{opened.path}: {both}: two differences for the same place")
        found[match[1], kind] = name
    return found


def _check_pairs(
    path: Path,
    halves: Mapping[str, Mapping[bool, str]],
    alphas: Mapping[str, str],
    versions: Mapping[str, str],
    *,
    empty: bool,
) -> None:
    if not halves and empty:
        raise UserError(f"{path}: holds no adapters for the model")
    if len(versions) > 1:
        raise UserError(f"{path}: {' and '.join(list(versions.values())[:2])}: two adapters in one file; give one")
    for layer, half in halves.items():
        if len(half) == 1:
            (name,) = half.values()
            raise UserError(f"{path}: {name}: the other matrix of {layer} is missing; fetch or export the file again")
    for layer, name in alphas.items():
        if layer not in halves:
            raise UserError(f"{path}: {name}: the matrices of {layer} are missing; fetch or export the file again")
