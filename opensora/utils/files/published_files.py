"""The published weights that configurations name: where each is from, and what it must be.

Revisions are commits, so that the same command fetches the same bytes; of a repository without one here the commit of
the first download is kept beside the files. Sizes and digests are those that the publishers' repositories list.
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """What is known of a file; None: nothing beyond its name."""

    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Repository:
    """Files of one repository on huggingface.co."""

    name: str
    revision: str | None  # commit; None: the newest at the first download
    patterns: tuple[str, ...]  # of the files that are fetched
    folder: str = ""  # below the target, where they are put under their own names
    files: dict[str, PublishedFile] = field(default_factory=dict)  # that must be there afterwards
    gated: bool = False  # its licence must be accepted on its page, and HF_TOKEN set

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.name}"

    def path_of(self, file: str, target: Path) -> Path:
        """Where a file lies below ``target``."""
        return target / self.folder / file


_T5 = ("config.json", "spiece.model", "tokenizer*", "special_tokens_map.json", "*.safetensors*", "pytorch_model*.bin*")
_CLIP = ("config.json", "merges.txt", "vocab.json", "tokenizer*", "special_tokens_map.json", "model.safetensors")
_CLIP_WEIGHTS = PublishedFile(
    size=1_710_540_580, sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
)


def _files(name: str, *files: str) -> tuple[Repository, ...]:
    """Some files of a repository, by their names."""
    return (Repository(name=name, revision=None, patterns=files, files={file: PublishedFile() for file in files}),)


def _model(name: str) -> Repository:
    """Weights in the form of the model hub, in a folder of the repository's name."""
    return Repository(
        name=name,
        revision=None,
        patterns=("config.json", "*.safetensors*"),
        folder=name.partition("/")[2],
        files={"config.json": PublishedFile()},
    )


SETS: dict[str, tuple[Repository, ...]] = {
    "latte": _files("maxin-cn/Latte", "ucf101.pt"),
    "pixart-256": _files("PixArt-alpha/PixArt-alpha", "PixArt-XL-2-256x256.pth"),
    "pixart-512": _files("PixArt-alpha/PixArt-alpha", "PixArt-XL-2-512x512.pth"),
    "pixart-1024-ms": _files("PixArt-alpha/PixArt-alpha", "PixArt-XL-2-1024-MS.pth"),
    "open-sora-v1": _files(
        "hpcai-tech/Open-Sora",
        *("OpenSora-v1-16x256x256.pth", "OpenSora-v1-HQ-16x256x256.pth", "OpenSora-v1-HQ-16x512x512.pth"),
    ),
    "open-sora-v1-1": (_model("hpcai-tech/OpenSora-STDiT-v2-stage3"),),
    "open-sora-v1-2": (_model("hpcai-tech/OpenSora-STDiT-v3"), _model("hpcai-tech/OpenSora-VAE-v1.2")),
    "open-sora-v1-3": (_model("hpcai-tech/OpenSora-STDiT-v4"), _model("hpcai-tech/OpenSora-VAE-v1.3")),
    "open-sora-v2": (
        Repository(
            name="hpcai-tech/Open-Sora-v2",
            revision=None,
            patterns=(
                "Open_Sora_v2.safetensors",
                "hunyuan_vae.safetensors",
                "google/t5-v1_1-xxl/*",
                "openai/clip-vit-large-patch14/*",
            ),
            files={
                "Open_Sora_v2.safetensors": PublishedFile(),
                "hunyuan_vae.safetensors": PublishedFile(),
                "google/t5-v1_1-xxl/config.json": PublishedFile(),
                "openai/clip-vit-large-patch14/config.json": PublishedFile(),
            },
        ),
    ),
    "open-sora-v2-dc-ae": (
        Repository(
            name="hpcai-tech/Open-Sora-v2-Video-DC-AE",
            revision="162780d1bbbeeb469dd5b98c573e678d54e76963",
            patterns=("Open_Sora_v2_Video_DC_AE.safetensors", "F32T4C128_AE.safetensors"),
            files={
                "Open_Sora_v2_Video_DC_AE.safetensors": PublishedFile(),
                "F32T4C128_AE.safetensors": PublishedFile(),
            },
        ),
    ),
    "flux1-dev": (
        Repository(
            name="black-forest-labs/FLUX.1-dev",
            revision="3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
            patterns=("flux1-dev.safetensors", "ae.safetensors"),
            files={
                "flux1-dev.safetensors": PublishedFile(
                    size=23_802_932_552, sha256="4610115bb0c89560703c892c59ac2742fa821e60ef5871b33493ba544683abd7"
                ),
                "ae.safetensors": PublishedFile(
                    size=335_304_388, sha256="afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38"
                ),
            },
            gated=True,
        ),
    ),
    "text-encoders": (
        Repository(
            name="google/t5-v1_1-xxl",
            revision="3db67ab1af984cf10548a73467f0e5bca2aaaeb2",
            patterns=_T5,
            folder="google/t5-v1_1-xxl",
            files={"config.json": PublishedFile(), "spiece.model": PublishedFile()},
        ),
        Repository(
            name="openai/clip-vit-large-patch14",
            revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
            patterns=_CLIP,
            folder="openai/clip-vit-large-patch14",
            files={"config.json": PublishedFile(), "model.safetensors": _CLIP_WEIGHTS},
        ),
    ),
}


def set_of(path: str) -> str | None:
    """The first set that has a file of this name, or a folder with a model in it, wherever it lies; None: no set."""
    for name, repositories in SETS.items():
        for repository in repositories:
            places = [Path(repository.folder, file) for file in repository.files]
            if Path(path).name in {one.parent.name if one.name == "config.json" else one.name for one in places}:
                return name
    return None
