import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from opensora.utils import console, metrics_log
from opensora.utils.charts import _fitting, contact_sheet, loss_curve, running_mean
from opensora.utils.console import announce, launched_rank, progress
from opensora.utils.errors import UserError
from opensora.utils.metrics_log import MetricsLogger, read_metrics


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_the_rank_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert launched_rank() == 0  # a batch script, not a step
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert launched_rank() == 3
    monkeypatch.setenv("RANK", "1")
    assert launched_rank() == 1


def test_one_line_per_record_at_once(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "run")
    logger.log(10, {"loss": 0.5, "lr": 1e-4})
    records, events = read_metrics(logger.path)  # before close: a crash loses nothing
    assert records == [{"step": 10, "loss": 0.5, "lr": 1e-4}] and events == []
    logger.close()
    logger.close()


def test_what_json_cannot_hold_is_text(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"loss": math.nan, "norm": math.inf})
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == [{"step": 1, "loss": "nan", "norm": "inf"}]


def test_a_resume_cuts_what_it_will_write_again(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        for step in (10, 20, 30):
            logger.log(step, {"loss": 1.0})
        logger.log_event("interrupted", 30, signal="SIGTERM")
    with logger.path.open("a") as file:
        file.write('{"step": 40, "lo')  # a crash in the middle of a line
    with MetricsLogger(tmp_path, resumed_step=20) as logger:
        logger.log_event("resumed", 20)
        logger.log(30, {"loss": 0.9})
    records, events = read_metrics(logger.path)
    assert [(record["step"], record["loss"]) for record in records] == [(10, 1.0), (20, 1.0), (30, 0.9)]
    assert events == [{"step": 20, "event": "resumed"}]
    assert _steps(logger.path) == [10, 20, 20, 30]


def test_an_interruption_at_the_saved_step_stays(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log_event("interrupted", 7)
    with MetricsLogger(tmp_path, resumed_step=7) as logger:
        logger.log_event("resumed", 7)
    assert [event["event"] for event in read_metrics(tmp_path / "metrics.jsonl")[1]] == ["interrupted", "resumed"]


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log(10, {"loss": 1.0})
    with MetricsLogger(tmp_path) as logger:
        logger.log(5, {"loss": 1.0})
    assert _steps(logger.path) == [5]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsLogger(tmp_path, tensorboard=True) as logger:
        logger.log(10, {"loss": 0.5, "note": "text"})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 0.5)]
    assert events.Tags()["scalars"] == ["loss"]


@pytest.mark.parametrize(
    ("module", "asked", "hint"),
    [
        ("wandb", {"wandb": "offline"}, "log.wandb=offline: wandb is not installed; pip install wandb"),
        ("torch.utils.tensorboard", {"tensorboard": True}, "log.tensorboard=true: tensorboard is not installed"),
    ],
)
def test_an_absent_writer_is_named(
    module: str, asked: dict[str, Any], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=hint):
        MetricsLogger(tmp_path, **asked)


class FakeWandb:
    def __init__(self, key: str | None) -> None:
        self.api = SimpleNamespace(api_key=key)
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    def init(self, **arguments: Any) -> "FakeWandb":
        self.started = arguments
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize(
    ("wanted", "key", "mode", "messages"),
    [("online", None, "offline", 1), ("online", "abc", "online", 0), ("offline", "abc", "offline", 0)],
)
def test_wandb_gets_a_copy_and_goes_offline_without_a_key(
    wanted: Any, key: str | None, mode: str, messages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, said = FakeWandb(key), []
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(metrics_log, "announce", said.append)
    with MetricsLogger(tmp_path / "trial", wandb=wanted, config={"seed": 1}) as logger:
        logger.log(10, {"loss": 0.5, "note": "text"})
    assert fake.started["mode"] == mode and fake.started["name"] == "trial" and fake.started["config"] == {"seed": 1}
    assert fake.logged == [({"loss": 0.5}, 10)] and fake.finished
    assert len(said) == messages


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb("abc")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    names = []
    for step in (0, 10, 0):  # started, resumed, started afresh
        MetricsLogger(tmp_path / "trial", wandb="offline", resumed_step=step).close()
        names.append(fake.started["id"])
    assert names[0] == names[1] != names[2] and all(name.startswith("trial-") for name in names)


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        announce(f"from {rank}")
    err = capsys.readouterr().err
    assert "from 0" in err and "from 1" not in err


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    bar = progress(100, initial=50, every_s=10)
    values = {"loss": 0.25, "rate/tokens_per_s": 12345.6, "time/step_s": 1.5}
    for step, now in ((51, 101.0), (55, 105.0), (60, 112.0), (100, 113.0)):  # noqa: B007
        bar.update_to(step, values)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 51/100", "step 60/100", "step 100/100"]
    assert lines[1] == "step 60/100, loss 0.2500, 12,346 tokens/s, 1.5 s/step, ETA 0:00:48"


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress(10, initial=5)
    bar.update_to(10, {"loss": 0.25})
    bar.close()
    err = capsys.readouterr().err
    assert "10/10" in err and "loss 0.2500" in err


def test_a_contact_sheet_shows_evenly_spaced_frames_and_its_title(tmp_path: Path) -> None:
    video = np.zeros((9, 32, 48, 3), dtype=np.uint8)
    video[:, :, :, 0] = (np.arange(9) * 30)[:, None, None]
    still = np.full((1, 64, 32, 3), 200, dtype=np.uint8)
    path = tmp_path / "made" / "sheet.png"
    contact_sheet([("a red circle " * 40, video), ("a still", still)], path, columns=3, frame_height=32)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (8 + 2 * (22 + 32 + 8), 480, 3)
    middle = sheet[8 + 22 + 16]
    assert [tuple(middle[8 + i * 56 + 24]) for i in range(3)] == [(0, 0, 0), (120, 0, 0), (240, 0, 0)]
    assert tuple(sheet[8 + 62 + 22 + 16, 8 + 8]) == (200, 200, 200)
    assert sheet[8:28].min() < 100 and sheet[8:28, -6:].min() == 255  # a title is drawn and does not run over


def test_references_stand_framed_beside_their_clips(tmp_path: Path) -> None:
    """All clips of a sheet begin where the one with most references does; the order is that of the references."""
    video, path = np.full((2, 32, 32, 3), 200, dtype=np.uint8), tmp_path / "sheet.png"
    red, blue = np.zeros((32, 48, 3), dtype=np.uint8), np.zeros((64, 64, 3), dtype=np.uint8)
    red[..., 0] = blue[..., 2] = 255
    contact_sheet([("a", video), ("b", video)], path, frame_height=32, references=[[red, blue], []])
    sheet = np.asarray(Image.open(path))
    first, second = sheet[8 + 22 + 16], sheet[8 + 62 + 22 + 16]
    assert tuple(first[8 + 24]) == (255, 0, 0) and tuple(first[8 + 56 + 16]) == (0, 0, 255)
    assert tuple(first[8 + 1]) == tuple(first[8 + 56 + 1]) == (255, 140, 0)
    left = 8 + (48 + 8) + (32 + 8)
    for row in (first, second):
        assert (row[left : left + 32] == 200).all() and tuple(row[left - 1]) == (255, 255, 255)
    assert (second[8:left] == 255).all()
    with pytest.raises(ValueError, match="1 lists, must be one for each of 2"):
        contact_sheet([("a", video), ("b", video)], path, references=[[red]])


LONG = {
    "800 words": "long " * 800,
    "a word of 100,000 letters": "w" * 100_000,
    "emoji": "😀👨\u200d👩" * 30_000,
    "from right to left": "\u05e9\u05dc\u05d5\u05dd \u0639\u0644\u064a\u0643\u0645 " * 20_000,
    "lines": "a\n" * 100_000,
    "accents on one letter": "e" + "\u0301" * 100_000,
    "no width at all": "\u200b" * 100_000,
    "controls and half characters": "\0\x1b[31m\ud800" * 20_000,
    "blanks before a word": " " * 100_000 + "word",
}


@pytest.mark.parametrize("kind", LONG)
def test_the_time_of_a_contact_sheet_does_not_grow_with_the_prompt(kind: str, tmp_path: Path) -> None:
    video = np.zeros((2, 32, 48, 3), dtype=np.uint8)

    def seconds(title: str) -> float:
        start = time.process_time()
        contact_sheet([(title, video)], tmp_path / "sheet.png")
        return time.process_time() - start

    short = min(seconds("a red circle") for _ in range(3))
    assert min(seconds(LONG[kind]) for _ in range(3)) < max(0.1, 10 * short)
    assert np.asarray(Image.open(tmp_path / "sheet.png"))[8:28, -6:].min() == 255  # the title does not run over


def test_a_title_is_cut_where_the_sheet_ends() -> None:
    font = ImageFont.load_default(size=14)
    words = " ".join(f"word{number}" for number in range(200))
    shown = _fitting(words, font, 464)
    assert words.startswith(shown.removesuffix("...")) and font.getlength(shown) <= 464
    longer = words[: len(shown.removesuffix("...")) + 2] + "..."
    assert font.getlength(longer) > 464
    assert _fitting("  a\n short  one ", font, 464) == "a short one" and _fitting("", font, 464) == ""


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_a_contact_sheet_refuses_other_arrays(frames: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        contact_sheet([("x", frames)], tmp_path / "x.png")


def test_the_loss_curve_marks_where_the_run_was_cut(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    for folder in (plain, marked):
        with MetricsLogger(folder) as logger:
            for step in range(10, 110, 10):
                logger.log(step, {"loss": 1 / step})
            if folder is marked:
                logger.log_event("interrupted", 50)
        loss_curve(logger.path, folder / "loss.png")
    images = [np.asarray(Image.open(folder / "loss.png").convert("RGB")).astype(int) for folder in (plain, marked)]
    red = [((image[..., 0] > 180) & (image[..., 1] < 90) & (image[..., 2] < 90)).sum() for image in images]
    assert red[0] == 0 and red[1] > 100


def test_the_loss_curve_needs_a_loss(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"loss": math.nan})
    with pytest.raises(ValueError, match="holds no loss"):
        loss_curve(logger.path, tmp_path / "loss.png")


def test_the_running_mean_starts_at_the_first_value() -> None:
    assert np.allclose(running_mean(np.full(5, 3.0)), 3.0)
    assert running_mean(np.array([0.0, 1.0]))[1] == pytest.approx(0.1 / 0.19)


def test_importing_loads_no_optional_package() -> None:
    program = (
        "import sys, opensora.utils.console, opensora.utils.charts\n"
        "print(sorted({'wandb', 'tensorboard', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]"
