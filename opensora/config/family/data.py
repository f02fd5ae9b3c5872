"""What the keys of the Open-Sora family say together of the clips that are trained, and of their buckets."""

from collections.abc import Mapping
from typing import Any

from opensora.config.family import keys as table
from opensora.config.family.jobs import area_name
from opensora.config.family.models import is_second, version_of
from opensora.config.family.translation import Translation
from opensora.config.schema import shown, suggestion
from opensora.utils.errors import UserError

RULES = {"1.0": "open_sora_1_1", "1.1": "open_sora_1_1", "1.2": "open_sora_1_2", "1.3": "open_sora_1_3"}
ONE_SHAPE = "open_sora_1_0"  # the rule of data sets without buckets


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
