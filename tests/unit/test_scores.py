"""Scores of pluggable models: tiny random ones, against the formulas written out; which clips get one, and its key."""

import json
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_pipeline.config import PipelineConfig
from data_pipeline.limits import SourceLimits
from data_pipeline.outputs import digest_of
from data_pipeline.rows import to_rows, to_table
from data_pipeline.scoring.pixels import Preprocessing, read_preprocessing
from data_pipeline.stages.base import Unit
from data_pipeline.stages.scores import ScorerConfig, ScoresStage, sampled
from opensora.config.load import load_config
from opensora.config.schema import plain
from opensora.utils.errors import UserError
from opensora.utils.files.video_writer import write_video

SIDE, WIDTH = 32, 12  # of a picture, of an embedding
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
STAGES: Any = [SimpleNamespace(name=name, columns=pa.schema([(name, pa.int32())])) for name in ("shots", "duplicates")]
LIMITS = SourceLimits()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights as transformers saves it, with a vocabulary of letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(ord("a") + number) for number in range(26)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    layers: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = layers | {"vocab_size": len(vocab), "max_position_embeddings": 10, "bos_token_id": 52, "eos_token_id": 53}
    torch.manual_seed(0)
    vision = layers | {"image_size": SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).save_pretrained(folder)
    stated = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated | {"image_mean": MEAN, "image_std": STD}))
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers as published heads have them: 12 to 5 to 1, without a nonlinearity."""
    path = tmp_path_factory.mktemp("head") / "head.pth"
    generator = torch.Generator().manual_seed(1)
    shapes = {"layers.0": (5, WIDTH), "layers.10": (1, 5)}
    state = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(
        state | {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}, path
    )
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames of noise that is as large as blocks, so that coding leaves it alone."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    small = np.random.default_rng(0).integers(0, 255, (24, 6, 8, 3), np.uint8)
    write_video(path, small.repeat(8, 1).repeat(8, 2), 12)
    return path


def rows_of(stage: ScoresStage, video: Path, shots: list[tuple[int, int]], **others: Any) -> list[dict[str, Any]]:
    """What the stage writes, through a table."""
    rows = {"shots": [{"first": first, "last": last} for first, last in shots], "screen": [{"keep": True}] * len(shots)}
    unit = Unit(source="a.mp4", file=str(video), rows=rows | others)
    return to_rows(to_table(stage.run(unit), stage.columns))


def pixels_written_out(frame: np.ndarray) -> torch.Tensor:
    """64x48 to 42x32, the middle 32x32, normalised."""
    picture = np.asarray(Image.fromarray(frame).resize((42, 32), Image.Resampling.BICUBIC), np.float64)[:, 5:37]
    return torch.from_numpy((picture / 255 - MEAN) / STD).permute(2, 0, 1).float()


def embedding(model: Path, video: Path, numbers: list[int]) -> torch.Tensor:
    """(n, width) of length 1, by the whole model of transformers."""
    from transformers import CLIPModel

    from opensora.datasets.decode.api import read_frames

    pictures = torch.stack([pixels_written_out(read_frames(str(video), number, 1)[0]) for number in numbers])
    whole = CLIPModel.from_pretrained(model)
    with torch.no_grad():
        found = whole.visual_projection(whole.vision_model(pixel_values=pictures).pooler_output).double()
    return found / found.norm(dim=-1, keepdim=True)


def test_an_aesthetic_score_is_the_head_of_the_embedding(model: Path, head: Path, video: Path) -> None:
    config = ScorerConfig(kind="clip_aesthetic", model=str(model), head=str(head), frames=2)
    stage = ScoresStage({"aesthetic": config}, LIMITS, STAGES)
    found = rows_of(stage, video, [(0, 8), (8, 24)])
    state = {name: value.double() for name, value in torch.load(head, weights_only=True).items()}
    for row, numbers in zip(found, ([2, 6], [12, 20]), strict=True):
        hidden = embedding(model, video, numbers) @ state["layers.0.weight"].T + state["layers.0.bias"]
        expected = (hidden @ state["layers.10.weight"].T + state["layers.10.bias"]).mean()
        assert row["aesthetic"] == pytest.approx(float(expected), abs=1e-3)
    assert found[0]["aesthetic"] != found[1]["aesthetic"]


def test_the_content_of_the_file_is_in_the_key(model: Path) -> None:
    """By the id of its clips: files that are as long as each other have the same first and last frames."""
    config = ScorerConfig(kind="clip_match", model=str(model), prompt="bee")
    assert "clip_id" in ScoresStage({"match": config}, LIMITS, STAGES).reads["shots"]


def test_a_match_is_the_cosine_of_picture_and_text(model: Path, video: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    captions = tmp_path / "captions.csv"
    captions.write_text(f"path,text\n{video},a cab\n")
    configs = {
        "prompted": ScorerConfig(kind="clip_match", model=str(model), prompt="bee"),
        "captioned": ScorerConfig(kind="clip_match", model=str(model), captions=str(captions)),
    }
    (row,) = rows_of(ScoresStage(configs, LIMITS, STAGES), video, [(0, 3)])
    whole, picture = CLIPModel.from_pretrained(model), embedding(model, video, [1])[0]
    ids = {"prompted": [52, 1, 4, 30, 53], "captioned": [52, 26, 2, 0, 27, 53]}  # letters; those that end a word: + 26
    for name, of_text in ids.items():
        with torch.no_grad():
            pooled = whole.text_model(input_ids=torch.tensor([of_text])).pooler_output
            text = whole.text_projection(pooled)[0].double()
        assert row[name] == pytest.approx(float(picture @ text / text.norm()), abs=1e-3)


def test_a_video_without_a_caption_has_no_match(model: Path, video: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("path,text\nother.mp4,a cab\n")
    config = ScorerConfig(kind="clip_match", model=str(model), captions=str(tmp_path / "captions.csv"))
    (row,) = rows_of(ScoresStage({"match": config}, LIMITS, STAGES), video, [(0, 3)])
    assert row["match"] is None


def test_what_is_rejected_or_a_duplicate_is_not_looked_at(
    model: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ScorerConfig(kind="clip_match", model=str(model), prompt="bee")
    stage = ScoresStage({"match": config}, LIMITS, STAGES)
    screen = [{"keep": False}, {"keep": True}, {"keep": True}]
    copies = [{"duplicate_of": None}, {"duplicate_of": "00"}, {"duplicate_of": None}]
    found = rows_of(stage, video, [(0, 3), (3, 6), (6, 9)], screen=screen, duplicates=copies)
    assert [row["match"] is None for row in found] == [True, True, False]
    assert [row["match_model"] is None for row in found] == [True, True, False]
    monkeypatch.setattr("data_pipeline.stages.scores.read_frames", lambda *_, **__: pytest.fail("was read"))
    rows_of(stage, video, [(0, 3)], screen=screen[:1])


def test_a_frame_that_is_damaged_has_no_score(model: Path, video: Path) -> None:
    config = ScorerConfig(kind="clip_match", model=str(model), prompt="bee")
    (row,) = rows_of(ScoresStage({"match": config}, LIMITS, STAGES), video, [(100, 103)])
    assert row["match"] is None and row["match_model"] is not None


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert sampled(10, 20, 1) == [15] and sampled(10, 22, 3) == [12, 16, 20] and sampled(5, 6, 3) == [5, 5, 5]


def test_the_key_is_of_what_is_in_the_files_and_not_of_where_they_are(model: Path, head: Path, tmp_path: Path) -> None:
    def key(**given: Any) -> str:
        config = ScorerConfig(**({"kind": "clip_aesthetic", "model": str(model), "head": str(head)} | given))
        stage = ScoresStage({"aesthetic": config}, LIMITS, STAGES)
        assert pickle.loads(pickle.dumps(stage)).columns == stage.columns
        return digest_of(plain(stage.config)) + stage.digest("aesthetic")

    (tmp_path / "same.pth").write_bytes(head.read_bytes())
    content = bytearray(head.read_bytes())
    content[-200] ^= 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/head.pth").write_bytes(content)
    (tmp_path / "elsewhere").mkdir()
    for path in model.iterdir():
        (tmp_path / "elsewhere" / path.name).write_bytes(path.read_bytes())
    assert key() == key(model=str(tmp_path / "elsewhere"))
    assert len({key(), key(head=str(tmp_path / "other/head.pth")), key(frames=3)}) == 3
    (tmp_path / "elsewhere/preprocessor_config.json").write_text("{}")
    assert key() != key(model=str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (224, 224), (31, 97)])
def test_pictures_are_prepared_as_transformers_does(size: tuple[int, int], model: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    frame = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    theirs = CLIPImageProcessorPil.from_pretrained(model)(frame, return_tensors="np")["pixel_values"][0]
    assert np.abs(read_preprocessing(model)(frame) - theirs).max() < 1e-5


def test_the_defaults_are_those_of_the_published_models(tmp_path: Path) -> None:
    assert read_preprocessing(tmp_path) == Preprocessing() == Preprocessing(side=224, height=224, width=224)


def test_a_model_in_onnx(head: Path, video: Path, tmp_path: Path) -> None:
    """A network that is written here byte by byte: the mean of each channel, times a matrix."""
    pytest.importorskip("onnxruntime")
    matrix = np.random.default_rng(2).normal(size=(3, WIDTH)).astype(np.float32)
    (tmp_path / "picture.onnx").write_bytes(onnx_of(matrix))
    stated = {"size": SIDE, "crop_size": SIDE, "image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    config = ScorerConfig(kind="clip_aesthetic", model=str(tmp_path / "picture.onnx"), head=str(head))
    (row,) = rows_of(ScoresStage({"aesthetic": config}, LIMITS, STAGES), video, [(0, 3)])
    from opensora.datasets.decode.api import read_frames

    embedded = (
        pixels_written_out(read_frames(str(video), 1, 1)[0]).double().mean((1, 2)) @ torch.from_numpy(matrix).double()
    )
    state = {name: value.double() for name, value in torch.load(head, weights_only=True).items()}
    hidden = state["layers.0.weight"] @ (embedded / embedded.norm()) + state["layers.0.bias"]
    assert row["aesthetic"] == pytest.approx(
        float(state["layers.10.weight"] @ hidden + state["layers.10.bias"]), abs=1e-3
    )


def onnx_of(matrix: np.ndarray) -> bytes:
    """An ONNX model: pixels (n, 3, h, w) to image_embeds (n, width)."""

    def number(value: int) -> bytes:
        parts = []
        while value > 127:
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts, value])

    def part(field: int, value: bytes | str | int) -> bytes:
        if isinstance(value, int):
            return number(field << 3) + number(value)
        content = value.encode() if isinstance(value, str) else value
        return number(field << 3 | 2) + number(len(content)) + content

    def node(kind: str, inputs: list[str], output: str) -> bytes:
        return part(1, b"".join(part(1, name) for name in inputs) + part(2, output) + part(4, kind))

    def tensor(name: str, dims: list[str | int]) -> bytes:
        shape = b"".join(part(1, part(2 if isinstance(dim, str) else 1, dim)) for dim in dims)
        return part(1, name) + part(2, part(1, part(1, 1) + part(2, shape)))

    nodes = node("GlobalAveragePool", ["pixels"], "pooled") + node("Flatten", ["pooled"], "flat")
    nodes += node("MatMul", ["flat", "matrix"], "image_embeds")
    dims = b"".join(part(1, size) for size in matrix.shape)
    weights = part(5, dims + part(2, 1) + part(8, "matrix") + part(9, struct.pack(f"<{matrix.size}f", *matrix.ravel())))
    inputs = part(11, tensor("pixels", ["n", 3, SIDE, SIDE]))
    graph = nodes + part(2, "g") + weights + inputs + part(12, tensor("image_embeds", ["n", matrix.shape[1]]))
    return part(1, 8) + part(7, graph) + part(8, part(1, "") + part(2, 13))


def refused(**config: Any) -> str:
    """What is said of scores with this configuration."""
    with pytest.raises(UserError) as caught:
        ScoresStage({name: ScorerConfig(**each) for name, each in config.items()}, LIMITS, STAGES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_not_there_or_no_model(model: Path, head: Path, tmp_path: Path) -> None:
    good = {"kind": "clip_aesthetic", "model": str(model), "head": str(head)}
    assert refused(a=good | {"model": "gone"}) == (
        "scores.a.model=gone: no such file or folder; nothing is downloaded, name a local one"
    )
    assert refused(a=good | {"head": "gone.pth"}).startswith("scores.a.head=gone.pth: no such file")
    assert "no *.safetensors in it" in refused(a=good | {"model": str(tmp_path)})
    match = {"kind": "clip_match", "model": str(head), "prompt": "x"}
    assert "needs the model's folder" in refused(a=match)


def test_names_that_cannot_be_columns(model: Path) -> None:
    config = {"kind": "clip_match", "model": str(model), "prompt": "x"}
    assert refused(duplicates=config).startswith("scores.duplicates: stage duplicates has a column of that name")
    assert refused(**{"A b": config}).startswith("scores.A b: must be a name for a column")
    assert refused(a_model=config).startswith("scores.a_model: must be a name for a column")


def test_weights_that_do_not_fit_are_told_before_the_work(head: Path, tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1700 << 20)  # of zeros that take no room
    config = {"kind": "clip_aesthetic", "model": str(tmp_path), "head": str(head)}
    assert "1700 MiB of weights do not fit into limits.memory_mib=2048; give limits.memory_mib=4168" in refused(
        a=config
    )


@pytest.mark.parametrize("shapes", [[(5, WIDTH)], [(5, WIDTH), (1, 4)], [(1, WIDTH + 1)], []])
def test_a_head_that_does_not_fit(shapes: list[tuple[int, int]], model: Path, video: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_file({f"{number}.weight": torch.zeros(shape) for number, shape in enumerate(shapes)}, path)
    config = ScorerConfig(kind="clip_aesthetic", model=str(model), head=str(path))
    with pytest.raises(UserError, match=r"scores\.a\.head=.*(must hold linear layers|embeddings of 13 numbers)"):
        rows_of(ScoresStage({"a": config}, LIMITS, STAGES), video, [(0, 3)])


@pytest.mark.parametrize("damage", ["a weight less", "another shape", "no weights"])
def test_a_model_without_all_of_its_weights(damage: str, model: Path, video: Path, tmp_path: Path) -> None:
    """transformers would draw what is missing at random, and score with it."""
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(model / "model.safetensors")
    if damage == "a weight less":
        weights.pop("visual_projection.weight")
    elif damage == "another shape":
        weights["visual_projection.weight"] = torch.zeros(WIDTH + 1, 16)
    save_file(weights if damage != "no weights" else {}, tmp_path / "model.safetensors", {"format": "pt"})
    config = ScorerConfig(kind="clip_match", model=str(tmp_path), prompt="bee")
    said = ""
    try:
        rows_of(ScoresStage({"a": config}, LIMITS, STAGES), video, [(0, 3)])
    except UserError as error:
        said = str(error)
    assert said.startswith("scores.a.model=") and "weights are missing or of another shape" in said


def test_a_head_that_is_no_file_of_tensors(model: Path, video: Path, tmp_path: Path) -> None:
    (tmp_path / "head.pth").write_text("no tensors")
    config = ScorerConfig(kind="clip_aesthetic", model=str(model), head=str(tmp_path / "head.pth"))
    with pytest.raises(UserError, match=r"scores\.a\.head=.*: cannot be used \(") as caught:
        rows_of(ScoresStage({"a": config}, LIMITS, STAGES), video, [(0, 3)])
    assert "\n" not in str(caught.value)


BAD = {
    "scores.a={kind: clip}": "scores.a.kind='clip': did you mean clip_aesthetic or clip_match?",
    "scores.a={kind: clip_match, model: ''}": "scores.a.model='': must name the folder",
    "scores.a={kind: clip_match, model: m}": "scores.a.prompt: clip_match needs a prompt or a captions file",
    "scores.a={kind: clip_match, model: m, prompt: x, captions: y}": "scores.a.prompt: clip_match needs",
    "scores.a={kind: clip_match, model: m, prompt: x, head: y}": "scores.a.head: clip_match has none",
    "scores.a={kind: clip_aesthetic, model: m}": "scores.a.head='': must name the file",
    "scores.a={kind: clip_aesthetic, model: m, head: h, prompt: x}": "scores.a.prompt: clip_aesthetic takes no text",
    "scores.a={kind: clip_match, model: m, prompt: x, frames: 0}": "scores.a.frames=0: must be an integer >= 1",
    "scores.a={kind: clip_match, model: m, prompt: x, frames: 17}": "scores.a.frames=17: must be at most 16",
}


@pytest.mark.parametrize("override", BAD)
def test_a_configuration_that_is_refused(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(PipelineConfig, {"source": "x", "out": "y"}, [override])
    assert str(caught.value).startswith(BAD[override]) and "\n" not in str(caught.value)
