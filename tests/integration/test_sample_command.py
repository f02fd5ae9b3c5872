"""The sampling command as typed, on 2 to 4 processes: the files of one process.

In fp64 layouts differ by rounding that no pixel shows, so videos are equal byte for byte; in fp32 a pixel of a still
may move by one level.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.integration.conftest import CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SAMPLING = """
weights: {weights}
save_dir: {save_dir}
precision: {precision}
prompts: [a red circle moves left on a gray background, a blue square]
batch_size: 2
sampling: {{width: {width}, height: 24, num_frames: {frames}, num_steps: 12, guidance: 3.0, text_osci: true, fps: 8}}
parallel: {{timeout_s: 100}}
"""
SECTIONS = """
model: {kind: mmdit, size: debug, patch_size: 1, context_in_dim: 32, vec_in_dim: 32, cond_embed: false}
vae: {kind: dct, channels: 16}
text: {kind: bytes, dim: 32, mask: true}
"""
SOURCES = {"run": "run", "export": "run/exported", "file": "run/exported/model.safetensors"}


def run(processes: int, script: str, *args: str) -> subprocess.CompletedProcess[str]:
    launcher, path = (str(ROOT / name) for name in ("launch/torchrun.sh", f"scripts/diffusion/{script}.py"))
    return subprocess.run(
        ["bash", launcher, str(processes), path, *args],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def command(processes: int, script: str, *args: str) -> None:
    done = run(processes, script, *args)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of a run folder; a few large steps, so that velocities are not zero."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "train.yaml"
    path.write_text(CONFIG.format(output=folder, table=shapes / "train.csv"))
    fp32 = [f"parallel.precision.{key}=fp32" for key in ("compute", "reduce", "master")]
    command(1, "train", str(path), *fp32, "parallel.mesh.ulysses=1", "optim.lr=0.02", "train.steps=8")
    return folder


def sample(
    trained: Path, name: str, processes: int, source: str, precision: str, frames: int, overrides: list[str]
) -> list[Path]:
    """The videos or stills that the command wrote."""
    path = trained / f"{name}.yaml"
    text = SAMPLING.format(
        weights=trained / SOURCES[source],
        save_dir=trained / name,
        precision=precision,
        frames=frames,
        width=40 if frames > 1 else 56,
    )
    path.write_text(text + (SECTIONS if source == "file" else ""))
    command(processes, "inference", str(path), *overrides)
    files = sorted((trained / name).glob("*/sample_*.[mp][pn][4g]"))
    assert len(files) == 2
    return files


@pytest.fixture(scope="module")
def videos(trained: Path) -> list[bytes]:
    return [path.read_bytes() for path in sample(trained, "one", 1, "run", "fp64", 9, [])]


@pytest.fixture(scope="module")
def stills(trained: Path) -> list[np.ndarray]:
    return [pixels(path) for path in sample(trained, "still", 1, "run", "fp32", 1, [])]


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


CASES = [
    (2, "run", {"ring": 2}),
    (2, "export", {"tensor": 2}),
    (2, "file", {"cfg": 2}),
    (3, "run", {"ulysses": 3}),  # of 4 heads
    (4, "file", {"ring": 2, "ulysses": 2}),
    (4, "run", {"cfg": 2, "tensor": 2}),
]


def mesh(degrees: dict[str, int]) -> list[str]:
    return [f"parallel.mesh.{axis}={degree}" for axis, degree in degrees.items()]


@pytest.mark.parametrize(("processes", "source", "degrees"), CASES)
def test_videos(trained: Path, videos: list[bytes], processes: int, source: str, degrees: dict[str, int]) -> None:
    """45 image tokens; tiles shared out, and ZeRO 3."""
    overrides = [*mesh(degrees), "vae_parallel=on", "parallel.zero=3"]
    found = sample(trained, f"{source}-{'-'.join(degrees)}", processes, source, "fp64", 9, overrides)
    assert [path.read_bytes() for path in found] == videos


@pytest.mark.parametrize(("processes", "source", "degrees"), [CASES[3], CASES[4]])
def test_stills(trained: Path, stills: list[np.ndarray], processes: int, source: str, degrees: dict[str, int]) -> None:
    """35 image tokens."""
    found = sample(trained, f"still-{'-'.join(degrees)}", processes, source, "fp32", 1, mesh(degrees))
    for path, truth in zip(found, stills, strict=True):
        assert truth.std() > 5 and np.abs(pixels(path) - truth).max() <= 1


def test_a_process_without_a_pass_is_refused_in_one_line(trained: Path) -> None:
    path = trained / "refused.yaml"
    path.write_text(
        SAMPLING.format(weights=trained / "run", save_dir=trained / "no", precision="fp32", frames=1, width=32)
    )
    done = run(2, "inference", str(path), "parallel.mesh.cfg=2", "sampling.guidance=1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "parallel.mesh.cfg=2: sampling.guidance=1 is off" in done.stderr
