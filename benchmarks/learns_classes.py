"""Does a small DiT trained from nothing draw the class that it is told, with every sampler of its objective?

    python -m benchmarks.learns_classes [--out outputs/learns_classes] [--minutes 8] [--processes 1] [overrides]

A class is a colour and a shape, 24 in all; stills of 32x32 pixels show one such object near the middle, on black, gray
or white. Trains configs/train/shapes_classes.yaml (IDDPM, classes for prompts) from nothing, as many updates as fit
into the minutes by a few that are measured; the learning rate warms up and falls over all of them. Then samples stills
of every class with DDPM in 250 steps, DPM-Solver++ in 20 and DDIM in 50.

Stills are judged from the files that were written, by ``data_pipeline.shapes.judge``, which shares no code with the
renderer: right is a still that shows the colour and the shape of its class. Prints one table, the classes that are
right least often, and one line for machines. A run in the output folder is continued, or only judged if it is finished.
"""

import argparse
import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.learns_i2v import ROOT, call, trained, write_table
from benchmarks.recipes import measured
from data_pipeline.shapes.judge import Verdict, judge_clip, match_files, read_clip, read_truths
from data_pipeline.shapes.render import Layout, combinations, draw_spec
from data_pipeline.shapes.write import Item, table_row, write_items
from opensora.config.load import load_config
from opensora.config.run import SAVED_NAME, RunConfig
from opensora.utils.charts import contact_sheet

CONFIG = "configs/train/shapes_classes.yaml"
CLASSES = [combination for combination in combinations() if combination[2] == "still"]  # class -> what it shows
STILLS = 6000
SIDE = 32  # pixels
BATCH = 32  # stills of an update
NEAR = Layout(radius=(0.24, 0.26), off_centre=0.2)  # to the middle, as the clips that learns_i2v.py begins with
SAMPLERS = {"ddpm": 250, "dpm_solver": 20, "ddim": 50}  # solver: steps
ASPECTS = ("colour", "shape")
# The variance that a small model learns is right for the errors that it still makes in steps of 1,000: v far above 1,
# which means too much noise in 250 steps, whose beta and posterior variance are further apart.
POSTERIOR_VARIANCE = "objective={kind: iddpm, predict_xstart: true, learn_sigma: false, sigma_small: true}"
SEED = 42  # of the first still of every class


@dataclass(frozen=True)
class Judged:
    """All stills of a sampler."""

    solver: str
    stills: list[np.ndarray]  # (H, W, 3) uint8
    verdicts: list[Verdict]
    truths: list[dict[str, str]]  # rows of the table that asked for them

    def shows(self, aspect: str) -> list[bool]:
        """Of every still."""
        return [getattr(v, aspect) == t[aspect] for v, t in zip(self.verdicts, self.truths, strict=True)]

    @property
    def right(self) -> list[bool]:
        """Of every still: colour and shape."""
        return [all(both) for both in zip(*map(self.shows, ASPECTS), strict=True)]

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Name of a class -> how many of its stills are right, of how many; the worst first."""
        counts: dict[str, tuple[int, int]] = {}
        for truth, right in zip(self.truths, self.right, strict=True):
            hits, stills = counts.get(truth["name"], (0, 0))
            counts[truth["name"]] = hits + right, stills + 1
        return dict(sorted(counts.items(), key=lambda one: (one[1][0] / one[1][1], one[0])))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not (args.out / "data" / "train.csv").exists():
        render_stills(args.out / "data", args.stills)
    spent = train(args)
    found = [judge(solver, sample(solver, args), args.out) for solver in SAMPLERS]
    report(found, args, spent)
    if args.sheet:
        draw(found, args.sheet)


def render_stills(folder: Path, count: int) -> None:
    """Stills, their table, in which the caption is the number of the class, and a table that asks for every class."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    specs = [draw_spec(0, "class", index, CLASSES, [(SIDE, SIDE)], [1], NEAR) for index in range(count)]
    items = [Item(path=f"images/{index:06d}.png", spec=spec, fps=1.0) for index, spec in enumerate(specs)]
    write_items(folder, items, processes=1)
    numbers = {combination: str(number) for number, combination in enumerate(CLASSES)}
    asked = [
        {"text": number, "name": f"{colour}_{shape}", "colour": colour, "shape": shape, "direction": direction}
        for (colour, shape, direction), number in numbers.items()
    ]
    write_table(folder / "classes.csv", asked)
    rows = [table_row(item) for item in items]
    texts = [numbers[row["colour"], row["shape"], row["direction"]] for row in rows]
    write_table(folder / "train.csv", [row | {"text": text} for row, text in zip(rows, texts, strict=True)])


def train(args: argparse.Namespace) -> float | None:
    """Seconds of CPU time, of all processes; None of a run that had begun before."""
    table = f"data.table={args.out / 'data' / 'train.csv'}"
    bucket = f"data.buckets={{{SIDE}px:{{1:[1.0,{BATCH // args.processes}]}}}}"  # the same stills, whoever has them
    words = [CONFIG, table, bucket, f"data.micro_batches={args.processes}", f"output={args.out}", *args.overrides]
    saved = folder_of_run(args) / SAVED_NAME
    is_new = not saved.exists()
    if not is_new:  # the schedule stays that of the run
        steps = load_config(RunConfig, saved).train.steps
    else:
        steps = args.steps or max(1, round(60 * args.minutes / measured(words, args.processes)))
    schedule = [f"train.steps={steps}", f"optim.warmup_steps={steps // 50}"]
    before = busy()
    call(["bash", "launch/torchrun.sh", args.processes, "scripts/diffusion/train.py", *words, *schedule])
    return busy() - before if is_new else None


def folder_of_run(args: argparse.Namespace) -> Path:
    return args.out / load_config(RunConfig, ROOT / CONFIG).name


def busy() -> float:
    """Seconds of CPU time that ended children have had."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sample(solver: str, args: argparse.Namespace) -> Path:
    """The folder of the stills; processes take a pass of guidance each."""
    folder = args.out / "samples" / solver
    job = ["scripts/diffusion/inference.py", "configs/sample/demo.yaml", f"weights={folder_of_run(args)}"]
    job += [POSTERIOR_VARIANCE] if solver == "ddpm" else []  # the others use none
    steps = [f"sampling.solver={solver}", f"sampling.num_steps={SAMPLERS[solver]}", f"sampling.seed={SEED}"]
    size = [f"sampling.resolution={SIDE}px", "sampling.num_frames=1", f"sampling.guidance={args.guidance:g}"]
    many = [f"prompt_csv={args.out / 'data' / 'classes.csv'}", f"num_sample={args.seeds}", "batch_size=96"]
    layout = [f"parallel.mesh.cfg={args.processes}", "parallel.mesh.ulysses=1"] if args.processes == 2 else []
    where = [f"save_dir={folder}", "overwrite=true"]
    call(["bash", "launch/torchrun.sh", args.processes, *job, *steps, *size, *many, *layout, *where])
    return folder


def judge(solver: str, folder: Path, out: Path) -> Judged:
    """What the files of a sampler show."""
    pairs = match_files(folder, read_truths(out / "data" / "classes.csv"))
    stills = [read_clip(path) for path, _ in pairs]
    return Judged(solver, [still[0] for still in stills], [*map(judge_clip, stills)], [truth for _, truth in pairs])


def report(found: Sequence[Judged], args: argparse.Namespace, spent: float | None) -> None:
    """The table, and one line for machines."""
    line: dict[str, object] = {"benchmark": "learns_classes", **trained([folder_of_run(args)])}
    took = ""
    if spent is not None:
        line["cpu_minutes"] = round(spent / 60, 1)
        took = f", {line['cpu_minutes']} minutes of CPU time with start and end"
    print(f"\n{line['steps']} updates in {line['minutes']} minutes{took}")
    print(f"guidance {args.guidance:g}, seeds {SEED} to {SEED + args.seeds - 1} of {len(CLASSES)} classes")
    print(f"{'sampler':<12}{'steps':>6}{'stills':>8}{'colour':>9}{'shape':>9}{'both':>9}   the worst classes")
    for judged in found:
        shares = {name: float(np.mean(judged.shows(name))) for name in ASPECTS} | {"both": float(np.mean(judged.right))}
        worst = [(name, *counts) for name, counts in judged.by_class().items()][:3]
        shown = ", ".join(f"{name} {hits}/{stills}" for name, hits, stills in worst)
        percent = "".join(f"{share:>9.1%}" for share in shares.values())
        print(f"{judged.solver:<12}{SAMPLERS[judged.solver]:>6}{len(judged.stills):>8}{percent}   {shown}")
        rounded = {name: round(share, 4) for name, share in shares.items()}
        line[judged.solver] = {"stills": len(judged.stills), **rounded, "worst": round(worst[0][1] / worst[0][2], 4)}
    print(json.dumps(line | {"guidance": args.guidance}))


def draw(found: Sequence[Judged], path: Path) -> None:
    """The first still of every class, not chosen for what it shows: two rows a sampler."""
    rows = []
    for judged in found:
        first = {truth["name"]: still for truth, still in reversed([*zip(judged.truths, judged.stills, strict=True)])}
        names = [f"{colour}_{shape}" for colour, shape, _ in CLASSES]
        for part in (names[: len(names) // 2], names[len(names) // 2 :]):
            colours = ", ".join(dict.fromkeys(name.split("_")[0] for name in part))
            title = f"{judged.solver}, {SAMPLERS[judged.solver]} steps: {colours}"
            rows.append((title, np.stack([first[name] for name in part])))
    contact_sheet(rows, path, columns=len(CLASSES) // 2, frame_height=48)
    with Image.open(path) as sheet:  # a third of the bytes
        few_colours = sheet.quantize(128)
    few_colours.save(path, optimize=True)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/learns_classes"), help="folder to work in")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training")
    parser.add_argument("--steps", type=int, help="updates, in place of as many as fit into the minutes")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="training and sampling processes")
    parser.add_argument("--stills", type=int, default=STILLS, help="to train on")
    parser.add_argument("--seeds", type=int, default=8, help="samples per class")
    parser.add_argument("--guidance", type=float, default=1.0, help="towards the class; 1: none")
    parser.add_argument("--sheet", type=Path, help="then draw the first still of every class and sampler to this .png")
    parser.add_argument("overrides", nargs="*", help="section.key=value for the training")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
