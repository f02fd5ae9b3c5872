"""Names of files and tensors in the formats of LoRA that tools exchange: peft, diffusers, kohya's tools, ComfyUI.

All of them hold the same two matrices of a layer and perhaps their alpha. Other kinds of adapters than plain LoRA are
known by their names and refused, and parts for text encoders left out with a word.
"""

import re
from collections.abc import Mapping
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
    (r"\.diff(_b)?$", "whole differences of weights"),
    (r"\.(w|b)_norm$", "changes of norms"),
    (r"\.(set|reshape)_weight$", "whole weights"),
    (r"lora_embedding_", "LoRA of embeddings"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.processor\.", "LoRA as XLabs writes it, or an old diffusers"),
    (r"\blora_?(A|B|down|up)(\.\w+)?\.bias$", "LoRA with biases"),
)
_FOR_TEXT = re.compile(
    r"(lora_te\d?_|lora_prior_te_|(base_model\.model\.)?text_encoders?(_\d)?\.|te\d?\.|bundle_emb\.)"
)
_MATRIX = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.([^.]+))?\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
METADATA_ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha")  # ours, others', kohya's


def sorted_names(opened: OpenWeights) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """(layer -> its A and B, layer -> its alpha), all by the names in the file.

    Raises:
        UserError: anything else in the file.
    """
    halves: dict[str, dict[bool, str]] = {}
    alphas: dict[str, str] = {}
    versions: dict[str, str] = {}
    words: dict[bool, str] = {}
    for_text = [name for name in opened.shapes if _FOR_TEXT.match(name)]
    for name in [name for name in opened.shapes if not _FOR_TEXT.match(name)]:
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
    _check_pairs(opened.path, halves, alphas, versions)
    if len(words) > 1:
        both = " and ".join(words.values())
        raise UserError(f"{opened.path}: {both}: names of two forms in one file; give a file of one")
    if for_text:
        announce(f"{opened.path}: {len(for_text)} tensors are for text encoders, as {for_text[0]}, and are left out")
    return {layer: (half[False], half[True]) for layer, half in sorted(halves.items())}, alphas


def _check_pairs(
    path: Path, halves: Mapping[str, Mapping[bool, str]], alphas: Mapping[str, str], versions: Mapping[str, str]
) -> None:
    if not halves:
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
