"""umT5 as Wan reads it, LLaVA's Llama with CLIP as HunyuanVideo does: against transformers and the pipelines' steps."""

import html
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.models.base import Width
from opensora.models.text import TEXT_ENCODERS, LlavaClipConfig, T5Config, UMT5Config, build_text_encoder
from opensora.models.text.llava_clip import TEMPLATE
from opensora.models.text.umt5 import published_prompt
from opensora.utils.errors import UserError
from tests.text_models import write_clip_text, write_llama, write_text_models, write_umt5

PROMPTS = ["a red circle", "", "a circle moves " * 60, "  a&amp;b  \n red ", "naïve 日本 🙂 a"]
WORDS = "a red circle moves " + TEMPLATE.replace("{}", " ").replace("<|eot_id|>", " ")
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines of both models in diffusers' layout, and other forms of the same Llama."""
    root = tmp_path_factory.mktemp("text")
    write_umt5(root / "wan")
    hunyuan = root / "hunyuan"
    write_llama(hunyuan / "text_encoder", WORDS)
    write_clip_text(hunyuan / "text_encoder_2")
    for kind in ("lm", "llava"):
        write_llama(root / kind, WORDS, kind=kind)
    for number in ("", "_2"):
        (hunyuan / f"tokenizer{number}").mkdir()
        for file in (hunyuan / f"text_encoder{number}").iterdir():
            if file.suffix != ".safetensors" and file.name not in ("config.json", "generation_config.json"):
                shutil.move(file, hunyuan / f"tokenizer{number}" / file.name)
    return root


def umt5(folder: Path, **options: Any) -> Any:
    return build_text_encoder(UMT5Config(umt5_path=str(folder / "wan"), max_tokens=TOKENS, **options), "cpu", DTYPE)


def llava(folder: Path, llama: str = "hunyuan", **options: Any) -> Any:
    paths = {"llava_path": str(folder / llama), "clip_path": str(folder / "hunyuan")}
    return build_text_encoder(LlavaClipConfig(**paths, max_tokens=TOKENS, **options), "cpu", DTYPE)


DTYPE = torch.float64


def of_wan_pipeline(folder: Path, prompts: list[str]) -> Tensor:
    """``WanPipeline._get_t5_prompt_embeds``, without ftfy, which is not installed here."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "wan" / "tokenizer")
    model = UMT5EncoderModel.from_pretrained(folder / "wan" / "text_encoder").to(DTYPE).eval()
    clean = [re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip() for prompt in prompts]
    made = tokenizer(clean, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    found = model(made.input_ids, made.attention_mask).last_hidden_state
    lengths = made.attention_mask.gt(0).sum(dim=1)
    padded = [
        torch.cat([row[:n], row.new_zeros(TOKENS - n, row.shape[1])]) for row, n in zip(found, lengths, strict=True)
    ]
    return torch.stack(padded).detach()


def test_umt5_is_that_of_the_published_pipeline(folder: Path) -> None:
    encoder, wanted = umt5(folder), of_wan_pipeline(folder, PROMPTS)
    assert (encoder.context_dim, encoder.vec_dim) == (16, 0)
    found = encoder.encode(PROMPTS)
    assert found.txt.shape == (5, TOKENS, 16) and found.y_vec.shape == (5, 0) and found.mask is None
    assert (found.txt - wanted).abs().max() < 1e-8 * wanted.abs().max()
    used = found.txt.abs().sum(2) > 0
    assert used.sum(1).tolist()[1:3] == [1, TOKENS]  # no prompt is its end alone; a long one is cut
    assert torch.equal(used, used.cummin(1).values)  # zeros behind the prompt and nowhere else
    assert not found.txt.requires_grad


def test_prompts_are_cleaned_as_ftfy_and_the_pipeline_do() -> None:
    """What ftfy 6.3 makes of these, written out."""
    made = {
        "色调艳丽，过曝，静态": "色调艳丽,过曝,静态",
        "a “quoted” word—dash…": 'a "quoted" word—dash…',
        "\ufb01ne ＡＢＣ　ｘ": "fine ABC x",
        "A&amp;amp;B &lt;b&gt;": "A&B <b>",
        "x\u2028y\r\nz": "x y z",
        "cafe\u0301": "café",
        "\x1b[31mred\x1b[0m \ufeffbom": "red bom",
        "  two   spaces ": "two spaces",
        "": "",
    }
    assert {text: published_prompt(text) for text in made} == made


def of_hunyuan_pipeline(folder: Path, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """``HunyuanVideoPipeline.encode_prompt``: hidden states third from the end, 95 cut off, mask, CLIP's pooled."""
    from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

    hunyuan = folder / "hunyuan"
    model = LlamaModel.from_pretrained(hunyuan / "text_encoder").to(DTYPE).eval()
    made = AutoTokenizer.from_pretrained(hunyuan / "tokenizer")(
        [TEMPLATE.replace("{}", prompt) for prompt in prompts],
        max_length=TOKENS + 95,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
        return_attention_mask=True,
    )
    states = model(made.input_ids, attention_mask=made.attention_mask, output_hidden_states=True).hidden_states
    clip = CLIPTextModel.from_pretrained(hunyuan / "text_encoder_2").to(DTYPE).eval()
    ids = AutoTokenizer.from_pretrained(hunyuan / "tokenizer_2")(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    return states[-3][:, 95:].detach(), made.attention_mask[:, 95:].bool(), clip(ids.input_ids).pooler_output.detach()


def test_llava_and_clip_are_those_of_the_published_pipeline(folder: Path) -> None:
    encoder, (txt, mask, pooled) = llava(folder), of_hunyuan_pipeline(folder, PROMPTS)
    assert (encoder.context_dim, encoder.vec_dim) == (16, 16)
    found = encoder.encode(PROMPTS)
    assert found.mask is not None and torch.equal(found.mask, mask)
    assert (found.txt - txt)[mask].abs().max() < 1e-8 * txt.abs().max()
    assert torch.allclose(found.y_vec, pooled, atol=1e-10)
    assert mask.sum(1).tolist()[:3] == [4, 1, TOKENS]  # the prompt and the end of the turn; a long one is cut
    assert found.txt.shape == (5, TOKENS, 16)
    # Llama saw the instruction that is cut off: the same words behind another one are something else.
    other = llava(folder)
    other._llama_tokenizer = _Without(other._llama_tokenizer)
    assert not torch.allclose(other.encode(PROMPTS[:1]).txt[:, :4], found.txt[:1, :4], atol=1e-2)


class _Without:
    """A tokenizer that does not see a word of the instruction."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, prompts: list[str], **options: Any) -> Any:
        return self._tokenizer([prompt.replace("theme", "video") for prompt in prompts], **options)


def test_the_last_layers_and_norm_are_not_loaded(folder: Path) -> None:
    encoder = llava(folder)
    names = [name for name, _ in encoder._modules[0].named_parameters()]
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}  # of five
    assert not any(name.startswith("norm") for name in names)
    assert encoder._modules[0].rotary_emb.inv_freq.dtype == torch.float32
    half = build_text_encoder(encoder.cfg, "cpu", torch.bfloat16)
    assert torch.equal(half._modules[0].rotary_emb.inv_freq, encoder._modules[0].rotary_emb.inv_freq)
    assert (half.encode(PROMPTS).txt - encoder.encode(PROMPTS).txt).abs().mean() < 0.1


@pytest.mark.parametrize("form", ["lm", "llava"])
def test_llama_in_a_larger_model_is_the_same(form: str, folder: Path) -> None:
    """With its head, or with a LLaVA's eyes, in the names of either."""
    assert torch.equal(llava(folder, form).encode(PROMPTS).txt, llava(folder).encode(PROMPTS).txt)


def test_names_of_newer_and_older_llavas(folder: Path, tmp_path: Path) -> None:
    wanted = llava(folder).encode(PROMPTS).txt
    tensors = load_file(folder / "hunyuan" / "text_encoder" / "model.safetensors")
    for prefix, more in (
        ("language_model.model.", {"language_model.lm_head.weight": 3, "vision_tower.vision_model.x.weight": 2}),
        ("model.language_model.", {"lm_head.weight": 3, "model.vision_tower.vision_model.x.weight": 2}),
        ("", {"layers.1.self_attn.rotary_emb.inv_freq": 2}),
    ):
        place = tmp_path / (prefix or "plain")
        shutil.copytree(folder / "llava", place)
        renamed = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        save_file(renamed | {name: torch.zeros(n) for name, n in more.items()}, place / "model.safetensors")
        assert torch.equal(llava(folder, str(place)).encode(PROMPTS).txt, wanted), prefix
    renamed["layers.2.mlp.more.weight"] = renamed.pop("layers.1.mlp.up_proj.weight")
    save_file(renamed, place / "model.safetensors")
    with pytest.raises(
        UserError, match=r"1 missing: layers.1.mlp.up_proj.weight.*unexpected: layers.2.mlp.more"
    ) as told:
        llava(folder, str(place))
    assert "\n" not in str(told.value) and str(told.value).startswith(f"text.llava_path={place}: ")


@pytest.mark.parametrize("make", [umt5, llava])
def test_features_do_not_depend_on_the_batch_or_on_what_is_kept(make: Any, folder: Path) -> None:
    """Bit for bit: alone, beside longer ones, kept, and read once more."""
    encoder = make(folder)
    together = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = make(folder, cache_mib=0).encode([prompt])
        again = encoder.encode([prompt])
        for name in ("txt", "y_vec", "mask"):
            whole, one = getattr(together, name), getattr(alone, name)
            assert (whole is None) == (one is None)
            if whole is not None:
                assert torch.equal(whole[row], one[0]) and torch.equal(getattr(again, name), one), (name, prompt)


def test_equal_prompts_after_cleaning_are_encoded_once(folder: Path) -> None:
    encoder, seen = umt5(folder), []
    whole = encoder._encoded
    encoder._encoded = lambda prompts, length: seen.append(prompts) or whole(prompts, length)
    encoder.encode(["a  b", "a b", " a b\n"])
    assert seen == [["a b"]]


def test_stated_before_anything_is_loaded(folder: Path) -> None:
    cfg = UMT5Config(umt5_path=str(folder / "wan"))
    kind = TEXT_ENCODERS["umt5"]
    assert kind.stated is not None
    assert kind.stated(cfg) == (Width(16, f"text.umt5_path={folder / 'wan'}"), Width(0, "text.kind=umt5"))
    kind.check(cfg)
    both = LlavaClipConfig(llava_path=str(folder / "llava"), clip_path=str(folder / "hunyuan"))
    kind = TEXT_ENCODERS["llava_clip"]
    assert kind.stated is not None
    assert [width.size for width in kind.stated(both)] == [16, 16]
    kind.check(both)
    assert set(kind.files) == {"llava_path", "clip_path"}


def test_wrong_folders_are_one_line(folder: Path, tmp_path: Path) -> None:
    write_text_models(tmp_path)
    write_llama(tmp_path / "short", WORDS, layers=2)
    wrong = {
        "umt5_path is not set: give the folder": UMT5Config(),
        "umt5_path=.*is of a model of type t5, must be of type umt5": UMT5Config(umt5_path=str(tmp_path / "t5")),
        "llava_path=.*is of a model of type clip, must be of type llava or llama": LlavaClipConfig(
            llava_path=str(tmp_path / "clip"), clip_path=str(folder / "hunyuan")
        ),
        "clip_path is not set": LlavaClipConfig(llava_path=str(folder / "hunyuan")),
        "llava_path=.*num_hidden_layers=2, must be more than 2": LlavaClipConfig(
            llava_path=str(tmp_path / "short"), clip_path=str(folder / "hunyuan")
        ),
    }
    for said, cfg in wrong.items():
        kind = TEXT_ENCODERS[cfg.kind]
        assert kind.stated is not None
        with pytest.raises(UserError, match=said) as caught:
            kind.stated(cfg)
            kind.check(cfg)
        assert str(caught.value).startswith("text.") and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="max_tokens=0: must be"):
        UMT5Config(max_tokens=0)
    with pytest.raises(ValueError, match="max_tokens=0: must be"):
        LlavaClipConfig(max_tokens=0)
    with pytest.raises(ValueError, match="with device=cpu must be false"):
        replace(LlavaClipConfig(), device="cpu", shard=True)


def test_a_plain_t5_of_a_pipeline_is_found(tmp_path: Path) -> None:
    """Where a pipeline holds several text encoders, each key takes its own."""
    write_text_models(tmp_path / "all")
    shutil.copytree(tmp_path / "all" / "clip", tmp_path / "flux" / "text_encoder")
    shutil.copytree(tmp_path / "all" / "t5", tmp_path / "flux" / "text_encoder_2")
    found = build_text_encoder(T5Config(t5_path=str(tmp_path / "flux"), max_tokens=8), "cpu", DTYPE)
    wanted = build_text_encoder(T5Config(t5_path=str(tmp_path / "all" / "t5"), max_tokens=8), "cpu", DTYPE)
    assert torch.equal(found.encode(["a red"]).txt, wanted.encode(["a red"]).txt)
