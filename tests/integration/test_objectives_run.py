"""The real commands with the objectives of Open-Sora 1.x: train with given frames and losses of samples, look at clips
that are held out, and sample what was saved with every solver that fits."""

from pathlib import Path

import pytest

from opensora.config.load import load_config
from opensora.config.run import RunConfig
from tests import factored_family
from tests.dist.harness import run_distributed
from tests.integration.test_factored_run import MODEL, losses, run_sample, run_train

OBJECTIVES = {
    "iddpm": ("objective={kind: iddpm, rescale_learned_sigmas: true}", ("ddpm", "ddim", "dpm_solver")),
    "flow": ("objective={kind: rectified_flow_v1, version: '1.3', use_timestep_transform: true}", ("euler",)),
}
TRAINING = [
    "conditioning={dropout: {text: 0.3}, masks: {random: 0.4, image_head: 0.2}}",
    "train.loss_reduction=samples",
    "train.log_every=1",
    "optim.lr=3.0e-3",
]
SAMPLING = "width: 32, height: 32, num_frames: 9, num_steps: 3, fps: 8, guidance: 3.0, cfg_channel: 3"


@pytest.fixture
def factored(config: Path) -> Path:
    """The configuration with the factored model in place of the MMDiT."""
    assert factored_family.KIND == "toy_factored"
    before, _, rest = config.read_text().partition("model:\n")
    path = config.parent / "factored.yaml"
    path.write_text(before + MODEL.replace("=", ": ") + "\n" + rest[rest.index("vae:") :])
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_train_and_sample(factored: Path, tmp_path: Path, name: str) -> None:
    objective, solvers = OBJECTIVES[name]
    folders, held_out = {}, f"validate={{every: 3, table: {load_config(RunConfig, factored).data.table}, samples: 4}}"
    for world, extra in ((2, []), (1, ["parallel.mesh.ulysses=1"])):
        folder = tmp_path / f"on{world}"
        argv = [str(factored), objective, *TRAINING, held_out, f"output={folder}", *extra]
        assert run_distributed(run_train, world, argv, timeout=400, init=False) == [0] * world
        folders[world] = folder / "run"
    assert losses(folders[2]) == pytest.approx(losses(folders[1]), rel=1e-9)
    saved = load_config(RunConfig, folders[2] / "config.yaml")
    assert saved.objective.kind in objective and saved.train.loss_reduction == "samples"
    made: dict[tuple[str, int], dict[str, bytes]] = {}
    for solver in solvers:
        for world in (1, 2) if solver == solvers[0] else (1,):
            job, out = tmp_path / "job.yaml", tmp_path / f"{solver}{world}"
            job.write_text(f"weights: {folders[2]}\nprompt: a red circle\n")
            option = f"sampling={{{SAMPLING}, solver: {solver}}}"
            argv = [str(job), f"save_dir={out}", "precision=fp64", option, f"parallel.mesh.ulysses={world}"]
            assert run_distributed(run_sample, world, argv, timeout=200, init=False) == [0] * world
            files = (file for file in out.rglob("*") if file.suffix in (".mp4", ".png"))
            made[solver, world] = {file.name: file.read_bytes() for file in files}
    assert made[solvers[0], 1] and made[solvers[0], 1] == made[solvers[0], 2]
    assert len({tuple(sorted(files.values())) for files in made.values()}) == len(solvers)
