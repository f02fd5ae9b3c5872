"""Damaged configurations of the family: any value under any key is read, or refused in one line."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from opensora.config.load import is_training, load_config
from opensora.config.mmengine import read_python
from opensora.config.run import RunConfig, SampleConfig
from opensora.utils.errors import UserError
from tests.unit.test_family_configs import CONFIGS
from tests.unit.test_family_configs import FILES as FIRST
from tests.unit.test_second_family_configs import FILES as SECOND

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7.5,
        1e300,
        2**62,
        "",
        "x",
        "TEXT",
        "dynamic",
        "None",
        "1x",
        "9:16",
        "\x07",
        "é" * 300,
    ),
    *(
        [],
        [1],
        [256, 256],
        [None, None],
        ["a", 1],
        [[1]],
        {},
        {"type": "x"},
        {1: 2},
        {"a": {"b": [1]}},
        {"1": [1.0, 2]},
    ),
)
WORDS = (
    "num_frames",
    "image_size",
    "cfg-scale",
    "prompt",
    "ckpt-path",
    "loop",
    "model.type",
    "sampling.num_steps",
    "lr",
)


@cache
def first_trees() -> tuple[dict[str, Any], ...]:
    return tuple(read_python(CONFIGS / name)[0] for name in FIRST)


def second_trees(folder: Path) -> list[dict[str, Any]]:
    trees = []
    for name in ("diffusion/inference/256px.py", "diffusion/inference/plugins/t2i2v.py", "diffusion/train/image.py"):
        (folder / "whole.py").write_text(SECOND[name])
        trees.append(read_python(folder / "whole.py")[0])
    return [*trees, trees[0] | trees[1]]


def damaged(rng: random.Random, tree: dict[Any, Any]) -> dict[Any, Any]:
    """One value replaced, taken out, or put under another name."""
    tree = dict(tree)
    key = rng.choice(list(tree)) if tree else "model"
    inside = tree.get(key)
    if isinstance(inside, dict) and inside and rng.random() < 0.7:
        tree[key] = damaged(rng, inside)
        return tree
    what = rng.random()
    if what < 0.6:
        tree[key] = rng.choice(ODD)
    elif what < 0.8:
        tree.pop(key, None)
    else:
        tree[rng.choice(["typ", "fps", "batch_size", "plugin_config", "mask_types", "_x", 3])] = rng.choice(ODD)
    return tree


def written(tree: dict[Any, Any]) -> str:
    return "".join(f"{key} = {value!r}\n" for key, value in tree.items() if isinstance(key, str))


def run(folder: Path, seeds: range) -> tuple[int, int]:
    """(how many were read, how many refused)"""
    trees = [*first_trees(), *second_trees(folder)]
    path, read, refused = folder / "run.py", 0, 0
    for seed in seeds:
        rng = random.Random(seed)
        tree = rng.choice(trees)
        for _ in range(rng.randint(1, 3)):
            tree = damaged(rng, tree)
        path.write_text(written(tree), encoding="utf-8")
        words = [word for _ in range(rng.randint(0, 2)) for word in (f"--{rng.choice(WORDS)}", str(rng.choice(ODD)))]
        try:
            cls = RunConfig if is_training(RunConfig, path) else SampleConfig
            usual = ["--data-path", "c.csv"] if cls is RunConfig else ["--prompt", "a cat", "--ckpt-path", "w.pt"]
            load_config(cls, path, [*usual, *words])
            read += 1
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) <= 1100, (seed, tree, words)
            refused += 1
    return read, refused


def test_damaged_files_of_the_family(tmp_path: Path) -> None:
    assert sum(run(tmp_path, range(400))) == 400


@pytest.mark.slow
def test_many_damaged_files_of_the_family(tmp_path: Path) -> None:
    assert sum(run(tmp_path, range(10_000, 22_000))) == 12_000
