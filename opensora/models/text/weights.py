"""T5 and CLIP on the meta device, and what their weights are called in files.

Files hold the encoder alone or the whole model (the decoder of T5, the eyes of CLIP), with or without what stands
before the encoder's own names: ``encoder.`` in T5, ``text_model.`` in CLIP. T5's embedding is ``shared.weight``, and in
some files ``encoder.embed_tokens.weight`` as well, which is the same. All of it is decided here, by names alone;
``opensora/models/weights`` reads, and compares names and shapes with the model that config.json describes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from opensora.models.text.folder import check_folder, weights_of
from opensora.models.weights.format import Layout
from opensora.models.weights.plain import PlainWeights
from opensora.models.weights.reader import WeightFile, load_state_dict_for
from opensora.models.weights.rows import Shape, Target, whole
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parsing


@dataclass(kw_only=True)
class TextWeights(PlainWeights):
    """The format of one encoder's files."""

    prefix: str  # of the encoder's names in the whole model
    renamed: Mapping[str, str]  # name in files -> name in the encoder
    others: tuple[str, ...]  # patterns: of the other half of the model, in the same file

    def targets(self, shapes: Mapping[str, Shape], source: Layout, to: Layout) -> dict[str, Target]:
        """Under the encoder's own names."""
        return {self.own_name(name): whole(name, shape) for name, shape in shapes.items()}

    def own_name(self, name: str) -> str:
        """What a tensor is called in the encoder."""
        return self.renamed.get(name, name.removeprefix(self.prefix))

    def not_read(self, names: Collection[str]) -> tuple[str, ...]:
        """What is of other models, or there twice."""
        twice = [one for one, other in self.renamed.items() if other != one and self.prefix + other in names]
        repeated = [self.prefix + self.renamed[one] for one in twice if one in names]
        return (*(name for name in names if any(fnmatchcase(name, p) for p in self.others)), *repeated)


T5 = TextWeights(
    top_level=("shared", "encoder", "decoder", "lm_head", "block", "embed_tokens", "final_layer_norm"),
    prefix="encoder.",
    renamed={"shared.weight": "embed_tokens.weight"},
    others=("decoder.*", "lm_head.*"),
    torch_keys=(),
    advice="fetch the folder again, or one of this model",
    example_layer="block.0.layer.0.SelfAttention.q",
)
CLIP = TextWeights(
    top_level=(
        *("text_model", "embeddings", "encoder", "final_layer_norm"),
        *("vision_model", "text_projection", "visual_projection", "logit_scale"),
    ),
    prefix="text_model.",
    renamed={},
    others=("vision_model.*", "text_projection.*", "visual_projection.*", "logit_scale"),
    recomputed=("*position_ids",),  # counted upwards in files of old releases, and made anew by the model
    torch_keys=(),
    advice="fetch the folder again, or one of this model",
    example_layer="encoder.layers.0.self_attn.q_proj",
)


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

    return _opened(key, path, T5Config, lambda cfg: T5EncoderModel(cfg).encoder, T5, "block")


def open_clip(key: str, path: str) -> EncoderFile:
    """CLIP's text encoder of the folder; errors as of ``open_t5``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    def build(cfg: Any) -> Any:
        model = CLIPTextModel(cfg)
        return getattr(model, "text_model", model)  # one inside the other, by the release of transformers

    return _opened(key, path, CLIPTextConfig, build, CLIP, "encoder.layers")


def _opened(key: str, path: str, config: Any, build: Any, format: TextWeights, blocks: str) -> EncoderFile:
    folder, name = check_folder(key, path), f"text.{key}={path}"
    with parsing(lambda reason: UserError(f"{name}: cannot be loaded from this folder ({config.__name__}: {reason})")):
        stated = config.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            module = build(stated)
    module.eval().requires_grad_(False)
    module.block_lists = (blocks,)
    try:
        file, _ = load_state_dict_for(module, weights_of(path), format, to=format.original)
    except UserError as error:
        raise UserError(f"{name}: {str(error).removeprefix(f'{path}: ')}") from None
    return EncoderFile(module, file, name)


def restore_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Make what an encoder computes and no file holds, after it was allocated: positions, counted upwards."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            assert name == "position_ids", name
            owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
