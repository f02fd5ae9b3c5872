"""Everything to ask of a machine that has a GPU, in at most 8 minutes: tests first, then speed.

    python -m benchmarks.gpu.all [--out outputs/gpu] [--budget 480] [--only mfu sampling] [--list]
    python -m benchmarks.gpu.all --dry          # stand-ins for the parts, on any machine: how failures are handled

Each part is a process of its own with a limit of its own, and never more than what is left of the budget: one that
fails or hangs costs its own result, not those of the others. Results are in OUT/results.json and, as a table, in
OUT/results.md, and are written anew after every part. What a part prints is in OUT/PART.log.

Exit code: 0 all parts went well; 1 one did not, or no time was left for it; 2 there is no GPU, or no such part.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 480.0
LEAST_S = 10.0  # no part is begun with less time left
GRACE_S = 3.0  # from a polite end to a hard one
TAIL = 25  # lines of what a failed part said last

MACHINE = """
import json, platform, sys, torch
if not torch.cuda.is_available():
    sys.exit(2)
properties = torch.cuda.get_device_properties(0)
print(json.dumps({
    "benchmark": "machine", "gpu": properties.name, "gib": round(properties.total_memory / 2**30, 1),
    "gpus": torch.cuda.device_count(), "capability": list(torch.cuda.get_device_capability(0)),
    "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
}))
"""


@dataclass(frozen=True)
class Part:
    """A command, and how long it may take; ``{junit}`` in it becomes the file for the results of pytest."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass
class Result:
    """What became of a part."""

    name: str
    state: str  # ok | failed | timeout | no time left
    seconds: float
    limit_s: float  # that it had
    command: str
    records: list[dict[str, Any]] = field(default_factory=list)  # the lines of JSON that it printed
    tests: dict[str, Any] = field(default_factory=dict)  # passed, failed, skipped, and the names of what failed
    tail: list[str] = field(default_factory=list)  # what it said last, unless all went well


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.gpu.{name}", *arguments)


def _tests(path: str, *arguments: str) -> tuple[str, ...]:
    options = ("-m", "gpu", "-q", "-p", "no:cacheprovider", "--junitxml={junit}", *arguments)
    return (sys.executable, "-m", "pytest", path, *options)


PARTS = (
    Part("tests-steps", _tests("tests/gpu/test_cuda.py"), 75),
    Part("tests-recompute", _tests("tests/gpu/test_recompute_cuda.py", "-k", "not compiled"), 45),
    Part("tests-kernels", _tests("tests/gpu/test_kernels.py"), 75),
    Part("tests-apex", _tests("tests/gpu/test_apex.py"), 40),
    Part("mfu", _module("mfu", "--tokens", "8828", "37000"), 75),
    Part("attention", _module("attention"), 45),
    Part("sampling", _module("sampling"), 75),
    Part("data", _module("data"), 40),
    Part("step-1x", (sys.executable, "-m", "benchmarks.step_1x", "--device", "cuda", "--seconds", "8"), 60),
    Part("mfu-compiled", _module("mfu", "--tokens", "8828", "37000", "--recompute", "none", "--compile"), 90),
    Part("tests-compiled", _tests("tests/gpu/test_recompute_cuda.py", "-k", "compiled"), 120),
)

_SAYS = 'print(\'{{"benchmark": "stand-in", "value": {}}}\', flush=True)'
DRY = (
    Part("passes", (sys.executable, "-c", _SAYS.format(1)), 20),
    Part("fails", (sys.executable, "-c", _SAYS.format(2) + "; raise SystemExit('as it should')"), 20),
    Part("hangs", (sys.executable, "-c", _SAYS.format(3) + "; import time; time.sleep(600)"), 3),
    Part("passes-too", (sys.executable, "-c", _SAYS.format(4)), 20),
)


def run_all(parts: Sequence[Part], budget_s: float, out: Path, machine: dict[str, Any]) -> list[Result]:
    """Run the parts one after the other and write results after each; ends within the budget."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results: list[Result] = []
    for part in parts:
        left = budget_s - (time.monotonic() - began) - GRACE_S
        results.append(run_part(part, left, out))
        say(results[-1])
        write(results, out, {**machine, "budget_s": round(budget_s), "seconds": round(time.monotonic() - began, 1)})
    return results


def run_part(part: Part, left_s: float, out: Path) -> Result:
    """One part in a process group of its own, which ends with it."""
    junit = out / f"{part.name}.xml"
    junit.unlink(missing_ok=True)
    command = [word.format(junit=junit) if "{junit}" in word else word for word in part.command]
    limit = min(part.limit_s, left_s)
    shown = " ".join(command).replace(sys.executable, "python") if len(command) < 12 else part.name
    if limit < min(LEAST_S, part.limit_s):
        return Result(part.name, "no time left", 0.0, max(round(limit, 1), 0.0), shown)
    log = out / f"{part.name}.log"
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            state = "ok" if process.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timeout"
        finally:
            end(process)
    text = log.read_text(errors="replace")
    records, tests = records_of(text), tests_of(junit)
    if "--junitxml={junit}" in part.command and state == "ok" and not tests.get("passed"):
        state = "failed"  # what is skipped has shown nothing
    tail = [] if state == "ok" else text.splitlines()[-TAIL:]
    return Result(part.name, state, round(time.monotonic() - began, 1), round(limit, 1), shown, records, tests, tail)


def end(process: "subprocess.Popen[bytes]") -> None:
    """The process and all that it has started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(timeout=GRACE_S if kind == signal.SIGTERM else None)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def records_of(text: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects with the key ``benchmark``."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "benchmark" in record:
                found.append(record)
    return found


def tests_of(junit: Path) -> dict[str, Any]:
    """What pytest has written; nothing where it has not."""
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {}
    kinds = {case: {child.tag for child in case} for case in cases}
    bad = [case for case in cases if kinds[case] & {"failure", "error"}]
    skipped = [case for case in cases if "skipped" in kinds[case]]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "names": [f"{case.get('classname', '')}::{case.get('name', '')}" for case in bad],
    }


def write(results: Sequence[Result], out: Path, about: dict[str, Any]) -> None:
    """results.json and results.md, each whole or as it was."""
    data = {**about, "parts": [asdict(result) for result in results]}
    for name, text in (("results.json", json.dumps(data, indent=1) + "\n"), ("results.md", table(results, about))):
        aside = out / f".{name}.tmp"
        aside.write_text(text)
        os.replace(aside, out / name)


def table(results: Sequence[Result], about: dict[str, Any]) -> str:
    """One row a part, and one a record."""
    lines = ["# " + ", ".join(f"{key} {value}" for key, value in about.items() if key != "benchmark"), ""]
    lines += ["| part | state | s | limit s | result |", "|---|---|---|---|---|"]
    for result in results:
        shown = result.tail[-1:] if result.state == "failed" else []
        shown += [_counts(result.tests)] if result.tests else []
        shown += [_record(record) for record in result.records]
        first = shown[0] if shown else ""
        lines.append(f"| {result.name} | {result.state} | {result.seconds:g} | {result.limit_s:g} | {_cell(first)} |")
        lines += [f"| | | | | {_cell(one)} |" for one in shown[1:]]
    for result in results:
        if result.tail:
            lines += ["", f"## {result.name}: {result.state}", "", f"`{result.command}`", "", "```"]
            lines += [*(line.replace("```", "'''") for line in result.tail), "```"]
    return "\n".join(lines) + "\n"


def _record(record: dict[str, Any]) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in record.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if key != "benchmark")


def _counts(tests: dict[str, Any]) -> str:
    named = f": {', '.join(tests['names'])}" if tests["names"] else ""
    return f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped{named}"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")[:300]


def say(result: Result) -> None:
    """One line on the terminal."""
    about = _counts(result.tests) if result.tests else f"{len(result.records)} records"
    print(f"{result.name:<18}{result.state:<14}{result.seconds:>6.1f} s  {about}", flush=True)


def machine() -> dict[str, Any] | None:
    """What it computes on, as another process sees it, so that this one holds no memory of the GPU; None without."""
    found = subprocess.run([sys.executable, "-c", MACHINE], stdout=subprocess.PIPE, text=True, timeout=60)
    records = records_of(found.stdout)
    return {**records[0], "commit": _commit()} if records else None


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def chosen(parts: Sequence[Part], only: Sequence[str]) -> list[Part]:
    """Those whose name begins with one of ``only``, all without; empty where there is no such part."""
    if any(not any(part.name.startswith(one) for part in parts) for one in only):
        return []
    return [part for part in parts if not only or any(part.name.startswith(one) for one in only)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--only", nargs="+", default=[], help="parts whose names begin so")
    parser.add_argument("--list", action="store_true", help="the parts, their limits and commands; runs nothing")
    parser.add_argument("--dry", action="store_true", help="stand-ins for the parts; needs no GPU")
    args = parser.parse_args(argv)
    every = DRY if args.dry else PARTS
    parts = chosen(every, args.only)
    if not parts:
        names = ", ".join(part.name for part in every)
        print(f"--only {' '.join(args.only)}: no such part; must be beginnings of {names}", file=sys.stderr)
        return 2
    if args.list:
        for part in parts:
            print(f"{part.name:<18}{part.limit_s:>5g} s  {' '.join(('python', *part.command[1:]))}")
        return 0
    began = time.monotonic()
    about = {"gpu": "none: a dry run", "commit": _commit()} if args.dry else machine()
    if about is None:
        print("no CUDA device: nothing to measure; --dry runs stand-ins for the parts", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # ends the part at hand, and keeps what is written
    results = run_all(parts, args.budget - (time.monotonic() - began), args.out, about)
    print(f"{args.out / 'results.md'}, {args.out / 'results.json'}")
    return 0 if all(result.state == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
