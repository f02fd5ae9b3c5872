"""What several keys of the Open-Sora family say together of a job: clips, prompts, data, layout, optimizer."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from opensora.config.family import keys as table
from opensora.config.family.models import is_second, version_of
from opensora.config.family.translation import Translation
from opensora.config.schema import suggestion, types_at
from opensora.datasets.buckets.sizes_1x import Version, clip_size_1x, sizes_1x
from opensora.utils.files.user_files import absence, read_text

LONG_RUN = 1_000_000  # steps of a run that says epochs: the family's are just large enough, and ended by hand
AREAS = {"2k": "1440p", "4k": "2160p"}
SIZES: dict[str, Version] = {"1.3": "1.3"}  # tables that clips are sampled by; else those of 1.2, the first with flags
USUAL_RATIO = "9:16"  # height to width


def sampled(t: Translation) -> None:
    """What a sampling job makes, and of which prompts."""
    if t.is_training:
        given = ("prompt", "prompt_path", "reference_path", "reference_txt_path", "mask_strategy", "motion_score")
        for key in ("fps", "save_fps", *given):
            if t.get(key) is not None:
                t.note(key, "is for sampling")
        return
    clip_size(t)
    if (batch := t.get("batch_size")) is not None:
        t.put("batch_size", batch, "batch_size")
    if (fps := t.get("fps")) is not None:
        t.put("sampling.fps", fps, "fps")
    interval = t.get("frame_interval", 1)
    if not is_count(interval):
        raise t.fail("frame_interval", "must be an integer >= 1")
    saved = t.get("save_fps", fps // interval if isinstance(fps, int) and interval > 1 else None)
    if saved is not None and saved != fps:
        t.put("save_fps", saved, "save_fps" if t.get("save_fps") is not None else "frame_interval")
    seed_key, seed = t.first("sampling_option.seed", "seed")  # the other one is not of the noise
    if seed is not None:
        t.put("sampling.seed", seed, seed_key)
    prompts(t)
    references_of_prompts(t)
    if t.get("offload_model"):
        t.put("offload", "models", "offload_model")
    if t.get("watermark"):
        t.note("watermark", "give the picture, as watermark=FILE")
    motion = table.motion_of(t.get("motion_score"))
    if motion == "dynamic":
        t.put("refine.motion_score", True, "motion_score")
    elif motion is not None:
        t.put("sampling.motion_score", motion, "motion_score")
    if not t.is_file:
        return
    # Clips of Open-Sora 2 were trained with words about frame rate and motion, and are sampled so.
    t.put("prompt_suffix", is_second(t), "model.type")
    guidance = types_at(t.cls, ("sampling", "guidance_img"))
    if version_of(t) == "1.3" and t.get("image_cfg_scale") is None and any(type(None) in get_args(g) for g in guidance):
        t.put("sampling.guidance_img", None, "model.type")  # as that towards the prompt
    t.put("parallel.zero", 3, "model.type")
    t.put("parallel.mesh", {"shard": 1, "ulysses": -1}, "model.type")
    for key in ("plugin", "plugin_config", "sp_size"):
        if t.get(key) not in (None, 1):
            t.note(key, "all processes of a job share every clip, whatever their number (parallel.mesh)")


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 1 on; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def clip_size(t: Translation) -> None:
    frames_key, frames = t.first("num_frames")
    if frames is not None:
        t.put("sampling.num_frames", t.converted(frames_key, frames, table.frames_of), frames_key)
    size = None if t.over("resolution", "image_size") else t.get("image_size")
    if size is not None:
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            raise t.fail("image_size", "must be two numbers, (height, width)")
        t.put("sampling.height", size[0], "image_size")
        t.put("sampling.width", size[1], "image_size")
    resolution, ratio = t.get("resolution"), t.get("aspect_ratio")
    if t.is_file and not is_second(t):
        listed_size(t, size, resolution, ratio)
        return
    if resolution is not None:
        t.put("sampling.resolution", area_name(str(resolution)), "resolution")
    if ratio is not None:
        t.put("sampling.aspect_ratio", ratio, "aspect_ratio")


def listed_size(t: Translation, size: Any, resolution: Any, ratio: Any) -> None:
    """Clips of 1.x have the size that its tables list for a resolution and a ratio, which has the height first."""
    if size is not None:
        for key in ("resolution", "aspect_ratio"):
            if t.get(key) is not None:
                t.note(key, "image_size says the size of clips")
        return
    if resolution is None:
        t.note("model.type", "no size of clips is given, so 256px holds; give --image-size H W, or --resolution")
        if isinstance(ratio, str):
            t.put("sampling.aspect_ratio", ":".join(reversed(ratio.split(":"))), "aspect_ratio")
        return
    version, key = SIZES.get(version_of(t), "1.2"), "resolution"
    try:
        sizes_1x(version, str(resolution))
        key = "resolution" if ratio is None else "aspect_ratio"
        height, width = clip_size_1x(version, str(resolution), str(ratio or USUAL_RATIO))
    except ValueError as error:
        raise t.fail(key, str(error)) from None
    t.put("sampling.height", height, key)
    t.put("sampling.width", width, key)


def area_name(name: str) -> str:
    """A resolution of the family as it is called here."""
    return AREAS.get(name) or (f"{name}px" if re.fullmatch("[0-9]{1,5}", name) else name)


def prompts(t: Translation) -> None:
    """Prompts win over a file of prompts, unless that one alone is given on the command line."""
    given, path_key = t.get("prompt"), t.first("prompt_path", "dataset.data_path")[0]
    if t.over(path_key, "prompt"):
        given = None
    texts = [given] if isinstance(given, str) else given
    if texts is not None:
        for text in texts if isinstance(texts, (list, tuple)) else ():
            if text == "TEXT" or (isinstance(text, str) and text.startswith("TEXT{")):
                raise t.fail("prompt", "stands for a prompt of yours; give it, as --prompt 'a cat'")
        t.put("prompts", texts, "prompt")
    elif (path := t.get(path_key)) is not None:
        t.put("prompt_csv", table.path_of(path), path_key)
    negative = t.get("neg_prompt")
    if isinstance(negative, (list, tuple)) and len(negative) > 1:
        t.put("neg_prompts", list(negative), "neg_prompt")
    elif negative is not None:
        t.put("neg", negative[0] if isinstance(negative, (list, tuple)) and negative else negative, "neg_prompt")
    if t.get("dataset.type") not in (None, "text", "video_text"):
        t.note("dataset.type", "prompts come from prompt, prompts or prompt_csv")


def references_of_prompts(t: Translation) -> None:
    """What 1.x gives to clips, how files are called, and which steps are guided."""
    second = is_second(t)
    if t.is_file and not second:
        t.put("release", version_of(t), "model.type")
    if t.get("csv_reference_column_name", "ref") != "ref":
        raise t.fail("csv_reference_column_name", "must be ref, the column that references are read from; rename it")
    if (path := t.get("reference_txt_path")) is not None and not t.over("reference_path", "reference_txt_path"):
        t.put("reference_path", references_listed(t, path), "reference_txt_path")
    left = "reference_path" if t.over("reference_txt_path", "reference_path") else ""
    for key in ("reference_path", "mask_strategy"):
        if (values := t.get(key)) is not None and key != left:
            texts = [values] if isinstance(values, str) else values
            if not isinstance(texts, (list, tuple)):
                raise t.fail(key, "must be a list with a text for every prompt, None for none")
            t.put(key, [None if text in ("", "None") else text for text in texts], key)
    if (name := t.get("sample_name")) is not None:
        whole = t.is_file and not second and t.get("prompt_as_path")
        t.put("save_prefix", name if whole else table.prefix_of(name), "sample_name")
    both = "scheduler.use_oscillation_guidance"
    for name in ("text", "image"):
        key, value = t.first(f"use_oscillation_guidance_for_{name}", both)
        if value is not None:
            t.put(f"sampling.{name}_osci", value, key)


def references_listed(t: Translation, path: Any) -> list[str | None]:
    """References of every prompt, a line each, as 1.3 reads them from a file; an empty line has none."""
    if not isinstance(path, str):
        raise t.fail("reference_txt_path", "must be a text file, with the references of a prompt in every line")
    if reason := absence(path, "file"):
        raise t.fail("reference_txt_path", f"cannot be read ({reason})")
    lines = read_text(Path(path), f"reference_txt_path={path}").splitlines()
    return [line.strip() or None for line in lines]


def layout(t: Translation) -> None:
    """How a training run is spread over processes."""
    dtype = table.precision_of(t.get("dtype"))
    if t.get("dtype") == "fp16":
        t.note("dtype", "computed in bf16, which needs no loss scaling")
    if dtype is not None:
        t.put("parallel.precision.compute" if t.is_training else "precision", dtype, "dtype")
    if not t.is_training:
        return
    plugin, config = t.get("plugin"), t.get("plugin_config", {})
    if not isinstance(config, Mapping):
        raise t.fail("plugin_config", "must be a mapping, as plugin_config = dict(...)")
    zero = {
        "zero1": 1,
        "zero2": 2,
        "zero1-seq": 1,
        "zero2-seq": 2,
        "zero3": 3,
        "ddp": 0,
        "hybrid": config.get("zero_stage", 0),
    }
    if plugin is not None:
        if not isinstance(plugin, str) or plugin not in zero:
            raise t.fail("plugin", suggestion(str(plugin), zero))
        t.put("parallel.zero", zero[plugin], "plugin")
    for name in config:
        if name not in (*table.PLUGIN, *table.ENGINES):
            raise t.fail("plugin_config", f"{name} is unknown; {suggestion(str(name), table.PLUGIN)}")
    if any(name in table.ENGINES for name in config):
        left = ", ".join(str(name) for name in config if name in table.ENGINES)
        t.note("plugin_config", f"{left}: decided by the engine (parallel.engine)")
    for name in ("sp_size", "tp_size", "pp_size"):
        if not is_count(config.get(name, 1)):
            raise t.fail("plugin_config", f"{name} must be a whole number >= 1")
    if not is_count(t.get("sp_size", 1)):
        raise t.fail("sp_size", "must be a whole number >= 1")
    if config.get("pp_size", 1) != 1:
        raise t.fail("plugin_config", "pp_size must be 1; models are cut by zero, ring, ulysses and tensor here")
    key, processes = (
        ("sp_size", t.get("sp_size")) if t.get("sp_size") is not None else ("plugin_config", config.get("sp_size"))
    )
    if processes not in (None, 1):
        ring = config.get("sequence_parallelism_mode") == "ring_attn"
        t.put(f"parallel.mesh.{'ring' if ring else 'ulysses'}", processes, key)
    if config.get("tp_size", 1) != 1:
        t.put("parallel.mesh.tensor", config["tp_size"], "plugin_config")
    recompute = t.get("grad_checkpoint")
    if recompute is not None:
        t.put("parallel.recompute.kind", "full" if recompute else "none", "grad_checkpoint")
    for key in ("grad_ckpt_settings", "model.grad_ckpt_settings"):
        if t.get(key) is not None:
            t.note(key, "all blocks are recomputed; parallel.recompute.kind=first takes some")


def optimizer(t: Translation) -> None:
    if not t.is_training:
        return
    for name in ("lr", "eps"):  # where there is a section, it decides, and the name outside is a value for it
        key, value = t.first(f"optim.{name}", name)
        if value is not None and (key != "eps" or "optim.cls" not in t.given):
            t.put(f"optim.{name}", value, key)
    if t.get("optim.cls", "HybridAdam") not in ("HybridAdam", "AdamW", "Adam"):
        raise t.fail("optim.cls", "must be HybridAdam or AdamW; optim.kind=sgd is another one here")
    if t.get("optim.adamw_mode") is False and t.get("optim.weight_decay"):
        raise t.fail("optim.adamw_mode", "must be True: decay is not part of the gradient here")
    key, warmup = t.first("warmup_steps", "warmup")
    if warmup is not None:
        t.put("optim.warmup_steps", warmup, key)
        if warmup:
            t.put("optim.initial_lr", 1e-6 if is_second(t) else 0.0, key)
    if t.get("use_cosine_scheduler"):
        t.put("optim.schedule", "cosine", "use_cosine_scheduler")
    second = is_second(t)
    if t.get("ema_decay") is not None or (t.is_file and not second):
        t.put("optim.ema_decay", t.get("ema_decay", 0.9999), "ema_decay")
        t.put("optim.ema_warmup", False, "ema_decay")
    if t.is_file and not second and t.get("adam_eps") is None and "eps" not in t.layer.get("optim", {}):
        t.put("optim.eps", 1e-8, "lr")


def run(t: Translation) -> None:
    """Name and length of a training run."""
    if not t.is_training:
        return
    if t.get("seed") is not None:
        t.put("seed", t.get("seed"), "seed")
    epochs = t.get("epochs")
    if not is_count(t.get("epochs", 1)):
        raise t.fail("epochs", "must be a whole number >= 1")
    if t.is_file:
        t.put("train.steps", LONG_RUN, "epochs")
        if epochs is not None:
            t.note("epochs", f"a run is as long as train.steps, {LONG_RUN} unless it is given")
