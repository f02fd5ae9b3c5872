"""What a sampling job keeps on a device at least, part by part; a model is built on the meta device alone."""

from dataclasses import replace

from acceleration.distributed import mesh
from acceleration.sharding.precision import DTYPES
from opensora.config.run import SampleConfig
from opensora.inference.check import fit_option, least_bytes
from opensora.inference.find import Source
from opensora.models.families import count_parameters
from opensora.models.text import text_tokens
from opensora.models.vae import autoencoder_shape
from opensora.planner.encoder_memory import encoder_bytes


def memory_of(cfg: SampleConfig, source: Source, world: int) -> dict[str, int]:
    """Part -> bytes of a process of ``world``. Encoders are as large as the published ones.

    The model's weights and the text encoder's lie beside what denoising takes, or decoding; the autoencoder beside all.

    Raises:
        UserError: a size or length that cannot be sampled.
        ValueError: a mesh that does not fit so many processes.
    """
    mesh.resolve(cfg.parallel.mesh, world)
    itemsize, shape = DTYPES[cfg.precision].itemsize, autoencoder_shape(source.vae)
    option = fit_option("sampling", cfg.sampling, source.model, shape)
    model = 0 if cfg.parallel.offload == "parameters" else count_parameters(source.model) * itemsize // world
    autoencoder, text = encoder_bytes(source.vae, source.text, itemsize, max(1, world // cfg.parallel.mesh.replicate))
    every = least_bytes(
        option,
        source.model,
        shape,
        samples=cfg.batch_size,
        txt=text_tokens(source.text),
        itemsize=itemsize,
        parallel=replace(cfg.parallel, offload="parameters"),  # weights are counted above
        world_size=world,
    )
    return {"model": model, "text encoder": text, "autoencoder": autoencoder, "clips and activations": every}
