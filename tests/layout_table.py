"""Print how far every layout is from one process: ``python -m tests.layout_table [part of a name ...]``.

Training rows: the largest relative differences, in fp64, over all processes and three SGD steps, of the loss, of any
parameter's gradient, of the norm that clipping uses and of the weights afterwards. Sampling rows: the latents. Both say
whether the bytes that each process sent over each axis are those of the formulas. DeepSpeed knows no fp64: its rows are
held to what fp32 leaves of the truth. ColossalAI's rows are its ZeRO 0. Rows of ``factored`` are of a model that keeps
time and space apart, with masked frames, those of ``chapter`` of DiT, Latte and PixArt, which are sampled as well, and
of STDiT, STDiT2 and STDiT3, those of ``jobs of Wan`` and ``jobs of HunyuanVideo`` of these, sampled as well. With AdamW
weights are compared together with their moving average. ``SUM`` counts what is within its tolerance.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

from tests.dist import (
    chapters,
    jobs,
    stdit,
    test_chapters,
    test_engines,
    test_factored,
    test_sampling,
    test_stdit,
    test_stdit_sampling,
)
from tests.dist.compared import truth as truth_of_chapter
from tests.dist.factored import ADAMW, SGD, Run
from tests.dist.factored import on_one_process as on_one_process_factored
from tests.dist.factored import on_this_layout as on_this_layout_factored
from tests.dist.harness import DistributedFailure, run_distributed
from tests.dist.layouts import Layout, every_layout
from tests.dist.parity import TOLERANCE, Outcome, Sampled, SamplingCase, errors, relative
from tests.dist.test_parity import on_one_process, on_this_layout

WIDTH = 66  # of a name
COLUMNS = ("loss", "gradients", "norm", "weights", "latents")
FP64_LIMITS = dict.fromkeys(COLUMNS, TOLERANCE)
TOGETHER = 6  # rows at most that are computed by the same processes
Row = tuple[dict[str, float], bool | None]  # relative differences; whether bytes are as predicted
Rows = Iterator[tuple[str, Callable[[], Row]]]
Wanted = Callable[[str], bool]
Kind = Callable[[Wanted], Rows]


def main(names: list[str]) -> int:
    """Returns 1 if any layout is further away than the tolerance, sends other bytes than predicted, or failed."""
    print(f"{'layout':<{WIDTH}}" + "".join(f"{column:>11}" for column in COLUMNS) + f"{'bytes':>7}{'s':>7}", flush=True)
    worst: dict[str, float] = {}
    good, bad = 0, []
    for name, limits, compare in rows(lambda name: not names or any(part in name for part in names)):
        started = time.monotonic()
        try:
            found, as_predicted = compare()
        except DistributedFailure as error:
            bad.append(name)
            print(f"{name:<{WIDTH}} failed: {str(error).splitlines()[-1]}", flush=True)
            continue
        if any(error > limits[column] for column, error in found.items()) or as_predicted is False:
            bad.append(name)
        else:
            good += 1
        if limits is FP64_LIMITS:
            worst |= {column: max(error, worst.get(column, 0.0)) for column, error in found.items()}
        figures = "".join(f"{found[column]:>11.1e}" if column in found else f"{'':>11}" for column in COLUMNS)
        traffic = {True: "equal", False: "WRONG", None: ""}[as_predicted]
        print(f"{name:<{WIDTH}}{figures}{traffic:>7}{time.monotonic() - started:>7.1f}", flush=True)
    print(f"SUM {good} of {good + len(bad)} within their tolerance, {TOLERANCE:.0e} in fp64")
    print(json.dumps({"benchmark": "layout_table", "good": good, "bad": bad, **worst}))
    return int(bool(bad))


def rows(wanted: Wanted) -> Iterator[tuple[str, dict[str, float], Callable[[], Row]]]:
    """(name, largest errors allowed, what compares it with one process) of every row whose name is wanted."""
    for kind in (mmdit_rows, factored_rows, chapter_rows, stdit_rows, job_rows, sampling_rows):
        yield from ((name, FP64_LIMITS, compare) for name, compare in kind(wanted))
    for engine, stages in (("deepspeed", (0, 1, 2, 3)), ("colossalai", (0,))):
        for zero, ulysses in itertools.product(stages if find_spec(engine) else (), (1, 2)):
            precision, near, gradient, weight = test_engines.exactness(engine, zero)
            limits = {"loss": near, "norm": near, "gradients": gradient, "weights": weight}
            name = f"{engine}-2-ulysses{ulysses}-zero{zero}-{precision.compute}"
            if wanted(name):
                yield name, limits, lambda case=(engine, zero, ulysses): on_another_engine(*case)


def mmdit_rows(wanted: Wanted) -> Rows:
    for layout in every_layout():
        if wanted(str(layout)):
            yield str(layout), lambda layout=layout: trained(layout)


def factored_rows(wanted: Wanted) -> Rows:
    """Of the model that keeps time and space apart and knows nothing of a family."""
    for run in test_factored.SLOW[::2]:
        if wanted(f"factored-{run}"):
            yield f"factored-{run}", lambda run=run: trained_factored(run)


def chapter_rows(wanted: Wanted) -> Rows:
    """DiT, Latte and PixArt: training, and latents after steps of sampling."""
    every = [*test_chapters.SLOW, *test_chapters.LORA, *test_chapters.COMPILED]  # which take minutes
    for run, found in computed_together("chapter", every, wanted, partial(chapters_on_layouts, chapters.MODELS)):
        yield f"chapter-{run}", lambda run=run, found=found: compared_chapter(chapters.MODELS, run, found())


def job_rows(wanted: Wanted) -> Rows:
    """Wan and HunyuanVideo: the same."""
    for chapter, every in jobs.JOBS.items():
        for run, found in computed_together(chapter, every, wanted, partial(chapters_on_layouts, jobs.MODELS)):
            yield f"{chapter}-{run}", lambda run=run, found=found: compared_chapter(jobs.MODELS, run, found())


def stdit_rows(wanted: Wanted) -> Rows:
    """STDiT, STDiT2, STDiT3 and STDiT3 with windows: training."""
    every = sorted([*test_stdit.SLOW, *test_stdit.LORA], key=lambda run: "compile" in run.options)  # which take minutes
    for run, found in computed_together("chapter", every, wanted, stdit.on_these_layouts):
        truth = (run.model, run.optim.kind, run.adapters)
        yield f"chapter-{run}", lambda truth=truth, found=found: compared(found(), test_stdit.truth(*truth))


def sampling_rows(wanted: Wanted) -> Rows:
    """Through the pipeline: MMDiT, then STDiT, STDiT2, STDiT3, DiT, Latte and PixArt."""
    mmdit = [(test_sampling, *case) for case in [*test_sampling.QUICK.items(), *test_sampling.SLOW.items()]]
    for module, world, cases in [*mmdit, *((test_stdit_sampling, *case) for case in test_stdit_sampling.SLOW.items())]:
        for degrees, zero, calls in cases:
            axes = "-".join(f"{axis}{degree}" for axis, degree in degrees.items()) or "none"
            made = "+".join(call[:4] for call in calls) if module is test_sampling else f"{len(calls)} jobs of 1.x"
            name = f"sample-{world}-{axes}-zero{zero}-{made}"
            if wanted(name):
                yield name, lambda given=(module, world, (degrees, zero, calls)): sampled(*given)


def computed_together(
    chapter: str, runs: Sequence[Any], wanted: Wanted, on_layouts: Callable[[list[Any]], list[Any]]
) -> Iterator[tuple[Any, Callable[[], list[Any]]]]:
    """(run, what gives its results of all processes). Runs of equal size share processes, to start fewer of them.

    The time of a row that is first among those is the time of all.
    """
    chosen = [run for run in runs if wanted(f"{chapter}-{run}")]
    for world, same in itertools.groupby(chosen, lambda run: run.world):
        left = list(same)
        for start in range(0, len(left), TOGETHER):
            part = left[start : start + TOGETHER]

            @cache
            def results(world: int = world, part: tuple[Any, ...] = tuple(part)) -> list[list[Any]] | None:
                try:
                    return run_distributed(on_layouts, world, list(part), timeout=1200)
                except DistributedFailure:
                    return None  # each runs by itself, to see which it was

            def of_one(index: int, run: Any, results: Any = results) -> list[Any]:
                shared = results()
                every = shared or run_distributed(on_layouts, run.world, [run], timeout=600)
                return [found[index if shared else 0] for found in every]

            for index, run in enumerate(part):
                yield run, lambda index=index, run=run, of_one=of_one: of_one(index, run)


@cache
def mmdit_truth() -> Outcome:
    return on_one_process()


@cache
def factored_truth(kind: str) -> Outcome:
    return on_one_process_factored({optim.kind: optim for optim in (SGD, ADAMW)}[kind])


def trained(layout: Layout) -> Row:
    """The largest differences by kind, over all processes."""
    return compared(run_distributed(on_this_layout, layout.world, layout.config, timeout=600), mmdit_truth())


def trained_factored(run: Run) -> Row:
    """The same of the model that keeps time and space apart."""
    every = run_distributed(on_this_layout_factored, run.world, run, timeout=600)
    return compared(every, factored_truth(run.optim.kind))


def chapters_on_layouts(models: dict[str, Any], runs: list[chapters.Run]) -> list[tuple[Outcome, list[Any]]]:
    """Runs in every process of the group; nothing of a run with adapters is sampled."""
    every = chapters.on_these_layouts(runs, models)
    plain = {run: chapters.sampled_on_these_layouts([run], models)[0] for run in runs if not run.adapters}
    return [(outcome, plain.get(run, [])) for run, outcome in zip(runs, every, strict=True)]


def compared_chapter(models: Mapping[str, Any], run: chapters.Run, every: list[tuple[Outcome, list[Any]]]) -> Row:
    """Training and latents."""
    cfg = models[run.model]
    found, as_predicted = compared([outcome for outcome, _ in every], truth_of_chapter(cfg, run.kind, run.adapters))
    whole = chapters.sampled(cfg)
    apart = [relative(*pair) for _, samples in every if samples for pair in zip(samples, whole, strict=True)]
    return found | ({"latents": max(apart)} if apart else {}), as_predicted


def compared(results: list[Outcome], truth: Outcome) -> Row:
    found = [errors(result, truth) for result in results]
    traffic = [pair for result in results for pair in result.traffic]
    as_predicted = all(counted == formula for counted, formula in traffic) if traffic else None
    return {column: max(one[column] for one in found) for column in found[0]}, as_predicted


def sampled(module: Any, world: int, case: SamplingCase) -> Row:
    """The largest difference of any job's latents, over all processes."""
    truths = {name: job_truth(module, name) for name in case[2]}
    every: list[list[dict[str, Sampled]]] = run_distributed(module.on_these_layouts, world, [case], timeout=500)
    errors = [relative(found[0][name].latents, truths[name]) for found in every for name in truths]
    as_predicted = all(sampled.counted == sampled.predicted for found in every for sampled in found[0].values())
    return {"latents": max(errors)}, as_predicted


@cache
def job_truth(module: Any, name: str) -> Any:
    by_hand = module.on_one_process if module is test_sampling else module.by_hand
    return by_hand(module.JOBS[name])


def on_another_engine(engine: str, zero: int, ulysses: int) -> Row:
    """The largest differences by kind, over all processes."""
    cfg = test_engines.layout(engine, zero, ulysses)
    found = [
        errors(Outcome([step[:3] for step in steps], steps[-1][3]), mmdit_truth())
        for steps in run_distributed(test_engines.on_engine, 2, cfg, timeout=600)
    ]
    return {column: max(one[column] for one in found) for column in found[0]}, None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
