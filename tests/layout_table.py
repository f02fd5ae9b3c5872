"""Print how far every layout is from one process: ``python -m tests.layout_table [part of a name ...]``.

Training rows: the largest relative differences, in fp64, over all processes and three SGD steps, of the loss, of any
parameter's gradient, of the norm that clipping uses and of the weights afterwards. Sampling rows: the latents. Both say
whether the bytes that each process sent over each axis are those of the formulas. DeepSpeed knows no fp64: its rows are
held to what fp32 leaves of the truth. ColossalAI's rows are its ZeRO 0. Rows of ``factored`` are of a model that keeps
time and space apart, with masked frames, those of ``chapter`` of DiT, Latte, PixArt and STDiT. ``SUM`` counts what is
within its tolerance.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from tests.dist import chapters, stdit, test_chapters, test_engines, test_factored, test_sampling, test_stdit
from tests.dist.factored import ADAMW, SGD, Run
from tests.dist.factored import on_one_process as on_one_process_factored
from tests.dist.factored import on_this_layout as on_this_layout_factored
from tests.dist.harness import DistributedFailure, run_distributed
from tests.dist.layouts import Layout, every_layout
from tests.dist.parity import TOLERANCE, Outcome, errors, relative
from tests.dist.test_parity import on_one_process, on_this_layout

COLUMNS = ("loss", "gradients", "norm", "weights", "latents")
FP64_LIMITS = dict.fromkeys(COLUMNS, TOLERANCE)
Row = tuple[dict[str, float], bool | None]  # relative differences; whether bytes are as predicted


def main(names: list[str]) -> int:
    """Returns 1 if any layout is further away than the tolerance, sends other bytes than predicted, or failed."""
    print(f"{'layout':<52}" + "".join(f"{column:>11}" for column in COLUMNS) + f"{'bytes':>7}{'s':>7}", flush=True)
    worst: dict[str, float] = {}
    good, bad = 0, []
    for name, limits, compare in rows():
        if names and not any(part in name for part in names):
            continue
        started = time.monotonic()
        try:
            found, as_predicted = compare()
        except DistributedFailure as error:
            bad.append(name)
            print(f"{name:<52} failed: {str(error).splitlines()[-1]}", flush=True)
            continue
        if any(error > limits[column] for column, error in found.items()) or as_predicted is False:
            bad.append(name)
        else:
            good += 1
        if limits is FP64_LIMITS:
            worst |= {column: max(error, worst.get(column, 0.0)) for column, error in found.items()}
        figures = "".join(f"{found[column]:>11.1e}" if column in found else f"{'':>11}" for column in COLUMNS)
        traffic = {True: "equal", False: "WRONG", None: ""}[as_predicted]
        print(f"{name:<52}{figures}{traffic:>7}{time.monotonic() - started:>7.1f}", flush=True)
    print(f"SUM {good} of {good + len(bad)} within their tolerance, {TOLERANCE:.0e} in fp64")
    print(json.dumps({"benchmark": "layout_table", "good": good, "bad": bad, **worst}))
    return int(bool(bad))


def rows() -> Iterator[tuple[str, dict[str, float], Callable[[], Row]]]:
    """(name, largest errors allowed, what compares it with one process)."""
    truth = on_one_process()
    for layout in every_layout():
        yield str(layout), FP64_LIMITS, lambda layout=layout: trained(layout, truth)
    factored = {optim.kind: on_one_process_factored(optim) for optim in (SGD, ADAMW)}
    for run in test_factored.SLOW[::2]:
        yield f"factored-{run}", FP64_LIMITS, lambda run=run: trained_factored(run, factored[run.optim.kind])
    for run in test_chapters.SLOW:
        yield f"chapter-{run}", FP64_LIMITS, lambda run=run: trained_chapter(run)
    for run in test_stdit.SLOW:
        yield f"chapter-{run}", FP64_LIMITS, lambda run=run: trained_stdit(run)
    for world, cases in (*test_sampling.QUICK.items(), *test_sampling.SLOW.items()):
        for case in cases:
            degrees, zero, jobs = case
            axes = "-".join(f"{axis}{degree}" for axis, degree in degrees.items())
            name = f"sample-{world}-{axes}-zero{zero}-{'+'.join(job[:4] for job in jobs)}"
            yield name, FP64_LIMITS, lambda world=world, case=case: sampled(world, case)
    for engine, stages in (("deepspeed", (0, 1, 2, 3)), ("colossalai", (0,))):
        for zero, ulysses in itertools.product(stages if find_spec(engine) else (), (1, 2)):
            precision, near, gradient, weight = test_engines.exactness(engine, zero)
            limits = {"loss": near, "norm": near, "gradients": gradient, "weights": weight}
            name = f"{engine}-2-ulysses{ulysses}-zero{zero}-{precision.compute}"
            yield name, limits, lambda case=(engine, zero, ulysses): on_another_engine(*case, truth)


def trained(layout: Layout, truth: Outcome) -> Row:
    """The largest differences by kind, over all processes."""
    return compared(run_distributed(on_this_layout, layout.world, layout.config, timeout=600), truth)


def trained_factored(run: Run, truth: Outcome) -> Row:
    """The same of the model that keeps time and space apart."""
    return compared(run_distributed(on_this_layout_factored, run.world, run, timeout=600), truth)


def trained_chapter(run: chapters.Run) -> Row:
    """The same of DiT, Latte and PixArt."""
    every = run_distributed(chapters.on_this_layout, run.world, run, chapters.MODELS[run.model], timeout=600)
    return compared(every, test_chapters.truth(run.model, run.kind))


def trained_stdit(run: stdit.Run) -> Row:
    """The same of STDiT, STDiT2 and STDiT3."""
    every = run_distributed(stdit.on_this_layout, run.world, run, timeout=600)
    return compared(every, test_stdit.truth(run.model, run.optim.kind, run.adapters))


def compared(results: list[Outcome], truth: Outcome) -> Row:
    found = [errors(result, truth) for result in results]
    as_predicted = all(counted == formula for result in results for counted, formula in result.traffic)
    return {column: max(one[column] for one in found) for column in found[0]}, as_predicted


def sampled(world: int, case: tuple[Any, int, tuple[str, ...]]) -> Row:
    """The largest difference of any job's latents, over all processes."""
    truths = {name: test_sampling.on_one_process(test_sampling.JOBS[name]) for name in case[2]}
    every = run_distributed(test_sampling.on_these_layouts, world, [case], timeout=500)
    errors = [relative(found[0][name].latents, truths[name]) for found in every for name in truths]
    as_predicted = all(sampled.counted == sampled.predicted for found in every for sampled in found[0].values())
    return {"latents": max(errors)}, as_predicted


def on_another_engine(engine: str, zero: int, ulysses: int, truth: Outcome) -> Row:
    """The largest differences by kind, over all processes."""
    cfg = test_engines.layout(engine, zero, ulysses)
    found = [
        errors(Outcome([step[:3] for step in steps], steps[-1][3]), truth)
        for steps in run_distributed(test_engines.on_engine, 2, cfg, timeout=600)
    ]
    return {column: max(one[column] for one in found) for column in found[0]}, None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
