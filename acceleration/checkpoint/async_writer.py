"""Saving while training goes on: a copy of this process's file in shared memory, and a process that writes it.

What stalls training is the copy. The writing process is not a fork (which would copy page tables, locks and CUDA state)
and imports no torch. It ends with the training process: the system kills it then, also while it is stopped.
"""

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acceleration.checkpoint import shard_file, writer_process
from acceleration.diagnostics.watchdog import UNTOUCHED, end

CLOSE_S = 10.0  # for an idle process to end by itself


class BackgroundWriter:
    """At most one file at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._memory: mmap.mmap | None = None
        self._handle = -1
        self._size = 0
        self._busy = False

    def start(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors and begin to write them; they may change as soon as this returns.

        Raises:
            OSError: no memory for the copy, or no process.
        """
        assert not self._busy
        header = shard_file.header(tensors)
        size = len(header) + sum(t.numel() * t.element_size() for t in tensors.values())
        memory = self._room(size)
        memory[: len(header)] = header
        image = torch.frombuffer(memory, dtype=torch.uint8)
        position = len(header)
        for tensor in tensors.values():
            flat = tensor.detach().contiguous().flatten().view(torch.uint8)
            image[position : position + flat.numel()].copy_(flat)
            position += flat.numel()
        process = self._running()
        request = {"path": str(path), "memory": f"/proc/{os.getpid()}/fd/{self._handle}", "size": size}
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except OSError:
            self._end()  # what it has of the request must not come before the next one
            raise
        self._busy = True

    def ready(self) -> bool:
        """Whether ``result`` would return at once."""
        process = self._process
        if process is None or process.stdout is None or process.poll() is not None:
            return True
        return bool(select.select([process.stdout], [], [], 0)[0])

    def result(self) -> dict[str, Any]:
        """Size and SHA-256 of what was written; waits for it.

        Raises:
            OSError: it could not be written, or the writing process died.
        """
        self._busy = False
        process = self._process
        line = process.stdout.readline() if process and process.stdout else ""
        if not line.endswith("\n"):
            raise OSError(f"the process that writes checkpoints died (exit code {self._end()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"]) if answer["errno"] else OSError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._end()

    def _end(self) -> int | None:
        """Exit code of the process, when it has ended."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):  # bytes that it never took
            process.stdin.close()
        process.stdout.close()
        if self._busy:  # with what nobody will commit
            process.kill()
            self._busy = False
        return end(process, CLOSE_S)

    def _room(self, size: int) -> mmap.mmap:
        """Memory that another process can read by a path, kept from save to save."""
        if size > self._size:
            if self._handle >= 0:
                self._memory, self._size = None, 0  # the old goes before the new comes
                os.close(self._handle)
                self._handle = -1
            self._handle = os.memfd_create("checkpoint") if hasattr(os, "memfd_create") else _unlinked_file()
            os.ftruncate(self._handle, size)
            self._memory, self._size = mmap.mmap(self._handle, size), size
        assert self._memory is not None
        return self._memory

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            # A signal for the training processes must not end a save half-way: a terminal sends it to a group, SLURM
            # to every process of a step. This one ends when its stdin does; the mask is inherited.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, UNTOUCHED)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, writer_process.__file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._process


def available() -> bool:
    """Whether a file of another process can be opened by its number, as on Linux."""
    return Path("/proc/self/fd").is_dir()


def _unlinked_file() -> int:
    handle, path = tempfile.mkstemp()
    os.unlink(path)
    return handle
