"""peft's description of adapters, ``adapter_config.json``, or the same in the metadata of a file of diffusers."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from opensora.models.weights.adapter_names import KINDS, PREFIX
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import OpenWeights
from opensora.utils.files.untrusted import parse_json, parsing, read_small, short

# What peft can do beside W + alpha/r * B A; any of them set would be another model than the one we build.
OTHER = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "modules_to_save",
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
)
PLAIN_INIT = (True, False, "gaussian", "eva", "orthogonal")  # peft's others change the weights beside the adapters
_DIFFUSERS_CONFIG = "lora_adapter_metadata"  # peft's configuration as JSON, in a file that diffusers wrote
MAX_PATTERN = 200  # characters of a pattern in peft's configuration


@dataclass(frozen=True)
class PeftConfig:
    """What peft says of adapters."""

    path: Path
    values: Mapping[str, Any]

    def scale(self, layer: str, tensors: Mapping[str, Tensor]) -> float:
        """What B A of a layer is multiplied by, in the file's names."""
        return self.alpha(layer) / self.divisor(layer, tensors[f"{layer}{KINDS[0]}"].shape[0])

    def alpha(self, layer: str) -> float:
        return float(self._of(layer, "alpha_pattern", self.values["lora_alpha"]))

    def divisor(self, layer: str, rank: int) -> float:
        """What alpha is divided by.

        Raises:
            UserError: the matrices have another rank than is said.
        """
        wanted = self._of(layer, "rank_pattern", self.values["r"])
        if wanted != rank:
            raise UserError(f"{self.path}: {layer} is of rank {wanted} here, and its matrices are of rank {rank}")
        return math.sqrt(rank) if self.values.get("use_rslora") else float(rank)

    def _of(self, layer: str, patterns: str, otherwise: Any) -> Any:
        """The value of the layer's own name, as much of it as is there: diffusers writes one for every layer, and
        ``proj_out`` is the end of many. Else of the first pattern that names the layer, or its last parts where it
        does not begin with ^."""
        found, parts = self.values.get(patterns) or {}, layer.removeprefix(PREFIX).split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        if own := next((end for end in ends if end in found), None):
            return found[own]
        for pattern, value in found.items():
            expression = pattern.removeprefix("^").removesuffix("$")
            if any(re.fullmatch(expression, end) for end in (ends[:1] if pattern.startswith("^") else ends)):
                return value
        return otherwise


def stated_config(opened: OpenWeights) -> PeftConfig | None:
    """The configuration in the metadata of a file that diffusers wrote."""
    text = opened.metadata.get(_DIFFUSERS_CONFIG)
    if text is None:
        return None
    file = Path(f"{opened.path} ({_DIFFUSERS_CONFIG})")
    values = parse_json(text, lambda reason: UserError(f"{file}: not a description of adapters ({reason})"))
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a description of adapters; export the file again")
    own = {key.removeprefix("transformer."): value for key, value in values.items() if key.startswith("transformer.")}
    if not own and "r" in values:  # of a model by itself, not of a pipeline
        own = values
    return _checked(file, {"peft_type": "LORA", **own}) if own else None


def read_peft_config(file: Path) -> PeftConfig:
    """adapter_config.json.

    Raises:
        UserError: it cannot be read, or describes something else than plain LoRA.
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{file}: not a description of adapters ({reason})")

    with parsing(refuse):
        text = read_small(file)
    values = parse_json(text, refuse)
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a description of adapters; export the file again")
    return _checked(file, values)


def _checked(file: Path, values: dict[str, Any]) -> PeftConfig:
    """A configuration of plain LoRA.

    Raises:
        UserError: what else it describes.
    """
    kind, rank, alpha = (values.get(key) for key in ("peft_type", "r", "lora_alpha"))
    if kind != "LORA" or not _is_rank(rank) or not _is_number(alpha):
        said = f"peft_type={kind!r}, r={rank!r}, lora_alpha={alpha!r}"[:200]
        raise UserError(f"{file}: {said}: must have peft_type LORA, r a whole number >= 1, lora_alpha a number")
    for key in OTHER:
        if values.get(key):
            raise UserError(f"{file}: {key}={short(values[key])}: must be absent")
    if values.get("bias", "none") != "none":
        raise UserError(f"{file}: bias={short(values['bias'])}: must be none")
    init = values.get("init_lora_weights", True)
    if init not in PLAIN_INIT and init is not None:
        raise UserError(
            f"{file}: init_lora_weights={short(init)}: such adapters belong to weights that were changed with "
            "them; save them with path_initial_model_for_weight_conversion"
        )
    for key, allowed, fits in (
        ("rank_pattern", "whole numbers >= 1", _is_rank),
        ("alpha_pattern", "numbers", _is_number),
    ):
        patterns = values.get(key) or {}
        if not isinstance(patterns, dict) or not all(fits(value) for value in patterns.values()):
            raise UserError(f"{file}: {key}={short(patterns)}: must be names of layers, and {allowed}")
        for pattern in patterns:
            _check_pattern(file, key, pattern)
    return PeftConfig(file, values)


def _check_pattern(file: Path, key: str, pattern: str) -> None:
    """That a regular expression of a stranger is one, and short to try."""
    repeats = len(re.findall(r"[*+{]|\?", pattern))
    shown = short(repr(pattern), 60)
    if len(pattern) > MAX_PATTERN or repeats > 2 or re.search(r"\)[*+{?]", pattern):
        raise UserError(f"{file}: {key}: {shown} is too complex; save adapters with plain names of layers")
    with parsing(lambda reason: UserError(f"{file}: {key}: {shown} is no pattern ({reason})")):
        re.compile(pattern)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
