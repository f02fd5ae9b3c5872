"""Samples while training: the sampling pipeline over the model that is being trained, in its own layout."""

from acceleration.sharding import fsdp
from opensora.assembly.components import Components
from opensora.config.run import SampleConfig
from opensora.inference.pipeline import sample_jobs
from opensora.inference.prompts import read_jobs
from opensora.train.run import Run
from opensora.utils.console import announce


def sample_prompts(run: Run) -> None:
    """Write samples/step-XXXXXXXX/ with a clip per prompt and a contact sheet, from the live weights. Collective."""
    validate = run.cfg.validate
    encoders = run.prepare.encoders
    assert encoders.autoencoder is not None
    folder = run.cfg.folder / "samples" / f"step-{run.step:08d}"
    job = SampleConfig(
        weights=str(run.cfg.folder),
        prompts=validate.prompts,
        sampling=validate.sampling,
        save_dir=str(folder),
        overwrite=True,  # a run that was resumed makes the samples of a step again
        batch_size=len(validate.prompts),
    )
    parts = Components(
        model=run.engine.model,
        cfg=run.cfg.model,
        autoencoder=encoders.autoencoder,
        text_encoder=encoders.text_encoder,
        layout=run.prepare.layout,
        objective=run.cfg.objective,
        mesh=run.mesh,
        device=run.runtime.device,
        prompt_suffix=run.cfg.data.prompt_suffix,
        run_tiles=encoders.run_tiles,
    )
    run.enter("sample")
    with run.metrics.excluded("validate", run.mesh):
        files = sample_jobs(parts, job, read_jobs(job), quiet=True)
    fsdp.release(run.engine.model)
    announce(f"step {run.step}: sampled {', '.join(files[-1:])}")
