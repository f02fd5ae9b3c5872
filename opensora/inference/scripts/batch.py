"""What a script hands to ``api_fn`` and ``process_and_save``: entries of its batch, seeds, and sizes of the model."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short

KEYS = ("text", "ref", "neg", "name", "index")  # of a batch: what is sampled, and what files are called
FOR_FILES = ("name", "index")
EXTRAS = ("on_step", "noise")  # of api_fn, beside the batch: see opensora/inference/pipeline.py


def check_sizes(patch_size: int, channel: int, its_patch: int, its_channels: int, *, knows: bool) -> None:
    """That sizes are those of the model.

    Args:
        knows: the model says its own; else any will do.

    Raises:
        UserError: they are not.
    """
    if not knows:
        for name, value in (("patch_size", patch_size), ("channel", channel)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={short(str(value), 40)}: must be an integer >= 1")
        return
    if patch_size != its_patch:
        raise UserError(
            f"patch_size={short(str(patch_size), 40)}: must be {its_patch}, that of the model; or leave it out"
        )
    per_token = its_channels * its_patch**2
    if channel not in (its_channels, per_token):
        raise UserError(
            f"channel={short(str(channel), 40)}: must be {its_channels}, the channels of the model's latents, "
            f"{per_token}, those of its tokens; or leave it out"
        )


def asked_of(batch: Mapping[str, Any], *, for_files: bool = False) -> dict[str, Any]:
    """The entries of a batch that are wanted, as lists with one of each per clip.

    Args:
        for_files: also those that say what files are called, and nothing that only sampling reads.

    Raises:
        UserError: an unknown key, no prompts, or a list that does not fit them.
    """
    allowed = KEYS if for_files else (*KEYS, *EXTRAS)
    for key in batch:
        if key not in allowed:
            close = difflib.get_close_matches(str(key)[:40], KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"must be one of {', '.join(KEYS)}"
            raise UserError(f"batch.{short(str(key), 40)}: unknown key; {hint}")
    if batch.get("text") is None:
        raise UserError("batch.text: missing; give a list of prompts, one per clip")
    found = {key: batch[key] for key in batch if key not in FOR_FILES or for_files}
    for key in set(found) & {"text", "ref", "neg", "name"}:
        found[key] = [found[key]] if isinstance(found[key], str) else found[key]
    clips = _count(found["text"], "text")
    for key in set(found) & set(KEYS):
        if found[key] is not None and (count := _count(found[key], key)) != clips:
            raise UserError(f"batch.{key}: {count} entries for {clips} prompts; give one for each, or leave it out")
    if not all(one is None or isinstance(one, str | list | tuple) for one in found.get("ref") or ()):
        raise UserError('batch.ref: must be files as "a.png;b.mp4" for every clip, or a list of files and frames')
    if found.get("neg") is not None:
        found["neg"] = [one or "" for one in found["neg"]]
    return found


def _count(values: Any, key: str) -> int:
    """How many entries there are, of the kind that belongs there; None stands for nothing where there may be none."""
    is_list = not isinstance(values, Tensor | Mapping) and hasattr(values, "__len__") and len(values) > 0
    kind = str if key in ("text", "neg", "name") else object
    if not is_list or not all(isinstance(one, kind) or (one is None and key != "text") for one in values):
        raise UserError(f"batch.{key}: must be a list with {'a text' if kind is str else 'an entry'} for every clip")
    return len(values)


def seeds_of(seed: int | Sequence[int], clips: int) -> list[int]:
    """One per clip.

    Raises:
        UserError: none that a clip can have, or not as many.
    """
    seeds = [seed] * clips if isinstance(seed, int) else list(seed)
    if len(seeds) != clips or not all(isinstance(one, int) and 0 <= one < 2**63 for one in seeds):
        raise UserError(f"seed={short(str(seed), 40)}: must be an integer from 0 to 2^63-1, or one per clip")
    return seeds
