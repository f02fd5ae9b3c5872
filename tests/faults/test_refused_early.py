"""What can be known from texts and headers of files is refused before the run's folder is made or a model is built."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from opensora.cli import sample, train
from opensora.cli.main import run_cli
from opensora.config.load import load_config, save
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference import check
from opensora.inference.check import least_bytes
from opensora.inference.find import find_source
from opensora.inference.prompts import read_jobs
from opensora.models.families import build_model, count_parameters
from opensora.models.mmdit.convert import WEIGHTS
from opensora.models.vae import autoencoder_shape
from opensora.models.weights.writer import save_state_dict
from opensora.sampling.options import SamplingOption, sanitize_sampling_option
from opensora.utils.errors import UserError
from tests.faults.conftest import Tally
from tests.integration.conftest import CONFIG

TABLE = "path,text,num_frames,height,width,fps\na.mp4,one,9,32,32,8\nb.mp4,two,9,32,32,8\nc.png,three,1,32,32,\n"
SAMPLING = (
    "weights: {folder}/exported\nsave_dir: {folder}/samples\nprompt: a cat\nsampling: {{width: 32, height: 32}}\n"
)
ROW = "bad configurations: exit 2, one line, the key, nothing written"

# overrides of training -> what the line must begin with
TRAINING = {
    "weights: a folder without any": (["train.init_from=/etc"], "train.init_from=/etc: "),
    "weights: a text": (["train.init_from={folder}/table.csv"], "train.init_from={folder}/table.csv: "),
    "weights: a device": (["train.init_from=/dev/null"], "train.init_from=/dev/null: "),
    "weights: of another model": (
        ["train.init_from={folder}/exported", "model.depth=5"],
        "train.init_from={folder}/exported: ",
    ),
    "weights: a damaged header": (["train.init_from={folder}/damaged.safetensors"], "train.init_from="),
    "checkpoint: a folder that is none": (["train.resume={folder}"], "train.resume={folder}: exported weights; start"),
    "checkpoint: a file": (["train.resume={folder}/table.csv"], "train.resume={folder}/table.csv: a file; give"),
    "decoder": (["data.decoder=decord"], "data.decoder=decord: pip install decord2"),
    "decoder, another": (["data.decoder=torchcodec"], "data.decoder=torchcodec: "),
    "root": (["data.root={folder}/nowhere"], "data.root={folder}/nowhere: no such folder"),
    "autoencoder without a path": (["vae={{kind: hunyuan}}", *("model.in_channels=16",)], "vae.path is not set: give"),
    "autoencoder: no folder": (["vae={{kind: hunyuan, path: {folder}/no}}", "model.in_channels=16"], "vae.path="),
    "autoencoder: no weights": (["vae={{kind: hunyuan, path: {folder}/vae}}", "model.in_channels=16"], "vae.path="),
    "autoencoder: absurd": (["vae={{kind: hunyuan, path: {folder}/odd}}", "model.in_channels=16"], "vae.path="),
    "autoencoder: 2-D": (["vae={{kind: flux2d}}", "model.in_channels=16"], "vae.path is not set: give"),
    "text encoder without a path": (["text={{kind: t5_clip}}"], "text.t5_path is not set: give"),
    "text encoder: no folder": (["text={{kind: t5_clip, t5_path: {folder}/no}}"], "text.t5_path={folder}/no: "),
    "text encoder of another width": (
        ["text={{kind: t5_clip, t5_path: {folder}/t5, clip_path: {folder}/t5}}"],
        "model.context_in_dim=32: text.t5_path={folder}/t5 gives 4096; set model.context_in_dim=4096",
    ),
    "an output of 5,000 characters": ([f"output={'a' * 5000}"], "output: aaaa"),
    "tensorboard": (["log.tensorboard=true"], "log.tensorboard=true: tensorboard is not installed"),
    "wandb": (["log.wandb=offline"], "log.wandb=offline: wandb is not installed"),
    "samples: memory": (
        ["validate={{every: 1, prompts: [a], sampling: {{width: 16384, height: 16384, num_frames: 99997}}}}"],
        "validate.sampling: 99997 frames of 16384x16384 take at least",
    ),
    "samples: method": (
        ["validate={{every: 1, prompts: [a], sampling: {{method: distill}}}}"],
        "validate.sampling.method=distill: must be i2v",
    ),
    "samples: solver": (
        ["validate={{every: 1, prompts: [a], sampling: {{solver: eule}}}}"],
        "validate.sampling.solver=eule: must be one of euler",
    ),
}
MODEL = "{{kind: mmdit, size: debug, depth: 5, patch_size: 1, context_in_dim: 32, vec_in_dim: 32, cond_embed: false}}"
# overrides of sampling -> what the line must begin with
SAMPLES = {
    "a list of digests that is none": (
        ["weights={folder}/badlist"],
        "{folder}/badlist/SHA256SUMS line 1: damaged; export again",
    ),
    "a reference for text to video": (["ref=a.png"], "ref: 1 reference for a clip, cond_type=t2v takes none; set"),
    "a kind without a reference": (["cond_type=i2v_head"], "cond_type=i2v_head: needs references; give ref, or"),
    "a reference that is missing": (["cond_type=i2v_head", "ref=a.png"], "ref=a.png: no such file"),
    "a reference that is none": (["cond_type=i2v_tail", "ref={folder}/table.csv"], "ref={folder}/table.csv: "),
    "a reference that is short": (
        ["cond_type=v2v_head", "ref={folder}/still.png"],
        "ref={folder}/still.png: has 1 frame, cond_type=v2v_head takes its first 33; give a longer clip",
    ),
    "a reference for a model without": (
        ["cond_type=i2v_head", "ref={folder}/still.png", "weights={folder}/without_cond"],
        "ref: the model reads no reference frames (model.cond_embed=false); take ref and cond_type out",
    ),
    "a still and a reference": (
        ["cond_type=i2v_head", "ref={folder}/still.png", "still={{weights: {folder}/exported}}"],
        "still: makes the reference of every clip itself; take cond_type and ref out",
    ),
    "a still of one frame": (
        ["sampling.num_frames=1", "still={{weights: {folder}/exported}}"],
        "sampling.num_frames=1: must be 2 or more with still",
    ),
    "a still without weights": (["still={{weights: {folder}/no}}"], "still.weights={folder}/no: no such file"),
    "a size that stills have not": (
        ["still={{weights: {folder}/exported, resolution: big}}"],
        "still.resolution=big: ",
    ),
    "refine without a key": (
        ["refine={{prompts: true, key_variable: NO_SUCH_KEY}}"],
        "refine.key_variable=NO_SUCH_KEY: the environment has no such variable; export the key in it",
    ),
    "a motion score that no prompt names": (
        ["refine.motion_score=true"],
        "refine.motion_score=true: prompts name no motion score; set prompt_suffix=true",
    ),
    "three references": (
        ["cond_type=i2v_loop", "ref=a.png;b.png;c.png"],
        "ref: 3 references for a clip, cond_type=i2v_loop takes at most 2, one for each end",
    ),
    "a clip too short for its reference": (
        ["cond_type=v2v_tail", "ref={folder}/still.png", "sampling.num_frames=33"],
        "sampling.num_frames=33: must be at least 34 with cond_type=v2v_tail, as references give 33 of them",
    ),
    "a kind that there is not": (["cond_type=i2v_haed"], "cond_type='i2v_haed'"),
    "too few prompts": (["start_index=1"], "start_index=1: must be below the number of prompts, 1"),
    "no watermark": (["watermark=a.png"], "watermark=a.png: no such file"),
    "a watermark that is none": (["watermark={folder}/table.csv"], "watermark={folder}/table.csv: "),
    "method": (["sampling.method=distill"], "sampling.method=distill: must be i2v"),
    "solver": (["sampling.solver=1"], "sampling.solver=1: must be one of euler, unipc, dpm++, as the model was"),
    "no weights": (["weights={folder}/nowhere"], "weights={folder}/nowhere: no such file or folder"),
    "weights that are none": (["weights={folder}/empty"], "weights={folder}/empty: "),
    "weights of another model": ([f"model={MODEL}"], "model.depth=5: {folder}/exported was trained with 2; set"),
    "autoencoder": (["vae={{kind: hunyuan}}"], "vae.path is not set"),
    "autoencoder of another model": (["vae={{kind: dct, channels: 4}}"], "model.in_channels=16: vae.kind=dct"),
    "text encoder": (["text={{kind: t5_clip}}"], "text.t5_path is not set"),
    "memory": (
        ["sampling.width=16384", "sampling.height=16384", "sampling.num_frames=99997"],
        "sampling: 99997 frames of 16384x16384 take at least",
    ),
    "memory, one still": (
        ["sampling.width=16384", "sampling.height=16384", "sampling.num_frames=1025"],
        "sampling: 1025 frames of 16384x16384 take at least",
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "table.csv").write_text(TABLE)
    (tmp_path / "train.yaml").write_text(CONFIG.format(output=tmp_path / "runs", table=tmp_path / "table.csv"))
    cfg = load_config(RunConfig, tmp_path / "train.yaml", ["parallel.mesh.ulysses=1"])
    for name, reads in (("exported", True), ("without_cond", False)):
        one = replace(cfg, model=replace(cfg.model, cond_embed=reads))
        weights = build_model(one.model).state_dict()
        save_state_dict(weights, tmp_path / name, WEIGHTS, source=WEIGHTS.layout(one.model))
        save(one, tmp_path / name / "config.yaml")
    save(cfg, tmp_path / "empty" / "config.yaml")
    shutil.copytree(tmp_path / "exported", tmp_path / "badlist")
    (tmp_path / "badlist" / "SHA256SUMS").write_text("x\n")
    Image.new("RGB", (16, 8)).save(tmp_path / "still.png")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 64)
    for name, stated in (("vae", {}), ("odd", {"latent_channels": "x"}), ("t5", {"d_model": 4096})):
        (tmp_path / name).mkdir()
        if name == "t5":
            (tmp_path / name / "model.safetensors").touch()
        (tmp_path / name / "config.json").write_text(json.dumps(stated))
    (tmp_path / "sample.yaml").write_text(SAMPLING.format(folder=tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".clip_index" not in str(path))


def line_of(main: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    sys.argv[1:] = argv
    try:
        run_cli(main)
    except SystemExit as exit_:
        code = exit_.code
    except BaseException as error:
        return f"a traceback: {error!r}"
    err = capsys.readouterr().err
    return err if code == 2 and err.count("\n") == 1 else f"exit code {code}: {err!r}"


@pytest.mark.parametrize(
    ("main", "file", "cases"), [(train.main, "train.yaml", TRAINING), (sample.main, "sample.yaml", SAMPLES)]
)
def test_nothing_is_written(
    main: Callable[[list[str]], int],
    file: str,
    cases: dict[str, tuple[list[str], str]],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])
    hidden = {"decord", "torchcodec", "tensorboard", "wandb"}
    for name in hidden:  # whether they are installed here or not
        monkeypatch.setitem(sys.modules, name, None)
    find = check_spec_of()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in hidden else find(name, *more))

    def started(*_: object) -> None:
        raise AssertionError("a process group was started")

    monkeypatch.setattr("acceleration.distributed.runtime.start", started)
    before, wrong = tree(folder), []
    for case, (overrides, expected) in cases.items():
        single = ["parallel.mesh.ulysses=1"] if file == "train.yaml" else []
        line = line_of(main, [file, *single, *(o.format(folder=folder) for o in overrides)], capsys)
        if not line.startswith(f"error: {expected.format(folder=folder)}") or tree(folder) != before:
            wrong.append(f"{case}: {line}")
    assert not wrong, "\n".join(wrong)
    tally(ROW, len(cases), len(cases))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("data.features={folder}/no", "data.features={folder}/no: no such folder"),
        (
            "validate={{every: 1, prompts: [a], cond_type: i2v_head}}",
            "validate.cond_type=i2v_head: needs references; give",
        ),
        (
            "validate={{every: 1, prompts: [a], cond_type: i2v_head, ref: no.png}}",
            "validate.ref=no.png: no such file; give",
        ),
        (
            "validate={{every: 1, prompts: [a], ref: no.png}}",
            "validate.ref: 1 reference for a clip, cond_type=t2v takes",
        ),
        ("validate={{every: 1, prompt_csv: no.csv}}", "validate.prompt_csv=no.csv: no such file"),
    ],
)
def test_what_a_look_tells_is_said_before_a_table_is_indexed(
    overrides: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of millions of clips takes minutes."""
    monkeypatch.setattr(sys, "argv", ["command"])
    argv = ["train.yaml", "parallel.mesh.ulysses=1", "model.cond_embed=true", overrides.format(folder=folder)]
    line = line_of(train.main, argv, capsys)
    assert line.startswith(f"error: {said.format(folder=folder)}") and not list(folder.rglob(".clip_index*")), line


def check_spec_of() -> Callable[..., object]:
    import importlib.util

    return importlib.util.find_spec


def test_a_model_beyond_the_machine(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensora.train.setup.device_bytes", lambda: None)
    monkeypatch.setattr("opensora.train.setup.machine_bytes", lambda: 2**16)
    monkeypatch.setattr(sys, "argv", ["command"])
    line = line_of(train.main, ["train.yaml", "parallel.mesh.ulysses=1"], capsys)
    assert line.startswith("error: parallel.mesh: a process of 1 needs") and not (folder / "runs").exists()


def test_any_frame_rate_is_taken(folder: Path) -> None:
    cfg = load_config(SampleConfig, "sample.yaml", ["sampling.fps=23.976"])
    assert cfg.sampling.fps == 23.976
    assert load_config(SampleConfig, "sample.yaml", ["sampling.fps=8"]).sampling.fps == 8.0


def needed(option: SamplingOption, samples: int = 1, world: int = 1, *more: str) -> int:
    cfg = load_config(RunConfig, "train.yaml", ["parallel.mesh.ulysses=-1", "parallel.mesh.shard=1", *more])
    shape = autoencoder_shape(cfg.vae)
    option = sanitize_sampling_option(option, multiple=shape.stride[1])
    return least_bytes(
        option, cfg.model, shape, samples=samples, txt=32, itemsize=4, parallel=cfg.parallel, world_size=world
    )


def test_the_forecast_is_a_lower_bound(folder: Path) -> None:
    """Of what the tensors that every sample has take, measured by their sizes."""
    option = SamplingOption(width=64, height=48, num_frames=17)
    pixels = torch.zeros(1, 3, 17, 48, 64)
    assert pixels.nbytes < needed(option) < 100 * pixels.nbytes
    assert needed(option, samples=4) < 4 * needed(option)
    assert needed(option, world=4) < needed(option)


@pytest.mark.parametrize(("zero", "replicate", "copies"), [(0, 1, 4), (1, 1, 4), (2, 2, 4), (3, 1, 1), (3, 2, 2)])
def test_weights_that_are_not_cut_are_whole(folder: Path, zero: int, replicate: int, copies: int) -> None:
    """Of which four processes have so many copies together while a small clip is denoised."""
    option, cfg = SamplingOption(width=32, height=32, num_frames=1), load_config(RunConfig, "train.yaml", [])
    layout = (f"parallel.zero={zero}", f"parallel.mesh.replicate={replicate}")
    found = needed(option, 1, 4, "parallel.mesh.ulysses=1", "parallel.mesh.shard=-1", *layout)
    least = needed(option, 1, 4, "parallel.mesh.ulysses=1", "parallel.mesh.shard=-1", "parallel.offload=parameters")
    assert found - least == count_parameters(cfg.model) * 4 * copies // 4


def test_what_fits_is_not_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option = sanitize_sampling_option(SamplingOption(width=64, height=48, num_frames=17))
    bytes_ = needed(option)
    monkeypatch.setattr(check, "device_bytes", lambda: None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for room, refused in ((bytes_ - 1, True), (bytes_, False), (None, False)):
        monkeypatch.setattr(check, "machine_bytes", lambda room=room: room)
        if refused:
            with pytest.raises(
                UserError, match=r"^sampling: 17 frames of 64x48 take at least .* GiB a process, and this"
            ):
                check.check_memory("sampling", option, bytes_)
        else:
            check.check_memory("sampling", option, bytes_)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(check, "machine_bytes", lambda: 2 * bytes_ - 1)
    with pytest.raises(UserError):
        check.check_memory("sampling", option, bytes_)
    monkeypatch.setattr(check, "device_bytes", lambda: bytes_)  # a GPU is a process's own
    check.check_memory("sampling", option, bytes_)


def test_this_machine_has_memory() -> None:
    found = check.machine_bytes()
    assert found is None or 2**28 < found < 2**50
    assert os.path.exists("/proc/meminfo") == (found is not None)


def test_a_size_between_whole_tokens_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("opensora.inference.check.announce", said.append)
    for width, expected in ((32, 0), (33, 1)):
        size = f"{{width: {width}, height: 32}}"
        sizes = [f"validate={{every: 1, prompts: [a], sampling: {size}}}", "parallel.mesh.ulysses=1"]
        check.check_validation(load_config(RunConfig, "train.yaml", sizes), 1, clips=1)
        cfg = load_config(SampleConfig, "sample.yaml", [f"sampling.width={width}"])
        check.check_sample(cfg, find_source(cfg), read_jobs(cfg), 1)
        assert len(said) == 2 * expected
    assert said[0] == "validate.sampling: width=33, height=32 become 40x32, the next whole tokens"
    assert said[1] == said[0].removeprefix("validate.")
