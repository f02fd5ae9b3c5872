"""Plot a run's loss: ``python -m opensora.cli.plot RUN_FOLDER --out loss.png``."""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

from opensora.cli.main import run_cli
from opensora.utils.charts import loss_curve
from opensora.utils.command_line.arguments import Parser, place
from opensora.utils.command_line.command import naming
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import absence, try_output


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="python -m opensora.cli.plot", description="Draw the loss over steps.")
    parser.add_argument("run", type=place, help="folder of a run, with metrics.jsonl in it")
    parser.add_argument("--out", type=place, help="png to write; default: loss.png in the run's folder")
    args = parser.parse_args(argv)
    metrics = args.run / "metrics.jsonl"
    if reason := absence(metrics, "file"):
        raise UserError(f"{metrics}: {reason}; give the folder of a run")
    picture = args.out or args.run / "loss.png"
    try_output(picture, "--out")
    try:
        with naming(picture):
            loss_curve(metrics, picture)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"loss curve: {picture}")
    return 0


if __name__ == "__main__":
    run_cli(main)
