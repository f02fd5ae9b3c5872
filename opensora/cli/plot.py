"""Plot a run's loss: ``python -m opensora.cli.plot RUN_FOLDER --out loss.png``."""

import argparse
from pathlib import Path

from opensora.config import run_cli
from opensora.utils.errors import UserError
from opensora.utils.images import loss_curve
from opensora.utils.logging import announce


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m opensora.cli.plot", description="Draw the loss over steps.")
    parser.add_argument("run", type=Path, help="folder of a run, with metrics.jsonl in it")
    parser.add_argument("--out", type=Path, help="png to write; default: loss.png in the run's folder")
    args = parser.parse_args(argv)
    metrics = args.run / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics}: no such file; give the folder of a run")
    out = args.out or args.run / "loss.png"
    try:
        loss_curve(metrics, out)
    except ValueError as error:
        raise UserError(str(error)) from None
    announce(f"loss curve: {out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
