"""Does a model trained from nothing show what its prompt says? Kept-out combinations, judged from pixels.

    python -m benchmarks.learns_shapes [--out outputs/learns_shapes] [--processes 1] [--seeds 4] [overrides]
    python -m benchmarks.learns_shapes --config configs/train/shapes_wan.yaml --out outputs/learns_wan

Renders the training clips, trains configs/train/shapes.yaml (about 50 minutes on two quiet CPU cores), samples every
prompt of the kept-out (colour, shape, direction) combinations with several seeds, and lets the judge, which shares no
code with the renderer, say what it sees. Prints one table and one machine-readable line. A run that is already in the
output folder is continued, or only judged if it is finished.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from data_pipeline.shapes.judge import ASPECTS, Score, Verdict, judge_clip, match_files, read_clip, read_truths, score

ROOT = Path(__file__).resolve().parent.parent
CLIPS = 4000
SAMPLING = ["sampling.resolution=32px", "sampling.aspect_ratio=1:1", "sampling.num_frames=9", "sampling.num_steps=30"]


def main() -> None:
    args = parse_arguments()
    data, run = args.out / "data", args.out / "shapes"
    if not (data / "train.csv").exists():
        shape = ["--clips", CLIPS, "--images", 0, "--sizes", "32x32", "--durations", 9]
        call([sys.executable, "-m", "data_pipeline.shapes", "--out", data, *shape])
    train = ["scripts/diffusion/train.py", args.config, f"output={args.out}", "name=shapes"]
    call(["bash", "launch/torchrun.sh", args.processes, *train, f"data.table={data / 'train.csv'}", *args.overrides])
    samples = args.out / f"samples_g{args.guidance:g}"
    prompts = data / "prompts_heldout.csv"
    sample = ["scripts/diffusion/inference.py", "configs/sample/demo.yaml", f"weights={run}", f"prompt_csv={prompts}"]
    how = [*SAMPLING, f"sampling.guidance={args.guidance}", f"num_sample={args.seeds}", "batch_size=24"]
    call(["bash", "launch/torchrun.sh", args.processes, *sample, f"save_dir={samples}", "overwrite=true", *how])
    pairs = match_files(next(samples.glob("video_*")), read_truths(prompts))
    verdicts = [judge_clip(read_clip(path)) for path, _ in pairs]
    truths = [truth for _, truth in pairs]
    report(score(verdicts, truths), run, args)
    print_by_value(verdicts, truths)


def report(result: Score, run: Path, args: argparse.Namespace) -> None:
    """The table, and one line for machines."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    trained_s = sum(
        record["time/step_s"] * (record["step"] - before["step"])
        for before, record in zip([{"step": 0}, *steps], steps, strict=False)
    )
    print(
        f"\n{steps[-1]['step']} steps in {trained_s / 60:.1f} minutes, loss {steps[-1]['loss']:.3f}; "
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
    line = {"benchmark": "learns_shapes", "steps": steps[-1]["step"], "minutes": round(trained_s / 60, 1), **accuracy}
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
    parser.add_argument("--config", default="configs/train/shapes.yaml", help="of the training")
    parser.add_argument("--out", type=Path, default=Path("outputs/learns_shapes"), help="folder to work in")
    parser.add_argument("--processes", type=int, default=1, help="training and sampling processes")
    parser.add_argument("--seeds", type=int, default=4, help="samples per prompt")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("overrides", nargs="*", help="section.key=value for the training")
    return parser.parse_args()


def call(words: list[object]) -> None:
    """Run a command of the README to its end."""
    print("$", " ".join("python" if word == sys.executable else str(word) for word in words), flush=True)
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
