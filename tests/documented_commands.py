"""Every command that the README, the docs and docstrings name, run in a fresh clone at a small size.

    python -m tests.documented_commands                 all of them, in the order in which a reader meets them
    python -m tests.documented_commands --only plot     those that contain a text
    python -m tests.documented_commands --list          what is found, and what each is run as

A command that is found and that no rule of ``RULES`` knows is an error: what is documented is tried, or the reason
stands here why it cannot be. Prints one line a command with its exit code and time, and ends with the count.
"""

import argparse
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# What begins a command; a text that only names a module or a program is none.
_STARTS = (
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python3?(?: -m| [a-z]+/)|bash launch/|torchrun --|srun |sbatch |pip install )"
)
_COMMAND = re.compile(rf"{_STARTS}.*")
_INLINE = re.compile(r"``?([^`]+)``?")
TEXTS = ("README.md", "CONTRIBUTING.md", "docs/**/*.md")
SOURCES = ("opensora/**/*.py", "data_pipeline/**/*.py", "launch/*.py", "benchmarks/**/*.py", "tests/*.py")
COMMENTED = ("launch/*.sh", "launch/*.sbatch", "configs/**/*.yaml", "requirements*.txt")


@dataclass(frozen=True)
class Found:
    """A command and the first place that names it."""

    text: str
    place: str


def collect(root: Path = ROOT) -> list[Found]:
    """Every documented command once, in order."""
    commands: dict[str, Found] = {}
    for place, text in _passages(root):
        for line in _logical_lines(text):
            for candidate in (line, *_INLINE.findall(line)):
                command = _normal(candidate)
                if command and command not in commands:
                    commands[command] = Found(command, place)
    return list(commands.values())


def _passages(root: Path) -> Iterator[tuple[str, str]]:
    """(file, text that a person reads as documentation)."""
    for pattern in TEXTS:
        for path in sorted(root.glob(pattern)):
            yield str(path.relative_to(root)), path.read_text(encoding="utf-8")
    for pattern in SOURCES:
        for path in sorted(root.glob(pattern)):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    yield str(path.relative_to(root)), ast.get_docstring(node) or ""
    for pattern in COMMENTED:
        for path in sorted(root.glob(pattern)):
            lines = path.read_text(encoding="utf-8").splitlines()
            comments = [line.lstrip()[1:] for line in lines if line.lstrip().startswith("#")]
            yield str(path.relative_to(root)), "\n".join(comments)


def _logical_lines(text: str) -> list[str]:
    """Lines with those that end in a backslash joined, and inline code that a paragraph's end of line cuts in two."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r"(`[^`\n]+)\n([^`\n]+`)", r"\1 \2", text)
    return text.splitlines()


def _normal(text: str) -> str:
    """The command in a line, without what a comment says of it; empty if the line is none."""
    found = _COMMAND.fullmatch(text.strip())
    if found is None:
        return ""
    command = re.sub(r"\s+#.*$", "", found[0])
    command = re.sub(r"\s{3,}.*$", "", command)  # a column of explanations
    return " ".join(command.rstrip(" :.;,").split())


# Why a command is not run here. The first pattern found in it counts.
NOT_RUN = {
    r"^RUN=\S+ sbatch |^srun\b": "needs SLURM: tests/faults/test_slurm.py runs it on a real one",
    r"^(python|bash launch/torchrun\.sh( 2)?)( scripts/diffusion/train\.py)?$": "alone it says how to use it",
    r"--nodes \d --rendezvous": "needs several machines",
    r"-m slow|slow or not slow": "hours: the slow part of the tests",
    r"^bash launch/test\.sh$|pytest tests/(faults|dist)$": "the default tests, which run on every change",
    r"benchmarks\.gpu|--device cuda": "needs a CUDA device",
    r"^pip install .*(flash-attn|apex)": "needs CUDA and its compiler",
    r"^pip install$": "of this checkout: launch/setup.sh does the same, and tests/unit/test_console_command.py runs it",
    r"^pip install ": "docs/results has what each optional package was tried with",
    r"opensora\.cli\.download": "needs a network; tests/unit/test_download.py runs it on a stand-in",
    r"opensora\.cli\.doctor": "ends with 2 where files are missing; tests/unit/test_doctor.py has files",
    r"\.py configs/(opensora|dit|latte|pixart)": "needs published weights; tests/unit/test_family_configs.py reads it",
    r"\.py configs/sample/(wan|hunyuan_video)": "needs published weights; unit/test_published_sampling.py reads it",
    r"/(train|inference)\.py (training|sampling)\.py": "needs T5 and an autoencoder; test_guide_run.py has small ones",
    r"opensora\.cli\.convert LORA": "needs adapters; tests/integration/test_lora.py converts those of a run",
    r"opensora\.cli\.convert (FILE|WEIGHTS)": "needs a published file; tests/unit/test_convert.py writes small ones",
    r"captions\.endpoint\.url": "needs a server; tests/unit/test_pipeline_captions.py has one that behaves badly",
    r"engine\.address=": "needs a Ray cluster; tests/faults/test_pipeline_engines.py starts one",
    r"tests\.golden_(autoencoders|table)": "needs golden tensors, which the repository does not hold",
    r"opensora\.(cli\.serve|serve\.)|demo\.sh --serve": "serves until it is stopped; test_service_whole.py starts it",
    r"^curl ": "tests/integration/test_service_docs.py types all of them",
    r"tests\.documented_commands": "this one",
}
# What a command becomes so that it takes seconds on two cores: (what is replaced, by what), all in this order.
SMALLER = (
    (r"\[[^\]]*\]", ""),  # what may be left out
    (r"inference\.py CONFIG\.yaml", "inference.py configs/sample/demo.yaml weights=outputs/first"),
    (r'"\.\.\."', '"a blue square moves up"'),
    (r"(?<=launch/torchrun\.sh )\d+|(?<=--nproc_per_node )(\d+|N)", "2"),
    (r"(data_pipeline\.run|submit\.py pipeline) CONFIG\.yaml", r"\1 configs/pipeline/default.yaml"),
    (r"((?:data_pipeline\.run|submit\.py pipeline) .*)source=\S+ out=\S+", r"\1source=my_videos out=work/first"),
    (r"CONFIG(\.yaml)?", "configs/train/stage1.yaml"),
    (r"submit\.py \.\.\.", "submit.py configs/train/stage1.yaml"),
    (r"(precompute .*--out) DIR", r"\1 features2"),
    (r"(shapes .*--out) DIR", r"\1 shapes2"),
    (r"judge (FOLDER|\S+/video_\S+) --table \S+", "judge samples/video_32px --table data/shapes/prompts_train.csv"),
    (r"--(hunyuan|flux2d) DIR", ""),
    (r"(--media|--videos|--raw) \S+", r"\1 my_videos"),
    (r"\b(RUN_FOLDER|RUN)$", "outputs/first"),
    (r"\b(RUN_FOLDER|RUN) ", "outputs/first "),
    (r"(benchmarks\.step_caches) (?!-)\S+", r"\1 outputs/first"),
    (r"\bDIR\b", "my_clips"),
    (r"data\.table=(TABLE|outputs/\S+)", "data.table=clips.csv"),
    (r"--clips \d+ --images \d+", "--clips 24 --images 8"),
    (r"(cli\.forecast .*) --links \S+", r"\1"),  # of a run on several hosts
    (r"(data_pipeline\.shapes --out \S+)$", r"\1 --clips 24 --images 8"),
)
MODEL = (
    "vae.kind=dct vae.channels=16 text.kind=bytes text.dim=32 model.size=debug model.patch_size=1 model.vec_in_dim=32"
)
BUCKETS = "'data.buckets={32px:{1:[1.0,4],5:[1.0,2]}}' data.micro_batches=2 data.table=clips.csv"
RUN = "train.steps=10 train.log_every=1 optim.warmup_steps=0 parallel.mesh.ulysses=1 parallel.precision.compute=fp32"
TRAIN = f"{MODEL} {BUCKETS} {RUN}"
SAMPLE = "sampling.num_steps=2 sampling.num_frames=5 sampling.resolution=32px sampling.aspect_ratio=1:1 precision=fp32"
# Options that make a command small: what it contains -> what is put behind it. The first that fits counts.
OPTIONS = {
    r"train\.py configs/train/lora\.yaml": f"{TRAIN} lora.rank=2",
    r"train\.py configs/train/stage": f"{TRAIN} train.init_from=null",
    r"opensora\.cli\.precompute": f"{TRAIN} train.init_from=null",
    r"opensora\.cli\.buckets": BUCKETS,
    r"inference\.py configs/sample/256px": f"weights=outputs/first model=null vae=null text=null {SAMPLE}",
    r"inference\.py configs/sample": SAMPLE,
    r"submit\.py pipeline": "--dry-run",
    r"data_pipeline\.run": "filters.short=null",
    r"data\.table=work/first": "train.steps=10 parallel.mesh.ulysses=1 name=from_raw",
    r"launch/submit\.py.*--dry-run": f"{TRAIN} train.init_from=null",
    r"launch/submit\.py": f"--dry-run {TRAIN} train.init_from=null",
    r"launch/demo\.sh$": "--minutes 1",
    r"launch/demo\.sh --(videos|raw)": "--steps 40 --out outputs/demo_clips",
    r"tests\.layout_table": "ulysses_2",
    r"benchmarks\.learns_shapes": "train.steps=4 'data.buckets={32px:{9:[1.0,4]}}' optim.warmup_steps=0 --seeds 1",
    r"benchmarks\.learns_i2v": "train.steps=4 'data.buckets={32px:{9:[1.0,4]}}' optim.warmup_steps=0 --seeds 1 "
    "--only t2v",
    r"benchmarks\.learns_classes": "model.hidden_size=24 model.num_heads=2 --steps 4 --stills 96 --seeds 1",
    r"benchmarks\.recipes": "--minutes 0.02 --only shapes_i2v",
    r"benchmarks\.memory": "--processes 1,2 --width 64",
    r"benchmarks\.step_caches": "--clips 1 --steps 4",
    r"benchmarks\.step_times": "--steps 24 --copies 8",
    r"benchmarks\.balance": "--rows 20000 --steps 4",
    r"benchmarks\.index": "--rows 1000000",
    r"benchmarks\.sharing_step": "--steps 2",
    r"benchmarks\.sharing": "--rows 20000 --steps 4",
    r"benchmarks\.checkpoint": "--gib 0.02 --saves 2",
    r"benchmarks\.step_vs_diffusers": "--hidden 96 --heads 2 --seconds 1",
    r"benchmarks\.step_1x": "--shape tiny --seconds 1",
    r"benchmarks\.service": "--rounds 1 --clip-s 1 --pollers 4",
    r"benchmarks\.decode": "--windows 1 --frames 5",
    r"benchmarks\.packing": "--steps 1 --micro-batches 2",
    r"benchmarks\.plan_accuracy": "--only 1",
    r"benchmarks\.hosts": "--rates 0 --steps 1 --only shard hybrid",
    r"benchmarks\.demo_step": "--steps 2",
    r"launch/test\.sh -k": "--collect-only",
}
LIMIT_S = 900.0  # of one command, on a busy machine


def why_not(command: str) -> str:
    """The reason that a command is not run here; empty if it is run."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, command)), "")


def small(command: str) -> str:
    """The command as it is run here."""
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)  # type: ignore[arg-type]
    options = next((words for pattern, words in OPTIONS.items() if re.search(pattern, command)), "")
    return " ".join(f"{command} {options}".split())


def unknown(commands: list[Found]) -> list[Found]:
    """Commands that still hold a word for the reader to replace: ``SMALLER`` does not know it."""
    left = re.compile(r"\b(DIR|FOLDER|RUN|RUN_FOLDER|TABLE|CONFIG|FILE|N)\b|\.\.\.")
    return [found for found in commands if not why_not(found.text) and left.search(small(found.text))]


def prepare(folder: Path) -> Path:
    """A fresh clone with what a reader would bring: a few clips with captions, a table of prompts."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", "--local", str(ROOT), str(clone)], check=True)
    for name, size in (("my_clips", "32x32"), ("my_videos", "320x240")):
        shapes = ["--out", name, "--clips", "24", "--images", "8", "--sizes", size, "--durations", "5,17"]
        command = [sys.executable, "-m", "data_pipeline.shapes", *shapes]
        subprocess.run(command, cwd=clone, check=True, stdout=subprocess.DEVNULL)
        shutil.copy(clone / name / "train.csv", clone / name / "captions.csv")
    index = [sys.executable, "-m", "data_pipeline.index", "my_clips", "--out", "clips.csv"]  # also for --only
    subprocess.run(index, cwd=clone, check=True, stdout=subprocess.DEVNULL)
    prompts = "text,name\na red circle moves left on a black background,red_circle_left_black\n"
    (clone / "prompts.csv").write_text(prompts, encoding="utf-8")
    Image.new("RGB", (40, 30), "orange").save(clone / "cat.png")
    shutil.copy(clone / "cat.png", clone / "circle.png")
    (clone / "references.csv").write_text("text,ref\na red circle,cat.png\na blue square,\n", encoding="utf-8")
    (clone / "lines.txt").write_text("seed=1\nseed=2\n", encoding="utf-8")
    return clone


def run(command: str, clone: Path) -> tuple[int, float, str]:
    """(exit code, seconds, end of the output) of a command in the clone, with this interpreter."""
    python = shlex.quote(sys.executable)
    line = re.sub(r"^(\.venv/bin/)?python3? ", f"{python} ", command)
    line = re.sub(r"^torchrun ", f"{python} -m torch.distributed.run --standalone ", line)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(clone)}
    began = time.monotonic()
    try:
        done = subprocess.run(
            ["bash", "-c", line], cwd=clone, env=environment, timeout=LIMIT_S, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 124, f"{error.output or ''}"
    lines = output.strip().splitlines()
    said = [line for line in lines if line.startswith("error:")]
    return code, time.monotonic() - began, "\n".join([*said[:2], *lines[-4:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="those that contain this text")
    parser.add_argument("--skip", default="no command", help="those that do not contain this text")
    parser.add_argument("--list", action="store_true", help="show what would be run")
    args = parser.parse_args()
    commands = collect()
    chosen = [found for found in commands if args.only in found.text and args.skip not in found.text]
    if args.list:
        for found in chosen:
            print(f"{found.place:40} {found.text}\n{'':40}   {why_not(found.text) or small(found.text)}")
        return 0
    codes: dict[str, int] = {}  # by what was run: many commands are the same at a small size
    with tempfile.TemporaryDirectory(prefix="documented-commands-") as folder:
        clone = prepare(Path(folder))
        for found in chosen:
            if reason := why_not(found.text):
                print(f"   -            {found.text}\n{'':16}{reason}")
                continue
            line = small(found.text)
            if line in codes:
                print(f"{codes[line]:4d}    as above   {found.text}", flush=True)
                continue
            codes[line], seconds, end = run(line, clone)
            print(f"{codes[line]:4d} {seconds:8.1f} s   {found.text}", flush=True)
            if codes[line]:
                print(f"{'':17}$ {line}\n{end}", flush=True)
    failed = sum(code != 0 for code in codes.values())
    print(f"{len(codes) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
