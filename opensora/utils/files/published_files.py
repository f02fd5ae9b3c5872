"""The published weights that configurations name: where each is from, and what it must be.

Revisions are commits, so that the same command fetches the same bytes; of a repository without one here the commit of
the first download is kept beside the files, and ``--revision`` names another. Sizes and digests are those that the
publishers' repositories list.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """What is known of a file; None: nothing beyond its name."""

    size: int | None = None  # bytes
    sha256: str | None = None
    git_blob: str | None = (
        None  # SHA-1 that git gives a file's content; hubs list it of small files in place of SHA-256
    )


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


def _pipeline(name: str, *parts: str) -> tuple[Repository, ...]:
    """A pipeline of diffusers: one folder of the repository's name, with a folder for each part that is read."""
    described = (PIPELINE, *(f"{part}/config.json" for part in parts))
    patterns = (PIPELINE, "*/*.json", "*/*.safetensors", "*/spiece.model", "*/merges.txt")  # the last: tokenizers
    files = {file: PublishedFile() for file in described}
    return (Repository(name=name, revision=None, patterns=patterns, folder=name.partition("/")[2], files=files),)


PIPELINE = "model_index.json"  # what diffusers has in the folder of a whole pipeline
_WAN = ("transformer", "vae", "text_encoder")

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
    "wan-2.1-t2v-1.3b": _pipeline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", *_WAN),
    "wan-2.1-t2v-14b": _pipeline("Wan-AI/Wan2.1-T2V-14B-Diffusers", *_WAN),
    "wan-2.1-i2v-14b-480p": _pipeline("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", *_WAN, "image_encoder"),
    "wan-2.1-i2v-14b-720p": _pipeline("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", *_WAN, "image_encoder"),
    "wan-2.2-t2v-a14b": _pipeline("Wan-AI/Wan2.2-T2V-A14B-Diffusers", *_WAN, "transformer_2"),
    "wan-2.2-i2v-a14b": _pipeline("Wan-AI/Wan2.2-I2V-A14B-Diffusers", *_WAN, "transformer_2"),
    "wan-2.2-ti2v-5b": _pipeline("Wan-AI/Wan2.2-TI2V-5B-Diffusers", *_WAN),
    "hunyuan-video": _pipeline("hunyuanvideo-community/HunyuanVideo", *_WAN, "text_encoder_2"),
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


def _models(repositories: tuple[Repository, ...]) -> set[Path]:
    """Where a set puts its models, below the target: a whole pipeline, the folder of a config.json, and files without
    one beside them."""
    pipelines = {Path(one.folder) for one in repositories if PIPELINE in one.files}
    places = [Path(one.folder, file) for one in repositories if PIPELINE not in one.files for file in one.files]
    folders = {place.parent for place in places if place.name == "config.json"}
    return pipelines | folders | {place for place in places if place.parent not in folders}


def _whole(path: str | Path) -> Path:
    """The pipeline that a path is a part of, which is fetched as one; else the path."""
    pipelines = {one.folder for repositories in SETS.values() for one in repositories if PIPELINE in one.files}
    return next((place for place in (Path(path), *Path(path).parents) if place.name in pipelines), Path(path))


def _published(path: str) -> tuple[str, Path] | None:
    """(set, place below its target) of a model of this name, of the set with the fewest models; None: no set."""
    models = {name: _models(repositories) for name, repositories in SETS.items()}
    holding = [(name, one) for name, places in models.items() for one in places if one.name == _whole(path).name]
    return min(holding, key=lambda found: len(models[found[0]]), default=None)


def set_of(path: str) -> str | None:
    """The smallest set that has a file of this name, or a folder with a model in it, wherever it lies; None: no set."""
    found = _published(path)
    return found[0] if found else None


def folder_of_set(path: str) -> Path:
    """The ``--to`` of a download that puts a published file, or a model's folder, at ``path`` or near it."""
    place, found = _whole(path), _published(path)
    if found and place.parts[-len(found[1].parts) :] == found[1].parts:
        return place.parents[len(found[1].parts) - 1]
    is_of_hub = not place.is_absolute() and len(place.parts) == 2 and found is not None and len(found[1].parts) == 2
    return place.parent.parent if is_of_hub else place.parent  # as DeepFloyd/t5-v1_1-xxl, whose folder is no place


def how_to_fetch_all(paths: Iterable[str]) -> list[str]:
    """The commands that fetch published files that are not there; none for what another of them brings to the same
    place."""
    elsewhere: dict[tuple[str, Path], list[str]] = {}  # of every set and --to: where it puts what is named otherwise
    for path in paths:
        if found := _published(path):
            to = folder_of_set(path)
            elsewhere.setdefault((found[0], to), []).extend([str(to / found[1])] * (to / found[1] != _whole(path)))
    models = {name: _models(SETS[name]) for name, _ in elsewhere}
    return [
        f"python -m opensora.cli.download {name} --to {to}{_named(places)}"
        for (name, to), places in elsewhere.items()
        if places or not any(to == there and models[name] < models[other] for other, there in elsewhere)
    ]


def _named(places: list[str]) -> str:
    return f", and name {' and '.join(places)}, where that puts it" if places else ""


def how_to_fetch(path: str | Path) -> str:
    """What a message adds about a published file that is not there: the command that fetches it, and where that puts it
    if it is elsewhere; empty: it is none."""
    found = _published(str(path))
    if found is None:
        return ""
    name, place = found
    to = folder_of_set(str(path))
    named = _named([] if to / place == _whole(path) else [str(to / place)])
    return f", or fetch it: python -m opensora.cli.download {name} --to {to}{named}"
