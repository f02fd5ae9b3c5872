"""Does a model trained from nothing show what its prompt says? Kept-out combinations, judged from pixels.

    python -m benchmarks.learns_shapes [--config FILE] [--minutes M] [--processes 1 [2]] [--interrupt KEY=VALUE]
        [overrides]

Renders the training clips, trains a configuration (configs/train/shapes.yaml: about 50 minutes on two quiet CPU cores),
samples every prompt of the kept-out (colour, shape, direction) combinations with several seeds, and lets the judge,
which shares no code with the renderer, say what it sees. ``--minutes`` takes as many updates as fit into them, by a few
that are measured. ``--interrupt`` presses Ctrl-C when half of them are done, and goes on with these overrides, such as
another layout, and with the second number of ``--processes`` if there is one. Prints one table and one machine-readable
line. A run that is already in the output folder is continued, or only judged if it is finished.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.learns_i2v import trained
from benchmarks.recipes import measured
from data_pipeline.shapes.judge import ASPECTS, Score, Verdict, judge_clip, match_files, read_clip, read_truths, score
from opensora.config.load import load_config
from opensora.config.run import SAVED_NAME, RunConfig

ROOT = Path(__file__).resolve().parent.parent
CLIPS = 4000
SAMPLING = ["sampling.resolution=32px", "sampling.aspect_ratio=1:1", "sampling.num_frames=9", "sampling.num_steps=30"]
SAVED = 75  # exit code of a run that was asked to stop, and has saved


def main() -> None:
    args = parse_arguments()
    data, run = args.out / "data", args.out / load_config(RunConfig, ROOT / args.config).name
    if not (data / "train.csv").exists():
        shape = ["--clips", CLIPS, "--images", 0, "--sizes", "32x32", "--durations", 9]
        call([sys.executable, "-m", "data_pipeline.shapes", "--out", data, *shape])
    train(args, data, run)
    samples = args.out / f"samples_{run.name}_g{args.guidance:g}"
    prompts = data / "prompts_heldout.csv"
    sample = ["scripts/diffusion/inference.py", "configs/sample/demo.yaml", f"weights={run}", f"prompt_csv={prompts}"]
    how = [*SAMPLING, f"sampling.guidance={args.guidance}", f"num_sample={args.seeds}", "batch_size=24"]
    call(["bash", "launch/torchrun.sh", args.processes[-1], *sample, f"save_dir={samples}", "overwrite=true", *how])
    pairs = match_files(next(samples.glob("video_*")), read_truths(prompts))
    verdicts = [judge_clip(read_clip(path)) for path, _ in pairs]
    truths = [truth for _, truth in pairs]
    report(score(verdicts, truths), run, args)
    print_by_value(verdicts, truths)


def train(args: argparse.Namespace, data: Path, run: Path) -> None:
    """From nothing, or from where the run was left."""
    words = [args.config, f"data.table={data / 'train.csv'}", f"output={args.out}", *args.overrides]
    if (run / SAVED_NAME).exists():
        steps = load_config(RunConfig, run / SAVED_NAME).train.steps  # the schedule stays that of the run
    else:
        steps = load_config(RunConfig, ROOT / args.config, args.overrides).train.steps
        if args.minutes:
            steps = max(1, round(60 * args.minutes / seconds_of_an_update(words, args)))
    words += [f"train.steps={steps}"] + ([f"optim.warmup_steps={steps // 50}"] if args.minutes else [])
    script = ["scripts/diffusion/train.py", *words]
    if args.interrupt and last_step(run) < steps // 2:
        interrupt(["bash", "launch/torchrun.sh", args.processes[0], *script], run, steps // 2)
    call(["bash", "launch/torchrun.sh", args.processes[-1], *script, *args.interrupt])


def seconds_of_an_update(words: list[str], args: argparse.Namespace) -> float:
    """Before and behind the interruption, half of the updates each."""
    before = measured(words, args.processes[0])
    return (before + measured([*words, *args.interrupt], args.processes[-1])) / 2 if args.interrupt else before


def interrupt(command: list[object], run: Path, step: int) -> None:
    """Start a run, and press Ctrl-C behind a step.

    Raises:
        SystemExit: it ended otherwise than by saving.
    """
    say(command)
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, start_new_session=True)
    while process.poll() is None and last_step(run) < step:
        time.sleep(1.0)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    if process.wait() != SAVED:
        raise SystemExit(f"the run ended with exit code {process.returncode}, not by saving its state ({SAVED})")


def last_step(run: Path) -> int:
    """That the run has told of; 0: none."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def report(result: Score, run: Path, args: argparse.Namespace) -> None:
    """The table, and one line for machines."""
    of_run = trained([run])
    print(
        f"\n{args.config}: {of_run['steps']} steps in {of_run['minutes']} minutes, loss {of_run['loss']}; "
        f"{result.clips} clips of kept-out combinations, seeds 42 to {41 + args.seeds}, guidance {args.guidance:g}"
    )
    print(f"{'aspect':<12}{'right':>7}{'unsure':>8}{'clips':>7}{'accuracy':>10}")
    for aspect in ASPECTS:
        print(
            f"{aspect:<12}{result.right[aspect]:>7}{result.unsure[aspect]:>8}{result.clips:>7}"
            f"{result.accuracy(aspect):>10.1%}"
        )
    print(f"{'all three':<12}{result.all_three:>7}{'':>8}{result.clips:>7}{result.all_three / result.clips:>10.1%}")
    accuracy = {aspect: round(result.accuracy(aspect), 4) for aspect in ASPECTS}
    line = {"benchmark": "learns_shapes", "config": args.config, **of_run, **accuracy}
    print(json.dumps({**line, "all_three": round(result.all_three / result.clips, 4), "clips": result.clips}))


def print_by_value(verdicts: list[Verdict], truths: list[dict[str, str]]) -> None:
    """Accuracy per colour, shape and direction: where the gap is, if there is one."""
    for aspect in ASPECTS:
        values = sorted({truth[aspect] for truth in truths})
        shares = []
        for value in values:
            asked = [getattr(v, aspect) == value for v, t in zip(verdicts, truths, strict=True) if t[aspect] == value]
            shares.append(f"{value} {sum(asked)}/{len(asked)}")
        print(f"{aspect:<12}{', '.join(shares)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/learns_shapes"), help="folder to work in")
    parser.add_argument("--config", default="configs/train/shapes.yaml", help="of the training")
    parser.add_argument("--minutes", type=float, help="of training; else its own number of updates")
    parser.add_argument(
        "--interrupt", nargs="+", default=[], metavar="KEY=VALUE", help="half-way, then go on with these"
    )
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1],
        help="of training and sampling; two numbers: and once interrupted",
    )
    parser.add_argument("--seeds", type=int, default=4, help="samples per prompt")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("overrides", nargs="*", help="section.key=value for the training")
    return parser.parse_args()


def say(words: list[object]) -> None:
    print("$", " ".join("python" if word == sys.executable else str(word) for word in words), flush=True)


def call(words: list[object]) -> None:
    """Run a command of the README to its end."""
    say(words)
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
