"""T5, umT5, Llama and both halves of CLIP on the meta device, and what their weights are called in files.

Files hold the encoder alone or the whole model (the decoder of T5, the other half of CLIP, the eyes of LLaVA), with or
without what stands before the encoder's own names: ``encoder.`` in T5, ``text_model.`` in CLIP. T5's embedding is
``shared.weight``, and in some files ``encoder.embed_tokens.weight`` as well, which is the same. All of it is decided
here, by names alone; ``opensora/models/weights`` reads, and compares names and shapes with the model that config.json
describes.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.models.text.folder import check_folder, named, stated_config, weights_of
from opensora.models.weights.format import Layout
from opensora.models.weights.plain import PlainWeights
from opensora.models.weights.reader import WeightFile, load_state_dict_for
from opensora.models.weights.rows import Shape, Target, whole
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parsing


@dataclass(kw_only=True)
class TextWeights(PlainWeights):
    """The format of one encoder's files."""

    prefixes: tuple[str, ...]  # of the encoder's names in whole models, longer ones first
    renamed: Mapping[str, str]  # name in files -> name in the encoder
    others: tuple[str, ...]  # patterns: of the other half of the model, in the same file

    def targets(self, shapes: Mapping[str, Shape], source: Layout, to: Layout) -> dict[str, Target]:
        """Under the encoder's own names."""
        return {self.own_name(name): whole(name, shape) for name, shape in shapes.items()}

    def own_name(self, name: str) -> str:
        """What a tensor is called in the encoder."""
        prefix = next((one for one in self.prefixes if name.startswith(one)), "")
        return self.renamed.get(name, name.removeprefix(prefix))

    def not_read(self, names: Collection[str]) -> tuple[str, ...]:
        """What is of other models, or there twice."""
        repeated = [
            prefix + other
            for one, other in self.renamed.items()
            for prefix in self.prefixes
            if one in names and other != one and prefix + other in names
        ]
        return (*(name for name in names if any(fnmatchcase(name, p) for p in self.others)), *repeated)


_EYES = ("vision_tower", "multi_modal_projector")
_LLAVA = ("model.language_model.", "language_model.model.", "model.")
T5 = TextWeights(
    top_level=("shared", "encoder", "decoder", "lm_head", "block", "embed_tokens", "final_layer_norm"),
    prefixes=("encoder.",),
    renamed={"shared.weight": "embed_tokens.weight"},
    others=("decoder.*", "lm_head.*", "spiece_model"),  # the last is the tokenizer, in files of ComfyUI
    torch_keys=(),
    advice="fetch the folder again, or one of this model",
    example_layer="block.0.layer.0.SelfAttention.q",
)
CLIP = TextWeights(
    top_level=(
        *("text_model", "embeddings", "encoder", "final_layer_norm"),
        *("vision_model", "text_projection", "visual_projection", "logit_scale"),
    ),
    prefixes=("text_model.",),
    renamed={},
    others=("vision_model.*", "text_projection.*", "visual_projection.*", "logit_scale"),
    recomputed=("*position_ids",),  # counted upwards in files of old releases, and made anew by the model
    torch_keys=(),
    advice="fetch the folder again, or one of this model",
    example_layer="encoder.layers.0.self_attn.q_proj",
)
CLIP_VISION = replace(
    CLIP,
    top_level=(*CLIP.top_level, "pre_layrnorm", "post_layernorm"),
    prefixes=("vision_model.",),
    others=("text_model.*", "text_projection.*", "visual_projection.*", "logit_scale", "*post_layernorm.*"),
)
LLAMA = TextWeights(
    top_level=("embed_tokens", "layers", "norm", "model", "language_model", "lm_head", *_EYES),
    prefixes=_LLAVA,
    renamed={},
    others=("*lm_head.*", *(f"*{name}.*" for name in _EYES), *(f"{one}norm.weight" for one in ("", *_LLAVA))),
    recomputed=("*rotary_emb.inv_freq",),
    torch_keys=(),
    advice="fetch the folder again, or one of this model",
    example_layer="layers.0.self_attn.q_proj",
)
SKIPPED = 2  # layers of Llama at its end that HunyuanVideo does not use


@dataclass(frozen=True)
class EncoderFile:
    """An encoder without memory, and the file that has its weights."""

    module: nn.Module  # on the meta device; ``block_lists`` names its blocks
    file: WeightFile
    key: str  # of the configuration, with its value, for messages

    def fill(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Allocate the module on ``device`` and read its weights, one parameter at a time.

        Raises:
            UserError: a value that is no finite number.
        """
        self.module.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                self.file.read_part(name, (0,) * parameter.dim(), parameter)
                if parameter.numel() and not all(torch.isfinite(end) for end in parameter.aminmax()):
                    raise UserError(f"{self.key}: {name} holds NaN or infinite values; give weights without")
        restore_buffers(self.module, device)


def open_t5(key: str, path: str) -> EncoderFile:
    """T5's encoder of the folder; names and shapes are checked, values not read.

    Raises:
        UserError: a folder that cannot be read, or tensors that are not those of its config.json, in one line.
    """
    from transformers import T5Config, T5EncoderModel

    return _opened(key, path, _reader(T5Config), lambda cfg: T5EncoderModel(cfg).encoder, T5, "block")


def open_umt5(key: str, path: str) -> EncoderFile:
    """umT5's encoder of the folder, whose names are T5's; errors as of ``open_t5``."""
    from transformers import UMT5Config, UMT5EncoderModel

    return _opened(key, path, _reader(UMT5Config), lambda cfg: UMT5EncoderModel(cfg).encoder, T5, "block")


def open_clip(key: str, path: str) -> EncoderFile:
    """CLIP's text encoder of the folder; errors as of ``open_t5``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    def build(cfg: Any) -> Any:
        model = CLIPTextModel(cfg)
        return getattr(model, "text_model", model)  # one inside the other, by the release of transformers

    return _opened(key, path, _reader(CLIPTextConfig), build, CLIP, "encoder.layers")


def open_clip_vision(key: str, path: str) -> EncoderFile:
    """CLIP's image encoder of the folder without its last layer; errors as of ``open_t5``.

    Its result is then what the layer before the last gives, without a norm.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    def build(cfg: Any) -> Any:
        model = CLIPVisionModel(cfg)
        model = getattr(model, "vision_model", model)
        model.post_layernorm = nn.Identity()
        return model

    read = _reader(CLIPVisionConfig)
    return _opened(key, path, read, build, CLIP_VISION, "encoder.layers", skipped=1)


def open_llama(key: str, path: str) -> EncoderFile:
    """The Llama of a folder, which may be a LLaVA's, without its last two layers and its last norm: its result is the
    hidden state third from the end. Errors as of ``open_t5``."""
    from transformers import LlamaConfig, LlamaModel, LlavaConfig

    def read(folder: Path) -> Any:
        is_llava = "llava" in str(stated_config(key, path).get("model_type"))
        found = (LlavaConfig if is_llava else LlamaConfig).from_pretrained(str(folder), local_files_only=True)
        found = getattr(found, "text_config", found)
        if not isinstance(found, LlamaConfig):
            told = f"its text_config is a {type(found).__name__}, must be a LlamaConfig"
            raise UserError(f"{named(key, path)}: {told}; give a LLaVA of Llama 3")
        return found

    def build(cfg: Any) -> Any:
        model = LlamaModel(cfg)
        model.norm = nn.Identity()
        return model

    return _opened(key, path, read, build, LLAMA, "layers", skipped=SKIPPED)


def _reader(config: Any) -> Callable[[Path], Any]:
    """What reads a config.json."""

    def read(folder: Path) -> Any:
        return config.from_pretrained(str(folder), local_files_only=True)

    read.__name__ = config.__name__
    return read


def _opened(
    key: str,
    path: str,
    read: Callable[[Path], Any],
    build: Callable[[Any], Any],
    format: TextWeights,
    blocks: str,
    *,
    skipped: int = 0,
) -> EncoderFile:
    """
    Args:
        skipped: layers at the end that are neither built nor read.
    """
    folder, name = check_folder(key, path), named(key, path)
    with parsing(lambda reason: UserError(f"{name}: cannot be loaded from this folder ({read.__name__}: {reason})")):
        stated = read(folder)
        if skipped:
            stated.num_hidden_layers = _without(stated.num_hidden_layers, skipped, name)
            ends = range(stated.num_hidden_layers, stated.num_hidden_layers + skipped)
            format = replace(format, others=(*format.others, *(f"*layers.{number}.*" for number in ends)))
        with torch.device("meta"):
            module = build(stated)
    module.eval().requires_grad_(False)
    module.block_lists = (blocks,)
    try:
        file, _ = load_state_dict_for(module, weights_of(key, path), format, to=format.original)
    except UserError as error:
        raise UserError(f"{name}: {str(error).removeprefix(f'{path}: ')}") from None
    return EncoderFile(module, file, name)


def _without(layers: int, skipped: int, name: str) -> int:
    if layers <= skipped:
        raise UserError(f"{name}: config.json has num_hidden_layers={layers}, must be more than {skipped}")
    return layers - skipped


def restore_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Make what an encoder computes and no file holds, after it was allocated: positions, counted upwards, and the
    frequencies of rotary positions, in fp32 whatever its weights are in."""
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if name == "position_ids":
                owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                continue
            assert name in ("inv_freq", "original_inv_freq"), name
            fresh: Any = type(owner)(owner.config)
            setattr(owner, name, getattr(fresh, name).to(device))
