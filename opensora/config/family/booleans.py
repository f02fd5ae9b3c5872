"""What is on or off in the Open-Sora family: in its files True or False, on its command lines the words of argparse."""

from collections.abc import Mapping
from typing import Any

from opensora.config.family import keys as table
from opensora.config.family.translation import Translation
from opensora.config.schema import types_at
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short

WORDS: dict[str, bool] = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}
NONE = ("none", "null")

# By the family's dotted names; keys that stand for one of ours have its type, too.
BOOLEANS = (
    *("prompt_as_path", "offload_model", "llm_refine", "refine_prompt", "use_sdedit", "use_t2i2v", "is_causal_vae"),
    *("use_oscillation_guidance_for_text", "use_oscillation_guidance_for_image", "use_cosine_scheduler", "async_io"),
    *("use_image_transform", "load_video_features", "load_text_features", "cached_video", "cached_text"),
    *("noise_augmentation", "grad_checkpoint", "save_master_weights", "load_master_weights", "start_from_scratch"),
    *("record_time", "record_barrier"),
    *(f"dataset.{name}" for name in ("use_image_transform", "memory_efficient", "dummy_text_feature")),
    *("dataset.cached_text", "dataset.cached_video"),
    *(f"model.{name}" for name in ("enable_flash_attn", "enable_flashattn", "enable_layernorm_kernel", "adapt_16ch")),
    *(f"model.{name}" for name in ("enable_sequence_parallelism", "force_huggingface", "strict_load", "use_cond")),
    *("model.use_liger_rope", "model.no_temporal_pos_emb"),
    *(f"vae.{name}" for name in ("temporal_overlap", "use_tiled_conv3d", "local_files_only", "force_huggingface")),
    *("ae.use_spatial_tiling", "ae.use_temporal_tiling", "ae.from_scratch", "t5.shardformer", "clip.shardformer"),
    *("text_encoder.shardformer", "text_encoder.local_files_only", "optim.adamw_mode"),
    *(f"scheduler.{name}" for name in ("use_oscillation_guidance", "use_flaw_fix", "scale_image_weight")),
    *(f"sampling_option.{name}" for name in ("is_causal_vae", "text_osci", "image_osci", "scale_temporal_osci")),
)
# In mappings that are read as one value.
INSIDE = {
    "plugin_config": ("enable_sequence_parallelism", "static_graph", "overlap_allgather", "master_weights"),
    "img_flux": ("use_liger_rope", "strict_load"),
}


def is_boolean(cls: type, key: str) -> bool:
    """Whether a key of the family is on or off, by its dotted name."""
    rule = table.KEYS.get(key, table.TOGETHER)
    hints = [hint for target in (rule.sampling, rule.training) if target for hint in types_at(cls, target.split("."))]
    return key in BOOLEANS or bool in hints


def read_word(flag: str, text: str) -> bool | None:
    """What a word of the command line says.

    Raises:
        UserError: neither yes nor no.
    """
    word = text.lower()
    if word not in WORDS and word not in NONE:
        raise UserError(f"{flag}={short(text)} (command line): must be yes or no (also true, false, 1, 0)")
    return WORDS.get(word)


def booleans(t: Translation) -> None:
    """That what is on or off is True, False or None: a text such as 'no' would count as yes.

    Raises:
        UserError: another value.
    """
    wanted = "must be True or False"
    for key in BOOLEANS:
        if not isinstance(t.given.get(key), bool | None):
            raise t.fail(key, wanted)
    for key, names in INSIDE.items():
        given: Any = t.given.get(key)
        for name in names if isinstance(given, Mapping) else ():
            if not isinstance(given.get(name), bool | None):
                raise t.fail(key, f"{name} {wanted}")
