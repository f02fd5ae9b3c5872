"""Validation in its parts: which held-out clips, who computes them, what is refused, where numbers and clips go."""

import csv
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acceleration.config import OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.decode import api
from opensora.datasets.loading.loader import read_batches
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch
from opensora.datasets.plan.held_out import HeldOut, choose, even_shares
from opensora.datasets.table.manifest import read_table
from opensora.datasets.table.overlap import common_clips
from opensora.models.families import build_model
from opensora.planner.cost_fit import measured
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.train.held_out import Totals, announce_held_out, bin_edges, in_bins, open_held_out, records
from opensora.train.validate import check_prompts
from opensora.utils.charts import loss_curve, validation_curves
from opensora.utils.errors import UserError
from opensora.utils.metrics_log import Clip, MetricsLogger, read_metrics
from tests.dist.harness import run_distributed
from tests.dist.parity import fill
from tests.dist.problem import MODEL
from tests.unit.test_references import ConditioningConfig, ToyAutoencoder, preparation

CONFIG = """
name: run
output: {folder}/runs
model: {{kind: mmdit, size: debug, patch_size: 1, in_channels: 16, context_in_dim: 32, vec_in_dim: 32}}
vae: {{kind: dct, channels: 16}}
text: {{kind: bytes, dim: 32}}
data:
  table: {folder}/clips.csv
  workers: 0
  unused_rows: report
  buckets: {{32px: {{1: [1.0, 3]}}, 64px: {{1: [1.0, 2]}}}}
train: {{steps: 2}}
optim: {{warmup_steps: 0}}
validate: {{every: 1, table: {folder}/clips.csv, samples: 7}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve stills of two sizes, and a configuration that both trains and validates on them."""
    rows = []
    for number in range(12):
        side = 32 if number % 3 else 64
        Image.fromarray(np.full((side, side, 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(
            {"path": f"{number}.png", "text": f"still {number}", "num_frames": 1, "height": side, "width": side}
        )
    with (tmp_path / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "fps"])
        writer.writeheader()
        writer.writerows([row | {"fps": ""} for row in rows])
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def held_out(folder: Path, *overrides: str) -> HeldOut:
    found = open_held_out(load_config(RunConfig, folder / "run.yaml", list(overrides)))
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(30))
def test_shares_are_even_and_within_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts, total = rng.integers(1, 30, rng.integers(1, 9)).tolist(), int(rng.integers(1, 120))
    shares = even_shares(counts, total)
    assert sum(shares) == min(total, sum(counts)) and all(0 <= s <= c for s, c in zip(shares, counts, strict=True))
    short = [s for s, c in zip(shares, counts, strict=True) if s < c]  # who could give more gives as much as anybody
    assert not short or min(short) >= max(shares) - 1


def test_what_is_chosen(folder: Path) -> None:
    """Of the small ones (8) and the large ones (4) about equally many; whatever their micro-batches, another seed other
    ones; all of them where there are no more."""
    small, large = (f"data.buckets={{32px: {{1: [1.0, {a}]}}, 64px: {{1: [1.0, {b}]}}}}" for a, b in ((1, 1), (3, 2)))
    held, other = held_out(folder, small), held_out(folder, large)
    assert sorted(held.sample_ids) == sorted(other.sample_ids) and len(set(held.sample_ids)) == 7
    assert sorted(Counter(i % 3 == 0 for i in held.sample_ids).values()) == [3, 4]
    assert len({frozenset(held_out(folder, f"validate.seed={seed}").sample_ids) for seed in range(6)}) >= 4
    assert set(held.sample_ids) == set(held_out(folder, "seed=9", "data.micro_batches=4").sample_ids)
    assert sorted(held_out(folder, "validate.samples=99").sample_ids) == list(range(12))


@pytest.mark.parametrize("degree", range(1, 9))
def test_every_sample_is_counted_once(folder: Path, degree: int) -> None:
    held = held_out(folder, "validate.samples=12")
    shares = [held.assign(rank, degree) for rank in range(degree)]
    assert len({len(share) for share in shares}) == 1
    counted = Counter(i for share in shares for m in share if m.weight for i in m.sample_ids)
    assert counted == Counter(range(12)) == Counter(held.sample_ids)


def test_clips_in_both_tables_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_config(RunConfig, folder / "run.yaml")
    from opensora.datasets.table.index import open_table

    held, training = held_out(folder), open_table(cfg.data.table)
    announce_held_out(held, training)
    said = capsys.readouterr().err
    assert (
        "validation: 7 of 12 held-out clips in 2 buckets" in said and "7 of the 7 clips are in data.table too" in said
    )
    lines = (folder / "clips.csv").read_text().splitlines()
    (folder / "few.csv").write_text("\n".join([lines[0], *(lines[1 + i] for i in (2, 5, 7))]))
    few = read_table(str(folder / "few.csv"))
    assert common_clips(range(12), read_table(str(folder / "clips.csv")), few) == [2, 5, 7]
    assert common_clips([0, 3, 5], read_table(str(folder / "clips.csv")), few) == [5]


REFUSED: dict[str, tuple[str, str]] = {
    "no table": ("validate.table={folder}/nothing.csv", "validate.table={folder}/nothing.csv: "),
    "no clip table": ("validate.table={folder}/0.png", "validate.table"),
    "no column": ("validate.table={folder}/short.csv", "short.csv: column 'text' is missing"),
    # The middle of a path may be left out, where the folders of tests are deep.
    "too small": ("data.buckets={512px: {1: [1.0, 2]}}", "/clips.csv: data.buckets: none of the 12 samples fits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_held_out_table_that_cannot_be_used_is_one_line(folder: Path, case: str) -> None:
    (folder / "short.csv").write_text("path,num_frames,height,width,fps\n0.png,1,32,32,\n")
    override, said = (text.replace("{folder}", str(folder)) for text in REFUSED[case])
    with pytest.raises(UserError) as caught:
        held_out(folder, override)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert case == "no column" or str(caught.value).startswith("validate.table")


PROMPTS = {
    "no file": ("validate.prompt_csv=nowhere.csv", "validate.prompt_csv=nowhere.csv: "),
    "no reference": ("validate.cond_type=i2v_head", "validate.cond_type=i2v_head: needs references"),
    "a reference that is not there": ("validate.ref=a.png", "validate.ref: 1 reference for a clip, cond_type=t2v"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_and_references_are_checked_before_a_start(folder: Path, case: str) -> None:
    override, said = PROMPTS[case]
    size = "validate.sampling={width: 32, height: 32, num_frames: 5}"
    cfg = load_config(RunConfig, folder / "run.yaml", ["validate.prompts=[a]", size, override])
    with pytest.raises(UserError) as caught:
        check_prompts(cfg, 1)
    assert str(caught.value).startswith(said)


def test_what_cannot_be_read_is_grey_and_stated(folder: Path) -> None:
    (folder / "4.png").write_bytes(b"no picture")
    held = held_out(folder)
    bucket = next(m.bucket for m in held.micro_batches if m.bucket.resolution == "32px")
    (batch,) = read_batches(
        held.table, held.plan, held.data, iter([MicroBatch(bucket, (2, 4), 0)]), 0, substitutes=False
    )
    ((sample, substitute, why),) = batch.replaced
    assert (sample, substitute) == (4, 4) and "4.png" in why
    pixels = batch.pixels  # type: ignore[union-attr]
    assert pixels is not None and (pixels[1] == 128).all() and (pixels[0] == 40).all()


def test_bins_share_out_the_time_and_draw_for_themselves() -> None:
    """Prompts are never dropped, kinds of references are; noise and times belong to (seed, sample, bin)."""
    torch.manual_seed(0)
    prepare = preparation(ToyAutoencoder(torch.randn(4, 3)), ConditioningConfig(references={"i2v_head": 1.0}))
    _, prepared = in_bins(prepare, 4, 11)
    seen = []
    for index, one in enumerate(prepared):
        assert one.times is not None and one.seed == 11
        times = one.times(11, index, tuple(range(200)), None)  # type: ignore[arg-type]
        assert index / 4 <= times.min() < index / 4 + 0.02 and (index + 1) / 4 - 0.02 < times.max() <= (index + 1) / 4
        assert torch.equal(times[7:9], one.times(11, index, (7, 8), None))  # type: ignore[arg-type]
        assert one.conditioning.dropout.text == one.conditioning.dropout.pooled == 0
        seen.append(times - index / 4)
    assert not torch.allclose(seen[0], seen[1])


def test_bins_of_an_expert_are_of_its_own_times() -> None:
    prepare = preparation(ToyAutoencoder(torch.randn(4, 3)), ConditioningConfig())
    expert = RectifiedFlow(RectifiedFlowConfig(t_min=0.5, t_max=0.9))
    _, prepared = in_bins(dataclasses.replace(prepare, objective=expert), 2, 11)
    times = [one.times(11, 0, tuple(range(200)), None) for one in prepared]  # type: ignore[misc, arg-type]
    assert 0.5 <= times[0].min() < 0.51 and 0.69 < times[0].max() <= 0.7 <= times[1].min() and times[1].max() > 0.89
    assert bin_edges(expert, 2) == pytest.approx([0.5, 0.7, 0.9])
    named = records(Totals(("a",), 2), torch.zeros(1, 2, 3), bin_edges(expert, 2))
    assert {"validate/bin/0.50-0.70", "validate/bin/0.70-0.90"} < set(named)


def test_means_are_over_latent_values() -> None:
    totals = Totals(("a", "b"), 2)
    for name, index, loss, values in (("a", 0, 6.0, 3), ("a", 1, 3.0, 3), ("b", 0, 10.0, 1), ("b", 1, 1.0, 1)):
        pair = torch.tensor([loss, 100.0]), torch.tensor([values, 7]), torch.tensor([True, False])
        totals.add(name, index, *pair, samples=1)
    found = records(totals, totals.sums, [0.0, 0.5, 1.0])
    assert found["validate/loss"] == 20 / 8 and found["validate/samples"] == 2
    assert found["validate/bin/0.00-0.50"] == 16 / 4 and found["validate/bin/0.50-1.00"] == 4 / 4
    assert found["validate/bucket/a"] == 9 / 6 and found["validate/bins/b"] == [10.0, 1.0]


def averaged_and_back(offload: str) -> list[float]:
    """Differences: model within from the average, and everything afterwards from before."""
    cfg = ParallelConfig(zero=1, offload=offload)  # type: ignore[arg-type]
    mesh = meshes.build(cfg.mesh, 1, torch.device("cpu"))
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, torch.device("cpu"), fill)
    engine: Any = build_engine(model, cfg, OptimConfig(kind="sgd", lr=0.1, ema_decay=0.5), mesh)
    for shadow in engine.ema.shadow.values():
        shadow.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in (*engine.held(), *engine.full_weights("live"))}
    average = {name: weight.clone() for name, weight in engine.full_weights("ema")}
    with engine.averaged() as is_average:
        assert is_average
        within = max(float((weight - average[name]).abs().max()) for name, weight in engine.full_weights("live"))
    after = dict([*engine.held(), *engine.full_weights("live")])
    return [within, max(float((after[name] - tensor).abs().max()) for name, tensor in before.items())]


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_the_average_takes_the_place_of_the_weights_and_goes_back(offload: str) -> None:
    assert run_distributed(averaged_and_back, 1, offload) == [[0.0, 0.0]]


def test_a_round_is_an_event_that_records_do_not_see(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"loss": 1.0})
        assert not logger.was_validated(1)
        logger.log_validation(1, {"validate/loss": 2.0, "validate/bin/0.00-1.00": 2.0, "validate/bucket/a": 2.0})
        assert logger.was_validated(1) and not logger.was_validated(2)
        logger.log(2, {"loss": 0.5})
        logger.log_validation(2, {"validate/loss": 1.5, "validate/bin/0.00-1.00": 1.5, "validate/bucket/a": "nan"})
    with MetricsLogger(tmp_path, resumed_step=1) as logger:
        assert logger.was_validated(1) and not logger.was_validated(2)  # it will be made again
        logger.log(2, {"loss": 0.5})
        logger.log_validation(2, {"validate/loss": 1.5})
    rows, events = read_metrics(logger.path)
    assert [row["step"] for row in rows] == [1, 2]
    whole, bins, buckets = validation_curves(events)
    assert whole == {"held-out clips": ([1, 2], [2.0, 1.5])}
    assert bins == {"0.00-1.00": ([1], [2.0])} and buckets == {"a": ([1], [2.0])}
    loss_curve(logger.path, tmp_path / "loss.png")
    plain = tmp_path / "plain"
    with MetricsLogger(plain) as logger:
        logger.log(1, {"loss": 1.0})
    loss_curve(logger.path, plain / "loss.png")
    tall, flat = (Image.open(path / "loss.png").size for path in (tmp_path, plain))
    assert tall[1] == 3 * flat[1] and validation_curves([]) == []


def clip(path: Path, frames: int = 3) -> Clip:
    return Clip(
        path,
        np.zeros((frames, 8, 10, 3), np.uint8) + 40 * np.arange(frames, dtype=np.uint8)[:, None, None, None],
        8.0,
        "a dog",
    )


def test_tensorboard_gets_clips(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsLogger(tmp_path, tensorboard=True) as logger:
        assert logger.shows_clips
        logger.log_validation(7, {"validate/loss": 2.0})
        logger.show_clips(7, {"sample_0000": clip(tmp_path / "a.mp4")})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("validate/loss")] == [(7, 2.0)]
    (image,) = events.Images("validate/sample_0000")
    assert (image.step, image.width, image.height) == (7, 10, 8)
    path = tmp_path / "seen.gif"
    path.write_bytes(image.encoded_image_string)
    assert api.probe(str(path)).num_frames == 3


def test_wandb_gets_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    logged: list[Any] = []
    wandb = SimpleNamespace(
        api=SimpleNamespace(api_key="k"),
        init=lambda **given: SimpleNamespace(
            log=lambda values, step: logged.append((values, step)), finish=lambda: None
        ),
        Video=lambda path, caption, format: ("video", path, caption, format),
        Image=lambda path, caption: ("image", path, caption),
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    with MetricsLogger(tmp_path, wandb="offline") as logger:
        logger.show_clips(3, {"a": clip(Path("a.mp4")), "b": clip(Path("b.png"), 1)})
    assert logged == [
        ({"validate/a": ("video", "a.mp4", "a dog", "mp4"), "validate/b": ("image", "b.png", "a dog")}, 3)
    ]


def test_the_cost_is_fitted_from_steps_beside_rounds(folder: Path) -> None:
    """A round at every record leaves all of them to be fitted."""
    from opensora.planner import cost_fit

    cfg = load_config(RunConfig, folder / "run.yaml")
    plan = BatchPlan(read_table(str(folder / "clips.csv")), cfg.data, 8, 0)
    seen: list[set[int]] = []
    path = folder / "metrics.jsonl"
    with MetricsLogger(folder) as logger:
        for step in range(1, 5):
            logger.log(step, {"loss": 1.0, "time/step_s": 0.1, "data/wait_s": 0.0})
            logger.log_validation(step, {"validate/loss": 1.0})
    original = measured

    def noting(plan: Any, rows: Any, events: set[int]) -> Any:
        seen.append(events)
        return original(plan, rows, events)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="usable records"):
        patch.setattr(cost_fit, "measured", noting)
        patch.setattr(cost_fit, "LEAST_RECORDS", 100)
        cost_fit.calibrate(plan, path, 1)
    assert seen == [set()]


def test_choosing_does_not_read_a_plan_through(folder: Path) -> None:
    """A bucket of any size costs as much as the samples that are taken of it."""

    class Big:
        asked = 0

        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, place: int) -> int:
            Big.asked += 1
            return int(place)

    bucket = Bucket("32px", 1, 32, 32, 4)
    plan: Any = type("Plan", (), {})()
    plan.report = lambda: dataclasses.make_dataclass("R", ["per_bucket"])(((bucket, 10**12),))
    plan.members = lambda micro_batch: Big()
    found = choose(plan, 10, 3)
    assert Big.asked == 10 and [len(m.sample_ids) for m in found] == [4, 4, 2]
