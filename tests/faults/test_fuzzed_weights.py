"""Weights and adapters with random damage: read, or refused in one line; nothing else, and not for long."""

import json
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from opensora.config.run import SampleConfig
from opensora.inference.find import read_adapters
from opensora.inference.prompts import read_jobs
from opensora.models.families import MODEL_SIZES
from opensora.models.mmdit.convert import LAYOUTS
from opensora.models.mmdit.convert import WEIGHTS as FORMAT
from opensora.models.weights.adapter_names import CONFIG, WEIGHTS
from opensora.models.weights.reader import WeightFile
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import INDEX
from tests.faults.conftest import Tally

MODEL = MODEL_SIZES["mmdit"]["debug"]
LONGEST_S = 10.0  # of processor time, for one file
VALUES: list[object] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**400,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    {"a": 1},
    float("nan"),
    float("inf"),
    "9" * 999,
]
WORDS = [
    "lora_A",
    "lora_B",
    "lora_down",
    "alpha",
    "dora_scale",
    "double_blocks",
    "0",
    "",
    "..",
    "weight",
    "_orig_mod",
    "é",
]


def adapter() -> dict[str, torch.Tensor]:
    layers = {
        "base_model.model.double_blocks.0.img_attn.qkv": (64, 192),
        "base_model.model.single_blocks.1.linear1": (64, 448),
    }
    tensors = {}
    for layer, (inputs, outputs) in layers.items():
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = (
            torch.ones(2, inputs),
            torch.ones(outputs, 2),
        )
        tensors[f"{layer}.alpha"] = torch.tensor(4.0)
    return tensors


def weights() -> dict[str, torch.Tensor]:
    shapes = {
        "img_in.weight": (8, 4),
        "double_blocks.0.img_attn.qkv.weight": (24, 8),
        "single_blocks.0.linear1.bias": (56,),
    }
    shapes |= {"single_blocks.0.linear1.weight": (56, 8), "double_blocks.0.img_attn.norm.key_norm.scale": (4,)}
    return {name: torch.ones(shape) for name, shape in shapes.items()}


DESCRIBED = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "bias": "none",
    "rank_pattern": {"qkv": 2},
    "alpha_pattern": {"qkv": 4},
    "target_modules": ["qkv"],
    "base_model_name_or_path": "x",
    "use_rslora": False,
    "init_lora_weights": True,
}


def changed_json(draw: random.Random, tree: object) -> object:
    """A tree with one or two nodes replaced, removed, renamed or nested."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.randint(1, 2)):
        node = tree
        while isinstance(node, dict) and node:
            key = draw.choice(sorted(node))
            if not isinstance(node[key], dict) or draw.random() < 0.6:
                how = draw.randrange(4)
                if how == 0:
                    node[key] = draw.choice(VALUES)
                elif how == 1:
                    del node[key]
                elif how == 2:
                    node[draw.choice([key + draw.choice(WORDS), ".".join(draw.choices(WORDS, k=4)), key[::-1]])] = (
                        node.pop(key)
                    )
                else:
                    node[key] = {draw.choice(["(a+)+$", "qkv", "[", "^", "a" * 300, ".*"]): node[key]}
                break
            node = node[key]
    return tree


def changed_bytes(draw: random.Random, content: bytes) -> bytes:
    """A few bits flipped, a piece cut out, doubled or replaced by noise."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 10])):
        at = draw.randrange(min(len(data), draw.choice([8, 400, len(data)])) or 1) if data else 0
        how = draw.randrange(4)
        if how == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            del data[at : at + draw.choice([1, 4, 100])]
        elif how == 2:
            data[at:at] = draw.randbytes(draw.choice([1, 4, 100]))
        else:
            data[at : at + 4] = draw.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"[[[[", b'"":0', b"1e99"])
    return bytes(data)


def changed_header(draw: random.Random, content: bytes) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(changed_json(draw, json.loads(content[8 : 8 + size]))).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def attempt(draw: random.Random, folder: Path, content: bytes, whole: bytes) -> list[str]:
    """What went wrong with one damaged file of each kind."""
    files = {
        folder / "adapter" / WEIGHTS: draw.choice([changed_bytes, changed_header])(draw, content),
        folder / "weights/model.safetensors": draw.choice([changed_bytes, changed_header])(draw, whole),
    }
    described = json.dumps(changed_json(draw, DESCRIBED)).encode()
    files[folder / "adapter" / CONFIG] = draw.choice([described, changed_bytes(draw, described)])
    if draw.random() < 0.5:
        files[folder / "adapter" / WEIGHTS] = content  # so that the configuration is what decides
    index = json.dumps(
        changed_json(draw, {"weight_map": {"w": "model.safetensors", "v": "model.safetensors"}})
    ).encode()
    files[folder / "weights" / INDEX] = draw.choice([index, changed_bytes(draw, index)])
    files[folder / "prompts.csv"] = changed_bytes(draw, b'text,name,neg\na cat,x,\n"a, dog",y,z\n')
    for path, data in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    calls = {
        "adapter": lambda: read_adapters(folder / "adapter", MODEL, "lora"),
        "adapter file": lambda: read_adapters(folder / "adapter" / WEIGHTS, MODEL, "lora"),
        "weights": lambda: dict(
            WeightFile(folder / "weights/model.safetensors", FORMAT, draw.choice(list(LAYOUTS.values())))
        ),
        "index": lambda: WeightFile(folder / "weights", FORMAT),
        "prompts": lambda: read_jobs(SampleConfig(weights="w", prompt_csv=str(folder / "prompts.csv"))),
    }
    wrong = []
    for name, call in calls.items():
        start = time.process_time()
        try:
            call()
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > 2000:
                wrong.append(f"{name}: {error!r}")
        except Exception as error:
            wrong.append(f"{name}: {error!r}")
        if time.process_time() - start > LONGEST_S:
            wrong.append(f"{name}: took {time.process_time() - start:.0f} s")
    return wrong


def fuzz(seeds: range, folder: Path) -> list[str]:
    content, whole = save(adapter()), save(weights())
    return [f"{seed}: {one}" for seed in seeds for one in attempt(random.Random(seed), folder, content, whole)]


def test_damaged_weights_adapters_and_prompts(tmp_path: Path, tally: Tally) -> None:
    wrong = fuzz(range(150), tmp_path)
    assert not wrong, wrong[:5]
    tally("damaged weights, adapters, prompt tables: read, or refused in one line", 750, 750)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_weights_adapters_and_prompts(tmp_path: Path, tally: Tally) -> None:
    wrong = fuzz(range(150, 6150), tmp_path)
    assert not wrong, (len(wrong), wrong[:5])
    tally("damaged weights, adapters, prompt tables: read, or refused in one line", 30_000, 30_000)
