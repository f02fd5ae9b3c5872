"""Does a small model trained from nothing show its prompt, and go on from the frames that it is given?

    python -m benchmarks.learns_i2v [--out outputs/learns_i2v] [--processes 1] [--seeds 4] [overrides]

Trains configs/train/shapes_i2v.yaml in two runs, at most an hour of one CPU core together: from nothing on clips whose
shapes are near the middle, which shows a small model soon what shapes and motions are, then from there with a quarter
of clips whose shapes are in more places ("freer"), of which a first frame says more than the prompt. It then samples
clips of the (colour, shape, direction) combinations that training never saw: from their prompts alone (t2v), from
prompt and first frame (i2v_head), first and last frame (i2v_loop), first or last 33 frames of 37 (v2v_head, v2v_tail).
References are files of clips of these combinations, read back as anybody's would be.

Clips are judged from the files that were written, by ``data_pipeline.shapes.judge``, which shares no code with the
renderer. Direction is that of the whole clip. Colour and shape are those of the whole clip for t2v; where frames are
known they have to stay, so only frames that the model made count: the four that are farthest from the reference. Known
frames are compared with the reference's own pixels, PSNR = 10 log10(255^2 / mean squared error) over all of them, and
are "kept" in a clip of 30 dB or more. A clip "goes on" where the object's centre is, in the made frame beside the known
ones, at most 3 pixels from where it is in these; it moves at most 1.5 a frame. Prints one table and one line for
machines. A run that is in the output folder is continued, or only judged if it is finished.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from data_pipeline.shapes.judge import ASPECTS, Score, Verdict, judge_clip, match_files, read_clip, read_truths, score
from opensora.config.load import load_config, save
from opensora.config.run import SAVED_NAME, RunConfig
from opensora.utils.charts import contact_sheet
from opensora.utils.files.digests import write_digests
from opensora.utils.files.safetensors_files import SINGLE, write_weights
from opensora.utils.files.video_writer import write_image

ROOT = Path(__file__).resolve().parent.parent
CLIPS, STILLS = 6000, 600
LOOKS = {  # where shapes are, and how far they move
    "near": ["--radius", "0.24,0.26", "--travel", "0.32,0.36", "--off-centre", "0.2"],
    "freer": ["--radius", "0.23,0.26", "--travel", "0.22,0.34", "--off-centre", "0.6"],
}
FREER_SHARE = 3  # in the second run there are so many times fewer clips of them
NEAR_RUN = ["name=near", "train.steps=7600", "optim.lr=3e-3", "optim.warmup_steps=200"]
TRAINING_LENGTHS = ",".join(["9"] * 15 + ["37"])  # one clip of 16 is long enough for v2v
SAMPLING = ["sampling.resolution=32px", "sampling.aspect_ratio=1:1", "sampling.num_steps=30"]
ENOUGH_DB = 30.0
NEAR_ENOUGH = 3.0  # pixels
SHOWN = {"t2v": 4, "i2v_head": 2}  # on the sheet, of the kinds that are sampled with all seeds; one of the others
FAR_FRAMES = 4  # one latent frame


@dataclass(frozen=True)
class Kind:
    """A way of sampling that is tried."""

    cond_type: str
    frames: int  # of the clip that is made, and of the clip that references are taken from
    head: int  # first frames that are known
    tail: int  # last ones
    look: str = "near"  # of the clips that references are taken from

    @property
    def name(self) -> str:
        """As the tables have it."""
        return self.cond_type if self.look == "near" else f"{self.cond_type}, {self.look}"


KINDS = (
    Kind("t2v", 9, 0, 0),
    Kind("i2v_head", 9, 1, 0),
    Kind("i2v_head", 9, 1, 0, "freer"),
    Kind("i2v_loop", 9, 1, 1),
    Kind("v2v_head", 37, 33, 0),
    Kind("v2v_tail", 37, 0, 33),
)


@dataclass(frozen=True)
class Judged:
    """All clips of a kind."""

    kind: Kind
    score: Score
    clips: list[np.ndarray]  # (T, H, W, 3) uint8
    verdicts: list[Verdict]
    truths: list[dict[str, str]]  # rows of the table that asked for them
    decibels: dict[str, list[float]]  # of the frames known at either end, clip by clip
    jumps: list[float]  # pixels between the object's places in the last known and the first made frame; nan: none seen

    def kept(self, end: str) -> float:
        """Share of clips whose known frames are those of the reference."""
        return sum(value >= ENOUGH_DB for value in self.decibels[end]) / len(self.decibels[end])

    @property
    def goes_on(self) -> float:
        """Share of clips whose object is where the known frames have left it."""
        return sum(jump <= NEAR_ENOUGH for jump in self.jumps) / len(self.jumps)


def main() -> None:
    args = parse_arguments()
    near, freer, run = args.out / "data_near", args.out / "data_freer", args.out / "shapes_i2v"
    for folder, look, share in (near, "near", 1), (freer, "freer", FREER_SHARE):
        if not (folder / "train.csv").exists():
            many = ["--clips", CLIPS // share, "--images", STILLS // share]
            render(folder, [*LOOKS[look], *many, "--durations", TRAINING_LENGTHS])
    if not args.weights:
        train(args, [f"data.table={near / 'train.csv'}", *NEAR_RUN])
        both = f"data.table=[{near / 'train.csv'},{freer / 'train.csv'}]"
        train(args, [both, f"train.init_from={args.out / 'near' / 'exported'}"])
    found = []
    for kind in KINDS:
        if args.only in ("", kind.cond_type):
            table = near / "prompts_heldout.csv" if kind.cond_type == "t2v" else references(kind, args.out)
            found.append(judge(kind, sample(kind, table, args.weights or run, args), table))
            print_by_value(found[-1])
    report(found, run, args)
    if args.sheet:
        draw(found, args.sheet)
    if args.ship:
        ship(run / "exported", near / "prompts_heldout.csv", args.ship)


def ship(exported: Path, prompts: Path, folder: Path) -> None:
    """An export in bf16, with prompts of combinations that it never saw: what ``opensora/pretrained/shapes/`` holds."""
    found: dict[str, str] = {}  # SHA-256 of every file
    with safe_open(exported / SINGLE, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        write_weights(folder, ((name, file.get_tensor(name).bfloat16()) for name in names), metadata, digests=found)
    cfg = load_config(RunConfig, exported / SAVED_NAME)
    usual = load_config(RunConfig, ROOT / "configs/train/shapes_i2v.yaml")
    start = replace(cfg.train, init_from="outputs/learns_i2v/near/exported")
    # Places as the command has them by default, and none of this machine.
    cfg = replace(cfg, output=usual.output, data=replace(cfg.data, table=usual.data.table), train=start)
    found[SAVED_NAME] = save(cfg, folder / SAVED_NAME)
    write_digests(folder, found)
    with prompts.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["direction"] != "still"]
    count = len({row["background"] for row in rows})  # which take turns
    one_each = [row for turn, row in enumerate(rows) if turn % count == turn // count % count]
    write_table(folder / "prompts.csv", one_each)


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def render(folder: Path, words: Sequence[object]) -> None:
    call([sys.executable, "-m", "data_pipeline.shapes", "--out", folder, "--sizes", "32x32", *words])


def train(args: argparse.Namespace, words: Sequence[str]) -> None:
    run = ["scripts/diffusion/train.py", "configs/train/shapes_i2v.yaml", f"output={args.out}", *words]
    call(["bash", "launch/torchrun.sh", args.processes, *run, *args.overrides])


def references(kind: Kind, out: Path) -> Path:
    """A table of prompts with references, of clips of kept-out combinations: 4 of each."""
    clips = out / f"references_{kind.look}_{kind.frames}"
    if not (clips / "heldout.csv").exists():
        render(clips, [*LOOKS[kind.look], "--clips", 0, "--images", 0, "--heldout", 4, "--durations", kind.frames])
    table = clips / f"{kind.cond_type}.csv"
    with (clips / "heldout.csv").open(newline="", encoding="utf-8") as file:
        rows = [reference_row(row, clips / row["path"], kind) for row in csv.DictReader(file)]
    write_table(table, rows)
    return table


def reference_row(row: dict[str, str], clip: Path, kind: Kind) -> dict[str, str]:
    """A prompt with the files of its references; stills are cut from the clip, without loss."""
    files = [clip]
    if kind.head <= 1 and kind.tail <= 1:
        frames, files = read_clip(clip), []
        for end, index in ("first", 0), ("last", -1):
            files.append(clip.with_name(f"{clip.stem}_{end}.png"))
            write_image(files[-1], frames[index])
    used = files if kind.head and kind.tail else files[:1]
    named = {"name": clip.stem, "text": row["text"], "ref": ";".join(str(path.resolve()) for path in used)}
    return named | {aspect: row[aspect] for aspect in ASPECTS}


def sample(kind: Kind, table: Path, weights: Path, args: argparse.Namespace) -> Path:
    """The folder of the clips."""
    folder = args.out / "samples" / kind.name.replace(", ", "_")
    words = ["scripts/diffusion/inference.py", "configs/sample/demo.yaml", f"weights={weights}", f"prompt_csv={table}"]
    guided = [f"sampling.guidance={args.guidance:g}", f"sampling.guidance_img={args.guidance_img:g}"]
    how = [*SAMPLING, *guided, f"sampling.num_frames={kind.frames}", f"cond_type={kind.cond_type}", "crf=0"]
    many = [f"num_sample={args.seeds if kind.cond_type in SHOWN else 1}", "batch_size=24"]
    call(["bash", "launch/torchrun.sh", args.processes, *words, *how, *many, f"save_dir={folder}", "overwrite=true"])
    return next(folder.glob("video_*"))


def judge(kind: Kind, folder: Path, table: Path) -> Judged:
    """What the files of a kind show, and how near known frames are to the references."""
    pairs = match_files(folder, read_truths(table))
    clips, truths = [read_clip(path) for path, _ in pairs], [truth for _, truth in pairs]
    verdicts = [verdict(kind, clip) for clip in clips]
    decibels: dict[str, list[float]] = {}
    for clip, truth in zip(clips, truths, strict=True):
        for end, value in known_psnr(kind, clip, truth.get("ref", "")):
            decibels.setdefault(end, []).append(value)
    jumps = [jump(kind, clip) for clip in clips] if kind.head or kind.tail else []
    return Judged(kind, score(verdicts, truths), clips, verdicts, truths, decibels, jumps)


def verdict(kind: Kind, clip: np.ndarray) -> Verdict:
    """What a clip shows; colour and shape of frames that the model made, far from those that it was given."""
    whole = judge_clip(clip)
    if not kind.head and not kind.tail:
        return whole
    made = clip[kind.head : len(clip) - kind.tail]
    if not kind.tail:
        made = made[-FAR_FRAMES:]
    elif not kind.head:
        made = made[:FAR_FRAMES]
    seen = judge_clip(made)
    return replace(whole, colour=seen.colour, shape=seen.shape)


def known_psnr(kind: Kind, clip: np.ndarray, ref: str) -> Iterator[tuple[str, float]]:
    """(end of the clip, PSNR of the frames that a reference gives there)."""
    files = [read_clip(Path(path)) for path in ref.split(";") if path]
    if kind.head:
        yield "head", psnr(clip[: kind.head], files[0][: kind.head])
    if kind.tail:
        yield "tail", psnr(clip[-kind.tail :], files[-1][-kind.tail :])


def jump(kind: Kind, clip: np.ndarray) -> float:
    """Pixels that the object moves between the known frames and the one beside them."""
    first = kind.head or len(clip) - kind.tail
    return float(np.linalg.norm(np.subtract(*map(centre, clip[first - 1 : first + 1]))))


def centre(frame: np.ndarray) -> np.ndarray:
    """(row, column) of what differs from the colour of the border: the mean place of its pixels; nan: nothing does."""
    pixels = frame.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    return np.argwhere(distance > 0.5 * np.percentile(distance, 98)).mean(axis=0)


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Decibels over all values of uint8 frames."""
    error = np.square(found.astype(np.float64) - wanted.astype(np.float64)).mean()
    return float(10 * np.log10(255.0**2 / max(error, 1e-10)))


def draw(found: Sequence[Judged], path: Path) -> None:
    """A few clips of every kind, evenly spaced through the tables and not chosen for what they show."""
    rows, given = [], []
    for judged in found:
        count = SHOWN.get(judged.kind.cond_type, 1)
        for index in np.linspace(0, len(judged.clips) - 1, count + 2).round().astype(int)[1:-1]:
            truth = judged.truths[index]
            rows.append((f"{judged.kind.name}: {truth['text']}", judged.clips[index]))
            given.append([read_clip(Path(one))[0] for one in truth.get("ref", "").split(";") if one])
    contact_sheet(rows, path, frame_height=48, references=given)
    with Image.open(path) as sheet:  # a third of the bytes
        few_colours = sheet.quantize(128)
    few_colours.save(path, optimize=True)


def report(found: Sequence[Judged], run: Path, args: argparse.Namespace) -> None:
    """The table, and one line for machines."""
    columns = [*ASPECTS, "all three"]
    print(f"\n{'kind':<16}{'clips':>6}" + "".join(f"{name:>11}" for name in columns) + "   from references")
    line: dict[str, object] = {"benchmark": "learns_i2v"} | trained([run.with_name("near"), run])
    for judged in found:
        shares = {aspect: judged.score.accuracy(aspect) for aspect in ASPECTS}
        shares["all three"] = judged.score.all_three / judged.score.clips
        ends = {
            end: {"psnr": round(float(np.mean(values)), 1), "least": round(min(values), 1), "kept": judged.kept(end)}
            for end, values in judged.decibels.items()
        }
        said = [f"{end} {one['psnr']:.1f} dB, {one['kept']:.0%} kept" for end, one in ends.items()]
        if judged.jumps:
            said.append(f"{judged.goes_on:.1%} go on")
            shares["goes on"] = judged.goes_on
        print(
            f"{judged.kind.name:<16}{judged.score.clips:>6}"
            + "".join(f"{shares[name]:>11.1%}" for name in columns)
            + f"   {'; '.join(said)}"
        )
        rounded = {name.replace(" ", "_"): round(share, 4) for name, share in shares.items()}
        line[judged.kind.name] = {"clips": judged.score.clips, **rounded, **ends}
    print(json.dumps(line))


def trained(runs: Sequence[Path]) -> dict[str, object]:
    """Updates and minutes of the runs that are there, and the last loss."""
    steps, seconds, loss = 0, 0.0, 0.0
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            continue
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [record for record in records if "loss" in record]
        seconds += sum(
            record["time/step_s"] * (record["step"] - before["step"])
            for before, record in zip([{"step": 0}, *losses], losses, strict=False)
        )
        steps, loss = steps + losses[-1]["step"], losses[-1]["loss"]
    return {"steps": steps, "minutes": round(seconds / 60, 1), "loss": round(loss, 4)} if steps else {}


def print_by_value(judged: Judged) -> None:
    """Clips judged right of each colour, shape and direction: where the gap is, if there is one."""
    for aspect in ASPECTS:
        shares = []
        for value in sorted({truth[aspect] for truth in judged.truths}):
            seen = [v for v, t in zip(judged.verdicts, judged.truths, strict=True) if t[aspect] == value]
            shares.append(f"{value} {sum(getattr(v, aspect) == value for v in seen)}/{len(seen)}")
        print(f"{judged.kind.name:<16}{aspect:<11}{', '.join(shares)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/learns_i2v"), help="folder to work in")
    parser.add_argument("--weights", type=Path, help="judge these, a run or an export, and train nothing")
    parser.add_argument("--processes", type=int, default=1, help="training and sampling processes")
    parser.add_argument("--seeds", type=int, default=4, help="samples per prompt")
    parser.add_argument("--sheet", type=Path, help="then draw a few clips of every kind to this .png")
    parser.add_argument("--ship", type=Path, help="then write the weights in bf16 to this folder")
    parser.add_argument("--only", default="", help="one kind, as cond_type names it")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--guidance-img", type=float, default=1.0)
    parser.add_argument("overrides", nargs="*", help="section.key=value for the training")
    return parser.parse_args()


def call(words: Sequence[object]) -> None:
    """Run a command of the README to its end."""
    print("$", " ".join("python" if word == sys.executable else str(word) for word in words), flush=True)
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
