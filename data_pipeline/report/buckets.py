"""What a training run would make of the clips that are kept: its own code counts them."""

import ast
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.report.clips import Clips
from opensora.config.strict_yaml import read_text, read_yaml
from opensora.utils.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
_TRY = (
    "import sys; from data_pipeline.report.buckets import read_training; "
    "from opensora.utils.command_line.command import call; "
    "sys.exit(call(lambda words: read_training(words[0]) and 0))"
)
_TABLE = "data.table=clips.parquet"  # whatever it names, which need not be there


@dataclass(frozen=True)
class Filled:
    """One bucket."""

    resolution: str
    frames: int
    height: int
    width: int
    batch_size: int
    samples: int

    @property
    def batches(self) -> float:
        """Of one epoch; below 1 no micro-batch is ever full."""
        return self.samples / self.batch_size


@dataclass(frozen=True)
class Prediction:
    """The first epoch of a training run."""

    training: str  # its configuration
    buckets: tuple[Filled, ...] = ()
    left_out: tuple[tuple[str, int], ...] = ()  # (why, clips)
    unused: tuple[tuple[str, int], ...] = ()  # (resolution, frames) of its table that no clip reaches
    problem: str = ""  # why there are none


def check_training(training: str) -> None:
    """Before anything: that the file can be read. What it says is asked by ``try_training``, as the models that know
    it take seconds to load.

    Raises:
        UserError: there is no such file, or it is no configuration.
    """
    try:
        if training.endswith(".py"):  # of the Open-Sora family
            ast.parse(read_text(Path(training)))
        else:
            read_yaml(Path(training))
    except UserError as error:
        raise UserError(f"report.training={training}: {error}") from error
    except SyntaxError as error:
        raise UserError(f"report.training={training}: no Python ({error.msg}, line {error.lineno})") from error


def try_training(training: str) -> None:
    """Before work begins that takes longer than this: that training would take the configuration. In a process of its
    own, whose models are gone with it.

    Raises:
        UserError: it would not.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", _TRY, training]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it cannot be looked at"])[-1]
        raise UserError(f"report.training={training}: {said.removeprefix('error: ')}")


def read_training(training: str) -> "RunConfig":  # type: ignore[name-defined]  # noqa: F821
    """
    Raises:
        UserError: no configuration of a training run.
    """
    from opensora.config.load import load_config
    from opensora.config.run import RunConfig

    return load_config(RunConfig, training, [_TABLE])


def predict(clips: Clips, training: str) -> Prediction:
    """The buckets of the kept clips.

    Raises:
        UserError: the configuration cannot be used.
    """
    from opensora.datasets.plan.batch_plan import BatchPlan
    from opensora.models.base import ClipMeasure
    from opensora.models.families import describe
    from opensora.models.vae import autoencoder_shape

    cfg = read_training(training)
    shape, denoising = autoencoder_shape(cfg.vae), describe(cfg.model)
    if not clips.keep.any():
        return Prediction(training, problem="no clip is kept")
    try:
        data = replace(cfg.data, unused_rows="report")
        measure = ClipMeasure(shape, denoising)
        plan = BatchPlan(_table(clips), data, denoising.pixel_multiple(shape.stride), cfg.seed, measure)
    except UserError as error:
        return Prediction(training, problem=str(error))
    report = plan.report()
    found = [Filled(b.resolution, b.frames, b.height, b.width, b.batch_size, count) for b, count in report.per_bucket]
    return Prediction(training, tuple(found), report.left_out, report.unused_rows)


def _table(clips: Clips) -> "ClipTable":  # type: ignore[name-defined]  # noqa: F821
    """The kept clips as training sees them."""
    from opensora.datasets.table.manifest import COLUMNS, ClipTable, TextsInMemory

    kept = np.flatnonzero(clips.keep)
    columns = {}
    for name, kind in COLUMNS.items():
        values = clips.final(name)[kept]
        columns[name] = (
            np.minimum(values, np.iinfo(kind).max).astype(kind) if kind.kind in "iu" else values.astype(kind)
        )
    nothing = pa.chunked_array([pa.array([""] * len(kept))])
    texts = TextsInMemory(nothing, nothing)
    return ClipTable(**columns, texts=texts, folders=("",), first_rows=np.zeros(1, np.int64))
