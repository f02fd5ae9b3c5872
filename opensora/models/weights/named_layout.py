"""How files write a model that is published under original names and diffusers', with patches as a convolution."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from opensora.models.weights.patches import Patch
from opensora.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class NamedLayout:
    """Of a file of Wan or HunyuanVideo; ours is stated in its metadata, all else is seen by the names."""

    diffusers: bool = False  # names, and layers that are not fused
    linear: bool = False  # patches and the last layer as in our model
    patch: Patch | None = None  # latents per token along (t, h, w); None: as the file's convolution

    def metadata(self) -> dict[str, str]:
        """What a file's safetensors metadata says of its layout."""
        stated = {"format": "pt", "patches": "linear" if self.linear else "convolution"}
        return stated if self.patch is None else stated | {"patch": ",".join(map(str, self.patch))}


ORIGINAL, DIFFUSERS = NamedLayout(), NamedLayout(diffusers=True)
LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}


def stated_layout(metadata: Mapping[str, str], *, diffusers: bool) -> NamedLayout:
    """The layout of a file with these names.

    Raises:
        UserError: a stated patch that is none.
    """
    stated = metadata.get("patch")
    if stated is not None and not re.fullmatch(r"[1-9][0-9]?(,[1-9][0-9]?){2}", stated):
        raise UserError(f"patch={stated[:80]} in the file's metadata: must be three sizes, as 1,2,2")
    t, h, w = (0, 0, 0) if stated is None else map(int, stated.split(","))
    is_linear = metadata.get("patches") == "linear"
    return NamedLayout(diffusers=diffusers, linear=is_linear, patch=None if stated is None else (t, h, w))
