"""Text and image encoders cut over processes: memory for T5 falls with every process, as that for the model does."""

import torch
import torch.distributed as dist

from acceleration.blocks.module_offload import Visits
from acceleration.config import MeshConfig, PrecisionConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.comm_timer import WAITING
from acceleration.distributed.mesh import FSDP, Mesh
from acceleration.sharding import fsdp
from acceleration.sharding.precision import DTYPES
from opensora.assembly.initial_weights import FileSource
from opensora.models.base import TextEncoder
from opensora.models.image import ImageEncoder, ImageEncoderConfig, build_image_encoder
from opensora.models.text import TextConfig, build_text_encoder
from opensora.models.text.weights import EncoderFile, restore_buffers


class ShardedText:
    """Cuts encoders over all processes of a copy of the model, whatever they do with its tokens.

    A mesh of its own, because pieces go over the tensor axis as well, and what is sent is no part of a step's bytes.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        """Collective."""
        self._device = device
        cfg = MeshConfig(replicate=mesh["replicate"].degree, shard=-1)
        self._mesh = meshes.build(cfg, mesh.world_size, device)

    def place(self, file: EncoderFile, dtype: torch.dtype, *, offload: bool) -> None:
        """See ``Peers`` in opensora/models/text/transformers_encoder.py.

        Raises:
            UserError: a value that is no finite number, on every process.
        """
        kind = next(name for name, known in DTYPES.items() if known == dtype)
        precision = PrecisionConfig(compute=kind, reduce=kind, master=kind)  # type: ignore[arg-type]
        fsdp.shard(file.module, 3, precision, self._mesh, offload=offload)
        source = FileSource(file.file, file.key)
        fsdp.materialize(file.module, precision, torch.device("cpu") if offload else self._device, source)
        restore_buffers(file.module, self._device)
        source.check_values()

    def most(self, count: int) -> int:
        """See ``Peers``."""
        axis = self._mesh[FSDP]
        if axis.degree == 1:
            return count
        counts = torch.tensor(count, device=self._device)
        with WAITING.on("agreement on the prompts to encode"):
            dist.all_reduce(counts, dist.ReduceOp.MAX, group=axis.group)
        return int(counts)


def text_encoder_of(cfg: TextConfig, mesh: Mesh | None, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The text encoder of a run: cut over processes where ``text.shard`` says so, and moved out where ``text.offload``
    does. Collective, but without a mesh.

    Raises:
        UserError: as its kind.
    """
    peers = ShardedText(mesh, device) if mesh is not None and getattr(cfg, "shard", False) else None
    return build_text_encoder(cfg, device, dtype, peers, Visits)


def image_encoder_of(
    cfg: ImageEncoderConfig, mesh: Mesh | None, device: torch.device, dtype: torch.dtype
) -> ImageEncoder | None:
    """The image encoder of a run, where its section says; None: there is none. Collective, but without a mesh.

    Raises:
        UserError: as its kind.
    """
    peers = ShardedText(mesh, device) if mesh is not None and getattr(cfg, "shard", False) else None
    return build_image_encoder(cfg, device, dtype, peers, Visits)
