"""The training command computes what the formulas say: every loss, norm and learning rate, and the state at the end.

The other side of the comparison is ``training.py``, which shares nothing with the project.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.cli import precompute
from opensora.cli import train as command
from tests.conftest import ROOT
from tests.dist.harness import run_distributed
from tests.reference import files, mmdit, training
from tests.reference.checked import CheckedText
from tests.reference.files import Case
from tests.reference.training import Record, State

TOLERANCE = 1e-10
# Layouts as overrides of the configuration, on 1, 2 and 4 processes.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1-zero0-recompute": (1, ["parallel.zero=0", "parallel.recompute.kind=full"]),
    "1-workers-cache": (1, ["data.workers=2", "data.cache_mib=64"]),
    "1-offload": (1, ["parallel.offload=optimizer", "parallel.zero=3"]),
    "2-shard2-zero1": (2, ["parallel.zero=1"]),
    "2-ulysses2-zero3": (2, ["parallel.zero=3", "parallel.mesh.ulysses=2"]),
    "2-ulysses2-dynamic": (2, ["parallel.mesh.ulysses=2", "parallel.mesh.dynamic=true"]),
    "2-ring2": (2, ["parallel.mesh.ring=2", "parallel.recompute.kind=selective"]),
    "2-tensor2": (2, ["parallel.mesh.tensor=2"]),
    "2-replicate2": (2, ["parallel.mesh.replicate=2", "parallel.zero=0"]),
    "4-tensor2-shard2-zero3": (4, ["parallel.mesh.tensor=2", "parallel.zero=3"]),
    "4-tensor4": (4, ["parallel.mesh.tensor=4"]),
    "4-ring2-ulysses2-zero3": (4, ["parallel.mesh.ring=2", "parallel.mesh.ulysses=2", "parallel.zero=3"]),
    "4-ulysses2-tensor2": (4, ["parallel.mesh.ulysses=2", "parallel.mesh.tensor=2", "parallel.recompute.kind=full"]),
    "4-replicate2-shard2": (4, ["parallel.mesh.replicate=2", "parallel.zero=3"]),
}
QUICK = ("2-ulysses2-zero3", "2-tensor2", "4-tensor2-shard2-zero3")


CASES = {
    "adamw": Case(),
    "sgd, interleaved": Case(optimizer="sgd", rope="interleaved"),
    "drawn weights": Case(drawn=True),
    "flux layout": Case(flux=True),
    "other options": Case(plain=True),
    "an expert's times": Case(times=(0.4, 0.9)),
    "packs": Case(pack=2),
    "damaged files": Case(damaged=frozenset({3, 6, 8})),
    "adapters": Case(lora=(3, 12.0)),
    "references": Case(references="learned"),
    "references left out": Case(references="left out", optimizer="sgd"),
    "references in packs": Case(references="left out", pack=2),
}


@cache
def text(mask: bool = True) -> CheckedText:
    return CheckedText(Case(plain=not mask).text)


@cache
def truth(case: Case = Case()) -> tuple[list[Record], State]:  # noqa: B008  (frozen)
    start = mmdit.initial(files.weight_shapes(), files.SEED) if case.drawn else files.alive()
    return training.train(files.problem(text(not case.plain), case), files.used(start, plain=case.plain))


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()


def check(folder: Path, case: Case = Case()) -> None:  # noqa: B008  (frozen)
    """That the run of this folder is the one that formulas give."""
    (records, state), (true_records, true_state) = files.read_run(folder, case), truth(case)
    assert len(records) == len(true_records)
    for step, (record, true_record) in enumerate(zip(records, true_records, strict=True)):
        for name in ("lr", "loss", "grad_norm"):
            value, true_value = getattr(record, name), getattr(true_record, name)
            assert abs(value / true_value - 1) <= TOLERANCE, f"{name} of step {step}: {value}, not {true_value}"
    sections = {name: (getattr(state, name), getattr(true_state, name)) for name in vars(true_state)}
    sections["export"] = (files.read_export(folder, case), true_state.ema)
    for section, (found, right) in sections.items():
        assert found.keys() == right.keys(), section
        for name, value in right.items():
            error = relative(found[name], value)
            assert error <= TOLERANCE, f"{section} of {name}: off by {error:.1e}"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_clips(tmp_path_factory.mktemp("clips"))


Configure = Callable[..., Path]


@pytest.fixture
def configure(table: Path, tmp_path: Path) -> Configure:
    """Writes weights and a configuration whose run's folder is tmp_path/run."""

    def write(case: Case = Case()) -> Path:  # noqa: B008  (frozen)
        weights = files.used(files.alive(), plain=case.plain)
        start = None if case.drawn else files.write_weights(tmp_path / "weights.safetensors", weights, case.rope)
        clips = files.write_clips(tmp_path / "clips", case.damaged) if case.damaged else table
        return files.write_config(tmp_path / "train.yaml", clips, init_from=start, case=case)

    return write


@pytest.mark.parametrize("case", CASES)
def test_one_process(configure: Configure, tmp_path: Path, case: str) -> None:
    assert command.main([str(configure(CASES[case]))]) == 0
    check(tmp_path / "run", CASES[case])


def test_from_features(configure: Configure, tmp_path: Path) -> None:
    """Latents, references and text features that were stored before, for every epoch of the run."""
    case = CASES["references left out"]
    path = configure(case)
    assert precompute.main([str(path), "--out", str(tmp_path / "features"), "--epochs", "3"]) == 0
    assert command.main([str(path), f"data.features={tmp_path / 'features'}"]) == 0
    check(tmp_path / "run", case)


def test_resumed(configure: Configure, tmp_path: Path) -> None:
    """A run that lost everything after its first checkpoint makes the same steps again, with the same state."""
    path = configure()
    assert command.main([str(path)]) == 0
    folder = tmp_path / "run"
    first = folder / "checkpoints" / f"step-{files.RESUMED:08d}"
    for later in set(first.parent.glob("step-*")) - {first}:
        shutil.rmtree(later)
    shutil.rmtree(folder / "exported")
    (folder / "DONE").unlink()
    assert command.main([str(path)]) == 0
    check(folder)


def train(argv: list[str]) -> int:
    return command.main(argv)


# Default: one layout of each sort; slow: the cases that a layout could spoil.
MANY = [pytest.param(layout, "adamw", id=layout) for layout in QUICK]
MANY += [pytest.param("2-ulysses2-zero3", "references left out", id="2-ulysses2-zero3, references left out")]
MANY += [
    pytest.param(layout, case, id=f"{layout}, {case}", marks=pytest.mark.slow)
    for layout, case in (
        ("2-tensor2", "flux layout"),
        ("2-tensor2", "adapters"),
        ("2-shard2-zero1", "damaged files"),
        ("2-ring2", "other options"),
        ("4-ulysses2-tensor2", "packs"),
        ("2-ring2", "references"),
        ("2-tensor2", "references left out"),
        ("2-ulysses2-dynamic", "references left out"),
        ("4-ulysses2-tensor2", "references in packs"),
        ("4-ring2-ulysses2-zero3", "references left out"),
    )
]


@pytest.mark.parametrize(("layout", "case"), MANY)
def test_many_processes(configure: Configure, tmp_path: Path, layout: str, case: str) -> None:
    world, overrides = LAYOUTS[layout]
    argv = [str(configure(CASES[case])), *overrides]
    assert run_distributed(train, world, argv, timeout=110, init=False) == [0] * world
    check(tmp_path / "run", CASES[case])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", ["adamw", "sgd, interleaved"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_typed(configure: Configure, tmp_path: Path, layout: str, case: str) -> None:
    """The launcher and the script, from another folder."""
    world, overrides = LAYOUTS[layout]
    launch(world, "train", [str(configure(CASES[case])), *overrides], tmp_path)
    check(tmp_path / "run", CASES[case])


def launch(world: int, script: str, argv: list[str], folder: Path) -> None:
    """``bash launch/torchrun.sh N scripts/diffusion/SCRIPT.py ARGV`` must succeed."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch/torchrun.sh"), str(world), str(ROOT / f"scripts/diffusion/{script}.py"), *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_is_sensitive() -> None:
    """Every weight moves, so none of them is compared with what it was."""
    moved = truth()[1].weights
    for name, start in files.alive().items():
        assert not torch.equal(moved[name], start), name
