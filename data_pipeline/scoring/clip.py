"""Scores by CLIP: how good a picture looks, by layers on its embedding, and how well it goes with a text.

Models are read from local files alone, in the process that scores, and run on one thread of a CPU in float32.
"""

import os
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.captions import read_captions
from data_pipeline.scoring.base import ScorerFiles
from data_pipeline.scoring.pixels import read_preprocessing
from opensora.utils.errors import UserError, one_line

_TEXT_TOKENS = 77  # of all published models

Embed = Callable[[Sequence[np.ndarray]], np.ndarray]  # frames to (n, width) float64, each of length 1


class ClipAesthetic:
    """Linear layers on the embedding of a picture, as those trained on ratings of people: about 1 to 10."""

    def __init__(self, files: ScorerFiles) -> None:
        self.files = files

    def score(self, frames: Sequence[np.ndarray], file: str) -> float | None:
        """See ``Scorer``."""
        embedded = picture_embedding(self.files)(frames)
        layers = self._layers
        wanted = layers[0][0].shape[1]
        if embedded.shape[1] != wanted:
            width = embedded.shape[1]
            raise UserError(
                f"{self.files.said('head')}: is for embeddings of {wanted} numbers, the model's have {width}"
            )
        for weight, bias in layers:
            embedded = embedded @ weight.T + bias
        return float(embedded.mean())

    @cached_property
    def _layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return read_head(self.files)


class ClipMatch:
    """The cosine of the embeddings of picture and text: about 0.1 for a text about something else, 0.3 for one that
    fits."""

    def __init__(self, files: ScorerFiles, prompt: str) -> None:
        """``prompt``: the text; empty: that of the captions file."""
        self.files, self._prompt = files, prompt
        if os.path.isfile(files.paths["model"]):
            raise UserError(f"{files.said('model')}: clip_match needs the model's folder, with its text part")
        if "captions" in files.paths:
            read_captions(Path(files.paths["captions"]))  # its faults are told before the work begins

    def score(self, frames: Sequence[np.ndarray], file: str) -> float | None:
        """See ``Scorer``."""
        text = self._prompt or self._caption(file)
        if not text:
            return None
        pictures = picture_embedding(self.files)(frames)
        return float((pictures @ text_embedding(self.files, text)).mean())

    def _caption(self, file: str) -> str:
        found = self._captions.of(Path(file))
        return found[2] if found is not None else ""

    @cached_property
    def _captions(self) -> Any:
        return read_captions(Path(self.files.paths["captions"]))


def picture_embedding(files: ScorerFiles) -> Embed:
    """The picture part of a model; scorers with the same one share it."""
    load = _onnx_pictures if os.path.isfile(files.paths["model"]) else _pictures
    return _loaded(files, "model", lambda: load(files.paths["model"], files.digests["model"]))


def text_embedding(files: ScorerFiles, text: str) -> np.ndarray:
    """(width,) float64 of length 1."""
    path, digest = files.paths["model"], files.digests["model"]
    embed = _loaded(files, "model", lambda: _texts(path, digest))
    found: np.ndarray = embed(text)
    return found


def _loaded(files: ScorerFiles, name: str, load: Callable[[], Any]) -> Any:
    """Raises: UserError: whatever a library says of files that are not what they should be."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        reason = one_line(str(error)) or type(error).__name__
        raise UserError(f"{files.said(name)}: cannot be used ({reason})") from error


@lru_cache(maxsize=4)
def _pictures(folder: str, digest: str) -> Embed:
    """``digest``: of the files, so that others at the same place are another model."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    prepare = read_preprocessing(Path(folder))
    model = _part(folder, CLIPVisionModelWithProjection, CLIPVisionConfig)

    def embed(frames: Sequence[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([prepare(frame) for frame in frames]))
        with torch.inference_mode():
            return _of_length_one(model(pixel_values=pixels).image_embeds.numpy())

    return embed


def _part(folder: str, model: Any, config: Any) -> Any:
    """One of the two parts of a CLIP; the other one's weights are not even read.

    transformers draws weights at random that a file lacks, or has in another shape; here that is an error.
    """
    import torch
    from transformers import CLIPConfig
    from transformers.utils import logging

    torch.set_num_threads(1)
    stated = config.from_pretrained(folder, local_files_only=True)
    if "projection_dim" in (whole := CLIPConfig.get_config_dict(folder, local_files_only=True)[0]):
        stated.projection_dim = whole["projection_dim"]  # the whole model states it, its parts may not
    logging.set_verbosity_error()  # a table of all weights of the other part
    quiet = {"local_files_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    found, about = model.from_pretrained(folder, config=stated, use_safetensors=True, dtype=torch.float32, **quiet)
    if lacking := sorted([*about["missing_keys"], *(str(key) for key in about["mismatched_keys"])]):
        raise ValueError(f"{len(lacking)} weights are missing or of another shape, such as {lacking[0]}")
    return found.eval()


@lru_cache(maxsize=4)
def _onnx_pictures(path: str, digest: str) -> Embed:
    """A file with one input, pictures (n, 3, height, width), and ``image_embeds`` or else one output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    prepare = read_preprocessing(Path(path).parent)
    (given,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    wanted = "image_embeds" if "image_embeds" in names else names[0]

    def embed(frames: Sequence[np.ndarray]) -> np.ndarray:
        pixels = np.stack([prepare(frame) for frame in frames])
        return _of_length_one(session.run([wanted], {given.name: pixels})[0])

    return embed


@lru_cache(maxsize=4)
def _texts(folder: str, digest: str) -> Callable[[str], np.ndarray]:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    model = _part(folder, CLIPTextModelWithProjection, CLIPTextConfig)
    most = min(_TEXT_TOKENS, int(model.config.max_position_embeddings))

    @lru_cache(maxsize=64)
    def embed(text: str) -> np.ndarray:
        ids = tokenizer([text], truncation=True, max_length=most, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            return _of_length_one(model(input_ids=ids).text_embeds.numpy())[0]

    return embed


def _of_length_one(embedded: np.ndarray) -> np.ndarray:
    wide = embedded.astype(np.float64)
    found: np.ndarray = wide / np.linalg.norm(wide, axis=-1, keepdims=True)
    return found


def read_head(files: ScorerFiles) -> list[tuple[np.ndarray, np.ndarray]]:
    """(weight (out, in), bias (out,)) of the layers in order, which end in one number.

    Published heads are one layer, or several without a nonlinearity between them.

    Raises:
        UserError: the file holds something else.
    """
    tensors = _loaded(files, "head", lambda: _read_tensors(files.paths["head"]))
    names = sorted((name for name, value in tensors.items() if value.ndim == 2), key=_natural)
    layers = []
    for name in names:
        weight = tensors.pop(name)
        layers.append((weight, tensors.pop(f"{name.removesuffix('weight')}bias", np.zeros(len(weight)))))
    widths = [len(weight) for weight, _ in layers]
    fits = all(weight.shape[1] == wide for (weight, _), wide in zip(layers[1:], widths, strict=False))
    if not layers or tensors or not fits or widths[-1] != 1 or any(bias.shape != (len(w),) for w, bias in layers):
        shapes = ", ".join(str(weight.shape) for weight, _ in layers) or "none"
        raise UserError(f"{files.said('head')}: must hold linear layers that end in one number; it has {shapes}")
    return layers


def _read_tensors(path: str) -> dict[str, np.ndarray]:
    import torch
    from safetensors.torch import load_file

    found = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    return {name: value.double().numpy() for name, value in found.items()}


def _natural(name: str) -> list[tuple[int, str]]:
    """layers.10 behind layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
