"""Parts, defaults and objectives that a file of Open-Sora 1.x leaves out, or has otherwise than what it is for."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora.config.family import keys as table
from opensora.config.family import read_family
from opensora.config.load import load_config, save
from opensora.config.mmengine import read_python
from opensora.config.run import SAVED_NAME, RunConfig, SampleConfig
from opensora.config.schema import plain
from opensora.inference import find
from opensora.schedulers import OBJECTIVE_CONFIGS
from opensora.utils.errors import UserError
from tests.unit.test_second_family_configs import FILES as SECOND

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SAMPLING, TRAINING = CONFIGS / "opensora/inference/16x256x256.py", CONFIGS / "opensora/train/16x256x256.py"
FLAT: dict[str, Any] = {"num_frames": 16, "image_size": (256, 256), "data_path": None, "batch_size": 8}
WORDS: dict[type, list[str]] = {
    RunConfig: ["--data-path", "c.csv", "--ckpt-path", "FILE"],
    SampleConfig: ["--prompt", "a cat", "--ckpt-path", "FILE"],
}
JOBS: list[tuple[type, Path]] = [(SampleConfig, SAMPLING), (RunConfig, TRAINING)]


def edited(path: Path, folder: Path, **changes: Any) -> Path:
    """A copy with values that are others, a line each."""
    values = read_python(path)[0] | changes
    (folder / "run.py").write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))
    return folder / "run.py"


def line_of(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.startswith(f"{name} ="))


def loaded(cls: type, path: Path, *words: str) -> Any:
    return load_config(cls, path, [*WORDS[cls], *words])


def outcome(call: Callable[[], Any]) -> str:
    """read, or the one line of a refusal."""
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return "read"


def refusal(cls: type, path: Path, *words: str) -> str:
    return outcome(lambda: loaded(cls, path, *words))


@pytest.mark.parametrize(("cls", "path"), JOBS)
@pytest.mark.parametrize("section", ["model", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize("given", ["absent", None, {}, {"foo": 1}, {"type": None}])
def test_a_part_without_its_type_is_missing(cls: type, path: Path, section: str, given: Any, tmp_path: Path) -> None:
    """Whatever it is that says nothing of it; the message has the family's key, and the line if there is one."""
    made = edited(path, tmp_path, **{section: given})
    if given == "absent":
        text = "".join(line for line in made.read_text().splitlines(True) if not line.startswith(f"{section} ="))
        made.write_text(text)
    said = refusal(cls, made, *(["--ckpt-path", "FILE"] if section != "model" else []))
    if section == "model" and not isinstance(given, dict):
        assert said.startswith(f"{made}: names no model; a configuration of the family has model = dict(type=...)"), (
            said
        )
        return
    assert said.startswith(f"{section}.type: missing"), said
    place = "" if given == "absent" else f":{line_of(made, section)}"
    assert f"{made}{place}" in said, said


@pytest.mark.parametrize("given", [None, {}, {"from_pretrained": "W"}])
def test_training_of_open_sora_2_needs_its_autoencoder(given: Any, tmp_path: Path) -> None:
    (tmp_path / "image.py").write_text(SECOND["diffusion/train/image.py"])
    made = edited(tmp_path / "image.py", tmp_path, ae=given)
    said = refusal(RunConfig, made)
    assert said.startswith("ae.type: missing; model.type='flux' needs ae = dict(type=...)")
    assert said.endswith(f"({made}:{line_of(made, 'ae')})")


@pytest.mark.parametrize("section", ["dataset", "optim", "ae", "t5", "clip", "sampling_option"])
@pytest.mark.parametrize(("cls", "path"), JOBS)
def test_an_optional_part_that_is_none_is_absent(cls: type, path: Path, section: str, tmp_path: Path) -> None:
    flat = FLAT if cls is RunConfig and section == "dataset" else {}
    made = edited(path, tmp_path, **flat, **{section: None})
    found, lines = loaded(cls, made), made.read_text().splitlines(keepends=True)
    made.write_text("".join(line for line in lines if not line.startswith(f"{section} =")))
    assert plain(found) == plain(loaded(cls, made))


@pytest.mark.parametrize(("cls", "path"), JOBS)
def test_unknown_keys_of_a_scheduler_are_refused(cls: type, path: Path, tmp_path: Path) -> None:
    assert "scheduler.foo=1: unknown key" in refusal(cls, edited(path, tmp_path, scheduler={"type": "iddpm", "foo": 1}))


SCHEDULERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rflow": ({"type": "rflow"}, {"num_steps": 10, "guidance": 4.0}),
    "iddpm": ({"type": "iddpm"}, {"num_steps": 1000, "guidance": 4.0}),
    "a longer chain": ({"type": "iddpm", "diffusion_steps": 2000}, {"num_steps": 2000, "guidance": 4.0}),
    "of all": ({"type": "iddpm", "timestep_respacing": ""}, {"num_steps": 1000, "guidance": 4.0}),
    "chosen": ({"type": "iddpm", "timestep_respacing": "ddim25"}, {"num_steps": 25, "timestep_respacing": "ddim25"}),
    "dpm": ({"type": "dpm-solver", "num_sampling_steps": 20}, {"num_steps": 20, "guidance": 4.0}),
    "said": ({"type": "rflow", "num_sampling_steps": 7, "cfg_scale": 2.5}, {"num_steps": 7, "guidance": 2.5}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_a_scheduler_does_not_say_is_as_the_family_has_it(name: str, tmp_path: Path) -> None:
    """Not as Open-Sora 2 has it: 50 steps, guidance 7.5."""
    scheduler, expected = SCHEDULERS[name]
    option = loaded(SampleConfig, edited(SAMPLING, tmp_path, scheduler=scheduler)).sampling
    assert {key: getattr(option, key) for key in expected} == expected


def test_steps_that_nobody_says(tmp_path: Path) -> None:
    path = edited(SAMPLING, tmp_path, scheduler={"type": "dpm-solver"})
    assert refusal(SampleConfig, path).startswith("scheduler.num_sampling_steps: missing; type='dpm-solver' has no")
    assert loaded(SampleConfig, path, "--num-sampling-steps", "20").sampling.num_steps == 20
    twice = {"type": "iddpm", "num_sampling_steps": 10, "timestep_respacing": "20"}
    assert "num_sampling_steps says otherwise" in refusal(SampleConfig, edited(SAMPLING, tmp_path, scheduler=twice))


@pytest.mark.parametrize(("cls", "path"), JOBS)
@pytest.mark.parametrize(
    ("model", "length"),
    [
        ({"type": "STDiT-XL/2"}, 120),
        ({"type": "PixArt-XL/2"}, 120),
        ({"type": "STDiT2-XL/2"}, 200),
        ({"type": "STDiT3-XL/2"}, 300),
        ({"type": "STDiT2-XL/2", "model_max_length": 64}, 64),
    ],
)
def test_prompts_are_as_long_as_the_model_reads(
    cls: type, path: Path, model: dict[str, Any], length: int, tmp_path: Path
) -> None:
    scheduler = {"type": "iddpm", "num_sampling_steps": 4} if cls is SampleConfig else {"type": "iddpm"}
    encoder = {"type": "t5", "from_pretrained": "T5"}
    made = edited(path, tmp_path, model=model | {"from_pretrained": "W"}, text_encoder=encoder, scheduler=scheduler)
    cfg = loaded(cls, made)
    assert (cfg.text.max_tokens, cfg.model.model_max_length) == (length, length)


def habits(path: Path) -> tuple[str, str]:
    """(when captions are cleaned, precision of the tables)"""
    layer = read_family(RunConfig, path, WORDS[RunConfig])[0]
    return layer["text"].get("clean", "sampling"), layer["objective"]["tables"]


OF_1_1: list[dict[str, Any]] = [
    {},
    {"model": {"type": "STDiT2-XL/2", "from_pretrained": None, "enable_flashattn": True}},
    {"dataset": {"type": "VideoTextDataset", "data_path": None, "num_frames": 16, "image_size": (256, 256)}},
    {"bucket_config": {"256": {16: (1.0, 8)}}},
    {"mask_ratios": {"mask_no": 1.0}},
    {"scheduler": {"type": "iddpm-speed", "timestep_respacing": ""}},
]


@pytest.mark.parametrize("number", range(len(OF_1_1)))
def test_habits_are_those_of_the_first_release_that_can_read_a_file(number: int, tmp_path: Path) -> None:
    """Files of 1.1 say enable_flashattn, too, as those of 1.0 do; what only they say tells them apart."""
    model = {"type": "STDiT-XL/2", "from_pretrained": None, "enable_flashattn": True}
    made = edited(TRAINING, tmp_path, **({"model": model} | OF_1_1[number]))
    values = {name: value for name, value in read_python(made)[0].items() if name != "dataset" or number == 2}
    made.write_text("".join(f"{name} = {value!r}\n" for name, value in (values | FLAT).items()))
    assert habits(made) == (("sampling", "fp32") if number else ("always", "fp64"))


SAVED = {
    "iddpm": (TRAINING, WORDS[RunConfig]),
    "rectified_flow_v1": (CONFIGS / "opensora/train/16x256x256-spee-rflow.py", WORDS[RunConfig]),
    "rectified_flow": (CONFIGS / "train/stage1.yaml", ["data.table=c.csv"]),
}
SAMPLED = {
    "iddpm": CONFIGS / "opensora/inference/16x512x512.py",
    "dpm": CONFIGS / "pixart/inference/16x256x256.py",
    "rectified_flow_v1": CONFIGS / "opensora/inference/16x512x512-rflow.py",
}


@pytest.mark.parametrize("trained", OBJECTIVE_CONFIGS)
@pytest.mark.parametrize("sampled", SAMPLED)
def test_a_run_is_sampled_by_its_own_objective(
    trained: str, sampled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that names another kind is refused; of the same kind its options hold."""
    if trained not in SAVED:
        pytest.skip(f"{trained}: registered by another test")
    path, words = SAVED[trained]
    save(load_config(RunConfig, path, words), tmp_path / SAVED_NAME)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(find, "check_weights", lambda *_: None)
    monkeypatch.setattr(find, "_check_as_trained", lambda *_, **__: None)  # the models differ as well
    cfg = load_config(SampleConfig, SAMPLED[sampled], ["--prompt", "a cat", "--ckpt-path", str(tmp_path)])
    assert cfg.objective is not None
    if cfg.objective.kind == trained:
        assert find.find_source(cfg).objective == cfg.objective
        return
    said = outcome(lambda: find.find_source(cfg))
    assert f"objective.kind={cfg.objective.kind}: weights={tmp_path} were trained with objective.kind={trained}" in said
    assert "scheduler" in said


def test_a_solver_is_no_training(tmp_path: Path) -> None:
    said = refusal(RunConfig, edited(TRAINING, tmp_path, scheduler={"type": "dpm-solver"}))
    assert said.startswith("scheduler.type='dpm-solver': samples only") and "iddpm" in said


@pytest.mark.parametrize("name", ["Nope", "text", "VideoTextDatase", 3, ["VideoTextDataset"]])
def test_a_data_set_of_no_clips(name: Any, tmp_path: Path) -> None:
    values = {"type": name, "data_path": None, "num_frames": 16, "image_size": (256, 256)}
    said = refusal(RunConfig, edited(TRAINING, tmp_path, dataset=values))
    assert said.startswith(f"dataset.type={name!r}: ") and "VideoTextDataset" in said
    for known in table.DATASETS:
        loaded(RunConfig, edited(TRAINING, tmp_path, dataset=values | {"type": known}))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("image_size", 256, "must be two whole numbers"),
        ("image_size", "256", "must be two whole numbers"),
        ("image_size", (256,), "must be two whole numbers"),
        ("image_size", None, "missing; clips of one shape need num_frames, image_size, batch_size"),
        ("num_frames", None, "missing; clips of one shape need"),
        ("batch_size", None, "missing; clips of one shape need"),
    ],
)
def test_a_shape_that_is_none_is_named_where_it_stands(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    made = edited(TRAINING, tmp_path, **(FLAT | {"dataset": None, key: value}))
    said = refusal(RunConfig, made)
    assert said.startswith(key) and reason in said and f"({made}:{line_of(made, key)})" in said, said


def test_a_size_of_adam_is_given_or_the_familys(tmp_path: Path) -> None:
    given: dict[str, Any] = {"cls": "HybridAdam", "lr": 1e-4}
    assert loaded(RunConfig, edited(TRAINING, tmp_path, optim=given | {"eps": 1e-6})).optim.eps == 1e-6
    assert loaded(RunConfig, edited(TRAINING, tmp_path, optim=given)).optim.eps == 1e-8
    assert loaded(RunConfig, edited(TRAINING, tmp_path, adam_eps=1e-7)).optim.eps == 1e-7


def test_a_shape_given_twice_is_refused(tmp_path: Path) -> None:
    """By any name and number of frames, once as text and once as a number."""
    rng = random.Random(14)
    for _ in range(20):
        name, frames = rng.choice((144, 256, 512)), rng.choice((1, 16, 51))
        twice: Any = {str(name): {frames: (1.0, 8)}, name: {17: (1.0, 4)}}
        if rng.random() < 0.5:
            twice = {str(name): {frames: (1.0, 8), str(frames): (1.0, 4)}}
        made = edited(TRAINING, tmp_path, bucket_config=twice, dataset={"type": "VariableVideoTextDataset"})
        said = refusal(RunConfig, made)
        assert "twice" in said and str(name) in said and f":{line_of(made, 'bucket_config')})" in said
