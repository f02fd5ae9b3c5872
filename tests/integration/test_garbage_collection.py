"""In a real run Python collects garbage at step borders only, holds no tensor in it, and does as ever afterwards."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.train.loop import train
from opensora.train.run import Run
from opensora.train.setup import start_run
from opensora.utils import signal_handler
from tests.dist.harness import run_distributed
from tests.faults.runs import descendants

ZERO_3 = ["parallel.zero=3"]  # ulysses 2, all blocks recomputed
ZERO_1 = ["parallel.zero=1", "parallel.mesh.ulysses=1", "parallel.recompute.kind=none", "train.checkpoint_async=false"]
DYNAMIC = ["parallel.zero=2", "parallel.mesh.dynamic=true", "parallel.offload=optimizer"]
OFFLOADED = ["parallel.offload=parameters", "parallel.recompute={kind: full, offload: true}"]
PROGRAMS = ("opensora.datasets.decode.worker", "checkpoint/writer_process.py", "diagnostics/watchdog.py")
SAMPLES = [
    "validate.every=6",
    "validate.prompts=[a red circle]",
    "validate.sampling={width: 40, height: 24, num_frames: 1, num_steps: 2, fps: 8}",
]


class Seen(NamedTuple):
    """Of one process."""

    end: str
    within: list[str]  # where a collection ran that no border asked for
    borders: list[tuple[int, bool]]  # (step, whether everything was looked at)
    most_new: float  # objects that a border looks at, at most, after the first steps, of those that are frozen
    tensors: int  # that were found in unreachable cycles
    children: list[str]  # command lines of the processes that it has started, those of data and checkpoints among them
    after: tuple[bool, int]  # whether it is on, how many are frozen, when the run has ended


@contextmanager
def watched(run: Run) -> Iterator[dict[str, Any]]:
    """Notes collections of this process, and what they find."""
    found: dict[str, Any] = {"within": [], "borders": [], "most_new": 0.0, "tensors": 0, "children": []}
    collect, phase, at_border = run.garbage.collect, ["load"], [False]
    enter = run.enter

    def entering(name: str) -> None:
        phase[0] = name
        enter(name)

    def collecting(**how: bool) -> None:
        found["borders"].append((run.step, bool(how)))
        found["children"] += [Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(os.getpid())]
        if len(found["borders"]) > 5:
            found["most_new"] = max(found["most_new"], len(gc.get_objects()) / max(gc.get_freeze_count(), 1))
        gc.set_debug(gc.DEBUG_SAVEALL)  # what is unreachable is kept in gc.garbage, to be looked at
        at_border[0] = True
        collect(**how)
        gc.set_debug(0)
        found["tensors"] += sum(isinstance(thing, Tensor) for thing in gc.garbage)
        gc.garbage.clear()
        gc.collect()
        at_border[0] = False

    def note(when: str, info: dict[str, int]) -> None:
        if when == "start" and not at_border[0] and gc.get_freeze_count():
            found["within"].append(f"{phase[0]} of step {run.step}, generation {info['generation']}")

    run.garbage.collect, run.enter = collecting, entering  # type: ignore[method-assign]
    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


def trained(config: Path, overrides: list[str], fault: str | None) -> Seen:
    """A run on this process, with ``fault`` in its third step."""
    signal_handler.install()
    seen: dict[str, Any] = {}
    try:
        with start_run(load_config(RunConfig, config, overrides)) as run, watched(run) as seen:
            prepare = run.prepare

            class Preparing:
                def __call__(self, batch: Any, step: int) -> Any:
                    if step == 2 and fault == "signal" and run.runtime.rank == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    if step == 2 and fault == "error":
                        raise ArithmeticError("in the middle of a step")
                    return prepare(batch, step)

                def __getattr__(self, name: str) -> Any:
                    return getattr(prepare, name)

            run.prepare = Preparing()  # type: ignore[assignment]
            assert gc.isenabled()
            end = "finished" if train(run) else "interrupted"
            assert not gc.isenabled()
    except ArithmeticError:
        end = "failed"
    finally:
        signal_handler.install()
    return Seen(end=end, after=(gc.isenabled(), gc.get_freeze_count()), **seen)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ZERO_3, id="zero3"),
        pytest.param(DYNAMIC, id="dynamic", marks=pytest.mark.slow),
        pytest.param(ZERO_1, id="zero1", marks=pytest.mark.slow),
        pytest.param(OFFLOADED, id="offloaded", marks=pytest.mark.slow),
    ],
)
def test_only_between_steps_and_never_a_tensor(config: Path, layout: list[str]) -> None:
    overrides = [*layout, *SAMPLES, "train.steps=9", "train.checkpoint_every=5"]
    by_rank = run_distributed(trained, 2, config, overrides, None, timeout=110, init=False)
    for seen in by_rank:
        assert seen.end == "finished" and seen.after == (True, 0)
        assert seen.within == []
        assert seen.tensors == 0
        # They are programs of their own, not forks, which would begin with collection off.
        assert any(PROGRAMS[0] in child for child in seen.children)
        assert all(any(name in child for name in PROGRAMS) for child in seen.children)
        assert 0 < seen.most_new < 0.05
        assert [step for step, everything in seen.borders if not everything] == list(range(9))
        assert not any(everything for _, everything in seen.borders)  # asked for by going back only
    assert len({tuple(seen.borders) for seen in by_rank}) == 1


@pytest.mark.parametrize(
    ("fault", "end"), [("signal", "interrupted"), pytest.param("error", "failed", marks=pytest.mark.slow)]
)
def test_on_again_however_a_run_ends(config: Path, fault: str, end: str) -> None:
    for seen in run_distributed(trained, 2, config, [], fault, timeout=110, init=False):
        assert seen.end == end and seen.after == (True, 0)
        assert seen.within == [] and len(seen.borders) >= 3
