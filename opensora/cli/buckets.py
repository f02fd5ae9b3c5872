"""What a run would train on: ``python -m opensora.cli.buckets CONFIG.yaml [section.key=value ...]``.

Prints samples per bucket, every row of the table that is left out by reason, and how evenly steps can be shared out;
draws buckets.png in the run's folder. Indexes the table if it was not yet. Rows of ``data.buckets`` that no clip fits
are shown too, and end it with exit code 2 where a run would refuse them.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

from dataclasses import replace

from opensora.cli.main import run_cli
from opensora.config.load import config_from_argv
from opensora.config.run import RunConfig
from opensora.train.state.disk_check import check_writable
from opensora.train.step_data import check_rows, expected_idle, open_data
from opensora.utils.charts import bucket_chart
from opensora.utils.command_line.command import naming

STEPS = 64  # that idle time is averaged over


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    cfg = config_from_argv(RunConfig, argv, "Show which samples a run trains on, bucket by bucket.")
    target = cfg.folder / "buckets.png"
    check_writable(cfg)
    _, plan = open_data(replace(cfg, data=replace(cfg.data, unused_rows="report")))
    report = plan.report()
    print(report.histogram())
    steps, micro_batches = plan.steps_in_epoch(0), cfg.data.micro_batches
    print(f"{steps} steps of {micro_batches} micro-batches in the first epoch")
    if cfg.data.tokens_per_sequence:
        count = sum(len(plan.costs(step)) for step in range(min(STEPS, steps))) / min(STEPS, steps)
        budget = cfg.data.tokens_per_sequence
        print(f"{count:.1f} sequences of at most {budget} image tokens for the {micro_batches} micro-batches of a step")
    for degree in sorted({micro_batches // cfg.data.balance_group, micro_batches}):
        idle = expected_idle(plan, degree, range(min(STEPS, steps)))
        print(f"idle on {degree} data-parallel processes, by the cost model: {100 * idle:.2f} %")
    bars: dict[str, list[int]] = {}
    for bucket, count in report.per_bucket:
        bars.setdefault(f"{bucket.resolution} x {bucket.frames}", []).append(count)
    bars |= {f"{resolution} x {frames}": [0] for resolution, frames in report.unused_rows}
    left_out = sum(count for _, count in report.left_out)
    with naming(target):
        bucket_chart(list(bars.items()), target, title=f"{report.rows - left_out} of {report.rows} samples")
    print(target)
    if cfg.data.unused_rows == "error":
        check_rows(report)
    return 0


if __name__ == "__main__":
    run_cli(main)
