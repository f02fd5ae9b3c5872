"""The demo: the commands of the README one after the other, and a summary of what they made.

Each step is a command that could be typed, and is printed as such. Only the standard library is used here.
"""

import argparse
import contextlib
import csv
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from budget import FIRST_SHARE, Schedule, Speed, fits, lay_out, measure  # launch/budget.py; this is run as a script

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["bash", "launch/torchrun.sh"]
MARK = ".demo"  # in a folder that this program may empty
MEASURED_STEPS = 10
FIRST_LAYOUT = "ZeRO 3, Ulysses 2, gradient checkpointing"
SECOND_LAYOUT = "ZeRO 2, two data-parallel processes, no gradient checkpointing"
OTHER_LAYOUT = ["parallel.zero=2", "parallel.mesh.ulysses=1", "parallel.recompute.kind=none"]
PRETRAINED_PROMPTS = "opensora/pretrained/shapes/prompts.csv"
STILL = {"name": "still", "text": "a red square on a gray background"}
CLIP_OF_STILL = {
    "text": "a red square moves right on a gray background",
    "colour": "red",
    "shape": "square",
    "direction": "right",
}
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Stopped(Exception):
    """A signal for this program."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main() -> None:
    args = parse_arguments()
    out: Path = args.out
    config = "configs/train/demo_clips.yaml" if args.videos or args.raw else "configs/train/demo.yaml"
    overrides = [f"output={out}", *args.overrides]
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()
    demo = Demo(out)
    demo.sample_pretrained()
    if args.videos:
        table = demo.index_videos(args.videos)
        prompts = demo.prompts_of(captions_of_csv(table))
    elif args.raw:
        table = demo.cut_videos(args.raw)
        prompts = demo.prompts_of(captions_of_parquet(table))
    else:
        table, prompts = demo.render_shapes(), out / "data" / "demo_prompts.csv"
    overrides.append(f"data.table={table}")

    demo.deadline = time.monotonic() + 60 * args.minutes - demo.pretrained_s
    if args.steps:
        schedule = Schedule(first=max(10, int(FIRST_SHARE * args.steps)), total=args.steps)
    else:
        schedule = demo.choose_steps(config, overrides, args.minutes)

    demo.say(f"Training on 2 processes: {FIRST_LAYOUT}; stopped by a signal after {schedule.first} updates")
    demo.train_until(schedule, config, overrides)
    total = schedule.total if args.steps else demo.steps_left_in_time(schedule)
    demo.say(f"Resuming on another layout: {SECOND_LAYOUT}")
    resumed = [*overrides, *OTHER_LAYOUT, f"train.steps={total}"]
    demo.command([*TORCHRUN, "2", "scripts/diffusion/train.py", config, *resumed])

    demo.say("Sampling on 2 processes that share the tokens of every clip")
    samples = out / "samples"
    sample = ["scripts/diffusion/inference.py", "configs/sample/demo.yaml", f"weights={demo.run}"]
    demo.command([*TORCHRUN, "2", *sample, f"prompt_csv={prompts}", f"save_dir={samples}"])
    demo.command([sys.executable, "-m", "opensora.cli.plot", demo.run, "--out", out / "loss.png"])
    demo.summarise(prompts, judged=not (args.videos or args.raw))
    if args.serve:
        sys.exit(demo.serve())


class Demo:
    """Runs commands in the checkout and remembers how long they took."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.run = out / "demo"
        self.started = time.monotonic()
        self.deadline = self.started  # of everything but the data
        self.pretrained = out / "pretrained"
        self.pretrained_s = 0.0  # what its samples took
        self.speeds: tuple[Speed, Speed] | None = None  # of both layouts, where they were measured
        self.titles: list[tuple[float, str]] = []

    def say(self, title: str) -> None:
        self.titles.append((time.monotonic() - self.started, title))
        print(f"\n== {title} ({self.clock()})", flush=True)

    def clock(self) -> str:
        seconds = round(time.monotonic() - self.started)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def command(self, words: list[object]) -> None:
        """Run to the end; a failure ends the demo with the command's own words."""
        process = self.start(words)
        with self.passing_signals_to(process):
            code = process.wait()
        if code:
            sys.exit(f"error: the command above ended with exit code {code}")

    def start(self, words: list[object], stdout: int | None = None) -> subprocess.Popen[bytes]:
        line = [str(word) for word in words]
        shown = ["python" if word == sys.executable else word for word in line]
        print(f"$ {shlex.join(shown)}", flush=True)
        # In a session of its own, so that a terminal asks this program alone.
        return subprocess.Popen(line, cwd=ROOT, start_new_session=True, stdout=stdout)

    @contextlib.contextmanager
    def passing_signals_to(self, process: "subprocess.Popen[bytes]") -> Iterator[None]:
        """A signal for the demo ends the command in the command's own way, then the demo."""
        try:
            yield
        except Stopped as stop:
            self.stop(process, stop.number)

    def stop(self, process: "subprocess.Popen[bytes]", number: int) -> NoReturn:
        """Pass the signal on, as often as it comes; wait for the command; say what is kept and how to go on."""
        process.send_signal(number)
        while process.returncode is None:
            try:
                process.wait()
            except Stopped as stop:
                process.send_signal(stop.number)
        steps = sorted((self.run / "checkpoints").glob("step-*"))
        words = process.args if isinstance(process.args, list) else []
        shown = shlex.join("python" if word == sys.executable else str(word) for word in words)
        again = shlex.join(["bash", "launch/demo.sh", *sys.argv[1:]])
        leave(
            number,
            f"stopped by {signal.Signals(number).name}, the command above ended with exit code {process.returncode}",
            f"kept: what is in {self.out}" + (f", of the training {steps[-1]}" if steps else ""),
            f"this command alone goes on with: {shown}",
            f"the whole demo begins anew, with an empty {self.out}: {again}",
        )

    def sample_pretrained(self) -> None:
        """What a trained model makes: clips of prompts, a still, and a clip that goes on from this still."""
        began = time.monotonic()
        sample = [*TORCHRUN, "1", "scripts/diffusion/inference.py", "configs/sample/shapes.yaml"]
        self.say("Sampling from the small model that comes with the package: text to video")
        self.command([*sample, f"prompt_csv={PRETRAINED_PROMPTS}", f"save_dir={self.pretrained / 't2v'}"])
        self.say("A still of its own, and image to video from this still")
        self.pretrained.mkdir(exist_ok=True)
        table, stills = write_rows(self.pretrained / "still.csv", [STILL]), self.pretrained / "still"
        self.command([*sample, f"prompt_csv={table}", "sampling.num_frames=1", f"save_dir={stills}"])
        (still,) = stills.glob(f"image_*/{STILL['name']}.png")
        row = {"name": "from_still", "ref": str(still), **CLIP_OF_STILL}
        table = write_rows(self.pretrained / "i2v.csv", [row])
        self.command([*sample, f"prompt_csv={table}", "cond_type=i2v_head", f"save_dir={self.pretrained / 'i2v'}"])
        self.pretrained_s = time.monotonic() - began

    def render_shapes(self) -> Path:
        self.say("Rendering captioned clips and stills of moving shapes")
        data = self.out / "data"
        # Large shapes that move clearly, near the middle: what minutes of training can learn.
        look = ["--radius", "0.24,0.26", "--travel", "0.32,0.36", "--off-centre", "0.2"]
        size = ["--clips", "1600", "--images", "200", "--sizes", "32x32,32x32,48x32,32x48", "--durations", "5,9,9"]
        self.command([sys.executable, "-m", "data_pipeline.shapes", "--out", data, *size, *look])
        choose_prompts(data / "prompts_train.csv", data / "prompts_heldout.csv", data / "demo_prompts.csv")
        return data / "train.csv"

    def index_videos(self, folder: Path) -> Path:
        self.say(f"Indexing {folder}")
        table = self.out / "data" / "clips.csv"
        table.parent.mkdir(parents=True)
        self.command([sys.executable, "-m", "data_pipeline.index", folder, "--out", table])
        return table

    def cut_videos(self, folder: Path) -> Path:
        self.say(f"From the raw videos of {folder} to a clip table")
        out = self.out / "data"
        config = "configs/pipeline/default.yaml"
        self.command([sys.executable, "-m", "data_pipeline.run", config, f"source={folder}", f"out={out}"])
        return out / "clips.parquet"

    def prompts_of(self, captions: Iterable[str]) -> Path:
        """The first captions of a table, as a table of prompts."""
        texts = list(dict.fromkeys(captions))[:6]
        return write_rows(self.out / "data" / "demo_prompts.csv", [{"text": text} for text in texts])

    def choose_steps(self, config: str, overrides: list[str], minutes: float) -> Schedule:
        """As many updates as the time allows, by a few measured in either layout."""
        self.say(f"Measuring a few updates in both layouts, to fill {minutes:g} minutes")
        first, second = (self.speed(config, [*overrides, *layout]) for layout in ([], OTHER_LAYOUT))
        self.speeds = first, second
        schedule = lay_out(self.deadline - time.monotonic(), first, second)
        print(
            f"{first.step_s:.2f} s an update with {FIRST_LAYOUT}, {second.step_s:.2f} s with {SECOND_LAYOUT}: "
            f"train.steps={schedule.total}, the learning rate's cosine laid out for them",
            flush=True,
        )
        return schedule

    def speed(self, config: str, overrides: list[str]) -> Speed:
        words = [sys.executable, "-m", "benchmarks.demo_step", config, "--steps", MEASURED_STEPS, *overrides]

        def run() -> str:
            process = self.start(words, stdout=subprocess.PIPE)
            with self.passing_signals_to(process):
                printed, _ = process.communicate()
            if process.returncode:
                sys.exit(f"error: the command above ended with exit code {process.returncode}")
            return printed.decode()

        return measure(run, MEASURED_STEPS)

    def steps_left_in_time(self, schedule: Schedule) -> int:
        """The updates planned, or as many as fit where the machine is slower or faster than it was when measured."""
        assert self.speeds is not None
        first, second = self.speeds
        records = read_records(self.run / "metrics.jsonl")
        steady = records[1:] or records  # the first has the warm-up in it
        slower = statistics.median(record["time/step_s"] for record in steady) / first.step_s
        left = fits(self.deadline - time.monotonic(), Speed(slower * second.start_s, slower * second.step_s))
        done = last_step(self.run / "metrics.jsonl")
        if abs(done + left - schedule.total) <= 0.1 * schedule.total:
            return schedule.total
        print(f"an update takes {slower:.2f} times as long as measured: train.steps={done + left}", flush=True)
        return done + left

    def train_until(self, schedule: Schedule, config: str, overrides: list[str]) -> None:
        """Start training, send SIGTERM to the launcher once the first updates are reported, wait for the end."""
        steps = f"train.steps={schedule.total}"
        words = [*TORCHRUN, "2", "scripts/diffusion/train.py", config, *overrides, steps]
        process = self.start(words)
        metrics = self.run / "metrics.jsonl"
        with self.passing_signals_to(process):
            while process.poll() is None and last_step(metrics) < schedule.first:
                time.sleep(0.2)
            if process.poll() is None:
                print(f"$ kill -TERM {process.pid}   # at step {last_step(metrics)}", flush=True)
                process.send_signal(signal.SIGTERM)
            code = process.wait()
        saved = sorted((self.run / "checkpoints").glob("step-*"))
        if code == 0 or not saved:
            sys.exit(f"error: the interrupted training ended with exit code {code} and {len(saved)} checkpoints")
        print(f"interrupted: exit code {code}, state saved in {saved[-1]}", flush=True)

    def summarise(self, prompts: Path, *, judged: bool) -> None:
        self.say("Summary")
        verdict = "not judged: only the rendered shapes have a judge; look at the contact sheet\n"
        if judged:
            verdict = self.judged(self.videos(), prompts)
        of_pretrained = [
            ("text to video", self.judged(self.pretrained / "t2v", ROOT / PRETRAINED_PROMPTS)),
            ("image to video", self.judged(self.pretrained / "i2v", self.pretrained / "i2v.csv")),
        ]
        records = read_records(self.run / "metrics.jsonl")
        lines = [
            f"loss            {records[0]['loss']:.3f} at step {records[0]['step']}, "
            f"{records[-1]['loss']:.3f} at step {records[-1]['step']}",
            f"peak memory     {max(r['mem/peak_gib'] for r in records):.2f} GiB in the largest process",
            *self.bucket_use(records),
            f"loss curve      {self.out / 'loss.png'}",
            f"contact sheet   {self.videos() / 'contact_sheet.png'}",
            *(f"of the package  {sheet}" for sheet in sorted(self.pretrained.glob("*2v/*/contact_sheet.png"))),
            *(f"video           {path}" for path in sorted(self.videos().glob("*.mp4"))),
            f"run             {self.run} (config.yaml, metrics.jsonl, checkpoints/, exported/)",
            *(f"{seconds:8.0f} s     {title}" for seconds, title in self.titles),
            f"in all          {self.clock()} minutes",
        ]
        shown = [f"What the samples show:\n{verdict}"]
        shown += [f"What the model that comes with the package shows, {kind}:\n{said}" for kind, said in of_pretrained]
        text = "\n".join([*lines, "", *shown])
        (self.out / "summary.txt").write_text(text)
        print(text)
        print(f"This summary is {self.out / 'summary.txt'}")

    def serve(self, *words: str) -> int:
        """A page for what was trained, until a signal ends it. Returns its exit code."""
        self.say("A page for the model of this run; Ctrl-C ends it")
        config = "configs/serve/demo.yaml"
        own = [f"weights={self.run}", f"out={self.out / 'serve'}", *words]
        process = self.start([sys.executable, "-m", "opensora.cli.serve", config, *own])
        while True:
            try:
                return process.wait()
            except Stopped as stop:
                process.send_signal(stop.number)

    def judged(self, videos: Path, table: Path) -> str:
        """What the judge of the rendered shapes says of a folder of clips."""
        words = [sys.executable, "-m", "data_pipeline.shapes.judge", videos, "--table", table]
        return subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, check=True).stdout

    def bucket_use(self, records: list[dict[str, Any]]) -> list[str]:
        """How many samples of every bucket the updates consumed, a sample counted in every epoch."""
        held = next(line["buckets"] for line in read_lines(self.run / "metrics.jsonl") if "buckets" in line)
        used = {name: sum(r.get(f"samples/{name}", 0) for r in records) for name in held}
        lines = [f"buckets used    {sum(n > 0 for n in used.values())} of the {len(held)} that hold samples:"]
        return lines + [f"  {name:<24}{held[name]:>6} samples held {used[name]:>8} consumed" for name in held]

    def videos(self) -> Path:
        return next((self.out / "samples").glob("video_*"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/demo.sh", description="Prepare, train, interrupt, resume, sample.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--videos", type=Path, help="folder of clips with captions; default: rendered shapes")
    source.add_argument("--raw", type=Path, help="folder of raw videos, which are cut, judged and captioned first")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder to write, emptied first")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything after the data; default: 8")
    parser.add_argument("--steps", type=int, help="optimizer updates; default: as many as fit into the minutes")
    parser.add_argument("--serve", action="store_true", help="end with a page for what was trained, until Ctrl-C")
    parser.add_argument("overrides", nargs="*", help="section.key=value for the training")
    given = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    if twice := next((option for option in given if given.count(option) > 1), None):
        parser.error(f"{twice} is there twice; give it once")
    args = parser.parse_args()
    args.out = args.out.resolve()
    for name in ("videos", "raw"):
        if folder := getattr(args, name):
            setattr(args, name, folder.resolve())
            if not folder.is_dir():
                parser.error(f"--{name} {folder}: no such folder")
    if args.out.exists() and not (args.out / MARK).exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out}: holds something else than a demo; name another folder")
    if not 1 <= args.minutes <= 7 * 24 * 60:
        parser.error(f"--minutes {args.minutes:g}: must be a number from 1 to 10080")
    if args.steps is not None and args.steps < 40:
        parser.error(f"--steps {args.steps}: must be an integer >= 40")
    return args


def choose_prompts(seen: Path, unseen: Path, out: Path) -> Path:
    """Eight prompts of either kind, evenly spaced through the lists."""
    rows = []
    for path in (seen, unseen):
        with path.open(newline="", encoding="utf-8") as file:
            every = [row for row in csv.DictReader(file) if row.get("direction") != "still"]
        rows += every[:: max(1, len(every) // 8)][:8]
    return write_rows(out, [{**row, "name": f"{i:02d}"} for i, row in enumerate(rows)])


def captions_of_csv(table: Path) -> Iterator[str]:
    with table.open(newline="", encoding="utf-8") as file:
        yield from (row["text"] for row in csv.DictReader(file))


def captions_of_parquet(table: Path) -> Iterator[str]:
    """Of the clips that are kept."""
    import pyarrow.parquet as papq  # the one import that is not of the standard library

    rows = papq.read_table(table, columns=["text", "keep"]).to_pylist()
    yield from (row["text"] for row in rows if row["keep"])


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in complete]


def read_records(path: Path) -> list[dict[str, Any]]:
    return [record for record in read_lines(path) if "loss" in record]


def last_step(path: Path) -> int:
    records = read_records(path)
    return int(records[-1]["step"]) if records else 0


def interrupt(number: int, frame: object) -> NoReturn:
    raise Stopped(number)


def leave(number: int, *lines: str) -> NoReturn:
    """As a signal does, with some lines where there is still somebody to read them."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", flush=True)
    os._exit(128 + number)


if __name__ == "__main__":
    for stop in STOPS:
        if signal.getsignal(stop) != signal.SIG_IGN:  # as nohup has it
            signal.signal(stop, interrupt)
    try:
        main()
    except Stopped as stopped:
        leave(stopped.number, f"stopped by {stopped}, between two commands; bash launch/demo.sh begins anew")
