"""Tiny T5 and CLIP in the layout in which the published ones are: whole models, of which the encoders are a part."""

from pathlib import Path

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
