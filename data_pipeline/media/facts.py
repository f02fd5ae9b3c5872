"""What a container says of its video stream, by its packets; one frame is decoded for the rotation."""

from typing import Any

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from opensora.datasets.decode.common import Deadline, decoding
from opensora.datasets.decode.pyav_container import Opened, decode_packet, packets, video_stream
from opensora.datasets.decode.pyav_pixels import HDR_CURVES, stored_frame
from opensora.datasets.table.clip_storage import Source

_UNEVEN = 0.1  # of the usual distance of two frames


def read_facts(path: str, timeout_s: float) -> dict[str, Any]:
    """Columns of ``ProbeStage`` that no other reader gives.

    Raises:
        DecodeError: the file cannot be read.
    """
    source, deadline = Source(path, path), Deadline(path, timeout_s)
    with Opened(source) as container:
        stream = video_stream(source, container, threads=1)
        with decoding(path):
            facts = _of_container(container, stream)
        times, keys, turn = list[int](), 0, dict[str, Any]()
        for packet in packets(source, container, stream, deadline):
            with decoding(path):
                if packet.pts is not None and packet.size:
                    times.append(packet.pts)
                    keys += packet.is_keyframe
            if not turn:
                for frame in (decode_packet(source, packet, None) or ())[:1]:
                    stored = stored_frame(source, frame)
                    turn = {"rotation": _degrees(stored.turn), "hdr": HDR_CURVES.get(stored.curve, "")}
                    turn["pixel_format"] = stored.pixels
    return facts | turn | {"key_frames": keys, "variable_rate": _is_uneven(times)}


def _of_container(container: InputContainer, stream: VideoStream) -> dict[str, Any]:
    base = stream.time_base
    return {
        "container": container.format.name,
        "codec": stream.codec_context.codec.canonical_name,
        "time_base": str(base) if base else "",
        "video_streams": len(container.streams.video),
        "has_audio": bool(container.streams.audio),
        "bitrate": container.bit_rate or None,
    }


def _is_uneven(times: list[int]) -> bool:
    steps = np.diff(np.unique(np.array(times, dtype=np.float64)))
    if len(steps) < 2:
        return False
    usual = float(np.median(steps))
    return bool(np.mean(np.abs(steps - usual) > max(1.0, _UNEVEN * usual)) > 0.01)


def _degrees(turn: Any) -> int:
    """Clockwise, by which the stored picture is turned for display; a mirrored one as its turn alone."""
    if turn.transpose:
        return 270 if turn.flip_rows and not turn.flip_columns else 90
    return 180 if turn.flip_rows and turn.flip_columns else 0
