"""Whether a run can leave what it is going to leave, asked before it starts."""

import os
import shutil
import tempfile
from pathlib import Path

from torch import nn

from acceleration.sharding.precision import DTYPES
from opensora.config.run import RunConfig
from opensora.utils.console import announce, launched_rank
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short

MAX_NAME = 255  # bytes of a file or folder, on all usual file systems
_MOMENTS = {"adamw": 2, "sgd": 0}


def checkpoint_bytes(cfg: RunConfig, model: nn.Module) -> int:
    """Of the tensors in one checkpoint: what is trained, its moments, its average."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    copies = 1 + _MOMENTS[cfg.optim.kind] + (cfg.optim.ema_decay > 0)
    return trained * copies * DTYPES[cfg.parallel.precision.master].itemsize


def check_writable(cfg: RunConfig) -> Path:
    """The part of the path of the run's folder that is there already, which can be written; makes nothing.

    Raises:
        UserError: a file or a broken link is in the way, or it cannot be written.
    """
    place, key = cfg.folder, f"output={short(cfg.output)}"
    if any(len(os.fsencode(part)) > MAX_NAME for part in place.parts):
        raise UserError(f"{key}: a name in it is of more than {MAX_NAME} bytes; choose another output, or another name")
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        found = "a file" if place.exists() else "a link to nothing"
        raise UserError(f"{key}: {place} is {found}, and should be a folder; choose another output, or another name")
    kept = [cfg.folder / name for name in ("checkpoints", "exported", "samples")]
    for folder in (place, *(path for path in kept if os.path.lexists(path))):
        try:
            Path(tempfile.mkdtemp(dir=folder, prefix=".can-write-")).rmdir()
            os.listdir(folder)
        except OSError as error:
            raise UserError(f"{key}: {folder} cannot be written ({error.strerror}); choose another output") from None
    return place


def check_disk(cfg: RunConfig, model: nn.Module) -> None:
    """That the run's folder can be written, and has room for a checkpoint. Looks on the first process only.

    Raises:
        UserError: a file is in the way, the folder cannot be written, or the disk is too small.
    """
    if launched_rank() != 0:
        return
    place, key = check_writable(cfg), f"output={cfg.output}"
    size, free = checkpoint_bytes(cfg, model), shutil.disk_usage(place).free
    if free < size:
        raise UserError(
            f"{key}: the disk has {free / 1e9:.3g} GB left, and one checkpoint takes {size / 1e9:.3g} GB; "
            "free some, or choose another disk"
        )
    kept = cfg.train.checkpoint_keep + 1  # the newest is complete before the oldest goes
    if cfg.train.checkpoint_keep and free < kept * size:
        announce(
            f"{key}: the disk has room for {free // size} checkpoints of {size / 1e9:.3g} GB; "
            f"train.checkpoint_keep={cfg.train.checkpoint_keep} needs {kept} at times"
        )
