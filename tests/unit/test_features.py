"""Stored features: equal to what training would encode, made in pieces by any processes, refused when stale."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from acceleration.distributed.mesh import view
from opensora import precompute as module
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.loading.feature_store import FeatureStore, shard_name
from opensora.datasets.loading.loader import build_loader
from opensora.precompute import precompute
from opensora.train.preparation import Tokens
from opensora.train.setup import build_preparation, check
from opensora.utils.errors import UserError
from tests.integration.conftest import CONFIG
from tests.text_models import write_clip_vision
from tests.unit.test_decode import encode

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine clips, one of them broken, and a configuration that trains on them in windows of 5 and 9 frames."""
    root = tmp_path_factory.mktemp("features")
    lines = ["path,text,num_frames,height,width,fps"]
    for i in range(9):
        frames = 7 if i % 2 else 20
        encode(root / f"{i}.mp4", frames, size=(40, 40))
        lines.append(f"{i}.mp4,clip number {i},{frames},40,40,24")
    (root / "3.mp4").write_bytes(b"broken")
    (root / "t.csv").write_text("\n".join(lines))
    config = CONFIG.format(output=root / "runs", table=root / "t.csv")
    (root / "train.yaml").write_text(config.replace("      1: [1.0, 3]\n", "").replace("[[1.0, 0.5], 2]", "[1.0, 2]"))
    return root


def configuration(folder: Path, *overrides: str) -> RunConfig:
    plain = ["parallel.mesh.ulysses=1", "data.workers=0", "flow.text_dropout=0.5", "data.crop=random"]
    return load_config(RunConfig, folder / "train.yaml", [*plain, *overrides])


def tokens(cfg: RunConfig, steps: range, workers: int = 0) -> Iterator[Tokens]:
    """What the model is given at each step, as the training loop makes it."""
    cfg = replace(cfg, data=replace(cfg.data, workers=workers))
    table, plan = check(cfg, 1)
    prepare = build_preparation(cfg, view({}), CPU)
    batches = build_loader(
        table, plan, cfg.data, start_step=steps.start, stop_step=steps.stop, dp_rank=0, dp_degree=1, seed=cfg.seed
    )
    for step in steps:
        for _ in plan.assign(step, 0, 1):
            yield prepare(next(batches), step)
    batches.close()


def assert_equal(ours: Iterator[Tokens], theirs: Iterator[Tokens]) -> int:
    count = 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.targets["velocity"], b.targets["velocity"])
        for name, value in a.inputs.items():
            assert torch.equal(value, b.inputs[name]) if torch.is_tensor(value) else value == b.inputs[name], name
        count += 1
    return count


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """Two epochs, in shards of two micro-batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD_BATCHES", 2)
        assert precompute(configuration(folder), folder / "made", 2)
    return folder / "made"


@pytest.mark.parametrize("workers", [0, 1])
def test_the_model_is_given_the_same(folder: Path, made: Path, workers: int) -> None:
    """Two whole epochs, broken clip and dropped prompts included, bit for bit."""
    cfg = configuration(folder)
    _, plan = check(cfg, 1)
    steps = range(plan.steps_in_epoch(0) + plan.steps_in_epoch(1))
    stored = configuration(folder, f"data.features={made}")
    assert assert_equal(tokens(stored, steps, workers), tokens(cfg, steps)) >= 8


def test_tokens_of_first_frames_are_stored(folder: Path, tmp_path: Path) -> None:
    """Of a model that reads them, with the clips that go with them: no encoder is at work in training."""
    write_clip_vision(tmp_path)
    wan = "{kind: wan, size: debug, in_channels: 16, text_dim: 32, references: clip, image_dim: 16}"
    seen = [f"model={wan}", f"image_encoder={{kind: clip_vision, path: {tmp_path}}}"]
    cfg = configuration(folder, *seen, "conditioning.references={t2v: 1.0, i2v_head: 1.0}")
    assert precompute(cfg, tmp_path / "made", 1)
    _, plan = check(cfg, 1)
    stored = replace(cfg, data=replace(cfg.data, features=str(tmp_path / "made")))
    assert build_preparation(stored, view({}), CPU).encoders.image_encoder is None
    steps = range(plan.steps_in_epoch(0))
    assert assert_equal(tokens(stored, steps), tokens(cfg, steps)) >= 4
    shown = torch.cat([told.inputs["image_tokens"].flatten(1).any(1) for told in tokens(stored, steps)])
    assert shown.any() and not shown.all()


def test_later_epochs_use_the_windows_again(folder: Path, made: Path) -> None:
    cfg = configuration(folder)
    _, plan = check(cfg, 1)
    store = FeatureStore(made)
    later = next(m for m in plan.step(5 * plan.steps_in_epoch(0)))
    assert later.epoch == 5
    ids = later.sample_ids
    now = store.read(later).latents
    assert torch.equal(now, store.read(replace(later, epoch=1)).latents)
    assert torch.equal(now[:1], store.read(replace(later, epoch=1, sample_ids=ids[:1])).latents)
    assert not torch.equal(now, store.read(replace(later, epoch=0)).latents)


def test_any_number_of_processes_makes_the_same_in_any_number_of_goes(
    folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BATCHES", 2)
    cfg, out = configuration(folder), tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert precompute(cfg, out, 2) == (rank == "0")
    shards = sorted(path.name for path in made.glob("shard-*"))
    assert len(shards) >= 4 and shards == sorted(path.name for path in out.glob("shard-*"))
    for name in ("index.arrow", "manifest.json"):
        assert (out / name).read_bytes() == (made / name).read_bytes(), name
    for name in [*shards, "null.safetensors"]:
        assert same_tensors(out / name, made / name), name

    kept = (out / shard_name(0)).stat().st_mtime_ns
    (out / shard_name(1)).write_bytes(b"cut off")
    (out / shard_name(2)).unlink()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert precompute(cfg, out, 2)
    assert (out / shard_name(0)).stat().st_mtime_ns == kept
    assert all(same_tensors(out / name, made / name) for name in shards)


def same_tensors(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


STALE = {
    "autoencoder": (["vae.channels=12", "model.in_channels=12"], "vae.channels=12 (was 16)"),
    "text encoder": (["text.max_words=7"], "text.max_words=7 (was 32)"),
    "crop": (["data.crop=center"], "data.crop=center (was random)"),
    "buckets": (["data.buckets={32px: {5: [1.0, 2]}}"], "data.buckets="),
    "seed": (["seed=4"], "seed=4 (was 3)"),
    "decoder": (["data.decoder=decord"], "data.decoder=decord (was pyav)"),
    "background": (["data.background=black"], "data.background=black (was white)"),
    "table": ([], "data.table="),
    "draws": (["data.buckets={32px: {5: [0.5, 2]}}"], "data.buckets="),
}


@pytest.mark.parametrize("case", STALE)
def test_what_is_stale_is_refused_in_one_line(case: str, folder: Path, made: Path, tmp_path: Path) -> None:
    overrides, expected = STALE[case]
    if case == "table":
        text = (folder / "t.csv").read_text().replace("clip number 5", "another caption")
        (tmp_path / "t.csv").write_text(text)
        overrides = [f"data.table={tmp_path / 't.csv'}", f"data.root={folder}"]
    with pytest.raises(UserError, match=r"^data\.features=") as error:
        check(configuration(folder, f"data.features={made}", *overrides), 1)
    assert expected in str(error.value) and "\n" not in str(error.value)
    if case not in ("draws", "buckets"):
        with pytest.raises(UserError, match=r"^--out="):
            precompute(configuration(folder, *overrides), made, 1)


def test_where_clips_are_stored_and_how_training_is_spread_do_not_matter(
    folder: Path, made: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "t.csv", tmp_path / "moved.csv")
    others = [f"data.table={tmp_path / 'moved.csv'}", "data.micro_batches=2", "data.workers=3", "parallel.zero=1"]
    check(configuration(folder, f"data.features={made}", *others), 1)


def test_incomplete_damaged_or_too_short(folder: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    with pytest.raises(UserError, match="no such folder"):
        check(configuration(folder, f"data.features={out}"), 1)
    shutil.copytree(made, out)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not complete"):
        check(configuration(folder, f"data.features={out}"), 1)
    shutil.copy(made / "manifest.json", out)
    for path in out.glob("shard-*"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard-0000\d.safetensors: .*; remove it, and precompute again"):
        list(tokens(configuration(folder, f"data.features={out}"), range(2)))

    draws = ["data.buckets={32px: {5: [0.5, 2]}}"]
    assert precompute(configuration(folder, *draws), tmp_path / "draws", 1)
    check(
        configuration(folder, *draws, f"data.features={tmp_path / 'draws'}", "train.steps=1", "optim.warmup_steps=0"), 1
    )
    with pytest.raises(UserError, match=r"draws other buckets in each; .* --epochs"):
        check(configuration(folder, *draws, f"data.features={tmp_path / 'draws'}", "train.steps=99"), 1)


@pytest.mark.parametrize("name", ["manifest.json", "index.arrow", "null.safetensors", "shard-00003.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_named_before_the_work(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("it went to work")

    monkeypatch.setattr("opensora.precompute._encode", worked)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"^--out={tmp_path}: {name} in it is a folder, must be a file; move it away$"):
        precompute(configuration(folder), tmp_path, 1)


def test_the_command(folder: Path, made: Path, tmp_path: Path) -> None:
    from opensora.cli.precompute import main

    arguments: list[Any] = [folder / "train.yaml", "--out", tmp_path / "out", "data.workers=0"]
    assert main([str(a) for a in arguments]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["epochs"] == 1
    with pytest.raises(UserError, match="--epochs=0"):
        main([str(a) for a in [*arguments, "--epochs", "0"]])


def test_lookup_is_by_sample_and_epoch(made: Path) -> None:
    store = FeatureStore(made)
    assert len(store._key) == len(np.unique(store._key))
