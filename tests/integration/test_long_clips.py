"""The sampling command as by Open-Sora 1.x: references that stand in a clip, clips that go on, prompts with JSON, names
of files; from a model of random weights and an autoencoder that loses little."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from opensora.cli import sample
from opensora.datasets.decode import api
from opensora.inference.opensora_1x import clips
from opensora.inference.opensora_1x.references import read_reference
from opensora.models.families import build_model
from opensora.models.stdit import STDiT3Config
from opensora.models.vae import AUTOENCODER_CONFIGS, autoencoder_shape, build_autoencoder
from opensora.utils.errors import UserError
from opensora.utils.files.video_writer import write_video
from tests.dist.harness import run_distributed
from tests.dist.stdit import alive

SHAPE: dict[str, Any] = {"in_channels": 16, "caption_channels": 32, "hidden_size": 48, "num_heads": 4, "depth": 1}
MODEL = STDiT3Config(**SHAPE, model_max_length=8)
HEAD = """
vae: {kind: dct, channels: 16}
text: {kind: bytes, dim: 32, mask: true}
precision: fp32
sampling: {width: 40, height: 32, num_frames: 17, num_steps: 2, guidance: 3.0, fps: 8}
parallel: {zero: 0}
"""
FLOW = "objective: {kind: rectified_flow_v1}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, a picture, a clip of 21 frames."""
    folder = tmp_path_factory.mktemp("long")
    for name, more in (("plain", {}), ("beside", {"cond_embed": True})):
        model = build_model(STDiT3Config(**SHAPE, model_max_length=8, **more))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                alive(key, parameter)
        save_file({key: x.contiguous() for key, x in model.state_dict().items()}, folder / f"{name}.safetensors")
    picture = torch.arange(48 * 50 * 3).view(48, 50, 3) % 251
    Image.fromarray(picture.to(torch.uint8).numpy()).save(folder / "a.png")
    moving = torch.stack([(picture + 5 * frame) % 256 for frame in range(21)]).to(torch.uint8)
    write_video(folder / "b.mp4", moving[:, :, :48].contiguous().numpy(), 8)
    return folder


def job(folder: Path, text: str, weights: str = "plain") -> Path:
    """The configuration of a job."""
    shape = f"{SHAPE | {'model_max_length': 8, 'kind': 'stdit3', 'cond_embed': weights == 'beside'}}"
    shape = shape.replace("'", "").replace("True", "true").replace("False", "false")
    path = folder / "job.yaml"
    path.write_text(f"weights: {folder / weights}.safetensors\nmodel: {shape}\n{HEAD}\n{text}\n")
    return path


def run(argv: list[str], kept: str) -> int:
    """The command, which leaves the latents of every clip in a file of its rank."""
    found: list[torch.Tensor] = []
    plain = clips.LongClips._clip

    def listening(self: Any, *args: Any) -> Any:
        made = plain(self, *args)
        found.append(made.latents.clone())
        return made

    clips.LongClips._clip = listening  # type: ignore[method-assign]
    code = sample.main(argv)
    torch.save(found, f"{kept}{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}")
    return code


def sampled(folder: Path, path: Path, out: Path, world: int = 1, *words: str) -> list[torch.Tensor]:
    argv = [str(path), f"save_dir={out}", f"parallel.mesh.ulysses={world}", *words]
    assert run_distributed(run, world, argv, str(out.parent / "kept"), timeout=110, init=False) == [0] * world
    found: list[torch.Tensor] = torch.load(out.parent / "kept0", weights_only=True)
    return found


def coded(folder: Path, name: str) -> torch.Tensor:
    """(C, T', H', W'), as the command has to code it."""
    cfg = AUTOENCODER_CONFIGS["dct"](channels=16)
    pixels = read_reference(str(folder / name), (32, 40), autoencoder_shape(cfg), torch.float32)
    latents: torch.Tensor = build_autoencoder(cfg, torch.device("cpu"), torch.float32).encode(pixels[None])[0]
    return latents


def frames_of(path: Path) -> int:
    return api.probe(str(path)).num_frames


LOOPED = """
release: "1.2"
prompts: ['|0| a fox |1| runs{"reference_path": "A;B", "mask_strategy": "0;0,1,-2,2,9"}', a lake]
loop: 3
condition_frame_length: 2
condition_frame_edit: 0.0
aes: 6.5
save_fps: 5
"""


def looped(folder: Path) -> Path:
    text = LOOPED.replace("A;B", f"{folder / 'a.png'};{folder / 'b.mp4'}")
    return job(folder, f"{FLOW}\n{text}\nbatch_size: 2")


def check_looped(folder: Path, out: Path, found: list[torch.Tensor]) -> None:
    """5 latent frames a clip, of which later ones have 2 from the clip before; 17 frames, and twice 12 more."""
    assert [tuple(one.shape) for one in found] == [(2, 16, 5, 4, 5)] * 3
    picture, moving = coded(folder, "a.png"), coded(folder, "b.mp4")
    assert (picture.shape[1], moving.shape[1]) == (1, 6)
    assert torch.equal(found[0][0, :, 0], picture[:, 0])
    assert torch.equal(found[0][0, :, 2:4], moving[:, 4:6])
    assert not torch.equal(found[0][0, :, 4], moving[:, 5])
    for row in range(2):
        autoencoder = build_autoencoder(AUTOENCODER_CONFIGS["dct"](channels=16), torch.device("cpu"), torch.float32)
        again = autoencoder.encode(autoencoder.decode(found[0][row : row + 1]))
        assert torch.equal(found[1][row, :, :2], again[0, :, -2:])
    names = {path.name for path in out.iterdir()}
    assert names == {"sample_0000.mp4", "sample_0000.txt", "sample_0001.mp4", "sample_0001.txt", "contact_sheet.png"}
    told = "|0|a fox aesthetic score: 6.5.|1|runs aesthetic score: 6.5."
    assert (out / "sample_0000.txt").read_text().strip() == told
    assert frames_of(out / "sample_0000.mp4") == 17 + 2 * (17 - 5)
    assert api.probe(str(out / "sample_0001.mp4")).fps == 5


def test_references_and_clips_that_go_on(folder: Path, tmp_path: Path) -> None:
    check_looped(folder, tmp_path / "out", sampled(folder, looped(folder), tmp_path / "out"))


@pytest.mark.slow
def test_two_processes_make_the_same(folder: Path, tmp_path: Path) -> None:
    made = {}
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        out = tmp_path / str(world) / "out"
        found = sampled(folder, looped(folder), out, world, "precision=fp64")
        made[world] = (found, {file.name: file.read_bytes() for file in out.iterdir()})
    for one, two in zip(made[1][0], made[2][0], strict=True):
        assert ((one - two).abs().max() / one.abs().max()).item() <= 1e-10
    assert made[1][1] == made[2][1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t2v", "i2v_head", "i2v_loop", "v2v_head"])
def test_kinds_of_1_3(folder: Path, tmp_path: Path, kind: str) -> None:
    """Latents are joined, and nothing is put back."""
    given = "" if kind == "t2v" else f"reference_path: ['{folder / 'b.mp4'}']"
    text = f'release: "1.3"\nprompts: [a fox]\nloop: 2\ncondition_frame_length: 2\ncond_type: {kind}\n{given}'
    flow = "objective: {kind: rectified_flow_v1, version: '1.3'}"
    found = sampled(folder, job(folder, f"{flow}\n{text}", "beside"), tmp_path / "out")
    assert [tuple(one.shape) for one in found] == [(1, 16, 5, 4, 5)] * 2
    assert frames_of(tmp_path / "out" / "sample_0000.mp4") == (5 + 3 - 1) * 4 + 1
    assert not torch.equal(found[1][:, :, :2], found[0][:, :, -2:])


BAD: dict[str, tuple[str, str]] = {
    "no such file": ("reference_path: [none.png]\nmask_strategy: ['0']", "ref=none.png: "),
    "address": ("reference_path: ['https://a.b/c.mp4']\nmask_strategy: ['0']", "nothing is fetched; save it"),
    "no reference": ("mask_strategy: ['0,1']", "reference=1: there are none"),
    "beyond references": ("reference_path: [A]\nmask_strategy: ['0,1']", "reference=1: there is 1, counted from 0"),
    "beyond clips": (
        "loop: 2\ncondition_frame_length: 2\nmask_strategy: ['2']\nreference_path: [A]",
        "clip=2: there are 2 clips",
    ),
    "beyond the clip": ("reference_path: [A]\nmask_strategy: ['0,0,0,5']", "start=5 must be from -5 to 4"),
    "too long": ('release: "1.1"\nreference_path: [A]\nmask_strategy: ["0,0,0,0,3"]', "length=3 must be at most 1"),
    "no strategy": ("reference_path: [A]", "mask_strategy is missing"),
    "still": ("loop: 2\nsampling.num_frames: 1", "loop=2: must be 1 with sampling.num_frames=1"),
    "length": ("loop: 2\ncondition_frame_length: 5", "condition_frame_length=5: must be below 5"),
    "unknown key": ('release: "1.2"\nprompt: \'a {"ref": "a"}\'', "prompt 0: 'ref': unknown key in the JSON"),
    "kind": ("loop: 2\ncondition_frame_length: 2\ncond_type: i2v_head", "cond_type=i2v_head: model.kind=stdit3 takes"),
    "references": ("reference_path: [A, A]\nmask_strategy: ['0']", "reference_path: 2 entries for 1 prompts"),
    "score": ('release: "1.2"\nsampling.solver: euler\nflow: fast', "flow='fast': must be a number"),
    "both": ('release: "1.2"\nref: A\nreference_path: [A]\nmask_strategy: ["0"]', "ref: reference_path has"),
    "solver": (
        "loop: 2\ncondition_frame_length: 2\nobjective: {kind: iddpm}\nsampling.solver: dpm_solver",
        "sampling.solver=dpm_solver keeps no given frames",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_misuse_costs_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    text, expected = BAD[name]
    lines = text.replace("[A", f"[{folder / 'a.png'}").replace(" A]", f" {folder / 'a.png'}]").splitlines()
    words = [line.replace(": ", "=", 1) for line in lines if line.startswith("sampling.")]
    kept = "\n".join(line for line in lines if not line.startswith("sampling."))
    prompt = "" if "prompt:" in kept else "prompt: a fox"
    objective = "" if "objective:" in kept else FLOW
    with pytest.raises(UserError) as caught:
        sample.main([str(job(folder, f"{objective}\n{prompt}\n{kept}")), f"save_dir={tmp_path / 'out'}", *words])
    assert expected in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_that_take_nothing(folder: Path, tmp_path: Path) -> None:
    flow = "objective: {kind: rectified_flow_v1, version: '1.3'}\nprompt: a"
    for text, expected in (
        (f"reference_path: ['{folder / 'a.png'}']\nmask_strategy: ['0']", "mask_strategy: the model reads references"),
        (f"reference_path: ['{folder / 'a.png'}']", "ref: cond_type=t2v takes none"),
        ("loop: 2\ncondition_frame_length: 2\ncond_type: i2v_head", "cond_type=i2v_head: needs references"),
        (
            f"reference_path: ['{folder / 'a.png'};{folder / 'a.png'}']\ncond_type: i2v_head",
            "ref: 2 references for a prompt, cond_type=i2v_head takes at most 1",
        ),
        ("loop: 2\ncond_type: v2v_tail\nref: a.png\ncondition_frame_length: 2", "cond_type=v2v_tail: must be one of"),
    ):
        with pytest.raises(UserError) as caught:
            sample.main([str(job(folder, f"{flow}\n{text}", "beside")), f"save_dir={tmp_path / 'out'}"])
        assert expected in str(caught.value), str(caught.value)
    assert not (tmp_path / "out").exists()
