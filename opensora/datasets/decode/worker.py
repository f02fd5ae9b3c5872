"""A decoding process: reads one window after another for the process that started it, and ends with it.

It is a fresh interpreter, not a fork, and never loads torch: it costs tens of megabytes, has none of the trainer's
locks, and may be killed at any time. ``opensora.datasets.decode.process`` is the other end.
"""

import faulthandler
import mmap
import os
import signal
import sys
import traceback
from math import prod
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np

from opensora.datasets.decode.api import DecodeError, probe, read_frames
from opensora.utils.signal_handler import NAMES, end_with_parent

IGNORED_SIGNALS = NAMES  # what asks a run to stop
ORPHAN_S = 60.0  # beyond the time limit of a sample: then nobody is there who would have killed this process

# What one process may hold beside the frames it hands over. What asks for more is damaged, or made to harm: a clip of
# 10 KB whose header counts 60 million frames wants 2 GB before its first packet.
MEMORY_BYTES = 1900 << 20

# What goes back: the shape of the frames, which lie in the shared memory, or the ``MediaInfo`` of a probe; why the file
# cannot be read; or the traceback of a mistake of ours.
Answer = tuple[Literal["frames", "facts", "unreadable", "mistake"], Any]


class SharedFrames:
    """A window of frames in memory that two processes see, behind an open file. It grows to the largest window and is
    used again and again: new memory would have to be cleared page by page, which takes as long as decoding."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._memory: mmap.mmap | None = None

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """The memory as uint8 of this shape; what was there before is overwritten by whoever writes."""
        size = prod(shape)
        if self._memory is None or len(self._memory) < size:
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, size)
            self._memory = mmap.mmap(self._file, os.fstat(self._file).st_size)
        return np.ndarray(shape, np.uint8, buffer=self._memory)


def main(argv: list[str]) -> None:
    """``argv``: file descriptors of the connection and of the shared memory."""
    for name in IGNORED_SIGNALS:  # the trainer decides when its decoders end
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)  # also while a decoder hangs
    _limit_memory()
    connection, shared = Connection(int(argv[0])), SharedFrames(int(argv[1]))
    silence = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    connection.send(None)
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        faulthandler.dump_traceback_later(request["timeout_s"] + ORPHAN_S, exit=True, file=silence)
        answer = _answer(request, shared)
        faulthandler.cancel_dump_traceback_later()
        try:
            connection.send(answer)
        except OSError:
            return


def _limit_memory() -> None:
    """Memory that is shared, as the frames are, does not count."""
    if sys.platform == "linux":  # elsewhere the limit is another one, or none
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(most, MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _answer(request: dict[str, Any], shared: SharedFrames) -> Answer:
    is_probe = request.pop("probe", False)
    try:
        if is_probe:
            return "facts", probe(**request)
        return "frames", read_frames(**request, allocate=shared.array).shape
    except DecodeError as error:
        return "unreadable", error.cause
    except MemoryError:
        return "unreadable", f"it asks for more than {MEMORY_BYTES >> 20} MiB of memory"
    except Exception:
        return "mistake", traceback.format_exc()


if __name__ == "__main__":
    main(sys.argv[1:])
