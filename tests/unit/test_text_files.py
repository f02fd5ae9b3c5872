"""T5 and CLIP from files of every shape that they are published in: the published code's features, or a refusal."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.models.text import T5ClipConfig, build_text_encoder
from opensora.models.text.t5_clip import T5ClipTextEncoder
from opensora.utils.errors import UserError

Tensors = dict[str, Tensor]
PROMPTS = ["a red circle", "", "two words and more words than eight", "a red circle"]


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def of_golden(golden: Path, **options: Any) -> T5ClipTextEncoder:
    text = golden / "text"
    cfg = T5ClipConfig(t5_path=str(text / "t5"), clip_path=str(text / "openai-clip"), max_tokens=16, **options)
    return T5ClipTextEncoder(cfg, "cpu", torch.float32)


def test_features_and_tokens_of_the_published_code(golden: Path) -> None:
    truth = load_file(golden / "text.safetensors")
    with safe_open(golden / "text.safetensors", "pt") as file:
        prompts = json.loads(file.metadata()["config"])["prompts"]
    encoder = of_golden(golden)
    features, (t5_ids, clip_ids) = encoder.encode(prompts), encoder.tokens(prompts)
    assert torch.equal(t5_ids, truth["out.t5.input_ids"]) and torch.equal(clip_ids, truth["out.clip.input_ids"])
    assert relative(features.txt, truth["out.t5.last_hidden_state"]) <= 1e-5
    assert relative(features.y_vec, truth["out.clip.pooled"]) <= 1e-5
    for added, align in ((10, 4), (3, 7)):
        wanted = truth[f"out.t5.seq_align_{align}_added_{added}"]
        aligned = encoder.encode(prompts[: len(wanted)], added_tokens=added, seq_align=align).txt
        assert aligned.shape == wanted.shape and relative(aligned, wanted) <= 1e-5
