"""Fit ``data.cost`` to a run's times: ``python -m opensora.cli.calibrate RUN_FOLDER [--processes N]``.

Prints the section to put into a configuration. Run it on a short run first: a cost that changes within a run changes
the order of its samples.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

from opensora.cli.main import run_cli
from opensora.config.load import load_config, to_yaml
from opensora.config.run import SAVED_NAME, RunConfig
from opensora.planner.cost_fit import calibrate
from opensora.train.step_data import open_data
from opensora.utils.command_line.arguments import Parser, place, whole
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import absence

MAX_PROCESSES = 10**6


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="python -m opensora.cli.calibrate", description="Fit data.cost to a run.")
    parser.add_argument("run", type=place, help="folder of a run, with config.yaml and metrics.jsonl in it")
    parser.add_argument(
        "--processes", type=whole(1, MAX_PROCESSES), default=1, help="data-parallel ones of the run (1)"
    )
    args = parser.parse_args(argv)
    for name in (SAVED_NAME, "metrics.jsonl"):
        if reason := absence(args.run / name, "file"):
            raise UserError(f"{args.run / name}: {reason}; give the folder of a run")
    _, plan = open_data(load_config(RunConfig, args.run / SAVED_NAME))
    cost, error = calibrate(plan, args.run / "metrics.jsonl", args.processes)
    print(f"# seconds; predicts the run's times to {100 * error:.1f} % on average")
    print("data:\n  cost:\n" + "\n".join(f"    {line}" for line in to_yaml(cost).splitlines()))
    return 0


if __name__ == "__main__":
    run_cli(main)
