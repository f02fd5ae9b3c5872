"""What the published autoencoders and text encoders take on a device, by where they are configured to be: weights, and
what prompts need while they are encoded."""

from opensora.config.run import RunConfig
from opensora.models.text import TEXT_ENCODERS, TextConfig
from opensora.models.vae import AUTOENCODERS, AutoencoderConfig


def frozen_bytes(cfg: RunConfig, world: int = 1) -> int:
    """Weights of autoencoder and text encoder on a process of ``world``, as ``build_run`` loads them: where features
    are stored and nothing is validated, none."""
    if cfg.data.features and not cfg.validate.every:
        return 0
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


PROMPTS_TOGETHER = 8  # of which a text encoder makes features at once


def text_working_bytes(text: TextConfig, itemsize: int, pieces: int, prompts: int) -> int:
    """Bytes that encoding prompts takes on a device beside what ``encoder_bytes`` counts: weights that come for it, and
    the activations of one block of its largest model, with its attention's scores in fp32 and in the type of the
    features. CLIP-L is a fortieth of it."""
    kind = TEXT_ENCODERS[text.kind]
    if not kind.parameters or getattr(text, "device", "auto") == "cpu":
        return 0
    moved, block = kind.parameters * itemsize, kind.blocks
    if block is None:  # a CLIP, which is gathered or moved whole in the worst case
        return moved if getattr(text, "shard", False) or getattr(text, "offload", False) else 0
    tokens, together = kind.tokens(text) + block.read, min(prompts, PROMPTS_TOGETHER)
    scores = block.heads * tokens * tokens * (4 + 2 * itemsize)
    activations = together * (scores + tokens * (6 * block.width + 3 * block.hidden) * itemsize)
    if getattr(text, "shard", False):  # the block that runs and the next one, gathered, and what is outside of blocks
        return activations + (2 * block.parameters + block.outside) * itemsize
    return activations + (moved if getattr(text, "offload", False) else 0)


def text_flops(text: TextConfig, prompts: int) -> float:
    """Of encoding so many prompts; of an encoder without published sizes: none."""
    kind = TEXT_ENCODERS[text.kind]
    looked_up, read = (kind.blocks.outside, kind.blocks.read) if kind.blocks else (0, 0)
    return 2.0 * (kind.parameters - looked_up) * (kind.tokens(text) + read) * prompts
