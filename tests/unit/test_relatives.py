"""Weights of models that are built around a Wan or a HunyuanVideo, and folders of whole pipelines: what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora.assembly.conversion import convert_weights
from opensora.assembly.initial_weights import check_weights
from opensora.models import hunyuan_video, wan
from opensora.models.families import build_model, family_of
from opensora.models.weights.reader import WeightFile
from opensora.utils.errors import UserError

SIZES: dict[str, Any] = {"wan": wan.SIZES["debug"], "hunyuan_video": hunyuan_video.SIZES["debug"]}
RELATIVES = [
    ("wan", "vace_blocks.0.before_proj.weight", "Wan VACE"),
    ("wan", "img_emb.emb_pos", "Wan FLF2V"),
    ("wan", "condition_embedder.image_embedder.pos_embed", "Wan FLF2V"),
    ("wan", "ref_conv.weight", "Wan Fun-Control"),
    ("wan", "audio_injector.injector.0.q.weight", "Wan S2V"),
    ("wan", "face_adapter.fuser_blocks.0.linear1_q.weight", "Wan Animate"),
    ("hunyuan_video", "clean_x_embedder.proj.weight", "FramePack"),
    ("hunyuan_video", "byt5_in.fc1.weight", "HunyuanVideo 1.5"),
    ("hunyuan_video", "context_embedder_2.linear_1.weight", "HunyuanVideo 1.5"),
]


def published(kind: str, folder: Path) -> dict[str, Tensor]:
    """A small model under the names of the release."""
    cfg = SIZES[kind]
    state = {name: torch.zeros(x.shape) for name, x in build_model(cfg).state_dict().items()}
    save_file(state, folder / "ours.safetensors", family_of(cfg).weights.layout(cfg).metadata())
    convert_weights(cfg, folder / "ours.safetensors", folder / "out", "original")
    return dict(WeightFile(folder / "out", family_of(cfg).weights))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("kind", "more", "model"), RELATIVES)
def test_weights_of_a_relative_are_named(kind: str, more: str, model: str, prefix: str, tmp_path: Path) -> None:
    """No size of ours reads them, so nobody is sent to look for one."""
    state, file = published(kind, tmp_path) | {more: torch.zeros(2)}, tmp_path / "a.safetensors"
    save_file({prefix + name: value for name, value in state.items()}, file)
    with pytest.raises(
        UserError, match=rf"^weights={file}: these are weights of {model}, which is another model: give"
    ):
        check_weights("weights", file, SIZES[kind])


@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        ("wan", ["high_noise_model", "low_noise_model"]),
        ("hunyuan_video", ["transformers"]),
        ("hunyuan_video", ["hunyuan-video-t2v-720p/transformers"]),
    ],
)
@pytest.mark.parametrize("beside", ["", "Wan2.1_VAE.pth"])
def test_a_published_folder_names_what_to_give(kind: str, inside: list[str], beside: str, tmp_path: Path) -> None:
    """Also where it holds an encoder as a pickle, which is no denoiser that somebody could convert."""
    for name in inside:
        (tmp_path / name).mkdir(parents=True)
    if beside:
        (tmp_path / beside).write_bytes(b"PK\x03\x04")
    wanted = " or ".join(str(tmp_path / name) for name in inside)
    with pytest.raises(UserError, match=rf"^weights={tmp_path}: holds no weights: give {wanted}$"):
        check_weights("weights", tmp_path, SIZES[kind])
