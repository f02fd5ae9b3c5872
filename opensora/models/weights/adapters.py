"""LoRA adapters on disk: W + alpha/rank * B A, in the formats that tools exchange.

* peft: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``, which says rank and alpha;
* one safetensors file of kohya's tools, ComfyUI or diffusers: ``lora_A``, ``lora_B`` or ``lora_down``, ``lora_up``, and
  an ``alpha`` per layer, or alpha in the metadata, or none.

What the layers are called is left to the model (``plan_adapter`` in models/mmdit/convert.py). Other kinds of adapters
are refused by their names, and parts for text encoders left out with a word.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import (
    FLOATS,
    OpenWeights,
    check_regular,
    check_types,
    open_weights,
    write_file,
    write_json,
)
from opensora.utils.files.untrusted import parse_json, parsing, read_small, short
from opensora.utils.files.user_files import absence

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # peft's wrapper around a model
COMFYUI_PREFIX = "diffusion_model."
KINDS = (".lora_A.weight", ".lora_B.weight")
# What peft can do beside W + alpha/r * B A; any of them set would be another model than the one we build.
OTHER = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
)
PLAIN_INIT = (True, False, "gaussian", "eva", "orthogonal")  # peft's others change the weights beside the adapters
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
_METADATA_ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha")  # ours, others', kohya's
_DIFFUSERS_CONFIG = "lora_adapter_metadata"  # peft's configuration as JSON, in a file that diffusers wrote
MAX_SCALE = 1e6  # alpha/rank, either way: beyond it the adapters drown any weights
MAX_PATTERN = 200  # characters of a pattern in peft's configuration


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Adapters by layer, as the file calls them."""

    path: Path
    base: str | None  # where the weights are that they were trained beside
    tensors: dict[str, Tensor]  # on the CPU, such as "single_blocks.0.linear1.lora_A.weight"
    scales: dict[str, float]  # layer -> alpha/rank, what B A is multiplied by
    metadata: dict[str, str]  # of the safetensors file

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


@dataclass(frozen=True, kw_only=True)
class AdapterRows:
    """Rows of B of one adapter, and where they go in a layer of a model."""

    layer: str  # of the adapter
    rows: Tensor  # (n,) indices
    start: int  # first row of the model's layer


@dataclass(frozen=True)
class FittedAdapter:
    """Adapters as the layers of a model need them, put together from those of a file when they are asked for.

    A layer that is made of several of the file's (q, k, v in one) has the sum of their ranks, and zeros in B where a
    row has no part in one of them. One that is a part of a file's layer has rows of its B.
    """

    adapter: Adapter
    pieces: Mapping[str, Sequence[AdapterRows]]  # by layer of the model
    outputs: Mapping[str, int]  # of every layer of the model

    def sizes(self) -> dict[str, tuple[int, float]]:
        """Layer of the model -> (rank, what B A is multiplied by)."""
        return {
            layer: (sum(self._ranks(layer).values()), self._scale(layer)) for layer in self.pieces if self._ranks(layer)
        }

    def tensor(self, name: str) -> Tensor:
        """A or B of a layer of the model, by its parameter's name."""
        kind = KINDS[0] if name.endswith(KINDS[0]) else KINDS[1]
        layer = name.removesuffix(kind)
        ranks = self._ranks(layer)
        if kind == KINDS[0]:
            found = [self.adapter.matrices(source)[0] for source in ranks]
            return found[0] if len(found) == 1 else torch.cat(found)
        first = dict(zip(ranks, _starts(ranks.values()), strict=True))
        scale = self._scale(layer)
        dtypes = {self.adapter.matrices(source)[1].dtype for source in ranks}
        whole = torch.zeros(self.outputs[layer], sum(ranks.values()), dtype=_widest(dtypes))
        for piece in self.pieces[layer]:
            own = self.adapter.scales[piece.layer]
            b = self.adapter.matrices(piece.layer)[1][piece.rows]
            if own != scale:  # exactly, and rounded once where the value is used
                whole, b = whole.double(), b.double() * own / scale
            columns = slice(first[piece.layer], first[piece.layer] + ranks[piece.layer])
            whole[piece.start : piece.start + len(piece.rows), columns] = b
        return whole

    def _ranks(self, layer: str) -> dict[str, int]:
        """Rank of each of the file's adapters that a layer of the model is made of."""
        sources = dict.fromkeys(piece.layer for piece in self.pieces[layer])
        return {source: self.adapter.matrices(source)[0].shape[0] for source in sources}

    def _scale(self, layer: str) -> float:
        scales = {self.adapter.scales[source] for source in self._ranks(layer)}
        return scales.pop() if len(scales) == 1 else 1.0


def _starts(sizes: Iterable[int]) -> list[int]:
    starts, position = [], 0
    for size in sizes:
        starts.append(position)
        position += size
    return starts


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    widest = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    assert widest is not None
    return widest


def is_adapter(path: Path) -> bool:
    """Whether a folder holds adapters instead of a whole model."""
    return (path / CONFIG).is_file() or (path / WEIGHTS).is_file()


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
    stated = {_METADATA_ALPHAS[0]: repr(float(alpha))}  # also without the file beside it
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
        weights: full tensors by parameter name of the Flux layout.
        scales: layer -> alpha/rank.
        digests: gets the SHA-256 of the file by its name.
    """
    named = {f"{COMFYUI_PREFIX}{name}": tensor for name, tensor in weights.items()}
    for layer, scale in scales.items():
        alpha = scale * weights[f"{layer}{KINDS[0]}"].shape[0]
        named[f"{COMFYUI_PREFIX}{layer}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    write_file(folder / WEIGHTS, named, metadata, digests)
    (folder / CONFIG).unlink(missing_ok=True)  # of an earlier export, whose names were peft's


def read_adapter(path: Path) -> Adapter:
    """Adapters of a folder or a file, in any of the formats above.

    Raises:
        UserError: no adapters there, or of a kind that is not plain LoRA; values that are not finite.
    """
    file, config = _find(path)
    opened = open_weights(file)
    config = config or _stated_config(opened)
    matrices, alphas = _sorted_names(opened)
    check_types(opened, (name for pair in matrices.values() for name in pair))
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    source = ""
    for layer, (down, up) in matrices.items():
        a, b = (_read(opened, name) for name in (down, up))
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
    if not source:
        announce(f"{file}: says no alpha, so its adapters are added as they are (alpha = rank)")
    base = config.values.get("base_model_name_or_path") if config else None
    return Adapter(
        path=path,
        base=base if isinstance(base, str) else None,
        tensors=tensors,
        scales=scales,
        metadata=opened.metadata,
    )


def _find(path: Path) -> tuple[Path, "_PeftConfig | None"]:
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


def _sorted_names(opened: OpenWeights) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """(layer -> its A and B, layer -> its alpha), all by the names in the file.

    Raises:
        UserError: anything else in the file.
    """
    halves: dict[str, dict[bool, str]] = {}
    alphas: dict[str, str] = {}
    versions: dict[str, str] = {}
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


def _scale(
    layer: str, rank: int, alpha: Tensor | None, config: "_PeftConfig | None", opened: OpenWeights
) -> tuple[float, str]:
    """(alpha/rank, where alpha is said), the nearest to the layer: its tensor, the configuration, the metadata."""
    stated = next(
        (opened.metadata[key] for key in _METADATA_ALPHAS if opened.metadata.get(key, "None") != "None"), None
    )
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


@dataclass(frozen=True)
class _PeftConfig:
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


def _stated_config(opened: OpenWeights) -> _PeftConfig | None:
    """The configuration in the metadata of a file that diffusers wrote."""
    text = opened.metadata.get(_DIFFUSERS_CONFIG)
    if text is None:
        return None
    file = Path(f"{opened.path} ({_DIFFUSERS_CONFIG})")
    values = parse_json(text, lambda reason: UserError(f"{file}: not a description of adapters ({reason})"))
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a description of adapters; export the file again")
    own = {key.removeprefix("transformer."): value for key, value in values.items() if key.startswith("transformer.")}
    return _checked(file, {"peft_type": "LORA", **own}) if own else None


def read_peft_config(file: Path) -> _PeftConfig:
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


def _checked(file: Path, values: dict[str, Any]) -> _PeftConfig:
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
    return _PeftConfig(file, values)


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
