"""What several keys of the Open-Sora family say together of a job: clips, prompts, data, layout, optimizer."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from opensora.config.family import keys as table
from opensora.config.family.models import is_second, version_of
from opensora.config.family.translation import Translation
from opensora.config.schema import shown, suggestion, types_at
from opensora.config.strict_yaml import COMMAND_LINE
from opensora.datasets.buckets.sizes_1x import Version, clip_size_1x, sizes_1x
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import absence, read_text

LONG_RUN = 1_000_000  # steps of a run that says epochs: the family's are just large enough, and ended by hand
AREAS = {"2k": "1440p", "4k": "2160p"}
RULES = {"1.0": "open_sora_1_1", "1.1": "open_sora_1_1", "1.2": "open_sora_1_2", "1.3": "open_sora_1_3"}
ONE_SHAPE = "open_sora_1_0"  # the rule of data sets without buckets
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
    size = t.get("image_size")
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
    if t.get(path_key) is not None and t.place(path_key) == COMMAND_LINE != t.place("prompt"):
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
    if (path := t.get("reference_txt_path")) is not None:
        t.put("reference_path", references_listed(t, path), "reference_txt_path")
    for key in ("reference_path", "mask_strategy"):
        if (values := t.get(key)) is not None:
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


def dataset(t: Translation) -> None:
    """That training reads clips; before all else, as a file of what is no clips has no encoders either."""
    found = t.get("dataset.type")
    if not t.is_training or found is None or found in table.DATASETS:
        return
    if found == "BatchFeatureDataset":
        raise t.fail(
            "dataset.type",
            "holds no clips; train by the configuration of the clips, with data.features=FOLDER, the folder that "
            "python -m opensora.cli.precompute writes",
        )
    raise t.fail("dataset.type", suggestion(str(found), table.DATASETS))


def data(t: Translation) -> None:
    """Clips, and the table of shapes that they are trained in."""
    if not t.is_training:
        return
    key, path = t.first("dataset.data_path", "data_path")
    if path is not None:
        t.put("data.table", path, key)
    key, root = t.first("dataset.root", "root")
    if root is not None:
        t.put("data.root", root, key)
    for key in ("load_video_features", "load_text_features"):
        if t.get(key):
            t.note(key, "what is stored is read with data.features=FOLDER, as opensora.cli.precompute writes it")
    key, frames = t.first("dataset.num_frames", "num_frames")
    size_key, size = t.first("dataset.image_size", "image_size")
    has_shape = t.get("batch_size") is not None and isinstance(size, (list, tuple)) and frames is not None
    if t.get("bucket_config") is not None and not (has_shape and t.get("dataset.type") == "VideoTextDataset"):
        buckets(t, t.get("bucket_config"))
    elif has_shape:
        one_shape(t, size_key, size, t.converted(key, frames, table.frames_of))
        if t.get("bucket_config") is not None:
            t.note("bucket_config", "is for dataset.type='VariableVideoTextDataset'; all clips have dataset.image_size")
    elif t.is_file:
        raise no_shape(t, key, size_key)
    else:
        if t.get("batch_size") is not None:
            raise t.fail("batch_size", "stands in data.buckets, for every shape of clips")
        for given in ("num_frames", "image_size"):
            if t.get(given) is not None:
                raise t.fail(given, "stands in data.buckets, the shapes that clips are trained in")
    clips(t)
    if t.get("dataset.fps_max", 24) != 24:
        raise t.fail("dataset.fps_max", "must be 24: clips of more are read at a whole part of their rate")
    for ignored in ("aspect_ratio", "resolution"):
        if t.get(ignored) is not None:
            t.note(ignored, "is for sampling")
    beside = t.layer.get("model", {}).get("cond_embed") and version_of(t) == "1.3"
    if t.is_file and beside and t.get("mask_types") is None:
        t.put("conditioning.mask_types", {"none": 1.0}, "model.type")  # embedders of given frames add their biases
    if t.get("noise_augmentation"):
        t.note("noise_augmentation", "clips are trained as they are")


def clips(t: Translation) -> None:
    """Which frames of a clip are used, and how these are scaled."""
    key, interval = t.first("dataset.frame_interval", "frame_interval")
    if not t.is_file or is_second(t):
        if interval is not None:
            t.put("data.frame_interval", interval, key)
        return
    if interval is not None:
        t.put("data.frame_interval", interval, key)
    name = t.get("dataset.transform_name")
    if name not in (None, "center", "resize_crop"):
        raise t.fail("dataset.transform_name", "must be center or resize_crop")
    t.put("data.interpolation", "bilinear", "dataset.type")
    t.put("data.unused_rows", "report", "bucket_config")  # what no clip fits does not matter to the family


def no_shape(t: Translation, key: str, size_key: str) -> UserError:
    """What is wrong with a file that names no shape of clips.

    Args:
        key, size_key: what it calls frames and size.
    """
    shape = (key, size_key, "batch_size")
    missing = [name for name in shape if t.get(name) is None]
    if len(missing) == len(shape):
        return t.fail("bucket_config", f"missing; or give {', '.join(shape)}")
    if missing:
        return t.fail(missing[0], f"missing; clips of one shape need {', '.join(shape)}, others bucket_config")
    return t.fail(size_key, "must be two whole numbers, (height, width)")


def one_shape(t: Translation, key: str, size: Any, frames: Any) -> None:
    """A data set of one length and size, which its clips are scaled to cover and cut to."""
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise t.fail(key, "must be two whole numbers, (height, width)")
    height, width = size
    if t.get("dataset.transform_name") == "center" and height != width:
        raise t.fail("dataset.transform_name", f"must be resize_crop for {height}x{width}, which is no square")
    t.put("data.bucket_rule", ONE_SHAPE, key)
    t.put("data.buckets", {f"{height}x{width}": {frames: [1.0, t.get("batch_size")]}}, key)


def buckets(t: Translation, given: Any) -> None:
    if not isinstance(given, Mapping) or not all(isinstance(rows, Mapping) for rows in given.values()):
        raise t.fail("bucket_config", "must be {resolution: {frames: (probability, batch size)}}")
    first = t.is_file and not is_second(t)
    found: dict[str, dict[Any, list[Any]]] = {}
    for name, rows in given.items():
        ours = str(name) if first else area_name(str(name))
        if ours in found or len({str(frames) for frames in rows}) < len(rows):
            what = shown(name) if ours in found else f"a number of frames of {shown(name)}"
            raise t.fail("bucket_config", f"has {what} twice, as a number and as text; keep one")
        found[ours] = {frames: _row(t, f"bucket_config.{name}.{frames}", value) for frames, value in rows.items()}
    t.put("data.buckets", found, "bucket_config")
    if first:
        t.put("data.bucket_rule", RULES[version_of(t)], "bucket_config")
    if first and any(isinstance(row[0], list) for rows in found.values() for row in rows.values()):
        t.put("data.probability", "accept", "bucket_config")
    if t.get("batch_size") is not None:
        t.note("batch_size", "bucket_config has one for every shape")


def _row(t: Translation, key: str, value: Any) -> list[Any]:
    """(probability, batch size); what reserves a row, or searches for a batch size, becomes what can be trained."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise t.fail("bucket_config", f"{key}={shown(value)}: must be (probability, batch size)")
    keep, size = value
    if keep is None:
        keep = 1.0
    if size is None:
        return [keep, 1 if is_second(t) else None]  # a row that no clip is drawn for
    search = (isinstance(size, (list, tuple)) and size) or (isinstance(keep, (int, float)) and keep > 1 and value)
    if search:
        t.note("bucket_config", "a range of batch sizes: the smallest is taken; opensora.cli.forecast says what fits")
        return [1.0 if search is value else keep, next((n for n in search if n), 1)]
    return [list(keep) if isinstance(keep, (list, tuple)) else keep, size]


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
