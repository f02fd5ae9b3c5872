"""The keys of the Open-Sora family's configuration files (1.0 to 1.3, and 2), and what each is here: one table.

``KEYS`` is by the family's dotted name. What a key cannot say alone, such as a size that takes two of them, is put
together in models.py and jobs.py; these are marked ``TOGETHER``. A new key is one more line.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from opensora.config.family.masks import masks_of, types_of
from opensora.datasets.buckets.sizes_1x import FRAME_COUNTS

Read = Callable[[Any], Any]  # a value of theirs -> ours; ValueError: what must hold


class Key(NamedTuple):
    """What a key of theirs is here."""

    sampling: str = ""  # our key in a sampling job; empty: none
    training: str = ""  # our key in a training run; empty: none
    read: Read | None = None  # None: the value as it is
    why: str = ""  # why it has none
    together: bool = False  # read beside others
    only: Any = None  # the one value that there is here


def both(key: str, read: Read | None = None) -> Key:
    return Key(key, key, read)


def no_meaning(why: str) -> Key:
    return Key(why=why)


TOGETHER = Key(together=True)


def path_of(value: Any) -> Any:
    """Paths are relative to where the command runs, with or without ./ in front."""
    return value.removeprefix("./") if isinstance(value, str) else value


def precision_of(value: Any) -> Any:
    """fp16 is computed as bf16, which needs no loss scaling."""
    return "bf16" if value == "fp16" else value


def _wandb(value: Any) -> Any:
    if isinstance(value, str):
        value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
            value.lower(), value
        )
    return ("online" if value else "off") if isinstance(value, bool) else value


def motion_of(value: Any) -> Any:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value


def prefix_of(value: Any) -> Any:
    return f"{value}_" if isinstance(value, str) and value else value


def frames_of(value: Any) -> Any:
    """A number of frames. Lengths have names from 1.2 on: 1x is 51 frames, and so is 2s."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"must be a whole number, or one of {', '.join(FRAME_NAMES)}")
    if value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if value not in FRAME_NAMES:
        raise ValueError(f"must be a whole number, or one of {', '.join(FRAME_NAMES)}")
    return FRAME_NAMES[value]


FRAME_NAMES = FRAME_COUNTS | {"image": 1}

# type -> what it is here. Sizes are those that the family names.
MODELS: dict[str, dict[str, Any]] = {
    "DiT-XL/2": {"kind": "dit", "size": "xl2"},
    "DiT-XL/2x2": {"kind": "dit", "size": "xl2x2"},
    "Latte-XL/2": {"kind": "latte", "size": "xl2"},
    "PixArt-XL/2": {"kind": "pixart", "size": "xl2"},
    "PixArt-1B/2": {"kind": "pixart", "size": "1b2"},
    "PixArtMS-XL/2": {"kind": "pixart_ms", "size": "xl2"},
    "PixArt-Sigma-XL/2": {"kind": "pixart_sigma", "size": "xl2"},
    "PixArtSigma-XL/2": {"kind": "pixart_sigma", "size": "xl2"},
    "STDiT-XL/2": {"kind": "stdit", "size": "xl2"},
    "STDiT2-XL/2": {"kind": "stdit2", "size": "xl2"},
    "STDiT3-XL/2": {"kind": "stdit3", "size": "xl2"},
    "STDiT3-3B/2": {"kind": "stdit3", "size": "3b2"},
    "flux": {"kind": "mmdit"},
}
# What a file does not say, where the family's code has another default than the kind has here.
DEFAULTS: dict[str, dict[str, Any]] = {"mmdit": {"cond_embed": False}}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "VideoAutoencoderKL": {"kind": "sd"},
    "VideoAutoencoderKLTemporalDecoder": {"kind": "sd_temporal_decoder"},
    "OpenSoraVAE_V1_2": {"kind": "opensora_v1_2"},
    "OpenSoraVAE_V1_3": {"kind": "opensora_v1_3"},
    "hunyuan_vae": {"kind": "hunyuan"},
    "dc_ae": {"kind": "dc_ae"},
    "autoencoder_2d": {"kind": "flux2d"},
}
LATENT_CHANNELS = {"opensora_v1_3": 16}  # of autoencoders behind the models of 1.x; others: 4
TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "t5": {"kind": "t5"},
    "clip": {"kind": "clip"},
    "classes": {"kind": "classes"},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "iddpm": {"kind": "iddpm"},
    "iddpm-speed": {"kind": "iddpm", "speed": True},
    "dpm-solver": {"kind": "iddpm"},
    "rflow": {"kind": "rectified_flow_v1"},
}
# Data sets of clips that training reads: from 1.1 on, and those of Open-Sora 2.
DATASETS = ("VideoTextDataset", "VariableVideoTextDataset", "video_text", "cached_video_text")
SOLVERS = {"iddpm": "ddpm", "iddpm-speed": "ddpm", "dpm-solver": "dpm_solver", "rflow": "euler"}

_BY_KIND = "the model's kind says what it is told"
_MADE = "the index is built once and kept (data.index)"
_LOCAL = "files are read where they lie; python -m opensora.cli.download fetches published ones"
_MEMORY = "torch keeps pinned memory by itself"

KEYS: dict[str, Key] = {
    # What is sampled
    "num_frames": TOGETHER,
    "image_size": TOGETHER,
    "resolution": TOGETHER,
    "aspect_ratio": TOGETHER,
    "fps": TOGETHER,
    "frame_interval": TOGETHER,
    "save_fps": TOGETHER,
    "fps_save": Key("sampling.fps"),
    "batch_size": TOGETHER,
    "prompt": TOGETHER,
    "prompt_path": TOGETHER,
    "cond_type": Key("cond_type"),
    "loop": Key("loop"),
    "condition_frame_length": Key("condition_frame_length"),
    "condition_frame_edit": Key("condition_frame_edit"),
    "align": Key("align"),
    "reference_path": TOGETHER,
    "reference_txt_path": TOGETHER,
    "mask_strategy": TOGETHER,
    "csv_reference_column_name": TOGETHER,
    "ref": Key("ref"),
    "neg_prompt": TOGETHER,
    "image_cfg_scale": Key("sampling.guidance_img"),
    "guidance": Key("sampling.guidance"),
    "guidance_img": Key("sampling.guidance_img"),
    "num_steps": Key("sampling.num_steps"),
    "use_sdedit": Key("sampling.use_sdedit"),
    "use_oscillation_guidance_for_text": TOGETHER,
    "use_oscillation_guidance_for_image": TOGETHER,
    "motion_score": TOGETHER,
    "aes": Key("aes"),
    "flow": Key("flow"),
    "camera_motion": Key("camera_motion"),
    "llm_refine": Key("refine.prompts"),
    "refine_prompt": Key("refine.prompts"),
    "prompt_generator": no_meaning("refine.url and refine.model say who writes prompts out"),
    "num_prompt_generator": no_meaning("refine.url and refine.model say who writes prompts out"),
    "watermark": TOGETHER,
    "save_dir": Key("save_dir", "", path_of),
    "sample_name": TOGETHER,
    "start_index": Key("start_index"),
    "end_index": Key("end_index"),
    "num_sample": Key("num_sample"),
    "prompt_as_path": Key("prompt_as_path"),
    "verbose": no_meaning("progress is always shown"),
    "multi_resolution": no_meaning(_BY_KIND),
    "offload_model": TOGETHER,
    "super_resolution": no_meaning("clips are not enlarged here"),
    "deflicker": no_meaning("clips are not smoothed here"),
    # What is trained on
    "data_path": TOGETHER,
    "root": TOGETHER,
    "use_image_transform": no_meaning("stills and clips of one frame are cut alike"),
    "dataset.type": TOGETHER,
    "dataset.data_path": TOGETHER,
    "dataset.root": TOGETHER,
    "dataset.num_frames": TOGETHER,
    "dataset.frame_interval": TOGETHER,
    "dataset.image_size": TOGETHER,
    "dataset.transform_name": TOGETHER,
    "dataset.use_image_transform": no_meaning("stills and clips of one frame are cut alike"),
    "dataset.fps_max": TOGETHER,
    "dataset.vmaf": Key("", "data.prompt_suffix"),
    "dataset.memory_efficient": no_meaning("tables are mapped, not loaded"),
    "dataset.dummy_text_feature": no_meaning("data.features names what is stored"),
    "dataset.cached_text": no_meaning("data.features names what is stored"),
    "dataset.cached_video": no_meaning("data.features names what is stored"),
    "bucket_config": TOGETHER,
    "mask_ratios": Key("", "conditioning.masks", masks_of),
    "mask_types": Key("", "conditioning.mask_types", types_of),
    "condition_config": Key("", "conditioning.references"),
    "drop_condition": Key("", "conditioning.dropout.conditions"),
    "dropout_ratio.t5": Key("", "conditioning.dropout.text"),
    "dropout_ratio.clip": Key("", "conditioning.dropout.pooled"),
    "num_workers": Key("", "data.workers"),
    "prefetch_factor": Key("", "data.prefetch"),
    "num_bucket_build_workers": no_meaning(_MADE),
    "load_video_features": TOGETHER,
    "load_text_features": TOGETHER,
    "cached_video": no_meaning("data.features names what is stored"),
    "cached_text": no_meaning("data.features names what is stored"),
    "noise_augmentation": TOGETHER,
    "noise_prob": no_meaning("belongs to noise_augmentation"),
    "noise_strength": no_meaning("belongs to noise_augmentation"),
    # How it is spread over processes
    "dtype": TOGETHER,
    "plugin": TOGETHER,
    "plugin_config": TOGETHER,
    "plugin_ae": no_meaning("vae_parallel shares out what is coded"),
    "plugin_config_ae": no_meaning("vae_parallel shares out what is coded"),
    "sp_size": TOGETHER,
    "grad_checkpoint": TOGETHER,
    "grad_ckpt_settings": TOGETHER,
    "grad_ckpt_buffer_size": no_meaning("parallel.recompute.offload moves what is kept to the CPU"),
    "pin_memory_cache_pre_alloc_numels": no_meaning(_MEMORY),
    # How it is trained
    "lr": TOGETHER,
    "eps": TOGETHER,
    "adam_eps": Key("", "optim.eps"),
    "warmup": TOGETHER,
    "warmup_steps": TOGETHER,
    "update_warmup_steps": no_meaning("steps are counted from the start of the run"),
    "use_cosine_scheduler": TOGETHER,
    "grad_clip": Key("", "optim.clip_norm"),
    "ema_decay": TOGETHER,
    "accumulation_steps": Key("", "data.micro_batches"),
    "optim.cls": TOGETHER,
    "optim.lr": TOGETHER,
    "optim.eps": TOGETHER,
    "optim.betas": Key("", "optim.betas"),
    "optim.weight_decay": Key("", "optim.weight_decay"),
    "optim.adamw_mode": TOGETHER,
    "seed": TOGETHER,
    "outputs": Key("", "output", path_of),
    "wandb": Key("", "log.wandb", _wandb),
    "wandb_project": Key("", "log.wandb_project"),
    "epochs": TOGETHER,
    "log_every": Key("", "train.log_every"),
    "ckpt_every": Key("", "train.checkpoint_every"),
    "keep_n_latest": Key("", "train.checkpoint_keep"),
    "async_io": Key("", "train.checkpoint_async"),
    "save_master_weights": no_meaning("checkpoints always hold the masters"),
    "load_master_weights": no_meaning("checkpoints always hold the masters"),
    "load": TOGETHER,
    "load_lora": TOGETHER,
    "ckpt_path_lora": TOGETHER,
    "start_from_scratch": TOGETHER,
    "record_time": no_meaning("metrics.jsonl has the time of every part of a step"),
    "record_barrier": no_meaning("metrics.jsonl has the time of every part of a step"),
    # Models; other keys of model are those of its kind here
    "model.type": TOGETHER,
    "model.from_pretrained": TOGETHER,
    "model.class_dropout_prob": TOGETHER,
    "model.enable_flash_attn": TOGETHER,
    "model.enable_flashattn": TOGETHER,
    "model.enable_layernorm_kernel": TOGETHER,
    "model.enable_sequence_parallelism": no_meaning("parallel.mesh says how samples are cut over processes"),
    "model.force_huggingface": no_meaning(_LOCAL),
    "model.cache_dir": no_meaning(_LOCAL),
    "model.strict_load": no_meaning("weights must always fit"),
    "model.use_liger_rope": TOGETHER,
    "model.grad_ckpt_settings": TOGETHER,
    "model.adapt_16ch": no_meaning("train.init_from widens weights of 4 channels by itself"),
    "model.use_cond": no_meaning("model.cond_embed is on for 1.3"),
    "model.drop_path": Key(only=0.0),  # as in all published configurations
    "model.no_temporal_pos_emb": TOGETHER,
    "model.dtype": no_meaning("parallel.precision says it"),
    "vae.type": TOGETHER,
    "vae.from_pretrained": TOGETHER,
    "vae.subfolder": TOGETHER,
    "vae.micro_batch_size": Key("vae.micro_batch", "vae.micro_batch"),
    "vae.micro_batch_size_2d": both("vae.micro_batch_2d"),
    "vae.micro_frame_size": both("vae.micro_frame_size"),
    "vae.temporal_overlap": both("vae.temporal_overlap"),
    "vae.normalization": both("vae.normalization"),
    "vae.scaling_factor": both("vae.scale"),
    "vae.z_channels": Key(only=16),
    "vae.tile_size": no_meaning("convolutions are cut by vae.micro_frame_size"),
    "vae.use_tiled_conv3d": no_meaning("convolutions are cut by vae.micro_frame_size"),
    "vae.cache_dir": no_meaning(_LOCAL),
    "vae.local_files_only": no_meaning(_LOCAL),
    "vae.force_huggingface": no_meaning(_LOCAL),
    "vae_out_channels": no_meaning("the autoencoder's kind says it"),
    "text_encoder.type": TOGETHER,
    "text_encoder.from_pretrained": TOGETHER,
    "text_encoder.model_max_length": TOGETHER,
    "text_encoder.num_classes": both("text.num_classes"),
    "text_encoder.shardformer": TOGETHER,
    "text_encoder.cache_dir": no_meaning(_LOCAL),
    "text_encoder.local_files_only": no_meaning(_LOCAL),
    "text_encoder.dtype": no_meaning("encoders compute in the job's precision"),
    "text_encoder_output_dim": no_meaning("the encoder's files say it"),
    "model_max_length": TOGETHER,
    "scheduler.type": TOGETHER,
    "scheduler.num_sampling_steps": Key("sampling.num_steps"),
    "scheduler.cfg_scale": Key("sampling.guidance"),
    "scheduler.cfg_channel": Key("sampling.cfg_channel"),
    "scheduler.use_oscillation_guidance": TOGETHER,
    "scheduler.force_num": Key("sampling.force_num"),
    "scheduler.use_flaw_fix": Key("sampling.use_flaw_fix"),
    "scheduler.scale_image_weight": Key("sampling.scale_image_weight"),
    "scheduler.initial_image_scale": Key("sampling.initial_image_scale"),
    "scheduler.drop_condition": Key("", "conditioning.dropout.conditions"),
    "scheduler.x_cond_weight": Key("", "conditioning.known_weight"),
    # Models of Open-Sora 2
    "ae.type": TOGETHER,
    "ae.from_pretrained": both("vae.path", path_of),
    "ae.use_spatial_tiling": both("vae.spatial_tiling"),
    "ae.use_temporal_tiling": both("vae.temporal_tiling"),
    "ae.spatial_tile_size": both("vae.tile_size"),
    "ae.temporal_tile_size": both("vae.tile_frames"),
    "ae.tile_overlap_factor": both("vae.tile_overlap"),
    "ae.scaling_factor": both("vae.scale"),
    "ae.in_channels": Key(only=3),
    "ae.out_channels": Key(only=3),
    "ae.layers_per_block": Key(only=2),
    "ae.latent_channels": Key(only=16),
    "ae.model_name": Key(only="dc-ae-f32t4c128"),
    "ae.from_scratch": no_meaning("weights come from vae.path"),
    "ae_spatial_compression": no_meaning("the autoencoder's kind says it"),
    "is_causal_vae": no_meaning("the autoencoder's kind says it"),
    "patch_size": no_meaning("model.patch_size says it"),
    **{f"{name}.type": TOGETHER for name in ("t5", "clip")},
    **{f"{name}.from_pretrained": both(f"text.{name}_path", path_of) for name in ("t5", "clip")},
    **{f"{name}.cache_dir": no_meaning(_LOCAL) for name in ("t5", "clip")},
    "t5.max_length": both("text.max_tokens"),
    "t5.shardformer": TOGETHER,
    "clip.max_length": TOGETHER,
    "clip.shardformer": no_meaning("CLIP is small: every process has all of it"),
    "sampling_option.temporal_reduction": no_meaning("the autoencoder's kind says it"),
    "sampling_option.is_causal_vae": no_meaning("the autoencoder's kind says it"),
    **{
        f"sampling_option.{name}": Key(f"sampling.{name}")
        for name in ("resolution", "aspect_ratio", "width", "height", "num_frames", "num_steps", "shift", "flow_shift")
    },
    **{
        f"sampling_option.{name}": Key(f"sampling.{name}")
        for name in ("guidance", "guidance_img", "text_osci", "image_osci", "scale_temporal_osci", "method")
    },
    "sampling_option.seed": TOGETHER,
    "use_t2i2v": TOGETHER,
    "img_flux": TOGETHER,
    "img_flux_ae": TOGETHER,
    "img_resolution": TOGETHER,
}
# Keys of plugin_config: those that say something here, and those that the engines here decide by themselves.
PLUGIN = ("zero_stage", "sp_size", "tp_size", "pp_size", "sequence_parallelism_mode", "enable_sequence_parallelism")
ENGINES = (
    "static_graph",
    "overlap_allgather",
    "reduce_bucket_size_in_m",
    "master_weights",
    "initial_scale",
    "precision",
)
# What img_flux_ae may say of the autoencoder of stills: the published one.
STILL_AUTOENCODER: dict[str, Any] = {
    **{"in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16},
    **{"scale_factor": 0.3611, "shift_factor": 0.1159},
}
# Sections whose keys are above one by one; other mappings are values.
SECTIONS: tuple[str, ...] = (
    *("model", "vae", "text_encoder", "scheduler", "dataset"),
    *("ae", "t5", "clip", "sampling_option", "dropout_ratio", "optim"),
)

# Flags of the family's commands that are called otherwise than the key they set.
FLAGS: dict[str, str] = {
    "ckpt_path": "model.from_pretrained",
    "cfg_scale": "scheduler.cfg_scale",
    "num_sampling_steps": "scheduler.num_sampling_steps",
    "flash_attn": "model.enable_flash_attn",
    "layernorm_kernel": "model.enable_layernorm_kernel",
    "image_prompt": "reference_path",
    "image_prompt_path": "reference_path",
    "use_oscillation_guidance": "scheduler.use_oscillation_guidance",
    "force_huggingface": "model.force_huggingface",
}
MANY = ("prompt", "reference_path", "mask_strategy", "neg_prompt")  # flags that take one value or more
LISTS = ("reference_path", "mask_strategy")  # of these those that are a list here, even of one
SCORES = ("aes", "flow", "camera_motion")  # of which a text is one, but None is none
PAIRS = ("image_size",)  # two
TEXTS = (  # what stays text although it may look like a number
    *("resolution", "aspect_ratio", "prompt_path", "data_path", "dataset.data_path", "root", "load", "plugin", "dtype"),
    *("model.from_pretrained", "vae.from_pretrained", "motion_score", "reference_txt_path"),
    *("ckpt_path_lora", "load_lora", "csv_reference_column_name"),
)
SWITCHES = ("prompt_as_path", "start_from_scratch", "force_huggingface", "use_sdedit", "record_time")  # none
