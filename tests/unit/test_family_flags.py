"""Flags of the Open-Sora family's commands beside a YAML file."""

from pathlib import Path
from typing import Any

import pytest

from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.config.schema import plain
from opensora.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# flag -> (words, our key, value), beside a YAML file
FLAGS: dict[str, tuple[list[str], str, Any]] = {
    "prompt path": (["--prompt-path", "./a/b.txt"], "prompt_csv", "a/b.txt"),
    "prompt_path": (["--prompt_path=b.txt"], "prompt_csv", "b.txt"),
    "ckpt path": (["--ckpt-path", "w.pth"], "weights", "w.pth"),
    "num frames": (["--num-frames", "33"], "sampling.num_frames", 33),
    "num frames by name": (["--num-frames", "2s"], "sampling.num_frames", 51),
    "cfg scale": (["--cfg-scale", "4.5"], "sampling.guidance", 4.5),
    "cfg_scale": (["--cfg_scale", "4.5"], "sampling.guidance", 4.5),
    "steps": (["--num-sampling-steps", "20"], "sampling.num_steps", 20),
    "height": (["--image-size", "240", "426"], "sampling.height", 240),
    "width": (["--image_size", "240", "426", "--fps", "8"], "sampling.width", 426),
    "fps": (["--fps", "8"], "sampling.fps", 8.0),
    "seed": (["--seed", "7"], "sampling.seed", 7),
    "prompts": (["--prompt", "a cat", "two dogs", "weights=w"], "prompts", ["a cat", "two dogs"]),
    "one prompt": (["--prompt", "a cat", "weights=w"], "prompt", "a cat"),
    "batch size": (["--batch-size", "3"], "batch_size", 3),
    "save dir": (["--save-dir", "out"], "save_dir", "out"),
    "sample name": (["--sample-name", "try"], "save_prefix", "try_"),
    "indices": (["--start-index", "2", "--end-index", "5"], "end_index", 5),
    "number": (["--num-sample", "4"], "num_sample", 4),
    "names of prompts": (["--prompt-as-path", "--seed", "1"], "prompt_as_path", True),
    "names of prompts, said": (["--prompt-as-path", "True"], "prompt_as_path", True),
    "resolution": (["--resolution", "480p"], "sampling.resolution", "480p"),
    "resolution of 1.x": (["--resolution", "512"], "sampling.resolution", "512px"),
    "aspect ratio": (["--aspect-ratio", "9:16"], "sampling.aspect_ratio", "9:16"),
    "dtype": (["--dtype", "fp32"], "precision", "fp32"),
    "half": (["--dtype", "fp16"], "precision", "bf16"),
    "kernel": (["--flash-attn", "False"], "parallel.attention", "math"),
    "image guidance": (["--image-cfg-scale", "2"], "sampling.guidance_img", 2.0),
    "oscillation": (["--use-oscillation-guidance-for-image", "True"], "sampling.image_osci", True),
    "condition": (["--cond-type", "i2v_head"], "cond_type", "i2v_head"),
    "negative": (["--neg-prompt", "blurry"], "neg", "blurry"),
    "refined": (["--llm-refine", "True"], "refine.prompts", True),
    "none": (["--prompt-path", "None"], "prompt_csv", None),
    "said here": (["--verbose", "2"], "crf", 18),
    "adapters": (["--ckpt-path-lora", "./l.safetensors"], "lora", "l.safetensors"),
    "adapters to load": (["--load-lora", "l"], "lora", "l"),
    "edits": (["--use-sdedit", "--seed", "1"], "sampling.use_sdedit", True),
    "no edits": (["--use-sdedit", "False"], "sampling.use_sdedit", False),
    "local files": (["--force-huggingface", "--seed", "3"], "sampling.seed", 3),
    "column": (["--csv-reference-column-name", "ref", "--seed", "4"], "sampling.seed", 4),
}


def at(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_the_family(name: str, tmp_path: Path) -> None:
    words, key, expected = FLAGS[name]
    (tmp_path / "run.yaml").write_text("weights: w.safetensors\n")
    assert at(plain(load_config(SampleConfig, tmp_path / "run.yaml", words)), key) == expected


def test_references_listed_in_a_file(tmp_path: Path) -> None:
    """Of Open-Sora 1.3: a line for every prompt, with its references; prompts without one have an empty line."""
    (tmp_path / "run.yaml").write_text("weights: w.safetensors\nprompts: [a, b, c]\n")
    (tmp_path / "refs.txt").write_text("a.png;b.mp4\n\n c.png\r\n")
    found = load_config(SampleConfig, tmp_path / "run.yaml", ["--reference-txt-path", str(tmp_path / "refs.txt")])
    assert found.reference_path == ("a.png;b.mp4", None, "c.png")
    with pytest.raises(UserError, match=r"_path='nowhere\.txt': cannot be read \(no such file\) \(command line\)"):
        load_config(SampleConfig, tmp_path / "run.yaml", ["--reference-txt-path", "nowhere.txt"])
    with pytest.raises(UserError, match="says otherwise; keep one"):
        words = ["--reference-txt-path", str(tmp_path / "refs.txt"), "--reference-path", "d.png"]
        load_config(SampleConfig, tmp_path / "run.yaml", words)


TRAIN = CONFIGS / "train/stage1.yaml"
TRAIN_FLAGS: dict[str, tuple[list[str], str, Any]] = {
    "data path": (["--data-path", "c.csv"], "data.table", "c.csv"),
    "lr": (["--lr", "1e-3"], "optim.lr", 1e-3),
    "warm-up": (["--warmup-steps", "7"], "optim.warmup_steps", 7),
    "outputs": (["--outputs", "./runs"], "output", "runs"),
    "wandb": (["--wandb", "True"], "log.wandb", "online"),
    "load": (["--load", "outputs/x"], "train.resume", "outputs/x"),
    "ckpt path": (["--ckpt-path", "w.pth"], "train.init_from", "w.pth"),
    "from scratch": (["--ckpt-path", "w.pth", "--start-from-scratch"], "train.init_from", None),
    "seed": (["--seed", "7"], "seed", 7),
    "time": (["--record-time", "True"], "seed", 42),
    "time, bare": (["--record-time", "--seed", "8"], "seed", 8),
}


@pytest.mark.parametrize("name", TRAIN_FLAGS)
def test_flags_of_training(name: str) -> None:
    words, key, expected = TRAIN_FLAGS[name]
    assert at(plain(load_config(RunConfig, TRAIN, words)), key) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch-size", "4"], "batch_size=4: stands in data.buckets, for every shape of clips (command line)"),
        (["--image-size", "256", "256"], "image_size=[256, 256]: stands in data.buckets"),
        (["--lr"], "--lr: a value is missing"),
        (["--lr", "fast"], "optim.lr='fast': must be a number"),
        (["--leraning-rate", "1"], "leraning_rate: unknown key"),
        (["--load-lora", "x"], "load_lora='x': is for sampling; a run with lora.rank > 0 trains adapters"),
    ],
)
def test_flags_that_training_refuses(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, TRAIN, words)
    assert expected in str(caught.value), str(caught.value)


STDIT = CONFIGS / "opensora/inference/16x256x256.py"


@pytest.mark.parametrize("text", ["a cat", "TEXT", ["a cat", "TEXT{}"]])
def test_prompts_of_the_command_line_win_over_the_files(text: Any, tmp_path: Path) -> None:
    """Whether they are given themselves or by their file; not both."""
    (tmp_path / "run.py").write_text(f"{STDIT.read_text()}\nprompt = {text!r}\n")
    weights = ["--ckpt-path", "FILE"]
    found = load_config(SampleConfig, tmp_path / "run.py", [*weights, "--prompt-path", "p.txt"])
    assert (found.prompt_csv, found.prompt, found.prompts) == ("p.txt", None, ())
    found = load_config(SampleConfig, tmp_path / "run.py", [*weights, "--prompt", "a dog"])
    assert (found.prompt_csv, found.prompts) == (None, ("a dog",))


@pytest.mark.parametrize("words", [["--prompt", "a", "--prompt-path", "b"], ["--prompt_path=b", "--prompt=a"]])
def test_prompts_and_a_file_of_them(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("weights: w.safetensors\n")
    for path in (STDIT, tmp_path / "run.yaml"):
        with pytest.raises(UserError, match="--prompt and --prompt-path: both say what is sampled"):
            load_config(SampleConfig, path, ["--ckpt-path", "FILE", *words])


def test_references_stand_in_one_column() -> None:
    with pytest.raises(UserError, match="csv_reference_column_name='image': must be ref, the column that"):
        words = ["--ckpt-path", "FILE", "--prompt-path", "p.csv", "--csv-reference-column-name", "image"]
        load_config(SampleConfig, STDIT, words)


def test_sizes_and_references_of_the_command_line_win_over_the_files(tmp_path: Path) -> None:
    """Where they are other keys than those of the file, which say the same of clips."""
    (tmp_path / "refs.txt").write_text("b.png\n")
    listed = ["--reference-txt-path", str(tmp_path / "refs.txt")]
    words = ["--ckpt-path", "FILE", "--prompt", "a"]
    (tmp_path / "run.py").write_text(f"{STDIT.read_text()}\nreference_path = ['a.png']\n")
    assert load_config(SampleConfig, tmp_path / "run.py", words).reference_path == ("a.png",)
    found = load_config(SampleConfig, tmp_path / "run.py", [*words, *listed, "--resolution", "480p"])
    assert found.reference_path == ("b.png",)
    assert (found.sampling.height, found.sampling.width) == (480, 854)
    (tmp_path / "run.py").write_text(f"{STDIT.read_text()}\nreference_txt_path = 'nowhere.txt'\n")
    found = load_config(SampleConfig, tmp_path / "run.py", [*words, "--reference-path", "c.png"])
    assert found.reference_path == ("c.png",)
    assert (found.sampling.height, found.sampling.width) == (256, 256)
