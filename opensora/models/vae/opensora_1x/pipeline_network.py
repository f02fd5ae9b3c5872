"""Both networks of Open-Sora 1.2's autoencoder in one module, with the names of ``VideoAutoencoderPipeline``."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opensora.models.vae.image_network import ImageSizes, image_network
from opensora.models.vae.opensora_1x.sd import SIZES
from opensora.models.vae.opensora_1x.temporal_network import TemporalSizes, TemporalVAE

STATISTICS = ("shift", "scale")


@dataclass(frozen=True, kw_only=True)
class PipelineSizes:
    """What a network is made of."""

    image: ImageSizes = SIZES
    temporal: TemporalSizes = field(default_factory=TemporalSizes)
    statistics: tuple[int, ...] = (1, 4, 1, 1, 1)  # shape of shift and scale; () where one number serves all channels


class SpatialVAE(nn.Module):
    """Holds the image autoencoder under the name that it was published with."""

    def __init__(self, sizes: ImageSizes) -> None:
        super().__init__()
        self.module = image_network(sizes)


class PipelineVAE(nn.Module):
    """Frames to image latents, these to latents, and back; latents are (z - shift) / scale."""

    shift: Tensor
    scale: Tensor

    def __init__(self, sizes: PipelineSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.spatial_vae = SpatialVAE(sizes.image)
        self.temporal_vae = TemporalVAE(sizes.temporal)
        for name in STATISTICS:
            self.register_buffer(name, torch.zeros(sizes.statistics) + (name == "scale"))

    @property
    def last_layer(self) -> Tensor:
        """The weight by whose gradients a discriminator's opinion is weighed: the temporal decoder's last."""
        weight: Tensor = self.temporal_vae.decoder.conv_out.conv.weight
        return weight
