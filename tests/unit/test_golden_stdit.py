"""STDiT of Open-Sora 1.0 to 1.3 against tensors that its published code has computed: output, loss, gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor, nn

from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.assembly.token_layout import TokenLayout, token_layout
from opensora.models.families import MODEL_CONFIGS, build_model, family_of
from opensora.models.weights.patches import PUBLISHED
from opensora.models.weights.writer import convert_state_dict

LIMIT = 1e-5
KINDS = {"STDiT": "stdit", "STDiT2": "stdit2", "STDiT3": "stdit3"}
NAMES = (
    *("stdit_v1_0", "stdit_v1_0_uncond_mask_repeat", "stdit_v1_2_xmask"),
    *("stdit2_v1_1", "stdit2_v1_1_qknorm_xmask", "stdit2_v1_2_qknorm_after_fix"),
    *("stdit3_v1_2", "stdit3_v1_2_xmask", "stdit3_v1_2_cached_text"),
    *("stdit3_v1_3_window_t2v", "stdit3_v1_3_window_i2v", "stdit3_v1_3_plain"),
)
# Latents of a clip, which tokens say; and what is of training alone.
UNREAD = ("input_size", "drop_path", "class_dropout_prob", "no_temporal_pos_emb", "use_cond", "adapt_16ch")


def relative(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value; of a gradient that is zero, as of known frames where none are, the
    difference itself."""
    return float((found - truth).abs().max() / (truth.abs().max() or 1.0))


class Golden:
    """One file: a model, its inputs, and what the published code made of them."""

    def __init__(self, folder: Path, name: str) -> None:
        with safe_open(folder / "v1" / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.case: dict[str, Any] = json.loads((folder / "v1" / "models.json").read_text())[name]

    def part(self, prefix: str) -> dict[str, Tensor]:
        found = {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}
        return {key: x.float() if x.is_floating_point() else x for key, x in found.items()}

    @property
    def config(self) -> Any:
        """The published constructor's arguments are ours, but for what versions did alike."""
        args = {name: value for name, value in self.case["args"].items() if name not in UNREAD}
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
        kind = KINDS[self.case["model"]]
        if self.case["version"] == "v1.3":
            args["cond_embed"] = True
        return MODEL_CONFIGS[kind](kind=kind, **args)

    def model(self) -> nn.Module:
        """With the file's weights, by the family's format."""
        cfg = self.config
        format = family_of(cfg).weights
        weights = {n: x for n, x in self.part("w.").items() if not n.startswith("pos_embed")}
        model = build_model(cfg)
        model.load_state_dict(convert_state_dict(weights, format, source=PUBLISHED, to=format.layout(cfg)))
        return model

    def inputs(self, layout: TokenLayout, latents: Tensor) -> dict[str, Any]:
        """Arguments of the forward, with latents as tokens."""
        found: dict[str, Any] = self.part("in.") | self.case["plain_inputs"]
        grid = layout.denoising.grid((latents.shape[2], latents.shape[3], latents.shape[4]))
        found |= {"x": layout.patchify(latents), "positions": layout.positions(grid, len(latents), "cpu")}
        if found["y"].ndim == 4:
            found["y"] = found["y"][:, 0]
        else:
            found["mask"] = found["mask"].tolist()
        if "y_null" in found:
            found["y_null"] = found["y_null"][:, 0]
        found |= {name: layout.patchify(found[name]) for name in ("cond", "cond_mask") if name in found}
        return found if self.case["model"] == "STDiT" else found | {"grid": grid.sides}


@pytest.mark.parametrize("name", NAMES)
def test_output_loss_and_gradients(golden: Path, name: str) -> None:
    check(Golden(golden, name))


def test_files_that_this_one_does_not_name(golden: Path) -> None:
    """Whatever else of these models is there."""
    for name, case in json.loads((golden / "v1" / "models.json").read_text()).items():
        if case["model"] in KINDS and name not in NAMES:
            check(Golden(golden, name))


def check(file: Golden) -> None:
    cfg, model = file.config, file.model()
    layout = token_layout(cfg, SequenceParallel(meshes.view({})))
    latents = file.part("in.")["x"].requires_grad_()
    out = model(**file.inputs(layout, latents))
    out = layout.unpatchify(out, layout.denoising.grid((latents.shape[2], latents.shape[3], latents.shape[4])))
    loss = (out - file.part("target")[""]).square().mean()
    loss.backward()
    assert relative(out.detach(), file.part("out")[""]) <= LIMIT
    assert relative(loss.detach(), file.part("loss")[""]) <= LIMIT
    assert latents.grad is not None
    assert relative(latents.grad, file.part("g_in.")["x"]) <= LIMIT

    format = family_of(cfg).weights
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs = convert_state_dict(gradients, format, source=format.layout(cfg), to=PUBLISHED)
    listed = file.part("g.")
    assert listed and listed.keys() <= theirs.keys()
    for parameter, gradient in listed.items():
        assert relative(theirs[parameter], gradient) <= LIMIT, parameter
