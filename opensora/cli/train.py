"""Train: ``torchrun --nproc_per_node N scripts/diffusion/train.py CONFIG.yaml [section.key=value ...]``."""

from opensora.config import RunConfig, config_from_argv
from opensora.train.loop import train
from opensora.train.setup import start_run

INTERRUPTED = 75  # the state is on disk: start the same command again


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 when the run is finished, 75 when it was stopped and can be resumed."""
    with start_run(config_from_argv(RunConfig, argv, "Train a video diffusion transformer.")) as run:
        return 0 if train(run) else INTERRUPTED
