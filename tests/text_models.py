"""Tiny T5 and CLIP in the layout in which the published ones are: whole models, of which the encoders are a part."""

import json
import re
from pathlib import Path
from typing import Any

import torch

WORDS = ("<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>", "circle</w>")


def write_text_models(folder: Path, *, width: int = 16, layers: int = 2, vocabulary: int = 384) -> None:
    """Write the folders ``t5``, with a decoder, and ``clip``, with eyes, with tokenizers and weights of a seed."""
    from transformers import ByT5Tokenizer, CLIPConfig, CLIPModel, CLIPTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=4,
        num_heads=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    ByT5Tokenizer().save_pretrained(folder / "t5")
    small = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    text = {**small, "vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    seen = {**small, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=seen)).save_pretrained(folder / "clip")
    CLIPTokenizer(vocab={word: at for at, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder / "clip")


SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>", "<unk>")


def write_umt5(folder: Path, *, width: int = 16, layers: int = 2, vocabulary: int = 384) -> None:
    """umT5's encoder with weights of a seed in ``text_encoder``, and a tokenizer of bytes in ``tokenizer``."""
    from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    cfg = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=4,
        num_heads=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    UMT5EncoderModel(cfg).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")


def write_llama_tokenizer(folder: Path, words: str) -> int:
    """Files of a tokenizer that knows these words and the signs of Llama 3's chats, and puts its first token before
    all; the size of its vocabulary."""
    from transformers import PreTrainedTokenizerFast

    # Cut so that the instruction of HunyuanVideo is 95 tokens, as by the published tokenizer.
    cuts = r"\s+|(?=[.,:])|(?<=[.,:])|(?=ships|itions)"
    known = [*SPECIAL, *(word for word in re.split(cuts, words) if word), *"abcdefghijklmnopqrstuvwxyz.,:"]
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys(known))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first = SPECIAL[0]
    stated = {
        "version": "1.0",
        "added_tokens": [{"id": at, "content": sign, "special": True, **flags} for at, sign in enumerate(SPECIAL)],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": cuts}, "behavior": "Removed", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {first: {"id": first, "ids": [0], "tokens": [first]}},
        },
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    signs = {"bos_token": first, "eos_token": "<|eot_id|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **signs).save_pretrained(folder)
    return len(vocabulary)


def write_llama(folder: Path, words: str, *, width: int = 16, layers: int = 5, kind: str = "llama") -> None:
    """A small Llama with weights of a seed: the model alone (``llama``), with its head (``lm``), or in a LLaVA."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    vocabulary = write_llama_tokenizer(folder, words)
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=500000.0,
        max_position_embeddings=512,
        initializer_range=0.3,  # so that tokens tell on one another
        pad_token_id=4,
    )
    model: Any = LlamaForCausalLM(cfg)
    if kind == "llava":
        eyes = CLIPVisionConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        whole = Llava(LlavaConfig(vision_config=eyes, text_config=cfg, image_token_index=5))
        whole.model.language_model.load_state_dict(model.model.state_dict())
        model = whole
    (model.model if kind == "llama" else model).save_pretrained(folder)


def write_clip_text(folder: Path, *, width: int = 16, layers: int = 2) -> None:
    """The text half of a CLIP, with its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(1)
    small = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    cfg = CLIPTextConfig(vocab_size=len(WORDS), num_attention_heads=2, **small, **ids)
    CLIPTextModel(cfg).save_pretrained(folder)
    CLIPTokenizer(vocab={word: at for at, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder)


def write_clip_vision(folder: Path, *, width: int = 16, layers: int = 3, size: int = 28, whole: bool = False) -> None:
    """The image half of a CLIP as Wan's pipelines have it, or a whole CLIP."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    small = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
    seen = {**small, "num_hidden_layers": layers, "image_size": size, "patch_size": 7, "hidden_act": "gelu"}
    model = CLIPVisionModel(CLIPVisionConfig(**seen))
    if whole:
        text = {**small, "num_hidden_layers": 1, "vocab_size": len(WORDS)}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=seen))
    model.save_pretrained(folder)
