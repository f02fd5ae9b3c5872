"""Run every optional package through the command that uses it: ``python -m tests.optional_packages [NAME ...]``.

``OPENSORA_TESTS=1 bash launch/setup.sh`` installs them. Commands are started as a user starts them, on two processes
and a small rendered data set; each is followed by a look at what it wrote. The table is that of
docs/results/optional_packages.md. What is not installed, or cannot run here, is listed with the reason.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from opensora.datasets.decode.api import require
from opensora.models.mmdit.convert import WEIGHTS as FORMAT
from opensora.models.weights.adapter_names import WEIGHTS
from opensora.models.weights.reader import read_state_dict
from opensora.utils.errors import UserError
from opensora.utils.metrics_log import read_metrics
from tests.integration.conftest import CONFIG

ROOT = Path(__file__).resolve().parent.parent
ONE_TYPE = "parallel.precision.compute={0} parallel.precision.reduce={0} parallel.precision.master={0}"
FP32 = ONE_TYPE.format("fp32")


class Failed(Exception):
    """The path of a package does not run, or does something else than it should."""


class Cannot(Exception):
    """It cannot run here, and why."""


@dataclass(frozen=True)
class Place:
    """A folder with a data set, a configuration, and the runs made so far."""

    folder: Path

    def train(self, name: str, *overrides: str, processes: int = 2) -> Path:
        """``bash launch/torchrun.sh``; the folder of the run, which must be finished."""
        words = [word for override in overrides for word in override.split()]
        command = ["bash", "launch/torchrun.sh", str(processes), "scripts/diffusion/train.py"]
        command += [f"{self.folder}/train.yaml", f"name={name}", *words]
        env = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise Failed(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
        return self.folder / "runs" / name

    def native(self) -> Path:
        """The run that others are compared with: the native engine in fp64."""
        folder = self.folder / "runs" / "native"
        return folder if (folder / "exported").exists() else self.train("native")

    def same_weights(self, run: Path, near: float) -> str:
        """How far the export of a run is from the native one's."""
        found, wanted = (read_state_dict(folder / "exported", FORMAT)[0] for folder in (run, self.native()))
        error = max(float((found[name] - w).norm() / w.norm().clamp(min=1e-12)) for name, w in wanted.items())
        if found.keys() != wanted.keys() or not error <= near:
            raise Failed(f"weights are {error:.1e} from the native engine's, must be {near:.0e}")
        return f"weights within {error:.0e} of the native engine's"


def make_place(folder: Path) -> Place:
    from data_pipeline.shapes.__main__ import main as render

    render(["--out", str(folder), "--clips", "20", "--images", "6", "--durations", "5,9", "--processes", "1"])
    text = CONFIG.format(output=folder / "runs", table=folder / "train.csv").replace(
        "lr: 1.0e-3", "eps: 1.0e-6, lr: 1.0e-3"
    )
    (folder / "train.yaml").write_text(text)
    return Place(folder)


def deepspeed(place: Place) -> str:
    """ZeRO 0 to 3; then the native engine goes on from its checkpoint."""
    for zero in range(4):
        run = place.train(f"deepspeed{zero}", f"parallel.engine=deepspeed parallel.zero={zero} {FP32}")
        said = place.same_weights(run, 1e-3)
    half = f"{FP32} train.steps=3"
    place.train("from_deepspeed", f"parallel.engine=deepspeed parallel.zero=2 {half}")
    place.same_weights(place.train("from_deepspeed", FP32), 1e-3)
    return f"ZeRO 0 to 3; ZeRO 2, then native: {said}"


def colossalai(place: Place) -> str:
    """ZeRO 0; then native from its checkpoint, and it from native's."""
    options = "parallel.engine=colossalai parallel.zero=0"
    said = place.same_weights(place.train("colossalai", options), 1e-10)
    for first, then in ((options, ""), ("", options), (options, options)):
        name = f"engines{bool(first):d}{bool(then):d}"
        place.train(name, first, "train.steps=3")
        place.same_weights(place.train(name, then), 1e-10)
    return f"ZeRO 0, alone, before and after native: {said}"


def first_loss(run: Path) -> float:
    return next(record["loss"] for record in read_metrics(run / "metrics.jsonl")[0] if "loss" in record)


def decoder(name: str) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        try:
            require(name)
        except UserError as error:
            raise Cannot(str(error)) from None
        loss = first_loss(place.train(name, f"data.decoder={name}"))
        wanted = first_loss(place.native())
        if not abs(loss - wanted) <= 1e-3 * wanted:
            raise Failed(f"first loss {loss}, with pyav {wanted}")
        return f"first loss {loss:.5f}, with pyav {wanted:.5f}"

    return run


def wandb(place: Place) -> str:
    """Offline: every loss of metrics.jsonl is in its file, which holds numbers as JSON."""
    run = place.train("wandb", "log.wandb=offline log.wandb_project=trial")
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    wanted = [record["loss"] for record in read_metrics(run / "metrics.jsonl")[0] if "loss" in record]
    missing = [loss for loss in wanted if json.dumps(loss).encode() not in path.read_bytes()]
    if missing or not wanted:
        raise Failed(f"losses {missing} of metrics.jsonl are not in {path.name}")
    return f"{len(wanted)} records as in metrics.jsonl"


def tensorboard(place: Place) -> str:
    run = place.train("tensorboard", "log.tensorboard=true")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    wanted = [record["loss"] for record in read_metrics(run / "metrics.jsonl")[0] if "loss" in record]
    if not torch.allclose(torch.tensor(losses), torch.tensor(wanted, dtype=torch.float32)):
        raise Failed(f"losses {losses}, in metrics.jsonl {wanted}")
    return f"{len(losses)} records as in metrics.jsonl"


def peft(place: Place) -> str:
    """Adapters that a run exported, read and merged by peft."""
    from safetensors.torch import load_file

    from opensora.config.load import load_config
    from opensora.config.run import RunConfig
    from opensora.models.families import build_model

    run = place.train("adapters", "lora.rank=4 optim.warmup_steps=0", f"train.init_from={place.native()}/exported")
    import peft as vendor

    cfg = load_config(RunConfig, run / "config.yaml")
    model = vendor.PeftModel.from_pretrained(build_model(cfg.model).double(), str(run / "exported"))
    written = load_file(run / "exported" / WEIGHTS)
    found = {name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora_" in name}
    if found.keys() != written.keys() or not all(torch.equal(found[n].float(), w.float()) for n, w in written.items()):
        raise Failed(f"peft holds {len(found)} tensors, the file has {len(written)}")
    model.merge_and_unload()
    return f"{len(found)} tensors alike in peft, merged there"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    install: str
    uses: str
    run: Callable[[Place], str]


EXTRA = 'pip install ".[{}]"'
CASES = (
    Case("deepspeed", EXTRA.format("deepspeed"), "parallel.engine=deepspeed", deepspeed),
    Case(
        "colossalai", "pip install --no-deps -r requirements-colossalai.txt", "parallel.engine=colossalai", colossalai
    ),
    Case("decord", EXTRA.format("decord"), "data.decoder=decord", decoder("decord")),
    Case("torchcodec", EXTRA.format("torchcodec"), "data.decoder=torchcodec", decoder("torchcodec")),
    Case("wandb", EXTRA.format("wandb"), "log.wandb=offline", wandb),
    Case("tensorboard", "with the project", "log.tensorboard=true", tensorboard),
    Case("peft", "pip install peft", "lora.rank=4, and peft reads the export", peft),
)
NOT_RUN = {
    "flash-attn": "parallel.attention=flash_attn: is built with nvcc and needs a GPU; not run",
    "apex": "parallel.norm_kernel=apex optim.kernel=apex: is built with nvcc and needs a GPU; not run",
}


def version(name: str) -> str:
    """Of the distribution that brings the module ``name``: decord may be decord2's."""
    found = importlib.metadata.packages_distributions().get(name, []) if find_spec(name) else []
    if not found:
        raise Cannot("not installed")
    return importlib.metadata.version(found[0])


def main(names: list[str]) -> int:
    """Returns 1 if the path of a package that is there does not run."""
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print("| package | installed by | command with | result | s |\n|---|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder))
        for case in CASES:
            if names and case.name not in names:
                continue
            began = time.monotonic()
            try:
                found = f"{case.name} {version(case.name)}"
                result = case.run(place)
            except Cannot as why:
                found, result = case.name, f"not run: {why}"
            except Exception as error:  # one package's fault must not hide what the others do
                failed += 1
                result = f"FAILED: {type(error).__name__}: {error}"
            print(
                f"| {found} | `{case.install}` | `{case.uses}` | {result} | {time.monotonic() - began:.0f} |",
                flush=True,
            )
    for name, why in NOT_RUN.items():
        print(f"| {name} | | | {why} | |")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
