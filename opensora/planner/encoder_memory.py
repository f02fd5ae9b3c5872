"""What the published autoencoders and text encoders take on a device, by where they are configured to be."""

from opensora.config.run import RunConfig
from opensora.models.text import TEXT_ENCODERS, TextConfig
from opensora.models.vae import AUTOENCODERS, AutoencoderConfig


def frozen_bytes(cfg: RunConfig, world: int = 1) -> int:
    """Weights of autoencoder and text encoder on a process of ``world``, as ``build_run`` loads them."""
    itemsize = 2 if cfg.parallel.precision.compute == "bf16" else 4
    pieces = max(1, world // cfg.parallel.mesh.replicate)
    return sum(encoder_bytes(cfg.vae, cfg.text, itemsize, pieces))


def encoder_bytes(vae: AutoencoderConfig, text: TextConfig, itemsize: int, pieces: int) -> tuple[int, int]:
    """Bytes on a device of the published autoencoder, and of the published text encoder where it is configured to be.

    ``pieces``: processes that a text encoder with ``shard`` is cut over. One that is moved out after use, or is on the
    CPU, leaves its memory to what comes after it.
    """
    whole = TEXT_ENCODERS[text.kind].parameters * itemsize
    if getattr(text, "device", "auto") == "cpu" or getattr(text, "offload", False):
        whole = 0
    elif getattr(text, "shard", False):
        whole = -(-whole // pieces)
    return AUTOENCODERS[vae.kind].parameters * itemsize, whole
