"""HunyuanVideo: text that is refined first, then text and image in one attention."""

from opensora.models.hunyuan_video.config import SIZES, HunyuanVideoConfig
from opensora.models.hunyuan_video.model import FAMILY, HunyuanVideoModel

__all__ = ["FAMILY", "SIZES", "HunyuanVideoConfig", "HunyuanVideoModel"]
