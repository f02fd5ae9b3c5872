"""Text encoders of Open-Sora 1.x: transformers' own features and masks, classes, captions cleaned as published; and
what training, sampling and stored features make of them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from opensora.assembly.encoders import Encoders
from opensora.assembly.stored_features import StoredText
from opensora.assembly.token_layout import TokenLayout
from opensora.conditioning import ConditioningConfig
from opensora.conditioning.config import DropoutConfig
from opensora.config.load import load_config
from opensora.config.run import RunConfig, check_classes
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.loading import feature_store
from opensora.datasets.loading.feature_store import Features
from opensora.datasets.plan.batch_plan import MicroBatch
from opensora.inference.pipeline import conditions_of
from opensora.models import families
from opensora.models.base import TextFeatures
from opensora.models.text import (
    ClassesConfig,
    ClipConfig,
    T5Config,
    TextConfig,
    build_text_encoder,
    check_prompts,
    check_text_encoder,
    has_mask,
    text_tokens,
)
from opensora.models.text.caption_cleaning import clean_prompt, lowered
from opensora.sampling.options import SamplingOption
from opensora.train.preparation import Preparation
from opensora.utils.errors import UserError
from tests import factored_family
from tests.text_models import write_text_models

CPU, KIND = torch.device("cpu"), factored_family.KIND
PROMPTS = ["a red circle", "", "two words and more words than twelve", "a red circle", "A Blue One"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    write_text_models(path)
    return path


def t5(folder: Path, **options: Any) -> Any:
    cfg = T5Config(**{"t5_path": str(folder / "t5"), "max_tokens": 12, **options})
    return build_text_encoder(cfg, CPU, torch.float32)


def clip(folder: Path, **options: Any) -> Any:
    return build_text_encoder(ClipConfig(clip_path=str(folder / "clip"), **options), CPU, torch.float32)


@torch.no_grad()
def published_t5(folder: Path, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Last hidden state and mask by transformers alone, all prompts at once."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "t5")
    model = T5EncoderModel.from_pretrained(folder / "t5").eval()
    batch = tokenizer(
        list(prompts), max_length=length, padding="max_length", truncation=True, return_tensors="pt",
        return_attention_mask=True, add_special_tokens=True,
    )  # fmt: skip
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return found["last_hidden_state"], batch["attention_mask"].bool()


@pytest.mark.parametrize("length", [5, 12, 40])
def test_t5_is_that_of_transformers(length: int, folder: Path) -> None:
    """All rows, padding too; the mask is of every prompt's own length."""
    truth, mask = published_t5(folder, PROMPTS, length)
    encoder = t5(folder, max_tokens=length)
    features = encoder.encode(PROMPTS)
    assert torch.allclose(features.txt, truth, atol=2e-6) and features.mask is not None
    assert torch.equal(features.mask, mask) and features.y_vec.shape == (len(PROMPTS), 0)
    assert mask[1].sum() == 1 and (length == 40) != bool(mask.all(dim=1).any())
    assert (encoder.context_dim, encoder.vec_dim) == (truth.shape[-1], 0)
    assert has_mask(encoder.cfg) and text_tokens(encoder.cfg) == length


def test_prompts_as_alone(folder: Path) -> None:
    """Bit for bit, whatever is beside a prompt: masks differ between rows."""
    together = t5(folder).encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = t5(folder, cache_mib=0).encode([prompt])
        assert torch.equal(alone.txt[0], together.txt[row]) and torch.equal(alone.mask[0], together.mask[row])


def test_rows_with_a_bias_of_their_own() -> None:
    """A release of transformers adds the mask of a row to the bias that blocks hand on."""
    from opensora.models.text.row_by_row import row_by_row

    class Block(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            bias = torch.ones(1, 2, 3) + mask[:, None] if bias is None else bias
            return x + bias.sum((1, 2))[:, None, None], bias

    x, mask = torch.zeros(3, 3, 1), torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 2, 1]])
    whole, blocks = [Block(), Block()], [Block(), Block()]
    row_by_row(blocks)
    wanted, bias = whole[0](x, mask)
    found, own = blocks[0](x, mask)
    assert torch.equal(whole[1](wanted, mask, bias)[0], blocks[1](found, mask, own)[0])
    assert blocks[0](x, torch.zeros(3, 3))[1].shape[0] == 1  # what all rows share is held once


@torch.no_grad()
def test_clip_is_that_of_transformers(folder: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    model = CLIPTextModel.from_pretrained(folder / "clip").eval()
    ids = tokenizer(PROMPTS, truncation=True, max_length=77, padding="max_length", return_tensors="pt")["input_ids"]
    truth = model(input_ids=ids).pooler_output
    encoder = clip(folder)
    features = encoder.encode(PROMPTS)
    assert features.txt.shape == (len(PROMPTS), 1, truth.shape[1]) and features.mask is None
    assert torch.allclose(features.txt[:, 0], truth, atol=2e-6) and torch.equal(features.y_vec, features.txt[:, 0])
    assert text_tokens(encoder.cfg) == 1 and not has_mask(encoder.cfg)


def test_cleaning_is_the_published_one(golden: Path) -> None:
    cases = json.loads((golden / "v1" / "clean_caption.json").read_text(encoding="utf-8"))
    assert len(cases) > 30
    for text, clean, lower in cases:
        assert (clean_prompt(text), lowered(text)) == (clean, lower), text


@pytest.mark.parametrize("build", [t5, clip])
def test_when_captions_are_cleaned(build: Any, folder: Path) -> None:
    text, clean = "A <b>Red</b> circle, from www.shapes.org/a #123", "a red circle, from"
    assert clean_prompt(text) == clean
    plain = build(folder, clean="never").encode([text, clean])
    for when, trained, sampled in (("never", 0, text), ("sampling", 0, clean), ("always", 1, text)):
        encoder = build(folder, clean=when)
        assert torch.equal(encoder.encode([text]).txt[0], plain.txt[trained])
        assert encoder.for_sampling(text) == sampled and encoder.for_sampling("") == ""
    assert T5Config().clean == "sampling" and ClipConfig().clean == "never"


def test_classes() -> None:
    cfg = ClassesConfig(num_classes=10)
    encoder = build_text_encoder(cfg, CPU, torch.bfloat16)
    features = encoder.encode(["3", " 9 ", "", "0"])
    assert features.label is not None and features.label.tolist() == [3, 9, 10, 0]
    assert features.label.dtype == torch.int64 and features.txt.shape == (4, 0, 1) and features.y_vec.shape == (4, 0)
    for wrong in ("10", "-1", "a dog", "1.0", "1 2", "٣", "9" * 40):
        with pytest.raises(UserError, match="must be the number of a class, 0 to 9, or empty for none"):
            encoder.encode(["1", wrong])
        with pytest.raises(UserError, match=r"^text\.kind=classes: "):
            check_prompts(cfg, ["1", wrong])
    check_prompts(T5Config(), ["a dog"])


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, said in (
        ({"max_tokens": 0}, "max_tokens=0: must be an integer >= 1"),
        ({"device": "cpu", "shard": True}, "shard=true: with device=cpu must be false"),
        ({"cache_mib": -1}, "cache_mib=-1: must be an integer >= 0"),
    ):
        with pytest.raises(ValueError, match=said):
            T5Config(**values)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"text\.t5_path is not set: give the folder of a transformers model"):
        t5(folder, t5_path="")
    latents: Any = SimpleNamespace(size=4, key="vae.kind=sd")
    model = factored_family.ToyConfig(text_dim=16)
    check_text_encoder(T5Config(t5_path=str(folder / "t5")), latents, model)
    with pytest.raises(UserError, match=r"model\.text_dim=12: text\.t5_path=.* gives 16; set model\.text_dim=16"):
        check_text_encoder(T5Config(t5_path=str(folder / "t5")), latents, factored_family.ToyConfig())
    with pytest.raises(ValueError, match=r"text\.kind=classes: model\.kind=toy_factored reads no classes"):
        check_classes(model, ClassesConfig())
    with_classes(monkeypatch, 10)
    check_classes(model, ClassesConfig(num_classes=10))
    with pytest.raises(ValueError, match=r"text\.num_classes=1000: must be 10, as the model has"):
        check_classes(model, ClassesConfig())
    with pytest.raises(
        ValueError, match=r"text\.kind=t5: must be classes with model\.kind=toy_factored, which reads 10"
    ):
        check_classes(model, T5Config())


def with_classes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The toy reads classes, and no text."""
    described = lambda cfg: replace(factored_family.describe(cfg), num_classes=count, text="none")  # noqa: E731
    monkeypatch.setitem(families.FAMILIES, KIND, replace(factored_family.FAMILY, describe=described))


def layout() -> TokenLayout:
    return TokenLayout(families.describe(factored_family.ToyConfig()), SequenceParallel(view({})))


def preparation(encoder: Any, dropout: float) -> Any:
    """As much of it as text needs."""
    return Preparation(
        encoders=Encoders(autoencoder=None, text_encoder=encoder, device=CPU),
        objective=None,  # type: ignore[arg-type]
        conditioning=ConditioningConfig(dropout=DropoutConfig(text=dropout, pooled=0.7)),
        model=factored_family.ToyConfig(),
        layout=layout(),
        seed=3,
    )


def told_of(encoder: Any, text: Features, ids: tuple[int, ...]) -> Any:
    """What the model is told where half of all prompts are dropped, and pooled ones by draws of their own."""
    prepare = preparation(encoder, 0.5)
    drop_txt, drop_vec, _ = prepare._dropped(ids, 0, None)
    return prepare._text(text, drop_txt, drop_vec)


def features_of(encoder: Any, prompts: list[str]) -> Features:
    text = encoder.encode(prompts)
    return Features(latents=torch.zeros(len(prompts), 1), **{k: v for k, v in vars(text).items() if v is not None})


def test_dropped_prompts_in_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their features and masks stay, and the model is told; a class becomes the one that stands for none."""
    prompts, ids = ["a red circle", "", "two", "4"] * 8, tuple(range(32))
    encoder = t5(folder)
    told = told_of(encoder, features_of(encoder, prompts), ids)
    own = encoder.encode(prompts)
    assert 8 < told.dropped.sum() < 24 and told.label is None and told.pooled is None
    assert torch.equal(told.text_mask, own.mask) and torch.equal(told.text, own.txt)
    with monkeypatch.context() as patched:  # a vector that the model's own embedding stands in for, as in DiT
        described = lambda cfg: replace(factored_family.describe(cfg), text="none", pooled_dim=16)  # noqa: E731
        patched.setitem(families.FAMILIES, KIND, replace(factored_family.FAMILY, describe=described))
        told = told_of(clip(folder), features_of(clip(folder), prompts), ids)
        assert torch.equal(told.pooled, clip(folder).encode(prompts).y_vec) and told.text is None
        assert 8 < told.dropped.sum() < 24
    with_classes(monkeypatch, 10)
    classes = build_text_encoder(ClassesConfig(num_classes=10), CPU, torch.float32)
    told = told_of(classes, features_of(classes, [str(i % 10) for i in ids]), ids)
    wanted = torch.where(told.dropped, 10, torch.arange(32) % 10)
    assert torch.equal(told.label, wanted) and told.text is None


def test_no_prompt_in_sampling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own embedding stands behind the mask of the prompt that it is set against; another text that is moved
    away from has a mask of its own."""
    opt, x = SamplingOption(width=16, height=16, num_frames=1), torch.zeros(3, 1, 1, 16)
    encoder = t5(folder)
    parts: Any = SimpleNamespace(text_encoder=encoder, layout=layout(), device=CPU)
    prompts, avoided = ["a red circle", "two", "b"], ["", "ugly", ""]
    told = conditions_of(parts, avoided, x, opt, null=True, behind=prompts)
    assert told.dropped.tolist() == [True, False, True]
    assert torch.equal(told.text_mask, encoder.encode([prompts[0], "ugly", prompts[2]]).mask)
    own = conditions_of(parts, prompts, x, opt)
    assert not own.dropped.any() and torch.equal(own.text_mask, encoder.encode(prompts).mask)
    with_classes(monkeypatch, 10)
    classes = build_text_encoder(ClassesConfig(num_classes=10), CPU, torch.float32)
    parts = SimpleNamespace(text_encoder=classes, layout=layout(), device=CPU)
    assert conditions_of(parts, ["1", "2", "3"], x, opt).label.tolist() == [1, 2, 3]
    told = conditions_of(parts, ["", "5", ""], x, opt, null=True, behind=["1", "2", "3"])
    assert told.label.tolist() == [10, 5, 10] and told.text is None


@pytest.mark.parametrize("kind", ["t5", "clip", "classes"])
def test_stored_features(kind: str, folder: Path, tmp_path: Path) -> None:
    """What is read is what was written, with masks and labels; the empty prompt too."""
    encoder: Any = {
        "t5": lambda: t5(folder),
        "clip": lambda: clip(folder),
        "classes": lambda: build_text_encoder(ClassesConfig(num_classes=10), CPU, torch.float32),
    }[kind]()
    prompts = ["1", "", "7"]
    bucket = Bucket("16px", 1, 16, 16, batch_size=3)
    batch = MicroBatch(bucket=bucket, sample_ids=(0, 1, 2), epoch=0)
    written = replace(features_of(encoder, prompts), latents=torch.arange(3.0)[:, None])
    feature_store.write_shard(tmp_path, 0, [(batch, written)], "hash")
    null = encoder.encode([""])
    feature_store.write_null(tmp_path, {name: x for name, x in vars(null).items() if x is not None}, "hash")
    feature_store.write_index(tmp_path, 1, 1, {}, "hash")
    store = feature_store.FeatureStore(tmp_path)
    read = store.read(replace(batch, sample_ids=(2, 0)))
    for name, x in written.tensors().items():
        assert torch.equal(getattr(read, name), x[[2, 0]]), name
    again = StoredText(TextFeatures(**store.null())).encode([""])
    assert {n: x.tolist() for n, x in vars(again).items() if x is not None} == {
        n: x.tolist() for n, x in vars(null).items() if x is not None
    }


def test_in_configurations(tmp_path: Path) -> None:
    """Keys by kind, with their defaults."""
    from tests.unit.test_extending import RUN

    with pytest.raises(UserError, match=r"text\.clean='no': must be one of sampling, always, never"):
        load_config(RunConfig, RUN, ["text={kind: t5, clean: no}"])
    with pytest.raises(UserError, match="reads no classes as configured"):
        load_config(RunConfig, RUN, ["text={kind: classes, num_classes: 10}"])
    cfg: TextConfig = T5Config(max_tokens=120, clean="always")
    assert (cfg.kind, cfg.device, cfg.shard) == ("t5", "auto", False)
