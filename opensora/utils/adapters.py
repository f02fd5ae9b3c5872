"""Adapters on disk, as peft writes them: adapter_model.safetensors, and adapter_config.json that says what they are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.untrusted import ANY, NUMBER, WHOLE, mismatch, parse_json, parsing, read_small, require_file
from opensora.utils.weights import write_file, write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # peft's wrapper around a model
KINDS = (".lora_A.weight", ".lora_B.weight")
# What peft can do beside W + alpha/r * B A; any of them set would be another model than the one we build.
OTHER = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Adapters of one rank and their scale alpha/rank."""

    path: Path
    rank: int
    alpha: float
    base: str | None  # where the weights are that they were trained beside
    tensors: dict[str, Tensor]  # by parameter name of the model, such as "single_blocks.0.linear1.lora_A.weight"
    metadata: dict[str, str]  # of the safetensors file

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers they belong to."""
        return tuple(name.removesuffix(KINDS[0]) for name in self.tensors if name.endswith(KINDS[0]))


def is_adapter(path: Path) -> bool:
    """Whether a folder holds adapters instead of a whole model."""
    return (path / CONFIG).is_file()


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
    write_file(folder / WEIGHTS, named, metadata, digests)
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


def read_adapter(path: Path) -> Adapter:
    """Adapters of a folder that ``write_adapter`` or peft wrote; tensors on the CPU.

    Raises:
        UserError: no adapters there, or of a kind that is not plain LoRA of one rank.
    """
    config = _read_config(path)
    rank, alpha = config["r"], config["lora_alpha"]
    tensors: dict[str, Tensor] = {}
    unreadable = parsing(lambda why: UserError(f"{path / WEIGHTS}: cannot be read as safetensors ({why})"))
    with unreadable, safe_open(require_file(path / WEIGHTS), framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
        for key in opened.keys():  # noqa: SIM118 (not a dict)
            tensors[key.removeprefix(PREFIX)] = opened.get_tensor(key)
    for name, tensor in tensors.items():
        kind = next((kind for kind in KINDS if name.endswith(kind)), None)
        if kind is None or tensor.dim() != 2 or tensor.shape[KINDS.index(kind)] != rank:
            wanted = f"matrices called *{KINDS[0]} and *{KINDS[1]}, of rank {rank}"
            raise UserError(f"{path / WEIGHTS}: {name} {tuple(tensor.shape)}: allowed are {wanted}")
    base = config.get("base_model_name_or_path")
    return Adapter(path=path, rank=rank, alpha=alpha, base=base, tensors=tensors, metadata=metadata)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        content = read_small(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: has no {CONFIG}; give a folder that a LoRA run exported, or peft saved") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    config = parse_json(content, lambda why: UserError(f"{file}: not a description of adapters ({why})"))
    wrong = mismatch(config, {"peft_type": ANY, "r": ANY, "lora_alpha": ANY, "...": ANY})
    if wrong:
        raise UserError(f"{file}: not a description of adapters ({wrong})")
    kind, rank, alpha, base = (config.get(key) for key in ("peft_type", "r", "lora_alpha", "base_model_name_or_path"))
    if kind != "LORA" or not WHOLE.test(rank) or rank <= 0 or not NUMBER.test(alpha) or alpha <= 0:
        said = f"peft_type={kind!s:.40}, r={rank!s:.40}, lora_alpha={alpha!s:.40}"
        raise UserError(f"{file}: {said}: allowed is plain LORA")
    if base is not None and not isinstance(base, str):
        raise UserError(f"{file}: base_model_name_or_path={base!s:.80}: must be text or null")
    for key in OTHER:
        if config.get(key):
            raise UserError(f"{file}: {key}={config[key]!s:.80}: allowed are adapters without it")
    if config.get("bias", "none") != "none":
        raise UserError(f"{file}: bias={config['bias']!s:.80}: allowed is none")
    return dict(config)
