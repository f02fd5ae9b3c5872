"""Two recipes in the same time: what a model shows after so many minutes of training, judged from pixels.

    python -m benchmarks.recipes [--out outputs/recipes] [--minutes 2 5] [--only NAME]

``shapes`` is configs/train/shapes.yaml, ``shapes_i2v`` the recipe of the model that comes with the package, without its
references, so that both learn the same: clips of 9 frames from prompts. For every time a run of its own is trained from
nothing, as many updates as fit by a few that are measured, with the whole of its schedule. Every prompt of the kept-out
combinations is then sampled once, and judged. Training time is that of the updates, without starts. The last line is
JSON.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.learns_i2v import CLIPS, LOOKS, render
from data_pipeline.shapes.judge import ASPECTS, Score, judge_clip, match_files, read_clip, read_truths, score

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "shapes": ["configs/train/shapes.yaml"],
    "shapes_i2v": ["configs/train/shapes_i2v.yaml", "conditioning.references={}", "data.buckets={32px:{9:[1.0,16]}}"],
}
SAMPLING = ["sampling.resolution=32px", "sampling.num_frames=9", "sampling.num_steps=30", "batch_size=12"]
MEASURED_STEPS = 30


def main() -> None:
    args = parse_arguments()
    rows = []
    if not (args.out / "data" / "train.csv").exists():
        render(args.out / "data", [*LOOKS["freer"], "--clips", CLIPS, "--images", 0, "--durations", 9])
    for name in [args.only] if args.only else RECIPES:
        table = f"data.table={args.out / 'data' / 'train.csv'}"
        words = [*RECIPES[name], table, "parallel.mesh.ulysses=1", *args.overrides]
        step_s = measured(words)
        for minutes in args.minutes:
            steps = max(1, round(60 * minutes / step_s))
            run = train(f"{name}_{minutes:g}", words, steps, args.out)
            shown = judge(run, args)
            rows.append(row(name, steps, run, shown))
            print_rows(rows)
    print(json.dumps({"benchmark": "recipes", "rows": rows}))


def measured(words: Sequence[str], processes: int = 1) -> float:
    """Seconds of an update."""
    command = ["-m", "benchmarks.demo_step", *words, "--processes", processes, "--steps", MEASURED_STEPS]
    said = call([sys.executable, *command], stdout=subprocess.PIPE)
    return float(json.loads(said.strip().splitlines()[-1])["step_s"])


def train(name: str, words: Sequence[str], steps: int, out: Path) -> Path:
    """The run's folder; the learning rate warms up for a fiftieth of it, as that of a long run does."""
    schedule = [f"train.steps={steps}", f"optim.warmup_steps={steps // 50}", "train.resume=none"]
    where = [f"name={name}", f"output={out}"]
    call(["bash", "launch/torchrun.sh", 1, "scripts/diffusion/train.py", *words, *schedule, *where])
    return out / name


def judge(run: Path, args: argparse.Namespace) -> Score:
    """What the clips of kept-out combinations show."""
    prompts, folder = args.out / "data" / "prompts_heldout.csv", args.out / f"samples_{run.name}"
    job = ["scripts/diffusion/inference.py", "configs/sample/demo.yaml", f"weights={run}", f"prompt_csv={prompts}"]
    call(["bash", "launch/torchrun.sh", 1, *job, *SAMPLING, f"save_dir={folder}", "overwrite=true"])
    pairs = match_files(folder, read_truths(prompts))
    return score([judge_clip(read_clip(path)) for path, _ in pairs], [truth for _, truth in pairs])


def row(name: str, steps: int, run: Path, shown: Score) -> dict[str, object]:
    """What was trained, in which time, and what it shows."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record for record in records if "loss" in record]
    seconds = sum(
        record["time/step_s"] * (record["step"] - before["step"])
        for before, record in zip([{"step": 0}, *losses], losses, strict=False)
    )
    shares = {aspect: round(shown.accuracy(aspect), 3) for aspect in ASPECTS}
    shares["all three"] = round(shown.all_three / shown.clips, 3)
    return {"recipe": name, "updates": steps, "minutes": round(seconds / 60, 2), "clips": shown.clips, **shares}


def print_rows(rows: Sequence[dict[str, object]]) -> None:
    names = list(rows[0])
    print("".join(f"{name:>12}" for name in names))
    for one in rows:
        print("".join(f"{one[name]!s:>12}" for name in names), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/recipes"), help="folder to work in")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0, 5.0], help="of training, one run each")
    parser.add_argument("--only", choices=RECIPES, help="one recipe")
    parser.add_argument("--overrides", nargs="*", default=[], help="section.key=value for all trainings")
    return parser.parse_args()


def call(words: Sequence[object], stdout: int | None = None) -> str:
    """Run a command of the README to its end."""
    print("$", " ".join("python" if word == sys.executable else str(word) for word in words), flush=True)
    done = subprocess.run([str(word) for word in words], cwd=ROOT, check=True, stdout=stdout, text=True)
    return done.stdout or ""


if __name__ == "__main__":
    main()
