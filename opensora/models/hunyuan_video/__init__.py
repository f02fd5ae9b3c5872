"""HunyuanVideo: an MMDiT with a token refiner."""

from opensora.models.hunyuan_video.config import SIZES, HunyuanVideoConfig
from opensora.models.hunyuan_video.model import FAMILY, HunyuanVideoModel

__all__ = ["FAMILY", "SIZES", "HunyuanVideoConfig", "HunyuanVideoModel"]
