"""Bad configurations through the command itself: exit code 2, one line that names the key, nothing written.

Beside the mistakes of tests/unit/test_config.py, which are sent through the command here too: those that show only
when sections meet a data table, a number of processes, or a disk.
"""

import copy
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from opensora.cli import train
from opensora.cli.main import run_cli
from opensora.config.load import load_config, save
from opensora.config.run import RunConfig, SampleConfig
from opensora.utils.errors import MAX_LINE, UserError, one_line
from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.integration.conftest import CONFIG
from tests.unit.test_config import BAD, GOOD

TABLE = "path,text,num_frames,height,width,fps\na.mp4,one,9,32,32,8\nb.mp4,two,9,32,32,8\nc.png,three,1,32,32,\n"

# name -> (overrides, processes, what the line must contain)
CASES: dict[str, tuple[list[str], int, str]] = {
    "learning rate below zero": (["optim.lr=-1"], 2, "optim.lr=-1"),
    "betas": (["optim.betas=[1.0, 0.9]"], 2, "optim.betas="),
    "epsilon": (["optim.eps=-1"], 2, "optim.eps=-1"),
    "weight decay": (["optim.weight_decay=-0.1"], 2, "optim.weight_decay=-0.1"),
    "clip norm": (["optim.clip_norm=-1"], 2, "optim.clip_norm=-1"),
    "average above one": (["optim.ema_decay=1.5"], 2, "optim.ema_decay=1.5"),
    "warm-up below zero": (["optim.warmup_steps=-1"], 2, "optim.warmup_steps=-1"),
    "schedule": (["optim.schedule=linaer"], 2, "optim.schedule='linaer'"),
    "no steps": (["train.steps=0"], 2, "train.steps=0"),
    "checkpoints never": (["train.checkpoint_every=0"], 2, "train.checkpoint_every=0"),
    "keep": (["train.checkpoint_keep=-1"], 2, "train.checkpoint_keep=-1"),
    "a checkpoint that is not there": (["train.resume={folder}/nowhere"], 2, "train.resume="),
    "weights that are not there": (["train.init_from={folder}/nowhere"], 2, "train.init_from="),
    "timeout": (["parallel.timeout_s=0"], 2, "parallel.timeout_s=0"),
    "no seed": (["seed=-1"], 2, "seed=-1"),
    "no name": (["name=.."], 2, "name='..'"),
    "the run's folder is a file": (["output={folder}/table.csv"], 2, "output="),
    "a file is in the way": (["output={folder}", "name=table.csv"], 2, "table.csv"),
    "a disk that cannot be written": (["output=/proc/runs"], 2, "output=/proc/runs"),
    "a folder of too long a name": ([f"output={'a' * 300}"], 2, "output: aaa"),
    "a table that is a folder": (["data.table={folder}"], 2, "data.table="),
    "a pattern without tables": (["data.table={folder}/*.parquet"], 2, "no such file"),
    "workers": (["data.workers=-1"], 2, "data.workers=-1"),
    "micro-batches": (["data.micro_batches=0"], 2, "data.micro_batches=0"),
    "prefetch": (["data.prefetch=0"], 2, "data.prefetch=0"),
    "bucket frames": (["data.buckets={{32px: {{0: [1.0, 1]}}}}"], 2, "data.buckets.32px.0"),
    "bucket batch": (["data.buckets={{32px: {{9: [1.0, 0]}}}}"], 2, "data.buckets.32px.9"),
    "bucket name": (["data.buckets={{big: {{9: [1.0, 1]}}}}"], 2, "data.buckets.big"),
    "bucket frames that do not fit": (["data.buckets={{32px: {{7: [1.0, 1]}}}}"], 2, "data.buckets.32px.7"),
    "no clip is long enough": (["data.buckets={{32px: {{33: [1.0, 1]}}}}"], 2, "data.buckets"),
    "no block": (["model.depth=-1"], 2, "model.depth=-1"),
    "axes": (["model.axes_dim=[2, 2, 2]"], 2, "model.axes_dim="),
    "patch": (["model.patch_size=3"], 2, "model.in_channels"),
    "objective": (["objective.sampling=magic"], 2, "objective."),
    "its old name": (["flow.sampling=magic"], 2, "objective."),
    "dropout": (["conditioning.dropout.text=2"], 2, "conditioning.dropout.text"),
    "masks": (["conditioning.masks={{all: 1}}"], 2, "conditioning.masks"),
    "masks that the model cannot take": (["conditioning.masks={{random: 0.5}}"], 2, "conditioning.masks"),
    "types of given frames": (["conditioning.mask_types={{i2v_hed: 1}}"], 2, "conditioning.mask_types.i2v_hed"),
    "given frames that the model does not read": (
        ["conditioning.mask_types={{none: 1}}"],
        2,
        "conditioning.mask_types",
    ),
    "bucket rule": (["data.bucket_rule=open_sora_1_4"], 2, "data.bucket_rule='open_sora_1_4': did you mean"),
    "interval of another rule": (["data.frame_interval=3"], 2, "data.frame_interval=3: must be null"),
    "interval": (["data.bucket_rule=open_sora_1_2", "data.frame_interval=0"], 2, "data.frame_interval=0"),
    "resolution of another rule": (
        ["data.bucket_rule=open_sora_1_2", "data.probability=accept"],
        2,
        "data.buckets.32px",
    ),
    "interpolation": (["data.interpolation=lanczos"], 2, "data.interpolation="),
    "pairs that skip": (
        ["data.bucket_rule=open_sora_1_2", "data.buckets={{144p: {{9: [[1.0, 0.5], 1]}}}}"],
        2,
        "data.probability=skip: with bucket_rule=open_sora_1_2 must be accept",
    ),
    "sizes that the autoencoder does not take": (
        ["data.bucket_rule=open_sora_1_2", "data.buckets={{144p: {{9: [1.0, 1]}}}}"],
        2,
        "data.buckets.144p.9: 117x312 pixels do not fit",
    ),
    "references": (["conditioning.references={{i2v: 1}}"], 2, "conditioning.references.i2v"),
    "references that the model does not read": (
        ["conditioning.references={{i2v_head: 1}}", "model.cond_embed=false"],
        2,
        "conditioning.references",
    ),
    "references of no weight": (["conditioning.references={{i2v_head: 0}}"], 2, "conditioning.references"),
    "shard of nothing": (["parallel.mesh.shard=0"], 2, "parallel.mesh.shard=0"),
    "processes left over": (["parallel.mesh.ulysses=2"], 3, "parallel.mesh"),
    "more ring than processes": (["parallel.mesh.ring=4"], 2, "parallel.mesh"),
    "tensor that does not divide": (["parallel.mesh.tensor=3", "parallel.mesh.ulysses=1"], 3, "parallel.mesh.tensor=3"),
    "blocks to recompute": (["parallel.recompute.kind=first", "parallel.recompute.blocks=0"], 2, "blocks=0"),
    "precision": (["parallel.precision.compute=fp8"], 2, "parallel.precision.compute='fp8'"),
    "samples of nothing": (["validate.every=1"], 2, "validate.prompts"),
    "samples in no step": (
        ["validate.every=1", "validate.prompts=[a]", "validate.sampling.num_steps=0"],
        2,
        "num_steps=0",
    ),
    "wandb": (["log.wandb=on"], 2, "log.wandb="),
    "features that are not there": (["data.features={folder}/nowhere"], 2, "data.features"),
}


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def line_of(argv: list[str], world: int, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    """What the command says, or why that is not one line and exit code 2."""
    patch.setattr(sys, "argv", ["train.py", *argv])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}.items():
        patch.setenv(name, value)
    try:
        run_cli(train.main)
    except SystemExit as exit_:
        code: object = exit_.code
    except Exception as error:
        return f"a traceback: {error!r}"
    said = capsys.readouterr().err
    if code != 2 or said.count("\n") != 1 or not said.startswith("error: "):
        return f"exit code {code}, {said!r}"
    return said


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "table.csv").write_text(TABLE)
    (tmp_path / "index").mkdir()
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", table=tmp_path / "table.csv"))
    monkeypatch.chdir(tmp_path)
    return path


def test_mistakes_that_show_in_context(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    before, wrong = tree(config.parent), []
    for case, (overrides, world, expected) in CASES.items():
        argv = [str(config), f"data.index={config.parent}/index", *(o.format(folder=config.parent) for o in overrides)]
        said = line_of(argv, world, capsys, monkeypatch)
        if not said.startswith("error: ") or expected not in said:
            wrong.append(f"{case}: {said}")
        left = [name for name in tree(config.parent) if not name.startswith("index")]
        if left != [name for name in before if not name.startswith("index")]:
            wrong.append(f"{case}: wrote {left}")
    tally("bad configurations: exit 2, one line, the key, nothing written", len(CASES) - len(wrong), len(CASES))
    assert not wrong, "\n".join(wrong)


def test_mistakes_in_the_configuration_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for case, (content, overrides, expected) in BAD.items():
        text = GOOD if content is None else content
        (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        said = line_of(["run.yaml", *overrides], 1, capsys, monkeypatch)
        if not said.startswith("error: ") or expected not in said or tree(tmp_path) != ["run.yaml"]:
            wrong.append(f"{case}: {said}")
    tally("bad configurations: exit 2, one line, the key, nothing written", len(BAD) - len(wrong), len(BAD))
    assert not wrong, "\n".join(wrong)


def test_a_disk_without_room_for_one_checkpoint(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    said = line_of([str(config), f"data.index={config.parent}/index"], 2, capsys, monkeypatch)
    assert "output=" in said and "the disk has 1e-06 GB left, and one checkpoint takes" in said
    assert not (config.parent / "runs").exists()


@pytest.mark.slow
def test_the_command_itself(config: Path, tally: Tally) -> None:
    """As a user meets it: the real script, a process of its own."""
    script = str(ROOT / "scripts/diffusion/train.py")
    cases = [
        ([str(config), "optim.learning_rate=1"], "error: optim.learning_rate: unknown key"),
        ([str(config), "output=table.csv"], "error: output=table.csv: table.csv is a file"),
        (["nowhere.yaml"], "error: nowhere.yaml: cannot be read"),
    ]
    before = tree(config.parent)
    running = [
        subprocess.Popen(
            [sys.executable, script, *argv, *([f"data.index={config.parent}/index"] if len(argv) > 1 else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        )
        for argv, _ in cases
    ]
    for process, (_, expected) in zip(running, cases, strict=True):
        out, err = process.communicate(timeout=100)
        assert process.returncode == 2 and out == "" and err.startswith(expected) and err.count("\n") == 1, err
    assert [name for name in tree(config.parent) if not name.startswith("index")] == [
        name for name in before if not name.startswith("index")
    ]
    tally("bad configurations: exit 2, one line, the key, nothing written", len(cases), len(cases))


SAMPLE = "weights: outputs/trial\nprompt: a cat\nsampling: {width: 64, height: 64}\n"
ODD_TEXT = (
    *(
        "",
        " ",
        "~",
        "null",
        "true",
        "NO",
        "1_0",
        "0x1F",
        "012",
        "1e999",
        ".nan",
        "-.inf",
        "16:9",
        "²",
        "٣",
        "???",
        "a.b",
    ),
    *(
        "${x}",
        "${oc.env:HOME}",
        "\\\\${",
        "%s",
        "{0}",
        "a=b",
        "--",
        "-",
        "'",
        '"',
        "#",
        "&a",
        "*a",
        "!!str",
        "!x",
        "|",
        ">",
    ),
    *(
        "\0",
        "\x1b[31m",
        "\x7f",
        "\x85",
        "\u202e",
        "\u2028",
        "\ud800",
        "\udcff",
        "\ufeff",
        "\U0001f408",
        "a\nb",
        "\r",
        "\t",
        "..",
    ),
    *(
        "/",
        "/dev/zero",
        "/etc",
        "a" * 5000,
        "1" * 5000,
        "ä" * 300,
        "<<",
        "include",
        "kind",
        "size",
        "__init__",
        "=",
        ",",
        "]",
    ),
)
ODD_NUMBERS = (0, -1, 1, 2**31, 2**63 - 1, -(2**63), 2**64, 10**400, 0.0, -0.0, 1e308, 5e-324, 1.5, True, False, None)


class Odd:
    """Random configurations: parts of a good one taken out, moved, wrapped and replaced by values of other kinds."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def scalar(self) -> object:
        return self.rng.choice(ODD_TEXT) if self.rng.random() < 0.6 else self.rng.choice(ODD_NUMBERS)

    def value(self, depth: int = 0) -> object:
        """A scalar, a list or a mapping, seldom a very deep one."""
        kind = self.rng.random()
        if kind < 0.02:
            value: object = self.scalar()
            for _ in range(self.rng.choice((31, 33, 200))):
                value = [value] if self.rng.random() < 0.5 else {"a": value}
            return value
        if kind < 0.6 or depth > 3:
            return self.scalar()
        items = [self.value(depth + 1) for _ in range(self.rng.randrange(4))]
        if kind < 0.8:
            return items
        return {self.key(): item for item in items}

    def key(self) -> object:
        known = (
            "name",
            "train",
            "steps",
            "kind",
            "model",
            "data",
            "buckets",
            "64px",
            1,
            9,
            "lr",
            "include",
            "sampling",
        )
        return self.rng.choice(known) if self.rng.random() < 0.6 else self.scalar()

    def tree(self, good: dict[object, object]) -> dict[object, object]:
        """``good`` with one to three changes."""
        tree = copy.deepcopy(good)
        for _ in range(self.rng.randint(1, 3)):
            place: dict[object, object] = tree
            while True:
                key = self.rng.choice(list(place)) if place else self.key()
                below = place.get(key)
                if isinstance(below, dict) and self.rng.random() < 0.7:
                    place = below
                    continue
                break
            how = self.rng.randrange(5)
            if how == 0:
                place.pop(key, None)
            elif how == 1:
                place[self.key()] = self.value()
            elif how == 2:
                place[key] = [below]
            elif how == 3:
                place[key] = {self.key(): below}
            else:
                place[key] = self.value()
        return tree

    def override(self, good: dict[object, object]) -> list[str]:
        """One of a known key, an odd one, or no override at all."""
        keys, place = [], good
        while place:
            key = self.rng.choice(list(place))
            keys.append(str(key))
            below = place[key]
            place = below if isinstance(below, dict) and self.rng.random() < 0.8 else {}
        if self.rng.random() < 0.4:
            keys.insert(self.rng.randrange(len(keys) + 1), str(self.key()))
        name, value = ".".join(keys * self.rng.choice((1, 1, 1, 1, 200))), self.value()
        text = value if isinstance(value, str) else flow(value)
        spelled = ([f"{name}={text}"], [f"--{name}={text}"], [f"--{name}", text], [name], [text], [f"{name}=="])
        return self.rng.choice(spelled[: 3 if self.rng.random() < 0.8 else 6])


def flow(value: object) -> str:
    """YAML on one line; texts are plain, quoted, or escaped, as it comes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        return value if value.isalnum() or len(value) % 3 == 1 else json.dumps(value, ensure_ascii=len(value) % 2 == 0)
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, float)
        else repr(value)
    )


def odd_configurations(count: int, seed: int, folder: Path) -> tuple[int, list[str]]:
    """(how many were refused, what is wrong with the messages of those that were)."""
    odd, refused, wrong = Odd(seed), 0, []
    texts: dict[type, str] = {RunConfig: GOOD, SampleConfig: SAMPLE}
    good = {cls: yaml.safe_load(text) for cls, text in texts.items()}
    path = folder / "run.yaml"
    for number in range(count):
        cls = RunConfig if odd.rng.random() < 0.8 else SampleConfig
        in_file, overrides = odd.rng.random() < 0.6, []
        content = flow(odd.tree(good[cls])) if in_file else texts[cls]
        if not in_file or odd.rng.random() < 0.3:
            overrides = [word for _ in range(odd.rng.randint(1, 3)) for word in odd.override(good[cls])]
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        case = f"{number}: {content[:300] if in_file else overrides!r:.300}"
        try:
            cfg = load_config(cls, path, overrides)
            assert load_config(cls, written(cfg, folder)) == cfg
        except UserError as error:
            refused += 1
            if not names_its_place(str(error), cls, overrides):
                wrong.append(f"{case}: {error}")
        except BaseException as error:
            wrong.append(f"{case}: a traceback: {error!r:.200}")
    return refused, wrong


def written(cfg: object, folder: Path) -> Path:
    save(cfg, folder / "again" / "config.yaml")
    return folder / "again" / "config.yaml"


def names_its_place(line: str, cls: type, overrides: list[str]) -> bool:
    """Whether a message is one printable line that names the file, or a key, or the word of the command line."""
    if not line.isprintable() or len(line) > MAX_LINE + 10 or not line.strip():
        return False
    known = {field.name for field in dataclasses.fields(cls)} | {"include"}
    first = re.split(r"[.=: (]", line)[0]
    return "run.yaml" in line or "command line" in line or first in known or any(said_of(line, w) for w in overrides)


def said_of(line: str, word: str) -> bool:
    shown = one_line(word)
    return line.startswith((shown[:20], f"'{shown[:20]}", repr(word)[:20]))


@pytest.mark.parametrize(
    ("count", "seed"), [(400, 0), pytest.param(10_000, 1, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.timeout(600)  # some: 6 s on a quiet machine
def test_odd_configurations(
    count: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    monkeypatch.chdir(tmp_path)
    refused, wrong = odd_configurations(count, seed, tmp_path)
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong[:20])
    assert 0.6 * count < refused < count
    tally("odd configurations and overrides: read, or refused in one line that names the place", count, count)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_noise_in_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
    """10,000 files with a few bytes altered, moved or repeated: read, or refused in one line."""
    monkeypatch.chdir(tmp_path)
    rng, path = random.Random(0), tmp_path / "run.yaml"
    refused = 0
    for number in range(10_000):
        content = bytearray(GOOD.encode())
        for _ in range(rng.randint(1, 4)):
            at, size = rng.randrange(len(content)), rng.randint(1, 12)
            piece = content[at : at + size]
            other = rng.randrange(len(content))
            how = rng.randrange(4)
            if how == 0:
                content[at] = rng.randrange(256)
            elif how == 1:
                del content[at : at + size]
            elif how == 2:
                content[other:other] = piece
            else:
                content[at:at] = rng.choice(b"{}[]:,#&*!|>%@`'\"-?\n\t\0 ~").to_bytes(1, "little")
        path.write_bytes(content)
        try:
            load_config(RunConfig, path)
        except UserError as error:
            refused += 1
            assert str(error).strip(), number
    assert refused > 5000
    tally("noise in a configuration: read, or refused in one line", 10_000, 10_000)
