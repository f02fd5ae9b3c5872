"""What is on or off in the Open-Sora family: True or False in files, words of argparse on the command line."""

import re
from pathlib import Path
from typing import Any

import pytest

from opensora.config.family.booleans import BOOLEANS, INSIDE
from opensora.config.family.flags import flag_overrides, read_family
from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.config.schema import plain
from opensora.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAIN = CONFIGS / "opensora/train/16x256x256.py"
SAMPLE = CONFIGS / "opensora/inference/16x256x256.py"


WORDS = {
    **{"yes": True, "true": True, "t": True, "y": True, "1": True},
    **{"no": False, "false": False, "f": False, "n": False, "0": False},
}


def refusal(path: Path, *words: str) -> str:
    """What is said of a training file; empty: nothing."""
    try:
        read_family(RunConfig, path, words)
    except UserError as error:
        return str(error)
    return ""


def at(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value[part]
    return value


def layer_of(cls: type, path: Path, *words: str) -> dict[str, Any]:
    layer, _, rest = read_family(cls, path, words)
    assert rest == []
    return layer


def with_key(folder: Path, key: str, value: str) -> Path:
    """A file that trains, with one more key or another value of it."""
    *sections, name = key.split(".")
    lines = [f"{sections[0]} = dict({name}={value})"] if sections else [f"{name} = {value}"]
    if sections == ["model"]:
        lines = [f"model = dict(type='STDiT-XL/2', {name}={value})"]
    (folder / "base.py").write_text(
        "model = dict(type='STDiT-XL/2')\nvae = dict(type='VideoAutoencoderKL')\ntext_encoder = dict(type='t5')\n"
        "scheduler = dict(type='iddpm')\nnum_frames = 16\nimage_size = (256, 256)\nbatch_size = 1\nlr = 1e-4\n"
        "outputs = 'o'\nepochs = 1\n"
    )
    (folder / "run.py").write_text("\n".join(["_base_ = 'base.py'", *lines]) + "\n")
    return folder / "run.py"


@pytest.mark.parametrize("key", BOOLEANS)
def test_a_text_or_a_number_is_neither_on_nor_off(key: str, tmp_path: Path) -> None:
    for value in ("'no'", "'False'", "3", "1", "0.0", "[]", "dict(a=1)"):
        message = refusal(with_key(tmp_path, key, value))
        assert message.startswith(f"{key}=") and "must be True or False" in message and "run.py:2" in message
    for value in ("True", "False", "None"):
        assert "must be True or False" not in refusal(with_key(tmp_path, key, value))


@pytest.mark.parametrize(("section", "name"), [(section, name) for section, names in INSIDE.items() for name in names])
def test_nor_inside_a_mapping(section: str, name: str, tmp_path: Path) -> None:
    message = refusal(with_key(tmp_path, f"{section}.{name}", "'no'"))
    assert re.fullmatch(rf"{section}=.*{name} must be True or False \(.*run\.py:2\)", message)


ON_AND_OFF = {
    "--flash-attn": ("parallel.attention", "auto", "math"),
    "--layernorm-kernel": ("parallel.norm_kernel", "auto", "torch"),
    "--grad-checkpoint": ("parallel.recompute.kind", "full", "none"),
    "--wandb": ("log.wandb", "online", "off"),
}


@pytest.mark.parametrize("flag", ON_AND_OFF)
def test_words_of_the_command_line(flag: str) -> None:
    """Those that the family's str2bool takes, in any case; of --wandb the whole words."""
    key, on, off = ON_AND_OFF[flag]
    for word, meaning in WORDS.items():
        for text in (word, word.upper()) if flag != "--wandb" or word not in "tyfn" else ():
            assert at(layer_of(RunConfig, TRAIN, flag, text), key) == (on if meaning else off), text
            assert (tuple(key.split(".")), on if meaning else off) in flag_overrides(RunConfig, [flag, text])[0]


def test_no_other_word_is_taken() -> None:
    for flag in ("--flash-attn", "--grad-checkpoint", "--use-cosine-scheduler", "--use-image-transform"):
        for text in ("maybe", "2", "[]", "on"):
            for read in (lambda words: read_family(RunConfig, TRAIN, words), lambda w: flag_overrides(RunConfig, w)):
                with pytest.raises(UserError) as caught:
                    read([flag, text])
                assert str(caught.value).endswith(f"={text} (command line): must be yes or no (also true, false, 1, 0)")


@pytest.mark.parametrize(("word", "meaning"), [("yes", True), ("No", False), ("1", True), ("f", False)])
def test_switches_and_keys_of_both(word: str, meaning: bool, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("weights: w.safetensors\n")
    found = plain(load_config(SampleConfig, tmp_path / "run.yaml", ["--prompt-as-path", word, "--llm-refine", word]))
    assert found["prompt_as_path"] is meaning and found["refine"]["prompts"] is meaning
    layer = layer_of(SampleConfig, SAMPLE, "--ckpt-path", "w.pth", "--prompt-as-path", word)
    assert layer["prompt_as_path"] is meaning


@pytest.mark.parametrize(
    ("key", "value"),
    [("sp_size", "True"), ("sp_size", "0"), ("epochs", "'a'"), ("epochs", "True"), ("epochs", "1.5")],
)
def test_counts_are_whole_numbers(key: str, value: str, tmp_path: Path) -> None:
    message = refusal(with_key(tmp_path, key, value))
    assert re.fullmatch(rf"{key}=.*: must be a whole number >= 1 \(.*run\.py:2\)", message)
    message = refusal(with_key(tmp_path, "plugin_config.tp_size", "True"))
    assert re.fullmatch(r"plugin_config=.*tp_size must be a whole number >= 1 \(.*run\.py:2\)", message)
