"""The configurations of the Open-Sora family in configs/: their values, and what they become here."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from opensora.config.family import read_family, trains
from opensora.config.family.keys import SECTIONS
from opensora.config.load import load_config
from opensora.config.mmengine import read_python
from opensora.config.run import MODEL_CONFIGS, RunConfig, SampleConfig
from opensora.utils.errors import UserError
from tests import guide_configs

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
FOLDERS = ("opensora", "dit", "latte", "pixart", "opensora-v1-1", "opensora-v1-2", "opensora-v1-3")
FILES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for folder in FOLDERS
    for job in ("train", "inference")
    for path in (CONFIGS / folder / job).glob("*.py")
)


def published(golden: Path) -> dict[str, Any]:
    """File -> values, of the last release that changed it."""
    values: dict[str, Any] = {}
    for release in json.loads((golden / "v1/configs.json").read_text("utf-8")).values():
        values |= release["values"]
    return {
        name: value
        for name, value in values.items()
        if name.split("/")[0] in FOLDERS and name.split("/")[1] in ("train", "inference")
    }


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_every_file_of_the_family_is_here(golden: Path) -> None:
    assert set(published(golden)) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_values_are_the_published_ones(name: str, golden: Path) -> None:
    data, _ = read_python(CONFIGS / name)
    assert as_json(data) == published(golden)[name]


def layer_of(cls: type, path: Path, *words: str) -> dict[str, Any]:
    """What a file of the family is here, before it is put into classes."""
    layer, _, rest = read_family(cls, path, words)
    assert rest == []
    return layer


def subset(expected: dict[str, Any], found: dict[str, Any], at: str = "") -> None:
    for key, value in expected.items():
        assert key in found, f"{at}{key}"
        if isinstance(value, dict) and isinstance(found[key], dict) and not at.endswith("buckets."):
            subset(value, found[key], f"{at}{key}.")
        else:
            assert found[key] == value, f"{at}{key}"


def test_the_examples_are_those_of_the_guide(golden: Path, tmp_path: Path) -> None:
    found = [*golden.parent.glob("seeds/003_*.txt")]
    if not found:
        pytest.skip(f"no guide to the family's configurations beside {golden}")
    ours = (guide_configs.SAMPLING, guide_configs.TRAINING)
    for text, example in zip(guide_configs.examples_of(found[0]), ours, strict=True):
        (tmp_path / "theirs.py").write_text(text, encoding="utf-8")
        (tmp_path / "ours.py").write_text(example, encoding="utf-8")
        assert read_python(tmp_path / "theirs.py")[0] == read_python(tmp_path / "ours.py")[0]


def test_the_guide_to_sampling(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(guide_configs.SAMPLING)
    found = layer_of(SampleConfig, tmp_path / "run.py")
    parallel = {"attention": "auto", "norm_kernel": "auto", "zero": 3, "mesh": {"shard": 1, "ulysses": -1}}
    assert found.pop("parallel") == parallel
    assert found.pop("objective") == {"kind": "iddpm", "tables": "fp32"}
    found["text"] = dict(found["text"])
    assert found == {
        "model": {
            "kind": "stdit",
            "size": "xl2",
            "in_channels": 4,
            "model_max_length": 120,
            "space_scale": 1.0,
            "time_scale": 2 / 3,
        },
        "vae": {"kind": "sd", "path": "stabilityai/sd-vae-ft-ema", "micro_batch": 128},
        "text": {"kind": "t5", "t5_path": "DeepFloyd/t5-v1_1-xxl", "max_tokens": 120},
        "weights": "PRETRAINED_MODEL",
        "sampling": {
            "solver": "ddpm",
            "num_frames": 64,
            "height": 512,
            "width": 512,
            "fps": 12,
            "seed": 42,
            "num_steps": 100,
            "guidance": 7.0,
        },
        "batch_size": 1,
        "release": "1.1",
        "prompt_csv": "assets/texts/t2v_samples.txt",
        "prompt_suffix": False,
        "precision": "bf16",
        "save_dir": "samples",
    }


def test_the_guide_to_training(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(guide_configs.TRAINING)
    found = layer_of(RunConfig, tmp_path / "run.py")
    subset(
        {
            "name": "run",
            "output": "outputs",
            "seed": 42,
            "model": {"kind": "stdit", "size": "xl2", "space_scale": 1.0, "time_scale": 2 / 3, "model_max_length": 120},
            "vae": {"kind": "sd", "path": "stabilityai/sd-vae-ft-ema", "micro_batch": 128},
            "text": {"kind": "t5", "t5_path": "DeepFloyd/t5-v1_1-xxl", "max_tokens": 120, "shard": True},
            "objective": {"kind": "iddpm", "timestep_respacing": ""},
            "conditioning": {"dropout": {"text": 0.1, "pooled": 0.1}},
            "data": {"table": "CSV_PATH", "buckets": {"512x512": {64: [1.0, 4]}}, "workers": 4},
            "parallel": {
                "zero": 2,
                "recompute": {"kind": "full"},
                "precision": {"compute": "bf16"},
                "attention": "auto",
                "norm_kernel": "auto",
            },
            "optim": {"lr": 2e-5, "clip_norm": 1.0, "ema_decay": 0.9999, "eps": 1e-8, "kernel": "auto"},
            "train": {
                "init_from": "YOUR_PRETRAINED_MODEL",
                "log_every": 10,
                "checkpoint_every": 250,
                "steps": 1_000_000,
            },
            "log": {"wandb": "off"},
        },
        found,
    )
    assert "root" not in found["data"] and "mesh" not in found["parallel"]


SAMPLED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "opensora-v1-2/inference/sample.py": (
        [],
        {"release": "1.2", "aes": 6.5, "align": 5, "condition_frame_length": 5, "sampling": {"fps": 24}},
    ),
    "opensora-v1-1/inference/sample-ref.py": (
        ["--sample-name", "try", "--reference-path", "a.png", "--mask-strategy", "0"],
        {
            **{"release": "1.1", "loop": 2, "condition_frame_length": 4, "save_fps": 8, "save_prefix": "try_"},
            **{"reference_path": ["a.png"], "mask_strategy": ["0"]},
        },
    ),
    "opensora-v1-1/inference/sample.py": (
        ["--loop", "3", "--sample-name", "p-", "--prompt-as-path", "--start-index", "1", "--num-sample", "2"],
        {"loop": 3, "save_prefix": "p-", "prompt_as_path": True, "start_index": 1, "num_sample": 2},
    ),
    "opensora-v1-3/inference/t2v.py": (
        ["--neg-prompt", "blurry", "dark", "--flow", "fair", "--camera-motion", "pan left"],
        {
            **{"release": "1.3", "neg_prompts": ["blurry", "dark"], "flow": "fair", "camera_motion": "pan left"},
            "sampling": {"text_osci": True, "image_osci": True, "use_flaw_fix": True},
        },
    ),
    "opensora-v1-3/inference/v2v.py": (
        ["--cond-type", "v2v_head", "--condition-frame-edit", "0.1", "--use-oscillation-guidance-for-image", "False"],
        {
            **{"release": "1.3", "cond_type": "v2v_head", "condition_frame_edit": 0.1, "aes": 7.0},
            "sampling": {"text_osci": True, "image_osci": False, "use_sdedit": True, "guidance_img": 5.0},
        },
    ),
    "opensora/inference/16x256x256.py": ([], {"release": "1.1"}),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_what_clips_are_given(name: str) -> None:
    """References, loops, scores, names and which steps are guided."""
    words, expected = SAMPLED[name]
    found = layer_of(SampleConfig, CONFIGS / name, "--ckpt-path", "FILE", "--prompt", "a cat", "a dog", *words)
    subset(expected, found)
    cfg = load_config(SampleConfig, CONFIGS / name, ["--ckpt-path", "FILE", "--prompt", "a cat", "a dog", *words])
    assert cfg.release == found["release"] and cfg.goes_on


def test_oscillation_of_1_3_is_of_text_and_image(tmp_path: Path) -> None:
    """The scheduler's key holds for both, unless the command's say otherwise."""
    text = (CONFIGS / "opensora-v1-3/inference/t2v.py").read_text()
    (tmp_path / "run.py").write_text(text + "\nuse_oscillation_guidance_for_text = False\n")
    found = layer_of(SampleConfig, tmp_path / "run.py", "--ckpt-path", "FILE")["sampling"]
    assert (found["text_osci"], found["image_osci"]) == (False, True)


# What files of this family cannot be: no command of ours does what they are for.
OTHERWISE = {"opensora-v1-2/train/stage1_feat.py": "dataset.type='BatchFeatureDataset': holds no clips"}


@pytest.mark.parametrize("name", FILES)
def test_every_file_becomes_ours(name: str) -> None:
    """Each kind is that of its type, and no key is lost without a word; clips come from the command line."""
    training = name.split("/")[1] == "train"
    cls, words = (RunConfig, ["--data-path", "clips.csv"]) if training else (SampleConfig, ["--prompt", "a cat"])
    words += ["--ckpt-path", "FILE"]
    if name in OTHERWISE:
        with pytest.raises(UserError, match=OTHERWISE[name]):
            layer_of(cls, CONFIGS / name, *words)
        return
    assert trains(CONFIGS / name) == training
    theirs, found = read_python(CONFIGS / name)[0], layer_of(cls, CONFIGS / name, *words)
    assert found["model"]["kind"] == KINDS[theirs["model"]["type"].split("-")[0]]
    assert found["vae"]["path"].startswith(theirs["vae"]["from_pretrained"])
    assert found["train"]["init_from"] == "FILE" if training else found["weights"] == "FILE"
    if training:
        frames = {n for lengths in found["data"]["buckets"].values() for n in lengths}
        assert found["optim"]["lr"] == theirs["lr"] and found["data"]["table"] == "clips.csv"
        rows = theirs.get("bucket_config") or {"": {theirs["dataset"]["num_frames"]: 0}}
        assert frames == {n for lengths in rows.values() for n in lengths}
    else:
        assert found["sampling"]["guidance"] == theirs["scheduler"]["cfg_scale"] and found["prompts"] == ["a cat"]
        assert found["sampling"]["num_steps"] == theirs["scheduler"]["num_sampling_steps"]
        assert found["sampling"]["num_frames"] == theirs["num_frames"]
    if {found["model"]["kind"]} <= set(MODEL_CONFIGS):
        load_config(cls, CONFIGS / name, words)


KINDS = {
    **{"DiT": "dit", "Latte": "latte", "PixArt": "pixart", "PixArtMS": "pixart_ms"},
    **{"STDiT": "stdit", "STDiT2": "stdit2", "STDiT3": "stdit3"},
}


def written(folder: Path, text: str) -> Path:
    path = folder / "run.py"
    path.write_text(text)
    return path


def edited(path: Path, **changes: str) -> str:
    """A file with lines added to it: what is assigned last holds."""
    return path.read_text("utf-8") + "".join(f"{name} = {value}\n" for name, value in changes.items())


V1_3 = 'dict(type="OpenSoraVAE_V1_3", from_pretrained="VAE"{})'
WHOLE = {"micro_batch": None, "micro_frame_size": None, "temporal_overlap": False, "normalization": "none"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", {}),
        (", micro_batch_size=1, micro_frame_size=17", {"micro_batch": 1, "micro_frame_size": 17}),
        (', micro_batch_size=None, normalization="video"', {"normalization": "video"}),
        (", normalization=None, temporal_overlap=True", {"temporal_overlap": True}),
    ],
)
def test_what_a_file_leaves_out_of_the_autoencoder_of_1_3(given: str, expected: Any, tmp_path: Path) -> None:
    """Its code then codes clips whole, without overlap, and does not normalise; ours has the published values."""
    path = written(tmp_path, edited(CONFIGS / "opensora-v1-3/train/stage1.py", vae=V1_3.format(given)))
    found = layer_of(RunConfig, path, "--data-path", "clips.csv")["vae"]
    assert {name: found[name] for name in WHOLE} == WHOLE | expected
    cfg = load_config(RunConfig, path, ["--data-path", "clips.csv"])
    assert all(getattr(cfg.vae, name) == value for name, value in (WHOLE | expected).items())


@pytest.mark.parametrize(
    ("given", "pieces"), [("", 17), (", micro_frame_size=None", None), (", micro_frame_size=33", 33)]
)
def test_pieces_of_the_autoencoder_of_1_2(given: str, pieces: int | None, tmp_path: Path) -> None:
    """One that is absent is 17 there, and None is a clip in one piece."""
    vae = f'dict(type="OpenSoraVAE_V1_2", from_pretrained="VAE"{given})'
    path = written(tmp_path, edited(CONFIGS / "opensora-v1-2/train/stage1.py", vae=vae))
    assert load_config(RunConfig, path, ["--data-path", "clips.csv"]).vae.micro_frame_size == pieces


@pytest.mark.parametrize(("name", "clean"), [("enable_flashattn", "always"), ("enable_flash_attn", "sampling")])
def test_captions_are_cleaned_as_the_release_does(name: str, clean: str, tmp_path: Path) -> None:
    """1.0 cleans inside its encoder, in training too; later ones where they sample."""
    path = written(tmp_path, guide_configs.TRAINING.replace("enable_flash_attn", name))
    assert load_config(RunConfig, path, []).text.clean == clean  # type: ignore[union-attr]
    path.write_text(guide_configs.SAMPLING.replace("enable_flash_attn", name))
    assert load_config(SampleConfig, path, []).text.clean == clean


@pytest.mark.parametrize(
    ("given", "norms", "attention"), [("True", "auto", "auto"), ("False", "torch", "math"), ("None", "torch", "auto")]
)
def test_kernels_are_those_that_a_file_names(given: str, norms: str, attention: str, tmp_path: Path) -> None:
    text = guide_configs.TRAINING.replace("enable_layernorm_kernel=True", f"enable_layernorm_kernel={given}")
    path = written(tmp_path, text.replace("enable_flash_attn=True", f"enable_flash_attn={given}"))
    cfg = load_config(RunConfig, path, [])
    assert (cfg.parallel.norm_kernel, cfg.parallel.attention, cfg.optim.kernel) == (norms, attention, "auto")
    assert cfg.text.shard  # type: ignore[union-attr]
    words = ["--layernorm-kernel", given, "--flash-attn", given]
    sampling = load_config(SampleConfig, written(tmp_path, guide_configs.SAMPLING), words)
    if given != "None":
        assert (sampling.parallel.norm_kernel, sampling.parallel.attention) == (norms, attention)


def test_names_of_masks_that_the_family_refuses_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    layer_of(RunConfig, CONFIGS / "opensora/train/16x256x256-mask.py", "--data-path", "clips.csv")
    found = capsys.readouterr().err
    assert found.count("mask_head as quarter_head") in (0, 1)  # once in a process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opensora.config.family.translation._said", set())
        layer_of(RunConfig, CONFIGS / "opensora/train/16x256x256-mask.py", "--data-path", "clips.csv")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mask_ratios" in line]
    assert (
        "mask_tail as quarter_tail, mask_head_tail as quarter_head_tail: the family's code knows no such names" in line
    )


def releases() -> list[str]:
    return ["1.0", "1.1", "1.2", "1.3"]


def plain(value: Any) -> Any:
    """Values as a file has them: numbers of frames are keys that are whole numbers."""
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def outcome(path: Path, values: dict[str, Any]) -> str:
    """read, or the message of a refusal; anything else is an error."""
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))
    cls = RunConfig if trains(path) else SampleConfig
    words = ["--data-path", "clips.csv"] if cls is RunConfig else ["--prompt", "a cat"]
    try:
        load_config(cls, path, [*words, "--ckpt-path", "FILE"])
    except UserError as error:
        return str(error)
    return "read"


# What of the published values is refused, and the key that each message names.
CANNOT = {
    "vae": "model.type",  # trains or tests an autoencoder
    "vae_v1_3": "model.type",
    "stage1_feat": "dataset.type",
    "misc": "",
}


@pytest.mark.parametrize("release", releases())
def test_values_of_every_release_are_read_or_refused_by_a_key(release: str, golden: Path, tmp_path: Path) -> None:
    """Files of no command here too: those for autoencoders, for measuring losses, for searching batch sizes."""
    read = 0
    for name, found in json.loads((golden / "v1/configs.json").read_text("utf-8"))[release]["values"].items():
        values = plain(found)
        said = outcome(tmp_path / "run.py", values)
        read += said == "read"
        if said == "read":
            continue
        assert "\n" not in said and len(said) < 500, (name, said)
        folder, kind, file = name.split("/")[0], name.split("/")[1], Path(name).stem
        assert {folder, kind, file} & CANNOT.keys(), (name, said)
        key = next(CANNOT[part] for part in (file, folder, kind) if part in CANNOT)
        assert key in said and any(part in said for part in values), (name, said)
    assert read >= 5


def changed(rng: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    """One to three values, at any depth, made others of any kind, taken away, or given another name."""
    found = copy.deepcopy(values)
    for _ in range(rng.randint(1, 3)):
        place, key = found, rng.choice(list(found))
        while isinstance(place[key], dict) and place[key] and rng.random() < 0.7:
            place = place[key]
            key = rng.choice(list(place))
        fate = rng.random()
        if fate < 0.2:
            del place[key]
        elif fate < 0.4:
            place[f"{key}{rng.choice('sx_')}"] = place.pop(key)
        else:
            place[key] = rng.choice(
                [None, True, -1, 0, 1e30, "", "x", [], [None], {}, {"type": "x"}, float(2**70), ["a"]]
            )
        if not found:
            return changed(rng, values)
    return found


def test_damaged_values_of_every_release_cost_one_line(golden: Path, tmp_path: Path) -> None:
    every = [
        plain(found)
        for release in json.loads((golden / "v1/configs.json").read_text("utf-8")).values()
        for found in release["values"].values()
    ]
    rng = random.Random(14)
    said = [outcome(tmp_path / "run.py", changed(rng, rng.choice(every))) for _ in range(100)]
    assert all("\n" not in line and len(line) < 1000 for line in said)
    assert 5 < said.count("read") < 60


@pytest.mark.parametrize("text", ["", "# nothing\n", "x = 1\n", "model = None\nlr = 1\n"])
@pytest.mark.parametrize("cls", [RunConfig, SampleConfig])
def test_a_file_without_a_model_says_so(cls: type, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.py: names no model; a configuration of the family has model = dict"):
        read_family(cls, written(tmp_path, text), [])


def test_sections_are_mappings(tmp_path: Path) -> None:
    """Any section of the table, with the line of what stands in its place."""
    base = (CONFIGS / "opensora/train/16x256x256.py").read_text("utf-8")
    for name in SECTIONS:
        for value in ("'STDiT'", "3", "[1]", "0.5"):
            with pytest.raises(UserError) as caught:
                read_family(RunConfig, written(tmp_path, f"{base}\n\n{name} = {value}\n"), [])
            line = base.count("\n") + 3
            wanted = f"{name}={value}: must be a mapping, as {name} = dict(...) ({tmp_path}/run.py:{line})"
            assert str(caught.value) == wanted
