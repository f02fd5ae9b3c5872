"""Seeded text features are readable, reproducible and independent of the batch; the real encoders load."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from opensora.models.text import TEXT_ENCODERS, ByteTextConfig, T5ClipConfig, build_text_encoder
from opensora.models.text.bytes import ByteTextEncoder
from opensora.utils.errors import UserError

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = ("left", "right", "up", "down")
SMALL = ByteTextConfig(dim=64, max_words=8)


@pytest.fixture(scope="module")
def small() -> ByteTextEncoder:
    return ByteTextEncoder(SMALL)


def test_shapes_padding_and_unit_variance(small: ByteTextEncoder) -> None:
    features = small.encode(["a red circle", "", "one two three four five six seven eight nine ten"])
    assert features.txt.shape == (3, 8, 64)
    assert features.y_vec.shape == (3, 64)
    assert features.mask is None
    assert torch.allclose(features.y_vec.std(dim=1, correction=0), torch.ones(3), atol=1e-3)
    used = features.txt.abs().sum(dim=2) > 0
    assert used.sum(dim=1).tolist() == [4, 1, 8]  # words and the end token; cut at max_words
    assert torch.isfinite(features.txt).all()


def test_mask_marks_real_words() -> None:
    features = ByteTextEncoder(ByteTextConfig(dim=64, max_words=8, mask=True)).encode(["a red circle", ""])
    assert features.mask is not None
    assert features.mask.sum(dim=1).tolist() == [4, 1]


def test_same_seed_same_weights_and_global_rng_untouched() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = ByteTextEncoder(SMALL).encode(["a blue cross moves up"])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    second = ByteTextEncoder(SMALL).encode(["a blue cross moves up"])
    other = ByteTextEncoder(ByteTextConfig(dim=64, max_words=8, seed=1)).encode(["a blue cross moves up"])
    assert torch.equal(first.txt, second.txt)
    assert torch.equal(first.y_vec, second.y_vec)
    assert not torch.allclose(first.y_vec, other.y_vec, atol=0.1)


def test_features_do_not_depend_on_the_batch(small: ByteTextEncoder) -> None:
    prompt = "a green square stays still"
    together = small.encode(["something much longer than the other prompt is", prompt, "x"])
    alone = ByteTextEncoder(SMALL).encode([prompt])
    assert torch.equal(together.txt[1], alone.txt[0])
    assert torch.equal(together.y_vec[1], alone.y_vec[0])


def test_word_order_is_seen(small: ByteTextEncoder) -> None:
    features = small.encode(["red over blue", "blue over red"])
    assert not torch.allclose(features.txt[0, 1], features.txt[1, 1], atol=0.1)


def test_any_string_is_encoded(small: ByteTextEncoder) -> None:
    features = small.encode(["naïve 日本 ", "  two   spaces ", "x" * 5000, "tab\tand\nnewline"])
    assert torch.isfinite(features.txt).all()
    assert torch.isfinite(features.y_vec).all()


def test_a_linear_probe_reads_every_word() -> None:
    encoder = ByteTextEncoder(ByteTextConfig(max_words=16))
    asked = list(product(COLOURS, SHAPES, DIRECTIONS))
    features = encoder.encode([f"a {c} {s} moves {d} on a gray background 8 FPS." for c, s, d in asked])
    kept_out = torch.arange(len(asked)) % 7 == 3
    for inputs in (features.y_vec, features.txt.mean(dim=1) * 4):
        for axis, names in enumerate((COLOURS, SHAPES, DIRECTIONS)):
            target = torch.eye(len(names))[[names.index(row[axis]) for row in asked]]
            x = torch.cat([inputs, torch.ones(len(asked), 1)], dim=1)
            seen = x[~kept_out]
            weights = torch.linalg.solve(seen.T @ seen + torch.eye(x.shape[1]), seen.T @ target[~kept_out])
            right = (x[kept_out] @ weights).argmax(dim=1) == target[kept_out].argmax(dim=1)
            assert right.float().mean() == 1


@pytest.mark.parametrize("wrong", [{"dim": 40}, {"depth": 0}, {"max_words": 0}])
def test_config_refuses(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*must be"):
        ByteTextConfig(**wrong)


@pytest.fixture(scope="module")
def real_folders(tmp_path_factory: pytest.TempPathFactory) -> T5ClipConfig:
    """Tiny random models in the layout of the published ones."""
    from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    t5, clip = tmp_path_factory.mktemp("t5"), tmp_path_factory.mktemp("clip")
    T5EncoderModel(T5Config(vocab_size=384, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2)).save_pretrained(t5)
    ByT5Tokenizer().save_pretrained(t5)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    raw = tmp_path_factory.mktemp("raw")
    (raw / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (raw / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(raw).save_pretrained(clip)
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(clip)
    return T5ClipConfig(t5_path=str(t5), clip_path=str(clip), max_tokens=24)


def test_t5_clip_features(real_folders: T5ClipConfig) -> None:
    encoder = build_text_encoder(real_folders, "cpu", torch.float32)
    assert (encoder.context_dim, encoder.vec_dim) == (32, 16)
    features = encoder.encode(["a red circle", "", "word " * 100])
    assert features.txt.shape == (3, 24, 32)
    assert features.y_vec.shape == (3, 16)
    assert features.mask is None
    assert torch.isfinite(features.txt).all()
    assert not features.txt.requires_grad
    assert torch.allclose(encoder.encode(["a red circle"]).y_vec, features.y_vec[:1], atol=1e-5)


def test_missing_models_are_one_line(tmp_path: Path) -> None:
    assert set(TEXT_ENCODERS) == {"bytes", "t5_clip", "t5", "umt5", "llava_clip", "clip", "classes"}
    with pytest.raises(UserError, match=r"text.t5_path is not set"):
        build_text_encoder(T5ClipConfig(), "cpu", torch.float32)
    with pytest.raises(UserError, match=r"text.t5_path=.*no config.json there") as caught:
        build_text_encoder(T5ClipConfig(t5_path=str(tmp_path), clip_path=str(tmp_path)), "cpu", torch.float32)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be loaded") as caught:
        build_text_encoder(T5ClipConfig(t5_path=str(tmp_path), clip_path=str(tmp_path)), "cpu", torch.float32)
    assert "\n" not in str(caught.value)
