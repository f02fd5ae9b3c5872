"""Imports point downwards only: the layer table, and the one home of every vendor.

Every import statement counts, also inside functions, under TYPE_CHECKING, relative, or spelled
``importlib.import_module("name")``.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# layer -> what of ours it may import besides itself; a name stands for itself and everything below it
LAYERS: dict[str, tuple[str, ...]] = {
    "acceleration": (),
    "opensora.utils": (
        "acceleration.files.atomic_write",
        "acceleration.files.sealed_json",
        "acceleration.files.tensor_file",
        "acceleration.files.untrusted",
    ),
    "opensora.models": ("opensora.utils",),
    "opensora.schedulers": ("opensora.utils",),
    "opensora.datasets": ("opensora.utils",),
    "opensora.config": (
        "opensora.models",
        "opensora.schedulers",
        "opensora.datasets",
        "opensora.utils",
        "acceleration.config",
    ),
    "opensora.inference": (
        "acceleration",
        "opensora.config",
        "opensora.models",
        "opensora.schedulers",
        "opensora.utils",
    ),
    "opensora.train": (
        "acceleration",
        "opensora.config",
        "opensora.datasets",
        "opensora.inference",
        "opensora.models",
        "opensora.schedulers",
        "opensora.utils",
    ),
    "opensora.cli": ("opensora.config", "opensora.train", "opensora.inference", "opensora.utils"),
    "scripts": ("opensora.config", "opensora.train", "opensora.inference", "opensora.utils", "opensora.cli"),
    "data_pipeline": (
        "opensora.datasets.table.manifest",
        "opensora.datasets.decode.api",
        "opensora.datasets.decode.process",
        "opensora.utils",
    ),
    "launch": ("opensora.config", "opensora.train", "opensora.utils"),
}
FREE = ("tests", "benchmarks")  # may import everything; nothing may import them
OURS = ("acceleration", "opensora", "scripts", "data_pipeline", "launch", *FREE)

# vendor -> the files that may import it
HOMES: dict[str, tuple[str, ...]] = {
    "omegaconf": ("opensora/config/run.py",),
    "yaml": ("opensora/config/strict_yaml.py",),
    "wandb": ("opensora/utils/console.py",),
    "deepspeed": ("acceleration/engines/deepspeed_engine.py",),
    "colossalai": ("acceleration/engines/colossalai_engine.py",),
    "flash_attn": ("acceleration/attention/kernels/flash.py",),
    "flash_attn_interface": ("acceleration/attention/kernels/flash.py",),
    "decord": ("opensora/datasets/decode/decord_backend.py",),
    "torchcodec": ("opensora/datasets/decode/torchcodec_backend.py",),
    "av": ("opensora/datasets/decode/pyav_backend.py", "opensora/utils/video_writer.py"),
}


def python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") or part in ("outputs", "build", "dist") for part in parts)
        if not hidden:
            yield path


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; ``from a import b`` gives ``a.b``, which is a or something below it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(root: Path) -> list[str]:
    found: list[str] = []
    for path in python_files(root):
        module, place = module_name(path, root), path.relative_to(root).as_posix()
        if any(within(module, free) for free in FREE) or module == "opensora":
            layer: str | None = None
        else:
            layer = next((name for name in LAYERS if within(module, name)), None)
            if layer is None:
                found.append(f"{place}: {module} is in no layer; add it to LAYERS and to CONTRIBUTING.md")
                continue
        for line, name in imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            vendor = name.split(".")[0]
            if layer is not None and vendor in HOMES and place not in HOMES[vendor]:
                found.append(f"{place}:{line}: imports {vendor}, whose home is {' and '.join(HOMES[vendor])}")
            if vendor not in OURS:
                continue
            if module == "opensora":
                found.append(f"{place}:{line}: the top package imports nothing, but has {name}")
            if layer is None:
                continue
            if not any(within(name, allowed) for allowed in (layer, *LAYERS[layer])):
                found.append(f"{place}:{line}: {layer} may not import {name}")
    return found


def test_the_layer_table_holds() -> None:
    assert violations(ROOT) == []


def test_the_table_lists_only_what_can_exist() -> None:
    for name, allowed in LAYERS.items():
        assert name.split(".")[0] in OURS
        assert all(any(within(other, layer) for layer in LAYERS) for other in allowed)


BAD = {
    "a lower layer imports a higher one": ("opensora/utils/x.py", "from opensora.models import build_model"),
    "inside a function": ("acceleration/x.py", "def f():\n    import opensora.utils.rng"),
    "inside TYPE_CHECKING": (
        "opensora/models/x.py",
        "if TYPE_CHECKING:\n    from acceleration.distributed.mesh import Mesh",
    ),
    "siblings": ("opensora/models/x.py", "from opensora.datasets import plan"),
    "relative": ("opensora/models/vae/x.py", "from ...datasets import plan"),
    "relative, in a package": ("opensora/models/families.py", "from ..train import loop"),
    "more of a package than allowed": ("opensora/config/run.py", "from acceleration.distributed.mesh import Mesh"),
    "the package instead of its part": ("data_pipeline/x.py", "from opensora import datasets"),
    "another part": ("data_pipeline/x.py", "from opensora.datasets import plan"),
    "a prefix is not a parent": ("data_pipeline/x.py", "import opensora.datasets.manifest_tools"),
    "by name at run time": ("opensora/utils/x.py", 'importlib.import_module("opensora.train.loop")'),
    "tests from the project": ("opensora/utils/x.py", "from tests.dist import harness"),
    "the top package": ("opensora/__init__.py", "from opensora.models import build_model"),
    "an unlisted package": ("newthing/x.py", "x = 1"),
    "an unlisted part of opensora": ("opensora/helpers/x.py", "x = 1"),
    "a vendor away from home": ("opensora/models/x.py", "def f():\n    from omegaconf import OmegaConf"),
    "a vendor in another engine": ("acceleration/engines/native.py", "import deepspeed.comm"),
    "a vendor in a script": ("scripts/diffusion/x.py", "import wandb"),
}
GOOD = {
    "down": ("opensora/train/x.py", "from opensora.inference import load\nfrom acceleration import mesh"),
    "the allowed part": ("opensora/config/run.py", "from acceleration.config import MeshConfig\nimport omegaconf"),
    "a part by name": ("data_pipeline/x.py", "from opensora.datasets import manifest"),
    "relative, own layer": ("opensora/models/vae/x.py", "from ..base import Autoencoder"),
    "a vendor at home": ("acceleration/engines/deepspeed_engine.py", "def f():\n    import deepspeed"),
    "free": ("tests/x.py", "import opensora.train.loop"),
    "a vendor in a benchmark": ("benchmarks/x.py", "import av"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_planted_bad_import_is_found(case: str, tmp_path: Path) -> None:
    place, source = BAD[case]
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize("case", GOOD)
def test_a_good_import_is_not(case: str, tmp_path: Path) -> None:
    place, source = GOOD[case]
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(source)
    assert violations(tmp_path) == []
