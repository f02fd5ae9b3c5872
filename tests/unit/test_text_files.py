"""T5 and CLIP from files of every shape that they are published in: the published code's features, or a refusal."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.models.text import T5ClipConfig, build_text_encoder
from opensora.models.text.t5_clip import T5ClipTextEncoder
from opensora.utils.errors import UserError
from tests.text_models import write_text_models

Tensors = dict[str, Tensor]
PROMPTS = ["a red circle", "", "two words and more words than eight", "a red circle"]


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders t5 and clip with the whole models, as they are published: a decoder, and eyes."""
    folder = tmp_path_factory.mktemp("whole")
    write_text_models(folder)
    return folder


def encoder_of(folder: Path, clip: str = "clip", **options: Any) -> T5ClipTextEncoder:
    cfg = T5ClipConfig(t5_path=str(folder / "t5"), clip_path=str(folder / clip), max_tokens=16, **options)
    return T5ClipTextEncoder(cfg, "cpu", torch.float32)


def test_features_and_tokens_of_the_published_code(golden: Path) -> None:
    truth = load_file(golden / "text.safetensors")
    with safe_open(golden / "text.safetensors", "pt") as file:
        prompts = json.loads(file.metadata()["config"])["prompts"]
    encoder = encoder_of(golden / "text", "openai-clip")
    features, (t5_ids, clip_ids) = encoder.encode(prompts), encoder.tokens(prompts)
    assert torch.equal(t5_ids, truth["out.t5.input_ids"]) and torch.equal(clip_ids, truth["out.clip.input_ids"])
    assert relative(features.txt, truth["out.t5.last_hidden_state"]) <= 1e-5
    assert relative(features.y_vec, truth["out.clip.pooled"]) <= 1e-5
    for added, align in ((10, 4), (3, 7)):
        wanted = truth[f"out.t5.seq_align_{align}_added_{added}"]
        aligned = encoder.encode(prompts[: len(wanted)], added_tokens=added, seq_align=align).txt
        assert aligned.shape == wanted.shape and relative(aligned, wanted) <= 1e-5


def test_every_prompt_as_alone_and_equal_ones_once(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever is beside it, was before it, or is kept."""
    alone = [encoder_of(whole, cache_mib=0).encode([prompt]) for prompt in PROMPTS]
    seen: list[list[str]] = []
    for mib in (0, 64):
        encoder = encoder_of(whole, cache_mib=mib)
        original = encoder._encoded
        monkeypatch.setattr(encoder, "_encoded", lambda p, n, of=original: seen.append(list(p)) or of(p, n))
        seen.clear()
        for _ in range(2):
            together = encoder.encode(PROMPTS)
            for row, one in enumerate(alone):
                assert torch.equal(together.txt[row], one.txt[0]) and torch.equal(together.y_vec[row], one.y_vec[0])
        words = [PROMPTS[0], PROMPTS[2]]
        assert seen == ([[words[0], "", words[1]]] if mib else [[words[0], "", words[1]], words])  # "" stays
    many = [f"a dog {number}" for number in range(19)]
    seen.clear()
    encoder.encode(many)
    assert [len(chunk) for chunk in seen] == [8, 8, 3]


def test_blocks_see_one_prompt_at_a_time(whole: Path) -> None:
    """Whatever is encoded together, matrices have the sizes of one prompt, so that kernels sum in one order."""
    seen: set[int] = set()
    encoder = encoder_of(whole)
    for module in (inner for one in encoder._modules for inner in one.modules()):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[0]))
    encoder.encode([f"a dog {number}" for number in range(5)])
    assert seen == {1}


def test_what_is_kept_is_bounded(whole: Path) -> None:
    encoder = encoder_of(whole, cache_mib=1)
    one = sum(part.nbytes for part in encoder._encoded(["x"], 16).__next__())
    encoder._cache._most = 3 * one
    for number in range(10):
        encoder.encode([f"a dog {number}", ""])
    assert list(encoder._cache._rows) == [(f"a dog {number}", 16) for number in (7, 8, 9)]
    assert encoder._cache._held == 3 * one and encoder._cache.get(("", 16)) is not None
    for kept in encoder._cache._rows.values():
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept)  # of the row alone


def features_of(folder: Path, t5: str = "t5", clip: str = "clip", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    cfg = T5ClipConfig(t5_path=str(folder / t5), clip_path=str(folder / clip), max_tokens=12)
    features = build_text_encoder(cfg, "cpu", dtype).encode(PROMPTS)
    return [features.txt, features.y_vec]


def by_transformers(folder: Path) -> list[Tensor]:
    """The same features from transformers' own loading, one prompt at a time."""
    from transformers import ByT5Tokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel

    t5, clip = T5EncoderModel.from_pretrained(folder / "t5"), CLIPTextModel.from_pretrained(folder / "clip")
    sizes: list[tuple[Any, int]] = [(ByT5Tokenizer(), 12), (CLIPTokenizer.from_pretrained(folder / "clip"), 77)]
    ids = [
        tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=size, return_tensors="pt")["input_ids"]
        for tokenizer, size in sizes
    ]
    with torch.no_grad():
        return [t5(input_ids=ids[0]).last_hidden_state, clip(input_ids=ids[1]).pooler_output]


def renamed(change: Callable[[str], str | None]) -> Callable[[Tensors], Tensors]:
    """Tensors under other names; None leaves one out."""
    return lambda tensors: {name: t.clone() for one, t in tensors.items() if (name := change(one)) is not None}


def is_encoder(name: str) -> bool:
    return name.startswith(("encoder.", "shared.", "text_model."))


FILES: dict[str, Callable[[Tensors], Tensors]] = {
    "the whole model": renamed(lambda name: name),
    "the encoder alone": renamed(lambda name: name if is_encoder(name) else None),
    "no prefix": renamed(
        lambda name: name.removeprefix("encoder.").removeprefix("text_model.") if is_encoder(name) else None
    ),
    "no shared": renamed(lambda name: {"shared.weight": "encoder.embed_tokens.weight"}.get(name, name)),
    "bare embedding": renamed(lambda name: {"shared.weight": "embed_tokens.weight"}.get(name, name)),
    "embedding twice": lambda t: {
        **t,
        **({"encoder.embed_tokens.weight": t["shared.weight"].clone()} if "shared.weight" in t else {}),
    },
    "behind a wrapper": renamed(lambda name: f"module.{name}"),
    "positions": lambda t: {
        **t,
        **({} if "shared.weight" in t else {"text_model.embeddings.position_ids": torch.arange(77)[None]}),
    },
}


@pytest.mark.parametrize("names", FILES)
def test_files_with_other_names(names: str, whole: Path, tmp_path: Path) -> None:
    truth = by_transformers(whole)
    for part in ("t5", "clip"):
        shutil.copytree(whole / part, tmp_path / part)
        file = tmp_path / part / "model.safetensors"
        save_file(FILES[names](load_file(file)), file, {"format": "pt"})
    for found, wanted in zip(features_of(tmp_path), truth, strict=True):
        assert relative(found, wanted) <= 1e-6


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_stored_in_any_type(stored: torch.dtype, dtype: torch.dtype, whole: Path, tmp_path: Path) -> None:
    rounded: dict[str, Tensors] = {}
    for part in ("t5", "clip"):
        shutil.copytree(whole / part, tmp_path / part)
        file = tmp_path / part / "model.safetensors"
        rounded[part] = {name: tensor.to(stored) for name, tensor in load_file(file).items()}
        save_file(rounded[part], file, {"format": "pt"})
    found = features_of(tmp_path, dtype=dtype)
    for part, tensors in rounded.items():  # the same numbers in full precision
        save_file({name: t.float() for name, t in tensors.items()}, tmp_path / part / "model.safetensors")
    assert all(torch.equal(one, two) for one, two in zip(found, features_of(tmp_path, dtype=dtype), strict=True))
    assert found[0].dtype == found[1].dtype == dtype


def test_shards_single_files_and_torch_files(whole: Path, tmp_path: Path) -> None:
    truth = features_of(whole)
    for part in ("t5", "clip"):
        for form in ("shards", "bin", "variant"):
            shutil.copytree(whole / part, tmp_path / form / part)
        tensors = load_file(whole / part / "model.safetensors")
        folder = tmp_path / "shards" / part
        (folder / "model.safetensors").unlink()
        names, where = sorted(tensors), {}
        for number in range(3):
            file = f"model-{number + 1:05d}-of-00003.safetensors"
            save_file({name: tensors[name] for name in names[number::3]}, folder / file)
            where |= dict.fromkeys(names[number::3], file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (tmp_path / "bin" / part / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "bin" / part / "pytorch_model.bin")
        save_file({"x": torch.ones(2, dtype=torch.int32)}, tmp_path / "variant" / part / "model.int8.safetensors")
    forms = [features_of(tmp_path / form) for form in ("shards", "bin", "variant")]
    forms.append(features_of(whole, "t5/model.safetensors", "clip/model.safetensors"))
    for found in forms:
        assert all(torch.equal(one, two) for one, two in zip(found, truth, strict=True))


def wide(tensors: Tensors) -> str:
    """A matrix of the encoder."""
    return next(name for name in sorted(tensors) if tensors[name].dim() == 2 and is_encoder(name))


DAMAGES: dict[str, tuple[Callable[[Tensors, str], Tensors], str]] = {
    "missing": (lambda t, name: {one: v for one, v in t.items() if one != name}, "1 missing: {own}"),
    "of another set": (lambda t, name: {f"first_stage_model.{one}": v for one, v in t.items()}, "missing: "),
    "too many": (lambda t, name: {**t, f"{name}_2": torch.ones(2)}, "1 unexpected: {own}_2"),
    "NaN": (lambda t, name: {**t, name: t[name] * math.nan}, "{own} holds NaN or infinite values"),
    "infinity": (lambda t, name: {**t, name: t[name].abs().clamp(min=1) / 0}, "{own} holds NaN or infinite values"),
    "too large for half": (lambda t, name: {**t, name: t[name].double().abs() + 1e300}, "{own} holds NaN or infinite"),
    "fp8 without its scale": (
        lambda t, name: {**t, name: t[name].to(torch.float8_e4m3fn), "scaled_fp8": torch.ones(2)},
        "{name} is F8_E4M3 without a scale, where scaled_fp8 tells of scaled fp8: fetch",
    ),
    "integers": (lambda t, name: {**t, name: t[name].int()}, "{name} is I32"),
    "another shape": (lambda t, name: {**t, name: torch.ones(3, 5)}, "1 of another shape (file, model): {own} (3, 5)"),
}


@pytest.mark.parametrize("part", ["t5", "clip"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_whole_are_refused_by_name(damage: str, part: str, whole: Path, tmp_path: Path) -> None:
    change, words = DAMAGES[damage]
    shutil.copytree(whole, tmp_path / "m")
    file = tmp_path / "m" / part / "model.safetensors"
    tensors = load_file(file)
    name = wide(tensors)
    save_file(change(tensors, name), file, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        features_of(tmp_path / "m")
    own = name.removeprefix("encoder." if part == "t5" else "text_model.")
    assert str(caught.value).startswith(f"text.{part}_path={tmp_path / 'm' / part}: "), caught.value
    assert words.replace("{own}", own).replace("{name}", name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_tokens": 0}, "max_tokens=0: must be"),
        ({"cache_mib": -1}, "cache_mib=-1: must be"),
        ({"device": "cpu", "shard": True}, "shard=true: with device=cpu must be false"),
        ({"device": "cpu", "offload": True}, "offload=true: with device=cpu must be false"),
    ],
)
def test_placements_that_say_nothing_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        T5ClipConfig(**wrong)
