"""Numbers gone wrong: left out alike everywhere, gone back from, bounded; copies that differ; slow processes."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from acceleration.checkpoint import contents, newest
from acceleration.diagnostics.replica_check import digest as hashed
from opensora.cli import train as cli
from opensora.config.run import GuardConfig
from opensora.train.health.anomaly_guard import RECOVERED, AnomalyGuard
from opensora.train.run import Run
from tests.dist.harness import run_distributed
from tests.faults.conftest import Tally
from tests.faults.runs import ALWAYS, Fault, Outcome, digest, events, run_with

NAN, INF = float("nan"), float("inf")


def train(
    config: Path, folder: Path, *overrides: str, faults: tuple[Fault, ...] = (), world: int = 2
) -> tuple[Outcome, Path]:
    """(what became of the run, its folder); all processes must have seen the same."""
    outcomes = run_distributed(
        run_with, world, config, [f"output={folder}", *overrides], faults, timeout=100, init=False
    )
    assert outcomes[1:] == outcomes[:-1]
    return outcomes[0], folder / "run"


@pytest.fixture(scope="module")
def clean(stills: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without faults."""
    from tests.faults.conftest import CONFIG

    folder = tmp_path_factory.mktemp("clean")
    config = folder / "train.yaml"
    config.write_text(CONFIG.format(output=folder, table=stills))
    outcome, run = train(config, folder)
    assert outcome.end == "finished" and outcome.left_out == 0
    return run


@pytest.mark.parametrize("fault", ["loss", "gradient", "target"])
def test_a_bad_update_is_left_out_on_all_alike(fault: str, config: Path, tmp_path: Path, tally: Tally) -> None:
    """On one process only; weights, moments and average stay, the step and its samples go by."""
    value = {"loss": NAN, "gradient": INF, "target": NAN}[fault]
    faults = (Fault(fault, step=3, rank=1, times=ALWAYS, value=value),)
    outcome, run = train(config, tmp_path, "train.steps=4", "train.checkpoint_every=1", faults=faults)
    assert outcome == Outcome("finished", 4, 1, ((0, True), (1, True), (2, True), (3, False)))
    before, after = (contents(run / f"checkpoints/step-0000000{step}") for step in (3, 4))
    for name, value in before.items():
        if not name.endswith(".lr"):
            same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
            assert same, name
    assert [event["step"] for event in events(run, "left_out")] == [4]
    tally("bad loss, gradient or sample on one process: left out on all", 1, 1)


def test_what_was_transient_is_as_if_it_had_not_been(config: Path, clean: Path, tmp_path: Path, tally: Tally) -> None:
    """A weight turns into NaN in memory: noticed at once, back to before, the same end."""
    faults = (Fault("weight", step=5, rank=1),)
    outcome, run = train(config, tmp_path, faults=faults)
    assert outcome.end == "finished" and outcome.left_out == 1
    good = [step for step, made in outcome.judged if made]
    assert outcome.judged[5] == (5, False) and good == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    (event,) = events(run, "went_back")
    assert event["checkpoint"] == "step-00000004" and event["came_from"] == 6
    assert event["why"] == "values of the state are not finite at step 5"
    assert digest(run) == digest(clean)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    tally("NaN in a weight: back, and the end of a run without it, bit for bit", 1, 1)


def test_what_comes_again_is_leapt_over_and_then_ends_the_run(config: Path, tmp_path: Path, tally: Tally) -> None:
    faults = tuple(Fault("target", step=step, rank=0, times=ALWAYS) for step in (3, 4))
    outcome, run = train(config, tmp_path / "leap", "guard.max_bad=1", "train.checkpoint_every=1", faults=faults)
    assert outcome.end == "finished"
    first = [(0, True), (1, True), (2, True), (3, False), (4, False)]
    assert outcome.judged == (*first, (3, False), (4, False), (5, True), (6, True), (7, True))
    assert [event["step"] for event in events(run, "went_back")] == [3, 5]

    hopeless = tuple(Fault("target", step=step, times=ALWAYS) for step in range(3, 12))
    overrides = ("guard.max_bad=1", "train.checkpoint_every=1", "train.steps=12")
    outcome, run = train(config, tmp_path / "end", *overrides, faults=hopeless)
    assert outcome.end.startswith("hopeless: 2 bad updates in a row from step 5 on again, after going back 2 times")
    tally("bad for good: leapt over, then stopped after two returns", 2, 2)


def test_without_a_checkpoint_to_go_back_to_the_run_ends(config: Path, tmp_path: Path) -> None:
    faults = tuple(Fault("loss", step=step, times=ALWAYS) for step in range(2))
    outcome, _ = train(config, tmp_path, "guard.max_bad=1", faults=faults, world=1)
    assert outcome.end.startswith("hopeless: 2 bad updates in a row from step 0 on, and no checkpoint of 0 steps")


@pytest.mark.parametrize("layout", ["parallel.mesh.replicate=2", "parallel.zero=0"])
def test_one_flipped_bit_in_one_copy_is_found(
    layout: str, config: Path, clean: Path, tmp_path: Path, tally: Tally
) -> None:
    """The lowest bit of one fp64 weight, by the next comparison; the end is that of a run without it."""
    faults = (Fault("bit", step=4, rank=1, value=0),)
    overrides = (layout, "guard.replicas_every=2", "train.steps=6")
    outcome, run = train(config, tmp_path, *overrides, faults=faults)
    (event,) = events(run, "went_back")
    assert event["why"] == "the state of rank 0, 1 differs from its copies, which were equal at step 4"
    assert outcome.end == "finished" and event["came_from"] == 6 and event["checkpoint"] == "step-00000004"
    same_steps = contents(clean / "checkpoints/step-00000006")
    ended = newest(run / "checkpoints")
    assert ended is not None and ended.name == "step-00000006"
    for name, value in contents(ended).items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, same_steps[name], rtol=1e-10, atol=1e-14), name
    tally("one flipped bit in one copy: found by the next comparison", 1, 1)


@pytest.mark.slow
def test_the_copy_that_stands_alone_is_named(config: Path, tmp_path: Path) -> None:
    """Three copies, and four processes of two copies times two places on the tensor axis."""
    faults = (Fault("bit", step=2, rank=2, value=62),)
    common = ("guard.replicas_every=2", "train.steps=4", "train.checkpoint_every=1")
    _, run = train(config, tmp_path / "three", "parallel.zero=0", *common, faults=faults, world=3)
    assert events(run, "went_back")[0]["why"].startswith("the state of rank 2 differs")
    layout = ("parallel.mesh.replicate=2", "parallel.mesh.tensor=2")
    outcome, run = train(config, tmp_path / "clean", *layout, *common, world=4)
    assert outcome.end == "finished" and not events(run, "went_back")
    faults = (Fault("bit", step=2, rank=3, value=5),)
    _, run = train(config, tmp_path / "tensor", *layout, *common, faults=faults, world=4)
    assert "3" in events(run, "went_back")[0]["why"]


def test_a_hash_changes_with_every_single_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, word, bits in ((torch.float32, torch.int32, 32), (torch.bfloat16, torch.int16, 16)):
        x = torch.randn(7, 3, generator=generator).to(dtype)
        was = int(hashed([x, x]))
        for place in range(x.numel()):
            for bit in range(bits):
                y = x.clone()
                y.view(-1)[place : place + 1].view(word).bitwise_xor_(-(1 << bit) if bit == bits - 1 else 1 << bit)
                assert int(hashed([x, y])) != was
        assert int(hashed([x, x.clone()])) == was


def test_a_slow_process_is_named_and_the_run_goes_on(config: Path, tmp_path: Path, tally: Tally) -> None:
    """Rank 1 sleeps in every micro-batch; with one record per step it is named within three."""
    faults = (Fault("slow", rank=1, value=0.6),)
    lines: list[str] = run_distributed(
        lines_of, 2, config, [f"output={tmp_path}", "train.steps=3"], faults, init=False
    )[0]
    named = [line for line in lines if "is slow" in line]
    assert named and all("rank 1 is slow" in line and "most of it in encode" in line for line in named)
    assert named[0].startswith(("step 2", "step 3"))
    tally("slow process: named within three records, run not ended", 1, 1)


def lines_of(config: Path, overrides: list[str], faults: tuple[Fault, ...]) -> list[str]:
    """What the account of times announces."""
    from opensora.train.health import step_timer

    lines: list[str] = []
    step_timer.announce = lines.append  # type: ignore[assignment]
    assert run_with(config, overrides, faults).end == "finished"
    return lines


@pytest.mark.slow
def test_an_engine_that_does_not_ask_goes_back_at_once(config: Path, tmp_path: Path) -> None:
    """DeepSpeed knows the norm only after its update."""
    pytest.importorskip("deepspeed")
    layout = ["parallel.engine=deepspeed", "parallel.zero=1"]
    layout += [f"parallel.precision.{key}=fp32" for key in ("compute", "reduce", "master")]
    _, whole = train(config, tmp_path / "whole", *layout)
    faults = (Fault("target", step=4, rank=1),)
    outcome, run = train(config, tmp_path / "broken", *layout, faults=faults)
    assert outcome.end == "finished" and events(run, "went_back")[0]["checkpoint"] == "step-00000004"
    assert digest(run) == digest(whole)


def train_command(arguments: list[str]) -> int:
    """With a learning rate that no weight survives, and no configuration may have."""
    with mock.patch.object(Run, "lr_at", lambda run, step: 1e200):
        return cli.main(arguments)


def test_a_run_that_cannot_be_helped_ends_with_one_line_and_1(config: Path, tmp_path: Path) -> None:
    """Weights overflow, and there is no checkpoint from before."""
    arguments = [str(config), f"output={tmp_path}", "optim.kind=sgd", "optim.clip_norm=0"]
    arguments += ["train.checkpoint_every=100", "optim.warmup_steps=0"]
    assert run_distributed(train_command, 1, arguments, timeout=60, init=False) == [1]
    assert not (tmp_path / "run/checkpoints").exists()


# The policy by itself: what needs no process.


def judged(guard: AnomalyGuard, losses: list[float], start: int = 0) -> list[bool]:
    return [guard.judge(start + i, loss, 1.0).bad is None for i, loss in enumerate(losses)]


def test_a_spike_is_left_out_and_never_enters_the_window(tally: Tally) -> None:
    guard = AnomalyGuard(GuardConfig(spike_sigma=10.0, spike_window=16))
    usual = [1.0 + 0.01 * (i % 3) for i in range(16)]
    deviation = torch.tensor(usual).std(correction=0).item()
    assert all(judged(guard, usual))
    assert judged(guard, [NAN, INF, 1.01 + 11 * deviation, 1.01 + 8 * deviation]) == [False, False, False, True]
    assert guard.skipped == 3 and all(loss < 1.2 for loss in guard.state()["losses"])
    assert not judged(AnomalyGuard(GuardConfig()), [NAN])[0] and all(judged(AnomalyGuard(GuardConfig()), [*usual, 1e9]))
    tally("spike of 10 deviations: left out, not in the window", 1, 1)


def test_a_window_must_be_half_full_before_it_judges() -> None:
    guard = AnomalyGuard(GuardConfig(spike_sigma=3.0, spike_window=16))
    assert all(judged(guard, [1.0, 1.1, 1.0, 50.0, 1.0, 1.1, 1.0, 1.1]))
    assert judged(guard, [500.0]) == [False]


@pytest.mark.parametrize("cut", range(10))
def test_the_guard_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(cut: int) -> None:
    losses = [1.0, 1.1, NAN, 1.0, 1.1, 9.0, NAN, NAN, 1.0, 1.05]
    cfg = GuardConfig(spike_sigma=3.0, spike_window=8)
    whole = AnomalyGuard(cfg)
    wanted = judged(whole, losses)
    first = AnomalyGuard(cfg)
    before = judged(first, losses[:cut])
    second = AnomalyGuard(cfg, cut, json.loads(json.dumps(first.state())))
    assert before + judged(second, losses[cut:], cut) == wanted and second.state() == whole.state()


def test_at_most_five_in_a_row() -> None:
    guard = AnomalyGuard(GuardConfig())
    judged(guard, [1.0, *[NAN] * 5, 1.0, *[NAN] * 5])
    assert guard._bad_row() is None
    judged(guard, [NAN], 12)
    wanted = guard._bad_row()
    assert wanted is not None and wanted.before == 7 and wanted.skip_to is None


def test_what_is_long_past_no_longer_counts() -> None:
    guard = AnomalyGuard(GuardConfig(max_bad=0))
    guard.judge(10, NAN, 1.0)
    guard._rollbacks, guard._row = 2, 0
    for step in range(5, 10 + RECOVERED + 1):  # the same steps again do not
        guard.judge(step, 1.0, 1.0)
    assert guard._rollbacks == 2
    guard.judge(10 + RECOVERED + 1, 1.0, 1.0)
    assert guard._rollbacks == 0
