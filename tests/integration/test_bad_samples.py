"""What is wrong with a sampling job costs a line and exit code 2, before anything is written; alone and in company."""

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from opensora.cli import sample
from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.utils.files.video_writer import write_video
from tests.integration.test_bad_input import refused

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
SHAPE = {
    "patch_size": 2, "in_channels": 16, "hidden_size": 32, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6], "context_in_dim": 32, "vec_in_dim": 32,
}  # fmt: skip
# Overrides -> what the line begins with. {f} is a folder with files of every sort.
BAD: dict[str, str] = {
    "cond_type=i2v_head ref={f}/none.png": "ref={f}/none.png: no such file",
    "cond_type=i2v_head ref={f}": "ref={f}: ",
    "cond_type=i2v_head ref={f}/noise.png": "ref={f}/noise.png: ",
    "cond_type=i2v_head ref={f}/empty.mp4": "ref={f}/empty.mp4: ",
    "cond_type=v2v_head ref={f}/short.mp4 sampling.num_frames=41": "ref={f}/short.mp4: has 5 frames",
    "cond_type=v2v_tail_easy ref={f}/a.png sampling.num_frames=81": "ref={f}/a.png: has 1 frame",
    "cond_type=v2v_head ref={f}/short.mp4": "sampling.num_frames=9: must be at least",
    "cond_type=i2v_loop ref={f}/a.png;{f}/a.png;{f}/a.png": "ref: 3 references for a clip",
    "ref={f}/a.png": "ref: 1 reference for a clip, cond_type=t2v takes none",
    "cond_type=i2v_head": "cond_type=i2v_head: needs references",
    "cond_type=i2v_haed ref={f}/a.png": "cond_type='i2v_haed': did you mean i2v_head?",
    "cond_type=i2v_head ref={f}/a.png weights={f}/deaf.safetensors model.cond_embed=false": "ref: the model reads no",
    "sampling.method=distill": "sampling.method=distill: must be i2v",
    "sampling.method=best": "sampling.method='best': must be one of i2v, distill",
    "refine.prompts=true": "refine.key_variable=",
    "refine.motion_score=true prompt_suffix=true": "refine.key_variable=",
    "sampling.cache.kind=firstblock": "sampling.cache.kind",
    "sampling.cache.kind=dbcache sampling.cache.first_blocks=8": "sampling.cache.kind",
    "sampling.solver=rk4": "sampling.solver=rk4: must be one of",
    "offload=models": "offload=models: needs a GPU",
    "offload=blocks": "offload=blocks: needs a GPU",
    "offload=some": "offload",
    "vae.kind=dc_ae": "model.patch_size=2: must be 1 with vae.kind=dc_ae",
    "vae.kind=hunyuan model.in_channels=64": "",
    "sampling.width=-8 sampling.height=8": "sampling.width=-8: must be",
    "sampling.width=0 sampling.height=0": "sampling.width=0: must be",
    "sampling.width=32": "sampling.width=32 without height",
    "sampling.width=20000 sampling.height=16": "sampling.width=20000: ",
    "sampling.resolution=0px": "sampling.resolution=0px: ",
    "sampling.resolution=big": "sampling.resolution=big: ",
    "sampling.aspect_ratio=0:9": "sampling.aspect_ratio=0:9: ",
    "sampling.num_frames=0": "sampling.num_frames=0: must be",
    "sampling.num_frames=-3": "sampling.num_frames=-3: must be",
    "sampling.num_frames=nine": "sampling.num_frames",
    "sampling.num_steps=0": "sampling.num_steps=0: must be",
    "sampling.guidance=-1": "sampling.guidance=-1.0: must be",
    "sampling.guidance=.nan": "sampling.guidance",
    "sampling.guidance_img=.inf": "sampling.guidance_img",
    "sampling.fps=0": "sampling.fps=0.0: must be",
    "sampling.seed=-1": "sampling.seed=-1: must be",
    "sampling.flow_shift=0": "sampling.flow_shift=0.0: must be",
    "sampling.frames=3": "sampling.frames: unknown key",
    "prompt=null prompt_csv={f}/none.csv": "prompt_csv={f}/none.csv: no such file",
    "prompt=null prompt_csv={f}": "prompt_csv={f}: not a regular file",
    "prompt=null prompt_csv={f}/noise.csv": "prompt_csv={f}/noise.csv",
    "prompt=null prompt_csv={f}/no_text.csv": "prompt_csv={f}/no_text.csv",
    "prompt=null prompt_csv={f}/no_row.csv": "prompt_csv={f}/no_row.csv: the table is empty",
    "prompt=null prompt_csv={f}/blank.csv": "prompt_csv={f}/blank.csv line 2 has no text",
    "prompt=null prompt_csv={f}/long.csv": "prompt_csv={f}/long.csv line 2",
    "prompt=null prompt_csv={f}/name.csv": "prompt_csv={f}/name.csv line 2: name",
    **{
        f"prompt=null prompt_csv={{f}}/{case}": f"prompt_csv={{f}}/{said}"
        for case, said in (
            ("ref.csv", "ref.csv line 2: ref: 1 reference for a clip, cond_type=t2v takes none"),
            ("ref.csv cond_type=i2v_tail", "ref.csv line 2: ref=gone.png: no such file; give an image or a video"),
            ("noise.parquet", "noise.parquet: cannot be read as parquet ("),
            ("no_text.parquet", "no_text.parquet: column 'text' is missing; it has name"),
            ("number.parquet", "number.parquet: column 'text' is int64, must be string"),
            ("null.parquet", "null.parquet row 1 has no text"),
            ("twice.parquet", "twice.parquet: column 'text' is there twice"),
            ("ref.parquet cond_type=i2v_tail", "ref.parquet row 2: ref=gone.png: no such file"),
        )
    },
    "cond_type=i2v ref={f}/a.png": "cond_type='i2v': did you mean i2v_head or i2v_tail or i2v_loop?",
    "cond_type=i2v_head ref=https://a.org/a.png": "ref=https://a.org/a.png: is an address, and nothing is fetched",
    "prompt=null prompt_csv={f}/no_text.csv ref={f}/a.png": "ref: is for prompt and prompts",
    "prompt=null": "prompt: missing; give --prompt TEXT",
    "start_index=1": "start_index=1: must be below the number of prompts, 1",
    "start_index=-1": "start_index=-1: must be",
    "end_index=0": "end_index=0: must be above",
    "num_sample=0": "num_sample=0: must be",
    "batch_size=0": "batch_size=0: must be",
    "crf=52": "crf=52: must be",
    "watermark={f}/none.png": "watermark={f}/none.png: ",
    "watermark={f}/noise.png": "watermark={f}/noise.png: ",
    "save_prefix=a/": "name 'a/",
    "save_dir={f}/a.png": "save_dir={f}/a.png: is a file; name a folder",
    "save_dir={f}/a.png/b": "save_dir={f}/a.png/b: cannot be written",
    "weights={f}/bare": "weights={f}/bare: ",
    "weights={f}/bare model=null": "weights={f}/bare: no weights there; give a run folder",
    "text.kind=t5_clip text.t5_path={f}/clip text.clip_path={f}/t5": "text.t5_path={f}/clip: config.json is of a model "
    "of type clip_text_model, must be of type t5",
    "text.kind=t5_clip text.t5_path={f}/t5 text.clip_path={f}/t5": "text.clip_path={f}/t5: config.json is of a model "
    "of type t5, must be of type clip",
    "precision=fp16": "precision",
    "lora={f}/none": "lora={f}/none: ",
    "lora={f}/bare": "lora={f}/bare: has no adapter_config.json and no safetensors file",
    "lora={f}/weights.safetensors": "lora={f}/weights.safetensors: ",
    "weights=ckpts/Open_Sora_v2.safetensors": "weights=ckpts/Open_Sora_v2.safetensors: no such file or folder; give a "
    "run folder, an export folder or a safetensors file, or fetch it: "
    "python -m opensora.cli.download open-sora-v2 --to ckpts",
    "text.kind=t5_clip text.t5_path=x/google/t5-v1_1-xxl": "text.t5_path=x/google/t5-v1_1-xxl: no config.json there; "
    "give the folder of a transformers model, or fetch it: python -m opensora.cli.download text-encoders --to x",
    "model={{kind:": "model (command line): not valid YAML: a bracket or quote is not closed; put the whole",
    "weights={f}/none": "weights={f}/none: no such file",
    "weights={f}/noise.png": "weights={f}/noise.png: cannot be read as safetensors",
    "weights={f}/deaf.safetensors": "weights={f}/deaf.safetensors: ",
    "still.weights={f}/none": "still.weights={f}/none: no such file",
    "still.weights={f}/weights.safetensors cond_type=i2v_head ref={f}/a.png": "still: makes the reference",
    "still.weights={f}/weights.safetensors sampling.num_frames=1": "sampling.num_frames=1: must be 2 or more",
    "still.weights={f}/weights.safetensors": "still.model: missing; {f}/weights.safetensors has no config.yaml",
    "still.weights={f}/weights.safetensors still.resolution=3 still.model.kind=mmdit still.model.patch_size=2": "",
    "parallel.mesh.cfg=3": "parallel.mesh: shard=-1 x cfg=3 does not fit 1 process",
    "parallel.mesh.dynamic=true": "parallel.mesh.dynamic=true with ulysses=1",
    "parallel.engine=deepspeed": "parallel.engine=deepspeed: must be native",
    "parallel.attention=flash9": "parallel.attention",
}
GOOD = ("sampling.num_steps=2", "num_sample=2", "batch_size=3", "crf=20", "sampling.text_osci=true", "save_prefix=x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    for name, more in (("weights", {}), ("deaf", {"cond_embed": False})):
        shape = MMDiTConfig(**{**SHAPE, "axes_dim": (4, 6, 6), **more})  # type: ignore[arg-type]
        save_file(MMDiTModel(shape).state_dict(), path / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path / "a.png")
    write_video(path / "short.mp4", np.zeros((5, 16, 16, 3), np.uint8), 8.0)
    for name in ("noise.png", "noise.csv"):
        (path / name).write_bytes(rng.bytes(300))
    tables = {
        "no_text": "name,ref\na,b\n", "no_row": "text\n", "blank": "text,neg\n  ,a\n", "long": "text\na,b,c\n",
        "name": "text,name\na,b/c\n", "ref": "text,ref\na,gone.png\n",
    }  # fmt: skip
    for name, text in tables.items():
        (path / f"{name}.csv").write_text(text)
    (path / "empty.mp4").touch()
    (path / "bare").mkdir()
    for name, kind in (("t5", "t5"), ("clip", "clip_text_model")):
        (path / name).mkdir()
        (path / name / "model.safetensors").touch()
        (path / name / "config.json").write_text(json.dumps({"model_type": kind, "d_model": 32, "hidden_size": 32}))
    (path / "noise.parquet").write_bytes(b"PAR1" + rng.bytes(60))
    columns: dict[str, tuple[list[str], list[list[object]]]] = {
        "no_text": (["name"], [["a"]]), "number": (["text"], [[3]]), "null": (["text", "neg"], [[None], ["a"]]),
        "twice": (["text", "text"], [["a"], ["b"]]), "ref": (["text", "ref"], [["a", "b"], [None, "gone.png"]]),
    }  # fmt: skip
    for name, (names, values) in columns.items():
        papq.write_table(pa.Table.from_arrays([pa.array(one) for one in values], names), path / f"{name}.parquet")
    config = {
        "weights": str(path / "weights.safetensors"), "save_dir": str(path / "out"), "prompt": "a cat",
        "model": {"kind": "mmdit", **SHAPE}, "vae": {"kind": "dct", "channels": 4},
        "text": {"kind": "bytes", "dim": 32},
        "sampling": {"resolution": "32px", "num_frames": 9, "num_steps": 1}, "precision": "fp32",
    }  # fmt: skip
    (path / "sample.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def refusal(folder: Path, capsys: Capture, monkeypatch: Patch) -> Callable[[list[str]], str]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)  # nobody comes so far
    monkeypatch.chdir(folder)

    def told(overrides: list[str]) -> str:
        before = sorted(path.name for path in folder.iterdir())
        argv = [str(folder / "sample.yaml"), *(one.format(f=folder) for one in overrides)]
        line = refused(sample.main, argv, capsys, monkeypatch)
        assert sorted(path.name for path in folder.iterdir()) == before
        return line

    return told


@pytest.mark.parametrize("overrides", BAD)
def test_one_thing_that_is_wrong(folder: Path, refusal: Callable[[list[str]], str], overrides: str) -> None:
    line = refusal(overrides.split())
    assert line.startswith(f"error: {BAD[overrides].format(f=folder)}"), line


def topics(overrides: str) -> set[str]:
    """The sections and keys that a case changes; of keys that belong together, one."""
    names = {re.split("[.=]", word)[0] for word in overrides.split()}
    return {{"ref": "cond_type", "prompt_csv": "prompt"}.get(name, name) for name in names}


def test_among_others(refusal: Callable[[list[str]], str]) -> None:
    """Seeded: with good settings around it, and two at a time in either order, of which neither mends the other."""
    rng = random.Random(13)
    pairs = (rng.sample(list(BAD), 2) for _ in iter(int, 1))
    for pair in itertools.islice((pair for pair in pairs if not topics(pair[0]) & topics(pair[1])), 60):
        words = [word for one in pair for word in one.split()] + rng.sample(GOOD, 2)
        rng.shuffle(words)
        given = {word.partition("=")[0]: word for word in words if not word.startswith("prompt=")}
        refusal([*given.values(), *(["prompt=null"] if "prompt=null" in words else [])])
