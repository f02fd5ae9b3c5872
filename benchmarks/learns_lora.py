"""Adapters of a model that has learned: exported in each form, read back, merged by hand, and the same clips of all.

    python -m benchmarks.learns_lora RUN [--out outputs/learns_lora] [--steps 400]

RUN is a finished run of benchmarks.learns_shapes, with the clips that it was trained on beside it. Its adapters learn
one change of mind: clips of blue objects whose prompts say red, among clips of other colours as they are. The prompts
of kept-out combinations are then sampled from the model itself, with the run's own adapters, with them in every form
that people exchange (opensora.cli.convert --lora), and from weights that they were added to in this file, without the
code that does so for sampling. The judge says what is painted for which word; the last column is the largest
difference of any pixel from the clips of the run's own adapters. The last line is JSON.
"""

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.learns_shapes import SAMPLING, call
from data_pipeline.shapes.judge import Verdict, judge_clip, match_files, read_clip, read_truths
from opensora.assembly.adapter_files import FORM_NAMES

ASKED, PAINTED = "red", "blue"
RANK, ALPHA = 8, 16
EXPORT, ADAPTERS = "model.safetensors", "adapter_model.safetensors"


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    base, prompts = args.run / "exported", args.run.parent / "data/prompts_heldout.csv"
    adapters = train(args, base, relabelled(args.run.parent / "data", args.out))
    ways = {"the model": [f"weights={base}"], "its adapters": [f"weights={base}", f"lora={adapters}"]}
    for form in FORM_NAMES:
        place = args.out / (form if form == "peft" else f"{form}.safetensors")
        call([sys.executable, "-m", "opensora.cli.convert", adapters, "--to", place, "--lora", "--form", form])
        ways[form] = [f"weights={base}", f"lora={place}"]
    ways["merged by hand"] = [f"weights={merged(base, adapters, args.out / 'merged')}"]
    shown = {way: sample(args.out / way.replace(" ", "_"), prompts, words) for way, words in ways.items()}
    report(args.run.name, shown, read_truths(prompts))


def relabelled(data: Path, out: Path) -> Path:
    """Clips of one colour under the name of another, and as many of each further colour under their own."""
    with (data / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["colour"] != ASKED]
    for row in rows:
        row["path"] = str((data / row["path"]).resolve())
        if row["colour"] == PAINTED:
            row["text"] = row["text"].replace(PAINTED, ASKED)
    with (out / "relabelled.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return out / "relabelled.csv"


def train(args: argparse.Namespace, base: Path, table: Path) -> Path:
    """The export of a run of adapters, in the layers that the family names."""
    words = ["name=adapters", f"output={args.out}", f"data.table={table}", f"train.init_from={base}"]
    lora = [f"lora.rank={RANK}", f"lora.alpha={ALPHA}", "optim.lr=2e-3", "optim.warmup_steps=10"]
    words += [*lora, f"train.steps={args.steps}", "parallel.mesh.ulysses=1"]
    config = args.run / "config.yaml"
    call(["bash", "launch/torchrun.sh", args.processes, "scripts/diffusion/train.py", config, *words])
    return args.out / "adapters/exported"


def merged(base: Path, adapters: Path, place: Path) -> Path:
    """W + alpha/rank B A of every adapted layer, under the release's names, beside the model's other files."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(base, place, ignore=shutil.ignore_patterns("SHA256SUMS"))  # of the weights without them
    with safe_open(base / EXPORT, "pt") as file:
        metadata = file.metadata()
    weights, added = load_file(base / EXPORT), load_file(adapters / ADAPTERS)
    for name in [name for name in added if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        a, b = added[name].double(), added[f"{layer}.lora_B.weight"].double()
        alpha = added.get(f"{layer}.alpha")  # none: that of the rank, as every reader of such files has it
        weight = f"{layer.removeprefix('diffusion_model.')}.weight"
        weights[weight] = (weights[weight].double() + (1.0 if alpha is None else float(alpha) / len(a)) * b @ a).float()
    save_file(weights, place / EXPORT, metadata)
    return place


def sample(folder: Path, prompts: Path, words: list[str]) -> dict[str, np.ndarray]:
    """Clips by the name of their prompt: (T, H, W, 3) uint8."""
    job = ["scripts/diffusion/inference.py", "configs/sample/demo.yaml", *words, f"prompt_csv={prompts}"]
    how = [*SAMPLING, "batch_size=12", f"save_dir={folder}", "overwrite=true"]
    call(["bash", "launch/torchrun.sh", 1, *job, *how])
    pairs = match_files(next(folder.glob("video_*")), read_truths(prompts))
    return {truth["name"]: read_clip(path) for path, truth in pairs}


def report(model: str, shown: dict[str, dict[str, np.ndarray]], truths: dict[str, dict[str, str]]) -> None:
    """One line per way: what is painted for either word, and how far the pixels are from the adapters' own."""
    rows = {}
    words = (f"{ASKED} for {ASKED}", f"{PAINTED} for {ASKED}", "other words right", "largest difference")
    print(f"\n{'clips of ' + model:<28}" + "".join(f"{word:>20}" for word in words))
    for way, clips in shown.items():
        verdicts = {name: judge_clip(clip) for name, clip in clips.items()}
        red = share(verdicts, truths, lambda verdict, truth: verdict.colour == ASKED, asked=True)
        blue = share(verdicts, truths, lambda verdict, truth: verdict.colour == PAINTED, asked=True)
        right = share(verdicts, truths, lambda verdict, truth: verdict.colour == truth["colour"], asked=False)
        far = max(int(np.abs(clip.astype(int) - shown["its adapters"][name]).max()) for name, clip in clips.items())
        rows[way] = {ASKED: red, PAINTED: blue, "others": right, "largest_difference": far}
        print(f"{way:<28}{red:>20}{blue:>20}{right:>20}{far:>20}")
    print(json.dumps({"benchmark": "learns_lora", "model": model, "rows": rows}))


def share(
    verdicts: dict[str, Verdict],
    truths: dict[str, dict[str, str]],
    holds: Callable[[Verdict, dict[str, str]], bool],
    *,
    asked: bool,
) -> str:
    """Of the clips whose prompt says the colour in question, or of all others."""
    names = [name for name in verdicts if (truths[name]["colour"] == ASKED) is asked]
    return f"{sum(holds(verdicts[name], truths[name]) for name in names)}/{len(names)}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of benchmarks.learns_shapes")
    parser.add_argument("--out", type=Path, default=Path("outputs/learns_lora"), help="folder to work in")
    parser.add_argument("--steps", type=int, default=400, help="updates of the adapters")
    parser.add_argument("--processes", type=int, default=1, help="of the training")
    return parser.parse_args()


if __name__ == "__main__":
    main()
