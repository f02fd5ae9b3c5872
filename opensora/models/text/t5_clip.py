"""T5 and CLIP as Open-Sora 2 and Flux use them: T5's last hidden state as txt, CLIP's pooled text as y_vec.

Both come from local folders in the layout of transformers (config.json, *.safetensors, tokenizer files); nothing is
fetched. T5 is padded to ``max_tokens`` and its padding is attended, by T5 itself and by the denoiser.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opensora.models.base import TextFeatures
from opensora.models.pretrained import load_pretrained
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parse_json, parsing
from opensora.utils.files.user_files import absence, read_text
from opensora.utils.limits import Limits

CLIP_TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class T5ClipConfig:
    """Folders of the two models. T5 v1.1 XXL gives 4096 dims, CLIP ViT-L/14 768."""

    kind: Literal["t5_clip"] = "t5_clip"
    t5_path: str = ""
    clip_path: str = ""
    max_tokens: int = 512

    LIMITS: ClassVar[Limits] = {"max_tokens": (65536, "T5 attends to all pairs of them")}

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be an integer >= 1")


class T5ClipTextEncoder:
    """Prompt -> T5 rows and a CLIP vector."""

    def __init__(
        self, cfg: T5ClipConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel

        self.cfg = cfg
        self._device = device
        t5_folder, clip_folder = check_folder("t5_path", cfg.t5_path), check_folder("clip_path", cfg.clip_path)
        self._t5_tokenizer = _tokenizer("t5_path", t5_folder, AutoTokenizer)
        self._clip_tokenizer = _tokenizer("clip_path", clip_folder, CLIPTokenizer)
        self._t5 = load_pretrained("text.t5_path", t5_folder, T5EncoderModel, dtype=dtype).to(device)
        self._clip = load_pretrained("text.clip_path", clip_folder, CLIPTextModel, dtype=dtype).to(device)
        self.context_dim: int = self._t5.config.d_model
        self.vec_dim: int = self._clip.config.hidden_size

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        """txt (B, max_tokens, context_dim), y_vec (B, vec_dim); longer prompts are cut."""
        t5_ids = self._tokens(self._t5_tokenizer, prompts, self.cfg.max_tokens)
        # CLIP tokenizers built from bare vocabulary files claim an unlimited length, so it is stated here.
        clip_ids = self._tokens(self._clip_tokenizer, prompts, CLIP_TOKENS)
        return TextFeatures(
            txt=self._t5(input_ids=t5_ids).last_hidden_state, y_vec=self._clip(input_ids=clip_ids).pooler_output
        )

    def _tokens(self, tokenizer: Any, prompts: list[str], length: int) -> Tensor:
        batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return batch["input_ids"].to(self._device)


def check_folder(key: str, path: str) -> str:
    """``path``, if it may hold a transformers model.

    Raises:
        UserError: no path, no such folder, or no weights in it.
    """
    if not path:
        raise UserError(f"text.{key} is not set: give the folder of a transformers model, or set text.kind=bytes")
    if reason := absence(Path(path) / "config.json", "file"):
        detail = "" if reason.startswith("no such") else f" ({reason})"
        raise UserError(f"text.{key}={path}: no config.json there{detail}; give the folder of a transformers model")
    if not any(Path(path).glob("*.safetensors")) and not any(Path(path).glob("*.bin")):
        raise UserError(f"text.{key}={path}: cannot be loaded, no *.safetensors beside config.json; fetch them")
    return path


def stated_widths(cfg: T5ClipConfig) -> tuple[int | None, int | None]:
    """Widths of T5's tokens and of CLIP's vector, by the config.json of their folders; None: it does not say.

    Raises:
        UserError: as ``_stated_width``.
    """
    return _stated_width("t5_path", cfg.t5_path, "d_model"), _stated_width("clip_path", cfg.clip_path, "hidden_size")


def _stated_width(key: str, path: str, name: str) -> int | None:
    """Width of the features that the model in a folder gives, by its config.json; None: it does not say.

    Raises:
        UserError: as ``check_folder``, or config.json cannot be read.
    """
    file = Path(check_folder(key, path)) / "config.json"
    refuse = partial(_unreadable, key, path)
    stated = parse_json(read_text(file, f"text.{key}={file}"), refuse)
    if not isinstance(stated, dict):
        raise refuse("no mapping")
    both = stated.get("text_config")  # of a CLIP that reads pictures too
    width = stated.get(name, both.get(name) if isinstance(both, dict) else None)
    return width if isinstance(width, int) else None


def _unreadable(key: str, path: str, reason: str) -> UserError:
    return UserError(f"text.{key}={path}: config.json is not readable as JSON ({reason})")


def _tokenizer(key: str, path: str, loader: Any) -> Any:
    name = f"text.{key}={path}: {loader.__name__} cannot be loaded from this folder"
    with parsing(lambda reason: UserError(f"{name}: {reason}")):
        return loader.from_pretrained(path, local_files_only=True)
