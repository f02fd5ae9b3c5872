"""Text in a picture, by PP-OCR (RapidOCR, which brings its models) on one core."""

from dataclasses import dataclass
from typing import Any

import numpy as np

_LARGEST = 0.5  # of the picture: its detector takes a whole picture without text for one box
_SETTINGS = {
    "Global.log_level": "critical",
    "Global.use_cls": False,  # which is for text that stands on its head
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    "Det.limit_type": "max",
}


@dataclass(frozen=True)
class Words:
    """A line that was read."""

    text: str
    score: float  # 0 to 1
    share: float  # of the picture's area that its box has


class TextReader:
    """One set of networks; it is not shared by threads."""

    def __init__(self, side: int) -> None:
        """``side``: pixels of the longer side that it sees."""
        import onnxruntime
        from rapidocr import RapidOCR

        onnxruntime.set_default_logger_severity(3)  # that there is no GPU is no news
        self._engine: Any = RapidOCR(params=_SETTINGS | {"Det.limit_side_len": side})

    def read(self, bgr: np.ndarray) -> list[Words]:
        """(h, w, 3) uint8. Without boxes of the size of the picture, which are never text."""
        found = self._engine(np.ascontiguousarray(bgr))
        if found.txts is None:
            return []
        area = bgr.shape[0] * bgr.shape[1]
        words = [
            Words(text.strip(), float(score), _area(np.asarray(box, np.float64)) / area)
            for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
        ]
        return [each for each in words if each.share <= _LARGEST]


def _area(box: np.ndarray) -> float:
    """Of a polygon: (k, 2)."""
    x, y = box[:, 0], box[:, 1]
    return float(abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2)
