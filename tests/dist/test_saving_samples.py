"""Clips to files: every process uses the same names, nothing of another job is replaced, nothing is half written."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from opensora.config.run import SampleConfig
from opensora.inference.prompts import read_jobs
from opensora.inference.save import Saver, output_folder, unused_names
from opensora.sampling.options import SamplingOption
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import read_text
from tests.dist.harness import run_distributed


def config(folder: Path, frames: int = 1, **more: Any) -> SampleConfig:
    option = SamplingOption(width=16, height=16, num_frames=frames, fps=8)
    return SampleConfig(
        weights="w", **({"prompts": ("a", "b")} | more), sampling=option, save_dir=str(folder), vae_parallel="off"
    )


def write(cfg: SampleConfig, before_saving: Callable[[], None] | None = None) -> list[str]:
    """What sampling does around the model: every process makes one of the clips, in the colour of its number."""
    jobs = unused_names(cfg, read_jobs(cfg))
    if before_saving and dist.get_rank() == 0:
        before_saving()
    dist.barrier()
    mesh = SimpleNamespace(is_first_of_sample=True)
    saver = Saver(cfg, SimpleNamespace(mesh=mesh, prompt_suffix=True, published_prompts=False))  # type: ignore[arg-type]
    for index, job in enumerate(jobs):
        if index % dist.get_world_size() == dist.get_rank():
            saver.save([job], torch.full((1, 3, cfg.sampling.num_frames, 16, 16), index / len(jobs)))
    return saver.finish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def twice(cfg: SampleConfig, overwriting: SampleConfig) -> list[list[str]]:
    return [write(cfg), write(cfg), write(overwriting)]


@pytest.mark.parametrize("frames", [1, 5])
def test_a_second_job_replaces_nothing(frames: int, tmp_path: Path) -> None:
    cfgs = config(tmp_path, frames), config(tmp_path, frames, overwrite=True)
    first, second, third = run_distributed(twice, 2, *cfgs, timeout=60)[0]
    folder, suffix = output_folder(cfgs[0]), "png" if frames == 1 else "mp4"
    stems = [f"sample_{number:04d}" for number in range(4)]
    assert [Path(path).name for path in first] == [f"{s}.{suffix}" for s in stems[:2]] + ["contact_sheet.png"]
    assert [Path(path).name for path in second] == [f"{s}.{suffix}" for s in stems[2:]] + ["contact_sheet_1.png"]
    assert third == first
    files = {f"{stem}.{kind}" for stem in stems for kind in (suffix, "txt")}
    assert set(names(folder)) == files | {"contact_sheet.png", "contact_sheet_1.png"}
    words = "" if frames == 1 else " 8 FPS."
    assert [read_text(folder / f"{stem}.txt") for stem in stems] == [
        f"{text}{words} 4 motion score.\n" for text in "abab"
    ]


def test_the_sheet_shows_what_clips_were_made_from(tmp_path: Path) -> None:
    """The first frames of references, in their order, to the left of the clip and inside a border."""
    for name, colour in (("red", "#ff0000"), ("blue", "#0000ff")):
        Image.new("RGB", (40, 20), colour).save(tmp_path / f"{name}.png")
    cfg = config(tmp_path / "with", 5, ref=f"{tmp_path / 'red.png'};{tmp_path / 'blue.png'}")
    *_, path = run_distributed(write, 1, cfg, timeout=60)[0]
    *_, plain = run_distributed(write, 1, config(tmp_path / "without", 5), timeout=60)[0]
    sheet, without = np.asarray(Image.open(path)), np.asarray(Image.open(plain))
    row = slice(8 + 22, 8 + 22 + 96)
    assert sheet[row][48, [8 + 48, 8 + 104 + 48]].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert (sheet[row, 8 + 2 * 104 : 8 + 7 * 104 - 8] == without[row, 8 : 8 + 5 * 104 - 8]).all()


class Intruder:
    """Another job that takes names after they were decided."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        for name in ("sample_0001.png", "contact_sheet.png"):
            (self.folder / name).write_bytes(b"theirs")


def test_two_jobs_at_once_lose_nothing(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    folder = output_folder(cfg)
    made = run_distributed(write, 2, cfg, Intruder(folder), timeout=60)[0]
    assert [Path(path).name for path in made] == ["sample_0000.png", "sample_0001_1.png", "contact_sheet_1.png"]
    assert (folder / "sample_0001.png").read_bytes() == (folder / "contact_sheet.png").read_bytes() == b"theirs"
    assert (folder / "sample_0001_1.txt").is_file() and not [name for name in names(folder) if "tmp" in name]


def refused(cfg: SampleConfig) -> str:
    try:
        unused_names(cfg, read_jobs(cfg))
    except UserError as error:
        return str(error)
    return "accepted"


def test_a_place_that_cannot_be_written_is_refused_on_every_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = run_distributed(refused, 2, config(tmp_path / "file"), timeout=60)
    assert said[0] == said[1] and said[0].startswith(f"save_dir={tmp_path}/file/image_16x16: cannot be written")
    said = run_distributed(refused, 2, config(tmp_path / ("long" * 80)), timeout=60)
    assert said[0] == said[1] and "cannot be written (File name too long)" in said[0]
    assert names(tmp_path) == ["file"]


def test_a_name_that_this_file_system_cannot_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opensora.inference import save

    table = tmp_path / "t.csv"
    table.write_text("text,name\na,16:9?\n")
    cfg = config(tmp_path / "out", prompts=(), prompt_csv=str(table))
    assert [job.name for job in save._decide(cfg, read_jobs(cfg), output_folder(cfg))] == ["16:9?"]
    assert not list(output_folder(cfg).iterdir())
    monkeypatch.setattr(Path, "touch", lambda *_, **__: (_ for _ in ()).throw(OSError(22, "Invalid argument")))
    with pytest.raises(UserError, match=r"no file there can be called '16:9\?' \(Invalid argument\)"):
        save._decide(cfg, read_jobs(cfg), output_folder(cfg))


@pytest.mark.parametrize("name", ["sample_0001.mp4", "sample_0000.txt", "contact_sheet.png"])
def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, 5, overwrite=True)
    (output_folder(cfg) / name).mkdir(parents=True)
    (output_folder(cfg) / "sample_0000.png").mkdir()  # of a still, and in nobody's way
    (said,) = run_distributed(refused, 1, cfg, timeout=60)
    assert said == f"overwrite=true: {output_folder(cfg) / name} is a folder; move it away, or give another name"
    (said,) = run_distributed(refused, 1, config(tmp_path, 5), timeout=60)
    assert said == "accepted"


@pytest.mark.parametrize("name", ["n" * 251, "😀" * 62, "é" * 125])
def test_the_longest_names_are_written(name: str, tmp_path: Path) -> None:
    """A file name has 255 bytes, and so has that of what is written aside."""
    (tmp_path / "prompts.csv").write_text(f"text,name\na,{name}\n", encoding="utf-8")
    cfg = config(tmp_path, prompts=(), prompt_csv=str(tmp_path / "prompts.csv"))
    run_distributed(write, 1, cfg, timeout=60)
    assert names(output_folder(cfg)) == sorted([f"{name}.png", f"{name}.txt", "contact_sheet.png"])
