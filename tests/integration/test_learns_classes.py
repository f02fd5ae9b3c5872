"""benchmarks/learns_classes.py, tiny and hardly trained: its data, training, samples, judgement and report."""

import csv
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learns_classes
from data_pipeline.shapes.judge import judge_clip, read_clip
from opensora.cli import sample, train
from tests.dist.harness import run_distributed

TINY = [
    *("model.hidden_size=24", "model.num_heads=2", "model.depth=1", "model.in_channels=8", "vae.channels=8"),
    *("data.buckets={32px:{1:[1.0,8]}}", "parallel.precision.compute=fp32", "train.log_every=1"),
]


def words(folder: Path, *more: str) -> list[str]:
    few = ["--steps", "3", "--stills", "48", "--processes", "1", "--seeds", "2", "--sheet", str(folder / "sheet.png")]
    return ["--out", str(folder), *few, *more, *TINY]


def run(argv: list[str]) -> str:
    """The benchmark in one process, its commands by their functions; what it prints."""

    def call(command: Sequence[object]) -> None:
        script = next(index for index, word in enumerate(command) if str(word).startswith("scripts/diffusion/"))
        main = train.main if str(command[script]).endswith("train.py") else sample.main
        assert main([str(word) for word in command[script + 1 :]]) == 0

    learns_classes.call = call  # type: ignore[assignment]
    with redirect_stdout(StringIO()) as said:
        learns_classes.main(argv)
    return said.getvalue()


def test_it_trains_samples_and_judges(tmp_path: Path) -> None:
    (said,) = run_distributed(run, 1, words(tmp_path), timeout=120, init=False)
    record = json.loads(said.strip().splitlines()[-1])
    assert record["steps"] == 3 and record["benchmark"] == "learns_classes"
    for solver in learns_classes.SAMPLERS:
        assert record[solver]["stills"] == 48
        assert 0 <= record[solver]["worst"] <= record[solver]["both"] <= record[solver]["colour"] <= 1
        assert len(list((tmp_path / "samples" / solver).rglob("*_1.png"))) == 24
    assert (tmp_path / "sheet.png").is_file()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_numbers_stand_for_what_stills_show(tmp_path: Path) -> None:
    """By the judge: every still of the training table, against the class that its number asks for."""
    learns_classes.render_stills(tmp_path, 48)
    asked = {row["text"]: (row["colour"], row["shape"], row["name"]) for row in rows(tmp_path / "classes.csv")}
    assert len(asked) == 24 == len({name for _, _, name in asked.values()}) and set(asked) == set(map(str, range(24)))
    table = rows(tmp_path / "train.csv")
    assert len(table) == 48 and {row["text"] for row in table} == set(asked)
    for row in table:
        seen = judge_clip(read_clip(tmp_path / row["path"]))
        assert asked[row["text"]] == (seen.colour, seen.shape, f"{seen.colour}_{seen.shape}")


def test_judged_right_is_what_shows_its_class(tmp_path: Path) -> None:
    learns_classes.render_stills(tmp_path / "data", 48)
    names = {row["text"]: row["name"] for row in rows(tmp_path / "data" / "classes.csv")}
    samples = tmp_path / "samples"
    samples.mkdir()
    for index, row in enumerate(rows(tmp_path / "data" / "train.csv")):
        number = int(row["text"])
        shown = number if number else 1  # stills of class 0 are said to be of another one, of the same colour
        (samples / f"{names[str(shown)]}_{index}.png").write_bytes((tmp_path / "data" / row["path"]).read_bytes())
    judged = learns_classes.judge("ddim", samples, tmp_path)
    wrong = judged.right.count(False)
    assert wrong == 2 == judged.shows("shape").count(False) and all(judged.shows("colour"))
    assert judged.by_class() == {names["1"]: (2, 4)} | {
        name: (2, 2) for number, name in names.items() if number not in ("0", "1")
    }
    assert next(iter(judged.by_class())) == names["1"]


def test_as_many_updates_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a run that is there stay, or its learning rate would."""
    said: list[list[str]] = []
    monkeypatch.setattr(learns_classes, "call", lambda command: said.append([str(word) for word in command]))
    monkeypatch.setattr(learns_classes, "measured", lambda given, processes: 0.25 / processes)
    asked = ["--out", str(tmp_path), "--minutes", "2", "--processes", "2", "optim.lr=0.001"]
    args: Any = learns_classes.parse_arguments(asked)
    learns_classes.train(args)
    assert {"train.steps=960", "optim.warmup_steps=19", "optim.lr=0.001", f"output={tmp_path}"} <= set(said[0])
    assert {"data.micro_batches=2", "data.buckets={32px:{1:[1.0,16]}}"} <= set(said[0])
    saved = (learns_classes.ROOT / learns_classes.CONFIG).read_text()
    run_folder = learns_classes.folder_of_run(args)
    run_folder.mkdir()
    (run_folder / "config.yaml").write_text(saved)
    learns_classes.train(args)
    steps = next(word for word in said[1] if word.startswith("train.steps="))
    assert f"{steps.removeprefix('train.steps=')}, log_every" in saved.replace("train: {steps: ", "")
